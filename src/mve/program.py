"""What the loop asks of the device: to learn, and for the policies that act and are judged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from mve import train
from mve.networks import Policy
from mve.state import Recipe, TrainState
from mve.train import Due
from mve.types import Metrics, Transition


def on_host(tree: Any) -> Any:
    """The same with NumPy leaves. Copied: the device's buffers are donated later."""
    return jax.tree.map(np.array, tree)


class Alone:
    """One training state as it is."""

    def __init__(self, recipe: Recipe):
        self.recipe = recipe

    def joined(self, states: Sequence[TrainState]) -> TrainState:
        """The state that is trained."""
        [state] = states
        return state

    def part(self, state: TrainState, number: int) -> TrainState:
        """The state of one of the runs."""
        del number
        return state

    def learn(self, state: TrainState, blocks: Sequence[Transition], due: Due) -> tuple[TrainState, Metrics]:
        """`train.learn`; returns before it is done, and donates the state."""
        [block] = blocks
        return train.learn(state, block, due, self.recipe)

    def explorers(self, state: TrainState, step: int) -> list[Policy]:
        """The policies that collect the block that starts at `step`."""
        return [on_host(train.exploration_policy(state, np.int32(step)))]

    def policies(self, state: TrainState) -> list[Policy]:
        """The deterministic policies."""
        return [on_host(state.agent.policy())]

    def numbers(self, metrics: Metrics) -> list[dict[str, float]]:
        """The metrics of each run; waits for them."""
        return [{name: float(value) for name, value in jax.device_get(metrics).items()}]
