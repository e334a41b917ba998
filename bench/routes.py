"""10,000 routes from BIRD into the kernel: Cymric (ExaBGP and bgpd) beside BIRD as the receiver.

One BIRD sends the same routes, in turn, to both receivers over sessions that are already up; the
clock runs from the command that lets the routes go to the moment when the receiver's kernel holds
the last of them. Two rows: routes that share their attributes, so that hundreds travel in one
UPDATE, and routes of which each has its own MED, so that each travels alone.

`python -m bench.routes` as root. It makes namespaces `cyrib-*` and removes them. BIRD 2.0.12 as
sender may sleep up to 3 s with work pending; any command on its socket wakes it, so the loop that
watches the kernel also pokes both BIRDs, equally for both receivers.
"""

from __future__ import annotations

import asyncio
import os
import re
import secrets
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench.row import Row, median
from bgpd import daemon
from bgpd.exabgp import ExaBGPSpeaker
from cymric.datastore.memory import MemoryDatastore
from cymric.kernel.routes import RouteTable
from cymric.model.peering import PeeringInputs, peering_of
from cymric.runtime.health import Health
from cymric.runtime.settings import Settings
from tests.fv.speaker_lab import OUR_ADDRESS, OUR_ASN, Bird, SpeakerLab
from tests.support.eventually import eventually
from tests.support.routing import configuration, node, peer, pool, store

ROUTES = 10_000
ROUNDS = 5
SENDER, RECEIVER = "198.19.8.2", "198.19.8.3"
SENDER_ASN = 64900
PREFIXES = [f"10.{64 + n // 1024}.{n // 4 % 256}.{n % 4 * 64}/26" for n in range(ROUTES)]
POLL_S = 0.002
POKE_S = 0.05


@dataclass
class Receiver:
    """Somebody whose kernel is watched: a process in the namespace, the sender's session name."""

    name: str
    pid: int
    session: str

    @property
    def prefixes(self) -> int:
        """How many prefixes the namespace's main table holds."""
        text = Path(f"/proc/{self.pid}/net/fib_triestat").read_text().partition("Main:")[2]
        found = re.search(r"Prefixes:\s+(\d+)", text)
        return int(found[1]) if found else 0


async def measure() -> list[Row]:
    """Both rows."""
    return [
        await _measure("10,000 routes into the kernel, shared attributes", one_by_one=False),
        await _measure("10,000 routes into the kernel, one per UPDATE", one_by_one=True),
    ]


async def _measure(what: str, *, one_by_one: bool) -> Row:
    with _lab() as lab:
        sender = _sender(lab, one_by_one=one_by_one)
        receivers = [await _cymric(lab), _bird(lab)]
        for receiver in receivers:
            await eventually(lambda r=receiver: _is_up(sender, r.session), 30)  # type: ignore[misc]
        taken_s: dict[str, list[float]] = {receiver.name: [] for receiver in receivers}
        for _ in range(ROUNDS):
            for receiver in receivers:
                taken_s[receiver.name].append(await _once(lab, sender, receiver))
        return Row(
            what=what,
            unit="s",
            cymric=median(taken_s["cymric"]),
            peer_name="BIRD",
            peer=median(taken_s["BIRD"]),
        )


async def _once(lab: SpeakerLab, sender: Bird, receiver: Receiver) -> float:
    """Let the routes go to one receiver; seconds until its kernel has them all. Then clean up."""
    birds = tuple(lab.birds.values())
    before = receiver.prefixes
    started = time.monotonic()
    sender.ask(f"enable {receiver.session}_routes")
    await _until(lambda: receiver.prefixes >= before + ROUTES, birds)
    taken_s = time.monotonic() - started
    sender.ask(f"disable {receiver.session}_routes")
    await _until(lambda: receiver.prefixes == before, birds)
    return taken_s


async def _until(condition: object, birds: tuple[Bird, ...]) -> None:
    deadline, poke_at = time.monotonic() + 120, 0.0
    while not condition():  # type: ignore[operator]
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


def _is_up(sender: Bird, session: str) -> bool:
    return "Established" in sender.ask(f"show protocols {session}")


