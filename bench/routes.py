"""Routes from a peer into the kernel and from us to a peer: Cymric, BIRD and bare ExaBGP.

    BIRD (sender) ─▶ Cymric (ExaBGP and bgpd)    ─▶ kernel of its namespace
                  ─▶ BIRD                        ─▶ kernel of its namespace
                  ─▶ ExaBGP and bench/floor.py   ─▶ kernel of its namespace
    Cymric (ExaBGP and the speaker), BIRD, or ExaBGP and bench/floor.py ─▶ BIRD (receiver)

The same routes go to all, in turn, over sessions that are already up. Received: the clock runs from
the command that lets the routes go to the moment when the receiver's kernel holds the last of them.
Announced: from the wish to the moment when the receiving BIRD holds the last; no kernel.

The floor is what no program behind a stock ExaBGP can beat: it decides nothing and checks nothing.
For announcing it runs at reactor speed 0.1, which is faster and costs a tenth of a core when idle.

`python -m bench.routes [--quick]` as root; quick takes 10,000 instead of 100,000 for the first row.
It makes namespaces `cyrib-*` and removes them. BIRD 2.0.12 as sender may sleep up to 3 s with work
pending; any command on its socket wakes it, so the loop that watches also pokes all BIRDs, equally
for every receiver.
"""

from __future__ import annotations

import asyncio
import os
import re
import secrets
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import bench.floor
from bench.floor import prefixes
from bench.row import Row, median
from bgpd import daemon
from bgpd.announcement import Announcement
from bgpd.exabgp import ExaBGPSpeaker
from cymric.datastore.memory import MemoryDatastore
from cymric.kernel.routes import RouteTable
from cymric.model.peering import PeeringInputs, peering_of
from cymric.runtime.health import Health
from cymric.runtime.settings import Settings
from tests.fv.speaker_lab import OUR_ADDRESS, OUR_ASN, Bird, SpeakerLab, session
from tests.support.eventually import eventually
from tests.support.routing import configuration, node, peer, pool, store

MANY, SOME = 100_000, 10_000
ROUNDS = 3
HUB, RECEIVER, FLOOR = "198.19.8.2", "198.19.8.3", "198.19.8.4"
HUB_ASN = 64900
POLL_S = 0.002
POKE_S = 0.05
BGP = "  graceful restart on; connect delay time 1; connect retry time 1; error wait time 1, 2;\n"


@dataclass
class Side:
    """One of the three: how to let routes go and call them back, and how many have arrived."""

    name: str
    session: str
    go: Callable[[], object]
    back: Callable[[], object]
    arrived: Callable[[], int]


async def measure(many: int = MANY) -> list[Row]:
    """All rows: each of ours beside BIRD, then beside the floor."""
    return [row async for row in _all_rows(many)]


async def _all_rows(many: int) -> AsyncIterator[Row]:
    shared = f"{many:,} routes into the kernel, shared attributes"
    for row in await _received(shared, many):
        yield row
    alone = f"{SOME:,} routes into the kernel, each with its own attributes"
    for row in await _received(alone, SOME, one_by_one=True):
        yield row
    for row in await _announced(f"{SOME:,} routes announced to BIRD", SOME):
        yield row


async def _print(many: int) -> None:
    async for row in _all_rows(many):
        print(row, flush=True)


async def _received(what: str, count: int, *, one_by_one: bool = False) -> list[Row]:
    with _lab() as lab:
        hub = _sender(lab, count, one_by_one=one_by_one)

        def side(name: str, session_name: str, pid: int) -> Side:
            return Side(
                name,
                session_name,
                lambda: hub.ask(f"enable {session_name}_routes"),
                lambda: hub.ask(f"disable {session_name}_routes"),
                lambda: _kernel_prefixes(pid),
            )

        return await _rows(
            what,
            lab,
            hub,
            [
                side("cymric", "to_cymric", await _cymric(lab)),
                side("BIRD", "to_bird", _receiving_bird(lab)),
                side("bare ExaBGP", "to_floor", _floor(lab, count)[0]),
            ],
            count,
        )


