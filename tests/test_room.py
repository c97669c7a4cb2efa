"""Whether a run fits is said before it starts: what it needs, what is free, which setting to change."""

from __future__ import annotations

import os
from pathlib import Path

import jax
import pytest
from test_lock import SAC, Slide

from mve import Learner, room, seeds
from mve.run import Run
from mve.state import fresh_state
from mve.types import UserError


@pytest.fixture(scope="module", params=["sac", "mve-sac", "dhmbpo"])
def run(request: pytest.FixtureRequest) -> Run:
    small = []
    if request.param == "dhmbpo":
        small = ["imagination.starts=32", "dynamics.weight_decay_by_layer=[]", "train.learning_starts=1000"]
        small += ["dynamics.learning_starts=1000"]
    settings = ["agent.hidden=[32,32]", "dynamics.hidden=[32,32]", "train.total_steps=5000", *small]
    return Learner(Slide(), request.param, settings=settings, quiet=True).run


def test_what_is_estimated_is_what_is_allocated(run: Run) -> None:
    state = jax.eval_shape(lambda: fresh_state(run.recipe, run.capacity(), 0))
    size = lambda tree: sum(x.size * 4 for x in jax.tree.leaves(tree))  # noqa: E731
    parts = room.needed(run).parts
    assert parts[room.REPLAY] == size(state.replay.rows)
    assert parts[room.IMAGINED] == (0 if state.imagined is None else size(state.imagined.rows))
    networks = size((state.model, state.agent))
    assert 0.9 * networks <= parts[room.NETWORKS] <= 1.5 * networks


def test_seeds_multiply(run: Run) -> None:
    one, eight = room.needed(run), room.needed(run, seeds=8)
    assert eight.memory == 8 * one.memory
    assert eight.saved == 8 * one.saved


def test_a_run_that_cannot_fit_is_refused_with_the_setting_to_change(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs = room.needed(run)
    assert room.check(run, tmp_path).startswith("memory: ")
    monkeypatch.setattr(room, "free_host_bytes", lambda: needs.memory - 1)
    with pytest.raises(UserError, match=r"does not fit: memory: .* of .* free; lower .*\(replay ") as caught:
        room.check(run, tmp_path)
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(room, "free_host_bytes", lambda: needs.memory * 10 // 9)
    with pytest.warns(RuntimeWarning, match="memory: .* free; lower"):
        room.check(run, tmp_path)
    with pytest.raises(UserError, match="train fewer seeds at once"):
        room.check(run, tmp_path, seeds=2)


def test_a_disk_that_holds_no_checkpoint_is_refused(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "free_disk_bytes", lambda folder: room.needed(run).saved - 1)
    with pytest.raises(UserError, match=r"disk: .* another --run-dir"):
        room.check(run, tmp_path)


def test_what_a_run_has_already_is_free_to_it(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next checkpoint takes the place of the one before, and what was allocated is not so again."""
    wants = room.needed(run)
    monkeypatch.setattr(room, "free_disk_bytes", lambda folder: 1000)
    monkeypatch.setattr(room, "free_host_bytes", lambda: 1000)
    with pytest.raises(UserError, match="does not fit: memory"):
        room.check(run, tmp_path)
    with pytest.raises(UserError, match="does not fit: disk"):
        room.check(run, tmp_path, held=2 * wants.memory)
    saved = tmp_path / "seed-0" / "checkpoints" / "000100" / "replay.safetensors"
    saved.parent.mkdir(parents=True)
    saved.write_bytes(b"")
    os.truncate(saved, wants.disk)
    saved.with_name("same").hardlink_to(saved)
    with pytest.warns(RuntimeWarning, match="disk"):
        room.check(run, tmp_path, held=2 * wants.memory)


def test_an_accelerators_memory_is_asked_for_where_there_is_one(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "free_device_bytes", lambda: 1000)
    with pytest.raises(UserError, match=r"device memory: .* of 1 kB free"):
        room.check(run, tmp_path)


def test_nothing_is_allocated_for_a_run_that_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = [*SAC, "train.total_steps=1000000000", "replay.capacity=1000000000000"]
    monkeypatch.setattr(room, "free_host_bytes", lambda: 10**9)
    with pytest.raises(UserError, match=r"does not fit: memory: 40 GB of 1 GB free; lower replay.capacity"):
        Learner(Slide(), "sac", settings=settings)
    with pytest.raises(UserError, match="fewer seeds"):
        seeds.create(Slide(), "sac", seeds=range(100), settings=[*SAC, "train.total_steps=1000000"])


def test_the_limits_of_a_control_group_are_read(tmp_path: Path) -> None:
    (tmp_path / "memory.stat").write_text("anon 5\ninactive_file 300\n")
    (tmp_path / "memory.current").write_text("1000\n")
    (tmp_path / "memory.max").write_text("5000\n")
    assert room._control_group(str(tmp_path)) == 5000 - (1000 - 300)
    (tmp_path / "memory.max").write_text("max\n")
    assert room._tried(lambda: room._control_group(str(tmp_path))) is None
    assert room._tried(lambda: room._control_group_1(str(tmp_path))) is None
    assert (room.free_host_bytes() or 0) > 0
    assert (room.free_disk_bytes(tmp_path / "not" / "there") or 0) > 0
