"""Fit the members: loss, minibatches, held-out rows, early stopping, elites."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from mve.dynamics import rows
from mve.dynamics.ensemble import (
    Bounds,
    Dynamics,
    Nets,
    change,
    optimiser,
    predict,
    termination_logit,
)
from mve.dynamics.judging import held_out_error
from mve.dynamics.settings import DynamicsConfig
from mve.networks import MLP, apply_gradient
from mve.types import Key, Metrics, SampleFn, Transition

BOUNDS_WEIGHT = (
    0.005  # pulls the log-variance's bounds together; PETS: 0.01, in a loss of twice the likelihood
)
SMALLEST_GAIN = 0.01  # of the held-out error, relative, that counts as an improvement (MBPO)
JUDGED_ROWS = 1024  # held-out rows that a fit is judged on (MBPO: 5000 at most)
MOST_DRAWN = 16_384  # rows looked through for them


def negative_log_likelihood(
    target: Float[Array, " *batch O"], mean: Float[Array, " *batch O"], log_var: Float[Array, " *batch O"]
) -> Float[Array, " *batch O"]:
    """-log N(target; mean, var) = ((target - mean)^2 / var + log var + log 2 pi) / 2, output by output."""
    return 0.5 * (jnp.square(target - mean) * jnp.exp(-log_var) + log_var + math.log(2 * math.pi))


def fit_step(model: Dynamics, batch: Transition, config: DynamicsConfig) -> tuple[Dynamics, Metrics]:
    """One Adam step on a minibatch with leading axes (M, B): every member sees rows of its own.

    Loss: mean squared error of the scaled change, or its negative log-likelihood, plus the cross-entropy
    of the termination if learned. Rows that are held out weigh nothing, wherever they turn up.
    """
    gradient, metrics = jax.grad(_loss, has_aux=True)(model.nets, model, batch, config)
    nets, opt_state = apply_gradient(optimiser(config), gradient, model.opt_state, model.nets)
    net, termination_net, noise = nets
    return replace(model, net=net, termination_net=termination_net, noise=noise, opt_state=opt_state), metrics


def _loss(nets: Nets, model: Dynamics, batch: Transition, config: DynamicsConfig) -> tuple[Array, Metrics]:
    net, termination_net, noise = nets
    weight, kept = rows.fitting_weights(batch.step, config)
    predicted = predict(replace(model, net=net, noise=noise), batch.obs, batch.action)
    target = model.change.scale(change(model, batch))
    of_noise = jnp.float32(0)
    if predicted.log_var is None:
        error = jnp.square(predicted.mean - target)
    elif config.noise_rows == "unseen":
        given_noise, given_mean = jax.lax.stop_gradient((predicted.log_var, predicted.mean))
        error = negative_log_likelihood(target, predicted.mean, given_noise)
        unseen = negative_log_likelihood(target, given_mean, predicted.log_var)
        of_noise = _average(unseen, rows.unseen_weights(batch.step, config))
    else:
        error = negative_log_likelihood(target, predicted.mean, predicted.log_var)
    loss = _average(error, weight)
    metrics = {"model/loss": loss}
    loss = loss + of_noise
    if isinstance(noise, Bounds):
        loss = loss + BOUNDS_WEIGHT * jnp.mean(jnp.sum(noise.high - noise.low, axis=-1))
    if termination_net is not None:
        logit = termination_logit(termination_net, model, batch.obs, batch.action, batch.next_obs)
        cross_entropy = optax.sigmoid_binary_cross_entropy(logit, 1.0 - batch.continuation)
        cross_entropy = _average(cross_entropy[..., None], kept)
        metrics["model/termination_loss"] = cross_entropy
        loss = loss + cross_entropy
    # The members' losses are independent: a sum gives each the gradient it would have alone.
    return config.members * loss, metrics


def _average(error: Float[Array, " M B O"], weight: Float[Array, " M B"] | None) -> Array:
    """Mean over members and outputs of each member's weighted mean over rows."""
    if weight is None:
        return jnp.mean(error)
    share = weight / jnp.maximum(jnp.sum(weight, axis=1, keepdims=True), 1.0)
    return jnp.mean(jnp.sum(jnp.broadcast_to(share[..., None], error.shape) * error, axis=1))


class Judges(NamedTuple):
    """Held-out rows, the same throughout a fit; fewer than asked for where few are held out so far."""

    rows: Transition  # (K, ...)
    counts: Bool[Array, " K"]


class Best(NamedTuple):
    """Each member where it did best in this fit, and how many checks went by without any member's gain."""

    net: MLP
    score: Float[Array, " M"]
    in_vain: Array


class Progress(NamedTuple):
    """What a fit carries from minibatch to minibatch; metrics are sums."""

    model: Dynamics
    metrics: Metrics
    fits: Array
    best: Best | None


