"""The rows of a ring on disk: immutable files of neighbouring slots, shared by the checkpoints of a run.

    checkpoints/replay/SHA256.safetensors    slots i*n .. (i+1)*n - 1 as they were at some step

A checkpoint names a file for every n slots that are filled, n being 2048 for a million. A save after a
thousand new rows writes the one or two files that these fall into, and names the others again. A file's name
is its checksum: what is there is never written over, and no name can lead out of the folder.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mve import files
from mve.files import DamagedError, Written
from mve.types import Positive

FOLDER = "replay"
MOST_FILES, FEWEST_ROWS = 512, 1024
WRITING = ".writing"

Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Segment(Written):
    """One file, and how many rows it has."""

    rows: Positive


class Ring(NamedTuple):
    """The rows of a replay, and how to copy `count` slots from `start` on to the host."""

    kinds: Mapping[str, Any]  # shape and dtype of every array, the first axis being the capacity
    position: int  # slot that is written next
    size: int  # slots that are filled, the first ones
    read: Callable[[int, int], Arrays]

    @property
    def capacity(self) -> int:
        return next(iter(self.kinds.values())).shape[0]


class Changed(NamedTuple):
    """What a save has to write: slots on the host, by the number of their segment; and all that stands."""

    rows: dict[int, dict[str, np.ndarray]]
    standing: dict[int, Segment]


def rows_each(capacity: int) -> int:
    """Slots in a segment: few, for a save writes whole ones, yet not so few that there are many files."""
    return max(FEWEST_ROWS, 1 << (max(capacity - 1, 0) // MOST_FILES).bit_length())


@dataclass
class Shelf:
    """What the checkpoints of one run, written by this process, have on disk of a ring that only grows."""

    capacity: int = 0
    total: int = 0  # rows ever added, when the last one was written
    segments: tuple[Segment, ...] = ()
    sound: set[str] = field(default_factory=set)  # files that this process wrote or has read

    def changed(self, ring: Ring, total: int) -> Changed:
        """The slots written since the last save, copied; `total` counts the rows ever added."""
        each, new = rows_each(ring.capacity), total - self.total
        numbers = range(-(-ring.size // each))
        if ring.capacity == self.capacity and 0 <= new < ring.capacity:
            slots = np.arange(ring.position - new, ring.position) % ring.capacity
            touched = set(np.unique(slots // each).tolist())
        else:
            touched = set(numbers)
        touched |= set(numbers[len(self.segments) :])
        rows = {}
        for number in sorted(touched & set(numbers)):
            start = number * each
            # Whole segments are asked for, filled or not: every length would be a compilation of its own.
            copied = ring.read(start, min(each, ring.capacity - start))
            rows[number] = {name: array[: ring.size - start] for name, array in copied.items()}
        return Changed(rows, {n: self.segments[n] for n in numbers if n not in rows})

    def wrote(self, capacity: int, total: int, segments: Sequence[Segment]) -> None:
        """A checkpoint with these segments is in place."""
        self.capacity, self.total, self.segments = capacity, total, tuple(segments)

    def put(self, folder: Path, changed: Changed) -> tuple[list[Segment], list[Path]]:
        """All segments in order, and the files that are new; OSError leaves none of those."""
        for standing in changed.standing.values():
            path = _path(folder, standing)
            if not path.is_file() or path.stat().st_size != standing.bytes:
                self.segments = ()  # the next save writes all
                raise OSError(f"{path} has been damaged")
        segments, new = dict(changed.standing), []
        try:
            for number, rows in changed.rows.items():
                segments[number], path = self._put_one(folder, rows)
                new += [path] if path else []
        except BaseException:
            discard(new)
            raise
        files.sync(folder)
        return [segments[number] for number in sorted(segments)], new

    def _put_one(self, folder: Path, rows: Arrays) -> tuple[Segment, Path | None]:
        """Its file, unless that is there already."""
        chunks = files.packed(rows)
        written = files.digest(chunks)
        segment = Segment(written.sha256, written.bytes, len(next(iter(rows.values()))))
        path, writing = _path(folder, segment), folder / WRITING
        if self._holds(path, segment):
            return segment, None
        try:
            writing.unlink(missing_ok=True)
            files.write(writing, chunks)
            writing.replace(path)
        except BaseException:
            discard([writing])
            raise
        self.sound.add(segment.sha256)
        return segment, path

    def _holds(self, path: Path, segment: Segment) -> bool:
        """What another process wrote may have been damaged since: it is read once."""
        if not path.exists() or segment.sha256 in self.sound:
            return path.exists()
        with contextlib.suppress(DamagedError):
            files.read_tensors(path, segment)
            self.sound.add(segment.sha256)
        return segment.sha256 in self.sound


def get(folder: Path, segments: Iterable[Segment], rows: Mapping[str, np.ndarray]) -> None:
    """Read the segments into the first rows of these arrays, one by name for each array of a file.

    DamagedError if a file is not what it was, or is of other names, shapes or dtypes.
    """
    if folder.is_symlink():
        raise DamagedError(f"{folder.name} is a link out of the folder")
    start = 0
    for segment in segments:
        found = files.read_tensors(_path(folder, segment), segment)
        end = start + segment.rows
        wanted = {name: (array.dtype, array[start:end].shape) for name, array in rows.items()}
        if {name: (array.dtype, array.shape) for name, array in found.items()} != wanted:
            raise DamagedError(f"{segment.sha256[:8]} of {folder.name} does not hold the rows described")
        for name, array in found.items():
            rows[name][start:end] = array
        start = end


def sweep(folder: Path, named: Iterable[Segment]) -> None:
    """Drop every file that no checkpoint names."""
    if folder.is_symlink() or not folder.is_dir():
        return
    kept = {_path(folder, segment) for segment in named}
    discard(path for path in folder.iterdir() if path not in kept)


def discard(paths: Iterable[Path]) -> None:
    """Delete files if that can be done."""
    for path in paths:
        with contextlib.suppress(OSError):
            path.unlink()


def _path(folder: Path, segment: Segment) -> Path:
    return folder / f"{segment.sha256}.safetensors"
