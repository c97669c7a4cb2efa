"""What the loop asks of the device: to learn, and for the policies that act and are judged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mve import train
from mve.agents import Agent
from mve.checkpoint.segments import Ring
from mve.envs.device import for_one
from mve.networks import Normaliser
from mve.policies import Policy
from mve.state import Recipe, TrainState
from mve.train import Due
from mve.types import Metrics, Transition


def on_host(tree: Any) -> Any:
    """The same with NumPy leaves. Copied: the device's buffers are donated later."""
    return jax.tree.map(np.array, tree)


SEED = "seed"  # the axis that devices share out


def _are_finite(state: TrainState, seeds: int) -> list[bool]:
    """Whether the networks and their optimisers are, for each of so many seeds; waits for them."""
    model = state.model
    learned = state.agent, None if model is None else (model.nets, model.opt_state)

    def has_range(node: Any) -> bool:  # which is infinite, of nothing
        return isinstance(node, Normaliser)

    leaves = [leaf for leaf in jax.tree.leaves(learned, is_leaf=has_range) if not has_range(leaf)]
    numbers = [np.asarray(leaf) for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating)]
    return np.all([np.isfinite(x).reshape(seeds, -1).all(axis=1) for x in numbers], axis=0).tolist()


class Alone:
    """One training state as it is."""

    def __init__(self, recipe: Recipe):
        self.recipe = recipe

    def joined(self, states: Sequence[TrainState]) -> TrainState:
        """The state that is trained."""
        [state] = states
        return state

    def part(self, state: TrainState, number: int) -> TrainState:
        """The state of one of the runs."""
        del number
        return state

    def rest(self, state: TrainState, number: int) -> TrainState:
        """The state of one of the runs but for the rows of its replay."""
        return _without_rows(self.part(state, number))

    def ring(self, state: TrainState, number: int) -> Ring:
        """The rows of the replay of one of the runs, which are read while nothing is learned."""
        del number
        return _ring(state, state.replay.rows, partial(_slots, state.replay.rows))

    def gathered(self, blocks: Sequence[Transition]) -> Transition:
        """What was collected on the host, as `learn` takes it."""
        [block] = blocks
        return block

    def stacked(self, trees: Sequence[Any]) -> Any:
        """Something of each run, on the device, as one."""
        [tree] = trees
        return tree

    def split(self, tree: Any) -> list[Any]:
        """The other way round."""
        return [tree]

    def each(self, tree: Any) -> list[Any]:
        """The same for NumPy leaves."""
        return [tree]

    def call(self, fn: Any, static: tuple[Any, ...], shared: Any, *each: Any) -> Any:
        """`fn(*static, shared, *each)`, compiled, of a function for trees with a leading axis of seeds."""
        return for_one(fn, static, shared, *each)

    def learn(self, state: TrainState, block: Transition, due: Due) -> tuple[TrainState, Metrics]:
        """`train.learn`; returns before it is done, and donates the state."""
        return train.learn(state, block, due, self.recipe)

    def exploration(self, state: TrainState, step: int) -> Policy:
        """What collects the block that starts at `step`, on the device; not to be kept when the state is
        donated."""
        return train.exploration_policy(state, np.int32(step))

    def deterministic(self, state: TrainState) -> Policy:
        """What is judged, on the device."""
        return state.agent.policy()

    def explorers(self, state: TrainState, step: int) -> list[Policy]:
        """The policies that collect the block that starts at `step`."""
        return [on_host(self.exploration(state, step))]

    def policies(self, state: TrainState) -> list[Policy]:
        """The deterministic policies."""
        return [on_host(self.deterministic(state))]

    def are_finite(self, state: TrainState) -> list[bool]:
        """Whether the networks of each run are free of NaN and infinities; waits for them."""
        return _are_finite(state, 1)

    def numbers(self, metrics: Metrics) -> list[dict[str, float]]:
        """The metrics of each run; waits for them."""
        return [{name: float(value) for name, value in jax.device_get(metrics).items()}]


def _without_rows(state: TrainState) -> TrainState:
    return eqx.tree_at(lambda state: state.replay.rows, state, None)


