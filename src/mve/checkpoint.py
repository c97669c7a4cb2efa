"""Save and restore one pytree and a few JSON facts: safetensors + JSON, nothing that can run code on load.

    folder/step_000000010000/state.safetensors    one tensor per leaf, named by its path: agent.critic.bias
    folder/step_000000010000/state.json           facts, shape and dtype of every tensor, sha256 of the above

A checkpoint is there whole or not at all, and the one before it is kept: a damaged newest is not a lost run.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from mve.types import Json, UserError

FORMAT = 1
KEPT = 2
TENSORS, FACTS = "state.safetensors", "state.json"
WRITING, REPLACED = ".writing_", ".replaced_"
NAME = re.compile(rf"({re.escape(REPLACED)})?step_(\d+)")


class DamagedError(Exception):
    """This checkpoint cannot be trusted; an older one may."""


def save(folder: Path, state: PyTree, facts: Json) -> Path:
    """Write `folder/step_N` with N = facts["num_env_steps"], then drop all but the newest two.

    Files and directories reach the disk before the rename that makes them visible: whenever the power
    fails, what is named `step_*` is whole. Facts have to be finite numbers, text, lists and mappings.
    """
    final = folder / f"step_{int(facts['num_env_steps']):012d}"
    writing, replaced = folder / f"{WRITING}{final.name}", folder / f"{REPLACED}{final.name}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _discard(writing)
        writing.mkdir()
        _write(writing, state, facts)
        if final.exists():  # saved twice at the same step; a directory cannot be renamed over another
            _discard(replaced)
            final.rename(replaced)
        writing.rename(final)
        _sync(folder)
    except OSError as error:
        _discard(writing)
        raise UserError(f"cannot write a checkpoint to {folder}: {error.strerror or error}") from error
    _prune(folder)
    return final


def restore(folder: Path, template_of: Callable[[Json], PyTree]) -> tuple[PyTree, Json]:
    """State and facts of the newest sound checkpoint in `folder`.

    `template_of` its facts gives structure, shapes and dtypes; leaves are `jax.ShapeDtypeStruct`, or NumPy
    arrays for what is to come back as such. A damaged checkpoint is passed over with a warning. Raises
    UserError if none is left, or if the state saved is not the state asked for.
    """
    for path in reversed(_checkpoints(folder)):
        try:
            described = _described(path)
            with _sound_tensors(path, described) as tensors:
                template = _template(template_of, described["facts"])
                return _fill(template, described, tensors, path), described["facts"]
        except DamagedError as error:
            warnings.warn(f"{path} is damaged ({error}); trying the one before it", stacklevel=2)
    raise UserError(f"no usable checkpoint in {folder}; train first, or give the folder of a finished run")


def _template(template_of: Callable[[Json], PyTree], facts: Json) -> PyTree:
    try:
        return template_of(facts)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise DamagedError(f"{FACTS}: {type(error).__name__}: {error}") from error


def latest(folder: Path) -> Path | None:
    """The newest checkpoint, sound or not; None if there is none."""
    found = _checkpoints(folder)
    return found[-1] if found else None


def read_facts(path: Path) -> Json:
    """The facts of one checkpoint, without its tensors."""
    try:
        return _described(path)["facts"]
    except DamagedError as error:
        raise UserError(f"{path} is damaged ({error}); use another checkpoint") from error


def load_tensors(path: Path) -> dict[str, np.ndarray]:
    """Every tensor of one checkpoint by name, keys as their key data: for reading a part of the state."""
    try:
        with _sound_tensors(path, _described(path)) as tensors:
            return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
    except DamagedError as error:
        raise UserError(f"{path} is damaged ({error}); use another checkpoint") from error


def _named_leaves(tree: PyTree) -> dict[str, Any]:
    """Leaves by dotted path, in the order of flattening."""
    paths, _ = jax.tree_util.tree_flatten_with_path(tree)
    named = {jax.tree_util.keystr(path, simple=True, separator=".") or "state": leaf for path, leaf in paths}
    if len(named) < len(paths):
        raise ValueError("two leaves of the state have the same dotted name")
    return named


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _write(folder: Path, state: PyTree, facts: Json) -> None:
    tensors, described = {}, {}
    for name, leaf in _named_leaves(state).items():
        if not isinstance(leaf, (jax.Array, np.ndarray)):
            raise TypeError(f"{name} is a {type(leaf).__name__}; only arrays can be saved")
        described[name] = {"shape": list(leaf.shape), "dtype": str(leaf.dtype)}
        if _is_key(leaf):
            described[name]["key_impl"] = str(jax.random.key_impl(leaf))
            leaf = jax.random.key_data(leaf)
        tensors[name] = np.asarray(leaf, order="C")
    save_file(tensors, folder / TENSORS)
    record = {"format": FORMAT, "facts": facts, "sha256": _sha256(folder / TENSORS), "tensors": described}
    (folder / FACTS).write_text(json.dumps(record, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    for path in (folder / TENSORS, folder / FACTS, folder):
        _sync(path)


def _described(path: Path) -> Json:
    """state.json, checked for what every reader relies on."""
    try:
        _refuse_link(path / FACTS)
        record = json.loads((path / FACTS).read_text(encoding="utf-8"))
        version, _, _, _ = (record[key] for key in ("format", "facts", "sha256", "tensors"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedError(f"{FACTS}: {type(error).__name__}: {error}") from error
    if version != FORMAT:
        raise UserError(
            f"{path} has checkpoint format {version}, this mve reads {FORMAT}; use the mve that wrote it"
        )
    return record


@contextmanager
def _sound_tensors(path: Path, described: Json) -> Iterator[Any]:
    """The open tensor file, its checksum verified; read leaf by leaf, so that memory holds one copy."""
    try:
        _refuse_link(path / TENSORS)
        if _sha256(path / TENSORS) != described["sha256"]:
            raise DamagedError(f"{TENSORS} does not match its checksum")
        with safe_open(path / TENSORS, framework="numpy") as tensors:
            yield tensors
    except (OSError, SafetensorError) as error:
        raise DamagedError(f"{TENSORS}: {error}") from error


def _fill(template: PyTree, described: Json, tensors: Any, path: Path) -> PyTree:
    """The template's tree with the saved leaves; names, shapes and dtypes are compared before any is read."""
    wanted, saved = _named_leaves(template), described["tensors"]
    for name in [*wanted, *(name for name in saved if name not in wanted)]:
        asked = f"{wanted[name].dtype} {list(wanted[name].shape)}" if name in wanted else "nothing"
        found = f"{saved[name]['dtype']} {saved[name]['shape']}" if name in saved else "nothing"
        if asked != found:
            raise UserError(
                f"{path} is of another configuration: {name} is {found} there, but {asked} was asked for"
            )
    leaves = []
    for name, leaf in wanted.items():
        array = tensors.get_tensor(name)
        if _is_key(leaf):
            restored = jax.random.wrap_key_data(jnp.array(array), impl=saved[name]["key_impl"])
        else:
            # A copy: JAX on the CPU may otherwise share, and with donation overwrite, NumPy's memory.
            restored = array if isinstance(leaf, np.ndarray) else jnp.array(array)
        if restored.shape != leaf.shape or restored.dtype != leaf.dtype:
            raise DamagedError(f"{name} is {restored.dtype} {list(restored.shape)}, described otherwise")
        leaves.append(restored)
    return jax.tree.unflatten(jax.tree.structure(template), leaves)


def _checkpoints(folder: Path) -> list[Path]:
    """Oldest first. Replaced ones count, before their successors: a crash between renames loses nothing."""
    if not folder.is_dir():
        return []
    found = [(match, path) for path in folder.iterdir() if (match := NAME.fullmatch(path.name))]
    found = [(match, path) for match, path in found if path.is_dir() and not path.is_symlink()]
    return [path for _, path in sorted(found, key=lambda pair: (int(pair[0][2]), pair[0][1] is None))]


def _prune(folder: Path) -> None:
    found = _checkpoints(folder)
    whole = [path for path in found if not path.name.startswith(REPLACED)]
    spare = [path for path in found if path not in whole[-KEPT:]]
    for path in [*spare, *folder.glob(f"{WRITING}*")]:
        _discard(path)


def _discard(path: Path) -> None:
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def _refuse_link(path: Path) -> None:
    if path.is_symlink() or path.parent.is_symlink():
        raise DamagedError(f"{path.name} is a link out of the folder")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
