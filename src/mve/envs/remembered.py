"""What the environments and wrappers of Gymnasium keep between steps, class by class.

Read from the sources of Gymnasium 1.4; an attribute that another version lacks is passed over. Classes are
compared by their full name: a subclass may keep more. What a class was made with is not listed, since the
environment restored is made the same way.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypeAlias

import gymnasium as gym
import numpy as np
from gymnasium import spaces

# Whether this layer can hold that value, so that a damaged snapshot is refused before anything is touched.
Check: TypeAlias = Callable[[Any, Any], bool]

# Those that draw from a generator of their own and from no other's.
SIMPLE_SPACES = (spaces.Box, spaces.Discrete, spaces.MultiBinary, spaces.MultiDiscrete, spaces.Text)

# Of MjData, where bodies were and what acted on them when forces were last evaluated, one substep behind the
# state: Ant, Humanoid and Reacher-v4 measure the next reward from xpos or xipos; observations show the rest.
BEHIND = (
    *("xpos", "xipos", "site_xpos", "cinert", "cvel", "cfrc_ext"),
    *("qfrc_actuator", "qfrc_constraint", "ten_length", "ten_velocity"),
)


def has_physics(layer: gym.Env[Any, Any]) -> bool:
    """Whether it is a MujocoEnv: told by names, for MuJoCo may not be installed."""
    return any(
        (base.__module__, base.__qualname__) == ("gymnasium.envs.mujoco.mujoco_env", "MujocoEnv")
        for base in type(layer).__mro__
    )


def mujoco_version() -> str:
    """Another one may lay out its state otherwise, and moves otherwise."""
    import mujoco

    return mujoco.__version__


def physics(env: Any) -> dict[str, np.ndarray]:
    """All that MuJoCo's next step depends on, the solver's warm start included, and what is a step behind."""
    import mujoco

    native: Any = mujoco  # its C functions are not in the type stubs
    which = native.mjtState.mjSTATE_INTEGRATION
    state = np.empty(native.mj_stateSize(env.model, which))
    native.mj_getState(env.model, env.data, state, which)
    return {"integration": state} | {name: getattr(env.data, name).copy() for name in BEHIND}


def set_physics(env: Any, values: dict[str, np.ndarray]) -> None:
    """Derived quantities that were not taken, such as a picture shows, are made anew from the state."""
    import mujoco

    native: Any = mujoco
    which = native.mjtState.mjSTATE_INTEGRATION
    native.mj_setState(env.model, env.data, values["integration"], which)
    native.mj_forward(env.model, env.data)
    # Again, for what mj_forward may do to it: with some versions of MuJoCo it moves the warm start.
    native.mj_setState(env.model, env.data, values["integration"], which)
    for name in BEHIND:
        getattr(env.data, name)[:] = values[name]


# Checks


def flag(_: Any, value: Any) -> bool:
    return isinstance(value, bool | np.bool_)


def real(_: Any, value: Any) -> bool:
    return isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)


def count(_: Any, value: Any) -> bool:
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    return value is None or (whole and bool(value >= 0))


def seed(_: Any, value: Any) -> bool:
    return count(_, value) or value == -1  # Gymnasium's word for an unknown one


def generator(_: Any, value: Any) -> bool:
    return value is None or isinstance(value, np.random.Generator)


def _of_shape(value: Any, shape: tuple[int, ...]) -> bool:
    array = np.asarray(value)
    return array.shape == shape and array.dtype.kind in "iuf"


def _vector(size: int) -> Check:
    """An array of so many numbers, or a tuple, as MountainCar's is after a step; None before the reset."""
    return lambda _, value: (
        value is None or (isinstance(value, np.ndarray | tuple) and _of_shape(value, (size,)))
    )


def _number_or_none(_: Any, value: Any) -> bool:
    return value is None or real(_, value)


def _numbers(_: Any, value: Any) -> bool:
    return isinstance(value, list) and all(real(_, number) for number in value)


def _moment(_: Any, value: Any) -> bool:
    return isinstance(value, np.ndarray | np.floating) and _of_shape(value, ())


def _obs(layer: Any, value: Any) -> bool:
    return isinstance(value, np.ndarray) and _of_shape(value, layer.env.observation_space.shape)


def _stack(layer: Any, value: Any) -> bool:
    return len(value) == layer.stack_size and all(_obs(layer, obs) for obs in value)


def _delayed(layer: Any, value: Any) -> bool:
    return len(value) <= layer.delay and all(_obs(layer, obs) for obs in value)


def _two_obs(layer: Any, value: Any) -> bool:
    return isinstance(value, np.ndarray) and _of_shape(value, (2, *layer.env.observation_space.shape))


def _action(layer: Any, value: Any) -> bool:
    return value is None or _of_shape(value, layer.action_space.shape)


# Attributes, by the full name of the class

