"""Saving while training goes on: one behind at most, and a full disk is a warning until the end."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import subprocess
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import equinox as eqx
import numpy as np
import pytest
from test_checkpoint import assert_same, make_state, sign

from mve import Learner, checkpoint, loop
from mve.checkpoint import store
from mve.checkpoint.frozen import Frozen, freeze
from mve.checkpoint.writer import Writer
from mve.log import Appender, RunLog
from mve.types import UserError

LIMIT = 40_000  # bytes of a file


def frozen(step: int, size: int = 1) -> Frozen:
    return freeze(
        {"state": make_state(step), "more": np.zeros(size)}, {"num_env_steps": step, "evaluation": None}
    )


def restored(folder: Path, size: int = 1) -> tuple[Any, int]:
    template = {"state": make_state(), "more": np.zeros(size)}
    state, facts = checkpoint.restore(folder, lambda facts: template)
    return state["state"], facts["num_env_steps"]


def test_training_goes_on_while_one_is_written_and_waits_for_it_before_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go, write, order = threading.Event(), checkpoint.write, []

    def slow(frozen: Any) -> Any:
        assert go.wait(10)
        order.append(next(iter(frozen.values())).step)
        return write(frozen)

    monkeypatch.setattr(store, "write", slow)
    with Writer() as writer:
        writer.start({tmp_path: frozen(1)})
        order.append("training")
        writer.poll()  # not done: not waited for
        threading.Timer(0.1, go.set).start()
        writer.start({tmp_path: frozen(2)})
        assert order[:2] == ["training", 1]
    assert order == ["training", 1, 2]
    assert checkpoint.steps(tmp_path) == [1, 2]


def test_what_is_frozen_is_not_what_training_does_to_the_state_afterwards(tmp_path: Path) -> None:
    state = {"state": make_state(1), "more": np.zeros(1)}
    kept = freeze(state, {"num_env_steps": 1})
    state["more"] += 1
    state["state"].host[:] = -1
    state["state"].count.delete()  # as donation does
    checkpoint.write({tmp_path: kept})
    assert_same(restored(tmp_path)[0], make_state(1))


@contextlib.contextmanager
def small_files(limit: int = LIMIT) -> Iterator[None]:
    """The kernel refuses to let any file grow beyond this; that needs no rights."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_save_that_fails_is_a_warning_and_the_next_one_tries_again(tmp_path: Path) -> None:
    with Writer() as writer:
        writer.start({tmp_path: frozen(1, LIMIT)})
        writer.wait()
        with small_files():
            writer.start({tmp_path: frozen(2, LIMIT)})
            says = r"cannot write a checkpoint to .*: File too large; training goes on, .* saved is of step 1"
            with pytest.warns(UserWarning, match=says):
                writer.wait()
        assert [path.name for path in tmp_path.iterdir()] == ["step_000000000001"]
        assert restored(tmp_path, LIMIT)[1] == 1
        writer.start({tmp_path: frozen(3, LIMIT)})
    assert restored(tmp_path, LIMIT)[1] == 3


def save_in(folder: Path, step: int, then: Callable[[Writer], object]) -> None:
    with Writer() as writer:
        writer.start({folder: frozen(step, LIMIT)})
        then(writer)


def test_at_the_end_of_a_run_it_is_an_error_that_says_what_is_lost(tmp_path: Path) -> None:
    with small_files(), pytest.raises(UserError, match=r"checkpoint is missing: .*; nothing of this run"):
        save_in(tmp_path, 1, lambda writer: None)
    save_in(tmp_path, 2, Writer.wait)
    with small_files(), pytest.raises(UserError, match=r"checkpoint is missing: .* saved is of step 2"):
        save_in(tmp_path, 3, lambda writer: None)


@pytest.mark.filterwarnings("ignore")
def test_a_failure_that_was_said_is_still_an_error_at_the_end(tmp_path: Path) -> None:
    with small_files(), pytest.raises(UserError, match="checkpoint is missing"):
        save_in(tmp_path, 3, Writer.wait)


def test_where_another_error_ends_the_run_it_is_a_warning(tmp_path: Path) -> None:
    with small_files(), pytest.warns(UserWarning, match="missing"), pytest.raises(ZeroDivisionError):
        save_in(tmp_path, 3, lambda writer: 1 / 0)


def test_a_defect_in_the_thread_is_raised_at_the_next_save(tmp_path: Path) -> None:
    broken = Frozen({"num_env_steps": 1}, {"x": np.array(["text"])}, {})
    with Writer() as writer:
        writer.start({tmp_path: broken})
        with pytest.raises(TypeError, match="x has dtype"):
            writer.start({tmp_path: frozen(2)})


