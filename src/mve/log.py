"""The run folder's records.

    metrics.jsonl      one record per line                 {"time/total_timesteps": 1000, "model/loss": 0.1}
    evaluations.csv    one row per evaluation episode      step,episode,return,length
    versions.json      what made the run                   mujoco.log    MuJoCo's own warnings
    events.log         what went wrong, if anything did

The files are the record; the console (`mve.display`) is a view of it.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import math
import os
import platform
import subprocess
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any, SupportsFloat

import jax
import numpy as np

from mve import files
from mve.types import Json, UserError

METRICS, EVALUATIONS, VERSIONS, MUJOCO_LOG = "metrics.jsonl", "evaluations.csv", "versions.json", "mujoco.log"
EVENTS = "events.log"
STEP = "time/total_timesteps"
COLUMNS = ("step", "episode", "return", "length")
KINDS = (np.int64, np.int64, np.float64, np.int64)
PACKAGES = ("numpy", "jax", "jaxlib", "equinox", "optax", "gymnasium", "mujoco", "dm-control")


class Appender:
    """Appends whole lines to a file, or, where the disk is full, none: they wait for the next time."""

    def __init__(self, path: Path):
        self._path, self._waiting = path, b""
        self._file = path.open("ab", buffering=0)

    @property
    def is_empty(self) -> bool:
        return self._file.tell() == 0

    def append(self, text: str) -> None:
        """Some lines; a warning if the file begins to refuse them."""
        had_to_wait, self._waiting = bool(self._waiting), self._waiting + text.encode()
        if (fault := self._write()) and not had_to_wait:
            warnings.warn(
                f"cannot write {self._path}: {fault}; its lines are kept and tried again", stacklevel=3
            )

    def _write(self) -> str | None:
        """Why what waits has to wait on."""
        end = self._file.seek(0, os.SEEK_END)
        try:
            written = self._file.write(self._waiting)
            if written == len(self._waiting):
                self._waiting = b""
                return None
            fault = "no room is left"
        except OSError as error:
            fault = error.strerror or str(error)
        with contextlib.suppress(OSError):
            self._file.truncate(end)
        return fault

    def close(self) -> None:
        if self._waiting and (fault := self._write()):
            lines = self._waiting.count(b"\n")
            warnings.warn(f"{self._path} lacks its last {lines} lines: {fault}", stacklevel=3)
        self._file.close()


class RunLog:
    """Appends to a run folder's records."""

    def __init__(self, folder: Path):
        self._folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._metrics, self._evaluations = Appender(folder / METRICS), Appender(folder / EVALUATIONS)
        except OSError as error:
            raise _cannot_write(folder, error) from error
        if self._evaluations.is_empty:
            self._append_rows([COLUMNS])

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._metrics.close()
        self._evaluations.close()

    def record(self, step: int, metrics: Mapping[str, SupportsFloat]) -> None:
        """One line of metrics.jsonl; what is not finite becomes null."""
        line = {STEP: int(step), **{name: _number(value) for name, value in metrics.items()}}
        self._metrics.append(json.dumps(line) + "\n")

    def evaluation(
        self, step: int, returns: Sequence[float] | np.ndarray, lengths: Sequence[int] | np.ndarray
    ) -> None:
        """One row of evaluations.csv per episode."""
        self._append_rows(
            (int(step), episode, float(ret), int(length))
            for episode, (ret, length) in enumerate(zip(returns, lengths, strict=True))
        )

    def event(self, text: str) -> None:
        """What went wrong and when, for whoever looks later; a line each, never taken back."""
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        with contextlib.suppress(OSError), (self._folder / EVENTS).open("a", encoding="utf-8") as file:
            file.writelines(f"{now} {line}\n" for line in text.splitlines())

    def _append_rows(self, rows: Any) -> None:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(rows)
        self._evaluations.append(text.getvalue())

    @staticmethod
    def truncate(folder: Path, step: int) -> None:
        """Forget what was recorded after `step`, and a line cut short: a resumed run repeats no row."""
        try:
            if (path := folder / METRICS).exists():
                records = [record for record in _records(path) if record[STEP] <= step]
                _write_text(path, "".join(json.dumps(record) + "\n" for record in records))
            if (path := folder / EVALUATIONS).exists():
                rows = [row for row in _rows(path) if row[0] <= step]
                _write_text(path, "".join(",".join(map(str, row)) + "\n" for row in [COLUMNS, *rows]))
        except OSError as error:
            raise _cannot_write(folder, error) from error


def _cannot_write(folder: Path, error: OSError) -> UserError:
    return UserError(f"cannot write the records in {folder}: {error.strerror or error}")


def _number(value: Any) -> float | int | None:
    if isinstance(value, (int, np.integer)):
        return int(value)
    # Nine digits: all that a float32 has.
    return float(f"{float(value):.9g}") if math.isfinite(float(value)) else None


