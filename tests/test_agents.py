"""The agents: what each promises in its docstring, and the expander's three functions."""

from __future__ import annotations

from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mve import agents, train
from mve.agents import AGENTS, Agent, AgentConfig
from mve.agents.base import action_values, critic_loss, drawn, polyak
from mve.agents.ddpg import DDPG, adapted_noise_scale, perturb
from mve.agents.dqn import DQN, DQNConfig
from mve.agents.sac import SAC
from mve.agents.td3 import TD3
from mve.config import build
from mve.dynamics import DynamicsConfig
from mve.networks import MLP
from mve.policies import EpsilonGreedy, GaussianActor
from mve.state import Capacity, Recipe, initial_state
from mve.targets import TargetsConfig
from mve.types import CriticTargets, Known, Transition, UserError

OBS, ACTION, ROWS = 3, 2, 8
NAMES = sorted(AGENTS)


def config(name: str, **settings: object) -> AgentConfig:
    return AGENTS[name][0](hidden=(16,), batch_size=ROWS, **settings)  # pyright: ignore


def fresh(name: str, **settings: object) -> Agent:
    return agents.init(config(name, **settings), OBS, ACTION, jax.random.key(0))


def some_targets(discrete: bool = False) -> CriticTargets:
    keys = jax.random.split(jax.random.key(1), 3)
    action = jax.random.normal(keys[1], (ROWS, ACTION))
    return CriticTargets(
        obs=jax.random.normal(keys[0], (ROWS, OBS)),
        action=jax.nn.one_hot(jnp.argmax(action, axis=-1), ACTION) if discrete else jnp.tanh(action),
        value=jax.random.normal(keys[2], (ROWS,)),
        weight=jnp.full(ROWS, 1.0 / ROWS),
    )


def same(a: object, b: object) -> bool:
    return bool(eqx.tree_equal(a, b))


@jax.jit
def update(agent: Agent, rows: CriticTargets, key: jax.Array) -> Agent:
    return agent.update(rows, rows.obs, lambda policy, value, obs, key: value(obs, key), key)[0]


def updated(agent: Agent, times: int = 1) -> Agent:
    for i in range(times):
        agent = update(agent, some_targets(agent.discrete), jax.random.key(10 + i))
    return agent


@pytest.mark.parametrize("name", NAMES)
def test_slow_copies_start_equal_to_their_networks(name: str) -> None:
    agent = fresh(name)
    assert same(agent.target_critic, agent.critic)  # pyright: ignore
    if hasattr(agent, "target_actor"):
        assert same(agent.target_actor, agent.actor)  # pyright: ignore


@pytest.mark.parametrize("name", NAMES)
def test_two_seeds_give_different_networks(name: str) -> None:
    other = agents.init(config(name), OBS, ACTION, jax.random.key(1))
    assert not same(fresh(name), other)


@pytest.mark.parametrize("name", NAMES)
def test_critics_of_one_agent_start_apart(name: str) -> None:
    agent = fresh(name, critics=3)
    q = agent.action_values(*some_targets(agent.discrete)[:2])
    assert q.shape == (3, ROWS)
    assert float(jnp.min(jnp.std(q, axis=0))) > 0


@pytest.mark.parametrize("name", NAMES)
def test_the_policy_on_the_host_is_the_policy_on_the_device(name: str) -> None:
    agent = fresh(name)
    policy = agent.exploration_policy(jax.random.key(3))
    obs, noise = np.ones((5, OBS), np.float32), np.full((5, ACTION), 0.3, np.float32)
    on_host = jax.tree.map(np.array, policy)(obs, noise)
    assert isinstance(on_host, np.ndarray)
    np.testing.assert_allclose(on_host, policy(jnp.array(obs), jnp.array(noise)), atol=1e-6)
    assert np.abs(on_host).max() <= 1.0


@pytest.mark.parametrize("name", NAMES)
def test_one_update_lowers_the_loss_on_its_own_rows(name: str) -> None:
    def loss(agent: Agent) -> jax.Array:
        rows = some_targets(agent.discrete)
        value = agent.action_values(rows.obs, rows.action)
        return jnp.mean(jnp.square(value - jnp.broadcast_to(rows.value, value.shape)))

    assert loss(updated(fresh(name), 20)) < loss(fresh(name))


