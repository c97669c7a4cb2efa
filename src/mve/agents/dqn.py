"""Deep Q-network (Mnih et al. 2015), double by default (van Hasselt et al. 2016): an argmax for an actor."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from mve.agents.base import Agent, AgentConfig, Objective, adam_step, critic_loss, init_adam, polyak
from mve.networks import MLP, ensemble
from mve.policies import EpsilonGreedy, Policy
from mve.types import CriticTargets, Key, Metrics, Positive, Rate, Unit, UserError, Widths


@dataclass(frozen=True, kw_only=True)
class DQNConfig(AgentConfig):
    """For vectors of a few numbers and budgets of thousands of steps; the paper's are for Atari."""

    hidden: Widths = (128, 128)
    """Widths of the hidden layers."""
    layer_norm: bool = True
    """LayerNorm before each activation: it steadies several updates per step."""
    critics: Positive = 1
    """N; the greedy action is that of the least of their values."""
    batch_size: Positive = 128
    """Real transitions per update (paper: 32)."""
    critic_learning_rate: Rate = 5e-4
    """Adam's step size."""
    target_rate: Unit = 0.01
    """Share of the new network in the slow copy, per update."""
    double: bool = True
    """Target actions are the current critic's choice, valued by the slow one (van Hasselt et al. 2016,
    equation 4); False: the slow critic's own choice, as in Mnih et al. 2015."""
    epsilon_start: Unit = 1.0
    """Share of random actions before the first update (paper: 1)."""
    epsilon_end: Unit = 0.05
    """Share of random actions from `epsilon_updates` on (paper: 0.1)."""
    epsilon_updates: Positive = 1000
    """Updates over which the share falls linearly (paper: 1 000 000 frames)."""

    def __post_init__(self) -> None:
        if self.model_steps:
            raise UserError(f"agent.model_steps = {self.model_steps}: dqn has no actor; it has to be 0")


class DQN(Agent):
    """Actions are one-hot vectors, so that any estimator's rows (s, a, y) train Q(s, a) = sum_i a_i Q(s)_i.

        a*(s) = argmax_a Q(s, a)  (double)  or  argmax_a Q'(s, a),    V(s) = Q'(s, a*(s));

    a* acts in imagination as well. Of N critics the least counts, in the argmax as in the target.

    One update: an Adam step of the critics, then their slow copies move: by Polyak averaging, where the paper
    copies every 10 000 updates. The loss is a plain square where the paper clips its gradient.
    """

    discrete: ClassVar[bool] = True
    critic: MLP
    target_critic: MLP
    critic_opt: optax.OptState
    num_updates: jax.Array
    config: DQNConfig = eqx.field(static=True)

    @classmethod
    def init(cls, config: DQNConfig, obs_size: int, action_size: int, key: Key) -> DQN:
        net = partial(
            MLP,
            obs_size,
            action_size,
            config.hidden,
            activation=config.activation,
            layer_norm=config.layer_norm,
            norm_inputs=config.norm_inputs,
        )
        critic = ensemble(lambda k: net(key=k), config.critics, key)
        return cls(
            critic=critic,
            target_critic=jax.tree.map(jnp.copy, critic),
            critic_opt=init_adam(config.critic_learning_rate, critic),
            num_updates=jnp.int32(0),
            config=config,
        )

    def action_values(self, obs: Array, action: Array) -> Array:
        return chosen_values(self.critic, obs, action)

    def epsilon(self) -> Array:
        """Share of random actions now: linear in the updates, then constant."""
        progress = jnp.minimum(self.num_updates.astype(jnp.float32) / self.config.epsilon_updates, 1.0)
        return self.config.epsilon_start + (self.config.epsilon_end - self.config.epsilon_start) * progress

    def policy(self) -> Policy:
        return EpsilonGreedy.of(self.critic, jnp.float32(0))

    def exploration_policy(self, key: Key) -> EpsilonGreedy:
        del key  # the draws are the noise that the policy is given
        return EpsilonGreedy.of(self.critic, self.epsilon())

    def target_policy(self, obs: Array, key: Key) -> tuple[Array, Array]:
        del key
        critic = self.critic if self.config.double else self.target_critic
        return greedy(critic, obs), jnp.zeros(obs.shape[:-1])

    def target_value(self, obs: Array, key: Key) -> Array:
        return chosen_values(self.target_critic, obs, self.target_policy(obs, key)[0])

    def target_action_value(self, obs: Array, action: Array) -> Array:
        return chosen_values(self.target_critic, obs, action)

    def log_density(self, obs: Array, action: Array) -> Array:
        """0 where the target policy takes the action, -inf where it takes another."""
        critic = self.critic if self.config.double else self.target_critic
        return jnp.log(jnp.sum(greedy(critic, obs) * action, axis=-1))

    def current_policy(self, obs: Array, key: Key) -> tuple[Array, Array]:
        del key
        return greedy(self.critic, obs), jnp.zeros(obs.shape[:-1])

    def update(
        self, targets: CriticTargets, obs: Array, objective: Objective, key: Key
    ) -> tuple[DQN, Metrics]:
        del obs, objective, key  # an actor's
        cfg = self.config
        gradient, metrics = jax.grad(critic_loss, has_aux=True)(self.critic, targets, chosen_values)
        critic, critic_opt = adam_step(cfg.critic_learning_rate, gradient, self.critic_opt, self.critic)
        agent = DQN(
            critic=critic,
            target_critic=polyak(self.target_critic, critic, cfg.target_rate),
            critic_opt=critic_opt,
            num_updates=self.num_updates + 1,
            config=cfg,
        )
        return agent, metrics | {"train/epsilon": self.epsilon()}


def every_value(critic: MLP, obs: Float[Array, " *batch S"]) -> Float[Array, " N *batch A"]:
    """Q_n(s, a) of every action."""
    return jax.vmap(lambda member: member(obs))(critic)


def chosen_values(
    critic: MLP, obs: Float[Array, " *batch S"], action: Float[Array, " *batch A"]
) -> Float[Array, " N *batch"]:
    """Q_n(s, a) = sum_i a_i Q_n(s)_i of one-hot actions."""
    return jnp.sum(every_value(critic, obs) * action[None], axis=-1)


def greedy(critic: MLP, obs: Float[Array, " *batch S"]) -> Float[Array, " *batch A"]:
    """argmax_a min_n Q_n(s, a), one-hot; the first of equals."""
    values = jnp.min(every_value(critic, obs), axis=0)
    return jax.nn.one_hot(jnp.argmax(values, axis=-1), values.shape[-1])
