"""Gymnasium's Pendulum-v1 in JAX: swing a pole up and hold it there."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, final

import jax
import jax.numpy as jnp
import numpy as np
from gymnasium.spaces import Box, Discrete
from jaxtyping import Array, Float

from mve.envs.known import never
from mve.envs.native import NativeStep, NativeTask
from mve.types import Key, Known

GRAVITY, MASS, LENGTH, SECONDS = 10.0, 1.0, 1.0, 0.05
FASTEST, STRONGEST = 8.0, 2.0


class Pole(NamedTuple):
    """Angle from upright, in radians, and its speed."""

    angle: Float[Array, ""]
    speed: Float[Array, ""]


@final
@dataclass(frozen=True, kw_only=True)
class Pendulum(NativeTask):
    """The same equations and the same distribution of beginnings; numbers in single precision."""

    name: str = "jax/Pendulum-v1"
    max_episode_steps: int | None = 200

    @property
    def action_space(self) -> Box | Discrete:  # pyright: ignore[reportIncompatibleVariableOverride]
        return Box(-STRONGEST, STRONGEST, (1,), np.float32)

    @property
    def known(self) -> Known:  # pyright: ignore[reportIncompatibleVariableOverride]
        return Known(reward, never)

    def reset(self, key: Key) -> tuple[Pole, Float[Array, " S"]]:
        angle, speed = jax.random.uniform(key, (2,), minval=-1.0) * jnp.array([math.pi, 1.0])
        pole = Pole(angle, speed)
        return pole, _seen(pole)

    def step(self, state: Pole, action: Array, key: Key) -> NativeStep:
        del key  # nothing is left to chance
        torque = jnp.clip(action[0], -STRONGEST, STRONGEST)
        angle, speed = state
        turn = 1.5 * GRAVITY / LENGTH * jnp.sin(angle) + 3.0 / (MASS * LENGTH**2) * torque
        speed = jnp.clip(speed + turn * SECONDS, -FASTEST, FASTEST)
        pole = Pole(angle + speed * SECONDS, speed)
        no = jnp.zeros((), bool)
        return NativeStep(pole, _seen(pole), reward(_seen(state), action, _seen(pole)), no, no)


def reward(obs: Array, action: Array, next_obs: Array) -> Array:
    """r = -(θ² + 0.1 θ̇² + 0.001 u²), of the state before the step, with the torque u as clipped."""
    del next_obs
    angle = jnp.arctan2(obs[..., 1], obs[..., 0])
    torque = jnp.clip(action[..., 0], -STRONGEST, STRONGEST)
    return -(angle**2 + 0.1 * obs[..., 2] ** 2 + 0.001 * torque**2)


def _seen(pole: Pole) -> Float[Array, " S"]:
    return jnp.stack([jnp.cos(pole.angle), jnp.sin(pole.angle), pole.speed])
