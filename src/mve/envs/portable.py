"""Python values as JSON and named arrays, exact to the bit, and back: nothing that could run code on load.

None, truth values, text, integers of 53 bits, finite numbers and lists of them stand for themselves; all else
is a mapping from what it is to its parts:

    array(3)                {"array": "0.state"}        the array itself is in `arrays` under that name
    np.float32(0.5)         {"scalar": "0.last_u"}      NumPy's scalars promote unlike Python's numbers
    (1.0, nan)              {"tuple": [1.0, {"float": "nan"}]}
    2**100                  {"int": "1267650600228229401496703205376"}
    np.random.Generator     {"generator": "PCG64", "state": ..., "seed": ...}
    {"a": 1}                {"dict": {"a": 1}}
"""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import numpy as np

Arrays: TypeAlias = dict[str, np.ndarray]

LARGEST_EXACT = 2**53  # beyond it some readers of JSON round an integer
KINDS, WIDEST = "biuf", 8  # of arrays: what safetensors holds
BIT_GENERATORS = ("PCG64", "PCG64DXSM", "MT19937", "Philox", "SFC64")
SEED_PARTS = ("entropy", "spawn_key", "pool_size", "n_children_spawned")


class NotPortableError(Exception):
    """A value that JSON and arrays cannot hold; the message says which and where."""


def pack(value: Any, name: str, arrays: Arrays) -> Any:
    """JSON of `value`; copies of the arrays in it are added to `arrays`, named from `name` on.

    NotPortableError for anything that would not come back the same.
    """
    if isinstance(value, np.ndarray | np.generic):
        return {"array" if isinstance(value, np.ndarray) else "scalar": _put(value, name, arrays)}
    if isinstance(value, np.random.Generator):
        return _pack_generator(value, name, arrays)
    kind = type(value)  # exactly: a subclass would come back as its parent
    if value is None or kind in (bool, str):
        return value
    if kind is int:
        return value if abs(value) <= LARGEST_EXACT else {"int": str(value)}
    if kind is float:
        return value if math.isfinite(value) else {"float": repr(value)}
    if kind in (list, tuple):
        packed = [pack(part, f"{name}.{i}", arrays) for i, part in enumerate(value)]
        return packed if kind is list else {"tuple": packed}
    if kind is dict and all(type(key) is str for key in value):
        return {"dict": {key: pack(part, f"{name}.{key}", arrays) for key, part in value.items()}}
    raise NotPortableError(f"{name} is of type {kind.__name__}, which is neither an array nor JSON")


def unpack(packed: Any, arrays: Arrays) -> Any:
    """What was packed, in its own memory. ValueError, TypeError, KeyError for what `pack` never wrote."""
    if packed is None or isinstance(packed, bool | int | float | str):
        return packed
    if isinstance(packed, list):
        return [unpack(part, arrays) for part in packed]
    match packed:
        case {"array": str(name), **rest} if not rest:
            return np.array(arrays[name])
        case {"scalar": str(name), **rest} if not rest and arrays[name].ndim == 0:
            return arrays[name][()]
        case {"tuple": list(parts), **rest} if not rest:
            return tuple(unpack(part, arrays) for part in parts)
        case {"int": str(text), **rest} if not rest:
            return int(text)
        case {"float": "nan" | "inf" | "-inf" as text, **rest} if not rest:
            return float(text)
        case {"dict": dict(parts), **rest} if not rest:
            return {key: unpack(part, arrays) for key, part in parts.items()}
        case {"generator": str(kind), "state": state, "seed": seed, **rest} if not rest:
            return _generator(kind, unpack(state, arrays), unpack(seed, arrays))
    raise ValueError(f"{str(packed)[:60]} stands for nothing")


def described(arrays: Arrays) -> dict[str, list[Any]]:
    """dtype and shape of every array by name, as JSON."""
    return {name: [str(array.dtype), list(array.shape)] for name, array in arrays.items()}


def _put(value: Any, name: str, arrays: Arrays) -> str:
    dtype = value.dtype
    if dtype.kind not in KINDS or dtype.itemsize > WIDEST or not dtype.isnative:
        raise NotPortableError(f"{name} has dtype {dtype}, which a checkpoint cannot hold")
    if name in arrays:
        raise NotPortableError(f"two arrays would have the name {name}")
    arrays[name] = np.array(value, order="C")
    return name


def _pack_generator(generator: np.random.Generator, name: str, arrays: Arrays) -> dict[str, Any]:
    """With what `spawn` would go on from, where the generator knows it."""
    bits: Any = generator.bit_generator
    kind, seed = type(bits).__name__, bits.seed_seq
    if kind not in BIT_GENERATORS:
        raise NotPortableError(f"{name} draws from {kind}, which is none of {', '.join(BIT_GENERATORS)}")
    known = isinstance(seed, np.random.SeedSequence)
    parts = {part: getattr(seed, part) for part in SEED_PARTS} if known else None
    return {
        "generator": kind,
        "state": pack(bits.state, f"{name}.state", arrays),
        "seed": pack(parts, f"{name}.seed", arrays),
    }


def _generator(kind: str, state: Any, seed: Any) -> np.random.Generator:
    if kind not in BIT_GENERATORS:
        raise ValueError(f"no generator {kind}")
    bits = getattr(np.random, kind)(np.random.SeedSequence(**seed) if seed is not None else None)
    bits.state = state
    return np.random.Generator(bits)
