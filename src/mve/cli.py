"""mve train | eval | resume | plot | diagnose | check | list | doctor.

Only tyro and rich are imported here: JAX and the rest wait until a command needs them, so that help and
mistakes in the command line are answered at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import sys
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text
from tyro.conf import Positional, UseAppendAction, arg

from mve.interrupt import leave_at_second_ctrl_c
from mve.messages import one_line, what_failed
from mve.usage import UsageError, parse

if TYPE_CHECKING:
    from mve.checkpoint import Which
    from mve.learner import Learner

FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130
EXIT_CODES = {
    0: "done",
    FAILED: "a check failed, or a defect of mve",
    BAD_INPUT: "bad input: the command line, a setting, a file, no room",
    3: "training diverged; the last checkpoint is from before",
    4: "the environment failed; everything before it is saved",
    129: "SIGHUP: stopped and saved",
    INTERRUPTED: "Ctrl-C: stopped and saved; at the second one, left at once",
    143: "SIGTERM: stopped and saved",
}
MOST_SEEDS = 1000  # in one program
DESCRIPTION = (
    "Sample-efficient reinforcement learning by model-based value expansion. Exit codes: "
    + ", ".join(f"{code} {what.partition(':')[0].partition(';')[0]}" for code, what in EXIT_CODES.items())
    + "."
)

Folder = Annotated[Positional[Path], arg(metavar="RUN")]
Steps = Annotated[int | None, arg(metavar="N", help_behavior_hint="")]
FunctionPath = Annotated[str | None, arg(metavar="FILE:FUNC", help_behavior_hint="")]
Settings = Annotated[UseAppendAction[list[list[str]]], arg(name="set", metavar="section.field=value")]


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
    """Any setting of config.json; several may follow."""
    reward: FunctionPath = None
    """Your JAX function (obs, action, next_obs) -> reward; learned if there is none."""
    termination: FunctionPath = None
    """Your JAX function (obs, action, next_obs) -> bool; learned if there is none."""
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
        settings = _joined(self.settings)
        if self.steps is not None:
            # Not left to learn(): memory and the spacing of evaluations follow from the budget.
            settings.append(f"train.total_steps={_at_least_one('--steps', self.steps)}")
        given: dict[str, Any] = {
            "run_dir": self.run_dir,
            "settings": settings,
            "reward_fn": _function("reward", self.reward),
            "termination_fn": _function("termination", self.termination),
            "quiet": self.quiet,
        }
        if seeds is None:
            return _learn(Learner(self.env, self.algo, seed=self.seed or 0, **given), None)
        return _learn_together(create(self.env, self.algo, seeds=seeds, **given), None)


@dataclass(frozen=True)
class OnRun:
    """What every command on a finished or stopped run is given."""

    run_folder: Folder
    """Folder of the run."""
    reward: FunctionPath = None
    """As it was given to train."""
    termination: FunctionPath = None
    """As it was given to train."""

    def load(self, *, quiet: bool = False, which: Which = "newest") -> Learner:
        """The run at its newest checkpoint, or at another."""
        from mve.learner import Learner

        return Learner.load(
            self.run_folder,
            reward_fn=_function("reward", self.reward),
            termination_fn=_function("termination", self.termination),
            quiet=quiet,
            which=which,
        )


@dataclass(frozen=True)
class Eval(OnRun):
    """Try the trained policy of a run, without noise, in environments of its own."""

    episodes: Annotated[int, arg(metavar="N")] = 10
    """How many to play."""
    best: bool = False
    """The policy whose evaluation was best, of those that were saved when evaluated; else the newest."""
    json: bool = False
    """Print the numbers as JSON."""

    def run(self) -> int:

        episodes = _at_least_one("--episodes", self.episodes)
        learner = self.load(which="best" if self.best else "newest")
        result = learner.evaluate(episodes)
        returns, lengths = result.returns.tolist(), result.lengths.tolist()
        if not self.json:
            print(f"evaluation   {_spread(returns)}")
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

        steps = None if self.steps is None else _at_least_one("--steps", self.steps)
        if not (self.run_folder / "config.json").exists() and seeds_of(self.run_folder):
            learners = self._load_seeds()
        else:
            # Killed before its first checkpoint, it begins again: config.json says all that there is.
            learners = [self.load(quiet=self.quiet, which="newest" if newest(self.run_folder) else 0)]
        done = learners[0].num_timesteps
        if steps is None and done >= learners[0].config.train.total_steps:
            raise UserError(f"{self.run_folder} has had all of its {done} steps; --steps N trains for N more")
        return _learn(learners[0], steps) if len(learners) == 1 else _learn_together(learners, steps)

    def _load_seeds(self) -> list[Learner]:
        from mve.seeds import load

        return load(
            self.run_folder,
            reward_fn=_function("reward", self.reward),
            termination_fn=_function("termination", self.termination),
            quiet=self.quiet,
        )


@dataclass(frozen=True)
class Plot:
    """Draw the learning curves of one run or several: a colour for each algorithm, a panel for each task."""

    runs: Annotated[Positional[tuple[Path, ...]], arg(metavar="RUN")]
    """Folders of the runs."""
    output: Annotated[Path, arg(metavar="PNG")] = Path("curves.png")
    """The picture to write."""

    def run(self) -> int:
        from mve.plot import curve
        from mve.types import UserError

        if not self.runs:
            raise UserError("plot: no run folder is given; see `mve plot --help`")
        print(curve(self.runs, self.output))
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
    output: Annotated[Path | None, arg(metavar="PNG")] = None
    """A picture to draw: a panel for each task."""
    csv: Annotated[Path | None, arg(metavar="CSV")] = None
    """A file to write the runs' evaluations to."""

    def run(self) -> int:
        from mve import compare
        from mve.types import UserError

        if not self.paths:
            raise UserError("compare: no run folder or CSV file is given; see `mve compare --help`")
        curves, published = compare.read_named(self.paths), compare.read(self.against)
        tasks = {curve.env for curve in curves}
        published = [c for c in published if c.env in tasks and (not self.only or c.algo in self.only)]
        steps = self.at or compare.common_steps(curves)
        table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
        for name in compare.HEADER:
            table.add_column(name, no_wrap=name != compare.HEADER[-1])
        for row in compare.table([*curves, *published], steps):
            table.add_row(*map(Text, row))
        Console(width=max(Console().width, 120)).print(table)  # every seed beside the rest
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

        episodes = _at_least_one("--episodes", self.episodes)
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

        steps = _at_least_one("--steps", self.steps)
        places = {"reward": self.reward, "termination": self.termination}
        known = Known(**{flag: _function(flag, place) for flag, place in places.items()})
        built = config.build(self.env, None, _joined(self.settings), self.seed)
        with capture_mujoco_warnings(None):
            report = check.check(host.make(built.env), known, sources=places, steps=steps, seed=self.seed)
        if self.json:
            print(json.dumps(dataclasses.asdict(report), indent=2))
        else:
            check.show(report)
        return 0 if report.agrees else FAILED


