"""Algorithms side by side over seeds: tables and pictures with intervals, from run folders and CSV files.

A CSV file has a row for each evaluation, the mean of its episodes:

    suite,env,algo,seed,step,return,source

Published curves are kept in the same form, so that one picture shows both.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from mve.folders import runs_in
from mve.log import VERSIONS, read_json
from mve.plot import COLOURS, STYLE, draw_line, mean_curve, read_run, thousands, write
from mve.types import UserError

COLUMNS = ("suite", "env", "algo", "seed", "step", "return", "source")
CONFIDENCE, RESAMPLES = 0.95, 5000
NEAR = 0.02  # share of a step: an evaluation as near to it is one at it
ACROSS = 3  # panels of a picture, at most
BETWEEN = "~"  # before a number that is interpolated between evaluations further off


class Curve(NamedTuple):
    """One seed's evaluations."""

    suite: str
    env: str
    algo: str
    seed: str
    source: str
    step: np.ndarray
    value: np.ndarray  # mean return of the evaluation's episodes

    @property
    def task(self) -> str:
        """The name that `mve train` knows it by."""
        return self.env if self.suite == "gym" else f"{self.suite}/{self.env}"


class Score(NamedTuple):
    """What several seeds reached at a step."""

    values: Float[np.ndarray, " seeds"]
    iqm: float
    low: float  # of the 95 % interval about the interquartile mean; nan for a single seed
    high: float
    measured: bool  # by evaluations at that step, all of them


def read(paths: Sequence[Path]) -> list[Curve]:
    """The curves of run folders, of folders of seeds, and of CSV files.

    The source of a run's is the commit of the code that made it, with a + where it had been changed since.
    """
    curves: list[Curve] = []
    for path in paths:
        if path.suffix == ".csv":
            curves += _read_csv(path)
        else:
            curves += [_read_run(folder) for folder in runs_in(path)]
    return curves


def read_named(places: Sequence[str]) -> list[Curve]:
    """The same of paths which may have a name before them, NAME=PATH: that of all their curves."""
    curves: list[Curve] = []
    for place in places:
        name, separator, path = place.partition("=")
        if separator and not Path(place).exists():
            curves += [curve._replace(algo=name) for curve in read([Path(path)])]
        else:
            curves += read([Path(place)])
    return curves


def _read_run(folder: Path) -> Curve:
    run, versions = read_run(folder), folder / VERSIONS
    facts = read_json(versions) if versions.exists() else {}
    commit = (facts.get("git_commit") or "")[:7]
    version = f"{commit}{'+' if facts.get('git_dirty') else ''}" if commit else facts.get("mve")
    suite, _, env = run.task.rpartition("/")
    return Curve(
        suite=suite or "gym",
        env=env,
        algo=run.algo,
        seed=str(run.seed),
        source=f"mve:{version}" if version else "mve",
        step=run.step,
        value=run.mean,
    )


def _read_csv(path: Path) -> list[Curve]:
    rows: dict[tuple[str, ...], list[tuple[int, float]]] = {}
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
            if missing:
                raise UserError(f"{path} has no column {', '.join(missing)}; it needs {','.join(COLUMNS)}")
            for row in reader:
                name = tuple(row[column] for column in ("suite", "env", "algo", "seed", "source"))
                rows.setdefault(name, []).append((int(row["step"]), float(row["return"])))
                if not math.isfinite(rows[name][-1][1]):
                    raise ValueError(
                        f"line {reader.line_num}: a return of {row['return']}; leave the row out"
                    )
    except (OSError, ValueError, TypeError, csv.Error) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    curves = []
    for name, points in rows.items():
        step, value = (np.array(column, np.float64) for column in zip(*sorted(points), strict=True))
        curves.append(Curve(*name, step=step, value=value))
    return curves


