"""The arithmetic of an update: counted by hand and by XLA, and done bare."""

from __future__ import annotations

import contextlib
import time
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import products
from mve import agents, train
from mve.learner import Learner


def _layers(net: Any) -> list[tuple[int, int]]:
    return [layer.weight.shape[-2:] for layer in net.layers]


def sizes_of(learner: Learner) -> products.Sizes:
    """What the hand count depends on; ValueError for what it does not know."""
    recipe, state = learner.recipe, learner.state
    if recipe.agent.action_layer or recipe.agent.model_steps or recipe.targets.keeps_members:
        raise ValueError("no hand count for these settings")
    sizes = products.Sizes(
        batch=recipe.agent.batch_size,
        actor=_layers(state.agent.actor.net),
        critic=_layers(state.agent.critic),
        critics=recipe.agent.critics,
        actions=recipe.action_size,
    )
    if state.model is None or not recipe.targets.imagined_steps:
        return sizes
    return sizes._replace(
        model=_layers(state.model.net),
        members=state.model.net.layers[0].weight.shape[0],
        termination=_layers(state.model.termination_net) if state.model.termination_net else (),
        horizon=recipe.targets.imagined_steps,
        regresses_imagined=recipe.targets.estimator == "mve_tdk",
    )


@contextlib.contextmanager
def _straight_line_scans():
    """XLA's cost analysis counts the body of a loop once, however often it runs: write the steps out."""
    scan = jax.lax.scan
    jax.lax.scan = lambda *given, **named: scan(*given, **{**named, "unroll": True})
    try:
        yield
    finally:
        jax.lax.scan = scan


def count_flops(learner: Learner) -> dict:
    """FLOPs of one update: by hand (matrix products only), and by XLA before and after its optimisations."""
    hand = products.flops(products.sac_update(sizes_of(learner)))

    def one_update(state: train.TrainState) -> agents.Agent:  # a new function: traced anew, with the patch
        return train.update_step(state, learner.recipe, jax.random.clone(state.key))[0]

    with _straight_line_scans():
        lowered = jax.jit(one_update).lower(learner.state)
    compiled = lowered.compile()
    return {
        "flops_hand": hand,
        "flops_xla_lowered": _counted(lowered.cost_analysis()),
        "flops_xla": _counted(compiled.cost_analysis()),
        "loops_left": compiled.as_text().count(" while("),
    }


def _counted(analysis: Any) -> float:
    return float((analysis[0] if isinstance(analysis, list) else analysis)["flops"])


def _operands(product: products.Product, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    rows, inputs, outputs = product[1:]
    shapes = {
        "forward": ((rows, inputs), (inputs, outputs)),
        "weight_gradient": ((rows, inputs), (rows, outputs)),
        "input_gradient": ((rows, outputs), (inputs, outputs)),
    }[product.use]
    left, right = jax.random.split(key)
    return jax.random.normal(left, shapes[0]), jax.random.normal(right, shapes[1])


CONTRACTED = {"forward": (1, 0), "weight_gradient": (0, 0), "input_gradient": (1, 1)}


@partial(jax.jit, static_argnames="uses")
def _multiply(operands: list[tuple[jax.Array, jax.Array]], uses: tuple[str, ...]) -> list[jax.Array]:
    """Every product by itself, one after the other; independent, so XLA may spread them over cores."""
    return [
        jax.lax.dot_general(left, right, (((CONTRACTED[use][0],), (CONTRACTED[use][1],)), ((), ())))
        for use, (left, right) in zip(uses, operands, strict=True)
    ]


class BareProducts:
    """The matrix products of an update and nothing else."""

    def __init__(self, learner: Learner):
        listed = products.sac_update(sizes_of(learner))
        keys = jax.random.split(jax.random.key(0), len(listed))
        operands = [_operands(product, key) for product, key in zip(listed, keys, strict=True)]
        self._operands = jax.block_until_ready(operands)
        self._uses = tuple(product.use for product in listed)

    def multiply(self) -> None:
        jax.block_until_ready(_multiply(self._operands, self._uses))


def gemm(library: str, size: int, seconds: float) -> dict:
    """GFLOP/s of float32 products of square matrices, best of what fits in so many seconds."""
    a = np.random.default_rng(0).standard_normal((size, size), np.float32)
    on_device = jnp.asarray(a)
    program = jax.jit(lambda x: x @ x)
    multiply = (lambda: a @ a) if library == "numpy" else lambda: program(on_device).block_until_ready()
    multiply()
    times, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        multiply()
        times.append(time.perf_counter() - start)
    times.sort()
    return {
        "gflops_best": 2e-9 * size**3 / times[0],
        "gflops_median": 2e-9 * size**3 / times[len(times) // 2],
    }
