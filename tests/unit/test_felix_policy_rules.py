"""Rules of policies as iptables rules: every field, and never more or less than is written."""

from __future__ import annotations

from ipaddress import ip_address
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cymric.model.net import Address, Network, parse_network
from felix.calc.config import FelixConfig
from felix.calc.policies import (
    EntityMatch,
    IcmpMatch,
    IPSet,
    Policy,
    PolicyId,
    PolicyRule,
    PortRange,
    SetKind,
    Verdict,
)
from felix.calc.values import Desired, ProfileRules
from felix.iptables import render
from felix.rules import policy_rule
from felix.rules.judge import Flow, Judge
from felix.rules.marks import allocate
from felix.rules.names import set_name
from felix.rules.policy import RuleChains
from felix.rules.policy_rule import Rendering
from felix.rules.rule import Log
from tests.support.rule_interpreter import PROTOCOLS, WITH_PORTS, Interpreter, Packet, texts

MARKS = allocate(0xFFFF0000)
V4, V6 = (Rendering(MARKS, version, Log("calico-packet: ")) for version in (4, 6))
HTTP = PortRange(80, 80)
ALLOW = "--jump MARK --set-mark 0x10000/0x10000"
ALLOWED = "-m mark --mark 0x10000/0x10000 --jump RETURN"
START = "--jump MARK --set-mark 0x0/0x180000"
FIRST, LATER = (f"--jump MARK --set-mark {bit:#x}/{bit:#x}" for bit in (0x80000, 0x100000))
NOT_LATER = "-m mark --mark 0/0x100000 --jump MARK --set-mark 0/0x80000"
CLEAR_FIRST = "--jump MARK --set-mark 0/0x80000"
ALL_MATCHED = "-m mark --mark 0x80000/0x80000"


def nets(*texts: str) -> tuple[Network, ...]:
    """Prefixes."""
    return tuple(map(parse_network, texts))


def bodies(rule: PolicyRule, how: Rendering = V4) -> list[str]:
    """The rules without hashes."""
    return [render.body(one) for one in policy_rule.rules(rule, how)]


def rule(action: Verdict = Verdict.ALLOW, **fields: Any) -> PolicyRule:
    """A rule; what begins with src_ or dst_ goes to that side."""
    sides = {
        name: EntityMatch(
            **{key[4:]: value for key, value in fields.items() if key.startswith(f"{name[:3]}_")}
        )
        for name in ("src", "dst")
    }
    rest = {key: value for key, value in fields.items() if key[:4] not in ("src_", "dst_")}
    return PolicyRule(action, source=sides["src"], destination=sides["dst"], **rest)


