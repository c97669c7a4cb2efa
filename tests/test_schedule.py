"""When what is due, and what a run's budget decides: counted by hand."""

from __future__ import annotations

from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest

from mve import schedule
from mve.config import Config, build
from mve.run import Run
from mve.types import UserError


def test_refits_are_counted_from_when_the_agent_learns() -> None:
    config = build("HalfCheetah-v5", "dhmbpo")
    steps = (0, 5000, 5001, 5999, 6000, 7000)
    assert [schedule.refits_due(config, step) for step in steps] == [0, 0, 1, 1, 2, 3]
    # Five times as many to begin with, as in its authors' code: from then on as many updates as steps.
    assert [schedule.updates_due(config, step) for step in steps] == [0, 0, 5001, 5999, 6000, 7000]
    assert {schedule.rounds_due(config, step) for step in steps} == {0}
    early = build("HalfCheetah-v5", "dhmbpo", ["dynamics.learning_starts=1000"])
    assert [schedule.refits_due(early, step) for step in steps] == [0, 0, 1, 1, 2, 3]
    steady = build("HalfCheetah-v5", "mve-sac")
    assert [schedule.refits_due(steady, step) for step in (1000, 1001, 9000)] == [0, 1, 1]


@pytest.mark.parametrize(
    ("limit", "discount"), [(None, 0.995), (50, 0.95), (200, 0.975), (1000, 0.995), (5000, 0.995)]
)
def test_the_discount_may_come_from_the_episodes_length(limit: int | None, discount: float) -> None:
    """(L/5 - 1)/(L/5) within 0.95 and 0.995: 0.9, 39/40, 199/200, 999/1000."""
    config = schedule.with_budgets(build("Pendulum-v1", "sac", ["targets.discount=episode"]), limit)
    np.testing.assert_allclose(config.targets.discount, discount)
    assert schedule.with_budgets(config, None) == config
    plain = build("Pendulum-v1", "sac", ["targets.discount=0.5"])
    assert schedule.with_budgets(plain, limit).targets.discount == 0.5


def test_the_warm_up_is_a_fifth_of_the_budget_if_so_wanted() -> None:
    settings = [f"{name}=auto" for name in ("train.learning_starts", "train.initial_updates")]
    asked = build("Pendulum-v1", "sac", [*settings, "dynamics.learning_starts=auto"])
    for budget, starts in ((5000, 1000), (25_000, 5000), (1_000_000, 5000)):
        of_budget = replace(asked, train=replace(asked.train, total_steps=budget))
        built = schedule.with_budgets(of_budget, 200)
        assert (built.train.learning_starts, built.train.initial_updates) == (starts, starts)
        assert built.dynamics.learning_starts == starts
        # Where ends have to be learned, fewer updates with a model that has seen those of random actions.
        assert schedule.with_budgets(of_budget, 200, learns_ends=True).train.initial_updates == starts // 5
        assert schedule.with_budgets(built, 200) == built


def test_learning_begins_with_fewer_updates_where_ends_have_to_be_learned() -> None:
    for ends, updates in (("auto", 1000), ("never", 1000), ("learned", 200)):
        built = build("Pendulum-v1", "mve-svg", [f"dynamics.termination={ends}"])
        assert Run(built, gym.make("Pendulum-v1")).config.train.initial_updates == updates


def test_a_run_is_saved_as_often_as_it_is_judged() -> None:
    """So that little is lost of a short one, and what was judged best is there; every 5000 steps at least."""
    asked = build("Pendulum-v1", "sac", [])
    for budget, looks, saves in ((5000, 0, 1000), (200_000, 0, 5000), (5000, 300, 300), (20_000, 7000, 5000)):
        evaluate = replace(asked.evaluate, interval_steps=looks)
        of_budget = replace(asked, train=replace(asked.train, total_steps=budget), evaluate=evaluate)
        assert schedule.with_budgets(of_budget, 200).train.checkpoint_interval == saves
    own = build("Pendulum-v1", "sac", ["train.checkpoint_interval=70"])
    assert schedule.with_budgets(own, 200).train.checkpoint_interval == 70


@pytest.mark.parametrize(
    ("algo", "settings", "message"),
    [
        ("mve-sac", ["dynamics.initial_fits=0", "dynamics.fits_per_step=0"], "without a fit"),
        ("mve-sac", ["dynamics.initial_fits=0", "dynamics.fits_per_step=0.001"], "without a fit"),
        ("mve-svg", ["imagination.real_share=0.001"], "of agent.batch_size = 256 rows is none"),
        ("dhmbpo", ["targets.estimator=calibrated", "agent.model_steps=0"], "has by other critics"),
        ("retrace-sac", ["agent.critics=5", "agent.target_critics=2"], "has by other critics"),
    ],
)
def test_what_would_be_without_effect_or_meaning_is_refused(
    algo: str, settings: list[str], message: str
) -> None:
    def built(*settings: str) -> Config:
        return schedule.with_budgets(build("Hopper-v4", algo, [*settings, "train.total_steps=9000"]), 1000)

    schedule.check(built(), fits_model=True)
    with pytest.raises(UserError, match=message):
        schedule.check(built(*settings), fits_model=True)
