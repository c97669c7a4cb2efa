"""The ingredients of DHMBPO, each of them a setting of its own: by hand, or against the longer way round."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mve import agents, dynamics, experience, imagine, replay, targets, train
from mve.agents import AGENTS, Agent, values
from mve.agents.base import action_values
from mve.agents.sac import SAC, SACConfig
from mve.agents.values import ValueBounds
from mve.dynamics import DynamicsConfig
from mve.imagine import ImaginationConfig
from mve.networks import MLP, standardise
from mve.program import Together
from mve.state import Capacity, Recipe, TrainState, initial_state
from mve.targets import TargetsConfig
from mve.train import Due
from mve.types import CriticTargets, Known, Transition, UserError

OBS, ACTION, ROWS, STARTS, LENGTH = 3, 2, 8, 4, 3
NAMES = sorted(AGENTS)
# One with an actor and one without are tried every time, the others where time allows.
MOST_DIFFERENT = [
    name if name in ("sac", "dqn") else pytest.param(name, marks=pytest.mark.slow) for name in NAMES
]


def fresh(name: str, **settings: object) -> Agent:
    config = AGENTS[name][0](hidden=(8,), batch_size=ROWS, **settings)  # pyright: ignore
    return agents.init(config, OBS, ACTION, jax.random.key(0))


def some_targets(agent: Agent | None = None) -> CriticTargets:
    keys = jax.random.split(jax.random.key(1), 3)
    action = jnp.tanh(jax.random.normal(keys[1], (ROWS, ACTION)))
    discrete = agent is not None and getattr(agent, "inner", agent).discrete
    return CriticTargets(
        obs=5.0 + 3.0 * jax.random.normal(keys[0], (ROWS, OBS)),
        action=jax.nn.one_hot(jnp.argmax(action, axis=-1), ACTION) if discrete else action,
        value=jax.random.normal(keys[2], (ROWS,)),
        weight=jnp.full(ROWS, 1.0 / ROWS),
    )


def the_value(policy: Any, value: Any, obs: jax.Array, key: jax.Array) -> Any:
    return value(obs, key)


@jax.jit
def updated(agent: Agent, rows: CriticTargets) -> Agent:
    return agent.update(rows, rows.obs, the_value, jax.random.key(0))[0]


def same(a: object, b: object) -> bool:
    return bool(eqx.tree_equal(a, b))


# --- Networks ---


def test_standardising_takes_mean_and_spread_of_a_row_away() -> None:
    np.testing.assert_allclose(
        standardise(jnp.array([[1.0, 3.0], [0.0, 8.0]])), [[-1, 1], [-1, 1]], rtol=1e-4
    )


def test_the_derivative_of_standardising_is_that_of_its_formula() -> None:
    x, weight = jax.random.normal(jax.random.key(0), (2, 3, 5))

    def formula(x: jax.Array) -> jax.Array:
        return (x - jnp.mean(x, -1, keepdims=True)) / jnp.sqrt(jnp.var(x, -1, keepdims=True) + 1e-5)

    got, wanted = (jax.grad(lambda x, f=f: jnp.sum(weight * f(x)))(x) for f in (standardise, formula))
    np.testing.assert_allclose(got, wanted, rtol=1e-3, atol=1e-5)


def test_every_layer_but_the_first_is_given_standardised_inputs() -> None:
    net = MLP(2, 1, (4, 4), norm_inputs=True, activation="silu", key=jax.random.key(0))
    x = jnp.array([[0.5, -2.0]])
    for i, layer in enumerate(net.layers):
        x = layer(standardise(jax.nn.silu(x)) if i else x)
    np.testing.assert_allclose(net(jnp.array([[0.5, -2.0]])), x, rtol=1e-5)


# --- Scaled values ---

NONE = jnp.zeros(1)  # as of a replay in which nothing was paid


def test_bounds_are_what_the_outer_percents_of_single_steps_would_come_to() -> None:
    """Gains -40, -39, .., 60 have quantiles -39 and 59; gamma = 1/2 doubles them; then a quarter of the way
    to the bounds of gains that are all 4: -78 + (8 + 78) / 4 and 118 + (8 - 118) / 4."""
    gains = jnp.arange(-40.0, 61.0)
    first = ValueBounds.unknown().told(gains, NONE, 0.5, 0.25)
    np.testing.assert_allclose([first.low, first.high], [-78, 118], rtol=1e-5)
    np.testing.assert_allclose(first.unscale(jnp.array([-1.0, 0.0, 1.0])), [-78, 20, 118], rtol=1e-5)
    then = first.told(jnp.full((3, 5), 4.0), NONE, 0.5, 0.25)
    np.testing.assert_allclose([then.low, then.high], [-56.5, 90.5], rtol=1e-5)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_step_that_ends_an_episode_keeps_its_worth_where_every_step_is_paid(sign: float) -> None:
    """Steps that gain 4 are worth 400 if they go on for ever; one that falls over for 3 is worth 3. So it is
    where every step costs."""
    agent = fresh("sac", value_bounds_rate=0.5).told(jnp.full(50, sign * 4.0), NONE, 0.99)
    assert isinstance(agent, SAC)
    rows = some_targets()
    given = jnp.full_like(rows.value, sign * 250.0).at[0].set(sign * 3.0).at[1].set(sign * 500.0)
    clipped, metrics = agent._clipped(rows._replace(value=given))
    np.testing.assert_allclose(clipped.value, given.at[1].set(sign * 400.0), rtol=1e-5)
    assert metrics["train/target_clipped"] == pytest.approx(1 / len(given))


def test_what_is_paid_in_few_steps_stays_within_the_bounds() -> None:
    """A goal that pays 100 in one of a thousand steps, each of which costs 0.1: outliers alone would have
    -10 and 0. What was paid is kept in the replay."""
    gains, paid = jnp.full(1000, -0.1).at[7].set(100.0), jnp.array([0.0, -0.1, 100.0])
    bounds = ValueBounds.unknown().told(gains, NONE, 0.99, 0.01)
    np.testing.assert_allclose([bounds.low, bounds.high], [-10, 0], rtol=1e-5)
    for before in (bounds, ValueBounds.unknown()):
        told = before.told(gains, paid, 0.99, 0.01)
        np.testing.assert_allclose([told.low, told.high], [-10, 100], rtol=1e-5)

    ours = mixed(0.4)
    state = remembering(ours)
    rows = state.replay.rows
    state = replace(
        state, replay=replace(state.replay, rows=rows._replace(reward=rows.reward.at[3].set(1e4)))
    )
    shared = experience.imagine_once(state, ours, jax.random.key(8))
    agent: Any = train.told_gains(state, ours, shared.first, shared.later).agent
    assert agent.inner.bounds.high == 1e4


def test_critics_that_start_at_nought_say_the_centre_of_their_bounds() -> None:
    agent = fresh("sac", value_bounds_rate=0.5, output_gain=0.0)
    rows = some_targets()
    np.testing.assert_array_equal(agent.action_values(rows.obs, rows.action), 0.0)
    told = agent.told(jnp.array([1.0, 1.0, 3.0]), NONE, 0.9)
    assert isinstance(told, SAC)
    assert told.bounds is not None
    centre = 0.5 * float(told.bounds.low + told.bounds.high)
    assert centre > 10
    np.testing.assert_allclose(told.action_values(rows.obs, rows.action), centre, rtol=1e-6)
    np.testing.assert_allclose(told.target_action_value(rows.obs, rows.action), centre, rtol=1e-6)


def test_critics_start_with_the_spread_that_is_asked_for_and_actors_as_ever() -> None:
    """Uniform within +-sqrt(6 / 5), the first layer's inputs being 3 + 2, where +-sqrt(1 / 5) is usual."""
    he, usual = fresh("sac", hidden_gain=6**0.5), fresh("sac")
    assert isinstance(he, SAC)
    assert isinstance(usual, SAC)
    wide, narrow = (agent.critic.layers[0].weight for agent in (he, usual))
    np.testing.assert_allclose(wide, 6**0.5 * narrow, rtol=1e-5)
    assert 0.9 * (6 / 5) ** 0.5 < float(jnp.max(jnp.abs(wide))) <= (6 / 5) ** 0.5
    same = (he.actor, he.critic.layers[-1]), (usual.actor, usual.critic.layers[-1])
    jax.tree.map(np.testing.assert_array_equal, *same)


