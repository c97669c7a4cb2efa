"""The speed benchmarks: `python benchmarks/speed.py`, or `--quick` to see that everything runs.

Writes one JSON with every raw sample, and prints its tables. `--document` writes the tables of a finished
JSON into docs/performance.md instead. See that page for what is measured, and how.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path

import machine
import own_parts
import pages
import whole_runs
from against_peers import peers_section
from measure import Effort, Json
from workers import WorkerFailed

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "performance.md"

SECTIONS: dict[str, Callable[[Effort], Json]] = {
    "machine": own_parts.machine_section,
    "peers": peers_section,
    "expansion": own_parts.expansion_section,
    "seeds": own_parts.seeds_section,
    "roofline": own_parts.roofline_section,
    "mbpo": whole_runs.mbpo_section,
    "startup": whole_runs.startup_section,
    "paper": whole_runs.paper_section,
}


def main(argv: list[str] | None = None) -> int:
    options = _options(argv)
    path = options.out / ("speed-quick.json" if options.quick else "speed.json")
    if options.document:
        return _document(path)
    if importlib.util.find_spec("mve") is None:
        print(f"speed: {sys.executable} has no mve: pip install -e .", file=sys.stderr)
        return 2
    effort = Effort.of(options.quick)
    results = json.loads(path.read_text()) if path.exists() else {"sections": {}}
    for name in options.only or SECTIONS:
        print(f"{name} ...", file=sys.stderr, flush=True)
        section = _measured(name, effort)
        results["sections"][name] = section
        _write(path, results)
        print(pages.section_text(name, section), flush=True)
    print(f"all samples: {path}", file=sys.stderr)
    return any("failed" in results["sections"][name] for name in options.only or SECTIONS)


def _options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a smoke run: every part, numbers worth nothing")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=SECTIONS,
        metavar="NAME",
        help=f"these sections, the others' numbers are kept: {', '.join(SECTIONS)}",
    )
    parser.add_argument(
        "--out", type=Path, default=ROOT / "results", metavar="DIR", help="folder of the JSON (results)"
    )
    parser.add_argument(
        "--document", action="store_true", help="write the JSON's tables into docs/performance.md"
    )
    options = parser.parse_args(argv)
    if options.document and options.quick:
        parser.error("--document: a quick run's numbers are worth nothing and do not go into the document")
    return options


def _measured(name: str, effort: Effort) -> Json:
    """A section with when, how and on what it was taken. One that fails does not take the others with it."""
    facts = {
        "taken": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "command": shlex.join(sys.argv[1:]),
        "effort": {**vars(effort), "cores": list(effort.cores)},
        "machine": machine.facts(),
    }
    start = time.perf_counter()
    try:
        section = SECTIONS[name](effort)
    except (WorkerFailed, OSError) as error:
        section = {"failed": str(error)}
    return facts | section | {"took_seconds": time.perf_counter() - start, "load_after": machine.load()}


def _write(path: Path, results: Json) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(results, indent=1, default=str)
    path.write_text(text + "\n")


def _document(path: Path) -> int:
    if not path.exists():
        print(f"speed: there is no {path}; measure first: python benchmarks/speed.py", file=sys.stderr)
        return 2
    figures = pages.as_text(json.loads(path.read_text()))
    DOCUMENT.write_text(pages.put_figures(DOCUMENT.read_text(), figures))
    print(DOCUMENT)
    return 0


if __name__ == "__main__":
    sys.exit(main())
