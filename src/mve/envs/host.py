"""Gymnasium environments on the CPU: ids, instances, your own class."""

from __future__ import annotations

import difflib
import math
import warnings
from collections.abc import Callable
from typing import Any, TypeAlias

import gymnasium as gym
import jax
import jax.numpy as jnp
import numpy as np
from gymnasium.spaces import Box, Discrete

from mve.envs import control_suite, native_names
from mve.envs.base import EnvConfig, EnvSpec, Episode, HostPolicy, Snapshot
from mve.envs.known import known_functions, name_of
from mve.envs.portable import described
from mve.envs.stepped import Fault, Here, Restarts, Stepped
from mve.messages import no_device, one_line, what_failed
from mve.types import FaultError, Known, RewardFn, TerminationFn, Transition, UserError

ActionSpace: TypeAlias = Box | Discrete

LARGEST_SEED = 2**31 - 1
# Of an adapter in a snapshot: whether it was ever reset, whether it is within an episode, and how far.
COUNTERS = {
    **{"seed": int, "begun": bool, "going": bool},
    **{"num_steps": int, "num_episodes": int, "length": int, "return": float},
}
EPISODE_STREAM = 1  # first word of the seeds of training episodes; evaluation and exploration have others


def make(config: EnvConfig) -> gym.Env:
    """A fresh environment of that id; a typing mistake gets the nearest names."""
    try:
        if native_names.is_native(config.id):
            return native_names.make(config.id, config.kwargs or {})
        is_suite = config.id.startswith(control_suite.PREFIX)
        task = control_suite.spec(config.id) if is_suite else config.id
        with warnings.catch_warnings():
            # An older version is asked for on purpose, to compare with published numbers.
            warnings.filterwarnings("ignore", message=".*is out of date")
            return gym.make(task, **(config.kwargs or {}))
    except (gym.error.NameNotFound, gym.error.VersionNotFound, gym.error.NamespaceNotFound) as error:
        near = difflib.get_close_matches(config.id, list(gym.registry), n=3, cutoff=0.5)
        hint = f"; nearest: {', '.join(near)}" if near else "; see gymnasium.registry for the names"
        raise UserError(f"unknown environment '{config.id}'{hint}") from error
    except UserError:
        raise
    except (gym.error.Error, ImportError, TypeError) as error:
        raise UserError(f"cannot make environment '{config.id}': {one_line(error)}") from error
    except Exception as error:  # of the task's own code: a file that is missing, a number that it cannot use
        raise UserError(f"cannot make environment '{config.id}': {what_failed(error)}") from error


def episode_seed(stream: int, *words: int) -> int:
    """Seed of one episode's reset: a function of the stream, the run's seed and the episode's numbers."""
    return int(np.random.default_rng([stream, *words]).integers(LARGEST_SEED))


def action_size(space: ActionSpace) -> int:
    """A: axes of a box, or actions to choose from."""
    return int(space.n) if isinstance(space, Discrete) else space.shape[0]


def native_action(space: ActionSpace, action: np.ndarray) -> Any:
    """Actions as the environment takes them, in its own type: those in [-1, 1] stretched over the box,
    whatever its limits, every whole number of an integer box over an equal part of it; a one-hot vector as
    the number it stands for, without the last axis."""
    if isinstance(space, Discrete):
        return space.start + np.argmax(action, axis=-1).astype(space.dtype)
    low, high = space.low.astype(np.float64), space.high.astype(np.float64)
    share = (action + 1.0) * 0.5
    native = np.floor(low + share * (high - low + 1.0)) if is_whole(space) else low + share * (high - low)
    return np.clip(native, low, high).astype(space.dtype)


def is_whole(space: Box) -> bool:
    """Whether a box has whole numbers alone."""
    return bool(np.issubdtype(space.dtype, np.integer) or np.issubdtype(space.dtype, np.bool_))


def random_actions(space: ActionSpace, rng: np.random.Generator, count: int) -> np.ndarray:
    """So many actions (count, A) as the agent's, each drawn uniformly."""
    size = action_size(space)
    if isinstance(space, Discrete):
        return np.eye(size, dtype=np.float32)[rng.integers(size, size=count)]
    return rng.uniform(-1.0, 1.0, (count, size)).astype(np.float32)


def random_log_density(space: ActionSpace) -> float:
    """Log of the density of those in [-1, 1]^A, or of each one's probability."""
    size = action_size(space)
    return -math.log(size) if isinstance(space, Discrete) else -math.log(2.0) * size


def _check_spaces(env: gym.Env, name: str) -> tuple[Box, ActionSpace]:
    obs, action = env.observation_space, env.action_space
    if not isinstance(obs, Box) or len(obs.shape) != 1:
        raise UserError(
            f"{name}: observation space {one_line(obs)} is not supported; it has to be a Box with one axis "
            "(wrap it with gymnasium.wrappers.FlattenObservation)"
        )
    if isinstance(action, Discrete):
        return obs, action
    if not isinstance(action, Box) or len(action.shape) != 1:
        raise UserError(
            f"{name}: action space {one_line(action)} is not supported; "
            "it has to be a Box with one axis (continuous control) or Discrete"
        )
    if not (
        np.isfinite(action.low).all() and np.isfinite(action.high).all() and (action.low < action.high).all()
    ):
        raise UserError(
            f"{name}: action space {one_line(action)} has unbounded or empty ranges; "
            "give it finite low and high, and leave ClipAction out: no action is beyond them"
        )
    return obs, action


