"""Where the medians stand against what was set out to be reached, short or not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from report import Json, mbpo_core_seconds, number, rate, ratio, table

# Peers that do not run beside us, as measured on cores whose bare float32 product gives so many GFLOP/s
# through XLA: updates/s of SAC-MVE (H = 3, 5 x 4 x 256, no TD-k) in the code of Palenicek et al. 2023, by
# cores, and mbrl-lib's environment steps per core-second with its HalfCheetah configuration.
REFERENCE_GFLOPS = 150.0
STUDY_UPDATES = {1: 28.0, 2: 43.0}
MBRL_LIB_STEPS = 2.9


class Bar(NamedTuple):
    what: str
    measured: float
    bar: float
    goal: float
    most: bool = False  # a cost, which is to stay below

    @property
    def verdict(self) -> str:
        def reached(wanted: float) -> bool:
            return self.measured <= wanted if self.most else self.measured >= wanted

        return "goal reached" if reached(self.goal) else "reached" if reached(self.bar) else "**short**"


def bars_text(sections: Json) -> str:
    """One table of all bars whose sections were measured."""
    rows = [(b.what, f"{b.measured:.2f}", number(b.bar), number(b.goal), b.verdict) for b in bars(sections)]
    return table(("", "measured", "bar", "goal", ""), rows)


def bars(sections: Json) -> Iterator[Bar]:
    """Every bar that can be told from these sections."""
    sound = {name: s for name, s in sections.items() if not {"failed", "skipped"} & s.keys()}
    if "peers" in sound:
        yield from _beside_peers(sound["peers"])
    if {"machine", "expansion"} <= sound.keys():
        yield from _beside_the_study(sound["expansion"], machine_factor(sound["machine"]))
    if {"machine", "mbpo"} <= sound.keys():
        yield _beside_mbrl_lib(sound["mbpo"], machine_factor(sound["machine"]))
    if "roofline" in sound:
        for group in _whole(sound["roofline"]):
            whole, bare = group["arms"]
            yield Bar(f"of its bare products' speed: {group['title']}", ratio(group, whole, bare), 0.6, 0.75)
    if "expansion" in sound:
        yield from _dearer_than_arithmetic(sound["expansion"])
    if "seeds" in sound:
        for group in _whole(sound["seeds"]):
            if group.get("seeds") == 4:
                gain = ratio(group, "together", "one after the other")
                yield Bar(f"at once against in turn: {group['title']}", gain, 1.1, 1.4)


def machine_factor(section: Json) -> float:
    """How much faster one core's bare product is here than where the other peers were measured."""
    return section["gemm"]["jax 256 x 256, 1 core"]["gflops_median"] / REFERENCE_GFLOPS


def _whole(section: Json) -> Iterator[Json]:
    for group in section["groups"]:
        if len(group["arms"]) > 1 and not group["missing"]:
            yield group


def _beside_peers(section: Json) -> Iterator[Bar]:
    wanted = {
        ("SAC, 20 updates", "sbx"): (1.3, 1.8),
        ("SAC, 1 update ", "sbx"): (1.3, 1.6),
        ("SAC, 20 updates", "sb3"): (2.3, 3.0),
        ("TD3, 20 updates", "sbx"): (1.2, 1.6),
    }
    for (start, peer), (bar, goal) in wanted.items():
        for group in section["groups"]:
            both = {"mve", peer} <= group["arms"].keys()
            if both and group["title"].startswith(start) and group["title"].endswith("2 cores"):
                yield Bar(f"{group['title']}, against {peer}", ratio(group, "mve", peer), bar, goal)


def _beside_the_study(section: Json, factor: float) -> Iterator[Bar]:
    for group in section["groups"]:
        for cores, theirs in STUDY_UPDATES.items():
            if group["title"].endswith(f"expansion's cost, {cores} core{'s' * (cores > 1)}"):
                for name in [name for name in group["arms"] if name != group["baseline"]]:
                    what = f"{name}, {cores} core{'s' * (cores > 1)}, against the JAX study's {theirs:g}/s"
                    yield Bar(f"{what} x {factor:.2f}", rate(group, name) / (theirs * factor), 3.0, 5.0)


def _beside_mbrl_lib(section: Json, factor: float) -> Bar:
    seconds = sum(mbpo_core_seconds(section).values())
    what = f"mbpo, steps per core-second, against mbrl-lib's {MBRL_LIB_STEPS:g} x {factor:.2f}"
    return Bar(what, 1000 / seconds / (MBRL_LIB_STEPS * factor), 2.5, 4.0)


def _dearer_than_arithmetic(section: Json) -> Iterator[Bar]:
    for group in section["groups"]:
        if {"sac", "mve-sac, H = 3"} <= group["arms"].keys() and "expansion's cost" in group["title"]:
            flops = {name: arm["facts"]["flops_hand"] for name, arm in group["arms"].items()}
            dearer = ratio(group, "sac", "mve-sac, H = 3") / (flops["mve-sac, H = 3"] / flops["sac"])
            yield Bar(f"cost over SAC's by arithmetic: {group['title']}", dearer, 1.15, 1.0, most=True)
