"""SIGKILL at random moments, some of them in a save; what is resumed ends where an undisturbed run ends.

MVE_KILLS=20 pytest -m slow tests/test_killed.py        so many kills of each of the four runs
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import equinox as eqx
import numpy as np
import pytest

from mve import Learner, folders
from mve.checkpoint import latest

KILLS = int(os.environ.get("MVE_KILLS", "6"))
STEPS = 200 + 100 * KILLS
TINY = (
    *("agent.hidden=[16]", "agent.batch_size=16", "dynamics.hidden=[16]", "dynamics.batch_size=16"),
    *("dynamics.members=2", "dynamics.initial_fits=10", "dynamics.fits_per_step=0.2"),
    *("dynamics.learning_starts=60", "train.learning_starts=60", "train.updates_per_step=0.5"),
    *("train.checkpoint_interval=40", "evaluate.interval_steps=200", "evaluate.episodes=2"),
    *("replay.capacity=500", f"train.total_steps={STEPS}"),
)
WALL_CLOCK = {"time/time_elapsed", "time/fps"}
START_S = 120.0  # for a process to come to its first checkpoint, on a busy machine


class Commands:
    """`mve` in processes of its own, whose compiled code is kept for the next."""

    def __init__(self, cache: Path):
        paths = os.pathsep.join(path for path in sys.path if path)
        self.environment = os.environ | {"PYTHONPATH": paths, "XDG_CACHE_HOME": str(cache)}

    def begun(self, *argv: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "mve", *argv, "--quiet"]
        return subprocess.Popen(command, env=self.environment, stdout=subprocess.DEVNULL)

    def done(self, *argv: str) -> None:
        assert self.begun(*argv).wait() == 0


def runs_of(folder: Path) -> list[Path]:
    return folders.seeds_of(folder) or [folder]


def is_saving(folder: Path) -> bool:
    return any(folder.rglob(".writing_*"))


def newest(folder: Path) -> list[Path | None]:
    return [latest(run / "checkpoints") for run in runs_of(folder)]


def wait_for_the_moment(process: subprocess.Popen[bytes], folder: Path, rng: np.random.Generator) -> str:
    """What the process is doing when this returns: anything at all, training, or saving."""
    moment = str(rng.choice(["any", "training", "saving", "saving"]))
    deadline = time.monotonic() + (rng.uniform(0.0, 8.0) if moment == "any" else START_S)
    passed_over = int(rng.integers(4))  # checkpoints that are let be
    before = newest(folder)
    while process.poll() is None and time.monotonic() < deadline:
        if passed_over and newest(folder) != before:
            before, passed_over = newest(folder), passed_over - 1
        elif moment == "saving" and not passed_over and is_saving(folder):
            return moment
        elif moment == "training" and newest(folder) != before:
            time.sleep(rng.uniform(0.0, 0.3))
            return moment
        time.sleep(0.0005)
    return moment


def killed_and_resumed(
    commands: Commands, train: list[str], folder: Path, rng: np.random.Generator
) -> Counter[str]:
    """Until it is done; how many kills came when, counting those of a process that was still at work."""
    moments: Counter[str] = Counter()
    while moments.total() < KILLS:
        again = folder.exists() and any(run.joinpath("config.json").exists() for run in runs_of(folder))
        process = commands.begun(*(["resume", str(folder)] if again else [*train, "--run-dir", str(folder)]))
        moment = wait_for_the_moment(process, folder, rng)
        process.kill()
        if process.wait() == 0:
            print("done early, with", moments)
            return moments
        assert process.returncode == -9
        moments[moment if any(newest(folder)) else "before the first checkpoint"] += 1
        print(
            moment,
            [path and path.name for path in newest(folder)],
            "cut short" * is_saving(folder),
            flush=True,
        )
    commands.done("resume", str(folder))
    return moments


def records(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in WALL_CLOCK} for line in lines]


def assert_the_same(straight: Path, killed: Path) -> None:
    one, other = (Learner.load(folder, quiet=True) for folder in (straight, killed))
    assert one.num_timesteps == other.num_timesteps == STEPS
    assert eqx.tree_equal(one.progress, other.progress)
    assert eqx.tree_equal(one.run.env.snapshot(), other.run.env.snapshot())
    assert (one.run.metrics, one.run.recent) == (other.run.metrics, other.run.recent)
    assert records(straight) == records(killed)
    assert (straight / "evaluations.csv").read_bytes() == (killed / "evaluations.csv").read_bytes()
    steps = [record["time/total_timesteps"] for record in records(killed)]
    assert steps == sorted(set(steps))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "seeds"), [("Pendulum-v1", 1), ("HalfCheetah-v5", 1), ("Hopper-v5", 1), ("Pendulum-v1", 2)]
)
def test_a_run_that_is_killed_at_random_moments_ends_the_same(
    task: str, seeds: int, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    commands = Commands(tmp_path_factory.getbasetemp() / "cache")
    train = [
        "train",
        task,
        "--algo",
        "mve-sac",
        *(["--seeds", f"0..{seeds - 1}"] if seeds > 1 else []),
        "--set",
        *TINY,
    ]
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    commands.done(*train, "--run-dir", str(straight))
    moments = killed_and_resumed(commands, train, killed, np.random.default_rng([seeds, len(task)]))
    print(f"{task}, {seeds} seed(s): killed {dict(moments)}")
    assert moments.total() == KILLS
    for one, other in zip(runs_of(straight), runs_of(killed), strict=True):
        assert_the_same(one, other)
