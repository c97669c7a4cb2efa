"""The true simulator as dynamics: set to any imagined state, it says what would really follow.

With it an estimator's error is the critic's alone, as in the oracle experiments of Feinberg et al. 2018
(arXiv 1803.00101). The observation has to determine the simulator's state. What it leaves out is handled
here once:

- the root's position, where the dynamics do not depend on it: 0 before the step, so that a forward reward,
  a difference of positions over dt, is right;
- the solver's warm start, which begins at zero: a real step begins at the last one's forces. Where the
  solver converges that is rounding (HalfCheetah: 1e-13 in double precision); Humanoid's stops early;
- velocities beyond the +-10 at which Hopper, Walker2d and InvertedDoublePendulum clip what they show: lost.
  Uniform actions drive Walker2d there in 80 % of its states, a fifth of that strength in 2 %; no other
  state is affected;
- where bodies were when forces were last evaluated, which the rewards of Ant, Humanoid and Reacher-v4
  measure from: up to 0.08, 0.002 and 0.001;
- turns of Reacher's elbow beyond pi.

Observations are single precision, so nothing is exact beyond 1e-7 of a state. Errors of one step, measured
on real episodes, are in `tests/test_oracle.py`. Where something that moves is not seen at all (the speed of
Pusher's object) we refuse.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any, TypeAlias

import gymnasium as gym
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from mve.envs import host
from mve.envs.known import below_harmless_wrappers, class_name, known_functions
from mve.messages import what_failed
from mve.types import Key, StepFn, UserError

# One state is put into the environment; many are stepped at once: obs (n, S) and actions (n, A) in the
# environment's own units -> next_obs, reward, terminated.
Setter: TypeAlias = Callable[[Any, np.ndarray], None]
BatchStep: TypeAlias = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, ...]]

TRIED_STEPS = 8  # of a user's environment, before its states are trusted
TRIED_TOLERANCE = 1e-3  # relative to the largest number compared


def simulator(env: gym.Env[Any, Any]) -> StepFn:
    """One true step of states (*batch, S) under actions (*batch, A) in [-1, 1], inside or outside jit.

    `env` is taken over: it is reset here and then only ever set. Any environment will do that has

        def set_observation(self, obs: np.ndarray) -> None: ...

    which puts it into the state that shows `obs`, a final one included; its next `step` has to be the one
    that would follow, without random draws. A time limit is not heeded, a termination is. UserError if the
    state of `env` cannot be set, or if a few steps from states set anew are not those of an episode.
    """
    name, env = host.name_of(env), below_harmless_wrappers(env)
    try:
        env.reset(seed=0)
        if hasattr(env, "set_observation"):
            step = _one_by_one(env, lambda env, obs: env.set_observation(obs))
            _try(env, step, name)
            return _as_step_fn(step, env)
    except UserError:
        raise
    except Exception as error:  # of the user's own code
        raise UserError(f"{name} cannot be an oracle: {what_failed(error)}") from error
    known_class = class_name(env)
    if known_class in _REFUSED:
        raise UserError(f"{name} cannot be an oracle: its observation leaves out {_REFUSED[known_class]}")
    if known_class in _ROLLED:
        return _rolled(env, name, *_ROLLED[known_class])
    if known_class == _PENDULUM:
        return _as_step_fn(_pendulum(env), env)
    if known_class not in _SETTERS:
        raise UserError(
            f"{name} cannot be set to a state, which dynamics.kind=oracle asks for; "
            "give its class a method set_observation(obs)"
        )
    env.render_mode = None  # states that are imagined are not shown
    return _as_step_fn(_one_by_one(env, _SETTERS[known_class]), env)


def _as_step_fn(batch_step: BatchStep, env: gym.Env[Any, Any]) -> StepFn:
    """From NumPy rows to a function that JAX can trace. It has no gradient."""
    call = _Call(batch_step, env.action_space)

    def step(obs: Array, action: Array, key: Key) -> tuple[Array, Array, Array]:
        del key
        row = jax.ShapeDtypeStruct(obs.shape[:-1], obs.dtype)
        shapes = (jax.ShapeDtypeStruct(obs.shape, obs.dtype), row, row)
        next_obs, reward, terminated = jax.pure_callback(
            call, shapes, obs, action, vmap_method="broadcast_all"
        )
        return next_obs, reward, 1.0 - terminated

    return step


class _Call:
    """What runs on the host: any leading axes, one caller at a time; NumPy only, for JAX might deadlock."""

    def __init__(self, batch_step: BatchStep, space: gym.Space[Any]):
        self.batch_step, self.space, self.lock = batch_step, space, threading.Lock()

    def __call__(self, obs: Any, action: Any) -> tuple[np.ndarray, ...]:
        obs, action = np.asarray(obs), np.asarray(action)
        lead, dtype = obs.shape[:-1], obs.dtype
        rows = obs.reshape(-1, obs.shape[-1]).astype(np.float64)
        native = host.native_action(self.space, action.reshape(-1, action.shape[-1]))  # pyright: ignore[reportArgumentType]
        with self.lock:
            results = self.batch_step(rows, native)
        return tuple(np.asarray(x, dtype).reshape(*lead, *x.shape[1:]) for x in results)


def _one_by_one(env: gym.Env[Any, Any], set_state: Setter) -> BatchStep:
    """The environment's own code, a row at a time: tens of microseconds each."""

    def step(obs: np.ndarray, action: np.ndarray) -> tuple[np.ndarray, ...]:
        next_obs, reward, terminated = np.empty_like(obs), np.empty(len(obs)), np.empty(len(obs))
        for i in range(len(obs)):
            set_state(env, obs[i])
            next_obs[i], reward[i], terminated[i], _, _ = env.step(action[i])
        return next_obs, reward, terminated

    return step


