"""True reward and termination functions of Gymnasium's control tasks, where observations determine them.

Each environment class has one small function that reads the weights and ranges of the instance it is given
and writes its equations for a single transition: vectors in, scalar out. `_over_batch` lifts those to any
leading axes. In the equations x' is x after the step, Δx = x' - x, and w, b, c stand for the weights of going
forward, of staying healthy and of control.

An answer is withheld (None) rather than guessed. The usual reason is a reward that reads the position which
the default observation leaves out (`exclude_current_positions_from_observation=True`).

One approximation is accepted. `mj_step` leaves body positions as its last evaluation of the forces saw them,
which is the last Runge-Kutta stage and not quite the new qpos. Ant, Humanoid and InvertedDoublePendulum build
rewards on such positions; we use qpos. The lag is of third order in the time step where motion is smooth, is
largest at impacts, and cancels between neighbouring steps in a sum of forward rewards.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import gymnasium as gym
import jax.numpy as jnp
import numpy as np
from gymnasium import wrappers
from jax import Array

from mve.envs.kinematics import f32, kinematics, matmul, norm
from mve.types import Known, RewardFn, TerminationFn

Builder: TypeAlias = Callable[[Any, int], Known]  # (unwrapped environment, version of its class)
Scalar: TypeAlias = Callable[[Array, Array, Array], Array]  # one transition -> one number
Feature: TypeAlias = Callable[[Array], Array]  # of one observation: a number or a truth value

# These leave observation, action, reward and termination as the environment gave them. (The step on which
# Autoreset resets is no transition of the environment: whoever collects has to drop it.)
_HARMLESS = (
    wrappers.TimeLimit,
    wrappers.OrderEnforcing,
    wrappers.PassiveEnvChecker,
    wrappers.RecordEpisodeStatistics,
    wrappers.Autoreset,
)


def known_functions(env: gym.Env[Any, Any]) -> Known:
    """The true functions of `env`, read from the instance and so from its keyword arguments.

    Classes are compared by their full name: a subclass may step differently and is not recognised, nor is
    anything below a wrapper that could change what the agent sees or is paid.
    """
    env = below_harmless_wrappers(env)
    if isinstance(task_known := getattr(env, "known", None), Known):  # a native task's own
        return task_known
    build, version = _BUILDERS.get(class_name(env), (lambda _, __: Known(None, None), 0))
    return build(env, version)


def of_class(name: str, settings: Any) -> Known:
    """Those of one of Gymnasium's classic control tasks, such as "cartpole:CartPoleEnv", for an instance with
    these attributes."""
    build, version = _BUILDERS[f"gymnasium.envs.classic_control.{name}"]
    return build(settings, version)


def below_harmless_wrappers(env: gym.Env[Any, Any]) -> gym.Env[Any, Any]:
    """What is left when wrappers that change nothing of a transition are taken off."""
    while isinstance(env, gym.Wrapper) and type(env) in _HARMLESS:
        env = env.env
    return env


def class_name(env: gym.Env[Any, Any]) -> str:
    return f"{type(env).__module__}:{type(env).__qualname__}"


def name_of(env: gym.Env[Any, Any]) -> str:
    """Its Gymnasium id, or the name of its class."""
    return env.spec.id if env.spec is not None else type(env.unwrapped).__name__


# Classic control and the pendulums


def _pendulum(env: Any, _: int) -> Known:
    """r = -(θ² + 0.1 θ̇² + 0.001 u²), of the state before the step, with the torque u as clipped."""
    COS, SIN, SPEED = range(3)
    limit = float(env.max_torque)

    def reward(obs: Array, action: Array, _: Array) -> Array:
        angle = jnp.arctan2(obs[SIN], obs[COS])
        torque = jnp.clip(action[0], -limit, limit)
        return -(angle**2 + 0.1 * obs[SPEED] ** 2 + 0.001 * torque**2)

    return Known(_over_batch(reward), never)


def _inverted_pendulum(_: Any, version: int) -> Known:
    """Ends when |θ'| > 0.2 or anything is not finite. r = 1; v5 pays nothing on the step that ends it."""
    ANGLE = 1

    def terminated(_: Array, __: Array, next_obs: Array) -> Array:
        return ~jnp.all(jnp.isfinite(next_obs)) | (jnp.abs(next_obs[ANGLE]) > 0.2)

    def reward(obs: Array, action: Array, next_obs: Array) -> Array:
        unpaid = terminated(obs, action, next_obs) & (version == 5)
        return jnp.where(unpaid, 0.0, 1.0)

    return Known(_over_batch(reward), _over_batch(terminated))


