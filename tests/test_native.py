"""Environments written in JAX: the same rows, whatever collects them, and nothing across an episode's end."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import equinox as eqx
import gymnasium as gym
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnasium.spaces import Box, Discrete
from test_resume import SMALL, assert_the_same_run
from test_traces import recipe

from mve import Learner, seeds
from mve.envs import device, device_env, host, native
from mve.envs.base import EnvConfig, Snapshot
from mve.envs.device import Collected
from mve.envs.device_env import DeviceEnv
from mve.envs.native import NativeStep, NativeTask
from mve.envs.pendulum import Pendulum, Pole
from mve.policies import Policy
from mve.program import Together
from mve.types import FaultError, UserError

BLOCK = 8
LENGTHS = jnp.array([3, 5])


@dataclass(frozen=True)
class Counting(NativeTask):
    """Observes (steps since the reset, 10 times what chance decided) and pays the count it leaves.

    Episodes terminate after `terminates` steps and are cut off by the task itself after `cuts`.
    """

    terminates: int = 100
    cuts: int = 100
    choices: int = 0  # of a discrete action; 0: a box
    spoilt: int = 100  # count at which the reward is not a number
    name: str = "Counting"
    max_episode_steps: int | None = None

    @property
    def action_space(self) -> Box | Discrete:
        return Discrete(self.choices, start=3) if self.choices else Box(-2.0, 6.0, (1,))

    def _seen(self, count: Any, chance: Any) -> Any:
        return jnp.stack([count.astype(jnp.float32), 10.0 * chance])

    def reset(self, key: Any) -> Any:
        count, chance = jnp.zeros((), jnp.int32), jax.random.uniform(key)
        return (count, chance), self._seen(count, chance)

    def step(self, state: Any, action: Any, key: Any) -> NativeStep:
        count, own = state
        reward = jnp.where(count == self.spoilt, jnp.nan, count.astype(jnp.float32))
        count += 1
        over = count >= self.terminates, count >= self.cuts
        return NativeStep((count, own), self._seen(count, own), reward, over[0], over[1] & ~over[0])


class Fixed(Policy):
    """Always the same action."""

    action: jax.Array

    def __call__(self, obs: Any, noise: Any) -> Any:
        return jnp.broadcast_to(self.action, (*obs.shape[:-1], *self.action.shape)) + 0.0 * noise

    def log_density(self, obs: Any, action: Any) -> Any:
        return 7.0 + 0.0 * obs[..., 0]


def made(task: NativeTask, seed: int = 0, **settings: Any) -> DeviceEnv:
    instance = native.as_gymnasium(task)
    spec = host.HostEnv(instance, seed=seed).spec
    env = device_env.of(instance, spec, seed, BLOCK, **settings)
    assert env is not None
    return env


def collected(
    env: DeviceEnv, step: int, count: int = BLOCK, is_random: bool = False, policy: Policy | None = None
) -> Collected:
    shared = np.int32(step), np.int32(count), np.bool_(is_random)
    policy = policy or Fixed(jnp.zeros(env.spec.action_size))
    env.running, found = device.for_one(device.collect, (env.env,), shared, policy, env.running, env.key)
    return jax.device_get(found)


def rows(task: NativeTask, blocks: int = 3, **settings: Any) -> Collected:
    env = made(task, **settings)
    parts = [collected(env, BLOCK * i) for i in range(blocks)]
    return jax.tree.map(lambda *x: np.concatenate(x), *parts)


def test_the_next_observation_is_never_that_of_another_episode() -> None:
    block = rows(Counting(terminates=3)).block
    np.testing.assert_array_equal(block.obs[:, 0], np.arange(24) % 3)
    np.testing.assert_array_equal(block.next_obs[:, 0], np.arange(24) % 3 + 1)
    np.testing.assert_array_equal(block.next_obs[:, 1], block.obs[:, 1])  # drawn once an episode
    np.testing.assert_array_equal(block.reward, np.arange(24) % 3)
    np.testing.assert_array_equal(block.episode, np.arange(24) // 3)
    np.testing.assert_array_equal(block.step, np.arange(24) + 1)
    assert len(set(block.obs[:, 1].tolist())) == 8


@pytest.mark.parametrize(
    ("task", "settings", "continuation"),
    [
        (Counting(terminates=3), {}, 0.0),
        (Counting(cuts=3), {}, 1.0),
        (Counting(max_episode_steps=3), {}, 1.0),
        (Counting(terminates=3, cuts=3, max_episode_steps=3), {}, 0.0),
        (Counting(cuts=3), {"truncation_is_terminal": True}, 0.0),
    ],
)
def test_a_termination_ends_all_reward_and_a_time_limit_does_not(
    task: NativeTask, settings: dict[str, bool], continuation: float
) -> None:
    found = rows(task, **settings)
    last = np.arange(24) % 3 == 2
    np.testing.assert_array_equal(found.over, last)
    np.testing.assert_array_equal(found.block.continuation, np.where(last, continuation, 1.0))
    np.testing.assert_array_equal(found.length[last], 3)
    np.testing.assert_array_equal(found.ret[last], 0 + 1 + 2)


def test_rows_that_are_not_wanted_are_not_taken() -> None:
    env = made(Counting(terminates=3))
    found = collected(env, 0, count=5)
    np.testing.assert_array_equal(found.block.obs[:, 0], [0, 1, 2, 0, 1, 0, 0, 0])
    np.testing.assert_array_equal(found.block.step, [1, 2, 3, 4, 5, 0, 0, 0])
    assert not found.over[5:].any()
    following = collected(env, 5)
    np.testing.assert_array_equal(following.block.obs[:2, 0], [2, 0])
    assert following.ret[0] == 0 + 1 + 2  # in parts of two blocks


def test_actions_are_stretched_over_the_box_and_random_ones_cover_it() -> None:
    @dataclass(frozen=True)
    class Echo(Counting):
        """Pays the action that it is given."""

        def step(self, state: Any, action: Any, key: Any) -> NativeStep:
            paid = action if self.choices else action[0]
            return super().step(state, action, key)._replace(reward=paid.astype(jnp.float32))

    assert collected(made(Echo()), 0, policy=Fixed(jnp.array([-1.0]))).block.reward.tolist() == [-2.0] * BLOCK
    assert collected(made(Echo()), 0, policy=Fixed(jnp.array([1.0]))).block.reward.tolist() == [6.0] * BLOCK
    drawn = collected(made(Echo()), 0, is_random=True).block
    np.testing.assert_allclose(drawn.reward, 2.0 + 4.0 * drawn.action[:, 0], rtol=1e-6)
    assert np.ptp(drawn.action) > 1.0
    chosen = collected(made(Echo(choices=4)), 0, is_random=True).block
    np.testing.assert_array_equal(chosen.reward, 3 + np.argmax(chosen.action, axis=1))
    np.testing.assert_array_equal(np.sort(chosen.action, axis=1), np.eye(4)[[3] * BLOCK])
    assert len(set(chosen.reward.tolist())) > 1


def test_densities_are_the_policys_or_those_of_random_actions() -> None:
    env = made(Counting(), keeps_density=True)
    np.testing.assert_array_equal(collected(env, 0).block.log_density, 7.0)
    np.testing.assert_allclose(collected(env, 8, is_random=True).block.log_density, -np.log(2.0))
    assert not collected(made(Counting()), 0).block.log_density.any()


def test_what_was_paid_and_shown_is_taken_note_of(tmp_path: Path) -> None:
    """By it values beyond all rewards are told; rows that pad a block are not among them."""
    run = Learner(Counting(terminates=7), "sac", run_dir=tmp_path / "run", settings=SMALL, quiet=True).learn()
    assert run.run.watch.reward == (0.0, 6.0)
    assert run.run.watch.obs is not None
    assert run.run.watch.obs[1] <= 10.0


def test_a_number_that_is_not_finite_is_found_where_it_is() -> None:
    found = rows(Counting(terminates=10, spoilt=4), blocks=1)
    np.testing.assert_array_equal(found.sound, np.arange(BLOCK) != 4)


def test_a_run_that_meets_one_ends_and_saves_nothing_of_it(tmp_path: Path) -> None:
    run = Learner(Counting(spoilt=45), "sac", run_dir=tmp_path / "run", settings=SMALL, quiet=True)
    with pytest.raises(UserError, match="Counting: the observation or reward of step 46 is not finite"):
        run.learn()
    assert not (tmp_path / "run" / "checkpoints").exists()
    obs = np.zeros(run.spec.obs_size, np.float32)
    for use in (lambda: run.predict(obs), lambda: run.learn(20), lambda: run.save(tmp_path / "elsewhere")):
        with pytest.raises(UserError, match=r"the last learn\(\) failed; go on with .*, which=0\)"):
            use()
    assert not (tmp_path / "elsewhere" / "checkpoints").exists()


def test_an_evaluation_that_meets_one_ends_with_everything_saved(tmp_path: Path) -> None:
    """Whole episodes are evaluated, where training has come to step 40 of the first."""
    settings = [*SMALL, "evaluate.interval_steps=40"]
    run = Learner(Counting(spoilt=90), "sac", run_dir=tmp_path / "run", settings=settings, quiet=True)
    with pytest.raises(
        FaultError, match="Counting: the evaluation at step 40 met a reward that is not finite"
    ):
        run.learn()
    assert Learner.load(tmp_path / "run", Counting(), quiet=True).num_timesteps == run.num_timesteps == 40


def test_seeds_side_by_side_have_the_draws_that_each_has_alone() -> None:
    envs = [made(Counting(terminates=3), seed) for seed in (4, 9)]
    together, policy = Together(recipe(), 2), Fixed(jnp.zeros(1))
    running, keys, policies = (
        together.stacked(trees)
        for trees in ([env.running for env in envs], [env.key for env in envs], [policy, policy])
    )
    shared = np.int32(0), np.int32(BLOCK), np.bool_(True)
    running, found = together.call(device.collect, (envs[0].env,), shared, policies, running, keys)
    for env, part, left in zip(
        envs, together.each(jax.device_get(found)), together.split(running), strict=True
    ):
        jax.tree.map(np.testing.assert_array_equal, part, collected(env, 0, is_random=True))
        assert eqx.tree_equal(left, env.running)
    assert not np.array_equal(found.block.action[0], found.block.action[1])


def test_evaluation_is_that_of_a_plain_loop() -> None:
    """Episodes of different lengths; what follows the first one's end is not counted."""

    @dataclass(frozen=True)
    class Lottery(Counting):
        """Ends by chance."""

        def step(self, state: Any, action: Any, key: Any) -> NativeStep:
            ends = jax.random.uniform(key) < 0.2
            return super().step(state, action, key)._replace(terminated=ends)

    env = made(Lottery())
    policy = Fixed(jnp.zeros(1))
    returns, lengths = env.evaluate(policy, 40, 5, 30)
    np.testing.assert_array_equal(returns, lengths * (lengths - 1) / 2)
    assert len(set(lengths.tolist())) > 1
    np.testing.assert_array_equal(returns, env.evaluate(policy, 40, 5, 30)[0])
    assert returns.tolist() != env.evaluate(policy, 60, 5, 30)[0].tolist()
    assert max(made(Counting()).evaluate(policy, 0, 2, 30)[1]) == 30
    assert max(made(Counting(max_episode_steps=4)).evaluate(policy, 0, 2, 30)[1]) == 4


