"""The whole loop beside Stable-Baselines3 and SBX: the same task, networks, batch, buffer and processor."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import venvs
from measure import LONG, SAME, TASK, Effort, Json, compare, on_cores, say
from workers import Ask, Worker, WorkerFailed

EACH_STEP = "mve, blocks of 1"  # a fresh policy at every step, as the peers have it


@dataclass(frozen=True)
class Contestant:
    """A worker that can run the loop."""

    name: str
    script: str
    python: Path | str
    request: Callable[[str, int], Json]  # algorithm, updates per step -> what its `build` is asked


def ours(name: str, block_steps: int) -> Contestant:
    def request(algo: str, updates: int) -> Json:
        loop = [f"train.updates_per_step={updates}", f"train.block_steps={block_steps}"]
        return {"algo": algo, "settings": [*SAME, *LONG, *loop]}

    return Contestant(name, "worker_mve.py", sys.executable, request)


def theirs(peer: venvs.Peer) -> Contestant:
    """Raises CannotInstall."""
    return Contestant(
        peer.name,
        "worker_sb3.py",
        venvs.python_of(peer),
        lambda algo, updates: {"library": peer.name, "algo": algo, "updates_per_step": updates},
    )


def peers_section(effort: Effort) -> Json:
    """Whole loops, environment included, at one and at twenty updates per environment step."""
    contestants, missing, versions = [ours("mve", 20), ours(EACH_STEP, 1)], {}, {}
    for peer in venvs.PEERS.values():
        try:
            contestants.append(theirs(peer))
            versions[peer.name] = venvs.versions_of(peer)
        except venvs.CannotInstall as error:
            missing[peer.name] = str(error)
            say(f"{peer.name} is left out: {error}")
    races = [("sac", 1), ("td3", 20)] if effort.quick else [(a, n) for a in ("sac", "td3") for n in (1, 20)]
    groups = []
    for algo, updates in races:
        for cores in effort.cores:
            group = race(contestants, algo, updates, cores, effort)
            groups.append(group | {"missing": missing | group["missing"]})
    return {"groups": groups, "versions": versions}


def race(contestants: list[Contestant], algo: str, updates: int, cores: int, effort: Effort) -> Json:
    """All of them in turns, each in a process of its own."""
    asks: dict[str, Ask] = {}
    failed: dict[str, str] = {}
    with ExitStack() as stack:
        for contestant in contestants:
            if updates > 1 and contestant.name == EACH_STEP:
                continue  # where updates dominate, blocks decide nothing
            label = f"{contestant.name.replace(', ', '-').replace(' ', '-')}-{algo}-{updates}"
            worker = Worker(contestant.script, cores=cores, python=contestant.python, label=label)
            stack.enter_context(worker)
            try:
                request = contestant.request(algo, updates)
                worker.ask("build", name="it", task=TASK, fill=effort.fill, **request)
            except WorkerFailed as error:
                failed[contestant.name] = str(error)
                continue
            asks[contestant.name] = lambda steps, ask=worker.ask: ask("loop", name="it", steps=steps)
        times = f"{updates} update{'s' * (updates > 1)}"
        title = f"{algo.upper()}, {times} per environment step, {on_cores(cores)}"
        per = "env_steps" if updates == 1 else "updates"
        group = compare(title, per, asks, effort, first=20, multiple=20, baseline="mve")
    return group | {"missing": failed | group["missing"]}
