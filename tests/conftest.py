"""Strictness for every test: no silent broadcasting or casting, no random key used twice."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax

# The suite's time is compiling; the older emitters of fused loops do it in a quarter less. XLA aborts at a
# flag that it does not know, and flags come and go: only where it was tried. Child processes inherit it.
if jax.__version_info__ < (0, 11):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_use_fusion_emitters=false"

import optax.tree
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_debug_key_reuse", True)
jax.config.update("jax_disable_most_optimizations", True)  # small programs: compiling them is what takes time

# optax raises a float to its integer step count, which strict promotion forbids even in other people's code.
_bias_correction = optax.tree.bias_correction


def _with_standard_promotion(*args: Any) -> Any:
    with jax.numpy_dtype_promotion("standard"):
        return _bias_correction(*args)


optax.tree.bias_correction = _with_standard_promotion


@pytest.fixture(autouse=True, scope="module")
def compiled_code_is_let_go() -> Iterator[None]:
    """Else a process keeps some thousands of programs, more than Linux lets it map, and is aborted."""
    yield
    jax.clear_caches()
