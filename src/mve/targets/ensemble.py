"""Weights by what the members of an ensemble say of a state: steve, steve_mean, steve_cov, calibrated."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mve.targets.base import VARIANCE_FLOOR, TargetsConfig, candidate_returns, real_row, survival
from mve.targets.fixed import one_step
from mve.types import CriticTargets, EstimatorFns, Imagined, Transition, ValueFn

SCATTER_RIDGE = 1e-3  # added to the diagonal of steve_cov's scatter
RELATIVE_RIDGE = 1e-5  # and this share of its mean diagonal: single precision cannot invert without


def ensemble_candidates(
    imagined: Imagined, value: Float[Array, " N horizons M B"], discount: float
) -> Float[Array, " horizons E B"]:
    """Candidate returns by every combination of reward model, critic and transition model: E = R N M.

    `imagined` has batch axes (M, B), member m having rolled out alone from start to end, and rewards
    (H, R, M, B): reward model r's opinion of each step of member m (R = 1 where the reward is known).
    """
    _, rewards, members, rows = imagined.reward.shape
    critics = value.shape[0]

    def cross(x: Array) -> Array:  # (T, R or 1, N or 1, M, B) -> (T, E, B)
        every = jnp.broadcast_to(x, (x.shape[0], rewards, critics, members, rows))
        return every.reshape(x.shape[0], rewards * critics * members, rows)

    reward = imagined.reward + jnp.broadcast_to(imagined.bonus[:, None], imagined.reward.shape)
    return candidate_returns(
        cross(reward[:, :, None]),
        cross(discount * imagined.continuation[:, None, None]),
        cross(jnp.moveaxis(value, 0, 1)[:, None]),
    )


def equal_weights(candidates: Float[Array, " horizons E B"]) -> Float[Array, " horizons B"]:
    """Every horizon alike."""
    return jnp.full_like(candidates[:, 0], 1.0 / candidates.shape[0])


def inverse_variance_weights(candidates: Float[Array, " horizons E B"]) -> Float[Array, " horizons B"]:
    """w_k = 1 / (var_k + floor), over their sum; var_k over the E candidates of horizon k (biased).

    The least variance that a mix of uncorrelated horizons can have. The floor only guards against
    division by zero, so a horizon on which all agree takes everything: with one critic that is k = 0,
    hence one_step. Where all horizons are agreed on (one member as well), weights are equal.
    """
    precision = 1.0 / (jnp.var(candidates, axis=1) + VARIANCE_FLOOR)
    return precision / jnp.sum(precision, axis=0, keepdims=True)


def inverse_covariance_weights(candidates: Float[Array, " horizons E B"]) -> Float[Array, " horizons B"]:
    """w = (C + ridge I)^-1 1, over its sum, with C the horizons' scatter over E; a weight may be negative.

    The least variance whatever the correlation. C is a sum over members, not a mean, as in the code.
    """
    centred = jnp.moveaxis(candidates - jnp.mean(candidates, axis=1, keepdims=True), -1, 0)  # (B, H+1, E)
    scatter = jnp.matmul(centred, jnp.swapaxes(centred, 1, 2))
    size = jnp.mean(jnp.diagonal(scatter, axis1=1, axis2=2), axis=-1)[:, None, None]
    identity = jnp.eye(scatter.shape[-1], dtype=scatter.dtype)[None]
    ridge = (SCATTER_RIDGE + RELATIVE_RIDGE * size) * identity
    weight = jnp.linalg.solve(scatter + ridge, jnp.ones((*scatter.shape[:2], 1), scatter.dtype))[..., 0].T
    return weight / jnp.sum(weight, axis=0, keepdims=True)


def steve(
    batch: Transition,
    imagined: Imagined,
    ask: EstimatorFns,
    config: TargetsConfig,
    weights_of: Callable[[Array], Array] = inverse_variance_weights,
) -> CriticTargets:
    """Each horizon's mean over the ensemble, weighted by how far the ensemble agrees (Buckman et al. 2018).

    y = r + gamma * continuation * sum_k w_k mean_e C_k^e, with e over reward models x critics x members.
    The critics' mean is the bootstrap, not their least, so H = 0 is one_step for a single critic only.

    Where we differ: candidates are values of s', not of (s, a), which scales their variance by
    1 / gamma^2 against the floor and by nothing else; a predicted termination cuts a rollout off where
    the paper multiplies rewards by a probability of survival; with SAC each member draws actions of its
    own, so that candidate 0, the critics' opinion of s' alone in the paper, varies by action as well.
    """
    candidates = ensemble_candidates(imagined, ask.value(imagined.obs), config.discount)
    weight = weights_of(candidates)
    mix = jnp.sum(weight * jnp.mean(candidates, axis=1), axis=0)
    return real_row(batch, mix, jnp.mean(weight, axis=1), config.discount)


def value_by_member(
    value_fn: ValueFn, obs: Float[Array, " horizons M B S"]
) -> Float[Array, " N horizons M B"]:
    """The critics' values; what the value function draws, it draws alike for every member."""
    return jax.vmap(value_fn, in_axes=1, out_axes=2)(obs)


def calibrated(
    batch: Transition, imagined: Imagined, ask: EstimatorFns, config: TargetsConfig
) -> CriticTargets:
    """Each horizon's mean over the members, weighted by the inverse of its *measured* squared error.

    y = r + gamma * continuation * sum_k w_k mean_m C_k^m,    w_k ~ 1 / e_k

    with e_k of `calibration.squared_error`: what such a spread of the members, and of the critics, has
    turned out to mean on real steps that the model had not seen. STEVE takes the variance itself for
    e_k, and so believes an error that all members share. The bootstrap is the least of the critics'
    values. Members draw the same actions, so that they differ by the model alone, as where it is judged, and
    each pays for its own steps: rewards (H, 1, M, B).
    """
    if imagined.reward.shape[0] == 0:
        return one_step(batch, imagined, ask, config)
    assert ask.squared_error is not None
    discount = config.discount * imagined.continuation
    value = value_by_member(ask.value, imagined.obs)
    reward = imagined.reward[:, 0] + imagined.bonus
    candidates = candidate_returns(reward, discount, jnp.min(value, axis=0))
    error = ask.squared_error(
        jnp.var(candidates, axis=1),
        jnp.mean(jnp.var(value, axis=0), axis=1),
        jnp.mean(survival(discount), axis=1),
    )
    weight = inverse_error_weights(error)
    mix = jnp.sum(weight * jnp.mean(candidates, axis=1), axis=0)
    return real_row(batch, mix, jnp.mean(weight, axis=1), config.discount)


def inverse_error_weights(squared_error: Float[Array, " horizons B"]) -> Float[Array, " horizons B"]:
    """w_k = 1 / e_k, over their sum; an infinite error gets no weight. One has to be finite, none 0."""
    precision = 1.0 / squared_error
    return precision / jnp.sum(precision, axis=0, keepdims=True)
