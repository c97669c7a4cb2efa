"""Save and restore one pytree and a few JSON facts: safetensors + JSON, nothing that can run code on load.

    folder/step_000000010000/state.safetensors    one tensor per leaf, named by its path: agent.critic.bias
    folder/step_000000010000/state.json           facts, shape and dtype of every tensor, a sha256 of every
                                                  file, and one of all that it says itself
    folder/replay/SHA256.safetensors              rows that the checkpoints share (`segments`)

A checkpoint is there whole or not at all. The newest two are kept, so that a damaged newest is not a lost
run, and the one whose evaluation was best.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import shutil
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from mve import files
from mve.checkpoint import manifest, segments
from mve.checkpoint.frozen import Frozen, freeze, is_key, named_leaves
from mve.checkpoint.manifest import FACTS, FORMAT, REPLACED, TENSORS, Manifest, Rows, Tensor
from mve.checkpoint.segments import Segment
from mve.files import DamagedError
from mve.messages import what_failed
from mve.types import Json, UserError

KEPT = 2
WRITING = ".writing_"
FULL = (errno.ENOSPC, errno.EDQUOT)

Which: TypeAlias = Literal["newest", "best"] | int  # an integer: the newest of at most that step


def save(folder: Path, state: PyTree, facts: Json) -> Path:
    """Write `folder/step_N` with N = facts["num_env_steps"], as `write` does."""
    [path] = write({folder: freeze(state, facts)})
    return path


def write(frozen: Mapping[Path, Frozen]) -> list[Path]:
    """A checkpoint in each of these folders, or in none; then all but the newest two and the best go.

    Files and directories reach the disk before the rename that makes them visible: whenever the power
    fails, what is named `step_*` is whole. Raises UserError where the disk is full or cannot be written;
    what was there before is then as it was.
    """
    ready: dict[Path, list[Segment]] = {}
    new: list[Path] = []
    final: list[Path] = []
    for folder, each in frozen.items():
        try:
            ready[folder], written = _prepare(folder, each)
            new += written
        except BaseException as error:
            segments.discard(new)
            for begun in [*ready, folder]:
                _discard(_writing(begun, frozen[begun]))
            if isinstance(error, OSError):
                raise _refused(folder, each, error) from error
            raise
    for folder, each in frozen.items():
        try:
            final.append(_publish(folder, each, ready[folder]))
        except OSError as error:
            raise _refused(folder, each, error) from error
    for path in final:
        with contextlib.suppress(OSError):  # what should go and does not is no harm
            _prune(path)
    return final


def _prepare(folder: Path, frozen: Frozen) -> tuple[list[Segment], list[Path]]:
    """Everything on the disk, under a name that nobody reads; all segments, and the files that are new."""
    put: list[Segment] = []
    new: list[Path] = []
    writing, rows = _writing(folder, frozen), None
    _discard(writing)
    writing.mkdir(parents=True)
    if frozen.ringed is not None:
        (shelved := folder / segments.FOLDER).mkdir(exist_ok=True)
        if shelved.is_symlink():
            raise OSError(errno.ELOOP, f"{shelved} is a link")
        put, new = frozen.ringed.shelf.put(shelved, frozen.changed)
        rows = Rows(frozen.ringed.prefix, put)
    try:
        file = files.write(writing / TENSORS, files.packed(frozen.tensors))
        said = manifest.text(Manifest(FORMAT, frozen.facts, frozen.described, file, rows))
        files.write(writing / FACTS, [said.encode()])
        files.sync(writing)
    except BaseException:
        segments.discard(new)
        raise
    return put, new


def _publish(folder: Path, frozen: Frozen, put: list[Segment]) -> Path:
    """Give what was prepared its name."""
    final = folder / f"step_{frozen.step:012d}"
    if final.exists():  # saved twice at the same step; a directory cannot be renamed over another
        _discard(replaced := folder / f"{REPLACED}{final.name}")
        final.rename(replaced)
    _writing(folder, frozen).rename(final)
    files.sync(folder)
    if frozen.ringed is not None:
        frozen.ringed.shelf.wrote(frozen.ringed.ring.capacity, frozen.step, put)
    return final


def _writing(folder: Path, frozen: Frozen) -> Path:
    return folder / f"{WRITING}step_{frozen.step:012d}"


def _refused(folder: Path, frozen: Frozen, error: OSError) -> UserError:
    """One line: where, why, and how much room it takes."""
    why = error.strerror or str(error)
    if error.errno in FULL:
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        free = shutil.disk_usage(there).free
        why += f"; it takes {frozen.nbytes / 1e6:.1f} MB, and {free / 1e6:.1f} MB are free there"
    return UserError(f"cannot write a checkpoint to {folder}: {why}")


def restore(
    folder: Path, template_of: Callable[[Json], PyTree], which: Which = "newest"
) -> tuple[PyTree, Json]:
    """State and facts of the newest sound checkpoint in `folder`, or of `which` it is to be.

    `template_of` its facts gives structure, shapes and dtypes; leaves are `jax.ShapeDtypeStruct`, or NumPy
    arrays for what is to come back as such. It raises ValueError, TypeError or KeyError where the facts
    cannot be right. A damaged checkpoint is passed over with a warning. Raises UserError if none is left, or
    if the state saved is not the state asked for.
    """
    if folder.is_symlink():
        raise UserError(
            f"{folder} is a link, and nothing outside the run folder is read; move what it leads to"
        )
    candidates = _candidates(folder, which)
    for path in candidates:
        try:
            said = manifest.read(path)
            template = _template(template_of, said.facts)
            return _fill(template, said, path), said.facts
        except DamagedError as error:
            hint = "" if path == candidates[-1] else "; trying the one before it"
            warnings.warn(f"{path} is damaged ({error}){hint}", stacklevel=2)
    if which == "best":
        raise UserError(f"no usable checkpoint in {folder} has an evaluation; use the newest")
    raise UserError(f"no usable checkpoint in {folder}; train first, or give the folder of a finished run")


def _candidates(folder: Path, which: Which) -> list[Path]:
    """Best first."""
    found = manifest.checkpoints(folder)
    if which == "best":
        best = manifest.best(found)
        return [best] if best else []
    return [path for path in reversed(found) if which == "newest" or manifest.step_of(path) <= which]


def _template(template_of: Callable[[Json], PyTree], facts: Json) -> PyTree:
    try:
        return template_of(facts)
    except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise DamagedError(f"{FACTS}: {what_failed(error)}") from error


def latest(folder: Path) -> Path | None:
    """The newest checkpoint, sound or not; None if there is none."""
    found = manifest.checkpoints(folder)
    return found[-1] if found else None


def steps(folder: Path) -> list[int]:
    """Of which there are checkpoints, sound or not, in order."""
    return [manifest.step_of(path) for path in manifest.checkpoints(folder)]


def read_facts(path: Path) -> Json:
    """The facts of one checkpoint, without its tensors."""
    try:
        return manifest.read(path).facts
    except DamagedError as error:
        raise UserError(f"{path} is damaged ({error}); use another checkpoint") from error


def load_tensors(path: Path) -> dict[str, np.ndarray]:
    """Every tensor of one checkpoint by name, keys as their key data: for reading a part of the state."""
    try:
        said = manifest.read(path)
        return _tensors(said, path)
    except DamagedError as error:
        raise UserError(f"{path} is damaged ({error}); use another checkpoint") from error


def _tensors(said: Manifest, path: Path) -> dict[str, np.ndarray]:
    """All of them, checked against their description before any is used."""
    tensors = files.read_tensors(path / TENSORS, said.file)
    if (rows := said.rows) is not None:
        prefix = f"{rows.prefix}."
        ring = {name.removeprefix(prefix): t for name, t in said.tensors.items() if name.startswith(prefix)}
        filled = sum(segment.rows for segment in rows.segments)
        if not ring or any(not t.shape or t.shape[0] < filled for t in ring.values()):
            raise DamagedError(f"{FACTS}: {filled} rows in tensors that have fewer")
        # Slots that were never filled are zeros, which are not in any file.
        arrays = {name: _zeros(tensor) for name, tensor in ring.items()}
        segments.get(path.parent / segments.FOLDER, rows.segments, arrays)
        tensors |= {prefix + name: array for name, array in arrays.items()}
    for name in said.tensors.keys() | tensors.keys():
        if name not in said.tensors or name not in tensors:
            raise DamagedError(f"{name} is described and not there, or there and not described")
        array, described = tensors[name], said.tensors[name]
        if described.key_impl is None and (array.shape, str(array.dtype)) != (
            described.shape,
            described.dtype,
        ):
            raise DamagedError(f"{name} is {array.dtype} {list(array.shape)}, described otherwise")
    return tensors


def _zeros(tensor: Tensor) -> np.ndarray:
    if tensor.dtype not in files.DTYPES:
        raise DamagedError(f"{FACTS}: {tensor.dtype} is not the dtype of any tensor")
    try:
        return np.zeros(tensor.shape, tensor.dtype)
    except (ValueError, MemoryError) as error:
        raise DamagedError(f"{FACTS}: {error}") from error


def _fill(template: PyTree, said: Manifest, path: Path) -> PyTree:
    """The template's tree with the saved leaves; names, shapes and dtypes are compared before any is read."""
    wanted, saved = named_leaves(template), said.tensors
    for name in [*wanted, *(name for name in saved if name not in wanted)]:
        asked = f"{wanted[name].dtype} {list(wanted[name].shape)}" if name in wanted else "nothing"
        found = f"{saved[name].dtype} {list(saved[name].shape)}" if name in saved else "nothing"
        if asked != found:
            raise UserError(
                f"{path} is of another configuration: {name} is {found} there, but {asked} was asked for"
            )
    _check_memory(wanted.values(), path)
    tensors, leaves = _tensors(said, path), []
    for name, leaf in wanted.items():
        array = tensors.pop(name)
        try:
            if is_key(leaf):
                restored = jax.random.wrap_key_data(jnp.array(array), impl=saved[name].key_impl)
            else:
                # A copy: JAX on the CPU may otherwise share, and with donation overwrite, NumPy's memory.
                restored = array if isinstance(leaf, np.ndarray) else jnp.array(array)
        except (ValueError, TypeError) as error:
            raise DamagedError(f"{name}: {error}") from error
        if restored.shape != leaf.shape or restored.dtype != leaf.dtype:
            raise DamagedError(f"{name} is {restored.dtype} {list(restored.shape)}, described otherwise")
        leaves.append(restored)
    return jax.tree.unflatten(jax.tree.structure(template), leaves)


