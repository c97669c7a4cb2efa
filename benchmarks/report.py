"""From raw samples to medians, ratios and tables. Reads the JSON only, with the standard library only."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any, NamedTuple

Json = dict[str, Any]

UNITS = {
    "env_steps": "environment steps/s",
    "updates": "updates/s",
    "fits": "model minibatches/s",
    "rounds": "rounds of rollouts/s",
}


class Spread(NamedTuple):
    middle: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{number(self.middle)} [{number(self.low)} .. {number(self.high)}]"


def spread(values: Sequence[float]) -> Spread:
    return Spread(median(values), min(values), max(values))


def number(x: float) -> str:
    """Three digits, or all of them before the point."""
    digits = 0 if abs(x) >= 100 or x == 0 else 1 if abs(x) >= 10 else 2 if abs(x) >= 1 else 3
    return f"{x:,.{digits}f}".replace(",", " ")


def scaled(x: float, unit: str) -> str:
    """With the prefix that leaves one to three digits before the point."""
    for prefix in ("", "k", "M", "G", "T"):
        if abs(x) < 1000:
            return f"{number(x)} {prefix}{unit}"
        x /= 1000
    return f"{number(x)} P{unit}"


def rates(arm: Json, per: str) -> list[float]:
    """Units of work a second, a number for each sample."""
    return [sample[per] / sample["seconds"] for sample in arm["samples"]]


def rate(group: Json, name: str) -> float:
    return median(rates(group["arms"][name], group["per"]))


def ratio(group: Json, above: str, below: str) -> float:
    """Of medians of rates."""
    return rate(group, above) / rate(group, below)


def per_core_second(group: Json, name: str) -> float:
    """Units of work for each second on a core; waiting for one is not counted."""
    return median(s[group["per"]] / s["cpu_seconds"] for s in group["arms"][name]["samples"])


def mbpo_core_seconds(section: Json) -> dict[str, float]:
    """Core-seconds that each part of MBPO takes for 1000 environment steps."""
    taken = {}
    for group in section["groups"]:
        per, samples = group["per"], group["arms"]["mve"]["samples"]
        taken[per] = section["per_1000_steps"][per] * median(s["cpu_seconds"] / s[per] for s in samples)
    return taken


def share(arm: Json, of: str, seconds: str = "seconds") -> float:
    """Seconds `of` something for each second, over all samples: 1 is one core kept busy, or waited for."""
    return sum(s[of] for s in arm["samples"]) / max(sum(s[seconds] for s in arm["samples"]), 1e-9)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown with aligned columns, so that it reads in a terminal as well."""
    lines = [list(header), *[list(row) for row in rows]]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    lines.insert(1, ["-" * width for width in widths])
    padded = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)


def group_text(group: Json) -> str:
    """One comparison: rates, how many times faster the baseline is, cores kept busy, waiting, memory."""
    per, baseline = group["per"], group["baseline"]
    faster = f"{baseline} is"
    header = (
        "", UNITS[per], faster, "per core-second", "samples", "cores busy", "waiting", "busy unasked",
        "peak MB",
    )  # fmt: skip
    rows = []
    for name, arm in group["arms"].items():
        compared = name != baseline and baseline in group["arms"]
        rows.append(
            (
                name,
                str(spread(rates(arm, per))),
                f"{ratio(group, baseline, name):.2f} x" if compared else "",
                number(per_core_second(group, name)),
                str(len(arm["samples"])),
                f"{share(arm, 'cpu_seconds'):.2f}",
                f"{share(arm, 'wait_seconds'):.2f}",
                f"{share(arm, 'idle_cpu_seconds', 'idle_seconds'):.3f}",
                number(max(s["peak_rss_mb"] for s in arm["samples"])),
            )
        )
    return f"**{group['title']}**\n\n{table(header, rows)}{missing_text(group)}"


def missing_text(group: Json) -> str:
    return "".join(f"\n\nNot measured: {name} ({reason})." for name, reason in group["missing"].items())


class Cost(NamedTuple):
    """One learner's update beside the baseline's."""

    name: str
    rate: Spread
    mflop_hand: float
    mflop_xla: float
    measured: float  # times as dear as the baseline's
    by_hand: float  # as it would be if FLOPs were all, counted by hand
    by_xla: float  # and by XLA
    beyond_xla: float  # measured / by_xla: 1 is as dear as its arithmetic, less is better


def costs(group: Json) -> list[Cost]:
    """Of all learners of a comparison; none if the baseline is missing."""
    if group["baseline"] not in group["arms"]:
        return []
    base = group["arms"][group["baseline"]]["facts"]
    found = []
    for name, arm in group["arms"].items():
        facts, measured = arm["facts"], ratio(group, group["baseline"], name)
        by_xla = facts["flops_xla"] / base["flops_xla"]
        found.append(
            Cost(
                name=name,
                rate=spread(rates(arm, group["per"])),
                mflop_hand=facts["flops_hand"] / 1e6,
                mflop_xla=facts["flops_xla"] / 1e6,
                measured=measured,
                by_hand=facts["flops_hand"] / base["flops_hand"],
                by_xla=by_xla,
                beyond_xla=measured / by_xla,
            )
        )
    return found


def curve(groups: Sequence[Json]) -> list[Json]:
    """The learners that say where `at` they stand, as points of a curve."""
    points = []
    for group in groups:
        for cost in costs(group):
            if (at := group["arms"][cost.name].get("at")) is not None:
                points.append({"at": at} | cost._asdict() | {"rate": cost.rate._asdict()})
    return points
