"""What a checkpoint costs: bytes and seconds written, and how long training is held up.

    python benchmarks/checkpoints.py [--rows 100000 1000000] [--new 1000] [--folder DIR]

HalfCheetah's sizes and mve-sac's networks, in a full ring; nothing is trained. `whole` writes every tensor
into one file, as the first format did, and training waited for all of it. By segments, `first` is the first
checkpoint of a run, `resumed` that of a process that goes on with one, `next` one after some new rows, the
median of five. `held up` is the copying to the host, `written` what the thread does afterwards.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mve import checkpoint, config, files, replay
from mve.checkpoint.frozen import Frozen, freeze
from mve.checkpoint.segments import Shelf
from mve.envs import host
from mve.program import Alone
from mve.run import Run
from mve.state import Capacity, Progress, TrainState, initial_state

REPEATS, TASK, ALGO = 5, "HalfCheetah-v5", "mve-sac"


class Cost(NamedTuple):
    """Of one save, or the medians of some."""

    held_up: float  # seconds
    written: float
    megabytes: float


class Counted:
    """Counts the bytes that are written to files."""

    def __init__(self) -> None:
        self.bytes, self._write = 0, files.write
        files.write = self

    def __call__(self, path: Path, chunks: Any) -> files.Written:
        written = self._write(path, chunks)
        self.bytes += written.bytes
        return written


def filled(run: Run, rows: int) -> TrainState:
    """A state whose ring of so many rows is full of numbers that do not repeat."""
    state = initial_state(run.recipe, Capacity(rows), 0)
    draws = np.random.default_rng(0)

    def drawn(leaf: jax.Array) -> jax.Array:
        return jnp.asarray(draws.integers(1, 2**30, leaf.shape, np.int32).view(leaf.dtype))

    ring = replay.Replay(jax.tree.map(drawn, state.replay.rows), jnp.int32(0), jnp.int32(rows))
    return replace(state, replay=ring, num_env_steps=jnp.int32(rows))


def with_more(state: TrainState, count: int) -> TrainState:
    """The same after so many more rows."""
    block = jax.tree.map(lambda ring: ring[:count] + 1, state.replay.rows)
    ring = replay.add(state.replay, block, jnp.ones(count, bool))
    return replace(state, replay=ring, num_env_steps=state.num_env_steps + count)


def cost(freeze: Callable[[], Frozen], folder: Path, counted: Counted) -> Cost:
    before, started = counted.bytes, time.perf_counter()
    frozen = freeze()
    held_up = time.perf_counter() - started
    started = time.perf_counter()
    checkpoint.write({folder: frozen})
    return Cost(held_up, time.perf_counter() - started, (counted.bytes - before) / 1e6)


def measure(run: Run, rows: int, new: int, folder: Path) -> dict[str, Cost]:
    counted, program, state = Counted(), Alone(run.recipe), jax.block_until_ready(filled(run, rows))
    facts = {"num_env_steps": rows}
    costs = {"whole": cost(lambda: freeze(state, facts), folder / f"whole-{rows}", counted)}

    def save(state: TrainState, shelf: Shelf, name: str = "segments") -> Cost:
        progress, ring = Progress(program.rest(state, 0)), program.ring(state, 0)
        return cost(lambda: run.freeze(progress, ring, shelf), folder / f"{name}-{rows}", counted)

    save(state, Shelf(), "unused")  # compiles the copying
    costs["first"] = save(state, Shelf())
    costs["resumed"] = save(state, shelf := Shelf())
    repeats = []
    for _ in range(REPEATS):
        state = jax.block_until_ready(with_more(state, new))
        repeats.append(save(state, shelf))
    costs["next"] = Cost(*(statistics.median(column) for column in zip(*repeats, strict=True)))
    files.write = counted._write
    return costs


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--new", type=int, default=1000)
    parser.add_argument("--folder", type=Path, default=None)
    given = parser.parse_args()
    built = config.build(TASK, ALGO)
    run = Run(built, host.make(built.env))
    print(f"{'rows':>9}  {'save':<7} {'held up':>9} {'written':>9} {'megabytes':>10}")
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        for rows in given.rows:
            for name, each in measure(run, rows, given.new, Path(folder)).items():
                print(
                    f"{rows:>9}  {name:<7} {each.held_up:8.3f}s {each.written:8.3f}s {each.megabytes:10.2f}"
                )


if __name__ == "__main__":
    main()
