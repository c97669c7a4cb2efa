"""The nouns that flow between the stages. No logic lives here.

Axes, one letter each, horizon first:
H horizon, B batch, M model members, R reward models, N critics, E combinations of these three,
K regression rows, S obs, A action, T env time.

r_t is the reward for acting in s_t. `continuation` is 1 - terminated: a time limit keeps it at 1.
Actions are scaled to [-1, 1], and the choice among A discrete ones is a one-hot vector, everywhere but inside
`envs/`, which speaks the environment's own units.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    ClassVar,
    Literal,
    NamedTuple,
    SupportsFloat,
    SupportsIndex,
    TypeAlias,
)

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from msgspec import Meta

Metrics: TypeAlias = dict[str, Array]
Key: TypeAlias = jax.Array  # a typed PRNG key, consumed by the function that takes it

# (obs, action, next_obs) -> reward or terminated, in the environment's own units, any leading axes.
# A discrete action is its own integer there, so that `action` is (*batch) and has no last axis.
RewardFn: TypeAlias = Callable[[Array, Array, Array], Array]
TerminationFn: TypeAlias = Callable[[Array, Array, Array], Array]

# The functions that a rollout and an estimator are given.
StepFn: TypeAlias = Callable[
    [Array, Array, Key], tuple[Array, Array, Array]
]  # -> next_obs, reward, continuation
# The same, told of the real steps beside the imagined ones.
BesideStepFn: TypeAlias = Callable[[Array, Array, Key, "Beside"], tuple[Array, Array, Array]]
PolicyFn: TypeAlias = Callable[[Array, Key], tuple[Array, Array]]  # obs, key -> action, bonus of acting
ValueFn: TypeAlias = Callable[[Array], Array]  # obs (*batch, S) -> one value per critic (N, *batch)
ActionValueFn: TypeAlias = Callable[[Array, Array], Array]  # obs, action (*batch, A) -> (N, *batch)
LogDensityFn: TypeAlias = Callable[[Array, Array], Array]  # obs, action -> log pi(a|s) (*batch), or -inf
# Of candidates 0..H: variance over members, of V(s_k) over critics, D_k -> squared error, all (H+1, B).
SquaredErrorFn: TypeAlias = Callable[[Array, Array, Array], Array]

# What an actor is improved on: its policy, and its value (*batch) of a state with the bonus of the action
# taken there, make of start states (B, S) the values (B,) to raise and the bonuses (B,) of the first actions.
ActorValueFn: TypeAlias = Callable[[Array, Key], tuple[Array, Array]]
ObjectiveFn: TypeAlias = Callable[[PolicyFn, ActorValueFn, Array, Key], tuple[Array, Array]]
PolicyOfFn: TypeAlias = Callable[[Any], PolicyFn]  # of an actor, which gradients are taken of

# What a fit is given: rows drawn from the replay, with leading axes of this shape.
SampleFn: TypeAlias = Callable[[tuple[int, ...], Key], "Transition"]


class Transition(NamedTuple):
    """What one environment step leaves behind; also a batch of them."""

    obs: Float[Array, " *batch S"]
    action: Float[Array, " *batch A"]
    reward: Float[Array, " *batch"]
    next_obs: Float[Array, " *batch S"]
    continuation: Float[Array, " *batch"]
    episode: Int[Array, " *batch"]  # running number of the episode: neighbours in time share it
    step: Int[Array, " *batch"]  # environment step at which it was collected: the row's own name
    log_density: Float[Array, " *batch"]  # of the action under the policy that took it; 0 where nobody asks


class Beside(NamedTuple):
    """Real steps that run beside imagined ones, as far as there are any."""

    rows: Transition
    there: Bool[Array, " *batch"]


class Imagined(NamedTuple):
    """H model steps under the policy, from a batch of start states.

    Where members are kept apart, *batch is (M, B) and `reward` is (H, R, M, B): R reward models judge every
    member's steps, or R = 1, where the reward is known or each member judges its own.
    """

    obs: Float[Array, " H+1 *batch S"]
    action: Float[Array, " H *batch A"]
    reward: Float[Array, " H *batch"]
    continuation: Float[Array, " H *batch"]
    bonus: Float[Array, " H *batch"]  # of acting in state t: 0, or SAC's entropy term


class SharedObjective(NamedTuple):
    """What an actor is to raise, where the rollout under it has been made: the critic's targets are from it.

    `pull_back` takes the cotangents of the rollout to those of the actor, a tuple of one; `worth` says what
    the rollout is worth (B,), and the bonuses (B,) of its first actions.
    """

    imagined: Imagined
    pull_back: Callable[[Imagined], tuple[Any]]
    worth: Callable[[Imagined, ActorValueFn], tuple[Array, Array]]


class Segment(NamedTuple):
    """Real steps that followed one another, as they were recorded."""

    rows: Transition  # (H, B, ...)
    valid: Bool[Array, " H B"]  # still in the episode that the first row is from, and still remembered


class EstimatorFns(NamedTuple):
    """What an estimator may ask about the target policy, by the slow critics; None where it does not."""

    value: ValueFn  # bonus of the state's own action included
    action_value: ActionValueFn | None = None
    log_density: LogDensityFn | None = None
    squared_error: SquaredErrorFn | None = None


ALL_ON_ZERO = np.ones(1, np.float32)


class CriticTargets(NamedTuple):
    """K rows for the critic to regress: every estimator's answer, whichever it was."""

    obs: Float[Array, " K S"]
    action: Float[Array, " K A"]
    value: Float[Array, " K"]
    weight: Float[Array, " K"]  # of the row's squared error; a plain mean has 1/K everywhere
    # What the real rows' values gave to each horizon, on average; one-step targets have no other than 0.
    horizon_weight: Float[Array | np.ndarray, " horizons"] = ALL_ON_ZERO


class Known(NamedTuple):
    """True functions of the environment; None where one has to be learned."""

    reward: RewardFn | None = None
    termination: TerminationFn | None = None


class UserError(Exception):
    """A mistake the user can mend: shown as one line, never a traceback."""

    exit_code: ClassVar[int] = 2


class DivergedError(UserError):
    """Training gave what is not finite. The first line says what and where, the others what led to it."""

    exit_code = 3


class FaultError(UserError):
    """An environment failed and was not to be begun anew, or not once more."""

    exit_code = 4


class SpoiltError(FaultError):
    """What an environment on the device gave was learned from before it was seen not to be finite: nothing
    since the last checkpoint is worth keeping."""


# Ranges of settings, checked when a configuration is read.
Count = Annotated[int, Meta(ge=0)]
Positive = Annotated[int, Meta(ge=1)]
Widths = tuple[Positive, ...]
Rate = Annotated[float, Meta(gt=0, le=1e3)]
NonNegative = Annotated[float, Meta(ge=0, le=1e9)]
Unit = Annotated[float, Meta(ge=0, le=1)]
if TYPE_CHECKING:  # their words are replaced by numbers before anything computes with them
    Discount: TypeAlias = float
    OwnCount: TypeAlias = int
else:
    Discount = Unit | Literal["episode"]
    OwnCount = Count | Literal["auto"]
Whole: TypeAlias = SupportsIndex | SupportsFloat  # an integer of any library, or 2e4
Seconds = Annotated[float, Meta(gt=0, le=1e6)]
Json: TypeAlias = dict[str, Any]
