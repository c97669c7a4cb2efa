"""Stage 7, the loop's inside: where the stages meet. Everything here is pure and runs in one compiled call.

sample -> imagine -> estimate -> improve                   update_step, once per gradient step
judge -> remember -> fit -> branch -> update_step ...      learn, once per block of real steps
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import NamedTuple, TypeAlias, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from mve import dynamics, experience, imagine, replay, targets
from mve.agents import Agent
from mve.experience import Shared
from mve.policies import Policy
from mve.replay import Replay
from mve.state import Recipe, TrainState
from mve.targets import Calibration, TargetsConfig, calibration
from mve.types import (
    ActorValueFn,
    CriticTargets,
    EstimatorFns,
    Imagined,
    Key,
    Metrics,
    ObjectiveFn,
    PolicyFn,
    Segment,
    SharedObjective,
    StepFn,
    Transition,
)

State = TypeVar("State")
# Agent, imagination buffer, updates done, their metrics, rounds of rollouts, and theirs.
Legs: TypeAlias = tuple[Agent, Replay, Array, Metrics, Array, Metrics]

LEARN, ACT = 0, 1  # the streams of random draws that start from a run's root key
traces: Counter[Recipe] = Counter()  # how often `learn_block` has been traced: once a run, or it is slow
ERROR_DEPTHS = (1, 3, 5)  # steps of the open-loop model error that is logged
PIECE, LAST_PIECE = 100, 300  # updates of a block that are done in one call, and the last of them at most


class Due(NamedTuple):
    """How much of everything a block of real steps is followed by."""

    rows: Array  # of the block that are real; the others are padding
    fits: Array  # minibatches of the model
    refits: Array  # of the model: 1 where a first fit or a refit is among them
    rounds: Array  # of rollouts into the imagination buffer
    updates: Array  # of the agent
    updated: Array  # updates before this block
    done: Array  # updates of this block done by earlier calls, which have seen to all that comes before them

    @classmethod
    def of(
        cls, *, rows: int, fits: int = 0, refits: int = 0, rounds: int = 0, updates: int = 0, updated: int = 0
    ) -> Due:
        numbers = (rows, fits, refits, rounds, updates, updated, 0)
        return cls(*(cast(Array, np.int32(n)) for n in numbers))

    def piece(self, done: int) -> Due:
        """What comes next of it once so many updates are done: where much is left, some of that.

        It can be stopped between two pieces. Where they are cut depends on `updates` alone, and all pieces
        together are what the whole would have been in one, but for the means that are its metrics; rollouts
        that come every so many updates have to divide PIECE for that.
        """
        left = int(self.updates) - done
        count = left if left <= LAST_PIECE else PIECE
        piece = self._replace(updates=cast(Array, np.int32(count)), done=cast(Array, np.int32(done)))
        nothing = cast(Array, np.int32(0))
        return piece._replace(fits=nothing, refits=nothing, rounds=nothing) if done else piece


def update_step(
    state: TrainState, recipe: Recipe, key: Key, *, critics_only: bool = False
) -> tuple[Agent, Metrics]:
    """One gradient step of the agent: sample, imagine (or recall), estimate, improve."""
    sample_key, imagine_key, value_key, agent_key = jax.random.split(key, 4)
    steps, discount = recipe.agent.model_steps, recipe.targets.discount

    if recipe.shares_rollout:
        shared = experience.imagine_once(state, recipe, imagine_key)
        state = told_gains(state, recipe, shared.first, shared.later)
        critic_targets = shared_targets(shared, state, recipe.targets, value_key)
        worth_of = partial(worth, discount=discount, key=sample_key)
        objective, obs = SharedObjective(shared.whole, shared.pull_back, worth_of), shared.first.obs
    else:
        batch, recalled = experience.recall(state, recipe, sample_key)
        ahead = experience.imagine_ahead(state, recipe, batch, imagine_key) if recalled is None else recalled
        state = told_gains(state, recipe, batch, ahead)
        critic_targets = targets.estimate(batch, ahead, estimator_fns(state, value_key), recipe.targets)
        step_of = partial(experience.model_step, state, recipe)
        objective, obs = actor_objective(step_of, steps, discount), batch.obs
    asked = None if critics_only else objective
    agent, metrics = state.agent.update(critic_targets, obs, asked, agent_key)

    return agent, metrics | _target_metrics(critic_targets, recipe)


def shared_targets(shared: Shared, state: TrainState, config: TargetsConfig, key: Key) -> CriticTargets:
    """The rows of a shared rollout, as many as it has starts: the real steps that led to some, and from
    the others the rollout's own first steps. These are expanded by the estimator's horizon, real ones by a
    step more: both are made of as many imagined steps. Without a horizon nothing is expanded."""
    horizon = config.imagined_steps
    ahead = imagine.first_steps(shared.later, horizon)
    if shared.real is None:
        return targets.estimate(shared.first, ahead, estimator_fns(state, key), config)
    count, size = len(shared.real.reward), len(shared.first.reward)
    real_key, key = jax.random.split(key)
    whole = imagine.first_steps(shared.whole, config.shared_steps)
    of_real: Imagined = jax.tree.map(lambda x: x[:, :count], whole)
    real = targets.estimate(shared.real, of_real, estimator_fns(state, real_key), config)
    if count == size:
        return real
    first: Transition = jax.tree.map(lambda x: x[count:], shared.first)
    later: Imagined = jax.tree.map(lambda x: x[:, count:], ahead)
    imagined = targets.estimate(first, later, estimator_fns(state, key), config)
    return targets.joined(real, imagined, count / size)


def told_gains(state: TrainState, recipe: Recipe, batch: Transition, ahead: Imagined | Segment) -> TrainState:
    """The agent knows what the steps that its targets are made of earn, if it wants to.

    Where no step is imagined the real ones' rewards stand alone: nobody knows the bonus of a recorded action.
    """
    if not recipe.agent.scales_values:
        return state
    gain = batch.reward
    if isinstance(ahead, Imagined) and ahead.reward.shape[0]:
        gain = jnp.expand_dims(ahead.bonus, 1) if recipe.targets.keeps_members else ahead.bonus
        gain = ahead.reward + jnp.broadcast_to(gain, ahead.reward.shape)
    paid = state.replay.rows.reward  # 0 where no row is yet
    return replace(state, agent=state.agent.told(gain, paid, recipe.targets.discount))


def estimator_fns(state: TrainState, key: Key) -> EstimatorFns:
    """What the agent, and the measured errors of the model, answer an estimator."""
    agent, measured = state.agent, state.calibration
    return EstimatorFns(
        value=lambda obs: agent.target_value(obs, key),
        action_value=agent.target_action_value,
        log_density=agent.log_density,
        squared_error=None if measured is None else partial(calibration.squared_error, measured),
    )


def actor_objective(step_of: Callable[[Key], StepFn], steps: int, discount: float) -> ObjectiveFn:
    """What the actor is to raise: the critic's value, after so many steps of the model.

    J(s_0) = sum_{t<H} D_t (b_t + r_t) + D_H V(s_H), differentiated through policy and model alike (Heess et
    al. 2015; Amos et al. 2021, arXiv 2008.12775, whose horizon counts the critic's step too, and who divide
    by it, which Adam does not feel). `step_of` gives the model's step for the rollout of a key.
    """

    def expanded(policy: PolicyFn, value: ActorValueFn, obs: Array, key: Key) -> tuple[Array, Array]:
        if steps == 0:
            return value(obs, key)
        imagine_key, value_key = jax.random.split(key)
        imagined = imagine.rollout(step_of(imagine_key), policy, obs, steps, imagine_key)
        return worth(imagined, value, discount=discount, key=value_key)

    return expanded


def worth(imagined: Imagined, value: ActorValueFn, *, discount: float, key: Key) -> tuple[Array, Array]:
    """J of the start states of a rollout (B,), and the bonuses of their actions (B,)."""
    tail, _ = value(imagined.obs[-1], key)
    reward = imagined.reward + imagined.bonus
    return targets.returns_to_go(reward, discount * imagined.continuation, tail)[0], imagined.bonus[0]


def _target_metrics(critic_targets: CriticTargets, recipe: Recipe) -> Metrics:
    real, imagined = jnp.split(critic_targets.value, [recipe.agent.batch_size])
    metrics = {"train/target_mean": jnp.mean(real), "train/target_std": jnp.std(real)}
    metrics |= {f"mve/weight_k{k}": weight for k, weight in enumerate(critic_targets.horizon_weight)}
    if imagined.size:
        weight = critic_targets.weight[recipe.agent.batch_size :]
        alive = weight > 0
        metrics["mve/imagined_target_mean"] = jnp.sum(jnp.where(alive, imagined, 0.0)) / jnp.maximum(
            jnp.sum(alive, dtype=jnp.float32), 1.0
        )
        metrics["mve/alive_fraction"] = jnp.mean(alive, dtype=jnp.float32)
    return metrics


def calibrate(state: TrainState, block: Transition, num_rows: Array, recipe: Recipe, key: Key) -> Calibration:
    """What the model's imagination of a block of real steps adds to what is known of its errors."""
    assert state.calibration is not None
    model_key, value_key = jax.random.split(key)
    seen = calibration.replay(
        experience.target_step(state, recipe, model_key),
        estimator_fns(state, value_key),
        block,
        num_rows,
        recipe.kept_members,
        recipe.targets,
        model_key,
    )
    return calibration.observe(state.calibration, seen, recipe.targets.calibration_decay)


