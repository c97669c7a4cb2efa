"""Environments written in JAX, as pure functions: real steps can then be taken where learning happens.

Yours is a subclass of `NativeTask`, as are those that have names (`native_names.py`). `device.py` collects
from all of them alike.
"""

from __future__ import annotations

import abc
import difflib
from collections.abc import Sequence
from typing import Any, NamedTuple, final

import gymnasium as gym
import jax
import jax.numpy as jnp
import numpy as np
from gymnasium.envs.registration import EnvSpec
from gymnasium.spaces import Box, Discrete
from jaxtyping import Array, Bool, Float

from mve.envs.known import below_harmless_wrappers
from mve.types import Key, Known, UserError


class NativeStep(NamedTuple):
    """What one step leaves behind."""

    state: Any
    obs: Float[Array, " S"]
    reward: Float[Array, ""]
    terminated: Bool[Array, ""]
    truncated: Bool[Array, ""]  # for reasons other than `max_episode_steps`, which is the adapter's to count


class NativeTask(abc.ABC):
    """A task as pure functions of one environment, which are traced, and mapped over many.

    `action` is in the environment's own units: within the box (A,), or an integer (). `state` is any pytree
    of arrays, whose structure, shapes and dtypes never change. Equal tasks share a compilation: a frozen
    dataclass is a good one. `known` are true functions of (obs, action, next_obs), where there are any.
    """

    name: str
    action_space: Box | Discrete
    max_episode_steps: int | None = None
    known: Known = Known()

    @abc.abstractmethod
    def reset(self, key: Key) -> tuple[Any, Float[Array, " S"]]:
        """State and observation at the beginning of an episode."""

    @abc.abstractmethod
    def step(self, state: Any, action: Array, key: Key) -> NativeStep:
        """What follows, episode's end or not: there is no automatic reset here."""


@final
class AsGymnasium(gym.Env[np.ndarray, Any]):
    """A native task as a Gymnasium environment, without its time limit: for all that steps on the host."""

    def __init__(self, task: NativeTask):
        self.task, self.known = task, task.known
        obs = jax.eval_shape(task.reset, jax.random.key(0))[1]
        self.observation_space = Box(-np.inf, np.inf, obs.shape, np.float32)
        self.action_space = task.action_space
        self._reset, self._step = jax.jit(task.reset), jax.jit(task.step)
        self._state, self._key, self._count = None, jax.random.key(0), 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self._key = jax.random.key(int(self.np_random.integers(2**31)))
        self._state, obs = self._reset(jax.random.fold_in(self._key, 0))
        self._count = 0
        return np.asarray(obs), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self._count += 1
        key = jax.random.fold_in(self._key, self._count)
        self._state, obs, reward, terminated, truncated = self._step(self._state, np.asarray(action), key)
        return np.asarray(obs), float(reward), bool(terminated), bool(truncated), {}


def as_gymnasium(env: gym.Env | NativeTask, max_episode_steps: int | None = None) -> gym.Env:
    """A native task as an environment of its name, with this time limit or its own; others as they are."""
    if not isinstance(env, NativeTask):
        return env
    spec = EnvSpec(
        id=env.name,
        entry_point=f"{AsGymnasium.__module__}:{AsGymnasium.__name__}",
        max_episode_steps=env.max_episode_steps,
        kwargs={"task": env},
    )
    return gym.make(spec, max_episode_steps=max_episode_steps, disable_env_checker=True)


def task_of(env: gym.Env[Any, Any]) -> NativeTask | None:
    """The native task that `env` shows as it is; None for any other environment."""
    inner = below_harmless_wrappers(env)
    return inner.task if isinstance(inner, AsGymnasium) else None


def check_name(name: str, names: Sequence[str]) -> None:
    """UserError with the nearest names for one that is not among them."""
    if name not in names:
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
        raise UserError(f"unknown environment '{name}'; there are: {', '.join(near or names)}")


def as_features(obs: Any) -> Array:
    """An observation of any shape as (S,), in single precision."""
    return jnp.ravel(jnp.asarray(obs)).astype(jnp.float32)
