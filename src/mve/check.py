"""Is a reward or termination function that of the environment? Asked of real transitions.

Uniform random actions are played in the real environment, and each function is asked about every step in
the environment's own units. Where it disagrees, the worst steps are kept and the usual slips are tried: an
offset, a factor, a negation, obs exchanged with next_obs, actions in the wrong units.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import gymnasium as gym
import jax
import numpy as np
from gymnasium.spaces import Box, Discrete

from mve.envs.given import What, action_dtype, fault
from mve.envs.host import HostEnv, native_action, random_actions
from mve.envs.known import known_functions
from mve.types import Json, Known, UserError

TOLERANCE = 1e-4  # share of the largest reward observed: room for float32, and for a simulator's rounding
SMALLEST_TOLERANCE = 1e-6
SHOWN = 5  # disagreements
WIDEST = 6  # numbers of a vector that are printed
NOTHING = Known()


class Steps(NamedTuple):
    """Real transitions in the environment's own units."""

    obs: np.ndarray
    action: np.ndarray
    next_obs: np.ndarray
    agents_action: np.ndarray  # the same actions in [-1, 1], or one-hot
    reward: np.ndarray
    terminated: np.ndarray
    step: np.ndarray


class Candidate(NamedTuple):
    """A function to be scored, and where it came from in the user's words."""

    what: What
    source: str
    function: Callable[[Any, Any, Any], Any]

    def __str__(self) -> str:
        return f"{self.what} {self.source}"


@dataclass(frozen=True)
class Score:
    """How one function did."""

    what: What
    source: str
    agrees: bool
    verdict: str
    numbers: Json
    worst: list[Json]  # step, obs, action, next_obs, told, observed


@dataclass(frozen=True)
class Report:
    """How all of them did."""

    env: str
    steps: int
    seed: int
    scores: list[Score]

    @property
    def agrees(self) -> bool:
        return all(score.agrees for score in self.scores)


def check(
    env: gym.Env,
    known: Known = NOTHING,
    *,
    sources: Mapping[str, str | None] | None = None,
    steps: int = 2000,
    seed: int = 0,
    tolerance: float = TOLERANCE,
) -> Report:
    """Score the functions of `known` on fresh steps; those that the project ships if it has none.

    A reward agrees if every error is at most `tolerance` times the largest reward observed. Raises
    UserError for a function that cannot be scored: it fails, or answers with a wrong shape or dtype, or
    with what is not finite.
    """
    host = HostEnv(env, seed=seed)
    candidates = _candidates(env, host.spec.name, known, sources or {})
    faults = [fault(str(c), c.what, c.function, host.spec.obs_size, env.action_space) for c in candidates]
    if any(faults):
        raise UserError("; ".join(filter(None, faults)))
    played = play(env, host, steps, seed)
    scores = [
        _score_reward(c, played, tolerance) if c.what == "reward" else _score_termination(c, played)
        for c in candidates
    ]
    return Report(env=host.spec.name, steps=steps, seed=seed, scores=scores)


def _candidates(env: gym.Env, name: str, known: Known, sources: Mapping[str, str | None]) -> list[Candidate]:
    if known == NOTHING:
        known, sources = known_functions(env), dict.fromkeys(Known._fields, "shipped with mve")
    if known == NOTHING:
        raise UserError(
            f"{name}: no function is given and none is shipped; "
            "give --reward FILE:FUNC or --termination FILE:FUNC"
        )
    both: tuple[tuple[What, Any], ...] = (("reward", known.reward), ("termination", known.termination))
    return [Candidate(what, sources.get(what) or "given", fn) for what, fn in both if fn is not None]


def play(env: gym.Env, host: HostEnv, steps: int, seed: int) -> Steps:
    """So many real steps with actions drawn uniformly from the action space."""
    rng, space = np.random.default_rng(seed), env.action_space
    assert isinstance(space, Box | Discrete)
    actions = iter(random_actions(space, rng, steps))
    rows, _ = host.collect(lambda obs: next(actions), steps)
    agents_action = np.asarray(rows.action)
    return Steps(
        obs=np.asarray(rows.obs),
        action=native_action(space, agents_action).astype(action_dtype(space)),
        next_obs=np.asarray(rows.next_obs),
        agents_action=agents_action,
        reward=np.asarray(rows.reward),
        terminated=np.asarray(rows.continuation) == 0,
        step=np.asarray(rows.step),
    )


def _told(candidate: Candidate, steps: Steps) -> np.ndarray:
    """The function's answers, all finite."""
    told = np.asarray(jax.jit(candidate.function)(steps.obs, steps.action, steps.next_obs))
    if not np.isfinite(told).all():
        row = int(np.argmin(np.isfinite(told)))
        place = f"obs {_short(steps.obs[row])}, action {_short(steps.action[row])}"
        raise UserError(f"{candidate} is {told[row]} at step {steps.step[row]} [{place}]")
    return told


