"""Trees of JSON put into Calico's stored form: field order, zero values, number and time spellings.

The command line changes objects that others wrote, with fields that this version does not know. So
it never turns an object into a typed struct and back; it works on the JSON tree and only arranges
it. `conform` gives the tree as Go's encoder would write it (fields in the order of the Go struct,
empty ones dropped where Go drops them, durations and AS numbers in canonical spelling) and reports
every field of a wrong type by its path, and every field it does not know. Unknown fields stay, at
the end: whether they are welcome is the caller's question. Pure.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from cymric.model.durations import go_duration
from cymric.model.net import parse_asn

Tree = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong with one field; `path` is written with dots, `spec.bgp.ipv4Address`."""

    path: str
    message: str

    def __str__(self) -> str:
        return f"{self.path}: {self.message}" if self.path else self.message


@dataclass(frozen=True, slots=True)
class Field:
    """One field of a Go struct.

    `kind` is a key of `_READERS`, or `object` / `objects` with `fields` for what is inside.
    `keeps_zero` marks a pointer: its zero value is written when given, all others drop it.
    """

    name: str
    kind: str
    keeps_zero: bool = False
    fields: Mapping[str, Field] = field(default_factory=dict)


Fields = Mapping[str, Field]


def fields(text: str, **inside: Fields) -> Fields:
    """A struct in words: `name:kind`, `name:kind?` for a pointer; `inside` tells nested structs."""
    table: dict[str, Field] = {}
    for word in text.split():
        name, _, kind = word.partition(":")
        table[name] = Field(
            name, kind.removesuffix("?") or "string", kind.endswith("?"), inside.get(name, {})
        )
    return table


@dataclass(slots=True)
class Conformed:
    """A tree in stored form, and what was noticed on the way."""

    tree: Tree
    problems: list[Problem]
    unknown: list[str]


def conform(tree: object, table: Fields, path: str = "") -> Conformed:
    """`tree` in stored form. What has a wrong type is left out of it and told in `problems`."""
    done = Conformed({}, [], [])
    if not isinstance(tree, Mapping):
        done.problems.append(Problem(path, f"expected fields, not {_describe(tree)}"))
        return done
    for name, entry in table.items():
        value = tree.get(name)
        if value is None:
            continue
        try:
            value = _conform_value(value, entry, f"{path}.{name}" if path else name, done)
        except ValueError as error:
            done.problems.append(Problem(f"{path}.{name}" if path else name, str(error)))
            continue
        if entry.keeps_zero or not _is_zero(value):
            done.tree[name] = value
    for name, value in tree.items():
        if name not in table and value is not None:
            done.unknown.append(f"{path}.{name}" if path else str(name))
            done.tree[str(name)] = value
    return done


def without_indices(path: str) -> str:
    """The path of a field with list positions left out: the same field, wherever it moved."""
    return re.sub(r"\[\d+\]", "", path)


def _conform_value(value: object, entry: Field, path: str, done: Conformed) -> object:
    if entry.kind == "object":
        return _conform_object(value, entry, path, done)
    if entry.kind == "objects":
        return [
            _conform_object(item, entry, f"{path}[{index}]", done)
            for index, item in enumerate(_list(value))
        ]
    return _READERS[entry.kind](value)


def _conform_object(value: object, entry: Field, path: str, done: Conformed) -> Tree:
    inner = conform(value, entry.fields, path)
    done.problems += inner.problems
    done.unknown += inner.unknown
    return inner.tree


def _is_zero(value: object) -> bool:
    return value in ("", 0, False) or (isinstance(value, (list, dict)) and not value)


def _describe(value: object) -> str:
    words = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a number"}
    for kind, word in words.items():
        if type(value) is kind:
            return f"{word} ({value!r})" if kind in (str, bool, int) else word
    return repr(value)


def _string(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"expected text, not {_describe(value)}")
    return value


def _bool(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"expected true or false, not {_describe(value)}")
    return value


def _int(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"expected a whole number, not {_describe(value)}")
    return value


def _number(value: object) -> int | float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"expected a number, not {_describe(value)}")
    return int(value) if value == int(value) else value


def _duration(value: object) -> str:
    return go_duration(_string(value))


def _asn(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise ValueError(f"expected an AS number, not {_describe(value)}")
    try:
        return parse_asn(value)
    except ValueError:
        raise ValueError(f"{value!r} is no AS number") from None


def _list(value: object) -> list[object]:
    if not isinstance(value, list):
        raise ValueError(f"expected a list, not {_describe(value)}")
    return value


def _strings(value: object) -> list[str]:
    return [_string(item) for item in _list(value)]


def _map(value: object) -> dict[str, str]:
    if not isinstance(value, dict):
        raise ValueError(f"expected names with text values, not {_describe(value)}")
    for name, text in value.items():
        if not isinstance(name, str) or not isinstance(text, str):
            raise ValueError(f"{name!r} must be text with a text value, not {_describe(text)}")
    return dict(sorted(value.items()))


def _port(value: object) -> int | str:
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise ValueError(f"expected a number or text, not {_describe(value)}")
    return value


_READERS: Mapping[str, Callable[[object], object]] = {
    "string": _string,
    "bool": _bool,
    "int": _int,
    "number": _number,
    "duration": _duration,
    "asn": _asn,
    "strings": _strings,
    "map": _map,
    "port": _port,
    "ports": lambda value: [_port(item) for item in _list(value)],
    "asns": lambda value: [_asn(item) for item in _list(value)],
    "any": lambda value: value,
}
