"""Sample efficiency: the flagship, its ablations and its rivals here, over tasks and seeds.

    python benchmarks/efficiency.py train FOLDER --tasks Hopper-v4 Walker2d-v4 --seeds 0 1 2 --steps 25000
    python benchmarks/efficiency.py train FOLDER --seeds 0 1 2 3 4 5 6 7 --together --programs 3 --aside
    python benchmarks/efficiency.py report FOLDER --csv results/NAME.csv --document docs/sample-efficiency.md

`train` keeps a run on every core, pinned to it, until all have had their steps; with --together, for a GPU,
all seeds of a task are one program, --programs of which run at a time, and with --aside their evaluations are
played while training goes on (`aside.py`). Interrupt it, move FOLDER to another machine, say the same again:
what was interrupted goes on from its checkpoints, what is done stays.
`report` writes every evaluation as a CSV of suite,env,algo,seed,step,return,source, and the tables: presets
beside what was published, and the flagship with a setting changed. The files are added to: what FOLDER has of
a task and a variant takes the place of all that they had of it, and the rest stays.
"""

from __future__ import annotations

import argparse
import csv
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np

import machine
import pages
from mve.types import UserError

if TYPE_CHECKING:
    from mve.compare import Curve

T = TypeVar("T")

ROOT = Path(__file__).resolve().parent.parent
# What is stopped early has to begin as what it stands beside did, not after a fifth of its own steps.
STARTS = ("train.learning_starts", "dynamics.learning_starts")
RIVALS = ["DHMBPO", "MBPO", "MACURA", "DR.Q", "FlashSAC", "CrossQ"]
# Published tasks that are almost one of ours: a small contact cost more; only a part of the observation.
ALIKE = ("Ant-v4-MB27=Ant-v4", "Humanoid-v4-trunc45=Humanoid-v4")
EVALUATIONS = ("evaluate.interval_steps=5000", "evaluate.episodes=10")


class Variant(NamedTuple):
    """A preset and what is set differently."""

    algo: str
    settings: tuple[str, ...] = ()


