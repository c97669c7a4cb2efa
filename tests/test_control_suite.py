"""DeepMind Control's tasks: the adapter against a suite of our own and, where installed, the real one."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from mve.cli import main
from mve.envs import host
from mve.envs.base import EnvConfig
from mve.envs.host import HostEnv
from mve.types import UserError

SIX = ["cheetah-run", "walker-run", "quadruped-run", "hopper-hop", "cartpole-swingup", "reacher-hard"]
NEEDS_EXTRA = pytest.mark.skipif(
    importlib.util.find_spec("dm_control") is None, reason="dm-control is not installed: the extra dmc"
)

Entry = namedtuple("Entry", "shape")
Actions = namedtuple("Actions", "minimum maximum")


class Step(namedtuple("Step", "observation reward discount ended")):
    def last(self) -> bool:
        return self.ended


class Counter:
    """As dm-control's environments: observes the steps taken; `ends` says at which, with which discount."""

    def __init__(
        self, task_kwargs: dict[str, Any], ends: dict[int, float], fails: dict[int, str], most: float
    ):
        self.task_kwargs, self.ends, self.fails, self.most = task_kwargs, ends, fails, most
        self.task = SimpleNamespace(random=np.random.RandomState(task_kwargs["random"]))
        self.actions: list[np.ndarray] = []

    def observation_spec(self) -> dict[str, Entry]:
        return {"zeta": Entry((2, 2)), "alpha": Entry(()), "beta": Entry((1,))}

    def action_spec(self) -> Actions:
        return Actions(np.array([-1.0, -self.most]), np.array([1.1, self.most]))

    def reset(self) -> Step:
        self.count, self.drawn = 0, self.task.random.uniform()
        return self._now(None, None, False)

    def step(self, action: np.ndarray) -> Step:
        self.actions.append(action)
        self.count += 1
        if self.count in self.fails:
            raise RuntimeError(self.fails[self.count])
        return self._now(0.25, self.ends.get(self.count, 1.0), self.count in self.ends)

    def _now(self, *rest: Any) -> Step:
        # Not in the order of the specification, which is the one that counts.
        count = float(self.count)
        zeta = np.array([[count, 1.0], [2.0, 3.0]])
        return Step({"beta": np.array([self.drawn]), "zeta": zeta, "alpha": np.float64(7.0)}, *rest)

    def close(self) -> None:
        pass


@pytest.fixture
def suite(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A suite of two tasks in dm-control's place; what its environments do can be set."""
    fake = SimpleNamespace(ends={}, fails={}, most=3.0, made=[])

    def load(domain: str, task: str, task_kwargs: dict[str, Any]) -> Counter:
        assert (domain, task) in fake.module.ALL_TASKS
        fake.made.append(Counter(task_kwargs, fake.ends, fake.fails, fake.most))
        return fake.made[-1]

    package, fake.module = ModuleType("dm_control"), ModuleType("dm_control.suite")
    fake.module.ALL_TASKS = (("count", "up"), ("ball_in_cup", "catch"))  # pyright: ignore
    fake.module.load = load  # pyright: ignore
    package.suite = fake.module  # pyright: ignore
    monkeypatch.setitem(sys.modules, "dm_control", package)
    monkeypatch.setitem(sys.modules, "dm_control.suite", fake.module)
    return fake


def make(name: str, **kwargs: Any) -> gym.Env[Any, Any]:
    return host.make(EnvConfig(id=f"dmc/{name}", kwargs=kwargs))


def zeros(env: gym.Env[Any, Any]) -> np.ndarray:
    return np.zeros(env.action_space.shape or ())


# Anywhere


def test_without_the_extra_one_line_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "dm_control", None)  # as if it were not installed
    assert main(["train", "dmc/cheetah-run"]) == 2
    assert capsys.readouterr() == ("", 'mve: dmc/cheetah-run needs the extra: pip install "mve[dmc]"\n')


@pytest.mark.usefixtures("suite")
def test_a_name_that_is_not_in_the_suite_gets_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "dmc/ball_in_cap-catch"]) == 2
    expected = "mve: unknown environment 'dmc/ball_in_cap-catch'; nearest: dmc/ball_in_cup-catch\n"
    assert capsys.readouterr() == ("", expected)
    with pytest.raises(UserError, match=r"'dmc/Pendulum-v1'; dm_control\.suite\.ALL_TASKS has the names"):
        make("Pendulum-v1")


