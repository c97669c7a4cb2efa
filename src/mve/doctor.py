"""What `mve doctor` looks at: versions, devices, drawing, MuJoCo, memory and disk."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from mve.messages import no_device, what_failed

# Five programs at once compiled in one minute in place of over three (docs/performance.md, "On a GPU").
COMPILES_SOON = "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"
SMALLEST_MEMORY_GB, SMALLEST_DISK_GB = 2.0, 1.0


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's report; status is ok, warn or fail."""

    check: str
    status: str
    detail: str


def _check_versions() -> Iterator[Finding]:
    from mve.log import versions

    found = versions()
    yield Finding("mve", "ok" if found["mve"] else "warn", found["mve"] or "not installed: pip install -e .")
    for name in ("python", "platform", "numpy", "jax", "equinox", "optax", "gymnasium", "mujoco"):
        yield Finding(
            name, "ok" if found[name] else "fail", found[name] or f"not installed: pip install {name}"
        )
    kinds = ", ".join(f"{device['platform']} ({device['kind']})" for device in found["devices"])
    idle_gpu = Path("/dev/nvidia0").exists() and all(d["platform"] == "cpu" for d in found["devices"])
    hint = "; JAX does not see the NVIDIA GPU: pip install -U 'jax[cuda13]'" if idle_gpu else ""
    if any(d["platform"] == "gpu" for d in found["devices"]) and "autotune" not in os.getenv("XLA_FLAGS", ""):
        hint = f"; XLA_FLAGS='{COMPILES_SOON}' spares an NVIDIA GPU minutes of compiling"
    yield Finding("devices", "warn" if idle_gpu else "ok", f"{kinds}; {os.cpu_count()} CPU cores{hint}")
    if (dm_control := _installed("dm-control")) and int(found["mujoco"].split(".")[0]) >= 4:
        detail = f"{dm_control} does not work with mujoco {found['mujoco']}: pip install 'mujoco>=3.17,<4'"
        yield Finding("dm-control", "warn", detail)


def _installed(package: str) -> str | None:
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version(package)
    return None


def _check_jax() -> Iterator[Finding]:
    import jax
    import numpy as np

    x = np.random.default_rng(0).normal(size=(256, 256)).astype(np.float32)
    exact = x.astype(np.float64) @ x.astype(np.float64)
    error = np.abs(np.asarray(jax.jit(lambda a: a @ a)(x)) - exact).max() / np.abs(exact).max()
    settings = jax.config.values
    precision = settings["jax_default_matmul_precision"] or "default"
    status = "ok" if error < 1e-4 else "warn" if error < 1e-2 else "fail"
    yield Finding("matmul precision", status, f"{precision}: largest relative error {error:.0e}")
    cache = settings["jax_compilation_cache_dir"]
    yield Finding(
        "compilation cache", "ok", cache or "off; JAX_COMPILATION_CACHE_DIR=DIR keeps compiled code"
    )


def _check_drawing() -> Iterator[Finding]:
    from matplotlib.figure import Figure

    Figure().savefig(io.BytesIO(), format="png")
    yield Finding("matplotlib", "ok", f"{_installed('matplotlib')} draws")


def _check_mujoco() -> Iterator[Finding]:
    import gymnasium

    from mve.log import capture_mujoco_warnings

    with capture_mujoco_warnings(None):
        env = gymnasium.make("HalfCheetah-v5")
        env.reset(seed=0)
        env.step(env.action_space.sample())
        env.close()
    yield Finding("HalfCheetah-v5", "ok", "steps")


def _check_room() -> Iterator[Finding]:
    with contextlib.suppress(OSError):
        available = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
        if available:
            yield _room("free memory", int(available[1]) * 1024, SMALLEST_MEMORY_GB)
    yield _room("free disk", shutil.disk_usage(".").free, SMALLEST_DISK_GB)
    if not os.access(".", os.W_OK):
        yield Finding("this folder", "warn", f"{Path.cwd()} is not writable; use --run-dir DIR")


def _room(what: str, size: int, least_gb: float) -> Finding:
    gigabytes = size / 1e9
    detail = f"{gigabytes:.1f} GB" + (f"; {least_gb:g} GB or more is advised" if gigabytes < least_gb else "")
    return Finding(what, "warn" if gigabytes < least_gb else "ok", detail)


CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (
    *(_check_versions, _check_jax, _check_drawing),
    *(_check_mujoco, _check_room),
)


def examine() -> list[Finding]:
    """Every check, in the order in which one depends on another; one that cannot be made is a finding."""
    findings: list[Finding] = []
    for check in CHECKS:
        try:
            findings += check()
        except Exception as error:  # whatever is wrong, the doctor reports it and goes on
            detail = no_device() or what_failed(error)
            findings.append(Finding(check.__name__.removeprefix("_check_"), "fail", detail))
    return findings
