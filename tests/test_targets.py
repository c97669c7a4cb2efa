"""The estimators: golden numbers worked by hand, identities between them, fast == naive on random draws."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mve import targets
from mve.targets import TargetsConfig
from mve.types import CriticTargets, EstimatorFns, Imagined, Segment, Transition

GAMMA = 0.5
EXPANDED = ["mve", "mve_tdk", "lambda"]


def transition(reward: list[float], continuation: list[float]) -> Transition:
    rows = len(reward)
    return Transition(
        obs=jnp.full((rows, 1), -1.0),
        action=jnp.full((rows, 1), -0.5),
        reward=jnp.array(reward),
        next_obs=jnp.zeros((rows, 1)),
        continuation=jnp.array(continuation),
        episode=jnp.zeros(rows, jnp.int32),
        step=jnp.arange(rows, dtype=jnp.int32),
        log_density=jnp.zeros(rows),
    )


def imagined(
    reward: list[list[float]],
    continuation: list[list[float]] | None = None,
    bonus: list[list[float]] | None = None,
) -> Imagined:
    """Rewards etc. given as H lists of B; state t of every row is the number t."""
    r = jnp.array(reward, jnp.float32)
    horizon, rows = r.shape
    return Imagined(
        obs=jnp.broadcast_to(jnp.arange(horizon + 1.0)[:, None, None], (horizon + 1, rows, 1)),
        action=jnp.broadcast_to(0.1 * jnp.arange(float(horizon))[:, None, None], (horizon, rows, 1)),
        reward=r,
        continuation=jnp.ones_like(r) if continuation is None else jnp.array(continuation, jnp.float32),
        bonus=jnp.zeros_like(r) if bonus is None else jnp.array(bonus, jnp.float32),
    )


def value_fn(obs: jax.Array) -> jax.Array:
    """Two critics: 16 + s and 20 + s. The lesser says 16 + s."""
    return jnp.stack([16.0 + obs[..., 0], 20.0 + obs[..., 0]])


def config(estimator: str, **settings: object) -> TargetsConfig:
    return TargetsConfig(estimator=estimator, discount=GAMMA, **settings)  # pyright: ignore


def estimate(estimator: str, batch: Transition, rollout: Imagined, **settings: object) -> CriticTargets:
    return targets.estimate(batch, rollout, EstimatorFns(value_fn), config(estimator, **settings))


def random_case(seed: int, horizon: int, rows: int) -> tuple[Transition, Imagined]:
    rng = np.random.default_rng(seed)
    batch = transition(rng.normal(size=rows).tolist(), rng.integers(0, 2, rows).astype(float).tolist())
    shape = (horizon, rows)
    rollout = imagined(
        rng.normal(size=shape).tolist(),
        (rng.random(shape) < 0.8).astype(float).tolist(),
        rng.normal(size=shape).tolist(),
    )
    return batch, rollout


# --- Golden numbers, worked by hand with gamma = 1/2 ---


def test_one_step_target_is_reward_plus_discounted_value_of_the_next_state() -> None:
    rows = estimate("one_step", transition([1.0, 1.0], [1.0, 0.0]), imagined([[9.0, 9.0]]))
    # 1 + 0.5 * 16 = 9 with the lesser critic; a terminated row keeps its reward only.
    np.testing.assert_allclose(rows.value, [9.0, 1.0])
    np.testing.assert_allclose(rows.weight, [0.5, 0.5])


def test_mve_target_of_two_imagined_steps_by_hand() -> None:
    rows = estimate("mve", transition([1.0], [1.0]), imagined([[2.0], [4.0]]))
    # V(s_2) = 18. W_1 = 4 + 18/2 = 13, W_0 = 2 + 13/2 = 8.5, y = 1 + 8.5/2 = 5.25.
    np.testing.assert_allclose(rows.value, [5.25])


def test_tdk_rows_of_two_imagined_steps_by_hand() -> None:
    rows = estimate("mve_tdk", transition([1.0], [1.0]), imagined([[2.0], [4.0]]))
    np.testing.assert_allclose(rows.value, [5.25, 8.5, 13.0])
    np.testing.assert_allclose(rows.obs[:, 0], [-1.0, 0.0, 1.0])
    np.testing.assert_allclose(rows.action[:, 0], [-0.5, 0.0, 0.1], rtol=1e-6)
    np.testing.assert_allclose(rows.weight, [0.5, 0.5, 0.5])  # three terms, divided by H = 2


def test_an_imagined_row_weighs_the_same_however_many_real_steps_led_to_it() -> None:
    """Of a sum of m real steps the continuation is gamma^(m-1)."""
    rollout = imagined([[2.0, 2.0], [4.0, 4.0]])
    rows = estimate("mve_tdk", transition([1.0, 1.0], [GAMMA**3, 0.0]), rollout)
    np.testing.assert_allclose(rows.weight.reshape(3, 2), [[0.25, 0.25], [0.5, 0], [0.5, 0]])
    np.testing.assert_allclose(rows.value[:2], [1.0 + GAMMA**4 * 8.5, 1.0])


def test_the_tail_of_row_t_is_discounted_by_gamma_to_the_h_minus_t() -> None:
    horizon = 4
    rows = estimate("mve_tdk", transition([0.0], [1.0]), imagined([[0.0]] * horizon))
    tail = 16.0 + horizon
    np.testing.assert_allclose(rows.value, [tail * GAMMA ** (horizon - t) for t in range(-1, horizon)])


def test_the_bonus_of_acting_at_a_state_enters_earlier_rows_and_never_its_own() -> None:
    rows = estimate("mve_tdk", transition([0.0], [1.0]), imagined([[0.0], [0.0]], bonus=[[32.0], [64.0]]))
    # V(s_2) = 18 holds its own bonus. G_1 = 9, W_1 = 73; G_0 = 36.5, W_0 = 68.5; y = 34.25.
    np.testing.assert_allclose(rows.value, [34.25, 36.5, 9.0])


def test_candidate_returns_by_hand() -> None:
    reward, discount = jnp.array([[2.0], [4.0]]), jnp.full((2, 1), GAMMA)
    got = targets.candidate_returns(reward, discount, jnp.array([[16.0], [17.0], [18.0]]))
    # v_0; 2 + 17/2; 2 + 4/2 + 18/4.
    np.testing.assert_allclose(got[:, 0], [16.0, 10.5, 8.5])


def test_lambda_target_of_two_imagined_steps_by_hand() -> None:
    rows = estimate("lambda", transition([1.0], [1.0]), imagined([[2.0], [4.0]]), trace_decay=0.5)
    # Candidates 16, 10.5, 8.5 with weights 1/2, 1/4, 1/4: 12.75; y = 1 + 12.75/2.
    np.testing.assert_allclose(rows.value, [7.375])


def test_weights_average_over_the_rows_kept_at_each_depth_and_divide_by_the_horizon() -> None:
    batch = transition([0.0] * 4, [1.0, 1.0, 1.0, 0.0])
    rollout = imagined([[0.0] * 4] * 2, continuation=[[1.0, 0.0, 1.0, 1.0], [1.0] * 4])
    rows = estimate("mve_tdk", batch, rollout)
    weight = rows.weight.reshape(3, 4)
    np.testing.assert_allclose(weight[0], [1 / 8] * 4)  # the real rows: all kept
    np.testing.assert_allclose(weight[1], [1 / 6, 1 / 6, 1 / 6, 0])  # row 3 was terminal
    np.testing.assert_allclose(weight[2], [1 / 4, 0, 1 / 4, 0])  # row 1 ended in imagination
    undivided = estimate("mve_tdk", batch, rollout, divide_by_horizon=False)
    np.testing.assert_allclose(undivided.weight, 2 * rows.weight)


def test_an_undivided_horizon_leaves_values_alone() -> None:
    batch, rollout = random_case(3, 3, 4)
    divided, undivided = (estimate("mve_tdk", batch, rollout, divide_by_horizon=d) for d in (True, False))
    np.testing.assert_array_equal(divided.value, undivided.value)


# --- Identities ---


@pytest.mark.parametrize("estimator", EXPANDED)
def test_a_horizon_of_zero_is_one_step_bit_for_bit(estimator: str) -> None:
    batch, rollout = random_case(0, 3, 5)
    nothing = jax.tree.map(lambda x: x[:0], rollout)._replace(obs=rollout.obs[:1])
    for expected, got in zip(
        estimate("one_step", batch, nothing), estimate(estimator, batch, nothing), strict=True
    ):
        np.testing.assert_array_equal(expected, got)


@pytest.mark.parametrize("seed", range(5))
def test_row_zero_of_tdk_is_mve(seed: int) -> None:
    batch, rollout = random_case(seed, 4, 6)
    np.testing.assert_array_equal(
        estimate("mve_tdk", batch, rollout).value[:6], estimate("mve", batch, rollout).value
    )


@pytest.mark.parametrize("seed", range(5))
def test_a_lambda_of_zero_is_one_step_and_of_one_is_mve(seed: int) -> None:
    batch, rollout = random_case(seed, 4, 6)
    for decay, estimator in ((0.0, "one_step"), (1.0, "mve")):
        mixed = estimate("lambda", batch, rollout, trace_decay=decay)
        for expected, got in zip(estimate(estimator, batch, rollout)[:4], mixed[:4], strict=True):
            np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_the_last_candidate_is_the_first_return_to_go(seed: int) -> None:
    rng = np.random.default_rng(seed)
    reward, discount = jnp.array(rng.normal(size=(5, 3))), jnp.array(rng.random((5, 3)))
    bootstrap = jnp.array(rng.normal(size=(6, 3)))
    last = targets.candidate_returns(reward, discount, bootstrap)[-1]
    np.testing.assert_allclose(last, targets.returns_to_go(reward, discount, bootstrap[-1])[0], rtol=1e-5)


@pytest.mark.parametrize("estimator", EXPANDED)
def test_exact_values_make_every_estimator_agree(estimator: str) -> None:
    # Reward 1 for ever: V = 1 / (1 - gamma) = 2 everywhere, and every target is 2.
    rollout = imagined([[1.0] * 3] * 5)
    exact = lambda obs: jnp.full((2, *obs.shape[:-1]), 2.0)  # noqa: E731
    rows = targets.estimate(transition([1.0] * 3, [1.0] * 3), rollout, EstimatorFns(exact), config(estimator))
    np.testing.assert_allclose(rows.value, 2.0, rtol=1e-6)


def test_a_constant_reward_converges_to_its_geometric_sum() -> None:
    nothing = lambda obs: jnp.zeros((1, *obs.shape[:-1]))  # noqa: E731
    rows = targets.estimate(
        transition([3.0], [1.0]), imagined([[3.0]] * 40), EstimatorFns(nothing), config("mve")
    )
    np.testing.assert_allclose(rows.value, 3.0 / (1.0 - GAMMA), rtol=1e-6)


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [("one_step", [1.0]), ("mve", [0, 0, 1]), ("mve_tdk", [0, 0, 1]), ("lambda", [0.5, 0.25, 0.25])],
)
def test_every_estimator_says_what_weight_it_gave_to_each_horizon(
    estimator: str, expected: list[float]
) -> None:
    batch, rollout = random_case(0, 2, 4)
    np.testing.assert_array_equal(
        estimate(estimator, batch, rollout, trace_decay=0.5).horizon_weight, expected
    )


# --- Terminations ---


@pytest.mark.parametrize("estimator", EXPANDED)
def test_nothing_after_a_predicted_termination_matters(estimator: str) -> None:
    batch = transition([1.0], [1.0])
    ends = [[1.0], [0.0], [1.0], [1.0]]
    calm = imagined([[2.0], [4.0], [0.0], [0.0]], ends)
    wild = imagined([[2.0], [4.0], [1e6], [-1e6]], ends, bonus=[[0.0], [0.0], [1e6], [1e6]])
    a, b = (estimate(estimator, batch, r) for r in (calm, wild))
    np.testing.assert_array_equal(a.weight, b.weight)
    np.testing.assert_array_equal(
        jnp.where(a.weight > 0, a.value, 0.0), jnp.where(b.weight > 0, b.value, 0.0)
    )
    if estimator != "lambda":  # which also believes the critic on the way
        np.testing.assert_allclose(a.value[0], 1.0 + GAMMA * (2.0 + GAMMA * 4.0))


@pytest.mark.parametrize("estimator", ["one_step", *EXPANDED])
def test_a_terminal_real_row_is_its_reward_and_imagines_nothing(estimator: str) -> None:
    rows = estimate(estimator, transition([7.0], [0.0]), imagined([[1e6], [1e6]]))
    np.testing.assert_allclose(rows.value[0], 7.0)
    np.testing.assert_allclose(rows.weight[1:], 0.0)


# --- Fast == naive, jit == eager, vmap == loop ---


def naive_tdk(batch: Transition, rollout: Imagined) -> list[list[float]]:
    """y_{-1}, y_0, ..., y_{H-1} of each row, term by term as the recursion is written in the paper's code."""
    horizon, rows = rollout.reward.shape
    out = []
    for b in range(rows):
        later = float(value_fn(rollout.obs[-1])[:, b].min())
        column = []
        for t in reversed(range(horizon)):
            y = float(rollout.reward[t, b]) + GAMMA * float(rollout.continuation[t, b]) * later
            column.append(y)
            later = y + float(rollout.bonus[t, b])
        column.append(float(batch.reward[b]) + GAMMA * float(batch.continuation[b]) * later)
        out.append(column[::-1])
    return np.transpose(out).tolist()


