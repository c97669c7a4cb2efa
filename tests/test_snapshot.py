"""An environment restored from a snapshot goes on as the one that it was taken from: compared by bytes.

Actions are drawn from the environment's own action space and resets are not seeded, so that what follows
depends on every generator too.
"""

from __future__ import annotations

import copy
import hashlib
import json
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import wrappers
from gymnasium.envs.classic_control import CartPoleEnv
from gymnasium.envs.mujoco.hopper_v5 import HopperEnv

from mve import checkpoint
from mve.envs import snapshot
from mve.envs.base import Snapshot
from mve.envs.host import HostEnv
from mve.envs.portable import BIT_GENERATORS, NotPortableError, pack, unpack
from mve.types import UserError

LIMIT = 60  # of an episode, so that its end is soon reached
NUM_STEPS = 200  # compared after every snapshot

CLASSIC = ("CartPole-v1", "Pendulum-v1", "Acrobot-v1", "MountainCar-v0", "MountainCarContinuous-v0")
BODIES = (
    *("Ant", "HalfCheetah", "Hopper", "Humanoid", "HumanoidStandup", "InvertedDoublePendulum"),
    *("InvertedPendulum", "Pusher", "Reacher", "Swimmer", "Walker2d"),
)
MUJOCO = [f"{body}-{version}" for body in BODIES for version in ("v4", "v5")]
FAST = (*CLASSIC, "Ant-v5", "Humanoid-v4", "Reacher-v4")
SLOW = [id for id in MUJOCO if id not in FAST and id != "Pusher-v4"]  # which wants a MuJoCo below 3


@pytest.fixture(autouse=True)
def _surroundings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)  # MuJoCo writes its log into the current folder


def make(id: str, **kwargs: Any) -> gym.Env:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is out of date")
        return gym.make(id, **({"max_episode_steps": LIMIT} | kwargs))


def begun(env: gym.Env, seed: int = 0) -> gym.Env:
    env.reset(seed=seed)
    env.action_space.seed(seed)
    return env


def taken(env: gym.Env) -> Snapshot:
    """What it is after a checkpoint's files: JSON, and arrays that are nobody else's."""
    found = snapshot.take(env)
    assert found is not None, snapshot.obstacle(env)
    return Snapshot(copy.deepcopy(found.arrays), json.loads(json.dumps(found.facts, allow_nan=False)))


def exact(value: Any) -> Any:
    """Equal only if every bit is, and every type."""
    if isinstance(value, dict):  # `t` is the wall-clock time of RecordEpisodeStatistics
        return {name: exact(part) for name, part in value.items() if name != "t"}
    if isinstance(value, tuple):
        return tuple(exact(part) for part in value)
    array = np.asarray(value)
    return type(value).__name__, str(array.dtype), array.shape, array.tobytes()


def goes_on(env: gym.Env, over: bool = False, num_steps: int = NUM_STEPS) -> Iterator[tuple[Any, bool]]:
    """What each step or reset answers, and whether the episode is over then."""
    for _ in range(num_steps):
        by_hand = over and not isinstance(env, wrappers.Autoreset)
        answer: tuple = env.reset() if by_hand else env.step(env.action_space.sample())
        over = len(answer) > 2 and bool(answer[2] or answer[3])
        yield exact(answer), over


def story(env: gym.Env, over: bool = False, num_steps: int = NUM_STEPS) -> list[Any]:
    return [answer for answer, _ in goes_on(env, over, num_steps)]


def assert_exact(build: Callable[[], gym.Env]) -> None:
    """At the reset, mid-episode, just before an end, at it, and in the episode after it."""
    plain = list(goes_on(begun(build()), num_steps=NUM_STEPS + LIMIT + 20))
    end = 1 + next(t for t, (_, over) in enumerate(plain) if over)
    middle = int(np.random.default_rng(end).integers(1, end))
    moments, found = {0, middle, end - 1, end, end + 1, end + 3}, {}
    env, over, told = begun(build()), False, []
    steps = goes_on(env, num_steps=len(plain))
    for t in range(len(plain)):
        if t in moments:
            found[t] = taken(env), over
        answer, over = next(steps)
        told.append(answer)
    assert told == [answer for answer, _ in plain], "the environment was disturbed"
    for t, (saved, over) in found.items():
        other = begun(build(), seed=99)
        story(other, num_steps=5)
        for restored in (build(), other):
            snapshot.restore(restored, saved)
            assert story(restored, over) == told[t : t + NUM_STEPS], f"restored after {t} steps"


