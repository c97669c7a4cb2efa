"""A run that is killed and resumed ends where one that was never stopped ends, to the bit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import gymnasium as gym
import numpy as np
import pytest
from environments import Counting, Probe

from mve import Learner, checkpoint, loop, seeds
from mve.envs.host import HostEnv

STEPS, INTERVAL = 300, 100
# Checkpoints in the middle of an episode, a last block that is not a whole one, and all parts of a learner.
SMALL = (
    *("agent.hidden=[16]", "agent.batch_size=16", "dynamics.hidden=[16]", "dynamics.batch_size=16"),
    *("train.learning_starts=60", "dynamics.learning_starts=60", "train.updates_per_step=0.5"),
    *("dynamics.initial_fits=10", "dynamics.fits_per_step=0.2", "evaluate.episodes=1"),
    *(f"train.checkpoint_interval={INTERVAL}", "evaluate.interval_steps=150", f"train.total_steps={STEPS}"),
)
SMALL_DHMBPO = (
    *("imagination.starts=16", "imagination.rounds_kept=2", "dynamics.interval_steps=50"),
    *("train.initial_updates=7", "agent.critic_updates=5", "dynamics.weight_decay_by_layer=[0.5,1]"),
)
WALL_CLOCK = {"time/time_elapsed", "time/fps"}


class Killed(BaseException):
    """As if by SIGKILL: nothing that catches errors catches it."""


@pytest.fixture
def kill_after(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Kill the process once so many checkpoints are written, in the middle of the block after."""

    def arrange(checkpoints: int) -> None:
        saves, collect = [0], HostEnv.collect
        save = loop.Loop.save

        def counted_save(self: Any) -> None:
            save(self)
            saves[0] += 1

        def collect_or_die(self: Any, policy: Any, num_steps: int) -> Any:
            if saves[0] < checkpoints:
                return collect(self, policy, num_steps)
            collect(self, policy, num_steps // 2)
            raise Killed

        monkeypatch.setattr(loop.Loop, "save", counted_save)
        monkeypatch.setattr(HostEnv, "collect", collect_or_die)

    yield arrange
    monkeypatch.undo()


def lines(folder: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if k not in WALL_CLOCK} for record in records]


def assert_the_same_run(straight: Learner, resumed: Learner) -> None:
    assert eqx.tree_equal(straight.progress, resumed.progress)
    evaluations = [(each.folder / "evaluations.csv").read_text() for each in (straight, resumed)]
    assert evaluations[0] == evaluations[1]
    assert lines(straight.folder) == lines(resumed.folder)


