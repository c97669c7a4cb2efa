"""Whether a run fits into memory and onto the disk, asked before it starts."""

from __future__ import annotations

import contextlib
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, pairwise
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from mve.dynamics.ensemble import TERMINATION_HIDDEN
from mve.run import Run
from mve.types import Transition, UserError

CHECKPOINTS = 4  # on the disk at most: the newest two, the best, and the one being written
TIGHT = 0.8  # share of what is free beyond which there is a warning
FLOAT = 4  # bytes of a number, integers too
ACTIVATIONS = (
    4  # arrays of a layer's size that are alive at once in an update: forward, backward, two between
)
# What of the state a setting decides; the rest is networks and their optimisers.
REPLAY, IMAGINED, NETWORKS, UPDATE = "replay", "imagined rows", "networks", "an update"
SMALLER = {
    REPLAY: "replay.capacity or --steps",
    IMAGINED: "imagination.starts or imagination.rounds_kept",
    NETWORKS: "agent.hidden or dynamics.hidden",
    UPDATE: "agent.batch_size, imagination.starts, targets.horizon_steps or agent.model_steps",
}


class Needed(NamedTuple):
    """Bytes of all seeds together."""

    parts: dict[str, int]  # of memory: the first two are exact, and all but the last are in a checkpoint
    saved: int

    @property
    def memory(self) -> int:
        return sum(self.parts.values())

    @property
    def disk(self) -> int:
        """Rows of the replay are shared by checkpoints, but for the best one, which may be old."""
        return 2 * self.parts[REPLAY] + CHECKPOINTS * (self.saved - self.parts[REPLAY])


def needed(run: Run, seeds: int = 1) -> Needed:
    """What the run will take beside the program itself: arithmetic, nothing is traced or allocated."""
    capacity = run.capacity()
    row = FLOAT * (2 * run.spec.obs_size + run.spec.action_size + len(Transition._fields) - 3)
    kept = {
        REPLAY: capacity.replay * row,
        IMAGINED: capacity.imagined * row if run.config.imagination.starts else 0,
        NETWORKS: _network_bytes(run),
    }
    parts = kept | {UPDATE: _update_bytes(run)}
    return Needed({name: seeds * size for name, size in parts.items()}, seeds * sum(kept.values()))


def _network_bytes(run: Run) -> int:
    """Weights, slow copies and Adam's two moments, as if every agent had all of them."""
    agent, model, recipe = run.config.agent, run.config.dynamics, run.recipe
    pair, obs = run.spec.obs_size + run.spec.action_size, run.spec.obs_size
    weights = 4 * agent.critics * _weights(pair, agent.hidden, 1)
    weights += 4 * _weights(obs, agent.hidden, 2 * run.spec.action_size)
    if recipe.fits_model:
        weights += 3 * model.members * _weights(pair, model.hidden, 2 * (obs + 1))
        if recipe.known.termination is None:
            weights += 3 * _weights(pair + obs, TERMINATION_HIDDEN, 1)
    return FLOAT * weights


def _weights(inputs: int, hidden: Sequence[int], outputs: int) -> int:
    return sum((fan_in + 1) * fan_out for fan_in, fan_out in pairwise((inputs, *hidden, outputs)))


def _update_bytes(run: Run) -> int:
    """Rough: the activations of every imagined row, in the networks that see it, and a round of rollouts.

    What XLA really takes is known only once it has compiled, which is what this is to come before.
    """
    agent, model, recipe = run.config.agent, run.config.dynamics, run.recipe
    widths = agent.critics * sum(agent.hidden)
    if recipe.uses_model:
        widths += model.members * sum(model.hidden)
    steps = 1 + max(recipe.targets.imagined_steps, agent.model_steps)
    rows = agent.batch_size * steps * recipe.kept_members + recipe.imagination.starts
    return FLOAT * ACTIVATIONS * rows * widths


