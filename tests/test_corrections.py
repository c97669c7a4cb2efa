"""Imagined steps beside real ones: what a model errs by there is added to them (Fröhlich et al. 2022)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mve import dynamics, experience, replay, schedule
from mve.agents.ddpg import DDPGConfig
from mve.agents.sac import SACConfig
from mve.config import build
from mve.dynamics import Dynamics, DynamicsConfig
from mve.imagine import ImaginationConfig
from mve.state import Capacity, Recipe, TrainState, initial_state
from mve.targets import TargetsConfig
from mve.types import Beside, Known, Transition, UserError

OBS, ACTION, CAPACITY, LENGTH = 2, 1, 16, 3
BRANCH = jax.jit(experience.branch, static_argnums=1)


def world(obs: np.ndarray) -> np.ndarray:
    """The next state, whatever the action."""
    return 0.8 * obs[..., ::-1] + np.float32([0.3, -0.1])


def real_rows(count: int, first_of_second: int) -> Transition:
    """Two episodes of the world, numbered from 1."""
    rng, f32 = np.random.default_rng(0), np.float32
    obs = np.zeros((count, OBS), f32)
    for i in range(count):
        begins = i in (0, first_of_second)
        obs[i] = rng.normal(size=OBS) if begins else world(obs[i - 1])
    return Transition(
        obs=jnp.asarray(obs),
        action=jnp.asarray(rng.uniform(-1, 1, (count, ACTION)).astype(f32)),
        reward=jnp.asarray(obs.sum(axis=1)),
        next_obs=jnp.asarray(world(obs)),
        continuation=jnp.ones(count),
        episode=jnp.asarray((np.arange(count) >= first_of_second).astype(np.int32)),
        step=1 + jnp.arange(count),
        log_density=jnp.zeros(count),
    )


def recipe(corrections: bool = True, *, agent: Any = None, **targets: Any) -> Recipe:
    """A model of noisy members that has never been fitted, and a buffer of its rollouts."""
    return Recipe(
        obs_size=OBS,
        action_size=ACTION,
        known=Known(None, lambda s, a, n: n[..., 0] > 100),
        agent=agent or DDPGConfig(hidden=(8,), batch_size=8),
        dynamics=DynamicsConfig(
            hidden=(8,),
            members=2,
            noise="homoscedastic",
            sample="state",
            stay_in_data=False,
            on_policy_corrections=corrections,
        ),
        targets=TargetsConfig(**targets),
        imagination=ImaginationConfig(
            starts=12, length=(LENGTH, LENGTH), rounds_kept=1, real_share=0.5, first_step="imagined"
        ),
    )


def deaf(model: Dynamics) -> Dynamics:
    """The same model, to which actions make no difference."""
    weight = model.net.layers[0].weight
    return eqx.tree_at(lambda m: m.net.layers[0].weight, model, weight.at[:, OBS:].set(0.0))


def state_of(ours: Recipe, rows: Transition) -> TrainState:
    state, count = initial_state(ours, Capacity(CAPACITY, ours.imagination.capacity), seed=0), len(rows.step)
    assert state.model is not None
    model = dynamics.observe(deaf(state.model), rows, jnp.int32(count), ours.dynamics)
    return replace(state, replay=replay.add(state.replay, rows, jnp.ones(count, bool)), model=model)


# --- Rows by their numbers ---


def test_rows_are_found_by_number_and_episode_as_long_as_the_ring_has_them() -> None:
    memory = replay.init(6, OBS, ACTION)
    rows = real_rows(10, 7)  # steps 1-7 and 8-10, of which 5-10 are still there, 5 in place 4
    for part in (slice(0, 4), slice(4, 10)):
        lot = jax.tree.map(lambda x, part=part: x[part], rows)
        memory = replay.add(memory, lot, jnp.ones(len(lot.step), bool))
    asked = [(4, 0), (5, 0), (7, 0), (8, 0), (8, 1), (10, 1), (11, 1), (0, 0), (-3, 0)]
    step, episode = map(jnp.asarray, zip(*asked, strict=True))
    found, there = replay.at_steps(memory, step, episode)
    np.testing.assert_array_equal(there, [False, True, True, False, True, True, False, False, False])
    chosen = np.asarray(step)[np.asarray(there)] - 1
    np.testing.assert_array_equal(np.asarray(found.obs)[np.asarray(there)], np.asarray(rows.obs)[chosen])


def test_an_empty_ring_has_no_row_of_any_number() -> None:
    zero = jnp.zeros(1, jnp.int32)
    assert not replay.at_steps(replay.init(6, OBS, ACTION), zero, zero)[1]


# --- One step ---


def moved(model: Dynamics, ours: Recipe, obs: Any, action: Any, beside: Beside | None) -> Any:
    return dynamics.step(model, ours.known, ours.dynamics, obs, action, jax.random.key(0), beside)


def test_the_real_action_in_the_real_state_has_the_real_outcome_and_another_what_the_model_says_of_it() -> (
    None
):
    """By hand, f being the change in a member's opinion and f_r its reward: s + f(s, a) + (s'_real - s_real)
    - f(s_real, a_real), and f_r(s, a) + r_real - f_r(s_real, a_real)."""
    ours, rows = recipe(), real_rows(6, 6)
    model = initial_state(ours, Capacity(CAPACITY, 0), seed=0).model
    assert model is not None
    model = dynamics.observe(model, rows, jnp.int32(6), ours.dynamics)
    alone = dynamics.only(model, jnp.array([1]))
    real = Beside(rows, jnp.ones(6, bool))

    next_obs, reward, _ = moved(alone, ours, rows.obs, rows.action, real)
    np.testing.assert_allclose(next_obs, rows.next_obs, atol=1e-5)
    np.testing.assert_allclose(reward, rows.reward, atol=1e-5)

    def f(obs: Any, action: Any) -> Any:
        return alone.change.unscale(dynamics.predict(alone, obs, action, shared=True).mean)[0]

    obs, action = rows.obs + 0.2, -rows.action
    missing = jnp.concatenate([rows.next_obs - rows.obs, rows.reward[:, None]], -1) - f(rows.obs, rows.action)
    by_hand = f(obs, action) + missing
    next_obs, reward, _ = moved(alone, ours, obs, action, real)
    np.testing.assert_allclose(next_obs, obs + by_hand[:, :OBS], atol=1e-5)
    np.testing.assert_allclose(reward, by_hand[:, OBS], atol=1e-5)


def test_where_nothing_real_runs_beside_a_step_it_is_as_it_would_be_without() -> None:
    ours, rows = recipe(), real_rows(6, 6)
    model = state_of(ours, rows).model
    assert model is not None
    there = jnp.array([True, False] * 3)
    some, none = (
        moved(model, ours, rows.obs + 0.2, rows.action, beside) for beside in (Beside(rows, there), None)
    )
    for a, b in zip(some, none, strict=True):
        np.testing.assert_array_equal(a[~there], b[~there])
    assert not np.any(np.isclose(some[0][there], none[0][there]))


# --- Rollouts ---


def test_a_branch_repeats_what_really_followed_and_leaves_it_where_the_episode_ended() -> None:
    """Actions make no difference to world and model, so that every policy acts as the real one did."""
    rows = real_rows(14, 8)
    for corrections in (True, False):
        ours = recipe(corrections)
        buffer, _ = BRANCH(state_of(ours, rows), ours, jax.random.key(1))
        kept = jax.tree.map(lambda x, size=int(buffer.size): np.asarray(x)[:size], buffer.rows)
        assert len(kept.step) == 12 * LENGTH
        last = np.where(kept.episode == 0, 8, 14)
        within = kept.step <= last
        assert 0 < within.sum() < len(within)
        real = jax.tree.map(lambda x, at=kept.step[within] - 1: np.asarray(x)[at], rows)
        repeats = np.isclose(kept.next_obs[within], real.next_obs, atol=1e-5).all(axis=-1)
        assert repeats.all() == corrections
        if corrections:
            np.testing.assert_allclose(kept.reward[within], real.reward, atol=1e-5)
        assert not np.isclose(kept.next_obs[~within], world(kept.obs[~within]), atol=1e-3).all(axis=-1).any()


@pytest.mark.parametrize("n_step", [1, 3])
def test_targets_are_made_of_what_really_followed_the_real_rows(n_step: int) -> None:
    ours, rows = recipe(estimator="mve", horizon_steps=2, n_step=n_step), real_rows(14, 8)
    state = state_of(ours, rows)
    batch = experience.real_batch(state, ours, 8, jax.random.key(2))
    ahead = experience.imagine_ahead(state, ours, batch, jax.random.key(3))
    last = np.where(np.asarray(batch.episode) == 0, 8, 14)
    step = np.asarray(batch.step)  # of the last of the steps that were summed
    np.testing.assert_array_equal(batch.next_obs, np.asarray(rows.next_obs)[step - 1])
    for k in range(2):
        within = step + 1 + k <= last
        assert within.any()
        np.testing.assert_allclose(
            np.asarray(ahead.obs[k + 1])[within], np.asarray(rows.next_obs)[(step + k)[within]], atol=1e-5
        )
    assert not np.allclose(ahead.obs[-1], world(np.asarray(ahead.obs[-2])), atol=1e-3)


def test_a_shared_rollout_goes_on_beside_the_steps_that_followed_real_rows_and_imagined_ones() -> None:
    agent = SACConfig(hidden=(8,), batch_size=8, model_steps=LENGTH)
    ours = recipe(agent=agent, estimator="mve", horizon_steps=LENGTH - 1, n_step=2, n_step_drawn=True)
    assert ours.shares_rollout
    rows = real_rows(14, 8)
    state = state_of(ours, rows)
    state = replace(state, imagined=BRANCH(state, ours, jax.random.key(1))[0])
    shared = experience.imagine_once(state, ours, jax.random.key(2))
    obs = np.asarray(shared.whole.obs)
    # Whatever is in the data is the world's, and so is what follows it, one step at least of every episode.
    following = np.isclose(obs[1:], world(obs[:-1]), atol=1e-4).all(axis=-1)
    known = np.isclose(obs[:1, :, None], np.asarray(rows.obs)[None, None], atol=1e-4).all(-1).any(-1)[0]
    assert known[:4].any()
    assert known[4:].any()
    np.testing.assert_array_equal(following[0], known)
    assert following[1:].any()


def test_corrections_are_refused_where_they_would_reach_a_part_of_what_is_imagined() -> None:
    asked = ["dynamics.on_policy_corrections=true"]
    for algo, settings, message in (
        ("steve", [], "targets.estimator = steve asks how far they do not"),
        ("calibrated-sac", [], "make the members agree"),
        ("sac-svg", [], "agent.model_steps = 2 here has rollouts of the actor's own"),
        ("mve-svg", ["imagination.first_step=stored"], "rollouts of the actor's own"),
    ):
        with pytest.raises(UserError, match=message):
            schedule.check(budgeted(algo, [*asked, *settings]), fits_model=True)
    for algo in ("mve-svg", "dhmbpo", "mve-sac", "mbpo", "mve-dqn"):
        schedule.check(budgeted(algo, asked), fits_model=True)


def budgeted(algo: str, settings: list[str]) -> Any:
    task = "CartPole-v1" if algo == "mve-dqn" else "Hopper-v4"
    return schedule.with_budgets(build(task, algo, [*settings, "train.total_steps=9000"]), 1000)
