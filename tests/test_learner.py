"""The Python interface, on an id and on an environment of one's own; the run folder that it leaves."""

from __future__ import annotations

import csv
import json
import os
import threading
from pathlib import Path
from typing import Any

import equinox as eqx
import gymnasium as gym
import jax.numpy as jnp
import numpy as np
import pytest
from gymnasium.spaces import Box, Discrete
from gymnasium.wrappers import NormalizeObservation

import mve
from mve import Learner, log
from mve.envs import host
from mve.envs.base import EnvConfig
from mve.types import UserError

SMALL = (
    "agent.hidden=[16]",
    "agent.batch_size=16",
    "dynamics.hidden=[16]",
    "dynamics.members=2",
    "dynamics.batch_size=16",
    "dynamics.initial_fits=10",
    "dynamics.learning_starts=60",
    "train.learning_starts=60",
    "train.updates_per_step=1",
    "evaluate.episodes=2",
    "evaluate.interval_steps=100",
)
SAC = [setting for setting in SMALL if not setting.startswith("dynamics.")]


class Slide(gym.Env):
    """A point that is pushed along a line; its own task, known to nobody, with odd action limits."""

    observation_space = Box(-np.inf, np.inf, (2,), np.float64)
    action_space = Box(np.array([-1.0]), np.array([3.0]), dtype=np.float64)

    def __init__(self) -> None:
        self.state = np.zeros(2)
        self.steps = 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.state, self.steps = self.np_random.normal(size=2), 0
        return self.state.copy(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        assert self.action_space.contains(action)
        self.state = 0.9 * self.state + 0.1 * float(action[0])
        self.steps += 1
        return self.state.copy(), -float(np.abs(self.state).sum()), False, self.steps == 25, {}

    def snapshot(self) -> dict[str, Any]:
        return {"state": self.state, "steps": self.steps}

    def restore(self, data: dict[str, Any]) -> None:
        self.state, self.steps = data["state"], data["steps"]


@pytest.fixture(scope="module")
def learner(tmp_path_factory: pytest.TempPathFactory) -> Learner:
    folder = tmp_path_factory.mktemp("slide") / "run"
    return Learner(Slide(), "mve-sac", run_dir=folder, settings=SMALL, quiet=True).learn(220)


def test_who_waits_is_told_once_that_learning_begins_with_much(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [*SAC, "train.initial_updates=600"]
    Learner(Slide(), "sac", run_dir=tmp_path / "run", settings=settings).learn(120)
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("learning begins")]
    assert told == ["learning begins: 620 updates of the agent before the next step, which can take minutes"]


def test_learning_on_an_instance_counts_real_steps_exactly(learner: Learner) -> None:
    assert learner.num_timesteps == 220


def test_predict_answers_in_the_environments_own_units(learner: Learner) -> None:
    action, state = learner.predict(np.zeros(2), deterministic=True)
    assert state is None
    assert action.shape == (1,)
    assert learner.run.action_space.contains(action)
    batch, _ = learner.predict(np.zeros((5, 2)))
    np.testing.assert_allclose(batch, np.repeat(action[None], 5, 0), atol=1e-6)


def test_predict_explores_when_it_is_asked_to(learner: Learner) -> None:
    draws = [learner.predict(np.zeros(2), deterministic=False)[0].item() for _ in range(5)]
    assert len(set(draws)) > 1


def test_predict_refuses_an_observation_of_another_size(learner: Learner) -> None:
    with pytest.raises(UserError, match=r"shape \(3,\)"):
        learner.predict(np.zeros(3))


def test_the_run_folder_holds_everything_that_was_promised(learner: Learner) -> None:
    names = {p.name for p in learner.folder.iterdir()}
    assert names >= {
        "config.json", "versions.json", "metrics.jsonl", "evaluations.csv", "curve.png", "checkpoints"
    }  # fmt: skip
    records = [json.loads(line) for line in (learner.folder / "metrics.jsonl").read_text().splitlines()]
    seen = set().union(*records)
    assert seen >= {
        "time/total_timesteps", "time/time_elapsed", "time/fps", "rollout/ep_rew_mean", "rollout/ep_len_mean",
        "eval/mean_reward", "eval/mean_ep_length", "train/actor_loss", "train/critic_loss", "train/ent_coef",
        "train/n_updates", "model/loss", "model/mse_k1", "model/mse_k3", "model/mse_k5", "mve/horizon",
    }  # fmt: skip
    with (learner.folder / "evaluations.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["step", "episode", "return", "length"]
    assert [(int(r["step"]), int(r["episode"])) for r in rows] == [
        (step, episode) for step in (100, 200, 220) for episode in (0, 1)
    ]
    assert all(int(r["length"]) == 25 for r in rows)


def test_an_evaluation_depends_on_policy_seed_and_step_only(learner: Learner) -> None:
    first, second = learner.evaluate(3), learner.evaluate(3)
    np.testing.assert_array_equal(first.returns, second.returns)


def test_the_same_seed_gives_the_same_run_and_another_seed_another(learner: Learner, tmp_path: Path) -> None:
    again = Learner(Slide(), "mve-sac", run_dir=tmp_path / "a", settings=SMALL, quiet=True).learn(220)
    assert eqx.tree_equal(learner.state.agent, again.state.agent)
    other = Learner(Slide(), "mve-sac", run_dir=tmp_path / "b", settings=SMALL, quiet=True, seed=1).learn(220)
    assert not eqx.tree_equal(learner.state.agent, other.state.agent)


def test_a_loaded_learner_predicts_the_same_and_learns_on(learner: Learner, tmp_path: Path) -> None:
    learner.save(tmp_path / "saved")
    loaded = Learner.load(tmp_path / "saved", Slide(), quiet=True)
    assert eqx.tree_equal(learner.state, loaded.state)
    obs = np.array([0.3, -0.2])
    np.testing.assert_array_equal(learner.predict(obs)[0], loaded.predict(obs)[0])
    assert loaded.learn(50).num_timesteps == 270


def test_loading_an_instances_run_without_the_instance_says_so(learner: Learner) -> None:
    with pytest.raises(UserError, match="environment instance"):
        Learner.load(learner.folder)


def test_a_folder_that_holds_a_run_is_not_written_over(learner: Learner) -> None:
    with pytest.raises(UserError, match="already holds a run"):
        Learner(Slide(), "mve-sac", run_dir=learner.folder, settings=SMALL, quiet=True).learn(220)


def test_a_learner_writes_nothing_before_it_learns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Learner("Pendulum-v1", "mve-sac", settings=SMALL)
    assert os.listdir(tmp_path) == []


def test_mujoco_leaves_nothing_outside_the_run_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    learner = Learner("InvertedPendulum-v5", "mve-sac", settings=SMALL, run_dir=tmp_path / "run", quiet=True)
    learner.learn(80)
    assert os.listdir(tmp_path) == ["run"]
    assert "deprecated" not in capfd.readouterr().err


def test_an_evaluation_leaves_nothing_in_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Learner("HalfCheetah-v5", "mve-sac", settings=SMALL, quiet=True).evaluate(
        1
    )  # its model makes MuJoCo warn
    assert os.listdir(tmp_path) == []
    assert "deprecated" not in capfd.readouterr().err


def test_an_evaluation_environment_that_is_given_is_used() -> None:
    given = gym.make("Pendulum-v1", g=5.0)
    learner = Learner("Pendulum-v1", "mve-sac", settings=SMALL, eval_env=given)
    assert learner.run.evaluation_envs.another().unwrapped.g == 5.0  # pyright: ignore


def test_so_it_does_where_the_environment_is_made_by_id(tmp_path: Path) -> None:
    gym.register("Gathering-v0", entry_point=lambda: NormalizeObservation(Slide()))  # type: ignore
    try:
        run = Learner("Gathering-v0", "sac", settings=SAC, run_dir=tmp_path / "run", quiet=True).learn(220)
        again = Learner.load(tmp_path / "run", quiet=True)
        first, recorded = run.evaluate(), log.read_evaluations(run.folder)["return"]
        np.testing.assert_array_equal(first.returns, again.evaluate().returns)
        np.testing.assert_array_equal(first.returns, run.evaluate().returns)
        np.testing.assert_allclose(first.returns, recorded[-2:], rtol=1e-6)
    finally:
        gym.registry.pop("Gathering-v0")


def test_wrappers_that_gather_are_neither_made_anew_nor_evaluated_in_another_process(tmp_path: Path) -> None:
    gym.register("Gathering-v0", entry_point=lambda: NormalizeObservation(Held()))  # type: ignore
    try:
        run = Learner("Gathering-v0", "sac", settings=SAC, run_dir=tmp_path / "run", quiet=True)
        with pytest.raises(UserError, match="give another as eval_env"):
            run.learn(120)
        assert run.num_timesteps == 0
        apart = Learner("Gathering-v0", "sac", settings=[*SAC, "env.own_process=true"], quiet=True)
        with pytest.raises(UserError, match="NormalizeObservation, whose statistics evaluation in another"):
            apart.learn(120)
    finally:
        gym.registry.pop("Gathering-v0")


def test_evaluation_copies_the_environment_that_a_restart_has_made() -> None:
    made = [NormalizeObservation(Slide()), NormalizeObservation(Slide())]
    run = Learner(made[0], "sac", settings=SAC, quiet=True).run
    run.env._stepped.env = made[1]  # type: ignore
    made[1].obs_rms.count = 77.0
    assert run.evaluation_envs.another().obs_rms.count == 77.0  # type: ignore


def test_many_episodes_are_played_in_lots_of_those_that_training_plays() -> None:
    run = Learner("Pendulum-v1", "sac", settings=SAC, quiet=True)
    assert len(run.evaluate(5).returns) == 5
    assert len(run.run.evaluation_envs._held) == 2
    np.testing.assert_array_equal(run.evaluate(5).returns[:2], run.evaluate().returns)


def test_an_evaluation_environment_in_which_others_act_is_refused() -> None:
    scaled = gym.wrappers.RescaleAction(gym.make("Pendulum-v1"), -1, 1)
    with pytest.raises(UserError, match=r"eval_env Pendulum-v1 has actions .* wrap them alike"):
        Learner("Pendulum-v1", "sac", eval_env=scaled)
    with pytest.raises(UserError, match=r"shows observations of shape \(4,\), training \(3,\)"):
        Learner("Pendulum-v1", "sac", eval_env=gym.wrappers.TimeAwareObservation(gym.make("Pendulum-v1")))
    with pytest.raises(UserError, match="is evaluated on the device"):
        Learner("jax/Pendulum-v1", "sac", eval_env=gym.make("Pendulum-v1"))


@pytest.mark.parametrize("steps", [120.0, np.int64(120), np.float32(120)])
def test_budgets_and_seeds_are_whole_numbers_of_any_library(steps: Any, tmp_path: Path) -> None:
    run = Learner(Slide(), "sac", seed=np.int64(3), settings=SAC, run_dir=tmp_path / "run", quiet=True)
    run.set_budget(steps)
    run.save(tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["train"]["total_steps"], config["seed"]) == (120, 3)
    assert Learner.load(tmp_path / "run", Slide(), quiet=True, which=0).config == run.config


@pytest.mark.parametrize("steps", [0, -5, 1.5, float("nan")])
def test_what_is_no_budget_is_refused(steps: Any, tmp_path: Path) -> None:
    run = Learner(Slide(), "sac", settings=SAC, run_dir=tmp_path / "run", quiet=True)
    with pytest.raises(UserError, match="total_timesteps"):
        run.learn(steps)
    assert not (tmp_path / "run").exists()


class Held(Slide):
    """One that no copy can be made of."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()


def test_what_cannot_be_copied_trains_beside_an_environment_for_evaluation(tmp_path: Path) -> None:
    alone = Learner(Held(), "sac", settings=SAC, run_dir=tmp_path / "alone", quiet=True)
    with pytest.raises(UserError, match=r"cannot be copied for evaluation: .*lock") as caught:
        alone.learn(120)
    assert "\n" not in str(caught.value)
    assert alone.num_timesteps == 0
    judge = Held()
    run = Learner(Held(), "sac", settings=SAC, run_dir=tmp_path / "run", eval_env=judge, quiet=True)
    assert len(run.learn(120).evaluate().returns) == 2
    assert judge.steps == 25
    copied = Learner(env := Slide(), "sac", settings=SAC, run_dir=tmp_path / "same", eval_env=env, quiet=True)
    assert copied.run.evaluation_envs.another() is not env  # one that is trained in is not evaluated in


def test_an_environment_given_to_a_run_begun_by_id_is_used_throughout(tmp_path: Path) -> None:
    Learner("Pendulum-v1", "sac", settings=SAC, run_dir=tmp_path / "run", quiet=True).save(tmp_path / "run")
    learner = Learner.load(tmp_path / "run", given := gym.make("Pendulum-v1", g=5.0), quiet=True)
    assert learner.run.instance is given
    assert learner.run.evaluation_envs.another().unwrapped.g == 5.0  # pyright: ignore


def test_a_folder_that_has_gone_further_is_not_set_back_by_saving_into_it(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run = Learner(Slide(), "sac", settings=SAC, run_dir=folder, quiet=True).learn(120)
    earlier = Learner.load(folder, Slide(), quiet=True)
    run.learn(100)
    for stale in (earlier, Learner.load(folder, Slide(), quiet=True, which=0)):
        with pytest.raises(UserError, match="stands at step 220, this run at"):
            stale.save(folder)
    earlier.save(tmp_path / "copy")
    with pytest.raises(UserError, match="has gone on since it was loaded"):
        earlier.learn(100)
    assert Learner.load(folder, Slide(), quiet=True).num_timesteps == 220


class Whole(Slide):
    """Its action is one of four whole numbers."""

    action_space = Box(0, 3, (1,), np.int32)


def test_whole_actions_are_taken_alike_often(tmp_path: Path) -> None:
    space = Whole.action_space
    share = np.linspace(-1.0, 1.0, 4001, dtype=np.float32)[:, None]
    taken = host.native_action(space, share)
    assert taken.dtype == np.int32
    np.testing.assert_allclose(np.bincount(taken[:, 0]) / len(share), 0.25, atol=1e-3)
    np.testing.assert_array_equal(host.native_on_device(space)(jnp.asarray(share)), taken)
    Learner(Whole(), "sac", settings=SAC, run_dir=tmp_path / "run", quiet=True).learn(100)


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("Hopper-v5", {"xml_file": "nope.xml"}),
        ("Pendulum-v1", {"max_episode_steps": 0}),
        ("Hopper-v5", {"frame_skip": 0}),
        (":Pendulum-v1", {}),
        ("a:b:c", {}),
        ("jax/Pendulum-v1", {"g": 1}),
        ("jax/Pendulum-v1", {"max_episode_steps": 0}),
    ],
)
def test_an_environment_that_cannot_be_made_is_one_line(name: str, kwargs: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"'{name}'|jax/Pendulum-v1") as caught:
        host.make(EnvConfig(id=name, kwargs=kwargs))
    assert "\n" not in str(caught.value)


def test_an_evaluation_sees_what_wrappers_have_gathered_in_training(tmp_path: Path) -> None:
    """Whenever it is, and in whatever process: not what copies have gathered since their first evaluation."""
    run = Learner(NormalizeObservation(Slide()), "sac", settings=SAC, run_dir=tmp_path / "run", quiet=True)
    run.learn(120)
    again = Learner.load(tmp_path / "run", NormalizeObservation(Slide()), quiet=True)
    assert eqx.tree_equal(again.state, run.state)
    first = run.evaluate()
    np.testing.assert_array_equal(first.returns, again.evaluate().returns)
    np.testing.assert_array_equal(first.returns, run.evaluate().returns)
    np.testing.assert_allclose(first.returns, log.read_evaluations(run.folder)["return"][-2:], rtol=1e-6)


def test_your_own_functions_are_used_and_asked_for_again(tmp_path: Path) -> None:
    def reward(obs: Any, action: Any, next_obs: Any) -> Any:
        del obs, action
        return -jnp.sum(jnp.abs(next_obs), axis=-1)

    mine = Learner(
        Slide(), "mve-sac", run_dir=tmp_path / "run", settings=SMALL, reward_fn=reward, quiet=True
    ).learn(80)
    assert mine.recipe.known.reward is not None
    assert mine.recipe.known.termination is None
    with pytest.raises(UserError, match="reward function"):
        Learner.load(tmp_path / "run", Slide())
    Learner.load(tmp_path / "run", Slide(), reward_fn=reward)


@pytest.mark.parametrize(
    ("what", "function", "why"),
    [
        ("termination", lambda obs, action, next_obs: False, r"returns shape \(\), not \(7,\)"),
        ("termination", lambda obs, action, next_obs: obs[..., 0], "returns float32, not bool"),
        ("reward", lambda obs, action, next_obs: obs[..., :1], r"returns shape \(1,\), not \(\)"),
        ("reward", lambda obs, action, next_obs: np.abs(obs[..., 0]), "use jax.numpy in place of numpy"),
    ],
)
def test_a_function_of_yours_that_cannot_be_used_is_refused_at_once(
    tmp_path: Path, what: str, function: Any, why: str
) -> None:
    given: Any = {f"{what}_fn": function}
    with pytest.raises(UserError, match=f"{what} function <lambda>: given obs .*{why}") as caught:
        Learner(Slide(), "mve-sac", run_dir=tmp_path / "run", settings=SMALL, quiet=True, **given)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_what_follows_from_the_budget_does_from_the_one_that_is_given_to_learn(tmp_path: Path) -> None:
    def schedule_of(*settings: str, steps: int) -> tuple[int, int, int]:
        made = Learner(Slide(), settings=settings, run_dir=tmp_path / "run", quiet=True)
        made.set_budget(steps)
        train = made.config.train
        assert made.recipe.warmup_steps == train.learning_starts == made.config.dynamics.learning_starts
        return train.total_steps, int(train.learning_starts), made.config.evaluate.interval_steps

    assert schedule_of(steps=2000) == (2000, 400, 1000)
    assert schedule_of(steps=200_000) == (200_000, 5000, 5000)
    assert schedule_of("train.learning_starts=60", "dynamics.learning_starts=60", steps=100)[:2] == (100, 60)
    assert schedule_of("train.total_steps=10000", steps=4000) == (4000, 2000, 1000)  # as it was set


def test_a_learner_that_has_begun_keeps_its_schedule(learner: Learner, tmp_path: Path) -> None:
    learner.save(tmp_path / "copy")
    again = Learner.load(tmp_path / "copy", Slide(), quiet=True)
    again.set_budget(100_000)
    assert again.config.train.total_steps == learner.num_timesteps + 100_000
    assert again.config.train.learning_starts == 60
    assert again.config.evaluate.interval_steps == 100


def test_a_policy_is_not_saved_over_another_run(learner: Learner, tmp_path: Path) -> None:
    learner.save(tmp_path / "mine")
    learner.save(tmp_path / "mine")  # the same once more
    fresh = Learner(Slide(), "mve-sac", settings=SMALL, quiet=True)
    with pytest.raises(UserError, match="mine stands at step 220, this run at 0; choose another folder"):
        fresh.save(tmp_path / "mine")
    other = Learner(Slide(), "sac", settings=SAC, seed=3, quiet=True)
    with pytest.raises(UserError, match="mine holds another run, mve-sac with seed 0 on an environment of"):
        other.save(tmp_path / "mine")
    assert Learner.load(tmp_path / "mine", Slide()).num_timesteps == 220


def test_the_default_algorithm_heeds_the_users_functions() -> None:
    def reward(obs: Any, action: Any, next_obs: Any) -> Any:
        return -jnp.sum(jnp.abs(next_obs), axis=-1)

    mine = Learner(Slide(), settings=["agent.hidden=[16]"], reward_fn=reward, quiet=True)
    assert mine.recipe.known.reward is not None
    assert Learner(Slide(), settings=["agent.hidden=[16]"], quiet=True).recipe.known.reward is None


def test_a_learner_describes_what_its_model_has_to_learn(learner: Learner) -> None:
    assert learner.describe() == (
        "Slide with mve-sac: 2 observations, 1 actions, 220 steps; H = 3, reward learned, termination learned"
    )
    assert "reward known, termination known" in Learner("Pendulum-v1", "mve-sac", settings=SMALL).describe()
    never = Learner("Pendulum-v1", "mve-sac", settings=[*SMALL, "dynamics.termination=never"])
    assert "termination never" in never.describe()
    assert Learner("Pendulum-v1", "sac").describe().endswith("no model")


def test_a_budget_in_which_nothing_is_learned_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="ends before learning starts"):
        Learner("Pendulum-v1", "mve-sac", run_dir=tmp_path / "run").learn(500)


def test_an_agent_may_not_start_before_its_model(tmp_path: Path) -> None:
    settings = [*SMALL, "dynamics.learning_starts=70"]
    with pytest.raises(UserError, match="never fitted"):
        Learner("Pendulum-v1", "mve-sac", run_dir=tmp_path / "run", settings=settings).learn(200)


def test_retrace_remembers_how_likely_each_action_was(tmp_path: Path) -> None:
    settings = [*SMALL, "targets.estimator=retrace"]
    learner = Learner(Slide(), "sac", run_dir=tmp_path / "run", settings=settings, quiet=True).learn(80)
    log_density = np.asarray(learner.state.replay.rows.log_density)[:80]
    warmup, later = log_density[:60], log_density[60:]
    np.testing.assert_allclose(warmup, -np.log(2.0), rtol=1e-6)
    assert np.isfinite(later).all()
    assert len(np.unique(later)) == 20
    records = [json.loads(line) for line in (learner.folder / "metrics.jsonl").read_text().splitlines()]
    assert set().union(*records) >= {f"mve/weight_k{k}" for k in range(4)}
    loaded = Learner.load(learner.folder, Slide(), quiet=True)
    assert eqx.tree_equal(learner.state, loaded.state)


@pytest.mark.slow
def test_calibration_goes_into_the_checkpoint_and_the_log(tmp_path: Path) -> None:
    settings = [*SMALL, "targets.estimator=calibrated", "targets.horizon_steps=2"]
    learner = Learner(Slide(), "mve-sac", run_dir=tmp_path / "run", settings=settings, quiet=True).learn(140)
    loaded = Learner.load(learner.folder, Slide(), quiet=True)
    assert learner.state.calibration is not None
    assert float(learner.state.calibration.count[1]) > 20
    assert eqx.tree_equal(learner.state, loaded.state)
    records = [json.loads(line) for line in (learner.folder / "metrics.jsonl").read_text().splitlines()]
    assert set().union(*records) >= {"mve/weight_k2", "mve/critic_rmse", "mve/imagined_rmse_k2"}


@pytest.mark.parametrize(
    ("algo", "settings", "complaint"),
    [
        ("ddpg", ["targets.estimator=retrace"], "policy with a density.* ddpg .*sac"),
        ("td3", ["targets.estimator=retrace", "agent.exploration_noise=0"], "noise above 0.* td3"),
        (
            "mve-sac",
            ["targets.estimator=calibrated", "targets.horizon_steps=21"],
            "at most train.block_steps",
        ),
        ("calibrated-sac", ["targets.members=1"], "targets.members = 1: a spread takes 2 .*members = 5"),
        ("calibrated-sac", ["targets.members=6"], "targets.members = 6: .* dynamics.members = 5 there are"),
        ("mve-sac", ["targets.members=2"], "for targets.estimator = calibrated, not for mve_tdk"),
        ("dhmbpo", ["targets.discount=1"], "targets.discount = 1 has no bounds of values"),
        ("dhmbpo", ["imagination.trust=0.5"], "imagination.trust = 0.5 would stop rollouts at their first"),
    ],
)
def test_targets_that_cannot_be_made_are_refused_in_one_line(
    tmp_path: Path, algo: str, settings: list[str], complaint: str
) -> None:
    with pytest.raises(UserError, match=complaint) as caught:
        Learner("Pendulum-v1", algo, run_dir=tmp_path / "run", settings=settings, quiet=True).learn()
    assert "\n" not in str(caught.value)


def test_a_memory_smaller_than_a_block_is_refused(tmp_path: Path) -> None:
    settings = [*SMALL, "replay.capacity=10"]
    with pytest.raises(UserError, match="does not hold one block"):
        Learner("Pendulum-v1", "mve-sac", run_dir=tmp_path / "run", settings=settings).learn(200)


def test_a_known_function_that_is_asked_for_has_to_exist() -> None:
    with pytest.raises(UserError, match="no reward function is known"):
        Learner(Slide(), "mve-sac", settings=[*SMALL, "dynamics.reward=known"])


class Choice(Slide):
    """The same pushed by one of three forces, whose numbers begin at 3."""

    action_space = Discrete(3, start=3)

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        assert self.action_space.contains(action)
        self.state = 0.9 * self.state + 0.1 * float(action - 4)
        self.steps += 1
        return self.state.copy(), -float(np.abs(self.state).sum()), False, self.steps == 25, {}

    def snapshot(self) -> dict[str, Any]:
        return {"state": self.state, "steps": self.steps}

    def restore(self, data: dict[str, Any]) -> None:
        self.state, self.steps = data["state"], data["steps"]


@pytest.mark.slow
def test_a_choice_of_actions_is_learned_predicted_and_loaded(tmp_path: Path) -> None:
    learner = Learner(Choice(), "mve-dqn", run_dir=tmp_path / "run", settings=SMALL, quiet=True).learn(120)
    assert learner.config.algo == "mve-dqn"
    action, _ = learner.predict(np.zeros(2))
    assert isinstance(action, np.ndarray)
    assert (action.shape, action.dtype) == ((), np.int64)
    assert learner.spec.discrete
    batch, _ = learner.predict(np.zeros((50, 2)), deterministic=False)
    assert set(batch.tolist()) == {3, 4, 5}
    loaded = Learner.load(tmp_path / "run", Choice(), quiet=True)
    assert loaded.predict(np.zeros(2))[0] == action
    assert loaded.learn(40).num_timesteps == 160


@pytest.mark.parametrize(("env", "algo"), [("CartPole-v1", "mve-sac"), ("Pendulum-v1", "mve-dqn")])
def test_an_algorithm_for_other_actions_is_refused_with_those_that_fit(env: str, algo: str) -> None:
    with pytest.raises(UserError, match=f"{env} has .* actions?, which {algo} is not for; use --algo"):
        Learner(env, algo)


def test_the_package_offers_the_learner_and_the_error() -> None:
    assert mve.Learner is Learner
    assert mve.UserError is UserError
    with pytest.raises(AttributeError):
        mve.nothing  # noqa: B018
