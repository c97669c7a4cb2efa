"""Whatever is done to the files of a checkpoint: seen, said, and the one before it used; nothing executed."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_segments import FakeRing

from mve import checkpoint, files
from mve.checkpoint import segments
from mve.types import UserError

CORRUPTIONS = 500
WAS_HERE = Path(tempfile.gettempdir()) / "mve-executed-this"


def two_checkpoints(folder: Path, offset: int) -> tuple[FakeRing, list[Any]]:
    """Of one run: 1500 and 2500 rows, in segments of 1024, and both trees."""
    ring, trees = FakeRing(4096), []
    ring.total = offset
    for count in (1500, 1000):
        ring.add(count)
        ring.save(folder)
        trees.append(checkpoint.restore(folder, ring.template)[0])
    return ring, trees


def corrupt(folder: Path, other: Path, draws: np.random.Generator) -> tuple[str, Path]:
    """One file of the newest checkpoint, in one of many ways; which, and the file."""
    newest = checkpoint.latest(folder)
    assert newest is not None
    rows = checkpoint.manifest.read(newest).rows
    assert rows is not None
    shared = [folder / segments.FOLDER / f"{each.sha256}.safetensors" for each in rows.segments]
    mine = [*newest.iterdir(), *shared]
    victim = mine[draws.integers(len(mine))]
    content = bytearray(victim.read_bytes())
    way = ("bit", "bits", "truncated", "longer", "empty", "missing", "swapped", "folder")[draws.integers(8)]
    if way in ("bit", "bits"):
        for at in draws.integers(len(content), size=1 if way == "bit" else 40):
            content[at] ^= 1 << draws.integers(8)
    elif way == "truncated":
        del content[draws.integers(1, len(content)) :]
    elif way == "longer":
        content += bytes(draws.integers(0, 256, draws.integers(1, 100), np.uint8))
    elif way == "empty":
        content.clear()
    elif way == "swapped":
        theirs = [
            p for p in [*other.rglob("*"), *folder.rglob("*")] if p.is_file() and p.suffix == victim.suffix
        ]
        content[:] = theirs[draws.integers(len(theirs))].read_bytes()
    if way == "missing":
        victim.unlink()
    elif way == "folder":
        victim.unlink()
        victim.mkdir()
    else:
        victim.write_bytes(bytes(content))
    return way, victim


def same(one: Any, other: Any) -> bool:
    names = ("reward", "obs")
    rows = [(a["replay"]["rows"], b["replay"]["rows"]) for a, b in [(one, other)]]
    return all(a[n].tobytes() == b[n].tobytes() for a, b in rows for n in names) and bool(
        (one["count"] == other["count"]).all()
    )


def test_none_of_five_hundred_corruptions_is_loaded_silently_nor_a_traceback(tmp_path: Path) -> None:
    ring, (older, newer) = two_checkpoints(tmp_path / "run", 0)
    two_checkpoints(tmp_path / "other", 7)
    draws, outcomes = np.random.default_rng(0), Counter[str]()
    for _ in range(CORRUPTIONS):
        folder = tmp_path / "corrupted"
        shutil.copytree(tmp_path / "run", folder)
        way, victim = corrupt(folder, tmp_path / "other", draws)
        unchanged = (
            victim.is_file()
            and victim.read_bytes() == (tmp_path / "run" / victim.relative_to(folder)).read_bytes()
        )
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            try:
                tree, facts = checkpoint.restore(folder, ring.template)
            except UserError as error:
                refused = str(error)
                outcomes[f"{way}: refused"] += 1
                assert "no usable checkpoint" in refused, (way, victim, refused)
                assert len(warned) == 2
                continue
            finally:
                shutil.rmtree(folder)
        if not warned:
            # Swapped with itself, or changed in nothing that means anything, such as a blank between names.
            assert unchanged or victim.suffix == ".json"
            assert same(tree, newer), (way, victim)
            outcomes[f"{way}: without effect"] += 1
        else:
            assert facts["num_env_steps"] == 1500
            assert same(tree, older), (way, victim)
            outcomes[f"{way}: the one before"] += 1
    assert outcomes.total() == CORRUPTIONS
    assert sum(n for what, n in outcomes.items() if what.endswith("without effect")) < CORRUPTIONS / 10
    assert sum(n for what, n in outcomes.items() if what.endswith("the one before")) > CORRUPTIONS / 2


AUDITED = """
import json, sys, warnings
from pathlib import Path
from mve import Learner
from mve.types import UserError

warnings.simplefilter("ignore")
REFUSED = ("pickle.find_class", "exec", "compile", "import", "os.system", "subprocess.Popen", "marshal.loads")
intact, *folders = (Path(name) for name in sys.argv[1:])

def load(folder):
    try:
        Learner.load(folder, quiet=True)
    except UserError as error:
        return str(error)
    return "loaded"

def hook(event, args):
    if watched is None:
        return
    if event in REFUSED:
        bad.append([event, str(args)[:200]])
    elif event == "open" and not isinstance(args[0], int):
        path = Path(args[0].decode() if isinstance(args[0], bytes) else args[0]).absolute()
        writes = isinstance(args[2], int) and args[2] & 3
        if watched not in (path, *path.parents) or writes:
            bad.append([event, str(args)[:200]])

# Whatever Python and JAX import and compile on their own account, they have done after two loads.
found, watched, bad = {"": [load(intact), load(intact), []]}, None, []
sys.addaudithook(hook)
for folder in (intact, *folders):
    bad, watched = [], folder
    said = load(folder)
    watched = None
    found[folder.name] = [said, bad]
