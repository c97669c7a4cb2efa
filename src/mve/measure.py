"""What can be measured of an agent and a model on real episodes: pure functions, used by `diagnose`.

Returns are those of the policy whose value the critic is asked for, b being the bonus of acting (SAC's
entropy term):

    G_t = r_t + gamma c_t (b_{t+1} + G_{t+1}).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import NamedTuple, SupportsFloat

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from mve import dynamics, experience, imagine, targets, train
from mve.agents import Agent
from mve.dynamics import Dynamics
from mve.state import Recipe, TrainState
from mve.types import CriticTargets, Imagined, Json, Segment, StepFn, Transition

DRAWS = 5  # seed of what is drawn in imagination


class Played(NamedTuple):
    """Whole episodes, one after the other."""

    rows: Transition  # (T, ...)
    bonus: Float[np.ndarray, " T"]
    last: Bool[np.ndarray, " T"]  # of its episode
    time: np.ndarray  # (T,) steps since the reset


class OpenLoop(NamedTuple):
    """Errors after 1..K steps of the logged actions, each member rolled by itself, in units of the spread."""

    state: Float[Array, " K M B"]  # root mean square over the dimensions
    reward: Float[Array, " K M B"]
    wrong_end: Bool[Array, " K M B"]
    mean_state: Float[Array, " K B"]  # of the members' mean
    members_apart: Float[Array, " K B"]  # standard deviation over members, root mean square over dimensions


class OnPolicy(NamedTuple):
    """Errors after 1..K steps of the policy's own actions, in units of the spread."""

    state: Float[Array, " K B"]  # root mean square over the dimensions
    reward: Float[Array, " K B"]
    wrong_end: Bool[Array, " K B"]
    running: Bool[Array, " K B"]  # neither model nor simulator had ended before


def monte_carlo_returns(
    played: Played, tail_value: Float[np.ndarray, " T"], discount: float
) -> tuple[np.ndarray, np.ndarray]:
    """G_t of every step, and the weight in it of the value that stands for a tail that was not played.

    Episodes follow one another in one backward recursion: d_t = 0 on the last step of each, whose reward
    takes in gamma c V(s_T) instead. `tail_value` is read at last steps only.
    """
    rows, bonus = played.rows, played.bonus
    step_discount = discount * jnp.asarray(rows.continuation)
    cut, going_on = jnp.where(played.last, step_discount, 0.0), jnp.where(played.last, 0.0, step_discount)
    soft_value = targets.returns_to_go(rows.reward + bonus + cut * tail_value, going_on, jnp.float32(0))
    weight = targets.returns_to_go(cut, going_on, jnp.float32(0))
    return np.asarray(soft_value) - bonus, np.asarray(weight)


@partial(jax.jit, static_argnames=("recipe", "deepest"))
def targets_by_horizon(
    agent: Agent, model: Dynamics | None, recipe: Recipe, rows: Transition, deepest: int
) -> Float[Array, " K B"]:
    """y_k = r + gamma c C_k(s') of every row, k = 0..H, so K = H+1; k = 0 alone where there is no model.

    Imagined in the recipe's simulator if it has one, whatever the model.
    """
    discount = recipe.targets.discount
    step_fn = recipe.simulator
    if step_fn is None and model is not None:
        step_fn = dynamics.rollout_step(model, recipe.known, recipe.dynamics, jax.random.key(DRAWS + 2))
    if step_fn is None:
        candidates = state_values(agent, rows.next_obs)[None]
    else:
        key = jax.random.key(DRAWS + 1)
        start = imagine.where_it_goes_on(rows.continuation, rows.next_obs, rows.obs)
        imagined = imagine.rollout(step_fn, agent.target_policy, start, deepest, key)
        candidates = targets.candidate_returns(
            imagined.reward + imagined.bonus,
            discount * imagined.continuation,
            jax.lax.map(partial(state_values, agent), imagined.obs),  # one depth at a time: memory
        )
    return rows.reward[None] + discount * rows.continuation[None] * candidates


@partial(jax.jit, static_argnames=("recipe", "steps"))
def returns_in_model(
    agent: Agent, model: Dynamics, recipe: Recipe, rows: Transition, steps: int
) -> tuple[Float[Array, " B"], Float[Array, ""]]:
    """What the rows' returns would be if the model were the world, and how many of its steps are ends.

    The rows' own step is real; so many imagined ones under the target policy follow, and the critic values
    what is left. A loop of its own, for `imagine.rollout` keeps the states of all steps, a thousand here.
    """
    step_fn = dynamics.rollout_step(model, recipe.known, recipe.dynamics, jax.random.key(DRAWS + 2))
    keys = jax.random.split(jax.random.key(DRAWS + 1), steps)

    def step(carry: tuple[Array, ...], key: Array) -> tuple[tuple[Array, ...], None]:
        obs, discount, total, taken, ends = carry
        policy_key, model_key = jax.random.split(key)
        action, bonus = agent.target_policy(obs, policy_key)
        next_obs, reward, continuation = step_fn(obs, action, model_key)
        alive = discount > 0
        counts = taken + jnp.sum(alive), ends + jnp.sum(alive & (continuation == 0))
        total = total + discount * (reward + bonus)
        obs = imagine.where_it_goes_on(continuation, next_obs, obs)
        return (obs, recipe.targets.discount * continuation * discount, total, *counts), None

    first = recipe.targets.discount * rows.continuation
    start = imagine.where_it_goes_on(rows.continuation, rows.next_obs, rows.obs)
    begun = start, first, rows.reward, jnp.int32(0), jnp.int32(0)
    (obs, discount, total, taken, ends), _ = jax.lax.scan(step, begun, keys)
    return total + discount * state_values(agent, obs), ends / jnp.maximum(taken, 1)