@pytest.mark.parametrize(
    ("written", "match"),
    [
        pytest.param(rule(), "", id="everything"),
        pytest.param(rule(protocol="tcp"), "-p tcp", id="protocol by name"),
        pytest.param(rule(protocol=132), "-p 132", id="protocol by number"),
        pytest.param(rule(not_protocol="udp"), "! -p udp", id="any other protocol"),
        pytest.param(rule(not_protocol=0), "", id="any but none"),
        pytest.param(
            rule(protocol="tcp", not_protocol=17), "-p tcp", id="a protocol excludes the others"
        ),
        pytest.param(rule(src_nets=nets("10.0.0.0/8")), "--source 10.0.0.0/8", id="source prefix"),
        pytest.param(
            rule(dst_not_nets=nets("10.0.0.0/8")), "! --destination 10.0.0.0/8", id="not there"
        ),
        pytest.param(
            rule(src_set_ids=("s:a", "s:b"), dst_not_set_ids=("s:c",)),
            "-m set --match-set cali40s:a src -m set --match-set cali40s:b src"
            " -m set ! --match-set cali40s:c dst",
            id="sets",
        ),
        pytest.param(
            rule(protocol="tcp", dst_ports=(HTTP, PortRange(8000, 8080))),
            "-p tcp -m multiport --destination-ports 80,8000:8080",
            id="ports",
        ),
        pytest.param(
            rule(protocol="tcp", src_not_ports=tuple(PortRange(p, p) for p in range(1, 18))),
            "-p tcp -m multiport ! --source-ports 1,2,3,4,5,6,7,8,9,10,11,12,13,14,15"
            " -m multiport ! --source-ports 16,17",
            id="many ports that it may not be",
        ),
        pytest.param(
            rule(protocol="tcp", dst_port_set_ids=("n:a",)),
            "-p tcp -m set --match-set cali40n:a dst,dst",
            id="named port",
        ),
        pytest.param(
            rule(src_service_set_ids=("svcnoport:a",), dst_service_set_ids=("svc:a",)),
            "-m set --match-set cali40svcnoport:a src -m set --match-set cali40svc:a dst,dst",
            id="services",
        ),
        pytest.param(
            rule(protocol="icmp", icmp=IcmpMatch(8)), "-p icmp -m icmp --icmp-type 8", id="icmp"
        ),
        pytest.param(
            rule(protocol="icmp", not_icmp=IcmpMatch(3, 1)),
            "-p icmp -m icmp ! --icmp-type 3/1",
            id="icmp that it may not be",
        ),
        pytest.param(
            rule(
                protocol="tcp",
                src_nets=nets("10.0.0.0/8"),
                src_set_ids=("s:a",),
                src_ports=(PortRange(1, 1),),
                dst_nets=nets("11.0.0.0/8"),
                dst_set_ids=("s:b",),
                dst_ports=(PortRange(2, 2),),
                src_not_set_ids=("s:c",),
                src_not_ports=(PortRange(3, 3),),
                src_not_port_set_ids=("n:c",),
                dst_not_set_ids=("s:d",),
                dst_not_ports=(PortRange(4, 4),),
                dst_not_port_set_ids=("n:d",),
            ),
            "-p tcp --source 10.0.0.0/8 -m set --match-set cali40s:a src"
            " -m multiport --source-ports 1 --destination 11.0.0.0/8"
            " -m set --match-set cali40s:b dst -m multiport --destination-ports 2"
            " -m set ! --match-set cali40s:c src -m multiport ! --source-ports 3"
            " -m set ! --match-set cali40n:c src,src"
            " -m set ! --match-set cali40s:d dst -m multiport ! --destination-ports 4"
            " -m set ! --match-set cali40n:d dst,dst",
            id="the order of everything",
        ),
    ],
)
def test_one_rule(written: PolicyRule, match: str) -> None:
    """What fits into one iptables rule is one, in Calico's order, and its verdict another."""
    assert bodies(written) == [f"{match} {ALLOW}".strip(), ALLOWED]


@pytest.mark.parametrize(
    ("action", "expected"),
    [
        (Verdict.PASS, ["-p tcp --jump MARK --set-mark 0x20000/0x20000",
                        "-m mark --mark 0x20000/0x20000 --jump RETURN"]),
        (Verdict.DENY, ["-p tcp --jump MARK --set-mark 0x40000/0x40000",
                        "-m mark --mark 0x40000/0x40000 --jump DROP"]),
        (Verdict.LOG, ['-p tcp --jump LOG --log-prefix "calico-packet: " --log-level 5']),
    ],
)  # fmt: skip
def test_actions(action: Verdict, expected: list[str]) -> None:
    """A verdict is a mark and what follows from it; a log is just that."""
    assert bodies(rule(action, protocol="tcp")) == expected