def test_the_critic_loss_is_a_weighted_sum_of_squares_over_critics_by_hand() -> None:
    constant = lambda value: MLP(1, 1, (), side_inputs=1, key=jax.random.key(0))  # noqa: E731
    members = [
        jax.tree.map(jnp.zeros_like, constant(0)),
        eqx.tree_at(lambda m: m.layers[0].bias, jax.tree.map(jnp.zeros_like, constant(0)), jnp.array([3.0])),
    ]
    critic = jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)  # Q_0 = 0, Q_1 = 3
    rows = CriticTargets(
        obs=jnp.zeros((2, 1)),
        action=jnp.zeros((2, 1)),
        value=jnp.array([1.0, 5.0]),
        weight=jnp.array([0.5, 0.25]),
    )
    loss, _ = critic_loss(critic, rows)
    # Q_0: 0.5 * 1 + 0.25 * 25; Q_1: 0.5 * 4 + 0.25 * 4.
    np.testing.assert_allclose(loss, 0.5 + 6.25 + 2.0 + 1.0)


def test_polyak_moves_by_its_rate() -> None:
    np.testing.assert_allclose(polyak(jnp.array([0.0, 10.0]), jnp.array([1.0, 0.0]), 0.1), [0.1, 9.0])


# --- Densities, for Retrace ---


@pytest.mark.parametrize("name", ["sac", "td3"])
def test_densities_on_the_host_are_those_on_the_device(name: str) -> None:
    policy = fresh(name).exploration_policy(jax.random.key(3))
    obs, action = (np.array(x) for x in some_targets()[:2])
    on_host = jax.tree.map(np.array, policy).log_density(obs, action)
    assert isinstance(on_host, np.ndarray)
    assert on_host.dtype == np.float32
    np.testing.assert_allclose(on_host, policy.log_density(jnp.array(obs), jnp.array(action)), rtol=1e-4)


def test_a_policy_that_acts_as_the_target_policy_does_has_ratio_one_exactly() -> None:
    obs, action, *_ = some_targets()
    sac = fresh("sac")
    np.testing.assert_array_equal(
        sac.log_density(obs, action), sac.exploration_policy(jax.random.key(3)).log_density(obs, action)
    )


def test_td3s_density_is_that_of_its_smoothing_noise_by_hand() -> None:
    agent = fresh("td3", target_noise=0.2)
    obs = some_targets().obs
    mean, _ = fresh("td3", target_noise=0.0).target_policy(obs, jax.random.key(0))
    # Two dimensions, one standard deviation off in each: -1 - 2 log 0.2 - log 2 pi.
    expected = -1.0 - 2 * np.log(0.2) - np.log(2 * np.pi)
    np.testing.assert_allclose(agent.log_density(obs, mean + 0.2), expected, rtol=1e-4)


def test_ddpg_would_never_have_taken_the_actions_of_the_past() -> None:
    obs, action, *_ = some_targets()
    np.testing.assert_array_equal(fresh("ddpg").log_density(obs, action), -np.inf)
    assert not config("ddpg").has_density
    assert config("sac").has_density
    assert not config("td3", target_noise=0.0).has_density
    assert not config("td3", exploration_noise=0.0).has_density


@pytest.mark.parametrize("name", NAMES)
def test_the_slow_critics_are_asked_for_action_values(name: str) -> None:
    agent, rows = updated(fresh(name), 3), some_targets()
    as_if_slow = eqx.tree_at(lambda a: a.critic, agent, agent.target_critic)  # pyright: ignore
    expected = as_if_slow.action_values(rows.obs, rows.action)
    np.testing.assert_allclose(agent.target_action_value(rows.obs, rows.action), expected)
    assert np.abs(expected - agent.action_values(rows.obs, rows.action)).max() > 1e-6


# --- DDPG ---


def test_ddpg_takes_the_actors_gradient_from_the_critic_before_its_step() -> None:
    agent = fresh("ddpg")
    assert isinstance(agent, DDPG)
    far = some_targets()._replace(value=jnp.full(ROWS, 1e3))
    near = update(agent, some_targets(), jax.random.key(0))
    wild = update(agent, far, jax.random.key(0))
    assert isinstance(near, DDPG)
    assert isinstance(wild, DDPG)
    assert not same(near.critic, wild.critic)
    assert same(near.actor, wild.actor)