def _ring(state: TrainState, kinds: Transition, slots: Callable[..., Transition]) -> Ring:
    def read(start: int, count: int) -> dict[str, np.ndarray]:
        return on_host(slots(np.int32(start), count))._asdict()

    return Ring(kinds._asdict(), int(state.replay.position), int(state.replay.size), read)


@partial(jax.jit, static_argnames="count")
def _slots(rows: Transition, start: jax.Array, count: int) -> Transition:
    return jax.tree.map(lambda ring: jax.lax.dynamic_slice_in_dim(ring, start, count), rows)


@partial(jax.jit, static_argnames="count")
def _slots_of(rows: Transition, number: jax.Array, start: jax.Array, count: int) -> Transition:
    def slots(ring: jax.Array) -> jax.Array:
        [one] = jax.lax.dynamic_slice_in_dim(ring, number, 1)
        return jax.lax.dynamic_slice_in_dim(one, start, count)

    return jax.tree.map(slots, rows)


def devices_for(count: int) -> list[Any]:
    """As many of the devices as divide so many seeds evenly."""
    devices = jax.devices()
    return devices[: max(n for n in range(1, len(devices) + 1) if count % n == 0)]


class Together:
    """Several states as one, with a leading axis of seeds, in one program.

    How far all have come is one number and has no such axis: loops over counts stay loops. The seeds are
    shared out over as many devices as divide them evenly.
    """

    def __init__(self, recipe: Recipe, count: int):
        self.recipe, self.count = recipe, count
        devices = devices_for(count)
        self.mesh = Mesh(np.array(devices), (SEED,)) if len(devices) > 1 else None

    def joined(self, states: Sequence[TrainState]) -> TrainState:
        """The stacked state. The states given, which stand at the same step, are used up as if donated."""
        counts = jax.tree.map(jnp.copy, _counts(states[0]))
        stacked = eqx.tree_at(_counts, jax.tree.map(lambda *leaves: jnp.stack(leaves), *states), counts)
        for leaf in jax.tree.leaves(list(states)):
            if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
                leaf.delete()
        if (mesh := self.mesh) is None:
            return stacked
        mesh, specs = self.mesh, _per_leaf(stacked, PartitionSpec(SEED), PartitionSpec())
        return jax.tree.map(
            lambda leaf, spec: jax.device_put(leaf, NamedSharding(mesh, spec)), stacked, specs
        )

    def part(self, state: TrainState, number: int) -> TrainState:
        """The state of one of the runs."""
        part = _part(state, np.int32(number))
        return part if self.mesh is None else jax.device_put(part, jax.devices()[0])

    def rest(self, state: TrainState, number: int) -> TrainState:
        """The state of one of the runs but for the rows of its replay."""
        return self.part(_without_rows(state), number)

    def ring(self, state: TrainState, number: int) -> Ring:
        """The rows of the replay of one of the runs, which are read while nothing is learned."""
        rows = state.replay.rows
        one = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), rows)
        return _ring(state, one, partial(_slots_of, rows, np.int32(number)))

    def gathered(self, blocks: Sequence[Transition]) -> Transition:
        """What was collected on the host, as `learn` takes it."""
        return jax.tree.map(lambda *rows: np.stack(rows), *blocks)

    def stacked(self, trees: Sequence[Any]) -> Any:
        """Something of each run, on the device, as one with a leading axis of seeds."""
        stacked = _stacked(list(trees))
        if self.mesh is None:
            return stacked
        return jax.device_put(stacked, NamedSharding(self.mesh, PartitionSpec(SEED)))

    def split(self, tree: Any) -> list[Any]:
        """The other way round."""
        parts = [_at(tree, np.int32(i)) for i in range(self.count)]
        return parts if self.mesh is None else [jax.device_put(part, jax.devices()[0]) for part in parts]

    def each(self, tree: Any) -> list[Any]:
        """The same for NumPy leaves."""
        return [jax.tree.map(lambda x, i=i: x[i, ...], tree) for i in range(self.count)]

    def call(self, fn: Any, static: tuple[Any, ...], shared: Any, *each: Any) -> Any:
        """`fn(*static, shared, *each)`, compiled, of a function for trees with a leading axis of seeds."""
        return _call(fn, static, self.mesh, shared, each)

    def learn(self, state: TrainState, block: Transition, due: Due) -> tuple[TrainState, Metrics]:
        """`train.learn_block` of every seed; returns before it is done, and donates the state."""
        return _learn(state, block, due, self.recipe, self.mesh)

    def exploration(self, state: TrainState, step: int) -> Policy:
        """What collects the blocks that start at `step`, on the device; not to be kept when the state is
        donated."""
        return _explorers(state, np.int32(step))

    def deterministic(self, state: TrainState) -> Policy:
        """What is judged, on the device."""
        return _policies(state.agent)

    def explorers(self, state: TrainState, step: int) -> list[Policy]:
        """The policies that collect the blocks that start at `step`."""
        return self.each(on_host(self.exploration(state, step)))

    def policies(self, state: TrainState) -> list[Policy]:
        """The deterministic policies."""
        return self.each(on_host(self.deterministic(state)))

    def are_finite(self, state: TrainState) -> list[bool]:
        """Whether the networks of each run are free of NaN and infinities; waits for them."""
        return _are_finite(state, self.count)

    def numbers(self, metrics: Metrics) -> list[dict[str, float]]:
        """The metrics of each run; waits for them."""
        numbers = jax.device_get(metrics)
        return [{name: float(value[i]) for name, value in numbers.items()} for i in range(self.count)]


