"""Checkpoints are written in a thread of their own, while training goes on: never more than one behind."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from mve.checkpoint import store
from mve.checkpoint.frozen import Frozen
from mve.types import UserError


class Writer:
    """Writes one set of checkpoints at a time; what training does meanwhile does not touch them.

    A save that fails, as on a full disk, is a warning, and the next one tries again: the checkpoints before
    it stand. Where the last save failed, leaving the `with` block is a UserError that says what is lost, or
    again a warning if it is left by another error.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._missing: UserError | None = None  # of the last save, already said: at the end it is an error
        self._folders: list[Path] = []

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        failed = self._joined() or self._missing
        if failed is None:
            return
        if not isinstance(failed, UserError):
            raise failed
        message = f"the last checkpoint is missing: {failed}; {self._what_stands()}"
        if error is None:
            raise UserError(message) from failed
        warnings.warn(message, stacklevel=2)

    def start(self, frozen: Mapping[Path, Frozen]) -> None:
        """Begin to write, once what was begun before is done."""
        self.wait()
        self._folders, self._missing = list(frozen), None
        # A daemon: a second Ctrl-C leaves at once, and what was begun has a name that nobody reads.
        self._thread = threading.Thread(target=self._write, args=(frozen,), name="checkpoint", daemon=True)
        self._thread.start()

    def poll(self) -> None:
        """Say it if a save has failed since this was last asked."""
        if self._thread is not None and not self._thread.is_alive():
            self.wait()

    def wait(self) -> None:
        """Until what was begun is on the disk; a warning if it cannot be."""
        failed = self._joined()
        if isinstance(failed, UserError):
            warnings.warn(
                f"{failed}; training goes on, and the next checkpoint is tried at its time; "
                f"{self._what_stands()}",
                stacklevel=2,
            )
            self._missing = failed
        elif failed is not None:
            raise failed

    def _write(self, frozen: Mapping[Path, Frozen]) -> None:
        try:
            store.write(frozen)
        except BaseException as error:
            self._error = error

    def _joined(self) -> BaseException | None:
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.join()
        error, self._error = self._error, None
        return error

    def _what_stands(self) -> str:
        """What a run that ended now could be resumed from."""
        saved = [max(store.steps(folder), default=None) for folder in self._folders]
        if None in saved:
            return "nothing of this run is saved"
        return f"what is saved is of step {min(step for step in saved if step is not None)}"
