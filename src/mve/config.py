"""One configuration: the settings that live beside the code they configure.

Precedence: the dataclasses' defaults, then the preset, then the preset's row for the task, then what the
user sets.
"""

from __future__ import annotations

import difflib
import json
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from itertools import chain
from typing import Annotated, Any, Literal, SupportsIndex, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta

from mve.agents import AGENTS, AgentConfig
from mve.dynamics import DynamicsConfig
from mve.envs.base import EnvConfig, EnvSpec
from mve.envs.host import LARGEST_SEED
from mve.evaluate import EvaluateConfig
from mve.imagine import ImaginationConfig
from mve.presets import DEFAULT_ALGO, DEFAULT_DISCRETE_ALGO, PRESETS
from mve.targets import TargetsConfig
from mve.types import Count, Json, NonNegative, OwnCount, Positive, UserError, Whole

LONGEST_SHOWN = 100  # characters of a value in a message
SHOWN_BY = "; `mve settings` shows them all"
FORMAT = 5  # of config.json; files that do not say are of format 1


@dataclass(frozen=True, kw_only=True)
class ReplayConfig:
    """The memory of real transitions."""

    capacity: Positive = 1_000_000
    """Transitions kept, at most; no more is ever allocated than the budget of steps can fill."""
    recency: Annotated[float, Meta(ge=1, le=100)] = 1.0
    """1: all rows are drawn alike, for the model, for rollouts' starts and for updates. p above 1: those of a
    share x of all that are newest with probability x^(1/p). (retrace draws alike.)"""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The loop: how many real steps, and how much learning for each."""

    total_steps: Count = 0
    """Environment steps; 0: 25 full-length episodes, 25 000 where episodes have no time limit."""
    block_steps: Positive = 20
    """Real steps collected with one policy before learning goes on (paper: 100)."""
    learning_starts: OwnCount = 1000
    """Environment steps before the first update of the agent (released code of the paper: 10 000). auto: a
    fifth of the budget, 5000 at most."""
    updates_per_step: NonNegative = 1.0
    """Updates of the agent per environment step (paper: 4)."""
    initial_updates: OwnCount = 0
    """Updates of the agent as it begins to learn, on top of the steady rate (DHMBPO: 5000). auto: as many
    as steps came before; a fifth of them where what ends an episode has to be learned, of which random
    actions show one kind alone."""
    overlap: bool = True
    """Collect a block while the device learns from the one before: the policy acts one block behind. (Not
    where the environment is on the device too: there it never does.)"""
    warmup: Literal["uniform", "policy"] = "uniform"
    """Actions before learning starts: uniform, or the untrained exploration policy (the paper's code)."""
    hold_steps: Annotated[int, Meta(ge=1, le=1000)] = 1
    """Environment steps that a draw of exploration noise, or a random action, stays at most; how many is
    drawn, n with probability proportional to n^-2 (FlashSAC: 16). None stays beyond its block."""
    checkpoint_interval: Count = 0
    """Environment steps between checkpoints, of which one is always written at the end; 0: as between
    evaluations, 5000 at most."""
    matmul_precision: Literal["float32", "tensorfloat32", "bfloat16"] = "float32"
    """Of matrix products on GPU and TPU, whose own default rounds the inputs to fewer bits; a CPU computes in
    float32 whatever is asked."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that decides a run, but for the user's own functions and environment instances."""

    algo: str
    learner: str
    seed: Count
    agent: AgentConfig
    env: EnvConfig = field(default_factory=EnvConfig)
    replay: ReplayConfig = field(default_factory=ReplayConfig)
    dynamics: DynamicsConfig = field(default_factory=DynamicsConfig)
    imagination: ImaginationConfig = field(default_factory=ImaginationConfig)
    targets: TargetsConfig = field(default_factory=TargetsConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)


def build(env_id: str, algo: str | None = None, assignments: Sequence[str] = (), seed: int = 0) -> Config:
    """The configuration of a preset on a task, with the user's `section.field=value` on top."""
    return _config(_plain(env_id, algo or DEFAULT_ALGO, assignments, seed))


def task(env_id: str, algo: str | None = None, assignments: Sequence[str] = ()) -> EnvConfig:
    """The environment's part of `build`: the environment is made before its actions choose an algorithm."""
    return _section("env", EnvConfig, _plain(env_id, algo or DEFAULT_ALGO, assignments, 0)["env"])


def check_actions(config: Config, spec: EnvSpec) -> None:
    """Refuse an algorithm that is not for the task's kind of actions."""
    if AGENTS[config.learner][1].discrete == spec.discrete:
        return
    default = DEFAULT_DISCRETE_ALGO if spec.discrete else DEFAULT_ALGO
    kind = f"{'discrete' if spec.discrete else 'continuous'} action{'s' * (spec.action_size != 1)}"
    raise UserError(
        f"{spec.name} has {spec.action_size} {kind}, which {config.algo} is not for; "
        f"use --algo {default}, or see `mve list` for others"
    )


def whole(what: str, number: Whole) -> int:
    """As Python's own; UserError for what has a fraction, or is no number."""
    try:
        if isinstance(number, SupportsIndex):
            return operator.index(number)
        if (value := float(number)).is_integer():
            return int(value)
    except (TypeError, ValueError):
        pass
    raise UserError(f"{what} {_shown(number)} is not a whole number")


def _plain(env_id: str, algo: str, assignments: Sequence[str], seed: int) -> Json:
    if algo not in PRESETS:
        raise UserError(
            f"unknown algorithm {_shown(algo)}{nearest(algo, PRESETS)}; `mve list` shows them all"
        )
    if not 0 <= seed <= LARGEST_SEED:
        raise UserError(f"seed {_shown(seed)} is out of range; it has to be 0 to {LARGEST_SEED}")
    preset = PRESETS[algo]
    data: Json = {"algo": algo, "learner": preset.learner, "seed": seed, "env": {"id": env_id}}
    for prefix, settings in {"": preset.settings, **preset.tasks}.items():
        if env_id.startswith(prefix):
            for name, value in settings.items():
                _assign(data, name, value)
    for assignment in assignments:
        name, separator, text = assignment.partition("=")
        if not separator:
            raise UserError(f"cannot read the setting {_shown(assignment)}; write section.field=value")
        _assign(data, name.strip(), _literal(text.strip()))
    return data


def _literal(text: str) -> object:
    """JSON where it is JSON (numbers, lists, true), the text itself where it is not."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return {"True": True, "False": False, "None": None}.get(text, text)


def _assign(data: Json, name: str, value: object) -> None:
    section, _, setting = name.partition(".")
    if section in ("algo", "learner", "seed") or not setting:
        raise UserError(
            f"cannot set {_shown(name)}; settings are section.field, such as train.updates_per_step"
        )
    data.setdefault(section, {})[setting] = value


def nearest(name: str, names: Sequence[str] | Mapping[str, object]) -> str:
    near = difflib.get_close_matches(name[:LONGEST_SHOWN], list(names), n=3, cutoff=0.5)
    return f"; nearest: {', '.join(near)}" if near else ""


def to_json(config: Config) -> Json:
    """Plain data, enough to build the same configuration again."""
    return {"format": FORMAT, **json.loads(json.dumps(asdict(config)))}


def from_json(data: Any) -> Config:
    """The configuration that `to_json` described, in this version or an older one.

    UserError for one of a newer version; unknown names and bad values are refused by name.
    """
    if not isinstance(data, dict):
        raise UserError(f"config: it has to be a mapping of settings, not {type(data).__name__}")
    version = data.get("format", 1)
    if type(version) is not int or version < 1:
        raise UserError(f"config: format {_shown(version)} is not a version of it")
    if version > FORMAT:
        raise UserError(f"config: format {version}, this mve reads {FORMAT}; use the mve that wrote it")
    data = {name: value for name, value in data.items() if name != "format"}
    for older in range(version, FORMAT):
        data = MIGRATIONS[older](data)
    return _config(data)


def _before_overlap(data: Json) -> Json:
    """The first files were written when blocks were always collected with the newest policy."""
    settings = data.get("train")
    return data | {"train": {"overlap": False} | settings} if isinstance(settings, dict) else data


def _before_average_share(data: Json) -> Json:
    """The evaluated actor was an exponential average, of a rate that was the same throughout. What is learned
    does not depend on it; from here on its span is that share which it was of the budget."""
    settings = data.get("agent")
    if not isinstance(settings, dict) or "average_rate" not in settings:
        return data
    settings = dict(settings)
    rate, train = settings.pop("average_rate"), data.get("train")
    steps = train.get("total_steps") if isinstance(train, dict) else None
    if isinstance(rate, int | float) and 0 < rate < 1 and isinstance(steps, int) and steps > 0:
        settings["average_share"] = min(1.0, 1.0 / (rate * steps))
    return data | {"agent": settings}


def _before_limits(data: Json) -> Json:
    """Terminations were learned by a net alone, and limits are in none of the checkpoints."""
    settings = data.get("dynamics")
    return data | {"dynamics": {"limits": False} | settings} if isinstance(settings, dict) else data


def _before_spare_bins(data: Json) -> Json:
    """Histograms ended at the bounds of values."""
    settings = data.get("agent")
    if not isinstance(settings, dict) or not settings.get("value_bins"):
        return data
    return data | {"agent": {"spare_bins": 0} | settings}


# From the version that is the key to the next. Settings that are new need no migration where their default
# is what was done before.
MIGRATIONS: dict[int, Callable[[Json], Json]] = {
    1: _before_overlap,
    2: _before_average_share,
    3: _before_limits,
    4: _before_spare_bins,
}


def _config(data: Json) -> Config:
    learner, algo, seed = (data.get(name) for name in ("learner", "algo", "seed"))
    if not isinstance(learner, str) or learner not in AGENTS:
        raise UserError(f"config: learner {_shown(learner)} is not one of {', '.join(AGENTS)}")
    if not isinstance(algo, str):
        raise UserError(f"config: algo {_shown(algo)} is not the name of an algorithm")
    if type(seed) is not int or not 0 <= seed <= LARGEST_SEED:
        raise UserError(f"config: seed {_shown(seed)} is not a number from 0 to {LARGEST_SEED}")
    sections: dict[str, Any] = {"agent": AGENTS[learner][0]}
    for f in fields(Config):
        if isinstance(f.default_factory, type) and is_dataclass(f.default_factory):
            sections[f.name] = f.default_factory
    names = [f.name for f in fields(Config)]
    arguments: Json = {}
    for name, value in data.items():
        if name not in names:
            raise UserError(f"unknown settings section {_shown(name)}{nearest(name, names)}{SHOWN_BY}")
        arguments[name] = _section(name, sections[name], value) if name in sections else value
    arguments.setdefault("agent", sections["agent"]())
    return Config(**arguments)


def _shown(value: Any) -> str:
    """A value in a message: not more of it than fits."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits, say
        text = f"of type {type(value).__name__}"
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}..."


