"""A training state on the host, as it was at some step: what a checkpoint is written from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from mve.checkpoint.manifest import Tensor
from mve.checkpoint.segments import Changed, Ring, Shelf
from mve.types import Json


class Ringed(NamedTuple):
    """A ring to be saved by segments, and where earlier checkpoints have put it."""

    prefix: str
    ring: Ring
    shelf: Shelf


@dataclass(frozen=True)
class Frozen:
    """A state on the host as it was at some step, whatever becomes of it on the device."""

    facts: Json
    tensors: dict[str, np.ndarray]
    described: dict[str, Tensor]
    ringed: Ringed | None = None
    changed: Changed = field(default_factory=lambda: Changed({}, {}))

    @property
    def step(self) -> int:
        return int(self.facts["num_env_steps"])

    @property
    def nbytes(self) -> int:
        """Of all that has to be written."""
        arrays = [*self.tensors.values(), *(a for rows in self.changed.rows.values() for a in rows.values())]
        return sum(array.nbytes for array in arrays)


def freeze(state: PyTree, facts: Json, ringed: Ringed | None = None) -> Frozen:
    """Copy a state to the host, and of a ring, whose rows are then not in `state`, what has changed.

    Facts have to be finite numbers, text, lists and mappings.
    """
    tensors, described = {}, {}
    for name, leaf in named_leaves(state).items():
        if not isinstance(leaf, (jax.Array, np.ndarray)):
            raise TypeError(f"{name} is a {type(leaf).__name__}; only arrays can be saved")
        impl = str(jax.random.key_impl(leaf)) if is_key(leaf) else None
        described[name] = Tensor(leaf.shape, str(leaf.dtype), impl)
        tensors[name] = np.array(leaf if impl is None else jax.random.key_data(leaf), order="C")
    if ringed is None:
        return Frozen(facts, tensors, described)
    for name, kind in ringed.ring.kinds.items():
        described[f"{ringed.prefix}.{name}"] = Tensor(kind.shape, str(kind.dtype))
    changed = ringed.shelf.changed(ringed.ring, int(facts["num_env_steps"]))
    return Frozen(facts, tensors, described, ringed, changed)


def named_leaves(tree: PyTree) -> dict[str, Any]:
    """Leaves by dotted path, in the order of flattening."""
    paths, _ = jax.tree_util.tree_flatten_with_path(tree)
    named = {jax.tree_util.keystr(path, simple=True, separator=".") or "state": leaf for path, leaf in paths}
    if len(named) < len(paths):
        raise ValueError("two leaves of the state have the same dotted name")
    return named


def is_key(leaf: Any) -> bool:
    """Whether it holds random keys, which are saved as their key data."""
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
