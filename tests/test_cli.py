"""The commands, run as a user runs them: what they print, where, and with which exit code."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mve import doctor, log
from mve.cli import COMMANDS, main
from mve.learner import Learner
from mve.presets import PRESETS
from mve.types import UserError

# No function of the environment, so that a resumed run finds the compiled one; memory that never grows.
TINY = [
    *("agent.hidden=[16]", "agent.batch_size=16", "replay.capacity=200", "targets.horizon_steps=2"),
    *("dynamics.hidden=[16]", "dynamics.batch_size=16", "dynamics.members=1", "dynamics.initial_fits=5"),
    *("dynamics.learning_starts=100", "dynamics.reward=learned", "dynamics.termination=never"),
    *("train.learning_starts=100", "train.updates_per_step=0.5"),
    *("evaluate.episodes=2", "evaluate.interval_steps=160"),
]


def train_tiny(folder: Path, *more: str) -> int:
    return main(
        ["train", "Pendulum-v1", "--algo", "mve-sac", "--run-dir", str(folder), "--set", *TINY, *more]
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One training serves all tests, which must leave it as it is."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    assert train_tiny(folder, "--steps", "320", "--set", "targets.discount=0.9", "--quiet") == 0
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the trained run, in the folder that the command is run from."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained, tmp_path / "run")
    return Path("run")


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line on stderr with which the command line is refused."""
    capsys.readouterr()
    assert main(list(argv)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("mve: ")
    assert err.count("\n") == 1
    return err.strip()


def python(*argv: str, **environment: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **environment}
    return subprocess.run(
        [sys.executable, *argv], capture_output=True, text=True, timeout=120, env=environment
    )


# Help and mistakes in the command line


def test_help_comes_within_half_a_second_and_without_jax() -> None:
    asks = (
        "import sys, time; start = time.process_time(); from mve.cli import main; code = main(['--help']);"
        "print(code, 'jax' in sys.modules, 'gymnasium' in sys.modules, time.process_time() - start)"
    )
    attempts = [python("-c", asks) for _ in range(3)]  # processor time, and the best: the machine may be busy
    code, jax, gymnasium, seconds = min((a.stdout.split()[-4:] for a in attempts), key=lambda x: float(x[-1]))
    assert (code, jax, gymnasium) == ("0", "False", "False")
    assert float(seconds) < 0.5
    assert all(command in attempts[0].stdout for command in COMMANDS)


def test_compiled_code_is_kept_where_the_user_keeps_such_things(tmp_path: Path) -> None:
    asks = (
        "import os; from mve.cli import main; main(['list']); print(os.environ['JAX_COMPILATION_CACHE_DIR'])"
    )
    given = {"XDG_CACHE_HOME": str(tmp_path)}
    assert python("-c", asks, **given).stdout.splitlines()[-1] == str(tmp_path / "mve" / "jax")
    told = python("-c", asks, **given, JAX_COMPILATION_CACHE_DIR="elsewhere")
    assert told.stdout.splitlines()[-1] == "elsewhere"


def test_no_command_at_all_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert "usage: mve" in capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    assert f"usage: mve {command}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("trian Pendulum-v1", "mve: unknown command 'trian'; did you mean `mve train`?"),
        (
            "xyz",
            "mve: unknown command 'xyz'; there are train, eval, resume, plot, compare, diagnose, check, "
            "list, settings, doctor",
        ),
        ("train", "mve: train needs ENV; see `mve train --help`"),
        ("eval", "mve: eval needs RUN; see `mve eval --help`"),
        (
            "train Pendulum-v1 --stesp 4",
            "mve: unrecognized options: --stesp, 4; did you mean --steps?; see `mve train --help`",
        ),
        ("train Pendulum-v1 --steps x", "mve: --steps: 'x' is not a whole number; see `mve train --help`"),
        ("eval run --episodes 3.5", "mve: --episodes: '3.5' is not a whole number; see `mve eval --help`"),
        ("plot", "mve: plot: no run folder is given; see `mve plot --help`"),
    ],
)
def test_a_command_line_that_cannot_be_read_is_one_line(
    argv: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert refused(capsys, *argv.split()) == message


def test_what_tyro_says_is_one_line_in_any_encoding() -> None:
    for encoding in ("utf-8", "ascii"):
        asks = "from mve.cli import main; print(main(['train', 'Pendulum-v1', '--seed', 'x']))"
        done = python("-X", "utf8=0", "-c", asks, PYTHONIOENCODING=encoding)
        assert done.stderr == "mve: --seed: 'x' is not a whole number; see `mve train --help`\n"
        assert done.stdout == "2\n"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("train Pendulum-v11", ["Pendulum-v11", "Pendulum-v1"]),
        ("train Pendulm-v1", ["unknown environment 'Pendulm-v1'", "nearest: Pendulum-v1"]),
        ("train CartPole-v1 --algo sac", ["CartPole-v1 has 2 discrete actions", "use --algo mve-dqn"]),
        ("train Pendulum-v1 --algo dqn", ["Pendulum-v1 has 1 continuous action, ", "use --algo mve-svg"]),
        ("train FrozenLake-v1", ["FrozenLake-v1", "observation space"]),
        ("train Pendulum-v1 --algo mve-sca", ["unknown algorithm 'mve-sca'", "nearest: mve-sac"]),
        ("train Pendulum-v1 --set dynamics.membres=3", ["dynamics.membres", "nearest: members"]),
        ("train Pendulum-v1 --set dynamics.members=lots", ["dynamics.members", "lots"]),
        ("train Pendulum-v1 --set dynamics.members", ["dynamics.members", "section.field=value"]),
        ("train Pendulum-v1 --steps 0", ["--steps 0", "1 or more"]),
        ("train Pendulum-v1 --seed -1", ["seed -1"]),
        ("train Pendulum-v1 --reward rewards.py", ["--reward rewards.py", "FILE:FUNC"]),
        ("train Pendulum-v1 --reward nowhere.py:reward", ["there is no file nowhere.py"]),
        ("eval nowhere", ["nowhere is not a run folder", "there is no such folder"]),
        ("eval .", ["not a run folder", "config.json"]),
        ("eval nowhere --episodes 0", ["--episodes 0", "1 or more"]),
        ("resume nowhere", ["nowhere is not a run folder"]),
        ("plot nowhere", ["nowhere is not a run folder"]),
    ],
)
def test_bad_input_is_one_clear_line_and_writes_nothing(
    argv: str,
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    message = refused(capsys, *argv.split())
    for word in words:
        assert word in message
    assert list(tmp_path.iterdir()) == []


def test_a_function_that_is_not_there_or_not_one_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.py"
    file.write_text("number = 1\n")
    where = f"--reward {file}"
    assert refused(capsys, "train", "Pendulum-v1", "--reward", f"{file}:absent") == (
        f"mve: {where}:absent: absent is not there"
    )
    assert refused(capsys, "train", "Pendulum-v1", "--reward", f"{file}:number") == (
        f"mve: {where}:number: number is not a function"
    )
    assert [p.name for p in tmp_path.iterdir()] == ["mine.py"]


# A run from beginning to end


def test_train_leaves_a_whole_run_folder(run: Path) -> None:
    names = {"config.json", "versions.json", "metrics.jsonl", "evaluations.csv", "curve.png", "checkpoints"}
    assert {p.name for p in run.iterdir()} == names
    config = json.loads((run / "config.json").read_text())
    assert config["env"]["id"] == "Pendulum-v1"
    assert config["train"]["total_steps"] == 320
    # Both --set flags count.
    assert (config["agent"]["hidden"], config["targets"]["discount"]) == ([16], 0.9)
    assert set(log.read_evaluations(run)["step"]) == {160, 320}
    assert len(log.read_metrics(run)["time/total_timesteps"]) > 0


def test_train_ends_by_saying_what_came_of_it(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def learn(self: Learner, steps: int | None = None) -> Learner:
        self.folder = run
        return self

    monkeypatch.setattr(Learner, "learn", learn)
    assert train_tiny(Path("other"), "--steps", "320") == 0
    first, second, third = capsys.readouterr().out.splitlines()
    returns = log.read_evaluations(run)["return"][-2:]
    assert first.startswith(f"evaluation   {returns.mean():.1f} ± {returns.std():.1f}   (2 episodes, ")
    assert second.split() == ["run", "folder", "run"]
    assert third.split() == ["curve", "run/curve.png"]


def test_eval_prints_the_same_numbers_in_words_and_as_json(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", "run", "--episodes", "3", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert main(["eval", "run", "--episodes", "3"]) == 0
    assert capsys.readouterr().out.startswith(f"evaluation   {facts['mean_reward']:.1f} ± ")
    assert list(facts) == [
        *("env", "algo", "step", "episodes", "mean_reward", "std_reward", "returns", "lengths")
    ]
    assert (facts["env"], facts["step"], facts["lengths"]) == ("Pendulum-v1", 320, [200] * 3)
    assert facts["mean_reward"] == pytest.approx(np.mean(facts["returns"]))
    assert main(["eval", "run", "--episodes", "1", "--json", "--best"]) == 0
    assert json.loads(capsys.readouterr().out)["step"] == 320


def test_eval_changes_nothing_in_the_run_folder(run: Path) -> None:
    def contents() -> dict[str, Any]:
        return {str(p): p.read_bytes() for p in run.rglob("*") if p.is_file()}

    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"time/total_timesteps": 400}\n')  # a run that is still going on, past its checkpoint
    before = contents()
    assert main(["eval", "run", "--episodes", "1"]) == 0
    assert contents() == before


def test_resume_goes_on_where_the_run_stopped(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = log.read_evaluations(run)
    assert refused(capsys, "resume", "run").startswith("mve: run has had all of its 320 steps; --steps N")
    assert main(["resume", "run", "--steps", "160"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("evaluation   ")
    assert err.startswith("Pendulum-v1 with mve-sac: ")
    assert "step 480/480  evaluation " in err
    after = log.read_evaluations(run)
    np.testing.assert_array_equal(after["step"], [160, 160, 320, 320, 480, 480])
    np.testing.assert_array_equal(after["return"][:4], before["return"])


def test_a_run_is_not_trained_over(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(capsys, "train", "Pendulum-v1", "--algo", "mve-sac", "--run-dir", "run", "--set", *TINY)
    assert "already holds a run" in message


def test_an_interrupted_training_says_how_to_go_on(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(self: Learner, steps: int | None = None) -> Learner:
        raise KeyboardInterrupt

    monkeypatch.setattr(Learner, "learn", interrupted)
    assert main(["resume", "run", "--steps", "10"]) == 130
    out, err = capsys.readouterr()
    assert out == ""
    assert "mve resume run" in err
    assert "Traceback" not in err


@pytest.mark.filterwarnings("default")
def test_a_damaged_checkpoint_is_one_line_too(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One for each of the two that are kept, the newest first."""
    for file in run.rglob("state.safetensors"):
        file.write_bytes(b"")
    assert main(["eval", "run"]) == 2
    *damaged, last = capsys.readouterr().err.splitlines()
    for step, line in zip((320, 160), damaged, strict=True):
        assert line.startswith(f"mve: warning: run/checkpoints/step_{step:012} is damaged")
    assert last.startswith("mve: no usable checkpoint in run/checkpoints")


def test_your_own_reward_function_is_used_and_asked_for_again(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("mine.py").write_text("def reward(obs, action, next_obs):\n    return 0.0 * next_obs[..., 0]\n")
    facts = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**facts, "user_functions": ["reward"]}))
    assert "--reward FILE:FUNC" in refused(capsys, "eval", "run")
    assert main(["eval", "run", "--episodes", "1", "--reward", "mine.py:reward"]) == 0


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_signal_saves_and_the_run_goes_on(
    number: str,
    code: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    argv = [sys.executable, "-m", "mve", "train", "Pendulum-v1", "--algo", "mve-sac"]
    argv += ["--run-dir", "run", "--steps", "100000"]
    training = subprocess.Popen([*argv, "--set", *TINY], stderr=subprocess.PIPE, text=True)
    assert training.stderr is not None
    training.stderr.readline()  # what the run is
    training.stderr.readline()  # and needs
    training.stderr.readline()  # the first evaluation
    time.sleep(1)
    assert "is being written by process" in refused(capsys, "resume", "run")
    training.send_signal(getattr(signal, number))
    _, err = training.communicate(timeout=60)
    assert training.returncode == code
    assert "Traceback" not in err
    assert "mve resume run" in err
    assert main(["resume", "run", "--steps", "20", "--quiet"]) == 0


@pytest.mark.slow
def test_several_seeds_train_and_resume_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    argv = [
        "train",
        "Pendulum-v1",
        "--algo",
        "mve-sac",
        "--run-dir",
        "run",
        "--steps",
        "200",
        "--seeds",
        "0..1",
    ]
    assert main([*argv, "--set", *TINY]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("evaluation   ")
    assert "(2 seeds, " in out
    assert "; 2 seeds" in err.splitlines()[0]
    assert err.splitlines()[1].startswith("memory: ")
    assert {path.name for path in Path("run").iterdir()} == {"seed-0", "seed-1", "curve.png"}
    assert "already holds a run" in refused(capsys, *argv)
    assert "has had all of its 200 steps" in refused(capsys, "resume", "run")
    assert main(["resume", "run", "--steps", "40", "--quiet"]) == 0
    for seed in ("seed-0", "seed-1"):
        assert set(log.read_evaluations(Path("run") / seed)["step"]) == {160, 200, 240}
    assert main(["resume", "run/seed-1", "--steps", "20", "--quiet"]) == 0
    assert "stand at different steps" in refused(capsys, "resume", "run", "--steps", "20")


# An environment that fails, and one run by two


FAILING = """
import gymnasium as gym, numpy as np
from gymnasium.spaces import Box

class Failing(gym.Env):
    observation_space, action_space = Box(-1.0, 1.0, (2,)), Box(-1.0, 1.0, (1,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(2, np.float32), {}

    def step(self, action):
        raise OSError("the robot does not answer")

gym.register("Failing-v0", "failing_env:Failing")
"""


def test_an_environment_that_fails_is_one_line_and_a_code_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "failing_env.py").write_text(FAILING)
    monkeypatch.syspath_prepend(tmp_path)
    argv = ["train", "failing_env:Failing-v0", "--algo", "sac", "--run-dir", str(tmp_path / "run"), "--quiet"]
    assert main([*argv, "--set", "agent.hidden=[16]", "train.total_steps=2000"]) == 4
    said = capsys.readouterr().err.splitlines()
    assert said[-1].startswith(
        "mve: Failing-v0, seed 0: at step 1, step 1 of episode 0, it raised OSError: the"
    )
    assert "Traceback" not in " ".join(said)


# Whatever is typed

WORDS = st.one_of(
    st.text(max_size=12),
    st.sampled_from(
        [
            *("train", "resume", "eval", "plot", "Pendulum-v1", "CartPole-v1", "--algo", "--seed", "--seeds"),
            *("--steps", "--set", "--run-dir", "--reward", "--quiet", "--help", "0..3", "3..1", "-1", "1e9"),
            *(
                "nan",
                "env.timeout=x",
                "env.on_fault=never",
                "train.total_steps=-1",
                "agent.hidden=[0]",
                "=",
                "a.b=",
            ),
            *(
                "targets.discount=2",
                "env.kwargs={}",
                'env.kwargs={"g": "x"}',
                "mine.py:reward",
                "\x00",
                "[]",
                "--",
            ),
        ]
    ),
)


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(words=st.lists(WORDS, max_size=5), command=st.sampled_from([*COMMANDS, ""]))
def test_whatever_is_typed_is_answered_in_one_line(words: list[str], command: str) -> None:
    """Nothing is trained: what could be is stopped where it would begin."""
    argv = [*([command] if command else []), *words]
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.chdir(folder)
        patch.setattr("mve.commands.training._learn", lambda *_: 0)
        patch.setattr("mve.commands.training._learn_together", lambda *_: 0)
        for begins in ("check.check", "doctor.examine"):
            patch.setattr(f"mve.{begins}", refuses)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(argv)
        assert code in (0, 2)
        if code == 2:
            assert err.getvalue().startswith("mve: ")
            assert err.getvalue().count("\n") == 1
        assert os.listdir(folder) == []


def refuses(*_: Any, **__: Any) -> Any:
    raise UserError("not here")


# Discrete actions


@pytest.mark.slow
def test_every_command_works_on_a_task_with_discrete_actions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", "CartPole-v1", "--run-dir", "run", "--steps", "240", "--set", *TINY]) == 0
    out, err = capsys.readouterr()
    assert err.startswith("CartPole-v1 with mve-dqn: 4 observations, 2 discrete actions, 240 steps; H = 2")
    assert out.startswith("evaluation   ")
    assert main(["eval", "run", "--episodes", "3", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["returns"] == facts["lengths"]  # a reward of 1 for each step
    assert main(["resume", "run", "--steps", "40", "--quiet"]) == 0
    assert main(["plot", "run", "--output", "curve.png"]) == 0
    assert main(["diagnose", "run", "--episodes", "2"]) == 0
    assert Path("run/diagnosis/diagnosis.png").read_bytes().startswith(b"\x89PNG")


def test_functions_of_a_discrete_action_are_checked_with_its_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["check", "CartPole-v1", "--steps", "300"]) == 0
    assert "agrees with every reward observed" in capsys.readouterr().out
    Path("mine.py").write_text(
        "def reward(obs, action, next_obs):\n    return (action == 1).astype('float32')\n"
    )
    assert main(["check", "CartPole-v1", "--steps", "300", "--reward", "mine.py:reward", "--json"]) == 1
    [score] = json.loads(capsys.readouterr().out)["scores"]
    assert [row["action"] for row in score["worst"]] == [0] * 5  # where it says 0 and 1 is paid


# Pictures, lists and the doctor


def test_plot_draws_the_runs_and_prints_where(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plot", "run", "run", "--output", "both.png"]) == 0
    assert capsys.readouterr().out == "both.png\n"
    assert Path("both.png").read_bytes().startswith(b"\x89PNG")
    assert "cannot draw both.nonsense" in refused(capsys, "plot", "run", "--output", "both.nonsense")
    assert "cannot draw absent/a.png" in refused(capsys, "plot", "run", "--output", "absent/a.png")


def test_list_shows_every_preset(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in PRESETS)
    assert main(["list", "--json"]) == 0
    full = json.loads(capsys.readouterr().out)
    assert list(full) == list(PRESETS)
    assert full["paper"]["settings"]["targets.horizon_steps"] == 10


def test_the_doctor_finds_this_machine_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["doctor", "--json"]) == 0
    out, err = capfd.readouterr()
    findings = {finding["check"]: finding for finding in json.loads(out)}
    assert err == ""
    assert {"python", "jax", "devices", "matmul precision", "matplotlib", "HalfCheetah-v5"} <= set(findings)
    assert all(finding["status"] in ("ok", "warn") for finding in findings.values())
    assert os.listdir(tmp_path) == []


def test_the_doctor_fails_when_something_does(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("gymnasium.make", lambda name: 1 / 0)
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "fail" in out
    assert "ZeroDivisionError" in out


@pytest.mark.parametrize(
    ("kind", "flags", "hinted"),
    [("gpu", "", True), ("gpu", "--xla_gpu_autotune_level=0", False), ("cpu", "", False)],
)
def test_the_doctor_knows_what_a_gpu_compiles_sooner_by(
    kind: str, flags: str, hinted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions = log.versions() | {"devices": [{"platform": kind, "kind": "A device"}]}
    monkeypatch.setattr("mve.log.versions", lambda: versions)
    monkeypatch.setenv("XLA_FLAGS", flags)
    [found] = [f for f in doctor.examine() if f.check == "devices"]
    assert (doctor.COMPILES_SOON in found.detail) == hinted


def test_the_doctor_reports_even_a_jax_without_devices(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def nothing() -> NoReturn:
        raise AssertionError

    monkeypatch.setattr("jax.devices", nothing)
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    assert main(["doctor", "--json"]) == 1
    findings = {finding["check"]: finding for finding in json.loads(capsys.readouterr().out)}
    assert findings["versions"]["detail"].startswith(
        "JAX has no device to compute on; JAX_PLATFORMS=cuda asks"
    )
    assert findings["matplotlib"]["status"] == "ok"
    assert main(["train", "Pendulum-v1"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("mve: JAX has no device")


def test_a_reader_that_goes_away_is_no_error() -> None:
    piped = f"{sys.executable} -m mve list --json | head -1"
    done = subprocess.run(piped, shell=True, capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr) == ("{\n", "")