def fit(
    model: Dynamics, sample_fn: SampleFn, config: DynamicsConfig, num_fits: Array, key: Key
) -> tuple[Dynamics, Metrics]:
    """Fit every member to so many minibatches of its own, or fewer where held-out rows say so.

    With `config.patience`, held-out rows are asked every `check_every` minibatches and at the end: the fit
    stops after so many checks at which no member's error fell 1 % below its best so far (MBPO's rule), and
    every member goes back to that best. The start of the fit is not among the candidates, so that the
    model follows new data even where no check shows a gain. While no row is held out nothing stops.
    Finally the members are ranked on the held-out rows, if only elites are to serve.

    Metrics are means over the minibatches; `model/fits` is their number. All are NaN if there were none.
    """
    if not config.holdout_share:
        return _minimise(model, sample_fn, config, None, num_fits, key)

    def judged(model: Dynamics, key: Key) -> tuple[Dynamics, Metrics]:
        judges_key, key = jax.random.split(key)
        judges = _judges(sample_fn, config, judges_key)
        model, metrics = _minimise(model, sample_fn, config, judges, num_fits, key)
        score = held_out_error(model, *judges)
        if model.elites is not None:
            ranked = jnp.argsort(score)[: config.elites]
            model = replace(model, elites=jnp.where(jnp.any(judges.counts), ranked, model.elites))
        return model, metrics | {"model/holdout": jnp.mean(score)}

    def skipped(model: Dynamics, key: Key) -> tuple[Dynamics, Metrics]:
        metrics = jax.eval_shape(judged, model, key)[1]
        return model, jax.tree.map(lambda m: jnp.full(m.shape, jnp.nan), metrics)

    # Most blocks of real steps owe no fit where refits are far apart: they need not judge anything.
    return jax.lax.cond(num_fits > 0, judged, skipped, model, key)


def _minimise(
    model: Dynamics,
    sample_fn: SampleFn,
    config: DynamicsConfig,
    judges: Judges | None,
    num_fits: Array,
    key: Key,
) -> tuple[Dynamics, Metrics]:
    """The minibatches of a fit; at its end every member's best weights, where they were looked for."""

    def one_fit(model: Dynamics, key: Key) -> tuple[Dynamics, Metrics]:
        return fit_step(model, _minibatch(sample_fn, config, key), config)

    def going_on(progress: Progress) -> Array:
        enough = progress.best is not None and progress.best.in_vain >= config.patience
        return (progress.fits < num_fits) & jnp.logical_not(enough)

    def body(progress: Progress) -> Progress:
        model, metrics = one_fit(progress.model, jax.random.fold_in(key, progress.fits))
        fits, best = progress.fits + 1, progress.best
        if best is not None and judges is not None:
            due = (fits % config.check_every == 0) | (fits == num_fits)
            best = jax.lax.cond(due, partial(_check, judges), lambda model, best: best, model, best)
        return Progress(model, jax.tree.map(jnp.add, progress.metrics, metrics), fits, best)

    zeros = jax.tree.map(lambda m: jnp.zeros(m.shape, m.dtype), jax.eval_shape(one_fit, model, key)[1])
    nobody = None
    if judges is not None and config.patience:
        nobody = Best(model.net, jnp.full(config.members, jnp.inf), jnp.int32(0))
    done = jax.lax.while_loop(going_on, body, Progress(model, zeros, jnp.int32(0), nobody))
    return _at_its_best(done), _mean_metrics(done)


def _at_its_best(done: Progress) -> Dynamics:
    """Adam's moments and what is learned of the noise, which the error does not judge, stay as they are."""
    if done.best is None:
        return done.model
    return replace(done.model, net=_choose(jnp.isfinite(done.best.score), done.best.net, done.model.net))


def _mean_metrics(done: Progress) -> Metrics:
    fits = jnp.where(done.fits > 0, done.fits.astype(jnp.float32), jnp.nan)
    return {name: total / fits for name, total in done.metrics.items()} | {"model/fits": fits}


def _check(judges: Judges, model: Dynamics, best: Best) -> Best:
    score = held_out_error(model, *judges)
    improved = score < (1.0 - SMALLEST_GAIN) * best.score
    patient = jnp.any(improved) | jnp.logical_not(jnp.any(judges.counts))
    return Best(
        net=_choose(improved, model.net, best.net),
        score=jnp.where(improved, score, best.score),
        in_vain=jnp.where(patient, 0, best.in_vain + 1),
    )


def _choose(which: Bool[Array, " M"], this: MLP, that: MLP) -> MLP:
    """Member by member, one of two ensembles."""

    def choose(a: Array, b: Array) -> Array:
        return jnp.where(jnp.broadcast_to(which.reshape(-1, *[1] * (a.ndim - 1)), a.shape), a, b)

    return jax.tree.map(choose, this, that)


def _minibatch(sample_fn: SampleFn, config: DynamicsConfig, key: Key) -> Transition:
    """Rows (M, B), held-out ones replaced by others as far as a few spare ones reach."""
    if not config.holdout_share:
        return sample_fn((config.members, config.batch_size), key)
    drawn = sample_fn((config.members, _draws_for(config.batch_size, 1.0 - config.holdout_share)), key)
    fitted = jnp.logical_not(rows.held_out(drawn.step, config))
    return jax.vmap(partial(_first, count=config.batch_size))(drawn, fitted)


def _judges(sample_fn: SampleFn, config: DynamicsConfig, key: Key) -> Judges:
    drawn = sample_fn((min(_draws_for(JUDGED_ROWS, config.holdout_share), MOST_DRAWN),), key)
    chosen = _first(drawn, rows.held_out(drawn.step, config), JUDGED_ROWS)
    return Judges(chosen, rows.held_out(chosen.step, config))


def _draws_for(count: int, share: float) -> int:
    """Draws that hold `count` rows of a kind with such a share, by four standard deviations."""
    return math.ceil((count + 4.0 * math.sqrt(count * (1.0 - share))) / share)


def _first(drawn: Transition, wanted: Bool[Array, " N"], count: int) -> Transition:
    """The first `count` of the rows (N, ...) that are wanted; others only where those do not suffice."""
    order = jnp.argsort(jnp.logical_not(wanted), stable=True)[:count]
    return jax.tree.map(lambda x: x[order], drawn)
