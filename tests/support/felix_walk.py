"""A packet on its way through all rendered tables of a node, hook by hook, as in the kernel.

    Stored ─▶ felix.calc ─▶ Desired ─▶ felix.rules, sets ─▶ text ─▶ interpreter ─▶ allow, deny

What a table marks, the next sees; what raw takes out of tracking is not new any more.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property

from cymric.model.keys import ResourceKey
from cymric.model.net import Address
from felix.calc.journey import Node, Way
from felix.calc.state import Calculation
from felix.calc.values import Desired
from felix.calc.verdict import Packet
from felix.dataplane import pools
from felix.rules.tables import contents
from tests.support import rule_interpreter
from tests.support.felix_places import INTERFACES
from tests.support.felix_policy import NODE, Stored, update
from tests.support.rule_interpreter import Interpreter, as_text

_HOOKS_IN = (("raw", "PREROUTING"), ("mangle", "PREROUTING"))
_HOOKS_OUT = (("mangle", "POSTROUTING"),)

ENVIRONMENT = {"FELIX_DEFAULTENDPOINTTOHOSTACTION": "RETURN"}
"""Parameters of nodes in these tests: what pods may send to their node is not dropped anyway."""


def node_of(stored: Stored) -> Node:
    """The node as the evaluator reads it."""
    objects: dict[ResourceKey, object] = {}
    for name, spec in stored.items():
        key, value = update(name, spec)
        assert isinstance(key, ResourceKey)
        objects[key] = value
    config = Calculation(NODE, ENVIRONMENT).desired().config
    return Node(NODE, objects, config, INTERFACES)


class RenderedNode:
    """The tables and sets that a node has when exactly this is stored."""

    def __init__(
        self, stored: Stored, interfaces: Mapping[str, frozenset[Address]], **environment: str
    ) -> None:
        calculation = Calculation(NODE, environment)
        calculation.on_host_interfaces(interfaces)
        for name, spec in stored.items():
            calculation.on_update(*update(name, spec))
        self.desired: Desired = calculation.desired()
        self._sets = {one.name: one.members for one in pools.sets(self.desired, interfaces)}

    def decides(self, way: Way, packet: Packet) -> str:
        """`allow` or `deny`."""
        tables = self._tables4 if packet.ip_version == 4 else self._tables6
        walked = rule_interpreter.Packet(
            source=str(packet.source),
            destination=str(packet.destination),
            protocol=packet.protocol,
            source_port=packet.source_port,
            destination_port=packet.destination_port,
            icmp=(packet.icmp_type, packet.icmp_code),
        )
        return "allow" if _is_through(tables, way, walked) else "deny"

    @cached_property
    def _tables4(self) -> Interpreter:
        return self._interpreter(4)

    @cached_property
    def _tables6(self) -> Interpreter:
        return self._interpreter(6)

    def _interpreter(self, ip_version: int) -> Interpreter:
        found = contents(self.desired, ip_version)
        return Interpreter({name: as_text(table) for name, table in found.items()}, self._sets)


def _is_through(tables: Interpreter, way: Way, packet: rule_interpreter.Packet) -> bool:
    for table, hook in _hooks(way):
        is_output = hook in ("OUTPUT", "POSTROUTING", "FORWARD")
        is_input = hook in ("PREROUTING", "INPUT", "FORWARD")
        packet = replace(
            packet,
            in_interface=way.comes_in if is_input else "",
            out_interface=way.goes_out if is_output else "",
        )
        outcome = tables.at_hook(table, hook, packet)
        if outcome.verdict != "ACCEPT":
            return False
        state = "UNTRACKED" if outcome.untracked else packet.state
        packet = replace(packet, mark=outcome.mark, state=state)
    return True


def _hooks(way: Way) -> tuple[tuple[str, str], ...]:
    if not way.comes_in:
        return (("raw", "OUTPUT"), ("filter", "OUTPUT"), *_HOOKS_OUT)
    if not way.goes_out:
        return (*_HOOKS_IN, ("filter", "INPUT"))
    return (*_HOOKS_IN, ("filter", "FORWARD"), *_HOOKS_OUT)
