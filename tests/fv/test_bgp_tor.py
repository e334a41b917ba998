"""Our whole speaker (confd, ExaBGP, bgpd) against FRR as top-of-rack router and against BIRD."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from cymric.cli.main import cli
from cymric.cli.session import Session
from cymric.datastore.api import delete, put
from cymric.model.keys import PasswordKey, ResourceKey
from tests.support.bgp_node import BgpNode
from tests.support.bird import BirdRouter
from tests.support.eventually import eventually
from tests.support.frr import Frr
from tests.support.routing import block, pool, store
from tests.support.underlay import Host, Underlay, run

pytestmark = [pytest.mark.root, pytest.mark.peers]

PATIENCE_S = 60.0
POOL4, OURS4, THEIRS4 = "198.19.16.0/24", "198.19.16.0/26", "198.19.16.64/26"
POOL6, OURS6, THEIRS6 = "fd20::/64", "fd20::/122", "fd20::40/122"
FOREIGN = {4: "203.0.113.0/24", 6: "2001:db8::/48"}
OURS, THEIRS = {4: OURS4, 6: OURS6}, {4: THEIRS4, 6: THEIRS6}
TOR_ASN, CLUSTER_ASN = 64900, 64512


@pytest.fixture
def underlay(tmp_path: Path) -> Iterator[Underlay]:
    made = Underlay(tmp_path)
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
async def us(underlay: Underlay) -> BgpNode:
    """Our node, with a block in a pool of each family and no mesh."""
    made = BgpNode(underlay, underlay.host("us", 1))
    await node(made, "us", made.host)
    await resource(made, "BGPConfiguration", "default", {"nodeToNodeMeshEnabled": False})
    await store(made.store, pool(POOL4, name="four"), pool(POOL6, name="six"))
    await store(made.store, block(OURS4, "us"), block(OURS6, "us"))
    return made


async def resource(us: BgpNode, kind: str, name: str, spec: dict[str, Any]) -> None:
    """Store an object as calicoctl would."""
    tree = {"apiVersion": "projectcalico.org/v3", "kind": kind, "metadata": {"name": name}}
    await put(us.store, str(ResourceKey(kind, name)), json.dumps({**tree, "spec": spec}).encode())


async def node(us: BgpNode, name: str, host: Host, **bgp: Any) -> None:
    """Store a Node with both addresses of a host."""
    addresses = {"ipv4Address": f"{host.v4}/20", "ipv6Address": f"{host.v6}/64"}
    await resource(us, "Node", name, {"bgp": {**addresses, **bgp}})


async def secret(us: BgpNode, name: str, password: str) -> None:
    """Store a password; its key in the secret is `key`."""
    await put(us.store, str(PasswordKey(name, "key")), password.encode())


def password_of(name: str) -> dict[str, Any]:
    """A BGPPeer's reference to it."""
    return {"secretKeyRef": {"name": name, "key": "key"}}


def address(host: Host, version: int) -> str:
    """One of a host's two addresses."""
    return host.v4 if version == 4 else host.v6


