"""Native tasks by name, PREFIX/TASK: `jax/` are our own, `gymnax/` and `playground/` come with the extras."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium as gym

from mve.envs.native import NativeTask, as_gymnasium, check_name


def _our_own(name: str, kwargs: dict[str, Any]) -> NativeTask:
    from mve.envs.pendulum import Pendulum

    ours = {"jax/Pendulum-v1": Pendulum}
    check_name(name, list(ours))
    return ours[name](**kwargs)


def _gymnax(name: str, kwargs: dict[str, Any]) -> NativeTask:
    from mve.envs import gymnax_tasks

    return gymnax_tasks.make(name, kwargs)


def _playground(name: str, kwargs: dict[str, Any]) -> NativeTask:
    from mve.envs import playground_tasks

    return playground_tasks.make(name, kwargs)


PREFIXES: dict[str, Callable[[str, dict[str, Any]], NativeTask]] = {
    "jax/": _our_own,
    "gymnax/": _gymnax,
    "playground/": _playground,
}


def is_native(name: str) -> bool:
    """Whether that is the name of a native task."""
    return name.startswith(tuple(PREFIXES))


def make(name: str, kwargs: dict[str, Any]) -> gym.Env:
    """The environment of that name; `max_episode_steps` is taken out of `kwargs`, the rest is the task's.

    UserError for a name that there is not, and where the extra is missing or does not work.
    """
    settings = dict(kwargs)
    limit = settings.pop("max_episode_steps", None)
    task = PREFIXES[f"{name.partition('/')[0]}/"](name, settings)
    return as_gymnasium(task, limit)
