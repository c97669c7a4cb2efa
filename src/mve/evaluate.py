"""Stage 8, judge: what the deterministic policy earns in the real environment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from mve.envs.host import ActionSpace, action_size, episode_seed, native_action
from mve.envs.stepped import Fault, Restarts, Stepped
from mve.policies import Policy
from mve.types import Count, FaultError, Positive

EVALUATION_STREAM = 2  # first word of the seeds of evaluation episodes
LONGEST_EPISODE = 10_000  # steps, where the environment itself sets no limit


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """How often and how long the deterministic policy is tried, in environments of its own."""

    episodes: Positive = 10
    """Episodes per evaluation; every one's return is kept."""
    interval_steps: Count = 0
    """Environment steps between evaluations; 0: 1000 for budgets below 100 000 steps, 5000 from there on."""


class Evaluation(NamedTuple):
    """One number per episode."""

    returns: np.ndarray
    lengths: np.ndarray


def evaluate(
    envs: Sequence[Stepped],
    policy: Policy,
    space: ActionSpace,
    *,
    episodes: int,
    seed: int,
    step: int,
    longest: int,
    restarts: Restarts,
) -> Evaluation:
    """Undiscounted return of so many episodes, without noise; `policy` has NumPy leaves.

    As many episodes run side by side as there are environments, so that the policy is called once per step
    for all of them. Episode i is reset with a seed made of the run's seed, the step and i: the result depends
    on nothing else. One that a fault breaks off is played again from its beginning, or else FaultError is
    raised. An episode ends after `longest` steps at the latest.
    """
    seeds = [episode_seed(EVALUATION_STREAM, seed, step, i) for i in range(episodes)]
    parts = [
        _side_by_side(envs, policy, space, seeds[first : first + len(envs)], longest, restarts)
        for first in range(0, episodes, len(envs))
    ]
    return Evaluation(*(np.concatenate(numbers) for numbers in zip(*parts, strict=True)))


def _side_by_side(
    envs: Sequence[Stepped],
    policy: Policy,
    space: ActionSpace,
    seeds: Sequence[int],
    longest: int,
    restarts: Restarts,
) -> Evaluation:
    obs = np.stack([_begun(env, seed, restarts) for env, seed in zip(envs, seeds, strict=False)])
    returns, lengths = np.zeros(len(seeds)), np.zeros(len(seeds), np.int64)
    noise = np.zeros((len(seeds), action_size(space)), np.float32)
    running = np.ones(len(seeds), bool)
    while running.any():
        native = native_action(space, policy(obs, noise))
        for i in np.flatnonzero(running).tolist():
            try:
                obs[i], reward, terminated, truncated = envs[i].step(native[i])
            except Fault as fault:
                _give_up(f"at step {lengths[i] + 1} of evaluation episode {i}, {fault}", restarts)
                obs[i], returns[i], lengths[i] = _begun(envs[i], seeds[i], restarts), 0.0, 0
                continue
            returns[i] += reward
            lengths[i] += 1
            running[i] = not (terminated or truncated or lengths[i] == longest)
    return Evaluation(returns, lengths)


def _begun(env: Stepped, seed: int, restarts: Restarts) -> np.ndarray:
    while True:
        try:
            return env.reset(seed)
        except Fault as fault:
            _give_up(f"at the reset of an evaluation episode, {fault}", restarts)


def _give_up(told: str, restarts: Restarts) -> None:
    if not restarts.allow(told):
        raise FaultError(restarts.in_vain(told))
