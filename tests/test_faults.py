"""Environments that misbehave in every way, in training and in evaluation: stopped or begun anew."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import gymnasium as gym
import jax
import numpy as np
import pytest
from gymnasium.spaces import Box

from mve import Learner, log, seeds
from mve.envs import host
from mve.envs.base import EnvConfig
from mve.envs.host import BrokenOffError, HostEnv
from mve.envs.stepped import Fault, Here, Restarts
from mve.envs.worker import Worker
from mve.evaluate import evaluate
from mve.policies import Policy
from mve.types import DivergedError, FaultError, UserError

# One compilation for all runs.
TINY = (
    *("agent.hidden=[8]", "agent.batch_size=8", "train.learning_starts=40", "train.updates_per_step=0.1"),
    *("evaluate.episodes=2", "evaluate.interval_steps=100", "train.checkpoint_interval=100"),
    *("train.total_steps=200", "replay.capacity=200"),
)
EPISODE = 30


class Walk(gym.Env):
    """Counts its steps; does what `fault` says at the step of that number, counted over all episodes."""

    observation_space = Box(-np.inf, np.inf, (2,), np.float32)
    action_space = Box(-1.0, 1.0, (1,), np.float32)

    def __init__(self, at: int = -1, fault: str = "raises", again: bool = False):
        self.at, self.fault, self.again = at, fault, again
        self.count, self.taken = 0, 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.count = 0
        return np.zeros(2, np.float32), {}

    def step(self, action: np.ndarray) -> Any:
        self.taken, self.count = self.taken + 1, self.count + 1
        obs = np.array([self.count, self.taken], np.float32)
        sound = (obs, 1.0, False, self.count == EPISODE, {})
        due = self.taken >= self.at if self.again else self.taken == self.at
        return FAULTS[self.fault](*sound) if due and self.at >= 0 else sound

    def snapshot(self) -> dict[str, Any]:
        return {"count": self.count, "taken": self.taken}

    def restore(self, data: dict[str, Any]) -> None:
        self.count, self.taken = data["count"], data["taken"]


def raises(*_: Any) -> Any:
    raise ValueError("the motor is\nhot")


FAULTS: dict[str, Callable[..., Any]] = {
    "raises": raises,
    "nan": lambda obs, *rest: (obs * np.nan, *rest),
    "infinite": lambda obs, *rest: (np.full_like(obs, -np.inf), *rest),
    "beyond float32": lambda obs, *rest: (obs.astype(np.float64) * 1e300, *rest),
    "shape": lambda obs, *rest: (obs[:1], *rest),
    "text": lambda obs, *rest: (["a", "b"], *rest),
    "ragged": lambda obs, *rest: ([1.0, [2.0]], *rest),
    "complex": lambda obs, *rest: (obs + 1j, *rest),
    "nan reward": lambda obs, reward, *rest: (obs, float("nan"), *rest),
    "huge reward": lambda obs, reward, *rest: (obs, 1e300, *rest),
    "no reward": lambda obs, reward, *rest: (obs, None, *rest),
    "text reward": lambda obs, reward, *rest: (obs, "1.0", *rest),
    "two rewards": lambda obs, reward, *rest: (obs, np.ones(2), *rest),
    "terminated": lambda obs, reward, _, *rest: (obs, reward, 1, *rest),
    "truncated": lambda obs, reward, terminated, _, info: (obs, reward, terminated, None, info),
    "four values": lambda *answer: answer[:4],
    "nothing": lambda *_: None,
}
SAID = {
    "raises": "it raised ValueError: the motor is hot",
    "nan": "the observation is not finite",
    "infinite": "the observation is not finite",
    "beyond float32": "the observation is not finite",
    "shape": r"the observation has shape \(1,\), not \(2,\)",
    "text": "the observation is no array of real numbers but",
    "ragged": "the observation is no array of real numbers but",
    "complex": "the observation is no array of real numbers but",
    "nan reward": "the reward is nan",
    "huge reward": "the reward is 1e.300",
    "no reward": "the reward is no number but None, a NoneType",
    "text reward": "the reward is no number but '1.0', a str",
    "two rewards": "the reward is no number but",
    "terminated": "terminated is no truth value but 1, a int",
    "truncated": "truncated is no truth value but None, a NoneType",
    "four values": r"step\(\) did not return five values",
    "nothing": r"step\(\) did not return five values",
}


def still(obs: np.ndarray) -> np.ndarray:
    return np.zeros(1, np.float32)


def restarting(count: int = 3) -> Restarts:
    return Restarts(EnvConfig(on_fault="restart", max_restarts=count), "Walk")


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_stops_at_its_step_and_keeps_the_rows_before(fault: str) -> None:
    env = HostEnv(Walk(at=35, fault=fault), seed=0)
    with pytest.raises(
        BrokenOffError, match=f"Walk: at step 35, step 5 of episode 1, {SAID[fault]}"
    ) as caught:
        env.collect(still, 60)
    block = caught.value.block
    assert "\n" not in str(caught.value)
    assert len(block.reward) == env.num_steps == 34
    assert [episode.length for episode in caught.value.ended] == [EPISODE]
    assert all(np.isfinite(column).all() for column in block)


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_begins_another_episode_if_it_is_asked_to(fault: str) -> None:
    restarts = restarting()
    env = HostEnv(Walk(at=35, fault=fault), seed=0, restarts=restarts)
    block, _ = env.collect(still, 60)
    np.testing.assert_array_equal(block.episode, [0] * 30 + [1] * 4 + [2] * 26)
    np.testing.assert_array_equal(block.step, np.arange(1, 61))
    assert block.continuation[33] == 1  # cut short: the bootstrap is kept
    assert block.obs[34, 0] == 0
    assert all(np.isfinite(column).all() for column in block)
    [said] = restarts.said()
    assert "restart 1 of 3" in said
    assert restarts.said() == []


def test_restarts_run_out() -> None:
    env = HostEnv(Walk(at=5, again=True), seed=0, restarts=restarting(3))
    with pytest.raises(BrokenOffError, match="all 3 restarts are used up"):
        env.collect(still, 60)
    assert env.num_episodes == 4


def test_a_fault_in_the_first_step_of_all_leaves_an_empty_block() -> None:
    with pytest.raises(BrokenOffError) as caught:
        HostEnv(Walk(at=1), seed=0).collect(still, 5)
    assert caught.value.block.obs.shape == (0, 2)
    assert caught.value.block.reward.shape == (0,)


class BadReset(Walk):
    """Whose reset of the second episode fails."""

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        return [0.0, 0.0] if self.taken == EPISODE else super().reset(seed=seed)


def test_a_reset_that_fails_is_a_fault_of_its_episode() -> None:
    env = HostEnv(BadReset(), seed=0)
    with pytest.raises(BrokenOffError, match="at the reset of episode 1, after step 30, the observation has"):
        env.collect(still, 60)


def test_an_environment_made_by_name_is_made_anew_after_a_fault() -> None:
    made: list[Walk] = []

    def make() -> Walk:
        made.append(Walk())
        return made[-1]

    first = Walk(at=10, again=True)
    env = HostEnv(first, seed=0, stepped=lambda size: Here(first, size, make), restarts=restarting())
    block, _ = env.collect(still, 60)
    assert len(block.reward) == 60
    assert len(made) == 1


def test_an_observation_that_the_environment_writes_over_is_kept_as_it_was() -> None:
    class Reusing(Walk):
        shown = np.zeros(2, np.float32)

        def step(self, action: np.ndarray) -> Any:
            obs, *rest = super().step(action)
            self.shown[:] = obs
            return self.shown, *rest

    block, _ = HostEnv(Reusing(), seed=0).collect(still, 5)
    np.testing.assert_array_equal(block.next_obs[:, 0], [1, 2, 3, 4, 5])


# In evaluation


class Still(Policy):
    """Does nothing."""

    def __call__(self, obs: Any, noise: Any) -> Any:
        return np.zeros_like(noise)

    def log_density(self, obs: Any, action: Any) -> Any:
        raise NotImplementedError


def evaluated(env: Walk, restarts: Restarts, episodes: int = 2, longest: int = 1000) -> list[int]:
    policy = Still()
    space: Any = env.action_space
    given = {"episodes": episodes, "seed": 0, "step": 0, "longest": longest, "restarts": restarts}
    return evaluate([Here(env, 2)], policy, space, **given).lengths.tolist()


def test_an_evaluation_episode_ends_after_the_longest_that_was_asked_for() -> None:
    assert evaluated(Walk(), restarting(), longest=EPISODE - 1) == [EPISODE - 1] * 2


def test_an_evaluation_that_fails_stops_and_says_where() -> None:
    stops = Restarts(EnvConfig(), "Walk")
    with pytest.raises(FaultError, match="Walk: at step 3 of evaluation episode 0, it raised ValueError"):
        evaluated(Walk(at=3), stops)


def test_an_evaluation_episode_that_fails_is_played_again_from_its_beginning() -> None:
    restarts = restarting()
    assert evaluated(Walk(at=3), restarts, episodes=3) == [EPISODE] * 3
    assert restarts.used == 1


# A whole run


def learner(env: Any, folder: Path, *more: str, **given: Any) -> Learner:
    return Learner(env, "sac", run_dir=folder, settings=[*TINY, *more], quiet=True, **given)


def test_a_run_whose_environment_fails_is_saved_up_to_the_step_before_and_goes_on(tmp_path: Path) -> None:
    run = learner(Walk(at=115), tmp_path / "run", eval_env=Walk())
    with pytest.raises(
        FaultError, match="Walk, seed 0: at step 115, step 25 of episode 3, it raised"
    ) as caught:
        run.learn()
    assert caught.value.exit_code == 4
    assert "at step 115" in (tmp_path / "run" / log.EVENTS).read_text()
    assert run.num_timesteps == 114
    again = Learner.load(tmp_path / "run", Walk(), quiet=True)
    assert again.num_timesteps == 114
    again.learn(200 - 114)
    rows = again.state.replay.rows
    np.testing.assert_array_equal(rows.step, np.arange(1, 201))
    assert np.isfinite(rows.obs).all()
    assert list(rows.episode[112:115]) == [3, 3, 4]
    assert rows.continuation[113] == 1
    assert rows.obs[114, 0] == 0


def test_an_environment_that_fails_at_once_is_what_is_told(tmp_path: Path) -> None:
    """Nothing was seen, so that the range of observations, which the agent is shown them by, is empty."""
    run = learner(Walk(at=1), tmp_path / "run", "agent.normalize_obs=true")
    with pytest.raises(FaultError, match="at step 1, step 1 of episode 0, it raised"):
        run.learn()
    assert Learner.load(tmp_path / "run", Walk(), quiet=True).num_timesteps == 0


def test_a_run_that_restarts_says_so_in_its_records(tmp_path: Path) -> None:
    settings = ("env.on_fault=restart", "env.max_restarts=5")
    run = learner(Walk(at=115, fault="nan"), tmp_path / "run", *settings, eval_env=Walk(at=20)).learn()
    assert run.num_timesteps == 200
    rows = run.state.replay.rows
    assert all(np.isfinite(column).all() for column in rows)
    assert log.read_metrics(run.folder)["env/restarts"][-1] == 2
    told = (tmp_path / "run" / log.EVENTS).read_text().splitlines()
    # The environment that evaluations are played in, at its twentieth step, and the one that trains.
    assert ["evaluation episode" in line for line in told] == [True, False]
    assert "restart 2 of 5" in told[1]
    assert Learner.load(tmp_path / "run", Walk()).run.restarts.used == 2


def test_an_evaluation_that_fails_leaves_everything_saved(tmp_path: Path) -> None:
    run = learner(Walk(), tmp_path / "run", eval_env=Walk(at=20))
    with pytest.raises(FaultError, match="evaluation episode"):
        run.learn()
    assert Learner.load(tmp_path / "run", Walk(), quiet=True).num_timesteps == 100


def test_a_fault_of_one_seed_leaves_all_of_them_at_the_step_before(tmp_path: Path) -> None:
    given: dict[str, Any] = {"settings": TINY, "quiet": True, "eval_env": Walk()}
    runs = seeds.create(Walk(), "sac", seeds=[0, 1, 2], run_dir=tmp_path / "runs", **given)
    faulty: Any = runs[1].run.instance
    faulty.at = 47
    with pytest.raises(FaultError, match="Walk, seed 1: at step 47"):
        seeds.learn_together(runs)
    again = seeds.load(tmp_path / "runs", Walk(), quiet=True, eval_env=Walk())
    assert [each.num_timesteps for each in again] == [46] * 3
    episodes = []
    for each in seeds.learn_together(again, 54):
        rows = each.state.replay.rows
        np.testing.assert_array_equal(rows.step[:100], np.arange(1, 101))
        episodes.append(rows.episode[44:48].tolist())
    # The first had gone on, and its later steps are forgotten; the last stands where it stood.
    assert episodes == [[1, 1, 3, 3], [1, 1, 2, 2], [1, 1, 1, 1]]


def test_a_policy_that_is_not_finite_is_not_the_environments_fault(tmp_path: Path) -> None:
    run = learner(Walk(), tmp_path / "run")
    policy = jax.tree.map(lambda leaf: np.full_like(leaf, np.nan), run.policy())
    with pytest.raises(DivergedError, match="the policy is not finite"):
        run.run.collect(policy, 0, 1)


# In a process of its own


@pytest.fixture
def importable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Gymnasium id of an environment in a module of its own, as a user has one."""
    (tmp_path / "odd_env.py").write_text(ODD)
    monkeypatch.syspath_prepend(tmp_path)
    return "odd_env:Odd-v0"


