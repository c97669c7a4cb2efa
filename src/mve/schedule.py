"""What is due by which environment step: budgets, updates, evaluations. Functions of the step alone.

Nothing here remembers what was done: a run that resumes at some step owes what a run that never stopped
would owe there.
"""

from __future__ import annotations

from dataclasses import replace

from mve.agents import AGENTS
from mve.config import Config
from mve.state import real_rows, shares_rollout
from mve.targets import TargetsConfig
from mve.types import UserError

EPISODES_IN_BUDGET, BUDGET_WITHOUT_LIMIT = 25, 25_000
LONGEST_WARMUP, WARMUP_SHARE = 5000, 5  # environment steps at most; a fifth of the budget
FEWER_UPDATES = 5  # times, to begin with, where the model has yet to learn what ends an episode
SMALLEST_DISCOUNT, LARGEST_DISCOUNT = 0.95, 0.995  # of those that come from the episode's length
OF_SUMS = {  # settings that say how real steps are summed
    "n_step_drawn": "draws from 1 to targets.n_step",
    "n_step_warmup": "says of which rows no targets.n_step real steps are summed",
    "n_step_within": "says which rows sum targets.n_step real steps",
}
SHORT_BUDGET = 100_000  # environment steps below which evaluations come every 1000 steps
LONGEST_UNSAVED = 5000  # environment steps between checkpoints, unless other is asked