@contextmanager
def _lab() -> Iterator[SpeakerLab]:
    with tempfile.TemporaryDirectory() as directory:
        lab = SpeakerLab(Path(directory), name=f"cyrib-{secrets.token_hex(2)}")
        try:
            yield lab
        finally:
            lab.close()


def _sender(lab: SpeakerLab, *, one_by_one: bool) -> Bird:
    """BIRD with one table, set of routes and session for each receiver."""
    parts = [f"router id {SENDER};\nprotocol device {{}}\n"]
    for session, address, asn in (
        ("to_cymric", OUR_ADDRESS, OUR_ASN),
        ("to_bird", RECEIVER, OUR_ASN),
    ):
        routes = "\n".join(
            f"  route {prefix} blackhole" + (f" {{ bgp_med = {n}; }};" if one_by_one else ";")
            for n, prefix in enumerate(PREFIXES)
        )
        parts.append(
            f"ipv4 table {session}_table;\n"
            f"protocol static {session}_routes {{\n  disabled;\n"
            f"  ipv4 {{ table {session}_table; }};\n{routes}\n}}\n"
            f"protocol bgp {session} {{\n  local {SENDER} as {SENDER_ASN};\n"
            f"  neighbor {address} as {asn};\n  graceful restart on;\n"
            "  connect delay time 1; connect retry time 1; error wait time 1, 2;\n"
            f"  ipv4 {{ table {session}_table; import none; export all; next hop self; }};\n}}\n"
        )
    return _start_bird(lab, "sender", SENDER, "".join(parts))


def _bird(lab: SpeakerLab) -> Receiver:
    """BIRD as a stock node has it: received routes go to the kernel."""
    configuration_text = (
        f"router id {RECEIVER};\nprotocol device {{}}\nprotocol direct {{ ipv4; }}\n"
        "protocol kernel { ipv4 { import none; export where source = RTS_BGP; }; }\n"
        f"protocol bgp from_sender {{\n  local {RECEIVER} as {OUR_ASN};\n"
        f"  neighbor {SENDER} as {SENDER_ASN};\n  graceful restart on;\n"
        "  connect delay time 1; connect retry time 1; error wait time 1, 2;\n"
        "  ipv4 { import all; export none; };\n}\n"
    )
    bird = _start_bird(lab, "receiver", RECEIVER, configuration_text)
    return Receiver("BIRD", bird.process.pid, "to_bird")


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


async def _cymric(lab: SpeakerLab) -> Receiver:
    """ExaBGP and bgpd as processes of their own; only the datastore is one in memory."""
    nodes = {"us": node("us", f"{OUR_ADDRESS}/20")}
    peers = {"sender": peer(SENDER, SENDER_ASN)}
    peering = peering_of("us", PeeringInputs(nodes=nodes, peers=peers, configurations={}))
    lab.write_configuration(*peering.sessions)
    lab.exabgp()
    process = lab.start(
        "us", sys.executable, "-m", "bench.routes", "receive", log=lab.directory / "bgpd"
    )
    await eventually((lab.run_directory / "bgpd.sock").is_socket, 30)
    return Receiver("cymric", process.pid, "to_cymric")


async def _receive() -> None:
    """What runs in the receiver's namespace: bgpd, with a small cluster in memory."""
    settings = Settings(node_name="us", run_dir=Path(os.environ["CYMRIC_RUN_DIR"]))
    datastore = MemoryDatastore()
    await store(datastore, node("us", f"{OUR_ADDRESS}/20"), peer(SENDER, SENDER_ASN))
    await store(datastore, pool("10.64.0.0/10"), configuration(nodeToNodeMeshEnabled=False))
    speaker = ExaBGPSpeaker(settings.speaker_socket, settings.exabgp_config)
    async with RouteTable() as routes:
        await daemon.run(settings, Health(), datastore, speaker, routes)


def main() -> None:
    """Print the rows."""
    if sys.argv[1:] == ["receive"]:
        asyncio.run(_receive())
        return
    for row in asyncio.run(measure()):
        print(row)


if __name__ == "__main__":
    main()
