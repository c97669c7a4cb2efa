"""What several commands are given, and how it is read."""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, UseAppendAction, arg

from mve.messages import what_failed

if TYPE_CHECKING:
    from mve.checkpoint import Which
    from mve.learner import Learner

Folder = Annotated[Positional[Path], arg(metavar="RUN")]
Steps = Annotated[int | None, arg(metavar="N", help_behavior_hint="")]
FunctionPath = Annotated[str | None, arg(metavar="FILE:FUNC", help_behavior_hint="")]
Settings = Annotated[UseAppendAction[list[list[str]]], arg(name="set", metavar="section.field=value")]


@dataclass(frozen=True)
class OnRun:
    """What every command on a finished or stopped run is given."""

    run_folder: Folder
    """Folder of the run."""
    reward: FunctionPath = None
    """As it was given to train."""
    termination: FunctionPath = None
    """As it was given to train."""

    def load(self, *, quiet: bool = False, which: Which = "newest") -> Learner:
        """The run at its newest checkpoint, or at another."""
        from mve.learner import Learner

        return Learner.load(
            self.run_folder,
            reward_fn=function("reward", self.reward),
            termination_fn=function("termination", self.termination),
            quiet=quiet,
            which=which,
        )


def joined(settings: list[list[str]]) -> list[str]:
    """--set may be given several times, with several assignments each."""
    return [assignment for given in settings for assignment in given]


def at_least_one(flag: str, number: int) -> int:
    from mve.types import UserError

    if number < 1:
        raise UserError(f"{flag} {number}: it has to be 1 or more")
    return number


def spread(returns: list[float], of: str = "episode") -> str:
    import numpy as np

    count = f"{len(returns)} {of}{'s' * (len(returns) != 1)}"
    span = f"{min(returns):.1f} to {max(returns):.1f}"
    return f"{np.mean(returns):.1f} ± {np.std(returns):.1f}   ({count}, {span})"


def function(flag: str, place: str | None) -> Callable[..., Any] | None:
    """The user's own function. Their file is run from its text: nothing is cached beside it."""
    from mve.types import UserError

    if place is None:
        return None
    file, separator, name = place.rpartition(":")
    if not (file and separator and name):
        raise UserError(f"--{flag} {place}: write FILE:FUNC, such as rewards.py:{flag}")
    path = Path(file)
    if not path.is_file():
        raise UserError(f"--{flag} {place}: there is no file {path}")
    module = types.ModuleType(path.stem)
    module.__file__ = str(path)
    try:
        exec(compile(path.read_text(encoding="utf-8"), str(path), "exec"), module.__dict__)
    except Exception as error:  # whatever their file raises
        raise UserError(f"--{flag} {place}: {path} fails; {what_failed(error)}") from error
    found = getattr(module, name, None)
    if not callable(found):
        problem = "is not a function" if hasattr(module, name) else "is not there"
        raise UserError(f"--{flag} {place}: {name} {problem}")
    return found
