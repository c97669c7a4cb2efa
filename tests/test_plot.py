"""Learning curves: what is read of a run folder, and that a picture comes of it, however little there is."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mve import log, plot


def write_run(
    folder: Path, task: str, algo: str, seed: int, model: bool, points: int = 3, horizon: int = 3
) -> Path:
    with log.RunLog(folder) as records:
        for step in range(1, points + 1):
            errors = {f"model/mse_k{k}": k / step for k in (1, 3)} if model else {}
            records.record(step, {"train/critic_loss": 1.0, **errors})
            records.evaluation(step, [float(step), step + 2.0], [5, 5])
    targets = {"estimator": "mve_tdk" if model else "one_step", "horizon_steps": horizon}
    facts = {"algo": algo, "seed": seed, "env": {"id": task}, "task": task, "targets": targets}
    log.write_json(folder / "config.json", facts)
    return folder


def is_png(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000


def test_a_curve_is_drawn_of_one_of_many_and_of_almost_nothing(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / f"a{seed}", "A-v0", "mve", seed, model=True) for seed in range(2)]
    runs += [write_run(tmp_path / "b", "A-v0", "base", 0, model=False)]
    other = write_run(tmp_path / "c", "B-v0", "base", 0, model=False)
    for chosen in ([runs[0]], runs, [*runs, other], [other]):
        assert is_png(plot.curve(chosen, tmp_path / "picture.png"))
    for points in (0, 1):
        short = write_run(tmp_path / f"short{points}", "A-v0", "mve", 0, model=True, points=points)
        assert is_png(plot.curve([short], tmp_path / "picture.png"))
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_a_run_is_read_as_mean_and_range_over_episodes(tmp_path: Path) -> None:
    run = plot.read_run(write_run(tmp_path, "A-v0", "mve", 7, model=True))
    assert (run.task, run.algo, run.seed, run.episodes) == ("A-v0", "mve", 7, 2)
    np.testing.assert_array_equal(run.mean, [2.0, 3.0, 4.0])
    np.testing.assert_array_equal(run.low, [1.0, 2.0, 3.0])
    np.testing.assert_array_equal(run.errors[3][1], [3.0, 1.5, 1.0])


def test_horizons_of_one_algorithm_are_told_apart(tmp_path: Path) -> None:
    runs = [
        plot.read_run(write_run(tmp_path / f"{h}", "A-v0", "mve", 0, model=True, horizon=h)) for h in (0, 3)
    ]
    assert [run.algo for run in plot.told_apart(runs)] == ["mve, H = 0", "mve, H = 3"]
    assert [run.algo for run in plot.told_apart(runs[:1])] == ["mve"]


def test_the_mean_over_seeds_covers_only_what_all_of_them_measured() -> None:
    first = (np.array([0, 10, 20]), np.array([0.0, 10.0, 20.0]))
    second = (np.array([5, 15, 40]), np.array([0.0, 0.0, 0.0]))
    step, mean = plot.mean_curve([first, second])
    np.testing.assert_array_equal(step, [5, 10, 15, 20])
    np.testing.assert_allclose(mean, [2.5, 5.0, 7.5, 10.0])
