"""The chains of host endpoints in filter, mangle and raw, and the ways that lead to them.

    filter   INPUT, OUTPUT ─▶ cali-from-/cali-to-host-endpoint ─▶ cali-fh-…, cali-th-…
             FORWARD ───────▶ cali-from-/cali-to-hep-forward ───▶ cali-fhfw-…, cali-thfw-…
    mangle   PREROUTING ────▶ cali-from-host-endpoint ──────────▶ cali-fh-… of early policy
             POSTROUTING ───▶ cali-to-host-endpoint ────────────▶ cali-th-…, for translated packets
    raw      both ──────────▶ both ─────────────────────────────▶ of untracked policy

The endpoint that stands for all interfaces without one of their own is where the ways end; it has
no untracked policy. What the host sends to its own workloads is not its business. Ports of the
failsafe lists are open whatever policy says, or a slip would lock everybody out.
Source: Calico 3.32, felix/rules/dispatch.go, endpoints.go, static.go.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from felix.calc.config import FelixConfig, ProtocolPort
from felix.calc.policies import WILDCARD_INTERFACE, HostEndpoint, TierPolicies
from felix.rules.actions import allow, deny
from felix.rules.dispatch import Dispatch
from felix.rules.endpoint import Direction, Layout, Traffic, chain
from felix.rules.marks import Marks
from felix.rules.names import FROM_HOST, FROM_HOST_FORWARDED, TO_HOST, TO_HOST_FORWARDED, limited
from felix.rules.rule import ACCEPT, RETURN, Chain, Goto, Match, Rule, Side
from felix.rules.static import (
    FROM_HOST_ENDPOINT,
    FROM_HOST_FORWARD,
    TO_HOST_ENDPOINT,
    TO_HOST_FORWARD,
)

FAILSAFE_IN = "cali-failsafe-in"
FAILSAFE_OUT = "cali-failsafe-out"
ANY_INTERFACE = "any-interface-at-all"

_Ports = tuple[ProtocolPort, ...]

_SKIP = "Skip egress WHEP policy for traffic to local workload"


class HostChains:
    """All chains of host endpoints in one table of one family; remembers the ways to them."""

    def __init__(self, table: str, config: FelixConfig, marks: Marks, ip_version: int) -> None:
        self._table = table
        self._config = config
        self._marks = marks
        self._ip_version = ip_version
        ways = [(FROM_HOST_ENDPOINT, FROM_HOST), (TO_HOST_ENDPOINT, TO_HOST)]
        if table == "filter":
            ways += [(FROM_HOST_FORWARD, FROM_HOST_FORWARDED), (TO_HOST_FORWARD, TO_HOST_FORWARDED)]
        self._ways = [(prefix, Dispatch(root, _match(prefix), prefix)) for root, prefix in ways]

    def chains(self, endpoints: Sequence[HostEndpoint]) -> list[Chain]:
        """The ways, the endpoints' chains, and the failsafe chains that those refer to."""
        ends: list[Chain] = []
        for one in endpoints:
            ends += self._of_endpoint(one)
        names = {found.name for found in ends}
        if self._table == "mangle" and limited(FROM_HOST, ANY_INTERFACE) in names:
            # Who has an endpoint of its own without early policy has nothing to do with that of the
            # one for all interfaces (Calico applies it).
            ends += [
                Chain(name)
                for one in endpoints
                if one.interface != WILDCARD_INTERFACE
                and (name := limited(FROM_HOST, one.interface)) not in names
            ]
            names = {found.name for found in ends}
        ways: list[Chain] = []
        for prefix, dispatch in self._ways:
            found = [
                one.interface
                for one in endpoints
                if one.interface != WILDCARD_INTERFACE and limited(prefix, one.interface) in names
            ]
            ways += dispatch.chains(sorted(found), self._end(prefix, names))
        return [*ways, *ends, *self._failsafes(ends)]

    def _end(self, prefix: str, names: set[str]) -> tuple[Rule, ...]:
        """What packets of other interfaces meet."""
        target = limited(prefix, ANY_INTERFACE)
        if target not in names:
            return ()
        skip = (
            Rule(Match().out_interface(f"{start}+"), RETURN, (_SKIP,))
            for start in self._config.interface_prefixes
            if prefix == TO_HOST
        )
        return (*skip, Rule(action=Goto(target)))

    def _of_endpoint(self, one: HostEndpoint) -> Iterable[Chain]:
        is_wildcard = one.interface == WILDCARD_INTERFACE
        name = ANY_INTERFACE if is_wildcard else one.interface
        for prefix, layout in self._layouts(one):
            if is_wildcard and layout.traffic is Traffic.UNTRACKED:
                continue
            yield chain(limited(prefix, name), layout, self._config, self._marks)

    def _layouts(self, one: HostEndpoint) -> Iterable[tuple[str, Layout]]:
        inbound, outbound = Direction.INBOUND, Direction.OUTBOUND
        if self._table == "raw":
            if one.untracked_tiers:
                kind, tiers = Traffic.UNTRACKED, one.untracked_tiers
                yield TO_HOST, self._layout(kind, outbound, tiers, failsafe=FAILSAFE_OUT)
                yield FROM_HOST, self._layout(kind, inbound, tiers, failsafe=FAILSAFE_IN)
            return
        if self._table == "mangle":
            yield (
                TO_HOST,
                Layout(
                    traffic=Traffic.NORMAL,
                    direction=outbound,
                    tiers=one.tiers,
                    profiles=one.profiles,
                    accept=RETURN,
                    failsafe=FAILSAFE_OUT,
                ),
            )
            if one.pre_dnat_tiers:
                kind, tiers = Traffic.PRE_DNAT, one.pre_dnat_tiers
                yield FROM_HOST, self._layout(kind, inbound, tiers, failsafe=FAILSAFE_IN)
            return
        for prefix, direction, failsafe in (
            (TO_HOST, outbound, FAILSAFE_OUT),
            (FROM_HOST, inbound, FAILSAFE_IN),
        ):
            yield (
                prefix,
                Layout(
                    traffic=Traffic.NORMAL,
                    direction=direction,
                    tiers=one.tiers,
                    profiles=one.profiles,
                    accept=allow(self._config, self._table),
                    deny=deny(self._config, self._table),
                    failsafe=failsafe,
                ),
            )
        forwarded = Traffic.FORWARDED
        yield TO_HOST_FORWARDED, self._layout(forwarded, outbound, one.forward_tiers)
        yield FROM_HOST_FORWARDED, self._layout(forwarded, inbound, one.forward_tiers)

    def _layout(
        self,
        traffic: Traffic,
        direction: Direction,
        tiers: Sequence[TierPolicies],
        failsafe: str = "",
    ) -> Layout:
        return Layout(
            traffic=traffic,
            direction=direction,
            tiers=tiers,
            failsafe=failsafe,
            accept=allow(self._config, self._table),
            deny=deny(self._config, self._table),
        )

    def _failsafes(self, ends: Iterable[Chain]) -> list[Chain]:
        used = {target for one in ends for target in one.targets}
        config = self._config
        inbound, outbound = config.failsafe_inbound, config.failsafe_outbound
        lists: tuple[tuple[str, Side, _Ports, _Ports], ...] = (
            (FAILSAFE_IN, "source", inbound, outbound),
            (FAILSAFE_OUT, "destination", outbound, inbound),
        )
        found = []
        for name, far, opened, answered in lists:
            if name not in used:
                continue
            rules = self._ports(opened, "destination", far)
            if self._table == "raw":  # nothing tells answers from questions there
                rules += self._ports(answered, "source", far)
            found.append(Chain(name, tuple(rules)))
        return found

    def _ports(self, ports: Iterable[ProtocolPort], side: Side, far: Side) -> list[Rule]:
        rules = []
        for one in ports:
            match = Match().protocol(one.protocol).ports(side, str(one.port))
            if one.net is not None:
                if one.net.version != self._ip_version:
                    continue
                match = match.net(far, str(one.net))
            rules.append(Rule(match, ACCEPT))
        return rules


def _match(prefix: str) -> Callable[[str], Match]:
    is_from = prefix in (FROM_HOST, FROM_HOST_FORWARDED)
    return Match().in_interface if is_from else Match().out_interface
