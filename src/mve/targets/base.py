"""What all estimators share: settings, the two recursions along a rollout, the row of the real step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mve.types import Count, CriticTargets, Discount, Positive, Segment, Transition, Unit

VARIANCE_FLOOR = 1e-8  # added to variances and squared errors, in squared units of return


@dataclass(frozen=True, kw_only=True)
class TargetsConfig:
    """How the critic's targets are made from a real transition and an imagined continuation."""

    estimator: Literal[
        "one_step", "mve", "mve_tdk", "lambda", "steve", "steve_mean", "steve_cov", "calibrated", "retrace"
    ] = "one_step"
    """one_step: the base learner. mve: expand the real row. mve_tdk: and regress every imagined row too.
    lambda: a fixed geometric mix of all horizons. steve: trust a horizon as its ensemble agrees on it;
    steve_mean: all horizons alike; steve_cov: minding that errors of near horizons go together.
    calibrated: trust a horizon as such a spread has turned out to be right. retrace: no model; the real
    steps that followed, as far as the policy would have taken them."""
    horizon_steps: Count = 3
    """H, imagined steps per target, or real ones for retrace; 0 is the base learner exactly (but for STEVE's
    with several critics, which take their mean). one_step does not read it."""
    discount: Discount = 0.99
    """gamma, per environment step. episode: from the most steps L that the task's time limit allows,
    clip((L/5 - 1)/(L/5), 0.95, 0.995), the latter where it sets none (DHMBPO, TD-MPC2)."""
    trace_decay: Unit = 0.75
    """lambda, of the estimator of that name: 0 is one_step, 1 is mve (STEVE's ablations: 0.25 and 0.75).
    retrace: the factor of its traces (Munos et al. 2016: 1)."""
    calibration_decay: Unit = 0.98
    """What calibrated keeps of its measurements from block to block; at 0.98 with blocks of 20 steps the
    last 1000 or so count. 0: the last block alone."""
    members: Count = 0
    """Members of the model that imagine each state for calibrated, dealt anew at each update; their spread is
    measured with as many. 2 cost a quarter of what 8 do. 0: all there are."""
    n_step: Positive = 1
    """Real steps that are summed before a target expands what they led to, fewer where the episode ends. The
    actions after the first are taken as they were, whatever the policy would do now (uncorrected, as in
    Rainbow, Hessel et al. 2018, arXiv 1710.02298, who have 3): recent data suit more of them."""
    n_step_drawn: bool = False
    """Whether each target sums a number of real steps of its own, drawn uniformly from 1 to n_step, so that
    far returns and near ones mix: what the critic learns is on average the mean of those n targets (as
    TD(lambda) mixes them geometrically, Sutton and Barto 2018, section 12.1). False: n_step for all."""
    n_step_within: Count = 0
    """Environment steps within which a row is recent enough to be summed with those that followed it. Older
    rows stand for one step: where the policy has long done otherwise, long sums keep its values down, and it
    from trying. 0: however old."""
    n_step_warmup: bool = True
    """Whether rows of the warm-up are summed as well. If not, they stand for one step, for the same reason:
    their actions are none that any policy would take."""
    divide_by_horizon: bool = True
    """Divide the loss of mve_tdk by H, as the paper prints it; its H+1 terms then sum to (H+1)/H."""

    @property
    def imagined_steps(self) -> int:
        """Model steps that the estimator asks for; 0 means that no model is needed at all."""
        return 0 if self.estimator in ("one_step", "retrace") else self.horizon_steps

    @property
    def shared_steps(self) -> int:
        """Those of a real row where the policy's own next action is imagined too and has a target of as many
        as it asks for: one more. Where nothing is expanded, none."""
        return 1 + self.imagined_steps if self.imagined_steps else 0

    @property
    def recalled_steps(self) -> int:
        """Real steps after each sampled one that the estimator asks for."""
        return self.horizon_steps if self.estimator == "retrace" else 0

    @property
    def reads_segments(self) -> bool:
        """Whether what follows a row is recalled, its actions' densities with it, not imagined."""
        return self.estimator == "retrace"

    @property
    def calibrates(self) -> bool:
        """Whether errors of the model have to be measured; a horizon of 0 has none."""
        return self.estimator == "calibrated" and self.horizon_steps > 0

    @property
    def keeps_members(self) -> bool:
        """Whether every start is imagined by several members, whose answers then stay apart: axes (M, B)."""
        return self.crosses_rewards or self.calibrates

    @property
    def crosses_rewards(self) -> bool:
        """Whether every member says what each one's steps are paid, not its own alone."""
        return self.estimator.startswith("steve")

    @property
    def shares_draws(self) -> bool:
        """Whether members that are kept apart draw the same actions, and so differ by the model alone."""
        return self.calibrates


