"""Files of a run folder: written whole and synced, read as they are, and no link followed on the way.

Tensors are in the safetensors format, named arrays behind a JSON header, which nothing can be executed from.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from msgspec import Meta
from safetensors import SafetensorError
from safetensors.numpy import load

from mve.types import Count

LARGEST_JSON = 64 * 2**20  # bytes; what is larger was not written by us
# Absent on Windows, which asks for rights to make links in the first place.
NO_LINK = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
DTYPES = {
    **{"float64": "F64", "float32": "F32", "float16": "F16", "bool": "BOOL"},
    **{
        f"{sign}int{8 * size}": f"{sign.upper() or 'I'}{8 * size}"
        for sign in ("", "u")
        for size in (1, 2, 4, 8)
    },
}

Sha256 = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]


class DamagedError(Exception):
    """What was read cannot be trusted."""


@dataclass(frozen=True)
class Written:
    """What a file has to hold when it is read again."""

    sha256: Sha256
    bytes: Count


def read(path: Path, most: int) -> bytes:
    """Content of a regular file of at most so many bytes; OSError for anything else, a link included."""
    handle = os.open(path, os.O_RDONLY | NO_LINK)
    with open(handle, "rb") as file:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "not a regular file")
        if found.st_size > most:
            raise OSError(errno.EFBIG, f"{found.st_size} bytes, where at most {most} are expected")
        return file.read(most)


def parse(content: bytes) -> Any:
    """What JSON text says; ValueError for anything else, numbers that are not finite included."""
    try:
        return json.loads(content.decode("utf-8"), parse_constant=_refuse)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def write(path: Path, chunks: Iterable[Any]) -> Written:
    """A new file, on the disk before this returns."""
    digest, size = hashlib.sha256(), 0
    with path.open("xb") as file:
        for chunk in chunks:
            digest.update(chunk)
            size += file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
    return Written(digest.hexdigest(), size)


def sync(folder: Path) -> None:
    """Have the names in a folder reach the disk."""
    if os.name == "nt":  # a folder cannot be opened there
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def digest(chunks: Iterable[Any]) -> Written:
    """What `write` would return for these."""
    sha256, size = hashlib.sha256(), 0
    for chunk in chunks:
        sha256.update(chunk)
        size += len(chunk)
    return Written(sha256.hexdigest(), size)


def packed(tensors: Mapping[str, np.ndarray]) -> list[Any]:
    """A safetensors file in pieces: the arrays' own memory is among them, not a copy.

    TypeError for a dtype that the format does not have, or that NumPy could not read back.
    """
    header, chunks, start = {}, [], 0
    for name, tensor in tensors.items():
        if tensor.dtype.name not in DTYPES or not tensor.dtype.isnative:
            raise TypeError(f"{name} has dtype {tensor.dtype}, which a file of tensors cannot hold")
        offsets = [start, start := start + tensor.nbytes]
        header[name] = {
            "dtype": DTYPES[tensor.dtype.name],
            "shape": list(tensor.shape),
            "data_offsets": offsets,
        }
        chunks.append(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return [len(text).to_bytes(8, "little"), text, *chunks]


def read_tensors(path: Path, written: Written) -> dict[str, np.ndarray]:
    """The arrays of a file that has to be the one that was written; DamagedError if it is not."""
    try:
        content = read(path, written.bytes)
        if len(content) < written.bytes:
            raise DamagedError(f"{path.name} is cut short")
        if hashlib.sha256(content).hexdigest() != written.sha256:
            raise DamagedError(f"{path.name} does not match its checksum")
        return load(content)
    except OSError as error:
        raise DamagedError(f"{path.name}: {error.strerror or error}") from error
    except (SafetensorError, ValueError, KeyError) as error:
        raise DamagedError(f"{path.name}: {error}") from error
