"""The lab's pure parts: addresses, rendered configurations, and what other programs print."""

from __future__ import annotations

import configparser
from ipaddress import IPv4Address, IPv4Network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from labs.observe import read_block
from labs.probe import read_ping
from labs.router import Import, Session, parse_paths, parse_sessions, render
from labs.supervisor import Program, render_group, render_main
from labs.topology import (
    HOST_ADDRESS,
    NODES,
    UNDERLAY,
    Layout,
    Unknown,
    address_for,
    check_name,
    mac_for,
)

COURSE = frozenset(node.address for node in NODES)


@pytest.mark.parametrize(
    ("name", "taken", "address"),
    [
        pytest.param("control", frozenset(), "198.19.0.1", id="the course's own"),
        pytest.param("node2", frozenset(), "198.19.0.3", id="the course's own, again"),
        pytest.param("node3", COURSE, "198.19.0.4", id="by its number"),
        pytest.param("node9", COURSE, "198.19.0.10", id="by its number, with a gap"),
        pytest.param("edge", COURSE, "198.19.0.4", id="the first free"),
        pytest.param("edge", frozenset(), "198.19.0.4", id="the course's stay reserved"),
        pytest.param(
            "node3", COURSE | {IPv4Address("198.19.0.4")}, "198.19.0.5", id="its number is taken"
        ),
    ],
)
def test_a_new_nodes_address(name: str, taken: frozenset[IPv4Address], address: str) -> None:
    """A node's address follows from its name if it can, and is never one that is taken."""
    assert str(address_for(name, taken)) == address


@given(st.lists(st.from_regex(r"[a-z][a-z0-9]{0,6}", fullmatch=True), unique=True, max_size=12))
def test_addresses_of_many_nodes_are_distinct(names: list[str]) -> None:
    """Whatever nodes are called, each has an address and a MAC of its own in the underlay."""
    taken: frozenset[IPv4Address] = frozenset()
    for name in names:
        address = address_for(name, taken)
        assert address not in taken
        assert address in UNDERLAY
        assert address != HOST_ADDRESS
        taken |= {address}
    assert len({mac_for(address) for address in taken}) == len(names)


@pytest.mark.parametrize("name", ["", "-a", "a-", "A", "a/b", "../x", "a b", "a" * 60])
def test_names_that_would_be_paths_or_options_are_refused(name: str) -> None:
    """A name becomes a file, a namespace and a host: nothing else than a label is one."""
    with pytest.raises(Unknown):
        check_name(name)


@pytest.mark.parametrize(
    ("namespace", "ours"),
    [
        ("cymric-net", True),
        ("cymric-control", True),
        ("cymric-node17", True),
        ("cymric-pod-web-1", True),
        ("cymric-cni-test", False),
        ("cymric2-node1", False),
        ("cymtest1-node1", False),
        ("other", False),
    ],
)
def test_only_our_namespaces_are_ours(namespace: str, ours: bool) -> None:
    """Without records a lab claims only names that only it gives."""
    assert Layout("cymric").owns_namespace(namespace) is ours


def test_supervisor_reads_what_is_rendered() -> None:
    """Commands, values with % and quotes, and the order of start survive the configuration."""
    layout = Layout("cymric")
    programs = [
        Program("first", ("prog", "--rate=50%", "two words"), {"A": "1%", "B": "b"}),
        Program("second", ("other",)),
    ]
    read = configparser.RawConfigParser()
    read.read_string(render_main(layout))
    read.read_string(render_group(layout, "node1", programs))
    assert read["group:node1"]["programs"] == "node1-first,node1-second"
    first, second = read["program:node1-first"], read["program:node1-second"]
    assert first["command"] == "prog --rate=50%% 'two words'"
    assert first["environment"] == 'A="1%%",B="b"'
    assert int(first["priority"]) < int(second["priority"])
    assert first["process_name"] == "first"
    assert read["supervisord"]["pidfile"] == "/run/cymric-lab/supervisord.pid"


