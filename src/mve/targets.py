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
from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mve.types import Count, CriticTargets, Imagined, Transition, Unit, ValueFn

Estimator: TypeAlias = Callable[[Transition, Imagined, ValueFn, "TargetsConfig"], CriticTargets]


@dataclass(frozen=True, kw_only=True)
class TargetsConfig:
    """How the critic's targets are made from a real transition and an imagined continuation."""

    estimator: Literal["one_step", "mve", "mve_tdk", "lambda"] = "one_step"
    """one_step: the base learner. mve: expand the real row. mve_tdk: and regress every imagined row too.
    lambda: a fixed geometric mix of all horizons."""
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
    decay, horizon = config.trace_decay, imagined.reward.shape[0]
    weight = jnp.array([(1.0 - decay) * decay**k for k in range(horizon)] + [decay**horizon])
    mix = jnp.tensordot(weight.astype(candidates.dtype), candidates, axes=1)
    return real_row(batch, mix, config.discount)


ESTIMATORS: dict[str, Estimator] = {
    "one_step": one_step,
    "mve": mve,
    "mve_tdk": mve_tdk,
    "lambda": lambda_return,
}


def estimate(
    batch: Transition, imagined: Imagined, value_fn: ValueFn, config: TargetsConfig
) -> CriticTargets:
    """The configured estimator's rows."""
    return ESTIMATORS[config.estimator](batch, imagined, value_fn, config)