ODD = """
import os, time
import gymnasium as gym, numpy as np
from gymnasium.spaces import Box

class Odd(gym.Env):
    observation_space = Box(-np.inf, np.inf, (2,), np.float32)
    action_space = Box(-1.0, 1.0, (1,), np.float32)

    def __init__(self, at=-1, fault="hangs"):
        self.at, self.fault, self.taken = at, fault, 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.count = 0
        return self.np_random.normal(size=2).astype(np.float32), {}

    def step(self, action):
        self.taken, self.count = self.taken + 1, self.count + 1
        if self.taken == self.at:
            if self.fault == "hangs":
                time.sleep(1000)
            if self.fault == "exits":
                os._exit(7)
            if self.fault == "raises":
                raise ValueError("no")
            os.abort()
        return np.array([self.count, self.taken], np.float32), 1.0, False, self.count == 30, {}

    def snapshot(self):
        return {"count": self.count, "taken": self.taken}

    def restore(self, data):
        self.count, self.taken = data["count"], data["taken"]

gym.register("Odd-v0", "odd_env:Odd")
"""


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("hangs", r"it gave no answer within 2 s \(env.timeout\)"),
        pytest.param("exits", "its process ended with exit code 7", marks=pytest.mark.slow),
        pytest.param("raises", "it raised ValueError: no", marks=pytest.mark.slow),
        pytest.param("aborts", r"its process was killed by signal 6 \(SIGABRT\)", marks=pytest.mark.slow),
    ],
)
def test_a_worker_that_fails_is_replaced(importable: str, fault: str, said: str) -> None:
    config = EnvConfig(id=importable, kwargs={"at": 40, "fault": fault}, timeout=2.0)
    restarts = restarting()
    instance = host.make(config)
    env = HostEnv(instance, seed=0, stepped=lambda size: Worker(config, size), restarts=restarts)
    plain = HostEnv(host.make(EnvConfig(id=importable)), seed=0)
    block, _ = env.collect(still, 30)
    for one, other in zip(block, plain.collect(still, 30)[0], strict=True):
        np.testing.assert_array_equal(one, other)  # the same draws, to the bit
    taken = env.snapshot()
    assert taken is not None
    block, _ = env.collect(still, 20)
    np.testing.assert_array_equal(block.episode, [1] * 9 + [2] * 11)
    [told] = restarts.said()
    assert f"step 40, step 10 of episode 1, {said.replace(chr(92), '')}" in told
    env.restore(taken)
    again, _ = env.collect(still, 5)
    np.testing.assert_array_equal(again.next_obs[:, 1], [31, 32, 33, 34, 35])
    env.close()


