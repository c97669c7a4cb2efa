"""The speed benchmarks' arithmetic and tables, on canned samples: nothing is installed, nothing is timed."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mve import replay
from mve.checkpoint import steps as saved_steps
from mve.config import build
from mve.learner import Learner
from mve.types import UserError

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"

Loaded = dict[str, ModuleType]


@pytest.fixture(scope="module")
def bench() -> Iterator[Loaded]:
    """The modules by name. They find each other beside the script, which is on no path but its own."""
    names = (
        "report",
        "bars",
        "critic_fit",
        "device_profile",
        "efficiency",
        "model_fit",
        "pages",
        "paper",
        "products",
        "workers",
        "machine",
        "venvs",
    )
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield {name: importlib.import_module(name) for name in names}
    finally:
        sys.path.remove(str(BENCHMARKS))
        for name in names:
            sys.modules.pop(name, None)


def sample(seconds: float, **amounts: float) -> dict[str, float]:
    spent = {"cpu_seconds": 0.5 * seconds, "wait_seconds": 0.25 * seconds, "peak_rss_mb": 300.0}
    return {"seconds": seconds, **spent, "idle_seconds": 10.0, "idle_cpu_seconds": 0.01, **amounts}


def group(per: str, rates: dict[str, list[float]], **more: Any) -> dict[str, Any]:
    arms = {name: {"samples": [sample(2.0, **{per: 2.0 * r}) for r in rs]} for name, rs in rates.items()}
    return {"title": "A race", "per": per, "baseline": next(iter(rates)), "arms": arms, "missing": {}, **more}


def section(**content: Any) -> dict[str, Any]:
    busy = {"load_average_1min": 0.1, "cores": 2, "cpu": "a CPU", "someone_waited_percent_1min": None}
    return {"taken": "today", "machine": busy, **content}


def test_a_rate_is_told_as_its_median_and_range_and_a_ratio_is_one_of_medians(bench: Loaded) -> None:
    race = group("updates", {"ours": [30.0, 10.0, 20.0], "theirs": [5.0, 4.0, 100.0]})
    assert bench["report"].spread(bench["report"].rates(race["arms"]["ours"], "updates")) == (
        20.0,
        10.0,
        30.0,
    )
    assert bench["report"].ratio(race, "ours", "theirs") == 4.0
    assert bench["report"].per_core_second(race, "ours") == 40.0
    text = bench["report"].group_text(race)
    assert "20.0 [10.0 .. 30.0]" in text
    cells = [cell.strip() for cell in text.splitlines()[-1].split("|")[1:-1]]
    assert cells == ["theirs", "5.00 [4.00 .. 100]", "4.00 x", "10.0", "3", "0.50", "0.25", "0.001", "300"]


@pytest.mark.parametrize(
    ("x", "text"), [(0, "0"), (0.1234, "0.123"), (1.234, "1.23"), (12.34, "12.3"), (1234567.8, "1 234 568")]
)
def test_numbers_have_three_digits(bench: Loaded, x: float, text: str) -> None:
    assert bench["report"].number(x) == text


def test_prefixes_leave_one_to_three_digits_before_the_point(bench: Loaded) -> None:
    assert [bench["report"].scaled(x, "B") for x in (5, 1500, 2.5e9)] == ["5.00 B", "1.50 kB", "2.50 GB"]


def test_a_missing_peer_is_named_with_its_reason_and_leaves_the_others_numbers(bench: Loaded) -> None:
    race = group("env_steps", {"mve": [200.0], "sb3": [100.0]}, missing={"sbx": "no such release"})
    text = bench["pages"].section_text("peers", section(groups=[race], versions={"sb3": {"torch": "2"}}))
    assert "2.00 x" in text
    assert "not measured" in text
    assert "sbx (no such release)" in text
    alone = group("env_steps", {"sb3": [100.0]}, missing={"mve": "broken"}) | {"baseline": "mve"}
    assert "mve (broken)" in bench["pages"].section_text("peers", section(groups=[alone], versions={}))


def test_the_expansions_cost_is_measured_over_counted(bench: Loaded) -> None:
    race = group("updates", {"sac": [100.0], "H = 3": [25.0]})
    race["arms"]["sac"]["facts"] = {"flops_hand": 5e8, "flops_xla": 6e8}
    race["arms"]["H = 3"] |= {"facts": {"flops_hand": 1e9, "flops_xla": 1.2e9}, "at": 3}
    base, expanded = bench["report"].costs(race)
    assert (base.measured, base.beyond_xla) == (1.0, 1.0)
    assert (expanded.measured, expanded.by_hand, expanded.by_xla, expanded.beyond_xla) == (4.0, 2.0, 2.0, 2.0)
    (point,) = bench["report"].curve([race])
    assert (point["at"], point["measured"]) == (3, 4.0)
    assert "4.00" in bench["pages"].section_text("expansion", section(groups=[race], curves={}))
    race["baseline"] = "gone"
    assert bench["report"].costs(race) == []


def test_every_section_is_told_and_what_was_not_measured_is_told_as_well(bench: Loaded) -> None:
    seeds = group("updates", {"together": [30.0], "one after the other": [20.0]})
    roof = group("updates", {"update": [50.0], "its matrix products alone": [100.0]}) | {
        "facts": {"flops_hand": 2e9}
    }
    starts = [{"first_step": 3.0, "first_learned": 9.0, "peak_rss_mb": 400.0}]
    sections = {
        "machine": section(gemm={"jax": {"gflops_median": 90.0, "gflops_best": 95.0}}, versions={"jax": "1"}),
        "seeds": section(groups=[seeds]),
        "roofline": section(groups=[roof]),
        "mbpo": section(skipped="no preset"),
        "startup": section(startup={"cold": starts, "warm": starts}, groups=[]),
        "peers": section(failed="no pip"),
    }
    text = bench["pages"].as_text(json.loads(json.dumps({"sections": sections})))
    for expected in ("1.50 x", "| 100 ", "0.50", "9.00", "no preset", "no pip", "jax 1"):
        assert expected in text


def test_bars_say_what_was_reached_and_what_fell_short(bench: Loaded) -> None:
    race = group("updates", {"mve": [500.0], "sbx": [250.0], "sb3": [250.0]})
    race["title"] = "SAC, 20 updates per environment step, 2 cores"
    cost = group("updates", {"sac": [300.0], "mve-sac, H = 3": [100.0]})
    cost["title"] = "The expansion's cost, 2 cores"
    for arm, flops in zip(cost["arms"].values(), (1e9, 2.5e9), strict=True):
        arm["facts"] = {"flops_hand": flops}
    sections = {
        "machine": section(gemm={"jax 256 x 256, 1 core": {"gflops_median": 300.0}}),
        "peers": section(groups=[race]),
        "expansion": section(groups=[cost]),
        "seeds": section(failed="no"),
    }
    verdicts = [(bar.measured, bar.verdict) for bar in bench["bars"].bars(sections)]
    # 500 / 250 beside sbx and sb3; 100 against 43 x 300 / 150; three times as dear by 2.5 times the FLOPs.
    assert verdicts == [
        (2.0, "goal reached"),
        (2.0, "**short**"),
        (pytest.approx(100 / 86), "**short**"),
        (pytest.approx(1.2), "**short**"),
    ]


def test_gaps_are_what_no_operation_covers(bench: Loaded) -> None:
    def event(name: str, start: float, duration: float) -> dict[str, Any]:
        return {"ph": "X", "ts": start, "dur": duration, "name": name, "args": {"hlo_op": name}}

    # dot.1 and dot.2 overlap on two streams; a gap of 3 before the fusion, of 1 before the last dot.
    events = [event("dot.2", 2.0, 4.0), event("dot.1", 0.0, 4.0), event("fusion.7", 9.0, 1.0)]
    events += [event("while.3", 0.0, 100.0), event("dot.1", 11.0, 1.0), {"ph": "M", "name": "lane"}]
    profiled = bench["device_profile"]
    found = profiled.operations(events)
    assert [operation.name for operation in found] == ["dot.1", "dot.2", "fusion.7", "dot.1"]
    assert profiled.busy_and_gaps(found) == (8.0, [3.0, 1.0])
    facts = profiled.summary(found, updates=2)
    assert (facts["operations"], facts["busy_ms"], facts["gaps_ms"]) == (2.0, 0.004, 0.002)
    assert facts["kinds"]["dot"] == {"operations": 1.5, "ms": 0.0045}


def test_mbpo_is_put_together_from_its_parts(bench: Loaded) -> None:
    parts = [
        group(per, {"mve": [rate]})
        for per, rate in {"updates": 50.0, "fits": 25.0, "env_steps": 500.0}.items()
    ]
    due = {"updates": 10_000, "fits": 1000, "env_steps": 1000}
    made = section(groups=parts, per_1000_steps=due)
    # Half of each second was on a core: 10 000 / 100 + 1000 / 50 + 1000 / 1000.
    assert bench["report"].mbpo_core_seconds(made) == {"updates": 100.0, "fits": 20.0, "env_steps": 1.0}
    assert "8.26 environment steps per core-second" in bench["pages"].section_text("mbpo", made)


def test_the_sums_on_paper_follow_from_what_was_measured(bench: Loaded) -> None:
    sizes = {
        "transition_bytes": 100.0,
        "policy_bytes": 1000,
        "batch": 256,
        "updates_per_step": 4.0,
        "control_hz": 20.0,
    }
    updates = group("updates", {"sac": [50.0]}, sizes=sizes)
    updates["arms"]["sac"]["facts"] = {"flops_hand": 6e8}
    made = section(groups=[group("env_steps", {"mve": [500.0]}), updates])
    needs = bench["paper"].needs(bench["paper"].measured(made)["sac"], 1000)
    assert needs.env_steps_per_second == 20_000
    assert needs.env_cores == 20.0  # 1000 steps a core-second
    assert needs.written == 2e6
    assert needs.read == 80_000 * 256 * 100
    assert needs.learner_flops == 80_000 * 6e8
    assert needs.learner_cores == 800.0  # 100 updates a core-second
    assert "100 000" in bench["pages"].section_text("paper", made)


def test_figures_replace_what_lies_between_the_marks_of_the_document(bench: Loaded) -> None:
    pages = bench["pages"]
    document = f"how\n{pages.BEGIN}\nold\n{pages.END}\nend\n"
    once = pages.put_figures(document, "new")
    assert once == f"how\n{pages.BEGIN}\n\nnew\n\n{pages.END}\nend\n"
    assert pages.put_figures(once, "new") == once
    with pytest.raises(ValueError, match="figures: begin"):
        pages.put_figures("no marks", "new")
    text = (BENCHMARKS.parent / "docs" / "performance.md").read_text()
    assert pages.put_figures(text, "new").count("new\n") >= 1


def test_an_updates_products_are_those_counted_by_hand(bench: Loaded) -> None:
    products = bench["products"]
    sizes = products.Sizes(batch=2, actor=[(3, 5), (5, 4)], critic=[(5, 7), (7, 1)], critics=2, actions=2)
    actor, critic = 2 * 2 * (15 + 20), 2 * 2 * (35 + 7)  # forward
    target = actor + 2 * critic
    regression = 2 * (critic + critic + 2 * 2 * 7)  # forward, weights, inputs of the last layer
    through_critics = 2 * (critic + 2 * 2 * (2 * 7 + 7))  # forward, back to the two columns of the action
    improvement = actor + through_critics + actor + 2 * 2 * 20
    assert products.flops(products.sac_update(sizes)) == target + regression + improvement

    expanded = sizes._replace(model=[(5, 6), (6, 3)], members=2, horizon=3, regresses_imagined=True)
    step = actor + 2 * 2 * 1 * (30 + 18)  # each of two members serves one of two rows
    assert products.flops(products.sac_update(expanded)) == 3 * step + target + 4 * regression + improvement
    assert products.flops(products.sac_update(expanded._replace(horizon=0))) == products.flops(
        products.sac_update(sizes)
    )


def test_turns_are_taken_there_and_back_and_a_failure_ends_one_alone(bench: Loaded) -> None:
    workers, order = bench["workers"], []

    def ask(name: str, count: int) -> dict[str, Any]:
        order.append(name)
        if name == "b" and order.count("b") > 3:
            raise workers.WorkerFailed("worn out")
        return {"seconds": 0.01 * count, "updates": count}

    asks = {name: lambda count, name=name: ask(name, count) for name in "abc"}
    samples, failed = workers.take_turns(asks, rounds=3, seconds=1.0, first=10)
    assert failed == {"b": "worn out"}
    assert [s["updates"] for s in samples["a"]] == [100, 100, 100]
    assert "".join(order)[-7:] == "abccaac"


def test_a_worker_answers_says_what_it_did_unasked_and_passes_a_failure_on(
    bench: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workers = bench["workers"]
    script = tmp_path / "echo.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(BENCHMARKS)!r}); import machine, worker\n"
        "work = lambda n: worker.timed(lambda: {'updates': n, 'cores': len(machine.available_cores())})\n"
        "worker.serve({'work': work})\n"
    )
    monkeypatch.setattr(workers, "LOGS", tmp_path)
    with workers.Worker(str(script), cores=1) as asked:
        answer = asked.ask("work", n=3)
        assert answer["updates"] == 3
        assert answer["cores"] == 1 or not hasattr(bench["machine"].os, "sched_setaffinity")
        assert 0 <= answer["idle_cpu_seconds"] <= answer["idle_seconds"] + 1
        with pytest.raises(workers.WorkerFailed, match="unexpected keyword"):
            asked.ask("work", m=3)
        assert asked.ask("work", n=4)["updates"] == 4
    with workers.Worker(str(tmp_path / "none.py"), cores=1) as gone:
        gone._process.wait(60)  # asked when it is gone: the question itself has nowhere to go
        with pytest.raises(workers.WorkerFailed):
            gone.ask("work", n=1)


@pytest.mark.slow
def test_the_whole_loop_can_still_be_run_piecewise(bench: Loaded) -> None:
    """The worker reaches into Learner and train: what it needs of them is still there."""
    ours = importlib.import_module("worker_mve")
    small = ["agent.hidden=[8]", "agent.batch_size=4", "dynamics.hidden=[8]", "dynamics.members=2"]
    small += ["targets.horizon_steps=2", "train.total_steps=1000", "dynamics.initial_fits=1"]
    ours.build("it", "mve-sac", "Pendulum-v1", small, fill=20)
    done = ours.loop("it", 20)
    assert (done["env_steps"], done["updates"]) == (20, 80)
    assert ours.learn("it", updates=2)["updates"] == 2
    assert ours.loop("it", 20)["updates"] == 80
    assert ours.collect("it", 20)["env_steps"] == 20
    assert ours.facts("it")["transition_bytes"] == 4 * (3 + 1 + 1 + 3 + 1 + 1 + 1 + 1)
    sizes = ours.arithmetic.sizes_of(ours.arms["it"].learner)
    assert (sizes.batch, sizes.members, sizes.horizon, sizes.regresses_imagined) == (4, 2, 2, True)
    assert (sizes.actor, sizes.critic, sizes.model) == ([(3, 8), (8, 2)], [(4, 8), (8, 1)], [(4, 8), (8, 3)])


def test_an_evidence_run_is_started_gone_on_with_or_left_alone(
    bench: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    efficiency = bench["efficiency"]
    monkeypatch.setitem(efficiency.VARIANTS, "tiny", efficiency.Variant("sac", ("agent.hidden=[8]",)))
    job = efficiency.Job("Pendulum-v1", "tiny", (3,))
    folder = tmp_path / "Pendulum-v1" / "tiny" / "seed-3"
    asked = efficiency.command(job, tmp_path, 600)
    assert asked[2:] == [
        *("mve", "train", "Pendulum-v1", "--algo", "sac", "--seed", "3", "--steps", "600"),
        *("--run-dir", str(folder), "--quiet", "--set", *efficiency.EVALUATIONS, "agent.hidden=[8]"),
    ]
    (folder / "checkpoints" / "step_000000000400").mkdir(parents=True)
    (folder / "checkpoints" / "step_000000000400" / "state.json").write_text("{}")
    (folder / "config.json").write_text("{}")
    assert efficiency.command(job, tmp_path, 600)[3:] == ["resume", str(folder), "--steps", "200", "--quiet"]
    assert efficiency.command(job, tmp_path, 400) is None


def test_an_ablation_that_stops_early_begins_as_the_flagship_does(bench: Loaded, tmp_path: Path) -> None:
    efficiency = bench["efficiency"]
    job = efficiency.Job("Pendulum-v1", "two-updates", (3,))
    asked = efficiency.command(job, tmp_path, 600, learning_starts=500)
    begun = [f"{name}=500" for name in efficiency.STARTS]
    assert asked[asked.index("--set") + 1 :] == [*efficiency.EVALUATIONS, *begun, "train.updates_per_step=2"]
    assert efficiency.STARTS[0] + "=500" not in efficiency.command(job, tmp_path, 600)
    rival = efficiency.Job("Pendulum-v1", "dhmbpo", (3,))  # has its own
    assert efficiency.command(rival, tmp_path, 600, 500) == efficiency.command(rival, tmp_path, 600)


def test_seeds_of_one_program_leave_the_folders_of_runs_of_their_own(
    bench: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    efficiency = bench["efficiency"]
    monkeypatch.setitem(efficiency.VARIANTS, "tiny", efficiency.Variant("sac", ("agent.hidden=[8]",)))
    job = efficiency.Job("Pendulum-v1", "tiny", (3, 5))
    folder = tmp_path / "Pendulum-v1" / "tiny"
    assert str(job) == "Pendulum-v1 tiny seeds 3,5"
    asked = efficiency.command(job, tmp_path, 600)
    assert asked[5:11] == ["--algo", "sac", "--seeds", "3,5", "--steps", "600"]
    assert asked[11:13] == ["--run-dir", str(folder)]
    for seed, step in ((3, 500), (5, 400)):  # killed in the middle of a save
        run = efficiency.Job("Pendulum-v1", "tiny", (seed,)).folder(tmp_path)
        (run / "checkpoints" / f"step_{step:012d}").mkdir(parents=True)
        (run / "checkpoints" / f"step_{step:012d}" / "state.json").write_text("{}")
        (run / "config.json").write_text("{}")
    assert efficiency.command(job, tmp_path, 600)[3:] == ["resume", str(folder), "--steps", "200", "--quiet"]
    assert efficiency.command(job, tmp_path, 400) is None
    assert not efficiency.other_seeds(job, tmp_path)


def test_seeds_of_one_program_are_those_that_it_began_with(
    bench: Loaded, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "Hopper-v4" / "flagship" / "seed-3"
    run.mkdir(parents=True)
    (run / "config.json").write_text("{}")
    asked = ["train", str(tmp_path), "--tasks", "Hopper-v4", "--together", "--seeds"]
    assert bench["efficiency"].main([*asked, "3", "5"]) == 2
    assert "has seed-3; ask for those" in capsys.readouterr().err


@pytest.mark.skipif(not hasattr(os, "fork"), reason="POSIX only")
def test_evaluations_played_aside_are_those_of_the_run_itself(bench: Loaded, tmp_path: Path) -> None:
    small = ["agent.hidden=[8]", "train.learning_starts=40", "evaluate.interval_steps=40"]
    settings = [*small, "evaluate.episodes=2", "train.total_steps=100"]
    job = bench["efficiency"].Job("Pendulum-v1", "mve-sac", (3,))
    [_, script, *_] = bench["efficiency"].command(job, tmp_path, 100, aside=True)
    asked = [sys.executable, script, "train", "Pendulum-v1", "--algo", "sac", "--seed", "3", "--quiet"]
    folder = tmp_path / "run"
    run = subprocess.run(
        [*asked, "--run-dir", str(folder), "--set", *settings], capture_output=True, text=True, check=True
    )
    assert "Traceback" not in run.stderr
    header, *rows = (folder / "evaluations.csv").read_text().splitlines()
    assert [row.partition(",")[0] for row in sorted(rows)] == ["100"] * 2 + ["40"] * 2 + ["80"] * 2
    expected = []
    for step in (kept := saved_steps(folder / "checkpoints")):
        returns, lengths = Learner.load(folder, which=step).evaluate(2)
        both = enumerate(zip(returns.tolist(), lengths.tolist(), strict=True))
        expected += [f"{step},{episode},{ret},{length}" for episode, (ret, length) in both]
    assert header == "step,episode,return,length"
    assert len(kept) > 1
    assert sorted(row for row in rows if int(row.partition(",")[0]) in kept) == sorted(expected)


def test_evidence_is_told_beside_what_was_published(
    bench: Loaded, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    efficiency = bench["efficiency"]
    changed = efficiency.Variant("sac", ("agent.hidden=[8]",))
    further = efficiency.Variant("sac", (*changed.settings, "agent.batch_size=8"))
    variants = {"flagship": efficiency.Variant("sac"), "small": changed, "few": further}
    variants["td3-small"] = efficiency.Variant("td3", changed.settings)
    monkeypatch.setattr(efficiency, "VARIANTS", variants)
    for name, seed, value in (
        ("flagship", 0, 10.0),
        ("flagship", 1, 30.0),
        ("small", 0, 5.0),
        ("few", 0, 4.0),
        ("td3-small", 0, 3.0),
    ):
        run = tmp_path / "runs" / "Task-v1" / name / f"seed-{seed}"
        run.mkdir(parents=True)
        targets = {"estimator": "one_step", "horizon_steps": 0}
        config = {"algo": "sac", "seed": seed, "task": "Task-v1", "targets": targets}
        (run / "config.json").write_text(json.dumps(config))
        (run / "evaluations.csv").write_text(f"step,episode,return,length\n100,0,{value},5\n")
        (run / "metrics.jsonl").write_text('{"time/total_timesteps": 100, "time/time_elapsed": 120.0}\n')
        (run / "versions.json").write_text('{"mve": "1", "devices": [{"platform": "gpu", "kind": "A GPU"}]}')
    published = "suite,env,algo,seed,step,return,source\ngym,Task-v1,Rival,0,100,15,there\n"
    (tmp_path / "published.csv").write_text(published)
    page = tmp_path / "page.md"
    page.write_text("Before\n<!-- figures: begin -->\nold\n<!-- figures: end -->\nafter\n")
    asked = ["report", str(tmp_path / "runs"), "--published", str(tmp_path / "published.csv")]
    asked += ["--against", "Rival", "--csv", str(tmp_path / "all.csv"), "--document", str(page)]
    asked += ["--ablations-csv", str(tmp_path / "changed.csv"), "--times-csv", str(tmp_path / "times.csv")]
    assert efficiency.main(asked) == 0
    told = capsys.readouterr().out.splitlines()
    rows = [line for line in told if line.startswith("| Task-v1")]
    assert rows[0].startswith("| Task-v1 | flagship | 100 | 2 | 20 [10, 30] | 20 | 20 | 10 30 |")
    assert rows[1].startswith("| Task-v1 | Rival | 100 | 1 | 15 ")
    assert rows[3] == "| Task-v1 | flagship | 2 | 100 | 2.0 | 1200.0 | A GPU |"
    changes = told.index("| at 100 | changed | Task-v1: IQM [95 %]: every seed |")
    assert told[changes + 2 : changes + 6] == [
        "| flagship | nothing | 20 [10, 30]: 10, 30 |",
        "| small | agent.hidden=[8] | 5: 5 |",
        "| few | small, and agent.batch_size=8 | 4: 4 |",
        "| td3-small | td3, and agent.hidden=[8] | 3: 3 |",
    ]
    # What a variant goes on from is of the same preset, if there is one.
    with monkeypatch.context() as other:
        td3_further = efficiency.Variant("td3", further.settings)
        other.setattr(efficiency, "VARIANTS", {**variants, "td3-few": td3_further})
        assert efficiency.changes("td3-few") == "td3-small, and agent.batch_size=8"
        other.delitem(efficiency.VARIANTS, "td3-small")
        assert efficiency.changes("td3-few") == "td3, and agent.hidden=[8] agent.batch_size=8"
        other.delitem(efficiency.VARIANTS, "small")
        assert efficiency.changes("few") == "agent.hidden=[8] agent.batch_size=8"
    assert "old" not in page.read_text()
    assert rows[3] in page.read_text()
    assert (tmp_path / "all.csv").read_text().splitlines()[1] == "gym,Task-v1,flagship,0,100,10.00,mve:1"
    kept = "gym,Task-v1,few,0,100,4.00,mve:1"
    both = (tmp_path / "changed.csv").read_text().splitlines()[1:]
    other = "gym,Task-v1,td3-small,0,100,3.00,mve:1"
    assert both == [kept, "gym,Task-v1,small,0,100,5.00,mve:1", other]
    assert (tmp_path / "times.csv").read_text().splitlines()[2] == "Task-v1,flagship,2,100,2.0,1200.0,A GPU"
    assert efficiency.main(["report", str(tmp_path / "nowhere")]) == 2
    assert "holds no runs" in capsys.readouterr().err

    # On the next machine, which has another run of the ablation alone.
    shutil.rmtree(tmp_path / "runs" / "Task-v1" / "flagship")
    run = tmp_path / "runs" / "Task-v1" / "small" / "seed-7"
    run.with_name("seed-0").rename(run)
    (run / "config.json").write_text(json.dumps(config | {"seed": 7}))
    assert efficiency.main(asked) == 0
    again = capsys.readouterr().out.splitlines()
    assert [line for line in again if "flagship" in line] == [line for line in told if "flagship" in line]
    both = (tmp_path / "changed.csv").read_text().splitlines()[1:]
    assert both == [kept, "gym,Task-v1,small,7,100,5.00,mve:1", other]

    # A table for every step that is asked for, of those alone that have come so far.
    more = "step,episode,return,length\n100,0,5,5\n200,0,6,5\n"
    (run / "evaluations.csv").write_text(more)
    assert efficiency.main([*asked, "--ablations-at", "100", "200"]) == 0
    at_both = capsys.readouterr().out.splitlines()
    assert at_both[changes : changes + 6] == again[changes : changes + 6]
    later = at_both.index("| at 200 | changed | Task-v1: IQM [95 %]: every seed |")
    assert at_both[later + 2 : later + 5] == [
        "| flagship | nothing |  |",
        "| small | agent.hidden=[8] | 6: 6 |",
        "",
    ]

    with (tmp_path / "changed.csv").open("a") as file:
        file.write("gym,Task-v1,unheard-of,0,100,5.00,mve:1\n")
    assert efficiency.main(asked) == 2
    assert "has unheard-of, which VARIANTS has not" in capsys.readouterr().err


def test_a_models_fit_is_measured_on_what_a_run_remembers(
    bench: Loaded, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The change is linear in state and action: more minibatches, less error on steps not seen before."""
    tiny = ("agent.hidden=[8]", "dynamics.hidden=[8]", "dynamics.members=1", "dynamics.initial_fits=0")
    learner = Learner("Pendulum-v1", "mve-sac", settings=tiny, run_dir=tmp_path / "run", quiet=True)
    rng = np.random.default_rng(0)
    steps = jax.tree.map(lambda x: np.zeros((200, *x.shape[1:]), x.dtype), learner.state.replay.rows)
    action, obs = np.float32(rng.uniform(-1, 1, size=(200, 1))), np.zeros((201, 3), np.float32)
    next_obs, ended = np.zeros((200, 3), np.float32), np.zeros(200, np.float32)
    for t in range(200):
        next_obs[t] = 0.5 * obs[t, ::-1] + action[t]
        ended[t] = next_obs[t, 0] > 0.5
        obs[t + 1] = (1.0 - ended[t]) * next_obs[t]
    steps = steps._replace(obs=obs[:-1], action=action, next_obs=next_obs, continuation=1.0 - ended)
    memory = replay.add(learner.state.replay, steps, jnp.ones(200, bool))
    learner.state = replace(learner.state, replay=memory, num_env_steps=jnp.int32(200))
    learner.save(tmp_path / "saved")
    settings = f"dynamics.interval_steps=20 {' '.join(tiny)} dynamics.fits_per_refit="
    asked = [str(tmp_path / "saved"), "--start", "60", "--try", f"{settings}1", "--try", f"{settings}300"]
    assert bench["model_fit"].main(asked) == 0
    lines = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [len(line) for line in lines] == [11, 11]
    for few, many in zip(lines[0][1:7], lines[1][1:7], strict=True):
        assert 0 < float(many) < 0.7 * float(few)
    ends = f"{settings}1 dynamics.termination=learned"
    assert bench["model_fit"].main([*asked[:3], "--try", ends]) == 0
    found, false = capsys.readouterr().out.splitlines()[2].rstrip(" |").split(" | ")[-2:]
    assert int(found.split(" of ")[0]) > 0.8 * int(found.split(" of ")[1]) > 20
    assert int(false.split(" of ")[0]) < 0.1 * int(false.split(" of ")[1])
    assert bench["model_fit"].main([str(tmp_path / "saved")]) == 2
    assert "dynamics.interval_steps=250" in capsys.readouterr().err
    late = [str(tmp_path / "saved"), "--start", "200", "--try", f"{settings}1"]
    assert bench["model_fit"].main(late) == 2
    assert "200 steps, with the first fit at 200" in capsys.readouterr().err


