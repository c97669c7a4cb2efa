"""Diagnoses against answers worked out by hand, and the command from run folder to picture."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import equinox as eqx
import gymnasium as gym
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnasium.spaces import Box

from mve import Learner, diagnose, dynamics, episodes, measure, replay
from mve.agents import Agent
from mve.agents.base import action_values
from mve.agents.ddpg import DDPGConfig
from mve.agents.sac import SACConfig
from mve.cli import main
from mve.dynamics import Dynamics, DynamicsConfig
from mve.envs import oracle
from mve.imagine import ImaginationConfig
from mve.measure import OpenLoop, Played
from mve.networks import MLP
from mve.policies import Policy
from mve.state import Recipe, TrainState
from mve.targets import TargetsConfig
from mve.types import CriticTargets, Known, Transition, UserError

DEEPEST, GAMMA = 4, 0.9


# A point on a line: s' = s + a, reward 1, two episodes of five steps.


def never(obs: Any, action: Any, next_obs: Any) -> Any:
    del obs, action
    return jnp.zeros(next_obs.shape[:-1], bool)


def one(obs: Any, action: Any, next_obs: Any) -> Any:
    del obs, action
    return jnp.ones(next_obs.shape[:-1])


RECIPE = Recipe(
    obs_size=1,
    action_size=1,
    known=Known(one, never),
    agent=DDPGConfig(),
    dynamics=DynamicsConfig(hidden=(), members=2, stay_in_data=False),
    targets=TargetsConfig(estimator="mve", horizon_steps=2, discount=GAMMA),
)


def model_with(bias: tuple[float, float]) -> Dynamics:
    """Two members that say s' = s + a + bias."""
    model = dynamics.init(RECIPE.dynamics, RECIPE.known, 1, 1, jax.random.key(0))
    layer = model.net.layers[0]
    weight = jnp.zeros_like(layer.weight).at[:, 1, 0].set(1.0)
    return eqx.tree_at(
        lambda m: (m.net.layers[0].weight, m.net.layers[0].bias), model, (weight, jnp.array(bias)[:, None])
    )


def played(last_terminates: bool = False) -> Played:
    action = np.random.default_rng(0).uniform(-1, 1, (2, 5)).astype(np.float32)
    states = np.concatenate([np.zeros((2, 1), np.float32), np.cumsum(action, axis=1)], axis=1)
    time = np.tile(np.arange(5), 2)
    rows = Transition(
        obs=states[:, :-1].reshape(10, 1),
        action=action.reshape(10, 1),
        reward=np.ones(10, np.float32),
        next_obs=states[:, 1:].reshape(10, 1),
        continuation=np.where((time == 4) & last_terminates, 0, 1).astype(np.float32),
        episode=np.repeat(np.int32([0, 1]), 5),
        step=np.arange(1, 11, dtype=np.int32),
        log_density=np.zeros(10, np.float32),
    )  # pyright: ignore[reportArgumentType]
    return Played(rows, np.zeros(10, np.float32), time == 4, time)


class Constant(Agent):
    """Stands still and says that every state is worth `value`, and every action too."""

    critic: MLP
    value: jax.Array

    @classmethod
    def saying(cls, value: float) -> Constant:
        critic = MLP(1, 1, (), side_inputs=1, key=jax.random.key(0))
        critic = jax.tree.map(lambda x: jnp.zeros((1, *x.shape)), critic)
        bias = jnp.full((1, 1), value, jnp.float32)
        return cls(eqx.tree_at(lambda c: c.layers[0].bias, critic, bias), jnp.float32(value))

    def action_values(self, obs: Any, action: Any) -> Any:
        return action_values(self.critic, obs, action)

    def policy(self) -> Policy:
        raise NotImplementedError

    def exploration_policy(self, key: Any) -> Policy:
        raise NotImplementedError

    def target_policy(self, obs: Any, key: Any) -> tuple[Any, Any]:
        return jnp.zeros_like(obs), jnp.zeros(obs.shape[:-1])

    def target_value(self, obs: Any, key: Any) -> Any:
        return jnp.broadcast_to(self.value, (1, *obs.shape[:-1]))

    def target_action_value(self, obs: Any, action: Any) -> Any:
        raise NotImplementedError

    def log_density(self, obs: Any, action: Any) -> Any:
        raise NotImplementedError

    def current_policy(self, obs: Any, key: Any) -> Any:
        raise NotImplementedError

    def update(self, targets: CriticTargets, obs: Any, objective: Any, key: Any) -> Any:
        raise NotImplementedError