FLAGSHIP = "flagship"
NO_SUMS = ("targets.n_step=1", "targets.n_step_drawn=false")
# A model whose fit nothing holds back.
LOOSE = (
    "dynamics.norm_inputs=true",
    "dynamics.layer_norm=false",
    "dynamics.weight_decay=0.001",
    "dynamics.bootstrap=true",
)
LARGE_MINIBATCHES = ("dynamics.batch_size=256", "dynamics.learning_rate=0.001")
# Histograms that end at the bounds of values, as they did in the runs on a CPU.
TIGHT_BOUNDS = ("agent.spare_bins=0",)
BOLD_ACTOR = (*TIGHT_BOUNDS, "agent.actor_value=mean")
# As the flagship was before, one upon the other; the oldest averaged actors over some 200 updates, or never.
MEAN_CRITICS = (*BOLD_ACTOR, "agent.value_bins=0")
MEANS = (*MEAN_CRITICS, "targets.n_step_warmup=true")
ONE_REAL_STEP = (*MEANS, "agent.actor_rate_falls_after=0", *NO_SUMS)
LOOSE_MODEL = (*ONE_REAL_STEP, *LOOSE)
FEWER_FITS = (*LOOSE_MODEL, "dynamics.fits_per_refit=60", *LARGE_MINIBATCHES)
BEFORE = (*FEWER_FITS, "dynamics.stay_in_data=false", "agent.average_share=0")
# What was changed of the flagship when its critics learned means.
RECENT_SUMS = (*MEAN_CRITICS, "targets.n_step_within=4000")
CALIBRATED = (*MEANS, "targets.estimator=calibrated", "targets.horizon_steps=3")
LEARNED_ENDS = (*MEANS, "dynamics.termination=learned")
# To begin with: as many as where ends are known.
MORE_UPDATES = (*LEARNED_ENDS, "train.initial_updates=5000")
VARIANTS = {
    FLAGSHIP: Variant("mve-svg"),
    "tight-bounds": Variant("mve-svg", TIGHT_BOUNDS),
    "bold-actor": Variant("mve-svg", BOLD_ACTOR),
    "histogram-critics": Variant("mve-svg", (*BOLD_ACTOR, "targets.n_step_warmup=true")),
    "no-warm-up-sums": Variant("mve-svg", MEAN_CRITICS),
    "means": Variant("mve-svg", MEANS),
    "steady-rate": Variant("mve-svg", (*MEANS, "agent.actor_rate_falls_after=0")),
    "falling-rate": Variant("mve-svg", (*MEANS, *NO_SUMS)),
    "three-real-steps": Variant("mve-svg", (*MEANS, "targets.n_step=3", "targets.n_step_drawn=false")),
    "eight-real-steps": Variant("mve-svg", (*MEANS, "targets.n_step_drawn=false")),
    "recent-sums": Variant("mve-svg", RECENT_SUMS),
    "wide-bounds": Variant("mve-svg", (*MEANS, "agent.value_margin=1")),
    "recent-sums-wide-bounds": Variant("mve-svg", (*RECENT_SUMS, "agent.value_margin=1")),
    "one-real-step": Variant("mve-svg", ONE_REAL_STEP),
    "loose-model": Variant("mve-svg", LOOSE_MODEL),
    "fewer-fits": Variant("mve-svg", FEWER_FITS),
    "model-unbounded": Variant("mve-svg", BEFORE),
    "gamma-0.99": Variant("mve-svg", (*BEFORE, "targets.discount=0.99")),
    # one_step in other words: its runs were made before the flagship took that.
    "no-expansion": Variant("mve-svg", (*MEANS, "targets.estimator=lambda", "targets.trace_decay=0")),
    "calibrated": Variant("mve-svg", CALIBRATED),
    "calibrated-pairs": Variant("mve-svg", (*CALIBRATED, "targets.members=2")),
    "no-value-gradients": Variant("mve-svg", (*MEANS, "agent.model_steps=0")),
    "no-real-rows": Variant("mve-svg", (*MEANS, "imagination.real_share=0", *NO_SUMS)),
    "slow-targets": Variant("mve-svg", (*MEANS, "agent.target_rate=0.005")),
    "uniform-replay": Variant("mve-svg", (*MEANS, "replay.recency=1")),
    "five-members": Variant("mve-svg", (*MEANS, "dynamics.members=5")),
    "five-steps": Variant("mve-svg", (*MEANS, "agent.model_steps=5", "targets.horizon_steps=4")),
    "short-branches": Variant("mve-svg", (*MEANS, "imagination.length=[5,5]")),
    "preserved-values": Variant("mve-svg", (*MEANS, "agent.preserve_values=true")),
    "trusted-branches": Variant("mve-svg", (*MEANS, "imagination.trust=2")),
    "learned-termination": Variant("mve-svg", LEARNED_ENDS),
    "learned-termination-more-updates": Variant("mve-svg", MORE_UPDATES),
    "termination-net": Variant("mve-svg", (*MORE_UPDATES, "dynamics.limits=false")),
    "honest-noise": Variant("mve-svg", (*MEANS, "dynamics.bootstrap=true", "dynamics.noise_rows=unseen")),
    "learned-ends": Variant("mve-svg", ("dynamics.termination=learned",)),
    "real-rows": Variant("mve-svg", ("imagination.real_share=1",)),
    "corrected": Variant("mve-svg", ("dynamics.on_policy_corrections=true",)),
    "resets": Variant("mve-svg", ("agent.reset_optimisers=true",)),
    "two-updates": Variant("mve-svg", ("train.updates_per_step=2",)),
    "mve-sac": Variant("mve-sac"),
    "dhmbpo": Variant("dhmbpo"),
    # As the preset was before its model's fit was the flagship's.
    "dhmbpo-loose": Variant(
        "dhmbpo",
        (
            *LOOSE,
            "dynamics.fits_per_refit=240",
            *LARGE_MINIBATCHES,
            "dynamics.holdout_share=0.2",
            "agent.hidden_gain=1",
            "train.initial_updates=4000",
        ),
    ),
}


