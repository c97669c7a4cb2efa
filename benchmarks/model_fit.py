"""How well the model is fitted, at what cost: a run's remembered steps once more, without the agent.

    python benchmarks/model_fit.py RUN --try dynamics.fits_per_refit=60 --try dynamics.learning_rate=0.003

The steps that a run remembers come in again, as many at a time as lie between two refits of its model. Each
lot is judged by a model that has not seen it, then joins the others, and the model is fitted to them all
(prequential error; Dawid 1984). The first fit is at --start. Every --try is the run's preset with other
settings (`section.field=value`, several in quotes). Errors are squared and in spreads of the data: medians
and geometric means over the later half of the lots, after 1, 3 and 5 steps of the actions that were taken.
Over the noise that the model believes in, a member's squared error after one step has a mean of 1 where
that is as large as its errors. With dynamics.termination=learned among the settings, ends of real steps are
judged as well: of how many of all lots their next state told it, and how many other steps were taken for one.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from efficiency import markdown
from mve import config, dynamics, replay
from mve.config import Config
from mve.dynamics.ensemble import change, terminated
from mve.learner import Learner
from mve.replay import Replay
from mve.state import Recipe
from mve.train import ERROR_DEPTHS
from mve.types import Key, Known, Transition, UserError

ERRORS = tuple(f"{name}, {k}" for name in ("median", "mean") for k in ERROR_DEPTHS)
HEADER = ("settings", *ERRORS, "error^2 / noise^2", "ms a step", "ends told", "false ends")


def errors_and_cost(
    rows: Transition, recipe: Recipe, asked: Config, start: int, seed: int
) -> tuple[np.ndarray, float]:
    """Errors by depth, surprise, counts of `ends` (lots, depths + 5) from the second fit on, and processor
    milliseconds of fitting a step."""
    fitting, recency = asked.dynamics, asked.replay.recency
    lot_steps, num_rows = fitting.interval_steps, rows.reward.shape[0]

    @partial(jax.jit, donate_argnums=(0, 1))
    def take_in(
        model: dynamics.Dynamics, memory: Replay, lot: Transition, fits: jax.Array, key: Key
    ) -> tuple[dynamics.Dynamics, Replay, list[jax.Array]]:
        found = dynamics.open_loop_error(model, lot, jnp.int32(lot_steps), ERROR_DEPTHS)
        errors = [*(found[k] for k in ERROR_DEPTHS), surprise(model, lot), *ends(model, lot)]
        model = dynamics.observe(model, lot, jnp.int32(lot_steps), fitting)
        memory = replay.add(memory, lot, jnp.ones(lot_steps, bool))
        model, _ = dynamics.fit(model, partial(replay.sample, memory, recency=recency), fitting, fits, key)
        return model, memory, errors

    sizes = rows.obs.shape[1], rows.action.shape[1]
    known = Known(
        None if fitting.reward == "learned" else recipe.known.reward,
        None if fitting.termination == "learned" else recipe.known.termination,
    )
    model = dynamics.init(fitting, known, *sizes, jax.random.key(seed))
    memory = replay.init(num_rows, *sizes)
    errors: list[list[float]] = []
    seconds: list[float] = []
    for begin in range(0, num_rows - lot_steps + 1, lot_steps):
        lot = jax.tree.map(lambda x, begin=begin: x[begin : begin + lot_steps], rows)
        seen = begin + lot_steps
        fits = fitting.fits_per_refit if seen >= start else 0
        first = seen - lot_steps < start <= seen
        before = time.process_time()
        model, memory, found = take_in(
            model, memory, lot, jnp.int32(fits + first * fitting.initial_fits), jax.random.key(seen + seed)
        )
        jax.block_until_ready(memory)
        if fits and not first:
            errors.append([float(x) for x in found])
            seconds.append(time.process_time() - before)
    return np.asarray(errors), 1e3 * float(np.median(seconds)) / lot_steps


def surprise(model: dynamics.Dynamics, lot: Transition) -> jax.Array:
    """Mean over members, rows and outputs of squared error over variance; not a number without noise."""
    found = dynamics.predict(model, lot.obs, lot.action, shared=True)
    if found.log_var is None:
        return jnp.float32(jnp.nan)
    error = found.mean - model.change.scale(change(model, lot))[None]
    return jnp.mean(jnp.square(error) * jnp.exp(-found.log_var))


def ends(model: dynamics.Dynamics, lot: Transition) -> tuple[jax.Array, ...]:
    """Steps rightly told to end an episode, of how many, and wrongly, of how many; the former are none where
    that is not learned."""
    ended = lot.continuation == 0
    told = jnp.zeros_like(ended)
    if model.termination_net is not None:
        told = terminated(model, lot.obs, lot.action, lot.next_obs)
    return tuple(jnp.sum(which) for which in (told & ended, ended, told & ~ended, ~ended))


def remembered(learner: Learner, end: int) -> Transition:
    """The first steps of a run, in order."""
    memory = learner.state.replay
    if int(memory.size) < learner.num_timesteps:
        raise UserError(f"{learner.folder} has forgotten its first steps; give a shorter run")
    return jax.tree.map(lambda x: x[: min(end, int(memory.size))], memory.rows)


def row(learner: Learner, steps: Transition, settings: str, options: argparse.Namespace) -> tuple[str, ...]:
    """Settings, errors and cost."""
    asked = config.build(learner.config.env.id, learner.config.algo, settings.split())
    if not (interval := asked.dynamics.interval_steps):
        raise UserError("its model is fitted at every block; add dynamics.interval_steps=250 to --try")
    if (count := len(steps.reward)) // interval <= math.ceil(options.start / interval):
        raise UserError(
            f"{count} steps, with the first fit at {options.start} and refits every {interval}, leave none "
            "to judge by; give a longer run or a smaller --start"
        )
    found, cost = errors_and_cost(steps, learner.recipe, asked, options.start, options.seed)
    depths = len(ERROR_DEPTHS)
    later = found[len(found) // 2 :]
    errors = later[:, :depths]
    numbers = [*np.median(errors, axis=0), *np.exp(np.mean(np.log(errors), axis=0))]
    told = *(f"{number:.4f}" for number in numbers), f"{np.median(later[:, depths]):.2f}", f"{cost:.1f}"
    if asked.dynamics.termination != "learned":
        return settings or "none", *told, "", ""
    right, ended, wrong, others = found[:, depths + 1 :].sum(axis=0).astype(int)
    return settings, *told, f"{right} of {ended}", f"{wrong} of {others}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="a run folder whose preset refits its model now and then")
    parser.add_argument("--try", dest="tries", action="append", default=[], metavar="SETTINGS")
    parser.add_argument("--start", type=int, default=5000, help="steps before the first fit")
    parser.add_argument("--end", type=int, default=15_000, help="steps of the run that are used")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    try:
        learner = Learner.load(options.run, quiet=True)
        steps = remembered(learner, options.end)
        print(markdown(HEADER, []))
        for settings in options.tries or [""]:
            print(f"| {' | '.join(row(learner, steps, settings, options))} |", flush=True)
    except UserError as error:
        print(f"model_fit: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
