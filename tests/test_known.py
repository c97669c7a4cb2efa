"""The known functions against the environments themselves, transition by transition.

Tolerances are for float32, which is what the agent has; each is two to ten times the largest error seen in
10,000 transitions. A forward reward divides a difference of two rounded positions by dt: 5 m, rounded by
2.4e-7 at worst, twice, over HalfCheetah's 0.05 s makes 1e-5, and 1.5 m over Hopper's 0.008 s the same.

Terminations have to agree on every transition. Rounding could turn only one that is within 1e-7 of its
threshold; the seeds are fixed, and none is.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import cache
from types import MappingProxyType
from typing import Any, NamedTuple

import gymnasium as gym
import jax
import jax.numpy as jnp
import mujoco
import numpy as np
import pytest
from gymnasium.envs.mujoco import pusher_v4
from gymnasium.envs.mujoco.half_cheetah_v5 import HalfCheetahEnv
from gymnasium.spaces import Box

from mve.envs.known import known_functions
from mve.types import Known

WITH_POSITIONS = {"exclude_current_positions_from_observation": False}


@pytest.fixture(autouse=True)
def _surroundings(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.chdir(tmp_path)  # MuJoCo writes its log into the current folder
    # Pusher-v4 refuses mujoco >= 3 because the physics changed. Its reward, all that we compare, did not.
    monkeypatch.setattr(pusher_v4.mujoco, "__version__", "2.3.7")


class Case(NamedTuple):
    """An environment, and how far float32 may take the known reward from the one it paid."""

    id: str
    kwargs: Mapping[str, Any] = MappingProxyType({})
    tolerance: float | None = 1e-5  # None: the reward is not known
    ends: bool = False
    lag: float = 0.0  # bound on what lagging body positions add, see `lag_in_reward`

    def __str__(self) -> str:
        return "-".join([self.id, *(f"{name}={value}" for name, value in self.kwargs.items())])


def both_versions(name: str, *rest: Any, **named: Any) -> list[Case]:
    return [Case(f"{name}-v{version}", *rest, **named) for version in (4, 5)]


CASES = [
    # θ² comes near π² = 10, and a float32 angle is good to 2e-7.
    Case("Pendulum-v1", tolerance=1e-5),
    Case("CartPole-v1", tolerance=0.0, ends=True),  # counts, all three
    Case("Acrobot-v1", tolerance=0.0, ends=True),
    Case("MountainCar-v0", tolerance=0.0, ends=True),
    *both_versions("InvertedPendulum", tolerance=0.0, ends=True),  # a count
    # The tip lags behind qpos by up to 1e-4 m, which turned no ending of 4,000, and (y - 2)² doubles that.
    *both_versions("InvertedDoublePendulum", tolerance=1e-3, ends=True),
    *both_versions("Reacher", tolerance=2e-6),
    *both_versions("Pusher", tolerance=4e-6),
    *both_versions("HalfCheetah", tolerance=None),
    *both_versions("HalfCheetah", WITH_POSITIONS, tolerance=3e-5),
    *both_versions("Swimmer", tolerance=None),
    *both_versions("Swimmer", WITH_POSITIONS, tolerance=1e-5),
    *both_versions("Hopper", tolerance=None, ends=True),
    *both_versions("Hopper", WITH_POSITIONS, tolerance=3e-5, ends=True),
    *both_versions("Walker2d", tolerance=None, ends=True),
    *both_versions("Walker2d", WITH_POSITIONS, tolerance=3e-5, ends=True),
    *both_versions("Ant", tolerance=None, ends=True),
    # The torso lags by a third-order term in the 0.01 s step, times accelerations of hundreds at impacts.
    *both_versions("Ant", WITH_POSITIONS, tolerance=2e-5, ends=True, lag=0.2),
    Case("Ant-v4", WITH_POSITIONS | {"use_contact_forces": True}, tolerance=2e-5, ends=True, lag=0.2),
    *both_versions("Humanoid", tolerance=None, ends=True),
    # A sum over 13 bodies, each at the end of a chain of products, over a dt of 0.015 s.
    *both_versions("Humanoid", WITH_POSITIONS, tolerance=4e-5, ends=True, lag=0.02),
]
every_case = pytest.mark.parametrize("case", CASES, ids=str)


class Played(NamedTuple):
    """Transitions as an agent sees them, in float32, and what the environment said in float64."""

    obs: np.ndarray
    action: np.ndarray
    next_obs: np.ndarray
    reward: np.ndarray
    terminated: np.ndarray
    lag: np.ndarray  # the part of the reward that comes from lagging body positions

    def known(self, function: Callable[..., jax.Array]) -> np.ndarray:
        with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
            return np.asarray(jax.jit(function)(self.obs, self.action, self.next_obs))


def make(case_id: str, **kwargs: Any) -> gym.Env:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # that v4 is old
        return gym.make(case_id, **kwargs)


def torso_x(model: Any, data: Any) -> float:
    return data.body("torso").xpos[0]


def centre_of_mass_x(model: Any, data: Any) -> float:
    return model.body_mass @ data.xipos[:, 0] / model.body_mass.sum()


def lag_in_reward(env: Any, measure: Callable[[Any, Any], float]) -> Callable[[], float]:
    """Asked after each step (and reset): w (Δx as the environment saw it - Δx of its qpos) / dt."""
    scratch, last = mujoco.MjData(env.model), 0.0

    def lag() -> float:
        nonlocal last
        scratch.qpos[:] = env.data.qpos
        mujoco.mj_kinematics(env.model, scratch)
        before, last = last, measure(env.model, env.data) - measure(env.model, scratch)
        return getattr(env, "_forward_reward_weight", 1.0) * (last - before) / env.dt

    return lag


SWING = {
    "CartPole-v1": lambda obs: np.int64(obs[2] > 0),
    "Acrobot-v1": lambda obs: 2 * np.int64(obs[4] < 0),
    "MountainCar-v0": lambda obs: 2 * np.int64(obs[1] > 0),
}


@cache
def play(case_id: str, n: int, seed: int = 0, **kwargs: Any) -> Played:
    """Actions of a random strength, up to 1.5 times what is allowed, held for a random while.

    Where actions are a choice: one that swings up, and every third time any.
    """
    env, rng = make(case_id, **kwargs), np.random.default_rng(seed)
    measure = {"Ant": torso_x, "Humanoid": centre_of_mass_x}.get(case_id.split("-")[0])
    lag = lag_in_reward(env.unwrapped, measure) if measure else lambda: 0.0
    rows, fresh, action = [], True, np.zeros(0)
    while len(rows) < n:
        if fresh:
            obs, _ = env.reset(seed=int(rng.integers(2**31)))
            lag()
        if fresh or rng.random() < 0.02:
            strength, hold = rng.uniform(0.1, 1.5), rng.choice([1, 1, 3, 10])
        if fresh or rng.random() < 1 / hold:
            if isinstance(env.action_space, Box):
                low, high = env.action_space.low, env.action_space.high
                action = (strength * rng.uniform(low, high)).astype(np.float32)
            else:
                action = rng.integers(env.action_space.n) if rng.random() < 1 / 3 else SWING[case_id](obs)
        next_obs, reward, terminated, truncated, _ = env.step(action)
        rows.append((obs.astype(np.float32), action, next_obs.astype(np.float32), reward, terminated, lag()))
        obs, fresh = next_obs, terminated or truncated
    env.close()
    return Played(*(np.array(column) for column in zip(*rows, strict=True)))


def play_case(case: Case, n: int) -> Played:
    return play(case.id, n, **case.kwargs)


def check_reward(case: Case, n: int) -> None:
    known = known_functions(make(case.id, **case.kwargs))
    if case.tolerance is None:
        assert known.reward is None
        return
    assert known.reward is not None
    played = play_case(case, n)
    reward = played.known(known.reward)
    compared = np.ones(n, bool)
    if "DoublePendulum" in case.id:  # where a velocity is clipped, its penalty is understated
        compared = np.all(np.abs(played.next_obs[:, 6:8]) < 10, axis=1)
        assert np.mean(compared) > 0.99
    error = np.abs(reward - (played.reward - played.lag))[compared]
    assert np.max(error) <= case.tolerance
    assert np.max(np.abs(played.lag)) <= case.lag


def check_termination(case: Case, n: int) -> None:
    known = known_functions(make(case.id, **case.kwargs))
    assert known.termination is not None
    played = play_case(case, n)
    assert np.any(played.terminated) == case.ends
    np.testing.assert_array_equal(played.known(known.termination), played.terminated)


@every_case
def test_known_reward_is_what_the_environment_pays(case: Case) -> None:
    check_reward(case, 1_000)


@every_case
def test_known_termination_is_when_the_environment_ends(case: Case) -> None:
    check_termination(case, 1_000)


@pytest.mark.slow
@every_case
def test_known_functions_hold_over_ten_thousand_transitions(case: Case) -> None:
    check_reward(case, 10_000)
    check_termination(case, 10_000)


# Keyword arguments that change an equation; ranges and weights are far from the defaults so that ignoring
# one would show. None for the tolerance: as in CASES, the reward has to be learned.
HEALTH = {"healthy_reward": 3.0, "terminate_when_unhealthy": False}
WEIGHTS = {"forward_reward_weight": 2.5, "ctrl_cost_weight": 0.7}
VARIANTS = [
    *both_versions("HalfCheetah", WITH_POSITIONS | WEIGHTS, tolerance=5e-5),
    *both_versions("Swimmer", WITH_POSITIONS | WEIGHTS, tolerance=5e-5),
    *both_versions("Hopper", WITH_POSITIONS | WEIGHTS | HEALTH, tolerance=8e-5),
    *both_versions("Walker2d", WITH_POSITIONS | WEIGHTS | HEALTH, tolerance=8e-5),
    *both_versions("Hopper", {"healthy_z_range": (1.2, 1.3)}, tolerance=None, ends=True),
    *both_versions("Hopper", {"healthy_angle_range": (-0.02, 0.05)}, tolerance=None, ends=True),
    *both_versions("Hopper", {"healthy_state_range": (-2.0, 2.0)}, tolerance=None, ends=True),
    *both_versions("Walker2d", {"healthy_z_range": (1.2, 1.3)}, tolerance=None, ends=True),
    *both_versions("Walker2d", {"healthy_angle_range": (-0.1, 0.2)}, tolerance=None, ends=True),
    *both_versions("Ant", {"healthy_z_range": (0.5, 0.8)}, tolerance=None, ends=True),
    *both_versions("Ant", WITH_POSITIONS | HEALTH | {"healthy_z_range": (0.5, 0.8)}, tolerance=2e-5, lag=0.2),
    Case("Ant-v5", WITH_POSITIONS | WEIGHTS | {"contact_cost_weight": 0.1}, 5e-5, ends=True, lag=0.5),
    # Clipped to a range without 0, even the force on the world is paid for, which no observation shows.
    Case("Ant-v5", WITH_POSITIONS | {"contact_force_range": (0.5, 3.0)}, 2e-5, ends=True, lag=0.2),
    Case("Ant-v5", WITH_POSITIONS | {"include_cfrc_ext_in_observation": False}, None, ends=True),
    Case(
        "Ant-v5",
        WITH_POSITIONS | {"include_cfrc_ext_in_observation": False, "contact_cost_weight": 0.0},
        2e-5,
        ends=True,
        lag=0.2,
    ),
    *both_versions("Humanoid", {"healthy_z_range": (1.3, 1.45)}, tolerance=None, ends=True),
    *both_versions("Humanoid", WITH_POSITIONS | WEIGHTS | HEALTH, tolerance=1e-4, lag=0.05),
    Case("Humanoid-v5", WITH_POSITIONS | {"contact_cost_range": (0.1, 0.3)}, 4e-5, ends=True, lag=0.02),
    Case("Humanoid-v5", WITH_POSITIONS | {"include_cfrc_ext_in_observation": False}, None, ends=True),
    Case("InvertedDoublePendulum-v5", {"healthy_reward": 4.0}, 1e-3, ends=True),
    Case("Reacher-v5", {"reward_dist_weight": 3.0, "reward_control_weight": 0.2}),
    Case("Pusher-v5", {"reward_near_weight": 2.0, "reward_dist_weight": 3.0, "reward_control_weight": 0.5}),
    Case("Pendulum-v1", {"g": 5.0}, tolerance=1e-5),
    Case("CartPole-v1", {"sutton_barto_reward": True}, tolerance=0.0, ends=True),
    Case("MountainCar-v0", {"goal_velocity": 0.035}, tolerance=0.0, ends=True),
]


@pytest.mark.parametrize("case", VARIANTS, ids=str)
def test_keyword_arguments_of_the_environment_are_honoured(case: Case) -> None:
    check_reward(case, 300)
    check_termination(case, 300)


@pytest.mark.parametrize("version", [4, 5])
def test_hopper_that_leaves_a_healthy_range_is_paid_as_its_version_says(version: int) -> None:
    known = known_functions(make(f"Hopper-v{version}", **WITH_POSITIONS))
    assert known.reward is not None
    assert known.termination is not None
    standing, action = jnp.zeros(12).at[1].set(1.25), jnp.zeros(3)
    fallen = standing.at[1].set(0.5)
    assert known.reward(standing, action, standing) == 1
    assert known.reward(standing, action, fallen) == (1 if version == 4 else 0)
    assert known.termination(standing, action, fallen)


# Ranges that float32 represents exactly, so that a state can lie on the very threshold.
EXACT = {"healthy_z_range": (0.75, 1.5)}
PLANAR = EXACT | {"healthy_angle_range": (-0.25, 0.25)}
# Velocities are observed up to 10 only: Hopper's limits of ±100 would be out of sight.
WITHIN_SIGHT = PLANAR | {"healthy_state_range": (-9.5, 9.5)}
NARROW = EXACT | {"healthy_angle_range": (-8.0, 8.0), "healthy_state_range": (-0.5, 4.0)}


@pytest.mark.parametrize("exclude", [True, False])
@pytest.mark.parametrize(
    "case",
    [
        *both_versions("Hopper", WITHIN_SIGHT),
        *both_versions("Hopper", NARROW),
        *both_versions("Walker2d", PLANAR),
        *both_versions("Ant", EXACT),
        *both_versions("Humanoid", EXACT),
    ],
    ids=str,
)
def test_states_on_a_threshold_and_not_finite_are_judged_as_the_environment_does(
    case: Case, exclude: bool
) -> None:
    env = make(case.id, **case.kwargs, exclude_current_positions_from_observation=exclude)
    base: Any = env.unwrapped
    termination = known_functions(env).termination
    assert termination is not None
    env.reset(seed=0)
    rest = np.concatenate([base.init_qpos, base.init_qvel])
    rest[2 if case.id.startswith(("Ant", "Humanoid")) else 1] = 1.25  # a healthy height
    states, judged, observed = [], [], []
    for index in range(1, len(rest)):
        for value in (-9.0, -0.5, -0.25, 0.0, 0.25, 0.75, 1.5, 4.0, 9.0, np.nan, np.inf, -np.inf):
            states.append(rest.copy())
            states[-1][index] = value
    for state in states:  # written past the simulator, which would mend what is not finite
        base.data.qpos[:], base.data.qvel[:] = np.split(state, [base.model.nq])
        if exclude and not np.all(np.isfinite(state[:2])):
            continue  # y alone: no observation shows it
        judged.append(not base.is_healthy)
        observed.append(base._get_obs().astype(np.float32))
    next_obs, action = np.array(observed), np.zeros((len(observed), base.model.nu), np.float32)
    assert 0 < np.mean(judged) < 1
    np.testing.assert_array_equal(termination(next_obs, action, next_obs), judged)


def test_inverted_pendulum_that_is_not_a_number_counts_as_terminated() -> None:
    termination = known_functions(make("InvertedPendulum-v5")).termination
    assert termination is not None
    upright, action = jnp.zeros(4), jnp.zeros(1)
    assert not termination(upright, action, upright)
    assert termination(upright, action, upright.at[3].set(jnp.nan))


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.tolerance is not None and "v4" not in case.id], ids=str
)
def test_leading_axes_give_what_single_transitions_give(case: Case) -> None:
    known = known_functions(make(case.id, **case.kwargs))
    played = play_case(case, 1_000)
    rows = [column[:6] for column in (played.obs, played.action, played.next_obs)]
    blocks = [column.reshape(2, 3, *column.shape[1:]) for column in rows]
    for function, dtype in ((known.reward, jnp.float32), (known.termination, jnp.bool_)):
        assert function is not None
        block = jax.jit(function)(*blocks)
        assert block.shape == (2, 3)
        assert block.dtype == dtype
        single = jnp.stack([jax.jit(function)(*row) for row in zip(*rows, strict=True)])
        mapped = jax.jit(jax.vmap(function))(*blocks)
        np.testing.assert_allclose(block.reshape(6), single, atol=1e-4)
        np.testing.assert_allclose(mapped, block, atol=1e-4)


def test_harmless_wrappers_are_looked_through() -> None:
    env = gym.wrappers.Autoreset(gym.wrappers.RecordEpisodeStatistics(make("Pendulum-v1")))
    assert known_functions(env).reward is not None


@pytest.mark.parametrize(
    "wrap",
    [
        lambda env: gym.wrappers.TransformReward(env, lambda reward: 2 * reward),
        lambda env: gym.wrappers.RescaleAction(env, -1, 1),
        lambda env: gym.wrappers.TimeAwareObservation(env),
        lambda env: gym.wrappers.RecordEpisodeStatistics(gym.wrappers.ClipReward(env, -1, 1)),
    ],
)
def test_nothing_is_known_below_a_wrapper_that_may_alter_things(wrap: Callable[[gym.Env], gym.Env]) -> None:
    assert known_functions(wrap(make("Pendulum-v1"))) == Known(None, None)


def test_nothing_is_known_of_other_environments() -> None:
    assert known_functions(make("MountainCarContinuous-v0")) == Known(None, None)


def test_subclass_of_a_harmless_wrapper_is_not_taken_for_harmless() -> None:
    class Shortened(gym.wrappers.TimeLimit):
        pass

    assert known_functions(Shortened(make("Pendulum-v1"), 10)) == Known(None, None)


def test_subclass_of_a_known_environment_is_not_recognised() -> None:
    class Sideways(HalfCheetahEnv):
        pass

    assert known_functions(Sideways(**WITH_POSITIONS)) == Known(None, None)


def test_reacher_with_another_model_has_its_reward_learned(tmp_path: Any) -> None:
    stock = make("Reacher-v5").unwrapped.fullpath  # type: ignore[attr-defined]
    raised = tmp_path / "reacher.xml"
    with open(stock) as file:
        raised.write_text(
            file.read().replace('name="target" pos=".1 -.1 .01"', 'name="target" pos=".1 -.1 .05"')
        )
    known = known_functions(make("Reacher-v5", xml_file=str(raised)))
    assert known.reward is None
    assert known.termination is not None
