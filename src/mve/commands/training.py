"""train and resume: what takes real steps."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, arg

from mve.commands.given import FunctionPath, OnRun, Settings, Steps, at_least_one, function, joined, spread

if TYPE_CHECKING:
    from mve.learner import Learner

MOST_SEEDS = 1000  # in one program


@dataclass(frozen=True)
class Train:
    """Train a policy: one task, one algorithm, one seed or several, one folder."""

    env: Annotated[Positional[str], arg(metavar="ENV")]
    """Gymnasium id, such as Pendulum-v1 or HalfCheetah-v5."""
    algo: Annotated[str | None, arg(metavar="NAME", help_behavior_hint="")] = None
    """One of those that `mve list` shows; mve-svg if not given, mve-dqn for discrete actions."""
    steps: Steps = None
    """Environment steps; 25 full-length episodes if not given."""
    seed: Annotated[int | None, arg(metavar="S", help_behavior_hint="")] = None
    """Decides everything that is drawn at random; 0 if not given."""
    seeds: Annotated[str | None, arg(metavar="A..B", help_behavior_hint="")] = None
    """Several seeds, such as 0..7 or 0,3,5, trained side by side in one program; each has a folder seed-S."""
    run_dir: Annotated[Path | None, arg(metavar="DIR", help_behavior_hint="")] = None
    """Folder of the run; runs/ENV/ALGO/seed-S, or seeds-A-B, if not given."""
    settings: Settings = dataclasses.field(default_factory=list)
    """Any setting that `mve settings` shows; several may follow."""
    reward: FunctionPath = None
    """Your JAX function (obs, action, next_obs) -> reward; if not given the task's own, or learned."""
    termination: FunctionPath = None
    """Your JAX function (obs, action, next_obs) -> bool; if not given the task's own, or learned."""
    quiet: bool = False
    """No progress display."""

    def run(self) -> int:
        if self.seeds is not None:
            _one_device_for_each_core()
        from mve.learner import Learner
        from mve.seeds import create
        from mve.types import UserError

        if self.seed is not None and self.seeds is not None:
            raise UserError("--seed and --seeds exclude each other; give one of them")
        seeds = None if self.seeds is None else _seeds(self.seeds)
        settings = joined(self.settings)
        if self.steps is not None:
            # Not left to learn(): memory and the spacing of evaluations follow from the budget.
            settings.append(f"train.total_steps={at_least_one('--steps', self.steps)}")
        given: dict[str, Any] = {
            "run_dir": self.run_dir,
            "settings": settings,
            "reward_fn": function("reward", self.reward),
            "termination_fn": function("termination", self.termination),
            "quiet": self.quiet,
        }
        if seeds is None:
            return _learn(Learner(self.env, self.algo, seed=self.seed or 0, **given), None)
        return _learn_together(create(self.env, self.algo, seeds=seeds, **given), None)


@dataclass(frozen=True)
class Resume(OnRun):
    """Go on with a run from its newest checkpoint; from its beginning, if it was killed before the first."""

    steps: Steps = None
    """This many more environment steps; to the end of the run's budget if not given."""
    quiet: bool = False
    """No progress display."""

    def run(self) -> int:
        if not (self.run_folder / "config.json").exists():
            _one_device_for_each_core()
        from mve.folders import newest, seeds_of
        from mve.types import UserError

        steps = None if self.steps is None else at_least_one("--steps", self.steps)
        if not (self.run_folder / "config.json").exists() and seeds_of(self.run_folder):
            learners = self._load_seeds()
        else:
            # Killed before its first checkpoint, it begins again: config.json says all that there is.
            learners = [self.load(quiet=self.quiet, which="newest" if newest(self.run_folder) else 0)]
        done, unfinished = learners[0].num_timesteps, learners[0].progress.unfinished
        if steps is None and done >= learners[0].config.train.total_steps and unfinished is None:
            raise UserError(f"{self.run_folder} has had all of its {done} steps; --steps N trains for N more")
        return _learn(learners[0], steps) if len(learners) == 1 else _learn_together(learners, steps)

    def _load_seeds(self) -> list[Learner]:
        from mve.seeds import load

        return load(
            self.run_folder,
            reward_fn=function("reward", self.reward),
            termination_fn=function("termination", self.termination),
            quiet=self.quiet,
        )


def _seeds(text: str) -> list[int]:
    """Those that 0..7 or 0,3,5 stand for."""
    from mve.types import UserError

    seeds: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d{1,10})(?:\.\.(\d{1,10}))?", part.strip())
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if not 0 <= last - first < MOST_SEEDS:
            raise UserError(
                f"--seeds {text}: write 0..7 or 0,3,5, from the lower to the higher, {MOST_SEEDS} at most"
            )
        seeds += range(first, last + 1)
    if len(set(seeds)) < len(seeds):
        raise UserError(f"--seeds {text}: a seed is there twice")
    return seeds


def _one_device_for_each_core() -> None:
    """Have JAX see every core as a device, among which seeds are shared out.

    Small products are done faster by a core each than by all cores together. Too late where JAX has begun
    to compute: then it is the user's own program that decides.
    """
    import jax

    set_by_user = jax.config.jax_num_cpu_devices >= 0  # pyright: ignore[reportAttributeAccessIssue]
    told = set_by_user or "device_count" in os.environ.get("XLA_FLAGS", "")
    if not told:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", cores or 1)


def _learn(learner: Learner, steps: int | None) -> int:
    """Train, then say what came of it and where it lies."""
    with _saying_how_to_go_on(learner.folder, learner.folder):
        learner.learn(steps)
    returns = _last_returns(learner.folder)
    if returns:
        print(f"evaluation   {spread(returns)}")
    _print_places(learner.folder)
    return 0


def _learn_together(learners: list[Learner], steps: int | None) -> int:
    """The same for several seeds: what came of it is the spread of their means."""
    from mve.seeds import learn_together

    folder = learners[0].folder.parent
    with _saying_how_to_go_on(folder, learners[-1].folder):
        learn_together(learners, steps)
    found = [_last_returns(learner.folder) for learner in learners]
    if all(found):
        means = [sum(returns) / len(returns) for returns in found]
        print(f"evaluation   {spread(means, 'seed')}")
    _print_places(folder)
    return 0


@contextlib.contextmanager
def _saying_how_to_go_on(folder: Path, saved_last: Path) -> Iterator[None]:
    from mve.types import DivergedError, FaultError

    try:
        yield
    except (KeyboardInterrupt, SystemExit, FaultError, DivergedError):
        if (saved_last / "checkpoints").is_dir():
            print(
                f"mve: stopped; go on from the newest checkpoint with: mve resume {folder}", file=sys.stderr
            )
        raise


def _last_returns(folder: Path) -> list[float]:
    """Of the episodes of a run's last evaluation."""
    from mve.log import read_evaluations

    rows = read_evaluations(folder)
    return rows["return"][rows["step"] == rows["step"].max(initial=0)].tolist()


def _print_places(folder: Path) -> None:
    print(f"run folder   {folder}")
    print(f"curve        {folder / 'curve.png'}")
