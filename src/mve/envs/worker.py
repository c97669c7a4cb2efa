"""An environment in a process of its own, which may crash or hang without taking the run with it.

A fresh interpreter (never a fork, and the user's script is not run again in it) makes the environment from
its id and arguments. Requests and answers are MessagePack over a socket: arrays, numbers, text and truth
values pass, objects and code do not. The process ends with the run, however that ends.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import weakref
from dataclasses import asdict
from functools import partial
from typing import Any, final

import gymnasium as gym
import msgspec
import numpy as np

from mve.envs.base import EnvConfig, Snapshot
from mve.envs.host import make
from mve.envs.stepped import Fault, Here, Step, Stepped
from mve.types import UserError

START_TIMEOUT = 120.0  # seconds for an interpreter, its imports and the making of the environment
PARENT_CHECK_S = 5.0
LENGTH = struct.Struct("<Q")
FAULT, MISTAKE = "fault", "mistake"  # answers other than what was asked for


class Packed(msgspec.Struct, array_like=True):
    """An array in a message."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes

    @classmethod
    def of(cls, array: Any) -> Packed:
        array = np.asarray(array, order="C")
        return cls(array.dtype.str, array.shape, array.tobytes())

    @staticmethod
    def array(sent: Any) -> np.ndarray:
        """What was packed, from a message that was read; in memory of its own."""
        dtype, shape, data = sent
        return np.frombuffer(data, dtype).reshape(shape).copy()


def stepped(config: EnvConfig, env: gym.Env, obs_size: int) -> Stepped:
    """What steps an environment, which is `env` but for one that is to be in a process of its own."""
    if config.is_apart:
        return Worker(config, obs_size)
    return Here(env, obs_size, partial(make, config) if config.id else None)


@final
class Worker:
    """The environment of that id, in another process, which is begun when it is needed."""

    def __init__(self, config: EnvConfig, obs_size: int):
        if os.name == "nt":
            raise UserError("env.own_process and env.timeout are not there on Windows")
        self._config, self._obs_size = config, obs_size
        self._stage = "none"  # then begun, made, failed

    def _begin(self) -> None:
        ours, theirs = socket.socketpair()
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            "JAX_PLATFORMS": "cpu",  # the accelerator and its memory are the run's
        }
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env=environment,
                start_new_session=True,  # Ctrl-C is the run's to answer
            )
        self._socket, self._stage = ours, "begun"
        self._end = weakref.finalize(self, _end, self._process, ours)
        self._send("make", [asdict(self._config), self._obs_size])
        self._answer(START_TIMEOUT)
        self._stage = "made"

    def reset(self, seed: int) -> np.ndarray:
        if self._stage == "failed":
            self.close()
        return Packed.array(self._ask("reset", seed))

    def step(self, action: Any) -> Step:
        obs, *rest = self._ask("step", Packed.of(action))
        return Step(Packed.array(obs), *rest)

    def obstacle(self) -> str | None:
        return self._ask("obstacle")

    def take(self) -> Snapshot | None:
        if (taken := self._ask("take")) is None:
            return None
        arrays, facts = taken
        return Snapshot({name: Packed.array(sent) for name, sent in arrays.items()}, facts)

    def restore(self, snapshot: Snapshot) -> None:
        arrays = {name: Packed.of(array) for name, array in snapshot.arrays.items()}
        self._ask("restore", [arrays, snapshot.facts])

    def close(self) -> None:
        if self._stage != "none":
            self._end()
        self._stage = "none"

    def _ask(self, what: str, about: Any = None) -> Any:
        if self._stage == "none":
            self._begin()
        self._send(what, about)
        return self._answer(self._config.timeout)

    def _send(self, what: str, about: Any) -> None:
        try:
            _send(self._socket, [what, about])
        except OSError:
            raise self._fault(self._how_it_died()) from None

    def _answer(self, timeout: float | None) -> Any:
        self._socket.settimeout(timeout)
        try:
            received = _receive(self._socket)
        except TimeoutError:
            raise self._fault(f"it gave no answer within {timeout:g} s (env.timeout)") from None
        except OSError:
            received = None
        if received is None:
            raise self._fault(self._how_it_died())
        kind, answer = received
        if kind == FAULT:
            self._stage = "failed"  # it can be asked again, but a fresh one is safer
            raise Fault(answer)
        if kind == MISTAKE:
            raise UserError(answer)
        return answer

    def _fault(self, what: str) -> Fault:
        self._end()
        self._stage = "failed"
        return Fault(what)

    def _how_it_died(self) -> str:
        try:
            code = self._process.wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            return "its process does not answer any more"
        if code < 0:
            return f"its process was killed by signal {-code} ({signal.Signals(-code).name})"
        return f"its process ended with exit code {code}"


