"""Stage 3, fit: an ensemble that predicts the next state, and what of reward and termination is unknown.

    z(s' - s [, r]) = net_m(z(s, a)),   p(terminated) = sigmoid(net_end(z(s, a, s'))),   z: z-score

The 8 x 128 single network of Feinberg et al. 2018 is one setting of it. Reward and termination are either
known functions, given by the caller, or learned here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from mve.networks import MLP, Activation, Normaliser, apply_gradient, ensemble
from mve.types import Count, Key, Known, Metrics, NonNegative, Positive, Rate, Transition, Widths

TERMINATION_HIDDEN = (128, 128)


@dataclass(frozen=True, kw_only=True)
class DynamicsConfig:
    """The model, and how much of it is fitted when."""

    kind: Literal["learned", "oracle"] = "learned"
    """oracle: imagine in the true simulator, set to each state and respecting its ends; nothing is fitted,
    and no other setting of this section is read (Feinberg et al. 2018: model error set apart)."""
    hidden: Widths = (200, 200, 200, 200)
    """Widths of the hidden layers (paper: eight of 128)."""
    activation: Activation = "silu"
    """Of the hidden layers (paper: relu)."""
    members: Positive = 5
    """M, networks in the ensemble; each imagined step of a row is served by one of them (paper: 1)."""
    learning_rate: Rate = 1e-3
    """Adam's step size."""
    weight_decay: NonNegative = 0.0
    """Decoupled weight decay (AdamW), per step, times the learning rate."""
    batch_size: Positive = 256
    """Rows per member and minibatch (paper: 512)."""
    fits_per_step: NonNegative = 0.5
    """Minibatches per environment step, for every member (paper: 4)."""
    initial_fits: Count = 1000
    """Minibatches when fitting begins, on top of the steady rate (paper: 0)."""
    learning_starts: Count = 1000
    """Environment steps before the first fit (released code of the paper: 5000)."""
    normalise: bool = True
    """z-score inputs and targets with the statistics of all data seen so far."""
    stay_in_data: bool = True
    """Clip imagined states and learned rewards to the range seen in real data: no rollout explodes."""
    reward: Literal["auto", "known", "learned"] = "auto"
    """auto: the known function where there is one, learned otherwise."""
    termination: Literal["auto", "known", "learned", "never"] = "auto"
    """auto as for the reward; never: rollouts do not end, as in the MVE paper."""


class Dynamics(eqx.Module):
    """Everything of the model that training changes."""

    net: MLP  # (M, ...): the members
    termination_net: MLP | None
    obs: Normaliser
    action: Normaliser
    change: Normaliser  # of (next_obs - obs [, reward])
    opt_state: optax.OptState


def init(config: DynamicsConfig, known: Known, obs_size: int, action_size: int, key: Key) -> Dynamics:
    net_key, termination_key = jax.random.split(key)
    outputs = obs_size + (known.reward is None)

    def member(k: Key) -> MLP:
        # He's bound, sqrt(6 / inputs): eight ReLU layers deep, a smaller one loses the signal.
        return MLP(
            obs_size + action_size,
            outputs,
            config.hidden,
            activation=config.activation,
            hidden_gain=6**0.5,
            key=k,
        )

    net = ensemble(member, config.members, net_key)
    termination_net = None
    if known.termination is None:
        termination_net = MLP(
            2 * obs_size + action_size, 1, TERMINATION_HIDDEN, activation="relu", key=termination_key
        )
    return Dynamics(
        net=net,
        termination_net=termination_net,
        obs=Normaliser.empty(obs_size),
        action=Normaliser.empty(action_size),
        change=Normaliser.empty(outputs),
        opt_state=_optimiser(config).init((net, termination_net)),  # pyright: ignore[reportArgumentType]
    )


def _optimiser(config: DynamicsConfig) -> optax.GradientTransformation:
    return optax.adamw(config.learning_rate, weight_decay=config.weight_decay)


