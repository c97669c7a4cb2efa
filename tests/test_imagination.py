"""Imagination buffers and the actor's expanded objective: what is kept, for how long, and what it is for."""

from __future__ import annotations

from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from environments import linear_system

from mve import dynamics, experience, imagine, replay, schedule, train
from mve.agents.ddpg import DDPGConfig
from mve.config import build
from mve.dynamics import DynamicsConfig
from mve.imagine import ImaginationConfig
from mve.replay import Replay
from mve.state import Capacity, Recipe, TrainState, initial_state
from mve.targets import TargetsConfig
from mve.types import Known, Transition, UserError

STARTS, BATCH, ROWS = 6, 40, 16
BRANCH = jax.jit(experience.branch, static_argnums=1)
SAMPLE = jax.jit(experience.sample_batch, static_argnums=1)
GROW = ImaginationConfig(starts=STARTS, length=(1, 15), length_ramp=(20_000, 150_000))
LINEAR = linear_system()


def recipe(ends_above: float = np.inf, **imagination: object) -> Recipe:
    """Imagined episodes end where the first observation exceeds a number; rewards are the second one."""
    known = Known(lambda s, a, n: s[..., 1], lambda s, a, n: n[..., 0] > ends_above)
    settings: dict = {"starts": STARTS, "length": (3, 3), "rounds_kept": 2, **imagination}
    return Recipe(
        obs_size=2,
        action_size=1,
        known=known,
        agent=DDPGConfig(hidden=(8,), batch_size=BATCH),
        dynamics=DynamicsConfig(hidden=(8,), members=1, stay_in_data=False),
        targets=TargetsConfig(),
        imagination=ImaginationConfig(**settings),
    )


def state_of(ours: Recipe) -> TrainState:
    """Real rows are marked by their reward, -1, and by an action that no policy takes, 2."""
    state = initial_state(ours, Capacity(ROWS, ours.imagination.capacity), seed=0)
    obs = jax.random.normal(jax.random.key(1), (ROWS, 2))
    ones = jnp.ones(ROWS)
    rows = Transition(
        obs=obs,
        action=2.0 * ones[:, None],
        reward=-ones,
        next_obs=obs,
        continuation=ones,
        episode=jnp.zeros(ROWS, jnp.int32),
        step=jnp.arange(ROWS),
        log_density=0.0 * ones,
    )
    return replace(state, replay=replay.add(state.replay, rows, jnp.ones(ROWS, bool)))


def filled(state: TrainState, ours: Recipe, seed: int = 0) -> TrainState:
    return replace(state, imagined=BRANCH(state, ours, jax.random.key(seed))[0])


def rows_of(buffer: Replay | None) -> Transition:
    assert buffer is not None
    return jax.tree.map(lambda x: np.asarray(x)[: int(buffer.size)], buffer.rows)


def test_a_rollout_grows_as_mbpo_schedules_it() -> None:
    lengths = [
        int(imagine.rollout_length(GROW, jnp.int32(step)))
        for step in (0, 20_000, 29_285, 29_286, 85_000, 149_999, 150_000, 900_000)
    ]
    # 1 + 14 (e - 20) / 130 for e in thousands of steps: 2 is reached at e = 20 + 130 / 14 = 29.29.
    assert lengths == [1, 1, 1, 2, 8, 14, 15, 15]


def test_a_branch_is_a_chain_of_model_steps_from_real_states() -> None:
    ours = recipe()
    state = state_of(ours)
    rows = rows_of(filled(state, ours).imagined)
    obs, next_obs = rows.obs.reshape(3, STARTS, 2), rows.next_obs.reshape(3, STARTS, 2)

    real = {tuple(s) for s in np.asarray(state.replay.rows.obs)}
    assert {tuple(s) for s in obs[0]} <= real
    np.testing.assert_array_equal(obs[1:], next_obs[:-1])
    assert (np.abs(rows.obs - rows.next_obs) > 0).any()
    np.testing.assert_array_equal(rows.reward, rows.obs[:, 1])
    action, _ = state.agent.current_policy(jnp.asarray(rows.obs), jax.random.key(0))
    np.testing.assert_allclose(rows.action, action, atol=1e-6)


