"""Acting while the device learns: the lag is one block, always, and nothing else differs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import numpy as np
import pytest
from test_learner import SMALL, Slide

from mve import Learner, schedule, train
from mve.program import Alone, on_host
from mve.run import Run
from mve.state import Capacity, initial_state
from mve.train import Due
from mve.types import UserError

BLOCK = 20
# Learns from the second block on; looks and saves in the middle, and not where the budget ends.
LOOPED = [
    *SMALL,
    *("train.learning_starts=20", "dynamics.learning_starts=20", "evaluate.interval_steps=60"),
    *("train.checkpoint_interval=80", "evaluate.episodes=1", "replay.capacity=140"),
]


def learner(folder: Path, *more: str) -> Learner:
    return Learner(
        Slide(), "mve-sac", run_dir=folder, settings=[*LOOPED, "train.total_steps=140", *more], quiet=True
    )


class Collecting:
    """Notes the policy, the step and the rows of every block that is collected."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.policies, self.steps, self.blocks = [], [], []
        collect = Run.collect

        def watched(run: Run, policy: Any, step: int, count: int) -> Any:
            block = collect(run, policy, step, count)
            self.policies.append(policy)
            self.steps.append(step)
            self.blocks.append(block)
            return block

        monkeypatch.setattr(Run, "collect", watched)


@pytest.fixture
def collecting(monkeypatch: pytest.MonkeyPatch) -> Collecting:
    return Collecting(monkeypatch)


@pytest.mark.parametrize("lag", [1, 0])
def test_block_k_is_collected_with_the_policy_of_state_k_less_the_lag(
    collecting: Collecting, tmp_path: Path, lag: int
) -> None:
    """Replayed by hand, one block after the other, across evaluations and checkpoints."""
    run = learner(tmp_path / "run", f"train.overlap={lag == 1}").learn()
    assert collecting.steps == list(range(0, 140, BLOCK))
    state, policies = initial_state(run.recipe, Capacity(140), seed=0), []
    for step, block in zip(collecting.steps, collecting.blocks, strict=True):
        following = min(step + (BLOCK if lag else 0), 120)
        policies.append(on_host(train.exploration_policy(state, np.int32(following))))
        fits, updates = (
            owed(run.config, step + BLOCK) - owed(run.config, step)
            for owed in (schedule.fits_due, schedule.updates_due)
        )
        due = Due.of(rows=BLOCK, fits=fits, updates=updates)
        state, _ = train.learn(state, block, due, run.recipe)
    assert eqx.tree_equal(state, run.state)
    assert collecting.policies[0] is None  # uniform warm-up
    for number in range(1, 7):
        assert eqx.tree_equal(collecting.policies[number], policies[number - lag])


def test_overlap_changes_no_row_while_nothing_is_learned(collecting: Collecting, tmp_path: Path) -> None:
    frozen = ("train.updates_per_step=0", "train.warmup=policy")
    for overlap in (True, False):
        learner(tmp_path / str(overlap), f"train.overlap={overlap}", *frozen).learn()
    half = len(collecting.blocks) // 2
    for one, other in zip(collecting.blocks[:half], collecting.blocks[half:], strict=True):
        jax.tree.map(np.testing.assert_array_equal, one, other)


def test_where_a_run_looks_saves_and_pauses_changes_nothing_that_it_learns(tmp_path: Path) -> None:
    straight = learner(tmp_path / "a", "evaluate.interval_steps=140").learn()
    paused = learner(tmp_path / "b").learn(60).learn(80)
    assert eqx.tree_equal(straight.state.agent, paused.state.agent)
    assert eqx.tree_equal(straight.progress.explorer, paused.progress.explorer)


def test_a_checkpoint_holds_the_policy_that_acts_next(tmp_path: Path) -> None:
    run = learner(tmp_path / "run").learn()
    assert run.progress.explorer is not None
    loaded = Learner.load(tmp_path / "run", Slide(), quiet=True)
    assert eqx.tree_equal(loaded.progress, run.progress)
    in_step = learner(tmp_path / "in step", "train.overlap=false").learn()
    assert in_step.progress.explorer is None


def test_a_loss_that_is_not_finite_is_noticed_one_block_late(
    collecting: Collecting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learn = train.learn

    def spoilt(state: Any, block: Any, due: Due, recipe: Any) -> Any:
        state, metrics = learn(state, block, due, recipe)
        worse = np.nan if len(collecting.steps) == 2 else 0.0  # from the second block, as it is learned from
        return state, {**metrics, "train/critic_loss": metrics["train/critic_loss"] + np.float32(worse)}

    monkeypatch.setattr(train, "learn", spoilt)
    with pytest.raises(UserError, match="not finite at step 40"):
        learner(tmp_path / "run", "evaluate.interval_steps=1000").learn()
    assert collecting.steps == [0, 20, 40]


@pytest.mark.slow
def test_a_run_computes_in_the_precision_that_is_configured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen = set()
    learn = Alone.learn

    def watched(*given: Any) -> Any:
        seen.add(jax.config.jax_default_matmul_precision)
        return learn(*given)

    monkeypatch.setattr(Alone, "learn", watched)
    learner(tmp_path / "run", "train.total_steps=40").learn()
    assert seen == {"float32"}
