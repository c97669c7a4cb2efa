"""The learning curve of one run, or of many side by side, drawn from the run folders' records.

Runs of one (task, algorithm) are one colour: a thin line for each seed and a thick one for their mean. A
single run shows its episodes instead: the mean, and a band from the worst to the best.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mve.log import read_evaluations, read_json, read_metrics
from mve.types import Json, UserError

# Okabe and Ito 2008: told apart by colour-blind readers too. Their yellow is too faint for a line.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MODEL_ERROR = "model/mse_k"
INK, GRID = "#333333", "#E4E4E4"
STYLE: Any = {
    "font.size": 10.5,
    "axes.edgecolor": "#999999",
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
}


class Run(NamedTuple):
    """What is drawn of one run folder."""

    task: str
    algo: str
    horizon: int  # imagined steps per target
    seed: int
    step: np.ndarray  # of each evaluation
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    episodes: int  # per evaluation
    errors: dict[int, tuple[np.ndarray, np.ndarray]]  # model error by depth: steps, mean squared error


def curve(folders: Sequence[Path], output: Path) -> Path:
    """Draw the evaluation return against environment steps, and the model's error where there is one."""
    import matplotlib
    from matplotlib.figure import Figure

    runs = told_apart([read_run(folder) for folder in folders])
    tasks = list(dict.fromkeys(run.task for run in runs))
    has_model = any(run.errors for run in runs)
    colours = {
        algo: COLOURS[i % len(COLOURS)] for i, algo in enumerate(dict.fromkeys(run.algo for run in runs))
    }
    # Not pyplot: its figures are global state of the user's own session.
    with matplotlib.rc_context(STYLE):
        size = (1.5 + 6.5 * len(tasks), 6.0 if has_model else 4.4)
        figure = Figure(figsize=size, layout="constrained")
        heights = [2.6, 1.0] if has_model else [1.0]
        axes = figure.subplots(len(heights), len(tasks), squeeze=False, sharex="col", height_ratios=heights)
        for column, task in enumerate(tasks):
            chosen = [run for run in runs if run.task == task]
            _draw_returns(axes[0, column], task, chosen, colours)
            lowest = axes[0, column]
            if has_model:
                lowest = _draw_model_error(axes[1, column], chosen, colours) or lowest
            lowest.set_xlabel("environment steps")
            lowest.tick_params(labelbottom=True)
            lowest.xaxis.set_major_formatter(thousands)
            lowest.set_xlim(left=0)
        return write(figure, output)


def read_run(folder: Path) -> Run:
    """A run folder's evaluations and model errors; raises UserError if it is not one."""
    facts: Json = read_json(folder / "config.json")
    rows, metrics = read_evaluations(folder), read_metrics(folder)
    step = np.unique(rows["step"])
    returns = [rows["return"][rows["step"] == s] for s in step]
    errors = {}
    for name in metrics:
        if name.startswith(MODEL_ERROR):
            at, value = metrics["time/total_timesteps"], metrics[name]
            usable = np.isfinite(value) & (value > 0)  # the axis is logarithmic
            if usable.any():
                errors[int(name.removeprefix(MODEL_ERROR))] = (at[usable], value[usable])
    try:
        task, algo, seed = facts.get("task") or facts["env"]["id"], facts["algo"], facts["seed"]
        estimator, horizon = facts["targets"]["estimator"], facts["targets"]["horizon_steps"]
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{folder / 'config.json'} is not a run's: it has no {error}") from error
    return Run(
        task=task,
        algo=algo,
        horizon=0 if estimator == "one_step" else horizon,
        seed=seed,
        step=step,
        mean=np.array([r.mean() for r in returns]),
        low=np.array([r.min() for r in returns]),
        high=np.array([r.max() for r in returns]),
        episodes=max((len(r) for r in returns), default=0),
        errors=dict(sorted(errors.items())),
    )


def told_apart(runs: list[Run]) -> list[Run]:
    """Runs of one algorithm with different horizons are different algorithms in a picture."""
    horizons = {run.algo: {r.horizon for r in runs if r.algo == run.algo} for run in runs}
    return [
        run._replace(algo=f"{run.algo}, H = {run.horizon}") if len(horizons[run.algo]) > 1 else run
        for run in runs
    ]


