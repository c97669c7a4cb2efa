"""Soft actor-critic with a learned temperature (Haarnoja et al. 2018b, arXiv 1812.05905)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import reduce
from typing import Annotated, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array
from msgspec import Meta

from mve.agents import values
from mve.agents.base import (
    ActorCriticConfig,
    Agent,
    Objective,
    actor_gradient,
    adam_step,
    critic_loss,
    critic_outputs,
    drawn,
    init_adam,
    init_critic,
    init_net,
    polyak,
)
from mve.agents.values import ValueBounds
from mve.networks import MLP
from mve.policies import ActorPolicy, GaussianActor, Policy
from mve.types import (
    ActorValueFn,
    Count,
    CriticTargets,
    Key,
    Metrics,
    NonNegative,
    PolicyFn,
    PolicyOfFn,
    Rate,
    Unit,
    UserError,
)

BOUNDED = {  # settings that ask for bounds of values, and what they do to them
    "value_bins": "divides the bounds of values",
    "value_margin": "goes beyond bounds of values",
    "preserve_values": "keeps values where their bounds move",
}


@dataclass(frozen=True, kw_only=True)
class SACConfig(ActorCriticConfig):
    """The paper's settings; its networks are 2 x 256."""

    temperature_learning_rate: Rate = 3e-4
    """Adam's step size for log alpha."""
    initial_temperature: Rate = 1.0
    """alpha at the start."""
    target_entropy: Annotated[float, Meta(ge=-1e6, le=1e6)] | None = None
    """In nats; None for `entropy_per_action` times the number of action dimensions."""
    entropy_per_action: Annotated[float, Meta(ge=-100, le=100)] = -1.0
    """In nats, of the target (MBPO: about -0.5, task by task)."""
    target_critics: Count = 0
    """Critics drawn at random for each target, of which the least counts (REDQ, DHMBPO: 2); 0: all."""
    actor_value: Literal["least", "mean"] = "least"
    """Which of the critics' values the actor is to raise (DHMBPO: mean)."""
    actor_rate_falls_after: Count = 0
    """Updates from which on the actor's step size falls, as the inverse square root of their number (ours);
    0: it stays. Steps of one size keep a sharp gait wavering however long it has been learned."""
    average_share: Unit = 0.0
    """Share of all updates so far, the latest ones, over which the actor that is evaluated and kept is about
    an average (Shamir and Zhang 2013, arXiv 1212.1824, section 4; of weights: Izmailov et al. 2018, arXiv
    1803.05407); 0: it is the newest. It wavers less from update to update than that one, by which real and
    imagined steps are taken."""
    value_bounds_rate: Unit = 0.0
    """Where above 0, values are scaled to bounds that move so far towards those of the newest batch at each
    update (DHMBPO: 3e-4), and targets are clipped to them; 0 and every reward in the replay are within."""
    value_margin: NonNegative = 0.0
    """How far beyond those bounds targets may lie before they are clipped, in half distances of the bounds:
    these follow slowly where values rise fast."""
    value_bins: Count = 0
    """Bins of a histogram over the bounds that critics learn by cross-entropy, their values being its mean
    (HL-Gauss: Farebrother et al. 2024, arXiv 2403.03950, who have 101); 0: values by squared error."""
    spare_bins: Count = 3
    """Of those bins, how many lie beyond either bound (ours). Without them a target on a bound is learned
    0.37 bins inside it, and more than one bin once it has been bootstrapped from."""
    preserve_values: bool = False
    """Whether the critics' last layers make up for what the bounds have moved, so that no value changes by
    that alone (PopArt, van Hasselt et al. 2016, arXiv 1602.07714, section 2.1). Otherwise all values grow
    with the bounds, those bootstrapped from as well (DHMBPO)."""

    @property
    def targets_by_current_actor(self) -> bool:
        return True

    @property
    def scales_values(self) -> bool:
        return self.value_bounds_rate > 0

    @property
    def draws_critics(self) -> bool:
        return 0 < self.target_critics < self.critics

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target_critics > self.critics:
            raise UserError(
                f"agent.target_critics = {self.target_critics} is more than agent.critics = {self.critics}; "
                "lower it"
            )
        for name, does in BOUNDED.items():
            if getattr(self, name) and not self.scales_values:
                without = str(getattr(SACConfig, name)).lower()
                raise UserError(
                    f"agent.{name} = {getattr(self, name)} {does}, and there are none; "
                    f"set agent.value_bounds_rate, 3e-4 is usual, or agent.{name}={without}"
                )
        if 0 < self.value_bins < 3 + 2 * self.spare_bins:
            raise UserError(
                f"agent.value_bins = {self.value_bins} says next to nothing, {self.spare_bins} of them "
                "beyond either bound (agent.spare_bins); 101 is usual"
            )
        if self.value_bins and self.preserve_values:
            raise UserError(
                "a histogram moves with its bounds; set agent.preserve_values=false or agent.value_bins=0"
            )
        if self.value_bins and self.value_margin:
            raise UserError(
                "a histogram ends where its bounds are; set agent.value_margin=0 or agent.value_bins=0"
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
    average_actor: GaussianActor | None  # None where the actor itself is evaluated
    critic: MLP
    target_critic: MLP
    log_temperature: jax.Array
    actor_opt: optax.OptState
    critic_opt: optax.OptState
    temperature_opt: optax.OptState
    num_updates: jax.Array
    bounds: ValueBounds | None  # None where values are not scaled
    action_size: int = eqx.field(static=True)
    config: SACConfig = eqx.field(static=True)

    @classmethod
    def init(cls, config: SACConfig, obs_size: int, action_size: int, key: Key) -> SAC:
        actor_key, critic_key = jax.random.split(key)
        net = init_net(config, obs_size, 2 * action_size, actor_key)
        actor = GaussianActor(net)
        critic = init_critic(config, obs_size, action_size, critic_key, outputs=max(config.value_bins, 1))
        log_temperature = jnp.log(jnp.float32(config.initial_temperature))
        return cls(
            actor=actor,
            average_actor=jax.tree.map(jnp.copy, actor) if config.average_share else None,
            critic=critic,
            target_critic=jax.tree.map(jnp.copy, critic),
            log_temperature=log_temperature,
            actor_opt=init_adam(config.actor_learning_rate, actor),
            critic_opt=init_adam(config.critic_learning_rate, critic),
            temperature_opt=init_adam(config.temperature_learning_rate, log_temperature),
            num_updates=jnp.int32(0),
            bounds=ValueBounds.unknown() if config.scales_values else None,
            action_size=action_size,
            config=config,
        )

    def _values(self, critic: MLP, obs: Array, action: Array) -> Array:
        outputs = critic_outputs(critic, obs, action)
        net = values.expected(outputs, self.config.spare_bins) if self.config.value_bins else outputs[..., 0]
        return net if self.bounds is None else self.bounds.unscale(net)

    def _critic_loss(self, critic: MLP, targets: CriticTargets) -> tuple[Array, Metrics]:
        """The squared error, or the cross-entropy of the histograms, summed over the critics."""
        if not self.config.value_bins:
            return critic_loss(critic, targets, value_of=self._values)
        assert self.bounds is not None  # refused by the settings
        logits = critic_outputs(critic, targets.obs, targets.action)
        wanted = jnp.broadcast_to(self.bounds.scale(targets.value), logits.shape[:-1])
        weight = jnp.broadcast_to(targets.weight, wanted.shape)
        loss = jnp.sum(weight * values.cross_entropy(logits, wanted, self.config.spare_bins))
        value = self.bounds.unscale(values.expected(logits, self.config.spare_bins))
        return loss, {"train/critic_loss": loss, "train/q_mean": jnp.mean(value)}

    def told(self, gain: Array, paid: Array, discount: float) -> SAC:
        if self.bounds is None:
            return self
        bounds = self.bounds.told(gain, paid, discount, self.config.value_bounds_rate)
        if not self.config.preserve_values:
            return replace(self, bounds=bounds)
        critic, target_critic = (
            bounds.carried_over(critic, self.bounds) for critic in (self.critic, self.target_critic)
        )
        return replace(self, bounds=bounds, critic=critic, target_critic=target_critic)

    def action_values(self, obs: Array, action: Array) -> Array:
        return self._values(self.critic, obs, action)

    def policy(self) -> Policy:
        actor = self.actor if self.average_actor is None else self.average_actor
        return ActorPolicy(actor=actor, noise_std=jnp.float32(0))

    def exploration_policy(self, key: Key) -> Policy:
        del key
        return ActorPolicy(actor=self.actor, noise_std=jnp.float32(0))  # the Gaussian actor's own noise

    def _sample(self, actor: GaussianActor, obs: Array, key: Key) -> tuple[Array, Array]:
        return actor.sample(obs, jax.random.normal(key, (*obs.shape[:-1], self.action_size)))

    def target_policy(self, obs: Array, key: Key) -> tuple[Array, Array]:
        return self._policy_of(self.actor)(obs, key)

    def target_action_value(self, obs: Array, action: Array) -> Array:
        return self._values(self.target_critic, obs, action)

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
        value = self._values(critic, obs, action)
        return value + jnp.broadcast_to(bonus, value.shape)

    def acting(self) -> tuple[GaussianActor, PolicyOfFn]:
        return self.actor, self._policy_of

    def _policy_of(self, actor: GaussianActor) -> PolicyFn:
        """The policy that another actor would be, at the temperature of now."""

        def policy(obs: Array, key: Key) -> tuple[Array, Array]:
            action, log_density = self._sample(actor, obs, key)
            return action, -jnp.exp(self.log_temperature) * log_density

        return policy

    def _actor_share(self) -> Array | float:
        """Of its first step size, what is left of the actor's by now."""
        if not (steady := self.config.actor_rate_falls_after):
            return 1.0
        return jnp.sqrt(steady / jnp.maximum(self.num_updates, steady).astype(jnp.float32))

    def _clipped(self, targets: CriticTargets) -> tuple[CriticTargets, Metrics]:
        """Targets within the bounds and the margin around them. Published: the bootstrap alone is clipped."""
        if (bounds := self.bounds) is None:
            return targets, {}
        margin = self.config.value_margin * bounds.width
        value = jnp.clip(targets.value, bounds.low - margin, bounds.high + margin)
        return targets._replace(value=value), {
            "train/target_clipped": jnp.mean(value != targets.value, dtype=jnp.float32),
            "train/value_low": bounds.low,
            "train/value_high": bounds.high,
        }

    def update(
        self, targets: CriticTargets, obs: Array, objective: Objective, key: Key
    ) -> tuple[SAC, Metrics]:
        cfg = self.config
        targets, clip_metrics = self._clipped(targets)
        critic_gradient, metrics = jax.grad(self._critic_loss, has_aux=True)(self.critic, targets)
        metrics |= clip_metrics
        critic, critic_opt = adam_step(
            cfg.critic_learning_rate, critic_gradient, self.critic_opt, self.critic
        )
        target_critic = polyak(self.target_critic, critic, cfg.target_rate)
        if objective is None:
            return replace(self, critic=critic, critic_opt=critic_opt, target_critic=target_critic), metrics

        def value_of(actor: GaussianActor) -> ActorValueFn:
            def value(obs: Array, key: Key) -> tuple[Array, Array]:
                action, bonus = self._policy_of(actor)(obs, key)
                opinions = self._values(critic, obs, action)
                # Not jnp.min, whose derivative divides by how many values equal the least: none of them do
                # where the compiler has computed them twice and rounded differently.
                least = reduce(jnp.minimum, [*opinions]) if cfg.actor_value == "least" else None
                value = jnp.mean(opinions, axis=0) if least is None else least
                return value + bonus, bonus

            return value

        (loss, bonus), gradient = actor_gradient(objective, self._policy_of, value_of, self.actor, obs, key)
        actor_rate = cfg.actor_learning_rate * self._actor_share()
        actor, actor_opt = adam_step(actor_rate, gradient, self.actor_opt, self.actor)
        temperature = jnp.exp(self.log_temperature)
        log_density = -bonus / temperature

        target_entropy = cfg.target_entropy
        if target_entropy is None:
            target_entropy = cfg.entropy_per_action * self.action_size
        temperature_gradient = -(log_density + target_entropy)  # of -log_alpha (log pi + target)
        log_temperature, temperature_opt = adam_step(
            cfg.temperature_learning_rate, temperature_gradient, self.temperature_opt, self.log_temperature
        )
        average = self.average_actor
        share_of_newest = 1.0 / (1.0 + cfg.average_share * self.num_updates.astype(jnp.float32))
        agent = SAC(
            actor=actor,
            average_actor=None if average is None else polyak(average, actor, share_of_newest),
            critic=critic,
            target_critic=target_critic,
            log_temperature=log_temperature,
            actor_opt=actor_opt,
            critic_opt=critic_opt,
            temperature_opt=temperature_opt,
            num_updates=self.num_updates + 1,
            bounds=self.bounds,
            action_size=self.action_size,
            config=cfg,
        )
        return agent, metrics | {
            "train/actor_loss": loss,
            "train/ent_coef": temperature,
            "train/entropy": -log_density,
        }
