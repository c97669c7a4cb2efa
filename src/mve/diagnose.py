"""How far a run's model, critic and targets are from the truth, measured on real episodes.

Fresh ones are played with the target policy, the one whose value the critic is asked for (SAC: the Gaussian
actor; TD3: the smoothed slow actor; DDPG: the slow actor; DQN: the choice of the current critic or, if not
double, of the slow one). What they pay is then an unbiased sample of that value, b being the bonus of acting
(SAC's entropy term):

    G_t = r_t + gamma c_t (b_{t+1} + G_{t+1}).

Against G_t stand the critic's Q(s_t, a_t) and the target of every horizon k,

    y_k = r_t + gamma c_t C_k(s_{t+1}),    C_k of `targets.candidate_returns`, imagined as in training;

against the real states stand those that the model reaches by the logged actions. Where the simulator can be
set to a state, it also tries the actions that the policy takes in imagination, and targets are made with it
in the model's place: what error is left is the critic's. The report's `mode` says what was used:

    simulator    fresh episodes, and the simulator set to their states
    fresh        fresh episodes alone
    replay       no environment step at all: the newest episodes that the run remembers. The model has been
                 fitted to them, so its errors are lower bounds; their returns are the behaviour policies',
                 so the critic's bias takes in how far the policy has moved on. Targets are not judged.

A fresh episode goes on past its time limit until what follows counts for one per cent, where the task is a
Gymnasium id; its first steps, within the limit, are the ones judged. An episode that is cut off all the same
has its tail valued by the critic, and steps in whose G that tail weighs more than 5 % are not scored; where
none weighs less, the lightest quarter is. The variance of G is a floor under every root mean square here;
biases have none.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from mve import episodes, log, measure, picture
from mve.dynamics import Dynamics, Limits
from mve.evaluate import LONGEST_EPISODE
from mve.learner import Learner
from mve.measure import Played, plain
from mve.messages import number
from mve.networks import usable_spread
from mve.types import Json, StepFn, Transition, UserError

DEEPEST = 10  # steps of open loop, and horizons tried, or the run's own horizon if that is longer
MOST_STARTS = 5000  # states that are judged
LARGEST_TAIL = 0.05  # weight in a return of what was not played, as far as it is accepted
IMAGINED_STARTS, LONGEST_DREAM = 512, 1000  # states and steps of returns in the model
BINS, SAMPLES = 12, 1500  # of the calibration; pairs of value and return that are kept for the picture


class Judged(NamedTuple):
    """The steps that critic and targets are scored on, and what they earned."""

    played: Transition  # every step
    starts: Array  # those that are scored
    rows: Transition
    earned: np.ndarray
    tail: np.ndarray


def diagnose(learner: Learner, num_episodes: int = 5, *, from_replay: bool = False) -> Json:
    """Every number, as plain data: model error by depth, critic, targets by horizon, calibration."""
    settings, recipe = learner.config, learner.recipe
    deepest = max(DEEPEST, recipe.expanded_steps, recipe.targets.recalled_steps)
    simulator, why_not = None, "replay was asked for"
    with log.capture_mujoco_warnings(None):
        if from_replay:
            played = episodes.remembered(learner, num_episodes)
        else:
            played = episodes.play(learner, num_episodes)
            simulator, why_not = _simulator(learner)
        limit = learner.spec.max_episode_steps or LONGEST_EPISODE
        starts = _thinned(np.flatnonzero(played.time < limit), MOST_STARTS)
        within = jax.tree.map(lambda x: x[played.time < limit], played)
        returns = np.bincount(within.rows.episode, within.rows.reward)
        report: Json = {
            "mode": "replay" if from_replay else "fresh" if simulator is None else "simulator",
            "why_no_simulator": why_not,
            "env": learner.spec.name,
            "algo": settings.algo,
            "seed": settings.seed,
            "step": learner.num_timesteps,
            "discount": settings.targets.discount,
            "returns": plain(returns),
            "lengths": np.bincount(within.rows.episode).tolist(),
            "starts": len(starts),
        }
        judged = judged_steps(learner, played, starts)
        report |= _critic(learner, judged)
        if not from_replay:
            shown, found = _targets(learner, judged, simulator, deepest)
            report["samples"]["target"] = shown
            report |= found
        if (model := learner.state.model) is not None:
            report |= _model_errors(learner, model, played, starts, deepest)
            if model.limits is not None:
                report["terminations"] = _terminations(model.limits)
            if not from_replay:
                report["in_model"] = _in_model(learner, model, judged)
            if simulator is not None and recipe.simulator is None:
                report |= _on_policy(learner, model, simulator, played, starts, deepest)
    return report


def _simulator(learner: Learner) -> tuple[StepFn | None, str | None]:
    """The true dynamics, or why there are none to compare with."""
    if not learner.recipe.uses_model:
        return None, "the run imagines nothing"
    try:
        return learner.recipe.simulator or learner.run.simulator(), None
    except UserError as error:
        return None, str(error)


def write(report: Json, folder: Path) -> Path:
    """diagnosis.json and diagnosis.png into a folder, which is made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        log.write_json(folder / "diagnosis.json", report)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}") from error
    picture.draw(report, folder / "diagnosis.png")
    return folder


