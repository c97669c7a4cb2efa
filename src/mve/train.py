"""Stage 7, the loop's inside: where the stages meet. Everything here is pure and runs in one compiled call.

sample -> imagine -> estimate -> improve        update_step, once per gradient step
judge -> remember -> fit -> update_step ...     learn, once per block of real steps
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple, TypeVar, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from mve import agents, dynamics, imagine, replay, targets
from mve.agents import Agent, AgentConfig
from mve.dynamics import Dynamics, DynamicsConfig
from mve.imagine import ImaginationConfig
from mve.networks import Policy
from mve.replay import Replay
from mve.targets import TargetsConfig
from mve.types import ActorValueFn, Key, Known, Metrics, ObjectiveFn, PolicyFn, StepFn, Transition

State = TypeVar("State")

LEARN, ACT = 0, 1  # the streams of random draws that start from a run's root key
ERROR_DEPTHS = (1, 3, 5)  # steps of the open-loop model error that is logged
WHOLE_ROLLOUT = 2**32 - 1  # folded into a rollout's key for what holds throughout; its steps have 0, 1, ...


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What is fixed for a run and compiled into it: hashable, so that equal recipes share a compilation."""

    obs_size: int
    action_size: int
    known: Known
    agent: AgentConfig
    dynamics: DynamicsConfig
    targets: TargetsConfig
    imagination: ImaginationConfig = field(default_factory=ImaginationConfig)

    @property
    def uses_model(self) -> bool:
        return self.targets.imagined_steps > 0 or self.agent.model_steps > 0 or self.imagination.starts > 0


class Due(NamedTuple):
    """How much of everything a block of real steps is followed by."""

    rows: Array  # of the block that are real; the others are padding
    fits: Array  # minibatches of the model
    rounds: Array  # of rollouts into the imagination buffer
    updates: Array  # of the agent

    @classmethod
    def of(cls, *, rows: int, fits: int = 0, rounds: int = 0, updates: int = 0) -> Due:
        return cls(*(cast(Array, np.int32(n)) for n in (rows, fits, rounds, updates)))


class TrainState(eqx.Module):
    """Everything that training changes, as one pytree in the order of the data flow.

    `key` is the run's root and never changes: every draw is folded from it and the step it is for, so a
    state says all that there is to know about the randomness to come.
    """

    replay: Replay
    model: Dynamics | None  # None where nothing is imagined
    imagined: Replay | None  # None where imagined transitions are not kept
    agent: Agent
    num_env_steps: Array
    key: Key


class Capacity(NamedTuple):
    """Rows that memory is set aside for."""

    replay: int
    imagined: int = 0


def init(recipe: Recipe, capacity: Capacity, seed: int) -> TrainState:
    root, model_key, agent_key = jax.random.split(jax.random.key(seed), 3)
    sizes, imagines = (recipe.obs_size, recipe.action_size), recipe.imagination.starts > 0
    return TrainState(
        replay=replay.init(capacity.replay, *sizes),
        model=dynamics.init(recipe.dynamics, recipe.known, *sizes, model_key) if recipe.uses_model else None,
        imagined=replay.init(capacity.imagined, *sizes) if imagines else None,
        agent=agents.init(recipe.agent, *sizes, agent_key),
        num_env_steps=jnp.int32(0),
        key=root,
    )


def grow(state: TrainState, capacity: Capacity) -> TrainState:
    """The same state with room for more transitions, if it has not got it."""
    state = replace(state, replay=_grown(state.replay, capacity.replay))
    if state.imagined is None:
        return state
    return replace(state, imagined=_grown(state.imagined, capacity.imagined))


def _grown(ring: Replay, capacity: int) -> Replay:
    return replay.grow(ring, capacity) if capacity > ring.capacity else ring


def update_step(state: TrainState, recipe: Recipe, key: Key) -> tuple[Agent, Metrics]:
    """One gradient step of the agent: sample, imagine, estimate, improve."""
    sample_key, imagine_key, value_key, agent_key = jax.random.split(key, 4)
    agent = state.agent
    value_fn = lambda obs: agent.target_value(obs, value_key)  # noqa: E731

    batch = sample_batch(state, recipe, sample_key)
    imagined = imagine.rollout(
        _target_step(state, recipe, imagine_key),
        agent.target_policy,
        _start_obs(batch, recipe),
        recipe.targets.imagined_steps,
        imagine_key,
    )
    critic_targets = targets.estimate(batch, imagined, value_fn, recipe.targets)
    step_of = partial(_model_step, state, recipe)
    objective = actor_objective(step_of, recipe.agent.model_steps, recipe.targets.discount)
    agent, metrics = agent.update(critic_targets, batch.obs, objective, agent_key)

    return agent, metrics | _target_metrics(critic_targets, recipe)


def sample_batch(state: TrainState, recipe: Recipe, key: Key) -> Transition:
    """A batch of real transitions or, where imagined ones are kept, its share of both."""
    size, imagination = recipe.agent.batch_size, recipe.imagination
    if state.imagined is None:
        return replay.sample(state.replay, (size,), key)
    real_key, imagined_key, share_key, step_key = jax.random.split(key, 4)
    real = replay.sample(state.replay, (size,), real_key)
    newest = imagine.rollout_length(imagination, state.num_env_steps) * (
        imagination.starts * imagination.rounds_kept
    )
    dreamt = replay.sample(state.imagined, (size,), imagined_key, newest)
    if imagination.first_step == "imagined":
        step_fn = _model_step(state, recipe, step_key)
        dreamt = _first_step(dreamt, state.agent.target_policy, step_fn, step_key)
    if imagination.mixed_by == "row":
        is_real = jnp.arange(size) < round(imagination.real_share * size)
    else:
        is_real = jnp.broadcast_to(jax.random.bernoulli(share_key, imagination.real_share), (size,))

    def choose(a: Array, b: Array) -> Array:
        return jnp.where(is_real.reshape(-1, *[1] * (a.ndim - 1)), a, b)

    return jax.tree.map(choose, real, dreamt)


