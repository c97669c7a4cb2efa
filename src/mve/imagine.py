"""Stage 4, imagine: roll a policy through a model. Neither is known here, only the functions they are."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mve.types import Imagined, Key, PolicyFn, StepFn


def rollout(
    step_fn: StepFn,
    policy_fn: PolicyFn,
    start_obs: Float[Array, " *batch S"],
    horizon_steps: int,
    key: Key,
) -> Imagined:
    """H steps of the model under the policy, from each start state.

    a_t = policy_fn(s_t);  s_{t+1}, r_t, c_t = step_fn(s_t, a_t),  t = 0..H-1, s_0 = start_obs.

    The draws of step t depend on `key` and t only, so a longer rollout begins with the shorter one.
    Steps after a predicted termination are imagined all the same: `continuation` 0 cuts them off in
    every estimator.
    """

    def step(obs: Array, t: Array) -> tuple[Array, tuple[Array, ...]]:
        policy_key, model_key = jax.random.split(jax.random.fold_in(key, t))
        action, bonus = policy_fn(obs, policy_key)
        next_obs, reward, continuation = step_fn(obs, action, model_key)
        return next_obs, (next_obs, action, reward, continuation, bonus)

    _, (next_obs, action, reward, continuation, bonus) = jax.lax.scan(
        step, start_obs, jnp.arange(horizon_steps)
    )
    return Imagined(
        obs=jnp.concatenate([start_obs[None], next_obs]),
        action=action,
        reward=reward,
        continuation=continuation,
        bonus=bonus,
    )
