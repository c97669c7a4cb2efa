"""Stage 5, estimate: what should the critic say? Every value-expansion method is a choice made here.

Imagine H steps from the *real* next state s_0. With d_t = gamma * continuation_t, D_k = d_0 ... d_{k-1}
and b_t the bonus of acting in s_t (0, or SAC's entropy term), candidate k is

    C_k = sum_{t<k} D_t (b_t + r_t) + D_k V(s_k),    k = 0..H,

a value of s_0. An estimator chooses weights over the candidates and the rows to regress. The real row
always keeps its observed reward and continuation: y = r + gamma * continuation * mix.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mve.types import Count, CriticTargets, Imagined, Transition, Unit, ValueFn

Estimator: TypeAlias = Callable[[Transition, Imagined, ValueFn, "TargetsConfig"], CriticTargets]

VARIANCE_FLOOR = 1e-8  # added to STEVE's variances, in squared units of return
SCATTER_RIDGE = 1e-3  # added to the diagonal of steve_cov's scatter
RELATIVE_RIDGE = 1e-5  # and this share of its mean diagonal: single precision cannot invert without


@dataclass(frozen=True, kw_only=True)
class TargetsConfig:
    """How the critic's targets are made from a real transition and an imagined continuation."""

    estimator: Literal["one_step", "mve", "mve_tdk", "lambda", "steve", "steve_mean", "steve_cov"] = (
        "one_step"
    )
    """one_step: the base learner. mve: expand the real row. mve_tdk: and regress every imagined row too.
    lambda: a fixed geometric mix of all horizons. steve: trust a horizon as its ensemble agrees on it;
    steve_mean: all horizons alike; steve_cov: minding that errors of near horizons go together."""
    horizon_steps: Count = 3
    """H, imagined steps per target; 0 is the base learner exactly. one_step does not read it."""
    discount: Unit = 0.99
    """gamma, per environment step."""
    trace_decay: Unit = 0.75
    """lambda, of the estimator of that name: 0 is one_step, 1 is mve (STEVE's ablations: 0.25 and 0.75)."""
    divide_by_horizon: bool = True
    """Divide the loss of mve_tdk by H, as the paper prints it; its H+1 terms then sum to (H+1)/H."""

    @property
    def imagined_steps(self) -> int:
        """Model steps that the estimator asks for; 0 means that no model is needed at all."""
        return 0 if self.estimator == "one_step" else self.horizon_steps

    @property
    def keeps_members(self) -> bool:
        """Whether every start is imagined by every member, whose answers then stay apart: axes (M, B)."""
        return self.estimator.startswith("steve")


def candidate_returns(
    reward: Float[Array, " H *batch"],
    discount: Float[Array, " H *batch"],
    bootstrap: Float[Array, " H+1 *batch"],
) -> Float[Array, " H+1 *batch"]:
    """Return of the start state by k imagined rewards and then the value of state k, for every k.

    C_k = sum_{t<k} D_t r_t + D_k v_k with D_k = d_0 ... d_{k-1}; row 0 is the bootstrap of the start
    state itself. Feinberg et al. 2018 section 3.1 for one k; Buckman et al. 2018 equation 2 for all.
    """
    one = jnp.ones_like(bootstrap[:1])
    survival = jnp.concatenate([one, jnp.cumprod(discount, axis=0)])
    gained = jnp.concatenate([0.0 * one, jnp.cumsum(survival[:-1] * reward, axis=0)])
    return gained + survival * bootstrap


def returns_to_go(
    reward: Float[Array, " H *batch"],
    discount: Float[Array, " H *batch"],
    bootstrap: Float[Array, " *batch"],
) -> Float[Array, " H *batch"]:
    """Return from each imagined state to the end of the rollout.

    G_t = r_t + d_t G_{t+1}, backwards from G_H = bootstrap. The tail of row t is thus discounted by
    gamma^(H-t); the paper prints gamma^H on every row, a misprint that its own code does not share.
    Row 0 expands by the full horizon. The caller stops gradients.
    """

    def backwards(later: Array, now: tuple[Array, Array]) -> tuple[Array, Array]:
        r, d = now
        return (here := r + d * later), here

    return jax.lax.scan(backwards, bootstrap, (reward, discount), reverse=True)[1]


def real_row(batch: Transition, value: Float[Array, " B"], discount: float) -> CriticTargets:
    """The observed step, then `value` of the real next state: r + gamma continuation value; weights 1/B."""
    return CriticTargets(
        obs=batch.obs,
        action=batch.action,
        value=batch.reward + discount * batch.continuation * value,
        weight=jnp.full_like(batch.reward, 1.0 / batch.reward.shape[0]),
    )