@pytest.mark.parametrize(
    ("imports", "has_default_pool"), [(Import.STRICT, False), (Import.PERMISSIVE, True)]
)
def test_router_takes_what_it_should(imports: Import, has_default_pool: bool) -> None:
    """Both filters take the external pool and service ranges; one takes the default pool too."""
    text = render(NODES, imports)
    (line,) = [line for line in text.splitlines() if "net ~" in line]
    assert "198.19.24.0/21+" in line
    assert "198.19.32.0/20+" in line
    assert " 198.19.48.0/20," in line, "the aggregate only"
    assert ("198.19.16.0/21+" in line) is has_default_pool
    for node in NODES:
        assert f"neighbor {node.address} as 64512;" in text


PROTOCOLS = """\
BIRD 2.0.12 ready.
Name       Proto      Table      State  Since         Info
device1    Device     ---        up     2026-01-02 03:04:05.678
kernel1    Kernel     master4    up     2026-01-02 03:04:05.678
  Channel ipv4
    State:          UP
to_node1   BGP        ---        up     2026-01-02 03:05:00.001  Established
  BGP state:          Established
    Neighbor address: 198.19.0.2
    Neighbor AS:      64512
to_node2   BGP        ---        start  2026-01-02 03:04:06.000  Active        Socket: Refused
  BGP state:          Active
    Neighbor address: 198.19.0.3
"""


def test_birds_sessions_are_read() -> None:
    """Name, neighbour, state and the time of the last transition, of BGP protocols only."""
    assert parse_sessions(PROTOCOLS) == (
        Session("to_node1", IPv4Address("198.19.0.2"), "Established", "2026-01-02 03:05:00.001"),
        Session("to_node2", IPv4Address("198.19.0.3"), "Active", "2026-01-02 03:04:06.000"),
    )


ROUTES = """\
BIRD 2.0.12 ready.
Table master4:
198.19.16.0/26       unicast [to_node1 03:05:00.001 from 198.19.0.2] * (100/-) [i]
\tvia 198.19.0.2 on eth0
198.19.24.0/29       unicast [to_node1 03:05:00.001 from 198.19.0.2] * (100/-) [i]
\tvia 198.19.0.2 on eth0
                     unicast [to_node2 03:05:00.001 from 198.19.0.3] (100/-) [i]
\tvia 198.19.0.3 on eth0
"""


def test_birds_paths_are_read() -> None:
    """Each prefix with the next hop of every path to it."""
    one, two = IPv4Address("198.19.0.2"), IPv4Address("198.19.0.3")
    assert parse_paths(ROUTES) == {
        IPv4Network("198.19.16.0/26"): (one,),
        IPv4Network("198.19.24.0/29"): (one, two),
    }


def test_a_block_as_stored_is_read() -> None:
    """Owner and addresses in use; addresses reserved for Windows are nobody's."""
    block = read_block(
        {
            "cidr": "198.19.16.0/26",
            "affinity": "host:node1",
            "allocations": [0, None, 1, 1],
            "attributes": [
                {"handle_id": "windows-reserved-ipam-handle"},
                {"handle_id": "k8s-pod-network.abc"},
            ],
        }
    )
    assert (str(block.cidr), block.owner, block.used) == ("198.19.16.0/26", "node1", 2)


def _ping(numbers: list[int], sent: int) -> str:
    lines = [f"64 bytes from 192.0.2.1: icmp_seq={n} ttl=62 time=0.1 ms" for n in numbers]
    return "\n".join(
        [*lines, "", f"{sent} packets transmitted, {len(numbers)} received, 1% packet loss"]
    )


def test_lost_pings_are_named() -> None:
    """The packets that never came back are told by number; the very last one does not count."""
    assert read_ping(_ping([1, 2, 4, 5], 6)).missing == ("3",)
    assert read_ping(_ping([1, 3, 2, 4], 4)).missing == (), "late is not lost"


def test_a_long_ping_is_read_over_the_turn_of_its_numbers() -> None:
    """Sequence numbers have 16 bits; a run past them is read right, with what it lost."""
    numbers = [n & 0xFFFF for n in range(1, 66_001) if n not in (65_536, 65_990)]
    assert read_ping(_ping(numbers, 66_000)).missing == ("65536", "65990")


def test_an_empty_ping_is_no_measurement() -> None:
    """Output without ping's totals is an error, not a run without loss."""
    with pytest.raises(ValueError, match="not the output of ping"):
        read_ping("ping: connect: Network is unreachable\n")
