"""Stage 4, imagine: roll a policy through a model. Neither is known here, only the functions they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mve.types import (
    Beside,
    BesideStepFn,
    Count,
    Imagined,
    Key,
    NonNegative,
    PolicyFn,
    Positive,
    StepFn,
    Transition,
    Unit,
)


@dataclass(frozen=True, kw_only=True)
class ImaginationConfig:
    """The buffer of imagined transitions: how it is filled, and what it is for."""

    starts: Count = 0
    """Real states, drawn from replay, from which one round of rollouts starts; 0: there is no buffer."""
    interval_steps: Positive = 20
    """Environment steps between rounds, the first of which comes as the agent begins to learn."""
    interval_updates: Count = 0
    """Updates of the agent between rounds, where several follow one real step (DHMBPO: 20); where it is set
    interval_steps is not read. Updates of the critics alone have rounds of their own."""
    length: tuple[Positive, Positive] = (1, 1)
    """Model steps of a rollout, at the beginning and the end of `length_ramp`; whole numbers between."""
    length_ramp: tuple[Count, Count] = (0, 1)
    """Environment steps between which the length changes linearly (MBPO's schedule, in steps)."""
    trust: NonNegative = 0.0
    """Where above 0, a rollout stops before the first step on which two members of the model disagree so many
    times as much as on the 95 % quantile of the round's first steps (after MACURA, Frauenknecht et al. 2024,
    who have 2 and a running mean of the quantile); 0: none is stopped."""
    rounds_kept: Positive = 10
    """Rounds that the buffer holds, counted in rows of rounds of full length: those whose rollouts end early
    are kept for longer. Older rows are forgotten."""
    real_share: Unit = 0.05
    """Share of the updates' rows that come from replay, the others from the buffer (MBPO: 0.05)."""
    mixed_by: Literal["row", "update"] = "row"
    """row: every update gets its share of real rows; update: an update is all real or all imagined."""
    first_step: Literal["stored", "imagined"] = "stored"
    """stored: a buffered transition is regressed as it stands. imagined: the buffer gives start states only,
    and the current policy takes the first step anew (DHMBPO)."""

    @property
    def capacity(self) -> int:
        """Rows that the buffer needs."""
        return self.starts * self.rounds_kept * max(self.length)


def rollout(
    step_fn: StepFn | BesideStepFn,
    policy_fn: PolicyFn,
    start_obs: Float[Array, " *batch S"],
    horizon_steps: int,
    key: Key,
    beside: Beside | None = None,
    *,
    unrolled: bool = False,
) -> Imagined:
    """H steps of the model under the policy, from each start state.

    a_t = policy_fn(s_t);  s_{t+1}, r_t, c_t = step_fn(s_t, a_t),  t = 0..H-1, s_0 = start_obs.

    The draws of step t depend on `key` and t only, so a longer rollout begins with the shorter one.
    `beside` (H, *batch) are real steps of which `step_fn` is told as well, as its last argument.
    `unrolled` is faster to differentiate by the policy, whose gradient a loop would carry along and add to
    at every step, and slower to compile.

    Steps after a predicted termination are imagined all the same: `continuation` 0 cuts them off in
    every estimator. They go on from the last state before it, for a reward need not be a number beyond.
    """

    def moved(obs: Array, action: Array, key: Key, real: Beside | None) -> tuple[Array, Array, Array]:
        if real is None:
            return cast(StepFn, step_fn)(obs, action, key)
        return cast(BesideStepFn, step_fn)(obs, action, key, real)

    def step(obs: Array, now: tuple[Array, Beside | None]) -> tuple[Array, tuple[Array, ...]]:
        t, real = now
        policy_key, model_key = jax.random.split(jax.random.fold_in(key, t))
        action, bonus = policy_fn(obs, policy_key)
        next_obs, reward, continuation = moved(obs, action, model_key, real)
        alive = where_it_goes_on(continuation, next_obs, obs)
        return alive, (next_obs, action, reward, continuation, bonus)

    _, (next_obs, action, reward, continuation, bonus) = jax.lax.scan(
        step,
        start_obs,
        (jnp.arange(horizon_steps), beside),
        unroll=max(horizon_steps, 1) if unrolled else 1,
    )
    return Imagined(
        obs=jnp.concatenate([start_obs[None], next_obs]),
        action=action,
        reward=reward,
        continuation=continuation,
        bonus=bonus,
    )


def where_it_goes_on(
    continuation: Float[Array, " *batch"], next_obs: Float[Array, " *batch S"], obs: Float[Array, " *batch S"]
) -> Float[Array, " *batch S"]:
    """The next states, and where an episode ended the states before."""
    return jnp.where(jnp.broadcast_to(continuation[..., None] > 0, obs.shape), next_obs, obs)


def rollout_length(config: ImaginationConfig, num_env_steps: Int[Array, ""]) -> Int[Array, ""]:
    """Length of the rollouts that fill the buffer: linear in the environment steps, rounded down.

    Janner et al. 2019 (arXiv 1906.08253), appendix C: x + (e - a) / (b - a) (y - x), kept within [x, y].
    """
    (first, last), (begin, end) = config.length, config.length_ramp
    progress = jnp.clip((num_env_steps - begin) / max(end - begin, 1), 0.0, 1.0)
    return jnp.floor(first + progress * (last - first)).astype(jnp.int32)


def as_transition(imagined: Imagined, start: Transition) -> Transition:
    """The first imagined step as a transition, under the name of the row that it started from."""
    return start._replace(
        obs=imagined.obs[0],
        action=imagined.action[0],
        reward=imagined.reward[0],
        next_obs=imagined.obs[1],
        continuation=imagined.continuation[0],
    )


def first_steps(imagined: Imagined, count: int) -> Imagined:
    """A shorter rollout, from the same states."""
    return Imagined(imagined.obs[: count + 1], *(x[:count] for x in imagined[1:]))


def after_first(imagined: Imagined) -> Imagined:
    """What follows the first step of a rollout: a rollout from the states that it led to."""
    return jax.tree.map(lambda x: x[1:], imagined)
