"""How far a run's model, critic and targets are from the truth, measured on fresh real episodes.

Episodes are played with the target policy, the one whose value the critic is asked for (SAC: the Gaussian
actor; TD3: the smoothed slow actor; DDPG: the slow actor; DQN: the choice of the current critic or, if not
double, of the slow one). What they pay is then an unbiased sample of that value, b being the bonus of acting
(SAC's entropy term):

    G_t = r_t + gamma c_t (b_{t+1} + G_{t+1}).

Against G_t stand the critic's Q(s_t, a_t) and the target of every horizon k,

    y_k = r_t + gamma c_t C_k(s_{t+1}),    C_k of `targets.candidate_returns`, imagined as in training;

against the real states stand those that the model reaches by the logged actions. No simulator is set to a
state, so any environment will do. (Where one can be, imagined actions could be tried for real: not yet here.)

An episode goes on past its time limit until what follows counts for one per cent, where the task is a
Gymnasium id; its first steps, within the limit, are the ones judged. An episode that is cut off all the same
has its tail valued by the critic, and steps in whose G that tail weighs more than 5 % are not scored, unless
there are no others. The variance of G is a floor under every root mean square here; biases have none.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from mve import log, measure, picture, targets
from mve.agents import Agent
from mve.dynamics import Dynamics
from mve.envs import host
from mve.envs.host import HostEnv
from mve.evaluate import LONGEST_EPISODE
from mve.learner import Learner
from mve.measure import Played, plain
from mve.networks import SMALLEST_STD
from mve.types import Json, Transition, UserError

DEEPEST = 10  # steps of open loop, and horizons tried, or the run's own horizon if that is longer
MOST_STARTS = 5000  # states that are judged
TAIL, LARGEST_TAIL = 0.01, 0.05  # weight of what is not played: aimed at, and accepted
DIAGNOSIS_STREAM = 4  # first word of the seeds of these episodes; training and evaluation have others
BINS, SAMPLES = 12, 1500  # of the calibration; pairs of value and return that are kept for the picture


def diagnose(learner: Learner, episodes: int = 5) -> Json:
    """Every number, as plain data: model error by depth, critic, targets by horizon, calibration."""
    settings = learner.config
    deepest = max(DEEPEST, settings.targets.imagined_steps)
    with log.capture_mujoco_warnings(None):
        played = play(learner, episodes)
    limit = learner.spec.max_episode_steps or LONGEST_EPISODE
    starts = _thinned(np.flatnonzero(played.time < limit), MOST_STARTS)
    within = jax.tree.map(lambda x: x[played.time < limit], played)
    returns = np.bincount(within.rows.episode, within.rows.reward)
    report: Json = {
        "env": learner.spec.name,
        "algo": settings.algo,
        "seed": settings.seed,
        "step": learner.num_timesteps,
        "discount": settings.targets.discount,
        "returns": plain(returns),
        "lengths": np.bincount(within.rows.episode).tolist(),
        "starts": len(starts),
    }
    report |= _values(learner, played, starts, deepest)
    if learner._state.model is not None:
        report |= _model_errors(learner, learner._state.model, played, starts, deepest)
    return report


def write(report: Json, folder: Path) -> Path:
    """diagnosis.json and diagnosis.png into a folder, which is made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        log.write_json(folder / "diagnosis.json", report)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}") from error
    picture.draw(report, folder / "diagnosis.png")
    return folder


# Playing


def play(learner: Learner, episodes: int) -> Played:
    """So many whole episodes of the target policy, in an environment of their own."""
    settings, agent = learner.config, learner._state.agent
    limit, cuts_reward = learner.spec.max_episode_steps, settings.env.truncation_is_terminal
    env_config = settings.env
    if limit is not None and env_config.id and not cuts_reward:
        longer = limit + _steps_until(TAIL, settings.targets.discount)
        env_config = replace(env_config, kwargs={**(env_config.kwargs or {}), "max_episode_steps": longer})
    env = host.make(env_config) if env_config.id else learner._another_env()
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


# Judging


