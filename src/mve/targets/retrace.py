"""Retrace: several real steps without a model. The rival of expansion that costs no imagination."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from mve.targets.base import TargetsConfig, real_row, returns_to_go
from mve.types import CriticTargets, EstimatorFns, Segment, Transition


def retrace(batch: Transition, segment: Segment, ask: EstimatorFns, config: TargetsConfig) -> CriticTargets:
    """The real steps that followed, each as far as the target policy would have come to it.

        y = r_0 + gamma c_0 V(s_1) + sum_{t=1..H} (prod_{i=1..t} gamma c_{i-1} trace_i) delta_t
        delta_t = r_t + gamma c_t V(s_{t+1}) - Q(s_t, a_t)
        trace_t = lambda min(1, pi(a_t|s_t) / mu(a_t|s_t))

    Munos et al. 2016, arXiv 1606.02647, equation 4. Row 0 is `batch`, rows 1..H the segment; a row that
    is not valid has trace 0. V and Q are the least of the slow critics; V holds the bonus of acting (SAC's
    entropy term) and Q does not hold that of its own action, so each is counted once. A policy without a
    density, log pi = -inf wherever another action was taken, is cut there.
    """
    horizon = segment.valid.shape[0]
    rows = segment.rows
    value = jnp.min(ask.value(jnp.concatenate([batch.next_obs[None], rows.next_obs])), axis=0)
    if horizon == 0:
        return real_row(batch, value[0], jnp.ones(1), config.discount)
    assert ask.action_value is not None
    assert ask.log_density is not None
    trace = traces(ask.log_density(rows.obs, rows.action), segment, config.trace_decay)
    error = rows.reward + config.discount * rows.continuation * value[1:]
    error = error - jnp.min(ask.action_value(rows.obs, rows.action), axis=0)
    # A_t = delta_t + gamma c_t trace_{t+1} A_{t+1}, so that y = r_0 + gamma c_0 (V(s_1) + trace_1 A_1).
    later = jnp.concatenate([trace[1:], jnp.zeros_like(trace[:1])])
    ahead = returns_to_go(error, config.discount * rows.continuation * later, jnp.zeros_like(error[0]))
    return real_row(batch, value[0] + trace[0] * ahead[0], stopping_weights(trace), config.discount)


def traces(log_density: Float[Array, " H B"], segment: Segment, decay: float) -> Float[Array, " H B"]:
    """lambda min(1, pi / mu), 0 in rows that are not valid."""
    ratio = jnp.exp(jnp.minimum(log_density - segment.rows.log_density, 0.0))
    # -inf less -inf is not a number; what the policy never does ends the trace, whoever else did it.
    return jnp.where(segment.valid & ~jnp.isneginf(log_density), decay * ratio, 0.0)


def stopping_weights(trace: Float[Array, " H B"]) -> Float[Array, " horizons"]:
    """Mean share of the n-step returns that end after k further steps, k = 0..H.

    P_k - P_{k+1} with P_k = trace_1 ... trace_k: on the policy's own steps lambda's (1 - l) l^k.
    """
    one = jnp.ones_like(trace[:1])
    reached = jnp.concatenate([one, jnp.cumprod(trace, axis=0), 0.0 * one])
    return jnp.mean(reached[:-1] - reached[1:], axis=1)