@pytest.mark.slow
def test_a_worker_that_dies_at_the_snapshot_loses_its_episode_only(importable: str) -> None:
    config = EnvConfig(id=importable, own_process=True)
    worker = Worker(config, 2)
    env = HostEnv(host.make(config), seed=0, stepped=lambda _: worker, restarts=restarting())
    env.collect(still, 5)
    os.kill(worker._process.pid, signal.SIGKILL)
    assert "killed by signal 9" in str(env.snapshot_obstacle)
    assert env.snapshot() is None
    block, _ = env.collect(still, 5)
    np.testing.assert_array_equal(block.episode, 1)
    env.close()


@pytest.mark.slow
def test_a_worker_goes_when_its_run_is_killed(importable: str, tmp_path: Path) -> None:
    script = (
        "import time\nfrom mve.envs.base import EnvConfig\nfrom mve.envs.worker import Worker\n"
        f"w = Worker(EnvConfig(id={importable!r}, own_process=True), 2)\nw.reset(0)\n"
        "print(w._process.pid, flush=True)\ntime.sleep(100)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=environment
    ) as run:
        assert run.stdout is not None
        pid = int(run.stdout.readline())
        run.kill()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and is_alive(pid):
        time.sleep(0.1)
    assert not is_alive(pid)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.slow
def test_a_run_in_a_process_of_its_own_is_the_same_run(importable: str, tmp_path: Path) -> None:
    here = learner(importable, tmp_path / "here").learn()
    apart = learner(importable, tmp_path / "apart", "env.timeout=20").learn()
    assert eqx.tree_equal(here.progress, apart.progress)
    processes = [each._process.pid for each in (apart.run.env._stepped, *apart.run.evaluation_envs._held)]  # type: ignore
    assert len(processes) == 2
    assert all(map(is_alive, processes))
    apart.close()
    assert not any(map(is_alive, processes))
    returns = [log.read_evaluations(each.folder)["return"] for each in (here, apart)]
    np.testing.assert_array_equal(*returns)
    resumed = Learner.load(tmp_path / "apart", quiet=True)
    assert resumed.run.env.snapshot() is not None


def test_an_instance_cannot_be_stepped_elsewhere(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="given by its id"):
        learner(Walk(), tmp_path / "run", "env.timeout=5")


def test_a_fault_is_nothing_that_a_user_catches_by_accident() -> None:
    assert not issubclass(Fault, UserError)