def frr_configuration(us: Host, version: int, *lines: str) -> str:
    """A ToR that peers with us, says what `lines` want of us, and announces a prefix."""
    peer = address(us, version)
    extra = "\n".join(f" neighbor {peer} {line}" for line in lines)
    return f"""\
router bgp {TOR_ASN}
 bgp router-id 198.19.0.9
 no bgp ebgp-requires-policy
 no bgp network import-check
 no bgp default ipv4-unicast
 timers bgp 3 9
 neighbor {peer} remote-as {CLUSTER_ASN}
 neighbor {peer} timers connect 1
{extra}
 address-family ipv{version} unicast
  neighbor {peer} activate
  network {THEIRS[version]}
 exit-address-family
"""


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize(
    ("spec", "lines"),
    [
        pytest.param({}, (), id="plain"),
        pytest.param({"password": password_of("tor")}, ("password it's:secret",), id="MD5"),
        pytest.param({"ttlSecurity": 1}, ("ttl-security hops 1",), id="TTL security"),
        pytest.param({"ttlSecurity": 1, "password": password_of("tor")},
                     ("ttl-security hops 1", "password it's:secret"), id="both"),
        pytest.param({"localASNumber": 64700}, ("remote-as 64700",), id="another AS of ours"),
    ],
)  # fmt: skip
async def test_frr_as_tor(
    underlay: Underlay, us: BgpNode, version: int, spec: dict[str, Any], lines: tuple[str, ...]
) -> None:
    """The session comes up in its family; our block is there, and theirs in our kernel."""
    tor = underlay.host("tor", 9)
    frr = Frr.start(underlay, tor, frr_configuration(us.host, version, *lines))
    await secret(us, "tor", "it's:secret")
    peer = {"peerIP": address(tor, version), "asNumber": TOR_ASN, "keepaliveTime": "3s"}
    await resource(us, "BGPPeer", "tor", {**peer, **spec})
    async with us.running():
        ours = address(us.host, version)
        await eventually(lambda: frr.is_up(ours), PATIENCE_S)
        await eventually(lambda: OURS[version] in frr.routes(version), PATIENCE_S)
        await eventually(lambda: THEIRS[version] in us.kernel(version), PATIENCE_S)
        assert frr.neighbor(ours)["bgpTimerConfiguredHoldTimeMsecs"] == 9000
        assert us.confd_status()["unsupported"] == {}


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize(
    ("spec", "lines"),
    [
        pytest.param({"ttlSecurity": 1, "password": password_of("tor")},
                     ("ttl-security hops 1", "password secret"), id="MD5, TTL security"),
        pytest.param({"sourceAddress": "None"}, (), id="no address of our own"),
    ],
)  # fmt: skip
async def test_tor_that_connects_to_us(
    underlay: Underlay, us: BgpNode, version: int, spec: dict[str, Any], lines: tuple[str, ...]
) -> None:
    """What is asked of a session holds as well when the other side opens the connection."""
    tor = underlay.host("tor", 9)
    # Nobody answers on the port we connect to.
    await resource(us, "BGPPeer", "tor", {
        "peerIP": f"[{address(tor, version)}]:1179", "asNumber": TOR_ASN, **spec,
    })  # fmt: skip
    await secret(us, "tor", "secret")
    async with us.running():
        frr = Frr.start(underlay, tor, frr_configuration(us.host, version, *lines))
        await eventually(lambda: frr.is_up(address(us.host, version)), PATIENCE_S)
        await eventually(lambda: OURS[version] in frr.routes(version), PATIENCE_S)


async def test_peer_from_too_far_away_is_not_heard(underlay: Underlay, us: BgpNode) -> None:
    """With TTL security, packets that crossed a router, or may have, are dropped by the kernel."""
    tor = underlay.host("tor", 9)
    peer = {"peerIP": f"{tor.v4}:1179", "asNumber": TOR_ASN, "ttlSecurity": 1}
    await resource(us, "BGPPeer", "tor", peer)
    async with us.running():
        # Without TTL security FRR sends to another AS with a TTL of 1.
        frr = Frr.start(underlay, tor, frr_configuration(us.host, 4))
        refused = f"connection of {tor.v4} came from too far away"
        await eventually(lambda: us.exabgp_log.count(refused) > 1, PATIENCE_S)
        assert not frr.is_up(us.host.v4)


def counter(host: Host, name: str) -> int:
    """A counter of the host's kernel, from /proc/net/netstat."""
    lines = run(*host.enter, "cat", "/proc/net/netstat").splitlines()
    for names, values in zip(lines[::2], lines[1::2], strict=True):
        found = dict(zip(names.split(), values.split(), strict=True))
        if name in found:
            return int(found[name])
    raise AssertionError(f"the kernel counts no {name}")


# --- passwords ------------------------------------------------------------------------------------


def bird_configuration(bird: Host, us: Host, *, asn: int, password: str) -> str:
    """A router that peers with us."""
    return f"""
protocol bgp ours {{
  local {bird.v4} as {asn};
  neighbor {us.v4} as {CLUSTER_ASN};
  password "{password}";
  connect delay time 1; connect retry time 1; error wait time 1, 2;
  ipv4 {{ import all; export none; }};
}}
"""


async def test_password_changes_without_touching_other_sessions(
    underlay: Underlay, us: BgpNode
) -> None:
    """One session renews itself with its new password, or ends without one; the other stays up."""
    hosts = {"one": underlay.host("one", 7), "two": underlay.host("two", 8)}
    birds = {}
    for number, (name, host) in enumerate(hosts.items()):
        text = bird_configuration(host, us.host, asn=64901 + number, password=f"{name}-1")
        birds[name] = BirdRouter.start(underlay, host, text)
        await secret(us, name, f"{name}-1")
        spec = {"peerIP": host.v4, "asNumber": 64901 + number, "password": password_of(name)}
        await resource(us, "BGPPeer", name, spec)
    async with us.running():
        for bird in birds.values():
            await eventually(lambda bird=bird: bird.is_up("ours"), PATIENCE_S)  # type: ignore[misc]
        since_one, since_two = birds["one"].since("ours"), birds["two"].since("ours")
        # BIRD tells whole seconds, and all that follows may take less than one.
        await eventually(lambda: time.strftime("%H:%M:%S") not in (since_one, since_two))
        await secret(us, "one", "one-2")
        birds["one"].load(bird_configuration(hosts["one"], us.host, asn=64901, password="one-2"))
        await eventually(
            lambda: birds["one"].is_up("ours") and birds["one"].since("ours") != since_one,
            PATIENCE_S,
        )
        assert birds["two"].since("ours") == since_two
        await delete(us.store, str(PasswordKey("one", "key")))
        await eventually(lambda: "one" in us.confd_status()["unsupported"], PATIENCE_S)
        await eventually(lambda: not birds["one"].is_up("ours"), PATIENCE_S)
        assert birds["two"].is_up("ours")
        assert birds["two"].since("ours") == since_two


