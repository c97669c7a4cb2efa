"""A million steps on a short task: whether memory or the time of a step grows.

    python benchmarks/long_run.py [--steps N] [--algo NAME]

Tiny networks and few updates, so that what is measured is what happens at every step, block, evaluation and
checkpoint, thousands of times over. Prints a table; exit code 1 if the last fifth of the run needs more than
the second fifth did by more than is noise (the first compiles and fills the replay). Time is the processor's,
all threads together, so that a busy machine does not count.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box

from mve import Learner

ROWS = 20  # of the table
MOST_GROWTH_MB, MOST_SLOWDOWN = 10.0, 1.25
SETTINGS = (
    *("agent.hidden=[16]", "agent.batch_size=16", "dynamics.hidden=[16]", "dynamics.batch_size=16"),
    *("dynamics.members=2", "dynamics.initial_fits=20", "dynamics.fits_per_step=0.005"),
    *("train.block_steps=100", "train.updates_per_step=0.01", "train.checkpoint_interval=10000"),
    *("replay.capacity=20000", "evaluate.interval_steps=5000", "evaluate.episodes=2"),
)


class Mark(NamedTuple):
    """Where the process stood at a step."""

    step: int
    seconds: float
    resident_mb: float


class Watched(gym.Env):
    """A point pushed along a line, 50 steps an episode, that notes the process's memory as it goes."""

    observation_space = Box(-np.inf, np.inf, (2,), np.float32)
    action_space = Box(-1.0, 1.0, (1,), np.float32)

    def __init__(self, every: int):
        self.every, self.num_steps, self.marks = every, 0, []
        self.state, self.count = np.zeros(2, np.float32), 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.state, self.count = self.np_random.normal(size=2).astype(np.float32), 0
        return self.state.copy(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.num_steps, self.count = self.num_steps + 1, self.count + 1
        self.state = (0.9 * self.state + 0.1 * float(action[0])).astype(np.float32)
        if self.num_steps % self.every == 0:
            self.marks.append(Mark(self.num_steps, time.process_time(), resident_mb()))
        return self.state.copy(), -float(np.abs(self.state).sum()), False, self.count == 50, {}

    def snapshot(self) -> dict[str, Any]:
        return {"state": self.state, "count": self.count}

    def restore(self, data: dict[str, Any]) -> None:
        self.state, self.count = data["state"], data["count"]


def resident_mb() -> float:
    """What the process holds of the machine's memory (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--algo", default="mve-sac")
    asked = parser.parse_args()
    env, trial = Watched(asked.steps // ROWS), Watched(asked.steps)
    with tempfile.TemporaryDirectory() as folder:
        settings = [*SETTINGS, f"train.total_steps={asked.steps}"]
        run = Learner(
            env, asked.algo, run_dir=Path(folder) / "run", settings=settings, eval_env=trial, quiet=True
        )
        start = Mark(0, time.process_time(), resident_mb())
        run.learn()
    return report([start, *env.marks])


def report(marks: list[Mark]) -> int:
    print("      steps   us a step   resident MB")
    for before, mark in pairwise(marks):
        print(f"{mark.step:11,} {step_us(before, mark):11.1f} {mark.resident_mb:13.1f}", flush=True)
    fifth = len(marks) // 5
    early, late = step_us(marks[fifth], marks[2 * fifth]), step_us(marks[-1 - fifth], marks[-1])
    growth = marks[-1].resident_mb - marks[2 * fifth].resident_mb
    print(f"a step: {early:.1f} us in the second fifth, {late:.1f} us in the last")
    print(f"memory: {growth:+.1f} MB from the end of the second fifth to the end")
    return int(growth > MOST_GROWTH_MB or late > MOST_SLOWDOWN * early)


def step_us(before: Mark, after: Mark) -> float:
    return (after.seconds - before.seconds) / (after.step - before.step) * 1e6


if __name__ == "__main__":
    sys.exit(main())
