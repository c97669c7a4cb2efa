"""What imagination has turned out to be worth: errors of imagined candidates on real steps, by depth.

A block of real steps that the model has not seen is replayed: from every state of it, every member takes
the *logged* actions. With C_k^m the candidate return of member m after k steps, and C_k the real one,

    d_k = mean_m C_k^m - C_k,      spread_k^2 = var_m C_k^m,      k = 1..H.

The critic's own error is in both terms and cancels: d_k is what imagination adds. At every depth

    log d_k^2 = a_k + b_k log spread_k^2

is fitted to all blocks, the older the less, and exp of it, times a factor, is the squared model error to
expect where members are so far apart. The factor makes the mean of the predictions that of the d_k^2: the
mean of log chi^2_1 is -1.27, so exp alone would be too low. Errors that members share are in it, unlike in
STEVE's variance. Bonuses (SAC's entropy term) are left out: the logged actions' are the same on both sides.

The critic's share is D_k^2 times the mean square of its errors, of which a multi-step TD error of the
same blocks is a sample; it holds the noise of rewards and of logged actions that the policy would not take.
"""

from __future__ import annotations

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mve.targets.base import VARIANCE_FLOOR, TargetsConfig, candidate_returns, survival
from mve.targets.ensemble import own_reward, value_by_member
from mve.types import EstimatorFns, Key, Metrics, StepFn, Transition

FEWEST = 20.0  # segments of a depth, old ones discounted, before anything imagined that deep is believed
PRIOR_SLOPE, PRIOR_SCATTER = 1.0, 1.0  # b_k where spreads do not vary, and how much they have to (nats^2)
LARGEST_SLOPE = 2.0  # b_k lies in [0, this]: members further apart are never thought to be more right
LARGEST_LOG = 60.0  # of a squared error: sums of its exponential stay finite in single precision


class Replayed(NamedTuple):
    """A block of T real steps, replayed from each of its states for k = 1..H steps."""

    error: Float[Array, " H T"]  # d_k
    variance: Float[Array, " H T"]  # spread_k^2
    valid: Bool[Array, " H T"]  # the k steps are within the block and one episode
    critic_error: Float[Array, " T"]  # multi-step TD error


class Calibration(eqx.Module):
    """Sums over all segments seen, older blocks discounted; x = log spread^2, y = log d^2."""

    count: Float[Array, " H"]
    x: Float[Array, " H"]
    y: Float[Array, " H"]
    xx: Float[Array, " H"]
    xy: Float[Array, " H"]
    squared_error: Float[Array, " H"]  # of d^2
    predicted: Float[Array, " H"]  # of exp(a + b x), by the line as it was then
    critic_count: Float[Array, ""]
    critic_squared_error: Float[Array, ""]


def init(horizon: int) -> Calibration:
    """Nothing measured yet."""
    by_depth = {name: jnp.zeros(horizon) for name in Calibration.__dataclass_fields__}
    return Calibration(**by_depth | {"critic_count": jnp.zeros(()), "critic_squared_error": jnp.zeros(())})


def line(calibration: Calibration) -> tuple[Float[Array, " H"], Float[Array, " H"]]:
    """a_k and b_k: least squares, the slope drawn to 1 where spreads hardly vary."""
    count = jnp.maximum(calibration.count, 1e-6)
    x, y = calibration.x / count, calibration.y / count
    scatter = jnp.maximum(calibration.xx - calibration.x * x, 0.0)
    slope = (calibration.xy - calibration.x * y + PRIOR_SCATTER * PRIOR_SLOPE) / (scatter + PRIOR_SCATTER)
    slope = jnp.clip(slope, 0.0, LARGEST_SLOPE)
    return y - slope * x, slope


def _expected(calibration: Calibration, log_variance: Float[Array, " H B"]) -> Float[Array, " H B"]:
    """exp(a_k + b_k x), without the factor."""
    level, slope = (jnp.broadcast_to(c[:, None], log_variance.shape) for c in line(calibration))
    return jnp.exp(jnp.minimum(level + slope * log_variance, LARGEST_LOG))


def squared_error(
    calibration: Calibration, variance: Float[Array, " H+1 B"], weighs: Float[Array, " H+1 B"]
) -> Float[Array, " H+1 B"]:
    """Expected squared error of the candidates 0..H of states where members vary so, V_k weighing `weighs`.

    Candidate 0 imagines nothing. A depth that was hardly measured yet has an infinite error: before
    there are data, `calibrated` is one_step.
    """
    factor = calibration.squared_error / jnp.maximum(calibration.predicted, 1e-30)
    model = _expected(calibration, jnp.log(variance[1:] + VARIANCE_FLOOR))
    model = jnp.broadcast_to(factor[:, None], model.shape) * model
    measured = jnp.broadcast_to((calibration.count >= FEWEST)[:, None], model.shape)
    model = jnp.where(measured, model, jnp.inf)
    critic = calibration.critic_squared_error / jnp.maximum(calibration.critic_count, 1e-6)
    share = jnp.square(weighs) * critic + VARIANCE_FLOOR
    return share + jnp.concatenate([jnp.zeros_like(share[:1]), model])


