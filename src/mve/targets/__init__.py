"""Stage 5, estimate: what should the critic say? Every value-expansion method is a choice made here.

Imagine H steps from the *real* next state s_0. With d_t = gamma * continuation_t, D_k = d_0 ... d_{k-1}
and b_t the bonus of acting in s_t (0, or SAC's entropy term), candidate k is

    C_k = sum_{t<k} D_t (b_t + r_t) + D_k V(s_k),    k = 0..H,

a value of s_0. An estimator chooses weights over the candidates and the rows to regress. The real row
always keeps its observed reward and continuation: y = r + gamma * continuation * mix.

base       settings, the two recursions that all share, the real row
fixed      one_step, mve, mve_tdk, lambda: weights that are the same for every state
ensemble   steve and its kin, calibrated: weights by what the members of a model say of the state
retrace    no model: the steps that really followed, weighted by how likely the policy was to take them
calibration   what `calibrated` knows of the model's errors, measured on steps it had not seen
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

from mve.targets import calibration
from mve.targets.base import (
    VARIANCE_FLOOR,
    TargetsConfig,
    candidate_returns,
    cut,
    joined,
    n_steps_as_one,
    real_row,
    returns_to_go,
)
from mve.targets.calibration import Calibration
from mve.targets.ensemble import (
    calibrated,
    ensemble_candidates,
    equal_weights,
    inverse_covariance_weights,
    inverse_variance_weights,
    steve,
)
from mve.targets.fixed import geometric_weights, lambda_return, mve, mve_tdk, one_step
from mve.targets.retrace import retrace
from mve.types import CriticTargets, EstimatorFns, Imagined, Segment, Transition

# What lies ahead of the real rows: retrace reads a Segment, all others an Imagined.
Estimator: TypeAlias = Callable[[Transition, Any, EstimatorFns, TargetsConfig], CriticTargets]

ESTIMATORS: dict[str, Estimator] = {
    "one_step": one_step,
    "mve": mve,
    "mve_tdk": mve_tdk,
    "lambda": lambda_return,
    "steve": steve,
    "steve_mean": partial(steve, weights_of=equal_weights),
    "steve_cov": partial(steve, weights_of=inverse_covariance_weights),
    "calibrated": calibrated,
    "retrace": retrace,
}


def estimate(
    batch: Transition, ahead: Imagined | Segment, ask: EstimatorFns, config: TargetsConfig
) -> CriticTargets:
    """The configured estimator's rows."""
    return ESTIMATORS[config.estimator](batch, ahead, ask, config)


__all__ = [
    "ESTIMATORS",
    "VARIANCE_FLOOR",
    "Calibration",
    "Estimator",
    "TargetsConfig",
    "calibrated",
    "calibration",
    "candidate_returns",
    "cut",
    "ensemble_candidates",
    "equal_weights",
    "estimate",
    "geometric_weights",
    "inverse_covariance_weights",
    "inverse_variance_weights",
    "joined",
    "lambda_return",
    "mve",
    "mve_tdk",
    "n_steps_as_one",
    "one_step",
    "real_row",
    "retrace",
    "returns_to_go",
    "steve",
]
