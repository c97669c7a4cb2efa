"""Layers, heads and scales, used by dynamics and agents only.

Every module is a pytree whose leaves are all arrays, so `jax.jit`, `jax.vmap` and the checkpoint take it
whole. The same forward pass runs on JAX arrays while learning and on NumPy copies while acting (about ten
microseconds a call, where dispatching a jitted function costs five times that).
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable
from functools import reduce
from types import ModuleType
from typing import Any, Literal, TypeAlias, TypeVar, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from mve.types import Key

Activation: TypeAlias = Literal["relu", "silu", "tanh"]
T = TypeVar("T")

LOG_STD_MIN, LOG_STD_MAX = -20.0, 2.0
LOG_TWO_PI = math.log(2.0 * math.pi)
LAYER_NORM_EPSILON = 1e-5
SMALLEST_STD = 1e-4  # a column that moves less is left unscaled
LARGEST_ACTION = 1.0 - 1e-6  # before atanh: in single precision tanh is 1 from 9 on


def array_module(x: Any) -> ModuleType:
    """NumPy for a NumPy array, `jax.numpy` for everything else."""
    return np if isinstance(x, np.ndarray) else jnp


def activate(x: Any, activation: Activation) -> Any:
    xp = array_module(x)
    if activation == "relu":
        return xp.maximum(x, 0.0)
    if activation == "silu":
        return x / (1.0 + xp.exp(-x))
    return xp.tanh(x)


class Linear(eqx.Module):
    """y = x W + b with W (inputs, outputs); weights and bias start uniform in +-gain / sqrt(inputs)."""

    weight: jax.Array
    bias: jax.Array

    def __init__(self, inputs: int, outputs: int, *, gain: float, key: Key):
        weight_key, bias_key = jax.random.split(key)
        bound = gain / np.sqrt(inputs)
        self.weight = jax.random.uniform(weight_key, (inputs, outputs), minval=-bound, maxval=bound)
        self.bias = jax.random.uniform(bias_key, (outputs,), minval=-bound, maxval=bound)

    def __call__(self, x: Any) -> Any:
        xp = array_module(x)
        y = xp.matmul(x, self.weight)
        return y + xp.broadcast_to(self.bias, y.shape)


class LayerNorm(eqx.Module):
    """Zero mean, unit variance over the last axis, then a learned scale and shift (Ba et al. 2016)."""

    scale: jax.Array
    shift: jax.Array

    def __init__(self, width: int):
        self.scale = jnp.ones((width,))
        self.shift = jnp.zeros((width,))

    def __call__(self, x: Any) -> Any:
        xp = array_module(x)
        centred = x - xp.mean(x, axis=-1, keepdims=True)
        unit = centred / xp.sqrt(xp.mean(centred * centred, axis=-1, keepdims=True) + LAYER_NORM_EPSILON)
        return unit * xp.broadcast_to(self.scale, x.shape) + xp.broadcast_to(self.shift, x.shape)


class MLP(eqx.Module):
    """Hidden layers with an optional LayerNorm before each activation, then a linear output.

    `side_layer` says which layer a second input, if there is one, is joined to: 0 is the first; the
    MVE authors' critic takes the action at layer 1, after the first hidden layer.
    """

    layers: tuple[Linear, ...]
    norms: tuple[LayerNorm, ...]
    activation: Activation = eqx.field(static=True)
    side_layer: int = eqx.field(static=True)

    def __init__(
        self,
        inputs: int,
        outputs: int,
        hidden: tuple[int, ...],
        *,
        key: Key,
        side_inputs: int = 0,
        side_layer: int = 0,
        activation: Activation = "relu",
        layer_norm: bool = False,
        hidden_gain: float = 1.0,
        output_gain: float = 1.0,
    ):
        keys = jax.random.split(key, len(hidden) + 1)
        fan_in = [inputs, *hidden]
        fan_in[side_layer] += side_inputs
        self.layers = tuple(
            Linear(fan, width, gain=gain, key=k)
            for fan, width, gain, k in zip(
                fan_in, (*hidden, outputs), (*[hidden_gain] * len(hidden), output_gain), keys, strict=True
            )
        )
        self.norms = tuple(LayerNorm(width) for width in hidden) if layer_norm else ()
        self.activation = activation
        self.side_layer = side_layer

    def __call__(self, x: Any, side: Any = None) -> Any:
        for i, layer in enumerate(self.layers):
            if side is not None and i == self.side_layer:
                x = array_module(x).concatenate([x, side], axis=-1)
            x = layer(x)
            if i < len(self.layers) - 1:
                x = activate(self.norms[i](x) if self.norms else x, self.activation)
        return x


def ensemble(make: Callable[[Key], T], members: int, key: Key) -> T:
    """`members` independent modules as one, every array with a leading member axis."""
    return jax.vmap(make)(jax.random.split(key, members))


def apply_gradient(
    optimiser: optax.GradientTransformation, gradient: T, opt_state: optax.OptState, params: T
) -> tuple[T, optax.OptState]:
    """One step of an optimiser: new parameters and its new state."""
    update, opt_state = optimiser.update(cast(Any, gradient), opt_state, cast(Any, params))
    return cast(T, optax.apply_updates(cast(Any, params), update)), opt_state


class Normaliser(eqx.Module):
    """Mean, spread and range of each column over all rows ever seen, updated block by block."""

    count: jax.Array
    mean: jax.Array
    sum_of_squares: jax.Array  # about the mean
    low: jax.Array
    high: jax.Array

    @classmethod
    def empty(cls, width: int) -> Normaliser:
        return cls(
            count=jnp.float32(0),
            mean=jnp.zeros(width),
            sum_of_squares=jnp.zeros(width),
            low=jnp.full(width, jnp.inf, jnp.float32),
            high=jnp.full(width, -jnp.inf, jnp.float32),
        )

    @property
    def std(self) -> jax.Array:
        """Standard deviation, 1 for a column that never moved: near-constant columns must not blow up."""
        std = jnp.sqrt(self.sum_of_squares / jnp.maximum(self.count, 1.0))
        return jnp.where(std < SMALLEST_STD, 1.0, std)

    def scale(self, x: Array) -> Array:
        return (x - jnp.broadcast_to(self.mean, x.shape)) / jnp.broadcast_to(self.std, x.shape)

    def unscale(self, z: Array) -> Array:
        return z * jnp.broadcast_to(self.std, z.shape) + jnp.broadcast_to(self.mean, z.shape)

    def clip(self, x: Array) -> Array:
        return jnp.clip(x, jnp.broadcast_to(self.low, x.shape), jnp.broadcast_to(self.high, x.shape))

    def observe(self, x: Float[Array, " T X"], num_rows: Array) -> Normaliser:
        """Merge the first `num_rows` rows (Chan et al. 1979: pairwise update of mean and squares)."""
        used = (jnp.arange(x.shape[0]) < num_rows)[:, None]
        count = num_rows.astype(jnp.float32)
        mean = jnp.sum(jnp.where(used, x, 0.0), axis=0) / jnp.maximum(count, 1.0)
        spread = jnp.sum(jnp.where(used, jnp.square(x - mean[None]), 0.0), axis=0)
        total = jnp.maximum(self.count + count, 1.0)
        shift = mean - self.mean
        return Normaliser(
            count=self.count + count,
            mean=self.mean + shift * count / total,
            sum_of_squares=self.sum_of_squares + spread + shift**2 * self.count * count / total,
            low=jnp.minimum(self.low, jnp.min(jnp.where(used, x, jnp.inf), axis=0)),
            high=jnp.maximum(self.high, jnp.max(jnp.where(used, x, -jnp.inf), axis=0)),
        )


class DeterministicActor(eqx.Module):
    """a = tanh(net(s))."""

    net: MLP

    def act(self, obs: Any, noise: Any) -> Any:
        del noise  # one interface with the Gaussian actor
        mean = self.net(obs)
        return array_module(mean).tanh(mean)


class GaussianActor(eqx.Module):
    """a = tanh(u), u ~ N(mean(s), std(s)): SAC's squashed Gaussian (Haarnoja et al. 2018, appendix C)."""

    net: MLP

    def _mean_and_std(self, obs: Any) -> tuple[Any, Any, Any]:
        mean, log_std = array_module(obs).split(self.net(obs), 2, axis=-1)
        log_std = array_module(obs).clip(log_std, LOG_STD_MIN, LOG_STD_MAX)
        return mean, log_std, array_module(obs).exp(log_std)

    def act(self, obs: Any, noise: Any) -> Any:
        """Re-parameterised action for standard normal noise; noise 0 gives the mode of u, squashed."""
        mean, _, std = self._mean_and_std(obs)
        return array_module(obs).tanh(mean + std * noise)

    def sample(self, obs: Any, noise: Any) -> tuple[Any, Any]:
        """Action (*batch, A) and its log-density (*batch)."""
        mean, log_std, std = self._mean_and_std(obs)
        u = mean + std * noise
        return array_module(obs).tanh(u), self._log_density(u, noise, log_std)

    def log_density(self, obs: Any, action: Any) -> Any:
        """log pi(a|s) (*batch) of any action, by u = atanh(a); actions at the rim count as just within."""
        mean, log_std, std = self._mean_and_std(obs)
        xp = array_module(obs)
        u = xp.arctanh(xp.clip(action, -LARGEST_ACTION, LARGEST_ACTION))
        return self._log_density(u, (u - mean) / std, log_std)

    def _log_density(self, u: Any, noise: Any, log_std: Any) -> Any:
        """log pi(a) = sum_i [ log N(u_i) - log(1 - tanh(u_i)^2) ], u = mean + std noise, the second term in
        its stable form 2 (log 2 - u - softplus(-2u))."""
        xp = array_module(u)
        log_normal = -0.5 * noise**2 - log_std - 0.5 * LOG_TWO_PI
        log_slope = 2.0 * (math.log(2.0) - u - xp.logaddexp(-2.0 * u, 0.0))
        return xp.sum(log_normal - log_slope, axis=-1)


