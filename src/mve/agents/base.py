"""Stage 6, improve: what every agent is, and the few lines that all of them share."""

from __future__ import annotations

import abc
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeAlias, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from mve.networks import MLP, Activation, apply_gradient, ensemble
from mve.policies import DeterministicActor, Policy
from mve.types import (
    ActorValueFn,
    Count,
    CriticTargets,
    Imagined,
    Key,
    Metrics,
    NonNegative,
    ObjectiveFn,
    PolicyFn,
    PolicyOfFn,
    Positive,
    Rate,
    SharedObjective,
    Transition,
    Unit,
    UserError,
    Widths,
)

Tree = TypeVar("Tree")


@dataclass(frozen=True, kw_only=True)
class AgentConfig:
    """What all agents have in common."""

    hidden: Widths = (256, 256)
    """Widths of the hidden layers of actor and critics."""
    activation: Activation = "relu"
    """Of the hidden layers."""
    layer_norm: bool = False
    """LayerNorm before each activation, in actor and critics."""
    norm_inputs: bool = False
    """In the critics, LayerNorm without scale and shift before every linear layer but the first (DHMBPO)."""
    normalize_obs: bool = False
    """Actor and critics see observations z-scored with the statistics of all real ones so far (DHMBPO)."""
    critics: Positive = 2
    """N, critics; targets use the least of their values, STEVE's their mean and spread."""
    batch_size: Positive = 256
    """Transitions per update, real ones and imagined ones together (imagination.real_share)."""
    critic_learning_rate: Rate = 3e-4
    """Adam's step size."""
    target_rate: Unit = 0.005
    """Share of the new network in the slow copy, per update (Polyak)."""
    model_steps: Count = 0
    """Model steps that the actor's objective is differentiated through before it asks the critic; 0: none."""
    critic_updates: Count = 0
    """Updates of the critics and their slow copies alone after every refit of the model (DHMBPO: 250)."""
    reset_optimisers: bool = False
    """Adam begins anew, for all that the agent learns, after every refit of the model (DHMBPO)."""

    @property
    def has_density(self) -> bool:
        """Whether target policy and exploration have densities, whose ratio Retrace is made of."""
        return True

    @property
    def targets_by_current_actor(self) -> bool:
        """Whether the policy that targets are for is the one in training, and not a slow copy of it."""
        return False

    @property
    def scales_values(self) -> bool:
        """Whether the agent wants to be told what single steps earn."""
        return False

    @property
    def draws_critics(self) -> bool:
        """Whether values of states are by some of the critics, drawn anew, those of actions by all."""
        return False


@dataclass(frozen=True, kw_only=True)
class ActorCriticConfig(AgentConfig):
    """What DDPG, TD3 and SAC have in common."""

    action_layer: Count = 0
    """Layer of the critic where the action enters: 0 beside the observation, 1 after a hidden layer."""
    actor_learning_rate: Rate = 3e-4
    """Adam's step size."""
    output_gain: NonNegative = 1.0
    """Of the critics' last layer at the start, whose weights are uniform in +-gain / sqrt(inputs); at 0
    every value is 0, or the centre of its bounds (DHMBPO)."""
    hidden_gain: NonNegative = 1.0
    """Of the critics' other layers at the start, likewise: 1 is PyTorch's, sqrt(6) He's (DHMBPO)."""

    def __post_init__(self) -> None:
        if self.action_layer > len(self.hidden):
            raise UserError(
                f"agent.action_layer = {self.action_layer} is beyond the critic's last layer, "
                f"{len(self.hidden)}, with agent.hidden = {list(self.hidden)}; lower it"
            )


Objective: TypeAlias = ObjectiveFn | SharedObjective | None


