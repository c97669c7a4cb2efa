"""list, settings and doctor: what there is to use."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Annotated, Any

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text
from tyro.conf import Positional, arg

from mve.commands.codes import FAILED


@dataclass(frozen=True)
class List:
    """Show the algorithms that --algo takes, and where each was published."""

    json: bool = False
    """Print them with all their settings as JSON."""

    def run(self) -> int:
        from mve.presets import PRESETS

        if self.json:
            presets = {name: _plain(preset._asdict()) for name, preset in PRESETS.items()}
            print(json.dumps(presets, indent=2))
            return 0
        table = Table("name", "what it is", "published", box=None, header_style="bold", padding=(0, 2, 1, 0))
        for name, preset in PRESETS.items():
            table.add_row(Text(name, "bold"), Text(preset.summary), Text(preset.paper))
        Console().print(table)
        return 0


@dataclass(frozen=True)
class Settings:
    """Show what --set takes: every setting, its value, what it may be and what it is for."""

    words: Annotated[Positional[tuple[str, ...]], arg(metavar="WORD", help_behavior_hint="")] = ()
    """Only settings in whose name or description one of these stands, such as n_step or dynamics."""
    algo: Annotated[str | None, arg(metavar="NAME", help_behavior_hint="")] = None
    """Whose values; those of mve-svg if not given."""
    env: Annotated[str | None, arg(metavar="ENV", help_behavior_hint="")] = None
    """A task, where the algorithm has values of its own for it."""
    json: bool = False
    """Print them as JSON."""

    def run(self) -> int:
        from mve.settings import about, settings

        found = about(self.words, settings(self.algo, self.env))
        if self.json:
            print(json.dumps([setting._asdict() for setting in found], indent=2))
            return 0
        console = Console(highlight=False)
        for setting in found:
            value, default = _written(setting.value), _written(setting.default)
            console.print(Text(f"{setting.name}={value}", "bold"), soft_wrap=True)
            without = "" if value == default else f"; {default} where an algorithm does not say"
            console.print(Padding(Text(f"{setting.meaning} [{setting.allowed}{without}]"), (0, 0, 1, 4)))
        return 0


@dataclass(frozen=True)
class Doctor:
    """Check this machine: versions, devices, drawing, MuJoCo, memory and disk."""

    json: bool = False
    """Print the findings as JSON."""

    def run(self) -> int:
        from mve.doctor import examine

        findings = examine()
        if self.json:
            print(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=2))
        else:
            table = Table("", "check", "finding", box=None, header_style="bold", padding=(0, 2, 0, 0))
            colours = {"ok": "green", "warn": "yellow", "fail": "bold red"}
            for finding in findings:
                status = Text(finding.status, colours[finding.status])
                table.add_row(status, finding.check, Text(finding.detail))  # not markup: jax[cuda13]
            Console().print(table)
        return FAILED if any(finding.status == "fail" for finding in findings) else 0


def _written(value: Any) -> str:
    """As --set takes it."""
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))


def _plain(value: Any) -> Any:
    """Mappings, whatever their kind, as dictionaries, for JSON."""
    return {k: _plain(v) for k, v in value.items()} if hasattr(value, "items") else value
