"""What an update learns from: real rows and imagined ones, and what followed them or would follow.

Replay, model and policy meet here; `train.update_step` only asks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array

from mve import dynamics, imagine, replay, targets
from mve.agents import Agent
from mve.replay import Replay
from mve.state import Recipe, TrainState
from mve.targets import TargetsConfig
from mve.types import Beside, Imagined, Key, Metrics, PolicyFn, Segment, StepFn, Transition

USUAL = 0.95  # quantile of the first steps' disagreement that later ones are held against (MACURA)
WHOLE_ROLLOUT = 2**32 - 1  # folded into a rollout's key for what holds throughout; its steps have 0, 1, ...


def recall(state: TrainState, recipe: Recipe, key: Key) -> tuple[Transition, Segment | None]:
    """A batch of transitions, and what really followed them if the estimator reads that."""
    if not recipe.targets.reads_segments:
        return sample_batch(state, recipe, key), None
    num_rows = recipe.targets.horizon_steps + 1
    segment = replay.sample_segments(state.replay, recipe.agent.batch_size, num_rows, key)
    return jax.tree.map(lambda x: x[0], segment.rows), jax.tree.map(lambda x: x[1:], segment)


def sample_batch(state: TrainState, recipe: Recipe, key: Key) -> Transition:
    """A batch of real transitions or, where imagined ones are kept, its share of both."""
    size, imagination = recipe.agent.batch_size, recipe.imagination
    if state.imagined is None:
        return real_batch(state, recipe, size, key)
    real_key, imagined_key, share_key, step_key = jax.random.split(key, 4)
    real = real_batch(state, recipe, size, real_key)
    dreamt = _imagined_batch(state, recipe, imagined_key)
    if imagination.first_step == "imagined":
        step_fn = model_step(state, recipe, step_key)
        now = beside(state, recipe, dreamt.step, dreamt.episode, 1)
        dreamt = _first_step(dreamt, state.agent.target_policy, step_fn, step_key, now)
    if imagination.mixed_by == "row":
        is_real = jnp.arange(size) < recipe.real_rows
    else:
        is_real = jnp.broadcast_to(jax.random.bernoulli(share_key, imagination.real_share), (size,))

    def choose(a: Array, b: Array) -> Array:
        return jnp.where(is_real.reshape(-1, *[1] * (a.ndim - 1)), a, b)

    return jax.tree.map(choose, real, dreamt)


def real_batch(state: TrainState, recipe: Recipe, size: int, key: Key) -> Transition:
    """Real transitions, each with so many of the steps that followed it as its target is to sum."""
    if (n_step := recipe.targets.n_step) == 1:
        return replay.sample(state.replay, (size,), key, recency=recipe.recency)
    key, sum_key = jax.random.split(key)
    segment = replay.sample_segments(state.replay, size, n_step, key, recency=recipe.recency)
    recent = state.num_env_steps - recipe.targets.n_step_within if recipe.targets.n_step_within else 0
    own = 0 if recipe.targets.n_step_warmup else recipe.warmup_steps
    # Steps are numbered from 1, so that the first after any n of them is n + 1.
    segment = targets.cut(segment, jnp.where(segment.rows.step[0] > jnp.maximum(recent, own), n_step, 1))
    return summed(state.agent, segment, recipe.targets, sum_key)


def summed(agent: Agent, segment: Segment, config: TargetsConfig, key: Key) -> Transition:
    """Real steps that followed one another as one, with what the policy is paid for acting on the way: all
    of them, or as many from the first on as is drawn for each row."""
    if config.n_step_drawn:
        num_rows, size = segment.valid.shape
        lengths = jax.random.randint(jax.random.fold_in(key, 1), (size,), 1, num_rows + 1)
        segment = targets.cut(segment, lengths)
    _, bonus = agent.target_policy(segment.rows.obs[1:], key)
    return targets.n_steps_as_one(segment, bonus, config.discount)


def _imagined_batch(state: TrainState, recipe: Recipe, key: Key) -> Transition:
    """Rows of the rounds that are kept, as many as rounds of full length would have."""
    assert state.imagined is not None
    kept = recipe.imagination.starts * recipe.imagination.rounds_kept
    newest = kept * imagine.rollout_length(recipe.imagination, state.num_env_steps)
    return replay.sample(state.imagined, (recipe.agent.batch_size,), key, newest)


def _first_step(
    rows: Transition, policy: PolicyFn, step_fn: StepFn, key: Key, beside: Beside | None
) -> Transition:
    """What the policy and the model make of the rows' states: another action, reward and next state."""
    return imagine.as_transition(imagine.rollout(step_fn, policy, rows.obs, 1, key, beside), rows)


