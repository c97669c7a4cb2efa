"""Reading the command line: tyro does it, and its boxed complaints become one line."""

from __future__ import annotations

import contextlib
import difflib
import io
import re
from collections.abc import Mapping
from typing import Annotated, Any

import tyro
from tyro.conf import DisallowNone, FlagCreatePairsOff, subcommand

from mve.messages import one_line


class UsageError(Exception):
    """The command line itself cannot be read."""


def parse(commands: Mapping[str, type], description: str, argv: list[str]) -> Any:
    """The command asked for, or None once help was printed. tyro's boxed complaints become one line."""
    if argv and not argv[0].startswith("-") and argv[0] not in commands:
        near = difflib.get_close_matches(argv[0], commands, n=1)
        hint = f"did you mean `mve {near[0]}`?" if near else f"there are {', '.join(commands)}"
        raise UsageError(f"unknown command '{argv[0]}'; {hint}")
    union: Any = None
    for name, kind in commands.items():
        entry = Annotated[kind, subcommand(name=name, prefix_name=False)]
        union = entry if union is None else union | entry
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(
                union,
                prog="mve",
                description=description,
                args=argv or ["--help"],
                config=(FlagCreatePairsOff, DisallowNone),
            )
    except SystemExit as stopped:
        if not stopped.code:
            return None
        raise UsageError(_complaint(complaint.getvalue(), argv[0])) from None


def _complaint(boxed: str, command: str) -> str:
    """The first section of tyro's box, without box and title, and the flag it would have suggested.

    Where stdout is not UTF-8 the box has no sides and its rules are hyphens.
    """
    sections: list[list[str]] = [[]]
    for line in boxed.strip().splitlines()[1:]:
        text = line.strip().strip("│").strip()
        if not text.strip("─-╰╯"):
            sections.append([])
        else:
            sections[-1].append(text)
    sections = [section for section in sections if section] or [["cannot read the command line"]]
    text = one_line(" ".join(sections[0])).removeprefix("Error parsing ")
    text = re.sub(r"invalid literal for int\(\) with base 10: (.*)", r"\1 is not a whole number", text)
    text = re.sub(
        r"no type matching INT could be instantiated from \[(.*)\]", r"\1 is not a whole number", text
    )
    if text.startswith("Missing from"):
        text = f"{command} needs " + re.sub(r"^Missing from [^:]*: (\S+).*", r"\1", text)
    near = next((section[1] for section in sections if section[0].startswith("Perhaps you meant")), "")
    hint = f"; did you mean {near.split()[0].rstrip(',')}?" if near.startswith("--") else ""
    return f"{text[:1].lower()}{text[1:].rstrip('.')}{hint}; see `mve {command} --help`"
