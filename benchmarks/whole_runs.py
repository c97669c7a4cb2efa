"""Figures of whole runs: MBPO put together from its parts, the start of a run, rates for sums on paper."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measure import LONG, TASK, Effort, Json, Ours, compare, mve_sac, on_cores, sac, say, whole
from workers import HERE, Worker

# mbrl-lib's settings of MBPO on HalfCheetah; what is not said here is the preset's.
MBPO = [
    "agent.hidden=[512,512]",
    "agent.batch_size=256",
    "agent.layer_norm=false",
    "dynamics.hidden=[200,200,200,200]",
    "dynamics.members=7",
    "imagination.starts=100000",
    "imagination.interval_steps=250",
    "imagination.length=[1,1]",
    "imagination.rounds_kept=4",
    "train.updates_per_step=10",
]
LONGEST_START_S = 600


def mbpo_section(effort: Effort) -> Json:
    """The parts of MBPO on one core, to be put together as in the figure for mbrl-lib."""
    from mve.presets import PRESETS

    if "mbpo" not in PRESETS:
        return {"skipped": "this version of mve has no preset named mbpo"}
    settings = [*MBPO, *LONG]
    with Worker("worker_mve.py", cores=1, label="mbpo") as worker:
        worker.ask("build", name="it", algo="mbpo", task=TASK, settings=settings, fill=effort.fill)
        groups = [
            compare(
                f"MBPO: {what}, 1 core",
                part,
                {"mve": lambda count, part=part: worker.ask("learn", name="it", **{part: count})},
                effort,
                first=1,
            )
            # Rounds first: updates are to find the buffer of imagined transitions filled.
            for part, what in {
                "rounds": "rollouts",
                "fits": "model minibatches",
                "updates": "updates",
            }.items()
        ]
        groups.append(_env_steps(worker, "it", "MBPO: environment steps, 1 core", effort))
    return {"groups": whole(groups), "per_1000_steps": _due_in_1000_steps(settings), "settings": settings}


def _due_in_1000_steps(settings: list[str]) -> Json:
    """How much of everything the schedule asks for, far from the beginning."""
    from mve import config, schedule

    built, late = config.build(TASK, "mbpo", settings), 1_000_000
    counts = {"rounds": schedule.rounds_due, "fits": schedule.fits_due, "updates": schedule.updates_due}
    due = {name: count(built, late + 1000) - count(built, late) for name, count in counts.items()}
    return due | {"env_steps": 1000}


def _env_steps(worker: Worker, name: str, title: str, effort: Effort) -> Json:
    asks = {"mve": lambda steps: worker.ask("collect", name=name, steps=steps)}
    return compare(title, "env_steps", asks, effort, first=20)


def startup_section(effort: Effort) -> Json:
    """From the start of `mve train` to the first environment step, and to the first block learned; memory."""
    say("the start of mve train")
    samples: dict[str, list[Json]] = {"cold": [], "warm": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _start(folder / "cache-0", folder / "run-0")  # brings the programs' files into memory
        for i in range(1, effort.starts + 1):
            for kind in samples:  # the second one finds what the first one has compiled
                samples[kind].append(_start(folder / f"cache-{i}", folder / f"run-{i}-{kind}"))
    return {"startup": samples, "groups": [_default_loop(effort)]}


def _start(cache: Path, run: Path) -> Json:
    """Seconds until each thing that `first_step.py` reports, and its memory; it ends itself after that."""
    command = [sys.executable, str(HERE / "first_step.py"), "train", TASK, "--algo", "mve-sac", "--quiet"]
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PLATFORMS": "cpu"}
    begun, seen = time.perf_counter(), {}
    process = subprocess.Popen(
        [*command, "--run-dir", str(run)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment,
    )
    with process:
        assert process.stdout is not None
        for line in process.stdout:
            word, _, value = line.strip().partition(" ")
            seen[word] = float(value) if value else time.perf_counter() - begun
        process.wait(LONGEST_START_S)
    if "peak_rss_mb" not in seen:
        raise OSError(f"mve train ended with {process.returncode} before its first block was learned")
    return seen


def _default_loop(effort: Effort) -> Json:
    """The whole loop of `mve-sac` as it comes, for its memory beside the peers'."""
    cores = max(effort.cores)
    with Worker("worker_mve.py", cores=cores, label="memory") as worker:
        worker.ask("build", name="it", algo="mve-sac", task=TASK, settings=LONG, fill=effort.fill)
        asks = {"mve": lambda steps: worker.ask("loop", name="it", steps=steps)}
        title = f"mve-sac as it comes (4 updates per environment step), {on_cores(cores)}"
        return compare(title, "env_steps", asks, effort, rounds=2, first=20, multiple=20)


def paper_section(effort: Effort) -> Json:
    """One core's rates and the sizes of things, from which the needs of a cluster follow."""
    with Worker("worker_mve.py", cores=1, label="paper") as worker:
        ours = Ours(worker, effort)
        title = "Environment steps with the policy acting, 1 core"
        groups = [_env_steps(worker, ours.name(sac()), title, effort)]
        for spec in (sac(), mve_sac()):
            group = ours.compare(f"{spec[0]}: updates, 1 core", {spec[0]: spec})
            groups.append(group | {"sizes": worker.ask("facts", name=ours.name(spec))})
        fits = {"mve-sac": lambda count: worker.ask("learn", name=ours.name(mve_sac()), fits=count)}
        groups.append(compare("mve-sac: model minibatches, 1 core", "fits", fits, effort, first=4))
    return {"groups": whole(groups)}
