"""The model learns what there is to learn, keeps its scales, and serves imagination without mixing rows up.

Fitted once: an ensemble on a linear system with a constant observation beside it, which also has to learn
the reward and where episodes end. The mechanics are tested on hand-made models, whose answers are exact.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from environments import LinearSystem, linear_system

from mve import dynamics, imagine, targets
from mve.dynamics import Dynamics, DynamicsConfig, Normaliser
from mve.targets import TargetsConfig
from mve.types import EstimatorFns, Known, Transition, UserError

CONFIG = DynamicsConfig(hidden=(64,), members=3, learning_rate=3e-3, batch_size=128)
LEARNED = Known()
INIT = jax.jit(dynamics.init, static_argnums=(0, 1, 2, 3))
OBSERVE = jax.jit(dynamics.observe, static_argnums=3)
STEP = jax.jit(dynamics.step, static_argnums=(1, 2))
ROWS, NUM_FITS = 2000, 3000
CONSTANT = 1000.1  # large and not representable, as bad as a constant gets
EDGE = 1.0  # the episode ends where the first coordinate exceeds it


def rows_of(obs: Any, action: Any, reward: Any, next_obs: Any, terminated: Any = False) -> Transition:
    num_rows = len(obs)
    continuation = 1.0 - np.broadcast_to(terminated, num_rows)
    columns = (jnp.asarray(x, jnp.float32) for x in (obs, action, reward, next_obs, continuation))
    return Transition(
        *columns,
        episode=jnp.zeros(num_rows, jnp.int32),
        step=jnp.arange(num_rows),
        log_density=jnp.zeros(num_rows),
    )


def true_step(obs: np.ndarray, action: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The oscillator with a constant beside it: next state, reward, terminated."""
    system = linear_system()
    moving = system.next_obs(obs[:, :2], action)
    next_obs = np.concatenate([moving, np.full((len(obs), 1), CONSTANT)], axis=1)
    return next_obs, obs[:, 0] - 0.5 * action[:, 0], moving[:, 0] > EDGE


def random_rows(num_rows: int, seed: int) -> Transition:
    rng = np.random.default_rng(seed)
    obs = np.concatenate([rng.uniform(-2, 2, (num_rows, 2)), np.full((num_rows, 1), CONSTANT)], axis=1)
    action = rng.uniform(-1, 1, (num_rows, 1))
    next_obs, reward, terminated = true_step(obs, action)
    return rows_of(obs, action, reward, next_obs, terminated)


def observed(
    rows: Transition, config: DynamicsConfig = CONFIG, known: Known = LEARNED, seed: int = 0
) -> Dynamics:
    """A model with random nets, whose statistics are those of the rows."""
    model = INIT(CONFIG, known, rows.obs.shape[-1], rows.action.shape[-1], jax.random.key(seed))
    return OBSERVE(model, rows, jnp.int32(len(rows.reward)), config)


@jax.jit
def fit(model: Dynamics, rows: Transition, index: jax.Array, num_fits: jax.Array) -> Dynamics:
    """Fit i of member m is to the rows index[i, m]."""

    def body(i: jax.Array, model: Dynamics) -> Dynamics:
        batch: Transition = jax.tree.map(lambda x: x[index[i]], rows)
        return dynamics.fit_step(model, batch, CONFIG)[0]

    return jax.lax.fori_loop(0, num_fits, body, model)


def drawn() -> np.ndarray:
    shape = (NUM_FITS, CONFIG.members, CONFIG.batch_size)
    return np.random.default_rng(10).integers(0, ROWS, shape, np.int32)


@pytest.fixture(scope="module")
def fitted() -> Dynamics:
    """Three members, each fitted to minibatches of its own."""
    rows = random_rows(ROWS, seed=0)
    return fit(observed(rows), rows, drawn(), jnp.int32(NUM_FITS))


@jax.jit
def all_predictions(model: Dynamics, obs: jax.Array, action: jax.Array) -> jax.Array:
    """Next state and reward by every member on every row (M, B, S+1), unclipped."""
    change = model.change.unscale(dynamics.predict(model, obs, action, shared=True).mean)
    return change.at[..., : obs.shape[-1]].add(jnp.broadcast_to(obs, (*change.shape[:-1], obs.shape[-1])))


# --- What is learned ---


