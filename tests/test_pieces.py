"""Learning in pieces: together they are the whole, and a run that is stopped between two loses nothing."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path

import equinox as eqx
import jax
import numpy as np
import pytest
from test_learner import SMALL, Slide
from test_resume import assert_the_same_run

from mve import Learner, checkpoint, seeds, train
from mve.cli import main
from mve.display import Display
from mve.state import Unfinished, initial_state
from mve.train import Due
from mve.types import Transition, UserError

BLOCK, STEPS, NEVER = 20, 140, -1
ROLLOUTS = (
    *("imagination.starts=8", "imagination.rounds_kept=2", "dynamics.elites=0"),
    "dynamics.weight_decay_by_layer=[1,1]",
)
# Learning begins with the block of steps 60 to 80, and with 45 updates: 10, 10, 10 and 15.
SETTINGS = (
    *SMALL,
    *(f"train.block_steps={BLOCK}", f"train.total_steps={STEPS}", "train.initial_updates=25"),
    *("evaluate.interval_steps=1000", "train.checkpoint_interval=1000"),
)


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "PIECE", 10)
    monkeypatch.setattr(train, "LAST_PIECE", 20)


@pytest.fixture
def stop_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Have this process sent SIGTERM once so many updates of a block are done."""
    shown = Display.learning

    def arrange(wanted: int) -> None:
        def learning(self: Display, done: int, updates: int) -> None:
            shown(self, done, updates)
            if done == wanted:
                signal.raise_signal(signal.SIGTERM)

        monkeypatch.setattr(Display, "learning", learning)

    return arrange


def learner(folder: Path, *settings: str, algo: str = "mve-sac") -> Learner:
    return Learner(Slide(), algo, run_dir=folder, settings=[*SETTINGS, *settings], quiet=True)


def test_much_is_cut_and_the_rest_is_one_piece() -> None:
    due, sizes, fits = Due.of(rows=20, fits=7, refits=1, rounds=2, updates=45, updated=3), [], []
    while sum(sizes) < 45:
        piece = due.piece(sum(sizes))
        assert (piece.done, piece.updated, piece.rows) == (sum(sizes), 3, 20)
        sizes.append(int(piece.updates))
        fits.append((int(piece.fits), int(piece.refits), int(piece.rounds)))
    assert sizes == [10, 10, 10, 15]
    assert fits == [(7, 1, 2), (0, 0, 0), (0, 0, 0), (0, 0, 0)]
    assert Due.of(rows=20, updates=20).piece(0) == Due.of(rows=20, updates=20)


@pytest.mark.parametrize(
    ("algo", "settings"),
    [
        ("mve-sac", ()),
        ("dhmbpo", (*ROLLOUTS, "imagination.interval_updates=5", "agent.critic_updates=5")),
        pytest.param("mbpo", (*ROLLOUTS, "imagination.length=[2,2]"), marks=pytest.mark.slow),
        pytest.param("calibrated-sac", (), marks=pytest.mark.slow),
    ],
)
def test_pieces_together_are_the_whole(tmp_path: Path, algo: str, settings: tuple[str, ...]) -> None:
    """To the bit, blocks with and without rows to read; a number of fits and the means are the first's."""
    run = learner(tmp_path / "run", *settings, algo=algo)
    rng = np.random.default_rng(0)
    rows = run.state.replay.rows
    block: Transition = jax.tree.map(lambda x: rng.random((BLOCK, *x.shape[1:])).astype(x.dtype), rows)
    nothing = jax.tree.map(np.zeros_like, block)

    def begun() -> tuple:
        state = initial_state(run.recipe, run.run.capacity(), 0)
        for _ in range(4):
            state, _ = train.learn(state, block, Due.of(rows=BLOCK, fits=3), run.recipe)
        return state, Due.of(rows=BLOCK, fits=3, refits=1, rounds=1, updates=45, updated=0)

    state, due = begun()
    whole, said = train.learn(state, block, due, run.recipe)
    traced = train.traces[run.recipe]
    state, due = begun()
    for done in (0, 10, 20, 30):
        state, metrics = train.learn(state, nothing if done else block, due.piece(done), run.recipe)
        if "model/mse_k1" in said:
            same = metrics["model/mse_k1"] == said["model/mse_k1"]
            assert same if done == 0 else np.isnan(metrics["model/mse_k1"])
    assert eqx.tree_equal(whole, state)
    assert int(state.num_env_steps) == 5 * BLOCK
    assert train.traces[run.recipe] == traced


