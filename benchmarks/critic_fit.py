"""What critics learn of a run's policy, by one kind of target or another, with the policy held as it is.

    python benchmarks/critic_fit.py RUN --try targets.n_step=4 --try replay.recency=1

Fresh episodes of the policy in training say what it earns from every state (as for `mve diagnose`). Then the
critics alone go on for --updates, its actor and its model being held, under the run's preset with other
settings of targets, imagination and replay (`section.field=value`, several in quotes). The first line is the
run as it was left. Bias that is the same everywhere moves no actor; the correlation with what was earned,
over all steps played, says how well critics tell states apart, and so do values shortly before an end.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from efficiency import markdown
from mve import config, diagnose, episodes, log, schedule, train
from mve.agents import Agent
from mve.learner import Learner
from mve.state import Recipe, TrainState
from mve.types import Key, Transition, UserError

HEADER = ("settings", "bias", "root mean square", "correlation", "before an end", "earned there")
NEAR, FAR = 20, 100  # steps to an episode's end that are called shortly before
HELD = "targets.discount"  # what was earned is by the run's own
CORRECTIONS = "dynamics.on_policy_corrections"  # how the model is asked, not what it has learned
ALLOWED = ("targets.", "imagination.real_share", "imagination.length", "replay.recency", CORRECTIONS)


class Earned(NamedTuple):
    """Steps played, what they earned, and which of them came shortly before an episode's end."""

    rows: Transition
    value: np.ndarray
    near: np.ndarray


def play(learner: Learner, num_episodes: int) -> Earned:
    """Steps of fresh episodes under the policy in training."""
    with log.capture_mujoco_warnings(None):
        played = episodes.play(learner, num_episodes)
    judged = diagnose.judged_steps(learner, played, np.arange(len(played.last)))
    kept, ends = np.asarray(judged.starts), np.flatnonzero(played.last)
    end = ends[np.searchsorted(ends, kept)]
    to_go = end - kept
    near = (np.asarray(played.rows.continuation)[end] == 0) & (to_go >= NEAR) & (to_go < FAR)
    return Earned(judged.rows, judged.earned, near)


def asked_recipe(learner: Learner, settings: str) -> Recipe:
    """The run's, with other targets and rows."""
    for setting in settings.split():
        if not setting.startswith(ALLOWED) or setting.startswith(HELD):
            raise UserError(
                f"--try {setting}: agent and model are held, and so is {HELD}; "
                f"set one of {', '.join(ALLOWED)}"
            )
    asked = config.build(learner.config.env.id, learner.config.algo, settings.split())
    own = learner.config
    held = replace(own.dynamics, on_policy_corrections=asked.dynamics.on_policy_corrections)
    asked = replace(asked, train=own.train, dynamics=held, agent=own.agent)
    schedule.check(asked, learner.recipe.fits_model)
    targets = replace(asked.targets, discount=learner.recipe.targets.discount)
    dynamics = replace(learner.recipe.dynamics, on_policy_corrections=held.on_policy_corrections)
    recipe = replace(
        learner.recipe,
        targets=targets,
        dynamics=dynamics,
        imagination=asked.imagination,
        recency=asked.replay.recency,
    )
    buffer = learner.state.imagined
    if buffer is not None and asked.imagination.capacity > buffer.capacity:
        raise UserError(f"--try {settings}: the run's buffer of imagined rows holds {buffer.capacity}")
    return recipe


@partial(jax.jit, static_argnames="recipe")
def learned(state: TrainState, recipe: Recipe, updates: int, key: Key) -> TrainState:
    """The critics, so many updates on."""
    return train.updated(state, recipe, jnp.asarray(updates), key, critics_only=True)[0]


def row(agent: Agent, earned: Earned, name: str) -> tuple[str, ...]:
    """The critics' mean against what was earned."""
    obs, action = jnp.asarray(earned.rows.obs), jnp.asarray(earned.rows.action)
    value = np.asarray(jnp.mean(agent.action_values(obs, action), axis=0))
    error = value - earned.value
    correlation = np.corrcoef(value, earned.value)[0, 1]
    near = [f"{np.mean(x[earned.near]):.0f}" if earned.near.any() else "none" for x in (value, earned.value)]
    return name, f"{error.mean():+.0f}", f"{np.sqrt(np.mean(error**2)):.0f}", f"{correlation:.3f}", *near


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="a run folder")
    parser.add_argument("--try", dest="tries", action="append", default=[], metavar="SETTINGS")
    parser.add_argument("--updates", type=int, default=4000)
    parser.add_argument("--episodes", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    try:
        learner = Learner.load(options.run, quiet=True)
        tries = {settings or "preset": asked_recipe(learner, settings) for settings in options.tries or [""]}
        earned = play(learner, options.episodes)
        print(markdown(HEADER, [row(learner.state.agent, earned, "as it was left")]), flush=True)
        for name, recipe in tries.items():
            state = learned(learner.state, recipe, options.updates, jax.random.key(options.seed))
            print(f"| {' | '.join(row(state.agent, earned, name))} |", flush=True)
    except UserError as error:
        print(f"critic_fit: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