def _end(process: subprocess.Popen[bytes], connection: socket.socket) -> None:
    connection.close()
    process.kill()
    process.wait()


def _send(connection: socket.socket, message: list[Any]) -> None:
    body = msgspec.msgpack.encode(message)
    connection.sendall(LENGTH.pack(len(body)) + body)


def _receive(connection: socket.socket) -> Any:
    """The next message; None once the other side is gone."""
    if (head := _read(connection, LENGTH.size)) is None:
        return None
    body = _read(connection, LENGTH.unpack(head)[0])
    return None if body is None else msgspec.msgpack.decode(body)


def _read(connection: socket.socket, count: int) -> bytes | None:
    parts = bytearray()
    while len(parts) < count:
        if not (part := connection.recv(min(count - len(parts), 1 << 20))):
            return None
        parts += part
    return bytes(parts)


# In the other process


class Served:
    """The environment behind the socket."""

    def make(self, config: Any, obs_size: int) -> None:
        built = msgspec.convert(config, EnvConfig)
        self._env = Here(make(built), obs_size)

    def answer(self, what: str, about: Any) -> Any:
        """What the run asked for, in what a message can hold."""
        match what:
            case "make":
                return self.make(*about)
            case "reset":
                return Packed.of(self._env.reset(about))
            case "step":
                # [()]: the number of a discrete action is a scalar again.
                obs, *rest = self._env.step(Packed.array(about)[()])
                return [Packed.of(obs), *rest]
            case "obstacle":
                return self._env.obstacle()
            case "take":
                taken = self._env.take()
                return taken and [{n: Packed.of(x) for n, x in taken.arrays.items()}, taken.facts]
            case "restore":
                arrays, facts = about
                return self._env.restore(Snapshot({n: Packed.array(x) for n, x in arrays.items()}, facts))
        raise ValueError(f"{what} is no request")


def serve(connection: socket.socket) -> None:
    """Answer until the run is gone."""
    served = Served()
    while (request := _receive(connection)) is not None:
        try:
            answer = ["answer", served.answer(*request)]
        except Fault as fault:
            answer = [FAULT, str(fault)]
        except UserError as error:
            # Of the making it is a fault too: the run has made one itself, so it may work again.
            answer = [FAULT if request[0] == "make" else MISTAKE, str(error)]
        _send(connection, answer)


def _leave_with(parent: int) -> None:
    """An environment that hangs never sees that the run is gone."""
    while os.getppid() == parent:
        time.sleep(PARENT_CHECK_S)
    os._exit(1)


def _main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # sent to all of a job's processes; the run decides
    threading.Thread(target=_leave_with, args=(os.getppid(),), daemon=True).start()
    with contextlib.suppress(ImportError):
        import mujoco

        native: Any = mujoco  # its C functions are not in the type stubs
        native.set_mju_user_warning(lambda message: None)  # or it writes a file where the user stands
    with contextlib.suppress(OSError), socket.socket(fileno=int(sys.argv[1])) as connection:
        serve(connection)


if __name__ == "__main__":
    _main()
