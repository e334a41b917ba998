"""Label selectors: Calico's little language for choosing nodes, endpoints and namespaces.

`parse` turns text into a `Selector`; a selector says whether a map of labels matches, gives its
canonical text (two selectors that differ only in spelling share it) and an id made from that text.
The id is what names an IP set in the kernel, so the canonical text must agree with Calico's to the
last blank: a restarted daemon, and Calico itself, recognise a set by it.

Grammar, from the loosest binding to the tightest; blanks are spaces and tabs only:

    selector := empty | or                     empty matches everything
    or       := and ("||" and)*
    and      := unary ("&&" unary)*
    unary    := "!"* primary
    primary  := has(label) | all() | global() | "(" or ")"
              | label ("==" | "!=" | contains | starts with | ends with) literal
              | label (in | not in) "{" [literal ("," literal)* [","]] "}"

Words mean something only where they can stand: `in in {"a"}` asks about a label called `in`.
`!=` and `not in` are true of a label that is absent; every other comparison needs it present.

Source: projectcalico/calico v3.32 libcalico-go/lib/selector, described in our own words.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

Labels = Mapping[str, str]

MAX_LABEL_LENGTH = 512
MAX_DEPTH = 100
"""Parentheses inside each other. Calico sets no bound; nobody writes so many by hand, and without
one a hostile value could end a daemon by exhausting the interpreter's stack."""


class SelectorError(ValueError):
    """Text that is no selector. `position` counts characters from 0."""

    def __init__(self, text: str, position: int, problem: str) -> None:
        super().__init__(f"selector {text!r}, at character {position + 1}: {problem}")
        self.text = text
        self.position = position
        self.problem = problem


@dataclass(frozen=True, slots=True)
class Everything:
    """`all()`, and `global()`, which only the conversion of namespace selectors tells apart."""

    word: str = "all"

    def matches(self, labels: Labels) -> bool:
        """True."""
        return True

    def __str__(self) -> str:
        return f"{self.word}()"


@dataclass(frozen=True, slots=True)
class Has:
    """`has(label)`."""

    label: str

    def matches(self, labels: Labels) -> bool:
        """Whether the label is there, with whatever value."""
        return self.label in labels

    def __str__(self) -> str:
        return f"has({self.label})"


@dataclass(frozen=True, slots=True)
class Compare:
    """A label against one value; `operator` is a key of `OPERATORS`."""

    label: str
    operator: str
    value: str

    def matches(self, labels: Labels) -> bool:
        """Whether the label's value stands in the relation; only `!=` holds of an absent label."""
        actual = labels.get(self.label)
        if actual is None:
            return self.operator == "!="
        return OPERATORS[self.operator](actual, self.value)

    def __str__(self) -> str:
        return f"{self.label} {self.operator} {_quote(self.value)}"


@dataclass(frozen=True, slots=True)
class Member:
    """`label in {...}`, or `not in` when `negated`."""

    label: str
    values: frozenset[str]
    negated: bool = False

    def matches(self, labels: Labels) -> bool:
        """Whether the value is (not) one of the set; `not in` holds of an absent label."""
        return (labels.get(self.label) in self.values) != self.negated

    def __str__(self) -> str:
        # Go sorts by bytes of UTF-8; Python's order of code points is the same order.
        values = ", ".join(_quote(value) for value in sorted(self.values))
        return f"{self.label} {'not in' if self.negated else 'in'} {{{values}}}"


@dataclass(frozen=True, slots=True)
class Not:
    """`!operand`."""

    operand: Node

    def matches(self, labels: Labels) -> bool:
        """Whether the operand does not match."""
        return not self.operand.matches(labels)

    def __str__(self) -> str:
        return f"!{self.operand}"


@dataclass(frozen=True, slots=True)
class And:
    """Two or more operands joined by `&&`, in the order they were written."""

    operands: tuple[Node, ...]

    def matches(self, labels: Labels) -> bool:
        """Whether every operand matches."""
        for operand in self.operands:  # noqa: SIM110 - twice as fast as all() on the hottest path
            if not operand.matches(labels):
                return False
        return True

    def __str__(self) -> str:
        return f"({' && '.join(map(str, self.operands))})"


@dataclass(frozen=True, slots=True)
class Or:
    """Two or more operands joined by `||`, in the order they were written."""

    operands: tuple[Node, ...]

    def matches(self, labels: Labels) -> bool:
        """Whether any operand matches."""
        for operand in self.operands:  # noqa: SIM110 - see And
            if operand.matches(labels):
                return True
        return False

    def __str__(self) -> str:
        return f"({' || '.join(map(str, self.operands))})"


Node = Everything | Has | Compare | Member | Not | And | Or

OPERATORS: Mapping[str, Callable[[str, str], bool]] = {
    "==": lambda actual, wanted: actual == wanted,
    "!=": lambda actual, wanted: actual != wanted,
    "contains": lambda actual, wanted: wanted in actual,
    "starts with": lambda actual, wanted: actual.startswith(wanted),
    "ends with": lambda actual, wanted: actual.endswith(wanted),
}


