"""Every agent with every estimator learns the Q-values of environments so small that they are known.

After Andy Jones' probe environments. Each isolates one link: if only `an_action` fails, for instance, it is
the actor; if only `a_delay`, discounting or, with a model, imagination. Reward and termination are learned
as well. gamma is 1/2, so that a value one step off is a factor of two off.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from environments import DiscreteProbe, Probe

from mve import dynamics, replay, train
from mve.agents import AGENTS, Agent
from mve.dynamics import Dynamics, DynamicsConfig
from mve.envs.host import HostEnv, random_actions, random_log_density
from mve.replay import Replay
from mve.state import Capacity, Recipe, TrainState, fresh_state
from mve.targets import TargetsConfig, calibration
from mve.types import Known

GAMMA = 0.5
ROWS, JUDGED = 256, 64
FITS, UPDATES = 300, 1000
VALUE_TOLERANCE, ACTION_TOLERANCE = 0.06, 0.1  # values lie within [-2, 2], actions within [-1, 1]
INIT = jax.jit(fresh_state, static_argnums=(0, 1, 2))
MODEL = jax.jit(dynamics.init, static_argnums=(0, 1, 2, 3))

EXACT_AGENTS = {  # nothing that blurs Q: no smoothing noise; hardly any entropy bonus, for good
    "ddpg": {},
    "td3": {"target_noise": 0.0},
    "sac": {"initial_temperature": 1e-3, "temperature_learning_rate": 1e-9},
    "dqn": {},
}
# Retrace needs a target policy with a density; this much noise moves no value by more than 0.01.
NOISE_FOR_RETRACE = {"td3": {"target_noise": 0.05}}
# A compilation each: every agent with what all of them have to do, and every other estimator with one agent.
FAST = {"mve": "sac", "lambda": "td3", "steve": "ddpg", "calibrated": "sac", "retrace": "td3"}
ESTIMATORS = ("one_step", "mve_tdk", *FAST)
LEARNERS = [
    pytest.param(agent, estimator, marks=[pytest.mark.slow] if FAST.get(estimator, agent) != agent else [])
    for agent in AGENTS
    if not AGENTS[agent][1].discrete
    for estimator in ESTIMATORS
    if (agent, estimator) != ("ddpg", "retrace")  # which has no density
]


class Answers(NamedTuple):
    """An environment, the Q-values of some of its (s, a), and the best action in some states."""

    env: Probe
    value: dict[tuple[float, float], float]
    best: dict[float, float] = {}  # noqa: RUF012


PROBES = {
    "a_constant": Answers(Probe(lambda s, a: 1.0), {(0, 0): 1, (0, 0.8): 1}),
    "an_observation": Answers(
        Probe(lambda s, a: s, first_obs=(-1.0, 1.0)), {(-1, 0): -1, (1, 0): 1, (1, -0.8): 1}
    ),
    # 1 at the second and last step: half of that at the first.
    "a_delay": Answers(Probe(lambda s, a: s, num_steps=2), {(0, 0): 0.5, (0, 0.8): 0.5, (1, 0): 1}),
    "an_action": Answers(
        Probe(lambda s, a: 1 - 2 * (a - 0.5) ** 2), {(0, 0.5): 1, (0, 0): 0.5, (0, -0.5): -1}, {0: 0.5}
    ),
    "action_and_observation": Answers(
        Probe(lambda s, a: 1 - 2 * (a - 0.5 * s) ** 2, first_obs=(-1.0, 1.0)),
        {(1, 0.5): 1, (1, -0.5): -1, (-1, -0.5): 1, (-1, 0.5): -1},
        {1: 0.5, -1: -0.5},
    ),
    # The first step's value is half of what the *policy* earns at the second.
    "a_delayed_action": Answers(
        Probe(lambda s, a: s * (1 - 2 * (a - 0.5) ** 2), num_steps=2),
        {(0, 0): 0.5, (1, 0.5): 1, (1, 0): 0.5},
        {1: 0.5},
    ),
    # Three steps to a time limit, which is no end: 1 + 1/2 + 1/4 + ... = 2. Begins anywhere, so that the
    # state before a limit is known to the critic and not to its extrapolation only.
    "no_end": Answers(
        Probe(lambda s, a: 1.0, num_steps=3, first_obs=(0.0, 1.0, 2.0, 3.0), truncated=True),
        {(0, 0): 2, (1, 0): 2, (2, 0): 2, (3, 0): 2},
    ),
}
# Of the choice between 0 and 1. The best action is 1 throughout, or depends on the state.
DISCRETE_PROBES = {
    "a_choice": Answers(DiscreteProbe(lambda s, a: 2 * a - 1), {(0, 0): -1, (0, 1): 1}, {0: 1}),
    "choice_and_observation": Answers(
        DiscreteProbe(lambda s, a: s * (2 * a - 1), first_obs=(-1.0, 1.0)),
        {(1, 1): 1, (1, 0): -1, (-1, 0): 1, (-1, 1): -1},
        {1: 1, -1: 0},
    ),
    # The first step's value is half of what the better choice earns at the second.
    "a_delayed_choice": Answers(
        DiscreteProbe(lambda s, a: s * (2 * a - 1), num_steps=2),
        {(0, 0): 0.5, (0, 1): 0.5, (1, 1): 1, (1, 0): -1},
        {1: 1},
    ),
    # For ever, past every time limit: 1 + 1/2 + 1/4 + ... = 2 for choosing 1 now, 1 for choosing 0.
    "no_end_of_choices": Answers(
        DiscreteProbe(lambda s, a: a, num_steps=3, first_obs=(0.0, 1.0, 2.0, 3.0), truncated=True),
        {(0, 1): 2, (2, 1): 2, (3, 1): 2, (0, 0): 1, (2, 0): 1, (3, 0): 1},
        {0: 1, 1: 1, 2: 1},
    ),
}


def recipe(agent: str, estimator: str) -> Recipe:
    config_class, agent_class = AGENTS[agent]
    actor = {} if agent_class.discrete else {"action_layer": 0, "actor_learning_rate": 3e-3}
    return Recipe(
        obs_size=1,
        action_size=2 if agent_class.discrete else 1,
        known=Known(),
        agent=config_class(
            hidden=(64,),
            batch_size=64,
            critic_learning_rate=1e-2,
            target_rate=0.1,
            **actor,
            **EXACT_AGENTS[agent] | (NOISE_FOR_RETRACE.get(agent, {}) if estimator == "retrace" else {}),
        ),
        dynamics=DynamicsConfig(hidden=(64,), members=2, batch_size=64, learning_rate=3e-3),
        targets=TargetsConfig(estimator=estimator, horizon_steps=2, discount=GAMMA),  # pyright: ignore[reportArgumentType]
    )


@partial(jax.jit, static_argnames="recipe")
def fitted(model: Dynamics, memory: Replay, recipe: Recipe) -> Dynamics:
    model = dynamics.observe(model, memory.rows, memory.size, recipe.dynamics)
    sample_fn = partial(replay.sample, memory)
    return dynamics.fit(model, sample_fn, recipe.dynamics, jnp.int32(FITS), jax.random.key(1))[0]


@partial(jax.jit, static_argnames="recipe")
def improved(state: TrainState, recipe: Recipe) -> Agent:
    def improve(i: jax.Array, state: TrainState) -> TrainState:
        if state.calibration is not None:  # on what the model was fitted to: here it is as good as exact
            some, key = jax.tree.map(lambda x: x[:JUDGED], state.replay.rows), jax.random.key(3)
            known = train.calibrate(state, some, jnp.int32(JUDGED), recipe, jax.random.fold_in(key, i))
            state = replace(state, calibration=known)
        key = jax.random.fold_in(jax.random.key(2), i)
        return replace(state, agent=train.update_step(state, recipe, key)[0])

    return jax.lax.fori_loop(0, UPDATES, improve, state).agent


@cache
def experience(probe: str) -> tuple[Replay, Dynamics]:
    """Transitions of random actions, and the model fitted to them: the same for every agent."""
    world = (PROBES | DISCRETE_PROBES)[probe].env
    env = HostEnv(world, seed=0)
    actions = iter(random_actions(world.action_space, np.random.default_rng(0), ROWS))
    block, _ = env.collect(lambda obs: next(actions), ROWS)
    density = np.full(ROWS, random_log_density(world.action_space), np.float32)
    block = block._replace(log_density=density)  # pyright: ignore[reportArgumentType]
    sizes = env.spec.obs_size, env.spec.action_size
    memory = replay.add(replay.init(ROWS, *sizes), block, jnp.ones(ROWS, bool))
    ours = recipe("dqn" if env.spec.discrete else "ddpg", "mve")
    model = MODEL(ours.dynamics, ours.known, *sizes, jax.random.key(0))
    return memory, fitted(model, memory, ours)


@cache
def beginner(agent: str, recalls: bool) -> TrainState:
    return INIT(recipe(agent, "retrace" if recalls else "mve"), Capacity(ROWS), 0)


def trained(agent: str, estimator: str, probe: str) -> Agent:
    memory, model = experience(probe)
    ours = recipe(agent, estimator)
    known = calibration.init(ours.targets.horizon_steps) if ours.targets.calibrates else None
    state = replace(beginner(agent, estimator == "retrace"), replay=memory, model=model, calibration=known)
    return improved(state, ours)


def assert_values(value: jax.Array, answers: Answers) -> None:
    for critic in np.asarray(value):
        np.testing.assert_allclose(critic, list(answers.value.values()), atol=VALUE_TOLERANCE)


@pytest.mark.parametrize("probe", PROBES)
@pytest.mark.parametrize(("agent", "estimator"), LEARNERS)
def test_known_values_are_learned(agent: str, estimator: str, probe: str) -> None:
    learned, answers = trained(agent, estimator, probe), PROBES[probe]
    obs_action = jnp.array(list(answers.value), jnp.float32)
    assert_values(learned.action_values(obs_action[:, :1], obs_action[:, 1:]), answers)
    for obs, best in answers.best.items():
        action = learned.policy()(np.array([obs], np.float32), np.zeros(1, np.float32))
        np.testing.assert_allclose(action, best, atol=ACTION_TOLERANCE)


@pytest.mark.parametrize("probe", DISCRETE_PROBES)
@pytest.mark.parametrize(
    "estimator",
    [pytest.param(e, marks=[] if e in ("one_step", "mve_tdk") else [pytest.mark.slow]) for e in ESTIMATORS],
)
def test_known_values_of_choices_are_learned(estimator: str, probe: str) -> None:
    learned, answers = trained("dqn", estimator, probe), DISCRETE_PROBES[probe]
    obs, choice = jnp.array(list(answers.value), jnp.float32).T
    assert_values(learned.action_values(obs[:, None], jax.nn.one_hot(choice.astype(int), 2)), answers)
    for obs, best in answers.best.items():
        action = learned.policy()(np.array([obs], np.float32), np.zeros(2, np.float32))
        np.testing.assert_array_equal(action, np.eye(2)[best])
