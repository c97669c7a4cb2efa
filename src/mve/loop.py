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
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mve import folders, log, schedule, train
from mve.checkpoint.segments import Shelf
from mve.checkpoint.writer import Writer
from mve.collect import collector_for
from mve.display import Display
from mve.interrupt import Interrupt
from mve.program import Alone, Together
from mve.run import Run
from mve.state import Progress
from mve.train import Due
from mve.types import FaultError, Metrics, Transition

LONG_WORK = 500  # minibatches and updates at once of which the person who waits is told


class Collected(NamedTuple):
    """A block of real steps of every run, not learned from yet."""

    block: Transition
    before: int  # step at which it starts
    step: int  # and ends


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
        self._collected: Collected | None = None
        self._learning: Learning | None = None
        self._fault: FaultError | None = None
        self._traces: int | None = None
        self._said = False
        self.writer = Writer()  # to be left, as a `with` block, once the loop has gone as far as it should
        self._shelves = [Shelf() for _ in self.runs]

    def progress(self) -> list[Progress]:
        """Where each run stands."""
        return [
            Progress(self.program.part(self.state, i), explorer)
            for i, explorer in enumerate(self.collector.explorers)
        ]

    def go_on(
        self, total: int, records: Sequence[log.RunLog], display: Display, interrupt: Interrupt
    ) -> None:
        """Up to so many environment steps, or until a signal; ends with an evaluation and a checkpoint.

        After a fault of an environment it ends with a checkpoint and raises FaultError. Raises DivergedError
        without one: the checkpoint before is the last good one.
        """
        settings, interval = self.config.train, self.config.evaluate.interval_steps
        started, before_start = time.perf_counter(), [run.seconds for run in self.runs]
        stopping = False
        while self.step < total and not stopping:
            before = self.step
            self._learn(display)
            self._collect(min(settings.block_steps, total - before))
            looks = schedule.crosses(before, self.step, interval) or self.step == total
            evaluates = looks and self._fault is None
            saves = schedule.crosses(before, self.step, settings.checkpoint_interval) or self.step == total
            saves = saves or interrupt.asked or self._fault is not None
            if evaluates or saves or not settings.overlap:
                self._learn(display)
                self._read()
            for run, seconds in zip(self.runs, before_start, strict=True):
                run.seconds = seconds + time.perf_counter() - started
            tells = evaluates or schedule.crosses(before, self.step, max(interval // 5, 1))
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
                self._save_what_is_sound(display)
        if self._fault is not None:
            raise self._fault

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

    def _save_what_is_sound(self, display: Display) -> None:
        """A checkpoint, unless what would be in it is beyond repair."""
        self._learn(display)
        self._read()
        self.collector.settle()
        for run, is_finite in zip(self.runs, self.program.are_finite(self.state), strict=True):
            if not is_finite:
                raise run.diverged("a network's weight or its optimiser is not finite", self.step)
        if self._fault is None:
            self._give_up_episodes(display)
        self.save()

    def _learn(self, display: Display) -> None:
        """Ask the device to learn from what was collected, if that is not done; it is not waited for.

        Where the collector fetches a policy first, that waits until the device is done with the block before,
        so that reading is free.
        """
        if self._collected is None:
            return
        block, before, step = self._collected
        self.collector.before_learning(self.state, step)
        self._read()
        due = self._due(before, step)
        if due.updates > due.updated == 0 and due.fits + due.updates > LONG_WORK:
            fits = f"{due.fits:,} minibatches for the model and " if due.fits else ""
            display.say(
                f"learning begins: {fits}{due.updates:,} updates of the agent before the next step, which "
                "can take minutes"
            )
        self.state, metrics = self.program.learn(self.state, block, due)
        self._collected, self._learning = None, Learning(metrics, due, step)
        self._check_traces()

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
        for run, numbers in zip(self.runs, self.program.numbers(learning.metrics), strict=True):
            run.note(numbers, learning.step, int(learning.due.fits))

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
        frozen = {}
        for i, (run, shelf) in enumerate(zip(self.runs, self._shelves, strict=True)):
            progress = Progress(self.program.rest(self.state, i), self.collector.explorers[i])
            frozen[folders.checkpoints(run.folder)] = run.freeze(
                progress, self.program.ring(self.state, i), shelf
            )
        self.writer.start(frozen)