async def _announced(what: str, count: int) -> list[Row]:
    with _lab() as lab:
        hub = _listener(lab)

        def side(name: str, session_name: str, go: Callable[[bool], object]) -> Side:
            return Side(
                name,
                session_name,
                lambda: go(True),
                lambda: go(False),
                lambda: _held_from(hub, session_name),
            )

        sender = _announcing_bird(lab, count)
        ours, floor = await _announcing_cymric(lab, count), _floor(lab, count)[1]
        return await _rows(
            what,
            lab,
            hub,
            [
                side("cymric", "to_cymric", lambda on: _write(ours, on)),
                side("BIRD", "to_bird", lambda on: sender.ask(f"{_verb(on)} announced")),
                side("bare ExaBGP", "to_floor", lambda on: _write(floor, on)),
            ],
            count,
        )


async def _rows(
    what: str, lab: SpeakerLab, hub: Bird, sides: Sequence[Side], count: int
) -> list[Row]:
    for side in sides:
        await eventually(lambda s=side.session: _is_up(hub, s), 30)  # type: ignore[misc]
    taken_s: dict[str, list[float]] = {side.name: [] for side in sides}
    for _ in range(ROUNDS):
        for side in sides:
            taken_s[side.name].append(await _once(lab, side, count))
    ours = median(taken_s.pop("cymric"))
    return [
        Row(what=what, unit="s", cymric=ours, peer_name=name, peer=median(values))
        for name, values in taken_s.items()
    ]


async def _once(lab: SpeakerLab, side: Side, count: int) -> float:
    """Let the routes go to one side; seconds until all have arrived. Then clean up."""
    birds = tuple(lab.birds.values())
    before = side.arrived()
    started = time.monotonic()
    side.go()
    await _until(lambda: side.arrived() >= before + count, birds)
    taken_s = time.monotonic() - started
    side.back()
    await _until(lambda: side.arrived() == before, birds)
    return taken_s


async def _until(condition: Callable[[], bool], birds: tuple[Bird, ...]) -> None:
    deadline, poke_at = time.monotonic() + 180, 0.0
    while not condition():
        now = time.monotonic()
        if now > deadline:
            raise TimeoutError("the routes did not arrive")
        if now >= poke_at:
            await asyncio.gather(*(_poke(bird) for bird in birds))
            poke_at = now + POKE_S
        await asyncio.sleep(POLL_S)


async def _poke(bird: Bird) -> None:
    reader, writer = await asyncio.open_unix_connection(bird.socket)
    await reader.readline()
    writer.close()


def _kernel_prefixes(pid: int) -> int:
    """How many prefixes the main table of the process's namespace holds."""
    text = Path(f"/proc/{pid}/net/fib_triestat").read_text().partition("Main:")[2]
    found = re.search(r"Prefixes:\s+(\d+)", text)
    return int(found[1]) if found else 0


def _held_from(hub: Bird, session_name: str) -> int:
    found = re.search(r"(\d+) imported", hub.ask(f"show protocols all {session_name}"))
    return int(found[1]) if found else 0


def _is_up(hub: Bird, session_name: str) -> bool:
    return "Established" in hub.ask(f"show protocols {session_name}")


def _verb(on: bool) -> str:
    return "enable" if on else "disable"


def _write(fifo: Path, on: bool) -> None:
    fifo.write_text("go\n" if on else "back\n")


@contextmanager
def _lab() -> Iterator[SpeakerLab]:
    with tempfile.TemporaryDirectory() as directory:
        lab = SpeakerLab(Path(directory), name=f"cyrib-{secrets.token_hex(2)}")
        try:
            yield lab
        finally:
            lab.close()


# --- BIRD -----------------------------------------------------------------------------------------


