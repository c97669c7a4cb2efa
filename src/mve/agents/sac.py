"""Soft actor-critic with a learned temperature (Haarnoja et al. 2018b, arXiv 1812.05905)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array
from msgspec import Meta

from mve.agents.base import (
    ActorCriticConfig,
    Agent,
    action_values,
    adam_step,
    critic_loss,
    drawn,
    init_adam,
    init_critic,
    init_net,
    polyak,
)
from mve.networks import MLP
from mve.policies import ActorPolicy, GaussianActor, Policy
from mve.types import Count, CriticTargets, Key, Metrics, ObjectiveFn, Rate, UserError


@dataclass(frozen=True, kw_only=True)
class SACConfig(ActorCriticConfig):
    """The paper's settings; its networks are 2 x 256."""

    temperature_learning_rate: Rate = 3e-4
    """Adam's step size for log alpha."""
    initial_temperature: Rate = 1.0
    """alpha at the start."""
    target_entropy: Annotated[float, Meta(ge=-1e6, le=1e6)] | None = None
    """In nats; None for minus the number of action dimensions."""
    target_critics: Count = 0
    """Critics drawn at random for each target, of which the least counts (REDQ, DHMBPO: 2); 0: all."""
    actor_value: Literal["least", "mean"] = "least"
    """Which of the critics' values the actor is to raise (DHMBPO: mean)."""

    def __post_init__(self) -> None:
        if self.target_critics > self.critics:
            raise UserError(
                f"agent.target_critics = {self.target_critics} is more than agent.critics = {self.critics}; "
                "lower it"
            )


class SAC(Agent):
    """Entropy along imagined steps: with the current policy pi acting in imagination,

        V(s)   = min_n Q'_n(s, a) - alpha log pi(a|s),                    a ~ pi(.|s)
        W_H    = V(s_H)
        W_t    = r_t - alpha log pi(a_t|s_t) + gamma c_t W_{t+1}          value of imagined state t
        y_real = r + gamma c W_0                                          target of the real (s, a)
        y_t    = r_t + gamma c_t W_{t+1} = W_t + alpha log pi(a_t|s_t)    target of (s_t, a_t), TD-k

    so a row is never paid for its own action's entropy, which Q does not contain, and every bonus is
    counted once: the last one inside V(s_H). H = 0 gives y_real = r + gamma c V(s'), SAC's own target.

    One update, in this order: the critics; the actor on the new critics; the temperature on the
    actor's log-densities; the slow critics. Targets were made with alpha as it was before.
    """

    actor: GaussianActor
    critic: MLP
    target_critic: MLP
    log_temperature: jax.Array
    actor_opt: optax.OptState
    critic_opt: optax.OptState
    temperature_opt: optax.OptState
    num_updates: jax.Array
    action_size: int = eqx.field(static=True)
    config: SACConfig = eqx.field(static=True)

    @classmethod
    def init(cls, config: SACConfig, obs_size: int, action_size: int, key: Key) -> SAC:
        actor_key, critic_key = jax.random.split(key)
        net = init_net(config, obs_size, 2 * action_size, actor_key)
        actor = GaussianActor(net)
        critic = init_critic(config, obs_size, action_size, critic_key)
        log_temperature = jnp.log(jnp.float32(config.initial_temperature))
        return cls(
            actor=actor,
            critic=critic,
            target_critic=jax.tree.map(jnp.copy, critic),
            log_temperature=log_temperature,
            actor_opt=init_adam(config.actor_learning_rate, actor),
            critic_opt=init_adam(config.critic_learning_rate, critic),
            temperature_opt=init_adam(config.temperature_learning_rate, log_temperature),
            num_updates=jnp.int32(0),
            action_size=action_size,
            config=config,
        )

    def action_values(self, obs: Array, action: Array) -> Array:
        return action_values(self.critic, obs, action)

    def policy(self) -> Policy:
        return ActorPolicy(actor=self.actor, noise_std=jnp.float32(0))

    def exploration_policy(self, key: Key) -> Policy:
        del key
        return self.policy()  # the Gaussian actor's own noise

    def _sample(self, actor: GaussianActor, obs: Array, key: Key) -> tuple[Array, Array]:
        return actor.sample(obs, jax.random.normal(key, (*obs.shape[:-1], self.action_size)))

    def target_policy(self, obs: Array, key: Key) -> tuple[Array, Array]:
        action, log_density = self._sample(self.actor, obs, key)
        return action, -jnp.exp(self.log_temperature) * log_density

    def target_action_value(self, obs: Array, action: Array) -> Array:
        return action_values(self.target_critic, obs, action)

    def log_density(self, obs: Array, action: Array) -> Array:
        return self.actor.log_density(obs, action)

    def current_policy(self, obs: Array, key: Key) -> tuple[Array, Array]:
        return self.target_policy(obs, key)  # SAC has no slow actor

    def target_value(self, obs: Array, key: Key) -> Array:
        critic = self.target_critic
        if self.config.target_critics:
            key, subset_key = jax.random.split(key)
            critic = drawn(critic, self.config.target_critics, subset_key)
        action, bonus = self.target_policy(obs, key)
        value = action_values(critic, obs, action)
        return value + jnp.broadcast_to(bonus, value.shape)

    def update(
        self, targets: CriticTargets, obs: Array, objective: ObjectiveFn, key: Key
    ) -> tuple[SAC, Metrics]:
        cfg = self.config
        temperature = jnp.exp(self.log_temperature)
        critic_gradient, metrics = jax.grad(critic_loss, has_aux=True)(self.critic, targets)
        critic, critic_opt = adam_step(
            cfg.critic_learning_rate, critic_gradient, self.critic_opt, self.critic
        )

        def actor_loss(actor: GaussianActor) -> tuple[Array, Array]:
            def policy(obs: Array, key: Key) -> tuple[Array, Array]:
                action, log_density = self._sample(actor, obs, key)
                return action, -temperature * log_density

            def value(obs: Array, key: Key) -> tuple[Array, Array]:
                action, bonus = policy(obs, key)
                values = action_values(critic, obs, action)
                value = jnp.min(values, axis=0) if cfg.actor_value == "least" else jnp.mean(values, axis=0)
                return value + bonus, bonus

            soft_value, bonus = objective(policy, value, obs, key)
            return -jnp.mean(soft_value), -jnp.mean(bonus) / temperature

        (loss, log_density), gradient = jax.value_and_grad(actor_loss, has_aux=True)(self.actor)
        actor, actor_opt = adam_step(cfg.actor_learning_rate, gradient, self.actor_opt, self.actor)

        target_entropy = -self.action_size if cfg.target_entropy is None else cfg.target_entropy
        temperature_gradient = -(log_density + target_entropy)  # of -log_alpha (log pi + target)
        log_temperature, temperature_opt = adam_step(
            cfg.temperature_learning_rate, temperature_gradient, self.temperature_opt, self.log_temperature
        )
        agent = SAC(
            actor=actor,
            critic=critic,
            target_critic=polyak(self.target_critic, critic, cfg.target_rate),
            log_temperature=log_temperature,
            actor_opt=actor_opt,
            critic_opt=critic_opt,
            temperature_opt=temperature_opt,
            num_updates=self.num_updates + 1,
            action_size=self.action_size,
            config=cfg,
        )
        return agent, metrics | {
            "train/actor_loss": loss,
            "train/ent_coef": temperature,
            "train/entropy": -log_density,
        }
