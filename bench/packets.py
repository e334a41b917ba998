"""What policy costs packets: throughput and new connections from pod to pod, 0, 10, 100 policies.

A node of `felix_world.py` with the real felix and two pods that talk; as many policies as said
apply to the receiver, and the last of them allows. Each figure is taken in turn with the peer's:
the same two namespaces on one bare veth pair, without node, routing or rules between them. What
the way through the node costs before any rule is in a row of its own: felix not started yet.

A connection is opened, one byte goes each way, and a reset ends it. How many rules its first packet
meets in the filter table, and how many a later one, is counted by walking the rendered rules.
"""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.felix_calc import APPS, NODE, Stored, feed, resource
from bench.felix_world import SENDER, World, inside, main, world, write
from bench.row import Row, median
from felix.calc.state import Calculation
from felix.dataplane import pools
from felix.rules.tables import contents
from tests.support.eventually import eventually, eventually_now
from tests.support.rule_interpreter import Interpreter, Outcome, Packet, as_text

PORT = 9001
TIMES = 5
SECONDS = 0.4
NUMBERS = (0, 10, 100)
SETTLE_S = 0.3
WITHIN_S = 30.0
SIZES = (60, 60, 0)
MODULE = "bench.packets"
BARE = "bare veth pair"
BARE_ADDRESSES = ("198.19.32.1", "198.19.32.2")


def measure() -> list[Row]:
    """All rows."""
    return inside(MODULE, *SIZES)


async def measured(*sizes: int) -> list[Row]:
    """All rows, in the namespace we are in."""
    with world(*sizes) as here:
        await here.fill()
        _compile(here)
        _wire_bare(here)
        with _served(here):
            here.on_node("sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward")
            _route(here)
            rows = _rows("no rules, through the node", here)
            here.run_felix()
            for number in NUMBERS:
                rows += await _with_policies(here, number)
        return rows


async def _with_policies(here: World, number: int) -> list[Row]:
    stored = [_policy(here, one, is_last=one == number - 1) for one in range(number)]
    async with here.client() as store:
        await write(store, stored)
        listing = await store.list("/calico/")
    calculation = Calculation(NODE, {})
    feed(calculation, [(item.key, item.value) for item in listing.items])
    chain = f"cali-pi-np/ns0/bench{number - 1}" if number else "cali-FORWARD"
    await eventually(lambda: chain in here.on_node("iptables-nft-save"), WITHIN_S, what=chain)
    await asyncio.sleep(SETTLE_S)
    what = f"{number} policies on the endpoint"
    first, later = (_walked(here, calculation, state) for state in ("NEW", "ESTABLISHED"))
    assert (first.verdict, later.verdict) == ("ACCEPT", "ACCEPT"), f"{first}, {later}"
    return [
        *_rows(what, here),
        Row(what=f"{what}: met by a first packet", unit="rules", cymric=first.met),
        Row(what=f"{what}: met by a later packet", unit="rules", cymric=later.met),
    ]


def _walked(here: World, calculation: Calculation, state: str) -> Outcome:
    desired = calculation.desired()
    interpreter = Interpreter(
        {"filter": as_text(contents(desired)["filter"])},
        {one.name: one.members for one in pools.sets(desired, {})},
    )
    packet = Packet(
        here.address(SENDER),
        here.address(here.receiver),
        destination_port=PORT,
        in_interface=here.interface(SENDER),
        out_interface=here.interface(here.receiver),
        state=state,
    )
    return interpreter.at_hook("filter", "FORWARD", packet)


def _policy(here: World, number: int, *, is_last: bool) -> Stored:
    """One of those on the receiver; the last allows what is measured, the others other things."""
    rule = {
        "action": "Allow",
        "protocol": "TCP",
        "source": {"selector": f"app == 'app{SENDER if is_last else number % APPS + 1}'"},
        "destination": {"ports": [PORT]},
    }
    spec = {
        "order": 1000 if is_last else number,
        "selector": f"app == 'app{here.receiver % APPS}'",
        "types": ["Ingress"],
        "ingress": [rule],
    }
    name = f"bench{number}"
    return resource("NetworkPolicy", "networkpolicies", name, spec, namespace="ns0")


def _rows(what: str, here: World) -> list[Row]:
    """Both ways in turn."""
    flows = {"ours": here.address(here.receiver), "bare": BARE_ADDRESSES[1]}
    taken: dict[tuple[str, str], list[float]] = {}
    for _ in range(TIMES):
        for kind in ("bulk", "connect"):
            for name, address in flows.items():
                words = (kind, address, str(PORT), str(SECONDS))
                figure = float(here.on_node(*_in(here, SENDER), _program(here), *words))
                taken.setdefault((kind, name), []).append(figure)
    return [
        Row(
            what=f"pod to pod, {what}: {text}",
            unit=unit,
            cymric=scale / median(taken[kind, "ours"]),
            peer_name=BARE,
            peer=scale / median(taken[kind, "bare"]),
        )
        for kind, text, unit, scale in (
            ("bulk", "one GiB", "s", float(1 << 30)),
            ("connect", "one connection", "us", 1e6),
        )
    ]


def _compile(here: World) -> None:
    source = Path(__file__).with_name("flow.c")
    here.on_node("gcc", "-O2", "-o", _program(here), str(source))


def _program(here: World) -> str:
    return str(here.directory / "flow")


def _in(here: World, number: int) -> tuple[str, ...]:
    return "nsenter", f"--net=/run/netns/{here.namespace(f'pod{number}')}"


def _wire_bare(here: World) -> None:
    """A second pair, straight from one pod to the other."""
    far = here.namespace(f"pod{here.receiver}")
    words = ("type", "veth", "peer", "name", "bare0", "netns", far)
    here.on_node(*_in(here, SENDER), "ip", "link", "add", "bare0", *words)
    for number, address in zip((SENDER, here.receiver), BARE_ADDRESSES, strict=True):
        where = _in(here, number)
        here.on_node(*where, "ip", "address", "add", f"{address}/30", "dev", "bare0")
        here.on_node(*where, "ip", "link", "set", "bare0", "up")


def _route(here: World) -> None:
    """What felix does for pods, without any rule."""
    for number in (SENDER, here.receiver):
        interface, address = here.interface(number), here.address(number)
        Path(f"/proc/sys/net/ipv4/conf/{interface}/proxy_arp").write_text("1")
        here.on_node("ip", "route", "add", address, "dev", interface, "metric", "1024")


@contextmanager
def _served(here: World) -> Iterator[None]:
    """The receiver answers, for as long as the block lasts."""
    server = subprocess.Popen([*_in(here, here.receiver), _program(here), "serve", str(PORT)])
    listening = ("ss", "-Hltn", f"sport = :{PORT}")
    try:
        eventually_now(
            lambda: here.on_node(*_in(here, here.receiver), *listening), WITHIN_S, what="it listens"
        )
        yield
    finally:
        server.kill()
        server.wait()


if __name__ == "__main__":
    main(MODULE, measured, measure)
