"""`mve settings`: what --set takes, told from the classes that hold it."""

from __future__ import annotations

import json

import pytest

from mve.cli import main
from mve.config import build
from mve.presets import PRESETS
from mve.settings import about, settings
from mve.types import UserError


@pytest.mark.parametrize("algo", PRESETS)
def test_every_setting_is_told_with_the_algorithms_value(algo: str) -> None:
    known = {setting.name: setting for setting in settings(algo)}
    for name, value in PRESETS[algo].settings.items():
        told = known[name].value
        assert told == (tuple(value) if isinstance(value, list) else value), name
    for setting in known.values():
        assert setting.meaning.endswith((".", ")")), setting.name
        assert setting.allowed, setting.name
        if not isinstance(setting.value, dict):  # what is told can be said
            build("ENV", algo, [f"{setting.name}={json.dumps(setting.value)}"])


def test_a_task_has_values_of_its_own() -> None:
    lengths = {
        env: next(s.value for s in settings("mbpo", env) if s.name == "imagination.length")
        for env in (None, "Hopper-v4")
    }
    assert lengths == {None: (1, 1), "Hopper-v4": (1, 15)}


@pytest.mark.parametrize(
    ("name", "allowed"),
    [
        ("agent.hidden", "[whole number from 1, ...]"),
        ("agent.target_rate", "number from 0 to 1"),
        ("agent.target_entropy", "number or null"),
        ("agent.critic_learning_rate", "number above 0 to 1000"),
        ("imagination.length", "[whole number from 1, whole number from 1]"),
        ("train.learning_starts", "whole number from 0 or auto"),
        ("train.overlap", "true or false"),
        ("dynamics.trajectory", "ts1 or tsinf"),
        ("env.kwargs", "names and values or null"),
    ],
)
def test_what_a_setting_may_be_is_said_in_words(name: str, allowed: str) -> None:
    assert next(s.allowed for s in settings() if s.name == name) == allowed


def test_words_choose_by_name_and_by_meaning() -> None:
    def names(*words: str) -> list[str]:
        return [setting.name for setting in about(words, settings())]

    assert names("replay.") == ["replay.capacity", "replay.recency"]
    assert "agent.value_bins" in names("histogram")
    assert names("replay.", "MATMUL") == [*names("replay."), "train.matmul_precision"]
    assert len(names()) == len(settings())
    with pytest.raises(UserError, match="no setting is about 'hiden'; nearest: hidden, hidden_gain"):
        names("hiden")


def test_the_command_shows_what_can_be_set_again(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["settings", "recency", "hidden_gain", "estimator"]) == 0
    shown = capsys.readouterr().out
    lines = shown.splitlines()
    assert "replay.recency=2.0" in lines
    assert "targets.estimator=mve" in lines
    assert "[number from 1 to 100; 1.0 where an algorithm does not say]" in " ".join(shown.split())
    assert main(["settings", "--algo", "paper", "--env", "Swimmer-v5", "horizon_steps", "--json"]) == 0
    [told] = [s for s in json.loads(capsys.readouterr().out) if s["name"] == "targets.horizon_steps"]
    assert (told["value"], told["default"], told["allowed"]) == (10, 3, "whole number from 0")
    assert main(["settings", "no-such-thing"]) == 2
    assert "no setting is about 'no-such-thing'" in capsys.readouterr().err
