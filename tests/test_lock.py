"""One process at a time writes a run folder, whatever becomes of it."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import pytest
from test_learner import SAC, SMALL, Slide

from mve import Learner, lock
from mve.types import UserError

HOLDS = (
    "import sys, time; from pathlib import Path; from mve import lock\n"
    "with lock.held(Path(sys.argv[1])): print('held', flush=True); time.sleep(100)"
)


def test_a_folder_is_locked_once_and_free_again_afterwards(tmp_path: Path) -> None:
    with lock.held(tmp_path / "run"):
        facts = json.loads((tmp_path / "run" / lock.LOCK).read_text())
        assert facts["pid"] == os.getpid()
        with (
            pytest.raises(UserError, match="is being written by this process, since"),
            lock.held(tmp_path / "run"),
        ):
            pass
    assert list((tmp_path / "run").iterdir()) == []
    with lock.held(tmp_path / "run"):
        pass


def test_another_process_is_named_and_its_death_frees_the_folder(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    argv = [sys.executable, "-c", HOLDS, str(tmp_path)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, env=environment) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(
            UserError, match=f"is being written by process {holder.pid} on .*, since .*; stop"
        ):
            Learner(Slide(), "mve-sac", run_dir=tmp_path, settings=SMALL, quiet=True).learn(220)
        holder.kill()
    assert (tmp_path / lock.LOCK).exists()  # nobody could remove it, and it locks nothing
    with lock.held(tmp_path):
        pass


def test_a_lock_removed_while_it_is_waited_for_is_not_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Released between another's opening and locking: what is locked then is no longer in the folder."""
    flock, removed = lock.fcntl.flock, []

    def late(handle: int, how: int) -> None:
        if not removed:
            removed.append((tmp_path / lock.LOCK).unlink())
        flock(handle, how)

    monkeypatch.setattr(lock.fcntl, "flock", late)
    with lock.held(tmp_path):
        assert (tmp_path / lock.LOCK).exists()
    assert len(removed) == 1


def test_a_damaged_lock_file_still_locks(tmp_path: Path) -> None:
    with lock.held(tmp_path):
        (tmp_path / lock.LOCK).write_text("nonsense")
        with pytest.raises(UserError, match="another process"), lock.held(tmp_path):
            pass


def test_a_full_disk_is_no_reason_to_keep_a_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*given: object) -> NoReturn:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", full)
        with lock.held(tmp_path):
            pass
    with lock.held(tmp_path):
        pass


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write the run folder"), lock.held(tmp_path / "file" / "run"):
        pass


def test_a_run_that_has_gone_on_since_it_was_loaded_is_not_set_back(tmp_path: Path) -> None:
    first = Learner(Slide(), "sac", run_dir=tmp_path / "run", settings=SAC, quiet=True).learn(80)
    second = Learner.load(tmp_path / "run", Slide(), quiet=True)
    first.learn(20)
    with pytest.raises(UserError, match="has gone on since it was loaded"):
        second.learn(20)
    assert first.learn(20).num_timesteps == 120