def test_a_key_in_the_state_comes_back_as_a_key() -> None:
    class Keyed(Counting):
        def reset(self, key: Any) -> Any:
            (count, _), obs = super().reset(jax.random.clone(key))
            return (count, key), obs

    env, other = made(Keyed()), made(Keyed())
    _, key = env.running.task
    other.restore(env.snapshot())
    assert eqx.tree_equal(other.running.task[1], key)
    assert other.running.task[1].dtype == key.dtype


def test_a_snapshot_goes_on_to_the_bit_and_refuses_what_it_is_not_of() -> None:
    env, other = made(Counting(terminates=5), 3), made(Counting(terminates=5), 3)
    collected(env, 0)
    taken = env.snapshot()
    through_json = Snapshot(taken.arrays, json.loads(json.dumps(taken.facts)))
    other.restore(through_json)
    assert other.next_episode == env.next_episode == 2
    jax.tree.map(np.testing.assert_array_equal, collected(env, 8), collected(other, 8))
    made(Counting(), 3).restore(made(Counting(), 3).snapshot())  # of one not begun
    damaged = {name: x for name, x in taken.arrays.items() if name != ".obs"}
    for env, snapshot in (
        (made(Counting(), 4), taken),
        (made(Counting(), 3), Snapshot(damaged, taken.facts)),
        (made(Pendulum(), 3), taken),
        (made(Counting(), 3), Snapshot(taken.arrays, {})),
    ):
        with pytest.raises(UserError, match="does not fit; use another checkpoint"):
            env.restore(snapshot)


