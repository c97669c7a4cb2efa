"""What the device does in an update: operations launched, time busy, gaps between them, the dearest ones.

    python benchmarks/device_profile.py --algo dhmbpo --updates 20

Traces one call of `train.learn` with XLA's profiler, on whatever device JAX finds: kernels of a GPU's
streams, thunks of the CPU's runtime. Gaps are stretches in which no operation runs: on a GPU what
launching costs, on the CPU what the runtime itself costs.
"""

from __future__ import annotations

import argparse
import gzip
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from report import table

Json = dict[str, Any]
SHOWN = 12


class Operation(NamedTuple):
    """One run of one operation on the device, in microseconds."""

    name: str
    start: float
    duration: float


def operations(events: Sequence[Json]) -> list[Operation]:
    """Those of a trace that name the compiled operation they are, without loops, which enclose others."""
    found = []
    for event in events:
        facts = event.get("args", {})
        if event.get("ph") != "X" or "hlo_op" not in facts:
            continue
        name = str(facts["hlo_op"])
        if not name.startswith(("while", "call", "conditional")):
            found.append(Operation(name, float(event["ts"]), float(event["dur"])))
    return sorted(found, key=lambda operation: operation.start)


def busy_and_gaps(operations: Sequence[Operation]) -> tuple[float, list[float]]:
    """Microseconds in which at least one operation runs, and the lengths of the stretches in between."""
    if not operations:
        return 0.0, []
    busy, gaps, reached = 0.0, [], operations[0].start
    for _, start, duration in operations:
        if start > reached:
            gaps.append(start - reached)
        begin = max(start, reached)
        busy += max(start + duration - begin, 0.0)
        reached = max(reached, start + duration)
    return busy, gaps


def summary(operations: Sequence[Operation], updates: int) -> Json:
    """Figures for each update, and the dearest kinds of operation."""
    busy, gaps = busy_and_gaps(operations)
    kinds: dict[str, list[float]] = {}
    for name, _, duration in operations:
        kinds.setdefault(name.rstrip("0123456789.").split(".")[0], []).append(duration)
    dearest = sorted(kinds.items(), key=lambda item: -sum(item[1]))
    return {
        "operations": len(operations) / updates,
        "busy_ms": busy / updates / 1e3,
        "gaps_ms": sum(gaps) / updates / 1e3,
        "gap_median_us": sorted(gaps)[len(gaps) // 2] if gaps else 0.0,
        "kinds": {
            kind: {"operations": len(spent) / updates, "ms": sum(spent) / updates / 1e3}
            for kind, spent in dearest
        },
    }


def text(facts: Json) -> str:
    """What `summary` found, and on what."""
    rows = [
        (kind, f"{found['operations']:.1f}", f"{found['ms']:.3f}")
        for kind, found in list(facts["kinds"].items())[:SHOWN]
    ]
    lines = (
        f"{facts['algo']} on {facts['task']}, {facts['device']}",
        f"an update: {facts['operations']:.0f} operations, {facts['busy_ms']:.2f} ms busy, "
        f"{facts['gaps_ms']:.2f} ms of gaps (median {facts['gap_median_us']:.1f} us)",
    )
    return "\n".join([*lines, "", table(("operation", "an update", "ms"), rows)])


def profile(algo: str, task: str, updates: int, settings: list[str]) -> Json:
    """Trace so many updates of a learner with a little replay."""
    import jax

    import worker_mve

    worker_mve.build("it", algo, task, settings, fill=1000)
    worker_mve.learn("it", updates=updates)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            worker_mve.learn("it", updates=updates)
        [trace] = Path(folder).rglob("*.trace.json.gz")
        events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    device = jax.devices()[0]
    named = {"algo": algo, "task": task, "device": f"{device.platform}: {device.device_kind}"}
    return named | {"updates": updates} | summary(operations(events), updates)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--algo", default="mve-sac", help="a preset (mve-sac)")
    parser.add_argument("--task", default="HalfCheetah-v5", help="a Gymnasium id")
    parser.add_argument("--updates", type=int, default=20, help="traced in one call (20)")
    parser.add_argument("--set", nargs="+", default=[], metavar="SETTING", help="section.field=value")
    parser.add_argument("--json", type=Path, help="write all figures here")
    options = parser.parse_args(argv)
    facts = profile(options.algo, options.task, options.updates, options.set)
    if options.json:
        options.json.write_text(json.dumps(facts, indent=1) + "\n")
    print(text(facts))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