def test_nothing_that_follows_a_predicted_end_is_kept() -> None:
    ours = recipe(ends_above=0.5)
    rows = rows_of(filled(state_of(ours), ours).imagined)
    over = rows.next_obs[:, 0] > 0.5
    np.testing.assert_array_equal(rows.continuation, 1.0 - over)
    assert over.any()
    assert len(rows.reward) < 3 * STARTS
    ended = {tuple(s) for s in rows.next_obs[over]}
    assert not ended & {tuple(s) for s in rows.obs[STARTS:]}  # a start may lie beyond the end; later ones not


def test_rollouts_stop_where_members_disagree_more_than_they_do_at_first() -> None:
    """By hand: members that say s' = 1.5 s and s' = 0.5 s are s apart, squared s^2. From s = 1, twice the
    first steps' disagreement is 2: 1.5^2 = 2.25 is too much, 0.5 and 0.75 are not."""
    rates = jnp.array([0.5, -0.5])
    trusting, blind = (recipe(starts=64, length=(3, 3), rounds_kept=1, trust=trust) for trust in (2.0, 0.0))
    two = DynamicsConfig(hidden=(), members=2, stay_in_data=False)
    seen, kept = [], []
    for ours in (replace(trusting, dynamics=two), replace(blind, dynamics=two)):
        state = state_of(ours)
        assert state.model is not None
        weight = jnp.zeros((2, 3, 2)).at[:, :2].set(rates[:, None, None] * jnp.eye(2)[None])
        nets = lambda m: (m.net.layers[0].weight, m.net.layers[0].bias)  # noqa: E731
        model = eqx.tree_at(nets, state.model, (weight, jnp.zeros((2, 2))))
        real = state.replay.rows._replace(obs=jnp.ones((ROWS, 2)))
        state = replace(state, model=model, replay=replace(state.replay, rows=real))
        apart = dynamics.disagreement(model, jnp.array([[1.0, 3.0]] * 4), jnp.ones((4, 1)), jax.random.key(0))
        np.testing.assert_allclose(apart, (1 + 9) / 2, rtol=1e-6)
        buffer, metrics = BRANCH(state, ours, jax.random.key(0))
        seen.append(np.unique(rows_of(buffer).obs))
        kept.append(float(metrics["imagination/kept"]) * 3 * 64 / int(buffer.size))
    np.testing.assert_allclose(seen[0], [0.25, 0.5, 0.75, 1.0])
    np.testing.assert_allclose(seen[1], [0.25, 0.5, 0.75, 1.0, 1.5, 2.25])
    np.testing.assert_allclose(kept, [1.0, 1.0], rtol=1e-6)


def test_disagreement_is_in_units_of_the_noise_that_the_model_knows() -> None:
    """Members 2 and -1 in the one dimension, whose noise has standard deviation 3 (and a floor of 1e-3)."""
    config = DynamicsConfig(hidden=(), members=2, noise="homoscedastic")
    known = Known(lambda s, a, n: s[..., 0], lambda s, a, n: s[..., 0] > 9)
    model = dynamics.init(config, known, 1, 1, jax.random.key(0))
    parts = lambda m: (m.net.layers[0].weight, m.net.layers[0].bias, m.noise.log_std)  # noqa: E731
    weight, bias = jnp.zeros((2, 2, 1)), jnp.array([[2.0], [-1.0]])
    model = eqx.tree_at(parts, model, (weight, bias, jnp.full((2, 1), jnp.log(3.0))))
    apart = dynamics.disagreement(model, jnp.zeros((5, 1)), jnp.zeros((5, 1)), jax.random.key(0))
    np.testing.assert_allclose(apart, [1.0] * 5, rtol=1e-5)


def test_trust_asks_two_members_of_a_learned_model() -> None:
    trusting = ["imagination.trust=2", "train.total_steps=9000"]
    one = build("Hopper-v4", "mbpo", [*trusting, "dynamics.elites=1"])
    with pytest.raises(UserError, match="two members"):
        schedule.check(one, fits_model=True)
    with pytest.raises(UserError, match="mve-sac has none"):
        schedule.check(build("Hopper-v4", "mve-sac", trusting), fits_model=True)
    some = build("Hopper-v4", "mbpo", trusting)
    schedule.check(some, fits_model=True)
    with pytest.raises(UserError, match="two members"):
        schedule.check(some, fits_model=False)


