"""Nothing is lost, doubled or shifted between the environment and a sampled minibatch.

The environment's observation counts up, so that a row that is one step out, or that crosses from one
episode into the next, shows at once. Block lengths and ring sizes are odd on purpose.
"""

from __future__ import annotations

from collections.abc import Sequence

import gymnasium as gym
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from environments import Counting
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete

from mve import replay
from mve.envs import host
from mve.envs.base import EnvConfig, Episode
from mve.envs.host import HostEnv
from mve.replay import Replay
from mve.types import Transition, UserError

BLOCK = 7
CAPACITY = 20
ADD, SAMPLE = jax.jit(replay.add), jax.jit(replay.sample, static_argnums=1)
SEGMENTS = jax.jit(replay.sample_segments, static_argnums=(1, 2))
LENGTHS = (3, 5, 1, 4, 9)  # of the episodes; even ones terminate, odd ones are truncated


def do_nothing(obs: np.ndarray) -> np.ndarray:
    return np.zeros(1, np.float32)


def collected(num_steps: int, **settings: bool) -> tuple[Transition, list[Episode]]:
    return HostEnv(Counting(LENGTHS), seed=0, **settings).collect(do_nothing, num_steps)


def padded(block: Transition) -> Transition:
    """To the fixed length of a block, with numbers that must never be seen again."""
    missing = BLOCK - len(block.reward)
    return jax.tree.map(lambda x: np.concatenate([x, np.full((missing, *x.shape[1:]), -77, x.dtype)]), block)


def remembered(num_steps: int, capacity: int = CAPACITY, memory: Replay | None = None) -> Replay:
    """A ring after so many steps, in blocks of seven and a shorter last one."""
    memory = memory or replay.init(capacity, 2, 1)
    env = HostEnv(Counting(LENGTHS), seed=0)
    for start in range(0, num_steps, BLOCK):
        count = min(BLOCK, num_steps - start)
        memory = ADD(memory, padded(env.collect(do_nothing, count)[0]), np.arange(BLOCK) < count)
    return memory


def assert_is_counting(rows: Transition) -> None:
    """Every row is one step of one episode, its end flagged as the environment flagged it."""
    rows = jax.tree.map(np.asarray, rows)
    count, episode = rows.obs[..., 0], rows.obs[..., 1]
    length = np.array(LENGTHS)[rows.episode % len(LENGTHS)]
    np.testing.assert_array_equal(rows.next_obs[..., 0], count + 1)
    np.testing.assert_array_equal(rows.next_obs[..., 1], episode)
    np.testing.assert_array_equal(rows.episode, episode)
    np.testing.assert_array_equal(rows.reward, count)
    np.testing.assert_array_equal(rows.continuation, ~((count + 1 == length) & (rows.episode % 2 == 0)))


# --- Acting ---


def test_collected_rows_count_up_within_their_episode() -> None:
    block, _ = collected(60)
    assert_is_counting(block)
    np.testing.assert_array_equal(block.step, np.arange(1, 61))


def test_blocks_of_any_length_cut_the_same_stream() -> None:
    whole, ended = collected(60)
    env = HostEnv(Counting(LENGTHS), seed=0)
    parts, ended_in_parts = zip(*(env.collect(do_nothing, n) for n in (1, 7, 13, 2, 37)), strict=True)
    for expected, *columns in zip(whole, *parts, strict=True):
        np.testing.assert_array_equal(np.concatenate(columns), expected)
    assert [episode for part in ended_in_parts for episode in part] == ended


def test_episodes_report_their_return_and_length() -> None:
    _, ended = collected(sum(LENGTHS) + 2)
    assert ended == [Episode(ret=sum(range(length)), length=length) for length in LENGTHS]


@pytest.mark.parametrize("truncation_is_terminal", [False, True])
def test_a_time_limit_keeps_its_continuation_unless_told_otherwise(truncation_is_terminal: bool) -> None:
    block, _ = collected(sum(LENGTHS), truncation_is_terminal=truncation_is_terminal)
    last = np.cumsum(LENGTHS) - 1
    at_ends = block.continuation[last]
    np.testing.assert_array_equal(at_ends[::2], 0.0)  # terminated
    np.testing.assert_array_equal(at_ends[1::2], 0.0 if truncation_is_terminal else 1.0)
    np.testing.assert_array_equal(np.delete(block.continuation, last), 1.0)


# --- Remembering ---