def test_critics_are_fitted_to_the_policy_of_a_run_as_it_is(
    bench: Loaded, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """More updates of the critics alone come nearer to what the policy earns; nothing else may be changed."""
    tiny = (
        "agent.hidden=[16]",
        "agent.target_rate=0.05",
        "targets.discount=0.8",
        "train.learning_starts=300",
    )
    learner = Learner("Pendulum-v1", "td3", settings=tiny, run_dir=tmp_path / "run", quiet=True)
    learner.learn(310)
    run, asked = str(tmp_path / "run"), ["--episodes", "2", "--try", "targets.n_step=2"]
    assert bench["critic_fit"].main([run, *asked, "--updates", "1500"]) == 0
    lines = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    left, more = (float(line[2]) for line in lines)
    assert more < 0.7 * left
    assert bench["critic_fit"].main([run, "--try", "agent.critics=1"]) == 2
    assert "agent and model are held" in capsys.readouterr().err


def test_critics_are_tried_with_what_the_run_itself_has_found_out(bench: Loaded, tmp_path: Path) -> None:
    """Its discount, and when it began to learn: the preset says "episode" and "auto"."""
    settings = ["train.total_steps=2000", "agent.hidden=[8]", "dynamics.hidden=[8,8,8]"]
    learner = Learner("Pendulum-v1", settings=settings, run_dir=tmp_path / "run", quiet=True)
    recipe = bench["critic_fit"].asked_recipe(learner, "targets.n_step=3 replay.recency=1")
    assert (recipe.targets.n_step, recipe.recency) == (3, 1.0)
    assert recipe.targets.discount == learner.recipe.targets.discount == pytest.approx(0.975)
    corrected = bench["critic_fit"].asked_recipe(learner, "dynamics.on_policy_corrections=true").dynamics
    assert corrected == replace(learner.recipe.dynamics, on_policy_corrections=True)
    with pytest.raises(UserError, match="buffer of imagined rows"):
        bench["critic_fit"].asked_recipe(learner, "imagination.length=[99,99]")


def test_critics_are_held_against_what_was_earned_by_hand(bench: Loaded) -> None:
    """Values 2, 4 and 4 against 1, 2 and 6: off by 1, 2 and -2, of which the second is near an end."""

    class Opinions:
        def action_values(self, obs: jax.Array, action: jax.Array) -> jax.Array:
            return jnp.stack([obs[:, 0] - 1, obs[:, 0] + 1])

    rows = SimpleNamespace(obs=np.array([[2.0], [4.0], [4.0]]), action=np.zeros((3, 1)))
    earned = bench["critic_fit"].Earned(rows, np.array([1.0, 2.0, 6.0]), np.array([False, True, False]))
    assert bench["critic_fit"].row(Opinions(), earned, "ours") == ("ours", "+0", "2", "0.655", "4", "2")


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="Linux only")
def test_a_run_is_pinned_to_its_core(bench: Loaded) -> None:
    core = max(os.sched_getaffinity(0))
    code = "import os; print(sorted(os.sched_getaffinity(0)))"
    asked = bench["efficiency"].pinned([sys.executable, "-c", code], core)
    assert subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip() == str([core])


def test_every_variant_is_a_configuration(bench: Loaded) -> None:
    for name, variant in bench["efficiency"].VARIANTS.items():
        built = build("Hopper-v4", variant.algo, [*bench["efficiency"].EVALUATIONS, *variant.settings])
        assert built.algo == variant.algo, name
