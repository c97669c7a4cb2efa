"""The commands: a dataclass each, whose fields are its arguments and whose `run` gives the exit code.

given      what several are given: a run's folder, settings, the user's own functions
codes      exit codes
training   train, resume
judging    eval, plot, compare, diagnose, check
showing    list, settings, doctor
"""

from mve.commands.judging import Check, Compare, Diagnose, Eval, Plot
from mve.commands.showing import Doctor, List, Settings
from mve.commands.training import Resume, Train

COMMANDS = {
    kind.__name__.lower(): kind
    for kind in (Train, Eval, Resume, Plot, Compare, Diagnose, Check, List, Settings, Doctor)
}

__all__ = ["COMMANDS"]
