"""What a run is: what is compiled into it, and everything that training changes."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from mve import agents, dynamics, replay
from mve.agents import Agent, AgentConfig
from mve.dynamics import Dynamics, DynamicsConfig
from mve.imagine import ImaginationConfig
from mve.policies import Policy
from mve.replay import Replay
from mve.targets import Calibration, TargetsConfig, calibration
from mve.types import Count, Key, Known, StepFn


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What is fixed for a run and compiled into it: hashable, so that equal recipes share a compilation."""

    obs_size: int
    action_size: int
    known: Known
    agent: AgentConfig
    dynamics: DynamicsConfig
    targets: TargetsConfig
    imagination: ImaginationConfig = field(default_factory=ImaginationConfig)
    simulator: StepFn | None = None  # the true dynamics, in place of a fitted model
    recency: float = 1.0  # of the rows that are drawn from replay
    warmup_steps: int = 0  # environment steps of the warm-up, which is of whole blocks

    @property
    def uses_model(self) -> bool:
        return self.targets.imagined_steps > 0 or self.agent.model_steps > 0 or self.imagination.starts > 0

    @property
    def shares_rollout(self) -> bool:
        """Whether the critic's targets and the actor's objective are of the same imagined steps."""
        return shares_rollout(self.agent, self.targets, self.imagination)

    @property
    def real_rows(self) -> int:
        """Of a batch, where real and imagined rows share it."""
        return real_rows(self.agent, self.imagination)

    @property
    def expanded_steps(self) -> int:
        """Imagined steps of a real row's target."""
        shares = self.shares_rollout and self.real_rows > 0
        return self.targets.shared_steps if shares else self.targets.imagined_steps

    @property
    def kept_members(self) -> int:
        """How many members imagine each state of a target, where the estimator keeps them apart; else 1."""
        if not self.targets.keeps_members or self.simulator is not None:
            return 1  # the simulator is an ensemble of one: its copies would agree
        return self.targets.members or self.dynamics.members

    @property
    def fits_model(self) -> bool:
        return self.uses_model and self.simulator is None

    @property
    def corrects(self) -> bool:
        """Whether imagined steps run beside real ones, whose errors correct them."""
        return self.fits_model and self.dynamics.on_policy_corrections


def real_rows(agent: AgentConfig, imagination: ImaginationConfig) -> int:
    """Of a batch, where real and imagined rows share it."""
    return round(imagination.real_share * agent.batch_size)


def shares_rollout(agent: AgentConfig, targets: TargetsConfig, imagination: ImaginationConfig) -> bool:
    """Whether one rollout serves critic and actor: the same policy takes the steps of both, the first of them
    is imagined for both, and the actor wants as many as the critic's targets, if not more."""
    return (
        imagination.starts > 0
        and imagination.first_step == "imagined"
        and (imagination.real_share == 0 or imagination.mixed_by == "row")
        and agent.targets_by_current_actor
        and agent.model_steps >= 1 + targets.imagined_steps
        and not (targets.keeps_members or targets.reads_segments)
    )


class TrainState(eqx.Module):
    """Everything that training changes, as one pytree in the order of the data flow.

    `key` is the run's root and never changes: every draw is folded from it and the step it is for, so a
    state says all that there is to know about the randomness to come.
    """

    replay: Replay
    model: Dynamics | None  # None where nothing is imagined, or the simulator does it
    calibration: Calibration | None  # None where the estimator does not ask how wrong the model is
    imagined: Replay | None  # None where imagined transitions are not kept
    agent: Agent
    num_env_steps: Array
    key: Key


class Capacity(NamedTuple):
    """Rows that memory is set aside for."""

    replay: int
    imagined: int = 0


@dataclass(frozen=True)
class Unfinished:
    """Learning from a block of real steps, broken off between two updates."""

    before: Count  # environment step at which the block starts
    done: Count  # updates, of those that it is followed by


class Progress(NamedTuple):
    """Where a run stands between two blocks, or in the middle of learning from one."""

    state: TrainState
    explorer: Policy | None = None  # collects the next block, where that is not the state's own policy
    unfinished: Unfinished | None = None  # what comes before that block


def initial_state(recipe: Recipe, capacity: Capacity, seed: int) -> TrainState:
    """Nothing collected, nothing learned. Cannot be traced: `fresh_state` can.

    Compiled as a whole: one by one, its hundred small steps take most of a run's start. Of true functions it
    matters only which there are, so that the seeds of a batch share the compilation.
    """
    known = Known(*(None if fn is None else _unasked for fn in recipe.known))
    simulator = None if recipe.simulator is None else _unasked
    return _initial_state(replace(recipe, known=known, simulator=simulator), capacity, np.uint32(seed))


def _unasked(*_: Array) -> Any:
    raise AssertionError("a state is made without asking the environment")


def fresh_state(recipe: Recipe, capacity: Capacity, seed: Array | int) -> TrainState:
    """The same, step by step: for its shapes, under a transformation."""
    root, model_key, agent_key = jax.random.split(jax.random.key(seed), 3)
    sizes, imagines = (recipe.obs_size, recipe.action_size), recipe.imagination.starts > 0
    return TrainState(
        replay=replay.init(capacity.replay, *sizes),
        model=dynamics.init(recipe.dynamics, recipe.known, *sizes, model_key) if recipe.fits_model else None,
        calibration=calibration.init(recipe.targets.horizon_steps) if recipe.targets.calibrates else None,
        imagined=replay.init(capacity.imagined, *sizes) if imagines else None,
        agent=agents.init(recipe.agent, *sizes, agent_key),
        num_env_steps=jnp.int32(0),
        key=root,
    )


# It is run once: code that is had quickly, rather than quick code, halves the time that compiling takes.
_initial_state = jax.jit(
    fresh_state,
    static_argnames=("recipe", "capacity"),
    compiler_options={"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True},
)


def grown(state: TrainState, capacity: Capacity) -> TrainState:
    """The same state with room for more transitions, if it has not got it."""
    state = replace(state, replay=_grown(state.replay, capacity.replay))
    if state.imagined is None:
        return state
    return replace(state, imagined=_grown(state.imagined, capacity.imagined))


def _grown(ring: Replay, capacity: int) -> Replay:
    return replay.grow(ring, capacity) if capacity > ring.capacity else ring