def test_no_value_changes_by_its_bounds_alone_where_values_are_preserved() -> None:
    """By hand: within -1..1 an output of 0.5 is 0.5; within 0..198, centre and width 99, it takes an output
    of (0.5 - 99) / 99. Then on to bounds that are half way to others."""
    agent = fresh("sac", value_bounds_rate=0.5, preserve_values=True)
    rows = some_targets()
    before = agent.action_values(rows.obs, rows.action), agent.target_action_value(rows.obs, rows.action)
    first = agent.told(jnp.arange(101.0), NONE, 0.5)
    assert isinstance(agent, SAC)
    assert isinstance(first, SAC)
    inner = partial(action_values, obs=rows.obs, action=rows.action)
    np.testing.assert_allclose(inner(first.critic), (inner(agent.critic) - 99) / 99, rtol=1e-5)
    for told in (first, first.told(jnp.full(4, -7.0), NONE, 0.5)):
        after = told.action_values(rows.obs, rows.action), told.target_action_value(rows.obs, rows.action)
        np.testing.assert_allclose(after, before, atol=1e-4)


def test_a_histogram_is_the_share_of_a_gaussian_in_every_bin_by_hand() -> None:
    """Five bins of width 0.5, sigma 0.375: around 0 their edges are 2/3, 2 and 10/3 sigmas away, which leaves
    Phi(2/3) - Phi(-2/3) = 0.49501, Phi(2) - Phi(2/3) = 0.22974, Phi(10/3) - Phi(2) = 0.02232, of 0.99914."""
    shares = np.array([0.02232, 0.22974, 0.49501, 0.22974, 0.02232])
    np.testing.assert_allclose(values.histogram(jnp.float32(0), 5, 0), shares / 0.99914, atol=2e-5)
    x = jnp.linspace(-0.9, 0.9, 19)
    np.testing.assert_allclose(values.expected(jnp.log(values.histogram(x, 101, 0)), 0), x, atol=1e-5)
    np.testing.assert_allclose(values.expected(jnp.log(jnp.array([0.1, 0.2, 0.7])), 0), 0.6, rtol=1e-5)
    logits = jnp.zeros((2, 5))
    np.testing.assert_allclose(values.cross_entropy(logits, jnp.array([0.0, 0.7]), 0), np.log(5), rtol=1e-5)


