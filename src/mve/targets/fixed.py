"""Weights that are the same for every state: one_step, mve, mve_tdk, lambda."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from mve.targets.base import TargetsConfig, candidate_returns, real_row, returns_to_go
from mve.types import CriticTargets, EstimatorFns, Imagined, Transition


def one_step(
    batch: Transition, imagined: Imagined, ask: EstimatorFns, config: TargetsConfig
) -> CriticTargets:
    """All weight on k = 0: r + gamma * continuation * V(s'). The target of DDPG, TD3 and SAC."""
    return real_row(batch, jnp.min(ask.value(imagined.obs[0]), axis=0), all_on(0), config.discount)


def mve(batch: Transition, imagined: Imagined, ask: EstimatorFns, config: TargetsConfig) -> CriticTargets:
    """All weight on k = H: H imagined rewards, then the critic (Feinberg et al. 2018, equation 1).

    The bootstrap is the least of the critics' values (one critic: that one), as in clipped double-Q.
    """
    value = jnp.min(ask.value(imagined.obs[-1]), axis=0)
    to_go = returns_to_go(imagined.reward + imagined.bonus, config.discount * imagined.continuation, value)
    weight = all_on(imagined.reward.shape[0])
    return real_row(batch, jnp.concatenate([to_go, value[None]])[0], weight, config.discount)


def mve_tdk(batch: Transition, imagined: Imagined, ask: EstimatorFns, config: TargetsConfig) -> CriticTargets:
    """MVE with the TD-k trick: the real row, and every imagined (s_t, a_t) with its return-to-go.

    The critic is trained on the states where it will be asked (Feinberg et al. 2018, section 3.2). With
    W_t = b_t + G_t the soft value of imagined state t, the rows are

        y_real = r + gamma * continuation * W_0,      y_t = G_t = W_t - b_t,   t = 0..H-1:

    the bonus of acting at t enters the returns of rows before t, never row t's own target.

    Rows that follow a termination, real or predicted, weigh nothing; the squared errors are averaged
    over the rows kept at each depth, summed over the H+1 depths and divided by H if so configured.
    """
    horizon = imagined.reward.shape[0]
    if horizon == 0:
        return one_step(batch, imagined, ask, config)
    value = jnp.min(ask.value(imagined.obs[-1]), axis=0)
    soft_value = returns_to_go(
        imagined.reward + imagined.bonus, config.discount * imagined.continuation, value
    )
    # Where several real steps are summed the continuation holds their discounts as well.
    going_on = (batch.continuation > 0).astype(batch.continuation.dtype)
    alive = jnp.cumprod(jnp.concatenate([going_on[None], imagined.continuation[:-1]]), axis=0)
    kept = jnp.maximum(jnp.sum(alive, axis=1, keepdims=True), 1.0)

    real = real_row(batch, soft_value[0], all_on(horizon), config.discount)
    scale = 1.0 / horizon if config.divide_by_horizon else 1.0

    def join(first: Array, rest: Array) -> Array:
        return jnp.concatenate([first, rest.reshape(-1, *rest.shape[2:])])

    return real._replace(
        obs=join(real.obs, imagined.obs[:-1]),
        action=join(real.action, imagined.action),
        value=join(real.value, soft_value - imagined.bonus),
        weight=scale * join(real.weight, alive / kept),
    )


def lambda_return(
    batch: Transition, imagined: Imagined, ask: EstimatorFns, config: TargetsConfig
) -> CriticTargets:
    """Weights (1 - l) l^k over k < H, and the rest, l^H, on k = H (Sutton 1988, cut off at H).

    The expanded relative of TD(lambda): the steps mixed are imagined, so nothing is off-policy.
    """
    candidates = candidate_returns(
        imagined.reward + imagined.bonus,
        config.discount * imagined.continuation,
        jnp.min(ask.value(imagined.obs), axis=0),
    )
    weight = jnp.array(geometric_weights(config.trace_decay, imagined.reward.shape[0]), jnp.float32)
    mix = jnp.tensordot(weight.astype(candidates.dtype), candidates, axes=1)
    return real_row(batch, mix, weight, config.discount)


def geometric_weights(decay: float, horizon: int) -> list[float]:
    """(1 - l) l^k for k < H, and l^H: the H+1 weights sum to 1."""
    return [(1.0 - decay) * decay**k for k in range(horizon)] + [decay**horizon]


def all_on(horizon: int) -> Float[Array, " horizons"]:
    """Weight 1 on the deepest horizon, `horizon`, and none on those before it."""
    return jnp.zeros(horizon + 1).at[horizon].set(1.0)
