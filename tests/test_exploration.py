"""Noise that stays for some steps: lengths by hand and by frequency, the same on the host and the device."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_learner import SMALL, Slide

from mve import Learner
from mve.envs.device import DeviceTask, _draws
from mve.envs.pendulum import Pendulum
from mve.policies import Policy, held


def test_draws_stay_as_long_as_their_lengths_say_by_hand() -> None:
    """At most 3 steps: 1, 2, 3 have 36/49, 9/49, 4/49; up to 0.7347 one step, up to 0.9184 two."""
    draws = np.arange(12.0).reshape(6, 2)
    uniform = np.array([0.5, 0.95, 0.8, 0.0, 0.0, 0.0])
    np.testing.assert_array_equal(held(draws, uniform, 3), draws[[0, 1, 1, 1, 2, 2]])
    np.testing.assert_array_equal(held(draws, np.full(6, 0.99), 4), draws[[0, 0, 0, 0, 1, 1]])
    np.testing.assert_array_equal(held(draws, uniform, 1), draws)


def test_lengths_fall_with_their_square() -> None:
    count = 20_000
    which = held(np.arange(count), np.random.default_rng(0).random(count), 16)
    _, length = np.unique(which, return_counts=True)
    share = np.arange(1, 17) ** -2.0 / np.sum(np.arange(1, 17) ** -2.0)
    seen = np.bincount(length[:-1], minlength=17)[1:] / (len(length) - 1)
    np.testing.assert_allclose(seen, share, atol=0.01)


def test_the_device_holds_as_the_host_does() -> None:
    rng = np.random.default_rng(1)
    draws, uniform = rng.normal(size=(20, 2)).astype(np.float32), rng.random(20).astype(np.float32)
    np.testing.assert_array_equal(held(jnp.asarray(draws), jnp.asarray(uniform), 8), held(draws, uniform, 8))


class Echo(Policy):
    """Acts as the noise says."""

    def __call__(self, obs: Any, noise: Any) -> Any:
        return 0.1 * noise

    def log_density(self, obs: Any, action: Any) -> Any:
        raise AssertionError("nobody asks")


def collected(folder: Path, policy: Policy | None, *settings: str) -> np.ndarray:
    """Actions of the block at step 40."""
    run = Learner(Slide(), "mve-sac", run_dir=folder, settings=[*SMALL, *settings], quiet=True).run
    return np.asarray(run.collect(policy, 40, 20).action)


@pytest.mark.parametrize("policy", [Echo(), None])
def test_noise_and_random_actions_stay_and_depend_on_the_step_alone(
    tmp_path: Path, policy: Policy | None
) -> None:
    staying = collected(tmp_path / "a", policy, "train.hold_steps=16")
    assert 3 < sum(bool((a == b).all()) for a, b in pairwise(staying)) < 19
    np.testing.assert_array_equal(staying, collected(tmp_path / "b", policy, "train.hold_steps=16"))
    fresh = collected(tmp_path / "c", policy)
    assert not any((a == b).all() for a, b in pairwise(fresh))
    assert {*staying.ravel()} <= {*fresh.ravel()}  # the same draws, some of them longer


def test_native_tasks_are_explored_alike() -> None:
    env = DeviceTask(task=Pendulum(), block_steps=20, limit=200, hold_steps=16)
    key, start = jax.random.key(0), jnp.int32(40)
    fresh = _draws(replace(env, hold_steps=1), key, start)
    for staying, each in zip(_draws(env, key, start)[1:], fresh[1:], strict=True):
        assert 3 < sum(bool((a == b).all()) for a, b in pairwise(np.asarray(staying))) < 19
        assert {*np.asarray(staying).ravel()} <= {*np.asarray(each).ravel()}
