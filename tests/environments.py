"""Small worlds whose answers are known: what the tests act in, and what they compare to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box, Discrete
from scipy.linalg import solve_discrete_lyapunov

REALS = Box(-np.inf, np.inf, (2,), np.float32)


class Counting(gym.Env):
    """Observes (steps since the reset, number of the episode) and pays the count it leaves.

    Episode i lasts `lengths[i]` steps, cyclically; even episodes terminate, odd ones are truncated.
    What it was given is kept: the seed of each reset, the action of each step.
    """

    def __init__(
        self,
        lengths: Sequence[int] = (3, 5),
        action_space: gym.Space = Box(-1.0, 1.0, (1,)),  # noqa: B008
        observation_space: gym.Space = REALS,
    ):
        self.action_space = action_space
        self.observation_space = observation_space
        self.lengths = lengths
        self.episode, self.count = -1, 0
        self.seeds: list[int | None] = []
        self.actions: list[np.ndarray] = []

    def _obs(self) -> np.ndarray:
        return np.array([self.count, self.episode], np.float32)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict]:
        self.seeds.append(seed)
        self.episode, self.count = self.episode + 1, 0
        return self._obs(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.actions.append(action)
        reward = float(self.count)
        self.count += 1
        over = self.count == self.lengths[self.episode % len(self.lengths)]
        terminates = self.episode % 2 == 0
        return self._obs(), reward, over and terminates, over and not terminates, {}


class Probe(gym.Env):
    """Episodes through the states first, 1, 2, ..., `num_steps` steps long; `reward` is of state and action.

    The first state is drawn from `first_obs`. `truncated`: a time limit ends the episode, not a termination.
    """

    observation_space = Box(-np.inf, np.inf, (1,), np.float32)
    action_space: gym.Space = Box(-1.0, 1.0, (1,))

    def __init__(
        self,
        reward: Callable[[float, float], float],
        num_steps: int = 1,
        first_obs: Sequence[float] = (0.0,),
        truncated: bool = False,
    ):
        self.reward, self.num_steps, self.first_obs, self.truncated = reward, num_steps, first_obs, truncated

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.obs, self.count = float(self.np_random.choice(self.first_obs)), 0
        return np.array([self.obs], np.float32), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        reward = float(self.reward(self.obs, float(action[0])))
        self.count += 1
        self.obs, over = float(self.count), self.count == self.num_steps
        terminated, truncated = over and not self.truncated, over and self.truncated
        return np.array([self.obs], np.float32), reward, terminated, truncated, {}


class DiscreteProbe(Probe):
    """The same where the action is 0 or 1."""

    action_space = Discrete(2)

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        return super().step(np.array([action]))


class LinearSystem(NamedTuple):
    """s' = s A + a B under a = s K, rewards s.w + s Q s + a R a; states and actions are row vectors.

    Solved in closed form: V(s) = s.v + s P s with v = w + gamma F v and P = Q + K R K' + gamma F P F',
    where F = A + K B is the closed loop.
    """

    transition: np.ndarray  # A (S, S)
    control: np.ndarray  # B (A, S)
    gain: np.ndarray  # K (S, A)
    linear_reward: np.ndarray  # w (S,)
    state_reward: np.ndarray  # Q (S, S)
    action_reward: np.ndarray  # R (A, A)
    discount: float

    @property
    def closed_loop(self) -> np.ndarray:
        return self.transition + self.gain @ self.control

    def value_coefficients(self) -> tuple[np.ndarray, np.ndarray]:
        """v and P of the policy's exact value."""
        closed, gamma = self.closed_loop, self.discount
        v = np.linalg.solve(np.eye(len(closed)) - gamma * closed, self.linear_reward)
        cost = self.state_reward + self.gain @ self.action_reward @ self.gain.T
        return v, solve_discrete_lyapunov(np.sqrt(gamma) * closed, cost)

    def next_obs(self, obs: Any, action: Any) -> Any:
        return obs @ self.transition + action @ self.control

    def reward(self, obs: Any, action: Any) -> Any:
        of_state = obs @ self.linear_reward + ((obs @ self.state_reward) * obs).sum(-1)
        return of_state + ((action @ self.action_reward) * action).sum(-1)

    def policy(self, obs: Any) -> Any:
        return obs @ self.gain

    def value(self, obs: Any) -> Any:
        v, P = self.value_coefficients()
        dtype = obs.dtype
        return obs @ v.astype(dtype) + ((obs @ P.astype(dtype)) * obs).sum(-1)


class Settable(gym.Env):
    """A LinearSystem acted in, with actions within +-10; any state can be brought back by what it shows.

    `ends_beyond`: an episode terminates when the first coordinate leaves this range.
    """

    observation_space = Box(-np.inf, np.inf, (2,), np.float64)
    action_space = Box(-10.0, 10.0, (1,), np.float64)

    def __init__(self, system: LinearSystem, ends_beyond: float = np.inf):
        self.system, self.ends_beyond = system, ends_beyond
        self.num_steps = 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.state, self.count = self.np_random.normal(size=2), 0
        return self.state.copy(), {}

    def set_observation(self, obs: np.ndarray) -> None:
        self.state, self.count = np.array(obs, np.float64), 0

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        reward = float(self.system.reward(self.state, action))
        self.state = self.system.next_obs(self.state, action)
        self.count, self.num_steps = self.count + 1, self.num_steps + 1
        return self.state.copy(), reward, bool(abs(self.state[0]) > self.ends_beyond), self.count == 25, {}


def linear_system(discount: float = 0.9) -> LinearSystem:
    """A damped, driven oscillator; its closed loop shrinks every state by about 0.9 a step."""
    return LinearSystem(
        transition=np.array([[0.9, -0.2], [0.2, 0.9]]),
        control=np.array([[0.0, 0.3]]),
        gain=np.array([[-0.2], [-0.1]]),
        linear_reward=np.array([0.5, -0.3]),
        state_reward=-np.array([[1.0, 0.1], [0.1, 0.5]]),
        action_reward=-np.array([[0.2]]),
        discount=discount,
    )
