"""Imagined steps: which member answers for which row, and what becomes of its answer."""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mve.dynamics.ensemble import Dynamics, Prediction, change, num_members, only, predict, terminated
from mve.dynamics.settings import DynamicsConfig
from mve.types import Beside, Key, Known, StepFn, Transition

MANY = 2**30  # of offsets, so that the remainder by a batch's rows is as good as uniform


def rollout_step(model: Dynamics, known: Known, config: DynamicsConfig, key: Key) -> StepFn:
    """`step` for all steps of one rollout: under TS-infinity every row keeps the member it is dealt here.

    Under TS-1 `key` is not used: each step deals anew, with its own key.
    """
    if model.elites is not None:  # picked out once, not at every step
        model = only(model, model.elites)
    offset = jax.random.randint(key, (), 0, MANY) if config.trajectory == "tsinf" else None
    return partial(step, model, known, config, offset=offset)


def step(
    model: Dynamics,
    known: Known,
    config: DynamicsConfig,
    obs: Array,
    action: Array,
    key: Key,
    beside: Beside | None = None,
    *,
    offset: Array | None = None,
) -> tuple[Array, Array, Array]:
    """One imagined step of a batch (B, S): next state, reward, continuation.

    Each row is served by one member, an elite if there are any. The rows are rotated by an offset and
    dealt to the members in equal blocks, so that a step costs one member's work per row, not M. The
    offset is drawn anew at every step (TS-1 of Chua et al. 2018), unless it is given (TS-infinity).

    With f the mean change in the member's opinion, and real steps `beside` the rows, a row moves by

        f(s, a) + (s'_real - s_real) - f(s_real, a_real)

    (Fröhlich et al. 2022, equation 5), its reward likewise; where there is none, by f(s, a) and the noise.
    """
    if model.elites is not None:
        model = only(model, model.elites)
    noise_key = key
    if config.sample != "none":
        key, noise_key = jax.random.split(key)
    slots = _slots(model, obs.shape[0])
    if num_members(model) == 1:
        start = jnp.int32(0)
    elif offset is not None:
        start = offset % slots
    else:
        start = jax.random.randint(key, (), 0, slots)
    predicted = _dealt(model, obs, action, start)
    moved = predicted.mean
    if config.sample != "none":
        moved = moved + _noise(predicted, config, obs.shape[-1], noise_key)
    if beside is not None:
        erred = _errors(model, beside.rows, start)
        there = jnp.broadcast_to(beside.there[:, None], erred.shape)
        moved = jnp.where(there, predicted.mean + erred, moved)
    return _finish_step(model, known, config, obs, action, model.change.unscale(moved))


def _errors(model: Dynamics, rows: Transition, start: Array) -> Float[Array, " B O"]:
    """What is missing in the members' predictions of real steps, scaled; rows are dealt as in `step`."""
    return model.change.scale(change(model, rows)) - _dealt(model, rows.obs, rows.action, start).mean