class Job(NamedTuple):
    """A task, a variant, and the seeds of one program: one, or several side by side."""

    task: str
    variant: str
    seeds: tuple[int, ...]

    def folder(self, root: Path) -> Path:
        """Of the run, or of the runs; a seed's folder is the same either way."""
        runs = root / self.task.replace("/", "-") / self.variant
        return runs / f"seed-{self.seeds[0]}" if len(self.seeds) == 1 else runs

    def __str__(self) -> str:
        named = f"seed{'s' * (len(self.seeds) > 1)} {','.join(map(str, self.seeds))}"
        return f"{self.task} {self.variant} {named}"


def command(
    job: Job, root: Path, steps: int, learning_starts: int | None = None, *, aside: bool = False
) -> list[str] | None:
    """What starts the program, or goes on with it; None if its runs have had their steps."""
    from mve.folders import seeds_of

    folder = job.folder(root)
    mve = [sys.executable, *([str(ROOT / "benchmarks" / "aside.py")] if aside else ["-m", "mve"])]
    if begun := [folder] if (folder / "config.json").exists() else seeds_of(folder):
        done = min(_steps_of(run) for run in begun)
        return (
            [*mve, "resume", str(folder), "--steps", str(steps - done), "--quiet"] if done < steps else None
        )
    variant = VARIANTS[job.variant]
    seeds = ["--seed" if len(job.seeds) == 1 else "--seeds", ",".join(map(str, job.seeds))]
    run = ["train", job.task, "--algo", variant.algo, *seeds, "--steps", str(steps)]
    settings = list(EVALUATIONS)
    if learning_starts is not None and variant.algo == VARIANTS[FLAGSHIP].algo:
        settings += [f"{name}={learning_starts}" for name in STARTS]
    return [*mve, *run, "--run-dir", str(folder), "--quiet", "--set", *settings, *variant.settings]


def other_seeds(job: Job, root: Path) -> list[str]:
    """The runs that one program would go on with, where they are not those of the job."""
    from mve.folders import seeds_of

    found = [run.name for run in seeds_of(job.folder(root))]
    return found if set(found) != {f"seed-{seed}" for seed in job.seeds} else []


def _steps_of(run: Path) -> int:
    from mve.checkpoint import steps as saved_steps

    return max(saved_steps(run / "checkpoints"), default=0)


