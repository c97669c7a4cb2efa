"""Retrace: targets worked by hand, the formula of the paper against the recursion, and where traces end.

An action stands for its own probability: log pi(a|s) = log a. Each state is a number, and the value
functions are V(s) = 16 + s and Q(s, a) = 10 + s by the lesser of two critics. gamma is 1/2.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mve import targets
from mve.targets import TargetsConfig
from mve.types import CriticTargets, EstimatorFns, Segment, Transition

GAMMA = 0.5


def value(obs: jax.Array) -> jax.Array:
    return jnp.stack([16.0 + obs[..., 0], 20.0 + obs[..., 0]])


def action_value(obs: jax.Array, action: jax.Array) -> jax.Array:
    del action
    return jnp.stack([12.0 + obs[..., 0], 10.0 + obs[..., 0]])


def log_density(obs: jax.Array, action: jax.Array) -> jax.Array:
    del obs
    return jnp.log(action[..., 0])


ASK = EstimatorFns(value, action_value, log_density)


def steps(
    reward: np.ndarray, policy: np.ndarray, behaviour: np.ndarray, continuation: np.ndarray
) -> Transition:
    """H+1 steps (H+1, B) through the states 0, 1, 2, ..."""
    state = np.broadcast_to(np.arange(len(reward))[:, None], reward.shape)
    return Transition(
        *(jnp.asarray(x, jnp.float32) for x in (state[..., None], policy[..., None], reward)),
        next_obs=jnp.asarray(state[..., None] + 1, jnp.float32),
        continuation=jnp.asarray(continuation, jnp.float32),
        episode=jnp.zeros(reward.shape, jnp.int32),
        step=jnp.asarray(state, jnp.int32),
        log_density=jnp.asarray(np.log(behaviour), jnp.float32),
    )


def estimate(rows: Transition, valid: np.ndarray, decay: float, ask: EstimatorFns = ASK) -> CriticTargets:
    batch, rest = (jax.tree.map(lambda x, part=part: x[part], rows) for part in (0, slice(1, None)))
    config = TargetsConfig(estimator="retrace", horizon_steps=len(valid), discount=GAMMA, trace_decay=decay)
    return targets.estimate(batch, Segment(rest, jnp.asarray(valid)), ask, config)


def by_hand(
    decay: float = 1.0,
    continuation: tuple[float, float, float] = (1, 1, 1),
    valid: tuple[bool, bool] = (True, True),
    policy: tuple[float, float, float] = (1.0, 0.5, 0.9),
    behaviour: tuple[float, float, float] = (1.0, 1.0, 0.3),
) -> CriticTargets:
    """Rewards 1, 4, 6; the policy would have acted half as often, then three times as often."""
    columns = (np.array(x)[:, None] for x in ((1.0, 4.0, 6.0), policy, behaviour, continuation))
    return estimate(steps(*columns), np.array(valid)[:, None], decay)


@pytest.mark.parametrize(
    ("settings", "target", "weight"),
    [
        # V = 17, 18, 19 and Q = 11, 12: delta_1 = 4 + 9 - 11 = 2, delta_2 = 6 + 9.5 - 12 = 3.5.
        # Traces 1/2 and min(1, 3) = 1: y = 1 + 8.5 + (1/4) 2 + (1/8) 3.5.
        ({}, 10.4375, [0.5, 0.0, 0.5]),
        # Traces 1/4 and 1/2: y = 9.5 + (1/8) 2 + (1/32) 3.5.
        ({"decay": 0.5}, 9.859375, [0.75, 0.125, 0.125]),
        # Terminated at the second step: delta_1 = 4 - 11, and nothing follows.
        ({"continuation": (1, 0, 1), "valid": (True, False)}, 7.75, [0.5, 0.5, 0.0]),
        ({"continuation": (0, 1, 1), "valid": (False, False)}, 1.0, [1.0, 0.0, 0.0]),
        # A time limit, or the newest row: the bootstrap stays where the segment ends.
        ({"valid": (True, False)}, 10.0, [0.5, 0.5, 0.0]),
        ({"valid": (False, False)}, 9.5, [1.0, 0.0, 0.0]),
        # A policy that never acts so, whatever the behaviour's density.
        ({"policy": (1.0, 0.0, 0.9)}, 9.5, [1.0, 0.0, 0.0]),
        ({"policy": (1.0, 0.0, 0.0), "behaviour": (1.0, 0.0, 0.0)}, 9.5, [1.0, 0.0, 0.0]),
        # Twice as often, then never: 9.5 + (1/2) 2.
        ({"policy": (1.0, 1.0, 0.0), "behaviour": (1.0, 0.5, 0.5)}, 10.5, [0.0, 1.0, 0.0]),
    ],
    ids=[
        "mixed",
        "decayed",
        "ends at 1",
        "ends at 0",
        "cut at 1",
        "cut at 0",
        "never",
        "nobody",
        "then never",
    ],
)
@pytest.mark.filterwarnings("ignore:divide by zero")
def test_targets_of_three_steps_by_hand(settings: dict, target: float, weight: list[float]) -> None:
    rows = by_hand(**settings)
    np.testing.assert_allclose(rows.value, [target])
    np.testing.assert_allclose(rows.horizon_weight, weight)


def random_case(seed: int, horizon: int = 4, rows: int = 5) -> tuple[Transition, np.ndarray]:
    rng = np.random.default_rng(seed)
    shape = (horizon + 1, rows)
    reward, policy, behaviour = rng.normal(size=shape), rng.uniform(0.1, 1, shape), rng.uniform(0.1, 1, shape)
    valid = np.cumprod(rng.random((horizon, rows)) < 0.85, axis=0).astype(bool)
    return steps(reward, policy, behaviour, rng.random(shape) < 0.8), valid


def naive(rows: Transition, valid: np.ndarray, decay: float) -> list[float]:
    """The sum of Munos et al.'s equation 4, one product at a time."""
    r, c = np.asarray(rows.reward, np.float64), np.asarray(rows.continuation, np.float64)
    policy, behaviour = np.asarray(rows.action)[..., 0], np.exp(np.asarray(rows.log_density))
    out = []
    for b in range(r.shape[1]):
        total = r[0, b] + GAMMA * c[0, b] * (16.0 + 1)
        for t in range(1, len(r)):
            weight = 1.0
            for i in range(1, t + 1):
                trace = decay * min(1.0, policy[i, b] / behaviour[i, b]) * valid[i - 1, b]
                weight *= GAMMA * c[i - 1, b] * trace
            total += weight * (r[t, b] + GAMMA * c[t, b] * (16.0 + t + 1) - (10.0 + t))
        out.append(total)
    return out