def with_budgets(config: Config, max_episode_steps: int | None, *, learns_ends: bool = False) -> Config:
    """Numbers for the settings that depend on the task or the budget: in place of 0, or of a word.

    `learns_ends`: whether the model has to learn what ends an episode.
    """
    default = EPISODES_IN_BUDGET * max_episode_steps if max_episode_steps else BUDGET_WITHOUT_LIMIT
    total = config.train.total_steps or default
    interval = config.evaluate.interval_steps or (1000 if total < SHORT_BUDGET else 5000)
    discount = config.targets.discount
    if discount == "episode":
        discount = discount_of(max_episode_steps)
    starts = _number(config.train.learning_starts, min(total // WARMUP_SHARE, LONGEST_WARMUP))
    updates = _number(config.train.initial_updates, starts // FEWER_UPDATES if learns_ends else starts)
    return replace(
        config,
        targets=replace(config.targets, discount=discount),
        train=replace(
            config.train,
            total_steps=total,
            learning_starts=starts,
            initial_updates=updates,
            checkpoint_interval=config.train.checkpoint_interval or min(interval, LONGEST_UNSAVED),
        ),
        dynamics=replace(config.dynamics, learning_starts=_number(config.dynamics.learning_starts, starts)),
        evaluate=replace(config.evaluate, interval_steps=interval),
    )


def _number(setting: int | str, otherwise: int) -> int:
    return otherwise if isinstance(setting, str) else setting


def discount_of(max_episode_steps: int | None) -> float:
    """clip((L/5 - 1)/(L/5), 0.95, 0.995): 0.95 up to 100 steps, 0.975 at 200, 0.995 from 1000 on."""
    if max_episode_steps is None:
        return LARGEST_DISCOUNT
    fifth = max_episode_steps / 5
    return min(max((fifth - 1) / fifth, SMALLEST_DISCOUNT), LARGEST_DISCOUNT)


def check(config: Config, fits_model: bool) -> None:
    """Refuse a schedule in which nothing is learned, or targets come from what is not there."""
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
    if fits_model and dynamics.first_fit > train.learning_starts:
        raise UserError(
            f"the model is first fitted at step {dynamics.first_fit} (dynamics.learning_starts + "
            f"interval_steps), after train.learning_starts = {train.learning_starts}; "
            "set dynamics.initial_fits"
        )
    if fits_model and not fits_due(config, int(train.learning_starts) + train.block_steps):
        raise UserError(
            f"dynamics.initial_fits = 0 and dynamics.fits_per_step = {dynamics.fits_per_step} leave the "
            "model without a fit when the agent begins to learn from it; raise one of them"
        )
    imagination = config.imagination
    by_row = imagination.starts and imagination.mixed_by == "row"
    if by_row and imagination.real_share and not real_rows(config.agent, imagination):
        raise UserError(
            f"imagination.real_share = {imagination.real_share} of agent.batch_size = "
            f"{config.agent.batch_size} rows is none; set it to 0, or raise one of them"
        )
    if 0 < config.imagination.trust < 1:
        raise UserError(
            f"imagination.trust = {config.imagination.trust} would stop rollouts at their first step, and "
            "leave the imagination buffer empty; set it to 1 or more (2 is usual), or to 0"
        )
    if config.imagination.trust and not config.imagination.starts:
        raise UserError(
            f"imagination.trust = {config.imagination.trust} stops rollouts into the imagination buffer, and "
            f"{config.algo} has none; set imagination.starts, or imagination.trust=0"
        )
    if config.imagination.trust and (not fits_model or (dynamics.elites or dynamics.members) < 2):
        raise UserError(
            f"imagination.trust = {config.imagination.trust} asks two members of a learned model; "
            "set dynamics.kind=learned and dynamics.members=2 at least, or imagination.trust=0"
        )
    if fits_model and dynamics.on_policy_corrections:
        _check_corrections(config)
    _check_estimator(config)


def _check_corrections(config: Config) -> None:
    """Refuse imagined steps that would be corrected in part."""
    targets, agent = config.targets, config.agent
    if targets.keeps_members:
        raise UserError(
            f"dynamics.on_policy_corrections would make the members agree, and targets.estimator = "
            f"{targets.estimator} asks how far they do not; set dynamics.on_policy_corrections=false"
        )
    if agent.model_steps and not shares_rollout(agent, targets, config.imagination):
        raise UserError(
            f"agent.model_steps = {agent.model_steps} here has rollouts of the actor's own, which "
            "dynamics.on_policy_corrections does not reach; set it to false, or have critic and actor share "
            "their rollouts, as mve-svg does"
        )


def _check_estimator(config: Config) -> None:
    """Refuse a target that the agent, or the blocks of real steps, cannot give."""
    targets, block_steps = config.targets, config.train.block_steps
    if config.agent.scales_values and targets.discount == 1:
        raise UserError(
            "targets.discount = 1 has no bounds of values, which agent.value_bounds_rate asks for; lower it, "
            "or set agent.value_bounds_rate=0 and agent.value_bins=0"
        )
    if targets.reads_segments and not config.agent.has_density:
        others = ", ".join(name for name, (settings, _) in AGENTS.items() if settings().has_density)
        raise UserError(
            f"targets.estimator = {targets.estimator} needs a policy with a density, and noise above 0: "
            f"{config.learner} as it is set has none, and would cut every trace; learners that have: {others}"
        )
    if (targets.reads_segments or targets.calibrates) and config.agent.draws_critics:
        raise UserError(
            f"targets.estimator = {targets.estimator} compares values of states with those of actions, which "
            "agent.target_critics has by other critics; set it to 0"
        )
    if targets.reads_segments and config.imagination.starts:
        raise UserError(
            f"targets.estimator = {targets.estimator} reads what followed real transitions, and nothing "
            "followed imagined ones; set imagination.starts=0"
        )
    if targets.n_step > 1:
        _check_n_step(config)
    else:
        _refuse_unread(targets)
    if targets.members and targets.estimator != "calibrated":
        raise UserError(
            f"targets.members = {targets.members} is how many members imagine a state for "
            f"targets.estimator = calibrated, not for {targets.estimator}; set targets.members=0"
        )
    if targets.members == 1 or targets.members > config.dynamics.members:
        raise UserError(
            f"targets.members = {targets.members}: a spread takes 2 members of the model at least, and "
            f"dynamics.members = {config.dynamics.members} there are; set targets.members=0 for all of them"
        )
    if targets.calibrates and targets.horizon_steps > block_steps:
        raise UserError(
            f"targets.estimator = calibrated measures the model within a block: targets.horizon_steps = "
            f"{targets.horizon_steps} has to be at most train.block_steps = {block_steps}"
        )


def _refuse_unread(targets: TargetsConfig) -> None:
    """Settings of sums, where no real steps are summed."""
    for name, does in OF_SUMS.items():
        if (asked := getattr(targets, name)) != (without := getattr(TargetsConfig, name)):
            raise UserError(
                f"targets.{name} = {str(asked).lower()} {does}, which is 1; set targets.n_step (8, say) or "
                f"targets.{name}={str(without).lower()}"
            )


def _check_n_step(config: Config) -> None:
    """Refuse sums of real steps where there is nobody to read them, or to misread them."""
    targets, imagination = config.targets, config.imagination
    asked = f"targets.n_step = {targets.n_step}"
    if targets.reads_segments:
        raise UserError(
            f"{asked}, and targets.estimator = {targets.estimator} weighs the real steps that followed by "
            "itself; set targets.n_step=1, and targets.horizon_steps to their number"
        )
    if imagination.starts and not imagination.real_share:
        raise UserError(
            f"{asked} sums real steps, and imagination.real_share = 0 leaves none to learn from; "
            "set targets.n_step=1, or a share above 0"
        )
    shared = shares_rollout(config.agent, targets, imagination)
    if config.agent.scales_values and not (targets.imagined_steps or shared):
        raise UserError(
            f"{asked}, and agent.value_bounds_rate asks what single steps earn, which imagined ones say, and "
            "there are none; have some imagined (targets.estimator=mve), or set agent.value_bounds_rate=0 "
            "and agent.value_bins=0"
        )


def updates_due(config: Config, step: int) -> int:
    """Updates of the agent owed by a step: a first burst, then a steady rate."""
    train = config.train
    first = train.initial_updates if step > train.learning_starts else 0
    return first + _due(step, train.learning_starts, train.updates_per_step)


def rounds_due(config: Config, step: int) -> int:
    """Rounds of rollouts into the imagination buffer owed by a step: one to begin with, so that the first
    update finds it filled, then one an interval."""
    since = step - config.train.learning_starts
    if config.imagination.interval_updates:
        return 0  # they come with the updates
    return since // config.imagination.interval_steps + 1 if since > 0 else 0


def fits_due(config: Config, step: int) -> int:
    """Minibatches of the model owed by a step, at most: a first burst, then a steady rate or refits.

    What an early stop leaves undone is forgiven: the next refit owes no more for it.
    """
    dynamics = config.dynamics
    if dynamics.interval_steps:
        later = _intervals(config, step) * dynamics.fits_per_refit
    else:
        later = _due(step, dynamics.learning_starts, dynamics.fits_per_step)
    return later + (dynamics.initial_fits if step > dynamics.learning_starts else 0)


def refits_due(config: Config, step: int) -> int:
    """First fits and refits of the model by a step, those before the agent learns left out: a steady fit
    has its first burst alone."""
    dynamics, starts = config.dynamics, config.train.learning_starts
    if step <= starts:
        return 0
    refits = _intervals(config, step) - _intervals(config, starts) if dynamics.interval_steps else 0
    return refits + 1


def _intervals(config: Config, step: int) -> int:
    return max(step - config.dynamics.learning_starts, 0) // config.dynamics.interval_steps


def _due(step: int, starts: int, per_step: float) -> int:
    return int(max(step - starts, 0) * per_step)


def crosses(before: int, step: int, interval: int) -> bool:
    """Whether a multiple of the interval lies in (before, step]."""
    return before // interval < step // interval
