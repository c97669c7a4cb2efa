"""The model as one pytree: nets, their noise, their scales; and what each member predicts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from mve.dynamics.limits import Limits
from mve.dynamics.settings import DynamicsConfig
from mve.networks import MLP, Normaliser, ensemble
from mve.types import Key, Known, Transition

TERMINATION_HIDDEN = (128, 128)
SMALLEST_NOISE = 1e-3  # least homoscedastic standard deviation, in scaled units (DHMBPO)
LOG_VAR_LOW, LOG_VAR_HIGH = -10.0, 0.5  # where the heteroscedastic bounds start (PETS)


class Homoscedastic(eqx.Module):
    """One standard deviation per member and output, in scaled units."""

    log_std: Float[Array, " *M O"]

    def log_var(self) -> Array:
        # A floor with a slope: clipped, a log-std that had sunk below could never rise again.
        return jnp.log(jnp.exp(2.0 * self.log_std) + SMALLEST_NOISE**2)


class Bounds(eqx.Module):
    """Learned soft bounds on the log-variance that a net puts out, per member and output (PETS)."""

    low: Float[Array, " *M O"]
    high: Float[Array, " *M O"]

    def apply(self, log_var: Float[Array, " *batch O"]) -> Float[Array, " *batch O"]:
        low, high = (jnp.broadcast_to(bound, log_var.shape) for bound in (self.low, self.high))
        log_var = high - jax.nn.softplus(high - log_var)
        return low + jax.nn.softplus(log_var - low)


Noise: TypeAlias = Homoscedastic | Bounds | None
Nets: TypeAlias = tuple[MLP, MLP | None, Noise]  # what gradients are taken of


class Dynamics(eqx.Module):
    """Everything of the model that training changes."""

    net: MLP  # (M, ...): the members
    termination_net: MLP | None
    obs: Normaliser
    action: Normaliser
    change: Normaliser  # of (next_obs - obs [, reward])
    opt_state: optax.OptState
    noise: Noise
    elites: Array | None  # members that serve imagined steps, best first; None: all
    limits: Limits | None  # of a learned termination; None: the net alone is asked

    @property
    def nets(self) -> Nets:
        return self.net, self.termination_net, self.noise


class Prediction(NamedTuple):
    """A Gaussian of the scaled change; a net without noise has none."""

    mean: Float[Array, " *batch O"]
    log_var: Float[Array, " *batch O"] | None


def init(config: DynamicsConfig, known: Known, obs_size: int, action_size: int, key: Key) -> Dynamics:
    net_key, termination_key = jax.random.split(key)
    outputs = obs_size + (known.reward is None)

    def member(k: Key) -> MLP:
        # He's bound, sqrt(6 / inputs): eight ReLU layers deep, a smaller one loses the signal.
        return MLP(
            obs_size + action_size,
            outputs * (2 if config.noise == "heteroscedastic" else 1),
            config.hidden,
            activation=config.activation,
            layer_norm=config.layer_norm,
            norm_inputs=config.norm_inputs,
            hidden_gain=6**0.5,
            key=k,
        )

    net = ensemble(member, config.members, net_key)
    termination_net = limits = None
    if known.termination is None:
        limits = Limits.empty(obs_size) if config.limits else None
        termination_net = MLP(
            2 * obs_size + action_size, 1, TERMINATION_HIDDEN, activation="relu", key=termination_key
        )
    noise = _init_noise(config, (config.members, outputs))
    return Dynamics(
        net=net,
        termination_net=termination_net,
        obs=Normaliser.empty(obs_size),
        action=Normaliser.empty(action_size),
        change=Normaliser.empty(outputs),
        opt_state=optimiser(config).init((net, termination_net, noise)),  # pyright: ignore[reportArgumentType]
        noise=noise,
        elites=jnp.arange(config.elites) if config.elites else None,
        limits=limits,
    )


def _init_noise(config: DynamicsConfig, shape: tuple[int, int]) -> Noise:
    if config.noise == "none":
        return None
    if config.noise == "homoscedastic":
        return Homoscedastic(log_std=jnp.zeros(shape))
    return Bounds(low=jnp.full(shape, LOG_VAR_LOW), high=jnp.full(shape, LOG_VAR_HIGH))


def optimiser(config: DynamicsConfig) -> optax.GradientTransformation:
    """AdamW over `Dynamics.nets`, with a rate of its own for the homoscedastic log-std.

    Adam moves a parameter by its learning rate at most: at the nets' own 1e-3, a log-std that starts at 0
    takes thousands of minibatches to come down to what the nets have long reached.
    """
    factor = config.noise_learning_rate_factor if config.noise == "homoscedastic" else 1.0

    def hasten_noise(update: Nets, params: Nets | None) -> Nets:
        del params
        net, termination_net, noise = update
        return net, termination_net, jax.tree.map(lambda u: factor * u, noise)

    def decay(update: Nets, params: Nets | None) -> Nets:
        assert params is not None
        return jax.tree.map(lambda u, p, rate: u + rate * p, update, params, _decay_rates(config, params))

    return optax.chain(
        optax.scale_by_adam(),
        optax.stateless(decay) if config.weight_decay else optax.identity(),  # pyright: ignore[reportArgumentType]
        optax.scale_by_learning_rate(config.learning_rate),
        optax.stateless(hasten_noise),  # pyright: ignore[reportArgumentType]
    )


def _decay_rates(config: DynamicsConfig, nets: Nets) -> Any:
    """Of every leaf: 0 for biases, norms and noise. The factors by layer are the members' own."""

    def rate(path: tuple[Any, ...], leaf: Array) -> float:
        del leaf
        if path[-1].name != "weight":
            return 0.0
        of_members, factors = path[0].idx == 0, config.weight_decay_by_layer
        return config.weight_decay * (factors[path[-2].idx] if factors and of_members else 1.0)

    return jax.tree_util.tree_map_with_path(rate, nets)


