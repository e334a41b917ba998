"""The selector language: what parses, what matches, and what the canonical text is."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cymric.model.selector import (
    MAX_DEPTH,
    MAX_LABEL_LENGTH,
    OPERATORS,
    And,
    Compare,
    Everything,
    Has,
    Member,
    Node,
    Not,
    Or,
    Selector,
    SelectorError,
    parse,
)

WEB = {"app": "web", "tier": "front-end"}
BARE: dict[str, str] = {}


@pytest.mark.parametrize(
    ("text", "web", "bare"),
    [
        pytest.param("", True, True, id="empty"),
        pytest.param(" \t", True, True, id="only blanks"),
        pytest.param("all()", True, True, id="all"),
        pytest.param("all( )", True, True, id="blank inside the parentheses"),
        pytest.param("global()", True, True, id="global"),
        pytest.param("!all()", False, False, id="nothing"),
        pytest.param("has(app)", True, False, id="has"),
        pytest.param("has( app )", True, False, id="has with blanks"),
        pytest.param("has(none)", False, False, id="has not"),
        pytest.param('app == "web"', True, False, id="equal"),
        pytest.param("app=='web'", True, False, id="equal, tight, single quotes"),
        pytest.param('app == "db"', False, False, id="equal to another"),
        pytest.param('app != "db"', True, True, id="unequal is true of an absent label"),
        pytest.param('app != "web"', False, True, id="unequal"),
        pytest.param('app contains "e"', True, False, id="contains"),
        pytest.param('app contains "x"', False, False, id="does not contain"),
        pytest.param('app contains ""', True, False, id="contains needs the label"),
        pytest.param('tier starts with "front"', True, False, id="starts with"),
        pytest.param('tier startswith "end"', False, False, id="startswith"),
        pytest.param('tier ends \t with "end"', True, False, id="ends with"),
        pytest.param('tier endswith"front"', False, False, id="endswith"),
        pytest.param('app in {"web", "db"}', True, False, id="in"),
        pytest.param('app in{"db",}', False, False, id="in, trailing comma"),
        pytest.param("app in {}", False, False, id="in nothing never matches"),
        pytest.param('app not in {"db"}', True, True, id="not in is true of an absent label"),
        pytest.param('app notin {"web"}', False, True, id="notin"),
        pytest.param("app not in {}", True, True, id="not in nothing always matches"),
        pytest.param("has(app) && has(tier)", True, False, id="and"),
        pytest.param("has(app) && has(none)", False, False, id="and, one false"),
        pytest.param("has(none) || has(app)", True, False, id="or"),
        pytest.param("all() || has(a) && has(b)", True, True, id="and binds tighter than or"),
        pytest.param("(all() || has(a)) && has(b)", False, False, id="parentheses"),
        pytest.param("!has(none) && has(app)", True, False, id="not binds tighter than and"),
        pytest.param("!!has(app)", True, False, id="two nots cancel"),
        pytest.param("! ! !has(app)", False, True, id="three nots are one"),
        pytest.param('!app == "web"', False, True, id="not applies to the whole comparison"),
    ],
)
def test_truth(text: str, web: bool, bare: bool) -> None:
    """A selector chooses exactly the label maps that its text describes."""
    selector = parse(text)
    assert (selector.matches(WEB), selector.matches(BARE)) == (web, bare)


@pytest.mark.parametrize("word", ["in", "not", "contains", "has", "all", "global", "starts"])
def test_words_are_labels_where_a_label_stands(word: str) -> None:
    """A word of the language is an ordinary label when it stands at a label's place."""
    assert parse(f'{word} == "x"').matches({word: "x"})
    assert parse(f'{word} in {{"x"}}').matches({word: "x"})


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        pytest.param("", "all()", id="empty"),
        pytest.param("app=='web'", 'app == "web"', id="double quotes"),
        pytest.param("""app == 'a"b'""", """app == 'a"b'""", id="single when needed"),
        pytest.param("""app == "it's" """, """app == "it's\"""", id="an apostrophe"),
        pytest.param("app in {'b','a','b'}", 'app in {"a", "b"}', id="set sorted, no repeats"),
        pytest.param("app notin {'b'}", 'app not in {"b"}', id="not in"),
        pytest.param("app in {}", "app in {}", id="empty set"),
        pytest.param("app startswith 'a'", 'app starts with "a"', id="starts with"),
        pytest.param("app  ends  with 'a'", 'app ends with "a"', id="ends with"),
        pytest.param("has( a )&&has(b)&&has(c)", "(has(a) && has(b) && has(c))", id="and"),
        pytest.param("has(a)||has(b)", "(has(a) || has(b))", id="or"),
        pytest.param("((has(a)))", "has(a)", id="needless parentheses"),
        pytest.param("! has(a)", "!has(a)", id="not"),
        pytest.param("!(has(a) && has(b))", "!(has(a) && has(b))", id="not of and"),
        pytest.param("!!has(a)", "has(a)", id="not not"),
        pytest.param(
            "has(a) && has(b) || has(c)", "((has(a) && has(b)) || has(c))", id="precedence"
        ),
    ],
)
def test_canonical_text(text: str, canonical: str) -> None:
    """The canonical text has one spelling for every way to write the same selector."""
    assert str(parse(text)) == canonical


