"""The calibrated horizon: measured errors worked by hand, weights worked by hand, and whether what is
predicted comes true. gamma is 1/2."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mve import experience, targets, train
from mve.agents.sac import SACConfig
from mve.dynamics import DynamicsConfig
from mve.state import Capacity, Recipe, TrainState, initial_state
from mve.targets import Calibration, TargetsConfig, calibration
from mve.targets.calibration import Replayed
from mve.targets.ensemble import inverse_error_weights
from mve.types import CriticTargets, EstimatorFns, Imagined, Known, Transition

GAMMA = 0.5
CONFIG = TargetsConfig(estimator="calibrated", horizon_steps=2, discount=GAMMA)
EXPECTED, OBSERVE = jax.jit(calibration.expected), jax.jit(calibration.observe, static_argnums=2)


def knowing(level: list[float], slope: list[float], factor: float = 1.0, count: float = 100.0) -> Calibration:
    """As after very many measurements on the lines y = level + slope x, depth 0 being the critic's."""
    a, b, one = jnp.array(level), jnp.array(slope), jnp.ones(len(level))
    return Calibration(
        count=count * one,
        x=0.0 * one,
        y=count * a,
        xx=1e9 * one,
        xy=1e9 * b,
        squared_error=factor * one,
        predicted=one,
    )


# --- From measurements to weights, by hand ---


def test_squared_errors_by_hand() -> None:
    # The critic: 2 exp(log 2) = 4 whatever its spread. The model: 2 exp(0 + log v) = 2 v.
    known = knowing([np.log(2.0), 0.0, 0.0], [0.0, 1.0, 1.0], factor=2.0)
    variance, weighs = jnp.array([[0.0], [1.0], [4.0]]), jnp.array([[1.0], [0.5], [0.25]])
    error = calibration.squared_error(known, variance, jnp.full((3, 1), 9.0), weighs)
    np.testing.assert_allclose(error[:, 0], [4.0, 1.0 + 2.0, 0.25 + 8.0], rtol=1e-5)
    weight = inverse_error_weights(error)
    # 1/4, 1/3, 4/33: 33, 44, 16 parts of 93.
    np.testing.assert_allclose(weight[:, 0], [33 / 93, 44 / 93, 16 / 93], rtol=1e-5)


def test_a_state_where_the_critics_are_further_apart_has_a_larger_share_of_theirs() -> None:
    known = knowing([0.0, 0.0], [0.5, 1.0])
    nothing, ones = jnp.zeros((2, 2)), jnp.ones((2, 2))
    error = calibration.squared_error(known, nothing, jnp.array([[1.0, 16.0], [4.0, 9.0]]), ones)
    np.testing.assert_allclose(error, [[1.0, 4.0], [2.0, 3.0]], rtol=1e-4)  # square roots of the variances


def test_equal_errors_give_equal_weights() -> None:
    weight = inverse_error_weights(jnp.full((4, 3), 0.7))
    np.testing.assert_allclose(weight, 0.25)


def imagined(reward: np.ndarray) -> Imagined:
    """Rewards (H, R, M, B); all states are 0, and nothing ends."""
    horizon, _, *batch = reward.shape
    return Imagined(
        obs=jnp.zeros((horizon + 1, *batch, 1)),
        action=jnp.zeros((horizon, *batch, 1)),
        reward=jnp.asarray(reward, jnp.float32),
        continuation=jnp.ones((horizon, *batch)),
        bonus=jnp.zeros((horizon, *batch)),
    )


def transition(rows: int) -> Transition:
    columns = jnp.zeros((rows, 1)), jnp.zeros((rows, 1)), jnp.ones(rows), jnp.zeros((rows, 1)), jnp.ones(rows)
    names = jnp.zeros(rows, jnp.int32), jnp.arange(rows, dtype=jnp.int32)
    return Transition(*columns, *names, jnp.zeros(rows))


def value(obs: jax.Array) -> jax.Array:
    """Two critics, 16 + s and 20 + s."""
    return jnp.stack([16.0 + obs[..., 0], 20.0 + obs[..., 0]])


def action_value(obs: jax.Array, action: jax.Array) -> jax.Array:
    return value(obs) + action[None, ..., 0]


def estimate(known: Calibration, reward: np.ndarray) -> CriticTargets:
    ask = EstimatorFns(value, squared_error=partial(calibration.squared_error, known))
    return targets.estimate(transition(reward.shape[-1]), imagined(reward), ask, CONFIG)


