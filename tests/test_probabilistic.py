"""Noise that is learned and drawn, and the trajectories of an ensemble's members.

Two coordinates that shrink, driven by one action, with Gaussian noise where a test wants some.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mve import dynamics, imagine
from mve.dynamics import Dynamics, DynamicsConfig, fitting
from mve.dynamics.ensemble import Bounds, Homoscedastic
from mve.types import Key, Known, Metrics, StepFn, Transition


def nothing(obs: jax.Array, action: jax.Array, next_obs: jax.Array) -> jax.Array:
    return jnp.zeros(obs.shape[:-1])


def never(obs: jax.Array, action: jax.Array, next_obs: jax.Array) -> jax.Array:
    return jnp.zeros(obs.shape[:-1], bool)


KNOWN, LEARNED = Known(nothing, never), Known(None, never)
SMALL = DynamicsConfig(hidden=(32,), members=3, learning_rate=3e-3, batch_size=64)
HELD = replace(SMALL, learning_rate=1e-2, holdout_share=0.3, holdout_chunk_steps=10)
JUDGED = replace(HELD, patience=3, check_every=20, elites=2)
INIT = jax.jit(dynamics.init, static_argnums=(0, 1, 2, 3))
OBSERVE = jax.jit(dynamics.observe, static_argnums=3)
STEP = jax.jit(dynamics.step, static_argnums=(1, 2))
PREDICT = jax.jit(partial(dynamics.predict, shared=True))


def data(num_rows: int = 2000, noise: Any = 0.0, seed: int = 0) -> Transition:
    """s' = 0.9 s + 0.3 a + noise(s) e; the reward is the change of the first coordinate."""
    rng = np.random.default_rng(seed)
    obs = rng.uniform(-1, 1, (num_rows, 2)).astype(np.float32)
    action = rng.uniform(-1, 1, (num_rows, 1)).astype(np.float32)
    std = noise(obs) if callable(noise) else noise
    next_obs = (0.9 * obs + 0.3 * action + std * rng.normal(size=(num_rows, 2))).astype(np.float32)
    return Transition(
        *map(jnp.asarray, (obs, action, next_obs[:, 0] - obs[:, 0], next_obs)),
        continuation=jnp.ones(num_rows),
        episode=jnp.zeros(num_rows, jnp.int32),
        step=1 + jnp.arange(num_rows),
        log_density=jnp.zeros(num_rows),
    )


def beginner(config: DynamicsConfig, experience: Transition, known: Known = KNOWN) -> Dynamics:
    """Untrained, with the statistics of the data."""
    model = INIT(config, known, 2, 1, jax.random.key(0))
    return OBSERVE(model, experience, jnp.int32(len(experience.reward)), config)


def sampler(experience: Transition) -> Any:
    def sample(shape: tuple[int, ...], key: Key) -> Transition:
        index = jax.random.randint(key, shape, 0, len(experience.reward))
        return jax.tree.map(lambda x: x[index], experience)

    return sample


@partial(jax.jit, static_argnames="config")
def fit(
    model: Dynamics, experience: Transition, num_fits: jax.Array, key: Key, config: DynamicsConfig
) -> tuple[Dynamics, Metrics]:
    return dynamics.fit(model, sampler(experience), config, num_fits, key)


def drifting(changes: list[float], config: DynamicsConfig, known: Known = KNOWN) -> Dynamics:
    """Member m moves both coordinates by `changes[m]`, whatever it is shown; its scales are 1."""
    model = INIT(config, known, 2, 1, jax.random.key(0))
    last = model.net.layers[-1]
    bias = jnp.broadcast_to(jnp.array(changes)[:, None], last.bias.shape)
    return eqx.tree_at(
        lambda m: (m.net.layers[-1].weight, m.net.layers[-1].bias), model, (jnp.zeros_like(last.weight), bias)
    )


# --- Noise ---