async def test_a_password_that_changed_is_told_of_the_session_it_concerns(
    underlay: Underlay, us: BgpNode
) -> None:
    """FRR changes its password under a session: that one is named with its cause, before and after
    the hold timer, the other is not; with the right password nothing is said any more.
    """
    tor, other = underlay.host("tor", 9), underlay.host("other", 8)
    frr = Frr.start(underlay, tor, frr_configuration(us.host, 4, "password one"))
    bird = BirdRouter.start(
        underlay, other, bird_configuration(other, us.host, asn=64902, password="two")
    )
    for name, host, asn in (("one", tor, TOR_ASN), ("two", other, 64902)):
        await secret(us, name, name)
        spec = {"peerIP": host.v4, "asNumber": asn, "keepaliveTime": "3s"}
        await resource(us, "BGPPeer", name, {**spec, "password": password_of(name)})

    async def hints() -> dict[str, str]:
        return {peer["address"]: peer["hint"] for peer in (await us.ask())["peers"]}

    async def is_named() -> bool:
        return (await hints())[tor.v4].startswith("the password differs from the peer's")

    async with us.running():
        await eventually(lambda: frr.is_up(us.host.v4) and bird.is_up("ours"), PATIENCE_S)
        await eventually(lambda: is_silent(hints), PATIENCE_S)
        frr.load(f"router bgp {TOR_ASN}\n neighbor {us.host.v4} password changed\n")
        await eventually(is_named, PATIENCE_S)
        assert (await hints())[other.v4] == ""
        await secret(us, "one", "changed")
        await eventually(lambda: frr.is_up(us.host.v4), PATIENCE_S)
        await eventually(lambda: is_silent(hints), PATIENCE_S)


async def is_silent(hints: Callable[[], Awaitable[dict[str, str]]]) -> bool:
    """Whether nothing is said of any session."""
    return not any((await hints()).values())


async def test_wrong_password_is_no_session(underlay: Underlay, us: BgpNode) -> None:
    """The kernel drops every packet signed with another password; the right one mends it."""
    host = underlay.host("one", 7)
    bird = BirdRouter.start(
        underlay, host, bird_configuration(host, us.host, asn=64901, password="right")
    )
    await secret(us, "one", "wrong")
    spec = {"peerIP": host.v4, "asNumber": 64901, "password": password_of("one")}
    await resource(us, "BGPPeer", "one", spec)
    async with us.running():
        await eventually(lambda: counter(us.host, "TCPMD5Failure") > 0, PATIENCE_S)

        async def is_named() -> bool:
            [told] = (await us.ask())["peers"]
            return str(told["hint"]).startswith("the password differs from the peer's")

        await eventually(is_named, PATIENCE_S)
        assert not bird.is_up("ours")
        await secret(us, "one", "right")
        await eventually(lambda: bird.is_up("ours"), PATIENCE_S)


# --- BIRD as stock Calico sets it up --------------------------------------------------------------


async def test_mesh_with_a_calico_node(underlay: Underlay, us: BgpNode) -> None:
    """A node that runs BIRD as Calico configures it is a mesh peer in both families."""
    other = underlay.host("other", 2)
    sessions = "".join(
        f"""
protocol bgp us{version} {{
  local {address(other, version)} as {CLUSTER_ASN};
  neighbor {address(us.host, version)} as {CLUSTER_ASN};
  multihop; graceful restart on; source address {address(other, version)};
  connect delay time 2; connect retry time 5; error wait time 5, 30;
  ipv{version} {{ import all; export where source = RTS_STATIC; add paths on;
    gateway recursive; }};
}}
protocol static st{version} {{ ipv{version}; route {THEIRS[version]} blackhole; }}
"""
        for version in (4, 6)
    )
    bird = BirdRouter.start(underlay, other, sessions)
    await node(us, "other", other)
    await resource(us, "BGPConfiguration", "default", {})
    await store(us.store, block(THEIRS4, "other"), block(THEIRS6, "other"))
    async with us.running():
        for version in (4, 6):
            name = f"us{version}"
            await eventually(lambda name=name: bird.is_up(name), PATIENCE_S)  # type: ignore[misc]
            await eventually(
                lambda version=version: OURS[version] in bird.routes(f"us{version}"),  # type: ignore[misc]
                PATIENCE_S,
            )
            await eventually(
                lambda version=version: THEIRS[version] in us.kernel(version),  # type: ignore[misc]
                PATIENCE_S,
            )
        assert "local_pref: 2147482623" in bird.routes("us4")[OURS4]
        assert "Restart time: 120" in bird.ask("show protocols all us4")


