"""Checkpoints: whole or not at all, never executable, never of another shape than asked for."""

from __future__ import annotations

import json
import pickle
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mve import checkpoint
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

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(UserError, match=f"cannot write a checkpoint to {tmp_path}: No space left on device"):
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
    file = save(tmp_path, 10) / "state.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "format": 2}))
    with pytest.raises(UserError, match="has checkpoint format 2, this mve reads 1"):
        checkpoint.restore(tmp_path, lambda facts: make_state())


def test_only_arrays_can_be_saved(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="rate is a float; only arrays can be saved"):
        checkpoint.save(tmp_path, {"rate": 0.1}, {"num_env_steps": 0})