def learn_block(state: TrainState, block: Transition, due: Due, recipe: Recipe) -> tuple[TrainState, Metrics]:
    """Judge the model on a block of real steps, remember it, then fit, imagine and update so many times.

    The counts are traced, not static: the block that only remembers, the first fit, the steady state and
    what goes on with a block in hand (`Due.piece`) are one compilation. Metrics are means over the
    repetitions.
    """
    traces[recipe] += 1  # Python runs while JAX traces, and only then
    is_new = due.done == 0
    rows = jnp.where(is_new, due.rows, 0)
    state = replace(state, num_env_steps=state.num_env_steps - (due.rows - rows))  # where the block starts
    keys = jax.random.split(_key_of_step(state, LEARN, state.num_env_steps), 4)
    fit_key, branch_key, update_key, replay_key = keys
    metrics: Metrics = {}
    if state.calibration is not None:
        # On a block that the model has not seen yet, and never before it was first fitted.
        counts = is_new & (state.num_env_steps > recipe.dynamics.first_fit)
        observed = calibrate(state, block, rows, recipe, replay_key)
        known = jax.tree.map(partial(jnp.where, counts), observed, state.calibration)
        state, metrics = replace(state, calibration=known), calibration.metrics(known)

    model, memory = state.model, state.replay
    if model is not None:
        errors = dynamics.open_loop_error(model, block, rows, ERROR_DEPTHS)
        metrics |= {f"model/mse_k{k}": jnp.where(is_new, error, jnp.nan) for k, error in errors.items()}
        model = dynamics.observe(model, block, rows, recipe.dynamics)
        if model.limits is not None:
            metrics["model/ends_explained"] = model.limits.explained
    memory = replay.add(memory, block, jnp.arange(block.reward.shape[0]) < rows)
    if model is not None:
        sample_fn = partial(replay.sample, memory, recency=recipe.recency)
        model, fit_metrics = dynamics.fit(model, sample_fn, recipe.dynamics, due.fits, fit_key)
        metrics |= fit_metrics
    agent = state.agent.observed(block, rows)
    state = replace(state, replay=memory, model=model, agent=agent)
    state, update_metrics = improve(state, due, recipe, branch_key, update_key)
    return replace(state, num_env_steps=state.num_env_steps + due.rows), metrics | update_metrics