@pytest.mark.parametrize("seed", range(20))
def test_tdk_agrees_with_a_naive_loop_on_random_draws(seed: int) -> None:
    horizon = 1 + seed % 5
    batch, rollout = random_case(seed, horizon, 4)
    got = estimate("mve_tdk", batch, rollout).value.reshape(horizon + 1, 4)
    np.testing.assert_allclose(got, naive_tdk(batch, rollout), rtol=1e-4, atol=1e-4)


def naive_lambda(batch: Transition, rollout: Imagined, decay: float) -> list[float]:
    """W_t = (1 - l) V(s_t) + l (b_t + r_t + gamma c_t W_{t+1}), backwards: the recursive form of the mix."""
    horizon, rows = rollout.reward.shape
    value = np.asarray(value_fn(rollout.obs)).min(axis=0)
    out = []
    for b in range(rows):
        mix = value[horizon, b]
        for t in reversed(range(horizon)):
            gained = float(rollout.reward[t, b] + rollout.bonus[t, b])
            ahead = gained + GAMMA * float(rollout.continuation[t, b]) * mix
            mix = (1.0 - decay) * value[t, b] + decay * ahead
        out.append(float(batch.reward[b]) + GAMMA * float(batch.continuation[b]) * mix)
    return out


@pytest.mark.parametrize("seed", range(20))
def test_lambda_agrees_with_a_naive_loop_on_random_draws(seed: int) -> None:
    batch, rollout = random_case(seed, 1 + seed % 5, 4)
    got = estimate("lambda", batch, rollout, trace_decay=seed / 20).value
    np.testing.assert_allclose(got, naive_lambda(batch, rollout, seed / 20), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("estimator", ["one_step", *EXPANDED])
def test_compiled_estimators_agree_with_eager_ones(estimator: str) -> None:
    batch, rollout = random_case(1, 3, 4)
    eager = estimate(estimator, batch, rollout)
    compiled = jax.jit(lambda b, r: estimate(estimator, b, r))(batch, rollout)
    for a, b in zip(eager, compiled, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


@pytest.mark.parametrize("estimator", ["one_step", *EXPANDED])
def test_estimators_vectorise_over_seeds(estimator: str) -> None:
    cases = [random_case(seed, 3, 4) for seed in range(2)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *cases)
    together = jax.vmap(lambda b, r: estimate(estimator, b, r))(*stacked)
    for i, case in enumerate(cases):
        for a, b in zip(jax.tree.map(lambda x, i=i: x[i], together), estimate(estimator, *case), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6)


# --- Several real steps as one ---


ENDS = ((0.0, 0.0, 0.0, 0.0), (0.0, 0.0, 1.0, 0.0), (0.0, 1.0, 0.0, 0.0))  # of steps, row by row


def three_real_steps() -> tuple[Segment, jax.Array]:
    """Rewards 1, 2, 4 and bonuses 8, 16 in the second and third state, for four rows: all three steps, none
    of them the last; all three, the last an end; an end after two; a cut after one. Step t leads to t + 1."""
    steps = [
        transition([r] * 4, [1.0 - e for e in ends]) for r, ends in zip((1.0, 2.0, 4.0), ENDS, strict=True)
    ]
    rows: Transition = jax.tree.map(lambda *x: jnp.stack(x), *steps)
    led_to = jnp.broadcast_to(jnp.arange(1.0, 4.0)[:, None, None], (3, 4, 1))
    valid = jnp.array([[True] * 4, [True, True, True, False], [True, True, False, False]])
    bonus = jnp.broadcast_to(jnp.array([[8.0], [16.0]]), (2, 4))
    return Segment(rows._replace(next_obs=led_to), valid), bonus


def test_several_real_steps_are_one_whose_target_is_their_sum_and_what_follows() -> None:
    """By hand at gamma 1/2, V = 16 + s, which is 19 after three steps: 1 + (8 + 2) / 2 + (16 + 4) / 4
    + 19 / 8 = 13.375; without a future 11; an end after two: 1 + 10 / 2 = 6; a cut after one: 1 + 17 / 2.
    """
    one = targets.n_steps_as_one(*three_real_steps(), GAMMA)
    np.testing.assert_allclose(one.reward, [11.0, 11.0, 6.0, 1.0])
    np.testing.assert_allclose(one.continuation, [0.25, 0.0, 0.0, 1.0])
    np.testing.assert_allclose(one.next_obs[:, 0], [3.0, 3.0, 2.0, 1.0])
    np.testing.assert_array_equal(one.obs, three_real_steps()[0].rows.obs[0])
    rollout = imagined([[0.0] * 4])
    rollout = rollout._replace(obs=one.next_obs[None].repeat(2, 0))
    got = estimate("one_step", one, rollout)
    np.testing.assert_allclose(got.value, [13.375, 11.0, 6.0, 9.5])


def test_real_steps_beyond_a_rows_own_number_do_not_count() -> None:
    """The same rows of one, two, three and three steps: 1 + 17 / 2; 1 + (8 + 2) / 2 + 18 / 4; as before."""
    segment, bonus = three_real_steps()
    one = targets.n_steps_as_one(targets.cut(segment, jnp.array([1, 2, 3, 3])), bonus, GAMMA)
    rollout = imagined([[0.0] * 4])
    rollout = rollout._replace(obs=one.next_obs[None].repeat(2, 0))
    np.testing.assert_allclose(estimate("one_step", one, rollout).value, [9.5, 10.5, 6.0, 9.5])


def test_one_real_step_is_itself() -> None:
    segment, bonus = three_real_steps()
    alone = Segment(*jax.tree.map(lambda x: x[:1], segment))
    one = targets.n_steps_as_one(alone, bonus[:0], GAMMA)
    for got, wanted in zip(one, jax.tree.map(lambda x: x[0], segment.rows), strict=True):
        np.testing.assert_array_equal(got, wanted)
