"""Signals that ask a run to stop: it finishes what is in hand and saves; a second one leaves at once."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import NoReturn

# Those that this platform has.
ASKING = [number for name in ("SIGINT", "SIGTERM", "SIGHUP") if (number := getattr(signal, name, None))]

AT_ONCE_S = 1.0  # that a second Ctrl-C is waited for, where Python is deep in compiled code


class Interrupt:
    """Which signal asked, if one did."""

    def __init__(self) -> None:
        self._by: int | None = None

    @property
    def asked(self) -> bool:
        """Whether what is in hand is to be the last: a block of real steps, or a piece of learning."""
        return self._by is not None

    @contextmanager
    def watched(self) -> Iterator[None]:
        """While this lasts; signals reach the main thread only."""
        with ExitStack() as restored:
            if threading.current_thread() is threading.main_thread():
                for number in ASKING:
                    previous = signal.getsignal(number)
                    if number != signal.SIGINT and previous == signal.SIG_IGN:
                        continue  # nohup: the terminal may go, the run stays
                    restored.callback(signal.signal, number, previous or signal.SIG_DFL)
                    signal.signal(number, self._ask)
            yield

    def _ask(self, number: int, frame: FrameType | None) -> None:
        del frame
        first, self._by = not self.asked, number
        if not first:
            self.leave()

    def leave(self) -> NoReturn:
        """KeyboardInterrupt after Ctrl-C, SystemExit(128 + n) after signal n (143 for SIGTERM)."""
        if self._by is None or self._by == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + self._by)


def _is_watched() -> bool:
    """Whether a Ctrl-C only asks, as while a run trains."""
    return isinstance(getattr(signal.getsignal(signal.SIGINT), "__self__", None), Interrupt)


def leave_at_second_ctrl_c() -> None:
    """Answer the first Ctrl-C, and end the process AT_ONCE_S after the second if it has not ended by itself.

    A handler of signals has to wait until Python is back from compiled code, which may take minutes where a
    run begins to learn, and for ever where an environment hangs; a thread of its own need not.
    """
    reading, writing = socket.socketpair()
    writing.setblocking(False)
    signal.set_wakeup_fd(writing.fileno(), warn_on_full_buffer=False)

    def wait() -> None:
        pressed = 0
        with reading, writing:
            while pressed < 2:
                if reading.recv(1) != bytes([signal.SIGINT]):
                    continue
                pressed += 1
                if pressed == 1 and _is_watched():
                    os.write(2, b"\nstopping once what is in hand is saved; Ctrl-C again leaves at once\n")
            time.sleep(AT_ONCE_S)
            if sys.stderr.isatty():
                os.write(2, b"\x1b[?25h\n")  # the cursor, which the progress display had hidden
            os._exit(128 + signal.SIGINT)

    threading.Thread(target=wait, daemon=True).start()
