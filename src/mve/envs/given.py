"""The user's own reward and termination functions: what keeps one from being used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import gymnasium as gym
import jax
import jax.numpy as jnp
import numpy as np
from gymnasium.spaces import Discrete

What: TypeAlias = Literal["reward", "termination"]

LEADING_AXES = ((), (7,), (2, 7))  # tried on every function; lengths that few spaces share


def action_dtype(space: gym.Space) -> type:
    """Of the actions that functions are given."""
    return np.int32 if isinstance(space, Discrete) else np.float32


def fault(
    name: str, what: What, function: Callable[..., Any], obs_size: int, action_space: gym.Space
) -> str | None:
    """Why a function cannot be used, in one line that begins with its name; None if it can.

    Found from shapes alone: it is traced, and no step is played for it.
    """
    kind, wanted = (jnp.floating, "float32") if what == "reward" else (jnp.bool_, "bool")
    for shape in LEADING_AXES:
        obs = jax.ShapeDtypeStruct((*shape, obs_size), jnp.float32)
        one_action = action_space.shape or ()  # a discrete one is a number
        action = jax.ShapeDtypeStruct((*shape, *one_action), action_dtype(action_space))
        given = f"{name}: given obs {obs.shape} and action {action.shape} it"
        try:
            told: Any = jax.eval_shape(function, obs, action, obs)
        except Exception as error:  # the user's own code: whatever it raises
            return f"{given} fails; {_reason(error)}"
        if not hasattr(told, "shape"):
            return f"{given} returns {type(told).__name__}, not an array"
        if told.shape != shape:
            hint = "take columns as obs[..., 0] and sums over axis=-1"
            return f"{given} returns shape {told.shape}, not {shape}; {hint}"
        if not jnp.issubdtype(told.dtype, kind):
            return f"{given} returns {told.dtype}, not {wanted}"
    return None


def _reason(error: Exception) -> str:
    """What was raised; for the two usual faults, what to write instead."""
    if isinstance(error, jax.errors.TracerBoolConversionError):
        return "JAX cannot compile `if` on a value: write jnp.where"
    if isinstance(error, jax.errors.JAXTypeError):
        return "JAX cannot compile it: use jax.numpy in place of numpy, float() and int()"
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__
