"""gymnax's environments (Lange 2022) as native tasks: `gymnax/NAME`, such as gymnax/Pendulum-v1.

They come with the optional extra `gymnax`. A keyword argument is one of the environment's parameters, such as
max_torque, or else one of its constructor's. Versions from 1.0 on are asked for: before, `step_env` called a
time limit `done` like any other end.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, final

import jax.numpy as jnp
import numpy as np
from gymnasium.spaces import Box, Discrete
from jaxtyping import Array

from mve.envs import known
from mve.envs.native import NativeStep, NativeTask, as_features, check_name
from mve.messages import what_failed
from mve.types import Key, Known, UserError

PREFIX = "gymnax/"


def make(name: str, kwargs: dict[str, Any]) -> NativeTask:
    """UserError where the extra is missing, for an unknown name, and for settings that do not fit."""
    gymnax = _gymnax(name)
    check_name(name, [PREFIX + each for each in gymnax.registered_envs])
    own = name.removeprefix(PREFIX)
    try:
        _, params = gymnax.make(own)
        of_params = {key: value for key, value in kwargs.items() if hasattr(params, key)}
        env, params = gymnax.make(own, **{k: v for k, v in kwargs.items() if k not in of_params})
        return Gymnax(name, env, params.replace(**of_params))
    except Exception as error:  # whatever its constructor raises
        raise UserError(f"cannot make environment '{name}': {what_failed(error)}") from error


def _gymnax(name: str) -> Any:
    try:
        import gymnax  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError(f'{name} needs the extra: pip install "mve[gymnax]" ({error})') from error
    return gymnax


@final
class Gymnax(NativeTask):
    """One of gymnax's environments with these parameters. Observations of any shape are flattened.

    Terminated is what its `step_env` says; the time limit is left to the adapter. Its own automatic reset is
    not used: it would hide the last observation.
    """

    def __init__(self, name: str, env: Any, params: Any):
        self.name, self._env, self._params = name, env, params
        self.max_episode_steps = int(params.max_steps_in_episode)
        self.action_space = _space(name, env.action_space(params))
        self.known = _known(name.removeprefix(PREFIX), params)

    def reset(self, key: Key) -> tuple[Any, Array]:
        obs, state = self._env.reset_env(key, self._params)
        return state, as_features(obs)

    def step(self, state: Any, action: Array, key: Key) -> NativeStep:
        obs, state, reward, terminated, _ = self._env.step_env(key, state, action, self._params)
        return NativeStep(state, as_features(obs), reward, terminated, jnp.zeros((), bool))


def _space(name: str, space: Any) -> Box | Discrete:
    if hasattr(space, "n"):
        return Discrete(int(space.n))
    try:
        low, high = (np.broadcast_to(np.asarray(x, np.float32), space.shape) for x in (space.low, space.high))
    except AttributeError as error:
        raise UserError(f"{name}: {type(space).__name__} actions are not supported") from error
    return Box(low, high, dtype=np.float32)


def _known(name: str, params: Any) -> Known:
    """Those of Gymnasium's tasks that gymnax has rewritten faithfully, with its parameters."""
    if name == "Pendulum-v1":
        return known.of_class("pendulum:PendulumEnv", SimpleNamespace(max_torque=params.max_torque))
    if name == "CartPole-v1":
        return known.of_class(
            "cartpole:CartPoleEnv",
            SimpleNamespace(
                x_threshold=params.x_threshold,
                theta_threshold_radians=params.theta_threshold_radians,
                _sutton_barto_reward=False,
            ),
        )
    if name == "Acrobot-v1":
        return known.of_class("acrobot:AcrobotEnv", params)
    if name == "MountainCar-v0":
        return known.of_class("mountain_car:MountainCarEnv", params)
    return Known()
