"""eval, plot, compare, diagnose and check: what runs, and users' functions, are worth."""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from rich.console import Console
from rich.table import Table
from rich.text import Text
from tyro.conf import Positional, arg

from mve.commands.codes import FAILED
from mve.commands.given import FunctionPath, OnRun, Settings, at_least_one, function, joined, spread


@dataclass(frozen=True)
class Eval(OnRun):
    """Try the trained policy of a run, without noise, in environments of its own."""

    episodes: Annotated[int, arg(metavar="N")] = 10
    """How many to play; the first are the very ones that it was evaluated in when it was trained."""
    best: bool = False
    """The policy whose evaluation was best, of those that were saved when evaluated; else the newest. It was
    chosen by its first episodes: expect less of others."""
    json: bool = False
    """Print the numbers as JSON."""

    def run(self) -> int:

        episodes = at_least_one("--episodes", self.episodes)
        learner = self.load(which="best" if self.best else "newest")
        result = learner.evaluate(episodes)
        returns, lengths = result.returns.tolist(), result.lengths.tolist()
        if not self.json:
            print(f"evaluation   {spread(returns)}")
            return 0
        facts = {
            "env": learner.spec.name,
            "algo": learner.config.algo,
            "step": learner.num_timesteps,
            "episodes": episodes,
            "mean_reward": float(result.returns.mean()),
            "std_reward": float(result.returns.std()),
            "returns": returns,
            "lengths": lengths,
        }
        print(json.dumps(facts, indent=2))
        return 0


@dataclass(frozen=True)
class Plot:
    """Draw the learning curves of one run or several: a colour for each algorithm, a panel for each task."""

    runs: Annotated[Positional[tuple[Path, ...]], arg(metavar="RUN")]
    """Folders of the runs, or of their seeds."""
    output: Annotated[Path, arg(metavar="PNG")] = Path("curves.png")
    """The picture to write."""

    def run(self) -> int:
        from mve.folders import runs_in
        from mve.plot import curve
        from mve.types import UserError

        if not self.runs:
            raise UserError("plot: no run folder is given; see `mve plot --help`")
        print(curve([run for folder in self.runs for run in runs_in(folder)], self.output))
        return 0


@dataclass(frozen=True)
class Compare:
    """Compare algorithms over their seeds: interquartile means with 95 % bootstrap intervals."""

    paths: Annotated[Positional[tuple[str, ...]], arg(metavar="[NAME=]PATH")]
    """Folders of runs or of seeds, and CSV files of suite,env,algo,seed,step,return,source; NAME, if given,
    stands in place of the algorithm's."""
    at: tuple[int, ...] = ()
    """Steps to compare at; the last one that all runs of a task have reached, if not given."""
    against: Annotated[tuple[Path, ...], arg(metavar="CSV")] = ()
    """Published curves in the same form, compared on the same tasks."""
    only: tuple[str, ...] = ()
    """Of the published ones, these algorithms."""
    alike: Annotated[tuple[str, ...], arg(metavar="PUBLISHED=TASK")] = ()
    """Published tasks that are almost one of the runs', to be shown beside it under their own name."""
    over: Annotated[str, arg(metavar="NAME")] = ""
    """The algorithm to hold the others against: how probably a seed of theirs is above one of its, and the p
    of the rank test."""
    output: Annotated[Path | None, arg(metavar="PNG")] = None
    """A picture to draw: a panel for each task."""
    csv: Annotated[Path | None, arg(metavar="CSV")] = None
    """A file to write the runs' evaluations to."""

    def run(self) -> int:
        from mve import compare
        from mve.plot import thousands
        from mve.types import UserError

        if not self.paths:
            raise UserError("compare: no run folder or CSV file is given; see `mve compare --help`")
        every, published = compare.read_named(self.paths), compare.read(self.against)
        curves = [curve for curve in every if len(curve.step)]
        if not curves:
            raise UserError("compare: none of these runs has been evaluated yet; come back once one has")
        if silent := len(every) - len(curves):
            print(f"compare: {silent} of {len(every)} runs not evaluated yet, left out", file=sys.stderr)
        compare.refuse_twice(curves)
        tasks, own = {curve.task for curve in curves}, {curve.algo for curve in curves}
        published = [
            c._replace(algo=f"{c.algo} (published)") if c.algo in own else c
            for c in compare.beside(published, tasks, self.only, self.alike)
        ]
        steps = self.at or compare.common_steps(curves)
        rows = compare.table([*curves, *published], steps)
        tables: list[tuple[tuple[str, ...], list[tuple[str, ...]]]] = [(compare.HEADER, rows)]
        if self.over:
            tables.append((compare.AGAINST, compare.held_against(self.over, [*curves, *published], steps)))
        for header, lines in tables:
            table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
            for name in header:
                table.add_column(name, no_wrap=name != compare.HEADER[-1])
            for row in lines:
                table.add_row(*map(Text, row))
            Console(width=max(Console().width, 120)).print(table)  # every seed beside the rest
        if any(row[4].startswith(compare.BETWEEN) for row in rows):
            print(f"{compare.BETWEEN} between evaluations before and after that step", file=sys.stderr)
        if late := [step for step in steps if all(row[2] != thousands(float(step)) for row in rows)]:
            print(
                f"compare: nothing has been evaluated about step {', '.join(map(str, late))}", file=sys.stderr
            )
        if self.csv:
            print(compare.write_csv(curves, self.csv))
        if self.output:
            print(compare.picture(curves, published, self.output, max(self.at, default=None)))
        return 0


