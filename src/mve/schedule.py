"""What is due by which environment step: budgets, updates, evaluations. Functions of the step alone.

Nothing here remembers what was done: a run that resumes at some step owes what a run that never stopped
would owe there.
"""

from __future__ import annotations

from dataclasses import replace

from mve.config import Config
from mve.types import UserError

EPISODES_IN_BUDGET, BUDGET_WITHOUT_LIMIT = 25, 25_000
SHORT_BUDGET = 100_000  # environment steps below which evaluations come every 1000 steps


def with_budgets(config: Config, max_episode_steps: int | None) -> Config:
    """Numbers in place of 0 for the settings that depend on the task."""
    default = EPISODES_IN_BUDGET * max_episode_steps if max_episode_steps else BUDGET_WITHOUT_LIMIT
    total = config.train.total_steps or default
    interval = config.evaluate.interval_steps or (1000 if total < SHORT_BUDGET else 5000)
    return replace(
        config,
        train=replace(config.train, total_steps=total),
        evaluate=replace(config.evaluate, interval_steps=interval),
    )


def check(config: Config, fits_model: bool) -> None:
    """Refuse a schedule in which nothing is learned, or the agent would imagine with an unfitted model."""
    train, dynamics = config.train, config.dynamics
    if train.total_steps <= train.learning_starts:
        raise UserError(
            f"a budget of {train.total_steps} steps ends before learning starts "
            f"(train.learning_starts = {train.learning_starts}); raise --steps or lower that setting"
        )
    if config.replay.capacity < train.block_steps:
        raise UserError(
            f"replay.capacity = {config.replay.capacity} does not hold one block of "
            f"train.block_steps = {train.block_steps} steps"
        )
    if fits_model and dynamics.learning_starts > train.learning_starts:
        raise UserError(
            f"dynamics.learning_starts = {dynamics.learning_starts} is after train.learning_starts = "
            f"{train.learning_starts}: the agent would imagine with a model that was never fitted"
        )


def updates_due(config: Config, step: int) -> int:
    """Updates of the agent owed by a step."""
    return _due(step, config.train.learning_starts, config.train.updates_per_step)


def fits_due(config: Config, step: int) -> int:
    """Minibatches of the model owed by a step: a first burst, then a steady rate."""
    dynamics = config.dynamics
    steady = _due(step, dynamics.learning_starts, dynamics.fits_per_step)
    return steady + (dynamics.initial_fits if step > dynamics.learning_starts else 0)


def _due(step: int, starts: int, per_step: float) -> int:
    return int(max(step - starts, 0) * per_step)


def crosses(before: int, step: int, interval: int) -> bool:
    """Whether a multiple of the interval lies in (before, step]."""
    return before // interval < step // interval
