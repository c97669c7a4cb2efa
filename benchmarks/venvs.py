"""The peers' virtual environments: made on first use, each its own, kept in benchmarks/.venvs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

FOLDER = Path(__file__).parent / ".venvs"
SHARED = (
    "gymnasium",
    "mujoco",
    "numpy",
    "jax",
    "jaxlib",
)  # the same in all environments: one physics, one XLA
LOOK_UP_S, INSTALL_S = 120, 1800


@dataclass(frozen=True)
class Peer:
    """A library that is measured beside ours."""

    name: str
    requirements: tuple[str, ...]


PEERS = {
    "sb3": Peer("sb3", ("stable-baselines3>=2.4", "gymnasium[mujoco]>=1.1,<2")),
    "sbx": Peer("sbx", ("sbx-rl>=0.20", "gymnasium[mujoco]>=1.1,<2")),
}


class CannotInstall(Exception):
    """A peer that is left out, and why."""


def python_of(peer: Peer) -> Path:
    """The interpreter of the peer's environment, which is made if it is not there or not up to date."""
    folder = FOLDER / peer.name
    python, mark = folder / "bin" / "python", folder / "installed.json"
    wanted = {"requirements": list(peer.requirements), "constraints": _constraints()}
    if mark.exists() and json.loads(mark.read_text())["wanted"] == wanted:
        return python
    print(f"installing {peer.name} into {folder} ...", file=sys.stderr, flush=True)
    FOLDER.mkdir(exist_ok=True)
    _run([sys.executable, "-m", "venv", "--clear", str(folder)])
    constraints = folder / "constraints.txt"
    constraints.write_text("\n".join(wanted["constraints"]) + "\n")
    _pip(python, "install", "--quiet", "-c", str(constraints), *peer.requirements, *_cpu_torch(python))
    listed = json.loads(_pip(python, "list", "--format", "json"))
    versions = {package["name"]: package["version"] for package in listed}
    mark.write_text(json.dumps({"wanted": wanted, "versions": versions}, indent=1))
    return python


def versions_of(peer: Peer) -> dict[str, str]:
    """Of everything in the peer's environment."""
    return json.loads((FOLDER / peer.name / "installed.json").read_text())["versions"]


def _constraints() -> list[str]:
    return [f"{name}=={metadata.version(name)}" for name in SHARED]


def _cpu_torch(python: Path) -> list[str]:
    """The newest build of PyTorch without CUDA that pip can see, if it sees one.

    On Linux the default registry has the build with CUDA only (several GB), which computes on the CPU just
    as well; whoever has the smaller one in an index or folder that pip is told of (PIP_EXTRA_INDEX_URL,
    PIP_FIND_LINKS) gets that. Which it was is in the versions that are recorded.
    """
    try:
        listed = _pip(python, "index", "versions", "torch", seconds=LOOK_UP_S)
    except CannotInstall:
        return []
    builds = re.findall(r"\d[\w.]*\+cpu", listed)
    if not builds:
        print("  no CPU-only build of torch in sight: taking pip's default, maybe GBs", file=sys.stderr)
        return []
    return [f"torch=={builds[0]}"]


def _pip(python: Path, *arguments: str, seconds: int = INSTALL_S) -> str:
    return _run([str(python), "-m", "pip", "--disable-pip-version-check", *arguments], seconds)


def _run(command: Sequence[str], seconds: int = INSTALL_S) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CannotInstall(f"{' '.join(command[1:4])}: {type(error).__name__}") from error
    if done.returncode:
        last = ([line for line in done.stderr.splitlines() if "error" in line.lower()] or ["failed"])[-1]
        raise CannotInstall(last.strip())
    return done.stdout
