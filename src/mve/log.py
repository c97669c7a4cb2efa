"""The run folder's records, and what the person who waits sees of them.

    metrics.jsonl      one record per line                 {"time/total_timesteps": 1000, "model/loss": 0.1}
    evaluations.csv    one row per evaluation episode      step,episode,return,length
    versions.json      what made the run                   mujoco.log    MuJoCo's own warnings

The files are the record; the console is a view of it, on stderr: stdout is for results.
"""

from __future__ import annotations

import contextlib
import csv
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any, SupportsFloat

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column

from mve.types import Json, UserError

METRICS, EVALUATIONS, VERSIONS, MUJOCO_LOG = "metrics.jsonl", "evaluations.csv", "versions.json", "mujoco.log"
STEP = "time/total_timesteps"
COLUMNS = ("step", "episode", "return", "length")
PACKAGES = ("numpy", "jax", "jaxlib", "equinox", "optax", "gymnasium", "mujoco", "dm-control")
WIDE = 130  # columns of a terminal with room for a bar
RATE_WINDOW_S = 30.0  # steps/s is that of the last half minute: random warm-up steps cost next to nothing


class RunLog:
    """Appends to a run folder's records and shows how the run goes.

    On a terminal one live line; elsewhere one line per evaluation; nothing if `quiet`.
    """

    def __init__(self, folder: Path, total_steps: int, *, quiet: bool = False):
        folder.mkdir(parents=True, exist_ok=True)
        self._total_steps = total_steps
        self._metrics = (folder / METRICS).open("a", encoding="utf-8")
        self._evaluations = (folder / EVALUATIONS).open("a", encoding="utf-8", newline="")
        if self._evaluations.tell() == 0:
            self._append_rows([COLUMNS])
        self._fields: dict[str, SupportsFloat | str] = {}
        self._marks: deque[tuple[float, int]] = deque()
        console = Console(stderr=True)
        self._quiet = quiet
        self._live = None if quiet or not console.is_terminal else _live_line(console, total_steps)

    def __enter__(self) -> RunLog:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()
        self._metrics.close()
        self._evaluations.close()

    def record(self, step: int, metrics: Mapping[str, SupportsFloat]) -> None:
        """One line of metrics.jsonl; what is not finite becomes null."""
        line = {STEP: int(step), **{name: _number(value) for name, value in metrics.items()}}
        self._metrics.write(json.dumps(line) + "\n")
        self._metrics.flush()

    def evaluation(
        self, step: int, returns: Sequence[float] | np.ndarray, lengths: Sequence[int] | np.ndarray
    ) -> None:
        """One row of evaluations.csv per episode; the mean becomes the `evaluation` of the display."""
        self._append_rows(
            (int(step), episode, float(ret), int(length))
            for episode, (ret, length) in enumerate(zip(returns, lengths, strict=True))
        )
        mean, std = float(np.mean(returns)), float(np.std(returns))
        if self._live:
            self.progress(step, {"evaluation": mean})
        elif not self._quiet:
            self._fields["evaluation"] = f"{mean:.1f} ± {std:.1f}"
            width = len(f"{self._total_steps:,}")
            line = f"step {step:>{width},}/{self._total_steps:,}  {self._summary(step)}"
            print(line, file=sys.stderr, flush=True)

    def progress(self, step: int, fields: Mapping[str, SupportsFloat | str]) -> None:
        """Update the display. `env` names the line; every other field is shown as `name value`."""
        now = time.monotonic()
        self._marks.append((now, step))
        while now - self._marks[0][0] > RATE_WINDOW_S and len(self._marks) > 2:
            self._marks.popleft()
        self._fields.update(fields)
        if self._live:
            name = str(self._fields.get("env", "training"))
            self._live.update(
                self._live.task_ids[0], completed=step, description=name, text=self._summary(step)
            )

    def _summary(self, step: int) -> str:
        """Return first, then speed and time left, then the rest: what is read most stands first."""
        speed = []
        if len(self._marks) > 1:
            (then, first), (now, last) = self._marks[0], self._marks[-1]
            rate = (last - first) / max(now - then, 1e-9)
            speed.append(f"{rate:.0f} steps/s")
            if rate > 0:
                speed.append(f"{_duration((self._total_steps - step) / rate)} left")
        named = {name: f"{name} {_short(value)}" for name, value in self._fields.items()}
        first_of_all = [named.pop(name) for name in ("evaluation", "return") if name in named]
        named.pop("env", None)  # it names the line
        return "  ".join([*first_of_all, *speed, *named.values()])

    def _append_rows(self, rows: Any) -> None:
        csv.writer(self._evaluations, lineterminator="\n").writerows(rows)
        self._evaluations.flush()

    @staticmethod
    def truncate(folder: Path, step: int) -> None:
        """Forget what was recorded after `step`, and a line cut short: a resumed run repeats no row."""
        if (path := folder / METRICS).exists():
            records = [record for record in _records(path) if record[STEP] <= step]
            _write_text(path, "".join(json.dumps(record) + "\n" for record in records))
        if (path := folder / EVALUATIONS).exists():
            rows = [row for row in _rows(path) if int(row[0]) <= step]
            _write_text(path, "".join(",".join(row) + "\n" for row in [COLUMNS, *rows]))


