"""Who takes the real steps: the host, in Gymnasium's environments, or the device, in native ones.

Both give the loop a block at a time, of every run. On the host the policy may act one block behind
(`train.overlap`). On the device acting and learning have one processor to share, so that nothing is gained
by a lag, and there is none: block k+1 is always collected with the policy of state k+1. The host still asks
for what comes next before the device is done, and waits only for numbers that it records.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol, TypeAlias, final, runtime_checkable

import jax
import numpy as np

from mve.config import Config
from mve.envs import device
from mve.envs.base import Episode
from mve.envs.device import Collected
from mve.envs.device_env import DeviceEnv
from mve.envs.host import BrokenOffError
from mve.evaluate import LONGEST_EPISODE, Evaluation
from mve.policies import Policy
from mve.program import Alone, Together
from mve.run import Run
from mve.state import Progress, TrainState
from mve.types import FaultError, SpoiltError, Transition

Program: TypeAlias = Alone | Together


class Taken(NamedTuple):
    """Real steps of every run, up to where an environment failed."""

    block: Transition  # as the program learns it, padded to a whole one
    steps: int  # rows of it that are real
    fault: FaultError | None = None


@runtime_checkable
class Collector(Protocol):
    """The real steps of every run of a loop."""

    # Those that collect the next block, where they are not the state's own.
    explorers: list[Policy | None]

    def before_learning(self, state: TrainState, step: int) -> None:
        """The state is about to learn, and be donated: the last chance for what acts one block behind."""
        ...

    def collect(self, state: TrainState, step: int, count: int) -> Taken:
        """The block of every run that starts at `step`."""
        ...

    def settle(self) -> None:
        """Bring the runs up to date: their environments, and the episodes that have ended."""
        ...

    def evaluate(self, state: TrainState, step: int) -> list[Evaluation]:
        """Of every run's deterministic policy."""
        ...


def collector_for(runs: Sequence[Run], program: Program, progress: Sequence[Progress]) -> Collector:
    """The one that suits the runs' environments."""
    devices = [run.device for run in runs if run.device is not None]
    if len(devices) == len(runs):
        return OnDevice(runs, devices, program)
    return OnHost(runs, program, [each.explorer for each in progress])


@final
class OnHost:
    """Runs take their steps one after the other, by policies with NumPy leaves."""

    def __init__(self, runs: Sequence[Run], program: Program, explorers: list[Policy | None]):
        self.runs, self.program, self.explorers = runs, program, explorers
        self.overlaps = runs[0].config.train.overlap

    def before_learning(self, state: TrainState, step: int) -> None:
        """With overlap the next block is for the policy of the state before: fetched now. That waits until
        the device is done with the block before."""
        if self.overlaps:
            self.explorers = self._fetched(state, step)

    def _fetched(self, state: TrainState, step: int) -> list[Policy | None]:
        """The state's policies for the block that starts here; None where actions are random."""
        if not self.runs[0].explores(step):
            return [None for _ in self.runs]
        return [*self.program.explorers(state, step)]

    def collect(self, state: TrainState, step: int, count: int) -> Taken:
        explorers = self.explorers
        if not self.overlaps or explorers[0] is None:
            explorers = self._fetched(state, step)
        blocks: list[Transition] = []
        fault: FaultError | None = None
        for run, policy in zip(self.runs, explorers, strict=True):
            try:
                blocks.append(run.collect(policy, step, count))
            except BrokenOffError as broken:
                blocks.append(broken.block)
                fault, count = broken, run.env.num_steps - step
        if fault is not None:
            both = zip(self.runs, blocks, strict=True)
            blocks = [_cut(run, block, step, count) for run, block in both]
        return Taken(self.program.gathered(blocks), count, fault)

    def settle(self) -> None:
        """They always are."""

    def evaluate(self, state: TrainState, step: int) -> list[Evaluation]:
        policies = self.program.policies(state)
        return [run.evaluate(policy, step) for run, policy in zip(self.runs, policies, strict=True)]


def _cut(run: Run, block: Transition, before: int, count: int) -> Transition:
    """The rows up to another seed's fault, so that all stand at the same step; then a new episode."""
    if run.env.num_steps > before + count:
        run.env.lose(before + count)
    return jax.tree.map(lambda x: np.concatenate([x[:count], np.zeros_like(x[count:])]), block)


@final
class OnDevice:
    """All runs' steps in one call, that is not waited for; what ended in it is read a block later."""

    def __init__(self, runs: Sequence[Run], envs: Sequence[DeviceEnv], program: Program):
        self.runs, self.envs, self.program = runs, envs, program
        self.explorers: list[Policy | None] = [None for _ in runs]
        self.config: Config = runs[0].config
        self.env = envs[0].env  # the others are the same
        self.running = program.stacked([env.running for env in envs])
        self.keys = program.stacked([env.key for env in envs])
        self._unread: tuple[int, int, Collected] | None = None

    def before_learning(self, state: TrainState, step: int) -> None:
        """Nothing acts behind."""

    def collect(self, state: TrainState, step: int, count: int) -> Taken:
        policy = self.program.exploration(state, step)
        shared = np.int32(step), np.int32(count), np.bool_(not self.runs[0].explores(step))
        self._read()
        self.running, collected = self.program.call(
            device.collect, (self.env,), shared, policy, self.running, self.keys
        )
        self._unread = step, count, collected
        return Taken(collected.block, count)

    def _read(self) -> None:
        """Note the episodes that ended in the last block, once; waits until it is collected."""
        if self._unread is None:
            return
        (step, count, collected), self._unread = self._unread, None
        block, *ended = collected
        facts = jax.device_get((*ended, block.reward, block.next_obs))
        parts = self.program.each(facts)
        for run, (over, length, ret, sound, reward, obs) in zip(self.runs, parts, strict=True):
            if not sound[:count].all():
                where = step + 1 + int(np.argmin(sound[:count]))
                raise SpoiltError(
                    f"{run.spec.name}: the observation or reward of step {where} is not finite; the run ends "
                    "at its last checkpoint"
                )
            run.watch.see(reward[:count], obs[:count])
            run.recent.extend(Episode(float(ret[i]), int(length[i])) for i in np.flatnonzero(over))

    def settle(self) -> None:
        self._read()
        for env, running in zip(self.envs, self.program.split(self.running), strict=True):
            env.running = running

    def evaluate(self, state: TrainState, step: int) -> list[Evaluation]:
        static = self.env, self.config.evaluate.episodes
        shared = np.int32(step), np.int32(self.env.limit or LONGEST_EPISODE)
        played = self.program.call(device.play, static, shared, self.program.deterministic(state), self.keys)
        found = [Evaluation(*part) for part in self.program.each(played.on_host())]
        for run, evaluation in zip(self.runs, found, strict=True):
            if not np.isfinite(evaluation.returns).all():
                raise FaultError(
                    f"{run.spec.name}: the evaluation at step {step} met a reward that is not finite"
                )
        return found
