"""What theory promises of value expansion holds in the code that imagines and estimates.

A linear system under a linear policy has a value in closed form, so that errors of the expanded value can
be split exactly: with a perfect model, V_H(s_0) - V(s_0) = gamma^H (V^(s_H) - V(s_H)); with a model that
errs by at most eps (root mean square, at any depth), by Minkowski's inequality,

    RMSE(V_H) <= eps [L_r (1 - gamma^H) / (1 - gamma) + gamma^H L_V] + gamma^H RMSE(V^ at imagined s_H).

Double precision throughout: the identities are exact, so they are tested as such.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from environments import LinearSystem, linear_system

from mve import imagine, targets
from mve.targets import TargetsConfig
from mve.types import EstimatorFns, Imagined, Transition

GAMMA = 0.9
LONGEST = 30
ROWS = 64


@pytest.fixture(autouse=True)
def double_precision() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def start_states() -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).normal(size=(ROWS, 2)))


def wrong_value(system: LinearSystem) -> Callable[[jax.Array], jax.Array]:
    """The exact value and an error that depends on the state."""
    return lambda obs: system.value(obs) + 0.3 * jnp.sin(2.0 * obs[..., 0]) - 0.2 * jnp.cos(obs[..., 1])


@partial(jax.jit, static_argnames="horizon")
def imagined(system: LinearSystem, start: jax.Array, horizon: int) -> Imagined:
    """A rollout in `system`, which is the truth or a model of it."""

    def step_fn(obs: jax.Array, action: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        return system.next_obs(obs, action), system.reward(obs, action), jnp.ones(obs.shape[:-1])

    def policy_fn(obs: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        return system.policy(obs), jnp.zeros(obs.shape[:-1])

    return imagine.rollout(step_fn, policy_fn, start, horizon, jax.random.key(0))


def expanded_values(
    model: LinearSystem, start: jax.Array, value_fn: Callable[[jax.Array], jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """V_H of the start states for H = 0..30 at once, and the states imagined."""
    rollout = imagined(model, start, LONGEST)
    discount = GAMMA * rollout.continuation
    return targets.candidate_returns(rollout.reward, discount, value_fn(rollout.obs)), rollout.obs


def rms(x: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.mean(jnp.square(x), axis=-1))


# --- A perfect model ---


def test_the_closed_form_value_is_the_sum_of_discounted_rewards() -> None:
    system = linear_system(GAMMA)
    rollout = imagined(system, start_states(), 400)
    np.testing.assert_allclose(
        jnp.tensordot(GAMMA ** jnp.arange(400.0), rollout.reward, 1), system.value(rollout.obs[0]), rtol=1e-10
    )


def test_with_a_perfect_model_the_error_is_the_critics_at_the_horizon_times_gamma_to_the_h() -> None:
    system, start = linear_system(GAMMA), start_states()
    value_fn = wrong_value(system)
    expanded, obs = expanded_values(system, start, value_fn)
    gamma_h = GAMMA ** jnp.arange(LONGEST + 1.0)[:, None]
    critic_error = value_fn(obs) - system.value(obs)
    error = expanded - system.value(start)[None]
    np.testing.assert_allclose(error, gamma_h * critic_error, rtol=1e-9, atol=1e-13)
    # Hence MSE(V_H) = gamma^2H MSE(V^), the latter where the policy has taken the states.
    np.testing.assert_allclose(rms(error), gamma_h[:, 0] * rms(critic_error), rtol=1e-9)


@pytest.mark.parametrize("horizon", [1, 2, 5])
def test_with_a_perfect_model_row_t_of_tdk_carries_the_critics_error_times_gamma_to_the_h_minus_t(
    horizon: int,
) -> None:
    system, start = linear_system(GAMMA), start_states()
    value_fn = wrong_value(system)
    before = 0.5 * start  # any state and action whose successor is the start of the rollout
    batch = Transition(
        obs=before,
        action=jnp.zeros((ROWS, 1)),
        reward=jnp.ones(ROWS),
        next_obs=start,
        continuation=jnp.ones(ROWS),
        episode=jnp.zeros(ROWS, jnp.int32),
        step=jnp.zeros(ROWS, jnp.int32),
        log_density=jnp.zeros(ROWS),
    )
    rollout = imagined(system, start, horizon)
    config = TargetsConfig(estimator="mve_tdk", horizon_steps=horizon, discount=GAMMA)
    rows = targets.estimate(batch, rollout, EstimatorFns(lambda obs: value_fn(obs)[None]), config)
    y = rows.value.reshape(horizon + 1, ROWS)

    critic_error = value_fn(rollout.obs[-1]) - system.value(rollout.obs[-1])
    np.testing.assert_allclose(
        y[0] - (1.0 + GAMMA * system.value(start)), GAMMA ** (horizon + 1) * critic_error
    )
    for t in range(horizon):
        error = y[1 + t] - system.value(rollout.obs[t])  # on-policy: Q(s_t, a_t) = V(s_t)
        np.testing.assert_allclose(error, GAMMA ** (horizon - t) * critic_error, rtol=1e-9, atol=1e-13)


# --- A model that errs ---


def linear_reward_system() -> LinearSystem:
    """Without the quadratic rewards: V(s) = s.v is Lipschitz everywhere, as the bound asks."""
    return linear_system(GAMMA)._replace(state_reward=np.zeros((2, 2)), action_reward=np.zeros((1, 1)))


def perturbed(system: LinearSystem, size: float, seed: int) -> LinearSystem:
    error = np.random.default_rng(seed).normal(size=(2, 2))
    return system._replace(transition=system.transition + size * error / np.linalg.norm(error, 2))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("size", [0.001, 0.01, 0.05, 0.2])
def test_a_models_error_stays_within_the_bound_at_every_horizon(size: float, seed: int) -> None:
    system, start = linear_reward_system(), start_states()
    value_fn = wrong_value(system)
    expanded, obs = expanded_values(perturbed(system, size, seed), start, value_fn)
    error = rms(expanded - system.value(start)[None])

    true_obs = imagined(system, start, LONGEST).obs
    depth_error = jnp.sqrt(jnp.mean(jnp.sum(jnp.square(obs - true_obs), axis=-1), axis=-1))
    eps = jax.lax.cummax(depth_error)  # the greatest up to each horizon
    gamma_h = GAMMA ** jnp.arange(LONGEST + 1.0)
    v, _ = system.value_coefficients()
    reward_slope, value_slope = np.linalg.norm(system.linear_reward), np.linalg.norm(v)
    bound = eps * (reward_slope * (1 - gamma_h) / (1 - GAMMA) + gamma_h * value_slope)
    bound = bound + gamma_h * rms(value_fn(obs) - system.value(obs))

    ratio = bound / error
    assert ratio.min() >= 1 - 1e-12
    assert ratio.max() < 8  # nor is it vacuous: 1.3 to 7.8 at the worst horizons here
    assert ratio[0] == pytest.approx(1.0)  # nothing is imagined: the critic's own error


def test_a_better_model_moves_the_best_horizon_further_out() -> None:
    system, start = linear_reward_system(), start_states()
    best = []
    for size in (0.2, 0.05, 0.01, 0.001):
        expanded, _ = expanded_values(perturbed(system, size, 0), start, wrong_value(system))
        best.append(int(jnp.argmin(rms(expanded - system.value(start)[None]))))
    assert best == sorted(best)
    assert best[0] < 5
    assert best[-1] > 20