# Judging


def judged_steps(learner: Learner, played: Played, starts: np.ndarray) -> Judged:
    """Some of the steps played, but for those in whose return what was not played weighs too much."""
    ends, tail_value = np.flatnonzero(played.last), np.zeros(len(played.last), np.float32)
    tail_value[ends] = measure.state_values(learner.state.agent, played.rows.next_obs[ends])
    earned, tail = measure.monte_carlo_returns(played, tail_value, learner.config.targets.discount)
    kept = starts[tail[starts] <= LARGEST_TAIL]
    if len(kept) == 0:
        kept = np.sort(starts[np.argsort(tail[starts], kind="stable")[: -(-len(starts) // 4)]])
    everything: Transition = jax.tree.map(jnp.asarray, played.rows)
    rows: Transition = jax.tree.map(lambda x: x[kept], everything)
    return Judged(everything, jnp.asarray(kept), rows, earned[kept], tail[kept])


def _critic(learner: Learner, judged: Judged) -> Json:
    """The critic against the returns that were earned."""
    rows, earned, tail = judged.rows, judged.earned, judged.tail
    critic = np.asarray(measure.critic_values(learner.state.agent, rows.obs, rows.action))
    shown = _thinned(np.arange(len(earned)), SAMPLES)
    return {
        "scored": len(earned),
        "largest_tail_weight": plain([tail.max()])[0],
        "return_std": plain([earned.std()])[0],
        "critic": measure.score(critic, earned),
        "samples": {"return": plain(earned[shown]), "critic": plain(critic[shown])},
    }


def _targets(
    learner: Learner, judged: Judged, simulator: StepFn | None, deepest: int
) -> tuple[list[float | None], Json]:
    """Some of the critic's targets, and how far they are from what was earned, by horizon.

    All after one real step. What a target of several of them would be is told apart: here they are the very
    steps that earned it, where in training older policies took them.
    """
    state, recipe = learner.state, learner.recipe
    # The replay has nothing that ran beside fresh episodes.
    recipe = replace(recipe, dynamics=replace(recipe.dynamics, on_policy_corrections=False))
    after_one = replace(recipe, targets=replace(recipe.targets, n_step=1, n_step_drawn=False))
    rows, earned = judged.rows, judged.earned
    by_horizon = np.asarray(measure.targets_by_horizon(state.agent, state.model, recipe, rows, deepest))
    used = max(recipe.expanded_steps, recipe.targets.recalled_steps)
    estimated = measure.estimated_targets(state, after_one, judged.played, judged.starts)
    target, weights = np.asarray(estimated.value)[: len(earned)], plain(estimated.horizon_weight)
    shown = _thinned(np.arange(len(earned)), SAMPLES)
    found: Json = {
        "target": {"horizon": used} | measure.score(target, earned),
        "targets_by_horizon": _by_horizon(by_horizon, earned),
        "best_horizon": int(np.argmin(measure.numbers_first(np.mean((by_horizon - earned) ** 2, axis=1)))),
        "horizon_weights": weights + [0.0] * (len(by_horizon) - len(weights)),
        "selector": measure.selector(by_horizon, target, earned) if len(by_horizon) > 1 else None,
    }
    if (n_step := recipe.targets.n_step) > 1:
        summed = measure.estimated_targets(state, recipe, judged.played, judged.starts)
        score = measure.score(np.asarray(summed.value)[: len(earned)], earned)
        found["target_of_several_steps"] = {"n_step": n_step} | score
    if simulator is not None and recipe.simulator is None:
        true = replace(recipe, simulator=simulator)
        exact = measure.targets_by_horizon(state.agent, None, true, rows, deepest)
        found["targets_by_horizon_in_simulator"] = _by_horizon(np.asarray(exact), earned)
    return plain(target[shown]), found


def _by_horizon(values: np.ndarray, earned: np.ndarray) -> Json:
    scores = [measure.score(value, earned) for value in values]
    return {
        "horizon": list(range(len(scores))),
        **{name: [score[name] for score in scores] for name in scores[0]},
    }


def _in_model(learner: Learner, model: Dynamics, judged: Judged) -> Json:
    """The policy's returns if the model were the world: a critic that has learned all it can is as wrong."""
    some = _thinned(np.arange(len(judged.earned)), IMAGINED_STARTS)
    rows: Transition = jax.tree.map(lambda x: x[some], judged.rows)
    # Until what follows counts for one per cent.
    discount = min(max(learner.config.targets.discount, 1e-3), 1 - 1e-6)
    steps = min(LONGEST_DREAM, math.ceil(math.log(0.01) / math.log(discount)))
    worth, ends = measure.returns_in_model(learner.state.agent, model, learner.recipe, rows, steps)
    return measure.score(np.asarray(worth), judged.earned[some]) | {
        "steps": steps,
        "ends": plain([ends])[0],
        "ends_played": plain([1.0 - np.mean(np.asarray(judged.played.continuation))])[0],
    }


def _model_errors(
    learner: Learner, model: Dynamics, played: Played, starts: np.ndarray, deepest: int
) -> Json:
    """Error by depth in units of the replay's spread, and the members' spread against it."""
    recipe = learner.recipe
    ends = np.flatnonzero(played.last)
    remaining = ends[np.searchsorted(ends, starts)] - starts + 1
    deepest = min(deepest, int(remaining.max()))
    rows: Transition = jax.tree.map(jnp.asarray, played.rows)
    errors = measure.open_loop(model, recipe, rows, jnp.asarray(starts), *_spreads(learner), deepest)
    valid = remaining[None] > np.arange(deepest)[:, None]
    depths = sorted({1, (1 + deepest) // 2, deepest})
    several = recipe.dynamics.members > 1
    return {
        "model_error": _errors_by_depth(errors.state, errors.reward, errors.wrong_end, valid),
        "calibration": measure.calibration(errors, valid, depths, BINS) if several else None,
    }


def _terminations(limits: Limits) -> Json:
    """What ends the model's episodes: limits of coordinates (number, < or >, threshold), or a net's word."""
    sides = ("<", np.asarray(limits.lower)), (">", np.asarray(limits.upper))
    found = [
        [int(i), sign, *plain([edge[i]])] for sign, edge in sides for i in np.flatnonzero(np.isfinite(edge))
    ]
    return {
        "by": "limits" if limits.hold else "net",
        "limits": sorted(found),
        "explained": plain([limits.explained])[0],
        "ends": int(limits.count),
    }


def _on_policy(
    learner: Learner, model: Dynamics, simulator: StepFn, played: Played, starts: np.ndarray, deepest: int
) -> Json:
    """Error by depth under the policy's own actions, which the simulator tries as well."""
    obs = jnp.asarray(played.rows.obs[starts])
    rolled = measure.on_policy(learner.state.agent, model, learner.recipe, simulator, obs, deepest)
    obs_spread, reward_spread = _spreads(learner)
    errors = measure.on_policy_errors(rolled, obs_spread, reward_spread)
    valid = np.asarray(errors.running)
    valid = valid[: max(int(valid.any(axis=1).sum()), 1)]
    error = _errors_by_depth(errors.state[:, None], errors.reward[:, None], errors.wrong_end[:, None], valid)
    return {"model_error_on_policy": error}


def _errors_by_depth(state: Array, reward: Array, wrong_end: Array, valid: np.ndarray) -> Json:
    """Percentiles over members and states of errors (K, M, B), where `valid` (K, B) says."""
    deepest = len(valid)

    def by_depth(x: Array) -> Json:
        of_depth = (np.percentile(np.asarray(x[k])[:, valid[k]], (16, 50, 84)) for k in range(deepest))
        with np.errstate(invalid="ignore"):  # a model that diverges is no mistake of ours
            low, median, high = zip(*of_depth, strict=True)
        return {"low": plain(low), "median": plain(median), "high": plain(high)}

    return {
        "depth": list(range(1, deepest + 1)),
        "state": by_depth(state),
        "reward": by_depth(reward),
        "wrong_end": plain(np.asarray(wrong_end[k])[:, valid[k]].mean() for k in range(deepest)),
    }


def _spreads(learner: Learner) -> tuple[Array, Array]:
    """Of the states and rewards in the replay."""
    memory = learner.state.replay
    states, rewards = (np.asarray(x)[: int(memory.size)] for x in (memory.rows.next_obs, memory.rows.reward))
    return _spread(states), _spread(rewards)


def _spread(x: np.ndarray) -> Array:
    """Standard deviation of each column; 1 for one that hardly moves, as in the model's own scaling."""
    return jnp.asarray(usable_spread(np.std(x, axis=0), np.mean(x, axis=0)), jnp.float32)


def _thinned(index: np.ndarray, most: int) -> np.ndarray:
    """At most so many of them, evenly spaced."""
    return index[np.linspace(0, len(index) - 1, min(len(index), most)).astype(int)]


def summary(report: Json, folder: Path) -> str:
    """What a person wants to know first."""
    critic, error = report["critic"], report.get("model_error")
    played = "remembered" if report["mode"] == "replay" else "fresh"
    lines = [
        f"{report['env']}, {report['algo']}, step {report['step']}: "
        f"{len(report['returns'])} {played} episodes, {report['scored']} states scored",
        f"returns      {np.mean(report['returns']):.1f} ± {np.std(report['returns']):.1f} an episode; "
        f"discounted they spread by {_shown(report['return_std'])}",
        f"critic       bias {_shown(critic['bias'], '+')}, root mean square error {_shown(critic['rmse'])}",
    ]
    if report.get("selector") is not None:
        lines += _about_targets(report)
    if error is not None:
        lines.append(_about_model("model", error, "logged actions"))
    if (dream := report.get("in_model")) is not None:
        lines.append(
            f"imagined     bias {_shown(dream['bias'], '+')} of returns in the model alone; "
            f"{_rate(dream['ends'])} ends an episode there, in truth {_rate(dream['ends_played'])}"
        )
    if (found := report.get("terminations")) is not None:
        lines.append(_about_terminations(found))
    if "model_error_on_policy" in report:
        lines.append(_about_model("on policy", report["model_error_on_policy"], "the policy's own actions"))
    for found in report.get("calibration") or []:
        lines.append(
            f"ensemble     {found['depth']} deep: error {_shown(found['ratio'])} times the members' spread"
        )
    if report["largest_tail_weight"] > LARGEST_TAIL:
        lines.append(
            f"careful      episodes are short: up to {100 * report['largest_tail_weight']:.0f} % of a return "
            "is the critic's own guess, which hides its errors"
        )
    if report["mode"] == "replay":
        lines.append(
            "careful      the model was fitted to these episodes, and policies of their time played them"
        )
    elif report["mode"] == "fresh" and (error is not None or report.get("selector") is not None):
        lines.append(f"simulator    not asked: {report['why_no_simulator']}")
    return "\n".join([*lines, f"written      {folder}"])


def _shown(x: float | None, sign: str = "") -> str:
    return number(x, f"{sign}.4g")


def _rate(share: float) -> str:
    return f"one step in {1 / share:.0f}" if share else "none"


def _about_terminations(found: Json) -> str:
    if not found["ends"]:
        return "ends         none was seen so far, so none is imagined"
    limits = " or ".join(f"s[{i}] {sign} {edge:.4g}" for i, sign, edge in found["limits"])
    share = "all" if found["explained"] == 1.0 else f"{100 * found['explained']:.0f} % of"
    said = f"ends         {limits or 'limits of one number'}: explain {share} {found['ends']} ends"
    return f"{said}, so a net is asked" if found["by"] == "net" else said


def _about_targets(report: Json) -> list[str]:
    target, found, best = report["target"], report["targets_by_horizon"], report["best_horizon"]
    selector, exact = report["selector"], report.get("targets_by_horizon_in_simulator")
    lines = [
        f"target H={target['horizon']}   bias {_shown(target['bias'], '+')}, root mean square error "
        f"{_shown(target['rmse'])}; least at H={best}: {_shown(found['rmse'][best])}"
    ]
    if (several := report.get("target_of_several_steps")) is not None:
        lines.append(
            f"real steps   after up to {several['n_step']} of these episodes': bias "
            f"{_shown(several['bias'], '+')}, root mean square error {_shown(several['rmse'])}"
        )
    if exact is not None:
        used = target["horizon"]
        lines.append(
            f"true model   root mean square error {_shown(exact['rmse'][used])} at H={used}, "
            f"{_shown(exact['rmse'][-1])} at H={exact['horizon'][-1]}: what the critic and chance leave"
        )
    share = selector["share_won"]
    won = "" if share is None else f"; the target wins {100 * share:.0f} % of what that gains over one step"
    return [*lines, f"selector     {_shown(selector['rmse'])} with each state's best horizon{won}"]


def _about_model(name: str, error: Json, actions: str) -> str:
    first, last = error["state"]["median"][0], error["state"]["median"][-1]
    return (
        f"{name:13s}error {_shown(first)} after 1 step, {_shown(last)} after {error['depth'][-1]}, "
        f"in spreads of the data ({actions})"
    )
