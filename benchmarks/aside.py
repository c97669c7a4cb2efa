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

import os
import signal
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import NoReturn

from mve import cli
from mve.display import Display
from mve.log import RunLog
from mve.loop import Loop
from mve.policies import Policy
from mve.run import Run

NICENESS = 10  # those that train come first
playing: list[int] = []  # the processes


def play(run: Run, policy: Policy, step: int, record: RunLog) -> NoReturn:
    """The evaluation of one run, into its records, and the end of this process."""
    code = 1
    try:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)  # the evaluation of a run that stops is worth having
        os.nice(NICENESS)
        found = run.evaluate(policy, step)
        record.evaluation(step, found.returns, found.lengths)  # appended in one piece, as others' are
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def evaluate(loop: Loop, records: Sequence[RunLog], display: Display) -> list[dict[str, float]]:
    """In place of `Loop.evaluate`: begins what it would do, and neither waits nor shows it."""
    del display
    policies = loop.program.policies(loop.state)
    for run, policy, record in zip(loop.runs, policies, records, strict=True):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what is said above
            child = os.fork()
        if not child:
            play(run, policy, loop.step, record)
        playing.append(child)
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