def test_versions_that_do_not_fit_are_one_line(
    suite: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(suite.module, "load", lambda *_, **__: 1 / 0)
    with pytest.raises(
        UserError, match=r"dmc/count-up: dm-control fails with ZeroDivisionError: .*mve\[dmc\]"
    ):
        make("count-up")


def test_observations_are_flat_in_the_order_of_the_specification(suite: SimpleNamespace) -> None:
    env = make("count-up")
    obs, _ = env.reset(seed=3)
    drawn = np.random.RandomState(3).uniform()
    assert obs.dtype == np.float64
    np.testing.assert_array_equal(obs, [0, 1, 2, 3, 7, drawn])
    action = np.array([1.1, -3.0])
    obs, reward, terminated, truncated, _ = env.step(action)
    np.testing.assert_array_equal(obs, [1, 1, 2, 3, 7, drawn])
    assert (reward, terminated, truncated) == (0.25, False, False)
    np.testing.assert_array_equal(suite.made[0].actions, [action])
    assert env.action_space == gym.spaces.Box(np.array([-1, -3.0]), np.array([1.1, 3]), dtype=np.float64)
    assert env.observation_space.shape == (6,)


def test_a_seed_sets_the_draws_and_none_goes_on_with_them(suite: SimpleNamespace) -> None:
    env, other = make("count-up"), make("count-up")
    assert [made.task_kwargs["random"] for made in suite.made] == [0, 0]  # of what a task is built from
    without = [env.reset()[0][-1], env.reset()[0][-1], other.reset()[0][-1]]
    assert len(set(without)) == 3
    stream = np.random.RandomState(5)
    with_seed = [env.reset(seed=5)[0][-1], env.reset()[0][-1], env.reset(seed=5)[0][-1]]
    first, second = stream.uniform(), stream.uniform()
    assert with_seed == [first, second, first]


@pytest.mark.parametrize(("discount", "ended"), [(0.0, (True, False)), (1.0, (False, True))])
def test_only_a_discount_of_0_terminates(
    discount: float, ended: tuple[bool, bool], suite: SimpleNamespace
) -> None:
    suite.ends = {2: discount}
    env = make("count-up")
    env.reset(seed=0)
    assert env.step(zeros(env))[2:4] == (False, False)
    assert env.step(zeros(env))[2:4] == ended


def test_an_episode_is_a_thousand_steps_cut_by_a_time_limit_of_ours(suite: SimpleNamespace) -> None:
    env = HostEnv(make("count-up"), seed=0)
    assert env.spec.max_episode_steps == 1000
    assert env.spec.name == "dmc/count-up"
    assert suite.made[0].task_kwargs["time_limit"] == float("inf")
    rows, ended = env.collect(lambda obs: np.zeros(2), 1001)
    assert ended == [(250.0, 1000)]
    np.testing.assert_array_equal(rows.continuation, 1.0)
    np.testing.assert_array_equal(np.asarray(rows.next_obs)[998:, 0], [999, 1000, 1])
    assert HostEnv(make("count-up", max_episode_steps=3), seed=0).spec.max_episode_steps == 3


def test_a_simulation_that_fails_is_one_line(suite: SimpleNamespace) -> None:
    suite.fails = {1: "state is\ninvalid", 2: "No OpenGL backend."}
    env = make("count-up")
    env.reset(seed=0)
    with pytest.raises(UserError, match=r"^dmc/count-up: state is invalid$"):
        env.step(zeros(env))
    with pytest.raises(UserError, match=r"No OpenGL backend; .* set MUJOCO_GL=egl$"):
        env.step(zeros(env))


def test_actuators_without_a_limit_are_refused(suite: SimpleNamespace) -> None:
    suite.most = 1e10
    space = make("count-up").action_space
    assert isinstance(space, gym.spaces.Box)
    np.testing.assert_array_equal(space.high, [1.1, np.inf])
    with pytest.raises(UserError, match=r"dmc/count-up: action space .* unbounded"):
        HostEnv(make("count-up"), seed=0)


# With dm-control


def suite_episode(name: str, seed: int, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Observations and rewards as the suite itself gives them."""
    from mve.envs import control_suite

    real = control_suite._suite(name)
    env = real.load(*name.split("-"), task_kwargs={"random": seed})
    steps = [env.reset(), *(env.step(action) for action in actions)]
    rows = [np.concatenate([np.ravel(x) for x in step.observation.values()]) for step in steps]
    return np.array(rows), np.array([step.reward for step in steps[1:]])


def played(env: gym.Env[Any, Any], seed: int, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    rows, rewards = [env.reset(seed=seed)[0]], []
    for action in actions:
        obs, reward, *_ = env.step(action)
        rows.append(obs)
        rewards.append(reward)
    return np.array(rows), np.array(rewards)


def some_actions(env: gym.Env[Any, Any], count: int) -> np.ndarray:
    assert isinstance(env.action_space, gym.spaces.Box)
    native = host.random_actions(env.action_space, np.random.default_rng(0), count)
    return host.native_action(env.action_space, native)


@NEEDS_EXTRA
@pytest.mark.parametrize("name", SIX)
def test_an_episode_is_the_suites_own_whatever_came_before(name: str) -> None:
    env = make(name)
    actions = some_actions(env, 30)
    played(env, 1, actions)
    obs, rewards = played(env, 2, actions)
    expected_obs, expected_rewards = suite_episode(name, 2, actions)
    np.testing.assert_array_equal(obs, expected_obs)
    np.testing.assert_array_equal(rewards, expected_rewards)
    assert (rewards >= 0).all()
    assert (rewards <= 1).all()


@NEEDS_EXTRA
@pytest.mark.slow
def test_every_task_of_the_suite_is_a_thousand_steps_that_a_seed_repeats() -> None:
    from mve.envs import control_suite

    names = [f"{domain}-{task}" for domain, task in control_suite._suite("").ALL_TASKS]
    assert len(names) > 40
    for name in sorted({*names} - {"lqr-lqr_2_1", "lqr-lqr_6_2", "quadruped-escape"}):
        limit = control_suite._suite(name).load(*name.split("-"))._step_limit
        assert limit == control_suite.EPISODE_STEPS, name
        env, fresh = make(name), make(name)
        actions = some_actions(env, 10)
        played(env, 1, actions)
        for before, again in zip(played(env, 2, actions), played(fresh, 2, actions), strict=True):
            np.testing.assert_array_equal(before, again, err_msg=name)
        assert (
            HostEnv(env, seed=0).collect(lambda obs, n=actions.shape[1]: np.zeros(n), 1000)[1][0][1] == 1000
        )


@NEEDS_EXTRA
def test_a_whole_episode_is_paid_between_0_and_1000() -> None:
    env = HostEnv(make("cartpole-swingup"), seed=0)
    rows, ended = env.collect(lambda obs: np.ones(1), 1000)
    assert [episode.length for episode in ended] == [1000]
    assert 0 < ended[0].ret < 1000
    np.testing.assert_array_equal(rows.continuation, 1.0)
    assert env.spec.obs_size == 5


@NEEDS_EXTRA
def test_a_state_that_is_no_state_is_one_line() -> None:
    env = make("cartpole-swingup")
    env.reset(seed=0)
    env.unwrapped._env.physics.data.qpos[:] = np.nan  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(UserError, match="dmc/cartpole-swingup: Physics state is invalid"):
        env.step(zeros(env))


@NEEDS_EXTRA
def test_the_escape_asks_for_a_renderer() -> None:
    with pytest.raises(UserError, match=r"dmc/quadruped-escape: .*MUJOCO_GL=egl"):
        make("quadruped-escape").reset(seed=0)


@NEEDS_EXTRA
def test_making_a_task_needs_no_renderer_and_changes_nothing_in_the_process(tmp_path: Path) -> None:
    asks = """
import os, sys, mujoco
before = dict(os.environ)
from mve.envs import host
from mve.envs.base import EnvConfig
for name in ("cheetah-run", "dog-run"):
    host.make(EnvConfig(id="dmc/" + name)).reset(seed=0)
print(os.environ == before, mujoco.get_mju_user_warning(), "OpenGL" in sys.modules)
"""
    environment = {name: value for name, value in os.environ.items() if name != "MUJOCO_GL"}
    done = subprocess.run(
        [sys.executable, "-c", asks], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert done.stderr == ""
    assert done.stdout == "True None False\n"
    assert list(tmp_path.iterdir()) == []  # no MUJOCO_LOG.TXT


TINY = [
    *("agent.hidden=[16]", "agent.batch_size=16", "targets.horizon_steps=2", "replay.capacity=1200"),
    *("dynamics.hidden=[16]", "dynamics.batch_size=16", "dynamics.members=1", "dynamics.initial_fits=5"),
    *("dynamics.learning_starts=900", "train.learning_starts=900", "train.updates_per_step=0.1"),
    *("evaluate.episodes=2",),
]


CARTPOLE = ("train", "dmc/cartpole-swingup", "--algo", "mve-sac")


@NEEDS_EXTRA
def test_a_run_is_trained_evaluated_resumed_and_diagnosed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run = "runs/dmc-cartpole-swingup/mve-sac/seed-0"
    assert main([*CARTPOLE, "--steps", "1200", "--quiet", "--set", *TINY]) == 0
    assert json.loads(Path(run, "config.json").read_text())["env"]["id"] == "dmc/cartpole-swingup"
    assert json.loads(Path(run, "versions.json").read_text())["dm-control"] is not None
    capsys.readouterr()
    assert main(["eval", run, "--episodes", "1", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["lengths"] == [1000]
    assert 0 <= facts["returns"][0] <= 1000
    assert main(["resume", run, "--steps", "50", "--quiet"]) == 0
    assert main(["diagnose", run, "--episodes", "1"]) == 0
    assert Path(run, "diagnosis/diagnosis.json").is_file()


@NEEDS_EXTRA
def test_the_suite_is_no_oracle(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*CARTPOLE, "--set", "dynamics.kind=oracle"]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert "dmc/cartpole-swingup cannot be set to a state" in err
