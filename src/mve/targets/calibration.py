"""What imagination has turned out to be worth: errors of imagined candidates on real steps, by depth.

A block of real steps that the model has not seen is replayed: from every state of it, as many members as
imagine a target take the *logged* actions. With C_k^m the candidate return of member m after k steps, and
C_k the real one,

    d_k = mean_m C_k^m - C_k,      spread_k^2 = var_m C_k^m,      k = 1..H.

The critic's own error is in both terms and cancels: d_k is what imagination adds. At every depth

    log d_k^2 = a_k + b_k log spread_k^2

is fitted to all blocks, the older the less, and exp of it, times a factor, is the squared model error to
expect where members are so far apart. The factor makes the mean of the predictions that of the d_k^2: the
mean of log chi^2_1 is -1.27, so exp alone would be too low. Errors that members share are in it, unlike in
STEVE's variance. Bonuses (SAC's entropy term) are left out: the logged actions' are the same on both sides.

The critic's share is measured in the same way, as depth 0: d_0 is a multi-step TD error of Q(s, a) on the
same steps and spread_0^2 the variance over critics there (one critic: a constant, and the share is the mean
square). It weighs D_k^2 in candidate k. It holds the noise of rewards, and of actions that the policy
would not take; an error that outlasts the H steps is not seen.
"""

from __future__ import annotations

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mve.targets.base import VARIANCE_FLOOR, TargetsConfig, candidate_returns, survival
from mve.targets.ensemble import value_by_member
from mve.types import EstimatorFns, Key, Metrics, StepFn, Transition

FEWEST = 20.0  # segments of a depth, old ones discounted, before anything imagined that deep is believed
PRIOR_SLOPE, PRIOR_SCATTER = 1.0, 1.0  # b_k where spreads do not vary, and how much they have to (nats^2)
LARGEST_SLOPE = 2.0  # b_k lies in [0, this]: members further apart are never thought to be more right
LARGEST_LOG = 60.0  # of a squared error: sums of its exponential stay finite in single precision


class Replayed(NamedTuple):
    """A block of T real steps, replayed from each of its states; depth 0 is the critic's."""

    error: Float[Array, " depths T"]  # d_k
    variance: Float[Array, " depths T"]  # spread_k^2
    valid: Bool[Array, " depths T"]  # the k steps are within the block and one episode


class Calibration(eqx.Module):
    """Sums over all segments seen, older blocks discounted; x = log spread^2, y = log d^2."""

    count: Float[Array, " depths"]
    x: Float[Array, " depths"]
    y: Float[Array, " depths"]
    xx: Float[Array, " depths"]
    xy: Float[Array, " depths"]
    squared_error: Float[Array, " depths"]  # of d^2
    predicted: Float[Array, " depths"]  # of exp(a + b x), by the line as it was then


def init(horizon: int) -> Calibration:
    """Nothing measured yet."""
    return Calibration(*(jnp.zeros(horizon + 1) for _ in Calibration.__dataclass_fields__))


def line(calibration: Calibration) -> tuple[Float[Array, " depths"], Float[Array, " depths"]]:
    """a_k and b_k: least squares, the slope drawn to 1 where spreads hardly vary."""
    count = jnp.maximum(calibration.count, 1e-6)
    x, y = calibration.x / count, calibration.y / count
    scatter = jnp.maximum(calibration.xx - calibration.x * x, 0.0)
    slope = (calibration.xy - calibration.x * y + PRIOR_SCATTER * PRIOR_SLOPE) / (scatter + PRIOR_SCATTER)
    slope = jnp.clip(slope, 0.0, LARGEST_SLOPE)
    return y - slope * x, slope


def _on_the_line(calibration: Calibration, x: Float[Array, " depths B"]) -> Float[Array, " depths B"]:
    """exp(a_k + b_k x), without the factor."""
    level, slope = (jnp.broadcast_to(c[:, None], x.shape) for c in line(calibration))
    return jnp.exp(jnp.minimum(level + slope * x, LARGEST_LOG))


def expected(calibration: Calibration, variance: Float[Array, " depths B"]) -> Float[Array, " depths B"]:
    """d_k^2 to be expected where the spread at depth k is such; depth 0 is the critic's."""
    factor = calibration.squared_error / jnp.maximum(calibration.predicted, 1e-30)
    on_the_line = _on_the_line(calibration, jnp.log(variance + VARIANCE_FLOOR))
    return jnp.broadcast_to(factor[:, None], variance.shape) * on_the_line


def squared_error(
    calibration: Calibration,
    variance: Float[Array, " depths B"],
    critic_variance: Float[Array, " depths B"],
    weighs: Float[Array, " depths B"],
) -> Float[Array, " depths B"]:
    """Squared error to be expected of candidates 0..H, from the variance of each over the model's members,
    that of V(s_k) over critics, and what V(s_k) weighs in it.

    Candidate 0 imagines nothing. A depth that was hardly measured yet has an infinite error: before
    there are data, `calibrated` is one_step.
    """
    model = expected(calibration, variance)[1:]
    measured = jnp.broadcast_to((calibration.count[1:] >= FEWEST)[:, None], model.shape)
    model = jnp.where(measured, model, jnp.inf)
    critics = jax.tree.map(lambda x: jnp.broadcast_to(x[:1], x.shape), calibration)  # one line for all k
    share = jnp.square(weighs) * expected(critics, critic_variance) + VARIANCE_FLOOR
    return share + jnp.concatenate([jnp.zeros_like(share[:1]), model])