def test_ddpg_moves_its_slow_copies_after_the_step() -> None:
    old, new = fresh("ddpg"), updated(fresh("ddpg"))
    assert isinstance(old, DDPG)
    assert isinstance(new, DDPG)
    expected = polyak(old.critic, new.critic, old.config.target_rate)
    for a, b in zip(jax.tree.leaves(new.target_critic), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_parameter_noise_leaves_layer_norm_alone() -> None:
    agent = fresh("ddpg")
    assert isinstance(agent, DDPG)
    noisy = perturb(agent.actor, jnp.float32(0.5), jax.random.key(0))
    assert same(noisy.net.norms, agent.actor.net.norms)
    assert agent.actor.net.norms
    difference = noisy.net.layers[0].weight - agent.actor.net.layers[0].weight
    assert 0.3 < float(jnp.std(difference)) < 0.7


@pytest.mark.parametrize(("scale", "grows"), [(1e-6, True), (1e3, False)])
def test_parameter_noise_adapts_towards_the_wanted_action_distance(scale: float, grows: bool) -> None:
    agent = fresh("ddpg")
    assert isinstance(agent, DDPG)
    adapted = adapted_noise_scale(agent.actor, jnp.float32(scale), some_targets().obs, 0.2, jax.random.key(0))
    np.testing.assert_allclose(adapted, scale * 1.01 if grows else scale / 1.01, rtol=1e-6)


def test_parameter_noise_adapts_every_so_many_updates_only() -> None:
    agent = fresh("ddpg", noise_interval=3)
    assert isinstance(agent, DDPG)
    scales = [float(updated(agent, n).noise_scale) for n in range(5)]  # pyright: ignore
    assert scales[0] == scales[1] == scales[2] != scales[3] == scales[4]


# --- TD3 ---


def test_td3_moves_actor_and_slow_copies_every_second_update() -> None:
    start = fresh("td3")
    assert isinstance(start, TD3)
    one, two = updated(start), updated(start, 2)
    assert isinstance(one, TD3)
    assert isinstance(two, TD3)
    assert same(one.actor, start.actor)
    assert same(one.target_critic, start.target_critic)
    assert not same(one.critic, start.critic)
    assert not same(two.actor, start.actor)
    assert not same(two.target_critic, start.target_critic)


def test_td3_smooths_its_target_actions_within_the_clip() -> None:
    agent = fresh("td3", target_noise=10.0, target_noise_clip=0.25)
    obs = some_targets().obs
    action, bonus = agent.target_policy(obs, jax.random.key(0))
    difference = np.abs(action - agent.policy()(obs, 0.0))
    assert difference.max() <= 0.25 + 1e-6
    assert difference.max() > 0.2
    np.testing.assert_array_equal(bonus, 0.0)


# --- SAC ---


def test_the_squashed_gaussian_density_integrates_to_one() -> None:
    actor = GaussianActor(MLP(1, 2, (), key=jax.random.key(4)))
    u = jnp.linspace(-12.0, 12.0, 20001)
    mean, _, std = actor._mean_and_std(jnp.ones((1,)))
    action, log_density = actor.sample(jnp.ones((20001, 1)), ((u - mean) / std)[:, None])
    total = jnp.trapezoid(jnp.exp(log_density), action[:, 0])
    np.testing.assert_allclose(total, 1.0, atol=1e-3)


def test_sac_values_are_the_critics_less_the_tempered_log_density() -> None:
    agent = fresh("sac", initial_temperature=0.5)
    assert isinstance(agent, SAC)
    obs = some_targets().obs
    action, bonus = agent.target_policy(obs, jax.random.key(7))
    noise = jax.random.normal(jax.random.key(7), (ROWS, ACTION))
    expected_action, log_density = agent.actor.sample(obs, noise)
    np.testing.assert_allclose(action, expected_action, rtol=1e-6)
    np.testing.assert_allclose(bonus, -0.5 * log_density, rtol=1e-5)
    expected = action_values(agent.target_critic, obs, action) - 0.5 * log_density[None]
    np.testing.assert_allclose(agent.target_value(obs, jax.random.key(7)), expected, rtol=1e-4, atol=1e-5)


def test_the_density_of_an_action_is_that_of_the_draw_it_came_from() -> None:
    actor = GaussianActor(MLP(OBS, 2 * ACTION, (16,), key=jax.random.key(4)))
    noise = jax.random.normal(jax.random.key(5), (ROWS, ACTION))
    action, log_density = actor.sample(some_targets().obs, noise)
    np.testing.assert_allclose(actor.log_density(some_targets().obs, action), log_density, rtol=1e-3)
    at_the_rim = actor.log_density(some_targets().obs, jnp.ones((ROWS, ACTION)))
    assert np.isfinite(at_the_rim).all()


@pytest.mark.parametrize(("target_entropy", "rises"), [(100.0, True), (-100.0, False)])
def test_the_temperature_rises_while_entropy_is_below_its_target(target_entropy: float, rises: bool) -> None:
    start = fresh("sac", target_entropy=target_entropy)
    assert isinstance(start, SAC)
    end = updated(start)
    assert isinstance(end, SAC)
    assert (end.log_temperature > start.log_temperature) == rises


def test_the_target_entropy_is_so_much_an_action_unless_it_is_given() -> None:
    """The temperature's first moment is Adam's share of -(log pi + target): one nat more moves it as much."""

    def moment(**settings: float) -> float:
        agent = updated(fresh("sac", **settings))
        assert isinstance(agent, SAC)
        return float(jax.tree.leaves(agent.temperature_opt)[1])

    assert moment(entropy_per_action=-1.0) == moment() == moment(target_entropy=-float(ACTION))
    assert moment(entropy_per_action=-0.5) == moment(target_entropy=-0.5 * ACTION)
    assert moment(entropy_per_action=3.0, target_entropy=-7.0) == moment(target_entropy=-7.0)
    assert moment(target_entropy=-7.0) - moment(target_entropy=-8.0) == pytest.approx(-0.1, rel=1e-4)


def test_the_policy_that_is_evaluated_may_be_an_average_of_the_actors() -> None:
    """Over half of the updates: shares of the newest of 1, 1/1.5, 1/2 at the first, second, third update."""
    first = fresh("sac", average_share=0.5)
    assert isinstance(first, SAC)
    second, third, fourth = (updated(first, count) for count in (1, 2, 3))
    average = polyak(polyak(second.actor, third.actor, 1 / 1.5), fourth.actor, 0.5)
    for agent, wanted in ((second, second.actor), (fourth, average)):
        for leaf, other in zip(jax.tree.leaves(agent.policy().actor), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_allclose(leaf, other, rtol=1e-5, atol=1e-7)
    assert same(fourth.exploration_policy(jax.random.key(0)).actor, fourth.actor)
    plain = updated(fresh("sac"), 3)
    assert same(plain.actor, fourth.actor)  # what is learned is the same
    assert same(plain.policy().actor, plain.actor)


def test_the_actors_steps_fall_with_the_inverse_square_root_of_the_updates() -> None:
    """After 100 updates of a steady rate, the step of update 400 is half as long, and that of 50 whole."""

    def step(count: int, **settings: int) -> jax.Array:
        agent = fresh("sac", **settings)
        assert isinstance(agent, SAC)
        agent = replace(agent, num_updates=jnp.int32(count))
        after = updated(agent)
        assert isinstance(after, SAC)
        return after.actor.net.layers[0].weight - agent.actor.net.layers[0].weight

    whole = step(0)
    for count, share in ((50, 1.0), (100, 1.0), (400, 0.5)):
        got = step(count, actor_rate_falls_after=100)
        np.testing.assert_allclose(got, share * whole, rtol=1e-3, atol=1e-8)
    np.testing.assert_array_equal(step(400), whole)


# --- DQN ---


def constant_values(*critics: list[float]) -> MLP:
    """Q_n(s, a) as listed, whatever the state."""
    shape = MLP(OBS, len(critics[0]), (), key=jax.random.key(0))
    zeros = jax.tree.map(lambda x: jnp.zeros((len(critics), *x.shape)), shape)
    return eqx.tree_at(lambda m: m.layers[0].bias, zeros, jnp.array(critics))


def saying(current: list[list[float]], slow: list[list[float]], **settings: object) -> DQN:
    bare = DQNConfig(hidden=(), layer_norm=False, critics=len(current), **settings)  # pyright: ignore
    agent = DQN.init(bare, OBS, len(current[0]), jax.random.key(0))
    networks = constant_values(*current), constant_values(*slow)
    return eqx.tree_at(lambda a: (a.critic, a.target_critic), agent, networks)


@pytest.mark.parametrize(("double", "action", "value"), [(True, 1, 3.0), (False, 2, 9.0)])
def test_dqn_values_the_current_critics_choice_or_the_slow_ones_own(
    double: bool, action: int, value: float
) -> None:
    agent = saying([[1.0, 2.0, 0.0]], [[5.0, 3.0, 9.0]], double=double)
    obs = jnp.zeros((2, OBS))
    chosen, bonus = agent.target_policy(obs, jax.random.key(0))
    np.testing.assert_array_equal(chosen, np.eye(3)[[action, action]])
    np.testing.assert_array_equal(bonus, 0.0)
    np.testing.assert_array_equal(agent.target_value(obs, jax.random.key(0)), [[value, value]])
    np.testing.assert_array_equal(agent.current_policy(obs, jax.random.key(0))[0][0], [0.0, 1.0, 0.0])


def test_dqn_chooses_by_the_least_of_its_critics() -> None:
    agent = saying([[9.0, 2.0, 0.0], [0.0, 1.0, 9.0]], [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    obs = jnp.zeros((4, OBS))
    np.testing.assert_array_equal(agent.target_policy(obs, jax.random.key(0))[0], np.eye(3)[[1] * 4])
    np.testing.assert_array_equal(agent.target_value(obs, jax.random.key(0)), [[2.0] * 4, [5.0] * 4])
    np.testing.assert_array_equal(agent.policy()(obs, jnp.zeros((4, 3))), np.eye(3)[[1] * 4])


def test_dqn_trains_the_value_of_the_action_that_was_taken_only() -> None:
    agent = saying([[1.0, 2.0]], [[1.0, 2.0]], critic_learning_rate=1e-3, target_rate=0.005)
    rows = CriticTargets(jnp.zeros((1, OBS)), jnp.array([[0.0, 1.0]]), jnp.array([5.0]), jnp.array([0.5]))
    np.testing.assert_allclose(agent.action_values(rows.obs, rows.action), [[2.0]])
    after, metrics = agent.update(rows, rows.obs, lambda *_: pytest.fail("asked"), jax.random.key(0))
    np.testing.assert_allclose(metrics["train/critic_loss"], 0.5 * 9.0)
    # Adam's first step is its learning rate; the slow copy takes its share of that.
    np.testing.assert_allclose(after.critic.layers[0].bias[0], [1.0, 2.0 + 1e-3], rtol=1e-6)
    assert isinstance(after, DQN)
    np.testing.assert_allclose(after.target_critic.layers[0].bias[0], [1.0, 2.0 + 0.005 * 1e-3], rtol=1e-6)


@pytest.mark.parametrize(("updates", "epsilon"), [(0, 0.9), (5, 0.5), (10, 0.1), (1000, 0.1)])
def test_epsilon_falls_linearly_in_the_updates_and_then_stays(updates: int, epsilon: float) -> None:
    agent = fresh("dqn", epsilon_start=0.9, epsilon_end=0.1, epsilon_updates=10)
    agent = eqx.tree_at(lambda a: a.num_updates, agent, jnp.int32(updates))
    policy = agent.exploration_policy(jax.random.key(0))
    assert isinstance(policy, EpsilonGreedy)
    np.testing.assert_allclose(policy.epsilon, epsilon, rtol=1e-6)


@pytest.mark.parametrize("epsilon", [0.0, 0.3, 0.95, 1.0])
def test_epsilon_greedy_draws_each_action_with_its_probability(epsilon: float) -> None:
    policy = EpsilonGreedy.of(constant_values([1.0, 3.0, 2.0]), jnp.float32(epsilon))
    on_host = jax.tree.map(np.array, policy)
    assert np.isfinite(on_host.threshold)  # a policy that is not finite is a diverged one
    count, rng = 40_000, np.random.default_rng(0)
    obs, noise = np.zeros((count, OBS), np.float32), rng.standard_normal((count, 3), np.float32)
    action = on_host(obs, noise)
    expected = np.full(3, epsilon / 3) + np.array([0.0, 1.0 - epsilon, 0.0])
    np.testing.assert_allclose(action.mean(axis=0), expected, atol=0.012)  # five standard errors
    np.testing.assert_array_equal(policy(jnp.array(obs), jnp.array(noise)), action)
    np.testing.assert_array_equal(on_host(obs[:5], 0.0 * noise[:5]), np.eye(3)[[1] * 5])  # no noise: greedy
    if epsilon > 0:
        density = on_host.log_density(obs[:3], np.eye(3, dtype=np.float32))
        np.testing.assert_allclose(np.exp(density), expected, rtol=1e-5)
        np.testing.assert_allclose(policy.log_density(jnp.array(obs[:3]), jnp.eye(3)), density, rtol=1e-5)


def test_dqn_has_no_actor_to_differentiate_through_the_model() -> None:
    with pytest.raises(UserError, match=r"agent\.model_steps = 3: dqn has no actor"):
        build("CartPole-v1", "dqn", ["agent.model_steps=3"])


def test_targets_come_from_the_least_of_the_critics_drawn() -> None:
    agent = fresh("sac", critics=5, target_critics=2)
    obs, values = some_targets().obs, []
    for seed in range(30):
        value = np.asarray(agent.target_value(obs, jax.random.key(seed)))
        assert value.shape == (2, ROWS)
        assert np.abs(value[0] - value[1]).max() > 1e-6  # different critics
        values.append(value)
    critics = drawn(agent.target_critic, 2, jax.random.key(0))  # pyright: ignore
    every = agent.target_critic.layers[-1].bias  # pyright: ignore
    assert {float(b) for b in critics.layers[-1].bias[:, 0]} <= {float(b) for b in every[:, 0]}
    chosen = {
        tuple(np.asarray(drawn(agent.target_critic, 2, jax.random.key(s)).layers[-1].bias[:, 0]))
        for s in range(60)
    }  # pyright: ignore
    assert len({frozenset(pair) for pair in chosen}) == 10  # every pair of five, in time


def test_the_actor_may_raise_the_mean_of_the_critics() -> None:
    least, mean = (updated(fresh("sac", actor_value=which)) for which in ("least", "mean"))
    assert not same(least.actor, mean.actor)  # pyright: ignore
    assert same(least.critic, mean.critic)
    alone = [updated(fresh("sac", critics=1, actor_value=which)).actor for which in ("least", "mean")]  # pyright: ignore
    assert same(*alone)


# --- H = 0 ---


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("estimator", ["mve", "mve_tdk", "calibrated"])
def test_a_horizon_of_zero_trains_the_base_learner_bit_for_bit(name: str, estimator: str) -> None:
    results = []
    for settings in ({"estimator": "one_step"}, {"estimator": estimator, "horizon_steps": 0}):
        recipe = Recipe(
            obs_size=OBS,
            action_size=ACTION,
            known=Known(),
            agent=config(name),
            dynamics=DynamicsConfig(hidden=(16,)),
            targets=TargetsConfig(**settings),  # pyright: ignore
        )
        state = initial_state(recipe, Capacity(100), seed=0)
        for block in range(3):
            rng = np.random.default_rng(block)
            f32 = np.float32
            action = rng.uniform(-1, 1, (10, ACTION)).astype(f32)
            if AGENTS[name][1].discrete:
                action = np.eye(ACTION, dtype=f32)[action.argmax(axis=1)]
            rows = Transition(
                obs=rng.normal(size=(10, OBS)).astype(f32),
                action=action,
                reward=rng.normal(size=10).astype(f32),
                next_obs=rng.normal(size=(10, OBS)).astype(f32),
                continuation=np.ones(10, f32),
                episode=np.zeros(10, np.int32),
                step=np.arange(10, dtype=np.int32),
                log_density=np.zeros(10, f32),
            )
            state, _ = train.learn(state, rows, train.Due.of(rows=10, updates=5), recipe)
        results.append(state.agent)
    assert same(*results)