@pytest.mark.parametrize(
    ("written", "version"),
    [
        pytest.param(rule(ip_version=6), 4, id="written for the other"),
        pytest.param(rule(src_nets=nets("fd00::/8")), 4, id="prefixes of the other"),
        pytest.param(rule(src_not_nets=nets("10.0.0.0/8")), 6, id="excludes some of the other"),
        pytest.param(rule(src_not_nets=nets("0.0.0.0/0")), 4, id="excludes all"),
        pytest.param(rule(protocol="tcp", not_protocol=6), 4, id="a protocol and not"),
        pytest.param(rule(protocol=0), 4, id="protocol 0, which means all to iptables"),
        pytest.param(rule(protocol="icmp", icmp=IcmpMatch(8)), 6, id="ICMP in IPv6"),
        pytest.param(rule(protocol="icmpv6", icmp=IcmpMatch(128)), 4, id="ICMPv6 in IPv4"),
        pytest.param(rule(protocol=1, not_icmp=IcmpMatch()), 4, id="ICMP that is none"),
    ],
)
def test_rules_that_no_packet_of_a_family_can_match(written: PolicyRule, version: int) -> None:
    """They are left out: iptables would refuse them, or they would match what is not meant."""
    assert bodies(written, V4 if version == 4 else V6) == []


def test_families_take_their_own() -> None:
    """Of mixed prefixes each family takes its own; sets and ICMP have the family's spelling."""
    written = rule(src_nets=nets("10.0.0.0/8", "fd00::/8"), dst_set_ids=("s:a",))
    assert bodies(written)[0].startswith("--source 10.0.0.0/8 -m set --match-set cali40s:a dst ")
    assert bodies(written, V6)[0].startswith("--source fd00::/8 -m set --match-set cali60s:a dst ")
    ping = rule(protocol=58, icmp=IcmpMatch(128, 0))
    assert bodies(ping, V6)[0] == f"-p 58 -m icmp6 --icmpv6-type 128/0 {ALLOW}"


def test_several_prefixes_need_a_block() -> None:
    """Alternatives are worked out in a mark first; the main rule asks for it."""
    assert bodies(rule(src_nets=nets("10.0.0.0/8", "11.0.0.0/8"), protocol="tcp")) == [
        START,
        f"--source 10.0.0.0/8 {FIRST}",
        f"--source 11.0.0.0/8 {FIRST}",
        f"-p tcp {ALL_MATCHED} {ALLOW}",
        ALLOWED,
    ]


def test_numbers_and_names_of_ports_need_a_block() -> None:
    """A port may be one of the numbers or one of the named."""
    assert bodies(rule(protocol="tcp", dst_ports=(HTTP,), dst_port_set_ids=("n:a",))) == [
        START,
        f"-p tcp -m multiport --destination-ports 80 {FIRST}",
        f"-m set --match-set cali40n:a dst,dst {FIRST}",
        f"-p tcp {ALL_MATCHED} {ALLOW}",
        ALLOWED,
    ]


def test_negated_prefixes_that_do_not_fit() -> None:
    """They take the mark away; alone they start with it."""
    assert bodies(rule(src_not_nets=nets("10.0.0.0/8", "11.0.0.0/8"))) == [
        "--jump MARK --set-mark 0x80000/0x180000",
        f"--source 10.0.0.0/8 {CLEAR_FIRST}",
        f"--source 11.0.0.0/8 {CLEAR_FIRST}",
        f"{ALL_MATCHED} {ALLOW}",
        ALLOWED,
    ]
    assert bodies(rule(src_nets=nets("10.0.0.0/8"), src_not_nets=nets("10.1.0.0/16"))) == [
        "--jump MARK --set-mark 0x80000/0x180000",
        f"--source 10.1.0.0/16 {CLEAR_FIRST}",
        f"--source 10.0.0.0/8 {ALL_MATCHED} {ALLOW}",
        ALLOWED,
    ]


def test_third_block_starts_clean() -> None:
    """From the third positive block on the scratch mark of the one before is cleared."""
    ports = tuple(PortRange(port, port) for port in range(1, 17))
    written = rule(protocol="tcp", src_ports=ports, dst_ports=ports,
                   src_nets=nets("10.0.0.0/8", "11.0.0.0/8"))  # fmt: skip
    found = bodies(written)
    assert found.count(NOT_LATER) == 2
    third = found.index(f"--source 10.0.0.0/8 {LATER}")
    assert found[third - 1] == "--jump MARK --set-mark 0/0x100000"
    assert found[third - 2] == NOT_LATER