def test_a_target_on_a_bound_is_not_drawn_inside_by_bootstraps() -> None:
    """V = E[histogram of g V], which is 0 where the histogram goes on beyond the bound that 0 lies on."""

    def settled(spare: int, low: float = 0.0, high: float = 600.0) -> float:
        def again(_: int, value: jax.Array) -> jax.Array:
            x = 2 * (0.995**3 * value - low) / (high - low) - 1
            mean = values.expected(jnp.log(values.histogram(x, 101, spare)), spare)
            return low + 0.5 * (mean + 1) * (high - low)

        value = jax.lax.fori_loop(0, 2000, again, jnp.float32(low))
        return float(value) / ((high - low) / 2 * values.bin_width(101, spare))

    assert settled(0) == pytest.approx(1.31, abs=0.02)  # bins
    assert abs(settled(3)) < 0.01
    ends = jnp.array([-1.0, 1.0])
    np.testing.assert_allclose(values.expected(jnp.log(values.histogram(ends, 101, 3)), 3), ends, atol=1e-5)


def test_critics_may_learn_a_histogram_whose_mean_is_their_value() -> None:
    """Bounds -98..98 of gains in -1..1 at gamma 0.99: a target of 49 is an output of 0.5."""
    agent = fresh("sac", value_bounds_rate=0.5, value_bins=21, output_gain=0.0, critic_learning_rate=0.01)
    agent = agent.told(jnp.linspace(-1, 1, 101), NONE, 0.99)
    rows = some_targets()._replace(value=jnp.full(ROWS, 49.0))
    np.testing.assert_allclose(agent.action_values(rows.obs, rows.action), 0.0, atol=1e-4)
    update = jax.jit(lambda agent, key: agent.update(rows, rows.obs, the_value, key))
    first, metrics = update(agent, jax.random.key(0))
    np.testing.assert_allclose(metrics["train/critic_loss"], 2 * np.log(21), rtol=1e-5)
    for i in range(200):
        first, metrics = update(first, jax.random.key(i))
    np.testing.assert_allclose(first.action_values(rows.obs, rows.action), 49.0, atol=2.0)
    assert 2 * 1.19 < float(metrics["train/critic_loss"]) < 2 * 1.22  # the target's own entropy is 1.2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"value_bins": 101}, "there are none; .* or agent.value_bins=0$"),
        ({"preserve_values": True}, "there are none; .* or agent.preserve_values=false$"),
        ({"value_bins": 8, "value_bounds_rate": 0.1}, "next to nothing"),
        ({"value_bins": 101, "value_bounds_rate": 0.1, "preserve_values": True}, "moves with its bounds"),
        ({"value_bins": 101, "value_bounds_rate": 0.1, "value_margin": 1.0}, "ends where its bounds are"),
        ({"value_margin": 1.0}, "there are none"),
    ],
)
def test_histograms_that_cannot_be_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        SACConfig(**settings)


@pytest.mark.parametrize("margin", [0.0, 2.0])
def test_targets_beyond_the_bounds_are_clipped_and_counted(margin: float) -> None:
    """Bounds of -0.98 and 0.98, half a distance of 0.98: with a margin of two, -2.94 and 2.94."""
    agent = fresh("sac", value_bounds_rate=0.5, value_margin=margin).told(jnp.array([-1.0, 1.0]), NONE, 0.0)
    rows = some_targets()._replace(value=jnp.array([-9.0, 9.0, *np.linspace(-0.5, 0.5, ROWS - 2)]))
    within = rows._replace(value=jnp.clip(rows.value, -0.98 - margin * 0.98, 0.98 + margin * 0.98))
    after, metrics = agent.update(rows, rows.obs, the_value, jax.random.key(0))
    other, none = agent.update(within, rows.obs, the_value, jax.random.key(0))
    assert same(after, other)
    assert metrics["train/target_clipped"] == 2 / ROWS
    assert none["train/target_clipped"] == 0


