"""A chain on which expansion can only win with a true model, and only lose with a wrong one it believes.

After the toy of Buckman et al. 2018 (section 4.1): 100 states in a row, -1 a step and +100 for the last one,
gamma = 1, so that V(s) = s + 1; ensembles of 8 tables and 8 models, H = 5. A noisy model teleports one step
in ten. Tables start at random; an update moves one random state of each table to its target. Judged is the
squared error of the tables' mean.

A shared model takes one wrong step, from SLIP to far ahead, and all its members agree on it.
"""

from __future__ import annotations

from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mve import imagine, targets
from mve.targets import Calibration, TargetsConfig, calibration
from mve.targets.calibration import squared_error
from mve.types import EstimatorFns, Transition

STATES, ENSEMBLE, HORIZON = 100, 8, 5
VALUE = np.arange(1.0, STATES + 1.0, dtype=np.float32)
TELEPORTS = 0.1
SLIP, SLIPS_TO = 30.0, 80.0
REPLAYED = 10  # real steps in the block on which the model is judged before every update


class Method(NamedTuple):
    estimator: str
    model: Literal["true", "noisy", "slips"] = "true"


Q, MVE_ORACLE, MVE_NOISY = Method("one_step"), Method("mve"), Method("mve", "noisy")
STEVE_ORACLE, STEVE_NOISY = Method("steve"), Method("steve", "noisy")
STEVE_SLIPS, CALIBRATED_SLIPS = Method("steve", "slips"), Method("calibrated", "slips")


