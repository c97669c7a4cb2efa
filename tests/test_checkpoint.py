"""Checkpoints: whole or not at all, never executable, never of another shape than asked for."""

from __future__ import annotations

import json
import pickle
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mve import checkpoint, files
from mve.checkpoint import manifest
from mve.checkpoint.frozen import freeze
from mve.types import UserError


class Layer(eqx.Module):
    weight: jax.Array
    bias: jax.Array | None


class State(NamedTuple):
    layers: list[Layer]
    flags: dict[str, Any]
    count: jax.Array
    key: jax.Array
    host: np.ndarray


def make_state(seed: int = 0) -> State:
    return State(
        layers=[Layer(jnp.arange(6.0).reshape(2, 3) + seed, None), Layer(jnp.ones((2,)), jnp.zeros(()))],
        flags={"alive": jnp.array([True, False]), "half": jnp.ones((3,), jnp.float16)},
        count=jnp.int32(7 + seed),
        key=jax.random.split(jax.random.key(seed), 3),
        host=np.asfortranarray(np.arange(6.0, dtype=np.float32).reshape(2, 3)),
    )


def assert_same(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def save(folder: Path, step: int, seed: int = 0) -> Path:
    return checkpoint.save(folder, make_state(seed), {"num_env_steps": step, "note": "é"})


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


def sign(path: Path, **said: Any) -> None:
    """Change what state.json says, with the checksum that goes with it."""
    told = json.loads((path / "state.json").read_text()) | said
    del told["sha256"]
    (path / "state.json").write_text(json.dumps(told | {"sha256": manifest._digest(told)}))


def test_what_is_saved_comes_back_bit_for_bit(tmp_path: Path) -> None:
    path = save(tmp_path, 10)
    assert path == tmp_path / "step_000000000010"
    assert {p.name for p in path.iterdir()} == {"state.safetensors", "state.json"}
    for template in (make_state(5), jax.eval_shape(make_state)):
        state, facts = checkpoint.restore(tmp_path, lambda facts, template=template: template)
        assert_same(state, make_state(0))
        assert facts == {"num_env_steps": 10, "note": "é"} == checkpoint.read_facts(path)


def test_restored_keys_draw_the_same_numbers(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, {"key": jax.random.key(3, impl="rbg")}, {"num_env_steps": 0})
    state, _ = checkpoint.restore(tmp_path, lambda facts: {"key": jax.random.key(0, impl="rbg")})
    np.testing.assert_array_equal(
        jax.random.uniform(state["key"], (4,)), jax.random.uniform(jax.random.key(3, impl="rbg"), (4,))
    )


def test_tensors_have_readable_names(tmp_path: Path) -> None:
    tensors = checkpoint.load_tensors(save(tmp_path, 10))
    assert set(tensors) == {
        *("layers.0.weight", "layers.1.weight", "layers.1.bias"),
        *("flags.alive", "flags.half", "count", "key", "host"),
    }
    assert tensors["key"].dtype == np.uint32
    np.testing.assert_array_equal(tensors["host"], make_state().host)


def test_loading_never_unpickles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 10)

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("unpickled")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    checkpoint.restore(tmp_path, lambda facts: make_state())


def test_the_newest_two_are_kept_and_the_newest_is_restored(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        save(tmp_path, step, seed=step)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_000000000020", "step_000000000030"]
    assert checkpoint.latest(tmp_path) == tmp_path / "step_000000000030"
    state, _ = checkpoint.restore(tmp_path, lambda facts: make_state())
    assert_same(state, make_state(30))


def test_saving_twice_at_a_step_keeps_the_later_state(tmp_path: Path) -> None:
    save(tmp_path, 10, seed=1)
    save(tmp_path, 10, seed=2)
    assert [p.name for p in tmp_path.iterdir()] == ["step_000000000010"]
    assert_same(checkpoint.restore(tmp_path, lambda facts: make_state())[0], make_state(2))


def test_a_save_cut_short_is_ignored_and_then_cleaned_away(tmp_path: Path) -> None:
    save(tmp_path, 20, seed=2).rename(tmp_path / ".writing_step_000000000020")
    save(tmp_path / "other", 10, seed=1).rename(tmp_path / ".replaced_step_000000000010")
    (tmp_path / "other").rmdir()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(checkpoint.restore(tmp_path, lambda facts: make_state())[0], make_state(1))
    save(tmp_path, 30)
    assert [p.name for p in tmp_path.iterdir()] == ["step_000000000030"]


def test_a_failed_write_leaves_the_previous_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 10)

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "write", full)
    says = f"cannot write a checkpoint to {tmp_path}: No space left on device; it takes 0.0 MB, and .* free"
    with pytest.raises(UserError, match=says):
        save(tmp_path, 20)
    assert [p.name for p in tmp_path.iterdir()] == ["step_000000000010"]


