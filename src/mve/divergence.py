"""Whether what is learned still makes sense: losses that are finite, values that rewards could sum to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mve.config import Config
from mve.types import Json

# What has to be finite after a block of updates; the model's only if it was fitted.
LOSSES = {
    "train/critic_loss": "the critic's loss",
    "train/actor_loss": "the actor's loss",
    "train/q_mean": "the critic's values",
    "model/loss": "the model's loss",
}
EXPLODED = 10.0  # times the largest return that the rewards seen could add up to
SUSTAINED = 10  # blocks in a row beyond it, before it is said
LARGE_OBS, LARGE_REWARD = 1e3, 1e3
SHOWN = {
    "train/critic_loss": "critic loss",
    "train/actor_loss": "actor loss",
    "train/q_mean": "mean value",
    "train/ent_coef": "entropy coefficient",
    "model/loss": "model loss",
    "model/mse_k1": "model error after a step",
}


def not_finite(numbers: Mapping[str, float], fits: int) -> str | None:
    """The first loss that is not; None if all are."""
    for name, what in LOSSES.items():
        if name in numbers and (fits or not name.startswith("model/")) and not np.isfinite(numbers[name]):
            return what
    return None


class Watch:
    """What one run was paid and shown so far, and whether its values fit that."""

    def __init__(self) -> None:
        self.reward: tuple[float, float] | None = None  # lowest and highest
        self.obs: tuple[float, float] | None = None
        self._beyond = 0  # blocks in a row
        self._said = False

    def see(self, reward: np.ndarray, obs: np.ndarray) -> None:
        """Take note of what real steps were paid (T,) and showed (T, S)."""
        if len(reward):
            self.reward, self.obs = _widened(self.reward, reward), _widened(self.obs, obs)

    def facts(self) -> Json:
        """What a checkpoint keeps."""
        return {"reward": self.reward, "obs": self.obs}

    def restore(self, facts: Json) -> None:
        """Go on from there; an older checkpoint has none."""
        self.reward, self.obs = (facts.get(name) and tuple(facts[name]) for name in ("reward", "obs"))

    def exploding(self, numbers: Mapping[str, float], config: Config, action_size: int) -> str | None:
        """What to say, once, of values that have been beyond all reason for some time."""
        bound = self._largest_return(numbers, config, action_size)
        value = abs(numbers.get("train/q_mean", 0.0))
        self._beyond = self._beyond + 1 if bound is not None and value > EXPLODED * bound else 0
        if self._said or self._beyond < SUSTAINED:
            return None
        self._said = True
        return (
            f"seed {config.seed}: the critic's values have a mean of {numbers['train/q_mean']:.3g}, and the "
            f"rewards seen cannot add up to more than {bound:.3g}; {'; '.join(self._hints(numbers))}"
        )

    def _largest_return(self, numbers: Mapping[str, float], config: Config, action_size: int) -> float | None:
        """max |r| / (1 - gamma), with an allowance for SAC's bonus; None where nothing was paid yet."""
        if (
            self.reward is None
            or (largest := max(map(abs, self.reward))) == 0
            or config.targets.discount == 1
        ):
            return None
        bonus = numbers.get("train/ent_coef", 0.0) * action_size
        return (largest + bonus) / (1 - config.targets.discount)

    def diagnosis(self, what: str, numbers: Mapping[str, float]) -> list[str]:
        """Lines that say what led to it: the last numbers that were finite, and settings to try."""
        last = [f"{shown} {numbers[name]:.4g}" for name, shown in SHOWN.items() if name in numbers]
        lines = [f"the last block before: {', '.join(last)}" if last else "no block of updates went before"]
        for name, seen in (("rewards", self.reward), ("observations", self.obs)):
            if seen is not None:
                lines.append(f"{name} seen: {seen[0]:.4g} to {seen[1]:.4g}")
        return [*lines, *(f"try: {hint}" for hint in self._hints(numbers, what))]

    def _hints(self, numbers: Mapping[str, float], what: str = "") -> list[str]:
        hints = []
        if self.obs is not None and max(map(abs, self.obs)) > LARGE_OBS:
            hints.append("smaller observations (gymnasium.wrappers.RescaleObservation, or other units)")
        if self.reward is not None and max(map(abs, self.reward)) > LARGE_REWARD:
            hints.append("smaller rewards (gymnasium.wrappers.TransformReward, or other units)")
        if "model" in what:
            return [*hints, "a lower dynamics.learning_rate"]
        if "model/loss" in numbers:
            hints.append("a lower targets.horizon_steps")
        return [
            *hints,
            "a lower agent.critic_learning_rate, agent.layer_norm=true, fewer train.updates_per_step",
        ]


def _widened(seen: tuple[float, float] | None, values: Any) -> tuple[float, float]:
    low, high = float(np.min(values)), float(np.max(values))
    return (low, high) if seen is None else (min(low, seen[0]), max(high, seen[1]))
