"""Stage 7, the loop's inside: where the stages meet. Everything here is pure and runs in one compiled call.

sample -> imagine -> estimate -> improve        update_step, once per gradient step
judge -> remember -> fit -> update_step ...     learn, once per block of real steps
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from mve import agents, dynamics, imagine, replay, targets
from mve.agents import Agent, AgentConfig
from mve.dynamics import Dynamics, DynamicsConfig
from mve.networks import Policy
from mve.replay import Replay
from mve.targets import TargetsConfig
from mve.types import ActorValueFn, Key, Known, Metrics, ObjectiveFn, PolicyFn, StepFn, Transition

State = TypeVar("State")

LEARN, ACT = 0, 1  # the streams of random draws that start from a run's root key
ERROR_DEPTHS = (1, 3, 5)  # steps of the open-loop model error that is logged


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What is fixed for a run and compiled into it: hashable, so that equal recipes share a compilation."""

    obs_size: int
    action_size: int
    known: Known
    agent: AgentConfig
    dynamics: DynamicsConfig
    targets: TargetsConfig
    simulator: StepFn | None = None  # the true dynamics, in place of a fitted model

    @property
    def uses_model(self) -> bool:
        return self.targets.imagined_steps > 0 or self.agent.model_steps > 0

    @property
    def fits_model(self) -> bool:
        return self.uses_model and self.simulator is None


class TrainState(eqx.Module):
    """Everything that training changes, as one pytree in the order of the data flow.

    `key` is the run's root and never changes: every draw is folded from it and the step it is for, so a
    state says all that there is to know about the randomness to come.
    """

    replay: Replay
    model: Dynamics | None  # None where the estimator imagines nothing, or the simulator does it
    agent: Agent
    num_env_steps: Array
    key: Key


def init(recipe: Recipe, capacity: int, seed: int) -> TrainState:
    root, model_key, agent_key = jax.random.split(jax.random.key(seed), 3)
    sizes = recipe.obs_size, recipe.action_size
    return TrainState(
        replay=replay.init(capacity, *sizes),
        model=dynamics.init(recipe.dynamics, recipe.known, *sizes, model_key) if recipe.fits_model else None,
        agent=agents.init(recipe.agent, *sizes, agent_key),
        num_env_steps=jnp.int32(0),
        key=root,
    )


def grow(state: TrainState, capacity: int) -> TrainState:
    """The same state with room for more transitions."""
    return eqx.tree_at(lambda s: s.replay, state, replay.grow(state.replay, capacity))


def update_step(state: TrainState, recipe: Recipe, key: Key) -> tuple[Agent, Metrics]:
    """One gradient step of the agent: sample, imagine, estimate, improve."""
    sample_key, imagine_key, value_key, agent_key = jax.random.split(key, 4)
    agent = state.agent
    value_fn = lambda obs: agent.target_value(obs, value_key)  # noqa: E731

    batch = replay.sample(state.replay, (recipe.agent.batch_size,), sample_key)
    imagined = imagine.rollout(
        _target_step(state, recipe),
        agent.target_policy,
        _start_obs(batch, recipe),
        recipe.targets.imagined_steps,
        imagine_key,
    )
    critic_targets = targets.estimate(batch, imagined, value_fn, recipe.targets)
    agent, metrics = agent.update(critic_targets, batch.obs, _objective(state, recipe), agent_key)

    return agent, metrics | _target_metrics(critic_targets, recipe)


def _start_obs(batch: Transition, recipe: Recipe) -> Array:
    """The real next states, once for every member that is to imagine from them."""
    if not recipe.targets.keeps_members:
        return batch.next_obs
    # The simulator is an ensemble of one: its copies would agree.
    members = recipe.dynamics.members if recipe.simulator is None else 1
    return jnp.broadcast_to(batch.next_obs, (members, *batch.next_obs.shape))


