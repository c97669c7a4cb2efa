"""Deep deterministic policy gradient (Lillicrap et al. 2016), as the MVE paper tuned it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

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
from mve.policies import ActorPolicy, DeterministicActor, Policy
from mve.types import ActorValueFn, CriticTargets, Key, Metrics, NonNegative, Positive, Rate, Unit, Widths

NOISE_GROWTH = 1.01  # factor of one adaptation, up or down


@dataclass(frozen=True, kw_only=True)
class DDPGConfig(ActorCriticConfig):
    """Settings of the MVE paper's learner (code of February 2018) unless overridden."""

    hidden: Widths = (64, 64)
    """Widths of the hidden layers of actor and critic."""
    layer_norm: bool = True
    """LayerNorm before each activation: parameter noise needs it."""
    action_layer: int = 1
    """The action enters the critic after its first hidden layer."""
    critics: Positive = 1
    """DDPG has one critic."""
    batch_size: Positive = 512
    """Real transitions per update."""
    actor_learning_rate: Rate = 1e-3
    """Adam's step size."""
    critic_learning_rate: Rate = 1e-3
    """Adam's step size."""
    target_rate: Unit = 0.01
    """Share of the new network in the slow copy, per update."""
    exploration: Literal["parameter_noise", "gaussian"] = "parameter_noise"
    """Perturb the actor's weights for a whole block, or add noise to each action."""
    noise: NonNegative = 0.2
    """Standard deviation of exploration in units of the action range, which is 1 for this purpose."""
    noise_interval: Positive = 50
    """Updates between adaptations of the parameter noise."""

    @property
    def has_density(self) -> bool:
        return False


class DDPG(Agent):
    """One update, in this order: the critic's and the actor's gradients from the same old values, one
    Adam step each, then both slow copies move, then the parameter noise adapts."""

    actor: DeterministicActor
    critic: MLP
    target_actor: DeterministicActor
    target_critic: MLP
    actor_opt: optax.OptState
    critic_opt: optax.OptState
    noise_scale: jax.Array
    num_updates: jax.Array
    config: DDPGConfig = eqx.field(static=True)

    @classmethod
    def init(cls, config: DDPGConfig, obs_size: int, action_size: int, key: Key) -> DDPG:
        actor_key, critic_key = jax.random.split(key)
        net = init_net(config, obs_size, action_size, actor_key, output_gain=0.05)
        actor = DeterministicActor(net)
        critic = init_critic(config, obs_size, action_size, critic_key)
        return cls(
            actor=actor,
            critic=critic,
            # Copies, not fresh draws: the authors' last code starts targets apart by a slip.
            target_actor=jax.tree.map(jnp.copy, actor),
            target_critic=jax.tree.map(jnp.copy, critic),
            actor_opt=init_adam(config.actor_learning_rate, actor),
            critic_opt=init_adam(config.critic_learning_rate, critic),
            noise_scale=jnp.float32(config.noise / (len(config.hidden) + 1)),
            num_updates=jnp.int32(0),
            config=config,
        )

    def action_values(self, obs: Array, action: Array) -> Array:
        return action_values(self.critic, obs, action)

    def policy(self) -> Policy:
        return ActorPolicy(actor=self.actor, noise_std=jnp.float32(0))

    def exploration_policy(self, key: Key) -> Policy:
        if self.config.exploration == "gaussian":
            return ActorPolicy(actor=self.actor, noise_std=jnp.float32(2 * self.config.noise))
        return ActorPolicy(actor=perturb(self.actor, self.noise_scale, key), noise_std=jnp.float32(0))

    def target_policy(self, obs: Array, key: Key) -> tuple[Array, Array]:
        return deterministic(self.target_actor)(obs, key)

    def target_value(self, obs: Array, key: Key) -> Array:
        del key
        return action_values(self.target_critic, obs, self.target_actor.act(obs, 0.0))

    def target_action_value(self, obs: Array, action: Array) -> Array:
        return action_values(self.target_critic, obs, action)

    def log_density(self, obs: Array, action: Array) -> Array:
        del action
        return jnp.full(obs.shape[:-1], -jnp.inf)  # deterministic: no action of the past is its own

    def current_policy(self, obs: Array, key: Key) -> tuple[Array, Array]:
        return deterministic(self.actor)(obs, key)

    def update(
        self, targets: CriticTargets, obs: Array, objective: Objective, key: Key
    ) -> tuple[DDPG, Metrics]:
        objective_key, noise_key = jax.random.split(key)

        def value_of(actor: DeterministicActor) -> ActorValueFn:
            def value(obs: Array, key: Key) -> tuple[Array, Array]:
                del key
                values = action_values(self.critic, obs, actor.act(obs, 0.0))
                return jnp.mean(values, axis=0), jnp.zeros(obs.shape[:-1])

            return value

        cfg = self.config
        critic_gradient, metrics = jax.grad(critic_loss, has_aux=True)(self.critic, targets)
        critic, critic_opt = adam_step(
            cfg.critic_learning_rate, critic_gradient, self.critic_opt, self.critic
        )
        target_critic = polyak(self.target_critic, critic, cfg.target_rate)
        if objective is None:
            return replace(self, critic=critic, critic_opt=critic_opt, target_critic=target_critic), metrics
        (loss, _), gradient = actor_gradient(
            objective, deterministic, value_of, self.actor, obs, objective_key
        )
        actor, actor_opt = adam_step(cfg.actor_learning_rate, gradient, self.actor_opt, self.actor)
        noise_scale = jax.lax.cond(
            (self.num_updates + 1) % cfg.noise_interval == 0,
            lambda: adapted_noise_scale(actor, self.noise_scale, obs, cfg.noise, noise_key),
            lambda: self.noise_scale,
        )
        agent = DDPG(
            actor=actor,
            critic=critic,
            target_actor=polyak(self.target_actor, actor, cfg.target_rate),
            target_critic=target_critic,
            actor_opt=actor_opt,
            critic_opt=critic_opt,
            noise_scale=noise_scale,
            num_updates=self.num_updates + 1,
            config=cfg,
        )
        return agent, metrics | {"train/actor_loss": loss, "train/noise_scale": noise_scale}


def perturb(actor: DeterministicActor, scale: Array, key: Key) -> DeterministicActor:
    """The actor with N(0, scale^2) added to every weight but LayerNorm's (Plappert et al. 2018)."""
    layers, structure = jax.tree.flatten(actor.net.layers)
    keys = jax.random.split(key, len(layers))
    noisy = [w + scale * jax.random.normal(k, w.shape) for w, k in zip(layers, keys, strict=True)]
    return eqx.tree_at(lambda a: a.net.layers, actor, jax.tree.unflatten(structure, noisy))


def adapted_noise_scale(
    actor: DeterministicActor, scale: Array, obs: Array, target: float, key: Key
) -> Array:
    """One per cent up while perturbed actions differ by less than `target` (root mean square, actions
    rescaled to [0, 1]), one per cent down otherwise."""
    difference = perturb(actor, scale, key).act(obs, 0.0) - actor.act(obs, 0.0)
    distance = 0.5 * jnp.sqrt(jnp.mean(jnp.square(difference)))
    return jnp.where(distance < target, scale * NOISE_GROWTH, scale / NOISE_GROWTH)