def straight_and_killed(
    make: Callable[[], Any],
    algo: str,
    settings: tuple[str, ...],
    folder: Path,
    kill_after: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> tuple[Learner, Learner]:
    def learner(name: str) -> Learner:
        return Learner(make(), algo, seed=3, run_dir=folder / name, settings=[*SMALL, *settings], quiet=True)

    straight = learner("straight").learn()
    kill_after(2)
    with pytest.raises(Killed):
        learner("killed").learn()
    monkeypatch.undo()
    env = make()
    resumed = Learner.load(folder / "killed", None if isinstance(env, str) else env, quiet=True)
    assert resumed.num_timesteps == 2 * INTERVAL
    return straight, resumed.learn(STEPS - resumed.num_timesteps)


@pytest.mark.parametrize("overlap", ["true", pytest.param("false", marks=pytest.mark.slow)])
def test_a_killed_run_resumes_within_its_episode_to_the_same_end(
    overlap: str, tmp_path: Path, kill_after: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = (f"train.overlap={overlap}",)
    both = straight_and_killed(lambda: "Pendulum-v1", "mve-sac", settings, tmp_path, kill_after, monkeypatch)
    assert_the_same_run(*both)
    checkpoints = both[0].folder / "checkpoints"
    assert checkpoint.steps(checkpoints) == [2 * INTERVAL, STEPS]
    best = Learner.load(both[0].folder, quiet=True, which="best")  # the only one saved where it was evaluated
    assert best.num_timesteps == STEPS
    facts = checkpoint.read_facts(checkpoints / f"step_{STEPS:012d}")
    assert facts["evaluation"] == best.run.judged
    rows = [row.split(",") for row in (both[0].folder / "evaluations.csv").read_text().splitlines()]
    assert facts["evaluation"]["mean_reward"] == pytest.approx(float(rows[-1][2]))


def test_a_run_that_goes_back_and_is_killed_at_once_has_one_history(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    Learner("Pendulum-v1", "sac", run_dir=folder, settings=SMALL, quiet=True).learn(200)
    kept = checkpoint.steps(folder / "checkpoints")
    earlier = Learner.load(folder, quiet=True, which=kept[-2])
    earlier.prepare()  # as far as a kill in the first block
    assert checkpoint.steps(folder / "checkpoints") == kept[:-1]
    assert lines(folder)[-1]["time/total_timesteps"] <= kept[-2]
    assert Learner.load(folder, quiet=True).num_timesteps == kept[-2]


@pytest.mark.slow
@pytest.mark.parametrize("task", ["HalfCheetah-v5", "Hopper-v5", "Ant-v5", "CartPole-v1"])
@pytest.mark.parametrize("algo", ["sac", "dhmbpo", "calibrated-sac", "retrace-sac"])
def test_every_kind_of_state_resumes_exactly(
    task: str, algo: str, tmp_path: Path, kill_after: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    small_buffer = SMALL_DHMBPO if algo == "dhmbpo" else ()
    algo = "mve-dqn" if task == "CartPole-v1" else algo
    settings = () if algo == "mve-dqn" else small_buffer
    assert_the_same_run(*straight_and_killed(lambda: task, algo, settings, tmp_path, kill_after, monkeypatch))


def probe() -> gym.Env:
    """Nothing says how to take its state, so that it cannot be taken."""
    return Probe(lambda s, a: s - a, num_steps=7)


def test_an_episode_that_cannot_be_saved_is_given_up_in_both_runs(
    tmp_path: Path, kill_after: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    straight, resumed = straight_and_killed(probe, "sac", (), tmp_path, kill_after, monkeypatch)
    assert_the_same_run(straight, resumed)
    episode = np.asarray(straight.state.replay.rows.episode)
    obs = np.asarray(straight.state.replay.rows.obs)[:, 0]
    assert obs[INTERVAL] == 0  # a checkpoint in the middle of an episode of seven: the next one begins
    assert episode[INTERVAL] == episode[INTERVAL - 1] + 1
    assert obs[INTERVAL - 1] != 6


def test_giving_up_is_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Learner(probe(), "sac", run_dir=tmp_path / "run", settings=SMALL).learn()
    said = [line for line in capsys.readouterr().err.splitlines() if "begun anew" in line]
    assert len(said) == 1
    assert "Probe" in said[0]
    assert f"train.checkpoint_interval = {INTERVAL} steps" in said[0]


def test_seeds_side_by_side_resume_exactly(
    tmp_path: Path, kill_after: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def make(name: str) -> list[Learner]:
        given = {"settings": SMALL, "quiet": True, "run_dir": tmp_path / name}
        return seeds.create("Pendulum-v1", "sac", seeds=[0, 1], **given)

    straight = seeds.learn_together(make("straight"))
    kill_after(2)
    with pytest.raises(Killed):
        seeds.learn_together(make("killed"))
    monkeypatch.undo()
    # Killed between the renames of a save: one seed is a checkpoint ahead.
    shutil.rmtree(tmp_path / "killed" / "seed-1" / "checkpoints" / f"step_{2 * INTERVAL:012d}")
    with pytest.warns(UserWarning, match=r"seed-0 goes back from step 200 to 100"):
        learners = seeds.load(tmp_path / "killed", quiet=True)
    resumed = seeds.learn_together(learners, STEPS - INTERVAL)
    for one, other in zip(straight, resumed, strict=True):
        assert_the_same_run(one, other)


def test_an_abandoned_episode_counts_and_the_next_begins() -> None:
    env = HostEnv(Counting(), seed=0)
    env.collect(lambda obs: np.zeros(1, np.float32), 1)
    assert env.next_episode == 1
    env.abandon()
    assert env.next_episode == env.num_episodes == 1
    block, _ = env.collect(lambda obs: np.zeros(1, np.float32), 1)
    np.testing.assert_array_equal(block.obs[0, 0], 0)
    assert int(block.episode[0]) == 1
