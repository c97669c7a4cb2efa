"""Terminations learned as limits: coordinates of the next state beyond which no episode has gone on.

Most tasks end where one number leaves a range (a height, an angle, a position). A net needs hundreds of ends
of a kind to find the number; this needs one or two, and says which it is. Ours; ends of no such kind are left
to the net.
"""

from __future__ import annotations

from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mve.types import Transition

ENDS = 1024  # the latest ones are to be explained
UNEXPLAINED = 0.05  # share of them up to which limits are taken for the truth


class Limits(eqx.Module):
    """What was survived, where episodes ended, and the fewest limits that tell the two apart."""

    low: Float[Array, " S"]  # of the states that an episode was in and went on
    high: Float[Array, " S"]
    ends: Float[Array, " K S"]  # a ring
    count: Int[Array, ""]  # of all ends ever seen
    lower: Float[Array, " S"]  # -inf where there is no limit
    upper: Float[Array, " S"]
    unexplained: Int[Array, ""]  # ends of the ring that lie within the limits

    @classmethod
    def empty(cls, obs_size: int) -> Limits:
        def everywhere(x: float) -> Array:  # an array of its own each: they are donated
            return jnp.full(obs_size, x, jnp.float32)

        return cls(
            low=everywhere(jnp.inf),
            high=everywhere(-jnp.inf),
            ends=jnp.zeros((ENDS, obs_size)),
            count=jnp.int32(0),
            lower=everywhere(-jnp.inf),
            upper=everywhere(jnp.inf),
            unexplained=jnp.int32(0),
        )

    @property
    def explained(self) -> Float[Array, ""]:
        """Share of the ends that lie beyond the limits; 1 where there was none."""
        known = jnp.maximum(jnp.minimum(self.count, ENDS), 1)
        return 1.0 - self.unexplained.astype(jnp.float32) / known.astype(jnp.float32)

    @property
    def hold(self) -> Bool[Array, ""]:
        """Whether they explain the ends well enough to be taken for their cause."""
        return self.explained >= 1.0 - UNEXPLAINED

    def passed(self, next_obs: Float[Array, " *batch S"]) -> Bool[Array, " *batch"]:
        """Whether a state lies beyond one of them."""
        lower, upper = (jnp.broadcast_to(limit, next_obs.shape) for limit in (self.lower, self.upper))
        return jnp.any((next_obs < lower) | (next_obs > upper), axis=-1)

    def observe(self, block: Transition, num_rows: Array) -> Limits:
        """Take in the first `num_rows` rows of a block (T, ...)."""
        used = jnp.arange(block.reward.shape[0]) < num_rows
        ended = used & (block.continuation == 0)
        survived = jnp.concatenate([block.obs, block.next_obs])
        counts = jnp.concatenate([used, used & ~ended])[:, None]
        position = jnp.where(ended, (self.count + jnp.cumsum(ended, dtype=jnp.int32) - 1) % ENDS, ENDS)
        seen = replace(
            self,
            low=jnp.minimum(self.low, jnp.min(jnp.where(counts, survived, jnp.inf), axis=0)),
            high=jnp.maximum(self.high, jnp.max(jnp.where(counts, survived, -jnp.inf), axis=0)),
            ends=self.ends.at[position].set(block.next_obs, mode="drop"),
            count=self.count + jnp.sum(ended, dtype=jnp.int32),
        )
        return _drawn(seen)


def _drawn(limits: Limits) -> Limits:
    """The limits that explain the ends: the one that explains most of them first, and so on with the rest.

    A limit lies half way between what was survived and the nearest end beyond that: the widest margin.
    """
    known = jnp.arange(ENDS) < limits.count
    above, below = limits.ends > limits.high[None], limits.ends < limits.low[None]
    beyond = jnp.concatenate([above, below], axis=1) & known[:, None]  # (K, 2 S)

    def some_left(carry: tuple[Array, Array]) -> Array:
        _, open_ends = carry
        return jnp.any(beyond & open_ends[:, None])

    def explain(carry: tuple[Array, Array]) -> tuple[Array, Array]:
        chosen, open_ends = carry
        side = jnp.argmax(jnp.sum(beyond & open_ends[:, None], axis=0))
        return chosen.at[side].set(True), open_ends & ~beyond[:, side]

    none = jnp.zeros(beyond.shape[1], bool)
    chosen, open_ends = jax.lax.while_loop(some_left, explain, (none, known))
    nearest_above = jnp.min(jnp.where(above & known[:, None], limits.ends, jnp.inf), axis=0)
    nearest_below = jnp.max(jnp.where(below & known[:, None], limits.ends, -jnp.inf), axis=0)
    is_upper, is_lower = jnp.split(chosen, 2)
    return replace(
        limits,
        lower=jnp.where(is_lower, 0.5 * (limits.low + nearest_below), -jnp.inf),
        upper=jnp.where(is_upper, 0.5 * (limits.high + nearest_above), jnp.inf),
        unexplained=jnp.sum(open_ends, dtype=jnp.int32),
    )