def native_on_device(space: ActionSpace) -> Callable[[jax.Array], jax.Array]:
    """`native_action` in JAX, for actions that are within their limits already."""
    if isinstance(space, Discrete):
        return lambda action: int(space.start) + jnp.argmax(action, axis=-1)
    low, high = jnp.float32(space.low), jnp.float32(space.high)

    def native(action: jax.Array) -> jax.Array:
        shape = action.shape
        if is_whole(space):
            count = jnp.broadcast_to(high - low + 1.0, shape)
            whole = jnp.floor(jnp.broadcast_to(low, shape) + 0.5 * (action + 1.0) * count)
            return jnp.minimum(whole, jnp.broadcast_to(high, shape))
        return jnp.broadcast_to(low, shape) + (action + 1.0) * jnp.broadcast_to(0.5 * (high - low), shape)

    return native


class BrokenOffError(FaultError):
    """A block that a fault ended before it was whole."""

    def __init__(self, message: str, block: Transition, ended: list[Episode]):
        super().__init__(message)
        self.block, self.ended = block, ended  # as `collect` would have returned them


class HostEnv:
    """One Gymnasium environment, stepped on the host.

    The agent's actions in [-1, 1] are stretched over the action box, whatever its limits; one-hot ones are
    turned into the environment's numbers. Every episode is reset with a seed of its own, a function of the
    run's seed and the episode's number: an episode is then the same whatever came before it.

    An episode that a fault ends is cut short like one that a time limit ends: its rows stay, the last one
    with its bootstrap. `stepped` makes what is stepped, for observations of a size, if that is not `env`.
    """

    def __init__(
        self,
        env: gym.Env,
        *,
        seed: int,
        truncation_is_terminal: bool = False,
        reward_fn: RewardFn | None = None,
        termination_fn: TerminationFn | None = None,
        stepped: Callable[[int], Stepped] | None = None,
        restarts: Restarts | None = None,
    ):
        if why := no_device():
            raise UserError(f"{why}; `mve doctor` looks at the rest")
        name = name_of(env)
        obs_space, action_space = _check_spaces(env, name)
        size = obs_space.shape[0]
        self._stepped = stepped(size) if stepped else Here(env, size)
        self._restarts = restarts or Restarts(EnvConfig(), name)
        self._action_space = action_space
        self._seed = seed
        self._truncation_is_terminal = truncation_is_terminal
        self._obs: np.ndarray | None = None
        self._return, self._length = 0.0, 0
        self._begun = False  # reset at least once
        self._lost = False  # its state is not the one that belongs to the counters
        self.num_episodes = 0
        self.num_steps = 0
        limit = env.spec.max_episode_steps if env.spec is not None else None
        shipped = known_functions(env)
        known = Known(reward_fn or shipped.reward, termination_fn or shipped.termination)
        self.spec = EnvSpec(
            name=name,
            obs_size=obs_space.shape[0],
            action_size=action_size(action_space),
            max_episode_steps=limit,
            known=self._of_agents_actions(known),
            discrete=isinstance(action_space, Discrete),
        )

    @property
    def here(self) -> gym.Env | None:
        """The environment that is stepped, a new one after a fault, where that is in this process."""
        return self._stepped.env if isinstance(self._stepped, Here) else None

    def _of_agents_actions(self, known: Known) -> Known:
        """The same functions for actions as the agent's: outside this folder there is no other kind."""
        native = native_on_device(self._action_space)
        reward_fn, termination_fn = known
        reward = reward_fn and (lambda obs, action, next_obs: reward_fn(obs, native(action), next_obs))
        termination = termination_fn and (
            lambda obs, action, next_obs: termination_fn(obs, native(action), next_obs)
        )
        return Known(reward, termination)

    def _reset(self) -> np.ndarray:
        seed = episode_seed(EPISODE_STREAM, self._seed, self.num_episodes)
        obs = self._stepped.reset(seed)
        self._begun, self._lost = True, False
        self._return, self._length = 0.0, 0
        return obs

    def collect(self, policy: HostPolicy, num_steps: int) -> tuple[Transition, list[Episode]]:
        """The next `num_steps` real steps as a batch (T, ...), and the episodes that ended within.

        `continuation` is made here, once: 1 - terminated; a time limit leaves it at 1 unless the
        environment was told otherwise. `next_obs` is what the step returned, never a reset. Raises
        BrokenOffError, with the rows so far, for a fault after which the environment is not begun anew.
        """
        rows: list[tuple[Any, ...]] = []
        ended: list[Episode] = []
        while len(rows) < num_steps:
            try:
                rows.append(self._row(policy, ended))
            except Fault as fault:
                told = f"at {self._place()}, {fault}"
                self.lose()
                if not self._restarts.allow(told):
                    block = self._block(rows)
                    raise BrokenOffError(self._restarts.in_vain(told), block, ended) from fault
        return self._block(rows), ended

    def _row(self, policy: HostPolicy, ended: list[Episode]) -> tuple[Any, ...]:
        if self._obs is None:
            self._obs = self._reset()
        obs, episode = self._obs, self.num_episodes
        action = np.asarray(policy(obs), np.float32)
        native = native_action(self._action_space, action)
        next_obs, reward, terminated, truncated = self._stepped.step(native)
        self.num_steps += 1
        over = terminated or (truncated and self._truncation_is_terminal)
        self._return, self._length = self._return + reward, self._length + 1
        self._obs = next_obs
        if terminated or truncated:
            ended.append(Episode(self._return, self._length))
            self._obs = None
            self.num_episodes += 1
        return obs, action, reward, next_obs, 1.0 - over, episode, self.num_steps, 0.0

    def _block(self, rows: list[tuple[Any, ...]]) -> Transition:
        sizes = (self.spec.obs_size, self.spec.action_size)
        shapes = ((sizes[0],), (sizes[1],), (), (sizes[0],), (), (), (), ())
        dtypes = (np.float32,) * 5 + (np.int32,) * 2 + (np.float32,)
        columns = zip(*rows, strict=True) if rows else [()] * len(shapes)
        parts = zip(columns, shapes, dtypes, strict=True)
        return Transition(*(np.array(c, d).reshape(-1, *shape) for c, shape, d in parts))  # pyright: ignore[reportArgumentType]

    def _place(self) -> str:
        """Where a fault is: steps are counted from 1, episodes from 0, as in the replay."""
        if self._obs is None:
            return f"the reset of episode {self.num_episodes}, after step {self.num_steps}"
        return f"step {self.num_steps + 1}, step {self._length + 1} of episode {self.num_episodes}"

    def lose(self, num_steps: int | None = None) -> None:
        """Give up the environment's state: what follows, after so many steps, is another episode.

        Other than by `abandon`, one that was not begun is passed over too: its reset may be at fault.
        """
        self.num_episodes, self._obs, self._lost = self.num_episodes + 1, None, True
        self.num_steps = self.num_steps if num_steps is None else num_steps

    @property
    def next_episode(self) -> int:
        """Number of the episode that begins at the next reset."""
        return self.num_episodes + (self._obs is not None)

    def abandon(self) -> None:
        """Give the running episode up: what follows is another."""
        self.num_episodes, self._obs = self.next_episode, None

    @property
    def snapshot_obstacle(self) -> str | None:
        """Why there is no snapshot; None if there is one."""
        if self._lost:
            return "it failed"
        try:
            return self._stepped.obstacle() if self._begun else None
        except Fault as fault:
            self.lose()
            return str(fault)

    def snapshot(self) -> Snapshot | None:
        """The environment's state, the observation to act on, and the counters; None if not to be had.

        Before its first reset an environment has no state, and the counters are all there is.
        """
        if self._lost:
            return None
        try:
            taken = self._stepped.take() if self._begun else Snapshot({}, {"arrays": {}})
        except Fault:
            self.lose()
            return None
        if taken is None:
            return None
        arrays, facts = taken
        if self._obs is not None:
            arrays["obs"] = self._obs.copy()
            facts["arrays"] |= described({"obs": self._obs})
        going = self._obs is not None
        now = (self._seed, self._begun, going, self.num_steps, self.num_episodes, self._length, self._return)
        facts["host"] = dict(zip(COUNTERS, now, strict=True))
        return taken

    def restore(self, snapshot: Snapshot) -> None:
        """Go on from the snapshot of an environment of the same make and seed.

        UserError if it does not fit; nothing has been changed then.
        """
        counters: Any = snapshot.facts.get("host")
        if fault := self._fault(counters, snapshot.arrays.get("obs")):
            raise UserError(
                f"{self.spec.name}: the state saved does not fit: {fault}; use another checkpoint"
            )
        if counters["begun"]:
            try:
                self._stepped.restore(snapshot)
            except Fault as fault:
                raise FaultError(f"{self.spec.name}: when its state was put back, {fault}") from fault
        _, self._begun, going, self.num_steps, self.num_episodes, self._length, self._return = (
            counters[name] for name in COUNTERS
        )
        self._obs = np.array(snapshot.arrays["obs"]) if going else None

    def _fault(self, counters: Any, obs: np.ndarray | None) -> str | None:
        typed = isinstance(counters, dict) and {name: type(x) for name, x in counters.items()} == COUNTERS
        if not typed or min(x for x in counters.values() if type(x) is int) < 0:
            return "its counters are damaged"
        if counters["seed"] != self._seed:
            return f"it is of seed {counters['seed']}, not {self._seed}"
        if not counters["going"]:
            return None
        found = "missing" if obs is None else f"{obs.dtype} {list(obs.shape)}"
        wanted = f"float32 [{self.spec.obs_size}]"
        return None if found == wanted else f"its observation is {found}, not {wanted}"

    def close(self) -> None:
        self._stepped.close()