def test_unique_id_is_calicos() -> None:
    """The id is the one Calico computes, whatever way the selector was spelled."""
    wanted = "s:oy593DLyi5BRwxLRqXScOfE9YMyW5S4KAhmzFg"
    assert parse('app == "web"').unique_id() == wanted
    assert parse(" app=='web' ").unique_id() == wanted
    assert (
        parse('(projectcalico.org/namespace == "prod" && app == "lb")').unique_id()
        == "s:SKAWfwYhGs-kFLTCZp1Bzv8Eko5HdcRpat-s4g"
    )


@pytest.mark.parametrize(
    ("text", "position", "problem"),
    [
        pytest.param("app", 3, "operator after label 'app'", id="label alone"),
        pytest.param("app = 'a'", 4, "operator", id="single equals sign"),
        pytest.param("app == web", 7, "quotes", id="bare value"),
        pytest.param("app == 'web", 7, "quotes", id="open quote"),
        pytest.param("app contains2 'a'", 4, "operator", id="operator runs on"),
        pytest.param("has (app)", 4, "operator", id="blank before the parenthesis"),
        pytest.param("has()", 4, "label", id="has nothing"),
        pytest.param("all(app)", 4, "')'", id="all of something"),
        pytest.param("(has(a)", 7, "')'", id="open parenthesis"),
        pytest.param("has(a))", 6, "the end", id="stray parenthesis"),
        pytest.param("has(a) has(b)", 7, "the end", id="no operator between"),
        pytest.param("has(a) &&", 9, "label", id="ends with an operator"),
        pytest.param("has(a) & has(b)", 7, "the end", id="single ampersand"),
        pytest.param("app in 'a'", 7, "'{'", id="in without braces"),
        pytest.param("app in {'a' 'b'}", 12, "','", id="no comma"),
        pytest.param("app in {,}", 8, "quotes", id="comma alone"),
        pytest.param("has(a)\n", 6, "the end", id="a line feed is no blank"),
        pytest.param("has(å)", 4, "label", id="letters of ASCII only"),
        pytest.param(f"has({'a' * (MAX_LABEL_LENGTH + 1)})", 516, "')'", id="label too long"),
    ],
)
def test_errors_name_the_position(text: str, position: int, problem: str) -> None:
    """Text that is no selector is refused, with the place and what was expected there."""
    with pytest.raises(SelectorError) as caught:
        parse(text)
    assert caught.value.position == position
    assert problem in caught.value.problem
    assert f"at character {position + 1}:" in str(caught.value)


def test_depth_is_bounded() -> None:
    """Parentheses nest deeply, but not so deeply that they could end the process."""
    parse("(" * MAX_DEPTH + "all()" + ")" * MAX_DEPTH)
    with pytest.raises(SelectorError, match="parentheses inside each other"):
        parse("(" * 5000 + "all()" + ")" * 5000)


LABELS = st.text("abin./_-A0", min_size=1, max_size=4)
VALUES = st.text("ab 'é{", max_size=3) | st.text('ab "', max_size=3)
LEAVES: st.SearchStrategy[Node] = st.one_of(
    st.sampled_from([Everything(), Everything("global")]),
    st.builds(Has, LABELS),
    st.builds(Compare, LABELS, st.sampled_from(sorted(OPERATORS)), VALUES),
    st.builds(Member, LABELS, st.frozensets(VALUES, max_size=3), st.booleans()),
)


def _grow(nodes: st.SearchStrategy[Node]) -> st.SearchStrategy[Node]:
    operands = st.lists(nodes, min_size=2, max_size=3).map(tuple)
    single = nodes.filter(lambda node: not isinstance(node, Not))
    return st.one_of(st.builds(Not, single), st.builds(And, operands), st.builds(Or, operands))


NODES = st.recursive(LEAVES, _grow, max_leaves=12)


@given(NODES)
def test_canonical_text_parses_back(node: Node) -> None:
    """The canonical text of any selector parses to that very selector."""
    selector = Selector(node)
    assert parse(str(selector)) == selector
    assert parse(str(selector)).unique_id() == selector.unique_id()


@given(NODES, st.dictionaries(LABELS, VALUES, max_size=4))
def test_not_is_the_complement(node: Node, labels: dict[str, str]) -> None:
    """Of a selector and its negation exactly one matches."""
    text = str(Selector(node))
    assert parse(f"!({text})").matches(labels) != parse(text).matches(labels)


@given(st.text("ab =!()&|{},'\"\thasin", max_size=30))
def test_any_text_parses_or_is_refused(text: str) -> None:
    """No text makes the parser fail in another way than by naming a position inside it."""
    try:
        canonical = str(parse(text))
    except SelectorError as error:
        position = error.position
    else:
        position = 0
        assert str(parse(canonical)) == canonical
    assert 0 <= position <= len(text)