def test_the_likelihood_of_one_output_by_hand() -> None:
    # ((1 - 0)^2 / 4 + log 4 + log 2 pi) / 2 = (0.25 + 1.386294 + 1.837877) / 2
    found = fitting.negative_log_likelihood(jnp.array([1.0]), jnp.array([0.0]), jnp.log(jnp.array([4.0])))
    np.testing.assert_allclose(found, [1.737086], rtol=1e-6)


def test_log_variances_stay_softly_within_their_bounds() -> None:
    bounds = Bounds(low=jnp.array([-10.0]), high=jnp.array([0.5]))
    x = jnp.linspace(-50.0, 50.0, 201)[:, None]
    found = bounds.apply(x)[:, 0]
    assert (jnp.diff(found) >= 0).all()
    np.testing.assert_allclose(found[jnp.array([0, -1])], [-10.0, 0.5], atol=1e-3)
    np.testing.assert_allclose(found[90], -5.0, atol=0.02)  # in between, what the net says


def uneven(obs: np.ndarray) -> np.ndarray:
    """Standard deviations that depend on the state: 0.02 to 0.22, and 0.1 throughout."""
    return np.stack([0.12 + 0.1 * obs[:, 0], np.full(len(obs), 0.1)], axis=1)


def test_noise_that_depends_on_the_state_is_recovered() -> None:
    config = replace(SMALL, noise="heteroscedastic", batch_size=128)
    experience = data(8000, uneven)
    model, _ = fit(beginner(config, experience), experience, jnp.int32(1200), jax.random.key(1), config)
    judged = data(500, seed=1)
    found = PREDICT(model, judged.obs, judged.action)
    std = jnp.exp(0.5 * found.log_var) * model.change.std[None, None]
    for member in np.asarray(std):
        ratio = member / uneven(np.asarray(judged.obs))
        assert np.abs(np.log(ratio)).mean() < 0.12
        np.testing.assert_allclose(np.median(ratio, axis=0), 1.0, atol=0.1)
    change = model.change.unscale(found.mean)
    assert jnp.abs(change - (judged.next_obs - judged.obs)[None]).mean() < 0.02
    errors = jax.jit(dynamics.open_loop_error, static_argnums=3)(model, judged, jnp.int32(500), (1,))
    assert errors[1] < 1e-3  # judged by its means


@pytest.mark.parametrize(("factor", "recovered"), [(10.0, True), (1.0, False)])
def test_even_noise_is_recovered_and_fast_at_ten_times_the_rate(factor: float, recovered: bool) -> None:
    config = replace(SMALL, noise="homoscedastic", learning_rate=1e-3, noise_learning_rate_factor=factor)
    experience = data(4000, np.array([0.02, 0.06]))
    model, _ = fit(beginner(config, experience), experience, jnp.int32(500), jax.random.key(1), config)
    found = PREDICT(model, experience.obs[:1], experience.action[:1])
    std = jnp.exp(0.5 * found.log_var)[:, 0] * model.change.std[None]
    if recovered:
        np.testing.assert_allclose(std, np.tile([0.02, 0.06], (3, 1)), rtol=0.35)
    else:  # has come down by about exp(-0.5)
        assert (std > 0.55 * model.change.std[None]).all()


