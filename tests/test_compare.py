"""Tables and pictures over seeds, on curves worked by hand."""

from __future__ import annotations

import math
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from test_plot import write_run

from mve import cli, compare
from mve.compare import Curve
from mve.types import UserError


def curve(algo: str, seed: int, *values: float, env: str = "Task-v1") -> Curve:
    step = 1000.0 * np.arange(1, len(values) + 1)
    return Curve("gym", env, algo, str(seed), "here", step, np.array(values))


def test_the_interquartile_mean_drops_a_quarter_at_either_end() -> None:
    values = np.array([1000.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, -1000.0])
    assert compare.iqm(values) == (2 + 3 + 4 + 5) / 4
    assert compare.iqm(np.array([1.0, 2.0, 6.0])) == 3.0  # a quarter of three is none


def test_the_interval_is_that_of_a_naive_bootstrap() -> None:
    values = np.random.default_rng(0).normal(size=8)
    rng = np.random.default_rng(1)
    naive = [np.sort(rng.choice(values, 8))[2:6].mean() for _ in range(20_000)]
    low, high = compare.interval(values)
    assert (low, high) == pytest.approx(tuple(np.percentile(naive, [2.5, 97.5])), abs=0.05)
    assert (low, high) == compare.interval(values)
    assert all(math.isnan(x) for x in compare.interval(values[:1]))


def test_a_score_is_interpolated_and_leaves_out_seeds_that_have_not_come_so_far() -> None:
    curves = [curve("a", 0, 0.0, 10.0), curve("a", 1, 4.0, 6.0), curve("a", 2, 100.0)]
    found = compare.score(curves, 1500.0)
    assert found is not None
    assert sorted(found.values) == [5.0, 5.0]
    assert compare.score(curves, 5000.0) is None


def test_the_table_has_a_row_for_each_task_step_and_algorithm() -> None:
    curves = [curve("a", seed, 0.0, float(seed)) for seed in range(4)]
    curves += [curve("b", 0, 7.0, 9.0), curve("a", 0, 1.0, env="Other-v1")]
    rows = compare.table(curves, [2000])
    assert [row[:4] for row in rows] == [("Task-v1", "a", "2 k", "4"), ("Task-v1", "b", "2 k", "1")]
    assert rows[0][4].startswith("1.5 [")  # the mean of 1 and 2
    assert rows[0][7] == "0 1 2 3"
    assert compare.common_steps(curves) == [1000, 2000]


def test_what_lies_between_is_marked_and_across_a_wide_gap_nothing_is_said() -> None:
    far, near = (
        Curve("gym", "Task-v1", name, "0", "here", np.array(step, np.float64), np.array(value, np.float64))
        for name, step, value in (("far", (0, 10_000), (0, 500)), ("near", (0, 1010, 2000), (0, 101, 400)))
    )
    cells = {row[1]: row[4] for row in compare.table([far, near], [1000])}
    assert cells == {"near": "100"}  # at 1010, as good as there
    cells = {(row[1], row[2]): row[4] for row in compare.table([far, near], [1500, 6000, 10_000])}
    assert cells == {("near", "1.5 k"): f"~{101 + 299 * 490 / 990:.0f}", ("far", "10 k"): "500"}


def test_small_returns_keep_their_digits(tmp_path: Path) -> None:
    curves = [curve("a", seed, 0.2 + 0.0512 * seed) for seed in range(3)]
    [row] = compare.table(curves, [1000])
    assert row[4:] == ("0.251 [0.2, 0.302]", "0.251", "0.251", "0.2 0.251 0.302")
    again, _ = compare.read([compare.write_csv(curves[1:], tmp_path / "a.csv")])
    np.testing.assert_array_equal(again.value, [0.2512])


def test_a_seed_counts_once_and_own_runs_are_not_mixed_with_published_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own, old = tmp_path / "own.csv", tmp_path / "old.csv"
    compare.write_csv([curve("a", 0, 100.0), curve("a", 1, 300.0)], own)
    compare.write_csv([curve("a", 0, 700.0)], old)
    assert cli.main(["compare", str(own), "--against", str(old)]) == 0
    rows = capsys.readouterr().out.splitlines()[1:]
    assert [("published" in row, row.split()[-1]) for row in rows] == [(False, "300"), (True, "700")]
    assert cli.main(["compare", str(own), str(old)]) == 2
    assert "seed 0 of a on Task-v1 is there twice" in capsys.readouterr().err
    assert cli.main(["compare", str(own), f"old={old}"]) == 0