# --- the other side, written by us ----------------------------------------------------------------


async def tor_text(us: BgpNode, dialect: str) -> str:
    """What the command prints for the BGPPeer `tor`, its password filled in."""
    words = ["tor-config", "--peer", "tor", "--for", dialect]
    result = await asyncio.to_thread(CliRunner().invoke, cli, words, obj=Session(store=us.store))
    assert result.exit_code == 0, result.output
    assert "PASSWORD-OF-tor/key" in result.output
    return result.output.replace("PASSWORD-OF-tor/key", "secret")


def announcing(dialect: str, version: int) -> str:
    """What makes a router announce a prefix of the pool and one that is none of ours."""
    foreign = FOREIGN[version]
    if dialect == "bird":
        routes = f"route {THEIRS[version]} blackhole; route {foreign} blackhole;"
        return f"protocol static st {{ ipv{version}; {routes} }}\n"
    return (
        f"router bgp {TOR_ASN}\n bgp router-id 198.19.0.9\n no bgp network import-check\n"
        f" address-family ipv{version} unicast\n  network {THEIRS[version]}\n"
        f"  network {foreign}\n exit-address-family\n"
    )


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("dialect", ["frr", "bird"])
async def test_written_tor_configuration(
    underlay: Underlay, us: BgpNode, dialect: str, version: int
) -> None:
    """What we print for a router is accepted by it, and the session comes up with both filters."""
    tor = underlay.host("tor", 9)
    await secret(us, "tor", "secret")
    await resource(us, "BGPPeer", "tor", {
        "peerIP": address(tor, version), "asNumber": TOR_ASN, "ttlSecurity": 1,
        "password": password_of("tor"), "keepaliveTime": "3s",
    })  # fmt: skip
    text = await tor_text(us, dialect)
    routes: Callable[[], Iterable[str]]
    if dialect == "frr":
        frr = Frr.start(underlay, tor, announcing(dialect, version) + text)
        ours = address(us.host, version)
        is_up, routes = partial(frr.is_up, ours), partial(frr.routes, version)
    else:
        bird = BirdRouter.start(underlay, tor, announcing(dialect, version) + text)
        name = f"cymric_us_v{version}"
        is_up, routes = partial(bird.is_up, name), partial(bird.routes, name)
    async with us.running():
        await eventually(is_up, PATIENCE_S)
        await eventually(lambda: OURS[version] in routes(), PATIENCE_S)
        await eventually(lambda: THEIRS[version] in us.kernel(version), PATIENCE_S)
        received = json.dumps(await us.ask(f"received {address(tor, version)}"))
        assert THEIRS[version] in received
        assert FOREIGN[version] not in received, "the filter keeps what is none of ours"


async def test_written_bfd_is_accepted(underlay: Underlay, us: BgpNode) -> None:
    """FRR and BIRD take what is written for a peer with BFD."""
    tor = underlay.host("tor", 9)
    meta = {"name": "tor", "annotations": {"cymric.io/bfd": "300ms x 3"}}
    spec = {"peerIP": tor.v4, "asNumber": TOR_ASN, "password": password_of("tor")}
    tree = {"apiVersion": "projectcalico.org/v3", "kind": "BGPPeer", "metadata": meta}
    key = str(ResourceKey("BGPPeer", "tor"))
    await put(us.store, key, json.dumps({**tree, "spec": spec}).encode())
    frr = Frr.start(underlay, tor, await tor_text(us, "frr"), daemons=("bfdd",))
    shown = frr.neighbor(us.host.v4)["peerBfdInfo"]
    assert (shown["detectMultiplier"], shown["rxMinInterval"]) == (3, 300)
    other = underlay.host("other", 8)
    bird = BirdRouter.start(underlay, other, (await tor_text(us, "bird")).replace(tor.v4, other.v4))
    assert "cymric_bfd" in bird.ask("show protocols")