def improve(
    state: TrainState, due: Due, recipe: Recipe, branch_key: Key, update_key: Key
) -> tuple[TrainState, Metrics]:
    """The rounds and updates that a block is followed by, and what a refit of the model brings with it."""
    metrics: Metrics = {}
    if recipe.agent.reset_optimisers:
        renewed = state.agent.with_new_optimisers()
        chosen = jax.tree.map(partial(jnp.where, due.refits > 0), renewed, state.agent)
        state = replace(state, agent=chosen)
    if state.imagined is not None and not recipe.imagination.interval_updates:
        fill = lambda buffer, key: experience.branch(replace(state, imagined=buffer), recipe, key)  # noqa: E731
        buffer, rounds = _repeat(fill, state.imagined, due.rounds, branch_key)
        state, metrics = replace(state, imagined=buffer), _if_any(rounds, due.rounds)
    if recipe.agent.critic_updates:
        critic_key, update_key = jax.random.split(update_key)
        count = due.refits * recipe.agent.critic_updates
        state, _ = updated(state, recipe, count, critic_key, critics_only=True)
    state, update_metrics = updated(state, recipe, due.updates, update_key, before=due.updated, done=due.done)
    if state.imagined is not None:
        metrics["imagination/length"] = imagine.rollout_length(
            recipe.imagination, state.num_env_steps
        ).astype(jnp.float32)
        metrics["imagination/rows"] = state.imagined.size.astype(jnp.float32)
    return state, metrics | update_metrics