def test_a_task_that_is_almost_the_same_stands_beside_it_under_its_own_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own, old = tmp_path / "own.csv", tmp_path / "old.csv"
    compare.write_csv([curve("a", 0, 100.0)], own)
    theirs = [curve("b", 0, 300.0), curve("c", 0, 500.0)]
    compare.write_csv([each._replace(env="Task-v1-short") for each in theirs], old)
    asked = ["compare", str(own), "--against", str(old), "--only", "b"]
    assert cli.main(asked) == 0
    assert "Task-v1-short" not in capsys.readouterr().out
    assert cli.main([*asked, "--alike", "Task-v1-short=Task-v1"]) == 0
    rows = capsys.readouterr().out.splitlines()[1:]
    assert [row.split("  ")[0] for row in rows] == ["Task-v1", "Task-v1"]
    assert "b (Task-v1-short)" in rows[1]
    assert rows[1].split()[-1] == "300"
    [moved] = compare.beside([theirs[0]._replace(env="T")], ["dmc/T"], alike=["T=dmc/T"])
    assert (moved.suite, moved.env, moved.algo) == ("dmc", "T", "b (T)")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["own.csv", "--only", "b"], "--only b is not published there; none is"),
        (["own.csv", "--against", "own.csv", "--only", "b"], "--only b is not published there; a is"),
        (["own.csv", "--against", "own.csv", "--alike", "T=Task-v1"], "--alike T=Task-v1: it has to be"),
        (["own.csv", "--against", "own.csv", "--alike", "Task-v1"], "--alike Task-v1: it has to be"),
        (["run"], "none of these runs has been evaluated yet"),
        (["nothing"], "config.json is not a run's: it has no 'env'"),
        (["own.csv", "--csv", "."], "cannot write"),
        (["own.csv", "--output", "."], "cannot draw"),
    ],
)
def test_what_cannot_be_compared_is_said_in_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    compare.write_csv([curve("a", 0, 100.0)], Path("own.csv"))
    write_run(Path("run"), "Task-v1", "a", seed=0, model=False, points=0)
    write_run(Path("nothing"), "Task-v1", "a", seed=0, model=False)
    Path("nothing/config.json").write_text("{}")
    assert cli.main(["compare", *arguments]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert said in line


def test_curves_that_do_not_overlap_are_drawn_apart(tmp_path: Path) -> None:
    one, other = (
        Curve("gym", "T", "a", str(seed), "", np.array(step), np.ones(len(step)))
        for seed, step in enumerate(([1000.0], [5000.0, 10_000.0]))
    )
    assert compare.picture([one, other], [], tmp_path / "a.png").stat().st_size > 5000
    assert compare.picture([one], [other], tmp_path / "b.png", last=500).stat().st_size > 5000


def test_algorithms_are_held_against_one_by_hand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ours = [curve("a", seed, value) for seed, value in enumerate((1.0, 4.0, 5.0))]
    theirs = [curve("b", seed, value) for seed, value in enumerate((2.0, 3.0, 4.0))]
    # Of nine pairs a is above in 3 + 2 and level in 1: 4 over 2 and 3, level with 4; 5 over all.
    row = ("Task-v1", "a", "1 k", "3, 3", f"{5.5 / 9:.2f}")
    [found] = compare.held_against("b", [*ours, *theirs], [1000])
    assert found[:-1] == row
    assert compare.held_against("b", [*ours, *theirs], [9000]) == []
    apart = [each._replace(value=each.value + 10) for each in ours]
    [best] = compare.held_against("b", [*apart, *theirs], [1000])
    assert best[-2:] == ("1.00", "0.1")  # two of the twenty orders of three and three
    path = compare.write_csv([*ours, *(c._replace(algo="b (near)") for c in theirs)], tmp_path / "a.csv")
    assert cli.main(["compare", str(path), "--over", "b"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].split()[:5] == ["Task-v1", "a", "1", "k", "3,"]
    assert cli.main(["compare", str(path), "--over", "c"]) == 2
    assert "--over c is not among what is compared: a, b (near)" in capsys.readouterr().err


def test_many_tasks_are_drawn_in_rows(tmp_path: Path) -> None:
    one = curve("a", 0, 1.0, 2.0)
    row, rows = (
        matplotlib.image.imread(
            compare.picture([one._replace(env=f"T{i}") for i in range(n)], [], tmp_path / f"{n}.png")
        )
        for n in (compare.ACROSS, compare.ACROSS + 2)
    )
    assert rows.shape[1] == row.shape[1]
    assert rows.shape[0] == 2 * row.shape[0]


def test_what_is_written_is_read_again_and_drawn(tmp_path: Path) -> None:
    curves = [curve("a", seed, 1.0, 2.5, float(seed)) for seed in range(3)]
    path = compare.write_csv(curves, tmp_path / "a.csv")
    assert path.read_text().splitlines()[:2] == [
        "suite,env,algo,seed,step,return,source",
        "gym,Task-v1,a,0,1000,1.00,here",
    ]
    again = compare.read([path])
    for one, other in zip(curves, again, strict=True):
        assert one[:5] == other[:5]
        np.testing.assert_array_equal(one.value, other.value)
    published = [curve("paper", 0, 5.0, 6.0)._replace(seed="mean")]
    compare.write_csv(published, tmp_path / "p.csv")
    arguments = ["compare", str(path), "--against", str(tmp_path / "p.csv"), "--at", "2000"]
    assert cli.main([*arguments, "--output", str(tmp_path / "a.png")]) == 0
    assert (tmp_path / "a.png").stat().st_size > 10_000


def test_curves_may_be_given_a_name(tmp_path: Path) -> None:
    path = compare.write_csv([curve("a", 0, 1.0), curve("b", 0, 2.0)], tmp_path / "a.csv")
    with_equals = compare.write_csv([curve("c", 0, 1.0)], tmp_path / "x=1.csv")
    places = [f"wider nets={path}", str(path), str(with_equals)]
    assert [c.algo for c in compare.read_named(places)] == ["wider nets"] * 2 + ["a", "b", "c"]
    with pytest.raises(UserError, match="nowhere"):
        compare.read_named([f"x={tmp_path}/nowhere"])


def test_seeds_are_found_however_they_were_trained(tmp_path: Path) -> None:
    """One by one, side by side, or both, by the folder of the algorithm, of the seeds, or of one of them."""
    places = ["seed-10", "seed-9", "seeds-0-1/seed-0", "seeds-0-1/seed-1"]
    runs = [tmp_path / place for place in places]
    for run, seed in zip(runs, (10, 9, 0, 1), strict=True):
        write_run(run, "A-v0", "mve", seed, model=False)
    for folder, seeds in ((tmp_path, "9 10 0 1"), (tmp_path / "seeds-0-1", "0 1"), (runs[0], "10")):
        assert " ".join(c.seed for c in compare.read([folder])) == seeds
    picture = tmp_path / "all.png"
    assert cli.main(["plot", *map(str, tmp_path.iterdir()), "--output", str(picture)]) == 0
    assert picture.stat().st_size > 10_000
    with pytest.raises(UserError, match="is not a run folder"):
        compare.read([tmp_path / "nowhere"])


def test_a_file_of_another_form_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("env,step\nTask-v1,3\n")
    with pytest.raises(UserError, match="no column suite, algo"):
        compare.read([tmp_path / "x.csv"])
    text = "suite,env,algo,seed,step,return,source\ngym,Task-v1,a,0,many,1,x\n"
    (tmp_path / "x.csv").write_text(text)
    with pytest.raises(UserError, match="cannot read"):
        compare.read([tmp_path / "x.csv"])
    text = "suite,env,algo,seed,step,return,source\ngym,Task-v1,a,0,100,nan,x\n"
    (tmp_path / "x.csv").write_text(text)
    with pytest.raises(UserError, match=r"cannot read .*x.csv: line 2: a return of nan; leave the row out"):
        compare.read([tmp_path / "x.csv"])
    assert cli.main(["compare", str(tmp_path / "nowhere")]) == 2
    assert cli.main(["compare"]) == 2


def test_tasks_of_one_name_and_two_suites_are_two() -> None:
    here, there = curve("a", 0, 1.0), curve("a", 0, 9.0)._replace(suite="jax")
    compare.refuse_twice([here, there])
    rows = compare.table([here, there], [1000])
    assert [(row[0], row[3], row[4]) for row in rows] == [("Task-v1", "1", "1"), ("jax/Task-v1", "1", "9")]