print(json.dumps(found))
"""


class Evil:
    def __reduce__(self) -> Any:
        return eval, (f"open({str(WAS_HERE)!r}, 'w')",)


def as_pickle(folder: Path) -> None:
    for path in folder.rglob("*.safetensors"):
        path.write_bytes(pickle.dumps(Evil()))


def as_object_array(folder: Path) -> None:
    for path in folder.rglob("*.safetensors"):
        with path.open("wb") as file:
            np.savez(file, state=np.array([Evil()], object), allow_pickle=True)


def as_link(folder: Path) -> None:
    for path in folder.rglob("state.*"):
        path.unlink()
        path.symlink_to("/etc/passwd")


def as_folder_link(folder: Path) -> None:
    moved = folder.parent / f"{folder.name}-elsewhere"
    (folder / "checkpoints" / segments.FOLDER).rename(moved)
    (folder / "checkpoints" / segments.FOLDER).symlink_to(moved)


def as_checkpoints_link(folder: Path) -> None:
    moved = folder.parent / f"{folder.name}-checkpoints"
    (folder / "checkpoints").rename(moved)
    (folder / "checkpoints").symlink_to(moved)


def everywhere(text: str, *names: str) -> Callable[[Path], None]:
    def arrange(folder: Path) -> None:
        for name in names:
            for path in folder.rglob(name):
                path.write_text(text)

    return arrange


def outside(folder: Path) -> None:
    """A name that leads out, with a checksum that is right."""
    from test_checkpoint import sign

    for path in checkpoint.manifest.checkpoints(folder / "checkpoints"):
        rows = json.loads((path / "state.json").read_text())["rows"]
        rows["segments"] = [{"sha256": "../../../outside", "bytes": 1, "rows": 1}]
        sign(path, rows=rows)


def huge(folder: Path) -> None:
    """A replay of a million million rows, with a checksum that is right."""
    from test_checkpoint import sign

    for path in checkpoint.manifest.checkpoints(folder / "checkpoints"):
        said = json.loads((path / "state.json").read_text())
        said["facts"]["replay_rows"] = 10**12
        for name, tensor in said["tensors"].items():
            if name.startswith("replay.rows"):
                tensor["shape"][0] = 10**12
        sign(path, facts=said["facts"], tensors=said["tensors"])


def linked_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to("/etc/passwd")


MALICE = {
    "pickle": (as_pickle, "no usable checkpoint"),
    "object array": (as_object_array, "no usable checkpoint"),
    "links": (as_link, "no usable checkpoint"),
    "a linked replay": (as_folder_link, "no usable checkpoint"),
    "linked checkpoints": (as_checkpoints_link, "checkpoints is a link"),
    "a name that leads out": (outside, "no usable checkpoint"),
    "a huge shape": (huge, "GB of memory"),
    "deep nesting": (everywhere("[" * 200_000, "state.json"), "no usable checkpoint"),
    "a huge integer": (everywhere('{"format": ' + "9" * 10_000 + "}", "state.json"), "no usable checkpoint"),
    "not a number": (everywhere('{"format": NaN}', "state.json"), "no usable checkpoint"),
    "a linked config": (linked_config, "cannot read"),
    "a deep config": (everywhere('{"a":' * 100_000, "config.json"), "nested too deeply"),
    "a config of yaml": (everywhere("!!python/object/apply:os.system ['id']", "config.json"), "cannot read"),
    "a pickled config": (
        lambda folder: (folder / "config.json").write_bytes(pickle.dumps(Evil())),
        "cannot read",
    ),
    "a config of text": (everywhere("\"__import__('os')\"", "config.json"), "does not hold names"),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder; nothing has to be learned for it to be whole."""
    from mve import Learner

    folder = tmp_path_factory.mktemp("malice") / "run"
    Learner("Pendulum-v1", "sac", settings=["train.total_steps=50", "agent.hidden=[4]"], quiet=True).save(
        folder
    )
    return folder


@pytest.mark.slow
def test_of_malicious_files_nothing_is_executed_or_followed(trained: Path, tmp_path: Path) -> None:
    """Python reports every import, compilation and opening of a file to an audit hook."""
    for number, (arrange, _) in enumerate(MALICE.values()):
        shutil.copytree(trained, tmp_path / str(number))
        arrange(tmp_path / str(number))
    folders = [str(tmp_path / str(number)) for number in range(len(MALICE))]
    command = [sys.executable, "-c", AUDITED, str(trained), *folders]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout.splitlines()[-1])
    assert found.pop("") == ["loaded", "loaded", []]
    assert found.pop(trained.name) == ["loaded", []]
    for (kind, (_, says)), (said, bad) in zip(MALICE.items(), found.values(), strict=True):
        assert bad == [], kind
        assert says in said
    assert not WAS_HERE.exists()


@pytest.mark.parametrize("kind", MALICE)
def test_malicious_files_are_refused_in_one_line(kind: str, trained: Path, tmp_path: Path) -> None:
    from mve import Learner

    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    arrange, says = MALICE[kind]
    arrange(folder)
    warnings.simplefilter("ignore")  # pytest puts the filters back
    with pytest.raises(UserError) as error:
        Learner.load(folder, quiet=True)
    assert says in str(error.value)
    assert "\n" not in str(error.value)
    assert not WAS_HERE.exists()


def test_a_file_that_is_no_regular_one_is_not_waited_for(tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "state.json")
    for path, most in ((tmp_path / "state.json", 10), (tmp_path, 10)):
        with pytest.raises(OSError, match=r"regular|directory"):
            files.read(path, most)
    (tmp_path / "long").write_text("x" * 11)
    with pytest.raises(OSError, match="11 bytes, where at most 10"):
        files.read(tmp_path / "long", 10)
