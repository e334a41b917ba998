"""Trees put into stored form: order, zero values, spellings, and what is reported."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cymric.cli.kinds import KINDS, find
from cymric.cli.schema import Fields, conform, fields
from cymric.model.codec import encode_tree
from cymric.model.durations import duration_s, go_duration

TABLE = fields(
    "name on:bool maybe:bool? count:int every:duration asn:asn tags:strings marks:map "
    "inner:object? items:objects free:any",
    inner=fields("a b:int?"),
    items=fields("x"),
)


@pytest.mark.parametrize(
    ("given_tree", "stored"),
    [
        pytest.param({"count": 1, "name": "n"}, {"name": "n", "count": 1}, id="order"),
        pytest.param({"on": False, "maybe": False}, {"maybe": False}, id="false behind a pointer"),
        pytest.param({"name": "", "count": 0, "tags": []}, {}, id="zero values"),
        pytest.param({"name": None, "inner": None}, {}, id="null"),
        pytest.param({"every": "120s"}, {"every": "2m0s"}, id="duration"),
        pytest.param({"asn": "1.10"}, {"asn": 65546}, id="dotted AS number"),
        pytest.param({"marks": {"b": "1", "a": "2"}}, {"marks": {"a": "2", "b": "1"}}, id="map"),
        pytest.param({"inner": {"b": 0, "a": "x"}}, {"inner": {"a": "x", "b": 0}}, id="inside"),
        pytest.param({"inner": {}}, {"inner": {}}, id="empty behind a pointer"),
        pytest.param({"items": [{"x": "1"}, {}]}, {"items": [{"x": "1"}, {}]}, id="list"),
        pytest.param({"free": {"z": 1, "a": [None]}}, {"free": {"z": 1, "a": [None]}}, id="free"),
    ],
)
def test_stored_form(given_tree: dict[str, Any], stored: dict[str, Any]) -> None:
    """A tree comes out in Go's order, without what Go leaves out, in canonical spelling."""
    done = conform(given_tree, TABLE)
    assert not done.problems
    assert not done.unknown
    assert encode_tree(done.tree) == encode_tree(stored)


@pytest.mark.parametrize(
    ("tree", "path", "message"),
    [
        ({"name": 1}, "spec.name", "expected text, not a number (1)"),
        ({"on": "yes"}, "spec.on", "expected true or false, not text ('yes')"),
        ({"count": True}, "spec.count", "expected a whole number, not true or false (True)"),
        ({"count": 1.5}, "spec.count", "expected a whole number, not 1.5"),
        ({"every": "soon"}, "spec.every", "'soon' is not a duration"),
        ({"asn": 2**32}, "spec.asn", "is no AS number"),
        ({"tags": "a"}, "spec.tags", "expected a list, not text ('a')"),
        ({"marks": {"a": 1}}, "spec.marks", "'a' must be text with a text value"),
        ({"inner": []}, "spec.inner", "expected fields, not a list"),
        ({"items": [{}, {"x": 2}]}, "spec.items[1].x", "expected text"),
    ],
)
def test_problems_name_the_field(tree: dict[str, Any], path: str, message: str) -> None:
    """A value of the wrong type is reported by the path of its field."""
    (problem,) = conform(tree, TABLE, "spec").problems
    assert problem.path == path
    assert message in problem.message


def test_unknown_fields_are_kept_and_told() -> None:
    """Fields that are not in the table stay, at the end, and are told by path."""
    done = conform({"new": 1, "name": "n", "items": [{"y": 2}]}, TABLE, "spec")
    assert done.unknown == ["spec.items[0].y", "spec.new"]
    assert list(done.tree) == ["name", "items", "new"]


def test_go_escapes() -> None:
    """Strings carry the escapes of Go's encoder; other text stays UTF-8."""
    assert encode_tree({"a": "<&>\u2028é"}) == '{"a":"\\u003c\\u0026\\u003e\\u2028é"}'.encode()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 70000) | st.text("a1sm<.", max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab", max_size=2), inner),
    max_leaves=8,
)


def _names(table: Fields) -> st.SearchStrategy[str]:
    return st.sampled_from(sorted(table)) | st.text("xyz", max_size=2)


@given(st.data())
def test_conforming_is_final(data: st.DataObject) -> None:
    """Whatever a file holds, its stored form is valid JSON and conforms to itself."""
    kind = data.draw(st.sampled_from(KINDS))
    names = _names(kind.fields["spec"].fields)
    spec = data.draw(st.dictionaries(names, JSON, max_size=5))
    once = conform({"kind": kind.name, "spec": spec}, kind.fields)
    twice = conform(once.tree, kind.fields)
    assert encode_tree(twice.tree) == encode_tree(once.tree)
    assert not twice.problems
    assert json.loads(encode_tree(once.tree)) == once.tree


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("90s", "1m30s"), ("0", "0s"), ("0s", "0s"), ("60m", "1h0m0s"), ("1500ms", "1.5s"),
        ("250ms", "250ms"), ("0.5s", "500ms"), ("1us", "1µs"), ("3ns", "3ns"), ("-2s", "-2s"),
        ("100h", "100h0m0s"),
    ],
)  # fmt: skip
def test_durations_as_go_prints_them(text: str, canonical: str) -> None:
    """Durations are written as Go's Duration.String does."""
    assert go_duration(text) == canonical


@given(st.integers(0, 10**16))
def test_durations_keep_their_length(nanoseconds: int) -> None:
    """The canonical spelling means the same span, and is its own canonical spelling."""
    canonical = go_duration(f"{nanoseconds}ns")
    assert go_duration(canonical) == canonical
    assert duration_s(canonical) == pytest.approx(nanoseconds / 1e9)


@pytest.mark.parametrize("alias", ["IPPool", "ippools", "NODES", "wep", "bgpConfig", "FelixConfig"])
def test_kinds_are_found_in_any_case(alias: str) -> None:
    """Kinds answer to calicoctl's aliases, in any case."""
    assert find(alias).name