class Agent(eqx.Module):
    """A learner as one frozen pytree; every method is pure.

    It gives the expander `target_policy` and `target_value`, and takes back `CriticTargets` without
    knowing which estimator made them.
    """

    discrete: ClassVar[bool] = False  # chooses among actions, which are one-hot vectors

    @abc.abstractmethod
    def action_values(
        self, obs: Float[Array, " *batch S"], action: Float[Array, " *batch A"]
    ) -> Float[Array, " N *batch"]:
        """Q_n(s, a) of every critic in training."""

    @abc.abstractmethod
    def policy(self) -> Policy:
        """The deterministic policy that is evaluated."""

    @abc.abstractmethod
    def exploration_policy(self, key: Key) -> Policy:
        """The policy that collects the next block of real steps."""

    @abc.abstractmethod
    def target_policy(
        self, obs: Float[Array, " *batch S"], key: Key
    ) -> tuple[Float[Array, " *batch A"], Float[Array, " *batch"]]:
        """Action taken in an imagined state, and the bonus of taking it (0, or SAC's entropy term)."""

    @abc.abstractmethod
    def target_value(self, obs: Float[Array, " *batch S"], key: Key) -> Float[Array, " N *batch"]:
        """Bootstrap of a state under the target policy, bonus of its own action included, per critic."""

    @abc.abstractmethod
    def target_action_value(
        self, obs: Float[Array, " *batch S"], action: Float[Array, " *batch A"]
    ) -> Float[Array, " N *batch"]:
        """Q'_n(s, a) of every slow critic; no bonus of a in it."""

    @abc.abstractmethod
    def log_density(
        self, obs: Float[Array, " *batch S"], action: Float[Array, " *batch A"]
    ) -> Float[Array, " *batch"]:
        """log pi(a|s) of the policy whose value the critics estimate; -inf where it never acts so."""

    @abc.abstractmethod
    def current_policy(
        self, obs: Float[Array, " *batch S"], key: Key
    ) -> tuple[Float[Array, " *batch A"], Float[Array, " *batch"]]:
        """As `target_policy`, of the actor in training: it fills imagination buffers."""

    @abc.abstractmethod
    def update(
        self, targets: CriticTargets, obs: Float[Array, " B S"], objective: Objective, key: Key
    ) -> tuple[Agent, Metrics]:
        """One step of critic and actor; `objective` says what the actor, if there is one, is worth in the
        states `obs`. None: a step of the critics and their slow copies alone."""

    def acting(self) -> tuple[Any, PolicyOfFn]:
        """The actor in training, and the policy that it, or another in its place, is."""
        raise NotImplementedError

    def observed(self, block: Transition, num_rows: Array) -> Agent:
        """Having seen the first rows of a block of real steps."""
        del block, num_rows
        return self

    def told(self, gain: Float[Array, " *steps"], paid: Float[Array, " *rows"], discount: float) -> Agent:
        """Knowing what some single steps earn, bonus of acting included, and what real ones were paid; asked
        if `scales_values`."""
        del gain, paid, discount
        return self

    def with_new_optimisers(self) -> Agent:
        """Adam's states of all that is learned are as before the first step: nought throughout."""
        kinds = ("actor_opt", "critic_opt", "temperature_opt")
        names = [name for name in kinds if hasattr(self, name)]
        states = {name: jax.tree.map(jnp.zeros_like, getattr(self, name)) for name in names}
        return replace(self, **states)


def init_net(config: AgentConfig, obs_size: int, outputs: int, key: Key, *, output_gain: float = 1.0) -> MLP:
    """A net of an observation: the parameters of an action, or the values of all actions."""
    return MLP(
        obs_size,
        outputs,
        config.hidden,
        activation=config.activation,
        layer_norm=config.layer_norm,
        output_gain=output_gain,
        key=key,
    )


def init_critic(
    config: ActorCriticConfig, obs_size: int, action_size: int, key: Key, *, outputs: int = 1
) -> MLP:
    """N critics Q(s, a) with a leading critic axis."""

    def critic(k: Key) -> MLP:
        return MLP(
            obs_size,
            outputs,
            config.hidden,
            side_inputs=action_size,
            side_layer=config.action_layer,
            activation=config.activation,
            layer_norm=config.layer_norm,
            norm_inputs=config.norm_inputs,
            hidden_gain=config.hidden_gain,
            output_gain=config.output_gain,
            key=k,
        )

    return ensemble(critic, config.critics, key)