def survival(discount: Float[Array, " H *batch"]) -> Float[Array, " H+1 *batch"]:
    """D_k = d_0 ... d_{k-1}, what state k weighs in the value of the start state; D_0 = 1."""
    one = jnp.ones((1, *discount.shape[1:]), discount.dtype)
    return jnp.concatenate([one, jnp.cumprod(discount, axis=0)])


def candidate_returns(
    reward: Float[Array, " H *batch"],
    discount: Float[Array, " H *batch"],
    bootstrap: Float[Array, " H+1 *batch"],
) -> Float[Array, " H+1 *batch"]:
    """Return of the start state by k imagined rewards and then the value of state k, for every k.

    C_k = sum_{t<k} D_t r_t + D_k v_k with D_k = d_0 ... d_{k-1}; row 0 is the bootstrap of the start
    state itself. Feinberg et al. 2018 section 3.1 for one k; Buckman et al. 2018 equation 2 for all.
    """
    weight = survival(discount)
    gained = jnp.concatenate([jnp.zeros_like(weight[:1]), jnp.cumsum(weight[:-1] * reward, axis=0)])
    return gained + weight * bootstrap


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


def n_steps_as_one(segment: Segment, bonus: Float[Array, " later B"], discount: float) -> Transition:
    """Real steps (n, B) that followed one another, as one transition each, whose target is

        r_0 + sum_{0<i<m} gamma^i (b_i + r_i) + gamma^m c_{m-1} V(s_m)

    of the m of them that are valid: its reward is the sum, its continuation gamma^(m-1) c_{m-1}, so that
    estimators need not know, and its `step` the last one's, which the next real step follows. `bonus` is the
    policy's in the states after the first (Sutton and Barto 2018, section 7.1; with an entropy term:
    Haarnoja et al. 2018a, section 3, summed over steps).
    """
    rows, valid = segment
    weight = discount ** jnp.arange(len(valid), dtype=jnp.float32)[:, None] * valid.astype(jnp.float32)
    last = jnp.sum(valid, axis=0, dtype=jnp.int32) - 1
    final: Transition = jax.tree.map(lambda x: x[last, jnp.arange(len(last))], rows)
    first: Transition = jax.tree.map(lambda x: x[0], rows)
    return first._replace(
        reward=jnp.sum(weight * rows.reward, axis=0) + jnp.sum(weight[1:] * bonus, axis=0),
        next_obs=final.next_obs,
        step=final.step,
        continuation=discount ** last.astype(jnp.float32) * final.continuation,
    )


def cut(segment: Segment, lengths: Int[Array, " B"]) -> Segment:
    """The same segments, none longer than its length, 1 at least: later rows are no longer valid."""
    within = jnp.arange(len(segment.valid))[:, None] < lengths[None]
    return segment._replace(valid=segment.valid & within)


def real_row(
    batch: Transition,
    value: Float[Array, " B"],
    horizon_weight: Float[Array, " horizons"],
    discount: float,
) -> CriticTargets:
    """The observed step, then `value` of the real next state: r + gamma continuation value; weights 1/B."""
    return CriticTargets(
        obs=batch.obs,
        action=batch.action,
        value=batch.reward + discount * batch.continuation * value,
        weight=jnp.full_like(batch.reward, 1.0 / batch.reward.shape[0]),
        horizon_weight=horizon_weight,
    )


def joined(one: CriticTargets, other: CriticTargets, share: float) -> CriticTargets:
    """The rows of two batches as one, in which the first counts for so much, the other for the rest.

    Horizons that only one of them has got are none of the other's.
    """

    def mixed(a: Array | np.ndarray, b: Array | np.ndarray) -> Array:
        longest = max(len(a), len(b))
        a, b = (jnp.pad(jnp.asarray(x), (0, longest - len(x))) for x in (a, b))
        return share * a + (1.0 - share) * b

    return CriticTargets(
        obs=jnp.concatenate([one.obs, other.obs]),
        action=jnp.concatenate([one.action, other.action]),
        value=jnp.concatenate([one.value, other.value]),
        weight=jnp.concatenate([share * one.weight, (1.0 - share) * other.weight]),
        horizon_weight=mixed(one.horizon_weight, other.horizon_weight),
    )
