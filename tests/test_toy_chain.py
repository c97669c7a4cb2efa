"""A chain on which expansion can only win with a true model, and only lose with a wrong one it believes.

After the toy of Buckman et al. 2018 (section 4.1): 100 states in a row, -1 a step and +100 for the last one,
gamma = 1, so that V(s) = s + 1; ensembles of 8 tables and 8 models, H = 5. A noisy model teleports one step
in ten. Tables start at random; an update moves one random state of each table to its target. Judged is the
squared error of the tables' mean.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mve import imagine, targets
from mve.targets import TargetsConfig
from mve.types import EstimatorFns, Transition

STATES, ENSEMBLE, HORIZON = 100, 8, 5
VALUE = np.arange(1.0, STATES + 1.0, dtype=np.float32)
TELEPORTS = 0.1


class Method(NamedTuple):
    estimator: str
    noisy: bool = False


Q, MVE_ORACLE, MVE_NOISY = Method("one_step"), Method("mve"), Method("mve", noisy=True)
STEVE_ORACLE, STEVE_NOISY = Method("steve"), Method("steve", noisy=True)


def chain_step(
    noisy: bool, obs: jax.Array, action: jax.Array, key: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """To the right; the end is state 100, whose table entry stays 0. A teleport never ends anything."""
    del action
    next_obs = jnp.minimum(obs + 1.0, STATES)
    if noisy:
        whether_key, where_key = jax.random.split(key)
        teleported = jax.random.bernoulli(whether_key, TELEPORTS, obs.shape)
        anywhere = jax.random.randint(where_key, obs.shape, 0, STATES).astype(obs.dtype)
        next_obs = jnp.where(teleported, anywhere, next_obs)
    ended = (next_obs == STATES)[..., 0]
    return next_obs, jnp.where(ended, 100.0, -1.0), 1.0 - ended.astype(jnp.float32)


def update(method: Method, table: jax.Array, key: jax.Array) -> jax.Array:
    """One random state of each table takes its estimated target for a value."""
    sample_key, imagine_key = jax.random.split(key)
    state = jax.random.randint(sample_key, (ENSEMBLE,), 0, STATES)
    obs, action = state[:, None].astype(jnp.float32), jnp.zeros((ENSEMBLE, 1))
    next_obs, reward, continuation = chain_step(False, obs, action, key=None)  # pyright: ignore
    batch = Transition(
        obs, action, reward, next_obs, continuation, episode=state, step=state, log_density=reward
    )

    config = TargetsConfig(estimator=method.estimator, horizon_steps=HORIZON, discount=1.0)  # pyright: ignore
    start = jnp.broadcast_to(next_obs, (ENSEMBLE, *next_obs.shape)) if config.keeps_members else next_obs
    imagined = imagine.rollout(
        partial(chain_step, method.noisy),
        lambda obs, _: (jnp.zeros_like(obs), jnp.zeros(obs.shape[:-1])),
        start,
        config.imagined_steps,
        imagine_key,
    )
    if config.keeps_members:  # the reward is known: one reward model
        imagined = imagined._replace(reward=imagined.reward[:, None])

    def value_fn(obs: jax.Array) -> jax.Array:
        value = table[:, obs[..., 0].astype(jnp.int32)]
        return value if config.keeps_members else jnp.mean(value, axis=0, keepdims=True)

    rows = targets.estimate(batch, imagined, EstimatorFns(value_fn), config)
    return table.at[jnp.arange(ENSEMBLE), state].set(rows.value)


@partial(jax.jit, static_argnames=("method", "num_updates"))
def value_errors(method: Method, seeds: jax.Array, num_updates: int) -> jax.Array:
    """Mean squared error of the values (seeds, thousands of updates), the start first."""

    def of_seed(seed: jax.Array) -> jax.Array:
        table_key, update_key = jax.random.split(jax.random.key(seed))
        table = jax.random.uniform(table_key, (ENSEMBLE, STATES), maxval=STATES)
        table = jnp.concatenate([table, jnp.zeros((ENSEMBLE, 1))], axis=1)

        def one(table: jax.Array, i: jax.Array) -> tuple[jax.Array, None]:
            return update(method, table, jax.random.fold_in(update_key, i)), None

        def thousand(table: jax.Array, numbers: jax.Array) -> tuple[jax.Array, jax.Array]:
            table, _ = jax.lax.scan(one, table, numbers)
            return table, error(table)

        numbers = jnp.arange(num_updates).reshape(-1, 1000)
        return jnp.concatenate([error(table)[None], jax.lax.scan(thousand, table, numbers)[1]])

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
