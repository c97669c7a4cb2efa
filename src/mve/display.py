"""What the person who waits sees of a run, or of several: on stderr, for stdout is for results."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import SupportsFloat

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn
from rich.table import Column

WIDE = 130  # columns of a terminal with room for a bar
RATE_WINDOW_S = 30.0  # steps/s is that of the last half minute: random warm-up steps cost next to nothing
SAID_EVERY_S = 30.0  # how far learning is, where there is no live line


class Display:
    """On a terminal one live line; elsewhere one line per evaluation; nothing if `quiet`.

    How much time is left is not said before steps at the pace of learning, which begins at `learning_starts`,
    have been seen: those before it are many times as fast.
    """

    def __init__(self, total_steps: int, *, learning_starts: int = 0, quiet: bool = False):
        self._total_steps = total_steps
        self._learning_starts = learning_starts
        self._fields: dict[str, SupportsFloat | str] = {}
        self._marks: deque[tuple[float, int]] = deque()
        self._began: tuple[float, int] | None = None  # when learning at one step was first heard of, how far
        self._said = 0.0
        console = Console(stderr=True)
        self._quiet = quiet
        self._live = None if quiet or not console.is_terminal else _live_line(console, total_steps)

    def __enter__(self) -> Display:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()

    def evaluation(self, step: int, returns: Sequence[float] | np.ndarray) -> None:
        """The mean becomes the `evaluation` that is shown."""
        mean, std = float(np.mean(returns)), float(np.std(returns))
        if self._live:
            self.progress(step, {"evaluation": mean})
        elif not self._quiet:
            self._fields["evaluation"] = f"{mean:.1f} ± {std:.1f}"
            width = len(f"{self._total_steps:,}")
            line = f"step {step:>{width},}/{self._total_steps:,}  {self._summary(step)}"
            print(line, file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        """A line of its own."""
        if self._live:
            self._live.console.print(text, markup=False)
        elif not self._quiet:
            print(text, file=sys.stderr, flush=True)

    def learning(self, done: int, updates: int) -> None:
        """How far it is where many updates come between two steps, until the next call of `progress`."""
        now = time.monotonic()
        if self._began is None:
            self._began, self._said = (now, done), now
        began, first = self._began
        text = f"{done:,} of {updates:,} updates"
        if done > first:
            text += f", {_duration((now - began) / (done - first) * (updates - done))} more"
        if self._live:
            self._fields["learning"] = text
            self._live.update(self._live.task_ids[0], text=self._summary(self._marks[-1][1]))
        elif not self._quiet and now - self._said >= SAID_EVERY_S:
            print(f"learning: {text}", file=sys.stderr, flush=True)
            self._said = now

    def progress(self, step: int, fields: Mapping[str, SupportsFloat | str]) -> None:
        """Update the display. `env` names the line; every other field is shown as `name value`."""
        now, self._began = time.monotonic(), None
        self._fields.pop("learning", None)
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
            speed.append(f"{_short(rate)} steps/s")
            if rate > 0 and first >= self._learning_starts:
                speed.append(f"{_duration((self._total_steps - step) / rate)} left")
        named = {name: f"{name} {_short(value)}" for name, value in self._fields.items()}
        first_of_all = [named.pop(name) for name in ("evaluation", "return") if name in named]
        named.pop("env", None)  # it names the line
        return "  ".join([*first_of_all, *speed, *named.values()])


def _live_line(console: Console, total_steps: int) -> Progress:
    fixed, rest = Column(no_wrap=True), Column(no_wrap=False, ratio=1)
    # On a narrow terminal the numbers matter more than the bar, and wrap rather than being cut.
    bar = [BarColumn(bar_width=16, table_column=fixed)] if console.width >= WIDE else []
    live = Progress(
        SpinnerColumn(table_column=fixed),  # moves on where steps have to wait for minutes of learning
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