def test_the_target_by_hand_is_the_weighted_mean_of_least_candidates() -> None:
    # Members earn 2 or 6, then 0: C_0 = 16; C_1 = 2 + 8 or 6 + 8, mean 12, variance 4; C_2 the same less 4.
    reward = np.array([[2.0, 6.0], [0.0, 0.0]]).reshape(2, 1, 2, 1)
    rows = estimate(knowing([np.log(8.0), 0.0, 0.0], [0.0, 1.0, 0.0]), reward)
    # Errors 8; 8/4 + 4 = 6; 8/16 + 1 = 1.5. Weights 3, 4, 16 of 23; mix (3 16 + 4 12 + 16 8) / 23 = 224/23.
    np.testing.assert_allclose(rows.horizon_weight, [3 / 23, 4 / 23, 16 / 23], rtol=1e-5)
    np.testing.assert_allclose(rows.value, [1 + 112 / 23], rtol=1e-5)


def test_a_depth_with_a_huge_measured_error_gets_no_weight_even_if_members_coincide() -> None:
    rows = estimate(knowing([0.0, np.log(1e6), 0.0], [0.0, 0.0, 0.0]), np.zeros((2, 1, 3, 4)))
    # Errors 1, 1/4 + 1e6, 1/16 + 1.
    np.testing.assert_allclose(rows.horizon_weight, [17 / 33, 0.0, 16 / 33], atol=1e-5)


@pytest.mark.parametrize("known", [calibration.init(2), knowing([0.0] * 3, [1.0] * 3, count=19.0)])
def test_before_there_are_data_it_is_one_step(known: Calibration) -> None:
    rows = estimate(known, np.ones((2, 1, 3, 4)))
    np.testing.assert_array_equal(rows.horizon_weight, [1.0, 0.0, 0.0])
    np.testing.assert_allclose(rows.value, 1.0 + GAMMA * 16.0)


def test_nothing_after_a_predicted_termination_matters() -> None:
    known = knowing([0.0] * 3, [1.0] * 3)
    rollout = imagined(np.ones((2, 1, 3, 4)))
    ended = rollout._replace(continuation=rollout.continuation.at[0].set(0.0))
    wild = ended._replace(reward=ended.reward.at[1].set(1e3), obs=ended.obs.at[1:].set(1e3))
    ask = EstimatorFns(value, squared_error=partial(calibration.squared_error, known))
    a, b = (targets.estimate(transition(4), r, ask, CONFIG).value for r in (ended, wild))
    np.testing.assert_allclose(a, b, rtol=1e-5)


# --- From real steps to measurements ---


def walk(num_steps: int = 6, padding: int = 2) -> Transition:
    """s' = s + a and reward 1; steps of 1 from 0; the second episode begins with row 3, where 3 is ended."""
    row = np.arange(num_steps + padding)
    obs = np.where(row < num_steps, row, 0.0)[:, None].astype(np.float32)
    return Transition(
        obs=jnp.asarray(obs),
        action=jnp.ones_like(obs),
        reward=jnp.ones(len(row)),
        next_obs=jnp.asarray(obs + 1),
        continuation=jnp.asarray(row != 2, jnp.float32),
        episode=jnp.asarray(row > 2, jnp.int32),
        step=jnp.asarray(row, jnp.int32),
        log_density=jnp.zeros(len(row)),
    )