# The pendulum


def test_the_pendulum_is_gymnasiums() -> None:
    real, task = gym.make("Pendulum-v1"), Pendulum()
    step = jax.jit(task.step)
    for seed in range(20):
        real.reset(seed=seed)
        for torque in (-2.0, -0.3, 1.7):
            angle, speed = real.unwrapped.state  # type: ignore[attr-defined]
            action = np.array([torque], np.float32)
            mine = step(Pole(jnp.float32(angle), jnp.float32(speed)), action, jax.random.key(0))
            obs, reward, terminated, truncated, _ = real.step(action)
            np.testing.assert_allclose(mine.obs, obs, rtol=1e-5, atol=2e-6)
            np.testing.assert_allclose(mine.reward, reward, rtol=1e-4, atol=1e-5)
            assert (bool(mine.terminated), bool(mine.truncated)) == (terminated, truncated) == (False, False)


def test_its_episodes_begin_as_gymnasiums_do() -> None:
    poles, _ = jax.vmap(Pendulum().reset)(jax.random.split(jax.random.key(0), 2000))
    for values, most in ((poles.angle, np.pi), (poles.speed, 1.0)):
        np.testing.assert_allclose(np.abs(values).max(), most, rtol=0.01)
        np.testing.assert_allclose(np.std(values), most / np.sqrt(3), rtol=0.05)


