"""What a critic's outputs stand for: a share of the bounds of values, or a histogram over them."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mve.networks import MLP

SMOOTHING = 0.75  # bins, standard deviation (Farebrother et al. 2024)
SMALLEST_WIDTH = 1e-6  # of the bounds of values, where all steps have gained the same
OUTLIERS = 0.01  # share of the steps of a batch on either side that the bounds of values leave out


class ValueBounds(eqx.Module):
    """What a value can be, as far as single steps say: Q = centre + width net, width half the distance.

    A policy that earned the same at every step would be worth r / (1 - gamma). The bounds are those of the
    1 % and the 99 % quantile of r - alpha log pi over the steps of a batch; those of the first batch as they
    are, later ones by an exponential average (Kubo et al. 2025, section 4 and code). Ours: 0 is within them
    at all times, for that is what remains to be earned where an episode ends (Hopper is paid at every step:
    without it a fall was worth what dozens of steps are), and so is every reward in the replay, or one that
    is paid in few steps, at a goal, would be cut off with the outliers.
    """

    low: Float[Array, ""]
    high: Float[Array, ""]
    known: Bool[Array, ""]

    @classmethod
    def unknown(cls) -> ValueBounds:
        return cls(low=jnp.float32(-1), high=jnp.float32(1), known=jnp.array(False))  # Q = net

    def told(
        self, gain: Float[Array, " *steps"], paid: Float[Array, " *rows"], discount: float, rate: float
    ) -> ValueBounds:
        """After a batch of steps that gained so much each; `paid` are the rewards in the replay, or 0."""
        share = jnp.where(self.known, rate, 1.0)
        low, high = jnp.quantile(gain, jnp.array([OUTLIERS, 1.0 - OUTLIERS])) / (1.0 - discount)
        return ValueBounds(
            low=jnp.minimum(self.low + share * (low - self.low), jnp.min(paid, initial=0.0)),
            high=jnp.maximum(self.high + share * (high - self.high), jnp.max(paid, initial=0.0)),
            known=jnp.array(True),
        )

    @property
    def centre(self) -> Float[Array, ""]:
        return 0.5 * (self.high + self.low)

    @property
    def width(self) -> Float[Array, ""]:
        return 0.5 * (self.high - self.low)

    def unscale(self, net: Float[Array, " *batch"]) -> Float[Array, " *batch"]:
        """The value that an output of the net stands for."""
        return self.centre + self.width * net

    def scale(self, value: Float[Array, " *batch"]) -> Float[Array, " *batch"]:
        """The output that stands for a value."""
        return (value - self.centre) / jnp.maximum(self.width, SMALLEST_WIDTH)

    def carried_over(self, critic: MLP, before: ValueBounds) -> MLP:
        """The critic whose values within these bounds are those of `critic` within other ones."""
        width = jnp.maximum(self.width, SMALLEST_WIDTH)
        factor, shift = before.width / width, (before.centre - self.centre) / width

        def last(critic: Any) -> tuple[Any, Any]:
            return critic.layers[-1].weight, critic.layers[-1].bias

        weight, bias = last(critic)
        return eqx.tree_at(last, critic, (factor * weight, factor * bias + shift))


# A histogram over the bounds: K bins with equally spaced centres in the units of a net's output, `spare` of
# them beyond -1 and as many beyond 1.


def bin_width(bins: int, spare: int) -> float:
    """Of each bin; the bounds are two apart."""
    return 2.0 / (bins - 1 - 2 * spare)


def expected(logits: Float[Array, " *batch K"], spare: int) -> Float[Array, " *batch"]:
    """The mean of the histogram."""
    bins = logits.shape[-1]
    end = 1.0 + spare * bin_width(bins, spare)
    centres = jnp.linspace(-end, end, bins)
    return jnp.sum(jax.nn.softmax(logits) * jnp.broadcast_to(centres, logits.shape), axis=-1)


def histogram(x: Float[Array, " *batch"], bins: int, spare: int) -> Float[Array, " *batch K"]:
    """The share of every bin in N(x, sigma^2), cut off beyond the outermost, sigma being 0.75 bins.

    HL-Gauss (Imani and White 2018; Farebrother et al. 2024, arXiv 2403.03950, section 3.1). Cut off, the
    mean is not x within three bins of the ends; elsewhere it is, but for a hundred thousandth of a bin.
    """
    width = bin_width(bins, spare)
    end = 1.0 + (spare + 0.5) * width
    edges = jnp.broadcast_to(jnp.linspace(-end, end, bins + 1), (*x.shape, bins + 1))
    below = jax.scipy.special.ndtr((edges - x[..., None]) / (SMOOTHING * width))
    return jnp.diff(below, axis=-1) / (below[..., -1:] - below[..., :1])


def cross_entropy(
    logits: Float[Array, " *batch K"], x: Float[Array, " *batch"], spare: int
) -> Float[Array, " *batch"]:
    """Of the histogram that stands for x, in a critic's."""
    return -jnp.sum(histogram(x, logits.shape[-1], spare) * jax.nn.log_softmax(logits), axis=-1)