@pytest.mark.parametrize("seed", range(10))
def test_the_recursion_agrees_with_the_papers_sum_on_random_draws(seed: int) -> None:
    rows, valid = random_case(seed)
    np.testing.assert_allclose(estimate(rows, valid, seed / 9).value, naive(rows, valid, seed / 9), rtol=1e-4)


def test_on_the_policys_own_steps_with_lambda_one_it_is_the_n_step_return() -> None:
    rows, _ = random_case(1)
    rows = rows._replace(log_density=jnp.log(rows.action[..., 0]))
    # V(s_t) has to be Q(s_t, a_t) for the values on the way to cancel.
    ask = EstimatorFns(value, lambda obs, action: value(obs), log_density)
    got = estimate(rows, np.ones((4, 5), bool), 1.0, ask)
    n_step = targets.returns_to_go(rows.reward, GAMMA * rows.continuation, jnp.full(5, 16.0 + 5))[0]
    np.testing.assert_allclose(got.value, n_step, rtol=1e-5)
    np.testing.assert_allclose(got.horizon_weight, [0, 0, 0, 0, 1], atol=1e-6)


@pytest.mark.parametrize(("decay", "valid"), [(0.0, True), (1.0, False)])
def test_without_traces_or_followers_it_is_one_step(decay: float, valid: bool) -> None:
    rows, _ = random_case(2)
    got = estimate(rows, np.full((4, 5), valid), decay)
    np.testing.assert_allclose(got.value, rows.reward[0] + GAMMA * rows.continuation[0] * 17.0, rtol=1e-6)
    np.testing.assert_allclose(got.horizon_weight, [1, 0, 0, 0, 0])


def test_a_horizon_of_zero_is_one_step() -> None:
    rows, _ = random_case(3, horizon=0)
    got = estimate(rows, np.ones((0, 5), bool), 1.0)
    np.testing.assert_allclose(got.value, rows.reward[0] + GAMMA * rows.continuation[0] * 17.0, rtol=1e-6)
    np.testing.assert_allclose(got.horizon_weight, [1.0])


@pytest.mark.parametrize("end", ["terminated", "another episode"])
def test_nothing_after_an_end_matters(end: str) -> None:
    rows, _ = random_case(4)
    valid = np.ones((4, 5), bool)
    if end == "terminated":
        rows = rows._replace(continuation=rows.continuation.at[1].set(0.0))
    else:
        valid[1:] = False
    wild = rows._replace(
        reward=rows.reward.at[2:].set(1e6),
        obs=rows.obs.at[2:].set(1e6),
        next_obs=rows.next_obs.at[2:].set(1e6),
        action=rows.action.at[2:].set(0.9),
    )
    np.testing.assert_array_equal(estimate(rows, valid, 1.0).value, estimate(wild, valid, 1.0).value)


def test_weights_over_horizons_sum_to_one() -> None:
    for seed in range(5):
        weight = np.asarray(estimate(*random_case(seed), 0.9).horizon_weight)
        assert (weight >= -1e-6).all()
        np.testing.assert_allclose(weight.sum(), 1.0, rtol=1e-6)
