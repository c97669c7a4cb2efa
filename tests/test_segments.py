"""The rows of a replay on disk: shared by checkpoints, written once, and back in their slots to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from mve import checkpoint
from mve.checkpoint import segments
from mve.checkpoint.frozen import Ringed, freeze
from mve.checkpoint.segments import Ring, Shelf
from mve.files import DamagedError
from mve.types import UserError

PREFIX = "replay.rows"


class FakeRing:
    """A ring on the host whose rows can be told apart: row i holds i, and i times 1..3."""

    def __init__(self, capacity: int):
        self.arrays = {"reward": np.zeros(capacity, np.float32), "obs": np.zeros((capacity, 3), np.int32)}
        self.capacity, self.total, self.shelf, self.asked = capacity, 0, Shelf(), 0

    def add(self, count: int) -> None:
        rows = np.arange(self.total, self.total + count)
        slots = rows % self.capacity
        self.arrays["reward"][slots] = rows
        self.arrays["obs"][slots] = rows[:, None] * np.arange(1, 4)
        self.total += count

    def read(self, start: int, count: int) -> dict[str, np.ndarray]:
        self.asked += count
        assert start + count <= self.capacity
        return {name: array[start : start + count].copy() for name, array in self.arrays.items()}

    def save(self, folder: Path) -> Path:
        ring = Ring(self.arrays, self.total % self.capacity, min(self.total, self.capacity), self.read)
        rest = {"count": np.int64([self.total])}
        facts = {"num_env_steps": self.total}
        frozen = freeze(rest, facts, Ringed(PREFIX, ring, self.shelf))
        [path] = checkpoint.write({folder: frozen})
        return path

    def template(self, facts: Any) -> Any:
        rows = {name: np.zeros(array.shape, array.dtype) for name, array in self.arrays.items()}
        return {"count": np.zeros(1, np.int64), "replay": {"rows": rows}}

    def assert_restored(self, folder: Path) -> None:
        tree, _ = checkpoint.restore(folder, self.template)
        for name, array in tree["replay"]["rows"].items():
            assert array.dtype == self.arrays[name].dtype
            np.testing.assert_array_equal(array, self.arrays[name])


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four rows in a segment, or more where the ring has more than sixteen segments of four."""
    monkeypatch.setattr(segments, "FEWEST_ROWS", 4)
    monkeypatch.setattr(segments, "MOST_FILES", 16)


def names(folder: Path) -> set[str]:
    return {path.name for path in (folder / segments.FOLDER).iterdir()}


