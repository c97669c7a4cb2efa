"""Terminations learned as limits of single coordinates, checked by hand and on real falls."""

from __future__ import annotations

from dataclasses import replace

import equinox as eqx
import gymnasium as gym
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mve import diagnose, dynamics
from mve.dynamics.ensemble import terminated
from mve.dynamics.limits import ENDS, Limits
from mve.dynamics.settings import DynamicsConfig
from mve.envs.known import known_functions
from mve.types import Known, Transition

OBSERVE = jax.jit(Limits.observe)
LEARNED = Known(lambda s, a, n: s[..., 0], None)


def rows(obs: list, next_obs: list, ended: list) -> Transition:
    size = len(ended)
    return Transition(
        obs=jnp.array(obs, jnp.float32),
        action=jnp.zeros((size, 1)),
        reward=jnp.zeros(size),
        next_obs=jnp.array(next_obs, jnp.float32),
        continuation=1.0 - jnp.array(ended, jnp.float32),
        episode=jnp.zeros(size, jnp.int32),
        step=jnp.arange(size),
        log_density=jnp.zeros(size),
    )


def limits_of(*blocks: Transition) -> Limits:
    found = Limits.empty(blocks[0].obs.shape[-1])
    for block in blocks:
        found = OBSERVE(found, block, jnp.int32(len(block.reward)))
    return found


# Survived: first coordinate -1 to 1, second 0 to 4. Three ends, all of them above 1 in the first.
FALLS = rows(
    obs=[[0, 0], [1, 2], [-1, 3], [0, 1], [1, 1], [0.5, 2]],
    next_obs=[[1, 2], [-1, 3], [0, 4], [1.5, 5], [2, 1], [3, 6]],
    ended=[0, 0, 0, 1, 1, 1],
)


def test_a_limit_lies_half_way_between_what_was_survived_and_the_nearest_end() -> None:
    """By hand: 1 was survived, 1.5 not. The second coordinate, beyond 4 in two ends of three, is left."""
    found = limits_of(FALLS)
    np.testing.assert_allclose(found.upper, [1.25, np.inf])
    np.testing.assert_allclose(found.lower, [-np.inf, -np.inf])
    assert int(found.unexplained) == 0
    assert float(found.explained) == 1.0
    states = jnp.array([[1.2, 9.0], [1.3, 0.0], [-50.0, -50.0]])
    np.testing.assert_array_equal(found.passed(states), [False, True, False])


def test_what_one_limit_leaves_another_explains() -> None:
    low = rows(obs=[[0, 0]], next_obs=[[0, -2]], ended=[1])
    found = limits_of(FALLS, low)
    np.testing.assert_allclose(found.upper, [1.25, np.inf])
    np.testing.assert_allclose(found.lower, [-np.inf, -1.0])
    assert bool(found.hold)


def test_a_state_survived_beyond_a_limit_moves_it_and_can_refute_it() -> None:
    further = rows(obs=[[0, 0]], next_obs=[[1.75, 4]], ended=[0])
    found = limits_of(FALLS, further)  # 1.5 is explained by the second coordinate alone now, 2 by the first
    np.testing.assert_allclose(found.upper, [1.875, 4.5])
    refuted = limits_of(FALLS, rows(obs=[[0, 0]], next_obs=[[4, 7]], ended=[0]))
    assert int(refuted.unexplained) == 3
    assert not bool(refuted.hold)
    assert not np.isfinite(refuted.upper).any()


def test_blocks_of_any_size_lead_to_the_same_limits_and_padding_counts_for_nothing() -> None:
    one_by_one = limits_of(*(jax.tree.map(lambda x, i=i: x[i : i + 1], FALLS) for i in range(6)))
    padded = jax.tree.map(lambda x: jnp.concatenate([x, 100 + x]), FALLS)
    padded = OBSERVE(Limits.empty(2), padded._replace(continuation=padded.continuation % 2), jnp.int32(6))
    for other in (one_by_one, padded):
        for a, b in zip(jax.tree.leaves(limits_of(FALLS)), jax.tree.leaves(other), strict=True):
            np.testing.assert_array_equal(a, b)


def test_only_the_latest_ends_are_to_be_explained() -> None:
    old = limits_of(rows(obs=[[0.0]], next_obs=[[-5.0]], ended=[1]))
    assert float(old.lower[0]) == -2.5
    newer = rows(obs=[[0.0]] * ENDS, next_obs=[[2.0]] * ENDS, ended=[1] * ENDS)
    found = OBSERVE(old, newer, jnp.int32(ENDS))
    assert int(found.count) == ENDS + 1
    assert not np.isfinite(found.lower).any()
    np.testing.assert_allclose(found.upper, [1.0])


