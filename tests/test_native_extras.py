"""gymnax and MuJoCo Playground, by the optional extras of those names."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_native import Fixed, collected
from test_resume import SMALL

from mve import Learner
from mve.envs import device_env, host
from mve.envs.base import EnvConfig
from mve.envs.device import Collected
from mve.envs.device_env import DeviceEnv
from mve.types import UserError

TASKS = ["Pendulum-v1", "CartPole-v1", "Acrobot-v1", "MountainCar-v0"]


@pytest.fixture(autouse=True)
def others_code() -> Iterator[None]:
    """Our strictness is not for what others wrote."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"), jax.debug_key_reuse(False):
        yield


@pytest.fixture
def gymnax() -> None:
    pytest.importorskip("gymnax", reason='needs the extra: pip install "mve[gymnax]"')


def made(name: str, **kwargs: Any) -> DeviceEnv:
    instance = host.make(EnvConfig(id=name, kwargs=kwargs))
    env = device_env.of(instance, host.HostEnv(instance, seed=0).spec, 0, 100)
    assert env is not None
    return env


def random_rows(env: DeviceEnv, blocks: int = 5) -> Collected:
    policy = Fixed(jnp.zeros(env.spec.action_size))
    parts = [collected(env, 100 * i, 100, is_random=True, policy=policy) for i in range(blocks)]
    return jax.tree.map(lambda *x: np.concatenate(x), *parts)


@pytest.mark.usefixtures("gymnax")
@pytest.mark.parametrize("name", TASKS)
def test_known_functions_are_those_of_its_own_steps(name: str) -> None:
    env = made(f"gymnax/{name}")
    block = random_rows(env).block
    reward, termination = env.spec.known
    assert reward is not None
    assert termination is not None
    rows = [jnp.asarray(x) for x in (block.obs, block.action, block.next_obs)]
    np.testing.assert_allclose(reward(*rows), block.reward, atol=1e-5)
    np.testing.assert_array_equal(termination(*rows), block.continuation == 0)


@pytest.mark.usefixtures("gymnax")
def test_its_time_limit_is_no_termination() -> None:
    found = random_rows(made("gymnax/Pendulum-v1", max_episode_steps=60))
    np.testing.assert_array_equal(np.flatnonzero(found.over), [59, 119, 179, 239, 299, 359, 419, 479])
    assert (found.block.continuation == 1).all()
    found = random_rows(made("gymnax/CartPole-v1", max_episode_steps=20))
    over, fell = found.over, found.block.continuation == 0
    assert fell.any()
    assert (over & ~fell).any()
    np.testing.assert_array_equal(found.length[over & ~fell], 20)
    np.testing.assert_array_equal(fell & ~over, False)


@pytest.mark.usefixtures("gymnax")
def test_its_parameters_can_be_set_and_mistakes_are_one_line() -> None:
    assert made("gymnax/Pendulum-v1", max_torque=1.0).env.task.action_space.high == 1.0  # type: ignore[union-attr]
    with pytest.raises(UserError, match="there are: gymnax/Pendulum-v1"):
        made("gymnax/Pendlum-v1")
    with pytest.raises(UserError, match="cannot make environment 'gymnax/Pendulum-v1': TypeError"):
        made("gymnax/Pendulum-v1", colour=1)


@pytest.mark.usefixtures("gymnax")
def test_a_run_on_it_resumes(tmp_path: Path) -> None:
    given = {"settings": SMALL, "quiet": True, "run_dir": tmp_path / "run"}
    run = Learner("gymnax/CartPole-v1", "dqn", **given).learn()
    loaded = Learner.load(tmp_path / "run", quiet=True)
    assert loaded.evaluate(2).returns.tolist() == run.evaluate(2).returns.tolist()


@pytest.mark.slow
def test_playground_steps_end_by_its_time_limit_only() -> None:
    """Compiling MJX takes minutes on a CPU."""
    pytest.importorskip("mujoco_playground", reason='needs the extra: pip install "mve[mjx]"')
    env = made("playground/CartpoleBalance", max_episode_steps=4, impl="jax")
    found = collected(env, 0, 6, is_random=True, policy=Fixed(jnp.zeros(1)))
    np.testing.assert_array_equal(np.flatnonzero(found.over), [3])
    assert (found.block.continuation[:6] == 1).all()
    assert found.sound[:6].all()
    np.testing.assert_array_equal(found.block.next_obs[:3], found.block.obs[1:4])
    before = env.snapshot()
    first = collected(env, 6, 2, policy=Fixed(jnp.zeros(1)))
    env.restore(before)
    jax.tree.map(np.testing.assert_array_equal, first, collected(env, 6, 2, policy=Fixed(jnp.zeros(1))))
    with pytest.raises(UserError, match="there are: playground/CheetahRun"):
        made("playground/CheetahRum")
