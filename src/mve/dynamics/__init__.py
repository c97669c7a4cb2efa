"""Stage 3, fit: an ensemble that predicts the next state, and what of reward and termination is unknown.

    z(s' - s [, r]) = net_m(z(s, a)) [+ noise],   p(terminated) = sigmoid(net_end(z(s, a, s'))),   z: z-score
    or, where that explains the ends:   terminated = any_i (s'_i < lower_i or s'_i > upper_i)

settings   what can be chosen, from the 8 x 128 single network of Feinberg et al. 2018 to PETS and MBPO
ensemble   the nets, their noise and their scales; what each member predicts
limits     terminations as ranges that a state has to stay within
rows       which rows of the data a member is fitted to, and which none is
fitting    loss, minibatches, early stopping, elites
serving    which member answers for which imagined row
judging    error on steps that the model has not seen

Reward and termination are either known functions, given by the caller, or learned here.
"""

from mve.dynamics.ensemble import Dynamics, Normaliser, init, observe, only, predict
from mve.dynamics.fitting import fit, fit_step
from mve.dynamics.judging import held_out_error, open_loop_error
from mve.dynamics.limits import Limits
from mve.dynamics.serving import disagreement, few_members_step, member_step, rollout_step, step
from mve.dynamics.settings import DynamicsConfig

__all__ = [
    "Dynamics",
    "DynamicsConfig",
    "Limits",
    "Normaliser",
    "disagreement",
    "few_members_step",
    "fit",
    "fit_step",
    "held_out_error",
    "init",
    "member_step",
    "observe",
    "only",
    "open_loop_error",
    "predict",
    "rollout_step",
    "step",
]