def _slots(model: Dynamics, rows: int) -> int:
    """Places for so many rows in equal blocks, one for each member."""
    members = num_members(model)
    return -(-rows // members) * members


def _dealt(model: Dynamics, obs: Array, action: Array, start: Array) -> Prediction:
    """One member's prediction for every row (B, O), in blocks of neighbours: row r in slot r - `start`."""
    members, rows = num_members(model), obs.shape[0]
    slots = _slots(model, rows)
    # Slots beyond the rows have a copy, which is dropped again.
    order = (jnp.arange(slots) + start) % slots % rows

    def deal(x: Array) -> Array:
        return x[order].reshape(members, slots // members, x.shape[-1])

    def collect(x: Array) -> Array:
        return x.reshape(slots, -1)[(jnp.arange(rows) - start) % slots]

    return jax.tree.map(collect, predict(model, deal(obs), deal(action)))


def _noise(predicted: Prediction, config: DynamicsConfig, obs_size: int, key: Key) -> Float[Array, " B O"]:
    """A draw of the scaled change's noise: std times a standard normal, so that gradients reach the std."""
    assert predicted.log_var is not None  # refused by the settings
    draw = jnp.exp(0.5 * predicted.log_var) * jax.random.normal(key, predicted.mean.shape)
    if config.sample == "state_and_reward":
        return draw
    is_state = jnp.arange(draw.shape[-1]) < obs_size
    return jnp.where(jnp.broadcast_to(is_state, draw.shape), draw, 0.0)


def disagreement(model: Dynamics, obs: Array, action: Array, key: Key) -> Float[Array, " B"]:
    """How far two members are apart on every row: mean over outputs of (mu_a - mu_b)^2 / var, var being the
    noise's where there is a model of it and the data's otherwise.

    Rows are dealt as in `step`, to pairs: two members' work a row, where all pairs would be M (MACURA,
    Frauenknecht et al. 2024, takes their Jensen-Shannon divergence).
    """
    if model.elites is not None:
        model = only(model, model.elites)
    start = jax.random.randint(key, (), 0, _slots(model, obs.shape[0]))
    others = only(model, jnp.roll(jnp.arange(num_members(model)), 1))
    a, b = (_dealt(each, obs, action, start) for each in (model, others))
    apart = jnp.square(a.mean - b.mean)
    if a.log_var is not None and b.log_var is not None:
        apart = apart * jnp.exp(-0.5 * (a.log_var + b.log_var))
    return jnp.mean(apart, axis=-1)


def member_step(
    model: Dynamics, known: Known, config: DynamicsConfig, obs: Array, action: Array, *, crossed: bool
) -> tuple[Array, Array, Array]:
    """One imagined step of states (M, B, S), of which member m always moves its own (TS-infinity).

    Next state (M, B, S), continuation (M, B), and rewards (R, M, B): R = 1 where the reward is known, or in
    the opinion of the member that took the step. `crossed`: R = M where it is learned, the reward of every
    step in every member's opinion, as STEVE wants it. Rewards come from the nets that predict the change,
    so this costs M nets per state where STEVE has small nets of their own for it; there is one termination
    net, where STEVE has one per member.

    All members answer, elites or not, with their means: what is asked for is how far they disagree, which
    neither a selection nor the noise of the world may change.
    """
    if known.reward is not None or not crossed:
        moved = model.change.unscale(predict(model, obs, action).mean)
        next_obs, reward, continuation = _finish_step(model, known, config, obs, action, moved)
        return next_obs, reward[None], continuation
    opinions = model.change.unscale(predict(model, obs, action, shared=True).mean)  # (R, M, B, S+1)
    member = jnp.arange(config.members)
    next_obs, _, continuation = _finish_step(model, known, config, obs, action, opinions[member, member])
    return next_obs, _learned_reward(model, config, opinions), continuation


def few_members_step(model: Dynamics, known: Known, config: DynamicsConfig, key: Key) -> StepFn:
    """`member_step` where every state is imagined by a few of the M members alone: of states (K, B, S),
    K <= M, that begin as copies of one another, all those of a row have members of their own throughout.

    The members are dealt with `key`, in blocks as in `step`; a step costs the work of K nets a row, not of M.
    """
    offset = jax.random.randint(key, (), 0, MANY)

    def step(obs: Array, action: Array, key: Key) -> tuple[Array, Array, Array]:
        del key  # means, as in `member_step`
        rows = math.prod(obs.shape[:-1])
        # Copies of a row are at least B rows apart, a block has at most B: no two are in one.
        start = offset % _slots(model, rows)
        predicted = _dealt(model, obs.reshape(rows, -1), action.reshape(rows, -1), start)
        moved = model.change.unscale(predicted.mean.reshape(*obs.shape[:-1], -1))
        next_obs, reward, continuation = _finish_step(model, known, config, obs, action, moved)
        return next_obs, reward[None], continuation

    return step


def _finish_step(
    model: Dynamics, known: Known, config: DynamicsConfig, obs: Array, action: Array, moved: Array
) -> tuple[Array, Array, Array]:
    """From a predicted change to next state, reward and continuation, known functions first."""
    next_obs = obs + moved[..., : obs.shape[-1]]
    if config.stay_in_data:
        next_obs = model.obs.clip(next_obs)
    if known.reward is not None:
        reward = known.reward(obs, action, next_obs)
    else:
        reward = _learned_reward(model, config, moved)
    if known.termination is not None:
        ended = known.termination(obs, action, next_obs)
    else:
        ended = terminated(model, obs, action, next_obs)
    return next_obs, reward, 1.0 - ended.astype(jnp.float32)


def _learned_reward(model: Dynamics, config: DynamicsConfig, moved: Array) -> Array:
    return (model.change.clip(moved) if config.stay_in_data else moved)[..., -1]