# --- Normalised observations ---


def moments(agent: Agent) -> tuple[jax.Array, jax.Array]:
    return agent.view.mean, agent.view.std  # pyright: ignore[reportAttributeAccessIssue]


def seen(name: str) -> Agent:
    """An agent that has seen some rows, of which the last two do not count."""
    rows = some_targets()
    block = Transition(*[rows.obs] * 8)._replace(next_obs=jnp.concatenate([rows.obs, 1e3 + rows.obs[:2]]))
    return fresh(name, normalize_obs=True).observed(block, jnp.int32(ROWS))


def test_the_statistics_are_those_of_all_real_states() -> None:
    mean, std = moments(seen("sac"))
    np.testing.assert_allclose(mean, np.mean(some_targets().obs, axis=0), rtol=1e-5)
    np.testing.assert_allclose(std, np.std(some_targets().obs, axis=0), rtol=1e-5)


@pytest.mark.parametrize("name", MOST_DIFFERENT)
def test_an_agent_that_normalises_is_the_plain_one_on_normalised_observations(name: str) -> None:
    agent = seen(name)
    inner: Agent = agent.inner  # pyright: ignore[reportAttributeAccessIssue]
    rows, key = some_targets(agent), jax.random.key(3)
    mean, std = moments(agent)
    z = (rows.obs - mean[None]) / std[None]
    for ask in ("target_policy", "target_value", "current_policy"):
        for a, b in zip(
            jax.tree.leaves(getattr(agent, ask)(rows.obs, jax.random.clone(key))),
            jax.tree.leaves(getattr(inner, ask)(z, jax.random.clone(key))),
            strict=True,
        ):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    for ask in ("action_values", "target_action_value", "log_density"):
        got, wanted = getattr(agent, ask)(rows.obs, rows.action), getattr(inner, ask)(z, rows.action)
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)
    noise = np.full((ROWS, ACTION), 0.3, np.float32)
    on_host = jax.tree.map(np.array, agent.policy())(np.asarray(rows.obs), noise)
    assert isinstance(on_host, np.ndarray)
    np.testing.assert_allclose(on_host, inner.policy()(z, jnp.asarray(noise)), atol=1e-5)


@pytest.mark.parametrize("name", MOST_DIFFERENT)
def test_its_update_is_the_plain_ones_on_normalised_observations(name: str) -> None:
    agent = seen(name)
    inner: Agent = agent.inner  # pyright: ignore[reportAttributeAccessIssue]
    rows = some_targets(agent)
    mean, std = moments(agent)
    z = rows._replace(obs=(rows.obs - mean[None]) / std[None])
    got, wanted = updated(agent, rows).inner, updated(inner, z)  # pyright: ignore
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


# --- Updates of the critics alone, optimisers begun anew ---