def beside(state: TrainState, recipe: Recipe, first: Array, episode: Array, num_steps: int) -> Beside | None:
    """The real steps (H, B) from the `first` ones on, for rollouts that run beside them: imagined rows bear
    the number of the real step at which they would have been. None where nothing is corrected by them."""
    if not recipe.corrects:
        return None
    step = first[None] + jnp.arange(num_steps)[:, None]
    return Beside(*replay.at_steps(state.replay, step, jnp.broadcast_to(episode[None], step.shape)))


# The buffer, its newest rows, which rollouts go on, steps kept by each on average, and when one is to stop.
Branch: TypeAlias = tuple[Replay, Transition, Array, Array, Array]


class Shared(NamedTuple):
    """One rollout of a batch of states: what the critic's rows are made of, and the actor's way back."""

    real: Transition | None  # steps that led to the first of the states; None if they are imagined all
    first: Transition  # the rollout's first steps
    later: Imagined  # its other steps
    whole: Imagined
    pull_back: Callable[[Imagined], tuple[Any]]


def imagine_once(state: TrainState, recipe: Recipe, key: Key) -> Shared:
    """A rollout under the actor in training, from states of the imagination buffer and ones just reached.

    The forward pass serves critic and actor alike (the training rollout of Kubo et al. 2025): its
    derivative by the actor is kept, to be asked for once the critics have moved. Beyond them, a share of
    the rollouts starts where steps of the replay have led to, so that these can be expanded. An episode's
    last state is no start: in its place stands an imagined one, which the row's continuation takes out.
    """
    start_key, rollout_key = jax.random.split(key)
    start = _imagined_batch(state, recipe, start_key)
    real = None
    if recipe.real_rows:
        real_key = jax.random.fold_in(start_key, 1)
        real = real_batch(state, recipe, recipe.real_rows, real_key)
        start = _led_to(real, start)
    actor, policy_of = state.agent.acting()
    step_fn, steps = model_step(state, recipe, rollout_key), recipe.agent.model_steps
    along = beside(state, recipe, start.step, start.episode, steps)

    def rollout(actor: Any) -> Imagined:
        return imagine.rollout(step_fn, policy_of(actor), start.obs, steps, rollout_key, along, unrolled=True)

    whole, pull_back = jax.vjp(rollout, actor)
    return Shared(real, imagine.as_transition(whole, start), imagine.after_first(whole), whole, pull_back)


def _led_to(real: Transition, start: Transition) -> Transition:
    """The start rows, of which the first have the states that real steps led to, unless an episode ended
    there, and the numbers of the steps that followed."""
    count, goes_on = len(real.reward), real.continuation > 0

    def first(reached: Array, others: Array) -> Array:
        chosen = goes_on.reshape(-1, *[1] * (others.ndim - 1))
        return jnp.concatenate([jnp.where(chosen, reached, others[:count]), others[count:]])

    return start._replace(
        obs=first(real.next_obs, start.obs),
        step=first(real.step + 1, start.step),
        episode=first(real.episode, start.episode),
    )


