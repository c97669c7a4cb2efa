"""Native tasks on the device: a block of real steps is one `lax.scan`, for all seeds at once.

Every draw is a function of the run's seed and of what it is for: an episode's beginning of the episode's
number, what happens in a step and the exploration noise of the environment step at which the block starts.
The state is then all that a resumed run needs, and seeds side by side have the draws that each has alone.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, final

import gymnasium as gym
import jax
import jax.numpy as jnp
import numpy as np
from gymnasium.spaces import Discrete
from jaxtyping import Array, Bool, Float, Int

from mve.envs import host
from mve.envs.base import EnvSpec, Snapshot
from mve.envs.native import NativeTask, task_of
from mve.envs.portable import described
from mve.policies import Policy
from mve.types import Key, Transition, UserError

BEGINNING, CHANCE, NOISE, WARM_UP, EVALUATION = range(5)  # streams of draws from a run's key
HELD = {"seed": int, "num_episodes": int, "keys": dict}  # beside the arrays of a snapshot
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
    return jax.random.split(chance, env.block_steps), jax.random.normal(noise, size), random


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
    return jax.tree.map(lambda x: jax.lax.convert_element_type(x, x.dtype) if _is_number(x) else x, tree)


def _is_number(leaf: Array | jax.ShapeDtypeStruct) -> bool:
    return not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


@final
class DeviceEnv:
    """Where one run's environment stands, between blocks."""

    def __init__(self, env: DeviceTask, spec: EnvSpec, seed: int):
        self.env, self.spec, self._seed = env, spec, seed
        self.key = jax.random.key(seed)
        self._running: Running | None = None
        self.num_episodes = 0  # of the first to begin here
        self.num_steps = 0  # the loop counts them; the name is every adapter's

    @property
    def running(self) -> Running:
        """The episode under way; a first one is begun where there is none."""
        if self._running is None:
            self._running = self._begun(self.num_episodes)
        return self._running

    @running.setter
    def running(self, running: Running) -> None:
        self._running = running

    @property
    def next_episode(self) -> int:
        """Number of the episode that follows this one."""
        return self.num_episodes if self._running is None else int(self._running.episode) + 1

    def evaluate(
        self, policy: Policy, step: int, episodes: int, longest: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns and lengths of episodes of the deterministic policy."""
        shared = np.int32(step), np.int32(self.env.limit or longest)
        return for_one(play, (self.env, episodes), shared, policy, self.key).on_host()

    def snapshot(self) -> Snapshot:
        """The episode under way, leaf by leaf."""
        leaves = {} if self._running is None else _named_leaves(self._running)
        arrays = {name: np.asarray(_plain(leaf)) for name, leaf in leaves.items()}
        keys = {name: str(jax.random.key_impl(x)) for name, x in leaves.items() if not _is_number(x)}
        facts = {"seed": self._seed, "num_episodes": self.num_episodes, "keys": keys}
        return Snapshot(arrays, {"device": facts, "arrays": described(arrays)})

    def restore(self, snapshot: Snapshot) -> None:
        """Go on from there: the next block is the one that would have followed, to the bit.

        UserError if it does not fit; nothing has been changed then.
        """
        arrays, facts = snapshot
        held: Any = facts.get("device")
        sound = isinstance(held, dict) and {k: type(x) for k, x in held.items()} == HELD
        template = jax.eval_shape(lambda: self._begun(0)) if arrays else ()
        named = _named_leaves(template)
        wanted = {name: jax.eval_shape(_plain, leaf) for name, leaf in named.items()}
        kinds = {name: (x.dtype, x.shape) for name, x in wanted.items()}
        if (
            not sound
            or held["seed"] != self._seed
            or list(held["keys"]) != [name for name, leaf in named.items() if not _is_number(leaf)]
            or kinds != {name: (x.dtype, x.shape) for name, x in arrays.items()}
        ):
            raise UserError(f"{self.spec.name}: the state saved does not fit; use another checkpoint")
        # Copies: JAX on the CPU may otherwise share NumPy's memory.
        leaves = {name: jnp.array(arrays[name]) for name in wanted}
        for name in held["keys"]:
            leaves[name] = jax.random.wrap_key_data(leaves[name], impl=held["keys"][name])
        self.num_episodes = held["num_episodes"]
        whole = jax.tree.unflatten(jax.tree.structure(template), list(leaves.values()))
        self._running = whole if arrays else None

    def _begun(self, episode: int) -> Running:
        return for_one(begin, (self.env,), (), self.key, np.int32(episode))


def _named_leaves(tree: Any) -> dict[str, Any]:
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _plain(leaf: Any) -> Any:
    """Keys as their data."""
    return leaf if _is_number(leaf) else jax.random.key_data(leaf)


def of(
    instance: gym.Env[Any, Any], spec: EnvSpec, seed: int, block_steps: int, **settings: bool
) -> DeviceEnv | None:
    """The environment on the device that `instance` shows; None where there is none."""
    if (task := task_of(instance)) is None:
        return None
    env = DeviceTask(task=task, block_steps=block_steps, limit=spec.max_episode_steps, **settings)
    return DeviceEnv(env, spec, seed)
