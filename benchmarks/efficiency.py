"""Sample efficiency: the flagship, its ablations and its rivals here, over tasks and seeds.

    python benchmarks/efficiency.py train FOLDER --tasks Hopper-v4 Walker2d-v4 --seeds 0 1 2 --steps 25000
    python benchmarks/efficiency.py report FOLDER --csv results/NAME.csv --document docs/sample-efficiency.md

`train` keeps a run on every core, pinned to it, until all have had their steps. Interrupt it, move FOLDER to
another machine, say the same again: what was interrupted goes on from its checkpoints, what is done stays.
`report` writes every evaluation as a CSV of suite,env,algo,seed,step,return,source, and the tables: presets
beside what was published, and the flagship with a setting changed.
"""

from __future__ import annotations

import argparse
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

import machine
import pages

if TYPE_CHECKING:
    from mve.compare import Curve

ROOT = Path(__file__).resolve().parent.parent
EVALUATIONS = ("evaluate.interval_steps=5000", "evaluate.episodes=10")


class Variant(NamedTuple):
    """A preset and what is set differently."""

    algo: str
    settings: tuple[str, ...] = ()


FLAGSHIP = "flagship"
# Two that would be the next flagship, if they hold on all tasks.
FALLING_RATE = ("agent.actor_rate_falls_after=10000",)
# As the flagship was before, one upon the other.
LOOSE_MODEL = (
    "dynamics.norm_inputs=true",
    "dynamics.layer_norm=false",
    "dynamics.weight_decay=0.001",
    "dynamics.bootstrap=true",
)
FEWER_FITS = (
    *LOOSE_MODEL,
    "dynamics.fits_per_refit=60",
    "dynamics.batch_size=256",
    "dynamics.learning_rate=0.001",
)
BEFORE = (*FEWER_FITS, "dynamics.stay_in_data=false", "agent.average_share=0")
VARIANTS = {
    FLAGSHIP: Variant("mve-svg"),
    "falling-rate": Variant("mve-svg", FALLING_RATE),
    "three-real-steps": Variant("mve-svg", (*FALLING_RATE, "targets.n_step=3")),
    "eight-real-steps": Variant("mve-svg", (*FALLING_RATE, "targets.n_step=8")),
    "loose-model": Variant("mve-svg", LOOSE_MODEL),
    "fewer-fits": Variant("mve-svg", FEWER_FITS),
    "model-unbounded": Variant("mve-svg", BEFORE),
    "gamma-0.99": Variant("mve-svg", (*BEFORE, "targets.discount=0.99")),
    "no-real-rows": Variant("mve-svg", ("imagination.real_share=0",)),
    "slow-targets": Variant("mve-svg", ("agent.target_rate=0.005",)),
    "uniform-replay": Variant("mve-svg", ("replay.recency=1",)),
    "five-steps": Variant("mve-svg", ("agent.model_steps=5", "targets.horizon_steps=4")),
    "short-branches": Variant("mve-svg", ("imagination.length=[5,5]",)),
    "preserved-values": Variant("mve-svg", ("agent.preserve_values=true",)),
    "histogram-critics": Variant("mve-svg", ("agent.value_bins=101",)),
    "trusted-branches": Variant("mve-svg", ("imagination.trust=2",)),
    "honest-noise": Variant("mve-svg", ("dynamics.bootstrap=true", "dynamics.noise_rows=unseen")),
    "resets": Variant("mve-svg", ("agent.reset_optimisers=true",)),
    "mve-sac": Variant("mve-sac"),
    "dhmbpo": Variant("dhmbpo"),
}


class Job(NamedTuple):
    """One run: a task, a variant, a seed."""

    task: str
    variant: str
    seed: int

    def folder(self, root: Path) -> Path:
        return root / self.task.replace("/", "-") / self.variant / f"seed-{self.seed}"


def command(job: Job, root: Path, steps: int) -> list[str] | None:
    """What starts the run, or goes on with it; None if it has had its steps."""
    from mve.checkpoint import steps as saved_steps

    folder = job.folder(root)
    mve = [sys.executable, "-m", "mve"]
    if (folder / "config.json").exists():
        done = max(saved_steps(folder / "checkpoints"), default=0)
        return (
            [*mve, "resume", str(folder), "--steps", str(steps - done), "--quiet"] if done < steps else None
        )
    variant = VARIANTS[job.variant]
    run = ["train", job.task, "--algo", variant.algo, "--seed", str(job.seed), "--steps", str(steps)]
    return [*mve, *run, "--run-dir", str(folder), "--quiet", "--set", *EVALUATIONS, *variant.settings]