def test_the_oldest_rows_are_overwritten_first() -> None:
    for num_steps in (CAPACITY - 3, CAPACITY, 2 * CAPACITY + 12):
        memory = remembered(num_steps)
        kept = np.arange(max(1, num_steps - CAPACITY + 1), num_steps + 1)
        assert memory.size == len(kept)
        assert memory.position == num_steps % CAPACITY
        np.testing.assert_array_equal(memory.rows.step[(kept - 1) % CAPACITY], kept)


def test_sampled_rows_count_up_after_the_ring_has_wrapped() -> None:
    num_steps = 2 * CAPACITY + 12
    batch = SAMPLE(remembered(num_steps), (50, 40), jax.random.key(0))
    assert batch.obs.shape == (50, 40, 2)
    assert_is_counting(batch)
    step, times = np.unique(batch.step, return_counts=True)
    np.testing.assert_array_equal(step, np.arange(num_steps - CAPACITY + 1, num_steps + 1))
    # Uniform: 100 draws expected of each row, of standard deviation 10.
    assert 60 < times.min() < times.max() < 140


def test_a_ring_that_is_not_full_gives_only_what_was_written() -> None:
    batch = SAMPLE(remembered(CAPACITY - 3), (500,), jax.random.key(0))
    assert_is_counting(batch)
    assert set(np.asarray(batch.step).tolist()) == set(range(1, CAPACITY - 2))


def test_different_keys_sample_different_rows() -> None:
    memory = remembered(CAPACITY)
    a, b = (SAMPLE(memory, (30,), key).step for key in jax.random.split(jax.random.key(0)))
    assert (a != b).any()


@pytest.mark.parametrize("num_steps", [CAPACITY - 3, CAPACITY, CAPACITY + 6])
def test_a_grown_ring_keeps_its_rows_and_their_order(num_steps: int) -> None:
    before = remembered(num_steps)
    grown = replay.grow(before, 33)
    kept = np.arange(max(1, num_steps - CAPACITY + 1), num_steps + 1)
    np.testing.assert_array_equal(grown.rows.step[: len(kept)], kept)
    np.testing.assert_array_equal(grown.rows.step[len(kept) :], 0)
    assert (grown.capacity, grown.size, grown.position) == (33, len(kept), len(kept))
    # It goes on as a ring of 33 that had seen only these rows.
    more = remembered(2 * BLOCK, memory=grown)
    order = (np.arange(len(kept) + 2 * BLOCK))[-33:] % 33
    expected = np.concatenate([kept, np.arange(1, 2 * BLOCK + 1)])[-33:]
    np.testing.assert_array_equal(more.rows.step[order], expected)


# --- Segments ---


def test_segments_count_up_to_the_end_of_their_episode_or_the_newest_row() -> None:
    for num_steps in (CAPACITY - 3, CAPACITY, 2 * CAPACITY + 12):
        segment = SEGMENTS(remembered(num_steps), 300, 6, jax.random.key(0))
        rows, valid = jax.tree.map(np.asarray, segment)
        assert rows.obs.shape == (6, 300, 2)
        assert valid[0].all()
        assert_is_counting(jax.tree.map(lambda x, valid=valid: x[valid], rows))
        length = np.array(LENGTHS)[rows.episode[0] % len(LENGTHS)]
        left = np.minimum(length - rows.obs[0, :, 0], num_steps - rows.step[0] + 1)
        np.testing.assert_array_equal(valid.sum(axis=0), np.minimum(left, 6))
        np.testing.assert_array_equal(np.sort(valid, axis=0)[::-1], valid)  # one stretch, from the first row
        assert len(np.unique(rows.step[0])) == min(num_steps, CAPACITY)


def test_segments_are_drawn_as_single_rows_are() -> None:
    memory = remembered(CAPACITY)
    segment = SEGMENTS(memory, 30, 3, jax.random.key(0))
    np.testing.assert_array_equal(segment.rows.step[0], SAMPLE(memory, (30,), jax.random.key(0)).step)


def test_segments_may_be_of_the_newest_rows_above_all() -> None:
    memory = remembered(CAPACITY + 3)
    segment = replay.sample_segments(memory, 30, 3, jax.random.key(0), recency=2.0)
    one = replay.sample(memory, (30,), jax.random.key(0), recency=2.0)
    np.testing.assert_array_equal(segment.rows.step[0], one.step)


def test_a_ring_as_short_as_a_segment_never_takes_the_oldest_row_for_the_next() -> None:
    # One long episode fills the ring: after the newest row comes the oldest, of the same episode.
    memory = replay.init(4, 2, 1)
    block, _ = HostEnv(Counting((50,)), seed=0).collect(do_nothing, BLOCK)
    memory = ADD(memory, block, np.ones(BLOCK, bool))
    segment = SEGMENTS(memory, 50, 7, jax.random.key(0))
    np.testing.assert_array_equal(segment.valid.sum(axis=0), BLOCK + 1 - segment.rows.step[0])


