"""Every method, by its name alone, on a task so small that its parts can be small as well."""

from __future__ import annotations

import json
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from environments import DiscreteProbe, Probe

from mve import Learner
from mve.agents import AGENTS
from mve.presets import PRESETS

STEPS, STARTS = 300, 100
# Smaller, sooner and seldomer, but made of the same parts: nothing here switches one off.
SMALL = (
    *("agent.hidden=[16]", "agent.batch_size=32", "dynamics.hidden=[16]", "dynamics.batch_size=32"),
    *(f"train.learning_starts={STARTS}", f"dynamics.learning_starts={STARTS}", "train.updates_per_step=0.5"),
    *("dynamics.initial_fits=20", "dynamics.fits_per_step=0.2"),
    *("evaluate.episodes=2", "train.block_steps=20"),
)
BUFFER = ("imagination.starts=32", "imagination.interval_steps=40", "imagination.rounds_kept=2")
REFITS = ("dynamics.interval_steps=50", "dynamics.fits_per_refit=20")

BURST = ("train.initial_updates=0", "agent.critic_updates=5", "dynamics.weight_decay_by_layer=[0.5,1]")

# One of each family; the others differ in settings that tests of their own are about.
QUICK = ("mve-sac", "mve-dqn", "retrace-sac", "mbpo", "mve-svg")


def settings_of(algo: str) -> list[str]:
    settings = list(SMALL)
    if "imagination.starts" in PRESETS[algo].settings:
        settings += BUFFER
    if "dynamics.interval_steps" in PRESETS[algo].settings:
        settings += REFITS
    if "train.initial_updates" in PRESETS[algo].settings:
        settings += BURST
    return settings


def probe(algo: str) -> gym.Env:
    """Three steps an episode, each of whose actions counts."""
    if AGENTS[PRESETS[algo].learner][1].discrete:
        return DiscreteProbe(lambda s, a: s + a, num_steps=3)
    return Probe(lambda s, a: 1 - (a - 0.5 * s) ** 2, num_steps=3)


@pytest.mark.parametrize(
    "algo", [pytest.param(algo, marks=() if algo in QUICK else pytest.mark.slow) for algo in PRESETS]
)
def test_every_preset_trains_on_a_probe_and_its_losses_are_finite(algo: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    Learner(probe(algo), algo, run_dir=run, settings=settings_of(algo), quiet=True).learn(STEPS)
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["time/total_timesteps"] == STEPS
    assert last["train/n_updates"] == (STEPS - STARTS) // 2
    losses = {name: value for name, value in last.items() if name.startswith(("train/", "model/", "mve/"))}
    assert "train/critic_loss" in losses
    assert all(np.isfinite(value) for value in losses.values()), losses
    weights = [value for name, value in last.items() if name.startswith("mve/weight_k")]
    np.testing.assert_allclose(sum(weights), 1.0, rtol=1e-4)
    if "imagination.starts" in PRESETS[algo].settings:
        assert last["imagination/rows"] > 0
        assert 0 < last["imagination/kept"] <= 1
