"""Presets and settings: what they come to, and what is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mve import config, schedule
from mve.agents import AGENTS
from mve.agents.sac import SACConfig
from mve.config import Config, build, from_json, to_json
from mve.presets import PRESETS
from mve.types import UserError

TASKS = ("HalfCheetah-v5", "Swimmer-v5", "Walker2d-v5", "Pendulum-v1", "CartPole-v1")


@pytest.mark.parametrize("algo", PRESETS)
@pytest.mark.parametrize("task", TASKS)
def test_every_preset_builds_and_survives_json(algo: str, task: str) -> None:
    built = build(task, algo, seed=3)
    assert type(built.agent) is AGENTS[built.learner][0]
    assert from_json(json.loads(json.dumps(to_json(built)))) == built


def test_the_json_holds_every_setting_not_only_the_changed_ones() -> None:
    data = to_json(build("Pendulum-v1", "sac"))
    assert data["dynamics"]["learning_rate"] == 1e-3
    assert data["targets"]["discount"] == 0.99
    assert data["replay"]["capacity"] == 1_000_000


@pytest.mark.parametrize(
    ("task", "horizon"), [("HalfCheetah-v5", 10), ("Swimmer-v5", 10), ("Walker2d-v5", 3)]
)
def test_the_paper_preset_is_the_paper(task: str, horizon: int) -> None:
    built = build(task, "paper")
    assert built.targets.estimator == "mve_tdk"
    assert built.targets.horizon_steps == horizon
    assert built.targets.divide_by_horizon
    assert built.agent.batch_size == 512
    assert built.agent.layer_norm
    assert built.dynamics.hidden == (128,) * 8
    assert built.dynamics.members == 1
    assert built.dynamics.normalise
    assert built.dynamics.termination == "never"
    assert built.dynamics.fits_per_step == built.train.updates_per_step == 4
    assert built.train.block_steps == 100
    assert not built.env.truncation_is_terminal
    assert built.env.kwargs == {"exclude_current_positions_from_observation": False}


def test_dhmbpo_is_the_published_method_and_refit_its_cheaper_relative() -> None:
    published, refit = (build("HalfCheetah-v5", algo) for algo in ("dhmbpo", "dhmbpo-refit"))
    assert published.agent.critics == 5
    assert published.agent.model_steps == 5
    assert published.agent.reset_optimisers
    assert published.dynamics.interval_steps == 1000
    assert refit.agent.model_steps == 3
    assert not refit.agent.reset_optimisers
    assert refit.dynamics.interval_steps == 250
    for built in (published, refit):
        assert built.agent.model_steps == built.targets.horizon_steps + 1
        assert built.dynamics.members == 8
        assert built.train.learning_starts == 5000
    assert "refit" in PRESETS["dhmbpo-refit"].summary


@pytest.mark.parametrize(
    ("task", "actor_rate", "critic_rate", "target_rate"),
    [
        ("HalfCheetah-v5", 1e-3, 1e-3, 1e-2),
        ("Swimmer-v5", 1e-4, 1e-3, 1e-2),
        ("Walker2d-v5", 1e-4, 1e-4, 1e-3),
    ],
)
def test_the_repo2018_preset_is_the_authors_last_settings(
    task: str, actor_rate: float, critic_rate: float, target_rate: float
) -> None:
    built = build(task, "repo2018")
    assert built.targets.horizon_steps == 5
    assert built.agent.batch_size == 64
    assert not built.dynamics.normalise
    assert built.env.truncation_is_terminal
    assert built.agent.actor_learning_rate == actor_rate
    assert built.agent.critic_learning_rate == critic_rate
    assert built.agent.target_rate == target_rate


@pytest.mark.parametrize("algo", PRESETS)
@pytest.mark.parametrize("word", ["targets.estimator=one_step", "targets.horizon_steps=0"])
def test_expansion_can_be_switched_off_by_one_word_in_every_preset(algo: str, word: str) -> None:
    task = "CartPole-v1" if "dqn" in algo else "HalfCheetah-v5"
    built = schedule.with_budgets(build(task, algo, [word, "train.total_steps=20000"]), 1000)
    schedule.check(built, fits_model=True)
    assert built.targets.imagined_steps == 0


@pytest.mark.parametrize("learner", ["ddpg", "td3", "sac", "dqn"])
def test_one_word_switches_expansion_on_and_off(learner: str) -> None:
    assert build("Pendulum-v1", learner).targets.imagined_steps == 0
    assert build("Pendulum-v1", learner, ["targets.estimator=mve_tdk"]).targets.imagined_steps == 3
    assert build("Pendulum-v1", f"mve-{learner}").targets.imagined_steps == 3
    assert build("Pendulum-v1", f"mve-{learner}", ["targets.estimator=one_step"]).targets.imagined_steps == 0


def test_the_users_settings_win_over_the_preset() -> None:
    built = build("Walker2d-v5", "paper", ["targets.horizon_steps=7", "agent.hidden=[8, 8]"])
    assert built.targets.horizon_steps == 7
    assert built.agent.hidden == (8, 8)


def test_without_a_name_it_is_mve_on_sac() -> None:
    assert (
        build("Pendulum-v1") == build("Pendulum-v1", config.DEFAULT_ALGO) == build("Pendulum-v1", "mve-svg")
    )


@pytest.mark.parametrize(
    ("algo", "assignment", "message"),
    [
        ("mve-sak", "", "unknown algorithm 'mve-sak'; nearest: mve-sac"),
        (None, "agent.hiden=[16]", "unknown setting 'agent.hiden'; nearest: hidden"),
        (None, "trin.total_steps=1", "unknown settings section 'trin'; nearest: train"),
        (None, "agent.hidden=16", "setting agent.hidden = 16: Expected a list such as [256,256], got `int`"),
        (None, "agent.hidden=[0]", "setting agent.hidden = [0]: Expected `int` >= 1"),
        (None, "agent.target_rate=5", "setting agent.target_rate = 5: Expected `float` <= 1.0"),
        (None, "targets.discount=NaN", "setting targets.discount = nan"),
        (None, "targets.estimator=mvee", "it has to be one of one_step, mve, mve_tdk"),
        (None, "train.updates_per_step", "write section.field=value"),
        (None, "seed=3", "cannot set 'seed'"),
        (None, "agent.action_layer=4", "agent.action_layer = 4 is beyond the critic's last layer, 3"),
        ("paper", "agent.hidden=[]", "agent.action_layer = 1 is beyond the critic's last layer, 0"),
        (None, "agent.action_layer=-1", "setting agent.action_layer = -1: Expected `int` >= 0"),
        (None, "agent.hiden=3", "`mve settings` shows them all"),
        (None, "dynamics.members=two", "setting dynamics.members = 'two': Expected `int`, got `str`"),
    ],
)
def test_a_mistake_is_named_in_one_line(algo: str | None, assignment: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        build("Pendulum-v1", algo, [assignment] if assignment else [])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_seed_out_of_range_is_refused() -> None:
    with pytest.raises(UserError, match="seed -1"):
        build("Pendulum-v1", seed=-1)


# What comes from a file, or from whoever wrote it.

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
SECTIONS = to_json(build("Pendulum-v1"))
names = st.sampled_from([f"{s}.{n}" for s, part in SECTIONS.items() if isinstance(part, dict) for n in part])


def assert_refused_or_valid(make: Callable[[], Config]) -> None:
    try:
        built = make()
    except UserError as refused:
        message = str(refused)
    else:
        text = json.dumps(to_json(built), allow_nan=False)
        assert from_json(json.loads(text)) == built
        return
    assert "\n" not in message
    assert len(message) < 1000


def fuzzed(examples: int) -> Any:
    return settings(max_examples=examples, deadline=None, database=None, derandomize=True)


many = pytest.mark.parametrize("examples", [30, pytest.param(1000, marks=pytest.mark.slow)])


@many
def test_any_json_is_refused_in_one_line_or_is_a_configuration(examples: int) -> None:
    learners = st.fixed_dictionaries({"learner": st.sampled_from(list(AGENTS)), "algo": json_values})

    @fuzzed(examples)
    @given(json_values | learners)
    def check(data: Any) -> None:
        assert_refused_or_valid(lambda: from_json(data))

    check()


@many
def test_any_value_of_any_setting_is_refused_in_one_line_or_taken(examples: int) -> None:
    @fuzzed(examples)
    @given(names, json_values, st.sampled_from([1, 2]))
    def check(name: str, value: Any, version: int) -> None:
        section, _, setting = name.partition(".")
        data = {**SECTIONS, "format": version, section: {**SECTIONS[section], setting: value}}
        assert_refused_or_valid(lambda: from_json(data))
        assert_refused_or_valid(lambda: from_json({**SECTIONS, section: value}))

    check()


@many
def test_any_assignment_is_refused_in_one_line_or_taken(examples: int) -> None:
    @fuzzed(examples)
    @given(names | st.text(max_size=12), json_values.map(json.dumps) | st.text(max_size=12), st.integers())
    def check(name: str, text: str, seed: int) -> None:
        assert_refused_or_valid(lambda: build("Pendulum-v1", None, [f"{name}={text}"]))
        assert_refused_or_valid(lambda: build(text, name, [text], seed))

    check()


@pytest.mark.parametrize("text", ["[" * 100_000, "1e999", "9" * 5000, '{"a": NaN}', "-Infinity", "\ud800"])
def test_a_bomb_of_a_value_is_refused_in_one_line_or_text(text: str) -> None:
    for name in ("env.kwargs", "env.id", "agent.hidden", "train.total_steps", "targets.discount"):
        assert_refused_or_valid(lambda name=name: build("Pendulum-v1", None, [f"{name}={text}"]))


def test_a_newer_config_is_refused_and_an_older_one_migrates() -> None:
    data = to_json(build("Pendulum-v1"))
    assert data["format"] == config.FORMAT == max(config.MIGRATIONS) + 1
    with pytest.raises(UserError, match=r"config: format 6, this mve reads 5; use the mve that wrote it"):
        from_json({**data, "format": 6})
    for version in (0, True, "2", None, 1.0):
        with pytest.raises(UserError, match="is not a version"):
            from_json({**data, "format": version})
    first = {**data, "train": {k: v for k, v in data["train"].items() if k != "overlap"}}
    del first["format"]
    assert not from_json(first).train.overlap  # what the first runs did
    assert from_json({**first, "format": 2}).train.overlap  # what a new setting's default does
    assert from_json({**first, "train": data["train"]}) == from_json(data)


@pytest.mark.parametrize(("rate", "share"), [(1.0, 0.0), (0.005, 0.008)])
def test_an_older_average_of_actors_spans_the_share_that_it_was_of_the_budget(
    rate: float, share: float
) -> None:
    data = to_json(build("Pendulum-v1", "mve-svg", ["train.total_steps=25000"]))
    agent = {k: v for k, v in data["agent"].items() if k != "average_share"}
    older = {**data, "format": 2, "agent": {**agent, "average_rate": rate}}
    built = from_json(older)
    assert isinstance(built.agent, SACConfig)
    assert built.agent.average_share == pytest.approx(share)


@pytest.mark.parametrize(("version", "said"), [(1, None), (2, None), (3, None), (3, True), (4, True)])
def test_a_run_from_before_limits_has_none(version: int, said: bool | None) -> None:
    data = to_json(build("Pendulum-v1", "mve-sac"))
    del data["dynamics"]["limits"]
    dynamics = data["dynamics"] | ({} if said is None else {"limits": said})
    assert from_json({**data, "format": version, "dynamics": dynamics}).dynamics.limits is bool(said)
    assert from_json({**data, "format": 4}).dynamics.limits


@pytest.mark.parametrize(("version", "bins", "spare"), [(1, 101, 0), (4, 101, 0), (4, 0, 3), (5, 101, 3)])
def test_a_histogram_from_before_spare_bins_ends_at_its_bounds(version: int, bins: int, spare: int) -> None:
    data = to_json(build("Pendulum-v1", "mve-svg", [f"agent.value_bins={bins}"]))
    del data["agent"]["spare_bins"]
    built = from_json({**data, "format": version})
    assert isinstance(built.agent, SACConfig)
    assert built.agent.spare_bins == spare


def test_migrations_are_applied_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "FORMAT", 5)
    rename = lambda data: {**data, "seed": data["seed"] + 1}  # noqa: E731
    monkeypatch.setitem(config.MIGRATIONS, 4, rename)
    data = to_json(build("Pendulum-v1"))
    assert from_json({**data, "format": 5}).seed == 0
    assert from_json({**data, "format": 2}).seed == from_json({**data, "format": 1}).seed == 1