def _sender(lab: SpeakerLab, count: int, *, one_by_one: bool) -> Bird:
    """BIRD with one table, set of routes and session for each receiver."""
    parts = [f"router id {HUB};\nprotocol device {{}}\n"]
    for name, address in (("to_cymric", OUR_ADDRESS), ("to_bird", RECEIVER), ("to_floor", FLOOR)):
        parts.append(
            f"ipv4 table {name}_table;\n"
            f"protocol static {name}_routes {{\n  disabled;\n"
            f"  ipv4 {{ table {name}_table; }};\n{_statics(count, one_by_one=one_by_one)}\n}}\n"
            f"protocol bgp {name} {{\n  local {HUB} as {HUB_ASN};\n"
            f"  neighbor {address} as {OUR_ASN};\n{BGP}"
            f"  ipv4 {{ table {name}_table; import none; export all; next hop self; }};\n}}\n"
        )
    return _start_bird(lab, "hub", HUB, "".join(parts))


def _statics(count: int, *, one_by_one: bool = False) -> str:
    return "\n".join(
        f"  route {prefix} blackhole" + (f" {{ bgp_med = {n}; }};" if one_by_one else ";")
        for n, prefix in enumerate(prefixes(count))
    )


def _receiving_bird(lab: SpeakerLab) -> int:
    """BIRD as a stock node has it: received routes go to the kernel. Its process id."""
    return _start_bird(
        lab,
        "receiver",
        RECEIVER,
        f"router id {RECEIVER};\nprotocol device {{}}\nprotocol direct {{ ipv4; }}\n"
        "protocol kernel { ipv4 { import none; export where source = RTS_BGP; }; }\n"
        f"protocol bgp from_hub {{\n  local {RECEIVER} as {OUR_ASN};\n"
        f"  neighbor {HUB} as {HUB_ASN};\n{BGP}  ipv4 {{ import all; export none; }};\n}}\n",
    ).process.pid


def _listener(lab: SpeakerLab) -> Bird:
    """BIRD that takes routes from all three and keeps them in a table for each."""
    parts = [f"router id {HUB};\nprotocol device {{}}\n"]
    for name, address in (("to_cymric", OUR_ADDRESS), ("to_bird", RECEIVER), ("to_floor", FLOOR)):
        parts.append(
            f"ipv4 table {name}_table;\n"
            f"protocol bgp {name} {{\n  local {HUB} as {HUB_ASN};\n"
            f"  neighbor {address} as {OUR_ASN};\n{BGP}"
            f"  ipv4 {{ table {name}_table; import all; export none; }};\n}}\n"
        )
    return _start_bird(lab, "hub", HUB, "".join(parts))


def _announcing_bird(lab: SpeakerLab, count: int) -> Bird:
    return _start_bird(
        lab,
        "sender",
        RECEIVER,
        f"router id {RECEIVER};\nprotocol device {{}}\n"
        f"protocol static announced {{\n  disabled;\n  ipv4;\n{_statics(count)}\n}}\n"
        f"protocol bgp to_hub {{\n  local {RECEIVER} as {OUR_ASN};\n"
        f"  neighbor {HUB} as {HUB_ASN};\n{BGP}"
        "  ipv4 { import none; export all; next hop self; };\n}\n",
    )


def _start_bird(lab: SpeakerLab, name: str, address: str, text: str) -> Bird:
    lab.attach(name, address)
    directory = lab.directory / name
    directory.mkdir()
    path, socket = directory / "bird.conf", directory / "bird.ctl"
    path.write_text(text)
    process = lab.start(
        name, "bird", "-f", "-c", str(path), "-s", str(socket), "-P", str(directory / "pid"),
        log=directory / "output",
    )  # fmt: skip
    bird = Bird(name, address, f"{lab.name}-{name}", socket, path, process)
    lab.birds[name] = bird
    return bird


# --- bare ExaBGP ----------------------------------------------------------------------------------


