"""list and doctor: what there is to use."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

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


def _plain(value: Any) -> Any:
    """Mappings, whatever their kind, as dictionaries, for JSON."""
    return {k: _plain(v) for k, v in value.items()} if hasattr(value, "items") else value