def train(
    root: Path,
    jobs: Sequence[Job],
    steps: int,
    *,
    learning_starts: int | None = None,
    programs: int = 0,
    aside: bool = False,
) -> int:
    """Every job in its turn, one for each core, or so many `programs` that share them; how many failed."""
    waiting: queue.SimpleQueue[Job] = queue.SimpleQueue()
    for job in jobs:
        waiting.put(job)
    failed: list[Job] = []

    def work(core: int | None) -> None:
        while True:
            try:
                job = waiting.get_nowait()
            except queue.Empty:
                return
            if (asked := command(job, root, steps, learning_starts, aside=aside)) is None:
                continue
            folder = job.folder(root)
            folder.parent.mkdir(parents=True, exist_ok=True)
            asked = asked if core is None else pinned(asked, core)
            with (folder.parent / f"{folder.name}.log").open("a") as log:
                code = subprocess.run(asked, stdout=log, stderr=log, check=False).returncode
            print(f"{job}: {f'exit {code}' if code else 'done'}", flush=True)
            if code:
                failed.append(job)

    cores = [None] * programs or machine.available_cores()
    threads = [threading.Thread(target=work, args=(core,)) for core in cores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return len(failed)


def pinned(asked: list[str], core: int) -> list[str]:
    """The same on one core (Linux): two runs on a core each get more done than both on both."""
    if not hasattr(os, "sched_setaffinity"):
        return asked
    code = f"import os, sys; os.sched_setaffinity(0, [{core}]); os.execv(sys.argv[1], sys.argv[1:])"
    return [sys.executable, "-c", code, *asked]


def report(root: Path, options: argparse.Namespace) -> int:
    """The runs' evaluations as CSV, and their tables beside what was published and what the files had."""
    from mve import compare

    folders = [folder for folder in sorted(root.glob("*/*")) if folder.name in VARIANTS]
    fresh = compare.read_named([f"{folder.name}={folder}" for folder in folders])
    if not fresh:
        raise UserError(f"{root} holds no runs; `train` makes them")
    files = [path for path in (options.csv, options.ablations_csv) if path and path.exists()]
    curves = [*fresh, *others(compare.read(files), fresh, lambda curve: (curve.task, curve.algo))]
    if unknown := {curve.algo for curve in curves} - set(VARIANTS):
        named = ", ".join(sorted(unknown))
        raise UserError(
            f"{' or '.join(map(str, files))} has {named}, which VARIANTS has not; rename or remove"
        )
    tasks = {curve.task for curve in curves}
    known = compare.read([options.published])
    alike = [pair for pair in ALIKE if pair.partition("=")[0] in {curve.task for curve in known}]
    only = [algo for algo in options.against if algo in {curve.algo for curve in known}]
    published = compare.beside(known, tasks, only, alike) if only else []
    order = list(VARIANTS)
    curves.sort(key=lambda curve: (curve.task, order.index(curve.algo)))
    presets = [curve for curve in curves if not VARIANTS[curve.algo].settings]
    changed = [curve for curve in curves if VARIANTS[curve.algo].settings]
    at = options.at or compare.common_steps(presets or curves)
    reached = {(task, step) for task, _, step, *_ in compare.table(presets or curves, at)}
    rows = compare.table([*presets, *published], at)
    parts = [markdown(compare.HEADER, [row for row in rows if (row[0], row[2]) in reached])]
    if changed:
        parts += [markdown(*ablations(curves, step)) for step in options.ablations_at or [max(at)]]
    spent = with_others(options.times_csv, times(folders))
    text = "\n\n".join([*parts, markdown(TIMES, spent)])
    print(text)
    for those, path in ((presets, options.csv), (changed, options.ablations_csv)):
        if path:
            compare.write_csv(those, path)
    if options.times_csv:
        with options.times_csv.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([TIMES, *spent])
    if options.document:
        options.document.write_text(pages.put_figures(options.document.read_text(), text))
    return 0


def others(known: Sequence[T], fresh: Sequence[T], name: Callable[[T], object]) -> list[T]:
    """What is known of tasks and variants, their name, of which there is nothing fresh: seeds of one name and
    two versions of the code are not mixed."""
    renewed = set(map(name, fresh))
    return [one for one in known if name(one) not in renewed]


def with_others(path: Path | None, fresh: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Rows of TIMES, with those of the file whose task and variant are not among them."""
    known: Sequence[tuple[str, ...]] = ()
    if path and path.exists():
        with path.open(encoding="utf-8", newline="") as file:
            header, *known = map(tuple, csv.reader(file))
        if header != TIMES:
            raise UserError(f"{path} has other columns than {','.join(TIMES)}")
    return sorted([*fresh, *others(known, fresh, lambda row: row[:2])])


def ablations(curves: Sequence[Curve], step: int) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and rows: the flagship, and it or a preset with a setting changed, where they have come so far;
    each seed's return at the step, by task."""
    from mve import compare

    tasks = list(dict.fromkeys(curve.task for curve in curves))
    cells = {
        (task, name): f"{middle}: {seeds.replace(' ', ', ')}"
        for task, name, _, _, middle, _, _, seeds in compare.table(curves, [step])
    }
    run = {algo for _, algo in cells}
    rows: list[tuple[str, ...]] = []
    for name, variant in VARIANTS.items():
        if name == FLAGSHIP or (variant.settings and name in run):
            rows.append((name, changes(name), *(cells.get((task, name), "") for task in tasks)))
    return (f"at {step}", "changed", *(f"{task}: IQM [95 %]: every seed" for task in tasks)), rows


def changes(name: str) -> str:
    """What a variant changes, in words: its settings beyond those of the variant that has most of them, which
    is named where it is not the flagship."""
    algo, settings = VARIANTS[name]
    if not settings:
        return "nothing"
    base, count = FLAGSHIP if algo == VARIANTS[FLAGSHIP].algo else algo, 0
    for other, (theirs, begun) in VARIANTS.items():
        if theirs == algo and count < len(begun) < len(settings) and settings[: len(begun)] == begun:
            base, count = other, len(begun)
    return " ".join([*([] if base == FLAGSHIP else [f"{base}, and"]), *settings[count:]])


TIMES = ("task", "algorithm", "runs", "steps", "minutes a run", "ms a step", "device")


def times(folders: Sequence[Path]) -> list[tuple[str, ...]]:
    """Wall-clock by task and variant: the median of the runs, each on its own core where they are pinned, and
    that of all of them where they were one program."""
    from mve.folders import seeds_of
    from mve.log import read_json, read_metrics

    rows = []
    for folder in folders:
        runs = seeds_of(folder)
        records = [found for run in runs if "time/time_elapsed" in (found := read_metrics(run))]
        if not records:
            continue  # begun just now
        seconds, steps = (
            float(np.median([record[name][-1] for record in records]))
            for name in ("time/time_elapsed", "time/total_timesteps")
        )
        [device, *_] = read_json(runs[0] / "versions.json")["devices"]
        kind = machine.facts()["cpu"] if device["kind"] == "cpu" else device["kind"]
        numbers = f"{steps:.0f}", f"{seconds / 60:.1f}", f"{1e3 * seconds / steps:.1f}"
        rows.append((folder.parent.name, folder.name, str(len(runs)), *numbers, str(kind)))
    return rows


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    training = commands.add_parser("train", help="start or go on with runs")
    training.add_argument("folder", type=Path)
    training.add_argument("--tasks", nargs="+", default=["HalfCheetah-v4", "Hopper-v4", "Walker2d-v4"])
    training.add_argument("--variants", nargs="+", choices=VARIANTS, default=["flagship"])
    training.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    training.add_argument("--steps", type=int, default=25_000)
    training.add_argument(
        "--learning-starts",
        type=int,
        metavar="STEP",
        help="where new runs of the flagship begin to learn (as early as --steps has them)",
    )
    training.add_argument("--together", action="store_true", help="all seeds of a task in one program")
    training.add_argument("--programs", type=int, metavar="N", help="at a time, on no core of their own")
    training.add_argument("--aside", action="store_true", help="evaluate in processes beside the training")
    reporting = commands.add_parser("report", help="write CSV and tables")
    reporting.add_argument("folder", type=Path)
    reporting.add_argument("--at", nargs="+", type=int, help="steps of the table (the last that all reached)")
    reporting.add_argument("--ablations-at", nargs="+", type=int, help="a table each (the last of --at)")
    reporting.add_argument("--published", type=Path, default=ROOT / "results" / "published.csv")
    reporting.add_argument("--against", nargs="+", default=RIVALS)
    reporting.add_argument("--csv", type=Path, help="where the presets' evaluations are to go")
    reporting.add_argument("--ablations-csv", type=Path, help="where the other variants' are to go")
    reporting.add_argument("--times-csv", type=Path, help="where wall-clock and devices are to go")
    reporting.add_argument("--document", type=Path, help="a page whose tables are to be replaced")
    options = parser.parse_args(argv)
    try:
        return report(options.folder, options) if options.command == "report" else start(options)
    except UserError as error:
        print(f"efficiency: {error}", file=sys.stderr)
        return 2


def start(options: argparse.Namespace) -> int:
    """The runs that are asked for."""
    # Seed by seed, so that what is interrupted has some seeds of everything.
    groups = [tuple(options.seeds)] if options.together else [(seed,) for seed in options.seeds]
    jobs = [
        Job(task, variant, seeds)
        for seeds in groups
        for task in options.tasks
        for variant in options.variants
    ]
    for job in jobs:
        if begun := other_seeds(job, options.folder):
            raise UserError(f"{job}: {job.folder(options.folder)} has {' '.join(begun)}; ask for those")
    failed = train(
        options.folder,
        jobs,
        options.steps,
        learning_starts=options.learning_starts,
        programs=options.programs or int(options.together),
        aside=options.aside,
    )
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
