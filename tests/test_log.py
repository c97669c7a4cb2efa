"""The run folder's records survive kills and resumes; the console says little and on stderr."""

from __future__ import annotations

import io
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from mve import display, log
from mve.display import Display
from mve.log import RunLog
from mve.types import UserError


def write_run(folder: Path, steps: tuple[int, ...] = (10, 20), quiet: bool = True) -> None:
    with RunLog(folder) as run, Display(100, quiet=quiet) as shown:
        for step in steps:
            run.record(step, {"model/loss": step / 8, "train/count": np.int64(step)})
            shown.progress(step, {"env": "Task-v0", "model error": 0.1234567})
            run.evaluation(step, [step + 0.5, step + 1.5], [3, 4])
            shown.evaluation(step, [step + 0.5, step + 1.5])


def test_what_is_recorded_is_what_is_read(tmp_path: Path) -> None:
    write_run(tmp_path)
    metrics, evaluations = log.read_metrics(tmp_path), log.read_evaluations(tmp_path)
    np.testing.assert_array_equal(metrics["time/total_timesteps"], [10, 20])
    np.testing.assert_array_equal(metrics["model/loss"], [1.25, 2.5])
    np.testing.assert_array_equal(evaluations["step"], [10, 10, 20, 20])
    np.testing.assert_array_equal(evaluations["episode"], [0, 1, 0, 1])
    np.testing.assert_array_equal(evaluations["return"], [10.5, 11.5, 20.5, 21.5])
    np.testing.assert_array_equal(evaluations["length"], [3, 4, 3, 4])
    assert (tmp_path / "evaluations.csv").read_text().splitlines()[:2] == [
        "step,episode,return,length",
        "10,0,10.5,3",
    ]


def test_records_are_on_disk_before_the_run_ends(tmp_path: Path) -> None:
    with RunLog(tmp_path) as run:
        run.record(1, {"x": 2.0})
        assert (tmp_path / "metrics.jsonl").read_text() == '{"time/total_timesteps": 1, "x": 2.0}\n'
        assert len(log.read_evaluations(tmp_path)["step"]) == 0


def test_what_is_not_finite_is_recorded_as_null(tmp_path: Path) -> None:
    with RunLog(tmp_path) as run:
        run.record(1, {"a": math.nan, "b": math.inf, "c": np.float32(0.1)})
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {
        **{"time/total_timesteps": 1, "a": None, "b": None},
        "c": pytest.approx(0.1),
    }
    assert np.isnan(log.read_metrics(tmp_path)["a"]).all()


def test_a_metric_that_starts_late_is_missing_before(tmp_path: Path) -> None:
    with RunLog(tmp_path) as run:
        run.record(1, {})
        run.record(2, {"late": 5})
    np.testing.assert_array_equal(log.read_metrics(tmp_path)["late"], [np.nan, 5.0])


def test_resuming_repeats_no_row(tmp_path: Path) -> None:
    write_run(tmp_path)
    before = {name: (tmp_path / name).read_text() for name in ("metrics.jsonl", "evaluations.csv")}
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"time/total_timesteps": 15, "mod')  # the run was killed here
    with (tmp_path / "evaluations.csv").open("a") as file:
        file.write("20,2,-1")
    RunLog.truncate(tmp_path, 10)
    np.testing.assert_array_equal(log.read_evaluations(tmp_path)["step"], [10, 10])
    write_run(tmp_path, steps=(20,))
    assert {name: (tmp_path / name).read_text() for name in before} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["evaluations.csv", "metrics.jsonl"]


def test_records_that_are_no_records_are_named_in_one_line(tmp_path: Path) -> None:
    write_run(tmp_path)
    sound = (tmp_path / "evaluations.csv").read_bytes()
    for name, spoilt, why in (
        ("evaluations.csv", b"10,one,2,3\n", "'10,one,2,3' is not step,episode,return,length"),
        ("evaluations.csv", b"\xff\xfe\n", "is not text"),
        ("metrics.jsonl", b'{"time/total_timesteps": 7, "train/critic_loss": "high"}\n', "'high'"),
    ):
        path = tmp_path / name
        before = path.read_bytes()
        path.write_bytes(before + spoilt)
        with pytest.raises(UserError, match=r"is damaged: .*mend it, or remove it") as caught:
            (log.read_evaluations if "csv" in name else log.read_metrics)(tmp_path)
        assert why in str(caught.value)
        assert "\n" not in str(caught.value)
        path.write_bytes(before)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"time/total_timesteps": null}\n')
    RunLog.truncate(tmp_path, 20)
    assert (tmp_path / "evaluations.csv").read_bytes() == sound