def _change(model: Dynamics, rows: Transition) -> Array:
    """What the net predicts: the state's change, and the reward unless it is known."""
    delta = rows.next_obs - rows.obs
    learns_reward = model.change.mean.shape[-1] > delta.shape[-1]
    return jnp.concatenate([delta, rows.reward[..., None]], axis=-1) if learns_reward else delta


def observe(model: Dynamics, block: Transition, num_rows: Array, config: DynamicsConfig) -> Dynamics:
    """Take the first `num_rows` rows of a new block into the statistics."""
    obs, action, change = model.obs, model.action, model.change
    seen = (
        obs.observe(block.next_obs, num_rows),
        action.observe(block.action, num_rows),
        change.observe(_change(model, block), num_rows),
    )
    if not config.normalise:  # mean 0, scale 1; the range is kept all the same

        def range_only(n: Normaliser) -> Normaliser:
            unit = (jnp.zeros_like(n.mean), jnp.broadcast_to(n.count, n.mean.shape))
            return eqx.tree_at(lambda m: (m.mean, m.sum_of_squares), n, unit)

        seen = tuple(range_only(n) for n in seen)
    return eqx.tree_at(lambda m: (m.obs, m.action, m.change), model, seen)


def _predict(net: MLP, model: Dynamics, obs: Array, action: Array) -> Array:
    """Scaled change of state (and reward) that one network predicts."""
    return net(jnp.concatenate([model.obs.scale(obs), model.action.scale(action)], axis=-1))


def _termination_logit(
    termination_net: MLP, model: Dynamics, obs: Array, action: Array, next_obs: Array
) -> Array:
    x = [model.obs.scale(obs), model.action.scale(action), model.obs.scale(next_obs)]
    return termination_net(jnp.concatenate(x, axis=-1))[..., 0]


def fit_step(model: Dynamics, batch: Transition, config: DynamicsConfig) -> tuple[Dynamics, Metrics]:
    """One Adam step on a minibatch with leading axes (M, B): every member sees rows of its own.

    Loss: mean squared error of the scaled change, plus the cross-entropy of the termination if learned.
    """

    def loss_fn(nets: tuple[MLP, MLP | None]) -> tuple[Array, Metrics]:
        net, termination_net = nets
        predicted = jax.vmap(_predict, in_axes=(0, None, 0, 0))(net, model, batch.obs, batch.action)
        squared_error = jnp.square(predicted - model.change.scale(_change(model, batch)))
        loss = jnp.mean(squared_error)
        metrics = {"model/loss": loss}
        if termination_net is not None:
            logit = _termination_logit(termination_net, model, batch.obs, batch.action, batch.next_obs)
            cross_entropy = jnp.mean(optax.sigmoid_binary_cross_entropy(logit, 1.0 - batch.continuation))
            metrics["model/termination_loss"] = cross_entropy
            loss = loss + cross_entropy
        # The members' losses are independent: a sum gives each the gradient it would have alone.
        return config.members * loss, metrics

    nets = (model.net, model.termination_net)
    gradient, metrics = jax.grad(loss_fn, has_aux=True)(nets)
    nets, opt_state = apply_gradient(_optimiser(config), gradient, model.opt_state, nets)
    model = eqx.tree_at(
        lambda m: (m.net, m.termination_net, m.opt_state),
        model,
        (*nets, opt_state),
        is_leaf=lambda x: x is None,
    )
    return model, metrics


