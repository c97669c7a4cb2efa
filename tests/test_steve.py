"""STEVE: weights and targets worked by hand, every combination of members against a naive loop, and who
moves and judges whom in an imagined step. Batch axes are (M, B), rewards (H, R, M, B)."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_targets import GAMMA, config, transition, value_fn

from mve import dynamics, replay, targets, train
from mve.agents import AGENTS
from mve.dynamics import Dynamics, DynamicsConfig
from mve.state import Capacity, Recipe, fresh_state
from mve.targets import TargetsConfig
from mve.types import CriticTargets, EstimatorFns, Imagined, Known, Transition

ESTIMATE = jax.jit(targets.estimate, static_argnums=(2, 3))
MEMBER_STEP = jax.jit(dynamics.member_step, static_argnums=(1, 2), static_argnames="crossed")
STEP = jax.jit(dynamics.step, static_argnums=(1, 2))
INIT = jax.jit(fresh_state, static_argnums=(0, 1, 2))
UPDATE = jax.jit(train.update_step, static_argnums=1)
VARIANTS = ["steve", "steve_mean", "steve_cov"]
MODEL = DynamicsConfig(hidden=(8,), members=3, batch_size=8)
KNOWN = Known(lambda s, a, n: s[..., 0] + n[..., 1], lambda s, a, n: n[..., 0] > 0.3)


def imagined(reward: np.ndarray, continuation: np.ndarray | None = None, bonus: float = 0.0) -> Imagined:
    """Rewards (H, R, M, B); state t of every rollout is the number t."""
    horizon, _, *batch = reward.shape
    return Imagined(
        obs=jnp.broadcast_to(jnp.arange(horizon + 1.0)[:, None, None, None], (horizon + 1, *batch, 1)),
        action=jnp.zeros((horizon, *batch, 1)),
        reward=jnp.asarray(reward, jnp.float32),
        continuation=jnp.ones((horizon, *batch)) if continuation is None else jnp.asarray(continuation),
        bonus=jnp.full((horizon, *batch), bonus),
    )


def estimate(estimator: str, batch: Transition, rollout: Imagined) -> CriticTargets:
    return ESTIMATE(batch, rollout, EstimatorFns(value_fn), config(estimator))


ONE_CRITIC = EstimatorFns(lambda obs: value_fn(obs)[:1])


def random_case(seed: int, horizon: int = 3, rows: int = 5) -> tuple[Transition, Imagined]:
    """Two reward models, three members; `value_fn` has two critics."""
    rng = np.random.default_rng(seed)
    batch = transition(rng.normal(size=rows).tolist(), rng.integers(0, 2, rows).astype(float).tolist())
    rollout = imagined(
        rng.normal(size=(horizon, 2, 3, rows)),
        (rng.random((horizon, 3, rows)) < 0.8).astype(np.float32),
    )
    obs = jnp.asarray(rng.normal(size=(horizon + 1, 3, rows, 1)), jnp.float32)
    return batch, rollout._replace(
        obs=obs, bonus=jnp.asarray(rng.normal(size=(horizon, 3, rows)), jnp.float32)
    )


# --- Golden numbers, worked by hand: gamma = 1/2, critics 16 + s and 20 + s ---

TWO_MEMBERS = np.array([2.0, 4.0]).reshape(1, 1, 2, 1)  # H = 1; known reward; the members' s_1 earn 2 and 4


@pytest.mark.parametrize(
    ("estimator", "value"),
    [
        # k = 0: 16, 20; mean 18, variance 4. k = 1: 2 or 4, plus 8.5 or 10.5: 10.5, 12.5, 12.5, 14.5;
        # mean 12.5, variance 2. Weights 1/3, 2/3: mix 43/3, y = 1 + 43/6.
        ("steve", 49 / 6),
        ("steve_mean", 1 + (18 + 12.5) / 4),
        # The scatter is [[16, 8], [8, 8]], which times (0, 1) is 8 (1, 1): all weight on k = 1.
        ("steve_cov", 1 + 12.5 / 2),
    ],
)
def test_target_of_two_critics_and_two_members_by_hand(estimator: str, value: float) -> None:
    rows = estimate(estimator, transition([1.0], [1.0]), imagined(TWO_MEMBERS))
    np.testing.assert_allclose(rows.value, [value], rtol=1e-4)
    np.testing.assert_allclose(rows.weight, [1.0])


def test_the_weights_that_were_given_are_reported_as_means_over_rows() -> None:
    # Members 2 and 4 as above: 1/3, 2/3. Members that agree on 2: variances 4 and 1 by the critics: 1/5, 4/5.
    reward = np.array([[2.0, 2.0], [4.0, 2.0]]).reshape(1, 1, 2, 2)
    rows = estimate("steve", transition([1.0] * 2, [1.0] * 2), imagined(reward))
    np.testing.assert_allclose(rows.horizon_weight, [(1 / 3 + 1 / 5) / 2, (2 / 3 + 4 / 5) / 2], rtol=1e-5)


def test_learned_rewards_are_crossed_with_members_by_hand() -> None:
    # One reward model says 2 of either member's step, the other 4 and 8: mean 4, variance 6, and 1 from the
    # critics. k = 1 has mean 13.5, variance 7; weights 7/11, 4/11: mix 180/11.
    reward = np.array([[2.0, 2.0], [4.0, 8.0]]).reshape(1, 2, 2, 1)
    rows = estimate("steve", transition([1.0], [1.0]), imagined(reward))
    np.testing.assert_allclose(rows.value, [1 + 90 / 11], rtol=1e-5)


def test_weights_are_inverse_variances_and_sum_to_one() -> None:
    # Spreads of +-1, +-2 and +-4: precisions 1, 1/4, 1/16.
    candidates = jnp.array([[[1.0], [-1.0]], [[12.0], [8.0]], [[-4.0], [4.0]]])
    weight = targets.inverse_variance_weights(candidates)
    np.testing.assert_allclose(weight[:, 0], [16 / 21, 4 / 21, 1 / 21], rtol=1e-5)


def test_covariance_weights_may_be_negative() -> None:
    # Horizon 1 repeats the error of horizon 0 twofold, and adds a little: scatter [[4, 8], [8, 20]].
    candidates = jnp.array([[-1.0, -1.0, 1.0, 1.0], [-3.0, -1.0, 1.0, 3.0]])[..., None]
    weight = targets.inverse_covariance_weights(candidates)
    np.testing.assert_allclose(weight[:, 0], [12 / 8, -4 / 8], rtol=1e-2)


# --- Identities ---


@pytest.mark.parametrize("estimator", VARIANTS)
def test_members_that_differ_alike_at_every_horizon_get_equal_weights(estimator: str) -> None:
    # gamma 1, rewards 0, and no termination: C_k = v_n(s_k); the critics are 4 apart at every s_k.
    rollout = imagined(np.zeros((3, 1, 2, 4)))
    settings = TargetsConfig(estimator=estimator, discount=1.0)  # pyright: ignore[reportArgumentType]
    rows = ESTIMATE(transition([1.0] * 4, [1.0] * 4), rollout, EstimatorFns(value_fn), settings)
    np.testing.assert_allclose(rows.value, 1.0 + 18.0 + 1.5, rtol=1e-5)


def test_one_critic_and_one_member_weigh_all_horizons_alike() -> None:
    batch, rollout = random_case(0)
    alone = jax.tree.map(lambda x: x[:, :1], rollout)._replace(reward=rollout.reward[:, :1, :1])
    steve, mean = (ESTIMATE(batch, alone, ONE_CRITIC, config(e)) for e in ("steve", "steve_mean"))
    np.testing.assert_allclose(steve.value, mean.value, rtol=1e-5)


def test_one_critic_and_several_members_leave_one_step_only() -> None:
    batch, rollout = random_case(1)
    same_start = rollout._replace(obs=rollout.obs.at[0].set(rollout.obs[0, :1]))
    steve = ESTIMATE(batch, same_start, ONE_CRITIC, config("steve"))
    first_member = Imagined(*(x[:, 0] for x in same_start))
    one_step = ESTIMATE(batch, first_member, ONE_CRITIC, config("one_step"))
    np.testing.assert_allclose(steve.value, one_step.value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("estimator", VARIANTS)
def test_a_horizon_of_zero_is_one_step_for_a_single_critic(estimator: str) -> None:
    batch, rollout = random_case(2)
    start = rollout.obs[:1, :1]
    nothing = jax.tree.map(lambda x: x[:0, :1], rollout)._replace(obs=start, reward=jnp.zeros((0, 1, 1, 5)))
    got = ESTIMATE(batch, nothing, ONE_CRITIC, config(estimator))
    one_step = ESTIMATE(batch, Imagined(*(x[:, 0] for x in nothing)), ONE_CRITIC, config("one_step"))
    np.testing.assert_allclose(got.value, one_step.value, rtol=1e-6)


@pytest.mark.parametrize("estimator", VARIANTS)
def test_exact_values_leave_nothing_to_weigh(estimator: str) -> None:
    exact = lambda obs: jnp.full((2, *obs.shape[:-1]), 2.0)  # noqa: E731
    rows = ESTIMATE(
        transition([1.0], [1.0]), imagined(np.ones((5, 2, 2, 1))), EstimatorFns(exact), config(estimator)
    )
    np.testing.assert_allclose(rows.value, 2.0, rtol=1e-6)


@pytest.mark.parametrize("estimator", VARIANTS)
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
def test_weights_sum_to_one_however_alike_the_horizons_are(estimator: str, scale: float) -> None:
    rng = np.random.default_rng(0)
    shared = rng.normal(size=(1, 64, 8)) + 1e-3 * rng.normal(size=(6, 64, 8))
    candidates = jnp.asarray(scale * shared, jnp.float32)
    weigh = {
        "steve": targets.inverse_variance_weights,
        "steve_mean": targets.equal_weights,
        "steve_cov": targets.inverse_covariance_weights,
    }[estimator]
    weight = weigh(candidates)
    np.testing.assert_allclose(weight.sum(axis=0), 1.0, rtol=1e-4)
    assert jnp.abs(weight).max() < 100.0


# --- Terminations ---


@pytest.mark.parametrize("estimator", VARIANTS)
def test_nothing_after_a_predicted_termination_matters(estimator: str) -> None:
    batch, calm = random_case(3, horizon=4)
    calm = calm._replace(continuation=calm.continuation.at[1].set(0.0))
    wild = calm._replace(
        reward=calm.reward.at[2:].set(1e6), bonus=calm.bonus.at[2:].set(-1e6), obs=calm.obs.at[2:].set(1e6)
    )
    np.testing.assert_array_equal(
        estimate(estimator, batch, calm).value, estimate(estimator, batch, wild).value
    )


@pytest.mark.parametrize("estimator", VARIANTS)
def test_a_terminal_real_row_is_its_reward(estimator: str) -> None:
    rows = estimate(estimator, transition([7.0], [0.0]), imagined(1e3 * TWO_MEMBERS))
    np.testing.assert_allclose(rows.value, 7.0)


# --- Fast == naive, jit == eager, vmap == loop ---


def naive_steve(batch: Transition, rollout: Imagined) -> list[float]:
    """One candidate after the other: for each row b, horizon k, reward model r, critic n and member m."""
    horizon, reward_models, members, rows = rollout.reward.shape
    value = np.asarray(value_fn(rollout.obs), np.float64)
    targets = []
    for b in range(rows):
        mean, precision = [], []
        for k in range(horizon + 1):
            opinions = []
            for r, n, m in np.ndindex(reward_models, len(value), members):
                total, survival = 0.0, 1.0
                for t in range(k):
                    total += survival * float(rollout.reward[t, r, m, b] + rollout.bonus[t, m, b])
                    survival *= GAMMA * float(rollout.continuation[t, m, b])
                opinions.append(total + survival * value[n, k, m, b])
            mean.append(np.mean(opinions))
            precision.append(1.0 / (np.var(opinions) + 1e-8))
        mix = float(np.dot(precision, mean) / np.sum(precision))
        targets.append(float(batch.reward[b]) + GAMMA * float(batch.continuation[b]) * mix)
    return targets


@pytest.mark.parametrize("seed", range(5))
def test_steve_agrees_with_a_naive_loop_on_random_draws(seed: int) -> None:
    batch, rollout = random_case(seed)
    np.testing.assert_allclose(
        estimate("steve", batch, rollout).value, naive_steve(batch, rollout), rtol=1e-4
    )


@pytest.mark.parametrize("estimator", VARIANTS)
def test_compiled_and_vectorised_estimators_agree_with_eager_ones(estimator: str) -> None:
    cases = [random_case(seed) for seed in range(2)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *cases)
    together = jax.jit(jax.vmap(partial(estimate, estimator)))(*stacked)
    for i, case in enumerate(cases):
        for a, b in zip(jax.tree.map(lambda x, i=i: x[i], together), estimate(estimator, *case), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


# --- The imagined step of an ensemble whose members are kept apart ---


def model_of(known: Known, rows: Transition) -> Dynamics:
    model = jax.jit(dynamics.init, static_argnums=(0, 1, 2, 3))(MODEL, known, 2, 1, jax.random.key(0))
    return dynamics.observe(model, rows, jnp.int32(len(rows.reward)), MODEL)


def random_rows(num_rows: int) -> Transition:
    rng = np.random.default_rng(0)
    columns = (rng.normal(size=(num_rows, *tail)).astype(np.float32) for tail in ((2,), (1,), (), (2,)))
    return Transition(
        *map(jnp.asarray, columns),
        continuation=jnp.ones(num_rows),
        episode=jnp.zeros(num_rows, jnp.int32),
        step=jnp.arange(num_rows),
        log_density=jnp.zeros(num_rows),
    )


@pytest.mark.parametrize("known", [Known(), KNOWN], ids=["learned", "known"])
def test_every_member_moves_its_own_states_and_every_reward_model_judges_them(known: Known) -> None:
    rows = random_rows(12)
    model = model_of(known, rows)
    obs, action = rows.obs.reshape(3, 4, 2), rows.action.reshape(3, 4, 1)
    next_obs, reward, continuation = MEMBER_STEP(model, known, MODEL, obs, action, crossed=True)
    assert reward.shape == ((1 if known.reward else 3), 3, 4)
    for m in range(3):
        net = jax.tree.map(lambda x, m=m: jnp.stack([x[m]] * 3), model.net)
        copies = Dynamics(net, *(getattr(model, f) for f in list(model.__dataclass_fields__)[1:]))
        alone = [STEP(copies, known, MODEL, obs[i], action[i], jax.random.key(0)) for i in range(3)]
        np.testing.assert_allclose(next_obs[m], alone[m][0], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(continuation[m], alone[m][2])
        if known.reward:
            np.testing.assert_allclose(reward[0, m], alone[m][1], rtol=1e-5, atol=1e-5)
        else:
            for i in range(3):
                np.testing.assert_allclose(reward[m, i], alone[i][1], rtol=1e-5, atol=1e-5)


def test_a_member_that_is_asked_about_its_own_steps_alone_says_of_them_what_it_did() -> None:
    rows = random_rows(12)
    model = model_of(Known(), rows)
    asked = model, Known(), MODEL, rows.obs.reshape(3, 4, 2), rows.action.reshape(3, 4, 1)
    all_next, crossed, all_continuation = MEMBER_STEP(*asked, crossed=True)
    next_obs, own, continuation = MEMBER_STEP(*asked, crossed=False)
    assert own.shape == (1, 3, 4)
    np.testing.assert_allclose(own[0], crossed[np.arange(3), np.arange(3)], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(next_obs, all_next, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(continuation, all_continuation)


def recipe(agent: str, estimator: str, known: Known, horizon: int = 2) -> Recipe:
    return Recipe(
        obs_size=2,
        action_size=1,
        known=known,
        agent=AGENTS[agent][0](hidden=(8,), critics=2, batch_size=8),
        dynamics=MODEL,
        targets=TargetsConfig(estimator=estimator, horizon_steps=horizon),  # pyright: ignore[reportArgumentType]
    )


@pytest.mark.parametrize(
    ("agent", "known", "horizon"),
    [*[(agent, Known(), 2) for agent in AGENTS], ("ddpg", KNOWN, 2), ("ddpg", Known(), 0)],
)
def test_every_agent_takes_a_step_towards_steves_targets(agent: str, known: Known, horizon: int) -> None:
    ours = recipe(agent, "steve", known, horizon)
    state = INIT(ours, Capacity(16), 0)
    memory = replay.add(state.replay, random_rows(16), jnp.ones(16, bool))
    model = model_of(known, random_rows(16)) if horizon else None
    after, metrics = UPDATE(replace(state, replay=memory, model=model), ours, jax.random.key(1))
    assert all(bool(jnp.isfinite(m)) for m in metrics.values())
    moved = jax.tree.map(lambda a, b: jnp.any(a != b), state.agent.critic, after.critic)
    assert any(jax.tree.leaves(moved))