def test_before_the_first_end_nothing_ends() -> None:
    found = limits_of(rows(obs=[[0.0]], next_obs=[[1.0]], ended=[0]))
    assert bool(found.hold)
    assert not np.asarray(found.passed(jnp.array([[1e9], [-1e9]]))).any()


@pytest.mark.parametrize(("limits", "inside"), [(True, 1), (True, 3), (False, 3)])
def test_the_net_is_asked_where_limits_do_not_explain_the_ends(limits: bool, inside: int) -> None:
    """Of 40 ends 1 or 3 lie among what was survived: 2.5 % unexplained are taken for chance, 7.5 % are not.
    The net says by its bias that everything ends."""
    config = DynamicsConfig(hidden=(4,), members=1, limits=limits)
    model = dynamics.init(config, LEARNED, 1, 1, jax.random.key(0))
    ends = [[0.5]] * inside + [[2.0]] * (40 - inside)
    block = rows(obs=[[0.0]] * 40 + [[1.0]], next_obs=[*ends, [0.0]], ended=[1] * 40 + [0])
    model = dynamics.observe(model, block, jnp.int32(41), config)
    model = eqx.tree_at(lambda m: m.termination_net.layers[-1].bias, model, jnp.array([99.0]))
    states = jnp.array([[0.0], [1.4], [1.6]])
    told = terminated(model, states, jnp.zeros((3, 1)), states)
    by_limits = limits and inside == 1
    np.testing.assert_array_equal(told, [not by_limits, not by_limits, True])


def test_known_terminations_and_settings_without_limits_keep_none() -> None:
    known = Known(lambda s, a, n: s[..., 0], lambda s, a, n: s[..., 0] > 9)
    config = DynamicsConfig(hidden=(4,), members=1)
    assert dynamics.init(config, known, 1, 1, jax.random.key(0)).limits is None
    blind = replace(config, limits=False)
    assert dynamics.init(blind, LEARNED, 1, 1, jax.random.key(0)).limits is None


@pytest.mark.parametrize("task", ["Hopper-v5", "Walker2d-v5", "InvertedPendulum-v5"])
def test_limits_of_a_thousand_random_steps_are_those_of_the_task(task: str) -> None:
    """Judged by the known function on the next thousand: every end but one found, one other taken for one."""
    env = gym.make(task)
    termination = known_functions(env).termination
    assert termination is not None
    env.action_space.seed(0)
    steps, (obs, _) = [], env.reset(seed=0)
    for _ in range(2000):
        next_obs, _, ended, cut, _ = env.step(env.action_space.sample())
        steps.append((obs, next_obs, ended))
        obs = env.reset()[0] if ended or cut else next_obs
    env.close()
    found = limits_of(rows(*(list(part) for part in zip(*steps[:1000], strict=True))))
    later = rows(*(list(part) for part in zip(*steps[1000:], strict=True)))
    truth = np.asarray(termination(later.obs, later.action, later.next_obs))
    told = np.asarray(found.passed(later.next_obs))
    assert truth.sum() > 20
    assert (told & truth).sum() >= truth.sum() - 1
    assert (told & ~truth).sum() <= 1


def test_a_diagnosis_says_what_ends_an_episode() -> None:
    low = rows(obs=[[0, 0]], next_obs=[[0, -2]], ended=[1])
    facts = diagnose._terminations(limits_of(FALLS, low))
    assert facts == {"by": "limits", "limits": [[0, ">", 1.25], [1, "<", -1.0]], "explained": 1.0, "ends": 4}
    said = diagnose._about_terminations(facts)
    assert said.endswith("s[0] > 1.25 or s[1] < -1: explain all 4 ends")
    unlike = rows(obs=[[0, 0]] * 4, next_obs=[[0, 1]] * 4, ended=[1] * 4)
    facts = diagnose._terminations(limits_of(FALLS, low, unlike))
    assert (facts["by"], facts["explained"]) == ("net", 0.5)
    assert diagnose._about_terminations(facts).endswith("explain 50 % of 8 ends, so a net is asked")
    assert "none" in diagnose._about_terminations(diagnose._terminations(Limits.empty(2)))
