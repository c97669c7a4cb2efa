"""Many seeds in one program: each gets what it would have had alone."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import numpy as np
import pytest
from test_learner import SMALL, Slide
from test_traces import BLOCK, block, recipe

import mve
from mve import Learner, log, seeds, train
from mve.cli import main
from mve.program import Together
from mve.run import Run
from mve.state import Capacity, initial_state
from mve.train import Due
from mve.types import UserError

LOOPED = [*SMALL, "train.learning_starts=40", "dynamics.learning_starts=40", "train.total_steps=120"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> list[Learner]:
    folder = tmp_path_factory.mktemp("seeds") / "run"
    return mve.train_seeds(Slide(), "mve-sac", seeds=[0, 3], run_dir=folder, settings=LOOPED, quiet=True)


def same(left: Any, right: Any, **tolerance: float) -> None:
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        if not jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key):
            np.testing.assert_allclose(a, b, **tolerance)


@pytest.mark.slow
def test_a_call_for_all_seeds_is_each_ones_own_call_to_rounding() -> None:
    """A batched matrix product may sum in another order; nothing else differs."""
    states = [initial_state(recipe(), Capacity(100), seed) for seed in (0, 1)]
    alone = [initial_state(recipe(), Capacity(100), seed) for seed in (0, 1)]
    together = Together(recipe(), 2)
    stacked = together.joined(states)
    for i, (fits, updates) in enumerate([(0, 0), (3, 2)]):
        due = Due.of(rows=BLOCK, fits=fits, updates=updates)
        blocks = [block(2 * i), block(2 * i + 1)]
        stacked, metrics = together.learn(stacked, together.gathered(blocks), due)
        said = together.numbers(metrics)
        for seed in (0, 1):
            alone[seed], mine = train.learn(alone[seed], blocks[seed], due, recipe())
            assert set(said[seed]) == set(mine)
            for name, number in mine.items():
                np.testing.assert_allclose(said[seed][name], number, rtol=1e-4, atol=1e-5)
    for seed in (0, 1):
        same(together.part(stacked, seed), alone[seed], rtol=1e-4, atol=1e-5)
    explorers = together.explorers(stacked, 2 * BLOCK)
    same(explorers[1], train.exploration_policy(alone[1], np.int32(2 * BLOCK)), rtol=1e-4, atol=1e-5)


def test_every_seed_acts_as_it_would_alone(trained: list[Learner], tmp_path: Path) -> None:
    """The same episodes and exploration noise, exactly: all rows agree while nothing is learned."""
    frozen = {"settings": [*LOOPED, "train.updates_per_step=0", "train.warmup=policy"], "quiet": True}
    pair = mve.train_seeds(Slide(), "mve-sac", seeds=[0, 3], run_dir=tmp_path / "pair", **frozen)
    alone = Learner(Slide(), "mve-sac", seed=3, run_dir=tmp_path / "run", **frozen).learn()
    jax.tree.map(np.testing.assert_array_equal, pair[1].state.replay.rows, alone.state.replay.rows)
    assert not eqx.tree_equal(trained[0].state.agent, trained[1].state.agent)


def test_every_seed_leaves_the_folder_of_a_single_run(trained: list[Learner]) -> None:
    run = trained[0].folder.parent
    assert sorted(p.name for p in run.iterdir()) == ["curve.png", "seed-0", "seed-3"]
    for learner, seed in zip(trained, (0, 3), strict=True):
        names = {"config.json", "versions.json", "metrics.jsonl", "evaluations.csv", "curve.png"}
        assert {p.name for p in learner.folder.iterdir()} == {*names, "checkpoints"}
        assert json.loads((learner.folder / "config.json").read_text())["seed"] == seed
        assert set(log.read_evaluations(learner.folder)["step"]) == {100, 120}
        assert learner.num_timesteps == 120
        loaded = Learner.load(learner.folder, Slide(), quiet=True)
        assert eqx.tree_equal(loaded.progress, learner.progress)


@pytest.mark.slow
def test_all_go_on_together_or_one_alone(trained: list[Learner], tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained[0].folder.parent, run)
    resumed = mve.resume_seeds(run, 40, env=Slide(), quiet=True)
    assert [learner.num_timesteps for learner in resumed] == [160, 160]
    assert Learner.load(run / "seed-3", Slide(), quiet=True).learn(20).num_timesteps == 180
    with pytest.raises(UserError, match=r"stand at different steps .*seed-3 at 180"):
        mve.resume_seeds(run, 40, env=Slide(), quiet=True)
    with pytest.raises(UserError, match="already holds"):
        seeds.create(Slide(), seeds=[3, 4], run_dir=run, settings=LOOPED)


def test_the_same_seeds_repeat_bit_for_bit_and_are_compiled_once(
    trained: list[Learner], tmp_path: Path
) -> None:
    before = train.traces[trained[0].recipe]
    again = mve.train_seeds(
        Slide(), "mve-sac", seeds=[0, 3], run_dir=tmp_path / "run", settings=LOOPED, quiet=True
    )
    assert train.traces[trained[0].recipe] == before
    for one, other in zip(trained, again, strict=True):
        assert eqx.tree_equal(one.progress, other.progress)


@pytest.mark.slow
def test_learning_that_is_compiled_again_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Learner(Slide(), "mve-sac", run_dir=tmp_path / "run", settings=LOOPED, quiet=True)
    collect = Run.collect

    def longer(self: Run, policy: Any, step: int, count: int) -> Any:
        whole = collect(self, policy, step, count)
        return whole if step < 40 else jax.tree.map(lambda x: np.concatenate([x, x[:1]]), whole)

    monkeypatch.setattr(Run, "collect", longer)
    with pytest.raises(RuntimeWarning, match="compiled again"):
        run.learn()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("--seeds 5..2", "write 0..7 or 0,3,5"),
        ("--seeds all", "write 0..7 or 0,3,5"),
        ("--seeds 0..5000", "1000 at most"),
        ("--seeds 1,1", "twice"),
        ("--seed 1 --seeds 0..2", "exclude each other"),
    ],
)
def test_a_bad_list_of_seeds_is_one_clear_line(
    argv: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "Pendulum-v1", *argv.split()]) == 2
    err = capsys.readouterr().err
    assert words in err
    assert err.count("\n") == 1


def test_the_default_folder_names_the_seeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for chosen, name in (([0, 1, 2], "seeds-0-2"), ([0, 3], "seeds-0+3")):
        made = seeds.create(Slide(), "sac", seeds=chosen, settings=LOOPED)
        assert made[0].folder == Path("runs") / "Slide" / "sac" / name / "seed-0"
    assert list(tmp_path.iterdir()) == []


ON_DEVICES = """
import sys, warnings
import numpy as np, jax
sys.path.insert(0, {tests!r})
from test_learner import Slide
from test_seeds import LOOPED
import mve
made = mve.train_seeds(Slide(), "mve-sac", seeds=[0, 3], run_dir={folder!r}, settings=LOOPED)
used = made[0].state.replay.rows.obs.sharding.device_set
print(len(jax.devices()), len(used))
"""


def test_two_devices_give_what_one_gives(trained: list[Learner], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    code = ON_DEVICES.format(tests=str(Path(__file__).parent), folder=str(folder))
    both = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"
    flags = {"XLA_FLAGS": both, "JAX_PLATFORMS": "cpu"}
    flags["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, env={**os.environ, **flags}
    )
    assert done.stdout.split() == ["2", "1"], done.stderr  # what is handed back lies on one
    assert "2 seeds on 2 of 2 devices" in done.stderr
    for learner in trained:
        loaded = Learner.load(folder / learner.folder.name, Slide(), quiet=True)
        same(loaded.state.agent, learner.state.agent, rtol=1e-3, atol=1e-3)


def test_seeds_that_had_not_all_begun_are_not_taken_for_all(tmp_path: Path) -> None:
    """As a kill within the first milliseconds of a run may leave them."""
    (tmp_path / "seed-0").mkdir()
    (tmp_path / "seed-0" / "config.json").write_text("{}")
    (tmp_path / "seed-1").mkdir()
    (tmp_path / "seed-0-2").mkdir()  # a second run of seed 0, and a copy: no seeds of this folder
    (tmp_path / "seed-3.bak").mkdir()
    with pytest.raises(UserError, match="stopped before seed-1 had begun; remove seed-1 to go on without"):
        seeds.load(tmp_path)
