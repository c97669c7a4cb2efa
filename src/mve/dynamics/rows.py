"""Which rows a member is fitted to: fixed functions of the row's own name, the step it was collected at.

Masks and weights are thus never redrawn, at no refit, resume or change of the replay's capacity, and need
no memory: redrawn at each fit, they would show every member all the data in time.
"""

from __future__ import annotations

import itertools
import math

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt

from mve.dynamics.settings import DynamicsConfig

HOLD_OUT, BOOTSTRAP = 1, 2  # streams of numbers
LARGEST_WEIGHT = 5  # of Poisson(1) draws, one in 1700 is larger
_POISSON_CDF = tuple(itertools.accumulate(math.exp(-1) / math.factorial(k) for k in range(LARGEST_WEIGHT)))


def held_out(step: Int[Array, " *batch"], config: DynamicsConfig) -> Bool[Array, " *batch"]:
    """Whether no member may be fitted to the row: one draw for every chunk of neighbouring steps.

    Never for the first chunk: however long chunks are, the first fit has to have rows.
    """
    chunk = step // config.holdout_chunk_steps
    drawn = _uniform(_scramble(chunk.astype(jnp.uint32), HOLD_OUT)) < config.holdout_share
    return drawn & (chunk > 0)


def bootstrap_weights(step: Int[Array, " M *batch"]) -> Float[Array, " M *batch"]:
    """How often each row is in the resample of the member it is shown to: Poisson(1), at most 5.

    Drawing n of n rows with replacement, a row comes up Poisson(1) times for large n (Oza and Russell
    2001). "Masks stored with the row" are here recomputed from the name that is stored with it.
    """
    member = jnp.arange(step.shape[0], dtype=jnp.uint32).reshape(-1, *[1] * (step.ndim - 1))
    member = jnp.broadcast_to(_scramble(member, BOOTSTRAP), step.shape)
    draw = _uniform(_scramble(step.astype(jnp.uint32) ^ member, BOOTSTRAP))
    return sum((draw >= share).astype(jnp.float32) for share in _POISSON_CDF)  # pyright: ignore[reportReturnType]


def fitting_weights(step: Int[Array, " M B"], config: DynamicsConfig) -> tuple[Array | None, Array | None]:
    """Weights (M, B) of a minibatch's rows: for the nets of the members, for the one that all share.

    None where every row counts alike.
    """
    kept = 1.0 - held_out(step, config).astype(jnp.float32) if config.holdout_share else None
    if not config.bootstrap:
        return kept, kept
    drawn = bootstrap_weights(step)
    return (drawn if kept is None else drawn * kept), kept


def unseen_weights(step: Int[Array, " M B"], config: DynamicsConfig) -> Float[Array, " M B"]:
    """Which rows are in no member's hold-out and not in the member's own resample: one in e."""
    unseen = (bootstrap_weights(step) == 0).astype(jnp.float32)
    return unseen * (1.0 - held_out(step, config)) if config.holdout_share else unseen


def _scramble(name: UInt[Array, " *batch"], stream: int) -> UInt[Array, " *batch"]:
    """A hash of 32 bits (xor-shift and multiply, constants of Wellons 2018), one for each stream.

    Not `jax.random`, whose draws another release may change: what was held out has to stay so.
    """
    x = name + jnp.uint32(stream * 0x9E3779B9 % 2**32)
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def _uniform(bits: UInt[Array, " *batch"]) -> Float[Array, " *batch"]:
    """In [0, 1), from the upper 24 bits."""
    return (bits >> 8).astype(jnp.float32) * jnp.float32(2**-24)
