"""Stage 7, the loop's inside: where the stages meet. Everything here is pure and runs in one compiled call.

sample -> imagine -> estimate -> improve                   update_step, once per gradient step
judge -> remember -> fit -> branch -> update_step ...      learn, once per block of real steps
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import NamedTuple, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from mve import dynamics, experience, imagine, replay, targets
from mve.agents import Agent
from mve.policies import Policy
from mve.state import Recipe, TrainState
from mve.targets import Calibration, calibration
from mve.types import (
    ActorValueFn,
    CriticTargets,
    EstimatorFns,
    Key,
    Metrics,
    ObjectiveFn,
    PolicyFn,
    StepFn,
    Transition,
)

State = TypeVar("State")

LEARN, ACT = 0, 1  # the streams of random draws that start from a run's root key
traces: Counter[Recipe] = Counter()  # how often `learn_block` has been traced: once a run, or it is slow
ERROR_DEPTHS = (1, 3, 5)  # steps of the open-loop model error that is logged


class Due(NamedTuple):
    """How much of everything a block of real steps is followed by."""

    rows: Array  # of the block that are real; the others are padding
    fits: Array  # minibatches of the model
    rounds: Array  # of rollouts into the imagination buffer
    updates: Array  # of the agent

    @classmethod
    def of(cls, *, rows: int, fits: int = 0, rounds: int = 0, updates: int = 0) -> Due:
        return cls(*(cast(Array, np.int32(n)) for n in (rows, fits, rounds, updates)))


def update_step(state: TrainState, recipe: Recipe, key: Key) -> tuple[Agent, Metrics]:
    """One gradient step of the agent: sample, imagine (or recall), estimate, improve."""
    sample_key, imagine_key, value_key, agent_key = jax.random.split(key, 4)

    batch, recalled = experience.recall(state, recipe, sample_key)
    ahead = experience.imagine_ahead(state, recipe, batch, imagine_key) if recalled is None else recalled
    critic_targets = targets.estimate(batch, ahead, estimator_fns(state, value_key), recipe.targets)
    step_of = partial(experience.model_step, state, recipe)
    objective = actor_objective(step_of, recipe.agent.model_steps, recipe.targets.discount)
    agent, metrics = state.agent.update(critic_targets, batch.obs, objective, agent_key)

    return agent, metrics | _target_metrics(critic_targets, recipe)


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
        tail, _ = value(imagined.obs[-1], value_key)
        reward = imagined.reward + imagined.bonus
        return targets.returns_to_go(reward, discount * imagined.continuation, tail)[0], imagined.bonus[0]

    return expanded


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
        recipe.dynamics.members,
        recipe.targets,
        model_key,
    )
    return calibration.observe(state.calibration, seen, recipe.targets.calibration_decay)


def learn_block(state: TrainState, block: Transition, due: Due, recipe: Recipe) -> tuple[TrainState, Metrics]:
    """Judge the model on a block of real steps, remember it, then fit, imagine and update so many times.

    The counts are traced, not static: the block that only remembers, the first fit and the steady state
    are one compilation. Metrics are means over the repetitions.
    """
    traces[recipe] += 1  # Python runs while JAX traces, and only then
    keys = jax.random.split(_key_of_step(state, LEARN, state.num_env_steps), 4)
    fit_key, branch_key, update_key, replay_key = keys
    metrics: Metrics = {}
    if state.calibration is not None:
        # On a block that the model has not seen yet, and never before it was first fitted.
        was_fitted = state.num_env_steps > recipe.dynamics.learning_starts
        observed = calibrate(state, block, due.rows, recipe, replay_key)
        known = jax.tree.map(partial(jnp.where, was_fitted), observed, state.calibration)
        state, metrics = replace(state, calibration=known), calibration.metrics(known)

    model, memory = state.model, state.replay
    if model is not None:
        errors = dynamics.open_loop_error(model, block, due.rows, ERROR_DEPTHS)
        metrics |= {f"model/mse_k{k}": error for k, error in errors.items()}
        model = dynamics.observe(model, block, due.rows, recipe.dynamics)
    memory = replay.add(memory, block, jnp.arange(block.reward.shape[0]) < due.rows)
    if model is not None:
        sample_fn = partial(replay.sample, memory)
        model, fit_metrics = dynamics.fit(model, sample_fn, recipe.dynamics, due.fits, fit_key)
        metrics |= fit_metrics
    state = replace(state, replay=memory, model=model)
    if state.imagined is not None:
        fill = lambda buffer, key: experience.branch(replace(state, imagined=buffer), recipe, key)  # noqa: E731
        buffer, branch_metrics = _repeat(fill, state.imagined, due.rounds, branch_key)
        state = replace(state, imagined=buffer)
        metrics |= branch_metrics | {"imagination/rows": buffer.size.astype(jnp.float32)}
    update = lambda agent, key: update_step(replace(state, agent=agent), recipe, key)  # noqa: E731
    agent, update_metrics = _repeat(update, state.agent, due.updates, update_key)

    state = replace(state, agent=agent, num_env_steps=state.num_env_steps + due.rows)
    return state, metrics | update_metrics


# `learn_block` compiled; the state is donated.
learn = jax.jit(learn_block, static_argnames="recipe", donate_argnames="state")


def _repeat(
    step: Callable[[State, Key], tuple[State, Metrics]], state: State, times: Array, key: Key
) -> tuple[State, Metrics]:
    """Apply `step` so many times, with a key for each; metrics are averaged over them."""
    zeros = jax.tree.map(lambda m: jnp.zeros(m.shape, m.dtype), jax.eval_shape(step, state, key)[1])

    def body(i: Array, carry: tuple[State, Metrics]) -> tuple[State, Metrics]:
        state, total = carry
        state, metrics = step(state, jax.random.fold_in(key, i))
        return state, jax.tree.map(jnp.add, total, metrics)

    state, total = jax.lax.fori_loop(0, times, body, (state, zeros))
    count = jnp.maximum(times, 1).astype(jnp.float32)
    return state, jax.tree.map(lambda m: m / count, total)


@jax.jit
def exploration_policy(state: TrainState, step: Array) -> Policy:
    """The policy that collects the block that starts at that environment step."""
    return state.agent.exploration_policy(_key_of_step(state, ACT, step))


def _key_of_step(state: TrainState, stream: int, step: Array) -> Key:
    root = jax.random.clone(state.key)  # reused on purpose: the key-reuse checker has to be told
    return jax.random.fold_in(jax.random.split(root)[stream], step)