def observe(calibration: Calibration, seen: Replayed, decay: float) -> Calibration:
    """Take in a replayed block; what was known before counts `decay` times as much."""
    squared = jnp.square(seen.error)
    valid = seen.valid & jnp.isfinite(squared) & jnp.isfinite(seen.variance)
    x = jnp.log(jnp.where(valid, seen.variance, 0.0) + VARIANCE_FLOOR)
    y = jnp.minimum(jnp.log(jnp.where(valid, squared, 0.0) + VARIANCE_FLOOR), LARGEST_LOG)
    critic = jnp.square(seen.critic_error)
    row = jnp.isfinite(critic) & seen.valid[0]

    def total(of: Array, where: Array = valid) -> Array:
        return jnp.sum(jnp.where(where, of, 0.0), axis=-1)

    new = Calibration(
        count=total(jnp.ones_like(x)),
        x=total(x),
        y=total(y),
        xx=total(x * x),
        xy=total(x * y),
        squared_error=total(jnp.exp(y)),
        predicted=jnp.zeros_like(calibration.predicted),
        critic_count=total(jnp.ones_like(critic), row),
        critic_squared_error=total(critic, row),
    )
    calibration = jax.tree.map(lambda old, block: decay * old + block, calibration, new)
    # By the line as it is now: the first blocks' own lines may be many orders of magnitude out.
    predicted = calibration.predicted + total(_expected(calibration, x))
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
    """Every member takes the logged actions from every state of a block; compare with what followed.

    `step_fn` moves states (M, T, S) and pays rewards (R, M, T), as in training. Rows of the block from
    `num_rows` on are padding.
    """
    row, depth = jnp.arange(block.reward.shape[0])[None], jnp.arange(config.horizon_steps)[:, None]
    here = jnp.minimum(row + depth, row[:, -1:])  # (H, T): where step t from each state is recorded
    real: Transition = jax.tree.map(lambda x: x[here], block)
    valid = (row + depth < num_rows) & (real.episode == block.episode[None])

    def step(obs: Array, t: Array) -> tuple[Array, tuple[Array, Array, Array]]:
        action = jnp.broadcast_to(real.action[t], (members, *real.action[t].shape))
        next_obs, reward, continuation = step_fn(obs, action, jax.random.fold_in(key, t))
        return next_obs, (next_obs, reward, continuation)

    start = jnp.broadcast_to(block.obs, (members, *block.obs.shape))
    _, (next_obs, reward, continuation) = jax.lax.scan(step, start, depth[:, 0])
    # The real states join in as one more member: what the value function draws is then the same for all.
    imagined_obs = jnp.concatenate([start[None], next_obs])
    real_obs = jnp.concatenate([block.obs[None], real.next_obs])
    obs = jnp.concatenate([imagined_obs, real_obs[:, None]], axis=1)
    value = jnp.min(value_by_member(ask.value, obs), axis=0)

    imagined = candidate_returns(own_reward(reward), config.discount * continuation, value[:, :-1])
    truth = candidate_returns(real.reward, config.discount * real.continuation, value[:, -1])
    return Replayed(
        error=(jnp.mean(imagined, axis=1) - truth)[1:],
        variance=jnp.var(imagined, axis=1)[1:],
        valid=valid,
        critic_error=_multi_step_error(ask, real, valid, value[1:, -1], config.discount),
    )


def _multi_step_error(
    ask: EstimatorFns, real: Transition, valid: Array, next_value: Array, discount: float
) -> Float[Array, " T"]:
    """sum_t D_t (r_t + gamma c_t V(s_{t+1}) - Q(s_t, a_t)) over the valid steps from each state.

    How far H real steps would move Q(s_0, a_0) if the policy had taken the logged actions.
    """
    assert ask.action_value is not None
    step_discount = discount * real.continuation
    error = real.reward + step_discount * next_value
    error = error - jnp.min(ask.action_value(real.obs, real.action), axis=0)
    return jnp.sum(jnp.where(valid, survival(step_discount)[:-1] * error, 0.0), axis=0)


def metrics(calibration: Calibration) -> Metrics:
    """Root mean squares of what was measured: of the critic's multi-step error, and of d_k for each k."""
    model = jnp.sqrt(calibration.squared_error / jnp.maximum(calibration.count, 1.0))
    critic = jnp.sqrt(calibration.critic_squared_error / jnp.maximum(calibration.critic_count, 1.0))
    by_depth = {f"mve/imagined_rmse_k{k + 1}": model[k] for k in range(model.shape[0])}
    return {"mve/critic_rmse": critic} | by_depth