def only(model: Dynamics, members: Array) -> Dynamics:
    """The model of these members alone, in this order, for predicting: it cannot be fitted any further."""
    net, noise = jax.tree.map(lambda x: x[members], (model.net, model.noise))
    return replace(model, net=net, noise=noise, elites=None)


def num_members(model: Dynamics) -> int:
    return model.net.layers[0].bias.shape[0]


def change(model: Dynamics, rows: Transition) -> Array:
    """What the net predicts: the state's change, and the reward unless it is known."""
    delta = rows.next_obs - rows.obs
    learns_reward = model.change.mean.shape[-1] > delta.shape[-1]
    return jnp.concatenate([delta, rows.reward[..., None]], axis=-1) if learns_reward else delta


def observe(model: Dynamics, block: Transition, num_rows: Array, config: DynamicsConfig) -> Dynamics:
    """Take the first `num_rows` rows of a new block into the statistics, and the limits of a termination."""
    seen = (
        model.obs.observe(block.next_obs, num_rows),
        model.action.observe(block.action, num_rows),
        model.change.observe(change(model, block), num_rows),
    )
    if not config.normalise:  # mean 0, scale 1; the range is kept all the same

        def range_only(n: Normaliser) -> Normaliser:
            unit = (jnp.zeros_like(n.mean), jnp.broadcast_to(n.count, n.mean.shape))
            return eqx.tree_at(lambda m: (m.mean, m.sum_of_squares), n, unit)

        seen = tuple(range_only(n) for n in seen)
    model = eqx.tree_at(lambda m: (m.obs, m.action, m.change), model, seen)
    return model if model.limits is None else replace(model, limits=model.limits.observe(block, num_rows))


def predict(model: Dynamics, obs: Array, action: Array, *, shared: bool = False) -> Prediction:
    """Every member's prediction (M, B, O): of rows of its own (M, B, S), or of `shared` ones (B, S)."""
    rows = None if shared else 0
    return jax.vmap(_predict, in_axes=(0, 0, None, rows, rows))(model.net, model.noise, model, obs, action)


def _predict(net: MLP, noise: Noise, model: Dynamics, obs: Array, action: Array) -> Prediction:
    output = net(jnp.concatenate([model.obs.scale(obs), model.action.scale(action)], axis=-1))
    if noise is None:
        return Prediction(output, None)
    if isinstance(noise, Homoscedastic):
        return Prediction(output, jnp.broadcast_to(noise.log_var(), output.shape))
    mean, log_var = jnp.split(output, 2, axis=-1)
    return Prediction(mean, noise.apply(log_var))


def terminated(model: Dynamics, obs: Array, action: Array, next_obs: Array) -> Bool[Array, " *batch"]:
    """Whether an episode ends with a step, as far as that is learned."""
    assert model.termination_net is not None
    # A hard threshold: a probability multiplied over the horizon decays for healthy states as well.
    told = termination_logit(model.termination_net, model, obs, action, next_obs) > 0.0
    if model.limits is None:
        return told
    return jnp.where(model.limits.hold, model.limits.passed(next_obs), told)


def termination_logit(
    termination_net: MLP, model: Dynamics, obs: Array, action: Array, next_obs: Array
) -> Array:
    x = [model.obs.scale(obs), model.action.scale(action), model.obs.scale(next_obs)]
    return termination_net(jnp.concatenate(x, axis=-1))[..., 0]
