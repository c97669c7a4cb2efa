"""What a process can say of the machine and of itself. Standard library only: peers' workers import it."""

from __future__ import annotations

import os
import platform
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

BLAS = ("OPENBLAS", "OMP_", "MKL_")
TASKS, PRESSURE = Path("/proc/self/task"), Path("/proc/pressure/cpu")


@dataclass(frozen=True)
class Usage:
    """Seconds of this process so far: by the clock, on a core, and ready to run but waiting for one."""

    seconds: float
    cpu_seconds: float
    wait_seconds: float

    @classmethod
    def now(cls) -> Usage:
        return cls(time.perf_counter(), time.process_time(), _waited())

    def since(self, earlier: Usage) -> dict[str, float]:
        return {
            "seconds": self.seconds - earlier.seconds,
            "cpu_seconds": self.cpu_seconds - earlier.cpu_seconds,
            # Threads that ended in between take their waiting with them.
            "wait_seconds": max(self.wait_seconds - earlier.wait_seconds, 0.0),
        }


def _waited() -> float:
    """Linux's count of the time that the threads alive now have spent in a run queue; 0 elsewhere."""
    total = 0
    for task in TASKS.iterdir() if TASKS.is_dir() else ():
        try:
            total += int((task / "schedstat").read_text().split()[1])
        except (OSError, IndexError):
            continue  # the thread has ended meanwhile, or the kernel keeps no such count
    return total / 1e9


def peak_rss_mb() -> float:
    """The largest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)


def available_cores() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


@contextmanager
def pinned(cores: int) -> Iterator[None]:
    """Processes that are started within find the last so many cores only (Linux)."""
    before = available_cores()
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    os.sched_setaffinity(0, before[-cores:])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def facts() -> dict[str, object]:
    """CPU, memory, system, and how busy the machine is now."""
    return {
        "cpu": _cpu_model(),
        "cores": len(available_cores()),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "blas_environment": {k: v for k, v in os.environ.items() if k.startswith(BLAS)},
    } | load()


def load() -> dict[str, object]:
    """How many processes want a core, and the share of the last minute in which some had to wait (Linux)."""
    waiting = PRESSURE.read_text().split()[2].partition("=")[2] if PRESSURE.exists() else None
    return {
        "load_average_1min": round(os.getloadavg()[0], 2),
        "someone_waited_percent_1min": float(waiting) if waiting else None,
    }


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        fields = dict(
            (part.strip() for part in line.split(":", 1))
            for line in info.read_text().split("\n\n")[0].splitlines()
            if ":" in line
        )
        wide = [flag for flag in ("avx2", "avx512f", "amx_tile") if flag in fields.get("flags", "").split()]
        name = fields.get("model name", platform.machine())
        return f"{name} (family {fields.get('cpu family', '?')}; {', '.join(wide) or 'no AVX2'})"
    return platform.processor() or platform.machine()