def test_several_real_steps_ask_for_real_rows_and_for_nobody_else_who_sums_them() -> None:
    several = ["targets.n_step=3", "train.total_steps=9000"]

    def check(algo: str, *settings: str) -> None:
        built = schedule.with_budgets(build("Hopper-v4", algo, [*several, *settings]), 1000)
        schedule.check(built, fits_model=True)

    for algo in ("mve-sac", "mbpo", "td3"):
        check(algo)
    with pytest.raises(UserError, match="weighs the real steps that followed by itself"):
        check("sac", "targets.estimator=retrace")
    with pytest.raises(UserError, match="leaves none to learn from"):
        check("dhmbpo")
    with pytest.raises(UserError, match="what single steps earn"):
        check("sac", "agent.value_bounds_rate=3e-4")
    # Rollouts that the actor takes of the policy's own first actions say it, expanded or not.
    check("mve-svg", "targets.estimator=one_step")
    with pytest.raises(UserError, match="what single steps earn"):
        check("mve-svg", "targets.estimator=one_step", "agent.model_steps=0")
    check("td3", "targets.n_step_drawn=true")
    with pytest.raises(UserError, match="which is 1"):
        check("td3", "targets.n_step=1", "targets.n_step_drawn=true")
    check("td3", "targets.n_step_within=4000")
    with pytest.raises(UserError, match="which is 1"):
        check("td3", "targets.n_step=1", "targets.n_step_within=4000")
    check("td3", "targets.n_step_warmup=false")
    with pytest.raises(UserError, match="which is 1"):
        check("td3", "targets.n_step=1", "targets.n_step_warmup=false")


def test_only_the_newest_rounds_are_sampled() -> None:
    ours = recipe(length=(1, 1), length_ramp=(0, 1), rounds_kept=1)
    ours = replace(ours, imagination=replace(ours.imagination, length=(1, 3), length_ramp=(100, 101)))
    state = state_of(ours)
    first = filled(state, ours, seed=0)
    second = filled(first, ours, seed=1)  # both of one step: the buffer has room for three, one round counts
    newest = {tuple(s) for s in rows_of(second.imagined).next_obs[STARTS:]}
    batch = SAMPLE(second, ours, jax.random.key(2))
    imagined = np.asarray(batch.reward) != -1
    assert {tuple(s) for s in np.asarray(batch.next_obs)[imagined]} <= newest


@pytest.mark.parametrize(("share", "real"), [(0.0, 0), (0.05, 2), (0.5, 20), (1.0, 40)])
def test_every_batch_has_its_share_of_real_rows(share: float, real: int) -> None:
    ours = recipe(real_share=share)
    batch = SAMPLE(filled(state_of(ours), ours), ours, jax.random.key(3))
    np.testing.assert_array_equal(np.asarray(batch.action[:, 0]) == 2.0, np.arange(BATCH) < real)


def test_whole_updates_are_real_or_imagined_in_the_given_share() -> None:
    ours = recipe(real_share=0.2, mixed_by="update")
    state = filled(state_of(ours), ours)
    keys = jax.random.split(jax.random.key(4), 200)
    batches = jax.jit(jax.vmap(lambda key: experience.sample_batch(state, ours, key)))(keys)
    is_real = np.asarray(batches.action[..., 0]) == 2.0
    assert (is_real.all(axis=1) | ~is_real.any(axis=1)).all()
    assert 0.1 < is_real[:, 0].mean() < 0.3


def test_the_policy_takes_the_first_step_anew_from_buffered_states_alone() -> None:
    ours = recipe(real_share=0.5, first_step="imagined")
    state = filled(state_of(ours), ours)
    other = recipe(real_share=0.5)
    anew, stored = (SAMPLE(state, r, jax.random.key(5)) for r in (ours, other))
    half = BATCH // 2
    for a, b in zip(jax.tree.leaves(anew), jax.tree.leaves(stored), strict=True):
        np.testing.assert_array_equal(a[:half], b[:half])
    np.testing.assert_array_equal(anew.obs, stored.obs)

    agent = state.agent
    moved = replace(state, agent=jax.tree.map(lambda x: x + 0.1 if x.dtype == jnp.float32 else x, agent))
    batch = SAMPLE(moved, ours, jax.random.key(5))
    expected, _ = moved.agent.target_policy(batch.obs, jax.random.key(0))
    np.testing.assert_allclose(batch.action[half:], expected[half:], atol=1e-6)
    assert np.abs(batch.action[half:] - stored.action[half:]).max() > 1e-3


