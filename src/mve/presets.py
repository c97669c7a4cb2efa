"""The methods by name: each a row of settings, not a class. `mve list` shows them."""

from __future__ import annotations

import types
from collections.abc import Mapping
from typing import Literal, NamedTuple

DEFAULT_ALGO = "mve-sac"
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

# 500 random steps of CartPole are two dozen episodes, enough to begin with.
_DISCRETE = {
    "train.learning_starts": 500,
    "dynamics.learning_starts": 500,
    "train.updates_per_step": 4.0,
}

PRESETS: dict[str, Preset] = {
    "ddpg": Preset(
        "DDPG with LayerNorm and adaptive parameter noise: the learner that MVE was first built on",
        "Lillicrap et al. 2016, arXiv 1509.02971",
        "ddpg",
        {"train.updates_per_step": 4.0},
    ),
    "td3": Preset("Twin delayed DDPG", "Fujimoto et al. 2018, arXiv 1802.09477", "td3", {}),
    "sac": Preset(
        "Soft actor-critic with a learned temperature", "Haarnoja et al. 2018, arXiv 1812.05905", "sac", {}
    ),
    "mve-ddpg": Preset(
        "MVE with the TD-k trick on DDPG, learning from 1000 steps on",
        "Feinberg et al. 2018, arXiv 1803.00101",
        "ddpg",
        {"targets.estimator": "mve_tdk", "train.updates_per_step": 4.0},
    ),
    "mve-td3": Preset(
        "MVE with the TD-k trick on TD3",
        "Feinberg et al. 2018, on Fujimoto et al. 2018",
        "td3",
        _EXPANDED,
    ),
    "mve-sac": Preset(
        "MVE with the TD-k trick on SAC: the default",
        "Feinberg et al. 2018, on Haarnoja et al. 2018",
        "sac",
        _EXPANDED,
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
            "dynamics.learning_rate": 3e-4,
            "dynamics.batch_size": 512,
            "train.updates_per_step": 4.0,
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
    "dqn": Preset(
        "Double DQN, for discrete actions",
        "Mnih et al. 2015; van Hasselt et al. 2016, arXiv 1509.06461",
        "dqn",
        _DISCRETE,
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
}
