"""The methods by name: each a row of settings, not a class. `mve list` shows them."""

from __future__ import annotations

import types
from collections.abc import Mapping
from typing import Literal, NamedTuple

DEFAULT_ALGO = "mve-svg"
DEFAULT_DISCRETE_ALGO = "mve-dqn"


class Preset(NamedTuple):
    """A published method, or ours, as settings."""

    summary: str
    paper: str
    learner: Literal["ddpg", "td3", "sac", "dqn"]
    settings: Mapping[str, object]
    tasks: Mapping[str, Mapping[str, object]] = types.MappingProxyType({})  # by prefix of the task's name


_POSITIONS = {"env.kwargs": {"exclude_current_positions_from_observation": False}}

_MVE_2018 = {
    "targets.estimator": "mve_tdk",
    "dynamics.hidden": [128] * 8,
    "dynamics.activation": "relu",
    "dynamics.members": 1,
    "dynamics.batch_size": 512,
    "dynamics.fits_per_step": 4.0,
    "dynamics.initial_fits": 0,
    "dynamics.learning_starts": 5000,
    "dynamics.termination": "never",
    "dynamics.stay_in_data": False,
    "train.block_steps": 100,
    "train.overlap": False,
    "train.learning_starts": 10_000,
    "train.updates_per_step": 4.0,
    "train.warmup": "policy",
}

# The only tuned rates that are published: those of the authors' July 2018 settings files.
_RATES_2018 = {
    "HalfCheetah": {},
    "Swimmer": {"agent.actor_learning_rate": 1e-4},
    "Walker2d": {
        "agent.actor_learning_rate": 1e-4,
        "agent.critic_learning_rate": 1e-4,
        "agent.target_rate": 1e-3,
    },
}
_PAPER_HORIZON = {"HalfCheetah": 10, "Swimmer": 10, "Walker2d": 3}

# What expansion adds to TD3 and SAC: four updates a step, as in the paper, want a critic with LayerNorm.
_EXPANDED = {"targets.estimator": "mve_tdk", "train.updates_per_step": 4.0, "agent.layer_norm": True}

# DDPG as `paper` and `repo2018` have it, with LayerNorm and parameter noise, gets stuck at the ends of the
# action range where it learns from 1000 steps on: on Pendulum-v1 MVE never left them (seeds 0 and 1).
_DDPG = {
    "agent.layer_norm": False,
    "agent.action_layer": 0,
    "agent.exploration": "gaussian",
    "train.updates_per_step": 4.0,
}

# 500 random steps of CartPole are two dozen episodes, enough to begin with.
_DISCRETE = {
    "train.learning_starts": 500,
    "dynamics.learning_starts": 500,
    "train.updates_per_step": 4.0,
}

_MBPO_MODEL = {
    "dynamics.members": 7,
    "dynamics.elites": 5,
    "dynamics.bootstrap": True,
    "dynamics.noise": "heteroscedastic",
    "dynamics.sample": "state_and_reward",
    "dynamics.weight_decay": 5e-5,
    "dynamics.learning_starts": 5000,
    "dynamics.initial_fits": 2000,
    "dynamics.interval_steps": 250,
    "dynamics.fits_per_refit": 1000,
    "dynamics.holdout_share": 0.2,
    "dynamics.patience": 5,
}
# Kubo et al. 2025, except for the model's fit, which is ours; `dhmbpo` below adds what is its alone.
_DHMBPO = {
    "agent.hidden": [256] * 3,
    "agent.activation": "silu",
    "agent.norm_inputs": True,
    "agent.normalize_obs": True,
    "agent.output_gain": 0.0,
    "agent.value_bounds_rate": 3e-4,
    "agent.critics": 5,
    "agent.target_critics": 2,
    "agent.actor_value": "mean",
    "agent.initial_temperature": 0.1,
    "agent.model_steps": 5,
    "targets.estimator": "mve",
    "targets.horizon_steps": 4,  # and the first step, which is imagined as well
    "targets.discount": "episode",
    "imagination.starts": 256,
    "imagination.interval_updates": 20,
    "imagination.length": [20, 20],
    "imagination.rounds_kept": 10,
    "imagination.real_share": 0.0,
    "imagination.first_step": "imagined",
    "dynamics.hidden": [256] * 3,
    "dynamics.layer_norm": True,
    "dynamics.members": 8,
    "dynamics.noise": "homoscedastic",
    "dynamics.sample": "state",
    "dynamics.stay_in_data": False,
    "dynamics.reward": "learned",
    "dynamics.batch_size": 128,
    "dynamics.learning_rate": 0.002,
    "dynamics.weight_decay": 0.5,
    "dynamics.weight_decay_by_layer": [0.25, 0.5, 0.75, 1.0],
    "dynamics.learning_starts": 5000,
    "train.learning_starts": 5000,
    "train.initial_updates": 5000,
}
_DHMBPO_REFIT = {
    **_DHMBPO,
    "agent.model_steps": 3,
    "targets.horizon_steps": 2,
    "agent.critic_updates": 60,
    "dynamics.interval_steps": 250,
    "dynamics.fits_per_refit": 240,
}
_SOON = {"train.learning_starts": 1000, "dynamics.learning_starts": 1000}  # the task is learned in 5000