@partial(jax.jit, static_argnames="recipe")
def estimated_targets(state: TrainState, recipe: Recipe, rows: Transition, starts: Array) -> CriticTargets:
    """What the run's own estimator makes of some of the rows played, as in training; real rows come first."""
    batch: Transition = jax.tree.map(lambda x: x[starts], rows)
    if recipe.targets.n_step > 1:
        segment = _on_from(rows, starts, jnp.arange(recipe.targets.n_step))
        batch = experience.summed(state.agent, segment, recipe.targets, jax.random.key(DRAWS + 2))
    if recipe.targets.reads_segments:
        ahead = _played_on(state.agent, rows, starts, recipe.targets.horizon_steps)
    else:
        ahead = experience.imagine_ahead(state, recipe, batch, jax.random.key(DRAWS + 1))
    ask = train.estimator_fns(state, jax.random.key(DRAWS))
    return targets.estimate(batch, ahead, ask, recipe.targets)


def _played_on(agent: Agent, rows: Transition, starts: Array, horizon: int) -> Segment:
    """What followed, by the target policy itself: its own densities are those of the actions played."""
    followed, valid = _on_from(rows, starts, 1 + jnp.arange(horizon))
    log_density = agent.log_density(followed.obs, followed.action)
    return Segment(followed._replace(log_density=log_density), valid)


def _on_from(rows: Transition, starts: Array, offset: Array) -> Segment:
    """What was played so many steps on from some rows, while the episode was the same."""
    last = rows.reward.shape[0] - 1
    index = starts[None] + offset[:, None]
    played: Transition = jax.tree.map(lambda x: x[jnp.minimum(index, last)], rows)
    return Segment(played, (index <= last) & (played.episode == rows.episode[starts][None]))


def selector(by_horizon: np.ndarray, target: np.ndarray, earned: np.ndarray) -> Json:
    """What an oracle would reach that takes, in every state, the horizon whose target came nearest.

    `share_won` is what `target` gains over one step of what the oracle gains, in root mean square error:
    1 is the oracle, 0 one step, None where there is nothing to gain. The oracle also fits the chance in a
    single return, so no estimator gets all of it.
    """
    error = numbers_first(np.abs(by_horizon.astype(np.float64) - earned))
    chosen = np.argmin(error, axis=0)
    rmse, one_step = _root_mean_square(error.min(axis=0)), _root_mean_square(error[0])
    gain = one_step - rmse
    share = (one_step - _root_mean_square(target.astype(np.float64) - earned)) / gain if gain > 0 else None
    return {
        "rmse": plain([rmse])[0],
        "share_won": None if share is None else plain([share])[0],
        "chosen": plain(np.bincount(chosen, minlength=len(by_horizon)) / len(chosen)),
    }


@jax.jit
def critic_values(
    agent: Agent, obs: Float[Array, " B S"], action: Float[Array, " B A"]
) -> Float[Array, " B"]:
    """min_n Q_n(s, a) of the critics in training, not of their slow copies."""
    return jnp.min(agent.action_values(obs, action), axis=0)


@jax.jit
def state_values(agent: Agent, obs: Float[Array, " B S"]) -> Float[Array, " B"]:
    """The bootstrap that targets use: least over the slow critics, at the target policy's action."""
    return jnp.min(agent.target_value(obs, jax.random.key(DRAWS)), axis=0)