@dataclass(frozen=True)
class Diagnose(OnRun):
    """Measure a run's model, critic and targets against fresh episodes, and its simulator set to states."""

    output: Annotated[Path | None, arg(metavar="DIR", help_behavior_hint="")] = None
    """Folder for diagnosis.json and diagnosis.png; RUN/diagnosis if not given."""
    episodes: Annotated[int, arg(metavar="N")] = 5
    """How many to play, or to remember."""
    replay: bool = False
    """Play none: judge on the newest episodes that the run remembers."""
    json: bool = False
    """Print the numbers as JSON."""

    def run(self) -> int:
        from mve import diagnose

        episodes = at_least_one("--episodes", self.episodes)
        learner = self.load()
        report = diagnose.diagnose(learner, episodes, from_replay=self.replay)
        folder = diagnose.write(report, self.output or self.run_folder / "diagnosis")
        print(json.dumps(report, indent=2) if self.json else diagnose.summary(report, folder))
        return 0


@dataclass(frozen=True)
class Check:
    """Score reward and termination functions on real steps; without any, those that are shipped."""

    env: Annotated[Positional[str], arg(metavar="ENV")]
    """Gymnasium id, such as Pendulum-v1 or HalfCheetah-v5."""
    reward: FunctionPath = None
    """Your JAX function (obs, action, next_obs) -> reward."""
    termination: FunctionPath = None
    """Your JAX function (obs, action, next_obs) -> bool."""
    steps: Annotated[int, arg(metavar="N")] = 2000
    """Real steps to play, with random actions."""
    seed: int = 0
    """Of the steps."""
    settings: Settings = dataclasses.field(default_factory=list)
    """Settings of the environment, as they are given to train."""
    json: bool = False
    """Print the scores as JSON."""

    def run(self) -> int:
        from mve import check, config
        from mve.envs import host
        from mve.log import capture_mujoco_warnings
        from mve.types import Known

        steps = at_least_one("--steps", self.steps)
        places = {"reward": self.reward, "termination": self.termination}
        known = Known(**{flag: function(flag, place) for flag, place in places.items()})
        built = config.build(self.env, None, joined(self.settings), self.seed)
        with capture_mujoco_warnings(None):
            report = check.check(host.make(built.env), known, sources=places, steps=steps, seed=self.seed)
        if self.json:
            print(json.dumps(dataclasses.asdict(report), indent=2))
        else:
            check.show(report)
        return 0 if report.agrees else FAILED
