"""Environment steps per second where environments are in JAX, beside Gymnasium's on the host, in turns.

    python benchmarks/device_steps.py gymnax/Pendulum-v1 jax/Pendulum-v1 Pendulum-v1

SAC's policy of 2 x 256 acts, through the loop's own collectors; nothing is learned. With `--algo sac` the
whole loop runs, an update per step, its closing evaluation and checkpoint included.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax

from mve import Learner
from mve.collect import collector_for
from mve.program import Alone
from mve.state import Progress

BUDGET, BLOCK = 100_000, 20
NEVER = ("evaluate.interval_steps=1000000", "train.checkpoint_interval=1000000", "evaluate.episodes=1")


def collecting(learner: Learner) -> Callable[[int], None]:
    """Takes so many steps with the policy acting."""
    collector = collector_for([learner.run], Alone(learner.recipe), [Progress(learner.state)])
    taken = 0

    def work(steps: int) -> None:
        nonlocal taken
        for _ in range(steps // BLOCK):
            collector.before_learning(
                learner.state, taken
            )  # the policy's copy on the host, for those who need it
            block = collector.collect(learner.state, taken, BLOCK)
            taken += BLOCK
        jax.block_until_ready(block)

    return work


def contestants(names: list[str], algo: str | None, folder: Path) -> dict[str, Callable[[int], object]]:
    settings = [f"train.total_steps={BUDGET}", f"train.block_steps={BLOCK}", *NEVER]
    settings.append("train.learning_starts=200" if algo else "train.warmup=policy")
    made = {
        name: Learner(
            name, algo or "sac", settings=settings, run_dir=folder / name.replace("/", "-"), quiet=True
        )
        for name in names
    }
    return {name: learner.learn if algo else collecting(learner) for name, learner in made.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("names", nargs="+")
    parser.add_argument("--algo")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        works = contestants(given.names, given.algo, Path(folder))
        rates: dict[str, list[float]] = {name: [] for name in works}
        for work in works.values():
            work(600)
        for _ in range(given.rounds):
            for name, work in works.items():
                begun = time.perf_counter()
                work(given.steps)
                rates[name].append(given.steps / (time.perf_counter() - begun))
    for name, found in rates.items():
        print(f"{name:24} {statistics.median(found):8.0f} steps/s  [{min(found):.0f} .. {max(found):.0f}]")


if __name__ == "__main__":
    main()