def test_the_first_round_comes_with_the_first_update_and_then_one_an_interval() -> None:
    settings = ["train.learning_starts=1000", "imagination.starts=8", "imagination.interval_steps=250"]
    config = build("Pendulum-v1", "sac", settings)
    assert [schedule.rounds_due(config, s) for s in (0, 1000, 1001, 1249, 1250, 1500, 2000)] == [
        *(0, 0, 1, 1, 2, 3, 5)
    ]


# --- The actor's objective ---


def policy_of(gain: jax.Array):
    return lambda obs, key: (obs @ gain, jnp.full(obs.shape[:-1], 0.25))


def linear_step(obs, action, key):
    gone = jnp.zeros(obs.shape[:-1])
    return LINEAR.next_obs(obs, action), LINEAR.reward(obs, action), 1.0 - gone


def test_what_cannot_be_computed_beyond_an_end_counts_for_nothing() -> None:
    """A reward that is no number where an episode is over: sqrt(s), and s < 0 ends it. By hand, gamma 0.5."""

    def step_fn(obs: jax.Array, action: jax.Array, key: jax.Array) -> tuple[jax.Array, ...]:
        next_obs = obs + action
        return next_obs, jnp.sqrt(obs[..., 0]), (next_obs[..., 0] >= 0).astype(jnp.float32)

    def policy_of(gain: jax.Array):
        return lambda obs, key: (jnp.broadcast_to(gain, obs.shape), jnp.zeros(obs.shape[:-1]))

    def value(obs: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        return obs[..., 0], obs[..., 0]

    def worth_of(gain: jax.Array) -> jax.Array:
        rollout = imagine.rollout(step_fn, policy_of(gain), jnp.array([[1.0], [9.0]]), 3, jax.random.key(0))
        return jnp.sum(train.worth(rollout, value, discount=0.5, key=jax.random.key(0))[0])

    worth, slope = jax.value_and_grad(worth_of)(jnp.float32(-2.0))
    # From 1 the step to -1 is the last: 1. From 9: 3 + sqrt(7) / 2 + sqrt(5) / 4 + 3 / 8.
    by_hand = 1.0 + 3.0 + 7.0**0.5 / 2 + 5.0**0.5 / 4 + 3.0 / 8
    np.testing.assert_allclose(worth, by_hand, rtol=1e-6)
    # d/da of sqrt(9 + a) / 2 + sqrt(9 + 2 a) / 4 + (9 + 3 a) / 8.
    np.testing.assert_allclose(slope, 0.25 / 7.0**0.5 + 0.25 / 5.0**0.5 + 3.0 / 8, rtol=1e-6)


def test_nothing_is_imagined_from_where_a_real_episode_ended() -> None:
    ours = replace(recipe(), targets=TargetsConfig(estimator="mve", horizon_steps=2))
    state = state_of(ours)
    rows: Transition = jax.tree.map(lambda x: x[:ROWS], state.replay.rows)
    batch = rows._replace(next_obs=rows.obs + 1.0, continuation=jnp.arange(ROWS, dtype=jnp.float32) % 2.0)
    ahead = jax.jit(experience.imagine_ahead, static_argnums=1)(state, ours, batch, jax.random.key(0))
    np.testing.assert_array_equal(ahead.obs[0, ::2], batch.obs[::2])
    np.testing.assert_array_equal(ahead.obs[0, 1::2], batch.next_obs[1::2])


@pytest.mark.parametrize("steps", [0, 1, 4])
def test_an_expanded_objective_adds_the_models_rewards_and_every_bonus_once(steps: int) -> None:
    """Constant reward 2, bonus 1/4 and tail 8 (own bonus included): sum gamma^t 2.25 + gamma^H 8."""

    def step(obs, action, key):
        return obs, 2.0 * jnp.ones(obs.shape[:-1]), jnp.ones(obs.shape[:-1])

    objective = train.actor_objective(lambda key: step, steps, 0.5)
    value = lambda obs, key: (jnp.full(obs.shape[:-1], 8.0), jnp.full(obs.shape[:-1], 0.25))  # noqa: E731
    obs = jnp.ones((3, 2))
    total, bonus = objective(policy_of(jnp.zeros((2, 1))), value, obs, jax.random.key(0))
    expected = sum(0.5**t * 2.25 for t in range(steps)) + 0.5**steps * 8.0
    np.testing.assert_allclose(total, expected, rtol=1e-6)
    np.testing.assert_allclose(bonus, 0.25)


def test_an_imagined_end_cuts_the_rest_of_the_objective_off() -> None:
    def step(obs, action, key):
        return obs + 1.0, jnp.ones(obs.shape[:-1]), (obs[..., 0] < 1.0).astype(jnp.float32)

    value = lambda obs, key: (jnp.full(obs.shape[:-1], 100.0), jnp.zeros(obs.shape[:-1]))  # noqa: E731
    still = lambda obs, key: (obs[..., :1], jnp.zeros(obs.shape[:-1]))  # noqa: E731
    total, _ = train.actor_objective(lambda key: step, 3, 0.5)(
        still, value, jnp.zeros((1, 2)), jax.random.key(0)
    )
    np.testing.assert_allclose(total, 1.0 + 0.5 * 1.0)  # two steps, the second of which ends it


@pytest.mark.parametrize("steps", [1, 3])
def test_the_objectives_gradient_goes_through_model_and_policy(steps: int) -> None:
    """On the linear system, against finite differences; the tail is the value of a fixed policy."""
    gain = jnp.asarray(LINEAR.gain, jnp.float32)
    obs = jax.random.normal(jax.random.key(0), (5, 2))
    value = lambda obs, key: (LINEAR.value(obs), jnp.zeros(obs.shape[:-1]))  # noqa: E731
    objective = train.actor_objective(lambda key: linear_step, steps, LINEAR.discount)

    def total(gain: jax.Array) -> jax.Array:
        return jnp.mean(objective(policy_of(gain), value, obs, jax.random.key(1))[0])

    gradient = jax.jit(jax.grad(total))(gain)
    evaluate, h = jax.jit(total), 1e-2
    for i in range(2):
        move = jnp.zeros_like(gain).at[i, 0].set(h)
        difference = (evaluate(gain + move) - evaluate(gain - move)) / (2 * h)
        np.testing.assert_allclose(gradient[i, 0], difference, rtol=2e-2, atol=2e-3)


def test_with_the_exact_model_and_value_the_objective_is_the_value_at_any_depth() -> None:
    obs = jax.random.normal(jax.random.key(0), (5, 2))
    value = lambda obs, key: (LINEAR.value(obs), jnp.zeros(obs.shape[:-1]))  # noqa: E731
    policy = lambda obs, key: (LINEAR.policy(obs).astype(jnp.float32), jnp.zeros(obs.shape[:-1]))  # noqa: E731
    for steps in (0, 1, 5):
        total, _ = train.actor_objective(lambda key: linear_step, steps, LINEAR.discount)(
            policy, value, obs, jax.random.key(1)
        )
        np.testing.assert_allclose(total, LINEAR.value(obs), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("capacity", [1000, 400])
def test_recent_rows_are_drawn_more_often_if_so_set(capacity: int) -> None:
    """At 2, half of what is drawn is of the newest quarter; also in a ring that has wrapped."""
    memory = replay.init(capacity, 1, 1)
    rows = Transition(*(jnp.zeros((500, *leaf.shape[1:]), leaf.dtype) for leaf in memory.rows))
    rows = rows._replace(step=jnp.arange(500))
    memory = replay.add(memory, rows, jnp.ones(500, bool))
    size = min(capacity, 500)
    age = 499 - np.asarray(replay.sample(memory, (20_000,), jax.random.key(0), recency=2.0).step)
    assert (age.min(), age.max()) == (0, size - 1)
    for share in (0.01, 0.25, 0.5):
        assert np.mean(age < share * size) == pytest.approx(share**0.5, abs=0.02)
    alike = replay.sample(memory, (50,), jax.random.key(0))
    again = replay.sample(memory, (50,), jax.random.key(0), recency=1.0)
    np.testing.assert_array_equal(alike.step, again.step)