# --- The boundary: actions, spaces, seeds, mistakes ---


def box(low: Sequence, high: Sequence) -> Box:
    return Box(np.array(low, np.float32), np.array(high, np.float32))


LOPSIDED = box([-1, 0], [3, 10])
SQUARE = box([[0, 1], [2, 3]], [[4, 5], [6, 7]])


@pytest.mark.parametrize(
    ("agent", "native"),
    [(-1, (-1, 0)), (1, (3, 10)), (0, (1, 5)), (0.5, (2, 7.5)), (-2, (-1, 0)), (2, (3, 10))],
)
def test_actions_are_stretched_over_a_lopsided_box(agent: float, native: Sequence[float]) -> None:
    env = Counting(action_space=LOPSIDED)
    block, _ = HostEnv(env, seed=0).collect(lambda obs: np.full(2, agent, np.float32), 1)
    np.testing.assert_allclose(env.actions[0], native)
    assert env.actions[0].dtype == np.float32
    np.testing.assert_array_equal(block.action[0], agent)  # what the agent meant is what is remembered


def test_known_functions_are_given_actions_in_the_environments_own_units() -> None:
    def reward(obs: jax.Array, action: jax.Array, next_obs: jax.Array) -> jax.Array:
        return jnp.sum(action, axis=-1)

    def termination(obs: jax.Array, action: jax.Array, next_obs: jax.Array) -> jax.Array:
        return action[..., 1] > 9.0

    env = HostEnv(Counting(action_space=LOPSIDED), seed=0, reward_fn=reward, termination_fn=termination)
    assert env.spec.known.reward is not None
    assert env.spec.known.termination is not None
    obs, action = jnp.zeros((3, 2)), jnp.array([[-1.0, -1.0], [0.0, 0.0], [1.0, 1.0]])
    np.testing.assert_allclose(env.spec.known.reward(obs, action, obs), [-1.0, 6.0, 13.0])
    np.testing.assert_array_equal(env.spec.known.termination(obs, action, obs), [False, False, True])


CHOICES = Discrete(4, start=3)


def test_a_one_hot_action_reaches_the_environment_as_its_own_number() -> None:
    env = Counting(LENGTHS, action_space=CHOICES)
    block, _ = HostEnv(env, seed=0).collect(lambda obs: np.eye(4)[int(obs[0]) % 4], 20)
    assert_is_counting(block)
    assert env.actions == [3 + int(count) % 4 for count in block.obs[:, 0]]
    assert all(CHOICES.contains(action) for action in env.actions)
    # What the agent meant is what is remembered.
    np.testing.assert_array_equal(block.action, np.eye(4, dtype=np.float32)[block.obs[:, 0].astype(int) % 4])
    assert block.action.dtype == np.float32


def test_an_environment_says_whether_its_actions_are_a_choice() -> None:
    discrete, continuous = (HostEnv(Counting(action_space=s), seed=0).spec for s in (CHOICES, LOPSIDED))
    assert (discrete.discrete, discrete.action_size) == (True, 4)
    assert (continuous.discrete, continuous.action_size) == (False, 2)


def test_known_functions_of_a_choice_are_given_its_own_number() -> None:
    def reward(obs: jax.Array, action: jax.Array, next_obs: jax.Array) -> jax.Array:
        assert action.shape == obs.shape[:-1]
        assert jnp.issubdtype(action.dtype, jnp.integer)
        return 10.0 * action.astype(jnp.float32)

    def termination(obs: jax.Array, action: jax.Array, next_obs: jax.Array) -> jax.Array:
        return action == 5

    env = HostEnv(Counting(action_space=CHOICES), seed=0, reward_fn=reward, termination_fn=termination)
    assert env.spec.known.reward is not None
    assert env.spec.known.termination is not None
    obs, action = jnp.zeros((4, 2)), jnp.eye(4)
    np.testing.assert_allclose(env.spec.known.reward(obs, action, obs), [30.0, 40.0, 50.0, 60.0])
    np.testing.assert_array_equal(env.spec.known.termination(obs, action, obs), [False, False, True, False])
    np.testing.assert_allclose(env.spec.known.reward(obs[None], action[None], obs[None])[0, 3], 60.0)