def test_a_linear_system_is_recovered(fitted: Dynamics) -> None:
    rows = random_rows(300, seed=1)
    for member in all_predictions(fitted, rows.obs, rows.action):
        error = np.abs(np.asarray(member) - np.column_stack([rows.next_obs, rows.reward]))
        assert error.mean(axis=0).max() < 0.02  # of states that spread over [-2, 2]
        assert error.max() < 0.15


def test_five_open_loop_steps_stay_on_course(fitted: Dynamics) -> None:
    rng = np.random.default_rng(2)
    obs = np.concatenate([rng.uniform(-1, 1, (300, 2)), np.full((300, 1), CONSTANT)], axis=1).astype(
        np.float32
    )
    imagined, key = jnp.asarray(obs), jax.random.key(0)
    for t in range(5):
        action = rng.uniform(-1, 1, (300, 1)).astype(np.float32)
        obs, reward, _ = true_step(obs, action)
        imagined, imagined_reward, _ = STEP(
            fitted, LEARNED, CONFIG, imagined, jnp.asarray(action), jax.random.fold_in(key, t)
        )
        assert np.abs(imagined_reward - reward).mean() < 0.05
    error = np.abs(imagined - obs)
    assert error.mean() < 0.05
    np.testing.assert_allclose(imagined[:, 2], CONSTANT, rtol=1e-6)


def test_members_start_apart_and_stay_apart(fitted: Dynamics) -> None:
    rows = random_rows(300, seed=1)
    for model in (observed(rows), fitted):
        prediction = all_predictions(model, rows.obs, rows.action)
        for a, b in ((0, 1), (0, 2), (1, 2)):
            assert jnp.abs(prediction[a] - prediction[b])[:, [0, 1, 3]].mean(axis=0).min() > 1e-4


@pytest.mark.parametrize("member", range(3))
def test_each_member_learns_from_its_own_rows_only(member: int) -> None:
    rows = random_rows(ROWS, seed=0)
    model, index = observed(rows), drawn()
    other = index.copy()
    other[:, member] = (other[:, member] + 1) % ROWS
    a, b = fit(model, rows, index, jnp.int32(5)), fit(model, rows, other, jnp.int32(5))
    for with_index, with_other in zip(jax.tree.leaves(a.net), jax.tree.leaves(b.net), strict=True):
        differs = (with_index != with_other).any(axis=tuple(range(1, with_index.ndim)))
        np.testing.assert_array_equal(differs, np.arange(3) == member)


HEALTHY = jnp.array([[0.7, 0.0, CONSTANT], [-0.7, 0.5, CONSTANT], [0.0, 0.0, CONSTANT]])


