"""One compilation a run; the same seed repeats; two seeds differ; many seeds at once change nothing."""

from __future__ import annotations

import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mve import train
from mve.agents import Agent
from mve.agents.sac import SACConfig
from mve.dynamics import DynamicsConfig
from mve.state import Capacity, Recipe, TrainState, fresh_state, initial_state
from mve.targets import TargetsConfig
from mve.train import Due
from mve.types import Known, Transition

BLOCK = 10


def recipe() -> Recipe:
    return Recipe(
        obs_size=2,
        action_size=1,
        known=Known(),
        agent=SACConfig(hidden=(16,), batch_size=16),
        dynamics=DynamicsConfig(hidden=(16,), members=2, batch_size=16),
        targets=TargetsConfig(estimator="mve_tdk", horizon_steps=2),
    )


def block(number: int) -> Transition:
    rng = np.random.default_rng(number)
    obs = rng.normal(size=(BLOCK, 2)).astype(np.float32)
    return Transition(
        obs=obs,
        action=rng.uniform(-1, 1, (BLOCK, 1)).astype(np.float32),
        reward=obs[:, 0],
        next_obs=0.9 * obs,
        continuation=np.ones(BLOCK, np.float32),
        episode=np.zeros(BLOCK, np.int32),
        step=np.arange(BLOCK, dtype=np.int32),
        log_density=np.zeros(BLOCK, np.float32),
    )


def run(seed: int, blocks: int = 4) -> TrainState:
    state = initial_state(recipe(), capacity=Capacity(100), seed=seed)
    for i in range(blocks):
        rows, fits, updates = BLOCK - (i == blocks - 1), 3 * (i > 0), 2 * (i > 1)
        state, _ = train.learn(state, block(i), Due.of(rows=rows, fits=fits, updates=updates), recipe())
    return state


@pytest.fixture(scope="module")
def trained() -> TrainState:
    train.learn.clear_cache()
    return run(seed=0)


def test_learning_is_compiled_once_whatever_a_block_asks_for(trained: TrainState) -> None:
    run(seed=1, blocks=6)
    assert train.learn._cache_size() == 1


def test_the_same_seed_repeats_bit_for_bit(trained: TrainState) -> None:
    assert eqx.tree_equal(trained, run(seed=0))


def test_two_seeds_differ(trained: TrainState) -> None:
    other = run(seed=1)
    assert not eqx.tree_equal(trained.agent, other.agent)
    assert not eqx.tree_equal(trained.model, other.model)


@pytest.mark.slow
def test_a_larger_ring_changes_nothing_that_is_learned(trained: TrainState) -> None:
    state = initial_state(recipe(), capacity=Capacity(150), seed=0)
    for i in range(4):
        state, _ = train.learn(
            state, block(i), Due.of(rows=BLOCK - (i == 3), fits=3 * (i > 0), updates=2 * (i > 1)), recipe()
        )
    assert eqx.tree_equal(trained.agent, state.agent)


@pytest.mark.slow
def test_seeds_side_by_side_take_the_steps_that_each_takes_alone(trained: TrainState) -> None:
    """To rounding: a batched matrix product may sum in another order."""

    def update(state: TrainState, seed: jax.Array) -> Agent:
        return train.update_step(state, recipe(), jax.random.key(seed))[0]

    states, seeds = [trained, run(seed=1)], jnp.array([5, 6])
    together = jax.jit(jax.vmap(update))(jax.tree.map(lambda *x: jnp.stack(x), *states), seeds)
    alone = jax.jit(update)
    for i, state in enumerate(states):
        mine = jax.tree.map(lambda x, i=i: x[i], together)
        for a, b in zip(jax.tree.leaves(mine), jax.tree.leaves(alone(state, seeds[i])), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_every_matrix_product_is_asked_for_in_the_precision_around_it() -> None:
    """A GPU would else round the inputs of float32 products to ten bits of mantissa."""
    state, due = jax.eval_shape(lambda: fresh_state(recipe(), Capacity(100), 0)), Due.of(rows=BLOCK)
    asked = {}
    for precision in ("float32", "tensorfloat32"):
        with jax.default_matmul_precision(precision):
            lowered = train.learn.lower(state, block(0), due, recipe()).as_text()
        products = [line for line in lowered.splitlines() if "dot_general" in line]
        asked[precision] = {re.search(r"precision = \[(\w+), (\w+)\]", line) is not None for line in products}
        highest = [("[HIGHEST, HIGHEST]" in line) for line in products]
        assert products
        assert all(highest) if precision == "float32" else not any(highest)
    assert asked == {"float32": {True}, "tensorfloat32": {True}}
