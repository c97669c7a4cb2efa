"""Does expansion save real steps? Minutes, not seconds: run with `make test-slow`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mve import Learner
from mve.log import read_evaluations

SOLVED, SEEDS = {"Pendulum-v1": -200.0, "CartPole-v1": 475.0}, 5


def steps_to_solve(task: str, folder: Path, seed: int, horizon: int, budget: int) -> float:
    settings = [
        *(f"targets.horizon_steps={horizon}", f"train.total_steps={budget}", "evaluate.interval_steps=250")
    ]
    Learner(task, "mve-sac", seed=seed, run_dir=folder, settings=settings, quiet=True).learn()
    rows = read_evaluations(folder)
    means = {step: rows["return"][rows["step"] == step].mean() for step in np.unique(rows["step"])}
    return float(min((step for step, mean in means.items() if mean >= SOLVED[task]), default=np.inf))


@pytest.mark.slow
def test_expansion_solves_the_pendulum_in_fewer_steps_than_its_base_learner(tmp_path: Path) -> None:
    medians = [
        np.median(
            [
                steps_to_solve("Pendulum-v1", tmp_path / f"h{horizon}-{seed}", seed, horizon, 5000)
                for seed in range(SEEDS)
            ]
        )
        for horizon in (3, 0)
    ]
    assert medians[0] < medians[1]


@pytest.mark.slow
def test_expansion_on_dqn_balances_the_pole(tmp_path: Path) -> None:
    assert steps_to_solve("CartPole-v1", tmp_path, seed=1, horizon=3, budget=6000) <= 6000