def test_annotations_become_comments() -> None:
    """What is said of a rule is shown at each of its iptables rules."""
    found = bodies(rule(annotations=(("owner", "net team"),)))
    assert all(one.startswith('-m comment --comment "owner=net team"') for one in found)


def chains(*policies: Policy, **config: str) -> RuleChains:
    """The chains of these policies, and of a profile `p`."""
    made = RuleChains(FelixConfig(**config), MARKS, 4)  # type: ignore[arg-type]
    profile = ProfileRules("p", (rule(),), None)
    made.update({one.id: one for one in policies}, {"p": profile})
    return made


def test_policy_chains() -> None:
    """Named by kind and place, introduced by a comment; the last return is left out."""
    one = Policy(PolicyId("np", "prod", "web"), "default", (rule(protocol="tcp"), rule()), ())
    other = Policy(PolicyId("gnp", "", "x"), "t", (rule(Verdict.DENY),), ())
    made = chains(one, other)
    names = ["cali-pi-np/prod/web", "cali-po-np/prod/web", "cali-pi-gnp/x", "cali-tw-cali1",
             "cali-pri-p", "cali-pro-p", "cali-pi-np/prod/web"]  # fmt: skip
    found = {chain.name: [render.body(one) for one in chain.rules] for chain in made.needed(names)}
    assert found == {
        "cali-pi-np/prod/web": [
            f'-m comment --comment "NetworkPolicy prod/web ingress" -p tcp {ALLOW}',
            ALLOWED,
            ALLOW,
        ],
        "cali-po-np/prod/web": ['-m comment --comment "NetworkPolicy prod/web egress"'],
        "cali-pi-gnp/x": [
            '-m comment --comment "GlobalNetworkPolicy x ingress"'
            " --jump MARK --set-mark 0x40000/0x40000",
            "-m mark --mark 0x40000/0x40000 --jump DROP",
        ],
        "cali-pri-p": [f'-m comment --comment "Profile p ingress" {ALLOW}'],
        "cali-pro-p": ['-m comment --comment "Profile p egress" --jump DROP'],
    }


def test_unknown_policy_drops() -> None:
    """An endpoint that names a policy nobody told of must not be open."""
    (chain,) = chains().needed(["cali-pi-np/prod/gone"])
    assert [render.body(one) for one in chain.rules] == ["--jump DROP"]


def test_log_prefix_names_the_policy() -> None:
    """Tier, kind, name and place can be asked for; the kernel takes 29 characters."""
    one = Policy(PolicyId("np", "prod", "web"), "t", (rule(Verdict.LOG),), (rule(Verdict.LOG),))
    (chain,) = chains(one, log_prefix="%t %n %p").needed(["cali-pi-np/prod/web"])
    assert '--log-prefix "t web prod/web: "' in render.body(chain.rules[0])
    (chain,) = chains(one, log_prefix="%k %k").needed(["cali-po-np/prod/web"])
    assert '--log-prefix "NetworkPolicy NetworkPolicy: "' in render.body(chain.rules[0])


def test_unchanged_policies_keep_their_chains() -> None:
    """Another policy's change makes no new chain."""
    one, other = (Policy(PolicyId("np", "prod", name), "t", (rule(),)) for name in "ab")
    made = chains(one, other)
    before = made.needed(["cali-pi-np/prod/a", "cali-pi-np/prod/b"])
    changed = Policy(other.id, "t", (rule(Verdict.DENY),))
    made.update({one.id: one, other.id: changed}, {})
    after = made.needed(["cali-pi-np/prod/a", "cali-pi-np/prod/b"])
    assert after[0] is before[0]
    assert after[1] is not before[1]


# Any rule against any packet: the rendered text must say what the rule says.

