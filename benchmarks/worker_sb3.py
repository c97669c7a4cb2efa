"""Stable-Baselines3 or SBX, asked for chunks of `learn`. Runs in the peer's own environment."""

from __future__ import annotations

import gymnasium as gym
import numpy as np

import machine
import worker

BUFFER_ROWS, BATCH, HIDDEN = 100_000, 256, [256, 256]
models = {}


def build(name: str, library: str, algo: str, task: str, updates_per_step: int, fill: int) -> dict:
    """A learner with `fill` random transitions in its buffer."""
    import torch

    torch.set_num_threads(len(machine.available_cores()))
    if library == "sb3":
        import stable_baselines3 as package

        more = {"device": "cpu"}
    else:
        import sbx as package

        more = {}
    from stable_baselines3.common.noise import NormalActionNoise

    env = gym.make(task)
    if algo == "td3":
        size = env.action_space.shape[0]
        more["action_noise"] = NormalActionNoise(np.zeros(size), 0.1 * np.ones(size))
    model = getattr(package, algo.upper())(
        "MlpPolicy",
        env,
        batch_size=BATCH,
        buffer_size=BUFFER_ROWS,
        learning_starts=fill,
        train_freq=1,
        gradient_steps=updates_per_step,
        policy_kwargs={"net_arch": HIDDEN},
        seed=0,
        **more,
    )
    model.learn(fill)
    models[name] = model
    return {"threads": torch.get_num_threads()}


def loop(name: str, steps: int) -> dict:
    """So many environment steps with their updates."""
    model = models[name]

    def work() -> dict:
        steps_before, updates_before = model.num_timesteps, int(model._n_updates)
        model.learn(steps, reset_num_timesteps=False)
        return {
            "env_steps": model.num_timesteps - steps_before,
            "updates": int(model._n_updates) - updates_before,
        }

    return worker.timed(work)


worker.serve({"build": build, "loop": loop})
