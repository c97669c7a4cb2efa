"""Our own parts against each other: the expansion's cost, many seeds at once, the roof above it all."""

from __future__ import annotations

from functools import partial

import report
from measure import Effort, Json, Ours, compare, mve_sac, on_cores, sac
from workers import Worker

SMALLEST, LARGEST = 256, 2048  # square matrices


def machine_section(effort: Effort) -> Json:
    """BLAS and XLA on square matrices: the roof over everything else here."""
    gemm: dict[str, Json] = {}
    versions: Json = {}
    for cores in effort.cores:
        with Worker("worker_mve.py", cores=cores, label="gemm") as worker:
            versions = worker.ask("versions")["versions"]
            for library in ("numpy", "jax"):
                for size in (SMALLEST, LARGEST):
                    rate = worker.ask("gemm", library=library, size=size, seconds=effort.seconds)
                    gemm[f"{library} {size} x {size}, {on_cores(cores)}"] = {
                        name: rate[name] for name in ("gflops_median", "gflops_best")
                    }
    return {"gemm": gemm, "versions": versions}


def expansion_section(effort: Effort) -> Json:
    """What an expanded update costs beside SAC's own, against what its arithmetic says."""
    groups, curves = [], {}
    for cores in effort.cores:
        with Worker("worker_mve.py", cores=cores, label="expansion") as worker:
            ours, on = Ours(worker, effort), on_cores(cores)
            learners = {
                "sac": sac(),
                "mve-sac, H = 3": mve_sac(),
                "mve-sac, H = 3, no TD-k": mve_sac("targets.estimator=mve"),
            }
            groups.append(ours.compare(f"The expansion's cost, {on}", learners))
            if cores == max(effort.cores):
                curves = _curves(ours, on)
    points = {name: report.curve(along) for name, along in curves.items()}
    return {"groups": groups + [group for along in curves.values() for group in along], "curves": points}


def _curves(ours: Ours, on: str) -> dict[str, list[Json]]:
    """Along the horizon, the ensemble and the batch: groups whose arms say where `at` they stand."""
    quick, rounds = ours.effort.quick, ours.effort.curve_rounds
    horizons, members = ((1, 3), (1, 5)) if quick else ((1, 3, 5, 10), (1, 5, 8))
    specs = {h: mve_sac(f"targets.horizon_steps={h}") if h != 3 else mve_sac() for h in horizons}
    by_horizon = _curve(ours, f"Horizon, {on}", "H", specs)
    specs = {m: mve_sac(f"dynamics.members={m}") if m != 5 else mve_sac() for m in members}
    by_members = _curve(ours, f"Ensemble, H = 3, {on}", "M", specs)
    by_batch = []
    for batch in (128, 256) if quick else (128, 256, 512, 1024):
        size = [f"agent.batch_size={batch}"] if batch != 256 else []
        both = {"sac": sac(*size), "mve-sac": mve_sac(*size)}
        group = ours.compare(f"Batch of {batch}, H = 3, {on}", both, rounds)
        if "mve-sac" in group["arms"]:
            group["arms"]["mve-sac"]["at"] = batch
        by_batch.append(group)
    return {"horizon": [by_horizon], "members": [by_members], "batch": by_batch}


def _curve(ours: Ours, title: str, letter: str, specs: dict[int, tuple[str, ...]]) -> Json:
    named = {f"{letter} = {x}": spec for x, spec in specs.items()}
    group = ours.compare(title, {"sac": sac(), **named}, ours.effort.curve_rounds)
    for x, name in zip(specs, named, strict=True):
        if name in group["arms"]:
            group["arms"][name]["at"] = x
    return group


def seeds_section(effort: Effort) -> Json:
    """Many seeds in one program against the same number one after the other."""
    groups = []
    for cores in effort.cores:
        with Worker("worker_mve.py", cores=cores, label="seeds") as worker:
            ours = Ours(worker, effort)
            for spec in (sac(),) if effort.quick else (sac(), mve_sac()):
                name = ours.name(spec)
                for count in (1, 2) if effort.quick else (1, 2, 4, 8):
                    ask = partial(_ask_seeds, worker, name, count)
                    asks = {"together": partial(ask, True), "one after the other": partial(ask, False)}
                    title = f"{spec[0]}, {count} seed{'s' * (count > 1)}, {on_cores(cores)}"
                    group = compare(title, "updates", asks, effort, rounds=effort.curve_rounds, first=4)
                    groups.append(group | {"seeds": count})
    return {"groups": groups}


def _ask_seeds(worker: Worker, name: str, count: int, together: bool, updates: int) -> Json:
    return worker.ask("seeds", name=name, count=count, together=together, updates=updates)


def roofline_section(effort: Effort) -> Json:
    """An update against its bare matrix products, on the same cores in turns."""
    groups = []
    for cores in effort.cores:
        with Worker("worker_mve.py", cores=cores, label="roofline") as worker:
            ours = Ours(worker, effort)
            for spec in (sac(), mve_sac()):
                bare = partial(_ask_products, worker, ours.name(spec))
                asks = {"update": ours.updates(spec), "its matrix products alone": bare}
                group = compare(f"{spec[0]}, {on_cores(cores)}", "updates", asks, effort)
                groups.append(group | {"facts": ours.facts(spec)})
    return {"groups": groups}


def _ask_products(worker: Worker, name: str, updates: int) -> Json:
    return worker.ask("bare_products", name=name, updates=updates)
