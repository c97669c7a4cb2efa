"""A run folder: where it is, what it says of its run, and the training state in it.

config.json   the configuration, the task's name, which functions were the user's own
checkpoints   the training state, replay included, and how far the run had come
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import msgspec
import numpy as np

from mve import checkpoint, config, log
from mve.checkpoint import Which, frozen
from mve.checkpoint.frozen import Frozen, Ringed
from mve.checkpoint.segments import Ring, Shelf
from mve.config import Config
from mve.envs import snapshot
from mve.envs.base import Snapshot
from mve.state import Capacity, Progress, Recipe, TrainState, Unfinished, fresh_state
from mve.train import exploration_policy
from mve.types import Count, Json, NonNegative, Positive, UserError

SEED = re.compile(r"seed-(\d+)")  # folder of one of several
REPLAY_ROWS = "replay.rows"  # names of the tensors that checkpoints share


class Described(NamedTuple):
    """What config.json says."""

    config: Config
    user_functions: list[str]  # of "reward" and "termination", those that the user had given


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a checkpoint says beside its tensors, all of which is used."""

    num_env_steps: Count
    replay_rows: Positive
    imagined_rows: Count
    has_explorer: bool
    next_episode: Count
    seconds: NonNegative
    env: Json | None
    metrics: dict[str, float]
    recent: list[tuple[float, Count]]  # return and length of the last episodes
    restarts: Count = 0  # of the environment, after faults
    seen: dict[str, tuple[float, float] | None] | None = None  # lowest and highest reward and observation
    run: Json | None = None  # the same for all checkpoints of a run; format 1 did not have it
    evaluation: dict[str, float] | None = None  # of the state that is saved, if it was evaluated
    unfinished: Unfinished | None = None


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
    return [path for path in _seed_folders(folder) if (path / "config.json").exists()]


def not_begun(folder: Path) -> list[Path]:
    """Folders of seeds that hold no run: a kill came before."""
    return [path for path in _seed_folders(folder) if not (path / "config.json").exists()]


def _seed_folders(folder: Path) -> list[Path]:
    """By number; seed-0-2, which is a second run of seed 0, is none of them."""
    found = [(SEED.fullmatch(path.name), path) for path in folder.glob("seed-*/")]
    return [path for _, path in sorted((int(match[1]), path) for match, path in found if match)]


def runs_in(folder: Path) -> list[Path]:
    """The runs that a folder stands for: the one that it is, or those of its seeds, whether they were trained
    one by one or side by side, as runs/ENV/ALGO/seeds-0-7; the folder itself where it holds none."""
    if (folder / "config.json").exists():
        return [folder]
    together = sorted(folder.glob("seeds-*/"))
    return [run for place in (folder, *together) for run in seeds_of(place)] or [folder]


def newest(folder: Path) -> str | None:
    """Name of the newest checkpoint of a run, sound or not; None if it has none."""
    found = checkpoint.latest(checkpoints(folder))
    return found and found.name


def refuse_taken(folder: Path) -> None:
    """A run is never written over."""
    if (folder / "config.json").exists():
        raise UserError(
            f"{folder} already holds a run; continue it with `mve resume {folder}` or choose another folder"
        )


def refuse_other(folder: Path, identity: Json, step: int) -> None:
    """A run is not written over by another, nor by itself as it was before."""
    if not (folder / "config.json").exists():
        return
    built = read(folder).config
    held = identity_of(built)
    if held != identity:
        names = f"{held['algo']} with seed {held['seed']} on {held['env'] or 'an environment of your own'}"
        raise UserError(f"{folder} holds another run, {names}; choose another folder")
    if (last := max(checkpoint.steps(checkpoints(folder)), default=0)) > step:
        raise UserError(f"{folder} stands at step {last}, this run at {step}; choose another folder")


def identity_of(built: Config) -> Json:
    """What checkpoints of a run, and of no other beside it, say of it."""
    return {"env": built.env.id, "algo": built.algo, "seed": built.seed}


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
    path = folder / "config.json"
    data = log.read_json(path, what="run folder")
    data.pop("task", None)
    functions = data.pop("user_functions", [])
    if not isinstance(functions, list) or any(each not in ("reward", "termination") for each in functions):
        raise UserError(f"{path}: user_functions has to be a list of reward and termination")
    try:
        return Described(config.from_json(data), functions)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def checkpoints(folder: Path) -> Path:
    """Where those of a run are."""
    return folder / "checkpoints"


def freeze(progress: Progress, env: Snapshot | None, facts: Json, ring: Ring, shelf: Shelf) -> Frozen:
    """A checkpoint to be written; `facts` are joined by what restoring needs to know of sizes.

    `env` is the environment's state, None where it cannot be had; `ring` the rows of the replay, which are
    not in the state; `shelf` knows which of them earlier checkpoints have written.
    """
    state = progress.state
    described = {
        "num_env_steps": int(state.num_env_steps),
        "replay_rows": ring.capacity,
        "imagined_rows": state.imagined.capacity if state.imagined else 0,
        "has_explorer": progress.explorer is not None,
        "unfinished": progress.unfinished and asdict(progress.unfinished),
        "env": None if env is None else env.facts,
    }
    tree = _tree(progress) | {"env": {} if env is None else env.arrays}
    return frozen.freeze(tree, described | facts, Ringed(REPLAY_ROWS, ring, shelf))


def restore(
    folder: Path, recipe: Recipe, identity: Json, which: Which = "newest"
) -> tuple[Progress, Snapshot | None, Json]:
    """A sound checkpoint's progress, state of the environment, and facts; it has to be of the same run."""

    def template_of(held: Json) -> dict[str, Any]:
        facts = _checked(held, identity)

        def tree() -> dict[str, Any]:
            state = fresh_state(recipe, Capacity(facts.replay_rows, facts.imagined_rows), 0)
            acts = facts.has_explorer
            return _tree(Progress(state, exploration_policy(state, state.num_env_steps) if acts else None))

        return jax.eval_shape(tree) | {"env": {} if facts.env is None else snapshot.template(facts.env)}

    tree, held = checkpoint.restore(checkpoints(folder), template_of, which)
    facts = {"evaluation": None, "unfinished": None} | held
    explorer, arrays = jax.tree.map(np.asarray, tree.pop("explorer")), tree.pop("env")
    env = None if facts["env"] is None else Snapshot(arrays, facts["env"])
    unfinished = facts["unfinished"] and Unfinished(**facts["unfinished"])
    return Progress(TrainState(**jax.tree.map(jnp.asarray, tree)), explorer, unfinished), env, facts


def _checked(held: Json, identity: Json) -> Facts:
    """The facts of a checkpoint of this run; ValueError for others."""
    try:
        facts = msgspec.convert(held, Facts)
    except msgspec.ValidationError as error:
        raise ValueError(str(error)) from error
    if facts.run not in (None, identity):
        raise ValueError(f"it is of another run, {facts.run}")
    return facts


def _tree(progress: Progress) -> dict[str, Any]:
    """The state's own names, and `explorer`."""
    state = {field.name: getattr(progress.state, field.name) for field in fields(progress.state)}
    return state | {"explorer": progress.explorer}