@dataclass(frozen=True)
class List:
    """Show the algorithms that --algo takes, and where each was published."""

    json: bool = False
    """Print them with all their settings as JSON."""

    def run(self) -> int:
        from mve.presets import PRESETS

        if self.json:
            presets = {name: _plain(preset._asdict()) for name, preset in PRESETS.items()}
            print(json.dumps(presets, indent=2))
            return 0
        table = Table("name", "what it is", "published", box=None, header_style="bold", padding=(0, 2, 1, 0))
        for name, preset in PRESETS.items():
            table.add_row(Text(name, "bold"), Text(preset.summary), Text(preset.paper))
        Console().print(table)
        return 0


@dataclass(frozen=True)
class Doctor:
    """Check this machine: versions, devices, drawing, MuJoCo, memory and disk."""

    json: bool = False
    """Print the findings as JSON."""

    def run(self) -> int:
        from mve.doctor import examine

        findings = examine()
        if self.json:
            print(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=2))
        else:
            table = Table("", "check", "finding", box=None, header_style="bold", padding=(0, 2, 0, 0))
            colours = {"ok": "green", "warn": "yellow", "fail": "bold red"}
            for finding in findings:
                status = Text(finding.status, colours[finding.status])
                table.add_row(status, finding.check, Text(finding.detail))  # not markup: jax[cuda13]
            Console().print(table)
        return FAILED if any(finding.status == "fail" for finding in findings) else 0