def branch(state: TrainState, recipe: Recipe, key: Key) -> tuple[Replay, Metrics]:
    """One round of rollouts from real states under the policy in training, into the imagination buffer.

    Branched rollouts (Janner et al. 2019, algorithm 2); long ones are the distribution rollouts of Kubo et
    al. 2025. What follows a predicted termination is not kept, nor is a step on which the model is not to be
    trusted and what follows that. `imagination/kept` is the share of all steps that are.
    """
    start_key, rollout_key = jax.random.split(key)
    assert state.imagined is not None
    start = replay.sample(state.replay, (recipe.imagination.starts,), start_key, recency=recipe.recency)
    length = imagine.rollout_length(recipe.imagination, state.num_env_steps)
    policy, step_fn = state.agent.current_policy, model_step(state, recipe, rollout_key)

    def step(t: Array, carry: Branch) -> Branch:
        buffer, rows, alive, kept, largest = carry
        step_key = jax.random.fold_in(rollout_key, t)
        along = beside(state, recipe, rows.step, rows.episode, 1)
        rows = _first_step(rows, policy, step_fn, step_key, along)
        if recipe.imagination.trust:
            assert state.model is not None  # refused by the settings
            apart = dynamics.disagreement(state.model, rows.obs, rows.action, jax.random.fold_in(step_key, 1))
            usual = recipe.imagination.trust * jnp.quantile(apart, USUAL)
            largest = jnp.where(t == 0, usual, largest)
            alive = alive & (apart <= largest)
        buffer, kept = replay.add(buffer, rows, alive), kept + jnp.mean(alive, dtype=jnp.float32)
        on = rows._replace(obs=rows.next_obs, step=rows.step + 1)
        return buffer, on, alive & (rows.continuation > 0), kept, largest

    everyone = jnp.ones(recipe.imagination.starts, bool)
    begun = state.imagined, start, everyone, jnp.float32(0.0), jnp.float32(jnp.inf)
    buffer, _, _, kept, _ = jax.lax.fori_loop(0, length, step, begun)
    return buffer, {"imagination/kept": kept / length.astype(jnp.float32)}


def imagine_ahead(state: TrainState, recipe: Recipe, batch: Transition, key: Key) -> Imagined:
    """What the target policy would do next, in the model, from the next states of a batch."""
    policy = state.agent.target_policy
    if recipe.targets.shares_draws:
        policy = jax.vmap(policy, in_axes=(0, None))
    start, step_fn = _start_obs(batch, recipe), target_step(state, recipe, key)
    along = beside(state, recipe, batch.step + 1, batch.episode, recipe.expanded_steps)
    return imagine.rollout(step_fn, policy, start, recipe.expanded_steps, key, along)


def _start_obs(batch: Transition, recipe: Recipe) -> Array:
    """The real next states, once for every member that is to imagine from them; where an episode ended there,
    the states before, whose value the row's continuation takes out."""
    start = imagine.where_it_goes_on(batch.continuation, batch.next_obs, batch.obs)
    if not recipe.targets.keeps_members:
        return start
    return jnp.broadcast_to(start, (recipe.kept_members, *start.shape))


def model_step(state: TrainState, recipe: Recipe, rollout_key: Key) -> StepFn:
    """One imagined step of states (B, S), for the rollout of that key, which is left to it."""
    model = state.model
    if recipe.simulator is not None:
        return recipe.simulator
    if model is None:  # traced for a rollout of no steps, whose result is empty
        return lambda obs, action, key: (obs, jnp.zeros(obs.shape[:-1]), jnp.zeros(obs.shape[:-1]))
    whole = jax.random.fold_in(rollout_key, WHOLE_ROLLOUT)
    return dynamics.rollout_step(model, recipe.known, recipe.dynamics, whole)


def target_step(state: TrainState, recipe: Recipe, rollout_key: Key) -> StepFn:
    """As `model_step`, of states (M, B, S) where the estimator keeps members apart, M those that it asks."""
    model = state.model
    if not recipe.targets.keeps_members:
        return model_step(state, recipe, rollout_key)
    if recipe.simulator is not None:
        return _with_one_opinion(recipe.simulator)
    if model is None:
        nothing = jnp.zeros
        return lambda obs, action, key: (obs, nothing((1, *obs.shape[:-1])), nothing(obs.shape[:-1]))
    known, config, crossed = recipe.known, recipe.dynamics, recipe.targets.crosses_rewards
    if recipe.kept_members < config.members:
        whole = jax.random.fold_in(rollout_key, WHOLE_ROLLOUT)
        return dynamics.few_members_step(model, known, config, whole)
    return lambda obs, action, key: dynamics.member_step(model, known, config, obs, action, crossed=crossed)


def _with_one_opinion(step_fn: StepFn) -> StepFn:
    """The same step with an axis for reward models, of which there is one."""

    def step(obs: Array, action: Array, key: Key) -> tuple[Array, Array, Array]:
        next_obs, reward, continuation = step_fn(obs, action, key)
        return next_obs, reward[None], continuation

    return step