def action_values(
    critic: MLP, obs: Float[Array, " *batch S"], action: Float[Array, " *batch A"]
) -> Float[Array, " N *batch"]:
    """Q_n(s, a) of every critic."""
    return critic_outputs(critic, obs, action)[..., 0]


def critic_outputs(
    critic: MLP, obs: Float[Array, " *batch S"], action: Float[Array, " *batch A"]
) -> Float[Array, " N *batch O"]:
    """What the nets of all critics put out: values, or what stands for them."""
    return jax.vmap(lambda member: member(obs, action))(critic)


def drawn(critic: MLP, count: int, key: Key) -> MLP:
    """So many of the N critics, different ones (Chen et al. 2021, arXiv 2101.05982, algorithm 1)."""
    members = critic.layers[0].bias.shape[0]
    chosen = jax.random.choice(key, members, (count,), replace=False)
    return jax.tree.map(lambda leaf: leaf[chosen], critic)


def critic_loss(
    critic: MLP, targets: CriticTargets, value_of: Callable[[MLP, Array, Array], Array] = action_values
) -> tuple[Array, Metrics]:
    """sum_n sum_k w_k (Q_n(s_k, a_k) - y_k)^2: with weights 1/K, each critic's mean squared error, summed."""
    value = value_of(critic, targets.obs, targets.action)
    error = value - jnp.broadcast_to(targets.value, value.shape)
    loss = jnp.sum(jnp.broadcast_to(targets.weight, value.shape) * jnp.square(error))
    return loss, {"train/critic_loss": loss, "train/q_mean": jnp.mean(value)}


def actor_gradient(
    objective: ObjectiveFn | SharedObjective,
    policy_of: PolicyOfFn,
    value_of: Callable[[Tree], ActorValueFn],
    actor: Tree,
    obs: Float[Array, " B S"],
    key: Key,
) -> tuple[tuple[Array, Array], Tree]:
    """Loss, which is minus the mean of what the objective makes of an actor, its mean bonus, and gradient.

    With J(theta, tau(theta)) for the actor theta and the rollout tau under it,

        dJ/dtheta = d_theta J + (dtau/dtheta)^T d_tau J,

    whose last product a shared objective has the means for: nothing is imagined again.
    """

    def loss(value: Array, bonus: Array) -> tuple[Array, Array]:
        return -jnp.mean(value), jnp.mean(bonus)

    if not isinstance(objective, SharedObjective):
        imagining = lambda actor: loss(*objective(policy_of(actor), value_of(actor), obs, key))  # noqa: E731
        return jax.value_and_grad(imagining, has_aux=True)(actor)

    def along(actor: Tree, imagined: Imagined) -> tuple[Array, Array]:
        return loss(*objective.worth(imagined, value_of(actor)))

    result, gradients = jax.value_and_grad(along, argnums=(0, 1), has_aux=True)(actor, objective.imagined)
    at_the_end, of_rollout = gradients
    [along_rollout] = objective.pull_back(of_rollout)
    return result, jax.tree.map(jnp.add, at_the_end, along_rollout)


def deterministic(actor: DeterministicActor) -> PolicyFn:
    """The actor's action without noise; acting earns no bonus."""

    def policy(obs: Array, key: Key) -> tuple[Array, Array]:
        del key
        return actor.act(obs, 0.0), jnp.zeros(obs.shape[:-1])

    return policy


def init_adam(learning_rate: float, params: Any) -> optax.OptState:
    """Adam's state before its first step."""
    return optax.adam(learning_rate).init(params)


def adam_step(
    learning_rate: Array | float, gradient: Tree, opt_state: optax.OptState, params: Tree
) -> tuple[Tree, optax.OptState]:
    """One Adam step (Kingma and Ba 2015)."""
    return apply_gradient(optax.adam(learning_rate), gradient, opt_state, params)


def polyak(target: Tree, network: Tree, rate: Array | float) -> Tree:
    """target + rate (network - target), leaf by leaf."""
    return jax.tree.map(lambda slow, fast: slow + rate * (fast - slow), target, network)