def _live_line(console: Console, total_steps: int) -> Progress:
    fixed, rest = Column(no_wrap=True), Column(no_wrap=False, ratio=1)
    # On a narrow terminal the numbers matter more than the bar, and wrap rather than being cut.
    bar = [BarColumn(bar_width=16, table_column=fixed)] if console.width >= WIDE else []
    live = Progress(
        TextColumn("[bold]{task.description}", table_column=fixed),
        *bar,
        TextColumn(f"{{task.completed:,.0f}}/{total_steps:,}", table_column=fixed),
        TextColumn("{task.fields[text]}", markup=False, table_column=rest),
        console=console,
        transient=True,
        refresh_per_second=4,
        expand=True,
    )
    live.add_task("training", total=total_steps, text="compiling")
    return live


def _short(value: SupportsFloat | str) -> str:
    if isinstance(value, str):
        return value
    return f"{float(value):.3g}" if abs(float(value)) < 1000 else f"{float(value):.0f}"


def _duration(seconds_left: float) -> str:
    minutes, seconds = divmod(max(round(seconds_left), 0), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"


def _number(value: Any) -> float | int | None:
    if isinstance(value, (int, np.integer)):
        return int(value)
    # Nine digits: all that a float32 has.
    return float(f"{float(value):.9g}") if math.isfinite(float(value)) else None


def _records(path: Path) -> list[Json]:
    """Whole records only: the last line of a run that is still writing, or was killed, may be cut short."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            records.append(json.loads(line))
    return [record for record in records if isinstance(record, dict) and STEP in record]


def _rows(path: Path) -> list[list[str]]:
    # A row without its line end may have lost digits, so it is not trusted either.
    whole, _, _ = path.read_text(encoding="utf-8").rpartition("\n")
    return [row for row in csv.reader(whole.splitlines()[1:]) if len(row) == len(COLUMNS)]


def read_metrics(folder: Path) -> dict[str, np.ndarray]:
    """Columns of metrics.jsonl, NaN where a record lacks the name."""
    if not (folder / METRICS).is_file():
        raise UserError(f"{folder} is not a run folder: it has no {METRICS}")
    records = _records(folder / METRICS)
    names = dict.fromkeys(name for record in records for name in record)
    return {name: np.array([record.get(name) for record in records], np.float64) for name in names}


def read_evaluations(folder: Path) -> dict[str, np.ndarray]:
    """Columns of evaluations.csv: step, episode, return, length."""
    if not (folder / EVALUATIONS).is_file():
        raise UserError(f"{folder} is not a run folder: it has no {EVALUATIONS}")
    rows = _rows(folder / EVALUATIONS)
    kinds = (np.int64, np.int64, np.float64, np.int64)
    return {
        name: np.array([kind(row[i]) for row in rows], kind)
        for i, (name, kind) in enumerate(zip(COLUMNS, kinds, strict=True))
    }


def write_json(path: Path, data: Json) -> None:
    """Whole or not at all."""
    _write_text(path, json.dumps(data, indent=2, allow_nan=False) + "\n")


def read_json(path: Path, what: str = "run folder") -> Json:
    """A JSON file of a folder that is a `what`; one clear line if it is not there or not whole."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        reason = f"it has no {path.name}" if path.parent.is_dir() else "there is no such folder"
        raise UserError(f"{path.parent} is not a {what}: {reason}") from error
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from error


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
