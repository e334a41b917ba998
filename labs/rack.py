"""The lab as a rack: reflectors instead of the mesh, and two top-of-rack routers with BFD.

    control, node1      reflect routes (RFC 4456); every node peers with both
    node2, node3        peer with the reflectors only
    tor1, tor2          FRR and BIRD in AS 65000, eBGP and BFD to every node; each announces the
                        world, one address that both have and answer HTTP at
    host1               as before

It is made of a standing lab, step by step, so that no pod loses a packet on the way. The routers
are configured by what `cymric tor-config` prints, plus what is theirs: the address of the world.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

from labs import network
from labs.lab import HERE, MANIFESTS, Lab, server
from labs.network import entering, run
from labs.supervisor import Program
from labs.topology import CONTROL, Layout, Unknown

REFLECTORS = (CONTROL, "node1")
FOURTH = "node3"
CLUSTER_ID = "244.0.0.1"
LABEL = "rack.cymric.io/reflector"
TOR_ASN = 65000
WORLD = IPv4Network("198.19.48.1/32")
"""What lies beyond the routers: an address that both of them have."""


@dataclass(frozen=True, slots=True)
class Tor:
    """A top-of-rack router: `kind` is what `cymric tor-config --for` calls it."""

    name: str
    address: IPv4Address
    kind: str

    def directory(self, layout: Layout) -> Path:
        """Its configuration and sockets."""
        return layout.state / self.name

    @property
    def own_configuration(self) -> str:
        """What is its own affair: the world, announced to the nodes."""
        if self.kind == "frr":
            return (
                f"router bgp {TOR_ASN}\n address-family ipv4 unicast\n"
                f"  network {WORLD}\n exit-address-family\nexit\n"
            )
        return (
            "protocol device { scan time 2; }\n"
            'protocol direct { ipv4; interface "eth0"; }\n'
            f"protocol static world {{ ipv4; route {WORLD} unreachable; }}\n"
            "protocol kernel { scan time 2; merge paths on;"
            " ipv4 { import none; export where source = RTS_BGP; }; }\n"
        )


TORS = (
    Tor("tor1", IPv4Address("198.19.14.1"), "frr"),
    Tor("tor2", IPv4Address("198.19.14.2"), "bird"),
)


def tor(name: str) -> Tor:
    """Raises Unknown."""
    for one in TORS:
        if one.name == name:
            return one
    raise Unknown(f"no router {name}; there are {', '.join(one.name for one in TORS)}")


class Rack:
    """What is done to a lab to make a rack of it. Every method has done its work on return."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.layout = lab.layout

    def up(self) -> None:
        """Make a rack of the lab, which must be standing; completes one that was half made."""
        lab = self.lab
        lab.supervisor.processes()  # raises NotRunning
        lab.update_records(lambda known: replace(known, rack=True))
        if all(node.name != FOURTH for node in lab.records.nodes):
            lab.add_node(FOURTH)
            lab.add_pod(FOURTH, "supplier")
        with lab.step(f"Let {' and '.join(REFLECTORS)} reflect routes"):
            for name in REFLECTORS:
                self._make_reflector(name)
        for manifest in sorted((MANIFESTS / "rack").glob("*.yaml")):
            with lab.step(f"Apply {manifest.name}"):
                lab.cymric(CONTROL, "apply", "-f", str(manifest))
        for one in TORS:
            self._tor_up(one)

    def silence(self, name: str) -> None:
        """Make a router drop all it gets and sends, its interface staying up."""
        for chain in ("INPUT", "OUTPUT", "FORWARD"):
            run(*self._inside(name), "iptables", "-I", chain, "-j", "DROP")

    def restore(self, name: str) -> None:
        """Undo `silence`."""
        run(*self._inside(name), "iptables", "-F")

    def _inside(self, name: str) -> tuple[str, ...]:
        return entering(self.layout.namespace(tor(name).name))

    def _make_reflector(self, name: str) -> None:
        stored = json.loads(self.lab.cymric(name, "get", "node", name, "-o", "json"))
        if isinstance(stored, list):
            (stored,) = stored
        stored["metadata"].setdefault("labels", {})[LABEL] = "true"
        stored["spec"]["bgp"]["routeReflectorClusterID"] = CLUSTER_ID
        manifest = self.layout.node_dir(name) / "reflector.json"
        manifest.write_text(json.dumps(stored))
        self.lab.cymric(name, "apply", "-f", str(manifest))

    def _tor_up(self, one: Tor) -> None:
        namespace = self.layout.namespace(one.name)
        if network.exists(namespace):
            return
        with self.lab.step(f"Build the router {one.name} {one.address} ({one.kind}, AS {TOR_ASN})"):
            network.make_machine(
                namespace,
                bridge_namespace=self.layout.bridge_namespace,
                port=one.name,
                address=one.address,
                router=True,
            )
            run("ip", "-netns", namespace, "address", "add", str(WORLD), "dev", "lo")
            directory = one.directory(self.layout)
            directory.mkdir(parents=True, exist_ok=True)
            words = ("--peer", one.name, "--for", one.kind, "--announce", str(WORLD))
            ours = self.lab.cymric(CONTROL, "tor-config", *words)
            (directory / f"{one.kind}.conf").write_text(ours + "\n" + one.own_configuration)
            self.lab.supervisor.write_group(
                one.name, [Program(one.kind, self._command(one)), server(namespace)]
            )
            self.lab.supervisor.update()

    def _command(self, one: Tor) -> tuple[str, ...]:
        directory = one.directory(self.layout)
        enter = entering(self.layout.namespace(one.name))
        if one.kind == "frr":
            shutil.chown(directory, "frr", "frr")
            return (*enter, str(HERE / "frr.sh"), str(directory))
        words = ("-f", "-c", str(directory / "bird.conf"), "-s", str(directory / "bird.ctl"))
        return (*enter, "bird", *words)