def _try(env: gym.Env[Any, Any], step: BatchStep, name: str) -> None:
    """Refuse a user's environment whose steps from states set anew are not those that it took itself."""
    space, rows = env.action_space, []
    space.seed(0)
    obs, _ = env.reset(seed=0)
    for _ in range(TRIED_STEPS):
        action = space.sample()
        next_obs, reward, terminated, truncated, _ = env.step(action)
        rows.append((obs, action, next_obs, reward, terminated))
        obs = env.reset()[0] if terminated or truncated else next_obs
    first, actions, *real = (np.array(column, np.float64) for column in zip(*rows, strict=True))
    found = step(first, actions.astype(space.dtype))
    for what, truth, answer in zip(("observation", "reward", "termination"), real, found, strict=True):
        error = np.abs(answer - truth).max() / max(np.abs(truth).max(), 1.0)
        if not error <= TRIED_TOLERANCE:
            raise UserError(
                f"{name} cannot be an oracle: after set_observation(obs) the next {what} is not the one that "
                f"followed obs in an episode (off by {error:.2g}); does obs say all, and step draw nothing?"
            )


# MuJoCo, where the observation is (qpos, qvel) and known functions of them pay and end


def _rolled(env: Any, name: str, skipped: int, clip: float) -> StepFn:
    """Many states side by side in threads, without Python between steps (`mujoco.rollout`).

    The callback moves (qpos, qvel); reward and termination are the known functions of full, unclipped
    states, so that Hopper's end by a speed that it does not show is seen.
    """
    hidden = skipped if getattr(env, "_exclude_current_positions_from_observation", False) else 0
    env._exclude_current_positions_from_observation = False  # for the known functions; none is asked of env
    known, size = known_functions(env), env.model.nq + env.model.nv
    reward_fn, termination_fn = known.reward, known.termination
    if env.model.na or reward_fn is None or termination_fn is None:
        raise UserError(f"{name} cannot be an oracle: its model keeps more state than it shows")
    call = _Call(_mujoco_rows(env, hidden), env.action_space)

    def step(obs: Array, action: Array, key: Key) -> tuple[Array, Array, Array]:
        del key
        shapes = (jax.ShapeDtypeStruct((*obs.shape[:-1], size), obs.dtype), action)
        full, native = jax.pure_callback(call, shapes, obs, action, vmap_method="broadcast_all")
        before = jnp.concatenate([jnp.zeros((*obs.shape[:-1], hidden), obs.dtype), obs], axis=-1)
        terminated = termination_fn(before, native, full)
        position, velocity = jnp.split(full[..., hidden:], [env.model.nq - hidden], axis=-1)
        next_obs = jnp.concatenate([position, jnp.clip(velocity, -clip, clip)], axis=-1)
        return next_obs, reward_fn(before, native, full), 1.0 - terminated.astype(obs.dtype)

    return step


def _mujoco_rows(env: Any, hidden: int) -> BatchStep:
    """obs -> (qpos, qvel) after `frame_skip` steps, and the action; hidden positions start at 0."""
    import mujoco
    from mujoco.rollout import Rollout

    native: Any = mujoco  # its C functions are not in the type stubs
    model, threads = env.model, os.cpu_count() or 1
    pool: Any = Rollout(nthread=threads)
    data = [native.MjData(model) for _ in range(threads)]
    size = native.mj_stateSize(model, native.mjtState.mjSTATE_FULLPHYSICS)  # time, qpos, qvel

    def step(obs: np.ndarray, action: np.ndarray) -> tuple[np.ndarray, ...]:
        start = np.zeros((len(obs), size))
        start[:, 1 + hidden :] = obs
        control = action.astype(np.float64)[:, None]
        state, _ = pool.rollout(model, data, start, control, nstep=env.frame_skip)
        return state[:, -1, 1:], action

    return step