@dataclass(frozen=True, slots=True)
class Selector:
    """A parsed selector. Equal to another when both are written alike in canonical form."""

    root: Node

    def matches(self, labels: Labels) -> bool:
        """Whether something that carries `labels` is chosen."""
        return self.root.matches(labels)

    def __str__(self) -> str:
        """The canonical text, which parses back to an equal selector."""
        return str(self.root)

    def unique_id(self) -> str:
        """The selector's identity, `s:` and 38 characters, safe in a kernel IP set's name."""
        digest = hashlib.sha224(f"s:{self}".encode()).digest()
        return "s:" + base64.urlsafe_b64encode(digest).rstrip(b"=").decode()


def parse(text: str) -> Selector:
    """The selector written as `text`. Raises SelectorError, which names the position."""
    parser = _Parser(text)
    return Selector(parser.selector())


ALL = Selector(Everything())
"""What an empty selector means."""


def _quote(value: str) -> str:
    # The language has no escapes: a value never holds both kinds of quote.
    return f"'{value}'" if '"' in value else f'"{value}"'


_BLANKS = re.compile(r"[ \t]*")
_LABEL_CHARACTERS = "A-Za-z0-9_./-"
_LABEL = re.compile(f"[{_LABEL_CHARACTERS}]{{1,{MAX_LABEL_LENGTH}}}")
_LITERAL = re.compile(r""""[^"]*"|'[^']*'""")
_FUNCTION = re.compile(r"(has|all|global)\(")
_OPERATOR = re.compile(
    r"(?P<symbol>==|!=)|(?P<word>contains|starts[ \t]*with|ends[ \t]*with|not[ \t]*in|in)"
    f"(?![{_LABEL_CHARACTERS}])"
)
_SPELLING = {"startswith": "starts with", "endswith": "ends with", "notin": "not in"}


class _Parser:
    """Recursive descent straight over the text: what a word means depends on where it stands."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self._depth = 0

    def selector(self) -> Node:
        self._skip_blanks()
        if self._at == len(self._text):
            return ALL.root
        node = self._or()
        if self._at != len(self._text):
            raise self._error("expected '&&', '||' or the end")
        return node

    def _or(self) -> Node:
        operands = [self._and()]
        while self._take("||"):
            operands.append(self._and())
        return operands[0] if len(operands) == 1 else Or(tuple(operands))

    def _and(self) -> Node:
        operands = [self._unary()]
        while self._take("&&"):
            operands.append(self._unary())
        return operands[0] if len(operands) == 1 else And(tuple(operands))

    def _unary(self) -> Node:
        negated = False
        while self._take("!"):
            negated = not negated  # pairs cancel, in the canonical text as well
        node = self._primary()
        return Not(node) if negated else node

    def _primary(self) -> Node:
        if self._take("("):
            self._depth += 1
            if self._depth > MAX_DEPTH:
                raise self._error(f"more than {MAX_DEPTH} parentheses inside each other")
            node = self._or()
            self._expect(")")
            self._depth -= 1
            return node
        if word := self._match(_FUNCTION):
            label = self._label() if word == "has(" else ""
            self._expect(")")
            return Has(label) if label else Everything(word[:-1])
        return self._comparison(self._label())

    def _comparison(self, label: str) -> Node:
        found = self._match(_OPERATOR)
        if found is None:
            raise self._error(
                f"expected an operator after label {label!r}: "
                "==, !=, contains, starts with, ends with, in or not in"
            )
        squeezed = re.sub(r"[ \t]", "", found)
        operator = _SPELLING.get(squeezed, squeezed)
        if operator in ("in", "not in"):
            return Member(label, self._values(), negated=operator == "not in")
        return Compare(label, operator, self._literal())

    def _values(self) -> frozenset[str]:
        self._expect("{")
        values: list[str] = []
        while not self._take("}"):
            if values:
                self._expect(",")
                if self._take("}"):
                    break
            values.append(self._literal())
        return frozenset(values)

    def _label(self) -> str:
        label = self._match(_LABEL)
        if label is None:
            raise self._error("expected a label, 'has(', 'all()', 'global()', '!' or '('")
        return label

    def _literal(self) -> str:
        literal = self._match(_LITERAL)
        if literal is None:
            raise self._error("expected a value in single or double quotes")
        return literal[1:-1]

    def _take(self, symbol: str) -> bool:
        if not self._text.startswith(symbol, self._at):
            return False
        self._at += len(symbol)
        self._skip_blanks()
        return True

    def _expect(self, symbol: str) -> None:
        if not self._take(symbol):
            raise self._error(f"expected {symbol!r}")

    def _match(self, pattern: re.Pattern[str]) -> str | None:
        match = pattern.match(self._text, self._at)
        if match is None:
            return None
        self._at = match.end()
        self._skip_blanks()
        return match.group()

    def _skip_blanks(self) -> None:
        blanks = _BLANKS.match(self._text, self._at)
        assert blanks is not None
        self._at = blanks.end()

    def _error(self, problem: str) -> SelectorError:
        return SelectorError(self._text, self._at, problem)
