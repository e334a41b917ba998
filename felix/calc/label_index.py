"""Which selectors match which items, kept up change by change.

Items (endpoints, sets of networks) carry labels of their own and inherit those of their parents
(profiles): for each parent in order, the labels whose keys are not set yet. When labels, parents or
selectors change, the starts and ends of matches are told, once each:

    put_item, put_parent, put_selector ─▶ index ─▶ on_match(selector, item, True | False)

Pruning keeps the cost in proportion to what changed. Most selectors can only match where a certain
label has one of certain values (`==`, `in`) or is there at all. Such a selector is filed under the
label of it that fewest items have: an item is then tried only against selectors filed under its own
labels, and a selector only against items that have its label. The choice is about speed alone; the
matches depend on what is there now, never on the order in which it came.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from cymric.model.selector import And, Compare, Has, Member, Node, Selector

S = TypeVar("S", bound=Hashable)
I = TypeVar("I", bound=Hashable)  # noqa: E741 - an item

Labels = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Need:
    """A label that every match must have, with one of `values` (None: any value)."""

    label: str
    values: frozenset[str] | None


@dataclass(slots=True)
class _Item:
    own: Labels
    parents: tuple[str, ...]
    labels: Labels


class LabelIndex(Generic[S, I]):
    """See the chapter."""

    def __init__(self, on_match: Callable[[S, I, bool], None]) -> None:
        self._on_match = on_match
        self._items: dict[I, _Item] = {}
        self._parents: dict[str, Labels] = {}
        self._items_by_parent: dict[str, set[I]] = {}
        self._items_by_label: dict[str, dict[str, set[I]]] = {}
        self._selectors: dict[S, Selector] = {}
        self._needs: dict[S, Need | None] = {}
        self._by_value: dict[tuple[str, str], set[S]] = {}
        self._by_label: dict[str, set[S]] = {}
        self._without_need: set[S] = set()
        self._selectors_by_item: dict[I, set[S]] = {}
        self._items_by_selector: dict[S, set[I]] = {}
        self.evaluations = 0
        """How many selectors were tried on items so far."""

    def selectors_of(self, item: I) -> Iterable[S]:
        """What matches an item."""
        return self._selectors_by_item.get(item, ())

    def items_of(self, selector: S) -> Iterable[I]:
        """What a selector matches."""
        return self._items_by_selector.get(selector, ())

    def put_item(self, item: I, labels: Labels, parents: tuple[str, ...]) -> None:
        """An item is there, with these labels and parents."""
        known = self._items.get(item)
        if known and known.own == labels and known.parents == parents:
            return
        if known is None or known.parents != parents:
            if known:
                self._leave_parents(item, known.parents)
            for name in parents:
                self._items_by_parent.setdefault(name, set()).add(item)
        before = known.labels if known else {}
        found = self._items[item] = _Item(labels, parents, self._effective(labels, parents))
        self._file_item(item, before, found.labels)
        self._match_item(item, found.labels)

    def drop_item(self, item: I) -> None:
        """An item is gone."""
        known = self._items.pop(item, None)
        if known is None:
            return
        self._leave_parents(item, known.parents)
        self._file_item(item, known.labels, {})
        for selector in self._selectors_by_item.pop(item, ()):
            self._items_by_selector[selector].discard(item)
            self._on_match(selector, item, False)

    def put_parent(self, name: str, labels: Labels) -> None:
        """A parent hands down these labels; none is the same as no such parent."""
        if self._parents.get(name, {}) == labels:
            return
        if labels:
            self._parents[name] = labels
        else:
            del self._parents[name]
        for item in self._items_by_parent.get(name, ()):
            known = self._items[item]
            before, known.labels = known.labels, self._effective(known.own, known.parents)
            if known.labels != before:
                self._file_item(item, before, known.labels)
                self._match_item(item, known.labels)

    def put_selector(self, name: S, selector: Selector) -> None:
        """A selector is there."""
        known = self._selectors.get(name)
        if known == selector:
            return
        if known is not None:
            self._unfile_selector(name)
        self._selectors[name] = selector
        need = self._file_selector(name, selector)
        matched = {item for item in self._candidates(need) if self._matches(selector, item)}
        before = self._items_by_selector.get(name, set())
        self._items_by_selector[name] = matched
        for item in before - matched:
            self._selectors_by_item[item].discard(name)
            self._on_match(name, item, False)
        for item in matched - before:
            self._selectors_by_item.setdefault(item, set()).add(name)
            self._on_match(name, item, True)

    def drop_selector(self, name: S) -> None:
        """A selector is gone."""
        if self._selectors.pop(name, None) is None:
            return
        self._unfile_selector(name)
        del self._needs[name]
        for item in self._items_by_selector.pop(name, ()):
            self._selectors_by_item[item].discard(name)
            self._on_match(name, item, False)

    # --- labels -----------------------------------------------------------------------------------

    def _effective(self, own: Labels, parents: tuple[str, ...]) -> Labels:
        inherited = [labels for name in parents if (labels := self._parents.get(name))]
        if not inherited:
            return own
        found: dict[str, str] = {}
        for labels in reversed(inherited):
            found.update(labels)
        found.update(own)
        return found

    def _leave_parents(self, item: I, parents: tuple[str, ...]) -> None:
        for name in set(parents):
            items = self._items_by_parent[name]
            items.discard(item)
            if not items:
                del self._items_by_parent[name]

    def _file_item(self, item: I, before: Labels, after: Labels) -> None:
        for label, value in before.items():
            if after.get(label) != value:
                by_value = self._items_by_label[label]
                by_value[value].discard(item)
                if not by_value[value]:
                    del by_value[value]
                    if not by_value:
                        del self._items_by_label[label]
        for label, value in after.items():
            if before.get(label) != value:
                self._items_by_label.setdefault(label, {}).setdefault(value, set()).add(item)

    # --- matching ---------------------------------------------------------------------------------

    def _matches(self, selector: Selector, item: I) -> bool:
        self.evaluations += 1
        return selector.root.matches(self._items[item].labels)

    def _match_item(self, item: I, labels: Labels) -> None:
        matched = set()
        for name in self._possible(labels):
            self.evaluations += 1
            if self._selectors[name].root.matches(labels):
                matched.add(name)
        before = self._selectors_by_item.get(item, set())
        if matched == before:
            return
        self._selectors_by_item[item] = matched
        for name in before - matched:
            self._items_by_selector[name].discard(item)
            self._on_match(name, item, False)
        for name in matched - before:
            self._items_by_selector[name].add(item)
            self._on_match(name, item, True)

    def _possible(self, labels: Labels) -> Iterator[S]:
        """The selectors that could match; each is filed so that it comes once at most."""
        yield from self._without_need
        for pair in labels.items():
            yield from self._by_value.get(pair, ())
            yield from self._by_label.get(pair[0], ())

    def _candidates(self, need: Need | None) -> Iterator[I]:
        """The items that a selector with this need could match, each once."""
        if need is None:
            yield from self._items
            return
        by_value = self._items_by_label.get(need.label, {})
        for value in by_value if need.values is None else need.values:
            yield from by_value.get(value, ())

    # --- filing selectors -------------------------------------------------------------------------

    def _file_selector(self, name: S, selector: Selector) -> Need | None:
        need = min(needs(selector.root), key=self._rank, default=None)
        self._needs[name] = need
        if need is None:
            self._without_need.add(name)
        elif need.values is None:
            self._by_label.setdefault(need.label, set()).add(name)
        else:
            for value in need.values:
                self._by_value.setdefault((need.label, value), set()).add(name)
        return need

    def _unfile_selector(self, name: S) -> None:
        need = self._needs[name]
        if need is None:
            self._without_need.discard(name)
        elif need.values is None:
            _discard(self._by_label, need.label, name)
        else:
            for value in need.values:
                _discard(self._by_value, (need.label, value), name)

    def _rank(self, need: Need) -> tuple[int, int]:
        """The fewer items, and the fewer values, the better."""
        by_value = self._items_by_label.get(need.label, {})
        if need.values is None:
            return sum(map(len, by_value.values())), 1 << 30
        return sum(len(by_value.get(value, ())) for value in need.values), len(need.values)


K = TypeVar("K", bound=Hashable)


def _discard(sets: dict[K, set[S]], key: K, name: S) -> None:
    found = sets[key]
    found.discard(name)
    if not found:
        del sets[key]


def needs(node: Node) -> list[Need]:
    """Labels that whatever matches `node` must have; none if it may match without any."""
    match node:
        case Has(label):
            return [Need(label, None)]
        case Compare(label, "==", value):
            return [Need(label, frozenset({value}))]
        case Compare(label, operator) if operator != "!=":
            return [Need(label, None)]
        case Member(label, values, False):
            return [Need(label, values)]
        case And(operands):
            return [need for operand in operands for need in needs(operand)]
    return []