def step(
    model: Dynamics, known: Known, config: DynamicsConfig, obs: Array, action: Array, key: Key
) -> tuple[Array, Array, Array]:
    """One imagined step of a batch (B, S): next state, reward, continuation.

    Each row is served by one member, drawn anew at every step (TS-1 of Chua et al. 2018). The rows are
    rotated by a random offset and dealt to the members in equal blocks, so that a step costs one
    member's work per row, not M.
    """
    members, rows = config.members, obs.shape[0]
    start = jax.random.randint(key, (), 0, rows) if members > 1 else jnp.int32(0)
    block = -(-rows // members)
    # Padded to a whole number of blocks; the copies at the end are dropped again.
    dealt = (jnp.arange(block * members) + start) % rows

    def deal(x: Array) -> Array:
        return x[dealt].reshape(members, block, x.shape[-1])

    predicted = jax.vmap(_predict, in_axes=(0, None, 0, 0))(model.net, model, deal(obs), deal(action))
    predicted = predicted.reshape(block * members, -1)[(jnp.arange(rows) - start) % rows]
    return _finish_step(model, known, config, obs, action, model.change.unscale(predicted))


def member_step(
    model: Dynamics, known: Known, config: DynamicsConfig, obs: Array, action: Array
) -> tuple[Array, Array, Array]:
    """One imagined step of states (M, B, S), of which member m always moves its own (TS-infinity).

    Next state (M, B, S), continuation (M, B), and the reward of every step in every member's opinion
    (R, M, B), as STEVE wants it: R = M where the reward is learned, 1 where it is known. Rewards come
    from the nets that predict the change, so the former costs M nets per state where STEVE has small
    nets of their own for it; there is one termination net, where STEVE has one per member.
    """
    if known.reward is not None:
        change = jax.vmap(_predict, in_axes=(0, None, 0, 0))(model.net, model, obs, action)
        change = model.change.unscale(change)
        next_obs, reward, continuation = _finish_step(model, known, config, obs, action, change)
        return next_obs, reward[None], continuation
    opinions = jax.vmap(_predict, in_axes=(0, None, None, None))(model.net, model, obs, action)
    opinions = model.change.unscale(opinions)  # (R, M, B, S+1)
    member = jnp.arange(config.members)
    next_obs, _, continuation = _finish_step(model, known, config, obs, action, opinions[member, member])
    return next_obs, _learned_reward(model, config, opinions), continuation


def _finish_step(
    model: Dynamics, known: Known, config: DynamicsConfig, obs: Array, action: Array, change: Array
) -> tuple[Array, Array, Array]:
    """From a predicted change to next state, reward and continuation, known functions first."""
    next_obs = obs + change[..., : obs.shape[-1]]
    if config.stay_in_data:
        next_obs = model.obs.clip(next_obs)
    if known.reward is not None:
        reward = known.reward(obs, action, next_obs)
    else:
        reward = _learned_reward(model, config, change)
    if known.termination is not None:
        terminated = known.termination(obs, action, next_obs)
    else:
        assert model.termination_net is not None
        # A hard threshold: a probability multiplied over the horizon decays for healthy states as well.
        terminated = _termination_logit(model.termination_net, model, obs, action, next_obs) > 0.0
    return next_obs, reward, 1.0 - terminated.astype(jnp.float32)


def _learned_reward(model: Dynamics, config: DynamicsConfig, change: Array) -> Array:
    return (model.change.clip(change) if config.stay_in_data else change)[..., -1]


def open_loop_error(
    model: Dynamics, block: Transition, num_rows: Array, depths: tuple[int, ...]
) -> dict[int, Array]:
    """Mean squared error of the state after k steps of the logged actions, in units of the data's spread.

    Measured on a block *before* the model is fitted to it, so that no data is held back and none is
    judged by a model that has seen it (prequential error; Dawid 1984). Segments stay within an episode.
    The ensemble's mean is what is judged.
    """
    errors = {}
    obs, horizon = block.obs, block.reward.shape[0]
    row = jnp.arange(horizon)
    for k in range(1, max(depths) + 1):
        here = jnp.minimum(row + k - 1, horizon - 1)
        predicted = jnp.mean(
            jax.vmap(_predict, in_axes=(0, None, None, None))(model.net, model, obs, block.action[here]),
            axis=0,
        )
        obs = model.obs.clip(obs + model.change.unscale(predicted)[:, : obs.shape[-1]])
        if k in depths:
            scale = jnp.broadcast_to(model.obs.std, obs.shape)
            error = jnp.mean(jnp.square((obs - block.next_obs[here]) / scale), axis=-1)
            valid = (row + k <= num_rows) & (block.episode[here] == block.episode)
            count = jnp.sum(valid, dtype=jnp.float32)
            errors[k] = jnp.sum(jnp.where(valid, error, 0.0)) / jnp.maximum(count, 1.0)
    return errors