# Runs


def learner(folder: Path, env: Any = "jax/Pendulum-v1", *more: str, algo: str = "sac") -> Learner:
    return Learner(env, algo, seed=3, run_dir=folder, settings=[*SMALL, *more], quiet=True)


def test_a_run_resumes_within_its_episode_to_the_same_end(tmp_path: Path) -> None:
    straight = learner(tmp_path / "straight")
    before = dict(device.traces)
    straight.learn()
    assert straight.run.device is not None
    env = straight.run.device.env
    assert device.traces[env] - before.get(env, 0) <= 1  # traced once a run, or by one before
    shutil.copytree(tmp_path / "straight", tmp_path / "killed")
    [last] = (tmp_path / "killed" / "checkpoints").glob("*300")
    shutil.rmtree(last)
    resumed = Learner.load(tmp_path / "killed", quiet=True)
    assert resumed.num_timesteps == 200
    assert resumed.run.device.next_episode == 2  # type: ignore[union-attr]
    resumed.learn(100)
    assert_the_same_run(straight, resumed)
    assert int(resumed.state.replay.rows.episode[-1]) == 1
    judged = resumed.evaluate(2)
    assert judged.lengths.tolist() == [200, 200]
    recorded = np.loadtxt(tmp_path / "straight" / "evaluations.csv", delimiter=",", skiprows=1)
    assert judged.returns[0] == pytest.approx(recorded[-1, 2], rel=1e-5)


