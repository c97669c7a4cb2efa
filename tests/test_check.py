"""Functions scored on real steps: what is right passes, what is wrong is named, and where."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import jax.numpy as jnp
import numpy as np
import pytest
from environments import Counting

from mve import check
from mve.check import Report, Score
from mve.cli import main
from mve.types import Known, UserError

# Of `Counting`: it pays the count it leaves; episodes of 3 steps terminate, those of 5 are truncated.
STEPS = 16


def counted(obs: Any, action: Any, next_obs: Any) -> Any:
    del action, next_obs
    return obs[..., 0]


def third_of_even(obs: Any, action: Any, next_obs: Any) -> Any:
    del obs, action
    return (next_obs[..., 0] == 3) & (next_obs[..., 1] % 2 == 0)


def only(report: Report) -> Score:
    [score] = report.scores
    return score


def reward_score(fn: Callable[..., Any], env: gym.Env | None = None, steps: int = STEPS) -> Score:
    return only(check.check(env or Counting(), Known(reward=fn), steps=steps))


def termination_score(fn: Callable[..., Any]) -> Score:
    return only(check.check(Counting(), Known(termination=fn), steps=STEPS))


def test_true_functions_agree_on_every_step() -> None:
    report = check.check(Counting(), Known(counted, third_of_even), steps=STEPS)
    assert report.agrees
    reward, termination = report.scores
    assert reward.numbers["largest_error"] == 0.0
    assert reward.numbers["within_tolerance"] == 1.0
    counts = {"both_end": 2, "neither_ends": 14, "missed_ends": 0, "false_ends": 0}
    assert termination.numbers == counts
    assert reward.worst == termination.worst == []


def test_a_wrong_reward_is_caught_and_its_worst_step_named() -> None:
    score = reward_score(lambda obs, action, next_obs: obs[..., 0] + jnp.where(obs[..., 0] == 4, 5.0, 0.0))
    assert not score.agrees
    assert score.numbers["largest_error"] == 5.0
    assert score.numbers["mean_error"] == 5.0 * 2 / 16  # count 4 is left once in each episode of five
    assert "disagrees on 2 of 16 steps, by 5 at step 8" in score.verdict
    worst = score.worst[0]
    assert (worst["step"], worst["told"], worst["observed"]) == (8, 9.0, 4.0)
    assert (worst["obs"], worst["next_obs"]) == ([4.0, 1.0], [5.0, 1.0])
    assert len(score.worst) == 2


@pytest.mark.parametrize(
    ("fn", "slip"),
    [
        (lambda obs, action, next_obs: obs[..., 0] + 2.0, "It is 2 too high on every step"),
        (lambda obs, action, next_obs: -obs[..., 0], "Its sign is wrong"),
        (lambda obs, action, next_obs: 0.5 * obs[..., 0], "It lacks a factor of 2"),
        (lambda obs, action, next_obs: next_obs[..., 0] * obs[..., 0], "--set dynamics.reward=learned"),
    ],
)
def test_the_usual_slips_are_recognised(fn: Callable[..., Any], slip: str) -> None:
    assert slip in reward_score(fn).verdict


def pendulum(obs: Any, action: Any, next_obs: Any) -> Any:
    del next_obs
    angle = jnp.arctan2(obs[..., 1], obs[..., 0])
    return -(angle**2 + 0.1 * obs[..., 2] ** 2 + 0.001 * action[..., 0] ** 2)


def test_arguments_in_the_wrong_places_or_units_are_recognised() -> None:
    env = gym.make("Pendulum-v1")
    assert reward_score(pendulum, env, 50).agrees
    swapped = reward_score(lambda obs, action, next_obs: pendulum(next_obs, action, obs), env, 50)
    assert "obs and next_obs exchanged" in swapped.verdict
    # As JAX alone has it, whatever the arguments are.
    cleared = lambda obs, action, next_obs: pendulum(next_obs, action.at[..., 0].multiply(1.0), obs)  # noqa: E731
    assert "obs and next_obs exchanged" in reward_score(cleared, env, 50).verdict
    scaled = reward_score(lambda obs, action, next_obs: pendulum(obs, 2.0 * action, next_obs), env, 50)
    assert "right for actions in [-1, 1]" in scaled.verdict


def test_ends_that_are_missed_or_made_up_are_counted_and_shown() -> None:
    never = termination_score(lambda obs, action, next_obs: next_obs[..., 0] < 0)
    assert never.numbers == {"both_end": 0, "neither_ends": 14, "missed_ends": 2, "false_ends": 0}
    assert [row["step"] for row in never.worst] == [3, 11]
    # A time limit is no termination.
    limits = termination_score(lambda obs, action, next_obs: third_of_even(obs, action, next_obs) | (next_obs[..., 0] == 5))  # fmt: skip  # noqa: E501
    assert limits.numbers["false_ends"] == 2
    assert (limits.worst[0]["step"], limits.worst[0]["told"], limits.worst[0]["observed"]) == (8, True, False)
    opposite = termination_score(lambda *arguments: ~third_of_even(*arguments))
    assert "says the opposite" in opposite.verdict


def test_no_end_observed_means_that_no_end_was_tested() -> None:
    env = Counting(lengths=(100,))
    score = only(check.check(env, Known(termination=lambda obs, a, n: n[..., 0] > 99), steps=STEPS))
    assert score.agrees
    assert "no end was tested" in score.verdict


@pytest.mark.parametrize(
    ("fn", "message"),
    [
        (lambda obs, a, n: obs[..., :1], r"given obs \(2,\) and action \(1,\) .* shape \(1,\), not \(\)"),
        (lambda obs, a, n: obs[0], r"given obs \(7, 2\) .* returns shape \(2,\), not \(7,\)"),
        (lambda obs, a, n: 1.0, r"returns float, not an array|returns shape \(\), not \(7,\)"),
        (lambda obs, a, n: None, "returns NoneType, not an array"),
        (lambda obs, a, n: obs[..., 0] > 0, "returns bool, not float32"),
        (lambda obs, a, n: 1.0 if obs[..., 0] > 0 else 0.0, "fails; JAX cannot compile `if`"),
        (lambda obs, a, n: np.asarray(obs)[..., 0], "fails; JAX cannot compile it: use jax.numpy"),
        (lambda obs, a, n: obs["x"], "fails; TypeError: "),
        (lambda obs, a, n: jnp.log(obs[..., 0] - 2.0), r"is nan at step 1 \[obs 0 0, action "),
    ],
)  # fmt: skip
def test_a_function_that_cannot_be_scored_is_refused_in_one_line(
    fn: Callable[..., Any], message: str
) -> None:
    with pytest.raises(UserError, match=message) as refusal:
        reward_score(fn)
    assert "\n" not in str(refusal.value)
    assert str(refusal.value).startswith("reward given")


def test_all_faulty_functions_are_named_at_once() -> None:
    broken = Known(lambda obs, a, n: obs, lambda obs, a, n: obs[..., 0])
    with pytest.raises(UserError, match=r"^reward given: .*; termination given: .* float32, not bool$"):
        check.check(Counting(), broken)


def test_nothing_given_and_nothing_shipped_is_refused() -> None:
    with pytest.raises(UserError, match="no function is given and none is shipped"):
        check.check(Counting())


# The command


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(
        "def ends(obs, action, next_obs):\n    return abs(next_obs[..., 1]) > 0.2\n"
        "def late(obs, action, next_obs):\n    return abs(next_obs[..., 1]) > 0.25\n"
    )
    Path("broken.py").write_text("import nowhere_to_be_found\n")
    return tmp_path


def test_shipped_functions_are_checked_without_any_given(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "Pendulum-v1", "--steps", "300"]) == 0
    out = capsys.readouterr().out
    assert "Pendulum-v1: 300 real steps with random actions, seed 0" in out
    assert "reward shipped with mve agrees with every reward observed" in out
    assert "termination shipped with mve agrees, but no step terminated" in out


def test_the_command_tells_right_from_wrong_by_its_exit_code(
    mine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["check", "InvertedPendulum-v5", "--steps", "100", "--termination"]
    assert main([*command, "mine.py:ends"]) == 0
    assert "termination mine.py:ends agrees on every step" in capsys.readouterr().out
    assert main([*command, "mine.py:late"]) == 1
    out = capsys.readouterr().out
    assert "told False, observed True" in out
    assert main([*command, "mine.py:late", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert (report["env"], report["steps"]) == ("InvertedPendulum-v5", 100)
    [score] = report["scores"]
    assert score["numbers"]["missed_ends"] > 0
    assert len(score["worst"][0]["obs"]) == 4
    assert {path.name for path in mine.iterdir()} == {"mine.py", "broken.py"}


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("Pendulm-v1", "unknown environment 'Pendulm-v1'"),
        ("Pendulum-v1 --steps 0", "--steps 0: it has to be 1 or more"),
        ("Pendulum-v1 --reward broken.py:f", "--reward broken.py:f: broken.py fails; ModuleNotFoundError"),
        ("Pendulum-v1 --reward mine.py:ends", "reward mine.py:ends: given obs (3,) and action (1,)"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_exit_code_2(
    mine: Path, argv: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", *argv.split()]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert words in err