@pytest.mark.parametrize("name", MOST_DIFFERENT)
def test_an_update_without_an_objective_moves_critics_and_slow_critics_alone(name: str) -> None:
    agent = fresh(name)
    rows = some_targets(agent)
    after, _ = jax.jit(lambda agent: agent.update(rows, rows.obs, None, jax.random.key(0)))(agent)
    assert not same(after.critic, agent.critic)  # pyright: ignore
    assert not same(after.target_critic, agent.target_critic)  # pyright: ignore
    for part in ("actor", "target_actor", "actor_opt", "log_temperature"):
        assert same(getattr(after, part, None), getattr(agent, part, None))
    both = updated(agent, rows)
    for a, b in zip(jax.tree.leaves(after.critic), jax.tree.leaves(both.critic), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", MOST_DIFFERENT)
def test_new_optimisers_are_those_of_a_new_agent(name: str) -> None:
    agent = fresh(name, normalize_obs=name == "sac")
    rows = some_targets(agent)
    moved = updated(agent, rows).with_new_optimisers()
    moved, agent = getattr(moved, "inner", moved), getattr(agent, "inner", agent)
    assert not same(moved.critic, agent.critic)  # pyright: ignore
    assert same(moved.critic_opt, agent.critic_opt)  # pyright: ignore
    assert same(getattr(moved, "actor_opt", None), getattr(agent, "actor_opt", None))


# --- One rollout for critic and actor ---


def recipe(**agent: object) -> Recipe:
    settings: dict = {"hidden": (8,), "batch_size": ROWS, "model_steps": LENGTH, "critics": 3, **agent}
    return Recipe(
        obs_size=OBS,
        action_size=ACTION,
        known=Known(None, lambda s, a, n: s[..., 0] > 1.5),
        agent=SACConfig(normalize_obs=True, value_bounds_rate=0.1, **settings),
        dynamics=DynamicsConfig(
            hidden=(8,), members=2, noise="homoscedastic", sample="state", learning_starts=0, batch_size=8
        ),
        targets=TargetsConfig(estimator="mve", horizon_steps=LENGTH - 1, discount=0.9),
        imagination=ImaginationConfig(
            starts=STARTS,
            length=(LENGTH, LENGTH),
            rounds_kept=5,
            real_share=0.0,
            first_step="imagined",
            interval_updates=4,
        ),
    )


def real_block(count: int = 20) -> Transition:
    rng = np.random.default_rng(0)
    f32 = np.float32
    obs = rng.normal(size=(count, OBS)).astype(f32)
    return Transition(
        obs=obs,
        action=rng.uniform(-1, 1, (count, ACTION)).astype(f32),
        reward=obs[:, 0],
        next_obs=0.9 * obs,
        continuation=np.ones(count, f32),
        episode=np.zeros(count, np.int32),
        step=1 + np.arange(count, dtype=np.int32),
        log_density=np.zeros(count, f32),
    )


def remembering(ours: Recipe) -> TrainState:
    """A state with one block in its replay, and the same rows in its imagination buffer."""
    state, block = initial_state(ours, Capacity(100, ours.imagination.capacity), seed=0), real_block()
    rows: Transition = jax.tree.map(jnp.asarray, block)
    keep = jnp.ones(20, bool)
    assert state.imagined is not None
    assert state.model is not None
    return replace(
        state,
        replay=replay.add(state.replay, rows, keep),
        imagined=replay.add(state.imagined, rows, keep),
        model=dynamics.observe(state.model, rows, jnp.int32(20), ours.dynamics),
        agent=state.agent.observed(rows, jnp.int32(20)),
    )


def test_a_shared_rollout_gives_the_update_that_two_passes_give() -> None:
    """The update as it would be if the actor imagined for itself, with the draws of the shared rollout."""
    ours = recipe()
    assert ours.shares_rollout
    state, key = remembering(ours), jax.random.key(7)

    @jax.jit
    def in_two_passes(state: TrainState) -> Agent:
        sample_key, imagine_key, value_key, agent_key = jax.random.split(jax.random.clone(key), 4)
        start_key, rollout_key = jax.random.split(imagine_key)
        start = experience._imagined_batch(state, ours, start_key)

        def rollout(policy: Any) -> Any:
            rollout_key_again = jax.random.clone(rollout_key)
            step = experience.model_step(state, ours, jax.random.clone(rollout_key))
            return imagine.rollout(step, policy, start.obs, LENGTH, rollout_key_again)

        whole = rollout(state.agent.target_policy)
        batch, ahead = imagine.as_transition(whole, start), imagine.after_first(whole)
        state = train.told_gains(state, ours, batch, ahead)
        rows = targets.estimate(batch, ahead, train.estimator_fns(state, value_key), ours.targets)

        def objective(policy: Any, value: Any, obs: jax.Array, key: jax.Array) -> Any:
            return train.worth(rollout(policy), value, discount=0.9, key=jax.random.clone(sample_key))

        return state.agent.update(rows, start.obs, objective, agent_key)[0]

    shared = jax.jit(partial(train.update_step, recipe=ours))(state, key=key)[0]
    assert not same(shared.inner.actor, state.agent.inner.actor)  # pyright: ignore
    # Adam's first moments are the gradients, times a constant: its steps would hide their size.
    for a, b in zip(jax.tree.leaves(shared), jax.tree.leaves(in_two_passes(state)), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-6)


def test_the_shared_target_is_the_return_of_the_first_imagined_step_by_hand() -> None:
    """y = r_0 + g c_0 (r_1 + b_1 + g c_1 (r_2 + b_2 + g c_2 V)): no bonus of the first action."""
    ours = recipe()
    state = remembering(ours)
    shared = experience.imagine_once(state, ours, jax.random.key(8))
    whole = shared.whole
    rows = train.shared_targets(shared, state, ours.targets, jax.random.key(9))
    value = jnp.min(state.agent.target_value(whole.obs[-1], jax.random.key(9)), axis=0)
    r, c, b = whole.reward, whole.continuation, whole.bonus
    by_hand = r[0] + 0.9 * c[0] * (r[1] + b[1] + 0.9 * c[1] * (r[2] + b[2] + 0.9 * c[2] * value))
    np.testing.assert_allclose(rows.value, by_hand, rtol=1e-5)
    np.testing.assert_array_equal(rows.action, whole.action[0])


def mixed(share: float) -> Recipe:
    ours = recipe()
    return replace(ours, imagination=replace(ours.imagination, real_share=share))


def test_what_is_imagined_goes_on_where_several_real_steps_have_led_to() -> None:
    """The block is one episode of 20 steps: four steps on from the row that each target is for."""
    ours = mixed(0.4)
    ours = replace(ours, targets=replace(ours.targets, n_step=4))
    state = remembering(ours)
    shared = experience.imagine_once(state, ours, jax.random.key(8))
    assert shared.real is not None
    rows, real = state.replay.rows, shared.real
    np.testing.assert_array_equal(shared.whole.obs[0, :3], real.next_obs)
    for i in range(3):
        begin = int(np.flatnonzero((np.asarray(rows.obs[:20]) == np.asarray(real.obs[i])).all(-1))[0])
        ended = np.flatnonzero(np.asarray(rows.continuation[begin : begin + 4]) == 0)
        last = begin + 3 if not ended.size else begin + int(ended[0])
        last = min(last, 19)
        np.testing.assert_array_equal(real.next_obs[i], rows.next_obs[last])
        np.testing.assert_allclose(
            real.continuation[i], 0.9 ** (last - begin) * rows.continuation[last], rtol=1e-6
        )


def test_every_row_draws_how_many_real_steps_it_sums() -> None:
    """From 1 to 4, all alike often, by where rows lead that have 4 steps ahead of them in their episode."""
    ours = mixed(0.4)
    ours = replace(ours, targets=replace(ours.targets, n_step=4, n_step_drawn=True))
    state = remembering(ours)
    rows = jax.tree.map(np.asarray, state.replay.rows)
    batch = jax.tree.map(np.asarray, experience.real_batch(state, ours, 2000, jax.random.key(8)))
    where = {row.tobytes(): i for i, row in enumerate(rows.obs[:20])}
    counts = np.zeros(5, int)
    for begin, led_to in zip((where[row.tobytes()] for row in batch.obs), batch.next_obs, strict=True):
        if begin + 4 <= 20 and rows.continuation[begin : begin + 4].all():
            counts[1 + int(np.flatnonzero((rows.next_obs[begin : begin + 4] == led_to).all(-1))[0])] += 1
    assert counts[0] == 0
    assert counts.sum() > 200
    np.testing.assert_allclose(counts[1:] / counts.sum(), 0.25, atol=0.07)


@pytest.mark.parametrize(
    ("within", "warmup", "sums_it", "first"),
    [
        (0, 5, True, 0),
        (9, 14, True, 11),
        (0, 5, False, 5),
        (9, 5, False, 11),
        (9, 14, False, 14),
        (30, 0, False, 0),
    ],
)
def test_only_recent_rows_of_the_policys_own_steps_are_summed(
    within: int, warmup: int, sums_it: bool, first: int
) -> None:
    """At step 20, rows from max(20 - within, warm-up) on, or of the warm-up as well where that is summed;
    two steps, where the episode goes on, or one."""
    ours = mixed(0.4)
    ours = replace(
        ours,
        targets=replace(ours.targets, n_step=2, n_step_within=within, n_step_warmup=sums_it),
        warmup_steps=warmup,
    )
    state = replace(remembering(ours), num_env_steps=jnp.int32(20))
    rows = jax.tree.map(np.asarray, state.replay.rows)
    batch = jax.tree.map(np.asarray, experience.real_batch(state, ours, 500, jax.random.key(8)))
    where = {row.tobytes(): i for i, row in enumerate(rows.obs[:20])}
    begins = np.array([where[row.tobytes()] for row in batch.obs])
    goes_on = (begins < 19) & (rows.continuation[begins] > 0)
    summed = (begins >= first) & goes_on
    np.testing.assert_array_equal(batch.next_obs, rows.next_obs[begins + summed])
    assert {int(b) for b in begins[summed]} == {i for i in range(first, 19) if rows.continuation[i]}


def test_real_steps_are_expanded_by_the_whole_of_the_rollouts_that_start_where_they_led_to() -> None:
    """Three of eight rows, by hand: y = r + g c (b_0 + r_0 + g c_0 (b_1 + r_1 + ... V)), that of s' in it."""
    ours = mixed(0.4)
    assert ours.shares_rollout
    assert ours.real_rows == 3
    state = remembering(ours)
    shared = experience.imagine_once(state, ours, jax.random.key(8))
    real, whole = shared.real, shared.whole
    assert real is not None
    np.testing.assert_array_equal(whole.obs[0, :3], real.next_obs)
    rows = train.shared_targets(shared, state, ours.targets, jax.random.key(9))

    real_key, imagined_key = jax.random.split(jax.random.key(9))
    value_of = lambda obs, key: jnp.min(state.agent.target_value(obs, key), axis=0)  # noqa: E731
    r, c, b = whole.reward, whole.continuation, whole.bonus
    ahead = value_of(whole.obs[-1, :3], real_key)
    for t in reversed(range(LENGTH)):
        ahead = (b + r)[t, :3] + 0.9 * c[t, :3] * ahead
    np.testing.assert_allclose(rows.value[:3], real.reward + 0.9 * ahead, rtol=1e-5)
    np.testing.assert_array_equal(rows.obs[:3], real.obs)
    np.testing.assert_array_equal(rows.action[:3], real.action)

    ahead = value_of(whole.obs[-1, 3:], imagined_key)
    for t in reversed(range(1, LENGTH)):
        ahead = (b + r)[t, 3:] + 0.9 * c[t, 3:] * ahead
    np.testing.assert_allclose(rows.value[3:], r[0, 3:] + 0.9 * c[0, 3:] * ahead, rtol=1e-5)
    np.testing.assert_array_equal(rows.action[3:], whole.action[0, 3:])
    np.testing.assert_allclose(rows.weight, np.full(8, 1 / 8), rtol=1e-6)
    # Real rows have all their weight on H = 3, the others on H = 2.
    np.testing.assert_allclose(rows.horizon_weight, [0, 0, 5 / 8, 3 / 8], rtol=1e-6)


@pytest.mark.parametrize(
    "nothing",
    [
        {"estimator": "one_step"},
        {"estimator": "mve", "horizon_steps": 0},
        {"estimator": "mve_tdk", "horizon_steps": 0},
        {"estimator": "lambda", "trace_decay": 0.0},
    ],
)
def test_the_actor_may_go_on_where_targets_are_not_expanded(nothing: dict[str, Any]) -> None:
    """y = r + g c V(s') of real and imagined rows alike, though the rollout goes on for the actor's sake, and
    what its steps earn sets the bounds of values."""
    ours = mixed(0.4)
    plain = replace(ours, targets=replace(ours.targets, **nothing))
    assert plain.shares_rollout
    state = remembering(plain)
    shared = experience.imagine_once(state, plain, jax.random.key(8))
    rows = train.shared_targets(shared, state, plain.targets, jax.random.key(9))
    real, whole = shared.real, shared.whole
    assert real is not None
    assert whole.reward.shape[0] == LENGTH
    real_key, imagined_key = jax.random.split(jax.random.key(9))
    of_real = jnp.min(state.agent.target_value(whole.obs[0, :3], real_key), axis=0)
    np.testing.assert_allclose(rows.value[:3], real.reward + 0.9 * real.continuation * of_real, rtol=1e-5)
    of_imagined = jnp.min(state.agent.target_value(whole.obs[1, 3:], imagined_key), axis=0)
    by_hand = whole.reward[0, 3:] + 0.9 * whole.continuation[0, 3:] * of_imagined
    np.testing.assert_allclose(rows.value[3:], by_hand, rtol=1e-5)
    told, known = (train.told_gains(state, one, shared.first, shared.later) for one in (plain, ours))
    assert same(told.agent, known.agent)


def test_targets_may_be_expanded_by_fewer_steps_than_the_actor_takes() -> None:
    """H = 1 in a rollout of three: real rows by two of its steps, its own first steps by one."""
    ours = mixed(0.4)
    ours = replace(ours, targets=replace(ours.targets, horizon_steps=1))
    assert ours.shares_rollout
    state = remembering(ours)
    shared = experience.imagine_once(state, ours, jax.random.key(8))
    rows = train.shared_targets(shared, state, ours.targets, jax.random.key(9))
    real_key, imagined_key = jax.random.split(jax.random.key(9))
    value_of = lambda obs, key: jnp.min(state.agent.target_value(obs, key), axis=0)  # noqa: E731
    r, c, b = shared.whole.reward, shared.whole.continuation, shared.whole.bonus
    real, obs = shared.real, shared.whole.obs
    assert real is not None
    second = (r[1] + b[1])[:3] + 0.9 * c[1, :3] * value_of(obs[2, :3], real_key)
    soft = (r[0] + b[0])[:3] + 0.9 * c[0, :3] * second
    np.testing.assert_allclose(rows.value[:3], real.reward + 0.9 * real.continuation * soft, rtol=1e-5)
    second = (r[1] + b[1])[3:] + 0.9 * c[1, 3:] * value_of(obs[2, 3:], imagined_key)
    np.testing.assert_allclose(rows.value[3:], r[0, 3:] + 0.9 * c[0, 3:] * second, rtol=1e-5)


def test_nothing_is_imagined_from_the_last_state_of_an_episode() -> None:
    """Three rows of four ended there: what they earned is all of their target, and the actor is not asked
    what to do in a state where nobody acts."""
    ours = mixed(0.5)
    state, block = remembering(ours), real_block()
    ended = block._replace(continuation=np.zeros(20, np.float32))
    state = replace(
        state, replay=replay.add(state.replay, jax.tree.map(jnp.asarray, ended), jnp.ones(20, bool))
    )
    shared = experience.imagine_once(state, ours, jax.random.key(3))
    real = shared.real
    assert real is not None
    over = np.asarray(real.continuation) == 0
    assert 0 < over.sum() < 4
    at_the_end = (np.asarray(shared.whole.obs[0, :4]) == np.asarray(real.next_obs)).all(axis=1)
    np.testing.assert_array_equal(at_the_end, ~over)
    rows = train.shared_targets(shared, state, ours.targets, jax.random.key(9))
    np.testing.assert_array_equal(rows.value[:4][over], real.reward[over])


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.4, 1.0])
@pytest.mark.parametrize("estimator", ["mve", "mve_tdk", "lambda", "one_step"])
def test_every_estimator_of_fixed_weights_may_share_a_rollout(estimator: str, share: float) -> None:
    horizon = {"one_step": 0}.get(estimator, LENGTH - 1)
    ours = mixed(share)
    ours = replace(
        ours,
        targets=replace(ours.targets, estimator=estimator, horizon_steps=horizon),
        agent=replace(ours.agent, model_steps=1 + horizon),
    )
    assert ours.shares_rollout
    state = remembering(ours)
    shared = experience.imagine_once(state, ours, jax.random.key(8))
    rows = train.shared_targets(shared, state, ours.targets, jax.random.key(9))
    assert np.isfinite(rows.value).all()
    assert float(jnp.sum(rows.horizon_weight)) == pytest.approx(1.0)
    if estimator != "mve_tdk":
        assert float(jnp.sum(rows.weight)) == pytest.approx(1.0)


