"""Twin delayed deep deterministic policy gradient (Fujimoto et al. 2018)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from mve.agents.base import (
    ActorCriticConfig,
    Agent,
    Objective,
    action_values,
    actor_gradient,
    adam_step,
    critic_loss,
    deterministic,
    init_adam,
    init_critic,
    init_net,
    polyak,
)
from mve.networks import MLP
from mve.policies import ActorPolicy, DeterministicActor, Policy, gaussian_log_density
from mve.types import ActorValueFn, CriticTargets, Key, Metrics, NonNegative, Positive


@dataclass(frozen=True, kw_only=True)
class TD3Config(ActorCriticConfig):
    """The paper's settings, in units of actions in [-1, 1]."""

    exploration_noise: NonNegative = 0.1
    """Standard deviation of the Gaussian added to each real action."""
    target_noise: NonNegative = 0.2
    """Standard deviation of the smoothing noise on the target policy's actions."""
    target_noise_clip: NonNegative = 0.5
    """Largest smoothing noise."""
    policy_delay: Positive = 2
    """Critic updates per update of the actor and of the slow copies."""

    @property
    def has_density(self) -> bool:
        return self.exploration_noise > 0 and self.target_noise > 0


class TD3(Agent):
    """One update, in this order: the critics; then, every `policy_delay` updates, the actor on the new
    first critic, and both slow copies.

    In imagination the smoothed target policy acts, as it does in the bootstrap: the value that the
    critics estimate is the smoothed policy's, and unrolling it must not change the question.
    """

    actor: DeterministicActor
    critic: MLP
    target_actor: DeterministicActor
    target_critic: MLP
    actor_opt: optax.OptState
    critic_opt: optax.OptState
    num_updates: jax.Array
    config: TD3Config = eqx.field(static=True)

    @classmethod
    def init(cls, config: TD3Config, obs_size: int, action_size: int, key: Key) -> TD3:
        actor_key, critic_key = jax.random.split(key)
        actor = DeterministicActor(init_net(config, obs_size, action_size, actor_key))
        critic = init_critic(config, obs_size, action_size, critic_key)
        return cls(
            actor=actor,
            critic=critic,
            target_actor=jax.tree.map(jnp.copy, actor),
            target_critic=jax.tree.map(jnp.copy, critic),
            actor_opt=init_adam(config.actor_learning_rate, actor),
            critic_opt=init_adam(config.critic_learning_rate, critic),
            num_updates=jnp.int32(0),
            config=config,
        )

    def action_values(self, obs: Array, action: Array) -> Array:
        return action_values(self.critic, obs, action)

    def policy(self) -> Policy:
        return ActorPolicy(actor=self.actor, noise_std=jnp.float32(0))

    def exploration_policy(self, key: Key) -> Policy:
        del key
        return ActorPolicy(actor=self.actor, noise_std=jnp.float32(self.config.exploration_noise))

    def target_policy(self, obs: Array, key: Key) -> tuple[Array, Array]:
        action = self.target_actor.act(obs, 0.0)
        clip = self.config.target_noise_clip
        noise = jnp.clip(self.config.target_noise * jax.random.normal(key, action.shape), -clip, clip)
        return jnp.clip(action + noise, -1.0, 1.0), jnp.zeros(obs.shape[:-1])

    def target_value(self, obs: Array, key: Key) -> Array:
        return action_values(self.target_critic, obs, self.target_policy(obs, key)[0])

    def target_action_value(self, obs: Array, action: Array) -> Array:
        return action_values(self.target_critic, obs, action)

    def log_density(self, obs: Array, action: Array) -> Array:
        """Of the smoothed slow actor, neither of its two clips minded."""
        return gaussian_log_density(
            action - self.target_actor.act(obs, 0.0), jnp.float32(self.config.target_noise)
        )

    def current_policy(self, obs: Array, key: Key) -> tuple[Array, Array]:
        return deterministic(self.actor)(obs, key)

    def update(
        self, targets: CriticTargets, obs: Array, objective: Objective, key: Key
    ) -> tuple[TD3, Metrics]:
        cfg = self.config
        critic_gradient, metrics = jax.grad(critic_loss, has_aux=True)(self.critic, targets)
        critic, critic_opt = adam_step(
            cfg.critic_learning_rate, critic_gradient, self.critic_opt, self.critic
        )

        if objective is None:
            target_critic = polyak(self.target_critic, critic, cfg.target_rate)
            return replace(self, critic=critic, critic_opt=critic_opt, target_critic=target_critic), metrics

        def value_of(actor: DeterministicActor) -> ActorValueFn:
            def value(obs: Array, key: Key) -> tuple[Array, Array]:
                del key
                return action_values(critic, obs, actor.act(obs, 0.0))[0], jnp.zeros(obs.shape[:-1])

            return value

        def improve() -> tuple[DeterministicActor, optax.OptState, DeterministicActor, MLP, Array]:
            (loss, _), gradient = actor_gradient(objective, deterministic, value_of, self.actor, obs, key)
            actor, actor_opt = adam_step(cfg.actor_learning_rate, gradient, self.actor_opt, self.actor)
            target_actor = polyak(self.target_actor, actor, cfg.target_rate)
            target_critic = polyak(self.target_critic, critic, cfg.target_rate)
            # Updates without an actor step report 0: scaled, so that the mean over a block is the loss.
            return actor, actor_opt, target_actor, target_critic, cfg.policy_delay * loss

        def wait() -> tuple[DeterministicActor, optax.OptState, DeterministicActor, MLP, Array]:
            return self.actor, self.actor_opt, self.target_actor, self.target_critic, jnp.float32(0)

        actor, actor_opt, target_actor, target_critic, loss = jax.lax.cond(
            (self.num_updates + 1) % cfg.policy_delay == 0, improve, wait
        )
        agent = TD3(
            actor=actor,
            critic=critic,
            target_actor=target_actor,
            target_critic=target_critic,
            actor_opt=actor_opt,
            critic_opt=critic_opt,
            num_updates=self.num_updates + 1,
            config=cfg,
        )
        return agent, metrics | {"train/actor_loss": loss}
