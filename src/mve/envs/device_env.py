"""Where one run's native environment stands between blocks, and what a checkpoint holds of it."""

from __future__ import annotations

from typing import Any, final

import gymnasium as gym
import jax
import jax.numpy as jnp
import numpy as np

from mve.envs.base import EnvSpec, Snapshot
from mve.envs.device import DeviceTask, Running, begin, for_one, is_number, play
from mve.envs.native import task_of
from mve.envs.portable import described
from mve.policies import Policy
from mve.types import UserError

# Folded into the seed's key. Not a small number: what is folded with i is what is split as the i-th, and the
# training state splits the seed's key.
ENVIRONMENT = 2**31
HELD = {"seed": int, "num_episodes": int, "keys": dict}  # beside the arrays of a snapshot


@final
class DeviceEnv:
    """Where one run's environment stands, between blocks."""

    def __init__(self, env: DeviceTask, spec: EnvSpec, seed: int):
        self.env, self.spec, self._seed = env, spec, seed
        self.key = jax.random.fold_in(jax.random.key(seed), ENVIRONMENT)
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
        keys = {name: str(jax.random.key_impl(x)) for name, x in leaves.items() if not is_number(x)}
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
            or list(held["keys"]) != [name for name, leaf in named.items() if not is_number(leaf)]
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
    return leaf if is_number(leaf) else jax.random.key_data(leaf)


def of(
    instance: gym.Env[Any, Any], spec: EnvSpec, seed: int, block_steps: int, **settings: Any
) -> DeviceEnv | None:
    """The environment on the device that `instance` shows; None where there is none."""
    if (task := task_of(instance)) is None:
        return None
    env = DeviceTask(task=task, block_steps=block_steps, limit=spec.max_episode_steps, **settings)
    return DeviceEnv(env, spec, seed)
