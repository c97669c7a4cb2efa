"""The picture of a diagnosis, drawn from its numbers alone: model, critic, horizons, ensemble."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mve.messages import number
from mve.plot import COLOURS, GRID, INK, STYLE, write
from mve.types import Json

BLUE, ORANGE, GREEN = COLOURS[:3]
FAINT = "#8A8A8A"
HEADING, PANEL = 0.75, (6.0, 4.4)  # inches: height of the one, width and height of the other
PLAYED = {"fresh": "fresh episodes", "simulator": "fresh episodes", "replay": "remembered episodes"}
LOGGED = ("How fast does the model drift?", "error of logged actions replayed, 1 = spread of the data")
ON_POLICY = ("And where the policy leads it?", "error of the policy's own actions, against the simulator")


def draw(report: Json, output: Path) -> Path:
    """A panel for each thing that was measured: from the critic's alone to six."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    panels = _panels(report)
    rows = 2 if len(panels) > 3 else 1
    columns = -(-len(panels) // rows)
    with matplotlib.rc_context(STYLE):
        width, height = columns * PANEL[0] + 0.4, rows * PANEL[1] + HEADING
        below_heading = (0.0, 0.0, 1.0, 1.0 - HEADING / height)
        layout = ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.15, wspace=0.04, hspace=0.05, rect=below_heading)
        figure = Figure(figsize=(width, height), layout=layout)
        axes = np.ravel(figure.subplots(rows, columns))
        for axis, panel in zip(axes, panels, strict=False):
            panel(axis)
        for axis in axes[len(panels) :]:
            axis.set_axis_off()
        _draw_heading(figure, report)
        return write(figure, output)


def _panels(report: Json) -> list[Callable[[Any], None]]:
    """What there is to draw, in reading order."""
    has_model, has_simulator = "model_error" in report, "targets_by_horizon_in_simulator" in report
    panels: list[tuple[bool, Callable[[Any], None]]] = [
        (has_model, lambda axis: _draw_model_error(axis, report["model_error"], *LOGGED)),
        (has_simulator, lambda axis: _draw_model_error(axis, report["model_error_on_policy"], *ON_POLICY)),
        (True, lambda axis: _draw_values(axis, report)),
        (report.get("selector") is not None, lambda axis: _draw_horizons(axis, report)),
        (has_simulator, lambda axis: _draw_whose_error(axis, report)),
        (has_model, lambda axis: _draw_calibration(axis, report["calibration"])),
    ]
    return [draw for wanted, draw in panels if wanted]


def _draw_heading(figure: Any, report: Json) -> None:
    returns, height = report["returns"], figure.get_figheight()
    heading = f"{report['env']}   {report['algo']}, seed {report['seed']}, step {report['step']:,}"
    below = (
        f"{len(returns)} {PLAYED[report['mode']]}, mean return {np.mean(returns):,.1f}; "
        f"{report['scored']:,} states scored"
    )
    left = {"x": 0.2 / figure.get_figwidth(), "ha": "left", "va": "top"}
    figure.text(y=1 - 0.15 / height, s=heading, fontsize=15, fontweight="bold", **left)
    figure.text(y=1 - 0.45 / height, s=below, fontsize=11, color=FAINT, **left)


def _draw_model_error(axis: Any, error: Json, question: str, reading: str) -> None:
    """Medians with bands from the 16th to the 84th percentile, state and reward, in the data's spread."""
    depth, ends = error["depth"], {name: error[name]["median"][-1] or 0.0 for name in ("state", "reward")}
    for name, colour in (("reward", ORANGE), ("state", BLUE)):
        low, median, high = (_floats(error[name][level]) for level in ("low", "median", "high"))
        axis.fill_between(depth, low, high, color=colour, alpha=0.15, linewidth=0)
        axis.plot(depth, median, color=colour, linewidth=2.4, marker="o", markersize=4)
        side = "bottom" if ends[name] == max(ends.values()) else "top"
        _name(axis, float(depth[-1]), median[-1], name, colour, side)
    axis.set_ylim(bottom=0)
    axis.set_xticks(depth)
    axis.margins(x=0.02)
    _title(axis, question, reading)
    axis.set_xlabel("imagined steps")


def _draw_values(axis: Any, report: Json) -> None:
    """Predicted against earned discounted returns; on the diagonal all is well."""
    samples, target = report["samples"], report.get("target")
    earned = _floats(samples["return"])
    shown = [("critic", _floats(samples["critic"]), BLUE, report["critic"])]
    if target is not None and target["horizon"] > 0:
        shown.append((f"target, H = {target['horizon']}", _floats(samples["target"]), ORANGE, target))
    both = np.concatenate([earned, *(values for _, values, *_ in shown)])
    span = np.array([np.nanmin(both), np.nanmax(both)])
    axis.plot(span, span, color=INK, linewidth=1.0, linestyle=(0, (4, 3)), zorder=1)
    for label, values, colour, numbers in shown:
        text = f"{label}:  bias {number(numbers['bias'], '+.3g')},  rmse {number(numbers['rmse'], '.3g')}"
        axis.scatter(earned, values, s=7, color=colour, alpha=0.3, linewidth=0, label=text)
    legend = axis.legend(loc="upper left", fontsize=9.5, handletextpad=0.2, borderaxespad=0.2)
    for handle in legend.legend_handles:
        handle.set_alpha(1.0)
        handle.set_sizes([28])
    earners = " by the policies of the time" if report["mode"] == "replay" else ""
    _title(axis, "Does the critic know what comes?", f"predicted against earned{earners}; dashed: exact")
    axis.set_xlabel("discounted return earned")
    axis.set_ylabel("predicted")