def _inverted_double_pendulum(env: Any, version: int) -> Known:
    """r = b - 0.01 x'² - (y' - 2)² - 0.001 ω1'² - 0.005 ω2'², (x, y) the tip; ends when y' <= 1.

    With the stock model x = cart + 0.6 sin θ1 + 0.6 sin(θ1 + θ2), and y the same of cosines without the cart.
    v5 withholds b on the step that ends the episode; v4 has b = 10 and always pays it.
    Observed velocities are clipped to ±10, so the penalty of anything faster is understated.
    """
    CART, SIN_1, SIN_2, COS_1, COS_2, _CART_SPEED, SPEED_1, SPEED_2 = range(8)
    bonus = 10.0 if version == 4 else float(env._healthy_reward)
    poses, body, site = kinematics(env.model), env.model.site_bodyid[0], f32([*env.model.site_pos[0], 1])

    def tip(obs: Array) -> tuple[Array, Array]:
        # Angles, rather than the sum formulas: a model's sine and cosine need not lie on the unit circle.
        first, second = jnp.arctan2(obs[SIN_1], obs[COS_1]), jnp.arctan2(obs[SIN_2], obs[COS_2])
        x, _, y, _ = matmul(poses(jnp.stack([obs[CART], first, second]))[body], site)
        return x, y

    def terminated(_: Array, __: Array, next_obs: Array) -> Array:
        return tip(next_obs)[1] <= 1

    def reward(_: Array, __: Array, next_obs: Array) -> Array:
        x, y = tip(next_obs)
        alive = bonus if version == 4 else jnp.where(y <= 1, 0.0, bonus)
        speed_penalty = 1e-3 * next_obs[SPEED_1] ** 2 + 5e-3 * next_obs[SPEED_2] ** 2
        return alive - 0.01 * x**2 - (y - 2) ** 2 - speed_penalty

    return Known(_over_batch(reward), _over_batch(terminated))


def _cart_pole(env: Any, _: int) -> Known:
    """Ends when |x'| or |θ'| is beyond its threshold. r = 1; Sutton and Barto's form: 0, -1 at the end."""
    PLACE, ANGLE = 0, 2
    furthest, steepest = float(env.x_threshold), float(env.theta_threshold_radians)

    def terminated(_: Array, __: Array, next_obs: Array) -> Array:
        return (jnp.abs(next_obs[PLACE]) > furthest) | (jnp.abs(next_obs[ANGLE]) > steepest)

    def reward(obs: Array, action: Array, next_obs: Array) -> Array:
        if not env._sutton_barto_reward:
            return jnp.ones(())
        return jnp.where(terminated(obs, action, next_obs), -1.0, 0.0)

    return Known(_over_choices(reward), _over_choices(terminated))


def _acrobot(_: Any, __: int) -> Known:
    """Ends when the tip swings above the bar: -cos θ1' - cos(θ1' + θ2') > 1. r = -1, and 0 at the end."""
    COS_1, SIN_1, COS_2, SIN_2 = range(4)

    def terminated(_: Array, __: Array, next_obs: Array) -> Array:
        first = jnp.arctan2(next_obs[SIN_1], next_obs[COS_1])
        second = jnp.arctan2(next_obs[SIN_2], next_obs[COS_2])
        return -jnp.cos(first) - jnp.cos(first + second) > 1.0

    def reward(obs: Array, action: Array, next_obs: Array) -> Array:
        return jnp.where(terminated(obs, action, next_obs), 0.0, -1.0)

    return Known(_over_choices(reward), _over_choices(terminated))


def _mountain_car(env: Any, _: int) -> Known:
    """Ends when the car is at the goal, x' >= goal, and at least as fast as was asked. r = -1."""
    PLACE, SPEED = range(2)
    goal, fast = float(env.goal_position), float(env.goal_velocity)

    def terminated(_: Array, __: Array, next_obs: Array) -> Array:
        return (next_obs[PLACE] >= goal) & (next_obs[SPEED] >= fast)

    return Known(_over_choices(lambda _, __, ___: -jnp.ones(())), _over_choices(terminated))


# Arms


def _reacher(env: Any, version: int) -> Known:
    """r = -w ‖fingertip - target‖ - c ‖a‖²; v4 measures before the step (w = c = 1), v5 after it."""
    width = 3 if version == 4 else 2  # the difference vector closes the observation; v5 drops its height
    weights = (1.0, 1.0) if version == 4 else (env._reward_dist_weight, env._reward_control_weight)
    near, control = map(float, weights)
    if version == 5 and not _has_stock_model(env, "reacher.xml"):
        return Known(None, never)  # in another model the height that is dropped need not be zero

    def reward(obs: Array, action: Array, next_obs: Array) -> Array:
        seen = obs if version == 4 else next_obs
        return -near * norm(seen[-width:]) - control * jnp.sum(action**2)

    return Known(_over_batch(reward), never)


