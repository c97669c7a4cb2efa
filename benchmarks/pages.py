"""The sections' tables, in the terminal and in docs/performance.md."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bars import bars_text
from paper import paper_text
from report import (
    costs,
    group_text,
    mbpo_core_seconds,
    missing_text,
    number,
    rate,
    rates,
    ratio,
    spread,
    table,
)

Json = dict[str, Any]

BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"
SHOWN_VERSIONS = ("stable_baselines3", "sbx-rl", "torch", "jax", "gymnasium", "mujoco", "numpy")


def machine_text(section: Json) -> str:
    shown = {k: v for k, v in section["machine"].items() if v not in ({}, None)}
    lines = [f"- {name.replace('_', ' ')}: {value}" for name, value in shown.items()]
    versions = [f"{name} {v}" for name, v in section["versions"].items() if isinstance(v, str)]
    rows = [(k, number(v["gflops_median"]), number(v["gflops_best"])) for k, v in section["gemm"].items()]
    gemm = table(("float32 matrix product", "GFLOP/s, median", "best"), rows)
    return "\n".join([*lines, f"- versions: {', '.join(versions)}", "", gemm])


def peers_text(section: Json) -> str:
    rows = []
    for group in section["groups"]:
        have = [{"mve", peer} <= group["arms"].keys() for peer in ("sb3", "sbx")]
        cells = [
            f"{ratio(group, 'mve', peer):.2f} x" if both else "not measured"
            for peer, both in zip(("sb3", "sbx"), have, strict=True)
        ]
        rows.append((group["title"], *cells))
    versions = [
        f"{peer}: " + ", ".join(f"{name} {found[name]}" for name in SHOWN_VERSIONS if name in found)
        for peer, found in section["versions"].items()
    ]
    summary = table(("medians of this run", "mve / sb3", "mve / sbx"), rows)
    return "\n\n".join([summary, *versions, *map(group_text, section["groups"])])


def expansion_text(section: Json) -> str:
    header = (
        "", "updates/s", "MFLOP by hand", "by XLA", "times as dear", "by arithmetic (hand; XLA)",
        "measured / XLA's",
    )  # fmt: skip
    parts = []
    for group in section["groups"]:
        rows = [
            (
                cost.name,
                str(cost.rate),
                number(cost.mflop_hand),
                number(cost.mflop_xla),
                f"{cost.measured:.2f}",
                f"{cost.by_hand:.2f}; {cost.by_xla:.2f}",
                f"{cost.beyond_xla:.2f}",
            )
            for cost in costs(group)
        ]
        parts.append(f"**{group['title']}**\n\n{table(header, rows)}{missing_text(group)}")
    return "\n\n".join(parts)


def seeds_text(section: Json) -> str:
    ways = ("together", "one after the other")
    rows = []
    for group in section["groups"]:
        arms = group["arms"]
        cells = [str(spread(rates(arms[way], "updates"))) if way in arms else "not measured" for way in ways]
        rows.append((group["title"], *cells, f"{ratio(group, *ways):.2f} x" if len(arms) == 2 else ""))
    return "Updates a second, of all seeds.\n\n" + table(("", *ways, "gain"), rows)


def roofline_text(section: Json) -> str:
    rows = []
    for group in section["groups"]:
        if len(group["arms"]) == 2:
            (whole, bare), gflop = group["arms"], group["facts"]["flops_hand"] / 1e9
            reached = [number(gflop * rate(group, name)) for name in (whole, bare)]
            rows.append((group["title"], *reached, f"{ratio(group, whole, bare):.2f}"))
    return table(("", "update, GFLOP/s", "its matrix products alone, GFLOP/s", "reached"), rows)


def mbpo_text(section: Json) -> str:
    names = {"rounds": "rounds of rollouts", "fits": "model minibatches", "env_steps": "environment steps"}
    due, taken = section["per_1000_steps"], mbpo_core_seconds(section)
    total = sum(taken.values())
    rows = [(names.get(k, k), f"{due[k]:g}", number(v), f"{v / total:.2f}") for k, v in taken.items()]
    sums = table(("per 1000 environment steps", "how many", "core-seconds", "share"), rows)
    rates = "\n\n".join(map(group_text, section["groups"]))
    return f"{sums}\n\n**{number(1000 / total)} environment steps per core-second.**\n\n{rates}"


def startup_text(section: Json) -> str:
    starts = section["startup"]
    words = {"first_step": "first environment step", "first_learned": "first block learned, all compiled"}
    rows = [
        (f"seconds to the {what}", *(str(spread([s[word] for s in starts[k]])) for k in ("cold", "warm")))
        for word, what in words.items()
    ]
    rows.append(("peak MB until then", *(str(spread([s["peak_rss_mb"] for s in starts[k]])) for k in starts)))
    header = ("`mve train HalfCheetah-v5 --algo mve-sac`", "empty compilation cache", "filled")
    return "\n\n".join([table(header, rows), *map(group_text, section["groups"])])


PAGES: dict[str, tuple[str, Callable[[Json], str]]] = {
    "machine": ("Machine", machine_text),
    "peers": ("Beside Stable-Baselines3 and SBX", peers_text),
    "expansion": ("What the expansion costs", expansion_text),
    "seeds": ("Many seeds at once", seeds_text),
    "roofline": ("An update against its matrix products", roofline_text),
    "mbpo": ("MBPO, put together from its parts", mbpo_text),
    "startup": ("Start-up and memory", startup_text),
    "paper": ("On paper: what a cluster would need", paper_text),
}


def section_text(name: str, section: Json) -> str:
    """One section as markdown, with when and on how busy a machine it was taken."""
    title, text_of = PAGES[name]
    load, cores = section["machine"]["load_average_1min"], section["machine"]["cores"]
    text = f"### {title}\n\nTaken {section['taken']}, load {load} on {cores} cores before it began.\n\n"
    for reason in ("skipped", "failed"):
        if reason in section:
            return f"{text}Not measured: {section[reason]}.\n"
    return f"{text}{text_of(section)}\n"


def as_text(results: Json) -> str:
    """All sections that were measured, in their order."""
    sections = results["sections"]
    told = [section_text(name, sections[name]) for name in PAGES if name in sections]
    return "\n".join([f"### Against the bars\n\n{bars_text(sections)}\n", *told])


def put_figures(document: str, figures: str) -> str:
    """The document with what lies between the two marks replaced."""
    before, begin, rest = document.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"the document has no {BEGIN} ... {END}")
    return f"{before}{BEGIN}\n\n{figures.strip()}\n\n{END}{after}"