def _score_reward(candidate: Candidate, steps: Steps, tolerance: float) -> Score:
    """Errors |told - observed|; the worst first."""
    told, observed = _told(candidate, steps).astype(np.float64), steps.reward.astype(np.float64)
    error = np.abs(told - observed)
    allowed = max(tolerance * float(np.abs(observed).max()), SMALLEST_TOLERANCE)
    wrong = error > allowed
    numbers: Json = {
        "largest_error": float(error.max()),
        "mean_error": float(error.mean()),
        "tolerance": allowed,
        "within_tolerance": float(1.0 - wrong.mean()),
    }
    order = np.argsort(-error, kind="stable")[: min(SHOWN, wrong.sum())]
    verdict = "agrees with every reward observed"
    if wrong.any():
        verdict = (
            f"disagrees on {wrong.sum()} of {wrong.size} steps, by {error.max():.3g} at step "
            f"{steps.step[order[0]]}. {_reward_slip(candidate, told, steps, allowed)}"
        )
    worst = _rows(order, steps, told, observed)
    return Score(candidate.what, candidate.source, not wrong.any(), verdict, numbers, worst)


def _reward_slip(candidate: Candidate, told: np.ndarray, steps: Steps, allowed: float) -> str:
    """The change that would make every answer right, if it is one of the usual ones; else what to do."""
    observed = steps.reward.astype(np.float64)

    def right(answers: Any) -> bool:
        return bool(np.all(np.abs(np.asarray(answers, np.float64) - observed) <= allowed))

    offset, square = float(np.median(told - observed)), float(told @ told)
    factor = float(told @ observed) / square if square > 0 else 0.0
    if right(told - offset):
        return f"It is {abs(offset):.4g} too {'high' if offset > 0 else 'low'} on every step."
    if factor != 0 and right(factor * told):
        return "Its sign is wrong on every step." if right(-told) else f"It lacks a factor of {factor:.4g}."
    explained = 1.0 - float(np.var(told - observed) / max(np.var(observed), 1e-12))
    close = f"It explains {100 * explained:.3f} % of the variance, which may do. " if explained > 0.99 else ""
    return _exchange(candidate, steps, right) or close + _advice(candidate)


def _exchange(candidate: Candidate, steps: Steps, right: Callable[[Any], bool]) -> str:
    """Whether the function would be right with its arguments in other places or units."""
    function = jax.jit(candidate.function)
    with np.errstate(all="ignore"):
        if right(function(steps.next_obs, steps.action, steps.obs)):
            return "It is right with obs and next_obs exchanged."
        same_shape = steps.agents_action.shape == steps.action.shape  # not so where they are one-hot
        if same_shape and right(function(steps.obs, steps.agents_action, steps.next_obs)):
            return "It is right for actions in [-1, 1], but it is given the environment's own units."
    return ""


def _advice(candidate: Candidate) -> str:
    return f"Mend it after the steps below, or have it learned: --set dynamics.{candidate.what}=learned."


def _score_termination(candidate: Candidate, steps: Steps) -> Score:
    """Confusion counts; the first disagreements."""
    told, observed = _told(candidate, steps), steps.terminated
    wrong = told != observed
    numbers: Json = {
        "both_end": int((told & observed).sum()),
        "neither_ends": int((~told & ~observed).sum()),
        "missed_ends": int((~told & observed).sum()),
        "false_ends": int((told & ~observed).sum()),
    }
    if wrong.any():
        verdict = (
            f"disagrees on {wrong.sum()} of {wrong.size} steps: {numbers['missed_ends']} ends missed, "
            f"{numbers['false_ends']} ends that were none. {_termination_slip(candidate, told, steps)}"
        )
    elif observed.any():
        verdict = f"agrees on every step, {observed.sum()} of which ended an episode"
    else:
        verdict = "agrees, but no step terminated an episode, so no end was tested; --steps N plays longer"
    order = np.flatnonzero(wrong)[:SHOWN]
    worst = _rows(order, steps, told, observed)
    return Score(candidate.what, candidate.source, not wrong.any(), verdict, numbers, worst)


def _termination_slip(candidate: Candidate, told: np.ndarray, steps: Steps) -> str:
    if np.array_equal(~told, steps.terminated):
        return "It says the opposite: True has to mean that the episode ends."
    right = lambda answers: np.array_equal(answers, steps.terminated)  # noqa: E731
    return _exchange(candidate, steps, right) or _advice(candidate)


def _rows(order: np.ndarray, steps: Steps, told: np.ndarray, observed: np.ndarray) -> list[Json]:
    return [
        {
            "step": int(steps.step[i]),
            "obs": steps.obs[i].tolist(),
            "action": steps.action[i].tolist(),
            "next_obs": steps.next_obs[i].tolist(),
            "told": told[i].item(),
            "observed": observed[i].item(),
        }
        for i in order
    ]


def _short(x: Any) -> str:
    """A number, a truth value or a vector in a few characters."""
    if isinstance(x, bool):
        return str(x)
    numbers = [f"{n:.4g}" for n in np.atleast_1d(x)]
    return " ".join(numbers if len(numbers) <= WIDEST else [*numbers[:WIDEST], f"... ({len(numbers)})"])


def show(report: Report) -> None:
    """The report in words, on stdout."""
    print(f"{report.env}: {report.steps} real steps with random actions, seed {report.seed}")
    for score in report.scores:
        print(f"\n{score.what} {score.source} {score.verdict}")
        print("  " + ", ".join(f"{name.replace('_', ' ')} {_short(x)}" for name, x in score.numbers.items()))
        for row in score.worst:
            step, obs, action, next_obs, told, observed = (_short(x) for x in row.values())
            print(f"  step {step}: told {told}, observed {observed}")
            print(f"    obs {obs}   action {action}   next_obs {next_obs}")
