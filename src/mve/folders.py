"""A run folder: where it is, what it says of its run, and the training state in it.

config.json   the configuration, the task's name, which functions were the user's own
checkpoints   the training state, replay included, and how far the run had come
"""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mve import checkpoint, config, log
from mve.config import Config
from mve.envs import snapshot
from mve.envs.base import Snapshot
from mve.state import Capacity, Progress, Recipe, TrainState, initial_state
from mve.train import exploration_policy
from mve.types import Json, UserError

RUNS = "seed-*/config.json"


class Described(NamedTuple):
    """What config.json says."""

    config: Config
    user_functions: list[str]  # of "reward" and "termination", those that the user had given


def default(name: str, algo: str) -> Path:
    """runs/ENV/ALGO, which holds a folder for each seed."""
    return Path("runs") / name.replace("/", "-").replace(":", "-") / algo


def free(wanted: Path) -> Path:
    """That folder, or the first of NAME-2, NAME-3, ... that holds no run yet."""
    folder, n = wanted, 1
    while (folder / "config.json").exists() or seeds_of(folder):
        n += 1
        folder = wanted.with_name(f"{wanted.name}-{n}")
    return folder


def seeds_of(folder: Path) -> list[Path]:
    """The runs in a folder of several seeds, by number."""
    found = [(re.fullmatch(r"seed-(\d+)", path.parent.name), path.parent) for path in folder.glob(RUNS)]
    return [path for _, path in sorted((int(match[1]), path) for match, path in found if match)]


def newest(folder: Path) -> str | None:
    """Name of the newest checkpoint of a run, sound or not; None if it has none."""
    found = checkpoint.latest(folder / "checkpoints")
    return found and found.name


def refuse_taken(folder: Path) -> None:
    """A run is never written over."""
    if (folder / "config.json").exists():
        raise UserError(
            f"{folder} already holds a run; continue it with `mve resume {folder}` or choose another folder"
        )


def describe(folder: Path, built: Config, task: str, user_functions: list[str]) -> None:
    """Write what a run is and what it runs on; the folder is made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        facts = config.to_json(built) | {"task": task, "user_functions": user_functions}
        log.write_json(folder / "config.json", facts)
        log.write_versions(folder)
    except OSError as error:
        raise UserError(f"cannot write the run folder {folder}: {error.strerror}") from error


def read(folder: Path) -> Described:
    """What a run is."""
    data = log.read_json(folder / "config.json", what="run folder")
    data.pop("task", None)
    functions = data.pop("user_functions", [])
    return Described(config.from_json(data), functions)


def save(folder: Path, progress: Progress, env: Snapshot | None, facts: Json) -> None:
    """A checkpoint; `facts` are joined by what restoring needs to know of sizes.

    `env` is the environment's state, None where it cannot be had.
    """
    state = progress.state
    described = {
        "num_env_steps": int(state.num_env_steps),
        "replay_rows": state.replay.capacity,
        "imagined_rows": state.imagined.capacity if state.imagined else 0,
        "has_explorer": progress.explorer is not None,
        "env": None if env is None else env.facts,
    }
    tree = _tree(progress) | {"env": {} if env is None else env.arrays}
    checkpoint.save(folder / "checkpoints", tree, described | facts)


def restore(folder: Path, recipe: Recipe) -> tuple[Progress, Snapshot | None, Json]:
    """The newest sound checkpoint's progress, state of the environment, and facts."""

    def template_of(held: Json) -> dict[str, Any]:
        def tree() -> dict[str, Any]:
            state = initial_state(recipe, Capacity(held["replay_rows"], held["imagined_rows"]), 0)
            acts = held["has_explorer"]
            return _tree(Progress(state, exploration_policy(state, state.num_env_steps) if acts else None))

        return jax.eval_shape(tree) | {"env": {} if held["env"] is None else snapshot.template(held["env"])}

    tree, facts = checkpoint.restore(folder / "checkpoints", template_of)
    explorer, arrays = jax.tree.map(np.asarray, tree.pop("explorer")), tree.pop("env")
    env = None if facts["env"] is None else Snapshot(arrays, facts["env"])
    return Progress(TrainState(**jax.tree.map(jnp.asarray, tree)), explorer), env, facts


def _tree(progress: Progress) -> dict[str, Any]:
    """The state's own names, and `explorer`."""
    state = {field.name: getattr(progress.state, field.name) for field in fields(progress.state)}
    return state | {"explorer": progress.explorer}
