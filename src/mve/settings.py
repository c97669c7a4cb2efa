"""What can be set: every setting, an algorithm's value for it, what it may be and what it is for."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple, get_type_hints

import msgspec.inspect as kinds

from mve.config import Config, build, nearest
from mve.types import UserError

NO_TASK = "ENV"  # which no preset has a row for
NO_LIMIT = 1e6  # from which on an upper bound is a guard against slips, not worth telling


class Setting(NamedTuple):
    """One of them, as `--set NAME=VALUE` takes it."""

    name: str  # section.field
    value: Any  # the algorithm's
    default: Any  # where an algorithm does not say
    allowed: str
    meaning: str


def settings(algo: str | None = None, env_id: str | None = None) -> list[Setting]:
    """All that an algorithm can be given, with its values: on a task, where its preset has any for it."""
    built = build(env_id or NO_TASK, algo)
    return [
        setting
        for section in fields(Config)
        if is_dataclass(values := getattr(built, section.name))
        for setting in _of_section(section.name, values)
        if setting.name != "env.id"
    ]


def about(wanted: Sequence[str], known: Sequence[Setting]) -> list[Setting]:
    """Those in whose name or meaning one of the words stands; UserError for a word that stands nowhere."""
    for word in wanted:
        if not any(_mentions(setting, word) for setting in known):
            names = dict.fromkeys(setting.name.partition(".")[2] for setting in known)
            raise UserError(f"settings: no setting is about {word!r}{nearest(word, names)}")
    return [one for one in known if not wanted or any(_mentions(one, word) for word in wanted)]


def _mentions(setting: Setting, word: str) -> bool:
    return word.lower() in f"{setting.name} {setting.meaning}".lower()


def _of_section(name: str, values: Any) -> list[Setting]:
    meanings, hints = _docstrings(type(values)), get_type_hints(type(values), include_extras=True)
    return [
        Setting(
            name=f"{name}.{field.name}",
            value=getattr(values, field.name),
            default=field.default,
            allowed=_allowed(kinds.type_info(hints[field.name])),
            meaning=meanings[field.name],
        )
        for field in fields(values)
    ]


def _docstrings(section: type) -> dict[str, str]:
    """The string below each field, of the class and of those that it extends."""
    found: dict[str, str] = {}
    for kind in reversed(section.__mro__[:-1]):
        [body] = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
        assert isinstance(body, ast.ClassDef)
        for field, below in zip(body.body, body.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr):
                text = ast.literal_eval(below.value)
                found[ast.unparse(field.target)] = " ".join(text.split())
    return found


def _number(kind: kinds.IntType | kinds.FloatType) -> str:
    words = "whole number" if isinstance(kind, kinds.IntType) else "number"
    if kind.gt is not None:
        words += f" above {kind.gt:g}"
    elif kind.ge is not None and kind.ge > -NO_LIMIT:
        words += f" from {kind.ge:g}"
    return words if kind.le is None or kind.le >= NO_LIMIT else f"{words} to {kind.le:g}"


def _allowed(kind: kinds.Type) -> str:
    """A type in words."""
    match kind:
        case kinds.UnionType(types=several):
            return " or ".join(_allowed(each) for each in several)
        case kinds.LiteralType(values=words):
            return " or ".join(map(str, words))
        case kinds.BoolType():
            return "true or false"
        case kinds.NoneType():
            return "null"
        case kinds.IntType() | kinds.FloatType():
            return _number(kind)
        case kinds.VarTupleType(item_type=item):
            return f"[{_allowed(item)}, ...]"
        case kinds.TupleType(item_types=items):
            return f"[{', '.join(map(_allowed, items))}]"
        case kinds.DictType():
            return "names and values"
        case _:
            return "text"
