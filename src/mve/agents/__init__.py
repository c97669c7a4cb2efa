"""The family of agents, by name."""

from __future__ import annotations

from mve.agents.base import Agent, AgentConfig
from mve.agents.ddpg import DDPG, DDPGConfig
from mve.agents.dqn import DQN, DQNConfig
from mve.agents.normalised import NormalisedAgent
from mve.agents.sac import SAC, SACConfig
from mve.agents.td3 import TD3, TD3Config
from mve.networks import Normaliser
from mve.types import Key

AGENTS: dict[str, tuple[type[AgentConfig], type[Agent]]] = {
    "ddpg": (DDPGConfig, DDPG),
    "td3": (TD3Config, TD3),
    "sac": (SACConfig, SAC),
    "dqn": (DQNConfig, DQN),
}


def init(config: AgentConfig, obs_size: int, action_size: int, key: Key) -> Agent:
    """A fresh agent of the kind that the configuration is for."""
    for config_class, agent_class in AGENTS.values():
        if type(config) is config_class:
            agent: Agent = agent_class.init(config, obs_size, action_size, key)  # pyright: ignore[reportAttributeAccessIssue]
            if not config.normalize_obs:
                return agent
            return NormalisedAgent(inner=agent, view=Normaliser.empty(obs_size))
    raise TypeError(f"no agent takes a {type(config).__name__}")


__all__ = ["AGENTS", "Agent", "AgentConfig", "init"]