SETS = {
    "s:low": frozenset({"10.0.0.1", "10.0.0.2"}),
    "s:high": frozenset({"10.0.0.2", "10.1.0.0/16"}),
    "n:web": frozenset({"10.0.0.1,tcp:1", "10.0.0.2,udp:2", "10.1.0.1,tcp:16"}),
    "n:dns": frozenset({"10.0.0.2,tcp:3"}),
}
KERNEL_SETS = {set_name(name): members for name, members in SETS.items()}
ADDRESSES = ("10.0.0.1", "10.0.0.2", "10.1.0.1", "10.2.0.1")
NETS = nets("10.0.0.0/24", "10.0.0.1/32", "10.1.0.0/16", "10.0.0.0/8", "fd00::/8", "0.0.0.0/0")
PORTS = st.integers(1, 20)
ranges = st.tuples(PORTS, PORTS).map(lambda pair: PortRange(min(pair), max(pair)))
single = PORTS.map(lambda port: PortRange(port, port))


def some(values: tuple[Any, ...], most: int = 3) -> st.SearchStrategy[Any]:
    """Up to `most` of these; often none."""
    return st.one_of(st.just(()), st.lists(st.sampled_from(values), max_size=most).map(tuple))


port_lists = st.one_of(
    st.just(()), st.lists(st.one_of(single, ranges), max_size=3).map(tuple),
    st.lists(single, min_size=14, max_size=18).map(tuple),
)  # fmt: skip


@st.composite
def entities(draw: st.DrawFn, *, with_ports: bool) -> EntityMatch:
    """One side of a rule."""
    ports: dict[str, object] = {}
    if with_ports:
        ports = {
            "ports": draw(port_lists),
            "not_ports": draw(port_lists),
            "port_set_ids": draw(some(("n:web", "n:dns"), 2)),
            "not_port_set_ids": draw(some(("n:web", "n:dns"), 1)),
        }
    return EntityMatch(
        nets=draw(some(NETS)),
        not_nets=draw(some(NETS)),
        set_ids=draw(some(("s:low", "s:high"), 2)),
        not_set_ids=draw(some(("s:low", "s:high"), 1)),
        **ports,  # type: ignore[arg-type]
    )


@st.composite
def policy_rules(draw: st.DrawFn) -> PolicyRule:
    """Any rule that a policy may hold: ports only with a protocol that has them."""
    protocol = draw(st.sampled_from((None, "tcp", "udp", 6, 17, "icmp", 47)))
    with_ports = protocol in ("tcp", "udp", 6, 17)
    is_icmp = protocol == "icmp"
    icmp = st.one_of(st.none(), st.builds(IcmpMatch, st.integers(0, 3), st.sampled_from((None, 0))))
    return PolicyRule(
        draw(st.sampled_from(Verdict)),
        ip_version=draw(st.sampled_from((None, None, 4, 6))),
        protocol=protocol,
        not_protocol=draw(st.sampled_from((None, None, "udp", 6))),
        icmp=draw(icmp) if is_icmp else None,
        not_icmp=draw(icmp) if is_icmp else None,
        source=draw(entities(with_ports=with_ports)),
        destination=draw(entities(with_ports=with_ports)),
    )


packets = st.builds(
    Packet,
    source=st.sampled_from(ADDRESSES),
    destination=st.sampled_from(ADDRESSES),
    protocol=st.sampled_from((6, 6, 17, 1, 47)),
    source_port=PORTS,
    destination_port=PORTS,
    icmp=st.tuples(st.integers(0, 3), st.integers(0, 1)),
    # What earlier rules left in the scratch bits must not matter.
    mark=st.sampled_from((0, MARKS.scratch0, MARKS.scratch1, MARKS.scratch0 | MARKS.scratch1)),
)


