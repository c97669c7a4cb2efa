"""Stage 8, judge: what the deterministic policy earns in the real environment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import gymnasium as gym
import numpy as np

from mve.envs.host import action_size, episode_seed, native_action
from mve.policies import Policy
from mve.types import Count, Positive

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


def evaluate(envs: Sequence[gym.Env], policy: Policy, *, seed: int, step: int) -> Evaluation:
    """Undiscounted return of one episode in each environment, without noise; `policy` has NumPy leaves.

    Episodes run side by side, so that the policy is called once per step for all of them. Episode i is
    reset with a seed made of the run's seed, the step and i: the result depends on nothing else.
    """
    space = envs[0].action_space
    assert isinstance(space, gym.spaces.Box | gym.spaces.Discrete)
    resets = [env.reset(seed=episode_seed(EVALUATION_STREAM, seed, step, i)) for i, env in enumerate(envs)]
    obs = np.stack([obs for obs, _ in resets]).astype(np.float32)
    returns, lengths = np.zeros(len(envs)), np.zeros(len(envs), np.int64)
    noise = np.zeros((len(envs), action_size(space)), np.float32)
    running = np.ones(len(envs), bool)
    while running.any():
        native = native_action(space, policy(obs, noise))
        for i in np.flatnonzero(running).tolist():
            obs[i], reward, terminated, truncated, _ = envs[i].step(native[i])
            returns[i] += float(reward)
            lengths[i] += 1
            running[i] = not (terminated or truncated or lengths[i] == LONGEST_EPISODE)
    return Evaluation(returns, lengths)