def _draw_horizons(axis: Any, report: Json) -> None:
    """Error of the target by the horizon it would have had, and the weight that each horizon was given."""
    found, best = report["targets_by_horizon"], report["best_horizon"]
    horizon, rmse, bias = found["horizon"], _floats(found["rmse"]), _floats(found["bias"])
    weights = axis.twinx()
    weights.bar(horizon, _floats(report["horizon_weights"]), width=0.7, color=GRID, zorder=0)
    weights.set_ylim(0, 1)
    weights.set_axis_off()
    axis.set_zorder(weights.get_zorder() + 1)
    axis.set_facecolor("none")
    lines = (
        ("rmse", rmse, BLUE, "bottom"),
        (f"bias, {'high' if bias[-1] > 0 else 'low'}", np.abs(bias), ORANGE, "top"),
    )
    for name, values, colour, side in lines:
        axis.plot(horizon, values, color=colour, linewidth=2.4, marker="o", markersize=4)
        _name(axis, float(horizon[-1]), values[-1], name, colour, side)
    axis.plot(best, rmse[best], marker="o", markersize=11, color=BLUE, fillstyle="none", markeredgewidth=1.8)
    side = "right" if best == horizon[-1] else "center"  # not over the line's name
    place = {"xytext": (0, 10), "textcoords": "offset points", "ha": side}
    axis.annotate("least", (best, rmse[best]), color=BLUE, **place)
    axis.set_xticks(horizon)
    axis.margins(x=0.02, y=0.15)
    reading = "error of the critic's target; grey: mean weight it was given"
    _title(axis, "Which horizon would have been best?", reading)
    axis.set_xlabel("horizon, imagined steps before the critic")


def _draw_whose_error(axis: Any, report: Json) -> None:
    """The same targets made with the learned model and with the true one, and the best horizon by state."""
    learned, true = report["targets_by_horizon"], report["targets_by_horizon_in_simulator"]
    horizon, selector = learned["horizon"], report["selector"]
    chosen = axis.twinx()
    chosen.bar(horizon, _floats(selector["chosen"]), width=0.7, color=GRID, zorder=0)
    chosen.set_ylim(0, 1)
    chosen.set_axis_off()
    axis.set_zorder(chosen.get_zorder() + 1)
    axis.set_facecolor("none")
    share = selector["share_won"]
    won = "" if share is None else f"; the target comes {100 * share:.0f} % of the way"
    shown = {"color": BLUE, "linewidth": 2.4, "marker": "o", "markersize": 4}
    axis.plot(horizon, _floats(learned["rmse"]), label="learned model", **shown)
    shown |= {"color": GREEN, "linestyle": (0, (3, 2))}  # dashed: where the model is good they coincide
    axis.plot(horizon, _floats(true["rmse"]), label="true simulator", **shown)
    [least] = _floats([selector["rmse"]])
    axis.axhline(least, color=INK, linewidth=1.0, label=f"best horizon in each state{won}")
    axis.legend(loc="upper left", fontsize=9.5, borderaxespad=0.2)
    axis.set_xticks(horizon)
    axis.set_ylim(0, 1.4 * axis.dataLim.ymax)  # room for the legend above the lines
    axis.margins(x=0.02)
    _title(axis, "Whose error is it, model's or critic's?", "rmse of the target; grey: states it was best in")
    axis.set_xlabel("horizon, imagined steps before the critic")


def _draw_calibration(axis: Any, calibration: list[Json] | None) -> None:
    """Realised error against the members' spread, on logarithmic axes; above the diagonal: too sure."""
    from matplotlib.ticker import LogLocator

    _title(
        axis,
        "Does the ensemble know when it errs?",
        "members' mean; on the dashed line, yes; above it, too sure",
    )
    axis.set_xlabel("spread of the members")
    axis.set_ylabel("error")
    if calibration is None:
        axis.text(0.5, 0.5, "one member: no spread", transform=axis.transAxes, ha="center", color=FAINT)
        return
    lines = [(_floats(found["spread"]), _floats(found["error"])) for found in calibration]
    positive = np.concatenate([np.concatenate(line) for line in lines])
    positive = positive[np.isfinite(positive) & (positive > 0)]
    if positive.size == 0:
        axis.text(0.5, 0.5, "no error at all", transform=axis.transAxes, ha="center", color=FAINT)
        return
    span = [positive.min(), positive.max()]
    axis.plot(span, span, color=INK, linewidth=1.0, linestyle=(0, (4, 3)), zorder=1)
    for found, line, colour in zip(calibration, lines, COLOURS, strict=False):
        depth = found["depth"]
        label = f"{depth} step{'s' * (depth > 1)}: error {number(found['ratio'], '.3g')} x spread"
        axis.plot(*line, color=colour, linewidth=1.8, marker="o", markersize=4, label=label)
    axis.set_xscale("log")
    axis.set_yscale("log")
    for side in (axis.xaxis, axis.yaxis):
        side.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        side.set_major_formatter(lambda value, position: f"{value:g}")
        side.set_minor_formatter("")
    axis.legend(loc="lower right", fontsize=9.5)


def _title(axis: Any, question: str, reading: str) -> None:
    axis.set_title(question, loc="left", fontsize=12.5, fontweight="bold", pad=24)
    axis.text(0.0, 1.025, reading, transform=axis.transAxes, color=FAINT, fontsize=10)


def _name(axis: Any, x: float, y: float, name: str, colour: str, side: str = "center") -> None:
    """A line's name at its end, in place of a legend; `side` keeps two of them apart."""
    place = {"xytext": (9, 0), "textcoords": "offset points", "va": side, "annotation_clip": False}
    axis.annotate(name, (x, y), color=colour, fontweight="bold", **place)


def _floats(values: list[float | None]) -> np.ndarray:
    return np.array(values, np.float64)