@pytest.mark.parametrize(
    ("capacity", "rows"),
    [(1, 1024), (5000, 1024), (524_288, 1024), (524_289, 2048), (1_000_000, 2048), (10**7, 32768)],
)
def test_the_number_of_files_is_bounded(capacity: int, rows: int) -> None:
    assert segments.rows_each(capacity) == rows
    assert -(-capacity // rows) <= segments.MOST_FILES or rows == segments.FEWEST_ROWS


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("capacity", [1, 4, 7, 16, 65])
def test_a_ring_comes_back_to_the_bit_whatever_was_added_between_saves(capacity: int, tmp_path: Path) -> None:
    ring, draws = FakeRing(capacity), np.random.default_rng(capacity)
    for _ in range(8):
        ring.add(int(draws.integers(0, capacity + 3)))
        ring.save(tmp_path)
        ring.assert_restored(tmp_path)
    newest = checkpoint.manifest.read(tmp_path / f"step_{ring.total:012d}").rows
    assert newest is not None
    assert sum(segment.rows for segment in newest.segments) == min(ring.total, capacity)


@pytest.mark.usefixtures("small")
def test_only_the_segments_that_new_rows_fall_into_are_written(tmp_path: Path) -> None:
    ring = FakeRing(32)
    ring.add(30)
    ring.save(tmp_path)
    assert ring.asked == 32
    before, ring.asked = names(tmp_path), 0
    ring.add(1)
    ring.save(tmp_path)
    assert ring.asked == 4
    assert len(names(tmp_path) - before) == 1
    ring.asked = 0
    ring.add(3)  # the last slot, and round to the first two
    ring.save(tmp_path)
    assert ring.asked == 8
    ring.asked = 0
    ring.save(tmp_path)  # nothing new
    assert ring.asked == 0
    ring.assert_restored(tmp_path)


@pytest.mark.usefixtures("small")
def test_another_process_writes_only_what_is_not_there_or_is_damaged(tmp_path: Path) -> None:
    ring = FakeRing(16)
    ring.add(14)
    ring.save(tmp_path)
    files = {path: path.stat().st_ino for path in (tmp_path / segments.FOLDER).iterdir()}
    damaged = sorted(files)[0]
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(bytes(content))
    ring.shelf = Shelf()
    ring.save(tmp_path)
    after = {path: path.stat().st_ino for path in (tmp_path / segments.FOLDER).iterdir()}
    assert [path for path in files if files[path] != after[path]] == [damaged]
    ring.assert_restored(tmp_path)


@pytest.mark.usefixtures("small")
def test_a_file_goes_when_no_checkpoint_names_it(tmp_path: Path) -> None:
    ring = FakeRing(8)
    for _ in range(6):
        ring.add(5)
        ring.save(tmp_path)
    named = [checkpoint.manifest.read(path).rows for path in checkpoint.manifest.checkpoints(tmp_path)]
    assert len(named) == 2
    assert names(tmp_path) == {f"{s.sha256}.safetensors" for rows in named if rows for s in rows.segments}
    (tmp_path / "step_000000000030" / "state.json").write_text("{")
    (tmp_path / segments.FOLDER / ".writing").write_text("cut short")
    kept = names(tmp_path) - {".writing"}
    ring.add(1)
    ring.save(tmp_path)
    assert kept <= names(tmp_path)  # what a damaged one shares is not known: it goes first
    ring.add(1)
    ring.save(tmp_path)
    assert ".writing" not in names(tmp_path)
    ring.assert_restored(tmp_path)


@pytest.mark.usefixtures("small")
def test_rows_on_disk_that_go_missing_are_told_and_written_again(tmp_path: Path) -> None:
    ring = FakeRing(16)
    ring.add(16)
    ring.save(tmp_path)
    lost = sorted((tmp_path / segments.FOLDER).iterdir())[2]
    lost.unlink()
    ring.add(1)
    if str(lost.stem) in {each.sha256 for each in ring.shelf.segments[1:]}:  # not the one written anew
        with pytest.raises(UserError, match="has been damaged"):
            ring.save(tmp_path)
    ring.save(tmp_path)
    ring.assert_restored(tmp_path)


def test_rows_of_another_shape_are_refused(tmp_path: Path) -> None:
    ring = FakeRing(8)
    ring.add(8)
    path = ring.save(tmp_path)
    rows = checkpoint.manifest.read(path).rows
    assert rows is not None
    for wrong in ({"reward": np.zeros(8)}, {**ring.arrays, "more": np.zeros(8)}, {"obs": ring.arrays["obs"]}):
        with pytest.raises(DamagedError, match="does not hold the rows described"):
            segments.get(tmp_path / segments.FOLDER, rows.segments, wrong)


def test_rows_come_from_the_device_by_slots() -> None:
    from mve import program, replay
    from mve.types import Transition

    ring = replay.init(8, 2, 1)
    rows = jax.tree.map(lambda x: np.arange(x.size, dtype=x.dtype).reshape(x.shape), ring.rows)
    stacked = jax.tree.map(lambda x: np.stack([x + 1, x]), rows)
    for slots in (
        program._slots(rows, np.int32(5), 3),
        program._slots_of(stacked, np.int32(1), np.int32(5), 3),
    ):
        assert isinstance(slots, Transition)
        for name, array in slots._asdict().items():
            np.testing.assert_array_equal(array, getattr(rows, name)[5:])