def _values(learner: Learner, played: Played, starts: np.ndarray, deepest: int) -> Json:
    """Critic and targets against the returns that were earned."""
    agent, model, recipe = learner._state.agent, learner._state.model, learner._recipe
    ends, tail_value = np.flatnonzero(played.last), np.zeros(len(played.last), np.float32)
    tail_value[ends] = measure.state_values(agent, played.rows.next_obs[ends])
    earned, tail = measure.monte_carlo_returns(played, tail_value, recipe.targets.discount)
    kept = starts[tail[starts] <= LARGEST_TAIL]
    kept = kept if len(kept) else starts
    rows: Transition = jax.tree.map(lambda x: jnp.asarray(x[kept]), played.rows)
    earned, used = earned[kept], recipe.targets.imagined_steps
    critic = np.asarray(measure.critic_values(agent, rows.obs, rows.action))
    by_horizon = np.asarray(measure.targets_by_horizon(agent, model, recipe, rows, deepest))
    scores = [measure.score(target, earned) for target in by_horizon]
    weights = targets.fixed_weights(recipe.targets)
    # Where every state has weights of its own, they are not known here: the deepest candidate stands in.
    target = by_horizon[used] if weights is None else np.tensordot(weights, by_horizon[: used + 1], axes=1)
    shown = _thinned(np.arange(len(kept)), SAMPLES)
    return {
        "scored": len(kept),
        "largest_tail_weight": plain([tail[kept].max()])[0],
        "return_std": plain([earned.std()])[0],
        "critic": measure.score(critic, earned),
        "target": {"horizon": used} | measure.score(target, earned),
        "targets_by_horizon": {
            "horizon": list(range(len(scores))),
            **{name: [score[name] for score in scores] for name in scores[0]},
        },
        "best_horizon": int(np.argmin(np.mean((by_horizon - earned) ** 2, axis=1))),
        "horizon_weights": None if weights is None else weights + [0.0] * (len(scores) - len(weights)),
        "samples": {
            "return": plain(earned[shown]),
            "critic": plain(critic[shown]),
            "target": plain(target[shown]),
        },
    }


def _model_errors(
    learner: Learner, model: Dynamics, played: Played, starts: np.ndarray, deepest: int
) -> Json:
    """Error by depth in units of the replay's spread, and the members' spread against it."""
    recipe, memory = learner._recipe, learner._state.replay
    ends = np.flatnonzero(played.last)
    remaining = ends[np.searchsorted(ends, starts)] - starts + 1
    deepest = min(deepest, int(remaining.max()))
    spread = [_spread(np.asarray(x)[: int(memory.size)]) for x in (memory.rows.next_obs, memory.rows.reward)]
    rows: Transition = jax.tree.map(jnp.asarray, played.rows)
    errors = measure.open_loop(model, recipe, rows, jnp.asarray(starts), *spread, deepest)
    wrong_end = np.asarray(errors.wrong_end)
    valid = remaining[None] > np.arange(deepest)[:, None]

    def by_depth(x: np.ndarray) -> Json:
        low, median, high = zip(
            *(np.percentile(x[k][:, valid[k]], (16, 50, 84)) for k in range(deepest)), strict=True
        )
        return {"low": plain(low), "median": plain(median), "high": plain(high)}

    depths = sorted({1, (1 + deepest) // 2, deepest})
    several = recipe.dynamics.members > 1
    return {
        "model_error": {
            "depth": list(range(1, deepest + 1)),
            "state": by_depth(np.asarray(errors.state)),
            "reward": by_depth(np.asarray(errors.reward)),
            "wrong_end": plain(float(wrong_end[k][:, valid[k]].mean()) for k in range(deepest)),
        },
        "calibration": measure.calibration(errors, valid, depths, BINS) if several else None,
    }


def _spread(x: np.ndarray) -> Array:
    """Standard deviation of each column; 1 for one that hardly moves, as in the model's own scaling."""
    std = np.std(x, axis=0)
    return jnp.asarray(np.where(std < SMALLEST_STD, 1.0, std), jnp.float32)


def _thinned(index: np.ndarray, most: int) -> np.ndarray:
    """At most so many of them, evenly spaced."""
    return index[np.linspace(0, len(index) - 1, min(len(index), most)).astype(int)]


def summary(report: Json, folder: Path) -> str:
    """What a person wants to know first."""
    critic, target, error = report["critic"], report["target"], report.get("model_error")
    lines = [
        f"{report['env']}, {report['algo']}, step {report['step']}: "
        f"{len(report['returns'])} fresh episodes, {report['scored']} states scored",
        f"returns      {np.mean(report['returns']):.1f} ± {np.std(report['returns']):.1f} an episode; "
        f"discounted they spread by {report['return_std']:.4g}",
        f"critic       bias {critic['bias']:+.4g}, root mean square error {critic['rmse']:.4g}",
    ]
    if error is not None:
        best = report["best_horizon"]
        first, last = error["state"]["median"][0], error["state"]["median"][-1]
        lines += [
            f"target H={target['horizon']}   bias {target['bias']:+.4g}, root mean square error "
            f"{target['rmse']:.4g}; least at H={best}: {report['targets_by_horizon']['rmse'][best]:.4g}",
            f"model        error {first:.3g} after 1 step, {last:.3g} after "
            f"{error['depth'][-1]}, in spreads of the data",
        ]
    for found in report.get("calibration") or []:
        lines.append(
            f"ensemble     {found['depth']} deep: error {found['ratio']:.2f} times the members' spread"
        )
    if report["largest_tail_weight"] > LARGEST_TAIL:
        lines.append(
            f"careful      episodes are short: up to {100 * report['largest_tail_weight']:.0f} % of a return "
            "is the critic's own guess, which hides its errors"
        )
    return "\n".join([*lines, f"written      {folder}"])
