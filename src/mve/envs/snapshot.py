"""An environment's whole state in the middle of an episode: taken, and put into a freshly made one.

What follows is then the same to the bit, which an exact resume asks for. We take what a class is known to
keep between steps and never guess: an environment or a wrapper not listed in `remembered.py` cannot be taken,
and `obstacle` says so. Your own class, wrappers included, can be if it has

    def snapshot(self) -> dict[str, Any]: ...           arrays, numbers, text, lists and mappings of them
    def restore(self, data: dict[str, Any]) -> None: ...

The generator `np_random`, those of the spaces and the physics of a `MujocoEnv` are taken beside what
`snapshot` returns; all the rest is its own concern. `mismatch` tries on two spare environments whether that
is enough.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from operator import attrgetter
from typing import Any, TypeAlias

import gymnasium as gym
import numpy as np

from mve.envs import remembered
from mve.envs.base import Snapshot
from mve.envs.known import class_name, name_of
from mve.envs.portable import Arrays, NotPortableError, described, pack, unpack
from mve.messages import what_failed
from mve.types import Json, UserError

FORMAT = 1
TRIED_STEPS = 8  # before and after the snapshot by which a class is tried

Layer: TypeAlias = gym.Env[Any, Any]  # the environment or one of the wrappers around it
Setting: TypeAlias = Callable[[], None]


def take(env: Layer) -> Snapshot | None:
    """The state of `env`, which is left as it is; None if it cannot be taken (`obstacle` says why)."""
    try:
        return _taken(env)
    except NotPortableError:
        return None


def obstacle(env: Layer) -> str | None:
    """Why the state of `env` cannot be taken; None if it can."""
    try:
        _taken(env)
    except NotPortableError as error:
        return str(error)
    return None


def restore(env: Layer, snapshot: Snapshot) -> None:
    """Put `env`, made as the one that the snapshot is of, into that one's state.

    Everything is read and checked first: UserError for a snapshot that does not fit leaves `env` unharmed
    (what a user's own `restore` does before it fails is beyond us). Wall-clock times start anew.
    """
    name = name_of(env)
    try:
        own, settings = _plan(env, name, *snapshot)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        fault = f"{error} is missing" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise UserError(f"{name}: the state saved does not fit: {fault}; use another checkpoint") from error
    try:
        for apply in own:
            apply()
    except Exception as error:
        raise UserError(f"{name}: its restore(data) failed: {what_failed(error)}") from error
    for apply in settings:
        apply()


def template(facts: Json) -> Arrays:
    """Arrays of the dtypes and shapes that a snapshot with these facts has, for a checkpoint to fill."""
    try:
        kinds = facts["arrays"].items()
        return {name: np.broadcast_to(np.zeros((), dtype), shape) for name, (dtype, shape) in kinds}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError("the state saved of the environment is damaged; use another checkpoint") from error


def mismatch(env: Layer, other: Layer, seed: int = 0) -> str | None:
    """What differs first once `other` was restored to a snapshot of `env`; None if nothing does.

    Both are used up: reset and stepped under random actions. They have to be two of the same make, such as
    those of an evaluation. UserError if the state cannot be taken or put back.
    """
    actions = np.random.default_rng(seed)
    _wander(env, seed, actions)
    if (taken := take(env)) is None:
        raise UserError(f"{name_of(env)}: {obstacle(env)}")
    _wander(other, seed + 1, actions)
    restore(other, taken)
    for step in range(1, TRIED_STEPS + 1):
        action = _drawn(env, actions)
        first, second = env.step(action), other.step(action)
        if what := _first_difference(first[:4], second[:4]):
            return f"{what} of step {step} after the snapshot"
        if (first[2] or first[3]) and _first_difference(env.reset()[:1], other.reset()[:1]):
            return f"observation of the reset after step {step} after the snapshot"
    return None


def layers_of(env: Layer) -> list[Layer]:
    """From the outermost wrapper to the environment itself."""
    found = [env]
    while isinstance(found[-1], gym.Wrapper):
        found.append(found[-1].env)
    return found


def _speaks_for_itself(layer: Layer) -> bool:
    return all(callable(getattr(layer, method, None)) for method in ("snapshot", "restore"))


# Taking


def _taken(env: Layer) -> Snapshot:
    arrays: Arrays = {}
    records = [_record(layer, str(depth), arrays) for depth, layer in enumerate(layers_of(env))]
    facts = {"format": FORMAT, "env": name_of(env), "layers": records, "arrays": described(arrays)}
    return Snapshot(arrays, facts)


def _record(layer: Layer, name: str, arrays: Arrays) -> Json:
    """One layer; its arrays are added to `arrays`."""
    known = class_name(layer)
    record: Json = {"class": known}
    if _speaks_for_itself(layer):
        record["own"] = pack(_own(layer), f"{name}.own", arrays)
    elif known not in remembered.ATTRIBUTES:
        raise NotPortableError(
            f"what {known} keeps between steps is not known; give it methods snapshot() and restore(data)"
        )
    record["state"], record["absent"] = {}, []
    for attribute, fits in _attributes(layer).items():
        try:
            value = attrgetter(attribute)(layer)
        except AttributeError:  # not reset yet, or of another version of Gymnasium
            record["absent"].append(attribute)
            continue
        value = list(value) if isinstance(value, deque) else value
        if not fits(layer, value):
            raise NotPortableError(f"{known} keeps something else than expected in {attribute}")
        record["state"][attribute] = pack(value, f"{name}.{attribute}", arrays)
    spaces = enumerate(_spaces(layer))
    record["spaces"] = [pack(s._np_random, f"{name}.spaces.{i}", arrays) for i, s in spaces]
    if remembered.has_physics(layer):
        record["mujoco"] = remembered.mujoco_version()
        record["physics"] = pack(remembered.physics(layer), f"{name}.physics", arrays)
    return record


def _own(layer: Any) -> dict[str, Any]:
    """What a user's class says of itself. A fault in it need not end a run: it is the obstacle."""
    try:
        data = layer.snapshot()
    except Exception as error:
        raise NotPortableError(f"{class_name(layer)}: its snapshot() failed: {what_failed(error)}") from error
    if type(data) is not dict:
        raise NotPortableError(
            f"{class_name(layer)}: its snapshot() returned {type(data).__name__}, not dict"
        )
    return data


def _attributes(layer: Layer) -> dict[str, remembered.Check]:
    listed = {} if _speaks_for_itself(layer) else remembered.ATTRIBUTES.get(class_name(layer), {})
    return listed if isinstance(layer, gym.Wrapper) else listed | remembered.GENERATOR


def _spaces(layer: Layer) -> Iterator[Any]:
    """The spaces of its own that draw, parts for the whole."""
    wraps = isinstance(layer, gym.Wrapper)  # most have no spaces but those that they wrap
    names = ("_action_space", "_observation_space") if wraps else ("action_space", "observation_space")
    pending = [getattr(layer, name) for name in names]
    while pending:
        space = pending.pop()
        if isinstance(space, gym.spaces.Dict | gym.spaces.Tuple):
            parts = space.spaces
            pending.extend(parts.values() if isinstance(parts, dict) else parts)
        elif isinstance(space, remembered.SIMPLE_SPACES):
            yield space
        elif space is not None:
            raise NotPortableError(f"{class_name(layer)}: what {type(space).__name__} spaces draw from")


# Putting back


def _plan(env: Layer, name: str, arrays: Arrays, facts: Json) -> tuple[list[Setting], list[Setting]]:
    """All that has to be done, read and checked: the users' own `restore` methods, then everything else."""
    if facts["format"] != FORMAT:
        raise ValueError(f"format {facts['format']}, and this mve reads {FORMAT}")
    if facts["env"] != name:
        raise ValueError(f"it is of {facts['env']}")
    for array, (dtype, shape) in facts["arrays"].items():
        found = [str(arrays[array].dtype), list(arrays[array].shape)]
        if found != [dtype, shape]:
            raise ValueError(f"{array} is {found[0]} {found[1]}, not {dtype} {shape}")
    layers, records = layers_of(env), facts["layers"]
    classes, saved = [class_name(layer) for layer in layers], [record["class"] for record in records]
    if classes != saved:
        raise ValueError(f"it is of {' in '.join(reversed(saved))}, not {' in '.join(reversed(classes))}")
    own, settings = [], []
    for layer, record in zip(layers, records, strict=True):
        if _speaks_for_itself(layer):
            own.append(partial(layer.restore, unpack(record["own"], arrays)))  # pyright: ignore[reportAttributeAccessIssue]
        settings += _settings(layer, record, arrays)
    return own, settings


def _settings(layer: Layer, record: Json, arrays: Arrays) -> Iterator[Setting]:
    """What one layer's known attributes, generators and physics are to be."""
    known = class_name(layer)
    if not _speaks_for_itself(layer) and known not in remembered.ATTRIBUTES:
        raise ValueError(f"what {known} keeps between steps is not known")
    for attribute, fits in _attributes(layer).items():
        if attribute in record["absent"]:
            yield partial(_remove, layer, attribute)
            continue
        value = unpack(record["state"][attribute], arrays)
        if not fits(layer, value):
            raise ValueError(f"{known} cannot keep in {attribute} what was saved")
        yield partial(_set, layer, attribute, value)
    for space, packed in zip(_spaces(layer), record["spaces"], strict=True):
        if not remembered.generator(space, generator := unpack(packed, arrays)):
            raise ValueError("a space cannot draw from what was saved")
        yield partial(setattr, space, "_np_random", generator)
    if remembered.has_physics(layer):
        yield partial(remembered.set_physics, layer, _checked_physics(layer, record, arrays))
    if known in remembered.AFTERWARDS:
        yield partial(remembered.AFTERWARDS[known], layer)


def _checked_physics(layer: Layer, record: Json, arrays: Arrays) -> Arrays:
    if record["mujoco"] != (version := remembered.mujoco_version()):
        raise ValueError(f"it was taken with MuJoCo {record['mujoco']}, not {version}")
    values, present = unpack(record["physics"], arrays), remembered.physics(layer)
    for name in present:
        if (values[name].dtype, values[name].shape) != (present[name].dtype, present[name].shape):
            raise ValueError(f"{name} is of another MuJoCo model")
        if not np.isfinite(values[name]).all():
            raise ValueError(f"{name} is not finite")
    return values


def _owner(layer: Layer, attribute: str) -> tuple[Any, str]:
    """obs_rms.mean -> (layer.obs_rms, "mean")"""
    path, _, last = attribute.rpartition(".")
    return (attrgetter(path)(layer) if path else layer), last


def _set(layer: Layer, attribute: str, value: Any) -> None:
    owner, last = _owner(layer, attribute)
    present = getattr(owner, last, None)
    if isinstance(present, deque):
        present.clear()
        present.extend(value)
    else:
        setattr(owner, last, value)


def _remove(layer: Layer, attribute: str) -> None:
    owner, last = _owner(layer, attribute)
    vars(owner).pop(last, None)


# Trying


def _wander(env: Layer, seed: int, actions: np.random.Generator) -> None:
    """Into an episode by a few random steps, which a short one may not have."""
    env.reset(seed=seed)
    for _ in range(TRIED_STEPS):
        _, _, terminated, truncated, _ = env.step(_drawn(env, actions))
        if terminated or truncated:
            env.reset()


def _drawn(env: Layer, actions: np.random.Generator) -> Any:
    env.action_space.seed(int(actions.integers(2**31)))
    return env.action_space.sample()


def _first_difference(first: tuple[Any, ...], second: tuple[Any, ...]) -> str | None:
    for what, *pair in zip(("observation", "reward", "terminated", "truncated"), first, second, strict=False):
        one, another = (np.asarray(x) for x in pair)
        if one.dtype != another.dtype or one.tobytes() != another.tobytes():
            return what
    return None
