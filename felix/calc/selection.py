"""Which endpoints a policy or one side of a rule means, as one selector over effective labels.

Namespaces and service accounts have no objects here: their labels reach endpoints through profiles,
under the prefixes `pcns.` and `pcsa.`. So a namespace selector becomes a selector of endpoints by
prefixing its labels. The selectors made here name IP sets, so their canonical text must be the one
that Calico makes; that is why they are put together in exactly this nesting and order.
Source: Calico 3.32 libcalico-go/lib/backend/syncersv1/updateprocessors, in our own words.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

from cymric.model.endpoints import LABEL_NAMESPACE, LABEL_SERVICE_ACCOUNT
from cymric.model.policy import GlobalNetworkPolicy, NetworkPolicy
from cymric.model.rules import EntityRule
from cymric.model.selector import (
    ALL,
    And,
    Compare,
    Everything,
    Has,
    Member,
    Node,
    Not,
    Or,
    Selector,
)
from cymric.model.selector import parse as _parse

NAMESPACE_PREFIX = "pcns."
SERVICE_ACCOUNT_PREFIX = "pcsa."

_IN_A_NAMESPACE = Has(LABEL_NAMESPACE)
_WITH_ACCOUNT = Has(LABEL_SERVICE_ACCOUNT)

parse = lru_cache(maxsize=4096)(_parse)
"""The same few texts come again and again."""


def of_policy(policy: NetworkPolicy | GlobalNetworkPolicy) -> Selector:
    """The endpoints that a policy is about."""
    spec = policy.spec
    chosen = None if _is_blank(spec.selector) else parse(spec.selector).root
    if isinstance(policy, NetworkPolicy):
        chosen = _and(chosen, Compare(LABEL_NAMESPACE, "==", policy.metadata.namespace))
        if not _is_blank(spec.service_account_selector):
            accounts = _prefixed(spec.service_account_selector, SERVICE_ACCOUNT_PREFIX)
            chosen = _and(chosen, accounts)
        return Selector(chosen)
    namespaces = policy.spec.namespace_selector
    if not _is_blank(namespaces):
        both = _and(chosen, _prefixed(namespaces, NAMESPACE_PREFIX))
        # The user's own all() as well: with a namespace selector it no longer means hosts.
        chosen = _replaced(both, "all", _IN_A_NAMESPACE)
    if not _is_blank(spec.service_account_selector):
        accounts = _prefixed(spec.service_account_selector, SERVICE_ACCOUNT_PREFIX)
        chosen = _and(chosen, _replaced(accounts, "all", _WITH_ACCOUNT))
    return ALL if chosen is None else Selector(chosen)


def of_entity(entity: EntityRule, namespace: str) -> tuple[Selector | None, Selector | None]:
    """What one side of a rule must, and must not, be. `namespace` is the policy's, or empty.

    A negation is merged into the positive selector when there is one. Alone it stays apart: then it
    also matches addresses that belong to nothing we know.
    """
    endpoints = _endpoints(entity)
    place = _place(entity, namespace)
    unwanted = None if _is_blank(entity.not_selector) else parse(entity.not_selector).root
    is_limited = endpoints or unwanted or not _is_blank(entity.namespace_selector)
    wanted = endpoints
    if place is not None and is_limited:
        wanted = place if endpoints is None else And((place, endpoints))
    if unwanted is None:
        return (None if wanted is None else Selector(wanted)), None
    if wanted is None:
        return None, Selector(unwanted)
    return Selector(And((wanted, Not(unwanted)))), None


def _endpoints(entity: EntityRule) -> Node | None:
    """By service account and labels."""
    found: Node | None = None
    if accounts := entity.service_accounts:
        if accounts.names:
            found = Member(LABEL_SERVICE_ACCOUNT, frozenset(accounts.names))
        if not _is_blank(accounts.selector):
            found = _and(found, _prefixed(accounts.selector, SERVICE_ACCOUNT_PREFIX))
    if not _is_blank(entity.selector):
        found = _and(found, parse(entity.selector).root)
    return found


def _place(entity: EntityRule, namespace: str) -> Node | None:
    """By namespace: the ones selected, else the policy's own, else any."""
    if not _is_blank(entity.namespace_selector):
        node = _prefixed(entity.namespace_selector, NAMESPACE_PREFIX)
        node = _replaced(node, "all", _IN_A_NAMESPACE)
        return _replaced(node, "global", Not(_IN_A_NAMESPACE))
    return Compare(LABEL_NAMESPACE, "==", namespace) if namespace else None


def _is_blank(text: str) -> bool:
    return not text.strip(" \t")


def _and(first: Node | None, second: Node) -> Node:
    return second if first is None else And((first, second))


def _prefixed(text: str, prefix: str) -> Node:
    def leaf(node: Node) -> Node:
        match node:
            case Has(label):
                return Has(prefix + label)
            case Compare(label, operator, value):
                return Compare(prefix + label, operator, value)
            case Member(label, values, negated):
                return Member(prefix + label, values, negated)
        return node

    return _mapped(parse(text).root, leaf)


def _replaced(node: Node, word: str, by: Node) -> Node:
    def leaf(node: Node) -> Node:
        return by if isinstance(node, Everything) and node.word == word else node

    return _mapped(node, leaf)


def _mapped(node: Node, leaf: Callable[[Node], Node]) -> Node:
    match node:
        case Not(operand):
            return Not(_mapped(operand, leaf))
        case And(operands):
            return And(tuple(_mapped(one, leaf) for one in operands))
        case Or(operands):
            return Or(tuple(_mapped(one, leaf) for one in operands))
    return leaf(node)