def test_noise_may_be_learned_on_the_rows_that_a_member_does_not_see() -> None:
    """By hand: at log-std 0, d/dlog-std of (z^2 exp(-2 log-std) + 2 log-std) / 2 is 1 - z^2. Nets do not
    hear of unseen rows, the noise of no others."""
    config = replace(SMALL, noise="homoscedastic", bootstrap=True, noise_rows="unseen")
    experience = data(64, 0.1)
    model, rows = beginner(config, experience), sampler(experience)((3, 64), jax.random.key(0))
    weight = np.asarray(dynamics.rows.bootstrap_weights(rows.step))
    assert 0.25 < np.mean(weight == 0) < 0.5  # 1 / e

    @jax.jit
    def gradients(rows: Transition) -> Any:
        return jax.grad(dynamics.fitting._loss, has_aux=True)(model.nets, model, rows, config)[0]

    net, _, noise = gradients(rows)
    target = np.asarray(model.change.scale(rows.next_obs - rows.obs))
    square = np.square(np.asarray(dynamics.predict(model, rows.obs, rows.action).mean) - target)
    for m in range(3):
        unseen = square[m, weight[m] == 0].mean(axis=0)
        np.testing.assert_allclose(noise.log_std[m], (1 - unseen) / 2, atol=1e-4)  # mean over 2 outputs
    for moved, stays in ((weight == 0, net), (weight > 0, noise)):
        other = rows._replace(next_obs=rows.next_obs + 3.0 * jnp.asarray(moved, jnp.float32)[..., None])
        found = gradients(other)[0 if stays is net else 2]
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(stays), strict=True):
            np.testing.assert_array_equal(a, b)


def test_noise_of_unseen_rows_is_what_the_model_errs_by_on_new_ones() -> None:
    """64 rows of noise 0.1 are learned by heart: what is left on them says nothing of new ones."""
    few, new = data(64, 0.1), data(1000, 0.1, seed=1)
    ratio = {}
    for noise_rows in ("fitted", "unseen"):
        config = replace(
            SMALL, noise="homoscedastic", bootstrap=True, noise_rows=noise_rows, learning_rate=3e-3
        )
        model, _ = fit(beginner(config, few), few, jnp.int32(1500), jax.random.key(1), config)
        found = PREDICT(model, new.obs, new.action)
        error = np.square(np.asarray(found.mean) - np.asarray(model.change.scale(new.next_obs - new.obs)))
        ratio[noise_rows] = float(np.mean(error * np.exp(-np.asarray(found.log_var))))
    assert ratio["fitted"] > 3
    assert 0.5 < ratio["unseen"] < 2


def test_homoscedastic_noise_starts_at_one_and_has_a_floor() -> None:
    log_var = Homoscedastic(jnp.array([0.0, -30.0])).log_var()
    np.testing.assert_allclose(jnp.exp(0.5 * log_var), [1.0, 1e-3], rtol=1e-5)
    slope = jax.grad(lambda x: Homoscedastic(x).log_var()[0])(jnp.log(jnp.array([1e-3])))
    np.testing.assert_allclose(slope, 1.0, rtol=1e-4)  # half of what it is far above, and not 0