def check(run: Run, folder: Path, seeds: int = 1, held: int = 0) -> str:
    """One line: what is needed and what is free. UserError if it cannot fit, a warning if it hardly does.

    Free is also what the run has already: `held` bytes of memory, and its checkpoints in the folder, which
    the next ones take the place of.
    """
    wants = needed(run, seeds)
    host, device, disk = free_host_bytes(), free_device_bytes(), free_disk_bytes(folder)
    host, device = (free if free is None else free + held for free in (host, device))
    disk = disk if disk is None else disk + _saved_bytes(folder)
    largest = max(wants.parts, key=lambda name: wants.parts[name])
    smaller = f"lower {SMALLER[largest]}" + (", or train fewer seeds at once" if seeds > 1 else "")
    told = []
    for what, size, free, advice in (
        ("device memory", wants.memory, device, smaller),
        # Beside an accelerator the host holds what is about to be saved.
        ("memory", wants.memory if device is None else wants.saved, host, smaller),
        ("disk", wants.disk, disk, f"{smaller}, or give another --run-dir"),
    ):
        if free is None:
            continue
        # The disk may do with one checkpoint: a save that finds no room leaves the one before.
        least = wants.saved if what == "disk" else size
        share = f"{what}: {_size(size)} of {_size(free)} free"
        if least > free:
            raise UserError(f"{run.spec.name} does not fit: {share}; {advice} ({_parts(wants)})")
        if size > TIGHT * free:
            warnings.warn(f"{share}; {advice} ({_parts(wants)})", RuntimeWarning, stacklevel=2)
        told.append(share)
    return "; ".join(told)


def _saved_bytes(folder: Path) -> int:
    """What the checkpoints of a run, or of the seeds in a folder, take; what several share once."""
    places = chain.from_iterable(folder.glob(f"{run}checkpoints/**/*") for run in ("", "seed-*/"))
    sizes: dict[tuple[int, int], int] = {}
    with contextlib.suppress(OSError):  # a run that is being trained renames and removes them meanwhile
        for path in places:
            if path.is_file():
                facts = path.stat()
                sizes[facts.st_dev, facts.st_ino] = facts.st_size
    return sum(sizes.values())


def _parts(wants: Needed) -> str:
    return ", ".join(f"{name} {_size(size)}" for name, size in wants.parts.items() if size)


def _size(count: int) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count / 1e3:.3g} kB"


def free_device_bytes() -> int | None:
    """Of all accelerators together; None where the device is the host."""
    devices = jax.local_devices()
    stats = [device.memory_stats() for device in devices if device.platform != "cpu"]
    known = [s["bytes_limit"] - s["bytes_in_use"] for s in stats if s and "bytes_limit" in s]
    return int(np.sum(known)) if known else None


def free_host_bytes() -> int | None:
    """What this process may still take, by the machine and by its control group; None where neither tells."""
    found = [
        size for read in (_meminfo, _control_group, _control_group_1) if (size := _tried(read)) is not None
    ]
    return min(found) if found else _tried(lambda: os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


def _tried(read: Callable[[], int]) -> int | None:
    with contextlib.suppress(OSError, ValueError, KeyError, AttributeError):
        return read()
    return None


def _meminfo() -> int:
    return int(dict(_lines("/proc/meminfo", ":"))["MemAvailable"].split()[0]) * 1024


def _control_group(root: str = "/sys/fs/cgroup") -> int:
    """Of version 2. What is cached of files can be had back."""
    stat = dict(_lines(f"{root}/memory.stat"))
    used = int(Path(f"{root}/memory.current").read_text()) - int(stat["inactive_file"])
    return int(Path(f"{root}/memory.max").read_text()) - used  # "max" where there is no limit: no number


def _control_group_1(root: str = "/sys/fs/cgroup/memory") -> int:
    stat = dict(_lines(f"{root}/memory.stat"))
    used = int(Path(f"{root}/memory.usage_in_bytes").read_text()) - int(stat["total_inactive_file"])
    return int(Path(f"{root}/memory.limit_in_bytes").read_text()) - used


def _lines(path: str, separator: str = " ") -> Iterator[tuple[str, str]]:
    for line in Path(path).read_text().splitlines():
        name, _, rest = line.partition(separator)
        yield name, rest


def free_disk_bytes(folder: Path) -> int | None:
    """Where the folder is, or is to be."""
    place = next((path for path in (folder, *folder.absolute().parents) if path.exists()), Path())
    return _tried(lambda: shutil.disk_usage(place).free)