def test_records_never_hold_half_a_line(tmp_path: Path) -> None:
    with RunLog(tmp_path) as records:
        with small_files(300), warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            for step in range(20):
                records.record(step, {"loss": 1 / 3})
                records.evaluation(step, [1.5, 2.5], [3, 4])
        assert len(warned) == 2  # one for each file, not for each line
        assert "its lines are kept and tried again" in str(warned[0].message)
        content = (tmp_path / "metrics.jsonl").read_text()
        assert content.endswith("}\n")
        assert len(content) < 300
        records.record(20, {})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["time/total_timesteps"] for line in lines] == list(range(21))
    rows = (tmp_path / "evaluations.csv").read_text().splitlines()
    assert rows[1:] == [f"{step},{i},{1.5 + i},{3 + i}" for step in range(20) for i in range(2)]


def test_lines_that_never_fit_are_told_at_the_end(tmp_path: Path) -> None:
    appender = Appender(tmp_path / "x")
    appender.append("whole\n")
    with small_files(8):
        with pytest.warns(UserWarning, match="cannot write"):
            appender.append("two\nthree\n")
        with pytest.warns(UserWarning, match=r"lacks its last 2 lines: no room is left"):
            appender.close()
    assert (tmp_path / "x").read_text() == "whole\n"


def test_an_environment_that_cannot_be_put_back_begins_its_episode_anew(tmp_path: Path) -> None:
    settings = ["train.total_steps=50", "agent.hidden=[4]"]
    learner = Learner("Pendulum-v1", "sac", settings=settings, quiet=True)
    learner.run.collect(None, 0, 5)
    learner.save(tmp_path)
    assert Learner.load(tmp_path, quiet=True).run.env.num_steps == 5
    [path] = (tmp_path / "checkpoints").glob("step_*")
    facts = checkpoint.read_facts(path)
    facts["env"]["env"] = "Pendulum-v0"
    sign(path, facts=facts)
    with pytest.warns(UserWarning, match=r"it is of Pendulum-v0; .* its episode is begun anew"):
        loaded = Learner.load(tmp_path, quiet=True)
    assert (loaded.run.env.num_episodes, loaded.run.env.next_episode) == (1, 1)
    facts["run"]["seed"] = 1
    sign(path, facts=facts)
    with pytest.warns(UserWarning, match="it is of another run"), pytest.raises(UserError, match="no usable"):
        Learner.load(tmp_path, quiet=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of three megabytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or shutil.which("mount") is None or subprocess.run(command, check=False).returncode:
        pytest.skip("a small file system can only be made by root, where mounting is allowed")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def fill(disk: Path) -> Path:
    """Leave no room at all."""
    ballast = disk / "ballast"
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    return ballast


@pytest.fixture
def after_saves(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[int, Callable[[], object]]], None]:
    """Do something once so many checkpoints are on the disk."""

    def arrange(todo: dict[int, Callable[[], object]]) -> None:
        save, count = loop.Loop.save, [0]

        def counted(self: Any) -> None:
            save(self)
            count[0] += 1
            if count[0] in todo:
                with contextlib.suppress(UserError):
                    self.writer._thread.join()
                todo[count[0]]()

        monkeypatch.setattr(loop.Loop, "save", counted)

    return arrange


@pytest.mark.slow
@pytest.mark.parametrize("freed", [True, False])
def test_a_run_survives_a_full_disk(
    freed: bool, small_disk: Path, tmp_path: Path, after_saves: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from test_resume import INTERVAL, SMALL, STEPS, assert_the_same_run

    def learner(folder: Path) -> Learner:
        return Learner("Pendulum-v1", "sac", seed=3, run_dir=folder, settings=SMALL, quiet=True)

    straight = learner(tmp_path / "straight").learn()
    ballast = small_disk / "ballast"
    after_saves({1: lambda: fill(small_disk)} | ({2: ballast.unlink} if freed else {}))
    full = learner(small_disk / "run")
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        if freed:
            full.learn()
        else:
            with pytest.raises(
                UserError, match=rf"the last checkpoint is missing: .* saved is of step {INTERVAL}"
            ):
                full.learn()
    messages = [str(each.message) for each in warned]
    assert any(
        "No space left on device; it takes" in each and "training goes on" in each for each in messages
    )
    assert full.num_timesteps == STEPS
    assert eqx.tree_equal(full.progress, straight.progress)
    assert not list((small_disk / "run" / "checkpoints").glob(".writing*"))
    monkeypatch.undo()
    if not freed:
        for line in (small_disk / "run" / "metrics.jsonl").read_text().splitlines():
            json.loads(line)
        ballast.unlink()
        full = Learner.load(small_disk / "run", quiet=True)
        assert full.num_timesteps == INTERVAL
        full.learn(STEPS - INTERVAL)
    assert_the_same_run(straight, full)