def test_random_actions_are_uniform_in_either_kind_of_space() -> None:
    rng = np.random.default_rng(0)
    chosen = host.random_actions(CHOICES, rng, 4000)
    np.testing.assert_array_equal(np.sort(chosen, axis=1), np.tile([0.0, 0.0, 0.0, 1.0], (4000, 1)))
    np.testing.assert_allclose(chosen.mean(axis=0), 0.25, atol=0.03)
    stretched = host.random_actions(LOPSIDED, rng, 4000)
    assert stretched.shape == (4000, 2)
    np.testing.assert_allclose(np.quantile(stretched, (0, 0.25, 1), axis=0)[:, 0], (-1, -0.5, 1), atol=0.05)
    assert chosen.dtype == stretched.dtype == np.float32


@pytest.mark.parametrize(
    "spaces",
    [
        {"action_space": Box(-np.inf, np.inf, (2,))},
        {"action_space": box([-1, -np.inf], [1, 1])},
        {"action_space": box([-1, 2], [1, 2])},
        {"action_space": MultiDiscrete([3, 2])},
        {"action_space": MultiBinary(3)},
        {"action_space": SQUARE},
        {"observation_space": Discrete(3)},
        {"observation_space": Dict(a=Box(-1.0, 1.0, (1,)))},
        {"observation_space": SQUARE},
    ],
    ids=[
        "unbounded",
        "half-bounded",
        "empty",
        "multi-discrete",
        "multi-binary",
        "square",
        "discrete obs",
        "dict obs",
        "square obs",
    ],
)
def test_spaces_that_cannot_be_handled_are_refused_in_one_line(spaces: dict[str, gym.Space]) -> None:
    with pytest.raises(UserError, match=f"Counting: {next(iter(spaces)).split('_')[0]}.* space .*") as caught:
        HostEnv(Counting(**spaces), seed=0)
    assert "\n" not in str(caught.value)


class Broken(Counting):
    """Counts, but for what is broken at one step."""

    def __init__(self, obs: np.ndarray | None = None, reward: float | None = None, size: int = 2):
        space = Box(-np.inf, np.inf, (size,))
        super().__init__(lengths=(100,), observation_space=space)
        self.bad_obs, self.bad_reward, self.size = obs, reward, size

    def _obs(self) -> np.ndarray:
        broken = self.count == 4 and self.bad_obs is not None
        return self.bad_obs if broken else np.zeros(self.size, np.float32)

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        obs, reward, *rest = super().step(action)
        return obs, (self.bad_reward if self.count == 4 and self.bad_reward is not None else reward), *rest


@pytest.mark.parametrize(
    ("env", "complaint"),
    [
        (Broken(obs=np.array([0.0, np.nan])), "at step 4, .* the observation is not finite"),
        (Broken(obs=np.full(60, np.inf), size=60), "at step 4, .* the observation is not finite"),
        (Broken(obs=np.zeros(3)), r"at step 4, .* the observation has shape \(3,\), not \(2,\)"),
        (Broken(reward=float("nan")), "at step 4, .* the reward is nan"),
    ],
    ids=["nan", "many infinities", "shape", "reward"],
)
def test_nonsense_from_the_environment_is_refused_by_its_step(env: Broken, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint) as caught:
        HostEnv(env, seed=0).collect(do_nothing, 9)
    assert "\n" not in str(caught.value)


def reset_seeds(seed: int, lengths: Sequence[int], first_episode: int = 0) -> list[int | None]:
    inner = Counting(lengths)
    env = HostEnv(inner, seed=seed)
    env.num_episodes = first_episode
    env.collect(do_nothing, 40)
    return inner.seeds


def test_an_episodes_reset_seed_depends_on_the_run_and_its_number_only() -> None:
    seeds = reset_seeds(seed=3, lengths=(2, 3))
    assert seeds[:10] == reset_seeds(seed=3, lengths=(4,))  # whatever came before
    assert seeds[5:] == reset_seeds(seed=3, lengths=(2, 3), first_episode=5)[: len(seeds) - 5]
    assert len(set(seeds)) == len(seeds)
    assert not set(seeds) & set(reset_seeds(seed=4, lengths=(2, 3)))


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("HalfCheeta-v5", "HalfCheetah-v5"), ("Pendulum-v9", "Pendulum-v1"), ("hopper-v5", "Hopper-v5")],
)
def test_an_unknown_environment_suggests_the_nearest_name(typed: str, meant: str) -> None:
    with pytest.raises(UserError, match=f"unknown environment '{typed}'; nearest: .*{meant}"):
        host.make(EnvConfig(id=typed))


def test_a_name_like_no_other_says_where_the_names_are() -> None:
    with pytest.raises(UserError, match=r"see gymnasium\.registry"):
        host.make(EnvConfig(id="Xyzzyqqq-v0"))
