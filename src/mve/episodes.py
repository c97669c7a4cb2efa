"""The real episodes that a run is judged on: played anew, or those that its replay remembers."""

from __future__ import annotations

import math
from dataclasses import replace

import jax
import numpy as np
from jaxtyping import Array

from mve.agents import Agent
from mve.envs import host
from mve.envs.host import HostEnv
from mve.evaluate import LONGEST_EPISODE
from mve.learner import Learner
from mve.measure import Played
from mve.replay import Replay
from mve.types import Transition, UserError

TAIL = 0.01  # weight of what is not played: aimed at
DIAGNOSIS_STREAM = 4  # first word of the seeds of these episodes; training and evaluation have others


def play(learner: Learner, episodes: int) -> Played:
    """So many whole episodes of the target policy, in an environment of their own."""
    settings, agent = learner.config, learner.state.agent
    limit, cuts_reward = learner.spec.max_episode_steps, settings.env.truncation_is_terminal
    env_config = settings.env
    makes = env_config.id and learner.run.evaluation_envs.gathering is None
    if limit is not None and makes and not cuts_reward:
        longer = limit + _steps_until(TAIL, settings.targets.discount)
        env_config = replace(env_config, kwargs={**(env_config.kwargs or {}), "max_episode_steps": longer})
    env = host.make(env_config) if makes else learner.run.evaluation_envs.another()
    seeds = [host.episode_seed(DIAGNOSIS_STREAM, settings.seed, number) for number in range(episodes)]
    played = [
        _play_episode(HostEnv(env, seed=seed, truncation_is_terminal=cuts_reward), agent, number)
        for number, seed in enumerate(seeds)
    ]
    return jax.tree.map(lambda *x: np.concatenate(x), *played)


def _play_episode(env: HostEnv, agent: Agent, number: int) -> Played:
    bonuses, rows, ended = [], [], []

    def policy(obs: np.ndarray) -> np.ndarray:
        action, bonus = jax.device_get(_act(agent, obs, number, len(bonuses)))
        bonuses.append(bonus)
        return action

    while not ended and len(rows) < LONGEST_EPISODE:
        row, ended = env.collect(policy, 1)
        rows.append(row)
    joined: Transition = jax.tree.map(lambda *x: np.concatenate(x), *rows)
    time = np.arange(len(rows))
    joined = joined._replace(episode=np.full_like(joined.episode, number))
    return Played(joined, np.array(bonuses, np.float32), time == time[-1], time)


@jax.jit
def _act(agent: Agent, obs: Array, episode: Array, step: Array) -> tuple[Array, Array]:
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(DIAGNOSIS_STREAM), episode), step)
    action, bonus = agent.target_policy(obs[None], key)
    return action[0], bonus[0]


def _steps_until(weight: float, discount: float) -> int:
    """n with discount^n = weight, rounded up; none at all where the discount is 0 or 1."""
    if not 0 < discount < 1:
        return 0
    return min(math.ceil(math.log(weight) / math.log(discount)), LONGEST_EPISODE)


def remembered(learner: Learner, episodes: int) -> Played:
    """The newest whole episodes in the replay, at most so many; if there is none, all that it has.

    They are the behaviour policies', noise and all. Their bonus is that of the present policy in their
    states. No step is taken in any environment.
    """
    rows, limit = in_order(learner.state.replay), learner.spec.max_episode_steps
    if len(rows.reward) == 0:
        raise UserError(f"{learner.folder} remembers no steps yet; there is nothing to judge")
    number, first, length = np.unique(rows.episode, return_index=True, return_counts=True)
    whole = np.ones(len(number), bool)
    # The newest may still be running, the oldest may have lost its beginning to the ring.
    whole[-1] = rows.continuation[-1] == 0 or length[-1] == limit
    if learner.state.replay.size == learner.state.replay.capacity:
        whole[0] &= length[0] == limit
    chosen = number[whole][-episodes:] if whole.any() else number
    kept = np.isin(rows.episode, chosen)
    time = (np.arange(len(rows.reward)) - np.repeat(first, length))[kept]
    rows: Transition = jax.tree.map(lambda x: x[kept], rows)
    last = np.append(rows.episode[1:] != rows.episode[:-1], True)
    rows = rows._replace(episode=np.searchsorted(chosen, rows.episode).astype(np.int32))
    return Played(rows, np.asarray(_bonus(learner.state.agent, rows.obs)), last, time)


def in_order(memory: Replay) -> Transition:
    """The rows of a replay, oldest first, in the host's memory."""
    size, position = int(memory.size), int(memory.position)
    order = np.roll(np.arange(memory.capacity), -position) if size == memory.capacity else np.arange(size)
    return jax.tree.map(lambda ring: np.asarray(ring)[order], memory.rows)


@jax.jit
def _bonus(agent: Agent, obs: Array) -> Array:
    return agent.target_policy(obs, jax.random.key(DIAGNOSIS_STREAM))[1]