def gaussian_log_density(deviation: Any, std: Any) -> Any:
    """log N(deviation; 0, std^2 I) (*batch), one `std` for all dimensions; not a number where it is 0."""
    xp = array_module(deviation)
    scaled = deviation / std
    return xp.sum(-0.5 * scaled * scaled - xp.log(std) - 0.5 * LOG_TWO_PI, axis=-1)


class Policy(eqx.Module):
    """What acts in the environment: a function of an observation and standard normal noise (*batch, A).

    Zero noise is the deterministic policy. Copied to NumPy leaves it runs on the host.
    """

    @abc.abstractmethod
    def __call__(self, obs: Any, noise: Any) -> Any:
        """Action in [-1, 1], or a one-hot vector."""

    @abc.abstractmethod
    def log_density(self, obs: Any, action: Any) -> Any:
        """log of the density, or of the probability, (*batch) with which it takes such actions."""


class ActorPolicy(Policy):
    """An actor and, for deterministic ones, the noise added to its action."""

    actor: DeterministicActor | GaussianActor
    noise_std: jax.Array

    def __call__(self, obs: Any, noise: Any) -> Any:
        xp = array_module(obs)
        return xp.clip(self.actor.act(obs, noise) + self.noise_std * noise, -1.0, 1.0)

    def log_density(self, obs: Any, action: Any) -> Any:
        """log of the density (*batch) with which it takes such actions, by the actions themselves.

        For the Gaussian actor its own; for a deterministic one the noise's, the clip to [-1, 1] ignored
        (what is cut off has mass, not density), without noise none: not a number. The density of an
        action drawn is not taken from its draw, so that the ratio of two policies at the same recorded
        action is exact where rounding or a clip has moved that action: both see the same one.
        """
        if isinstance(self.actor, GaussianActor):
            return self.actor.log_density(obs, action)
        return gaussian_log_density(action - self.actor.act(obs, 0.0), self.noise_std)


