"""How wrong the model is on steps that it was not fitted to."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mve.dynamics.ensemble import Dynamics, change, predict
from mve.types import Transition


def held_out_error(model: Dynamics, rows: Transition, counts: Bool[Array, " K"]) -> Float[Array, " M"]:
    """Every member's mean squared error of the scaled change over the rows that count; NaN if none does.

    Of the mean prediction, whatever the noise, as in MBPO: a likelihood would be ruled by the few rows
    where a member is too sure of itself.
    """
    error = predict(model, rows.obs, rows.action, shared=True).mean
    target = model.change.scale(change(model, rows))
    error = jnp.mean(jnp.square(error - jnp.broadcast_to(target, error.shape)), axis=-1)
    used = jnp.broadcast_to(counts, error.shape)
    return jnp.sum(jnp.where(used, error, 0.0), axis=-1) / jnp.sum(used, axis=-1, dtype=jnp.float32)


def open_loop_error(
    model: Dynamics, block: Transition, num_rows: Array, depths: tuple[int, ...]
) -> dict[int, Array]:
    """Mean squared error of the state after k steps of the logged actions, in units of the data's spread.

    Measured on a block *before* the model is fitted to it, so that no data is held back and none is
    judged by a model that has seen it (prequential error; Dawid 1984). Segments stay within an episode; NaN
    for a depth that none reaches. The ensemble's mean is what is judged, without noise.
    """
    errors = {}
    obs, horizon = block.obs, block.reward.shape[0]
    row = jnp.arange(horizon)
    for k in range(1, max(depths) + 1):
        here = jnp.minimum(row + k - 1, horizon - 1)
        predicted = jnp.mean(predict(model, obs, block.action[here], shared=True).mean, axis=0)
        obs = model.obs.clip(obs + model.change.unscale(predicted)[:, : obs.shape[-1]])
        if k in depths:
            scale = jnp.broadcast_to(model.obs.std, obs.shape)
            error = jnp.mean(jnp.square((obs - block.next_obs[here]) / scale), axis=-1)
            valid = (row + k <= num_rows) & (block.episode[here] == block.episode)
            errors[k] = jnp.sum(jnp.where(valid, error, 0.0)) / jnp.sum(valid, dtype=jnp.float32)
    return errors
