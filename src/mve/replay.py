"""Stage 2, remember: a ring of transitions on the device, as pure functions over a frozen state."""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from mve.types import Key, Segment, Transition


class Replay(eqx.Module):
    """`rows` has a leading axis of the capacity; the first `size` are filled; `position` is written next."""

    rows: Transition
    position: jax.Array
    size: jax.Array

    @property
    def capacity(self) -> int:
        return self.rows.reward.shape[0]


def init(capacity: int, obs_size: int, action_size: int) -> Replay:
    rows = Transition(
        obs=jnp.zeros((capacity, obs_size)),
        action=jnp.zeros((capacity, action_size)),
        reward=jnp.zeros((capacity,)),
        next_obs=jnp.zeros((capacity, obs_size)),
        continuation=jnp.zeros((capacity,)),
        episode=jnp.zeros((capacity,), jnp.int32),
        step=jnp.zeros((capacity,), jnp.int32),
        log_density=jnp.zeros((capacity,)),
    )
    return Replay(rows=rows, position=jnp.int32(0), size=jnp.int32(0))


def add(replay: Replay, block: Transition, keep: Bool[Array, " T"]) -> Replay:
    """Write the rows of a block that `keep` names, in order, over the oldest once the ring is full.

    The block has a fixed length, so that fewer rows do not compile anew; those not kept are sent out of
    bounds, where the scatter drops them.
    """
    capacity, count = replay.capacity, jnp.cumsum(keep, dtype=jnp.int32)
    index = jnp.where(keep, (replay.position + count - 1) % capacity, capacity)
    rows = jax.tree.map(lambda ring, new: ring.at[index].set(new, mode="drop"), replay.rows, block)
    return Replay(
        rows=rows,
        position=(replay.position + count[-1]) % capacity,
        size=jnp.minimum(replay.size + count[-1], capacity),
    )


def sample(
    replay: Replay,
    shape: tuple[int, ...],
    key: Key,
    newest: Int[Array, ""] | None = None,
    *,
    recency: float = 1.0,
) -> Transition:
    """Rows drawn with replacement, with leading axes `shape`; of the `newest` ones if given.

    Uniformly, or, with a recency p above 1, those of a share x of all that are newest with probability
    x^(1/p): at 2, half of what is drawn is of the newest quarter.
    """
    if newest is None:
        index = _drawn(replay, shape, key, recency)
    else:
        age = jax.random.randint(key, shape, 0, jnp.minimum(newest, replay.size))
        index = (replay.position - 1 - age) % replay.capacity
    return jax.tree.map(lambda ring: ring[index], replay.rows)


def _drawn(replay: Replay, shape: tuple[int, ...], key: Key, recency: float) -> Array:
    """Where in the ring the rows of a sample are."""
    if recency == 1.0:
        return jax.random.randint(key, shape, 0, replay.size)
    share = jax.random.uniform(key, shape) ** recency
    age = (replay.size.astype(jnp.float32) * share).astype(jnp.int32)
    return (replay.position - 1 - jnp.minimum(age, replay.size - 1)) % replay.capacity


def at_steps(
    replay: Replay, step: Int[Array, " *batch"], episode: Int[Array, " *batch"]
) -> tuple[Transition, Bool[Array, " *batch"]]:
    """The rows that were collected at these environment steps, and whether they are there: in these episodes,
    and not overwritten. Before a gap in the numbers none is found."""
    newest = replay.rows.step[(replay.position - 1) % replay.capacity]
    age = newest - step
    rows: Transition = jax.tree.map(
        lambda ring: ring[(replay.position - 1 - age) % replay.capacity], replay.rows
    )
    there = (age >= 0) & (age < replay.size) & (rows.step == step) & (rows.episode == episode)
    return rows, there


def sample_segments(
    replay: Replay, batch_size: int, num_rows: int, key: Key, *, recency: float = 1.0
) -> Segment:
    """Rows drawn as `sample` draws them, each with those that followed it: axes (num_rows, B).

    A segment goes on while the episode is the same and `step` counts up by one; where it ends, at the
    episode's end, at the newest row or where the oldest have been overwritten, rows are not valid.
    """
    first = _drawn(replay, (batch_size,), key, recency)
    index = (first[None] + jnp.arange(num_rows)[:, None]) % replay.capacity
    rows: Transition = jax.tree.map(lambda ring: ring[index], replay.rows)
    # Rows never written lie beyond the size; their episode and step could be those of a real row.
    follows = (jnp.diff(rows.step, axis=0) == 1) & (jnp.diff(rows.episode, axis=0) == 0)
    follows &= index[1:] < replay.size
    valid = jnp.concatenate([jnp.ones((1, batch_size), bool), follows])
    return Segment(rows=rows, valid=jnp.cumprod(valid, axis=0, dtype=jnp.int32) == 1)


def grow(replay: Replay, capacity: int) -> Replay:
    """The same rows in a larger ring. Oldest first, so that a ring that had wrapped stays in order."""
    order = jnp.arange(replay.capacity) + jnp.where(replay.size == replay.capacity, replay.position, 0)
    extra = capacity - replay.capacity
    rows = jax.tree.map(
        lambda ring: jnp.concatenate(
            [ring[order % replay.capacity], jnp.zeros((extra, *ring.shape[1:]), ring.dtype)]
        ),
        replay.rows,
    )
    return Replay(rows=rows, position=replay.size % capacity, size=replay.size)
