"""Ours, asked for chunks of the whole loop or of `train.learn`. Runs in the environment of the benchmark."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import arithmetic
import worker
from mve import agents, log, train
from mve.display import Display
from mve.interrupt import Interrupt
from mve.learner import Learner
from mve.loop import Loop
from mve.program import on_host
from mve.types import Transition


class LoopOnly(Loop):
    """The loop run piecewise: no evaluations and no checkpoints."""

    def evaluate(self, *_: Any) -> list[dict[str, float]]:
        return [{} for _ in self.runs]

    def save(self) -> None:
        return None


def go_on(learner: Learner, steps: int) -> None:
    """So many environment steps with everything that is due by them."""
    piece, total = LoopOnly([learner.run], [learner.progress]), learner.num_timesteps + steps
    with log.RunLog(learner.folder) as records:
        piece.go_on(total, [records], Display(total, quiet=True), Interrupt())
    [learner.progress] = piece.progress()


class Arm(NamedTuple):
    """What is measured under one name."""

    learner: Learner
    folder: tempfile.TemporaryDirectory


arms: dict[str, Arm] = {}


def build(name: str, algo: str, task: str, settings: list[str], fill: int) -> dict:
    """A learner with `fill` random transitions in its replay; compiles the training call."""
    folder = tempfile.TemporaryDirectory()
    settings = [*settings, f"train.learning_starts={fill}", f"dynamics.learning_starts={fill}"]
    learner = Learner(task, algo, settings=settings, run_dir=Path(folder.name) / "run", quiet=True)
    go_on(learner, fill)
    arms[name] = Arm(learner, folder)
    return {"settings": settings, "describe": learner.describe()}


def loop(name: str, steps: int) -> dict:
    """So many environment steps with their updates, evaluations and checkpoints left out."""
    learner = arms[name].learner

    def work() -> dict:
        before, updates = learner.num_timesteps, int(learner.state.agent.num_updates)
        go_on(learner, steps)
        jax.block_until_ready(learner.state)
        return {
            "env_steps": learner.num_timesteps - before,
            "updates": int(learner.state.agent.num_updates) - updates,
        }

    return worker.timed(work)


def learn(name: str, updates: int = 0, fits: int = 0, rounds: int = 0) -> dict:
    """One call of `train.learn` on a block without rows: so many updates, fits, rounds of rollouts."""
    learner = arms[name].learner
    state, recipe = learner.state, learner.recipe
    nothing = jax.tree.map(
        lambda x: np.zeros((learner.config.train.block_steps, *x.shape[1:]), x.dtype), state.replay.rows
    )
    due = train.Due.of(rows=0, updates=updates, fits=fits, rounds=rounds)

    def work() -> dict:
        learner.state, _ = train.learn(state, Transition(*nothing), due, recipe)
        jax.block_until_ready(learner.state)
        return {"updates": updates, "fits": fits, "rounds": rounds}

    return worker.timed(work)


def collect(name: str, steps: int) -> dict:
    """So many environment steps with the policy acting, and nothing learned."""
    learner = arms[name].learner

    def work() -> dict:
        block, step = learner.config.train.block_steps, learner.num_timesteps
        for _ in range(-(-steps // block)):
            policy = on_host(train.exploration_policy(learner.state, np.int32(step)))
            learner.run.collect(policy, step, block)
        return {"env_steps": -(-steps // block) * block}

    return worker.timed(work)


# Many seeds


@partial(jax.jit, static_argnames="recipe")
def _updates(state: train.TrainState, times: jax.Array, recipe: train.Recipe) -> agents.Agent:
    """So many updates of one state's agent."""

    def body(i: jax.Array, agent: agents.Agent) -> agents.Agent:
        key = jax.random.fold_in(state.key, i)
        return train.update_step(replace(state, agent=agent), recipe, key)[0]

    return jax.lax.fori_loop(0, times, body, state.agent)


@partial(jax.jit, static_argnames="recipe")
def _updates_of_all(states: train.TrainState, times: jax.Array, recipe: train.Recipe) -> agents.Agent:
    """So many updates of each of the stacked states' agents, side by side in one program."""

    def body(i: jax.Array, agent: agents.Agent) -> agents.Agent:
        keys = jax.vmap(jax.random.fold_in, (0, None))(states.key, i)
        step = lambda state, key: train.update_step(state, recipe, key)[0]  # noqa: E731
        return jax.vmap(step)(replace(states, agent=agent), keys)

    return jax.lax.fori_loop(0, times, body, states.agent)


def _with_seed(learner: Learner, seed: int) -> train.TrainState:
    recipe, key = learner.recipe, jax.random.key(seed)
    agent = agents.init(recipe.agent, recipe.obs_size, recipe.action_size, jax.random.fold_in(key, 1))
    return replace(learner.state, agent=agent, key=key)


def seeds(name: str, count: int, together: bool, updates: int) -> dict:
    """So many updates of each of `count` seeds: in one program, or one seed after the other."""
    learner = arms[name].learner
    states, recipe = [_with_seed(learner, seed) for seed in range(count)], learner.recipe
    times = jnp.int32(updates)
    if together:
        stacked = jax.block_until_ready(jax.tree.map(lambda *x: jnp.stack(x), *states))

    def work() -> dict:
        if together:
            jax.block_until_ready(_updates_of_all(stacked, times, recipe))
        else:
            for state in states:
                jax.block_until_ready(_updates(state, times, recipe))
        return {"updates": count * updates}

    return worker.timed(work)


# Arithmetic


def flops(name: str) -> dict:
    return arithmetic.count_flops(arms[name].learner)


bare: dict[str, arithmetic.BareProducts] = {}


def bare_products(name: str, updates: int) -> dict:
    """The matrix products of so many updates and nothing else."""
    if name not in bare:
        bare[name] = arithmetic.BareProducts(arms[name].learner)

    def work() -> dict:
        for _ in range(updates):
            bare[name].multiply()
        return {"updates": updates}

    return worker.timed(work)


def facts(name: str) -> dict:
    """Sizes that the sums on paper need."""
    learner = arms[name].learner
    state = learner.state
    nbytes = lambda tree: sum(x.nbytes for x in jax.tree.leaves(tree) if hasattr(x, "nbytes"))  # noqa: E731
    return {
        "transition_bytes": nbytes(state.replay.rows) / state.replay.capacity,
        "policy_bytes": nbytes(learner.policy()),
        "batch": learner.config.agent.batch_size,
        "updates_per_step": learner.config.train.updates_per_step,
        "control_hz": 1.0 / learner.run.instance.unwrapped.dt,
        "capacity_rows": state.replay.capacity,
    }


if __name__ == "__main__":
    worker.serve(
        {
            "build": build,
            "loop": loop,
            "learn": learn,
            "collect": collect,
            "seeds": seeds,
            "flops": flops,
            "bare_products": bare_products,
            "gemm": arithmetic.gemm,
            "facts": facts,
            "versions": lambda: {"versions": log.versions()},
        }
    )