class EpsilonGreedy(Policy):
    """The action of the greatest Q(s, a) = min_n Q_n(s, a), as a one-hot vector; with probability epsilon
    one drawn uniformly (Mnih et al. 2015).

    The noise decides both, exactly: which of A independent normals has the largest magnitude is uniform,
    and independent of that magnitude, which exceeds t with probability 1 - (2 Phi(t) - 1)^A = epsilon.
    """

    critics: tuple[MLP, ...]  # each from an observation to A values
    epsilon: jax.Array
    threshold: jax.Array  # t, infinite for epsilon = 0

    @classmethod
    def of(cls, critics: MLP, epsilon: Array) -> EpsilonGreedy:
        """Acts on N critics with a leading critic axis."""
        count, size = critics.layers[-1].bias.shape
        members = [jax.tree.map(lambda leaf, n=n: leaf[n], critics) for n in range(count)]
        threshold = jax.scipy.special.ndtri(0.5 + 0.5 * (1.0 - epsilon) ** (1.0 / size))
        return cls(tuple(members), epsilon, threshold)

    def _values(self, obs: Any) -> Any:
        return reduce(array_module(obs).minimum, [critic(obs) for critic in self.critics])

    def __call__(self, obs: Any, noise: Any) -> Any:
        xp, values, magnitude = array_module(obs), self._values(obs), abs(noise)
        explores = xp.max(magnitude, axis=-1, keepdims=True) > self.threshold
        chosen = xp.argmax(xp.where(explores, magnitude, values), axis=-1)
        return xp.eye(values.shape[-1], dtype=np.float32)[chosen]

    def log_density(self, obs: Any, action: Any) -> Any:
        """log((1 - epsilon) [a is greedy] + epsilon / A) of one-hot actions (*batch, A)."""
        xp, values = array_module(obs), self._values(obs)
        is_greedy = xp.argmax(values, axis=-1) == xp.argmax(action, axis=-1)
        random = self.epsilon / values.shape[-1]
        return xp.log(xp.where(is_greedy, 1.0 - self.epsilon + random, random))
