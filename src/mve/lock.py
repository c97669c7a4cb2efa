"""One process at a time writes a run folder.

The lock is the kernel's (flock) on RUN/.lock, and goes with the process however that ends; the file says who
holds it, and is removed on release. Reading needs none. Where there is no flock (Windows, some network file
systems) nothing is locked.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mve.types import UserError

try:
    import fcntl
except ImportError:
    fcntl = None

LOCK = ".lock"


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """While this lasts nobody else writes there; the folder is made. UserError if somebody does already."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = _locked(folder)
    except OSError as error:
        raise UserError(f"cannot write the run folder {folder}: {error.strerror}") from error
    try:
        yield
    finally:
        if handle is not None:
            # Removed before it is released: whoever opened it before then sees that it is gone.
            with contextlib.suppress(OSError):
                (folder / LOCK).unlink()
            os.close(handle)


def _locked(folder: Path) -> int | None:
    path = folder / LOCK
    while fcntl is not None:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | getattr(os, "O_NOFOLLOW", 0), 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(handle)
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise UserError(f"{folder} is being written by {_holder(path)}; stop that first") from None
            return None
        if _is(path, handle):
            facts = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%F %T")}
            with contextlib.suppress(OSError):  # a full disk: the lock is held all the same
                os.truncate(handle, 0)
                os.write(handle, json.dumps(facts).encode() + b"\n")
            return handle
        os.close(handle)  # it was released, and removed, in between
    return None


def _is(path: Path, handle: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(handle))
    except FileNotFoundError:
        return False


def _holder(path: Path) -> str:
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        who = f"process {int(facts['pid'])} on {facts['host']}, since {facts['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
    return f"this process, since {facts['since']}" if facts["pid"] == os.getpid() else who