def _floor(lab: SpeakerLab, count: int) -> tuple[int, Path]:
    """ExaBGP without our launcher, with the least of a program behind it: process id and FIFO."""
    lab.attach("floor", FLOOR)
    directory = lab.directory / "floor"
    directory.mkdir()
    fifo, path = directory / "fifo", directory / "exabgp.conf"
    os.mkfifo(fifo)
    script = f"{sys.executable} {bench.floor.__file__} {fifo} {HUB} {FLOOR} {count}"
    path.write_text(
        f"process floor {{ run {script}; encoder json; }}\n"
        f"neighbor {HUB} {{\n  router-id {FLOOR}; local-address {FLOOR};\n"
        f"  local-as {OUR_ASN}; peer-as {HUB_ASN}; hold-time 90; adj-rib-in false;\n"
        "  family { ipv4 unicast; }\n"
        "  capability { graceful-restart 120; asn4 enable; route-refresh enable; }\n"
        "  api { processes [ floor ]; receive { parsed; update; } }\n}\n"
    )
    settings = {
        "exabgp_daemon_user": "root",
        "exabgp_daemon_drop": "false",
        "exabgp_api_cli": "false",
        "exabgp_api_ack": "false",
        "exabgp_log_level": "CRITICAL",
        "exabgp_reactor_speed": "0.1",
    }
    process = lab.start(
        "floor", "env", *(f"{name}={value}" for name, value in settings.items()),
        sys.executable, "-m", "exabgp", "server", str(path), log=directory / "output",
    )  # fmt: skip
    return process.pid, fifo


# --- Cymric ---------------------------------------------------------------------------------------


async def _cymric(lab: SpeakerLab) -> int:
    """ExaBGP and bgpd as processes of their own; only the datastore is one in memory."""
    nodes = {"us": node("us", f"{OUR_ADDRESS}/20")}
    peers = {"hub": peer(HUB, HUB_ASN)}
    peering = peering_of("us", PeeringInputs(nodes=nodes, peers=peers, configurations={}))
    lab.write_configuration(*peering.sessions)
    lab.exabgp()
    process = lab.start(
        "us", sys.executable, "-m", "bench.routes", "receive", log=lab.directory / "bgpd"
    )
    await eventually((lab.run_directory / "bgpd.sock").is_socket, 30)
    return process.pid


async def _receive() -> None:
    """What runs in the receiver's namespace: bgpd, with a small cluster in memory."""
    settings = Settings(node_name="us", run_dir=Path(os.environ["CYMRIC_RUN_DIR"]))
    datastore = MemoryDatastore()
    await store(datastore, node("us", f"{OUR_ADDRESS}/20"), peer(HUB, HUB_ASN))
    await store(datastore, pool("10.0.0.0/8"), configuration(nodeToNodeMeshEnabled=False))
    speaker = ExaBGPSpeaker(settings.speaker_socket, settings.exabgp_config)
    async with RouteTable() as routes:
        await daemon.run(settings, Health(), datastore, speaker, routes)


async def _announcing_cymric(lab: SpeakerLab, count: int) -> Path:
    """ExaBGP and the speaker; a line in the FIFO says what to want."""
    fifo = lab.directory / "ours"
    os.mkfifo(fifo)
    lab.write_configuration(session(HUB, asn=HUB_ASN))
    lab.exabgp()
    lab.start(
        "us", sys.executable, "-m", "bench.routes", "announce", str(fifo), str(count),
        log=lab.directory / "speaker",
    )  # fmt: skip
    return fifo


async def _announce(fifo: str, count: int) -> None:
    """What runs beside our ExaBGP to announce: the speaker, without bgpd's reasons."""
    run_directory = Path(os.environ["CYMRIC_RUN_DIR"])
    speaker = ExaBGPSpeaker(run_directory / "speaker.sock", run_directory / "exabgp.conf")
    routes = {prefix: Announcement(prefix, OUR_ADDRESS) for prefix in prefixes(count)}
    speaker.advertise(HUB, {})
    descriptor = os.open(fifo, os.O_RDWR | os.O_NONBLOCK)

    def obey() -> None:
        for word in os.read(descriptor, 4096).decode().split():
            speaker.advertise(HUB, routes if word == "go" else {})

    async def listen() -> None:
        async for _ in speaker.events():
            pass

    asyncio.get_running_loop().add_reader(descriptor, obey)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(speaker.run())
        tasks.create_task(listen())


def main() -> None:
    """Print the rows; with other words, be one of the processes measured."""
    match sys.argv[1:]:
        case ["receive"]:
            asyncio.run(_receive())
        case ["announce", fifo, count]:
            asyncio.run(_announce(fifo, int(count)))
        case words:
            asyncio.run(_print(SOME if "--quick" in words else MANY))


if __name__ == "__main__":
    main()