# Everything else that is settable: the environment's own step


def _pendulum(env: Any) -> BatchStep:
    """Gymnasium's own step on all states at once: its formulas never look at how many angles there are."""
    env.render_mode = None

    def step(obs: np.ndarray, action: np.ndarray) -> tuple[np.ndarray, ...]:
        env.state = np.stack([np.arctan2(obs[:, 1], obs[:, 0]), obs[:, 2]])
        next_obs, reward, terminated, _, _ = env.step(action.T)
        return next_obs.T, reward, np.full(len(obs), float(terminated))

    return step


def _set_cartpole(env: Any, obs: np.ndarray) -> None:
    env.state, env.steps_beyond_terminated = obs, None


def _set_acrobot(env: Any, obs: np.ndarray) -> None:
    env.state = np.array([np.arctan2(obs[1], obs[0]), np.arctan2(obs[3], obs[2]), obs[4], obs[5]])


def _set_mountain_car(env: Any, obs: np.ndarray) -> None:
    env.state = obs.copy()


def _set_mujoco(env: Any, qpos: np.ndarray, qvel: np.ndarray) -> None:
    env.data.qacc_warmstart[:] = 0.0
    env.set_state(qpos, qvel)


def _set_runner_in_space(env: Any, obs: np.ndarray) -> None:
    """Ant, Humanoid: what follows positions and velocities (forces, inertias) is made by the step."""
    hidden = 2 if getattr(env, "_exclude_current_positions_from_observation", True) else 0
    qpos = np.concatenate([np.zeros(hidden), obs[: env.model.nq - hidden]])
    _set_mujoco(env, qpos, obs[len(qpos) - hidden :][: env.model.nv])


def _set_reacher(env: Any, obs: np.ndarray) -> None:
    angles = np.arctan2(obs[2:4], obs[:2])
    _set_mujoco(env, np.concatenate([angles, obs[4:6]]), np.concatenate([obs[6:8], np.zeros(2)]))


def _set_inverted_double_pendulum(env: Any, obs: np.ndarray) -> None:
    _set_mujoco(env, np.concatenate([obs[:1], np.arctan2(obs[1:3], obs[3:5])]), obs[5:8])


_CLASSIC, _MUJOCO = "gymnasium.envs.classic_control.", "gymnasium.envs.mujoco."
_PENDULUM = _CLASSIC + "pendulum:PendulumEnv"
_SETTERS: dict[str, Setter] = {
    _CLASSIC + "cartpole:CartPoleEnv": _set_cartpole,
    _CLASSIC + "acrobot:AcrobotEnv": _set_acrobot,
    _CLASSIC + "mountain_car:MountainCarEnv": _set_mountain_car,
    _CLASSIC + "continuous_mountain_car:Continuous_MountainCarEnv": _set_mountain_car,
}
_ROLLED: dict[str, tuple[int, float]] = {}  # positions that are hidden if any are, limit of velocities shown
_REFUSED: dict[str, str] = {}
for _version in ("v4", "v5"):
    _SETTERS |= {
        f"{_MUJOCO}ant_{_version}:AntEnv": _set_runner_in_space,
        f"{_MUJOCO}humanoid_{_version}:HumanoidEnv": _set_runner_in_space,
        f"{_MUJOCO}humanoidstandup_{_version}:HumanoidStandupEnv": _set_runner_in_space,
        f"{_MUJOCO}reacher_{_version}:ReacherEnv": _set_reacher,
        f"{_MUJOCO}inverted_double_pendulum_{_version}:InvertedDoublePendulumEnv": (
            _set_inverted_double_pendulum
        ),
    }
    _ROLLED |= {
        f"{_MUJOCO}half_cheetah_{_version}:HalfCheetahEnv": (1, np.inf),
        f"{_MUJOCO}swimmer_{_version}:SwimmerEnv": (2, np.inf),
        f"{_MUJOCO}hopper_{_version}:HopperEnv": (1, 10.0),
        f"{_MUJOCO}walker2d_{_version}:Walker2dEnv": (1, 10.0),
        f"{_MUJOCO}inverted_pendulum_{_version}:InvertedPendulumEnv": (0, np.inf),
    }
    _REFUSED[f"{_MUJOCO}pusher_{_version}:PusherEnv"] = "the speed of the object"
