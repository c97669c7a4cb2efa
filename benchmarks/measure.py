"""What the sections share: how long to measure, common settings, and one comparison as plain data."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import machine
from workers import Ask, Worker, WorkerFailed, take_turns

Json = dict[str, Any]

TASK = "HalfCheetah-v5"
SAME = ["agent.hidden=[256,256]", "agent.batch_size=256", "agent.layer_norm=false"]
MODEL = ["dynamics.hidden=[256,256,256,256]", "dynamics.members=5", "targets.horizon_steps=3"]
# A budget that is never reached, the peers' size of buffer, and no long first fit before the measurement.
LONG = ["train.total_steps=10000000", "replay.capacity=100000", "dynamics.initial_fits=50"]


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How long to measure, and how much."""

    quick: bool
    rounds: int  # samples of each
    curve_rounds: int  # of each on a curve
    seconds: float  # of each sample
    fill: int  # random transitions in the buffers
    cores: tuple[int, ...]
    starts: int  # of `mve train`, cold and warm each

    @classmethod
    def of(cls, quick: bool) -> Effort:
        cores = tuple(count for count in (1, 2) if count <= len(machine.available_cores()))
        if quick:
            return cls(quick=True, rounds=2, curve_rounds=1, seconds=0.3, fill=500, cores=cores[:1], starts=1)
        return cls(quick=False, rounds=5, curve_rounds=3, seconds=1.8, fill=10_000, cores=cores, starts=3)


def say(text: str) -> None:
    print(f"  {text}", file=sys.stderr, flush=True)


def on_cores(count: int) -> str:
    return f"{count} core{'s' * (count != 1)}"


def compare(
    title: str,
    per: str,
    asks: dict[str, Ask],
    effort: Effort,
    *,
    rounds: int | None = None,
    first: int = 8,
    multiple: int = 1,
    baseline: str | None = None,
) -> Json:
    """One comparison, taken in turns: `per` names the count in the answers that is divided by seconds."""
    say(title)
    samples, failed = take_turns(
        asks, rounds=rounds or effort.rounds, seconds=effort.seconds, first=first, multiple=multiple
    )
    return {
        "title": title,
        "per": per,
        "baseline": baseline or next(iter(asks), ""),
        "arms": {name: {"samples": taken} for name, taken in samples.items()},
        "missing": failed,
    }


def whole(groups: list[Json]) -> list[Json]:
    """The same comparisons, if nothing is missing of what will be added up; else WorkerFailed."""
    for group in groups:
        for name, reason in group["missing"].items():
            raise WorkerFailed(f"{group['title']}: {name}: {reason}")
    return groups


Spec = tuple[str, ...]  # algorithm, then settings


def sac(*settings: str) -> Spec:
    return "sac", *SAME, *LONG, *settings


def mve_sac(*settings: str) -> Spec:
    return "mve-sac", *SAME, *MODEL, *LONG, *settings


class Ours:
    """A worker of ours that holds many learners, each asked for updates alone."""

    def __init__(self, worker: Worker, effort: Effort):
        self.worker, self.effort = worker, effort
        self._facts: dict[Spec, Json] = {}

    def name(self, spec: Spec) -> str:
        """Of the learner, which is built when first asked for."""
        name = " ".join(spec)
        if spec not in self._facts:
            algo, *settings = spec
            fill = self.effort.fill
            self.worker.ask("build", name=name, algo=algo, task=TASK, settings=settings, fill=fill)
            self._facts[spec] = self.worker.ask("flops", name=name)
        return name

    def facts(self, spec: Spec) -> Json:
        """FLOPs of an update, counted in several ways."""
        self.name(spec)
        return self._facts[spec]

    def updates(self, spec: Spec) -> Ask:
        name = self.name(spec)
        return lambda count: self.worker.ask("learn", name=name, updates=count)

    def compare(self, title: str, specs: dict[str, Spec], rounds: int | None = None) -> Json:
        """Updates a second, the first one's being the baseline, with their FLOPs."""
        asks: dict[str, Callable[[int], Json]] = {name: self.updates(spec) for name, spec in specs.items()}
        group = compare(title, "updates", asks, self.effort, rounds=rounds)
        for name, arm in group["arms"].items():
            arm["facts"] = self.facts(specs[name])
        return group
