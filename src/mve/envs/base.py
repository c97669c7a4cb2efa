"""Stage 1, act: what every environment adapter offers the loop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np

from mve.types import Count, Json, Known, Seconds

# obs (S,) -> action (A,): in [-1, 1], or one-hot where the choice is among A
HostPolicy: TypeAlias = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True, kw_only=True)
class EnvConfig:
    """Which task, and how its ends are read."""

    id: str = ""
    """Gymnasium id, such as HalfCheetah-v5, or one in JAX, such as gymnax/Pendulum-v1; empty for an
    environment instance."""
    kwargs: dict[str, Any] | None = None
    """Keyword arguments of gymnasium.make; max_episode_steps and parameters of the task for one in JAX."""
    truncation_is_terminal: bool = False
    """Treat a time limit as the end of all reward, as the MVE paper's code did; False keeps the bootstrap."""
    on_fault: Literal["stop", "restart"] = "stop"
    """Where the environment raises, hangs, dies or returns nonsense. stop: save what was before it and end
    the run. restart: make the environment anew and begin another episode."""
    max_restarts: Count = 10
    """Restarts of a whole run, evaluations included, after which a fault stops it all the same."""
    timeout: Seconds | None = None
    """Seconds that a reset or a step may take, in a process of its own, which it is then given. None: any."""
    own_process: bool = False
    """Step the environment in a process of its own, so that its crash is not the run's. By id only; about
    0.05 ms a step more, and 190 MB."""

    @property
    def is_apart(self) -> bool:
        """Whether it is stepped in a process of its own."""
        return self.own_process or self.timeout is not None


class EnvSpec(NamedTuple):
    """What the networks need to know of an environment."""

    name: str
    obs_size: int
    action_size: int
    max_episode_steps: int | None
    known: Known  # true functions of (obs, action as the agent's, next_obs), where there are any
    discrete: bool = False  # actions are one-hot vectors: a choice among `action_size`


class Episode(NamedTuple):
    """One that has ended."""

    ret: float
    length: int


class Snapshot(NamedTuple):
    """The state of an environment, which a checkpoint can hold: tensors and JSON."""

    arrays: dict[str, np.ndarray]
    facts: Json  # facts["arrays"] is the dtype and the shape of each of them
