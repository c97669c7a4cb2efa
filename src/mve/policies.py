"""What acts: actors and the policies made of them; on JAX arrays to learn, on NumPy copies to act."""

from __future__ import annotations

import abc
import math
from functools import reduce
from typing import Any

import equinox as eqx
import jax
import numpy as np
from jaxtyping import Array

from mve.networks import MLP, array_module

LOG_STD_MIN, LOG_STD_MAX = -20.0, 2.0
LOG_TWO_PI = math.log(2.0 * math.pi)
LARGEST_ACTION = 1.0 - 1e-6  # before atanh: in single precision tanh is 1 from 9 on


def held(draws: Any, uniform: Any, longest: int) -> Any:
    """Draws (T, ...), each of which stays for n <= `longest` steps, with probability proportional to n^-2.

    Independent draws at every step shake a body with inertia more than they move it; held ones take it to
    other states (Kim et al. 2026, arXiv 2604.04539, who hold for 16 steps at most). `uniform` (T,) in [0, 1)
    decides on the lengths. One row more or less changes nothing of those before it.
    """
    xp, share = array_module(draws), np.arange(1, longest + 1) ** -2.0
    up_to = np.cumsum(share / share.sum())[:-1]
    length = 1 + xp.searchsorted(xp.asarray(up_to), uniform, side="right")
    return draws[xp.searchsorted(xp.cumsum(length), xp.arange(len(draws)), side="right")]


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
    threshold: jax.Array  # t, beyond every draw for epsilon = 0

    @classmethod
    def of(cls, critics: MLP, epsilon: Array) -> EpsilonGreedy:
        """Acts on N critics with a leading critic axis."""
        count, size = critics.layers[-1].bias.shape
        members = [jax.tree.map(lambda leaf, n=n: leaf[n], critics) for n in range(count)]
        threshold = jax.scipy.special.ndtri(0.5 + 0.5 * (1.0 - epsilon) ** (1.0 / size))
        # Finite, for a policy that is not is taken for a diverged one.
        return cls(tuple(members), epsilon, jax.numpy.minimum(threshold, float(np.finfo(np.float32).max)))

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
