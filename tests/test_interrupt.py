"""Signals: the block in hand is finished and saved, the exit code says which it was, a second one leaves."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from test_lock import SAC, Slide

from mve import Learner
from mve.cli import EXIT_CODES
from mve.interrupt import Interrupt
from mve.types import DivergedError, FaultError, UserError


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_the_first_signal_asks_and_the_second_leaves(name: str) -> None:
    number, interrupt = getattr(signal, name), Interrupt()
    kind, code = (KeyboardInterrupt, ()) if name == "SIGINT" else (SystemExit, (128 + number,))
    inherited = signal.signal(number, signal.default_int_handler)  # nohup's may be to ignore it
    try:
        with interrupt.watched():
            signal.raise_signal(number)
            assert interrupt.asked
            with pytest.raises(kind) as caught:
                signal.raise_signal(number)
        assert caught.value.args == code
        assert signal.getsignal(number) is signal.default_int_handler
    finally:
        signal.signal(number, inherited)


def test_a_terminal_that_goes_does_not_stop_what_nohup_started() -> None:
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        interrupt = Interrupt()
        with interrupt.watched():
            signal.raise_signal(signal.SIGHUP)
        assert not interrupt.asked
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, previous)


class Signalled(Slide):
    """Sends this process a signal at its 70th step."""

    number = signal.SIGTERM

    def step(self, action: object) -> object:  # pyright: ignore[reportIncompatibleMethodOverride]
        self.taken = getattr(self, "taken", 0) + 1
        if self.taken == 70:
            signal.raise_signal(self.number)
        return super().step(action)  # pyright: ignore[reportArgumentType]


def test_sigterm_finishes_the_block_saves_and_exits_from_python_too(tmp_path: Path) -> None:
    run = Learner(Signalled(), "sac", run_dir=tmp_path / "run", settings=SAC, quiet=True, eval_env=Slide())
    with pytest.raises(SystemExit) as caught:
        run.learn(220)
    assert caught.value.code == 143
    assert run.num_timesteps == 80
    loaded = Learner.load(tmp_path / "run", Signalled(), quiet=True)
    assert loaded.num_timesteps == 80
    assert sorted(path.name for path in run.folder.iterdir())[0] == "checkpoints"  # and no lock is left


def test_every_exit_code_is_in_the_table() -> None:
    assert {error.exit_code for error in (UserError, DivergedError, FaultError)} == {2, 3, 4}
    assert {0, 1, 2, 3, 4, 128 + signal.SIGHUP, 128 + signal.SIGINT, 128 + signal.SIGTERM} == set(EXIT_CODES)


def test_ctrl_c_is_answered_and_a_second_leaves_even_where_python_does_not_come_back() -> None:
    script = (
        "import hashlib, signal; from mve.interrupt import Interrupt, leave_at_second_ctrl_c\n"
        "leave_at_second_ctrl_c()\n"
        "with Interrupt().watched():\n"
        "    print('deep', flush=True)\n"
        "    hashlib.pbkdf2_hmac('sha256', b'', b'', 2**31 - 1)"  # minutes of compiled code
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", script], env=environment, **pipes) as deep:
        assert deep.stdout is not None
        assert deep.stderr is not None
        deep.stdout.readline()
        deep.send_signal(signal.SIGINT)
        assert deep.stderr.readline() == "\n"  # below the live line
        assert "Ctrl-C again leaves at once" in deep.stderr.readline()
        deep.send_signal(signal.SIGINT)
        assert deep.wait(timeout=30) == 130