GENERATOR: dict[str, Check] = {"_np_random": generator, "_np_random_seed": seed}  # of every environment

_CLASSIC, _MUJOCO = "gymnasium.envs.classic_control.", "gymnasium.envs.mujoco."
_WRAPPERS = "gymnasium.wrappers."

ATTRIBUTES: dict[str, dict[str, Check]] = {
    f"{_CLASSIC}cartpole:CartPoleEnv": {"state": _vector(4), "steps_beyond_terminated": count},
    f"{_CLASSIC}pendulum:PendulumEnv": {"state": _vector(2), "last_u": _number_or_none},
    f"{_CLASSIC}acrobot:AcrobotEnv": {"state": _vector(4)},
    f"{_CLASSIC}mountain_car:MountainCarEnv": {"state": _vector(2)},
    f"{_CLASSIC}continuous_mountain_car:Continuous_MountainCarEnv": {"state": _vector(2)},
    f"{_WRAPPERS}common:TimeLimit": {"_elapsed_steps": count},
    f"{_WRAPPERS}common:Autoreset": {"autoreset": flag},
    f"{_WRAPPERS}common:OrderEnforcing": {"_has_reset": flag},
    f"{_WRAPPERS}common:PassiveEnvChecker": {
        "checked_reset": flag,
        "checked_step": flag,
        "checked_render": flag,
    },
    f"{_WRAPPERS}common:RecordEpisodeStatistics": {
        "episode_count": count,
        "episode_returns": real,
        "episode_lengths": count,
        "time_queue": _numbers,
        "return_queue": _numbers,
        "length_queue": _numbers,
    },
    f"{_WRAPPERS}stateful_observation:TimeAwareObservation": {"timesteps": count},
    f"{_WRAPPERS}stateful_observation:DelayObservation": {"observation_queue": _delayed},
    f"{_WRAPPERS}stateful_observation:FrameStackObservation": {"obs_queue": _stack},
    f"{_WRAPPERS}stateful_observation:MaxAndSkipObservation": {"_obs_buffer": _two_obs},
    f"{_WRAPPERS}stateful_observation:NormalizeObservation": {
        "obs_rms.mean": _obs,
        "obs_rms.var": _obs,
        "obs_rms.count": real,
        "_update_running_mean": flag,
    },
    f"{_WRAPPERS}stateful_reward:NormalizeReward": {
        "return_rms.mean": _moment,
        "return_rms.var": _moment,
        "return_rms.count": real,
        "discounted_reward": _vector(1),
        "_update_running_mean": flag,
    },
    f"{_WRAPPERS}stateful_action:StickyAction": {
        "last_action": _action,
        "is_sticky_actions": flag,
        "num_repeats": count,
        "repeats_taken": count,
    },
}

for _file, _class in (
    ("ant", "AntEnv"),
    ("half_cheetah", "HalfCheetahEnv"),
    ("hopper", "HopperEnv"),
    ("humanoid", "HumanoidEnv"),
    ("humanoidstandup", "HumanoidStandupEnv"),
    ("inverted_double_pendulum", "InvertedDoublePendulumEnv"),
    ("inverted_pendulum", "InvertedPendulumEnv"),
    ("pusher", "PusherEnv"),
    ("reacher", "ReacherEnv"),
    ("swimmer", "SwimmerEnv"),
    ("walker2d", "Walker2dEnv"),
):
    _placed = {"pusher": ("goal_pos", "cylinder_pos"), "reacher": ("goal",)}.get(_file, ())
    for _version in ("v4", "v5"):
        ATTRIBUTES[f"{_MUJOCO}{_file}_{_version}:{_class}"] = {name: _vector(2) for name in _placed}

# Those that keep nothing. Not TransformAction, ...Observation and ...Reward: a user's function may.
for _file, _classes in (
    ("stateful_action", "RepeatAction"),
    ("transform_action", "ClipAction RescaleAction DiscretizeAction"),
    (
        "transform_observation",
        "FilterObservation FlattenObservation ReshapeObservation RescaleObservation DtypeObservation "
        "DiscretizeObservation GrayscaleObservation ResizeObservation",
    ),
    ("transform_reward", "ClipReward"),
):
    ATTRIBUTES |= {f"{_WRAPPERS}{_file}:{_class}": {} for _class in _classes.split()}


def _past_its_checks(checker: Any) -> None:
    """Its last check compares two observations, the first of which went with the process that showed it."""
    if checker.checked_reset:
        checker.checked_step = checker.checked_data_reuse = True


def _start_the_clock(statistics: Any) -> None:
    statistics.episode_start_time = time.perf_counter()


# What is left to do where attributes are not all.
AFTERWARDS: dict[str, Callable[[Any], None]] = {
    f"{_WRAPPERS}common:PassiveEnvChecker": _past_its_checks,
    f"{_WRAPPERS}common:RecordEpisodeStatistics": _start_the_clock,
}