def write_csv(curves: Iterable[Curve], path: Path) -> Path:
    """All evaluations as one CSV file, by task, algorithm, seed and step."""
    try:
        written = path.with_name(f".writing.{path.name}")
        with written.open("w", encoding="utf-8", newline="") as file:
            out = csv.writer(file, lineterminator="\n")
            out.writerow(COLUMNS)
            for curve in sorted(curves, key=lambda c: (c.suite, c.env, c.algo, len(c.seed), c.seed)):
                for step, value in zip(curve.step, curve.value, strict=True):
                    name = (curve.suite, curve.env, curve.algo, curve.seed)
                    number = f"{value:.2f}" if value == 0 or abs(value) >= 1 else f"{value:.5g}"
                    out.writerow((*name, int(step), number, curve.source))
        written.replace(path)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from error
    return path


def grouped(curves: Sequence[Curve]) -> dict[str, dict[str, list[Curve]]]:
    """By task, then by algorithm, in the order given."""
    tasks: dict[str, dict[str, list[Curve]]] = {}
    for curve in curves:
        tasks.setdefault(curve.task, {}).setdefault(curve.algo, []).append(curve)
    return tasks


def score(curves: Sequence[Curve], step: float | int) -> Score | None:
    """What those seeds that came so far had reached at a step, interpolated between evaluations that are no
    further apart than the step is from 0: what lies between the first and a last one is not known.

    The interquartile mean drops a quarter of the seeds, rounded down, at either end; its interval is the
    percentile bootstrap over seeds (Agarwal et al. 2021, arXiv 2108.13264, section 4; one task is one
    stratum): of two or three seeds, their range. None if no seed has come so far.
    """
    reached = _reached(curves, step)
    if not reached:
        return None
    values = _values(reached, step)
    return Score(values, iqm(values), *interval(values), measured=not any(_gap(c, step) for c in reached))


def _reached(curves: Sequence[Curve], step: float | int) -> list[Curve]:
    """Those that have come so far."""
    return [c for c in curves if _gap(c, step) <= step]


def _values(reached: Sequence[Curve], step: float | int) -> Float[np.ndarray, " seeds"]:
    return np.array([np.interp(step, c.step, c.value) for c in reached])


def _gap(curve: Curve, step: float | int) -> float:
    """Steps between the evaluations before and after; 0 where there is one, infinite where there are none."""
    if not len(curve.step) or not curve.step[0] <= step <= curve.step[-1]:
        return math.inf
    if np.min(np.abs(curve.step - step)) <= NEAR * step:
        return 0.0
    after = int(np.searchsorted(curve.step, step))
    return float(curve.step[after] - curve.step[after - 1])


def iqm(values: Float[np.ndarray, " seeds"]) -> float:
    """Interquartile mean: without a quarter of the values, rounded down, at either end."""
    from scipy.stats import trim_mean

    return float(trim_mean(values, 0.25))