def _model_step(state: TrainState, recipe: Recipe) -> StepFn:
    """One imagined step of states (B, S)."""
    model = state.model
    if recipe.simulator is not None:
        return recipe.simulator
    if model is None:  # traced for a rollout of no steps, whose result is empty
        return lambda obs, action, key: (obs, jnp.zeros(obs.shape[:-1]), jnp.zeros(obs.shape[:-1]))
    return partial(dynamics.step, model, recipe.known, recipe.dynamics)


def _target_step(state: TrainState, recipe: Recipe) -> StepFn:
    """As `_model_step`, of states (M, B, S) where the estimator keeps members apart."""
    model = state.model
    if not recipe.targets.keeps_members:
        return _model_step(state, recipe)
    if recipe.simulator is not None:
        return _with_one_opinion(recipe.simulator)
    if model is None:
        nothing = jnp.zeros
        return lambda obs, action, key: (obs, nothing((1, *obs.shape[:-1])), nothing(obs.shape[:-1]))
    return lambda obs, action, key: dynamics.member_step(model, recipe.known, recipe.dynamics, obs, action)


def _with_one_opinion(step_fn: StepFn) -> StepFn:
    """The same step with an axis for reward models, of which there is one."""

    def step(obs: Array, action: Array, key: Key) -> tuple[Array, Array, Array]:
        next_obs, reward, continuation = step_fn(obs, action, key)
        return next_obs, reward[None], continuation

    return step


def _objective(state: TrainState, recipe: Recipe) -> ObjectiveFn:
    """What the actor is to raise: the critic's value, after `model_steps` of the model (Heess et al. 2015,
    Amos et al. 2021). The tail of a rollout that ends is cut; gradients pass through policy and model."""
    steps, discount, step_fn = recipe.agent.model_steps, recipe.targets.discount, _model_step(state, recipe)

    def expanded(policy: PolicyFn, value: ActorValueFn, obs: Array, key: Key) -> tuple[Array, Array]:
        if steps == 0:
            return value(obs, key)
        imagine_key, value_key = jax.random.split(key)
        imagined = imagine.rollout(step_fn, policy, obs, steps, imagine_key)
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


def fit_step(model: Dynamics, memory: Replay, recipe: Recipe, key: Key) -> tuple[Dynamics, Metrics]:
    """One gradient step of every member of the model, each on rows of its own."""
    shape = recipe.dynamics.members, recipe.dynamics.batch_size
    return dynamics.fit_step(model, replay.sample(memory, shape, key), recipe.dynamics)


@partial(jax.jit, static_argnames="recipe", donate_argnames="state")
def learn(
    state: TrainState, block: Transition, num_rows: Array, num_fits: Array, num_updates: Array, recipe: Recipe
) -> tuple[TrainState, Metrics]:
    """Judge the model on a block of real steps, remember it, then fit and update so many times.

    The counts are traced, not static: the block that only remembers, the first fit and the steady state
    are one compilation. Metrics are means over the updates; `state` is donated.
    """
    fit_key, update_key = jax.random.split(_key_of_step(state, LEARN))
    metrics: Metrics = {}

    model, memory = state.model, state.replay
    if model is not None:
        errors = dynamics.open_loop_error(model, block, num_rows, ERROR_DEPTHS)
        metrics |= {f"model/mse_k{k}": error for k, error in errors.items()}
        model = dynamics.observe(model, block, num_rows, recipe.dynamics)
    memory = replay.add(memory, block, jnp.arange(block.reward.shape[0]) < num_rows)
    if model is not None:
        fit = lambda model, key: fit_step(model, memory, recipe, key)  # noqa: E731
        model, fit_metrics = _repeat(fit, model, num_fits, fit_key)
        metrics |= fit_metrics
    state = replace(state, replay=memory, model=model)
    update = lambda agent, key: update_step(replace(state, agent=agent), recipe, key)  # noqa: E731
    agent, update_metrics = _repeat(update, state.agent, num_updates, update_key)

    state = replace(state, agent=agent, num_env_steps=state.num_env_steps + num_rows)
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
