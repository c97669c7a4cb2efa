"""`mve`, whose evaluations are played in processes beside the training, which goes on meanwhile (POSIX).

    python benchmarks/aside.py train HalfCheetah-v4 --seeds 0..7 --steps 100000

Episodes of eight seeds take a GPU's program seconds in which nothing is learned, and a machine with a GPU has
processor cores to spare. What is played is the same, to the bit: the deterministic policy of that step, in
episodes of the same seeds; it does not depend on who plays. Rows of evaluations.csv come in the order in
which the episodes end. A checkpoint does not know of its evaluation, so that `mve eval --best` finds none.

A forked process has the environments without making them portable, and touches no device: NumPy and the
simulator alone. JAX warns of forks in general, and is right to; hence a script, and not a setting.
"""

from __future__ import annotations

import csv
import io
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import Any

from mve import cli
from mve.log import EVALUATIONS
from mve.loop import Loop
from mve.run import Run

NICENESS = 10  # those that train come first
playing: list[int] = []  # the processes


def play(run: Run, policy: Any, step: int) -> None:
    """The evaluation of one run, into its records."""
    found = run.evaluate(policy, step)
    rows = io.StringIO()
    csv.writer(rows, lineterminator="\n").writerows(
        (step, episode, float(ret), int(length))
        for episode, (ret, length) in enumerate(zip(found.returns, found.lengths, strict=True))
    )
    file = os.open(run.folder / EVALUATIONS, os.O_WRONLY | os.O_APPEND)
    os.write(file, rows.getvalue().encode())  # in one piece: another may be about to write its own
    os.close(file)


def evaluate(loop: Loop, records: Sequence[Any], display: Any) -> list[dict[str, float]]:
    """In place of `Loop.evaluate`: begins what it would do, and records nothing itself."""
    del records, display
    for run, policy in zip(loop.runs, loop.program.policies(loop.state), strict=True):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what is said above
            child = os.fork()
        if child:
            playing.append(child)
            continue
        code = 1
        try:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)  # the evaluation of a run that stops is worth having
            os.nice(NICENESS)
            play(run, policy, loop.step)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    gather(wait=loop.step == loop.config.train.total_steps)  # the curve of the whole run is drawn next
    return [{} for _ in loop.runs]


def gather(*, wait: bool) -> None:
    """Those that have ended, or all of them."""
    playing[:] = [child for child in playing if os.waitpid(child, 0 if wait else os.WNOHANG) == (0, 0)]


def main(argv: list[str] | None = None) -> int:
    Loop.evaluate = evaluate
    try:
        return cli.main(argv)
    finally:
        gather(wait=True)


if __name__ == "__main__":
    raise SystemExit(main())