def chain_step(
    model: str, obs: jax.Array, action: jax.Array, key: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """To the right; the end is state 100, whose table entry stays 0. A teleport never ends anything."""
    del action
    next_obs = jnp.minimum(obs + 1.0, STATES)
    if model == "slips":
        next_obs = jnp.where(obs == SLIP, SLIPS_TO, next_obs)
    if model == "noisy":
        whether_key, where_key = jax.random.split(key)
        teleported = jax.random.bernoulli(whether_key, TELEPORTS, obs.shape)
        anywhere = jax.random.randint(where_key, obs.shape, 0, STATES).astype(obs.dtype)
        next_obs = jnp.where(teleported, anywhere, next_obs)
    ended = (next_obs == STATES)[..., 0]
    return next_obs, jnp.where(ended, 100.0, -1.0), 1.0 - ended.astype(jnp.float32)


def member_step(
    model: str, obs: jax.Array, action: jax.Array, key: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The same where members are kept apart: the reward is known, so there is one reward model."""
    next_obs, reward, continuation = chain_step(model, obs, action, key)
    return next_obs, reward[None], continuation


def ask(method: Method, table: jax.Array, known: Calibration) -> EstimatorFns:
    """Where members are kept apart, every table is a critic; elsewhere their mean is.

    To the calibrated estimator they are moved so that their least is their mean: with 8 critics and
    gamma = 1, pessimism would cost another bit at each of 100 steps, and hide what is tested here.
    """

    def value(obs: jax.Array) -> jax.Array:
        of_table = table[:, obs[..., 0].astype(jnp.int32)]
        mean = jnp.mean(of_table, axis=0, keepdims=True)
        if method.estimator != "calibrated":
            return of_table if method.estimator == "steve" else mean
        return of_table + jnp.broadcast_to(mean - jnp.min(of_table, axis=0, keepdims=True), of_table.shape)

    return EstimatorFns(value, lambda obs, action: value(obs), None, partial(squared_error, known))


def measured(method: Method, table: jax.Array, known: Calibration, key: jax.Array) -> Calibration:
    """The model judged on some real steps in a row, from anywhere."""
    place_key, model_key = jax.random.split(key)
    first = jax.random.randint(place_key, (), 0, STATES - REPLAYED + 1)
    obs = (first + jnp.arange(REPLAYED)).astype(jnp.float32)[:, None]
    block, num_rows = real_steps(obs), jnp.int32(REPLAYED)
    step_fn, config = partial(member_step, method.model), settings(method)
    seen = calibration.replay(
        step_fn, ask(method, table, known), block, num_rows, ENSEMBLE, config, model_key
    )
    return calibration.observe(known, seen, config.calibration_decay)


def real_steps(obs: jax.Array) -> Transition:
    action, same = jnp.zeros_like(obs), jnp.zeros(len(obs), jnp.int32)
    next_obs, reward, continuation = chain_step("true", obs, action, key=None)  # pyright: ignore
    return Transition(obs, action, reward, next_obs, continuation, same, same, jnp.zeros_like(reward))


def settings(method: Method) -> TargetsConfig:
    return TargetsConfig(estimator=method.estimator, horizon_steps=HORIZON, discount=1.0)  # pyright: ignore


State = tuple[jax.Array, Calibration]


def update(method: Method, state: State, key: jax.Array) -> State:
    """One random state of each table takes its estimated target for a value."""
    sample_key, imagine_key, measure_key = jax.random.split(key, 3)
    table, known = state
    place = jax.random.randint(sample_key, (ENSEMBLE,), 0, STATES)
    batch, config = real_steps(place[:, None].astype(jnp.float32)), settings(method)
    if config.calibrates:
        known = measured(method, table, known, measure_key)
    start = batch.next_obs
    if config.keeps_members:
        start = jnp.broadcast_to(start, (ENSEMBLE, *start.shape))
    imagined = imagine.rollout(
        partial(member_step if config.keeps_members else chain_step, method.model),
        lambda obs, _: (jnp.zeros_like(obs), jnp.zeros(obs.shape[:-1])),
        start,
        config.imagined_steps,
        imagine_key,
    )
    rows = targets.estimate(batch, imagined, ask(method, table, known), config)
    return table.at[jnp.arange(ENSEMBLE), place].set(rows.value), known


@partial(jax.jit, static_argnames=("method", "num_updates"))
def value_errors(method: Method, seeds: jax.Array, num_updates: int) -> jax.Array:
    """Mean squared error of the values (seeds, thousands of updates), the start first."""

    def of_seed(seed: jax.Array) -> jax.Array:
        table_key, update_key = jax.random.split(jax.random.key(seed))
        table = jax.random.uniform(table_key, (ENSEMBLE, STATES), maxval=STATES)
        table = jnp.concatenate([table, jnp.zeros((ENSEMBLE, 1))], axis=1)

        def one(state: State, i: jax.Array) -> tuple[State, None]:
            return update(method, state, jax.random.fold_in(update_key, i)), None

        def thousand(state: State, numbers: jax.Array) -> tuple[State, jax.Array]:
            state, _ = jax.lax.scan(one, state, numbers)
            return state, error(state[0])

        start = table, calibration.init(HORIZON)
        numbers = jnp.arange(num_updates).reshape(-1, 1000)
        return jnp.concatenate([error(table)[None], jax.lax.scan(thousand, start, numbers)[1]])

    def error(table: jax.Array) -> jax.Array:
        return jnp.mean(jnp.square(jnp.mean(table[:, :-1], axis=0) - VALUE))

    return jax.vmap(of_seed)(seeds)


def assert_ordering(seeds: jax.Array) -> None:
    """After 10 000 updates, in every seed: STEVE with the noisy model is done, Q is on the way, and MVE is
    worse than at its start."""
    q, mve, steve = (np.asarray(value_errors(m, seeds, 10_000)) for m in (Q, MVE_NOISY, STEVE_NOISY))
    np.testing.assert_array_less(steve[:, -1], 1.0)
    np.testing.assert_array_less(1.0, q[:, -1])
    np.testing.assert_array_less(q[:, -1], 0.2 * q[:, 0])
    np.testing.assert_array_less(mve[:, 0], mve[:, -1])


@pytest.mark.slow
def test_with_a_noisy_model_steve_learns_the_chain_and_mve_unlearns_it() -> None:
    assert_ordering(jnp.arange(2))


@pytest.mark.slow
def test_the_ordering_holds_in_each_of_ten_seeds() -> None:
    assert_ordering(jnp.arange(10))


@pytest.mark.slow
@pytest.mark.parametrize("method", [MVE_ORACLE, STEVE_ORACLE])
def test_with_a_true_model_expansion_beats_waiting_for_the_value_to_come_back(method: Method) -> None:
    seeds = jnp.arange(10)
    expanded, q = (np.asarray(value_errors(m, seeds, 5_000)) for m in (method, Q))
    np.testing.assert_array_less(expanded[:, -1], 1.0)
    np.testing.assert_array_less(100.0, q[:, -1])


def test_where_all_members_share_one_wrong_step_the_calibrated_horizon_beats_steve() -> None:
    """Members that agree leave STEVE nothing to doubt: after 10 000 updates its error is 373 and 348 in two
    seeds (about 900 at the start; MVE: 600). Measured on real steps, the same model's errors are seen: the
    calibrated horizon's is 0.0 in both, where one-step learning without the model is still at 25."""
    steve, calibrated = (
        np.asarray(value_errors(m, jnp.arange(2), 10_000))[:, -1] for m in (STEVE_SLIPS, CALIBRATED_SLIPS)
    )
    np.testing.assert_array_less(calibrated, 1.0)
    np.testing.assert_array_less(100.0, steve)
