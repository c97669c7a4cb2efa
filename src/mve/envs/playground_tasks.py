"""MuJoCo Playground's environments (Zakka et al. 2025, arXiv 2502.08844) as native tasks: `playground/NAME`.

Such as playground/CheetahRun; simulated by MJX. They come with the optional extra `mjx`. A keyword argument
overrides one of the environment's settings (`impl`, `ctrl_dt`, ...). The locomotion and manipulation suites
fetch their robots when first loaded; the control suite has what it needs.
"""

from __future__ import annotations

from typing import Any, final

import jax.numpy as jnp
import numpy as np
from gymnasium.spaces import Box
from jaxtyping import Array

from mve.envs.native import NativeStep, NativeTask, as_features, check_name
from mve.messages import what_failed
from mve.types import Key, UserError

PREFIX = "playground/"


def make(name: str, kwargs: dict[str, Any]) -> NativeTask:
    """UserError where the extra is missing, for an unknown name, and for settings that do not fit."""
    registry = _registry(name)
    check_name(name, [PREFIX + each for each in registry.ALL_ENVS])
    try:
        return Playground(name, registry.load(name.removeprefix(PREFIX), config_overrides=kwargs or None))
    except Exception as error:  # whatever its constructor raises
        raise UserError(f"cannot make environment '{name}': {what_failed(error)}") from error


def _registry(name: str) -> Any:
    try:
        from mujoco_playground import registry  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError(f'{name} needs the extra: pip install "mve[mjx]" ({error})') from error
    except Exception as error:
        raise UserError(
            f"{name}: mujoco_playground fails with {what_failed(error)}; "
            'versions that fit come by pip install "mve[mjx]"'
        ) from error
    return registry


@final
class Playground(NativeTask):
    """One of its environments. Where observations are several, the policy's is the one called `state`.

    Terminated is its `done`, which knows no time limit: `episode_length` is left to the adapter.
    """

    def __init__(self, name: str, env: Any):
        self.name, self._env = name, env
        self.max_episode_steps = int(env._config.episode_length)
        self.action_space = Box(-1.0, 1.0, (env.action_size,), np.float32)

    def reset(self, key: Key) -> tuple[Any, Array]:
        state = self._env.reset(key)
        return state, self._seen(state)

    def step(self, state: Any, action: Array, key: Key) -> NativeStep:
        del key  # its state carries one
        state = self._env.step(state, action)
        return NativeStep(state, self._seen(state), state.reward, state.done > 0, jnp.zeros((), bool))

    def _seen(self, state: Any) -> Array:
        return as_features(state.obs["state"] if isinstance(state.obs, dict) else state.obs)