def _section(name: str, section: type, data: Any) -> Any:
    if not isinstance(data, dict):
        raise UserError(f"settings {name} = {_shown(data)}: they have to be a mapping of names to values")
    known = [f.name for f in fields(section)]
    for setting in data:
        if setting not in known:
            full = _shown(f"{name}.{setting}")
            raise UserError(f"unknown setting {full}{nearest(setting, known)}{SHOWN_BY}")
    try:
        # What env.kwargs holds goes into config.json as it is.
        json.dumps(data, allow_nan=name != "env")
        return msgspec.convert(data, section)
    except msgspec.ValidationError as error:
        reason, _, place = str(error).partition(" - at `$.")
        setting = place.rstrip("`") or name
        setting = setting.partition("[")[0]
        value, kind = data.get(setting), get_type_hints(section).get(setting)
        if get_origin(kind) is Literal:
            reason = f"it has to be one of {', '.join(map(str, get_args(kind)))}"
        elif reason.startswith("Invalid enum value"):  # of the words that may stand in place of a number
            words = [get_args(each) for each in get_args(kind) if get_origin(each) is Literal]
            reason = f"it has to be a number or {', '.join(chain(*words))}"
        reason = reason.replace("`array`", "a list such as [256,256]")
        raise UserError(f"setting {name}.{setting} = {_shown(value)}: {reason}") from error
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise UserError(f"settings {name} = {_shown(data)}: {error}") from error