def _counts(state: TrainState) -> tuple[Any, ...]:
    """What is the same for all seeds."""
    return state.num_env_steps, state.replay.position, state.replay.size


def _per_leaf(state: TrainState, each: Any, shared: Any) -> Any:
    """`each` in place of every leaf, `shared` in place of what is the same for all seeds."""
    return eqx.tree_at(_counts, jax.tree.map(lambda _: each, state), (shared,) * len(_counts(state)))


@partial(jax.jit, static_argnames=("recipe", "mesh"), donate_argnames="states")
def _learn(
    states: TrainState, blocks: Transition, due: Due, recipe: Recipe, mesh: Mesh | None
) -> tuple[TrainState, Metrics]:
    axes = _per_leaf(states, 0, None)
    learn = partial(train.learn_block, recipe=recipe)
    every = jax.vmap(learn, in_axes=(axes, 0, None), out_axes=(axes, 0))
    if mesh is not None:
        # Not left to the compiler's partitioning: no seed asks anything of another device.
        shared, split = PartitionSpec(), PartitionSpec(SEED)
        placed = _per_leaf(states, split, shared)
        every = jax.shard_map(
            every, mesh=mesh, in_specs=(placed, split, shared), out_specs=(placed, split), check_vma=False
        )
    return every(states, blocks, due)


@jax.jit
def _explorers(states: TrainState, step: jax.Array) -> Policy:
    return jax.vmap(train.exploration_policy, in_axes=(_per_leaf(states, 0, None), None))(states, step)


@jax.jit
def _policies(agents: Agent) -> Policy:
    return jax.vmap(lambda agent: agent.policy())(agents)


@jax.jit
def _part(states: TrainState, number: jax.Array) -> TrainState:
    axes = _per_leaf(states, 0, None)
    return jax.tree.map(
        lambda axis, leaf: leaf if axis is None else leaf[number], axes, states, is_leaf=lambda x: x is None
    )


@jax.jit
def _at(tree: Any, number: jax.Array) -> Any:
    return jax.tree.map(lambda leaf: leaf[number], tree)


@jax.jit
def _stacked(trees: list[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


@partial(jax.jit, static_argnames=("fn", "static", "mesh"))
def _call(fn: Any, static: tuple[Any, ...], mesh: Mesh | None, shared: Any, each: tuple[Any, ...]) -> Any:
    every = partial(fn, *static)
    if mesh is not None:
        whole, split = PartitionSpec(), PartitionSpec(SEED)
        specs = (whole, *(split for _ in each))
        every = jax.shard_map(every, mesh=mesh, in_specs=specs, out_specs=split, check_vma=False)
    return every(shared, *each)
