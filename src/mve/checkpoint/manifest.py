"""What a checkpoint says of itself, in state.json, and which checkpoints a folder holds."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import msgspec

from mve import files
from mve.checkpoint.segments import Segment
from mve.files import DamagedError, Written
from mve.messages import what_failed
from mve.types import Count, Json, UserError

FORMAT = 2
TENSORS, FACTS = "state.safetensors", "state.json"
REPLACED = ".replaced_"
NAME = re.compile(rf"({re.escape(REPLACED)})?step_(\d{{1,18}})")


@dataclass(frozen=True)
class Tensor:
    """What state.json says of one tensor."""

    shape: tuple[Count, ...]
    dtype: str
    key_impl: str | None = None


@dataclass(frozen=True)
class Rows:
    """Which tensors, those named `prefix`.something, are in segments, and what these are."""

    prefix: str
    segments: list[Segment]


@dataclass(frozen=True)
class Manifest:
    """state.json."""

    format: int
    facts: Json
    tensors: dict[str, Tensor]
    file: Written
    rows: Rows | None = None


def text(manifest: Manifest) -> str:
    """state.json, with a checksum of all that it says."""
    said = asdict(manifest)
    return json.dumps(said | {"sha256": _digest(said)}, indent=1, allow_nan=False) + "\n"


def _digest(said: Json) -> str:
    """However it is laid out."""
    text = json.dumps(said, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def read(path: Path) -> Manifest:
    """state.json, checked: it says what was written, and of the folder that it is in."""
    try:
        if path.is_symlink():
            raise DamagedError(f"{path.name} is a link out of the folder")
        said = files.parse(files.read(path / FACTS, files.LARGEST_JSON))
        version, digest = said["format"], said.pop("sha256")
        if type(version) is not int:
            raise ValueError(f"format {version!r}")
        if version == 1:
            said = _from_format_1(said, digest, path)
        elif digest != _digest(said):
            raise DamagedError(f"{FACTS} does not match its checksum")
        elif version != FORMAT:
            raise UserError(
                f"{path} has checkpoint format {version}, this mve reads {FORMAT}; use the mve that wrote it"
            )
        manifest = msgspec.convert(said, Manifest)
    except OSError as error:
        raise DamagedError(f"{FACTS}: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, msgspec.MsgspecError) as error:
        raise DamagedError(f"{FACTS}: {what_failed(error)}") from error
    if type(step := manifest.facts.get("num_env_steps")) is not int or step != step_of(path):
        raise DamagedError(f"{FACTS} is of step {step}")
    return manifest


def _from_format_1(said: Json, digest: str, path: Path) -> Json:
    """As format 2 would have it: the checksum was of the tensors alone, which were all in one file."""
    if set(said) != {"format", "facts", "tensors"}:
        raise DamagedError(f"{FACTS} does not match its checksum")
    return said | {"file": {"sha256": digest, "bytes": (path / TENSORS).lstat().st_size}}


def checkpoints(folder: Path) -> list[Path]:
    """Oldest first. Replaced ones count, before their successors: a crash between renames loses nothing."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if NAME.fullmatch(path.name)]
    found = [path for path in found if path.is_dir() and not path.is_symlink()]
    return sorted(found, key=lambda path: (step_of(path), not path.name.startswith(REPLACED)))


def step_of(path: Path) -> int:
    return int(path.name.rpartition("_")[2])


def best(found: Iterable[Path]) -> Path | None:
    """Of those that were evaluated where they stand; the newest of equals."""
    scores = {path: score for path in found if (score := _score(path)) is not None}
    return max(scores, key=lambda path: (scores[path], step_of(path)), default=None)


def _score(path: Path) -> float | None:
    """Mean return of its evaluation, None where there is none."""
    try:
        return float(read(path).facts["evaluation"]["mean_reward"])
    except (DamagedError, UserError, KeyError, TypeError, ValueError):
        return None