def interval(values: Float[np.ndarray, " seeds"]) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the interquartile mean; the same for the same values."""
    from scipy.stats import bootstrap, trim_mean

    if len(values) < 2:
        return math.nan, math.nan
    found = bootstrap(
        (values,),
        lambda x, axis: trim_mean(x, 0.25, axis=axis),
        n_resamples=RESAMPLES,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return float(found.low), float(found.high)


def refuse_twice(curves: Sequence[Curve]) -> None:
    """A seed counts once: UserError where two curves are of one task, algorithm and seed."""
    seen: dict[tuple[str, ...], Curve] = {}
    for curve in curves:
        name = (curve.suite, curve.env, curve.algo, curve.seed)
        if (other := seen.setdefault(name, curve)) is not curve:
            raise UserError(
                f"seed {curve.seed} of {curve.algo} on {curve.task} is there twice (from {other.source} and "
                f"{curve.source}), and would count twice; leave one out, or name them apart: NAME=PATH"
            )


def beside(
    published: Sequence[Curve], tasks: Iterable[str], only: Sequence[str] = (), alike: Sequence[str] = ()
) -> list[Curve]:
    """The published curves on those tasks, of these algorithms if any are named.

    `alike` holds PUBLISHED=TASK: curves of a task that is almost one of ours, shown beside its own, and with
    the other's name. UserError for an algorithm or a task that is not published.
    """
    known = {curve.algo for curve in published}
    if unknown := set(only) - known:
        named = ", ".join(dict.fromkeys(curve.algo for curve in published)) or "none"
        raise UserError(f"--only {' '.join(sorted(unknown))} is not published there; {named} is")
    kin: dict[str, str] = {}
    for pair in alike:
        name, separator, task = pair.partition("=")
        if not separator or name not in {curve.task for curve in published}:
            raise UserError(f"--alike {pair}: it has to be PUBLISHED=TASK, a published task and one of yours")
        kin[name] = task
    wanted = set(tasks)
    shown = [_in_place(c, kin.get(c.task)) for c in published if not only or c.algo in only]
    return [curve for curve in shown if curve.task in wanted]


def _in_place(curve: Curve, task: str | None) -> Curve:
    """The curve as one of that task, if one is given."""
    if task is None:
        return curve
    suite, _, env = task.rpartition("/")
    return curve._replace(suite=suite or "gym", env=env, algo=f"{curve.algo} ({curve.env})")


def common_steps(curves: Sequence[Curve]) -> list[int]:
    """For each task, the last step that all of its curves have reached."""
    tasks = grouped([curve for curve in curves if len(curve.step)])
    return sorted({int(min(c.step[-1] for g in algos.values() for c in g)) for algos in tasks.values()})


def table(curves: Sequence[Curve], steps: Sequence[int]) -> list[tuple[str, ...]]:
    """A row of texts, under HEADER, for each task, step and algorithm that has come so far."""
    rows = []
    for task, algos in grouped(curves).items():
        for step in steps:
            for algo, group in algos.items():
                if (found := score(group, step)) is None:
                    continue
                values, between = found.values, "" if found.measured else BETWEEN
                shown = [found.iqm, found.low, found.high, values.mean(), np.median(values), *np.sort(values)]
                middle, low, high, mean, median, *every = _numbers(shown)
                spread = "" if math.isnan(found.low) else f" [{low}, {high}]"
                rows.append(
                    (
                        task, algo, thousands(float(step)), str(len(values)), f"{between}{middle}{spread}",
                        mean, median, " ".join(every),
                    )
                )  # fmt: skip
    return rows


def held_against(rival: str, curves: Sequence[Curve], steps: Sequence[int]) -> list[tuple[str, ...]]:
    """A row of texts, under AGAINST, for each task, step and algorithm that has come as far as the rival: the
    probability that one of its seeds is above one of the rival's, ties counting half (the probability of
    improvement of Agarwal et al. 2021, section 4.3), and the p of the rank test that says the same (Mann and
    Whitney 1947, two tails). UserError where the rival is not among them.

    The rival's curves on a task that is almost the same (`beside`) count as its own.
    """
    from scipy.stats import mannwhitneyu

    def is_rival(algo: str) -> bool:
        return algo == rival or algo.startswith(f"{rival} (")

    if not any(is_rival(curve.algo) for curve in curves):
        named = ", ".join(dict.fromkeys(curve.algo for curve in curves))
        raise UserError(f"--over {rival} is not among what is compared: {named}")
    rows = []
    for task, algos in grouped(curves).items():
        theirs = [curve for algo, group in algos.items() if is_rival(algo) for curve in group]
        for step in steps:
            known = _values(_reached(theirs, step), step)
            for algo, group in algos.items():
                found = _values(_reached(group, step), step)
                if is_rival(algo) or not len(found) or not len(known):
                    continue
                test = mannwhitneyu(found, known, alternative="two-sided")
                chance = test.statistic / (len(found) * len(known))
                counts = f"{len(found)}, {len(known)}"
                rows.append(
                    (task, algo, thousands(float(step)), counts, f"{chance:.2f}", f"{test.pvalue:.2g}")
                )
    return rows


def _numbers(values: Sequence[float]) -> list[str]:
    """Returns as a table has them: whole, or with three digits where all are small."""
    small = max(abs(value) for value in values if not math.isnan(value)) < 100
    return [f"{value:.3g}" if small else f"{value:.0f}" for value in values]


AGAINST = ("task", "algorithm", "step", "seeds", "above it", "p")
HEADER = ("task", "algorithm", "step", "seeds", "IQM [95 %]", "mean", "median", "every seed")


def picture(
    curves: Sequence[Curve], references: Sequence[Curve], output: Path, last: int | None = None
) -> Path:
    """A panel for each task: the interquartile mean of each algorithm over its seeds, with its interval and
    a thin line for each seed; references' interquartile means are dashed. `last` is where the axis ends."""
    import matplotlib
    from matplotlib.figure import Figure

    curves, references = ([c for c in some if len(c.step)] for some in (curves, references))
    tasks, known = grouped(curves), grouped(references)
    algos = list(dict.fromkeys(curve.algo for curve in curves))
    others = list(dict.fromkeys(c.algo for c in references if c.task in tasks))
    colours = {algo: COLOURS[i % len(COLOURS)] for i, algo in enumerate(algos)}
    greys = {algo: str(0.25 + 0.5 * i / max(len(others), 1)) for i, algo in enumerate(others)}
    with matplotlib.rc_context(STYLE):
        across, down = min(len(tasks), ACROSS), -(-len(tasks) // ACROSS)
        figure = Figure(figsize=(1.5 + 5.2 * across, 4.2 * down), layout="constrained")
        panels = figure.subplots(down, across, squeeze=False)
        for axis in panels.flat[len(tasks) :]:
            axis.set_axis_off()
        for axis, (task, by_algo) in zip(panels.flat, tasks.items(), strict=False):
            axis.set_title(task, loc="left", fontsize=13, fontweight="bold")
            end = float(last or max(c.step[-1] for group in by_algo.values() for c in group))
            for algo, group in known.get(task, {}).items():
                step, middle, _, _ = along(group, end)
                if len(step) == 0:
                    continue
                style = {"color": greys[algo], "linestyle": (0, (4, 2)), "linewidth": 1.4}
                measured = [i for i, at in enumerate(step) if any(at in curve.step for curve in group)]
                style |= {"marker": "o", "markersize": 3, "markevery": measured}  # it may be seldom
                axis.plot(step, middle, label=f"{algo}, {_seeds(group)} (published)", **style)
            for algo, group in by_algo.items():
                _draw(axis, algo, group, end, colours[algo])
            axis.set_xlim(0, end)
            axis.set_xlabel("environment steps")
            axis.xaxis.set_major_formatter(thousands)
            axis.legend(fontsize=8.5, loc="best", frameon=True, framealpha=0.8, edgecolor="none")
        for axis in panels[:, 0]:
            axis.set_ylabel("evaluation return, IQM and 95 % interval")
        return write(figure, output)


def _draw(axis: Any, algo: str, group: Sequence[Curve], end: float, colour: str) -> None:
    for curve in group:
        axis.plot(curve.step, curve.value, color=colour, linewidth=0.7, alpha=0.4)
    step, middle, low, high = along(group, end)
    draw_line(axis, (step, middle), color=colour, linewidth=2.4, label=f"{algo}, {_seeds(group)}")
    if len(group) > 1:
        axis.fill_between(step, low, high, color=colour, alpha=0.16, linewidth=0)


def along(group: Sequence[Curve], end: float) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Steps that all the seeds cover, up to `end`; the interquartile mean there and its interval."""
    step, _ = mean_curve([(curve.step, curve.value) for curve in group])
    if len(step):
        step = np.unique(np.append(step[step < end], min(end, step[-1])))
    scores = [(s, found) for s in step if (found := score(group, s)) is not None]
    points = [(s, found.iqm, found.low, found.high) for s, found in scores]
    step, middle, low, high = np.array(points).reshape(-1, 4).T
    return step, middle, low, high


def _seeds(group: Sequence[Curve]) -> str:
    if len(group) == 1:
        return "mean" if group[0].seed == "mean" else "1 seed"
    return f"{len(group)} seeds"