def _records(path: Path) -> list[Json]:
    """Whole records only: the last line of a run that is still writing, or was killed, may be cut short."""
    records = []
    for line in _text(path).splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            records.append(json.loads(line))
    return [record for record in records if isinstance(record, dict) and isinstance(record.get(STEP), int)]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise _damaged(path, f"byte {error.start} is not text") from error


def _damaged(path: Path, why: str) -> UserError:
    return UserError(f"{path} is damaged: {why}; mend it, or remove it: checkpoints do not need it")


def _rows(path: Path) -> list[tuple[Any, ...]]:
    # A row without its line end may have lost digits, so it is not trusted either.
    whole, _, _ = _text(path).rpartition("\n")
    rows = []
    for row in csv.reader(whole.splitlines()[1:]):
        if len(row) == len(COLUMNS):
            try:
                rows.append(tuple(kind(cell) for kind, cell in zip(KINDS, row, strict=True)))
            except ValueError as error:
                raise _damaged(path, f"{','.join(row)!r} is not {','.join(COLUMNS)}") from error
    return rows


def read_metrics(folder: Path) -> dict[str, np.ndarray]:
    """Columns of metrics.jsonl, NaN where a record lacks the name."""
    if not (folder / METRICS).is_file():
        raise UserError(f"{folder} is not a run folder: it has no {METRICS}")
    records = _records(folder / METRICS)
    names = dict.fromkeys(name for record in records for name in record)
    try:
        return {name: np.array([record.get(name) for record in records], np.float64) for name in names}
    except (TypeError, ValueError) as error:
        raise _damaged(folder / METRICS, str(error)) from error


def read_evaluations(folder: Path) -> dict[str, np.ndarray]:
    """Columns of evaluations.csv: step, episode, return, length."""
    if not (folder / EVALUATIONS).is_file():
        raise UserError(f"{folder} is not a run folder: it has no {EVALUATIONS}")
    rows = _rows(folder / EVALUATIONS)
    return {
        name: np.array([row[i] for row in rows], kind)
        for i, (name, kind) in enumerate(zip(COLUMNS, KINDS, strict=True))
    }


def write_json(path: Path, data: Json) -> None:
    """Whole or not at all."""
    _write_text(path, json.dumps(data, indent=2, allow_nan=False) + "\n")


def read_json(path: Path, what: str = "run folder") -> Json:
    """A JSON file of a folder that is a `what`; one clear line if it is not there or not whole."""
    try:
        data = files.parse(files.read(path, files.LARGEST_JSON))
        if not isinstance(data, dict):
            raise ValueError("it does not hold names and values")
        return data
    except (FileNotFoundError, NotADirectoryError) as error:
        reason = f"it has no {path.name}" if path.parent.is_dir() else "there is no such folder"
        raise UserError(f"{path.parent} is not a {what}: {reason}") from error
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise UserError(f"cannot read {path}: {why}") from error


def _write_text(path: Path, text: str) -> None:
    written = path.with_name(f".{path.name}.writing")
    with written.open("w", encoding="utf-8", newline="") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    written.replace(path)


def versions() -> Json:
    """What a result depends on beside the configuration."""
    return {
        "mve": _version("mve"),
        **_git(Path(__file__).parents[2]),
        "python": platform.python_version(),
        "platform": platform.platform(),
        **{name: _version(name) for name in PACKAGES},
        "devices": [{"platform": d.platform, "kind": d.device_kind} for d in jax.devices()],
    }


def write_versions(folder: Path) -> None:
    write_json(folder / VERSIONS, versions())


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git(root: Path) -> Json:
    """Commit of the package's own checkout, and whether files differ from it; None where it is not one."""
    unknown = {"git_commit": None, "git_dirty": None}
    if not (root / ".git").exists():
        return unknown

    def git(*arguments: str) -> str:
        command = ("git", "-C", str(root), *arguments)
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        return {"git_commit": git("rev-parse", "HEAD"), "git_dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return unknown


@contextlib.contextmanager
def capture_mujoco_warnings(folder: Path | None) -> Iterator[None]:
    """MuJoCo's C warnings go to `folder/mujoco.log`, or nowhere if that is None, for the whole process.

    Not to stderr, nor to a MUJOCO_LOG.TXT in whatever folder the user stands in.
    """
    try:
        import mujoco
    except ImportError:
        yield
        return

    def write(message: str) -> None:
        # Called from C, where an exception has nowhere to go.
        if folder is not None:
            with contextlib.suppress(OSError), (folder / MUJOCO_LOG).open("a", encoding="utf-8") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {message}\n")

    native: Any = mujoco  # its C functions are not in the type stubs
    previous = native.get_mju_user_warning()
    native.set_mju_user_warning(write)
    try:
        yield
    finally:
        native.set_mju_user_warning(previous)
