"""One environment as it is stepped: whatever it does wrong is a `Fault`, and only sound numbers come out.

`Here` steps it in this process; `worker.Worker` in one of its own. Both are reset after a fault like after
an episode: the environment is then made anew where it is known how, so that nothing broken is kept.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, final, runtime_checkable

import gymnasium as gym
import numpy as np

from mve.envs import snapshot as snapshots
from mve.envs.base import EnvConfig, Snapshot
from mve.messages import one_line, what_failed
from mve.types import UserError


class Fault(Exception):
    """What an environment did wrong, in words that follow "at step N,"."""


class Step(NamedTuple):
    """What one step of an environment gave, checked."""

    obs: np.ndarray  # (S,) float32, finite, in memory of its own
    reward: float  # finite as a float32 too
    terminated: bool
    truncated: bool


@runtime_checkable
class Stepped(Protocol):
    """An environment that raises nothing but `Fault` where it is stepped."""

    def reset(self, seed: int) -> np.ndarray:
        """The first observation (S,) of an episode; the environment is made anew after a fault."""
        ...

    def step(self, action: Any) -> Step:
        """One step; the action is in the environment's own units."""
        ...

    def obstacle(self) -> str | None:
        """Why the state cannot be taken; None if it can."""
        ...

    def take(self) -> Snapshot | None:
        """The state; None if it cannot be taken."""
        ...

    def restore(self, snapshot: Snapshot) -> None:
        """Go on from there; UserError if it does not fit."""
        ...

    def close(self) -> None: ...


@final
class Here:
    """In this process. `make` gives a fresh environment after a fault; without it the same one is reset."""

    def __init__(self, env: gym.Env, obs_size: int, make: Callable[[], gym.Env] | None = None):
        self.env, self._obs_size, self._make = env, obs_size, make
        self._failed = False

    def reset(self, seed: int) -> np.ndarray:
        if self._failed and self._make is not None:
            with contextlib.suppress(Exception):  # it is broken, and may be so in closing too
                self.env.close()
            self.env = self._called(self._make)
        self._failed = False
        answer = self._called(self.env.reset, seed=seed)
        try:
            obs, _ = answer
        except (TypeError, ValueError):
            raise self._fault("reset() did not return an observation and a dictionary") from None
        return self._obs(obs)

    def step(self, action: Any) -> Step:
        answer = self._called(self.env.step, action)
        try:
            obs, reward, terminated, truncated, _ = answer
        except (TypeError, ValueError):
            raise self._fault("step() did not return five values") from None
        return Step(
            self._obs(obs),
            self._reward(reward),
            self._flag("terminated", terminated),
            self._flag("truncated", truncated),
        )

    def obstacle(self) -> str | None:
        return snapshots.obstacle(self.env)

    def take(self) -> Snapshot | None:
        return snapshots.take(self.env)

    def restore(self, snapshot: Snapshot) -> None:
        snapshots.restore(self.env, snapshot)

    def close(self) -> None:
        self.env.close()

    def _fault(self, what: str) -> Fault:
        self._failed = True
        return Fault(what)

    def _called(self, function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        try:
            return function(*arguments, **named)
        except UserError as error:  # ours, such as of a simulation that failed: says enough
            raise self._fault(one_line(error)) from error
        except Exception as error:
            raise self._fault(f"it raised {what_failed(error)}") from error

    def _obs(self, obs: Any) -> np.ndarray:
        if (array := _real(obs)) is None:
            raise self._fault(f"the observation is no array of real numbers but {_shown(obs)}")
        if array.shape != (self._obs_size,):
            raise self._fault(f"the observation has shape {array.shape}, not ({self._obs_size},)")
        with np.errstate(over="ignore"):
            single = np.array(array, np.float32)  # a copy: some environments write over what they returned
        if not np.isfinite(single).all():
            raise self._fault(f"the observation is not finite: {one_line(single)}")
        return single

    def _reward(self, reward: Any) -> float:
        if type(reward) is not float:
            if (array := _real(reward)) is None or array.shape != ():
                raise self._fault(f"the reward is no number but {_shown(reward)}")
            reward = float(array)
        # Not NumPy's: that of a single number takes longer than the comparison.
        if not abs(reward) <= LARGEST:
            raise self._fault(f"the reward is {reward}")
        return reward

    def _flag(self, name: str, value: Any) -> bool:
        if type(value) is bool or type(value) is np.bool_:
            return bool(value)
        array = _real(value)  # JAX's are arrays
        if array is not None and array.dtype == bool and array.shape == ():
            return bool(array)
        raise self._fault(f"{name} is no truth value but {_shown(value)}")


LARGEST = float(np.finfo(np.float32).max)  # beyond it a reward would be infinite in the replay


class Restarts:
    """How often an environment may still be begun anew; shared by training and evaluation."""

    def __init__(self, config: EnvConfig, whose: str):
        self._whose = whose  # environment and seed, before what is said
        self.allowed = config.max_restarts if config.on_fault == "restart" else 0
        self.used = 0
        self._said: list[str] = []

    def allow(self, fault: str) -> bool:
        """Whether there is one more, which is then used up."""
        if self.used >= self.allowed:
            return False
        self.used += 1
        self._said.append(f"{self._whose}: {fault}; begun anew, restart {self.used} of {self.allowed}")
        return True

    def said(self) -> list[str]:
        """What was begun anew since this was last asked, and why."""
        said, self._said = self._said, []
        return said

    def in_vain(self, fault: str) -> str:
        """That fault, where there is no restart, and what can be done."""
        if self.allowed:
            return f"{self._whose}: {fault}; all {self.allowed} restarts are used up (env.max_restarts)"
        return f"{self._whose}: {fault}; env.on_fault=restart would begin another episode"


def _real(value: Any) -> np.ndarray | None:
    """As an array of real numbers or truth values; None for anything else."""
    try:
        array = np.asarray(value)
    except Exception:  # a ragged list, or what its own class raises
        return None
    return array if array.dtype.kind in "biuf" else None


def _shown(value: Any) -> str:
    text = one_line(repr(value))
    return f"{text if len(text) <= 40 else f'{text[:40]}...'}, a {type(value).__name__}"