def _check_memory(leaves: Iterable[Any], path: Path) -> None:
    """A ring may be described as larger than its files: refused before anything is allocated."""
    needed = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)
    names = os.sysconf_names if hasattr(os, "sysconf_names") else {}
    if "SC_PHYS_PAGES" not in names:
        return
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > there:
        raise UserError(
            f"{path} takes {needed / 1e9:.1f} GB of memory, and this machine has {there / 1e9:.1f} GB"
        )


def forget_after(folder: Path, step: int) -> None:
    """Discard the checkpoints of a future that the run goes back on."""
    for path in manifest.checkpoints(folder):
        if manifest.step_of(path) > step:
            _discard(path)


def _prune(newest: Path) -> None:
    """Keep the newest two and the best, of those that are not later."""
    folder, found = newest.parent, manifest.checkpoints(newest.parent)
    whole = [
        p
        for p in found
        if not p.name.startswith(REPLACED) and manifest.step_of(p) <= manifest.step_of(newest)
    ]
    kept = {*whole[-KEPT:], manifest.best(whole)}
    for path in [*(path for path in found if path not in kept), *folder.glob(f"{WRITING}*")]:
        _discard(path)
    try:
        records = [manifest.read(path) for path in manifest.checkpoints(folder)]
    except (DamagedError, UserError):
        return  # what it shares is not known: nothing is dropped before it is
    named = [segment for record in records if record.rows for segment in record.rows.segments]
    segments.sweep(folder / segments.FOLDER, named)


def _discard(path: Path) -> None:
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)