def mean_curve(curves: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Mean of curves over the steps that all of them cover, interpolated where they were not measured."""
    first, last = max(step[0] for step, _ in curves), min(step[-1] for step, _ in curves)
    grid = np.unique(np.concatenate([step for step, _ in curves]))
    grid = grid[(grid >= first) & (grid <= last)]
    return grid, np.mean([np.interp(grid, step, value) for step, value in curves], axis=0)


def _draw_returns(axis: Any, task: str, runs: list[Run], colours: dict[str, str]) -> None:
    axis.set_title(task, loc="left", fontsize=13, fontweight="bold", pad=10)
    axis.set_ylabel("evaluation return")
    evaluated = [run for run in runs if len(run.step)]
    if not evaluated:
        axis.text(0.5, 0.5, "no evaluation yet", transform=axis.transAxes, ha="center", color="#888888")
        return
    for algo, group in _by_algo(evaluated).items():
        colour = colours[algo]
        if len(group) == 1:
            run = group[0]
            label = f"{algo}, seed {run.seed}:\nmean of {run.episodes} episodes"
        else:
            label = f"{algo}:\nmean of {len(group)} runs"
            for run in group:
                axis.plot(run.step, run.mean, color=colour, linewidth=0.9, alpha=0.45)
        average = mean_curve([(run.step, run.mean) for run in group])
        draw_line(axis, average, color=colour, linewidth=2.4, label=label)
    if len(evaluated) == 1:  # bands of several runs would hide each other
        run, colour = evaluated[0], colours[evaluated[0].algo]
        band = {"facecolor": colour, "edgecolor": colour, "alpha": 0.16, "linewidth": 0.5}
        axis.fill_between(run.step, run.low, run.high, label="worst to best", **band)
    _legend(axis)


def _draw_model_error(axis: Any, runs: list[Run], colours: dict[str, str]) -> Any:
    """Every depth of a single algorithm; the deepest of each where there are several. The axis, if used."""
    modelled = _by_algo([run for run in runs if run.errors])
    if not modelled:
        axis.set_axis_off()
        return None
    alone = len(modelled) == 1
    for algo, group in modelled.items():
        depths = list(group[0].errors)
        for i, depth in enumerate(depths if alone else depths[-1:]):
            curves = [run.errors[depth] for run in group if depth in run.errors]
            label = f"{'' if alone else f'{algo}:'}\n{depth} step{'s' * (depth > 1)} ahead".lstrip()
            fading = max(1.0 - 0.3 * i, 0.25) if alone else 1.0
            draw_line(axis, mean_curve(curves), color=colours[algo], alpha=fading, linewidth=1.6, label=label)
    axis.set_ylabel("model error\n(mse / variance)")
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter(lambda value, position: f"{value:g}")
    axis.yaxis.set_minor_formatter("")
    _legend(axis)
    return axis


def draw_line(axis: Any, points: tuple[np.ndarray, np.ndarray], **style: Any) -> None:
    """A line, or a point where it is only one: a line through that is invisible."""
    axis.plot(*points, marker="o" if len(points[0]) == 1 else None, **style)


def _by_algo(runs: list[Run]) -> dict[str, list[Run]]:
    return {
        algo: [run for run in runs if run.algo == algo] for algo in dict.fromkeys(run.algo for run in runs)
    }


def _legend(axis: Any) -> None:
    place = {"loc": "upper left", "bbox_to_anchor": (1.01, 1.0), "borderaxespad": 0.0}
    axis.legend(fontsize=9.5, labelspacing=0.8, handlelength=1.6, **place)


def thousands(steps: float, position: int = 0) -> str:
    """A number of steps as an axis shows it: 500, 25 k, 1 M."""
    del position
    return (
        f"{steps:.0f}"
        if abs(steps) < 1000
        else f"{steps / 1000:g} k"
        if steps < 1e6
        else f"{steps / 1e6:g} M"
    )


def write(figure: Any, output: Path) -> Path:
    """Whole or not at all; the suffix of the name decides the kind of picture."""
    written: Path | None = None
    try:
        written = output.with_name(f".writing.{output.name}")
        figure.savefig(written, dpi=150)
        written.replace(output)
    except (OSError, ValueError) as error:
        if written:
            written.unlink(missing_ok=True)
        raise UserError(f"cannot draw {output}: {getattr(error, 'strerror', None) or error}") from error
    return output