@partial(jax.jit, static_argnames=("recipe", "deepest"))
def open_loop(
    model: Dynamics,
    recipe: Recipe,
    rows: Transition,
    starts: Array,
    obs_spread: Float[Array, " S"],
    reward_spread: Float[Array, ""],
    deepest: int,
) -> OpenLoop:
    """Roll every member, without noise, from real states with the logged actions; compare with what followed.

    Errors are in units of the two spreads. Where an episode ends before the last depth, rows
    past its end are compared with whatever comes next: the caller leaves them out.
    """
    members, settings = recipe.dynamics.members, replace(recipe.dynamics, sample="none")

    def step(member: Array, obs: Array, action: Array, key: Array) -> tuple[Array, Array, Array]:
        alone = dynamics.only(model, member[None])
        return dynamics.step(alone, recipe.known, settings, obs, action, key)

    def deeper(obs: Array, k: Array) -> tuple[Array, OpenLoop]:
        here = jnp.minimum(starts + k, rows.reward.shape[0] - 1)
        keys = jax.random.split(jax.random.fold_in(jax.random.key(DRAWS), k), members)
        next_obs, reward, continuation = jax.vmap(step, in_axes=(0, 0, None, 0))(
            jnp.arange(members), obs, rows.action[here], keys
        )
        error = (next_obs - rows.next_obs[here][None]) / obs_spread[None, None]
        apart = jnp.var(error, axis=0, ddof=1 if members > 1 else 0)
        return next_obs, OpenLoop(
            state=_rms(error),
            reward=jnp.abs(reward - rows.reward[here][None]) / reward_spread,
            wrong_end=continuation != rows.continuation[here][None],
            mean_state=_rms(jnp.mean(error, axis=0)),
            members_apart=jnp.sqrt(jnp.mean(apart, axis=-1)),
        )

    first = jnp.broadcast_to(rows.obs[starts], (members, *rows.obs[starts].shape))
    return jax.lax.scan(deeper, first, jnp.arange(deepest))[1]


@partial(jax.jit, static_argnames=("recipe", "simulator", "deepest"))
def on_policy(
    agent: Agent,
    model: Dynamics,
    recipe: Recipe,
    simulator: StepFn,
    obs: Float[Array, " B S"],
    deepest: int,
) -> tuple[Imagined, Imagined]:
    """What the model imagines from real states, and what the simulator makes of the same actions."""
    step_fn = dynamics.rollout_step(model, recipe.known, recipe.dynamics, jax.random.key(DRAWS + 2))
    imagined = imagine.rollout(step_fn, agent.target_policy, obs, deepest, jax.random.key(DRAWS + 2))

    def deeper(obs: Array, action: Array) -> tuple[Array, tuple[Array, ...]]:
        next_obs, reward, continuation = simulator(obs, action, jax.random.key(DRAWS))
        return next_obs, (next_obs, reward, continuation)

    _, (next_obs, reward, continuation) = jax.lax.scan(deeper, obs, imagined.action)
    truth = imagined._replace(
        obs=jnp.concatenate([obs[None], next_obs]), reward=reward, continuation=continuation
    )
    return imagined, truth


def on_policy_errors(
    rolled: tuple[Imagined, Imagined], obs_spread: Float[Array, " S"], reward_spread: Float[Array, ""]
) -> OnPolicy:
    """Imagined against true, in units of the two spreads."""
    imagined, truth = rolled
    both = imagined.continuation * truth.continuation
    running = jnp.cumprod(jnp.concatenate([jnp.ones_like(both[:1]), both[:-1]]), axis=0) > 0
    error = (imagined.obs[1:] - truth.obs[1:]) / obs_spread[None, None]
    return OnPolicy(
        state=_rms(error),
        reward=jnp.abs(imagined.reward - truth.reward) / reward_spread,
        wrong_end=imagined.continuation != truth.continuation,
        running=running,
    )


def _rms(x: Array) -> Array:
    return jnp.sqrt(jnp.mean(jnp.square(x), axis=-1))


def calibration(
    errors: OpenLoop, valid: Bool[np.ndarray, " K B"], depths: Iterable[int], bins: int
) -> list[Json]:
    """How far apart the members are against how wrong their mean is, at some depths.

    States are sorted by the members' spread into bins of equal count; both are root mean squares over a
    bin. `ratio` is that of all states: 1 where the spread has the right size, more where the members are
    too sure of themselves.
    """
    found = []
    for k in depths:
        apart, wrong = (np.asarray(x)[k - 1][valid[k - 1]] for x in (errors.members_apart, errors.mean_state))
        groups = np.array_split(np.argsort(apart), min(bins, len(apart)))
        found.append(
            {
                "depth": k,
                "spread": plain([_root_mean_square(apart[group]) for group in groups]),
                "error": plain([_root_mean_square(wrong[group]) for group in groups]),
                "ratio": plain([_root_mean_square(wrong) / max(_root_mean_square(apart), 1e-12)])[0],
            }
        )
    return found


def score(predicted: np.ndarray, earned: np.ndarray) -> Json:
    """Bias and mean squared error of predicted returns."""
    error = predicted.astype(np.float64) - earned
    bias, mse = float(error.mean()), float(np.mean(error**2))
    bias, mse, rmse = plain([bias, mse, _root_mean_square(error)])
    return {"bias": bias, "mse": mse, "rmse": rmse}


def numbers_first(error: np.ndarray) -> np.ndarray:
    """Errors in which one that is no number, of a model that diverged, is the largest."""
    return np.where(np.isnan(error), np.inf, error)


def plain(numbers: Iterable[SupportsFloat]) -> list[float | None]:
    """For JSON: six digits, null where not finite."""
    return [float(f"{x:.6g}") if np.isfinite(x) else None for x in map(float, numbers)]


def _root_mean_square(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(x, dtype=np.float64))))