def observe(calibration: Calibration, seen: Replayed, decay: float) -> Calibration:
    """Take in a replayed block; what was known before counts `decay` times as much."""
    squared = jnp.square(seen.error)
    valid = seen.valid & jnp.isfinite(squared) & jnp.isfinite(seen.variance)
    x = jnp.log(jnp.where(valid, seen.variance, 0.0) + VARIANCE_FLOOR)
    y = jnp.minimum(jnp.log(jnp.where(valid, squared, 0.0) + VARIANCE_FLOOR), LARGEST_LOG)

    def total(of: Array) -> Array:
        return jnp.sum(jnp.where(valid, of, 0.0), axis=1)

    new = Calibration(
        count=total(jnp.ones_like(x)),
        x=total(x),
        y=total(y),
        xx=total(x * x),
        xy=total(x * y),
        squared_error=total(jnp.exp(y)),
        predicted=jnp.zeros_like(calibration.predicted),
    )
    calibration = jax.tree.map(lambda old, block: decay * old + block, calibration, new)
    # By the line as it is now: the first blocks' own lines may be many orders of magnitude out.
    predicted = calibration.predicted + total(_on_the_line(calibration, x))
    return eqx.tree_at(lambda c: c.predicted, calibration, predicted)


def replay(
    step_fn: StepFn,
    ask: EstimatorFns,
    block: Transition,
    num_rows: Array,
    members: int,
    config: TargetsConfig,
    key: Key,
) -> Replayed:
    """So many members take the logged actions from every state of a block; compare with what followed.

    `step_fn` moves states (M, T, S) and pays rewards (1, M, T), as in training. Rows of the block from
    `num_rows` on are padding.
    """
    row, depth = jnp.arange(block.reward.shape[0])[None], jnp.arange(config.horizon_steps)[:, None]
    here = jnp.minimum(row + depth, row[:, -1:])  # (H, T): where step t from each state is recorded
    real: Transition = jax.tree.map(lambda x: x[here], block)
    valid = (row + depth < num_rows) & (real.episode == block.episode[None])

    def step(obs: Array, t: Array) -> tuple[Array, tuple[Array, Array, Array]]:
        action = jnp.broadcast_to(real.action[t], (members, *real.action[t].shape))
        next_obs, reward, continuation = step_fn(obs, action, jax.random.fold_in(key, t))
        # As in imagination: what follows an end counts for nothing, and has to be a number.
        alive = jnp.where(jnp.broadcast_to(continuation[..., None] > 0, obs.shape), next_obs, obs)
        return alive, (next_obs, reward, continuation)

    start = jnp.broadcast_to(block.obs, (members, *block.obs.shape))
    _, (next_obs, reward, continuation) = jax.lax.scan(step, start, depth[:, 0])
    # The real states join in as one more member: what the value function draws is then the same for all.
    imagined_obs = jnp.concatenate([start[None], next_obs])
    real_obs = jnp.concatenate([block.obs[None], real.next_obs])
    obs = jnp.concatenate([imagined_obs, real_obs[:, None]], axis=1)
    value = jnp.min(value_by_member(ask.value, obs), axis=0)

    imagined = candidate_returns(reward[:, 0], config.discount * continuation, value[:, :-1])
    truth = candidate_returns(real.reward, config.discount * real.continuation, value[:, -1])
    critic_error, critic_variance = _of_the_critic(ask, real, valid, value[1:, -1], config.discount)
    error = (jnp.mean(imagined, axis=1) - truth).at[0].set(critic_error)
    variance = jnp.var(imagined, axis=1).at[0].set(critic_variance)
    return Replayed(error, variance, valid=jnp.concatenate([valid[:1], valid]))


def _of_the_critic(
    ask: EstimatorFns, real: Transition, valid: Array, next_value: Array, discount: float
) -> tuple[Float[Array, " T"], Float[Array, " T"]]:
    """sum_t D_t (r_t + gamma c_t V(s_{t+1}) - Q(s_t, a_t)) over the valid steps from each state: how far
    they would move Q(s_0, a_0) had the policy taken them. And the variance of Q(s_0, a_0) over critics."""
    assert ask.action_value is not None
    step_discount = discount * real.continuation
    action_value = ask.action_value(real.obs, real.action)
    error = real.reward + step_discount * next_value - jnp.min(action_value, axis=0)
    total = jnp.sum(jnp.where(valid, survival(step_discount)[:-1] * error, 0.0), axis=0)
    return total, jnp.var(action_value[:, 0], axis=0)


def metrics(calibration: Calibration) -> Metrics:
    """Root mean squares of what was measured: of the critic's multi-step error, and of d_k for each k."""
    rms = jnp.sqrt(calibration.squared_error / jnp.maximum(calibration.count, 1.0))
    return {f"mve/imagined_rmse_k{k}" if k else "mve/critic_rmse": rms[k] for k in range(rms.shape[0])}