def matches(written: PolicyRule, packet: Packet) -> bool:
    """What the rule says of an IPv4 packet, read off its definition."""
    name = WITH_PORTS.get(packet.protocol)
    if written.ip_version == 6:
        return False
    if written.protocol is not None and number(written.protocol) != packet.protocol:
        return False
    if written.not_protocol is not None and number(written.not_protocol) == packet.protocol:
        return False
    if written.icmp is not None and not is_icmp(written.icmp, packet):
        return False
    if written.not_icmp is not None and is_icmp(written.not_icmp, packet):
        return False
    return all(
        side_matches(side, ip_address(address), f"{address},{name}:{port}", port)
        for side, address, port in (
            (written.source, packet.source, packet.source_port),
            (written.destination, packet.destination, packet.destination_port),
        )
    )


def number(protocol: str | int) -> int:
    """A protocol as number."""
    return PROTOCOLS[protocol] if isinstance(protocol, str) else protocol


def is_icmp(wanted: IcmpMatch, packet: Packet) -> bool:
    """Type and, if given, code."""
    return wanted.type == packet.icmp[0] and wanted.code in (None, packet.icmp[1])


def side_matches(side: EntityMatch, address: Address, with_port: str, port: int) -> bool:
    """One side of a rule."""

    def is_in(found: tuple[Network, ...]) -> bool:
        return any(net.version == 4 and address in net for net in found)

    def is_member(set_id: str) -> bool:
        return any(address in parse_network(member) for member in SETS[set_id])

    for found in (side.nets, side.not_nets):
        if found and not any(net.version == 4 for net in found):
            return False
    if side.nets and not is_in(side.nets):
        return False
    if is_in(side.not_nets):
        return False
    if not all(map(is_member, side.set_ids)) or any(map(is_member, side.not_set_ids)):
        return False
    if side.ports or side.port_set_ids:
        by_number = any(one.first <= port <= one.last for one in side.ports)
        if not by_number and not any(with_port in SETS[one] for one in side.port_set_ids):
            return False
    if any(one.first <= port <= one.last for one in side.not_ports):
        return False
    return not any(with_port in SETS[one] for one in side.not_port_set_ids)


@settings(max_examples=400, deadline=None)
@given(policy_rules(), st.lists(packets, min_size=1, max_size=8))
def test_rendered_rules_say_what_is_written(written: PolicyRule, met: list[Packet]) -> None:
    """For any rule and packet, the iptables rules decide as the rule does."""
    chains = {"cali-pi-x": texts(policy_rule.rules(written, V4))}
    for packet in met:
        outcome = Interpreter(sets=KERNEL_SETS).in_chain(chains, "cali-pi-x", packet)
        decided = outcome.mark & (MARKS.accept | MARKS.passed | MARKS.drop)
        if not matches(written, packet):
            assert (outcome.verdict, decided, outcome.logged) == ("RETURN", 0, ())
            continue
        match written.action:
            case Verdict.ALLOW:
                assert (outcome.verdict, decided) == ("RETURN", MARKS.accept)
            case Verdict.PASS:
                assert (outcome.verdict, decided) == ("RETURN", MARKS.passed)
            case Verdict.DENY:
                assert (outcome.verdict, decided) == ("DROP", MARKS.drop)
            case Verdict.LOG:
                assert (outcome.verdict, decided) == ("RETURN", 0)
                assert outcome.logged == ("calico-packet: ",)


@settings(max_examples=200, deadline=None)
@given(policy_rules(), st.lists(packets, min_size=1, max_size=8))
def test_judge_says_what_is_written(written: PolicyRule, met: list[Packet]) -> None:
    """Who judges connections without the kernel reads a rule as the kernel's rules do."""
    kind_by_id = {set_id: SetKind.NET if set_id[0] == "s" else SetKind.IP_PORT for set_id in SETS}
    sets = {one: IPSet(one, kind_by_id[one], members) for one, members in SETS.items()}
    judge = Judge(Desired(ip_sets=sets))
    for packet in met:
        flow = Flow(
            ip_address(packet.source),
            ip_address(packet.destination),
            packet.protocol,
            packet.source_port,
            packet.destination_port,
            packet.icmp,
        )
        assert judge.matches(written, flow) is matches(written, packet)
