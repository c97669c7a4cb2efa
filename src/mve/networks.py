"""Layers, heads and scales, used by dynamics and agents only.

Every module is a pytree whose leaves are all arrays, so `jax.jit`, `jax.vmap` and the checkpoint take it
whole. The same forward pass runs on JAX arrays while learning and on NumPy copies while acting (about ten
microseconds a call, where dispatching a jitted function costs five times that).
"""

from __future__ import annotations

from collections.abc import Callable
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

LAYER_NORM_EPSILON = 1e-5
SMALLEST_STD = 1e-8  # a column that moves less, in its own units, is left unscaled
SMALLEST_SHARE = 1e-6  # and one that moves less than this of its mean, which is hardly more than rounding


def array_module(x: Any) -> ModuleType:
    """NumPy for a NumPy array, `jax.numpy` for everything else."""
    return np if isinstance(x, np.ndarray) else jnp


def activate(x: Any, activation: Activation) -> Any:
    xp = array_module(x)
    if activation == "relu":
        return xp.maximum(x, 0.0)
    if activation == "silu":
        return x * (0.5 + 0.5 * xp.tanh(0.5 * x))  # x / (1 + exp(-x)), without the division
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


def standardise(x: Any) -> Any:
    """Zero mean, unit variance over the last axis (Ba et al. 2016)."""
    return _standardised(x)[0] if isinstance(x, np.ndarray) else _standardise(x)


def _standardised(x: Any) -> tuple[Any, Any]:
    """y = (x - mean) / std, and 1 / std."""
    xp = array_module(x)
    centred = x - xp.mean(x, axis=-1, keepdims=True)
    scale = 1.0 / xp.sqrt(xp.mean(centred * centred, axis=-1, keepdims=True) + LAYER_NORM_EPSILON)
    return centred * scale, scale


@jax.custom_vjp
def _standardise(x: Array) -> Array:
    return _standardised(x)[0]


def _standardise_forwards(x: Array) -> tuple[Array, tuple[Array, Array]]:
    y, scale = _standardised(x)
    return y, (y, scale)


def _standardise_backwards(kept: tuple[Array, Array], g: Array) -> tuple[Array]:
    """dx = (g - mean(g) - y mean(g y)) / std: two passes where differentiating the formula takes four."""
    y, scale = kept
    along = jnp.mean(g * y, axis=-1, keepdims=True)
    return (scale * (g - jnp.mean(g, axis=-1, keepdims=True) - y * along),)


_standardise.defvjp(_standardise_forwards, _standardise_backwards)


class LayerNorm(eqx.Module):
    """`standardise`, then a learned scale and shift."""

    scale: jax.Array
    shift: jax.Array

    def __init__(self, width: int):
        self.scale = jnp.ones((width,))
        self.shift = jnp.zeros((width,))

    def __call__(self, x: Any) -> Any:
        xp = array_module(x)
        return standardise(x) * xp.broadcast_to(self.scale, x.shape) + xp.broadcast_to(self.shift, x.shape)


class MLP(eqx.Module):
    """Hidden layers with an optional LayerNorm before each activation, then a linear output.

    `norm_inputs` standardises what every layer but the first is given, with no parameters (DHMBPO).
    `side_layer` says which layer a second input, if there is one, is joined to: 0 is the first; the
    MVE authors' critic takes the action at layer 1, after the first hidden layer.
    """

    layers: tuple[Linear, ...]
    norms: tuple[LayerNorm, ...]
    activation: Activation = eqx.field(static=True)
    side_layer: int = eqx.field(static=True)
    norm_inputs: bool = eqx.field(static=True)

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
        norm_inputs: bool = False,
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
        self.norm_inputs = norm_inputs

    def __call__(self, x: Any, side: Any = None) -> Any:
        for i, layer in enumerate(self.layers):
            if i > 0 and self.norm_inputs:
                x = standardise(x)
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


def usable_spread(std: Any, mean: Any) -> Any:
    """Standard deviations (X,), 1 for a column that never moved but by rounding."""
    xp = array_module(std)
    return xp.where(std > xp.maximum(SMALLEST_STD, SMALLEST_SHARE * xp.abs(mean)), std, xp.ones_like(std))


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
    def spread(self) -> jax.Array:
        """Standard deviation, 0 for a column that never moved; 1 before anything was seen."""
        seen = jnp.broadcast_to(self.count > 0, self.mean.shape)
        return jnp.where(seen, jnp.sqrt(self.sum_of_squares / jnp.maximum(self.count, 1.0)), 1.0)

    @property
    def std(self) -> jax.Array:
        """Standard deviation, 1 for a column that never moved: near-constant columns must not blow up."""
        return usable_spread(self.spread, self.mean)

    def scale(self, x: Array) -> Array:
        return (x - jnp.broadcast_to(self.mean, x.shape)) / jnp.broadcast_to(self.std, x.shape)

    def unscale(self, z: Array) -> Array:
        """What was scaled; the mean where a column never moved, whatever a net makes of that."""
        return z * jnp.broadcast_to(self.spread, z.shape) + jnp.broadcast_to(self.mean, z.shape)

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