@partial(jax.jit, static_argnames="horizon")
def steered(model: Dynamics, start: jax.Array, horizon: int) -> imagine.Imagined:
    """A rollout of the fitted model under the oscillator's own policy."""
    gain = jnp.asarray(linear_system().gain, jnp.float32)

    def policy_fn(obs: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        return obs[:, :2] @ gain, jnp.zeros(len(obs))

    return imagine.rollout(
        partial(dynamics.step, model, LEARNED, CONFIG), policy_fn, start, horizon, jax.random.key(0)
    )


def test_a_constant_observation_is_left_unscaled_and_stays_constant(fitted: Dynamics) -> None:
    np.testing.assert_allclose(fitted.obs.mean[2], CONSTANT, rtol=1e-6)
    np.testing.assert_array_equal(fitted.change.std[2], 1.0)
    rollout = steered(fitted, HEALTHY, 200)
    assert all(bool(jnp.isfinite(x).all()) for x in rollout)
    np.testing.assert_allclose(rollout.obs[..., 2], CONSTANT, rtol=1e-6)


def test_termination_is_right_on_both_sides_of_its_threshold(fitted: Dynamics) -> None:
    first = jnp.linspace(-2.0, 2.0, 300)
    obs = jnp.stack([first, jnp.zeros(300), jnp.full(300, CONSTANT)], axis=1)
    next_obs, _, continuation = STEP(fitted, LEARNED, CONFIG, obs, jnp.zeros((300, 1)), jax.random.key(0))
    clear = jnp.abs(next_obs[:, 0] - EDGE) > 0.1
    np.testing.assert_array_equal(continuation[clear], (next_obs[:, 0] < EDGE)[clear])
    assert set(np.unique(continuation)) == {0.0, 1.0}


def test_termination_does_not_wear_out_a_healthy_rollout(fitted: Dynamics) -> None:
    survival = jnp.prod(steered(fitted, HEALTHY, 200).continuation, axis=0)
    np.testing.assert_array_equal(survival, 1.0)


def test_known_functions_take_the_place_of_learned_ones() -> None:
    def reward(obs: jax.Array, action: jax.Array, next_obs: jax.Array) -> jax.Array:
        return obs[..., 0] + 10.0 * action[..., 0] + 100.0 * next_obs[..., 0]

    def termination(obs: jax.Array, action: jax.Array, next_obs: jax.Array) -> jax.Array:
        return next_obs[..., 0] > 0.3

    known, rows = Known(reward, termination), random_rows(64, seed=4)
    model = observed(rows, known=known)
    assert model.net.layers[-1].bias.shape == (3, 3)  # the state's change and nothing else
    assert model.termination_net is None
    obs, action = rows.obs, rows.action
    next_obs, got, continuation = STEP(model, known, CONFIG, obs, action, jax.random.key(0))
    np.testing.assert_allclose(got, reward(obs, action, next_obs), rtol=1e-6)
    np.testing.assert_array_equal(continuation, next_obs[:, 0] <= 0.3)


# --- Who serves whom ---


def served_by(model: Dynamics, obs: jax.Array, action: jax.Array, key: jax.Array) -> np.ndarray:
    """The member whose prediction each row got; fails if a row got none's."""
    free = eqx.tree_at(
        lambda m: (m.obs.low, m.obs.high), model, (jnp.full(3, -jnp.inf), jnp.full(3, jnp.inf))
    )
    next_obs, _, _ = STEP(free, LEARNED, CONFIG, obs, action, key)
    distance = jnp.abs(all_predictions(model, obs, action)[..., :2] - next_obs[None, :, :2]).max(axis=-1)
    np.testing.assert_allclose(distance.min(axis=0), 0.0, atol=1e-5)
    assert (jnp.sort(distance, axis=0)[1] > 1e-4).all()  # and nobody else's
    return np.asarray(distance.argmin(axis=0))


@pytest.mark.parametrize("num_rows", [12, 7, 2])
def test_every_row_gets_its_own_prediction_from_one_member(num_rows: int) -> None:
    rows = random_rows(num_rows, seed=5)
    model = observed(random_rows(100, seed=5))
    obs, action = rows.obs, rows.action
    seen = [served_by(model, obs, action, key) for key in jax.random.split(jax.random.key(0), 40)]
    if num_rows > 2:  # each row meets each member in time
        assert all(set(column) == {0, 1, 2} for column in np.transpose(seen))


def test_members_are_used_equally() -> None:
    rows = random_rows(300, seed=5)
    model = observed(rows)
    served = served_by(model, rows.obs, rows.action, jax.random.key(1))
    np.testing.assert_array_equal(np.bincount(served), 100)


# --- Statistics ---


def test_statistics_are_those_of_all_rows_ever_seen() -> None:
    rng = np.random.default_rng(6)
    blocks = [(rng.normal([5, -100, 0.01], [1, 30, 0.002], (7, 3)), n) for n in (7, 3, 0, 7, 1, 5)]
    seen = np.concatenate([block[:n] for block, n in blocks])
    normaliser = Normaliser.empty(3)
    for block, n in blocks:
        normaliser = normaliser.observe(jnp.asarray(block, jnp.float32), jnp.int32(n))
    assert normaliser.count == len(seen)
    np.testing.assert_allclose(normaliser.mean, seen.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(normaliser.std, seen.std(axis=0), rtol=1e-4)
    np.testing.assert_allclose(normaliser.low, seen.min(axis=0), rtol=1e-6)
    np.testing.assert_allclose(normaliser.high, seen.max(axis=0), rtol=1e-6)
    z = normaliser.scale(jnp.asarray(seen, jnp.float32))
    np.testing.assert_allclose(z.mean(axis=0), 0.0, atol=1e-4)
    np.testing.assert_allclose(z.std(axis=0), 1.0, rtol=1e-4)
    np.testing.assert_allclose(normaliser.unscale(z), seen, rtol=1e-4)


def test_a_column_is_constant_by_its_own_units() -> None:
    """Micrometres are scaled as metres are; what moves by rounding alone is not, and is the mean again."""
    rng = np.random.default_rng(6)
    draws = rng.normal(size=(200, 4)) * [3e-6, 3e-6, 1e-5, 0.0] + [0.0, 1e-5, 1000.0, 5.0]
    seen = jnp.asarray(draws, jnp.float32)
    normaliser = Normaliser.empty(4).observe(seen, jnp.int32(200))
    np.testing.assert_allclose(normaliser.std, [*draws.std(axis=0)[:2], 1.0, 1.0], rtol=1e-3)
    np.testing.assert_allclose(normaliser.scale(seen)[:, :2].std(axis=0), 1.0, rtol=1e-3)
    np.testing.assert_allclose(
        normaliser.unscale(normaliser.scale(seen))[:, :2], seen[:, :2], rtol=1e-3, atol=1e-9
    )
    np.testing.assert_allclose(normaliser.unscale(jnp.ones((1, 4)))[0, 2:], [1000.0, 5.0], rtol=1e-6)
    np.testing.assert_array_equal(Normaliser.empty(2).std, 1.0)
    np.testing.assert_array_equal(Normaliser.empty(2).unscale(jnp.full((1, 2), 7.0)), 7.0)


def test_observing_fills_in_state_action_and_change() -> None:
    rows = random_rows(50, seed=8)
    model = observed(rows)
    change = np.column_stack([rows.next_obs - rows.obs, rows.reward])
    for normaliser, column in (
        (model.obs, rows.next_obs),
        (model.action, rows.action),
        (model.change, change),
    ):
        np.testing.assert_allclose(normaliser.mean, column.mean(axis=0), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(normaliser.low, column.min(axis=0))


def test_without_normalisation_nothing_is_scaled_but_the_range_is_kept() -> None:
    config = replace(CONFIG, normalise=False)
    rows = random_rows(50, seed=8)
    model = OBSERVE(observed(rows, config), rows, jnp.int32(20), config)
    for normaliser in (model.obs, model.action, model.change):
        np.testing.assert_array_equal(normaliser.mean, 0.0)
        np.testing.assert_allclose(normaliser.std, 1.0)
    np.testing.assert_allclose(model.obs.high, rows.next_obs.max(axis=0))


# --- Hand-made models ---


TINY = DynamicsConfig(hidden=(8,), members=2)


def never(obs: jax.Array, action: jax.Array, next_obs: jax.Array) -> jax.Array:
    return jnp.zeros(obs.shape[:-1], bool)


ENDLESS = Known(termination=never)


def drifting(change: list[float]) -> Dynamics:
    """Member m predicts the change `change[m]` of one coordinate and the reward 3, whatever it is shown."""
    model = INIT(TINY, ENDLESS, 1, 1, jax.random.key(0))
    last = model.net.layers[-1]
    bias = jnp.array([[c, 3.0] for c in change])
    model = eqx.tree_at(
        lambda m: (m.net.layers[-1].weight, m.net.layers[-1].bias), model, (jnp.zeros_like(last.weight), bias)
    )
    unit = Normaliser.empty(1)
    unit = eqx.tree_at(lambda n: (n.low, n.high), unit, (jnp.array([-100.0]), jnp.array([100.0])))
    spread_2 = eqx.tree_at(lambda n: (n.count, n.sum_of_squares), unit, (jnp.float32(1), jnp.array([4.0])))
    return eqx.tree_at(lambda m: m.obs, model, spread_2)


def test_a_depth_that_no_segment_reaches_has_no_error() -> None:
    errors = jax.jit(dynamics.open_loop_error, static_argnums=3)(
        observed(random_rows(9, seed=1)), random_rows(9, seed=2), jnp.int32(2), (1, 3)
    )
    assert np.isfinite(errors[1])
    assert np.isnan(errors[3])


def test_open_loop_error_by_hand() -> None:
    model = drifting([0.5, 1.5])  # on average, every step adds 1; the spread of the data is 2
    # Two episodes, 0 1 3 4 and 10 12 13; the last row is beyond num_rows.
    obs, next_obs = [[0], [1], [3], [10], [12], [50]], [[1], [3], [4], [12], [13], [99]]
    rows = rows_of(obs, np.zeros((6, 1)), np.zeros(6), next_obs)
    rows = rows._replace(episode=jnp.array([0, 0, 0, 1, 1, 1]))
    errors = jax.jit(dynamics.open_loop_error, static_argnums=3)(model, rows, jnp.int32(5), (1, 2, 3))
    # One step: off by 0, 1, 0, 1, 0. Two, from rows 0, 1 and 3: 2 for 3, 3 for 4, 12 for 13. Three: 3 for 4.
    np.testing.assert_allclose(errors[1], (2 / 5) / 4)
    np.testing.assert_allclose(errors[2], (3 / 3) / 4)
    np.testing.assert_allclose(errors[3], (1 / 1) / 4)


@pytest.mark.parametrize("stay_in_data", [True, False])
def test_imagined_states_stay_within_the_data_if_asked_to(stay_in_data: bool) -> None:
    config = replace(TINY, stay_in_data=stay_in_data)
    model = drifting([1.0, 1.0])
    model = eqx.tree_at(
        lambda m: (m.change.low, m.change.high), model, (jnp.array([-1.0, -1.0]), jnp.ones(2))
    )

    def policy_fn(obs: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jnp.zeros_like(obs), jnp.zeros(obs.shape[:-1])

    step_fn = partial(dynamics.step, model, ENDLESS, config)
    rollout = imagine.rollout(step_fn, policy_fn, jnp.zeros((2, 1)), 150, jax.random.key(0))
    np.testing.assert_allclose(rollout.obs[-1], 100.0 if stay_in_data else 150.0)
    np.testing.assert_allclose(rollout.obs[100], 100.0)
    np.testing.assert_allclose(rollout.reward, 1.0 if stay_in_data else 3.0)


# --- An oracle in the model's place ---


@pytest.mark.parametrize("estimator", ["one_step", "mve", "mve_tdk"])
@pytest.mark.parametrize("horizon", [0, 1, 3, 10])
def test_an_oracle_and_exact_values_leave_no_error_in_any_target(horizon: int, estimator: str) -> None:
    system = linear_system()
    rng = np.random.default_rng(9)
    obs, action = (rng.normal(size=(32, n)).astype(np.float32) for n in (2, 1))
    batch = rows_of(obs, action, system.reward(obs, action), system.next_obs(obs, action))
    config = TargetsConfig(estimator=estimator, horizon_steps=horizon, discount=system.discount)  # pyright: ignore[reportArgumentType]
    rows = targets.estimate(
        batch, oracle(system, batch.next_obs, horizon), EstimatorFns(exact(system)), config
    )
    value = system.reward(rows.obs, rows.action) + system.discount * system.value(
        system.next_obs(rows.obs, rows.action)
    )
    assert len(rows.value) == 32 * (1 + (horizon if estimator == "mve_tdk" else 0))
    np.testing.assert_allclose(rows.value, value, rtol=1e-4, atol=1e-4)


@partial(jax.jit, static_argnames="horizon")
def oracle(system: LinearSystem, start: jax.Array, horizon: int) -> imagine.Imagined:
    def step_fn(obs: jax.Array, action: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        return system.next_obs(obs, action), system.reward(obs, action), jnp.ones(len(obs))

    def policy_fn(obs: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        return system.policy(obs), jnp.zeros(len(obs))

    return imagine.rollout(step_fn, policy_fn, start, horizon, jax.random.key(0))


def exact(system: LinearSystem) -> Callable[[jax.Array], jax.Array]:
    return lambda obs: system.value(obs)[None]


def test_weights_decay_by_layer() -> None:
    config = DynamicsConfig(
        hidden=(4,), members=2, weight_decay=0.5, weight_decay_by_layer=(0.25, 1.0), learning_rate=0.1
    )
    model = dynamics.init(config, Known(), 3, 2, jax.random.key(0))
    still: Any = jax.tree.map(jnp.zeros_like, model.nets)
    update, _ = dynamics.ensemble.optimiser(config).update(still, model.opt_state, model.nets)  # pyright: ignore
    nets: Any = model.nets
    for layer, share in ((0, 0.25), (1, 1.0)):
        expected = -0.05 * share * nets[0].layers[layer].weight
        np.testing.assert_allclose(update[0].layers[layer].weight, expected, rtol=1e-5)
    np.testing.assert_allclose(update[1].layers[0].weight, -0.05 * nets[1].layers[0].weight, rtol=1e-5)
    with pytest.raises(UserError, match="3 factors for 2 layers"):
        DynamicsConfig(hidden=(4,), weight_decay_by_layer=(1.0, 1.0, 1.0))