@pytest.mark.parametrize("id", FAST)
def test_what_follows_a_snapshot_is_the_same_to_the_bit(id: str) -> None:
    assert_exact(lambda: make(id))


@pytest.mark.slow
@pytest.mark.parametrize("id", SLOW)
def test_what_follows_a_snapshot_of_every_other_body_is_the_same_to_the_bit(id: str) -> None:
    assert_exact(lambda: make(id))


def test_every_environment_of_both_families_is_tried() -> None:
    families = ("gymnasium.envs.classic_control", "gymnasium.envs.mujoco")
    ids = {id for id, spec in gym.registry.items() if str(spec.entry_point).startswith(families)}
    tried = {id.rpartition("-")[0] for id in (*FAST, *SLOW)}
    assert {id.rpartition("-")[0] for id in ids} == tried


def test_shown_again_a_restored_robot_shows_what_it_showed() -> None:
    """Its inertias and forces are those of the last substep, not those of the state."""
    env, other = begun(make("Humanoid-v5")), make("Humanoid-v5")
    *_, (obs, *_) = (env.step(env.action_space.sample()) for _ in range(10))
    snapshot.restore(other, taken(env))
    body: Any = other.unwrapped
    assert exact(body._get_obs()) == exact(obs)


IN_ANOTHER_PROCESS = """
import sys
sys.path.insert(0, sys.argv[1])
from test_snapshot import continue_from_files
for id in sys.argv[2:]:
    print(continue_from_files(id))
"""


def continue_from_files(id: str) -> str:
    facts = checkpoint.read_facts(checkpoint.latest(Path(id)) or Path(id))
    state, facts = checkpoint.restore(Path(id), lambda facts: {"env": snapshot.template(facts["env"])})
    env = make(id)
    snapshot.restore(env, Snapshot(state["env"], facts["env"]))
    return digest(env)


def digest(env: gym.Env) -> str:
    return hashlib.sha256(repr(story(env)).encode()).hexdigest()


def test_another_process_goes_on_from_the_files_of_a_checkpoint() -> None:
    wanted = []
    for id in ("Ant-v5", "Pendulum-v1"):
        env = begun(make(id))
        story(env, num_steps=11)
        saved = taken(env)
        checkpoint.save(Path(id), {"env": saved.arrays}, {"num_env_steps": 11, "env": saved.facts})
        wanted.append(digest(env))
    command = [sys.executable, "-c", IN_ANOTHER_PROCESS, str(Path(__file__).parent), "Ant-v5", "Pendulum-v1"]
    answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert answer.stdout.split() == wanted


# --- Wrappers ---