def rolled(model: Dynamics, spread: float = 1.0) -> OpenLoop:
    rows = jax.tree.map(jnp.asarray, played().rows)
    spreads = jnp.array([spread], jnp.float32), jnp.float32(1)
    return measure.open_loop(model, RECIPE, rows, jnp.array([0, 5]), *spreads, DEEPEST)


def test_a_perfect_model_has_no_error_at_any_depth() -> None:
    errors = rolled(model_with((0.0, 0.0)))
    np.testing.assert_allclose(errors.state, 0.0, atol=1e-6)
    np.testing.assert_allclose(errors.members_apart, 0.0, atol=1e-6)
    np.testing.assert_array_equal(errors.reward, 0.0)
    assert not np.any(errors.wrong_end)


def test_a_steady_push_adds_up_with_depth_in_units_of_the_spread() -> None:
    errors = rolled(model_with((0.1, 0.1)), spread=2.0)
    depth = np.arange(1, DEEPEST + 1)
    np.testing.assert_allclose(
        errors.state, np.broadcast_to(0.05 * depth[:, None, None], (4, 2, 2)), atol=1e-6
    )


def test_members_that_err_in_opposite_ways_are_right_on_average_and_apart() -> None:
    errors = rolled(model_with((0.1, -0.1)))
    depth = np.arange(1, DEEPEST + 1)
    np.testing.assert_allclose(errors.mean_state, 0.0, atol=1e-6)
    # The standard deviation of +x and -x is x sqrt(2).
    expected = np.broadcast_to(0.1 * math.sqrt(2) * depth[:, None], (4, 2))
    np.testing.assert_allclose(errors.members_apart, expected, atol=1e-6)


def test_returns_of_a_constant_reward_are_geometric_sums() -> None:
    tail_value = np.full(10, 1 / (1 - GAMMA), np.float32)
    cut_off, weight = measure.monte_carlo_returns(played(), tail_value, GAMMA)
    np.testing.assert_allclose(cut_off, 10.0, rtol=1e-6)
    np.testing.assert_allclose(weight, np.tile(GAMMA ** np.arange(5, 0, -1), 2), rtol=1e-6)
    ended, weight = measure.monte_carlo_returns(played(last_terminates=True), tail_value, GAMMA)
    np.testing.assert_allclose(ended, np.tile([4.0951, 3.439, 2.71, 1.9, 1.0], 2), rtol=1e-6)
    np.testing.assert_array_equal(weight, 0.0)


def test_the_bonus_of_an_action_counts_before_it_and_not_in_its_own_return() -> None:
    with_bonus = played(last_terminates=True)._replace(bonus=np.tile(np.float32([0, 0, 0, 2, 0]), 2))
    earned, _ = measure.monte_carlo_returns(with_bonus, np.zeros(10, np.float32), 0.5)
    # Without it: 1, 1.5, 1.75, 1.875, 1.9375, backwards.
    np.testing.assert_allclose(earned[:5], [1.9375 + 0.25, 1.875 + 0.5, 1.75 + 1.0, 1.5, 1.0], rtol=1e-6)


