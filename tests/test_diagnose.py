"""Diagnoses against answers worked out by hand, and the command from run folder to picture."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mve import Learner, diagnose, dynamics, measure, replay
from mve.agents import Agent
from mve.agents.base import action_values
from mve.agents.ddpg import DDPGConfig
from mve.cli import main
from mve.dynamics import Dynamics, DynamicsConfig
from mve.measure import OpenLoop, Played
from mve.networks import MLP, Policy
from mve.state import Recipe
from mve.targets import TargetsConfig
from mve.types import CriticTargets, Known, Transition

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


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that remembers sixty random steps and has learned nothing: no compilation to wait for."""
    learner = Learner("Pendulum-v1", settings=TINY, quiet=True)
    rng, state = np.random.default_rng(0), learner._state
    block, _ = learner._env.collect(lambda obs: rng.uniform(-1, 1, 1), 60)
    rows, num_rows = jax.tree.map(jnp.asarray, block), jnp.int32(60)
    assert state.model is not None
    model = dynamics.observe(state.model, rows, num_rows, learner.config.dynamics)
    learner._state = eqx.tree_at(
        lambda s: (s.replay, s.model, s.num_env_steps),
        state,
        (replay.add(state.replay, rows, jnp.ones(60, bool)), model, num_rows),
    )
    folder = tmp_path_factory.mktemp("diagnosed") / "run"
    learner.save(folder)
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


def test_a_base_learner_gets_the_critic_part_alone(tmp_path: Path) -> None:
    learner = Learner("Pendulum-v1", "sac", settings=TINY[:1], run_dir=tmp_path / "none", quiet=True)
    report = diagnose.diagnose(learner, 1)
    assert "model_error" not in report
    assert report["horizon_weights"] == [1.0]
    assert report["critic"]["bias"] > 0  # untrained: near 0, where all returns are negative
    folder = diagnose.write(report, tmp_path / "out")
    assert (folder / "diagnosis.png").stat().st_size > 10_000
    assert "critic       bias +" in diagnose.summary(report, folder)


@pytest.mark.parametrize("estimator", ["steve", "calibrated"])
def test_weights_that_differ_by_state_are_reported_as_their_mean(estimator: str) -> None:
    settings = [*TINY, f"targets.estimator={estimator}", "targets.horizon_steps=2"]
    learner = Learner("Pendulum-v1", settings=settings, quiet=True)
    state = learner._state
    assert state.model is not None
    block, _ = learner._env.collect(lambda obs: np.zeros(1), 40)
    model = dynamics.observe(
        state.model, jax.tree.map(jnp.asarray, block), jnp.int32(40), learner.config.dynamics
    )
    rows, starts = jax.tree.map(jnp.asarray, block), jnp.arange(30)
    got = measure.estimated_targets(
        eqx.tree_at(lambda s: s.model, state, model), learner._recipe, rows, starts
    )
    assert got.value.shape == (30,)
    np.testing.assert_allclose(got.horizon_weight.sum(), 1.0, rtol=1e-5)
    if estimator == "calibrated":  # nothing measured yet
        np.testing.assert_array_equal(got.horizon_weight, [1.0, 0.0, 0.0])


def test_retrace_is_judged_on_what_was_played() -> None:
    """By the target policy itself: its traces are lambda, cut short where the episode is."""
    settings = ["targets.estimator=retrace", "targets.horizon_steps=2", "targets.trace_decay=0.5"]
    learner = Learner("Pendulum-v1", "sac", settings=[*settings, "agent.hidden=[16]"], quiet=True)
    block, _ = learner._env.collect(lambda obs: np.zeros(1), 5)
    rows = jax.tree.map(jnp.asarray, block)
    got = measure.estimated_targets(learner._state, learner._recipe, rows, jnp.array([0, 3, 4]))
    # From steps 0, 3 and 4: two steps follow, one, none.
    np.testing.assert_allclose(got.horizon_weight, [(0.5 + 0.5 + 1) / 3, (0.25 + 0.5) / 3, 0.25 / 3])


def test_diagnose_refuses_what_is_no_run_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["diagnose", "nowhere"]) == 2
    assert "nowhere is not a run folder" in capsys.readouterr().err
    assert main(["diagnose", "nowhere", "--episodes", "0"]) == 2
    assert "--episodes 0: it has to be 1 or more" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