def _pusher(env: Any, version: int) -> Known:
    """r = -n ‖object - tips‖ - w ‖object - goal‖ - c ‖a‖²; v4 measures before the step, v5 after it."""
    weights = (0.5, 1.0, 0.1)
    if version == 5:
        weights = (env._reward_near_weight, env._reward_dist_weight, env._reward_control_weight)
    near, far, control = map(float, weights)

    def reward(obs: Array, action: Array, next_obs: Array) -> Array:
        tips, thing, goal = (obs if version == 4 else next_obs)[-9:].reshape(3, 3)
        return -near * norm(thing - tips) - far * norm(thing - goal) - control * jnp.sum(action**2)

    return Known(_over_batch(reward), never)


# Runners in the plane: qpos = (x, z, pitch, joints...), Swimmer's = (x, y, heading, joints...)


def _half_cheetah_or_swimmer(env: Any, _: int) -> Known:
    """r = w Δx/dt - c ‖a‖²; never ends."""
    return Known(_runner_reward(env), never)


def _hopper(env: Any, version: int) -> Known:
    """r = w Δx/dt + b·alive - c ‖a‖²; healthy while height, pitch and every state after z are in range.

    Observed velocities are clipped to ±10, so one that leaves a wider `healthy_state_range` (±100) is missed.
    """
    z = 1 - _skipped(env, 1)

    def healthy(obs: Array) -> Array:
        upright = _inside(obs[z], env._healthy_z_range) & _inside(obs[z + 1], env._healthy_angle_range)
        return upright & jnp.all(_inside(obs[z + 1 :], env._healthy_state_range))

    bonus, termination = _health(env, version, healthy)
    return Known(_runner_reward(env, bonus), termination)


def _walker2d(env: Any, version: int) -> Known:
    """r = w Δx/dt + b·alive - c ‖a‖²; healthy while height and pitch are in range."""
    z = 1 - _skipped(env, 1)

    def healthy(obs: Array) -> Array:
        return _inside(obs[z], env._healthy_z_range) & _inside(obs[z + 1], env._healthy_angle_range)

    bonus, termination = _health(env, version, healthy)
    return Known(_runner_reward(env, bonus), termination)


def _runner_reward(env: Any, bonus: Feature | None = None) -> RewardFn | None:
    """r = w Δx/dt + bonus - c ‖a‖², where the observation has the x position."""
    X = 0
    if env._exclude_current_positions_from_observation:
        return None
    forward, control = float(env._forward_reward_weight) / env.dt, float(env._ctrl_cost_weight)

    def reward(obs: Array, action: Array, next_obs: Array) -> Array:
        gain = forward * (next_obs[X] - obs[X]) - control * jnp.sum(action**2)
        return gain if bonus is None else gain + bonus(next_obs)

    return _over_batch(reward)


# Runners in space: qpos = (x, y, z, quaternion, joints...)


def _ant(env: Any, version: int) -> Known:
    """r = w Δx/dt + b·alive - c ‖a‖² - k Σ f'²; healthy while z' is in [low, high] and the state is finite.

    x is the torso's (v5: main body's), f the contact forces as clipped and observed. v4 has w = 1 and pays
    for contact only under `use_contact_forces`; v5 always does.
    """
    skipped = _skipped(env, 2)
    z, n_state = 2 - skipped, env.model.nq + env.model.nv - skipped
    low, high = map(float, env._healthy_z_range)

    def healthy(obs: Array) -> Array:
        return jnp.all(jnp.isfinite(obs[:n_state])) & (low <= obs[z]) & (obs[z] <= high)

    bonus, termination = _health(env, version, healthy)
    price = float(env._contact_cost_weight) if version == 5 or env._use_contact_forces else 0.0
    observed = env._include_cfrc_ext_in_observation if version == 5 else env._use_contact_forces
    if skipped or (price and not observed):
        return Known(None, termination)

    body = env.data.body(env._main_body if version == 5 else "torso").id
    forward = (float(env._forward_reward_weight) if version == 5 else 1.0) / env.dt
    control, poses = float(env._ctrl_cost_weight), kinematics(env.model)
    # v5 observes every body but the world, whose force is zero before the clipping but maybe not after it.
    weakest, strongest = map(float, env._contact_force_range)
    unseen = 6 * min(max(0.0, weakest), strongest) ** 2 if version == 5 else 0.0

    def x(obs: Array) -> Array:
        return poses(obs[: env.model.nq])[body, 0, 3]

    def reward(obs: Array, action: Array, next_obs: Array) -> Array:
        contact = jnp.sum(next_obs[n_state:] ** 2) + unseen if price else 0.0
        gain = forward * (x(next_obs) - x(obs)) + bonus(next_obs)
        return gain - control * jnp.sum(action**2) - price * contact

    return Known(_over_batch(reward), termination)