def test_a_longer_horizon_discounts_the_critics_error() -> None:
    rows = jax.tree.map(jnp.asarray, played().rows)
    model = model_with((0.3, -0.2))  # no matter where it goes: the reward is 1 everywhere
    exact = measure.targets_by_horizon(Constant.saying(10.0), model, RECIPE, rows, DEEPEST)
    np.testing.assert_allclose(exact, 10.0, rtol=1e-6)
    high = measure.targets_by_horizon(Constant.saying(11.0), model, RECIPE, rows, DEEPEST)
    expected = np.broadcast_to(GAMMA ** np.arange(1, DEEPEST + 2)[:, None], (DEEPEST + 1, 10))
    np.testing.assert_allclose(high - 10.0, expected, rtol=1e-4)
    alone = measure.targets_by_horizon(Constant.saying(11.0), None, RECIPE, rows, DEEPEST)
    np.testing.assert_allclose(alone, [[10.9] * 10], rtol=1e-6)


# The simulator beside the model


class Walk(gym.Env):
    """s' = s + a, reward 1; ends beyond 2."""

    observation_space = Box(-np.inf, np.inf, (1,), np.float64)
    action_space = Box(-1.0, 1.0, (1,), np.float64)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.state = np.zeros(1)
        return self.state, {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.state = self.state + action
        return self.state, 1.0, bool(self.state[0] > 2), False, {}


class Line(Walk):
    """One that can be set."""

    def set_observation(self, obs: np.ndarray) -> None:
        self.state = obs


class Pushing(Constant):
    """Pushes to the right, more gently further out."""

    def target_policy(self, obs: Any, key: Any) -> tuple[Any, Any]:
        return 1.0 / (1.0 + jnp.abs(obs)), jnp.zeros(obs.shape[:-1])


def on_policy(bias: float, start: float = -5.0) -> measure.OnPolicy:
    simulator, obs = oracle.simulator(Line()), jnp.full((3, 1), start)
    model, agent = model_with((bias, bias)), Pushing.saying(0.0)
    rolled = measure.on_policy(agent, model, RECIPE, simulator, obs, DEEPEST)
    return measure.on_policy_errors(rolled, jnp.array([2.0]), jnp.float32(1))


def test_a_perfect_model_goes_where_the_simulator_goes_under_the_policys_own_actions() -> None:
    errors = on_policy(0.0)
    np.testing.assert_allclose(errors.state, 0.0, atol=1e-6)
    np.testing.assert_allclose(errors.reward, 0.0, atol=1e-6)
    assert np.all(errors.running)
    assert not np.any(errors.wrong_end)


def test_the_simulator_tries_the_actions_that_were_taken_in_the_models_states() -> None:
    """Had the policy acted in the simulator's own states, the errors would not add up to the pushes."""
    depth = np.arange(1, DEEPEST + 1)[:, None]
    np.testing.assert_allclose(on_policy(0.1).state, np.broadcast_to(0.05 * depth, (DEEPEST, 3)), atol=1e-6)


def test_steps_after_the_simulators_end_are_left_out_and_the_end_that_was_missed_is_not() -> None:
    errors = on_policy(0.0, start=1.2)  # 1.65, 2.03: over, which this model never says
    np.testing.assert_array_equal(errors.running[:, 0], [True, True, False, False])
    np.testing.assert_array_equal(errors.wrong_end[:2, 0], [False, True])


def test_targets_made_in_the_simulator_have_the_critics_error_alone() -> None:
    rows = jax.tree.map(jnp.asarray, played().rows)
    # A reward that the model misreads, for it is thought to be somewhere else: r = s'.
    recipe = replace(RECIPE, known=Known(lambda obs, action, next_obs: next_obs[..., 0], never))
    agent = Constant.saying(3.0)

    def still(obs: Any, action: Any, key: Any) -> tuple[Any, Any, Any]:
        return obs + action, (obs + action)[..., 0], jnp.ones(obs.shape[:-1])

    wrong = measure.targets_by_horizon(agent, model_with((0.5, 0.5)), recipe, rows, DEEPEST)
    right = measure.targets_by_horizon(agent, None, replace(recipe, simulator=still), rows, DEEPEST)
    stays = np.asarray(rows.next_obs[:, 0])
    for k in range(DEEPEST + 1):
        earned = 1.0 + sum(GAMMA ** (t + 1) for t in range(k)) * stays + GAMMA ** (k + 1) * 3.0
        np.testing.assert_allclose(right[k], earned, rtol=1e-5)
        drifted = sum(GAMMA ** (t + 1) * 0.5 * (t + 1) for t in range(k))
        np.testing.assert_allclose(wrong[k] - right[k], drifted, atol=1e-5)


def test_returns_in_the_model_are_what_it_would_pay_if_it_were_the_world() -> None:
    """By hand: from s' = 0 the policy stays, the model drifts by 0.5 a step and ends beyond 1.2, at its third
    step: 1 of the real step, then gamma + gamma^2 + gamma^3, one end in three steps. Where it never ends the
    critic's 3 follows four imagined steps. A real end is followed by nothing."""
    rows = jax.tree.map(lambda x: jnp.asarray(x[:2]), played().rows)
    rows = rows._replace(next_obs=jnp.zeros((2, 1)), continuation=jnp.array([1.0, 0.0]))
    agent, drifting = Constant.saying(3.0), model_with((0.5, 0.5))
    far = replace(RECIPE, known=Known(one, lambda obs, action, next_obs: next_obs[..., 0] > 1.2))
    worth, ends = measure.returns_in_model(agent, drifting, far, rows, 4)
    np.testing.assert_allclose(worth, [1 + GAMMA + GAMMA**2 + GAMMA**3, 1], rtol=1e-6)
    np.testing.assert_allclose(ends, 1 / 3, rtol=1e-6)
    worth, ends = measure.returns_in_model(agent, drifting, RECIPE, rows, 4)
    np.testing.assert_allclose(worth, [sum(GAMMA**t for t in range(5)) + 3 * GAMMA**5, 1], rtol=1e-6)
    assert ends == 0


def test_the_selector_takes_the_nearest_target_of_every_state() -> None:
    earned = np.zeros(4)
    by_horizon = np.array([[4.0, -4, 4, -4], [1, 5, -3, 4], [2, -1, 9, 4]])
    # It takes 1, -1, -3, -4: of 1 + 1 + 9 + 16 the root mean square is sqrt(27/4); one step has 4.
    target = by_horizon[1]  # squares 1 + 25 + 9 + 16
    found = measure.selector(by_horizon, target, earned)
    assert found["rmse"] == measure.plain([math.sqrt(27 / 4)])[0]
    assert found["chosen"] == [0.25, 0.5, 0.25]
    share = (4 - math.sqrt(51 / 4)) / (4 - math.sqrt(27 / 4))
    assert found["share_won"] == measure.plain([share])[0]
    assert measure.selector(by_horizon, by_horizon[0], earned)["share_won"] == 0
    assert measure.selector(by_horizon[:1], by_horizon[0], earned)["share_won"] is None
    diverged = by_horizon.copy()
    diverged[-1, :] = np.nan
    assert measure.selector(diverged, target, earned)["chosen"][-1] == 0.0


def judged_state() -> TrainState:
    return TrainState(
        replay=replay.init(1, 1, 1),
        model=model_with((0.0, 0.0)),
        calibration=None,
        imagined=None,
        agent=Constant.saying(7.0),
        num_env_steps=jnp.int32(0),
        key=jax.random.key(0),
    )


def test_the_target_that_training_makes_is_the_one_that_is_judged() -> None:
    rows, state = jax.tree.map(jnp.asarray, played().rows), judged_state()
    by_horizon = measure.targets_by_horizon(state.agent, state.model, RECIPE, rows, 2)
    steve = replace(RECIPE, targets=replace(RECIPE.targets, estimator="steve_mean"))
    everywhere = jnp.arange(len(rows.reward))
    for recipe, expected in ((RECIPE, by_horizon[2]), (steve, by_horizon.mean(axis=0))):
        got = measure.estimated_targets(state, recipe, rows, everywhere)
        np.testing.assert_allclose(got.value, expected, rtol=1e-6)


def test_a_real_row_of_a_shared_rollout_is_judged_by_a_step_more() -> None:
    """As it is trained: the policy's own first action has a target of two steps, the real one of three."""
    rows = jax.tree.map(jnp.asarray, played().rows)
    buffered = ImaginationConfig(starts=1, first_step="imagined", real_share=0.5)
    recipe = replace(RECIPE, agent=SACConfig(model_steps=3), imagination=buffered)
    assert (RECIPE.expanded_steps, recipe.expanded_steps) == (2, 3)
    assert replace(recipe, imagination=replace(buffered, real_share=0.0)).expanded_steps == 2
    one_step = replace(recipe.targets, estimator="one_step")
    assert replace(recipe, targets=one_step).expanded_steps == 0
    state = judged_state()
    by_horizon = measure.targets_by_horizon(state.agent, state.model, recipe, rows, 3)
    got = measure.estimated_targets(state, recipe, rows, jnp.arange(len(rows.reward)))
    np.testing.assert_allclose(got.value, by_horizon[3], rtol=1e-6)
    assert not np.allclose(by_horizon[2], by_horizon[3])


def test_scores_and_plain_numbers_are_as_worked_by_hand() -> None:
    score = measure.score(np.array([1.0, 2.0, 6.0]), np.array([0.0, 2.0, 4.0]))
    assert score == {"bias": 1.0, "mse": 1.66667, "rmse": 1.29099}
    assert measure.plain([1 / 3, math.nan, math.inf]) == [0.333333, None, None]


def test_calibration_compares_spread_and_error_bin_by_bin() -> None:
    apart = np.array([[4.0, 1.0, 3.0, 2.0, 9.0]])
    nothing = np.zeros((1, 2, 5))
    errors = OpenLoop(nothing, nothing, nothing > 0, 2 * apart, apart)  # type: ignore[arg-type]
    [found] = measure.calibration(errors, np.array([[True] * 4 + [False]]), [1], bins=2)
    assert found["spread"] == measure.plain([math.sqrt(2.5), math.sqrt(12.5)])
    assert found["error"] == measure.plain([math.sqrt(10), math.sqrt(50)])
    assert found["ratio"] == 2.0


# The command

TINY = [
    *("agent.hidden=[16]", "dynamics.hidden=[16]", "dynamics.members=2", "dynamics.termination=learned"),
    *("targets.discount=0.9", "train.total_steps=60"),
]


def untrained(algo: str, *settings: str) -> Learner:
    """One that remembers sixty random steps and has learned nothing: no compilation to wait for."""
    learner = Learner("Pendulum-v1", algo, settings=[*TINY, *settings], quiet=True)
    rng, state = np.random.default_rng(0), learner.state
    block, _ = learner.run.env.collect(lambda obs: rng.uniform(-1, 1, 1), 60)
    rows, num_rows = jax.tree.map(jnp.asarray, block), jnp.int32(60)
    assert state.model is not None
    model = dynamics.observe(state.model, rows, num_rows, learner.config.dynamics)
    learner.state = eqx.tree_at(
        lambda s: (s.replay, s.model, s.num_env_steps),
        state,
        (replay.add(state.replay, rows, jnp.ones(60, bool)), model, num_rows),
    )
    return learner


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("diagnosed") / "run"
    untrained("mve-sac").save(folder)
    return folder


def test_diagnose_writes_numbers_and_picture_and_says_what_it_found(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = set(run.rglob("*"))
    output = tmp_path / "deep" / "diagnosis"
    assert main(["diagnose", str(run), "--output", str(output), "--episodes", "2"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("Pendulum-v1, mve-sac, step 60: 2 fresh episodes, 400 states scored\n")
    assert out.endswith(f"written      {output}\n")
    assert {p.name for p in output.iterdir()} == {"diagnosis.json", "diagnosis.png"}
    assert (output / "diagnosis.png").read_bytes().startswith(b"\x89PNG")
    assert set(run.rglob("*")) == before

    report = json.loads((output / "diagnosis.json").read_text())
    assert report["lengths"] == [200, 200]
    assert report["largest_tail_weight"] <= 0.01  # played past the time limit
    error = report["model_error"]
    assert error["depth"] == list(range(1, 11))
    for name in ("state", "reward"):
        low, median, high = (np.array(error[name][level]) for level in ("low", "median", "high"))
        assert np.all((low <= median) & (median <= high))
    found = report["targets_by_horizon"]
    assert found["horizon"] == list(range(11))
    assert report["best_horizon"] == int(np.argmin(found["rmse"]))
    np.testing.assert_allclose(report["target"]["rmse"], found["rmse"][3], rtol=1e-4)
    assert report["horizon_weights"] == [float(k == 3) for k in range(11)]
    assert [entry["depth"] for entry in report["calibration"]] == [1, 5, 10]
    assert len(report["samples"]["return"]) == 400

    assert report["mode"] == "simulator"
    assert report["why_no_simulator"] is None
    assert report["model_error_on_policy"]["depth"] == list(range(1, 11))
    true = report["targets_by_horizon_in_simulator"]
    assert true["rmse"][0] == pytest.approx(found["rmse"][0])  # nothing is imagined at H = 0
    assert report["selector"]["rmse"] <= min(found["rmse"])
    assert sum(report["selector"]["chosen"]) == pytest.approx(1.0, abs=1e-5)
    assert report["in_model"]["ends_played"] == 0 <= report["in_model"]["ends"]
    assert report["in_model"]["steps"] == 44  # 0.9^44 < 0.01
    for name in ("on policy ", "true model ", "selector ", "imagined "):
        assert f"\n{name}" in out

    for level in error["state"].values():  # as of a model that diverges after a few steps
        level[4:] = [None] * len(level[4:])
    for name in ("rmse", "bias"):
        found[name][4:] = [None] * len(found[name][4:])
    report["calibration"][-1] |= {"ratio": None, "error": [None] * 5, "spread": [None] * 5}
    report["selector"]["rmse"] = report["in_model"]["bias"] = report["target"]["rmse"] = None
    report["best_horizon"] = 3
    text = diagnose.summary(report, diagnose.write(report, tmp_path / "diverged"))
    assert text.count("not finite") == 5


def test_a_base_learner_gets_the_critic_part_alone(tmp_path: Path) -> None:
    learner = Learner("Pendulum-v1", "sac", settings=TINY[:1], run_dir=tmp_path / "none", quiet=True)
    report = diagnose.diagnose(learner, 1)
    assert "model_error" not in report
    assert report["horizon_weights"] == [1.0]
    assert report["critic"]["bias"] > 0  # untrained: near 0, where all returns are negative
    folder = diagnose.write(report, tmp_path / "out")
    assert (folder / "diagnosis.png").stat().st_size > 10_000
    assert "critic       bias +" in diagnose.summary(report, folder)
    assert report["mode"] == "fresh"
    assert "simulator" not in diagnose.summary(report, folder)


# Without a step


class Untouchable(Walk):
    """Breaks if anyone acts in it."""

    def step(self, action: np.ndarray) -> Any:
        raise AssertionError("a step was taken")


def remembering(capacity: int, lengths: Sequence[int], ended: bool, tmp_path: Path) -> Learner:
    """Episodes of a point that moves to the right, in the replay of a learner that learned nothing."""
    settings = [*TINY, f"replay.capacity={capacity}", "dynamics.stay_in_data=false"]
    learner = Learner(Untouchable(), "mve-sac", settings=settings, run_dir=tmp_path / "run", quiet=True)
    time = np.concatenate([np.arange(n) for n in lengths])
    last = np.append(time[1:] == 0, True)
    zeros = np.zeros(len(time), np.float32)
    rows = Transition(
        obs=np.float32(time)[:, None],
        action=zeros[:, None],
        reward=zeros + 1,
        next_obs=np.float32(time)[:, None] + 1,
        continuation=np.float32(~(last & ended)),
        episode=np.repeat(np.int32(range(len(lengths))), lengths),
        step=np.arange(1, len(time) + 1, dtype=np.int32),
        log_density=zeros,
    )  # pyright: ignore[reportArgumentType]
    memory, rows = learner.state.replay, jax.tree.map(jnp.asarray, rows)
    for start in range(0, len(time), capacity):
        block = jax.tree.map(lambda x, start=start: x[start : start + capacity], rows)
        memory = replay.add(memory, block, jnp.ones(len(block.reward), bool))
    learner.state = eqx.tree_at(lambda s: s.replay, learner.state, memory)
    return learner


@pytest.mark.slow
def test_the_newest_whole_episodes_are_remembered_in_order(tmp_path: Path) -> None:
    learner = remembering(20, [10, 6, 5, 4], ended=False, tmp_path=tmp_path)
    # The ring has lost five steps of the first, and the last may still be running.
    found = episodes.remembered(learner, 5)
    np.testing.assert_array_equal(found.rows.obs[:, 0], [0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4])
    np.testing.assert_array_equal(np.flatnonzero(found.last), [5, 10])
    np.testing.assert_array_equal(found.time, found.rows.obs[:, 0])
    np.testing.assert_array_equal(found.rows.episode, [0] * 6 + [1] * 5)
    assert len(episodes.remembered(learner, 1).time) == 5
    ended = remembering(25, [10, 6, 5, 4], ended=True, tmp_path=tmp_path)
    np.testing.assert_array_equal(np.flatnonzero(episodes.remembered(ended, 2).last), [4, 8])
    alone = remembering(60, [10], ended=False, tmp_path=tmp_path)
    assert len(episodes.remembered(alone, 2).time) == 10  # better than nothing


def test_a_diagnosis_of_the_replay_takes_no_step(tmp_path: Path) -> None:
    learner = remembering(60, [20, 20, 20], ended=True, tmp_path=tmp_path)
    report = diagnose.diagnose(learner, 2, from_replay=True)
    assert report["mode"] == "replay"
    assert report["returns"] == [20.0, 20.0]
    assert report["model_error"]["depth"] == list(range(1, 11))
    assert [entry["depth"] for entry in report["calibration"]] == [1, 5, 10]
    assert report["critic"]["bias"] is not None
    assert "targets_by_horizon" not in report
    folder = diagnose.write(report, tmp_path / "out")
    text = diagnose.summary(report, folder)
    assert "2 remembered episodes" in text
    assert "careful      the model was fitted to these episodes" in text
    with pytest.raises(UserError, match="a step was taken"):
        diagnose.diagnose(learner, 1)
    simulator, why_not = diagnose._simulator(learner)
    assert simulator is None
    assert why_not is not None
    assert "Untouchable cannot be set to a state" in why_not


def test_a_replay_without_steps_is_refused(tmp_path: Path) -> None:
    learner = Learner("Pendulum-v1", "mve-sac", settings=TINY, run_dir=tmp_path / "none", quiet=True)
    with pytest.raises(UserError, match="remembers no steps yet"):
        diagnose.diagnose(learner, 1, from_replay=True)


@pytest.mark.parametrize("estimator", ["steve", "calibrated"])
def test_weights_that_differ_by_state_are_reported_as_their_mean(estimator: str) -> None:
    settings = [*TINY, f"targets.estimator={estimator}", "targets.horizon_steps=2"]
    learner = Learner("Pendulum-v1", "mve-sac", settings=settings, quiet=True)
    state = learner.state
    assert state.model is not None
    block, _ = learner.run.env.collect(lambda obs: np.zeros(1), 40)
    model = dynamics.observe(
        state.model, jax.tree.map(jnp.asarray, block), jnp.int32(40), learner.config.dynamics
    )
    rows, starts = jax.tree.map(jnp.asarray, block), jnp.arange(30)
    got = measure.estimated_targets(
        eqx.tree_at(lambda s: s.model, state, model), learner.recipe, rows, starts
    )
    assert got.value.shape == (30,)
    np.testing.assert_allclose(got.horizon_weight.sum(), 1.0, rtol=1e-5)
    if estimator == "calibrated":  # nothing measured yet
        np.testing.assert_array_equal(got.horizon_weight, [1.0, 0.0, 0.0])


def test_retrace_is_judged_on_what_was_played() -> None:
    """By the target policy itself: its traces are lambda, cut short where the episode is."""
    settings = ["targets.estimator=retrace", "targets.horizon_steps=2", "targets.trace_decay=0.5"]
    learner = Learner("Pendulum-v1", "sac", settings=[*settings, "agent.hidden=[16]"], quiet=True)
    block, _ = learner.run.env.collect(lambda obs: np.zeros(1), 5)
    rows = jax.tree.map(jnp.asarray, block)
    got = measure.estimated_targets(learner.state, learner.recipe, rows, jnp.array([0, 3, 4]))
    # From steps 0, 3 and 4: two steps follow, one, none.
    np.testing.assert_allclose(got.horizon_weight, [(0.5 + 0.5 + 1) / 3, (0.25 + 0.5) / 3, 0.25 / 3])


def test_sums_of_real_steps_are_judged_on_what_was_played() -> None:
    """From step 0 three rewards and a value, at gamma 1/2; from the last one reward and a value."""
    settings = ["targets.n_step=3", "targets.discount=0.5", "agent.hidden=[16]"]
    learner = Learner("Pendulum-v1", "ddpg", settings=settings, quiet=True)
    block, _ = learner.run.env.collect(lambda obs: np.zeros(1), 5)
    rows: Transition = jax.tree.map(jnp.asarray, block)
    got = measure.estimated_targets(learner.state, learner.recipe, rows, jnp.array([0, 4]))
    value = measure.state_values(learner.state.agent, rows.next_obs)
    by_hand = rows.reward[0] + rows.reward[1] / 2 + (rows.reward[2] + value[2] / 2) / 4
    np.testing.assert_allclose(got.value, [by_hand, rows.reward[4] + value[4] / 2], rtol=1e-5)


def test_the_target_is_compared_with_horizons_after_one_real_step_as_they_are(tmp_path: Path) -> None:
    learner = untrained("mve-sac", "targets.n_step=4", "targets.n_step_drawn=true")
    report = diagnose.diagnose(learner, 1)
    found = report["targets_by_horizon"]
    np.testing.assert_allclose(report["target"]["rmse"], found["rmse"][3], rtol=1e-4)
    assert report["target_of_several_steps"]["n_step"] == 4
    assert report["target_of_several_steps"]["rmse"] < report["target"]["rmse"]  # untrained, and below 0
    assert "\nreal steps   after up to 4 of these" in diagnose.summary(report, tmp_path)


def test_retrace_beside_a_model_may_be_longer_than_what_is_imagined(tmp_path: Path) -> None:
    learner = untrained("sac-svg", "targets.estimator=retrace", "targets.horizon_steps=12")
    report = diagnose.diagnose(learner, 1)
    assert len(report["horizon_weights"]) == len(report["targets_by_horizon"]["rmse"]) == 13
    assert "true model" in diagnose.summary(report, diagnose.write(report, tmp_path / "out"))


def test_diagnose_refuses_what_is_no_run_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["diagnose", "nowhere"]) == 2
    assert "nowhere is not a run folder" in capsys.readouterr().err
    assert main(["diagnose", "nowhere", "--episodes", "0"]) == 2
    assert "--episodes 0: it has to be 1 or more" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
