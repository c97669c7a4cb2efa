"""Noise, bootstrap, held-out rows, early stopping, elites and trajectories of the ensemble.

Two coordinates that shrink, driven by one action, with Gaussian noise where a test wants some.
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_learner import SMALL as TINY
from test_learner import Slide

from mve import Learner, dynamics, imagine, schedule, train
from mve import config as configuration
from mve.dynamics import Dynamics, DynamicsConfig, fitting, rows
from mve.dynamics.ensemble import Bounds, Homoscedastic
from mve.types import Key, Known, Metrics, StepFn, Transition, UserError


def nothing(obs: jax.Array, action: jax.Array, next_obs: jax.Array) -> jax.Array:
    return jnp.zeros(obs.shape[:-1])


def never(obs: jax.Array, action: jax.Array, next_obs: jax.Array) -> jax.Array:
    return jnp.zeros(obs.shape[:-1], bool)


KNOWN, LEARNED = Known(nothing, never), Known(None, never)
SMALL = DynamicsConfig(hidden=(32,), members=3, learning_rate=3e-3, batch_size=64)
INIT = jax.jit(dynamics.init, static_argnums=(0, 1, 2, 3))
OBSERVE = jax.jit(dynamics.observe, static_argnums=3)
STEP = jax.jit(dynamics.step, static_argnums=(1, 2))
PREDICT = jax.jit(partial(dynamics.predict, shared=True))
FIT_STEP = jax.jit(dynamics.fit_step, static_argnums=2)
ERROR = jax.jit(dynamics.held_out_error)
PINNED_WEIGHTS = [0, 1, 1, 1, 1, 0, 1, 0, 1, 1, 1, 0]  # of member 0 for the rows 0..11


def data(num_rows: int = 2000, noise: Any = 0.0, seed: int = 0) -> Transition:
    """s' = 0.9 s + 0.3 a + noise(s) e; the reward is what is lost, s'_0 - s_0."""
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


def batch_of(experience: Transition, index: np.ndarray) -> Transition:
    return jax.tree.map(lambda x: x[index], experience)


def same(a: Any, b: Any) -> bool:
    return bool(eqx.tree_equal(a, b))


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


# --- Which rows a member sees ---


def test_a_rows_weight_for_a_member_depends_on_its_name_and_the_member_only() -> None:
    step = jnp.arange(200_000)
    weight = np.asarray(rows.bootstrap_weights(jnp.broadcast_to(step, (3, *step.shape))))
    np.testing.assert_allclose(weight.mean(axis=1), 1.0, atol=0.01)
    np.testing.assert_allclose(weight.var(axis=1), 1.0, atol=0.02)
    np.testing.assert_allclose((weight == 0).mean(axis=1), np.exp(-1), atol=0.01)
    assert set(np.unique(weight)) == set(range(6))
    assert np.abs(np.corrcoef(weight) - np.eye(3)).max() < 0.01  # members resample independently
    assert abs(np.corrcoef(weight[0, 1:], weight[0, :-1])[0, 1]) < 0.01  # and rows

    names = np.random.default_rng(0).integers(0, 200_000, (3, 50))
    again = rows.bootstrap_weights(jnp.asarray(names))
    np.testing.assert_array_equal(again, np.take_along_axis(weight, names, axis=1))
    # Pinned: another release must not redraw what a run has begun with.
    np.testing.assert_array_equal(weight[0, :12], PINNED_WEIGHTS)


def test_a_member_learns_nothing_from_rows_that_its_resample_lacks() -> None:
    config = replace(SMALL, bootstrap=True)
    experience = data(300)
    model, index = beginner(config, experience), np.arange(192).reshape(3, 64)
    batch = batch_of(experience, index)
    absent = rows.bootstrap_weights(batch.step) == 0
    assert 0.2 < float(absent.mean(dtype=jnp.float32)) < 0.5
    spoiled = batch._replace(next_obs=jnp.where(absent[..., None], 99.0, batch.next_obs))
    assert same(FIT_STEP(model, batch, config)[0].net, FIT_STEP(model, spoiled, config)[0].net)
    wrong = batch._replace(next_obs=jnp.where(absent[..., None], batch.next_obs, 99.0))
    assert not same(FIT_STEP(model, batch, config)[0].net, FIT_STEP(model, wrong, config)[0].net)


def test_a_row_that_is_twice_in_the_resample_counts_twice() -> None:
    config = replace(SMALL, bootstrap=True)
    experience = data(300)
    model, index = beginner(config, experience), np.arange(192).reshape(3, 64)
    batch = batch_of(experience, index)
    weight = np.asarray(rows.bootstrap_weights(batch.step))
    predicted = dynamics.predict(model, batch.obs, batch.action).mean
    error = np.asarray(jnp.mean((predicted - model.change.scale(batch.next_obs - batch.obs)) ** 2, axis=-1))
    by_hand = np.mean([(w * e).sum() / w.sum() for w, e in zip(weight, error, strict=True)])
    np.testing.assert_allclose(FIT_STEP(model, batch, config)[1]["model/loss"], by_hand, rtol=1e-5)


@pytest.mark.parametrize(("chunk", "share"), [(100, 0.2), (1, 0.2), (7, 0.5)])
def test_neighbours_in_time_are_held_out_together(chunk: int, share: float) -> None:
    config = DynamicsConfig(holdout_share=share, holdout_chunk_steps=chunk)
    mask = np.asarray(rows.held_out(jnp.arange(140_000), config))
    assert abs(mask.mean() - share) < 0.03
    assert (mask.reshape(-1, chunk) == mask[::chunk, None]).all()
    assert not mask[:chunk].any()  # a first fit has rows, however long the chunks
    some = np.random.default_rng(0).integers(0, 140_000, (4, 5))
    np.testing.assert_array_equal(rows.held_out(jnp.asarray(some), config), mask[some])


HELD = replace(SMALL, learning_rate=1e-2, holdout_share=0.3, holdout_chunk_steps=10)
JUDGED = replace(HELD, patience=3, check_every=20, elites=2)


def test_held_out_rows_never_reach_the_nets() -> None:
    experience = data(300)
    model, mask = beginner(HELD, experience), rows.held_out(experience.step, HELD)
    spoiled = experience._replace(next_obs=jnp.where(mask[:, None], 99.0, experience.next_obs))
    a, told = fit(model, experience, jnp.int32(30), jax.random.key(1), HELD)
    b, alarmed = fit(model, spoiled, jnp.int32(30), jax.random.key(1), HELD)
    assert same(a.nets, b.nets)
    assert alarmed["model/holdout"] > 100 * told["model/holdout"]
    assert told["model/fits"] == 30


def test_a_minibatch_is_full_of_rows_that_may_be_fitted() -> None:
    drawn = jax.jit(partial(fitting._minibatch, sampler(data(5000)), HELD))(jax.random.key(0))
    assert drawn.reward.shape == (3, 64)
    assert not rows.held_out(drawn.step, HELD).any()
    judges = jax.jit(partial(fitting._judges, sampler(data(5000)), HELD))(jax.random.key(0))
    assert judges.counts.all()
    assert judges.counts.shape == (fitting.JUDGED_ROWS,)


def test_the_held_out_error_by_hand() -> None:
    experience = data(50)
    model, counts = beginner(SMALL, experience), jnp.arange(50) < 20
    predicted = PREDICT(model, experience.obs, experience.action).mean
    error = (predicted - model.change.scale(experience.next_obs - experience.obs)[None]) ** 2
    np.testing.assert_allclose(ERROR(model, experience, counts), error[:, :20].mean(axis=(1, 2)), rtol=1e-5)
    assert jnp.isnan(ERROR(model, experience, jnp.zeros(50, bool))).all()


# --- Early stopping ---


def test_a_fit_stops_when_held_out_rows_say_so_and_every_member_goes_back_to_its_best() -> None:
    """Against the rule in plain loops, along a fit to pure noise that is not stopped."""
    experience = data(300)
    rng = np.random.default_rng(4)
    experience = experience._replace(next_obs=jnp.asarray(rng.normal(size=(300, 2)), jnp.float32))
    start, most = beginner(JUDGED, experience), 2000
    open_end = replace(start, elites=None)

    judges = fitting._judges(sampler(experience), JUDGED, jax.random.split(jax.random.key(1))[0])
    best, best_net, in_vain, fits = np.full(3, np.inf), [None] * 3, 0, 0
    while in_vain < 3 and fits < most:
        fits += 20
        now, _ = fit(open_end, experience, jnp.int32(fits), jax.random.key(1), HELD)
        score = np.asarray(ERROR(now, *judges))
        improved = score < 0.99 * best
        for m in np.flatnonzero(improved):
            best[m], best_net[m] = score[m], jax.tree.map(lambda x, m=m: x[m], now.net)
        in_vain = 0 if improved.any() else in_vain + 1
    assert 60 < fits < most

    found, metrics = fit(start, experience, jnp.int32(most), jax.random.key(1), JUDGED)
    assert metrics["model/fits"] == fits
    for m in range(3):
        mine = jax.tree.map(lambda x, m=m: x[m], found.net)
        for a, b in zip(jax.tree.leaves(mine), jax.tree.leaves(best_net[m]), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(ERROR(found, *judges), best, rtol=1e-4)
    np.testing.assert_array_equal(found.elites, np.argsort(best)[:2])
    assert int(optax.tree.get(found.opt_state, "count")) == fits  # Adam goes on from where it was


def test_nothing_stops_while_nothing_is_held_out() -> None:
    experience, names = data(300, 1.0), jnp.arange(1000)
    early = names[jnp.logical_not(rows.held_out(names, JUDGED))][:300]
    experience = experience._replace(step=early)
    start = beginner(JUDGED, experience)
    found, metrics = fit(start, experience, jnp.int32(600), jax.random.key(1), JUDGED)
    assert metrics["model/fits"] == 600
    assert jnp.isnan(metrics["model/holdout"])
    np.testing.assert_array_equal(found.elites, [0, 1])
    assert not same(found.net, start.net)


def test_a_block_that_owes_no_fit_leaves_the_model_alone_and_says_nothing() -> None:
    experience = data(300)
    start = beginner(JUDGED, experience)
    found, metrics = fit(start, experience, jnp.int32(0), jax.random.key(1), JUDGED)
    assert same(found, start)
    assert all(bool(jnp.isnan(m)) for m in metrics.values())


# --- Elites ---


def drifting(changes: list[float], config: DynamicsConfig, known: Known = KNOWN) -> Dynamics:
    """Member m moves both coordinates by `changes[m]`, whatever it is shown; its scales are 1."""
    model = INIT(config, known, 2, 1, jax.random.key(0))
    last = model.net.layers[-1]
    bias = jnp.broadcast_to(jnp.array(changes)[:, None], last.bias.shape)
    return eqx.tree_at(
        lambda m: (m.net.layers[-1].weight, m.net.layers[-1].bias), model, (jnp.zeros_like(last.weight), bias)
    )


def test_the_best_members_on_held_out_rows_serve_imagined_steps() -> None:
    config = replace(JUDGED, stay_in_data=False)
    still = data(300)
    still = still._replace(next_obs=still.obs)  # to predict no change is right
    model = drifting([0.5, 8.0, -0.1], config)
    unranked = STEP(model, KNOWN, config, jnp.zeros((8, 2)), jnp.zeros((8, 1)), jax.random.key(0))[0]
    assert set(np.round(np.asarray(unranked).ravel(), 3)) == {0.5, 8.0}  # until a first fit: the first two
    ranked, _ = fit(model, still, jnp.int32(1), jax.random.key(1), JUDGED)
    np.testing.assert_array_equal(ranked.elites, [2, 0])
    moved = STEP(ranked, KNOWN, config, jnp.zeros((8, 2)), jnp.zeros((8, 1)), jax.random.key(0))[0]
    np.testing.assert_allclose(np.sort(np.asarray(moved[:, 0])), [-0.1] * 4 + [0.5] * 4, atol=0.15)


def test_a_member_that_has_diverged_is_no_elite() -> None:
    model = drifting([float("nan"), 0.5, 0.0], JUDGED)
    ranked, _ = fit(model, data(300), jnp.int32(1), jax.random.key(1), JUDGED)
    np.testing.assert_array_equal(np.sort(ranked.elites), [1, 2])


def test_an_estimator_that_keeps_members_apart_hears_all_of_them_without_noise() -> None:
    config = replace(HELD, elites=1, noise="homoscedastic", sample="state", stay_in_data=False)
    model = drifting([1.0, 2.0, 3.0], config)
    next_obs, reward, _ = jax.jit(dynamics.member_step, static_argnums=(1, 2))(
        model, KNOWN, config, jnp.zeros((3, 4, 2)), jnp.zeros((3, 4, 1))
    )
    np.testing.assert_allclose(next_obs, np.broadcast_to([[[1.0]], [[2.0]], [[3.0]]], (3, 4, 2)))
    assert reward.shape == (1, 3, 4)


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


# --- In training ---

EVERYTHING = (
    *("noise=heteroscedastic", "sample=state_and_reward", "trajectory=tsinf", "layer_norm=true"),
    *("bootstrap=true", "holdout_share=0.3", "holdout_chunk_steps=10", "patience=2", "check_every=5"),
    *("members=3", "elites=2", "interval_steps=50", "fits_per_refit=20", "initial_fits=20"),
)


def test_a_run_with_all_of_it_compiles_once_and_logs_the_last_fit_in_every_record(tmp_path: Path) -> None:
    settings = [*TINY, *(f"dynamics.{setting}" for setting in EVERYTHING)]
    train.learn.clear_cache()
    learner = Learner(Slide(), run_dir=tmp_path / "run", settings=settings, quiet=True).learn(220)
    assert train.learn._cache_size() == 1
    model = learner._state.model
    assert model is not None
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(model.nets))
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    records = [r for r in map(json.loads, lines) if "train/critic_loss" in r]
    assert len(records) == 8  # of which fits were made in 80, 120, 160 and 220
    for record in records:
        assert 5 <= record["model/fits"] <= 20
        assert np.isfinite([record["model/loss"], record["model/holdout"]]).all()
    assert len({record["model/loss"] for record in records}) == 4
    again = Learner.load(tmp_path / "run", Slide())
    assert same(again._state.model, model)


# --- When fits are due, and settings that contradict each other ---


def due(settings: list[str], steps: list[int]) -> list[int]:
    built = configuration.build("Pendulum-v1", "mve-sac", settings)
    return [schedule.fits_due(built, step) for step in steps]


def test_refits_come_at_multiples_of_the_interval_after_a_first_burst() -> None:
    refits = ["dynamics.interval_steps=250", "dynamics.fits_per_refit=60", "dynamics.initial_fits=400"]
    assert due(refits, [0, 1000, 1001, 1249, 1250, 1499, 1500, 3000]) == [0, 0, 400, 400, 460, 460, 520, 880]
    assert due([], [0, 1000, 1001, 1020, 2000]) == [0, 0, 1000, 1010, 1500]  # steadily, as ever


def test_an_agent_may_not_imagine_before_the_first_refit() -> None:
    settings = ["dynamics.interval_steps=250", "dynamics.initial_fits=0", "train.total_steps=5000"]
    built = configuration.build("Pendulum-v1", "mve-sac", settings)
    with pytest.raises(UserError, match=r"first fitted at step 1250.*set dynamics\.initial_fits"):
        schedule.check(built, uses_model=True)
    schedule.check(built, uses_model=False)
    later = configuration.build("Pendulum-v1", "mve-sac", [*settings, "dynamics.learning_starts=750"])
    schedule.check(later, uses_model=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["dynamics.elites=3"], "dynamics.elites = 3 is judged on held-out rows; set dynamics.holdout_share"),
        (["dynamics.patience=5"], "dynamics.patience = 5 is judged on held-out rows"),
        (["dynamics.elites=6", "dynamics.holdout_share=0.2"], "elites = 6 is more than dynamics.members = 5"),
        (["dynamics.sample=state"], "dynamics.sample = state needs a model of the noise"),
        (["dynamics.holdout_share=1"], "dynamics.holdout_share = 1 leaves no row to fit"),
        (["dynamics.noise=gaussian"], "it has to be one of none, homoscedastic, heteroscedastic"),
    ],
)
def test_settings_that_contradict_each_other_are_refused_in_one_line(
    settings: list[str], message: str
) -> None:
    with pytest.raises(UserError) as error:
        configuration.build("Pendulum-v1", "mve-sac", settings)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
