"""An agent whose nets see z-scored observations: any agent, and the statistics, in one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
from jaxtyping import Array

from mve.agents.base import Agent, Objective
from mve.networks import Normaliser
from mve.policies import Policy
from mve.types import (
    ActorValueFn,
    CriticTargets,
    Key,
    Metrics,
    PolicyFn,
    PolicyOfFn,
    SharedObjective,
    Transition,
)


class NormalisedPolicy(Policy):
    """A policy of z-scored observations."""

    policy: Policy
    mean: jax.Array
    std: jax.Array

    def __call__(self, obs: Any, noise: Any) -> Any:
        return self.policy((obs - self.mean) / self.std, noise)

    def log_density(self, obs: Any, action: Any) -> Any:
        return self.policy.log_density((obs - self.mean) / self.std, action)


class NormalisedAgent(Agent):
    """The agent within sees z-scored observations and nothing else; everything outside sees real ones.

    The statistics are those of every state that a real step led to, and move on with every block: between
    two blocks they are constants, of which no gradient is taken.
    """

    inner: Agent
    view: Normaliser

    @property
    def num_updates(self) -> Array:
        return self.inner.num_updates  # pyright: ignore[reportAttributeAccessIssue]

    def action_values(self, obs: Array, action: Array) -> Array:
        return self.inner.action_values(self.view.scale(obs), action)

    def policy(self) -> Policy:
        return self._of_real_obs(self.inner.policy())

    def exploration_policy(self, key: Key) -> Policy:
        return self._of_real_obs(self.inner.exploration_policy(key))

    def _of_real_obs(self, policy: Policy) -> Policy:
        return NormalisedPolicy(policy=policy, mean=self.view.mean, std=self.view.std)

    def target_policy(self, obs: Array, key: Key) -> tuple[Array, Array]:
        return self.inner.target_policy(self.view.scale(obs), key)

    def target_value(self, obs: Array, key: Key) -> Array:
        return self.inner.target_value(self.view.scale(obs), key)

    def target_action_value(self, obs: Array, action: Array) -> Array:
        return self.inner.target_action_value(self.view.scale(obs), action)

    def log_density(self, obs: Array, action: Array) -> Array:
        return self.inner.log_density(self.view.scale(obs), action)

    def current_policy(self, obs: Array, key: Key) -> tuple[Array, Array]:
        return self.inner.current_policy(self.view.scale(obs), key)

    def acting(self) -> tuple[Any, PolicyOfFn]:
        actor, policy_of = self.inner.acting()
        return actor, lambda actor: self._before(policy_of(actor))

    def _before(self, ask: PolicyFn) -> PolicyFn:
        """The same of real observations; also for an actor's value, which is asked alike."""
        return lambda obs, key: ask(self.view.scale(obs), key)

    def observed(self, block: Transition, num_rows: Array) -> NormalisedAgent:
        return replace(self, view=self.view.observe(block.next_obs, num_rows))

    def told(self, gain: Array, paid: Array, discount: float) -> NormalisedAgent:
        return replace(self, inner=self.inner.told(gain, paid, discount))

    def with_new_optimisers(self) -> NormalisedAgent:
        return replace(self, inner=self.inner.with_new_optimisers())

    def update(
        self, targets: CriticTargets, obs: Array, objective: Objective, key: Key
    ) -> tuple[NormalisedAgent, Metrics]:
        seen = targets._replace(obs=self.view.scale(targets.obs))
        inner, metrics = self.inner.update(seen, self.view.scale(obs), self._objective(objective, obs), key)
        return replace(self, inner=inner), metrics

    def _objective(self, objective: Objective, start_obs: Array) -> Objective:
        """As the agent within has to be asked: it knows scaled starts, the model only real ones."""
        if objective is None:
            return None
        if isinstance(objective, SharedObjective):
            worth = objective.worth
            return objective._replace(worth=lambda imagined, value: worth(imagined, self._before(value)))

        def asked(policy: PolicyFn, value: ActorValueFn, obs: Array, key: Key) -> tuple[Array, Array]:
            del obs
            return objective(self._before(policy), self._before(value), start_obs, key)

        return asked