def test_without_any_of_it_a_fit_is_adam_on_squared_errors_draw_for_draw() -> None:
    experience, key = data(200, 0.1), jax.random.key(3)
    model = beginner(SMALL, experience)
    assert model.noise is None
    assert model.elites is None
    found, metrics = fit(model, experience, jnp.int32(3), jax.random.key(3), SMALL)

    @jax.jit
    def naive(net: Any) -> Any:
        adam = optax.adam(SMALL.learning_rate)
        state = adam.init(net)

        def loss(net: Any, batch: Transition) -> jax.Array:
            x = jnp.concatenate([model.obs.scale(batch.obs), model.action.scale(batch.action)], axis=-1)
            target = model.change.scale(batch.next_obs - batch.obs)
            return sum(
                jnp.mean((jax.tree.map(lambda w, m=m: w[m], net)(x[m]) - target[m]) ** 2) for m in range(3)
            )  # pyright: ignore[reportReturnType]

        for i in range(3):
            batch = sampler(experience)((3, 64), jax.random.fold_in(key, i))
            update, state = adam.update(jax.grad(loss)(net, batch), state)
            net = optax.apply_updates(net, update)
        return net

    for a, b in zip(jax.tree.leaves(found.net), jax.tree.leaves(naive(model.net)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    assert metrics["model/fits"] == 3


def test_weights_decay_and_nothing_else_does() -> None:
    config = replace(SMALL, noise="homoscedastic", layer_norm=True, weight_decay=0.5, learning_rate=0.1)
    model = beginner(config, data(64))
    params: Any = model.nets
    still = jax.tree.map(jnp.zeros_like, params)
    optimiser = dynamics.ensemble.optimiser(config)
    update, _ = optimiser.update(still, model.opt_state, params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(update):
        assert bool(jnp.any(leaf != 0)) == (path[-1].name == "weight"), path
    np.testing.assert_allclose(update[0].layers[0].weight, -0.05 * model.net.layers[0].weight, rtol=1e-5)


# --- Draws of imagined steps ---


def sampling(noise: str, sample: str) -> tuple[Dynamics, DynamicsConfig]:
    config = replace(SMALL, members=2, noise=noise, sample=sample, stay_in_data=False)
    return beginner(config, data(100), LEARNED), config


@pytest.mark.parametrize("noise", ["homoscedastic", "heteroscedastic"])
def test_what_is_asked_for_is_drawn_and_the_rest_is_the_mean(noise: str) -> None:
    obs, action = jnp.zeros((4000, 2)), jnp.zeros((4000, 1))
    model, silent = sampling(noise, "none")
    model = dynamics.only(model, jnp.array([0]))
    mean_obs, mean_reward, _ = STEP(model, LEARNED, silent, obs, action, jax.random.key(0))
    found = PREDICT(model, obs[:1], action[:1])
    std = jnp.exp(0.5 * found.log_var)[0, 0] * model.change.std
    for sample in ("state", "state_and_reward"):
        config = replace(silent, sample=sample)
        next_obs, reward, _ = STEP(model, LEARNED, config, obs, action, jax.random.key(0))
        np.testing.assert_allclose((next_obs - mean_obs).std(axis=0), std[:2], rtol=0.05)
        np.testing.assert_allclose((next_obs - mean_obs).mean(axis=0), 0.0, atol=0.05)
        assert abs(jnp.corrcoef((next_obs - mean_obs).T)[0, 1]) < 0.06
        if sample == "state":
            np.testing.assert_array_equal(reward, mean_reward)
        else:
            np.testing.assert_allclose((reward - mean_reward).std(), std[2], rtol=0.05)


def test_gradients_flow_through_a_drawn_step() -> None:
    model, config = sampling("heteroscedastic", "state_and_reward")
    rng = np.random.default_rng(0)
    obs, direction = (jnp.asarray(rng.normal(size=(6, 2)), jnp.float32) for _ in range(2))
    action = jnp.asarray(rng.uniform(-1, 1, (6, 1)), jnp.float32)

    @jax.jit
    def outcome(shift: jax.Array, scale: jax.Array) -> jax.Array:
        assert isinstance(model.noise, Bounds)
        noisier = replace(model, noise=Bounds(model.noise.low, model.noise.high + scale))
        next_obs, reward, _ = dynamics.step(
            noisier, LEARNED, config, obs + shift * direction, action, jax.random.key(5)
        )
        return jnp.sum(next_obs * direction) + jnp.sum(reward**2)

    at, h = (jnp.float32(0.1), jnp.float32(0.2)), 1e-2
    slopes = jax.jit(jax.grad(outcome, argnums=(0, 1)))(*at)
    for i, slope in enumerate(slopes):
        up, down = (tuple(x + sign * h * (j == i) for j, x in enumerate(at)) for sign in (1, -1))
        np.testing.assert_allclose(slope, (outcome(*up) - outcome(*down)) / (2 * h), rtol=0.02)
        assert abs(slope) > 1e-2


# --- Trajectories ---


@partial(jax.jit, static_argnames="config")
def increments(model: Dynamics, config: DynamicsConfig, rollout_key: Key) -> jax.Array:
    """What each of 30 rows is moved by in each of 12 steps (H, B)."""

    def still(obs: jax.Array, key: Key) -> tuple[jax.Array, jax.Array]:
        return jnp.zeros((len(obs), 1)), jnp.zeros(len(obs))

    step_fn: StepFn = dynamics.rollout_step(model, KNOWN, config, rollout_key)
    rollout = imagine.rollout(step_fn, still, jnp.zeros((30, 2)), 12, jax.random.key(7))
    return jnp.diff(rollout.obs[..., 0], axis=0)


@pytest.mark.parametrize("elites", [0, 2])
def test_a_row_keeps_its_member_under_tsinf_and_changes_it_under_ts1(elites: int) -> None:
    config = replace(HELD, trajectory="tsinf", elites=elites, stay_in_data=False)
    model = drifting([1.0, 2.0, 3.0], config)
    serving = 3 if elites == 0 else 2
    moved = np.round(np.asarray(increments(model, config, jax.random.key(0))), 3)
    assert (moved == moved[0]).all()
    np.testing.assert_array_equal(np.unique_counts(moved[0]).counts, 30 // serving)
    keys = jax.random.split(jax.random.key(1), 40)
    others = np.round([np.asarray(increments(model, config, key))[0] for key in keys])
    # Another rollout, another deal: in time every row meets every member.
    assert all(set(column) == set(range(1, serving + 1)) for column in others.T)

    anew = np.round(np.asarray(increments(model, replace(config, trajectory="ts1"), jax.random.key(0))))
    assert all(len(set(column)) > 1 for column in anew.T)


@pytest.mark.parametrize(("copies", "rows"), [(2, 30), (2, 7), (3, 5), (4, 9)])
def test_copies_of_a_row_are_imagined_by_members_of_their_own(copies: int, rows: int) -> None:
    """Dealt anew for every rollout and kept throughout it; the answer is the mean, whatever the noise."""
    config = replace(SMALL, members=4, noise="homoscedastic", sample="state", stay_in_data=False)
    model = drifting([1.0, 2.0, 3.0, 4.0], config)

    @jax.jit
    def moved(key: Key) -> jax.Array:  # (2, K, B)
        step_fn = dynamics.few_members_step(model, KNOWN, config, key)
        obs, action = jnp.zeros((copies, rows, 2)), jnp.zeros((copies, rows, 1))
        there, reward, continuation = step_fn(obs, action, jax.random.key(7))
        assert reward.shape == (1, copies, rows)
        assert continuation.shape == (copies, rows)
        return jnp.stack([there, step_fn(there, action, jax.random.key(8))[0] - there])[..., 0]

    deals = np.round([np.asarray(moved(key)) for key in jax.random.split(jax.random.key(1), 20)], 3)
    np.testing.assert_array_equal(deals[:, 0], deals[:, 1])  # the second step as the first
    for deal in deals[:, 0]:
        assert all(len(set(column)) == copies for column in deal.T)  # no two of a row are one member's
    assert set(deals[:, 0, 0, 0]) == {1.0, 2.0, 3.0, 4.0}


@pytest.mark.parametrize("trajectory", ["ts1", "tsinf"])
def test_every_member_serves_where_rows_do_not_fill_their_blocks(trajectory: Literal["ts1", "tsinf"]) -> None:
    """16 rows and five members: four of each in turn, and none of one."""
    config = replace(SMALL, members=5, trajectory=trajectory, stay_in_data=False)
    model = drifting([1.0, 2.0, 3.0, 4.0, 5.0], config)

    @jax.jit
    def served(key: Key) -> jax.Array:
        step_fn = dynamics.rollout_step(model, KNOWN, config, key)
        return step_fn(jnp.zeros((16, 2)), jnp.zeros((16, 1)), key)[0][:, 0]

    deals = np.round([np.asarray(served(key)) for key in jax.random.split(jax.random.key(2), 100)])
    shares = np.unique_counts(deals)
    np.testing.assert_array_equal(shares.values, [1, 2, 3, 4, 5])
    np.testing.assert_allclose(shares.counts / deals.size, 0.2, atol=0.04)
