"""What can be chosen about the model, and how much of it is fitted when."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mve.networks import Activation
from mve.types import Count, NonNegative, OwnCount, Positive, Rate, Unit, UserError, Widths


@dataclass(frozen=True, kw_only=True)
class DynamicsConfig:
    """The model, and how much of it is fitted when. Settings that contradict each other are refused."""

    kind: Literal["learned", "oracle"] = "learned"
    """oracle: imagine in the true simulator, set to each state and respecting its ends; nothing is fitted,
    and no other setting of this section is read, but for learning_starts by calibrated (Feinberg et al. 2018:
    model error set apart)."""
    hidden: Widths = (200, 200, 200, 200)
    """Widths of the hidden layers (paper: eight of 128)."""
    activation: Activation = "silu"
    """Of the hidden layers (paper: relu)."""
    layer_norm: bool = False
    """LayerNorm before each activation."""
    norm_inputs: bool = False
    """LayerNorm without scale and shift before every linear layer but the first (DHMBPO: yes)."""
    members: Positive = 5
    """M, networks in the ensemble; each imagined step of a row is served by one of them (paper: 1)."""
    noise: Literal["none", "homoscedastic", "heteroscedastic"] = "none"
    """none: squared error. Otherwise a Gaussian's likelihood, whose standard deviation is homoscedastic, one
    number per member and output (DHMBPO), or heteroscedastic, an output of the net (PETS, MBPO)."""
    noise_learning_rate_factor: Rate = 10.0
    """Learning rate of the homoscedastic log-std, as a multiple of the nets' (ours; published: 1)."""
    noise_rows: Literal["fitted", "unseen"] = "fitted"
    """Which rows the homoscedastic log-std is learned on: those that the member is fitted to (DHMBPO), or
    those that its resample leaves out, on which it errs as it will on new ones (ours; asks for bootstrap)."""
    sample: Literal["none", "state", "state_and_reward"] = "none"
    """What of an imagined step the noise is drawn for, the rest being the mean (DHMBPO: state; MBPO: both).
    Where an estimator keeps members apart (STEVE) they answer with their means."""
    on_policy_corrections: bool = False
    """Whether imagined steps run beside the real ones that followed where they start: what the member that
    takes one errs by on the real step beside it, noise and all, is added to it, in the place of a draw. A
    policy that acts as it did is then imagined to fare as it did, and the model says what other actions
    change (Fröhlich et al. 2022, arXiv 2110.07985, equation 5). Beyond the episode's end and the newest step
    there is nothing to add, and noise is drawn."""
    trajectory: Literal["ts1", "tsinf"] = "ts1"
    """Who serves a row of a rollout: a member drawn anew at each step, or the same one throughout (PETS)."""
    learning_rate: Rate = 1e-3
    """Adam's step size."""
    weight_decay: NonNegative = 0.0
    """Decoupled decay of the weights (AdamW), not of biases or norms: per step, times the learning rate."""
    weight_decay_by_layer: tuple[Unit, ...] = ()
    """Factors of it, first layer to last (DHMBPO: 0.25, 0.5, 0.75, 1); none given: 1 for all."""
    batch_size: Positive = 256
    """Rows per member and minibatch (paper: 512)."""
    bootstrap: bool = False
    """Every member sees a resample of the data that is its own for good (PETS; MBPO: drawn at each fit)."""
    fits_per_step: NonNegative = 0.5
    """Minibatches per environment step, for every member (paper: 4). Not read where interval_steps is set."""
    initial_fits: Count = 1000
    """Minibatches when fitting begins, on top of the steady rate or the refits (paper: 0)."""
    learning_starts: OwnCount = 1000
    """Environment steps before the first fit (released code of the paper: 5000). auto: as many as before
    the agent learns."""
    interval_steps: Count = 0
    """Environment steps between refits (MBPO: 250); 0: fit steadily, with every block of real steps."""
    fits_per_refit: Positive = 250
    """Minibatches of a refit, at most; read where interval_steps is set."""
    holdout_share: Unit = 0.0
    """Share of the rows that no member is ever fitted to (MBPO: 0.2)."""
    holdout_chunk_steps: Positive = 100
    """Environment steps that are held out together: neighbours in time must not sit on both sides, or the
    fit is not seen to go wrong. 1: rows by themselves (MBPO)."""
    patience: Count = 0
    """Checks on held-out rows without any member's gain of 1 % that end a fit early (MBPO: 5); 0: none do."""
    check_every: Positive = 100
    """Minibatches between those checks (MBPO: a pass over the data)."""
    elites: Count = 0
    """The best so many members on held-out rows serve imagined steps (MBPO: 5 of 7); 0: all of them.
    Estimators that keep members apart hear all of them: it is their disagreement that counts there."""
    normalise: bool = True
    """z-score inputs and targets with the statistics of all data seen so far, held out or not."""
    stay_in_data: bool = True
    """Clip imagined states and learned rewards to the range seen in real data: no rollout explodes."""
    reward: Literal["auto", "known", "learned"] = "auto"
    """auto: the known function where there is one, learned otherwise."""
    termination: Literal["auto", "known", "learned", "never"] = "auto"
    """auto as for the reward; never: rollouts do not end, as in the MVE paper."""
    limits: bool = True
    """Learned terminations: whether limits of single coordinates of the next state, beyond which no episode
    has gone on, take the place of the net that learns them, for as long as they explain all but 5 % of the
    latest 1024 ends (ours)."""

    @property
    def first_fit(self) -> int:
        """Environment steps before the model was fitted at all."""
        return self.learning_starts + (0 if self.initial_fits else self.interval_steps)

    def __post_init__(self) -> None:
        if self.sample != "none" and self.noise == "none":
            raise UserError(
                f"dynamics.sample = {self.sample} needs a model of the noise; "
                "set dynamics.noise=homoscedastic or heteroscedastic"
            )
        if self.noise_rows == "unseen" and not (self.bootstrap and self.noise == "homoscedastic"):
            raise UserError(
                "dynamics.noise_rows = unseen asks for rows that a member is not fitted to, and for noise "
                "that is not the nets' own; set dynamics.bootstrap=true and dynamics.noise=homoscedastic"
            )
        layers = len(self.hidden) + 1
        if len(self.weight_decay_by_layer) not in (0, layers):
            raise UserError(
                f"dynamics.weight_decay_by_layer has {len(self.weight_decay_by_layer)} factors for {layers} "
                "layers (the hidden ones and the output); give one for each"
            )
        if self.holdout_share == 1.0:
            raise UserError("dynamics.holdout_share = 1 leaves no row to fit; lower it, 0.2 is usual")
        if self.elites > self.members:
            raise UserError(
                f"dynamics.elites = {self.elites} is more than dynamics.members = {self.members}; lower it"
            )
        for name in ("elites", "patience"):
            if getattr(self, name) and not self.holdout_share:
                raise UserError(
                    f"dynamics.{name} = {getattr(self, name)} is judged on held-out rows; "
                    "set dynamics.holdout_share, 0.2 is usual"
                )
