"""The wheel that is built is the package that works."""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_built_wheel_installs_and_imports(tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip"]
    subprocess.run([*pip, "wheel", "--no-deps", "-q", "-w", str(tmp_path), str(ROOT)], check=True)
    (wheel,) = tmp_path.glob("mve-*.whl")
    venv.create(tmp_path / "fresh", with_pip=True)
    python = tmp_path / "fresh" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", str(wheel)], check=True)
    # The dependencies are those of the environment that runs the tests.
    here = "import sys; sys.path += " + repr([p for p in sys.path if "site-packages" in p])
    check = f"assert {str(tmp_path)!r} in mve.__file__; print(mve.__version__)"
    code = f"{here}; import mve.cli, mve.learner; {check}"
    done = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.strip() == "0.1.0"
