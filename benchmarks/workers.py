"""The asking side: starts workers, sizes chunks, and takes turns between what is compared."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import machine

HERE = Path(__file__).parent
LOGS = HERE / "logs"
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
SLOWEST_ANSWER_S = 900

Ask = Callable[[int], dict[str, Any]]  # so many units of work -> the answer


class WorkerFailed(Exception):
    """A worker that could not do what it was asked, and why."""


class Worker:
    """A process of its own on so many cores, kept until `close`."""

    def __init__(self, script: str, *, cores: int, python: Path | str = sys.executable, label: str = ""):
        LOGS.mkdir(exist_ok=True)
        self._log = LOGS / f"{label or Path(script).stem}-{cores}.log"
        environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "PYTHONWARNINGS": "ignore",
            "CUDA_VISIBLE_DEVICES": "",
        }
        environment |= dict.fromkeys(THREAD_VARIABLES, str(cores))
        if python != sys.executable:
            environment.pop("PYTHONPATH", None)  # ours is not theirs
        with self._log.open("w") as log, machine.pinned(cores):
            self._process = subprocess.Popen(
                [str(python), str(HERE / script)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment,
            )

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        """The answer; WorkerFailed if there is none in time, or it is a complaint."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        limit = threading.Timer(SLOWEST_ANSWER_S, self._process.kill)
        limit.start()
        try:
            self._process.stdin.write(json.dumps({"do": do, **request}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except OSError:
            line = ""
        finally:
            limit.cancel()
        if not line:
            said = self._log.read_text().strip().splitlines() or ["nothing"]
            raise WorkerFailed(f"ended or took over {SLOWEST_ANSWER_S} s; its last words: {said[-1][:200]}")
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerFailed(answer["error"])
        return answer

    def close(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with suppress(BrokenPipeError):  # what a worker that is gone was still to be told
                pipe.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def sized(ask: Ask, seconds: float, *, first: int, multiple: int = 1) -> int:
    """How many units of work make a chunk of about so many seconds. Asked twice: the first one compiles."""
    ask(first)
    count = first
    while (taken := ask(count)["seconds"]) < seconds / 5:
        count *= 4
    return max(round(count * seconds / taken / multiple), 1) * multiple


def take_turns(
    asks: Mapping[str, Ask], *, rounds: int, seconds: float, first: int, multiple: int = 1
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, str]]:
    """A B A B ..., so that all see the same machine: samples of each, and why others gave none.

    Every second round goes backwards: what slowly gets faster or slower favours nobody.
    """
    samples: dict[str, list[dict[str, Any]]] = {}
    failed: dict[str, str] = {}
    counts: dict[str, int] = {}
    for name, ask in asks.items():
        try:
            counts[name] = sized(ask, seconds, first=first, multiple=multiple)
            samples[name] = []
        except WorkerFailed as error:
            failed[name] = str(error)
    for turn in range(rounds):
        for name in list(counts)[:: -1 if turn % 2 else 1]:
            try:
                samples[name].append(asks[name](counts[name]))
            except WorkerFailed as error:
                failed[name] = str(error)
                del counts[name], samples[name]
    return samples, failed