_DHMBPO_SOON = {task: {**_SOON, "train.initial_updates": 1000} for task in ("Pendulum", "InvertedPendulum")}


def _branches(last: int, begin: int, end: int) -> dict[str, object]:
    """Rollouts of one step to begin with, of `last` in the end."""
    return {"imagination.length": [1, last], "imagination.length_ramp": [begin, end]}


PRESETS: dict[str, Preset] = {
    "ddpg": Preset(
        "DDPG with Gaussian exploration, four updates a step",
        "Lillicrap et al. 2016, arXiv 1509.02971",
        "ddpg",
        _DDPG,
    ),
    "td3": Preset("Twin delayed DDPG", "Fujimoto et al. 2018, arXiv 1802.09477", "td3", {}),
    "sac": Preset(
        "Soft actor-critic with a learned temperature", "Haarnoja et al. 2018, arXiv 1812.05905", "sac", {}
    ),
    "dqn": Preset(
        "Double DQN, for discrete actions",
        "Mnih et al. 2015; van Hasselt et al. 2016, arXiv 1509.06461",
        "dqn",
        _DISCRETE,
    ),
    "mve-ddpg": Preset(
        "MVE with the TD-k trick on DDPG, learning from 1000 steps on",
        "Feinberg et al. 2018, arXiv 1803.00101",
        "ddpg",
        {**_DDPG, "targets.estimator": "mve_tdk"},
    ),
    "mve-ddpg-no-tdk": Preset(
        "MVE on DDPG without the TD-k trick: real rows alone are regressed",
        "Feinberg et al. 2018, arXiv 1803.00101, ablation",
        "ddpg",
        {**_DDPG, "targets.estimator": "mve"},
    ),
    "mve-td3": Preset(
        "MVE with the TD-k trick on TD3",
        "Feinberg et al. 2018, on Fujimoto et al. 2018",
        "td3",
        _EXPANDED,
    ),
    "mve-sac": Preset(
        "MVE with the TD-k trick on SAC",
        "Feinberg et al. 2018, on Haarnoja et al. 2018",
        "sac",
        _EXPANDED,
    ),
    "mve-dqn": Preset(
        "MVE with the TD-k trick on Double DQN: the default for discrete actions",
        'Feinberg et al. 2018 ("the actor may be dropped"), on Mnih et al. 2015',
        "dqn",
        {
            **_DISCRETE,
            "targets.estimator": "mve_tdk",
            # Four-step targets follow the slow critic faster than one-step ones do: a slower copy oscillates
            # less on CartPole, and then bears a larger step size.
            "agent.critic_learning_rate": 1e-3,
            "agent.target_rate": 0.005,
        },
    ),
    "lambda-sac": Preset(
        "SAC on a fixed geometric mix of imagined horizons, H = 5",
        "Sutton 1988, expanded as in the ablations of Buckman et al. 2018, arXiv 1807.01675",
        "sac",
        {**_EXPANDED, "targets.estimator": "lambda", "targets.horizon_steps": 5},
    ),
    # Estimator, critics, members and rates as published. Ours, so that it runs on a processor: the model's
    # size and fitting (8 x 512, unscaled, 10 000 minibatches first), learning from 1000 steps on, and known
    # rewards and terminations where there are any (dynamics.reward=learned crosses reward models as well).
    # Not expressed: each row trains one critic drawn at random (here every critic; they differ by their
    # start alone), targets copied every 500 updates (Polyak), the current policy in imagination (the slow
    # one), a termination net for each member (one), a penalty on actions before the tanh, epsilon-noise.
    "steve": Preset(
        "STEVE on DDPG: a horizon counts as far as models, rewards and critics agree on it",
        "Buckman et al. 2018, arXiv 1807.01675",
        "ddpg",
        {
            "targets.estimator": "steve",
            "targets.horizon_steps": 3,
            "agent.hidden": [128] * 3,
            "agent.layer_norm": False,
            "agent.action_layer": 0,
            "agent.critics": 4,
            "agent.batch_size": 512,
            "agent.actor_learning_rate": 3e-4,
            "agent.critic_learning_rate": 3e-4,
            "agent.exploration": "gaussian",
            "dynamics.members": 4,
            "dynamics.limits": False,
            "dynamics.learning_rate": 3e-4,
            "dynamics.batch_size": 512,
            "train.updates_per_step": 4.0,
        },
    ),
    "calibrated-sac": Preset(
        "SAC on the horizons that the model has proved to be good for, measured on steps it had not seen",
        "ours, after Buckman et al. 2018, arXiv 1807.01675",
        "sac",
        {**_EXPANDED, "targets.estimator": "calibrated", "targets.horizon_steps": 5},
    ),
    "retrace-sac": Preset(
        "SAC on five real steps, each trusted as far as the policy would have taken it: the model-free rival",
        "Munos et al. 2016, arXiv 1606.02647; on SAC in Palenicek et al. 2023, arXiv 2303.03955",
        "sac",
        {
            **_EXPANDED,
            "targets.estimator": "retrace",
            "targets.horizon_steps": 5,
            "targets.trace_decay": 1.0,
        },
    ),
    # The paper's rival: four imagined transitions for each real one, in a buffer of a million, and as many
    # updates on them, each of actor and critic. Rollouts follow the actor in training, not its slow copy.
    "ib-ddpg": Preset(
        "Imagination buffer on DDPG: updates on stored imagined transitions, four for each real one",
        "Kalweit and Boedecker 2017; the IB baseline of Feinberg et al. 2018, arXiv 1803.00101",
        "ddpg",
        {
            **_DDPG,
            "train.updates_per_step": 20.0,
            "imagination.starts": 16,
            "imagination.interval_steps": 20,
            "imagination.length": [5, 5],
            "imagination.rounds_kept": 12_500,
            "imagination.real_share": 0.2,
            "imagination.mixed_by": "update",
            "dynamics.termination": "never",
        },
    ),
    # As published but for the split and the stopping of the model's fit: held-out rows are named once and
    # for all, in chunks of time (a random split cannot see a fit go wrong), and a check comes every 100
    # minibatches, not once a pass. Rewards and terminations are known where they can be, as in its code.
    "mbpo": Preset(
        "SAC on short rollouts branched off real states, kept in a buffer: 20 updates a step, 5 % real rows",
        "Janner et al. 2019, arXiv 1906.08253",
        "sac",
        {
            **_MBPO_MODEL,
            "train.learning_starts": 5000,
            "train.updates_per_step": 20.0,
            "imagination.starts": 100_000,
            "imagination.interval_steps": 250,
            "imagination.rounds_kept": 4,
            "imagination.real_share": 0.05,
        },
        {
            "HalfCheetah": {"train.updates_per_step": 40.0, "agent.target_entropy": -3},
            "Hopper": {**_branches(15, 20_000, 150_000), "agent.target_entropy": -1},
            "Walker2d": {"agent.target_entropy": -3},
            "Ant": {**_branches(25, 20_000, 100_000), "agent.target_entropy": -4},
            "Humanoid": {
                **_branches(25, 20_000, 300_000),
                "agent.target_entropy": -2,
                "dynamics.hidden": [400] * 4,
                "dynamics.interval_steps": 1000,
                "imagination.interval_steps": 1000,
                "imagination.starts": 400_000,
                "imagination.rounds_kept": 5,
            },
            "InvertedPendulum": {"train.updates_per_step": 10.0, **_SOON},
            "Pendulum": {"train.updates_per_step": 10.0, **_SOON},
        },
    ),
    # Two model steps before the critic: the paper counts the critic's step too and says H = 3. Ours: the
    # ensemble in place of a GRU, networks, batches and rates of `sac` (4 x 512, 1024, 1e-4), no warm-up.
    "sac-svg": Preset(
        "SAC whose actor is improved through two steps of the model",
        "Amos et al. 2021, arXiv 2008.12775",
        "sac",
        {"agent.model_steps": 2},
    ),
    # Two horizons: 20 detached steps spread the states, five differentiated ones train actor and critic in
    # one pass. The critic never sees a real reward. Ours is the model's fit. As published it is held back by
    # dropout and by rows held out, which stop it after some hundreds to thousands of minibatches of 2048, and
    # every member weighs the rows its own way; here by decay, 500 times as strong, and LayerNorm with scale
    # and shift, after 960 minibatches of 128 at twice the rate, from all rows for every member, with ten
    # times the rate for the noise, and the optimiser's state is kept. Held back by nothing, it cost
    # HalfCheetah half of its return at 10 000 steps (docs/sample-efficiency.md). Updates come between blocks
    # of real steps and not all before an episode. Not expressed: dropout, in the critics as well (1e-3), and
    # the start of the actor (orthogonal, softplus for its spread).
    "dhmbpo": Preset(
        "SAC on imagined states alone: long rollouts spread them, short ones expand critic and actor",
        "Kubo et al. 2025, TMLR",
        "sac",
        {
            **_DHMBPO,
            "agent.hidden_gain": 2.449,  # the square root of 6: He's
            "agent.critic_updates": 250,
            "agent.reset_optimisers": True,
            "dynamics.interval_steps": 1000,
            "dynamics.fits_per_refit": 960,
        },
        _DHMBPO_SOON,
    ),
    "dhmbpo-refit": Preset(
        "DHMBPO with three-step rollouts, a model refitted four times as often, optimisers never reset",
        "ours, after Kubo et al. 2025, TMLR",
        "sac",
        _DHMBPO_REFIT,
        _DHMBPO_SOON,
    ),
    # What DHMBPO leaves on the table where steps are few. Half of the rows are real steps, which the same
    # rollouts expand, so that real rewards and falls count whatever the model says. Targets follow four
    # times as fast, for its critic was the slow part. What is drawn from replay is mostly recent: the random
    # steps before learning say little of where the policy now is. Two critics do; three imagined steps as
    # well as five. The discount is DHMBPO's: with 0.99 Hopper stays with a lunge that ends in a fall.
    # Imagined states keep to the range of real ones: one cheetah lay on its back for thousands of steps, and
    # its critic knew a way to its feet that there was not. The model's fit is that of `dhmbpo` above: held
    # back, it errs less on the steps to come, and believes in noise that is nearer to its errors. A real row
    # sums up to eight real steps before it imagines, how many being drawn: falls come back to what led to
    # them in few updates, where the model, which seldom falls, hid them from the critic. Random steps are not
    # summed, for no policy acts like that, and critics learn a histogram of values: either alone does little,
    # both together are thousands of steps sooner. From one update to the next, gaits as sharp trip or do not,
    # hence an actor that raises the least of both critics, a rate of it that falls, and an average over the
    # last twentieth of the updates for what is evaluated.
    "mve-svg": Preset(
        "MVE for the critic, value gradients for the actor, of the same three imagined steps: the default",
        "ours, after Feinberg et al. 2018, arXiv 1803.00101; Kubo et al. 2025, TMLR",
        "sac",
        {
            **_DHMBPO_REFIT,
            "agent.critics": 2,
            "agent.target_rate": 0.02,
            "agent.actor_rate_falls_after": 10_000,
            "agent.average_share": 0.05,
            "agent.actor_value": "least",
            "agent.value_bins": 101,
            "targets.n_step": 8,
            "targets.n_step_drawn": True,
            "targets.n_step_warmup": False,
            "imagination.real_share": 0.5,
            "replay.recency": 2.0,
            "dynamics.reward": "auto",
            "dynamics.stay_in_data": True,
            "train.learning_starts": "auto",
            "train.initial_updates": "auto",
            "dynamics.learning_starts": "auto",
        },
    ),
    "paper": Preset(
        "MVE-DDPG as the paper describes it: H = 10, 10, 3; batch 512; normalised model",
        "Feinberg et al. 2018, arXiv 1803.00101",
        "ddpg",
        {**_MVE_2018, "targets.horizon_steps": 10},
        {
            task: {**_POSITIONS, **rates, "targets.horizon_steps": _PAPER_HORIZON[task]}
            for task, rates in _RATES_2018.items()
        },
    ),
    "repo2018": Preset(
        "MVE-DDPG as its authors' last released settings have it: H = 5; batch 64; no normalisation; "
        "time limits end all reward",
        "Feinberg et al. 2018, code of July 2018",
        "ddpg",
        {
            **_MVE_2018,
            "targets.horizon_steps": 5,
            "agent.batch_size": 64,
            "dynamics.normalise": False,
            "env.truncation_is_terminal": True,
        },
        {task: {**_POSITIONS, **rates} for task, rates in _RATES_2018.items()},
    ),
}