@pytest.mark.slow
def test_seeds_side_by_side_are_the_runs_that_each_is_alone(tmp_path: Path) -> None:
    """To rounding, while nothing is learned: the pendulum multiplies differences."""
    frozen = ("train.updates_per_step=0", "train.total_steps=240")
    given = {"settings": [*SMALL, *frozen], "quiet": True, "run_dir": tmp_path / "both"}
    both = seeds.train_seeds("jax/Pendulum-v1", "sac", seeds=[3, 4], **given)
    alone = learner(tmp_path / "alone", "jax/Pendulum-v1", *frozen).learn()
    for one, other in zip(both[0].state.replay.rows, alone.state.replay.rows, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-3)
    assert not np.allclose(both[1].state.replay.rows.obs, alone.state.replay.rows.obs)
    resumed = seeds.resume_seeds(tmp_path / "both", 20, quiet=True)
    assert {each.num_timesteps for each in resumed} == {260}

    def first_return(folder: Path) -> float:
        lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        found = next(line for line in lines if "rollout/ep_rew_mean" in line)
        assert found["rollout/ep_len_mean"] == 200
        return found["rollout/ep_rew_mean"]

    one, other = first_return(tmp_path / "both" / "seed-3"), first_return(tmp_path / "alone")
    assert one == pytest.approx(other, rel=1e-4)


def test_discrete_actions_and_an_environment_of_the_users_own(tmp_path: Path) -> None:
    task = Counting(choices=3, terminates=7)
    run = learner(tmp_path / "run", task, algo="dqn").learn()
    assert run.run.device is not None
    rows = run.state.replay.rows
    np.testing.assert_array_equal(np.asarray(rows.continuation)[:21], np.arange(21) % 7 != 6)
    action, _ = run.predict(np.zeros(2, np.float32))
    assert int(action) in (3, 4, 5)
    with pytest.raises(UserError, match="give it again"):
        Learner.load(tmp_path / "run")
    assert Learner.load(tmp_path / "run", task, quiet=True).evaluate(2).lengths.tolist() == [7, 7]


def test_a_wrapper_brings_the_steps_back_to_the_host() -> None:
    wrapped = gym.wrappers.TransformReward(native.as_gymnasium(Pendulum()), lambda r: r)
    assert native.task_of(wrapped) is None
    assert native.task_of(host.make(EnvConfig(id="jax/Pendulum-v1"))) == Pendulum()


def test_a_native_task_can_be_stepped_on_the_host() -> None:
    env = host.make(EnvConfig(id="jax/Pendulum-v1", kwargs={"max_episode_steps": 30}))
    adapter = host.HostEnv(env, seed=0)
    block, ended = adapter.collect(lambda obs: np.zeros(1, np.float32), 65)
    assert [episode.length for episode in ended] == [30, 30]
    assert (block.continuation == 1).all()
    assert adapter.spec.known.reward is not None
    told = adapter.spec.known.reward(*map(jnp.asarray, (block.obs, block.action, block.next_obs)))
    np.testing.assert_allclose(told, block.reward, rtol=1e-5)


def test_names_that_there_are_not_get_the_nearest() -> None:
    with pytest.raises(UserError, match="unknown environment 'jax/Pendulm-v1'; there are: jax/Pendulum-v1"):
        host.make(EnvConfig(id="jax/Pendulm-v1"))


@pytest.mark.parametrize(("name", "module"), [("gymnax", "gymnax"), ("playground", "mujoco_playground")])
def test_a_missing_extra_is_said_with_its_command(
    name: str, module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, module, None)
    extra = {"gymnax": "gymnax", "playground": "mjx"}[name]
    with pytest.raises(UserError, match=rf'needs the extra: pip install "mve\[{extra}\]"'):
        host.make(EnvConfig(id=f"{name}/CheetahRun"))