def _humanoid(env: Any, version: int) -> Known:
    """r = w Δx/dt + b·alive - c ‖a‖² - clip(k Σ f'²); healthy while z' is in (low, high).

    x is that of the centre of mass. Only v5 pays for contact: f are the forces that close its observation.
    """
    skipped = _skipped(env, 2)
    z, n_forces = 2 - skipped, 6 * (env.model.nbody - 1)  # the world's force is left out, and is zero

    def healthy(obs: Array) -> Array:
        return _inside(obs[z], env._healthy_z_range)

    bonus, termination = _health(env, version, healthy)
    price = float(env._contact_cost_weight) if version == 5 else 0.0
    if skipped or (price and not env._include_cfrc_ext_in_observation):
        return Known(None, termination)

    low, high = map(float, env._contact_cost_range) if version == 5 else (0.0, 0.0)
    forward, control = float(env._forward_reward_weight) / env.dt, float(env._ctrl_cost_weight)
    poses, mass = kinematics(env.model), env.model.body_mass
    centres = np.insert(env.model.body_ipos, 3, 1, axis=1)  # in homogeneous coordinates
    shares = f32(mass[:, None] / mass.sum() * centres)

    def x(obs: Array) -> Array:
        return jnp.sum(poses(obs[: env.model.nq])[:, 0] * shares)

    def reward(obs: Array, action: Array, next_obs: Array) -> Array:
        contact = jnp.clip(price * jnp.sum(next_obs[-n_forces:] ** 2), low, high)
        return forward * (x(next_obs) - x(obs)) + bonus(next_obs) - control * jnp.sum(action**2) - contact

    return Known(_over_batch(reward), termination)


# Shared terms


def _health(env: Any, version: int, healthy: Feature) -> tuple[Feature, TerminationFn]:
    """The bonus b·alive of a next observation, and the termination.

    v5 pays while healthy. v4 also pays wherever being unhealthy ends the episode: on that last step.
    """
    ends, bonus = bool(env._terminate_when_unhealthy), float(env._healthy_reward)
    always = version == 4 and ends
    termination = _over_batch(lambda _, __, next_obs: ~healthy(next_obs)) if ends else never
    return lambda next_obs: jnp.where(healthy(next_obs) | always, bonus, 0.0), termination


def never(obs: Array, _: Array, __: Array) -> Array:
    return jnp.zeros(obs.shape[:-1], bool)


def _skipped(env: Any, positions: int) -> int:
    return positions if env._exclude_current_positions_from_observation else 0


def _inside(value: Array, bounds: tuple[float, float]) -> Array:
    """In the open interval, which a NaN never is."""
    low, high = map(float, bounds)
    return (low < value) & (value < high)


def _has_stock_model(env: Any, name: str) -> bool:
    return Path(env.fullpath) == Path(inspect.getfile(type(env))).parent / "assets" / name


def _over_batch(function: Scalar) -> Scalar:
    return jnp.vectorize(function, signature="(s),(a),(s)->()")


def _over_choices(function: Scalar) -> Scalar:
    """As `_over_batch` where an action is a number."""
    return jnp.vectorize(function, signature="(s),(),(s)->()")


_MUJOCO: dict[str, Builder] = {
    "ant:AntEnv": _ant,
    "half_cheetah:HalfCheetahEnv": _half_cheetah_or_swimmer,
    "hopper:HopperEnv": _hopper,
    "humanoid:HumanoidEnv": _humanoid,
    "inverted_double_pendulum:InvertedDoublePendulumEnv": _inverted_double_pendulum,
    "inverted_pendulum:InvertedPendulumEnv": _inverted_pendulum,
    "pusher:PusherEnv": _pusher,
    "reacher:ReacherEnv": _reacher,
    "swimmer:SwimmerEnv": _half_cheetah_or_swimmer,
    "walker2d:Walker2dEnv": _walker2d,
}
_BUILDERS: dict[str, tuple[Builder, int]] = {
    "gymnasium.envs.classic_control.acrobot:AcrobotEnv": (_acrobot, 1),
    "gymnasium.envs.classic_control.cartpole:CartPoleEnv": (_cart_pole, 1),
    "gymnasium.envs.classic_control.mountain_car:MountainCarEnv": (_mountain_car, 0),
    "gymnasium.envs.classic_control.pendulum:PendulumEnv": (_pendulum, 1),
    **{
        f"gymnasium.envs.mujoco.{name.replace(':', f'_v{version}:')}": (build, version)
        for name, build in _MUJOCO.items()
        for version in (4, 5)
    },
}