COMMANDS = {
    kind.__name__.lower(): kind
    for kind in (Train, Eval, Resume, Plot, Compare, Diagnose, Check, List, Doctor)
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code is one of EXIT_CODES."""
    if argv is None:
        leave_at_second_ctrl_c()
    try:
        command = parse(COMMANDS, DESCRIPTION, list(sys.argv[1:] if argv is None else argv))
    except UsageError as error:
        print(f"mve: {error}", file=sys.stderr)
        return BAD_INPUT
    if command is None:
        return 0
    _keep_compiled_code()
    from mve.types import DivergedError, UserError

    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            code = command.run()
        sys.stdout.flush()
        return code
    except UserError as error:
        first, *diagnosis = str(error).splitlines() if isinstance(error, DivergedError) else [str(error)]
        print(f"mve: {one_line(first)}", *(f"     {line}" for line in diagnosis), sep="\n", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # The reader has gone, as in `mve list | head -1`; Python would complain again at exit.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED


def _keep_compiled_code() -> None:
    """Have JAX keep what it compiles, so that the next run of the same sizes starts at once.

    In the user's cache folder, unless JAX was told where; JAX_ENABLE_COMPILATION_CACHE=false turns it off.
    Told by environment variables, which JAX reads when it is imported: that has to wait until a command
    needs it, and where it was imported before, it is the user's own program that decides.
    """
    if "jax" in sys.modules:
        return
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(home / "mve" / "jax"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")


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


def _show_warning(message: Warning | str, *where: Any, **more: Any) -> None:
    print(f"mve: warning: {one_line(str(message))}", file=sys.stderr)


def _learn(learner: Learner, steps: int | None) -> int:
    """Train, then say what came of it and where it lies."""
    with _saying_how_to_go_on(learner.folder, learner.folder):
        learner.learn(steps)
    returns = _last_returns(learner.folder)
    if returns:
        print(f"evaluation   {_spread(returns)}")
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
        print(f"evaluation   {_spread(means, 'seed')}")
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


def _joined(settings: list[list[str]]) -> list[str]:
    """--set may be given several times, with several assignments each."""
    return [assignment for given in settings for assignment in given]


def _at_least_one(flag: str, number: int) -> int:
    from mve.types import UserError

    if number < 1:
        raise UserError(f"{flag} {number}: it has to be 1 or more")
    return number


def _spread(returns: list[float], of: str = "episode") -> str:
    import numpy as np

    count = f"{len(returns)} {of}{'s' * (len(returns) != 1)}"
    span = f"{min(returns):.1f} to {max(returns):.1f}"
    return f"{np.mean(returns):.1f} ± {np.std(returns):.1f}   ({count}, {span})"


def _function(flag: str, place: str | None) -> Callable[..., Any] | None:
    """The user's own function. Their file is run from its text: nothing is cached beside it."""
    from mve.types import UserError

    if place is None:
        return None
    file, separator, name = place.rpartition(":")
    if not (file and separator and name):
        raise UserError(f"--{flag} {place}: write FILE:FUNC, such as rewards.py:{flag}")
    path = Path(file)
    if not path.is_file():
        raise UserError(f"--{flag} {place}: there is no file {path}")
    module = types.ModuleType(path.stem)
    module.__file__ = str(path)
    try:
        exec(compile(path.read_text(encoding="utf-8"), str(path), "exec"), module.__dict__)
    except Exception as error:  # whatever their file raises
        raise UserError(f"--{flag} {place}: {path} fails; {what_failed(error)}") from error
    found = getattr(module, name, None)
    if not callable(found):
        problem = "is not a function" if hasattr(module, name) else "is not there"
        raise UserError(f"--{flag} {place}: {name} {problem}")
    return found


def _plain(value: Any) -> Any:
    """Mappings, whatever their kind, as dictionaries, for JSON."""
    return {k: _plain(v) for k, v in value.items()} if hasattr(value, "items") else value