def train(root: Path, jobs: Sequence[Job], steps: int) -> int:
    """Every job in its turn, one for each core; how many failed."""
    waiting: queue.SimpleQueue[Job] = queue.SimpleQueue()
    for job in jobs:
        waiting.put(job)
    failed: list[Job] = []

    def work(core: int) -> None:
        while True:
            try:
                job = waiting.get_nowait()
            except queue.Empty:
                return
            if (asked := command(job, root, steps)) is None:
                continue
            folder = job.folder(root)
            folder.mkdir(parents=True, exist_ok=True)
            with (folder.parent / f"{folder.name}.log").open("a") as log:
                code = subprocess.run(pinned(asked, core), stdout=log, stderr=log, check=False).returncode
            print(
                f"{job.task} {job.variant} seed {job.seed}: {f'exit {code}' if code else 'done'}", flush=True
            )
            if code:
                failed.append(job)

    threads = [threading.Thread(target=work, args=(core,)) for core in machine.available_cores()]
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
    """The runs' evaluations as CSV, and their tables beside what was published."""
    from mve import compare

    folders = [folder for folder in sorted(root.glob("*/*")) if folder.name in VARIANTS]
    curves = compare.read_named([f"{folder.name}={folder}" for folder in folders])
    if not curves:
        print(f"efficiency: {root} holds no runs; `train` makes them", file=sys.stderr)
        return 2
    tasks = {curve.env for curve in curves}
    published = [c for c in compare.read([options.published]) if c.env in tasks and c.algo in options.against]
    order = list(VARIANTS)
    curves.sort(key=lambda curve: (curve.env, order.index(curve.algo)))
    presets = [curve for curve in curves if not VARIANTS[curve.algo].settings]
    changed = [curve for curve in curves if VARIANTS[curve.algo].settings]
    at = options.at or compare.common_steps(presets or curves)
    parts = [markdown(compare.HEADER, compare.table([*presets, *published], at))]
    if changed:
        parts.append(markdown(*ablations(curves, options.ablations_at or max(at))))
    text = "\n\n".join([*parts, markdown(TIMES, times(folders))])
    print(text)
    for those, path in ((presets, options.csv), (changed, options.ablations_csv)):
        if path:
            compare.write_csv(those, path)
    if options.document:
        options.document.write_text(pages.put_figures(options.document.read_text(), text))
    return 0


def ablations(curves: Sequence[Curve], step: int) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and rows: the flagship, and it with a setting changed; each seed's return at a step, by task."""
    from mve import compare

    tasks = list(dict.fromkeys(curve.env for curve in curves))
    cells = {
        (task, name): f"{middle}: {seeds.replace(' ', ', ')}"
        for task, name, _, _, middle, _, _, seeds in compare.table(curves, [step])
    }
    run = {curve.algo for curve in curves}
    rows = [
        (" ".join(variant.settings) or "nothing", *(cells.get((task, name), "") for task in tasks))
        for name, variant in VARIANTS.items()
        if name == FLAGSHIP or (variant.settings and name in run)
    ]
    return (f"changed; IQM [95 %]: every seed, at {step}", *tasks), rows


TIMES = ("task", "algorithm", "runs", "steps", "minutes a run", "ms a step", "device")


def times(folders: Sequence[Path]) -> list[tuple[str, ...]]:
    """Wall-clock by task and variant: the median of the runs, each on its own core where they are pinned."""
    from mve.folders import seeds_of
    from mve.log import read_json, read_metrics

    rows = []
    for folder in folders:
        runs = seeds_of(folder)
        records = [read_metrics(run) for run in runs]
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
    reporting = commands.add_parser("report", help="write CSV and tables")
    reporting.add_argument("folder", type=Path)
    reporting.add_argument("--at", nargs="+", type=int, help="steps of the table (the last that all reached)")
    reporting.add_argument("--ablations-at", type=int, help="step of their table (the last of --at)")
    reporting.add_argument("--published", type=Path, default=ROOT / "results" / "published.csv")
    reporting.add_argument("--against", nargs="+", default=["DHMBPO", "MBPO", "MACURA", "DR.Q", "FlashSAC"])
    reporting.add_argument("--csv", type=Path, help="where the presets' evaluations are to go")
    reporting.add_argument("--ablations-csv", type=Path, help="where the other variants' are to go")
    reporting.add_argument("--document", type=Path, help="a page whose tables are to be replaced")
    options = parser.parse_args(argv)
    if options.command == "report":
        return report(options.folder, options)
    # Seed by seed, so that what is interrupted has some seeds of everything.
    jobs = [
        Job(task, variant, seed)
        for seed in options.seeds
        for task in options.tasks
        for variant in options.variants
    ]
    return int(train(options.folder, jobs, options.steps) > 0)


if __name__ == "__main__":
    sys.exit(main())
