"""Which rows the members are fitted to, when a fit stops, and who is an elite afterwards."""

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
from test_probabilistic import (
    HELD,
    JUDGED,
    KNOWN,
    PREDICT,
    SMALL,
    STEP,
    beginner,
    data,
    drifting,
    fit,
    sampler,
)

from mve import Learner, dynamics, schedule, train
from mve import config as configuration
from mve.dynamics import DynamicsConfig, fitting, rows
from mve.types import Transition, UserError

FIT_STEP = jax.jit(dynamics.fit_step, static_argnums=2)
ERROR = jax.jit(dynamics.held_out_error)
PINNED_WEIGHTS = [0, 1, 1, 1, 1, 0, 1, 0, 1, 1, 1, 0]  # of member 0 for the rows 0..11


def batch_of(experience: Transition, index: np.ndarray) -> Transition:
    return jax.tree.map(lambda x: x[index], experience)


def same(a: Any, b: Any) -> bool:
    return bool(eqx.tree_equal(a, b))


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
    member_step = jax.jit(dynamics.member_step, static_argnums=(1, 2), static_argnames="crossed")
    next_obs, reward, _ = member_step(
        model, KNOWN, config, jnp.zeros((3, 4, 2)), jnp.zeros((3, 4, 1)), crossed=True
    )
    np.testing.assert_allclose(next_obs, np.broadcast_to([[[1.0]], [[2.0]], [[3.0]]], (3, 4, 2)))
    assert reward.shape == (1, 3, 4)


# --- In training ---

EVERYTHING = (
    *("noise=heteroscedastic", "sample=state_and_reward", "trajectory=tsinf", "layer_norm=true"),
    *("bootstrap=true", "holdout_share=0.3", "holdout_chunk_steps=10", "patience=2", "check_every=5"),
    *("members=3", "elites=2", "interval_steps=50", "fits_per_refit=20", "initial_fits=20"),
)


@pytest.mark.slow
def test_a_run_with_all_of_it_compiles_once_and_logs_the_last_fit_in_every_record(tmp_path: Path) -> None:
    settings = [*TINY, "train.overlap=false", *(f"dynamics.{setting}" for setting in EVERYTHING)]
    train.learn.clear_cache()
    learner = Learner(Slide(), "mve-sac", run_dir=tmp_path / "run", settings=settings, quiet=True).learn(220)
    assert train.learn._cache_size() == 1
    model = learner.state.model
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
    assert same(again.state.model, model)


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
        schedule.check(built, fits_model=True)
    schedule.check(built, fits_model=False)
    later = configuration.build("Pendulum-v1", "mve-sac", [*settings, "dynamics.learning_starts=750"])
    schedule.check(later, fits_model=True)


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