def _first_step(rows: Transition, policy: PolicyFn, step_fn: StepFn, key: Key) -> Transition:
    """What the policy and the model make of the rows' states: another action, reward and next state."""
    return imagine.as_transition(imagine.rollout(step_fn, policy, rows.obs, 1, key), rows)


def branch(state: TrainState, recipe: Recipe, key: Key) -> tuple[Replay, Metrics]:
    """One round of rollouts from real states under the policy in training, into the imagination buffer.

    Branched rollouts (Janner et al. 2019, algorithm 2); long ones are the distribution rollouts of Kubo et
    al. 2025. What follows a predicted termination is not kept.
    """
    start_key, rollout_key = jax.random.split(key)
    assert state.imagined is not None
    start = replay.sample(state.replay, (recipe.imagination.starts,), start_key)
    length = imagine.rollout_length(recipe.imagination, state.num_env_steps)
    policy, step_fn = state.agent.current_policy, _model_step(state, recipe, rollout_key)

    def step(t: Array, carry: tuple[Replay, Transition, Array]) -> tuple[Replay, Transition, Array]:
        buffer, rows, alive = carry
        rows = _first_step(rows, policy, step_fn, jax.random.fold_in(rollout_key, t))
        buffer = replay.add(buffer, rows, alive)
        return buffer, rows._replace(obs=rows.next_obs), alive & (rows.continuation > 0)

    everyone = jnp.ones(recipe.imagination.starts, bool)
    buffer, _, _ = jax.lax.fori_loop(0, length, step, (state.imagined, start, everyone))
    return buffer, {"imagination/length": length.astype(jnp.float32)}


def _start_obs(batch: Transition, recipe: Recipe) -> Array:
    """The real next states, once for every member that is to imagine from them."""
    if not recipe.targets.keeps_members:
        return batch.next_obs
    return jnp.broadcast_to(batch.next_obs, (recipe.dynamics.members, *batch.next_obs.shape))


def _model_step(state: TrainState, recipe: Recipe, rollout_key: Key) -> StepFn:
    """One imagined step of states (B, S), for the rollout of that key, which is left to it."""
    model = state.model
    if model is None:  # traced for a rollout of no steps, whose result is empty
        return lambda obs, action, key: (obs, jnp.zeros(obs.shape[:-1]), jnp.zeros(obs.shape[:-1]))
    whole = jax.random.fold_in(rollout_key, WHOLE_ROLLOUT)
    return dynamics.rollout_step(model, recipe.known, recipe.dynamics, whole)


def _target_step(state: TrainState, recipe: Recipe, rollout_key: Key) -> StepFn:
    """As `_model_step`, of states (M, B, S) where the estimator keeps members apart."""
    model = state.model
    if not recipe.targets.keeps_members:
        return _model_step(state, recipe, rollout_key)
    if model is None:
        nothing = jnp.zeros
        return lambda obs, action, key: (obs, nothing((1, *obs.shape[:-1])), nothing(obs.shape[:-1]))
    return lambda obs, action, key: dynamics.member_step(model, recipe.known, recipe.dynamics, obs, action)


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


def _target_metrics(critic_targets: targets.CriticTargets, recipe: Recipe) -> Metrics:
    real, imagined = jnp.split(critic_targets.value, [recipe.agent.batch_size])
    metrics = {"train/target_mean": jnp.mean(real), "train/target_std": jnp.std(real)}
    if imagined.size:
        weight = critic_targets.weight[recipe.agent.batch_size :]
        alive = weight > 0
        metrics["mve/imagined_target_mean"] = jnp.sum(jnp.where(alive, imagined, 0.0)) / jnp.maximum(
            jnp.sum(alive, dtype=jnp.float32), 1.0
        )
        metrics["mve/alive_fraction"] = jnp.mean(alive, dtype=jnp.float32)
    return metrics


@partial(jax.jit, static_argnames="recipe", donate_argnames="state")
def learn(state: TrainState, block: Transition, due: Due, recipe: Recipe) -> tuple[TrainState, Metrics]:
    """Judge the model on a block of real steps, remember it, then fit, imagine and update so many times.

    The counts are traced, not static: the block that only remembers, the first fit and the steady state
    are one compilation. Metrics are means over the repetitions; `state` is donated.
    """
    fit_key, branch_key, update_key = jax.random.split(_key_of_step(state, LEARN), 3)
    metrics: Metrics = {}

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
        fill = lambda buffer, key: branch(replace(state, imagined=buffer), recipe, key)  # noqa: E731
        buffer, branch_metrics = _repeat(fill, state.imagined, due.rounds, branch_key)
        state = replace(state, imagined=buffer)
        metrics |= branch_metrics | {"imagination/rows": buffer.size.astype(jnp.float32)}
    update = lambda agent, key: update_step(replace(state, agent=agent), recipe, key)  # noqa: E731
    agent, update_metrics = _repeat(update, state.agent, due.updates, update_key)

    state = replace(state, agent=agent, num_env_steps=state.num_env_steps + due.rows)
    return state, metrics | update_metrics


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
def exploration_policy(state: TrainState) -> Policy:
    """The policy that collects the block that starts at the state's step."""
    return state.agent.exploration_policy(_key_of_step(state, ACT))


def _key_of_step(state: TrainState, stream: int) -> Key:
    root = jax.random.clone(state.key)  # reused on purpose: the key-reuse checker has to be told
    return jax.random.fold_in(jax.random.split(root)[stream], state.num_env_steps)