@pytest.mark.parametrize(
    ("algo", "settings"),
    [
        ("mve-sac", ()),  # nothing else is due there
        ("mve-sac", ("evaluate.interval_steps=40",)),  # an evaluation and a record
        ("mve-sac", ("train.overlap=false", "evaluate.interval_steps=100")),  # a record
        ("mve-sac", ("train.total_steps=80",)),  # the end
        pytest.param("retrace-sac", ("train.checkpoint_interval=40",), marks=pytest.mark.slow),
    ],
)
def test_a_run_that_is_stopped_between_two_pieces_goes_on_to_the_same_end(
    tmp_path: Path, stop_at: Callable[[int], None], algo: str, settings: tuple[str, ...]
) -> None:
    straight = learner(tmp_path / "straight", *settings, algo=algo).learn()
    stop_at(20)
    stopped = learner(tmp_path / "stopped", *settings, algo=algo)
    with pytest.raises(SystemExit):
        stopped.learn()
    assert stopped.num_timesteps == 80
    assert int(stopped.state.agent.num_updates) == 20
    assert stopped.progress.unfinished == Unfinished(before=60, done=20)
    assert stopped.run.metrics["train/n_updates"] == 20
    loaded = Learner.load(tmp_path / "stopped", Slide(), quiet=True)
    assert eqx.tree_equal(loaded.progress, stopped.progress)
    stop_at(30)  # and once more
    with pytest.raises(SystemExit):
        loaded.learn(loaded.config.train.total_steps - 80)
    assert loaded.progress.unfinished == Unfinished(before=60, done=30)
    stop_at(NEVER)
    resumed = Learner.load(tmp_path / "stopped", Slide(), quiet=True)
    resumed.learn(resumed.config.train.total_steps - 80)
    assert_the_same_run(straight, resumed)
    assert resumed.progress.unfinished is None


def test_the_learner_itself_goes_on_after_a_signal(tmp_path: Path, stop_at: Callable[[int], None]) -> None:
    straight = learner(tmp_path / "straight").learn()
    stop_at(10)
    run = learner(tmp_path / "run")
    with pytest.raises(SystemExit):
        run.learn()
    run.learn(STEPS - 80)
    assert_the_same_run(straight, run)


def test_seeds_are_stopped_together_and_go_on_together(
    tmp_path: Path, stop_at: Callable[[int], None]
) -> None:
    def together(name: str) -> list[Learner]:
        given = {"run_dir": tmp_path / name, "settings": SETTINGS, "quiet": True}
        return seeds.create(Slide(), "mve-sac", seeds=[0, 1], **given)

    straight = seeds.learn_together(together("straight"))
    stop_at(20)
    with pytest.raises(SystemExit):
        seeds.learn_together(together("stopped"))
    stop_at(NEVER)
    resumed = seeds.load(tmp_path / "stopped", Slide(), quiet=True)
    assert {each.progress.unfinished for each in resumed} == {Unfinished(60, 20)}
    for one, other in zip(straight, seeds.learn_together(resumed, STEPS - 80), strict=True):
        assert_the_same_run(one, other)
    apart = seeds.load(tmp_path / "stopped", Slide(), quiet=True)
    apart[0].progress = apart[0].progress._replace(unfinished=Unfinished(120, 20))
    with pytest.raises(UserError, match=r"seed-0 at 140 and 20 updates, seed-1 at 140\)"):
        seeds.learn_together(apart, 20)


def test_resume_finishes_a_run_that_was_stopped_after_its_last_step(
    tmp_path: Path,
    stop_at: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    small = [f"--set={setting}" for setting in (*SETTINGS, "train.total_steps=80")]
    stop_at(10)
    with pytest.raises(SystemExit):
        main(["train", "Pendulum-v1", "--algo=mve-sac", *small, f"--run-dir={tmp_path / 'run'}", "--quiet"])
    stop_at(NEVER)
    [newest] = (tmp_path / "run" / "checkpoints").glob("step_*")
    assert checkpoint.read_facts(newest)["unfinished"] == {"before": 60, "done": 10}
    assert "go on from the newest checkpoint" in capsys.readouterr().err
    monkeypatch.setenv("FORCE_COLOR", "1")  # a terminal, whose live line shows learning before any step
    assert main(["resume", str(tmp_path / "run")]) == 0
    monkeypatch.delenv("FORCE_COLOR")
    assert "evaluation" in capsys.readouterr().out
    records = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    said = [json.loads(each) for each in records]
    assert [(each["time/total_timesteps"], each["train/n_updates"]) for each in said] == [(80, 45)]
    assert main(["resume", str(tmp_path / "run"), "--quiet"]) == 2


def test_who_waits_sees_how_far_learning_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [100.0]
    monkeypatch.setattr("mve.display.time.monotonic", lambda: now[0])
    shown = Display(1000)
    shown.progress(80, {})
    for done in (100, 200, 300, 400, 500):
        shown.learning(done, 1000)
        now[0] += 20.0
    told = capsys.readouterr().err.splitlines()
    assert told == [
        "learning: 300 of 1,000 updates, 2 min 20 s more",
        "learning: 500 of 1,000 updates, 1 min 40 s more",
    ]
    shown.progress(100, {})  # and another burst has a clock of its own
    shown.learning(100, 1000)
    assert capsys.readouterr().err == ""