def updated(
    state: TrainState,
    recipe: Recipe,
    times: Array,
    key: Key,
    *,
    before: Array | int = 0,
    done: Array | int = 0,
    critics_only: bool = False,
) -> tuple[TrainState, Metrics]:
    """So many updates, with rounds of rollouts among them if they come by updates.

    `before` came with earlier keys, and `done` with this one.
    """
    step = partial(update_step, recipe=recipe, critics_only=critics_only)
    every = recipe.imagination.interval_updates
    if state.imagined is None or not every:
        update = lambda agent, key: step(replace(state, agent=agent), key=key)  # noqa: E731
        agent, metrics = _repeat(update, state.agent, times, key, first=done)
        return replace(state, agent=agent), metrics

    end = done + times

    def leg(carry: Legs) -> Legs:
        agent, buffer, done, total, filled, of_rounds = carry
        fill_key, leg_key = jax.random.split(jax.random.fold_in(key, done))
        here, since = replace(state, agent=agent), (before + done) % every
        fill = lambda buffer, key: experience.branch(replace(here, imagined=buffer), recipe, key)  # noqa: E731
        fills = (since == 0).astype(jnp.int32)
        buffer, of_round = _repeat(fill, buffer, fills, fill_key)
        count = jnp.minimum(every - since, end - done)
        here = replace(here, imagined=buffer)
        update = lambda agent, key: step(replace(here, agent=agent), key=key)  # noqa: E731
        agent, metrics = _repeat(update, agent, count, leg_key)
        share = count.astype(jnp.float32) / jnp.maximum(times, 1).astype(jnp.float32)
        total = jax.tree.map(lambda a, b: a + share * b, total, metrics)
        of_rounds = jax.tree.map(jnp.add, of_rounds, of_round)
        return agent, buffer, done + count, total, filled + fills, of_rounds

    zeros = _zeros_like(jax.eval_shape(lambda key: step(state, key=key)[1], key))
    none = _zeros_like(jax.eval_shape(lambda key: experience.branch(state, recipe, key)[1], key))
    start = (state.agent, state.imagined, jnp.asarray(done, jnp.int32), zeros, jnp.int32(0), none)
    agent, buffer, _, metrics, filled, rounds = jax.lax.while_loop(lambda carry: carry[2] < end, leg, start)
    count = jnp.maximum(filled, 1).astype(jnp.float32)
    rounds = jax.tree.map(lambda m: m / count, rounds)
    return replace(state, agent=agent, imagined=buffer), metrics | _if_any(rounds, filled)


def _if_any(metrics: Metrics, times: Array) -> Metrics:
    """Means over so many times; NaN, which nobody records, where there was none."""
    return jax.tree.map(lambda m: jnp.where(times > 0, m, jnp.nan), metrics)


# `learn_block` compiled; the state is donated.
learn = jax.jit(learn_block, static_argnames="recipe", donate_argnames="state")


def _repeat(
    step: Callable[[State, Key], tuple[State, Metrics]],
    state: State,
    times: Array,
    key: Key,
    first: Array | int = 0,
) -> tuple[State, Metrics]:
    """Apply `step` so many times, with a key for each, numbered from `first`; metrics are averaged."""
    zeros = _zeros_like(jax.eval_shape(step, state, key)[1])

    def body(i: Array, carry: tuple[State, Metrics]) -> tuple[State, Metrics]:
        state, total = carry
        state, metrics = step(state, jax.random.fold_in(key, i))
        return state, jax.tree.map(jnp.add, total, metrics)

    state, total = jax.lax.fori_loop(first, first + times, body, (state, zeros))
    count = jnp.maximum(times, 1).astype(jnp.float32)
    return state, jax.tree.map(lambda m: m / count, total)


def _zeros_like(shapes: dict[str, jax.ShapeDtypeStruct]) -> Metrics:
    return jax.tree.map(lambda m: jnp.zeros(m.shape, m.dtype), shapes)


@jax.jit
def exploration_policy(state: TrainState, step: Array) -> Policy:
    """The policy that collects the block that starts at that environment step."""
    return state.agent.exploration_policy(_key_of_step(state, ACT, step))


def _key_of_step(state: TrainState, stream: int, step: Array) -> Key:
    root = jax.random.clone(state.key)  # reused on purpose: the key-reuse checker has to be told
    return jax.random.fold_in(jax.random.split(root)[stream], step)
