"""Objects in files: YAML or JSON, one or many documents, lists, as calicoctl reads them. Pure.

A document is one object, a `…List` object with `items`, or a bare list of objects. `-` is stdin.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import yaml

from cymric.cli.schema import Tree


class BadManifest(ValueError):
    """A file that holds no objects; the message says which file and where in it."""


@dataclass(frozen=True, slots=True)
class Found:
    """One object of a file; `where` is told in errors."""

    where: str
    tree: Tree


class _Loader(yaml.SafeLoader):
    """YAML as Calico reads it: dates and `64512:10` are text, a key given twice is a mistake."""


def _no_repeats(loader: _Loader, node: yaml.MappingNode) -> dict[object, object]:
    seen: set[str] = set()
    for key_node, _ in node.value:
        if key_node.value in seen:
            raise yaml.MarkedYAMLError(
                problem=f"field {key_node.value!r} is given twice", problem_mark=key_node.start_mark
            )
        if isinstance(key_node, yaml.ScalarNode):
            seen.add(key_node.value)
    return loader.construct_mapping(node, deep=True)


_WITHOUT_DATES_AND_BASE_60 = {
    first: [
        (tag, rule) for tag, rule in resolvers if tag.rpartition(":")[2] not in ("timestamp", "int")
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.yaml_implicit_resolvers = _WITHOUT_DATES_AND_BASE_60
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int",
    re.compile(r"[-+]?(?:0|[1-9][0-9]*|0x[0-9a-fA-F]+|0[0-7]+)\Z"),
    list("-+0123456789"),
)
_Loader.add_constructor("tag:yaml.org,2002:map", _no_repeats)


def read(text: str, name: str) -> list[Found]:
    """Every object in `text`, in order. Raises BadManifest."""
    try:
        documents = list(yaml.load_all(text, _Loader))
    except yaml.YAMLError as error:
        raise BadManifest(f"{name}: {error}") from None
    found = [
        item
        for number, document in enumerate(documents, 1)
        if document is not None
        for item in _objects(document, f"{name}, document {number}" if number > 1 else name)
    ]
    if not found:
        raise BadManifest(f"{name}: no objects in it")
    return found


def _objects(document: object, where: str) -> Iterator[Found]:
    if isinstance(document, list):
        for number, item in enumerate(document, 1):
            yield from _objects(item, f"{where}, item {number}")
    elif not isinstance(document, dict):
        raise BadManifest(f"{where}: expected an object with kind, metadata and spec")
    elif isinstance(document.get("items"), list) and str(document.get("kind")).endswith("List"):
        yield from _objects(document["items"], where)
    elif not isinstance(document.get("kind"), str):
        raise BadManifest(f"{where}: no kind")
    else:
        yield Found(where, document)