def off_by(bias: jax.Array) -> calibration.StepFn:
    """A model of which member m goes bias_m too far, and never ends."""

    def step(obs: jax.Array, action: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        del key
        next_obs = obs + action + jnp.broadcast_to(bias[:, None, None], obs.shape)
        return next_obs, jnp.ones((1, *obs.shape[:-1])), jnp.ones(obs.shape[:-1])

    return step


def replayed(bias: list[float]) -> Replayed:
    ask = EstimatorFns(value, action_value)
    return calibration.replay(
        off_by(jnp.array(bias)), ask, walk(), jnp.int32(6), len(bias), CONFIG, jax.random.key(0)
    )


def test_errors_of_replayed_candidates_by_hand() -> None:
    seen = replayed([0.1, 0.3])
    # After k steps the members are k/10 and 3k/10 too far, at states worth 1 each: mean k/5, spread k/10.
    depth = np.array([1, 2])[:, None]
    np.testing.assert_array_equal(seen.valid[1], [1, 1, 1, 1, 1, 1, 0, 0])
    np.testing.assert_array_equal(seen.valid[2], [1, 1, 0, 1, 1, 0, 0, 0])
    expected = np.broadcast_to(GAMMA**depth * depth * 0.2, (2, 8)).copy()
    expected[0, 2] += GAMMA * 19.0  # the model went on where the world ended: V(3) = 19 too much
    expected[1, 1] += GAMMA**2 * 19.0
    valid = np.asarray(seen.valid[1:])
    np.testing.assert_allclose(np.asarray(seen.error[1:])[valid], expected[valid], rtol=1e-4)
    spread = np.broadcast_to(GAMMA ** (2 * depth) * (depth * 0.1) ** 2, (2, 8))
    np.testing.assert_allclose(np.asarray(seen.variance[1:])[valid], spread[valid], rtol=1e-3)


def test_the_critics_error_of_a_few_steps_by_hand() -> None:
    seen = replayed([0.0])
    # delta = 1 + (16 + s + 1)/2 - (16 + s + 1) = -7.5 - s/2; one that ends: 1 - (17 + s).
    delta = np.array([-7.5, -8.0, -18.0, -9.0, -9.5, -10.0])
    expected = delta + np.array(
        [GAMMA * delta[1], GAMMA * delta[2], 0, GAMMA * delta[4], GAMMA * delta[5], 0]
    )
    np.testing.assert_allclose(seen.error[0, :6], expected)
    np.testing.assert_allclose(seen.variance[0], 4.0)  # critics 4 apart


def test_a_true_model_has_no_error() -> None:
    seen = replayed([0.0, 0.0])
    valid = np.asarray(seen.valid[1:]).copy()
    valid[0, 2] = valid[1, 1] = False  # where the world ends and the model does not know
    np.testing.assert_allclose(np.asarray(seen.error[1:])[valid], 0.0, atol=1e-5)


# --- Whether what is predicted comes true ---


def draws(seed: int, shape: tuple[int, int], wild: bool = False) -> Replayed:
    """d ~ N(0, 9 spread^1.4), spread over three orders of magnitude: level log 9, slope 0.7 on spread^2."""
    rng = np.random.default_rng(seed)
    variance = np.exp(rng.uniform(-7, 7, shape))
    error = 3.0 * variance**0.35 * rng.normal(size=shape)
    valid = np.ones(shape, bool)
    if wild:
        error[:, ::5], variance[:, 1::5], valid[:, 2::5] = np.nan, np.inf, False
        error[:, 2::5] = 1e9
    return Replayed(*(jnp.asarray(x, jnp.float32) for x in (error, variance)), jnp.asarray(valid))


@pytest.fixture(scope="module")
def learned() -> Calibration:
    known = calibration.init(1)
    for block in range(100):
        known = OBSERVE(known, draws(block, (2, 50)), 0.98)
    return known


def test_the_law_of_the_errors_is_recovered(learned: Calibration) -> None:
    level, slope = calibration.line(learned)
    np.testing.assert_allclose(slope, 0.7, atol=0.05)
    np.testing.assert_allclose(level, np.log(9.0) - 1.27, atol=0.15)  # E log chi^2_1 = -1.27
    factor = learned.squared_error / learned.predicted
    np.testing.assert_allclose(factor, np.exp(1.27), rtol=0.25)


def test_predicted_squared_errors_are_those_that_come_true_in_every_bin(learned: Calibration) -> None:
    fresh = draws(1000, (2, 20_000))
    predicted = np.asarray(EXPECTED(learned, fresh.variance))[1]
    realised, order = np.square(np.asarray(fresh.error)[1]), np.argsort(np.asarray(fresh.variance)[1])
    for bin_ in np.array_split(order, 8):
        np.testing.assert_allclose(predicted[bin_].mean(), realised[bin_].mean(), rtol=0.3)
    np.testing.assert_allclose(predicted.mean(), realised.mean(), rtol=0.2)


def test_rows_that_are_not_valid_or_not_finite_leave_no_trace() -> None:
    wild = OBSERVE(calibration.init(1), draws(0, (2, 50), wild=True), 0.98)
    seen = draws(0, (2, 50))
    kept = jnp.broadcast_to(jnp.arange(50) % 5 > 2, (2, 50))
    calm = OBSERVE(calibration.init(1), seen._replace(valid=kept), 0.98)
    np.testing.assert_array_equal(wild.count, 20.0)
    for a, b in zip(jax.tree.leaves(wild), jax.tree.leaves(calm), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


def test_without_memory_only_the_last_block_counts() -> None:
    blocks = [draws(seed, (2, 50)) for seed in range(2)]
    both = OBSERVE(OBSERVE(calibration.init(1), blocks[0], 0.0), blocks[1], 0.0)
    alone = OBSERVE(calibration.init(1), blocks[1], 0.0)
    assert eqx.tree_equal(both, alone)


def test_spreads_that_never_vary_leave_the_mean_error() -> None:
    seen = draws(0, (2, 50))._replace(variance=jnp.zeros((2, 50)))
    known = OBSERVE(calibration.init(1), seen, 0.98)
    error = EXPECTED(known, jnp.zeros((2, 1)))[:, 0]
    np.testing.assert_allclose(error, np.square(seen.error).mean(axis=1), rtol=1e-4)


# --- In the loop ---

RECIPE = Recipe(
    obs_size=1,
    action_size=1,
    known=Known(),
    agent=SACConfig(hidden=(8,), batch_size=8),
    dynamics=DynamicsConfig(hidden=(8,), members=2, batch_size=8, learning_starts=8),
    targets=CONFIG,
)


def learn(state: TrainState, fits: int) -> tuple[TrainState, dict]:
    due = train.Due.of(rows=8, fits=fits, updates=fits)
    return train.learn(state, walk(num_steps=8, padding=0), due, RECIPE)


@pytest.mark.slow
def test_a_block_is_judged_once_and_only_by_a_model_that_was_fitted() -> None:
    train.learn.clear_cache()
    state = initial_state(RECIPE, Capacity(50), seed=0)
    for block, count in enumerate([0, 0, 8, 8 + 0.98 * 8]):
        fits = 2 * (block > 0)
        state, metrics = learn(state, fits)  # learning starts after step 8, that is in the second block
        assert state.calibration is not None
        np.testing.assert_allclose(state.calibration.count[:2], count, rtol=1e-6)
        if fits:
            weights = [float(metrics[f"mve/weight_k{k}"]) for k in range(3)]
            np.testing.assert_allclose(sum(weights), 1.0, rtol=1e-5)
    assert {"mve/critic_rmse", "mve/imagined_rmse_k1", "mve/imagined_rmse_k2"} <= set(metrics)
    assert all(np.isfinite(float(m)) for m in metrics.values())
    assert train.learn._cache_size() == 1


def test_members_start_alike_and_act_alike_in_imagination() -> None:
    """So that they differ by the model alone: copies of one member never part."""
    state = initial_state(RECIPE, Capacity(50), seed=0)
    assert state.model is not None
    same = jax.tree.map(lambda x: jnp.stack([x[0], x[0]]), state.model.net)
    state = eqx.tree_at(lambda s: s.model.net, state, same)
    batch: Transition = jax.tree.map(lambda x: x[:4], walk())
    model = eqx.tree_at(lambda m: (m.obs.low, m.obs.high), state.model, (jnp.full(1, -9.0), jnp.full(1, 9.0)))
    state = eqx.tree_at(lambda s: s.model, state, model)
    ahead = jax.jit(experience.imagine_ahead, static_argnums=1)(state, RECIPE, batch, jax.random.key(0))
    for x in (ahead.obs, ahead.action, ahead.bonus):
        np.testing.assert_allclose(x[:, 0], x[:, 1], rtol=1e-6)
    assert ahead.reward.shape == (2, 1, 2, 4)  # of its own steps, though the reward is learned


def test_a_state_is_imagined_and_judged_by_as_many_members_as_asked_for() -> None:
    four = replace(RECIPE.dynamics, members=4, stay_in_data=False)  # nothing was seen to stay in
    recipe = replace(RECIPE, dynamics=four, targets=replace(CONFIG, members=2))
    state = replace(initial_state(recipe, Capacity(50), seed=0), num_env_steps=jnp.int32(9))
    batch: Transition = jax.tree.map(lambda x: x[:4], walk())
    ahead = jax.jit(experience.imagine_ahead, static_argnums=1)(state, recipe, batch, jax.random.key(0))
    assert ahead.obs.shape == (3, 2, 4, 1)
    assert ahead.reward.shape == (2, 1, 2, 4)
    seen = jax.jit(train.calibrate, static_argnums=3)(state, walk(), jnp.int32(6), recipe, jax.random.key(0))
    np.testing.assert_array_equal(seen.count, [6.0, 6.0, 4.0])