def test_truncating_an_empty_folder_does_nothing(tmp_path: Path) -> None:
    RunLog.truncate(tmp_path, 10)
    assert list(tmp_path.iterdir()) == []


def test_off_a_terminal_there_is_one_line_per_evaluation_on_stderr(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path, quiet=False)
    out, err = capsys.readouterr()
    assert out == ""
    first, second = err.splitlines()
    assert first == "step  10/100  evaluation 11.0 ± 0.5  model error 0.123"
    assert second.startswith("step  20/100  evaluation 21.0 ± 0.5  ")
    assert second.endswith(" left  model error 0.123")
    assert " steps/s  " in second


def test_time_left_is_not_told_from_the_pace_of_steps_before_learning(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(display.time, "monotonic", lambda: now[0])
    shown = Display(100, learning_starts=10)
    for seconds, step in ((1, 5), (2, 10), (52, 20), (92, 30)):
        now[0] = float(seconds)
        shown.progress(step, {})
        shown.evaluation(step, [1.0])
    _, warm_up, begun, learning = capsys.readouterr().err.splitlines()
    assert warm_up.endswith("5 steps/s")
    assert begun.endswith("0.2 steps/s  6 min 40 s left")  # a window has two steps at least: 10 and 20
    assert learning.endswith("0.25 steps/s  4 min 40 s left")


def test_quiet_prints_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path, quiet=True)
    assert capsys.readouterr() == ("", "")


def test_on_a_terminal_one_live_line_shows_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(
        display, "Console", lambda stderr: Console(file=screen, force_terminal=True, width=120)
    )
    write_run(tmp_path, quiet=False)
    for shown in ("Task-v0", "20/100", "evaluation 21", "model error 0.123", "steps/s", "left"):
        assert shown in screen.getvalue()


@pytest.mark.parametrize(
    ("seconds", "text"), [(5.0, "5 s"), (65.4, "1 min 05 s"), (3720.0, "1 h 02 min"), (-1.0, "0 s")]
)
def test_time_left_reads_well(seconds: float, text: str) -> None:
    assert display._duration(seconds) == text


def test_json_is_written_whole_and_in_order(tmp_path: Path) -> None:
    log.write_json(tmp_path / "a.json", {"b": 1, "a": [1, 2]})
    assert (tmp_path / "a.json").read_text() == '{\n  "b": 1,\n  "a": [\n    1,\n    2\n  ]\n}\n'
    assert log.read_json(tmp_path / "a.json") == {"b": 1, "a": [1, 2]}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_folder_that_is_no_run_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent is not a run folder: there is no such folder"):
        log.read_json(tmp_path / "absent" / "config.json")
    with pytest.raises(UserError, match=r"is not a run folder: it has no config.json"):
        log.read_json(tmp_path / "config.json")
    for read in (log.read_metrics, log.read_evaluations):
        with pytest.raises(UserError, match="is not a run folder"):
            read(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="cannot read"):
        log.read_json(tmp_path / "config.json")


def test_versions_name_everything_a_result_depends_on(tmp_path: Path) -> None:
    log.write_versions(tmp_path)
    written = log.read_json(tmp_path / "versions.json")
    assert list(written)[:5] == ["mve", "git_commit", "git_dirty", "python", "platform"]
    assert all(
        written[name] for name in ("python", "numpy", "jax", "jaxlib", "gymnasium", "mujoco", "devices")
    )


def test_outside_a_checkout_there_is_no_commit(tmp_path: Path) -> None:
    assert log._git(tmp_path) == {"git_commit": None, "git_dirty": None}


def test_mujoco_warns_into_the_run_folder_and_nowhere_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    import mujoco

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    xml = "<mujoco><worldbody><body><freejoint/><geom size='1'/></body></worldbody></mujoco>"
    for folder in (tmp_path, None):
        with log.capture_mujoco_warnings(folder):
            model = mujoco.MjModel.from_xml_string(xml)
            data = mujoco.MjData(model)
            data.qvel[:] = np.nan
            mujoco.mj_step(model, data)
    assert len((tmp_path / "mujoco.log").read_text().splitlines()) == 1
    assert "QVEL" in (tmp_path / "mujoco.log").read_text()
    assert os.listdir(elsewhere) == []
    assert capfd.readouterr() == ("", "")