@pytest.mark.parametrize("fault", ["tensors", "json", "missing", "link"])
def test_a_damaged_newest_falls_back_to_the_one_before(tmp_path: Path, fault: str) -> None:
    save(tmp_path / "run", 10, seed=1)
    newest = save(tmp_path / "run", 20, seed=2)
    if fault == "tensors":
        damage(newest / "state.safetensors")
    elif fault == "json":
        (newest / "state.json").write_text("{")
    elif fault == "missing":
        (newest / "state.safetensors").unlink()
    else:
        outside = (newest / "state.safetensors").rename(tmp_path / "outside")
        (newest / "state.safetensors").symlink_to(outside)
    with pytest.warns(UserWarning, match="step_000000000020 is damaged"):
        state, facts = checkpoint.restore(tmp_path / "run", lambda facts: make_state())
    assert_same(state, make_state(1))
    assert facts["num_env_steps"] == 10


def test_no_sound_checkpoint_is_one_clear_line(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path / "absent") is None
    with pytest.raises(UserError, match=r"no usable checkpoint in .*absent"):
        checkpoint.restore(tmp_path / "absent", lambda facts: make_state())
    path = save(tmp_path, 10)
    damage(path / "state.safetensors")
    with pytest.warns(UserWarning, match="checksum"), pytest.raises(UserError, match="no usable checkpoint"):
        checkpoint.restore(tmp_path, lambda facts: make_state())
    with pytest.raises(UserError, match="is damaged"):
        checkpoint.load_tensors(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"count": jnp.int32([1])}, r"count is int32 \[\] there, but int32 \[1\] was asked for"),
        ({"count": jnp.float32(1)}, r"count is int32 \[\] there, but float32 \[\] was asked for"),
        ({"key": jnp.zeros((3, 2), jnp.uint32)}, r"key is key<fry> \[3\] there, but uint32 \[3, 2\]"),
        ({"flags": {}}, r"flags.alive is bool \[2\] there, but nothing was asked for"),
        ({"host": [np.zeros(1)]}, r"host.0 is nothing there, but float64 \[1\] was asked for"),
    ],
)
def test_a_state_of_another_configuration_is_refused_by_name(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    save(tmp_path, 10)
    with pytest.raises(UserError, match=message):
        checkpoint.restore(tmp_path, lambda facts: make_state()._replace(**change))


def test_a_newer_format_is_not_taken_for_damage(tmp_path: Path) -> None:
    sign(save(tmp_path, 10), format=3)
    with pytest.raises(UserError, match="has checkpoint format 3, this mve reads 2"):
        checkpoint.restore(tmp_path, lambda facts: make_state())


def test_a_checkpoint_of_the_first_format_is_read(tmp_path: Path) -> None:
    path = save(tmp_path, 10)
    said = json.loads((path / "state.json").read_text())
    first = {
        "format": 1,
        "facts": said["facts"],
        "tensors": said["tensors"],
        "sha256": said["file"]["sha256"],
    }
    for tensor in first["tensors"].values():
        if tensor["key_impl"] is None:
            del tensor["key_impl"]
    (path / "state.json").write_text(json.dumps(first))
    state, facts = checkpoint.restore(tmp_path, lambda facts: make_state())
    assert_same(state, make_state(0))
    assert facts == {"num_env_steps": 10, "note": "é"}
    damage(path / "state.safetensors")
    with pytest.warns(UserWarning, match="checksum"), pytest.raises(UserError, match="no usable checkpoint"):
        checkpoint.restore(tmp_path, lambda facts: make_state())


def test_the_best_is_kept_beside_the_newest_two(tmp_path: Path) -> None:
    def evaluated(step: int, mean: float | None) -> None:
        evaluation = None if mean is None else {"mean_reward": mean}
        facts = {"num_env_steps": step, "evaluation": evaluation}
        checkpoint.save(tmp_path, make_state(step), facts)

    def which(best: Any) -> int:
        return checkpoint.restore(tmp_path, lambda facts: make_state(), best)[1]["num_env_steps"]

    evaluated(10, None)
    with pytest.raises(UserError, match=r"no usable checkpoint in .* has an evaluation"):
        which("best")
    for step, mean in ((20, 5.0), (30, -1.0), (40, None), (50, 3.0)):
        evaluated(step, mean)
    assert checkpoint.steps(tmp_path) == [20, 40, 50]
    assert which("best") == 20
    assert which("newest") == 50
    assert which(49) == 40
    evaluated(60, 5.0)  # equal: the newest
    assert checkpoint.steps(tmp_path) == [50, 60]
    evaluated(55, None)  # gone back to, and on from there: what was later is no more
    assert checkpoint.steps(tmp_path) == [50, 55]


def test_several_are_written_all_or_none(tmp_path: Path) -> None:
    frozen = {tmp_path / name: freeze(make_state(), {"num_env_steps": 10}) for name in "ab"}
    checkpoint.write(frozen)
    again = {folder: replace(each, facts={"num_env_steps": 20}) for folder, each in frozen.items()}
    again[tmp_path / "b"] = replace(again[tmp_path / "b"], tensors={"x": np.array(["text"])})
    with pytest.raises(TypeError, match="x has dtype <U4, which a file of tensors cannot hold"):
        checkpoint.write(again)
    for folder in frozen:
        assert [p.name for p in folder.iterdir()] == ["step_000000000010"]


def test_a_checkpoint_under_the_name_of_another_step_is_damaged(tmp_path: Path) -> None:
    save(tmp_path, 10).rename(tmp_path / "step_000000000020")
    with pytest.warns(UserWarning, match="of step 10"), pytest.raises(UserError, match="no usable"):
        checkpoint.restore(tmp_path, lambda facts: make_state())


@pytest.mark.parametrize(
    "said",
    [
        {"tensors": {"count": {"shape": [-1], "dtype": "int32"}}},
        {"tensors": {"count": {"shape": [], "dtype": 3}}},
        {"tensors": []},
        {"facts": [1]},
        {"facts": {"num_env_steps": True}},
        {"file": {"sha256": "../../etc/passwd", "bytes": 1}},
        {"file": {"sha256": "0" * 64, "bytes": -1}},
        {"rows": {"prefix": "count", "segments": [{"sha256": "../x", "bytes": 1, "rows": 1}]}},
        {"rows": {"prefix": "host", "segments": [{"sha256": "0" * 64, "bytes": 1, "rows": 10**30}]}},
        {"rows": {"prefix": "no", "segments": []}},
        {"format": "2"},
    ],
)
def test_what_has_the_right_checksum_and_the_wrong_types_is_damaged(tmp_path: Path, said: Any) -> None:
    sign(save(tmp_path, 10), **said)
    with pytest.warns(UserWarning, match="is damaged") as warned, pytest.raises(UserError, match="no usable"):
        checkpoint.restore(tmp_path, lambda facts: make_state())
    assert "\n" not in str(warned[0].message)


def test_a_shape_larger_than_the_memory_is_refused_before_it_is_made(tmp_path: Path) -> None:
    shape = (2**40, 2**10)
    huge = {"shape": list(shape), "dtype": "int32"}
    path = save(tmp_path, 10)
    sign(path, tensors={**json.loads((path / "state.json").read_text())["tensors"], "count": huge})
    template = make_state()._replace(count=jax.ShapeDtypeStruct(shape, jnp.int32))
    with pytest.raises(UserError, match=r"takes 4503599.6 GB of memory, and this machine has"):
        checkpoint.restore(tmp_path, lambda facts: template)


def test_only_arrays_can_be_saved(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="rate is a float; only arrays can be saved"):
        checkpoint.save(tmp_path, {"rate": 0.1}, {"num_env_steps": 0})
