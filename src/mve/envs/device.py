"""Native tasks on the device: a block of real steps is one `lax.scan`, for all seeds at once.

Every draw is a function of the run's seed and of what it is for: an episode's beginning of the episode's
number, what happens in a step and the exploration noise of the environment step at which the block starts.
The state is then all that a resumed run needs, and seeds side by side have the draws that each has alone.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from gymnasium.spaces import Discrete
from jaxtyping import Array, Bool, Float, Int

from mve.envs import host
from mve.envs.native import NativeTask
from mve.policies import Policy, held
from mve.types import Key, Transition

BEGINNING, CHANCE, NOISE, WARM_UP, EVALUATION, HOLD = range(6)  # streams of draws from a run's key
traces: Counter[DeviceTask] = Counter()  # how often `collect` has been traced


class Running(NamedTuple):
    """An episode under way."""

    task: Any  # the task's own state
    obs: Float[Array, " *seeds S"]
    episode: Int[Array, " *seeds"]  # its number
    length: Int[Array, " *seeds"]
    ret: Float[Array, " *seeds"]


class Collected(NamedTuple):
    """A block of real steps, and what ended in it."""

    block: Transition  # (*seeds, T, ...)
    over: Bool[Array, " *seeds T"]  # an episode ended with this step,
    length: Int[Array, " *seeds T"]  # which was so long by then
    ret: Float[Array, " *seeds T"]  # and had earned so much
    sound: Bool[Array, " *seeds T"]  # observation and reward are finite


class Played(NamedTuple):
    """One number per episode."""

    returns: Float[Array | np.ndarray, " *seeds E"]
    lengths: Int[Array | np.ndarray, " *seeds E"]

    def on_host(self) -> tuple[np.ndarray, np.ndarray]:
        """Waits for them; in double precision, as numbers are recorded."""
        returns, lengths = jax.device_get(self)
        return returns.astype(np.float64), lengths.astype(np.int64)


@dataclass(frozen=True, kw_only=True)
class DeviceTask:
    """What is compiled; equal ones share a compilation."""

    task: NativeTask
    block_steps: int
    limit: int | None  # steps of an episode
    hold_steps: int = 1
    truncation_is_terminal: bool = False
    keeps_density: bool = False  # of the actions, under the policy that took them


def begin(env: DeviceTask, shared: tuple[()], key: Key, episode: Array) -> Running:
    """The first observation of an episode of that number, for each seed."""
    del shared

    def one(key: Key, episode: Array) -> Running:
        beginnings = jax.random.fold_in(key, BEGINNING)
        state, obs = env.task.reset(jax.random.fold_in(beginnings, episode))
        return Running(state, obs, episode, jnp.zeros((), jnp.int32), jnp.zeros(()))

    return _strongly_typed(jax.vmap(one)(key, episode))


def collect(
    env: DeviceTask, shared: tuple[Array, Array, Array], policy: Policy, running: Running, key: Key
) -> tuple[Running, Collected]:
    """The next block of every seed: leaves of `policy`, `running` and `key` have a leading axis of seeds.

    `shared` are the environment step at which the block starts, how many rows of it are wanted, and whether
    actions are random rather than the policy's; rows beyond those wanted are zero. An episode that has ended
    is followed by the beginning of the next one, which costs a reset in the steps where there is one, and in
    no other. `continuation` is made here, once: 1 - terminated.
    """
    traces[env] += 1  # Python runs while JAX traces, and only then
    start, count, is_random = shared
    draws = jax.vmap(partial(_draws, env), in_axes=(0, None), out_axes=1)(key, start)
    advance = partial(_step, env, policy, key, start, is_random)

    def step(running: Running, inputs: tuple[Array, Any]) -> tuple[Running, Collected]:
        t, drawn = inputs
        kinds = jax.eval_shape(advance, running, t, drawn)[1]
        nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), kinds)
        wanted = lambda: advance(running, t, drawn)  # noqa: E731
        return jax.lax.cond(t < count, wanted, lambda: (running, nothing))

    time = jnp.arange(env.block_steps, dtype=jnp.int32)
    running, collected = jax.lax.scan(step, running, (time, draws))
    return running, jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), collected)


def _draws(env: DeviceTask, key: Key, start: Array) -> tuple[Key, Array, Array]:
    """Of one seed, for each step of a block: a key for the environment, noise, and a random action."""
    chance, noise, warm_up = (
        jax.random.fold_in(jax.random.fold_in(key, stream), start) for stream in (CHANCE, NOISE, WARM_UP)
    )
    size = env.block_steps, host.action_size(env.task.action_space)
    if isinstance(env.task.action_space, Discrete):
        random = jax.nn.one_hot(jax.random.randint(warm_up, size[:1], 0, size[1]), size[1])
    else:
        random = jax.random.uniform(warm_up, size, minval=-1.0)
    normal = jax.random.normal(noise, size)
    if env.hold_steps > 1:
        lengths = jax.random.uniform(jax.random.fold_in(noise, HOLD), size[:1])
        normal, random = (held(draws, lengths, env.hold_steps) for draws in (normal, random))
    return jax.random.split(chance, env.block_steps), normal, random


def _step(
    env: DeviceTask,
    policy: Policy,
    key: Key,
    start: Array,
    is_random: Array,
    running: Running,
    t: Array,
    drawn: tuple[Key, Array, Array],
) -> tuple[Running, Collected]:
    """One real step of every seed."""
    chance, noise, random = drawn
    chosen = jax.vmap(lambda policy, obs, noise: policy(obs, noise))(policy, running.obs, noise)
    action = jnp.where(is_random, random, chosen)
    native = host.native_on_device(env.task.action_space)(action)
    state, next_obs, reward, terminated, truncated = jax.vmap(env.task.step)(running.task, native, chance)
    reward = reward.astype(jnp.float32)
    length, ret = running.length + 1, running.ret + reward
    truncated = truncated | (length >= env.limit) if env.limit else truncated
    over = terminated | truncated
    ends = over if env.truncation_is_terminal else terminated
    density = jnp.zeros(reward.shape)
    if env.keeps_density:
        of_policy = jax.vmap(lambda policy, *pair: policy.log_density(*pair))(policy, running.obs, action)
        density = jnp.where(is_random, host.random_log_density(env.task.action_space), of_policy)
    row = Transition(
        obs=running.obs,
        action=action,
        reward=reward,
        next_obs=next_obs,
        continuation=1.0 - ends.astype(jnp.float32),
        episode=running.episode,
        step=jnp.broadcast_to(start + t + 1, over.shape),
        log_density=density,
    )
    sound = jnp.isfinite(reward) & jnp.all(jnp.isfinite(next_obs), axis=-1)
    going = running._replace(task=state, obs=next_obs, length=length, ret=ret)

    def next_episode() -> Running:
        following = begin(env, (), key, running.episode + 1)
        return jax.tree.map(lambda new, old: jnp.where(_like(over, new), new, old), following, going)

    following = jax.lax.cond(jnp.any(over), next_episode, lambda: going)
    return _strongly_typed(following), Collected(row, over, length, ret, sound)


def play(env: DeviceTask, episodes: int, shared: tuple[Array, Array], policy: Policy, key: Key) -> Played:
    """Undiscounted return of so many episodes under the deterministic policy of every seed, side by side.

    `shared` are the environment step for which this is done, and the longest that an episode may last. What
    is drawn is a function of the run's seed, the step and the episode's number.
    """
    step, longest = shared
    fold = jax.random.fold_in
    keys = jax.vmap(lambda key: fold(fold(key, EVALUATION), step))(key)
    keys = jax.vmap(lambda key: jax.random.split(key, episodes))(keys)  # (N, E)
    every = lambda fn: jax.vmap(jax.vmap(fn))  # noqa: E731
    begun, chance = every(lambda key: tuple(jax.random.split(key)))(keys)
    act = jax.vmap(lambda policy, obs: policy(obs, jnp.zeros((episodes, size))))
    native, size = host.native_on_device(env.task.action_space), host.action_size(env.task.action_space)
    state, obs = every(env.task.reset)(begun)
    counted = Played(jnp.zeros(obs.shape[:2]), jnp.zeros(obs.shape[:2], jnp.int32))

    def body(carry: tuple[Any, Array, Played, Array]) -> tuple[Any, Array, Played, Array]:
        state, obs, (returns, lengths), running = carry
        now = jnp.max(lengths)
        keys = every(lambda key: fold(key, now))(chance)
        state, obs, reward, terminated, truncated = every(env.task.step)(
            state, native(act(policy, obs)), keys
        )
        # What follows an episode's end is played on with the others, and not counted.
        returns = returns + jnp.where(running, reward.astype(jnp.float32), 0.0)
        lengths = lengths + running.astype(jnp.int32)
        running = running & ~(terminated | truncated) & (lengths < longest)
        return _strongly_typed(state), obs, Played(returns, lengths), running

    start = _strongly_typed(state), obs, counted, jnp.ones(obs.shape[:2], bool)
    return jax.lax.while_loop(lambda carry: jnp.any(carry[-1]), body, start)[2]


@partial(jax.jit, static_argnames=("fn", "static"))
def for_one(fn: Any, static: tuple[Any, ...], shared: Any, *each: Any) -> Any:
    """What `fn(*static, shared, *each)`, written for trees with a leading axis of seeds, is for one."""
    return jax.tree.map(lambda x: x[0], fn(*static, shared, *jax.tree.map(lambda x: x[None], each)))


def _like(mask: Array, leaf: Array) -> Array:
    """The mask with as many axes as the leaf."""
    return mask.reshape(mask.shape + (1,) * (leaf.ndim - mask.ndim))


def _strongly_typed(tree: Any) -> Any:
    """A task's own numbers may be Python's, which would have one loop compiled for each kind."""
    return jax.tree.map(lambda x: jax.lax.convert_element_type(x, x.dtype) if is_number(x) else x, tree)


def is_number(leaf: Array | jax.ShapeDtypeStruct) -> bool:
    return not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
