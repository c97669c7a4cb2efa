"""The loop: real steps and learning in turn, for one run or for several side by side.

State k has learned from blocks 0 .. k-1 of real steps. One iteration, where `train.overlap` is set:

    fetch     the exploration policy of state k; waits until the device has made it
    learn     ask the device for state k+1, from block k; not waited for
    act       collect block k+1 with the policy of state k, while the device works
    read      what learning from block k-1 said

so that the lag is one block, whatever takes how long: results do not depend on timing. Evaluations and
checkpoints are of the state that has learned from every step so far, and the lag stays what it is across
them: the policy of state k is fetched before block k is learned from, and goes into the checkpoint. Without
overlap, block k+1 is collected with the policy of state k+1, as in the algorithms' published listings; so
it is always where the environment is on the device too (`collect.py`).

Where thousands of updates follow a block, as where learning begins, they are asked for in pieces, all but the
last of which are waited for. A signal between two of them ends the run there: what is saved then has learned
from a part of its last block, and says how far it was.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from mve import folders, log, schedule, train
from mve.checkpoint.segments import Shelf
from mve.checkpoint.writer import Writer
from mve.collect import collector_for
from mve.display import Display
from mve.interrupt import Interrupt
from mve.program import Alone, Together
from mve.run import Run
from mve.state import Progress, Unfinished
from mve.train import Due
from mve.types import FaultError, Metrics, Transition

LONG_WORK = 500  # minibatches and updates at once of which the person who waits is told


class Collected(NamedTuple):
    """A block of real steps of every run, not learned from to the end yet."""

    block: Transition
    before: int  # step at which it starts
    step: int  # and ends
    done: int = 0  # of the updates that follow it; above 0 it is in the replay

    @property
    def unfinished(self) -> Unfinished | None:
        """What a checkpoint says of it."""
        return Unfinished(self.before, self.done) if self.done else None


class After(NamedTuple):
    """What comes after a block of real steps."""

    looks: bool  # at the deterministic policy
    saves: bool
    waits: bool  # until the block is learned from, before the next is collected


class Learning(NamedTuple):
    """What was asked of the device last; `metrics` may not be there yet."""

    metrics: Metrics
    due: Due
    step: int


class Loop:
    """Runs whose configurations differ in the seed only, and their training state."""

    def __init__(self, runs: Sequence[Run], progress: Sequence[Progress]):
        self.runs = list(runs)
        self.config = runs[0].config
        recipe = runs[0].recipe  # the others' are the same but for copies of the environment's functions
        self.program = Alone(recipe) if len(self.runs) == 1 else Together(recipe, len(self.runs))
        self.state = self.program.joined([each.state for each in progress])
        self.step = int(self.state.num_env_steps)
        self.collector = collector_for(self.runs, self.program, progress)
        self._collected = self._left_over(progress[0].unfinished)
        self._learning: Learning | None = None
        self._fault: FaultError | None = None
        self._traces: int | None = None
        self._said = False
        self.writer = Writer()  # to be left, as a `with` block, once the loop has gone as far as it should
        self._shelves = [Shelf() for _ in self.runs]

    def progress(self) -> list[Progress]:
        """Where each run stands."""
        unfinished = self._collected and self._collected.unfinished
        return [
            Progress(self.program.part(self.state, i), explorer, unfinished)
            for i, explorer in enumerate(self.collector.explorers)
        ]

    def _left_over(self, unfinished: Unfinished | None) -> Collected | None:
        """The block that learning goes on from; its rows are in the replay, and nobody reads them again."""
        if unfinished is None:
            return None
        rows, count = self.state.replay.rows, self.config.train.block_steps
        seeds = rows.reward.shape[:-1]  # an axis, or none
        block: Transition = jax.tree.map(
            lambda x: np.zeros((*seeds, count, *x.shape[len(seeds) + 1 :]), x.dtype), rows
        )
        return Collected(block, unfinished.before, self.step, unfinished.done)

    def go_on(
        self, total: int, records: Sequence[log.RunLog], display: Display, interrupt: Interrupt
    ) -> None:
        """Up to so many environment steps, or until a signal; ends with an evaluation and a checkpoint,
        after a signal with the latter.

        After a fault of an environment it ends with a checkpoint and raises FaultError. Raises DivergedError
        without one: the checkpoint before is the last good one.
        """
        interval = self.config.evaluate.interval_steps
        started, before_start = time.perf_counter(), [run.seconds for run in self.runs]
        stopping = False
        display.progress(self.step, self._shown())  # learning may go on from the middle, before any step
        while (self.step < total or self._collected is not None) and not stopping:
            before = self._act(total, display, interrupt)
            looks, saves, waits = self._after(before, total)
            saves = saves or interrupt.asked or self._fault is not None
            if waits or saves:
                self._learn(display, interrupt)
                self._read()
            is_broken_off = waits and self._collected is not None  # and looks when it has gone on
            evaluates = looks and self._fault is None and not is_broken_off
            for run, seconds in zip(self.runs, before_start, strict=True):
                run.seconds = seconds + time.perf_counter() - started
            tells = schedule.crosses(before, self.step, max(interval // 5, 1)) and not is_broken_off
            tells = tells or evaluates
            if tells or saves:
                self.collector.settle()
            display.progress(self.step, self._shown())
            judged = self._evaluated(records, display) if evaluates else [{} for _ in self.runs]
            if tells:
                for run, record, result in zip(self.runs, records, judged, strict=True):
                    record.record(self.step, run.line(self.step) | result)
            self._tell(records, display)
            self.writer.poll()
            stopping = interrupt.asked or self._fault is not None
            if saves or stopping:
                self._save_what_is_sound(display, interrupt)
        if self._fault is not None:
            raise self._fault

    def _act(self, total: int, display: Display, interrupt: Interrupt) -> int:
        """Learn from the block in hand, and collect the next; the step at which that starts.

        Learning that was broken off before the run was to be judged or saved leads there first.
        """
        if (held := self._collected) and held.done and self._after(held.before, total).waits:
            return held.before
        before = self.step
        self._learn(display, interrupt)
        if self._collected is None:
            self._collect(min(self.config.train.block_steps, total - before))
        return before

    def _after(self, before: int, total: int) -> After:
        """The block that starts at `before` and ends here."""
        train, is_last = self.config.train, self.step == total
        looks = is_last or schedule.crosses(before, self.step, self.config.evaluate.interval_steps)
        saves = is_last or schedule.crosses(before, self.step, train.checkpoint_interval)
        return After(looks, saves, waits=looks or saves or not train.overlap)

    def _evaluated(self, records: Sequence[log.RunLog], display: Display) -> list[dict[str, float]]:
        try:
            return self.evaluate(records, display)
        except FaultError as fault:
            self._fault = fault
            return [{} for _ in self.runs]

    def _tell(self, records: Sequence[log.RunLog], display: Display) -> None:
        """What was begun anew, to the person who waits and to the record."""
        for run, record in zip(self.runs, records, strict=True):
            for text in run.restarts.said():
                display.say(text)
                record.event(text)

    def _save_what_is_sound(self, display: Display, interrupt: Interrupt) -> None:
        """A checkpoint, unless what would be in it is beyond repair."""
        self._learn(display, interrupt)
        self._read()
        self.collector.settle()
        for run, is_finite in zip(self.runs, self.program.are_finite(self.state), strict=True):
            if not is_finite:
                raise run.diverged(
                    "a network's weight or its optimiser is not finite", self.step
                ) from self._fault
        if self._fault is None:
            self._give_up_episodes(display)
        self.save()

    def _learn(self, display: Display, interrupt: Interrupt) -> None:
        """Ask the device to learn from what was collected, if that is not done; the last piece is not waited
        for. A signal breaks it off after a piece.

        Where the collector fetches a policy first, that waits until the device is done with the block before,
        so that reading is free.
        """
        if (held := self._collected) is None:
            return
        due = self._due(held.before, held.step)
        if not held.done:
            self.collector.before_learning(self.state, held.step)
            self._read()
            self._announce(due, display)
        while not (held.done and interrupt.asked):
            piece = due.piece(held.done)
            self.state, metrics = self.program.learn(self.state, held.block, piece)
            self._learning = Learning(metrics, piece, held.step)
            self._check_traces()
            held = held._replace(done=held.done + int(piece.updates))
            self._collected = held if held.done < due.updates else None
            if self._collected is None:
                return
            self._read()
            display.learning(held.done, int(due.updates))

    def _announce(self, due: Due, display: Display) -> None:
        """To the person who waits: why nothing seems to happen."""
        if due.updates > due.updated == 0 and due.fits + due.updates > LONG_WORK:
            fits = f"{due.fits:,} minibatches for the model and " if due.fits else ""
            display.say(
                f"learning begins: {fits}{due.updates:,} updates of the agent before the next step, which "
                "can take minutes"
            )

    def _check_traces(self) -> None:
        """Compiling again costs a minute here and there, which nobody would notice otherwise."""
        traces = train.traces[self.program.recipe]
        if self._traces not in (None, traces):
            warnings.warn(
                f"learning was compiled again at step {self.step}: a defect of mve",
                RuntimeWarning,
                stacklevel=2,
            )
        self._traces = traces

    def _collect(self, count: int) -> None:
        before = self.step
        taken = self.collector.collect(self.state, before, count)
        self._fault = taken.fault
        self.step += taken.steps
        self._collected = Collected(taken.block, before, self.step) if taken.steps else None

    def _due(self, before: int, step: int) -> Due:
        """What a block of real steps is followed by."""
        config, fits_model = self.config, self.runs[0].recipe.fits_model
        return Due.of(
            rows=step - before,
            fits=schedule.fits_due(config, step) - schedule.fits_due(config, before) if fits_model else 0,
            refits=schedule.refits_due(config, step) - schedule.refits_due(config, before)
            if fits_model
            else 0,
            rounds=schedule.rounds_due(config, step) - schedule.rounds_due(config, before),
            updates=schedule.updates_due(config, step) - schedule.updates_due(config, before),
            updated=schedule.updates_due(config, before),
        )

    def _read(self) -> None:
        """Take note of what was learned last, once; nothing before the first update."""
        learning, self._learning = self._learning, None
        if learning is None or learning.due.updates == 0:
            return
        due = learning.due
        updates = int(due.updated + due.done + due.updates)
        for run, numbers in zip(self.runs, self.program.numbers(learning.metrics), strict=True):
            run.note(numbers, learning.step, fits=int(due.fits), updates=updates)

    def _shown(self) -> dict[str, float | str]:
        """Means over the runs, of what every one of them knows."""
        name, count = self.runs[0].spec.name, len(self.runs)
        fields: dict[str, float | str] = {"env": name if count == 1 else f"{name}, {count} seeds"}
        if all(run.recent for run in self.runs):
            fields["return"] = float(np.mean([run.recent[-1].ret for run in self.runs]))
        if all("model/mse_k1" in run.metrics for run in self.runs):
            fields["model error"] = float(np.mean([run.metrics["model/mse_k1"] for run in self.runs]))
        return fields

    def evaluate(self, records: Sequence[log.RunLog], display: Display) -> list[dict[str, float]]:
        """Try and record every run's deterministic policy; shown are one's episodes, or every seed's mean."""
        judged, shown = [], []
        results = self.collector.evaluate(self.state, self.step)
        for run, result, record in zip(self.runs, results, records, strict=True):
            record.evaluation(self.step, result.returns.tolist(), result.lengths.tolist())
            run.judged = {
                "mean_reward": float(result.returns.mean()),
                "std_reward": float(result.returns.std()),
                "mean_ep_length": float(np.mean(result.lengths)),
            }
            judged.append({f"eval/{name}": value for name, value in run.judged.items()})
            run.judged["step"] = self.step
            shown.append(result.returns)
        display.evaluation(self.step, shown[0] if len(shown) == 1 else [returns.mean() for returns in shown])
        return judged

    def _give_up_episodes(self, display: Display) -> None:
        """Those whose state cannot be saved: a run that stops here and one that does not then agree."""
        reasons = [run.keep_what_can_be_kept() for run in self.runs]
        if reasons[0] and not self._said:
            every = f"train.checkpoint_interval = {self.config.train.checkpoint_interval} steps"
            display.say(f"episodes are begun anew after every checkpoint ({every}): {reasons[0]}")
            self._said = True

    def save(self) -> None:
        """A checkpoint of every run: copied here, and written while training goes on."""
        self.writer.wait()
        frozen, unfinished = {}, self._collected and self._collected.unfinished
        for i, (run, shelf) in enumerate(zip(self.runs, self._shelves, strict=True)):
            rest, explorer = self.program.rest(self.state, i), self.collector.explorers[i]
            progress = Progress(rest, explorer, unfinished)
            frozen[folders.checkpoints(run.folder)] = run.freeze(
                progress, self.program.ring(self.state, i), shelf
            )
        self.writer.start(frozen)
