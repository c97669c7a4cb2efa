"""DeepMind Control tasks as Gymnasium environments: `dmc/DOMAIN-TASK`, such as dmc/cheetah-run.

The suite of Tassa et al. 2018 (arXiv 1801.00690) with its state observations: 1000 control steps an episode,
none of them repeated, each paid between 0 and 1. dm-control comes with the optional extra `dmc`; without it
this file can still be imported. (Shimmy's adapter would leave the flat observation and the time limit to us,
and ask for h5py.)
"""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, final

import gymnasium as gym
import numpy as np
from gymnasium.envs.registration import EnvSpec
from gymnasium.spaces import Box

from mve.messages import one_line, what_failed
from mve.types import UserError

PREFIX = "dmc/"
EPISODE_STEPS = 1000  # of every task but LQR's two, which have no limit; ours is TimeLimit's, and can be set


def spec(name: str) -> EnvSpec:
    """What `gymnasium.make` makes the environment dmc/DOMAIN-TASK from.

    UserError where the extra is missing or does not work, and for a name that is not in the suite.
    """
    tasks = {f"{PREFIX}{domain}-{task}": (domain, task) for domain, task in _suite(name).ALL_TASKS}
    if name not in tasks:
        near = difflib.get_close_matches(name, tasks, n=3, cutoff=0.5)
        hint = f"nearest: {', '.join(near)}" if near else "dm_control.suite.ALL_TASKS has the names"
        raise UserError(f"unknown environment '{name}'; {hint}")
    domain, task = tasks[name]
    kwargs = {"domain": domain, "task": task}
    entry_point = f"{ControlSuite.__module__}:{ControlSuite.__name__}"
    return EnvSpec(id=name, entry_point=entry_point, max_episode_steps=EPISODE_STEPS, kwargs=kwargs)


@final
class ControlSuite(gym.Env[np.ndarray, np.ndarray]):
    """One task of the suite, without a time limit of its own.

    `obs` (S,) is every entry of the suite's observation in the suite's order; `action` (A,) is in the
    suite's units. Terminated where the suite's discount falls to 0, which none but LQR's does. With a seed,
    an episode begins as in the suite loaded with that random seed. UserError if the simulation fails.
    """

    def __init__(self, domain: str, task: str):
        self._name = f"{PREFIX}{domain}-{task}"
        self._env = _load(self._name, domain, task)
        self._env.task.random.seed()  # until a reset is given one
        entries = self._env.observation_spec()
        self._entries = tuple(entries)
        size = sum(math.prod(entry.shape) for entry in entries.values())
        self.observation_space = Box(-np.inf, np.inf, (size,), np.float64)
        actions = self._env.action_spec()
        self.action_space = Box(_limit(actions.minimum), _limit(actions.maximum), dtype=np.float64)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        if seed is not None:
            self._env.task.random.seed(seed)
        return self._flat(self._simulated(self._env.reset)), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        now = self._simulated(self._env.step, action)
        terminated = bool(now.last() and now.discount == 0.0)
        return self._flat(now), float(now.reward), terminated, now.last() and not terminated, {}

    def _flat(self, now: Any) -> np.ndarray:
        return np.concatenate([np.ravel(now.observation[entry]) for entry in self._entries])

    def _simulated(self, advance: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return advance(*arguments)
        except RuntimeError as error:  # PhysicsError is one; so is a missing renderer
            # quadruped-escape hands its terrain to the renderer, seen or not.
            hint = "; this task needs a renderer: set MUJOCO_GL=egl" if "OpenGL" in str(error) else ""
            raise UserError(f"{self._name}: {one_line(error).rstrip('.')}{hint}") from error

    def close(self) -> None:
        self._env.close()


def _limit(value: np.ndarray) -> np.ndarray:
    """The suite writes MuJoCo's largest number, 1e10, where an actuator has no limit."""
    return np.where(np.abs(value) < 1e10, value, np.copysign(np.inf, value))


def _suite(name: str) -> Any:
    """The module dm_control.suite, for whoever asked for the task of that name."""
    try:
        with _undisturbed():
            # Absent from most machines, so a type checker cannot follow it.
            from dm_control import suite  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        if error.name in ("dm_control", "mujoco"):
            raise UserError(f'{name} needs the extra: pip install "mve[dmc]"') from error
        raise _broken(name, error) from error
    except Exception as error:
        raise _broken(name, error) from error
    return suite


def _load(name: str, domain: str, task: str) -> Any:
    # LQR draws its masses and springs here: every copy of the task has to have the same ones.
    settings = {"random": 0, "time_limit": math.inf}
    suite = _suite(name)
    try:
        with _undisturbed():
            return suite.load(domain, task, task_kwargs=settings)
    except Exception as error:
        raise _broken(name, error) from error


def _broken(name: str, error: Exception) -> UserError:
    """Whatever dm-control raises where it does not fit the MuJoCo that is installed."""
    return UserError(
        f"cannot make {name}: dm-control fails with {what_failed(error)}; "
        'versions that fit each other come by pip install "mve[dmc]"'
    )


@contextmanager
def _undisturbed() -> Iterator[None]:
    """dm-control is imported and its models are read without a trace in the rest of the process.

    It would look for a display or a GL library, which states do not need (a MUJOCO_GL that was set is
    respected), and take over MuJoCo's warnings, here of what its models are written in: no user can mend it.
    """
    import mujoco  # before MUJOCO_GL is touched, which it reads as well

    native: Any = mujoco  # its C functions are not in the type stubs
    warn, chosen = native.get_mju_user_warning(), os.environ.get("MUJOCO_GL")
    os.environ.setdefault("MUJOCO_GL", "disable")
    native.set_mju_user_warning(lambda message: None)
    try:
        yield
    finally:
        native.set_mju_user_warning(warn)
        if chosen is None:
            del os.environ["MUJOCO_GL"]