def one_step(
    batch: Transition, imagined: Imagined, value_fn: ValueFn, config: TargetsConfig
) -> CriticTargets:
    """All weight on k = 0: r + gamma * continuation * V(s'). The target of DDPG, TD3 and SAC."""
    return real_row(batch, jnp.min(value_fn(imagined.obs[0]), axis=0), config.discount)


def mve(batch: Transition, imagined: Imagined, value_fn: ValueFn, config: TargetsConfig) -> CriticTargets:
    """All weight on k = H: H imagined rewards, then the critic (Feinberg et al. 2018, equation 1).

    The bootstrap is the least of the critics' values (one critic: that one), as in clipped double-Q.
    """
    value = jnp.min(value_fn(imagined.obs[-1]), axis=0)
    to_go = returns_to_go(imagined.reward + imagined.bonus, config.discount * imagined.continuation, value)
    return real_row(batch, jnp.concatenate([to_go, value[None]])[0], config.discount)


def mve_tdk(batch: Transition, imagined: Imagined, value_fn: ValueFn, config: TargetsConfig) -> CriticTargets:
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
        return one_step(batch, imagined, value_fn, config)
    value = jnp.min(value_fn(imagined.obs[-1]), axis=0)
    soft_value = returns_to_go(
        imagined.reward + imagined.bonus, config.discount * imagined.continuation, value
    )
    alive = jnp.cumprod(jnp.concatenate([batch.continuation[None], imagined.continuation[:-1]]), axis=0)
    kept = jnp.maximum(jnp.sum(alive, axis=1, keepdims=True), 1.0)

    real = real_row(batch, soft_value[0], config.discount)
    imaginary = CriticTargets(
        obs=imagined.obs[:-1], action=imagined.action, value=soft_value - imagined.bonus, weight=alive / kept
    )
    scale = 1.0 / horizon if config.divide_by_horizon else 1.0
    rows: CriticTargets = jax.tree.map(
        lambda first, rest: jnp.concatenate([first, rest.reshape(-1, *rest.shape[2:])]), real, imaginary
    )
    return rows._replace(weight=scale * rows.weight)


def lambda_return(
    batch: Transition, imagined: Imagined, value_fn: ValueFn, config: TargetsConfig
) -> CriticTargets:
    """Weights (1 - l) l^k over k < H, and the rest, l^H, on k = H (Sutton 1988, cut off at H).

    The expanded relative of TD(lambda): the steps mixed are imagined, so nothing is off-policy.
    """
    candidates = candidate_returns(
        imagined.reward + imagined.bonus,
        config.discount * imagined.continuation,
        jnp.min(value_fn(imagined.obs), axis=0),
    )
    weight = jnp.array(geometric_weights(config.trace_decay, imagined.reward.shape[0]))
    mix = jnp.tensordot(weight.astype(candidates.dtype), candidates, axes=1)
    return real_row(batch, mix, config.discount)


def geometric_weights(decay: float, horizon: int) -> list[float]:
    """(1 - l) l^k for k < H, and l^H: the H+1 weights sum to 1."""
    return [(1.0 - decay) * decay**k for k in range(horizon)] + [decay**horizon]


def fixed_weights(config: TargetsConfig) -> list[float] | None:
    """What the real row's target gives to each horizon 0..H; None where each state has its own weights."""
    horizon = config.imagined_steps
    if config.estimator == "lambda":
        return geometric_weights(config.trace_decay, horizon)
    if config.estimator == "steve_mean":
        return [1.0 / (horizon + 1)] * (horizon + 1)
    return None if config.keeps_members else [0.0] * horizon + [1.0]


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
    value_fn: ValueFn,
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
    candidates = ensemble_candidates(imagined, value_fn(imagined.obs), config.discount)
    mix = jnp.sum(weights_of(candidates) * jnp.mean(candidates, axis=1), axis=0)
    return real_row(batch, mix, config.discount)


ESTIMATORS: dict[str, Estimator] = {
    "one_step": one_step,
    "mve": mve,
    "mve_tdk": mve_tdk,
    "lambda": lambda_return,
    "steve": steve,
    "steve_mean": partial(steve, weights_of=equal_weights),
    "steve_cov": partial(steve, weights_of=inverse_covariance_weights),
}


def estimate(
    batch: Transition, imagined: Imagined, value_fn: ValueFn, config: TargetsConfig
) -> CriticTargets:
    """The configured estimator's rows."""
    return ESTIMATORS[config.estimator](batch, imagined, value_fn, config)
