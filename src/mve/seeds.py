"""Many seeds: environments stepped side by side, and one program that trains a policy for each.

RUN/seed-0 ...    what a run of that seed alone would have left    RUN/curve.png    all of their curves
"""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import jax

from mve import checkpoint, config, folders, lock, room
from mve.envs import host
from mve.envs.native import NativeTask
from mve.learner import Learner, go_on
from mve.program import devices_for
from mve.types import UserError, Whole


def train_seeds(env: str | gym.Env | NativeTask, algo: str | None = None, **given: Any) -> list[Learner]:
    """Train a learner for each seed, all in one program, to the end of the budget; takes what `create` does.

    Each has the environment's draws and the exploration noise of a run of that seed alone; its updates
    differ from that run's by rounding.
    """
    return learn_together(create(env, algo, **given))


def resume_seeds(run_dir: Path | str, total_timesteps: Whole | None = None, **given: Any) -> list[Learner]:
    """Go on with all runs of a folder of seeds, which have to stand at the same step."""
    return learn_together(load(run_dir, **given), total_timesteps)


def create(
    env: str | gym.Env | NativeTask,
    algo: str | None = None,
    *,
    seeds: Iterable[Whole],
    run_dir: Path | str | None = None,
    **given: Any,
) -> list[Learner]:
    """A learner for each seed, in run_dir/seed-S; `given` is what `Learner` takes.

    An environment instance is copied for each seed. The default folder is runs/ENV/ALGO/seeds-A-B, or
    seeds-A+B+C where the seeds do not follow one another. Nothing is written.
    """
    seeds = [config.whole("seed", seed) for seed in seeds]
    if not seeds or len(set(seeds)) < len(seeds):
        raise UserError(f"seeds {seeds}: at least one is needed, and each only once")
    first = Learner(_copied(env), algo, seed=seeds[0], **given)
    first.room = room.check(first.run, Path(run_dir or "runs"), len(seeds))
    learners = [first, *(Learner(_copied(env), algo, seed=seed, **given) for seed in seeds[1:])]
    if run_dir is None:
        run_dir = folders.free(folders.default(first.spec.name, first.config.algo) / f"seeds-{_name(seeds)}")
    folders.refuse_taken(Path(run_dir))
    for learner in learners:
        learner.folder = Path(run_dir) / f"seed-{learner.config.seed}"
        folders.refuse_taken(learner.folder)
    return learners


def load(run_dir: Path | str, env: gym.Env | NativeTask | None = None, **given: Any) -> list[Learner]:
    """The learners of a folder of seeds; `given` is what `Learner.load` takes beside the folder."""
    places = folders.seeds_of(Path(run_dir))
    if not places:
        raise UserError(f"{run_dir} is not a folder of seeds: it has no seed-*/config.json")
    if absent := folders.not_begun(Path(run_dir)):
        names = ", ".join(path.name for path in absent)
        raise UserError(
            f"{run_dir} was stopped before {names} had begun; remove {names} to go on without, or all of "
            f"{run_dir} to train them together"
        )
    if any(folders.newest(folder) is None for folder in places):
        given = {**given, "which": 0}  # killed before all had their first checkpoint
    learners = [Learner.load(folder, _copied(env), **given) for folder in places]
    earliest = min(learners, key=lambda learner: learner.num_timesteps)
    return [_beside(earliest, learner, env, given) for learner in learners]


def _beside(
    earliest: Learner, learner: Learner, env: gym.Env | NativeTask | None, given: dict[str, Any]
) -> Learner:
    """The same run at the step of the earliest, if it has a checkpoint there and was not trained on alone.

    A kill in the middle of a save leaves some seeds one checkpoint ahead.
    """
    folder, step = learner.folder, earliest.num_timesteps
    alike = replace(learner.config, seed=0) == replace(earliest.config, seed=0)
    kept = checkpoint.steps(folders.checkpoints(folder))
    if learner.num_timesteps == step or not alike or step not in kept:
        return learner
    warnings.warn(
        f"{folder} goes back from step {learner.num_timesteps} to {step}, as others do", stacklevel=3
    )
    return Learner.load(folder, _copied(env), which=step, **given)


def learn_together(learners: list[Learner], total_timesteps: Whole | None = None) -> list[Learner]:
    """Train learners that differ in the seed only for so many more steps, or to the end of their budget."""
    folder = learners[0].folder.parent
    if len({(learner.num_timesteps, learner.progress.unfinished) for learner in learners}) > 1:
        stand = ", ".join(f"{learner.folder.name} at {_place(learner)}" for learner in learners)
        raise UserError(f"{folder}: its runs stand at different steps ({stand}); resume each alone")
    if any(replace(each.config, seed=0) != replace(learners[0].config, seed=0) for each in learners):
        raise UserError(f"{folder}: its runs differ in more than the seed; resume each alone")
    for learner in learners:
        learner.set_budget(total_timesteps)
    with ExitStack() as locks:
        for learner in learners:
            locks.enter_context(lock.held(learner.folder))
        for learner in learners:
            learner.prepare()
        if not learners[0].quiet:
            told = f"{learners[0].describe()}; {_described(learners)}"
            print(told, learners[0].room, sep="\n", file=sys.stderr)
        go_on(learners, folder)
    return learners


def _place(learner: Learner) -> str:
    """The step at which it stands, and how far it is with learning from it where that was broken off."""
    unfinished = learner.progress.unfinished
    return f"{learner.num_timesteps}" + (f" and {unfinished.done} updates" if unfinished else "")


def _described(learners: Sequence[Learner]) -> str:
    """How many seeds, and on how many devices, if there are several."""
    count, devices = len(learners), len(jax.devices())
    used = len(devices_for(count)) if count > 1 else 1
    return f"{count} seed{'s' * (count > 1)}" + (f" on {used} of {devices} devices" if devices > 1 else "")


def _name(seeds: Sequence[int]) -> str:
    """0-7 for seeds that follow one another, 0+3+5 for others."""
    if list(seeds) == list(range(seeds[0], seeds[-1] + 1)):
        return f"{seeds[0]}-{seeds[-1]}"
    return "+".join(map(str, seeds))


def _copied(env: Any) -> Any:
    """An environment of its own for each seed; an id, a native task, or nothing, as it is."""
    if env is None or isinstance(env, str | NativeTask):
        return env
    try:
        return copy.deepcopy(env)
    except Exception as error:
        raise UserError(f"{host.name_of(env)} cannot be copied for each seed: {error}") from error