@pytest.mark.parametrize(
    "change",
    [
        {"agent": SACConfig(model_steps=LENGTH - 1)},
        {"agent": AGENTS["td3"][0](model_steps=LENGTH)},
        {"imagination": replace(recipe().imagination, real_share=0.1, mixed_by="update")},
        {"imagination": replace(recipe().imagination, first_step="stored")},
        {"targets": TargetsConfig(estimator="steve", horizon_steps=LENGTH - 1)},
    ],
)
def test_a_rollout_is_shared_only_where_it_serves_both(change: dict) -> None:
    assert recipe().shares_rollout
    assert not replace(recipe(), **change).shares_rollout


# --- Rounds, critic updates and resets among the updates ---


@pytest.mark.slow
def test_rounds_critic_updates_and_resets_come_with_the_updates() -> None:
    """Interval 4: of updates 2..11 the 4th and the 8th come after a round, 3 x 4 rows each; a refit's five
    critic updates have two rounds of their own, and Adam begins anew before them."""
    ours = recipe(critic_updates=5, reset_optimisers=True)
    ours = replace(ours, known=Known(None, lambda s, a, n: jnp.zeros(s.shape[:-1], bool)))
    state = initial_state(ours, Capacity(100, ours.imagination.capacity), seed=0)
    state, _ = train.learn(state, real_block(), Due.of(rows=20, fits=1, refits=1, updates=2), ours)
    assert int(state.imagined.size) == 12 * 3  # pyright: ignore
    inner: Any = state.agent.inner  # pyright: ignore
    assert int(inner.num_updates) == 2
    assert int(inner.critic_opt[0].count) == 7
    assert int(inner.actor_opt[0].count) == 2
    state, metrics = train.learn(state, real_block(), Due.of(rows=20, updates=10, updated=2), ours)
    assert int(state.imagined.size) == 12 * 5  # pyright: ignore
    inner = state.agent.inner  # pyright: ignore
    assert int(inner.num_updates) == 12
    assert int(inner.critic_opt[0].count) == 17
    said = {name: float(x) for name, x in metrics.items() if not name.startswith("model/")}
    assert all(np.isfinite(x) for x in said.values()), said
    state, _ = train.learn(state, real_block(), Due.of(rows=20, fits=1, refits=1), ours)
    inner = state.agent.inner  # pyright: ignore
    assert int(inner.critic_opt[0].count) == 5
    assert int(inner.actor_opt[0].count) == 0


@pytest.mark.slow
def test_seeds_side_by_side_have_their_rounds_and_critic_updates_as_alone() -> None:
    ours, block = recipe(critic_updates=5, reset_optimisers=True), real_block()
    together = Together(ours, 2)
    stacked = together.joined(
        [initial_state(ours, Capacity(100, ours.imagination.capacity), s) for s in (0, 1)]
    )
    alone = initial_state(ours, Capacity(100, ours.imagination.capacity), 1)
    due = Due.of(rows=20, fits=1, refits=1, updates=6)
    stacked, _ = together.learn(stacked, [block, block], due)
    alone, _ = train.learn(alone, block, due, ours)
    mine = together.part(stacked, 1)
    assert int(mine.imagined.size) == int(alone.imagined.size) > 0  # pyright: ignore
    for a, b in zip(jax.tree.leaves(mine.agent), jax.tree.leaves(alone.agent), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)
