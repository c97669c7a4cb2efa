"""mve train | eval | resume | plot | compare | diagnose | check | list | settings | doctor.

Only tyro and rich are imported here: JAX and the rest wait until a command needs them, so that help and
mistakes in the command line are answered at once.
"""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mve.commands import COMMANDS
from mve.commands.codes import BAD_INPUT, EXIT_CODES, FAILED, INTERRUPTED
from mve.interrupt import leave_at_second_ctrl_c
from mve.messages import one_line
from mve.usage import UsageError, parse

DESCRIPTION = (
    "Sample-efficient reinforcement learning by model-based value expansion. Exit codes: "
    + ", ".join(f"{code} {what.partition(':')[0].partition(';')[0]}" for code, what in EXIT_CODES.items())
    + "."
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code is one of EXIT_CODES."""
    if argv is None:
        leave_at_second_ctrl_c()
    try:
        command = parse(COMMANDS, DESCRIPTION, list(sys.argv[1:] if argv is None else argv))
    except UsageError as error:
        print(f"mve: {error}", file=sys.stderr)
        return BAD_INPUT
    if command is None:
        return 0
    _keep_compiled_code()
    from mve.types import DivergedError, UserError

    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            code = command.run()
        sys.stdout.flush()
        return code
    except UserError as error:
        first, *diagnosis = str(error).splitlines() if isinstance(error, DivergedError) else [str(error)]
        print(f"mve: {one_line(first)}", *(f"     {line}" for line in diagnosis), sep="\n", file=sys.stderr)
        return error.exit_code
    except PermissionError as error:
        print(f"mve: {error.filename or 'a file'} may not be looked into or written to", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # The reader has gone, as in `mve list | head -1`; Python would complain again at exit.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED


def _keep_compiled_code() -> None:
    """Have JAX keep what it compiles, so that the next run of the same sizes starts at once.

    In the user's cache folder, unless JAX was told where; JAX_ENABLE_COMPILATION_CACHE=false turns it off.
    Told by environment variables, which JAX reads when it is imported: that has to wait until a command
    needs it, and where it was imported before, it is the user's own program that decides.
    """
    if "jax" in sys.modules:
        return
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(home / "mve" / "jax"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")


def _show_warning(message: Warning | str, *where: Any, **more: Any) -> None:
    print(f"mve: warning: {one_line(str(message))}", file=sys.stderr)