WRAPPERS: dict[str, Callable[[gym.Env], gym.Env]] = {
    "actions": lambda env: wrappers.StickyAction(
        wrappers.ClipAction(wrappers.RescaleAction(env, *np.float32([[-0.5], [0.5]]))), 0.9, (3, 5)
    ),
    "running moments": lambda env: wrappers.NormalizeReward(wrappers.NormalizeObservation(env)),
    "stacked": lambda env: wrappers.FlattenObservation(wrappers.FrameStackObservation(env, 3)),
    "padded": lambda env: wrappers.FrameStackObservation(env, 4, padding_type="zero"),
    "late and timed": lambda env: wrappers.TimeAwareObservation(wrappers.DelayObservation(env, 2)),
    "statistics": lambda env: wrappers.RecordEpisodeStatistics(wrappers.ClipReward(env, -1.0, 1.0)),
    "skipping": lambda env: wrappers.MaxAndSkipObservation(env, 3),
    "beginning anew": lambda env: wrappers.Autoreset(env),
    "quantised": lambda env: wrappers.DtypeObservation(wrappers.RepeatAction(env, 2), np.float32),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_what_follows_is_the_same_below_wrappers(name: str) -> None:
    assert_exact(lambda: WRAPPERS[name](make("Pendulum-v1", max_episode_steps=20)))


def test_statistics_of_past_episodes_go_on() -> None:
    env, other = (wrappers.RecordEpisodeStatistics(make("CartPole-v1"), buffer_length=3) for _ in range(2))
    story(begun(env))
    snapshot.restore(other, taken(env))
    for name in ("return_queue", "length_queue", "time_queue"):
        assert list(getattr(other, name)) == list(getattr(env, name)) != []
        assert getattr(other, name).maxlen == 3


def test_a_snapshot_from_before_the_first_reset_wants_one() -> None:
    env = begun(make("MountainCar-v0"))
    snapshot.restore(env, taken(make("MountainCar-v0")))
    assert not hasattr(env.unwrapped, "state")
    with pytest.raises(gym.error.ResetNeeded):
        env.step(0)


def test_a_pole_that_has_fallen_stays_fallen() -> None:
    env, other = begun(make("CartPole-v1")), make("CartPole-v1")
    while not env.step(0)[2]:
        pass
    snapshot.restore(other, taken(env))
    with pytest.warns(UserWarning, match="even though this environment has already returned"):
        assert other.step(0)[1] == 0.0


class Doubling(gym.RewardWrapper):
    def reward(self, reward: Any) -> float:
        return 2.0 * float(reward)


class Heavy(CartPoleEnv):
    pass


@pytest.mark.parametrize(
    ("build", "named"),
    [
        (lambda: gym.make("Taxi-v4"), "TaxiEnv"),
        (lambda: Doubling(make("Pendulum-v1")), "Doubling"),
        (lambda: wrappers.TransformReward(make("Pendulum-v1"), float), "TransformReward"),
        (Heavy, "Heavy"),
    ],
)
def test_nothing_is_guessed_of_a_class_that_is_not_known(build: Callable[[], gym.Env], named: str) -> None:
    env = begun(build())
    assert snapshot.take(env) is None
    reason = snapshot.obstacle(env)
    assert reason is not None
    assert named in reason
    assert "snapshot() and restore(data)" in reason


# --- A class of one's own ---


class Walk(gym.Env):
    """A random walk that remembers where it has been; ends after a hundred steps."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float64)
    forgets = False

    def __init__(self) -> None:
        self.action_space = gym.spaces.Box(-1.0, 1.0, (1,))

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.places, self.count, self.drift = [self.np_random.normal()], 0, np.float32(0.1)
        return self._obs(), {}

    def _obs(self) -> np.ndarray:
        return np.array([self.places[-1], np.mean(self.places[-5:])])

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.places.append(self.places[-1] + self.np_random.normal() + float(self.drift * action[0]))
        self.count += 1
        return self._obs(), float(self.places[-1]), self.count == 100, False, {}

    def snapshot(self) -> dict[str, Any]:
        kept = {"count": self.count, "drift": self.drift}
        return kept if self.forgets else kept | {"places": np.array(self.places)}

    def restore(self, data: dict[str, Any]) -> None:
        self.count, self.drift = data["count"], data["drift"]
        if not self.forgets:
            self.places = list(data["places"])


class Forgetful(Walk):
    forgets = True


class Wistful(Walk):
    """Forgets no more than how many episodes there were, which only a reset shows."""

    num_episodes = 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.num_episodes += 1
        return np.full(2, float(self.num_episodes)), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        obs, reward, _, truncated, info = super().step(action)
        return obs, reward, self.count == 5, truncated, info


class Fickle(Walk):
    def snapshot(self) -> dict[str, Any]:
        return {"places": set(self.places)}


class Growing(gym.RewardWrapper):
    """Every reward weighs more than the last: a stateful wrapper that speaks for itself."""

    weight = 1.0

    def reward(self, reward: Any) -> float:
        self.weight *= 1.01
        return self.weight * float(reward)

    def snapshot(self) -> dict[str, Any]:
        return {"weight": self.weight}

    def restore(self, data: dict[str, Any]) -> None:
        self.weight = data["weight"]


class Lame(HopperEnv):
    """A body of one's own: the physics are taken without it."""

    limp = 0.0

    def step(self, action: Any) -> tuple:
        self.limp = 0.9 * self.limp + 0.1 * float(action[0])
        return super().step(action * np.float32(1.0 - abs(self.limp)))

    def snapshot(self) -> dict[str, Any]:
        return {"limp": self.limp}

    def restore(self, data: dict[str, Any]) -> None:
        self.limp = data["limp"]


@pytest.mark.parametrize("build", [Walk, lambda: Growing(Walk()), lambda: wrappers.TimeLimit(Lame(), LIMIT)])
def test_a_class_of_ones_own_says_itself_what_it_keeps(build: Callable[[], gym.Env]) -> None:
    env = begun(build())
    story(env, num_steps=11)
    saved, other = taken(env), build()
    snapshot.restore(other, saved)
    assert story(other, num_steps=80) == story(env, num_steps=80)


def test_what_no_checkpoint_can_hold_is_named() -> None:
    assert snapshot.take(begun(Fickle())) is None
    assert (snapshot.obstacle(Walk()) or "").startswith(
        "test_snapshot:Walk: its snapshot() failed: AttributeError"
    )
    assert (
        snapshot.obstacle(begun(Fickle()))
        == "0.own.places is of type set, which is neither an array nor JSON"
    )


def test_a_forgetful_class_is_found_out_on_two_spare_environments() -> None:
    assert snapshot.mismatch(Walk(), Walk()) is None
    assert snapshot.mismatch(make("Reacher-v4"), make("Reacher-v4")) is None
    assert snapshot.mismatch(Forgetful(), Forgetful()) == "observation of step 1 after the snapshot"
    other = Wistful()
    other.num_episodes = 7
    assert snapshot.mismatch(Wistful(), other) == "observation of the reset after step 2 after the snapshot"
    with pytest.raises(UserError, match="Heavy keeps between steps is not known"):
        snapshot.mismatch(Heavy(), Heavy())


def test_a_restore_of_ones_own_that_fails_is_one_line() -> None:
    saved = taken(begun(Walk()))
    del saved.facts["layers"][0]["own"]["dict"]["count"]
    with pytest.raises(UserError, match=r"^Walk: its restore\(data\) failed: KeyError: 'count'$"):
        snapshot.restore(Walk(), saved)


# --- What does not fit ---


def _at(saved: Snapshot, *path: Any) -> Any:
    place: Any = saved.facts
    for step in path:
        place = place[step]
    return place


ROBOT = ("layers", 3)
DAMAGE: dict[str, Callable[[Snapshot], Any]] = {
    "3.physics.integration' is missing": lambda s: s.arrays.pop("3.physics.integration"),
    "3.physics.xpos is float64 [5, 2], not float64 [5, 3]": lambda s: s.arrays.update(
        {"3.physics.xpos": np.zeros((5, 2))}
    ),
    "3.physics.xpos is float32": lambda s: s.arrays.update({"3.physics.xpos": np.zeros((5, 3), np.float32)}),
    "it is of Walker2d-v5": lambda s: s.facts.update(env="Walker2d-v5"),
    "format 7": lambda s: s.facts.update(format=7),
    "'layers' is missing": lambda s: s.facts.pop("layers"),
    "it is of": lambda s: s.facts["layers"].pop(0),
    "'_elapsed_steps' is missing": lambda s: _at(s, "layers", 0, "state").pop("_elapsed_steps"),
    "TimeLimit cannot keep in _elapsed_steps": lambda s: _at(s, "layers", 0, "state").update(
        _elapsed_steps="many"
    ),
    "it was taken with MuJoCo 2.3.7": lambda s: _at(s, *ROBOT).update(mujoco="2.3.7"),
    "integration is not finite": lambda s: s.arrays["3.physics.integration"].fill(np.nan),
    "no generator os.system": lambda s: _at(s, *ROBOT, "state", "_np_random").update(generator="os.system"),
    "a space cannot draw": lambda s: _at(s, *ROBOT).update(spaces=[1, None]),
    "xpos is of another MuJoCo model": lambda s: (
        s.arrays.update({"3.physics.xpos": np.zeros((9, 3))}),
        s.facts["arrays"].update({"3.physics.xpos": ["float64", [9, 3]]}),
    ),
}


def test_damaged_facts_have_no_template() -> None:
    for facts in ({}, {"arrays": {"x": ["float64", "wide"]}}, {"arrays": {"x": ["os.system", [2]]}}):
        with pytest.raises(UserError, match="damaged"):
            snapshot.template(facts)


@pytest.mark.parametrize("fault", DAMAGE)
def test_a_snapshot_that_does_not_fit_is_one_line_and_does_no_harm(fault: str) -> None:
    env, other = begun(make("Hopper-v5")), begun(make("Hopper-v5"), seed=3)
    saved, before = taken(env), taken(other)
    DAMAGE[fault](saved)
    with pytest.raises(UserError) as caught:
        snapshot.restore(other, saved)
    assert fault in str(caught.value)
    assert str(caught.value).startswith("Hopper-v5: the state saved does not fit: ")
    assert "\n" not in str(caught.value)
    after = taken(other)
    assert exact(after.arrays) == exact(before.arrays)
    assert after.facts == before.facts


def _paths(tree: Any, path: tuple = ()) -> Iterator[tuple]:
    parts = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for name, part in parts:
        yield (*path, name)
        yield from _paths(part, (*path, name))


@pytest.mark.parametrize("id", ["MountainCar-v0", "InvertedPendulum-v5"])
def test_whatever_is_wrong_in_the_facts_no_other_error_comes_out(id: str) -> None:
    env, other = (HostEnv(wrappers.NormalizeObservation(make(id)), seed=1) for _ in range(2))
    blocks(env, (3,))
    saved = env.snapshot()
    assert saved is not None
    refused = 0
    for path in _paths(saved.facts):
        for junk in (None, -1, "x", [], {}, {"array": "x"}, {"tuple": [{}]}, {"int": "x"}):
            damaged = Snapshot(saved.arrays, copy.deepcopy(saved.facts))
            _at(damaged, *path[:-1])[path[-1]] = junk
            try:
                other.restore(damaged)
            except UserError as error:
                assert "\n" not in str(error)  # noqa: PT017
                refused += 1
    assert refused > 100


# --- The adapter ---


def blocks(env: HostEnv, sizes: tuple[int, ...] = (37, 50, 13)) -> list[Any]:
    """Under a policy that looks at the observation."""
    size = env.spec.action_size
    if env.spec.discrete:
        policy = lambda obs: np.eye(size, dtype=np.float32)[int(np.abs(1e3 * obs).sum()) % size]  # noqa: E731
    else:
        policy = lambda obs: np.sin(100.0 * obs[:1] + np.arange(size, dtype=np.float32))  # noqa: E731
    return [exact(tuple(env.collect(policy, count)[0])) for count in sizes]


@pytest.mark.parametrize("build", [Walk, *(lambda id=id: make(id) for id in ("CartPole-v1", "Hopper-v5"))])
@pytest.mark.parametrize("first", [0, 5, 100])
def test_a_restored_adapter_collects_the_same_blocks(build: Callable[[], gym.Env], first: int) -> None:
    env, other = HostEnv(build(), seed=1), HostEnv(build(), seed=1)
    blocks(env, (first,) if first else ())
    found = env.snapshot()
    assert found is not None
    saved = Snapshot(found.arrays, json.loads(json.dumps(found.facts, allow_nan=False)))
    wanted = blocks(env)
    blocks(other, (9,))
    other.restore(saved)
    assert blocks(other) == wanted
    assert (other.num_steps, other.num_episodes) == (env.num_steps, env.num_episodes)


def test_returns_and_lengths_of_a_running_episode_go_on() -> None:
    env, other = HostEnv(Walk(), seed=1), HostEnv(Walk(), seed=1)
    push = lambda obs: np.ones(1, np.float32)  # noqa: E731
    env.collect(push, 40)
    saved = env.snapshot()
    assert saved is not None
    other.restore(saved)
    assert other.collect(push, 60)[1] == env.collect(push, 60)[1] != []


def test_an_adapter_refuses_what_does_not_fit_and_goes_on() -> None:
    env = HostEnv(make("Pendulum-v1"), seed=1)
    blocks(env, (7,))
    found = env.snapshot()
    assert found is not None

    def damaged(change: Callable[[Snapshot], Any]) -> Snapshot:
        saved = Snapshot(dict(found.arrays), copy.deepcopy(found.facts))
        change(saved)
        return saved

    faults: dict[str, Callable[[Snapshot], Any]] = {
        "it is of seed 2, not 1": lambda s: s.facts["host"].update(seed=2),
        "its counters are damaged": lambda s: s.facts["host"].update(num_steps=-1),
        "damaged": lambda s: s.facts.pop("host"),
        "its observation is float32 [4]": lambda s: s.arrays.update(obs=np.zeros(4, np.float32)),
        "its observation is missing": lambda s: s.arrays.pop("obs"),
    }
    other, plain = (HostEnv(make("Pendulum-v1"), seed=1) for _ in range(2))
    for fault, change in faults.items():
        with pytest.raises(UserError, match="does not fit") as caught:
            other.restore(damaged(change))
        assert fault in str(caught.value)
    assert blocks(other) == blocks(plain)


def test_an_adapter_without_a_snapshot_says_why() -> None:
    env = HostEnv(Doubling(make("Pendulum-v1")), seed=0)
    blocks(env, (2,))
    assert env.snapshot() is None
    assert "Doubling" in (env.snapshot_obstacle or "")
    assert HostEnv(make("Pendulum-v1"), seed=0).snapshot_obstacle is None


# --- Values ---


def test_values_come_back_with_every_bit_and_type() -> None:
    value = {
        "numbers": (1.0, -0.0, float("inf"), 0.1, 2**100, -3, True, None, "text"),
        "scalars": [np.float32(0.1), np.int64(7), np.bool_(True)],
        "arrays": {"empty": np.zeros((0, 3)), "whole": np.arange(6, dtype=np.int8).reshape(2, 3).T},
    }
    arrays: dict[str, np.ndarray] = {}
    packed = json.loads(json.dumps(pack(value, "x", arrays), allow_nan=False))
    back = unpack(packed, arrays)
    assert repr(back) == repr(value)
    assert exact({"x": back["arrays"]}) == exact({"x": value["arrays"]})
    assert sorted(arrays) == ["x.arrays.empty", "x.arrays.whole", "x.scalars.0", "x.scalars.1", "x.scalars.2"]


@pytest.mark.parametrize("kind", BIT_GENERATORS)
def test_a_generator_draws_and_spawns_on(kind: str) -> None:
    rng = np.random.Generator(getattr(np.random, kind)(5))
    rng.spawn(2), rng.integers(9, dtype=np.uint32), rng.normal(size=3)
    arrays: dict[str, np.ndarray] = {}
    other = unpack(json.loads(json.dumps(pack(rng, "rng", arrays))), arrays)
    assert other.normal(size=9).tobytes() == rng.normal(size=9).tobytes()
    assert other.spawn(1)[0].random() == rng.spawn(1)[0].random()


@pytest.mark.parametrize(
    "value",
    [
        {1: 2},
        np.array(["text"]),
        np.zeros(1, np.longdouble),
        object(),
        1j,
        np.zeros(1, ">f8"),
        {"a.b": 0, "a": {}},
    ],
)
def test_a_value_that_would_not_come_back_the_same_is_refused(value: Any) -> None:
    if isinstance(value, dict) and "a" in value:  # two arrays of one name
        value = {"a.b": np.zeros(1), "a": {"b": np.zeros(1)}}
    with pytest.raises(NotPortableError):
        pack(value, "x", {})
