"""What confd writes, when it writes, and what it never writes."""

from __future__ import annotations

import asyncio
import base64
import json
import re
import stat
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest

from bgpd.speaker_file import Listen, parse_header
from confd import check
from confd.daemon import STATUS_FILE, relay_command, run
from confd.install import Installer, Outcome, State
from confd.render import SpeakerInputs, labels_of, render_exabgp
from cymric.datastore.api import Listing, PermissionDenied, delete, put
from cymric.datastore.memory import MemoryDatastore
from cymric.kernel.command import Finished, HostCommands
from cymric.model.keys import BGP_PASSWORDS, PasswordKey, ResourceKey
from cymric.model.peering import PasswordRef, PeerType, Session
from cymric.runtime.health import Health
from cymric.runtime.settings import Settings
from tests.support.eventually import eventually

GOLDEN = Path(__file__).parents[1] / "golden" / "exabgp.conf"
RELAY = ("/usr/bin/python3", "-I", "-S", "/opt/cymric/relay.py", "/run/cymric/speaker.sock")


def session(address: str, **changed: Any) -> Session:
    """A session of node1 with the peer at `address`."""
    values: dict[str, Any] = {
        "name": f"Mesh_{address.replace('.', '_')}",
        "peer_type": PeerType.MESH,
        "peer_address": ip_address(address),
        "peer_port": 179,
        "peer_asn": 64512,
        "local_address": ip_address("198.19.0.2"),
        "local_asn": 64512,
        "router_id": ip_address("198.19.0.2"),
        "listen_port": 179,
        "is_passive": False,
        "peer_node": "node2",
    }
    return Session(**(values | changed))


MESH = session("198.19.0.3", is_passive=True)
ROUTER = session(
    "198.19.15.254",
    name="Global_198_19_15_254",
    peer_type=PeerType.GLOBAL,
    peer_asn=64999,
    peer_port=1179,
    peer_node="",
    restart_time_s=0,
)
PATIENT = session("198.19.0.10", restart_time_s=100_000)


SECRET = PasswordRef("bgp", "tor")
SIX = session(
    "fd00::3", name="Mesh_fd00__3", local_address=ip_address("fd00::2"), is_source_fixed=False
)
GUARDED = session("198.19.0.4", password=SECRET, ttl_security=2, hold_time_s=9)


def rendered(*sessions: Session, password: bytes = b"it's \"; \\ {") -> str:
    """The file of node1 with these sessions; the password needs every kind of quoting."""
    return render_exabgp(
        SpeakerInputs(
            node="node1",
            sessions=sessions,
            listen_address="0.0.0.0",
            listen_port=179,
            relay_command=RELAY,
            passwords={SECRET: password},
        )
    )


# --- render ---------------------------------------------------------------------------------------


def test_rendered_file() -> None:
    """The file is, letter by letter, the one kept in tests/golden."""
    text = rendered(ROUTER, PATIENT, MESH)
    assert text == GOLDEN.read_text()


def test_order_of_input_makes_no_difference() -> None:
    """Sessions are sorted by address, as numbers."""
    assert rendered(MESH, ROUTER, PATIENT) == rendered(PATIENT, ROUTER, MESH)
    assert list(labels_of(rendered(PATIENT, ROUTER, MESH))) == [
        "198.19.0.3",
        "198.19.0.10",
        "198.19.15.254",
    ]


def test_bgpd_reads_what_confd_writes() -> None:
    """Both programs agree on the header, which is the only thing they share in the file."""
    header = parse_header(rendered(MESH, ROUTER))
    assert header.listen == Listen("0.0.0.0", 179)
    assert header.label_by_peer == labels_of(rendered(MESH, ROUTER))


def test_label_tells_a_changed_peer() -> None:
    """A label depends on its own peer's block and on nothing else."""
    before = labels_of(rendered(MESH, ROUTER))
    after = labels_of(rendered(MESH, session("198.19.15.254", peer_asn=65000), PATIENT))
    assert before["198.19.0.3"] == after["198.19.0.3"]
    assert before["198.19.15.254"] != after["198.19.15.254"]


def test_names_cannot_break_out_of_a_comment() -> None:
    """Names from the datastore appear in comments only, and only as harmless characters."""
    text = rendered(session("198.19.0.3", peer_node='x\nneighbor 1.2.3.4 {"\\u0041'))
    assert "node x?neighbor 1.2.3.4 ???u0041\n" in text


@pytest.mark.parametrize(
    ("one", "lines"),
    [
        pytest.param(MESH, ["hold-time 240;", "ipv4 unicast;", "passive true;"], id="usual"),
        pytest.param(SIX, ["ipv6 unicast;", "local-address auto;", "router-id 198.19.0.2;"],
                     id="IPv6, any source"),
        pytest.param(GUARDED, ["incoming-ttl 254;", "outgoing-ttl 255;", "hold-time 9;",
                               "md5-password aXQncyAiOyBcIHs=;", "md5-base64 true;"], id="guarded"),
        pytest.param(session("198.19.0.4", local_asn=65010), ["local-as 65010;"], id="own AS"),
    ],
)  # fmt: skip
def test_options_of_a_session(one: Session, lines: list[str]) -> None:
    """Each option is one line of the peer's block."""
    text = rendered(one)
    assert [line for line in lines if f"    {line}\n" not in text] == []


def test_options_not_asked_for_are_absent() -> None:
    """No empty password and no TTL limit where none was asked for."""
    assert not [word for word in ("md5", "ttl") if word in rendered(MESH, SIX)]


def test_label_follows_the_password_without_telling_it() -> None:
    """Another password is another label, of that session alone; the text holds no fast hash."""
    before, after = rendered(GUARDED, MESH), rendered(GUARDED, MESH, password=b"other")
    assert labels_of(before)["198.19.0.4"] != labels_of(after)["198.19.0.4"]
    assert labels_of(before)["198.19.0.3"] == labels_of(after)["198.19.0.3"]


def test_password_that_is_not_given_is_an_error() -> None:
    """A session is never rendered without the password it names."""
    inputs = SpeakerInputs(
        node="n", sessions=[GUARDED], listen_address="::", listen_port=179, relay_command=RELAY
    )
    with pytest.raises(KeyError):
        render_exabgp(inputs)


def test_path_that_needs_quoting_is_refused() -> None:
    """ExaBGP's configuration cannot hold every path; better no file than another one."""
    inputs = SpeakerInputs(
        node="n", sessions=(), listen_address="::", listen_port=179, relay_command=("/a b",)
    )
    with pytest.raises(ValueError, match="/a b"):
        render_exabgp(inputs)


# --- check: ExaBGP's own opinion ------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(rendered(MESH, ROUTER, PATIENT), id="three peers"),
        pytest.param(rendered(GUARDED, SIX, MESH), id="passwords, TTL security, IPv6"),
        pytest.param(rendered(), id="no peer"),
    ],
)
async def test_exabgp_accepts_what_is_rendered(tmp_path: Path, text: str) -> None:
    """ExaBGP finds in the file exactly the peers and labels that were written."""
    text = text.replace("/usr/bin/python3", relay_command(tmp_path)[0])
    path = tmp_path / "exabgp.conf"
    path.write_text(text)
    assert await check.refusal(HostCommands(), path, labels_of(text)) == ""


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        pytest.param(("passive", "passiv"), "passiv", id="unknown word"),
        pytest.param(("peer-as 64512", "peer-as 4294967296"), "4294967296", id="number"),
        pytest.param(("neighbor 198.19.15", "}\nneighbor 198.19.15"), "reads the", id="brace"),
    ],
)  # fmt: skip
async def test_exabgp_refuses_with_a_reason(
    tmp_path: Path, spoil: tuple[str, str], reason: str
) -> None:
    """What ExaBGP would refuse, or read otherwise than meant, is told with the reason."""
    good = rendered(MESH, ROUTER).replace("/usr/bin/python3", relay_command(tmp_path)[0])
    path = tmp_path / "exabgp.conf"
    path.write_text(good.replace(*spoil))
    assert reason in await check.refusal(HostCommands(), path, labels_of(good))


# --- install --------------------------------------------------------------------------------------


async def accept(_path: Path) -> str:
    """A reader that takes anything."""
    return ""


async def refuse(_path: Path) -> str:
    """A reader that takes nothing."""
    return "because"


async def test_unchanged_text_is_not_written(tmp_path: Path) -> None:
    """A restarted confd that finds its own text leaves file and reader alone."""
    path = tmp_path / "deep" / "exabgp.conf"
    assert await Installer(path).install("text", accept) == Outcome(State.INSTALLED)
    before = path.stat()
    assert await Installer(path).install("text", refuse) == Outcome(State.UNCHANGED)
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    assert before.st_mode & 0o777 == 0o600


async def test_refused_text_is_kept_aside(tmp_path: Path) -> None:
    """The old file stays, the refused one can be looked at, and is not checked twice."""
    path = tmp_path / "exabgp.conf"
    installer = Installer(path)
    await installer.install("old", accept)
    asked: list[Path] = []

    async def refuse_and_count(candidate: Path) -> str:
        asked.append(candidate)
        assert candidate.read_text() == "new"
        return "because"

    for _ in range(2):
        assert await installer.install("new", refuse_and_count) == Outcome(State.REFUSED, "because")
    assert len(asked) == 1
    assert path.read_text() == "old"
    assert sorted(each.name for each in tmp_path.iterdir()) == [
        "exabgp.conf",
        "exabgp.conf.refused",
    ]
    assert (await installer.install("newer", accept)).state is State.INSTALLED
    assert path.read_text() == "newer"


async def test_file_changed_by_hand_is_put_right(tmp_path: Path) -> None:
    """What counts is what is in the file, not what was written once."""
    path = tmp_path / "exabgp.conf"
    installer = Installer(path)
    await installer.install("text", accept)
    path.write_text("edited")
    assert (await installer.install("text", accept)).state is State.INSTALLED
    path.unlink()
    assert (await installer.install("text", accept)).state is State.INSTALLED
    assert path.read_text() == "text"


# --- daemon ---------------------------------------------------------------------------------------


class Checker:
    """Stands for the checking process: refuses texts that hold a given word."""

    def __init__(self, refused_word: str = "nothing refused") -> None:
        self.refused_word = refused_word

    async def run(self, argv: Any, **_: Any) -> Finished:
        """Answer as `confd.check` does."""
        text = Path(argv[-1]).read_text()
        if self.refused_word in text:
            return Finished(tuple(argv), 1, "", f"cannot read {self.refused_word}\n")
        return Finished(tuple(argv), 0, json.dumps(labels_of(text)), "")


class Confd:
    """A running daemon on a datastore in memory."""

    def __init__(self, directory: Path) -> None:
        self.store = MemoryDatastore()
        self.settings = Settings(
            node_name="node1",
            run_dir=directory / "run",
            bgp_password_dir=directory / "bgp-passwords",
        )
        self.health = Health()
        self.checker = Checker()

    @property
    def peers(self) -> list[str] | None:
        """The peers in the installed file."""
        path = self.settings.exabgp_config
        return sorted(labels_of(path.read_text())) if path.exists() else None

    @property
    def status(self) -> dict[str, Any]:
        """The status file."""
        path = self.settings.run_dir / STATUS_FILE
        told: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        return told

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """For as long as the block lasts."""
        task = asyncio.create_task(run(self.settings, self.health, self.store, self.checker))
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def put(self, kind: str, name: str, spec: dict[str, Any]) -> None:
        """Store a resource."""
        value = {
            "apiVersion": "projectcalico.org/v3",
            "kind": kind,
            "metadata": {"name": name},
            "spec": spec,
        }
        await put(self.store, str(ResourceKey(kind, name)), json.dumps(value).encode())

    def write_password(self, text: str, *, mode: int = 0o600) -> None:
        """Put the file of secret bgp, key tor."""
        path = self.settings.bgp_password_dir / "bgp" / "tor"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(mode)

    async def guarded_peer(self) -> None:
        """Store a peer whose session needs the password of secret bgp, key tor."""
        await self.node("node1", "198.19.0.2/20")
        secret = {"secretKeyRef": {"name": "bgp", "key": "tor"}}
        spec = {"peerIP": "198.19.15.254", "asNumber": 64512, "password": secret}
        await self.put("BGPPeer", "tor", spec)

    @property
    def passwords(self) -> list[bytes]:
        """The passwords in the installed file."""
        path = self.settings.exabgp_config
        text = path.read_text() if path.exists() else ""
        return [base64.b64decode(word) for word in re.findall(r"md5-password (\S+);", text)]

    async def node(self, name: str, address: str = "") -> None:
        """Store a Node with that BGP address."""
        await self.put("Node", name, {"bgp": {"ipv4Address": address}} if address else {})


@pytest.fixture
def confd(tmp_path: Path) -> Iterator[Confd]:
    return Confd(tmp_path)


async def test_file_follows_the_datastore(confd: Confd) -> None:
    """Nodes and peers come and go, and the file with them."""
    await confd.node("node1", "198.19.0.2/20")
    await confd.node("node2", "198.19.0.3/20")
    async with confd.running():
        await eventually(lambda: confd.peers == ["198.19.0.3"])
        await confd.put("BGPPeer", "router", {"peerIP": "198.19.15.254", "asNumber": 64512})
        await eventually(lambda: confd.peers == ["198.19.0.3", "198.19.15.254"])
        await confd.put("BGPConfiguration", "default", {"nodeToNodeMeshEnabled": False})
        await eventually(lambda: confd.peers == ["198.19.15.254"])
        await delete(confd.store, str(ResourceKey("BGPPeer", "router")))
        await eventually(lambda: confd.peers == [])
        assert confd.status["state"] == "installed"
        assert confd.health.missing == ()


async def test_nothing_is_written_before_in_sync(confd: Confd) -> None:
    """While the datastore is away the file stays what it was, and confd is not ready."""
    await confd.node("node1", "198.19.0.2/20")
    path = confd.settings.exabgp_config
    path.parent.mkdir()
    path.write_text("from an earlier run\n")
    confd.store.go_down()
    async with confd.running():
        for _ in range(20):
            await asyncio.sleep(0.01)
        assert path.read_text() == "from an earlier run\n"
        assert confd.health.missing
        confd.store.come_up()
        await eventually(lambda: confd.peers == [] and not confd.health.missing)


@pytest.mark.parametrize("is_known", [True, False])
async def test_node_without_address_gets_an_empty_file(confd: Confd, is_known: bool) -> None:
    """A node that speaks no BGP, or is not known at all, has a valid file without sessions."""
    if is_known:
        await confd.node("node1")
    await confd.node("node2", "198.19.0.3/20")
    async with confd.running():
        await eventually(lambda: confd.peers == [])


async def test_refused_configuration_is_not_installed(confd: Confd) -> None:
    """The old file stays; status, readiness and log say why; the next good one is installed."""
    await confd.node("node1", "198.19.0.2/20")
    await confd.node("node2", "198.19.0.3/20")
    async with confd.running():
        await eventually(lambda: confd.peers == ["198.19.0.3"])
        confd.checker.refused_word = "198.19.0.4"
        await confd.node("node3", "198.19.0.4/20")
        await eventually(lambda: confd.status["state"] == "refused")
        assert confd.status["reason"] == "cannot read 198.19.0.4"
        assert confd.peers == ["198.19.0.3"]
        assert confd.health.missing == ("speaker configuration installed",)
        await delete(confd.store, str(ResourceKey("Node", "node3")))
        await confd.node("node4", "198.19.0.5/20")
        await eventually(lambda: confd.peers == ["198.19.0.3", "198.19.0.5"])
        await eventually(lambda: confd.status["state"] == "installed" and not confd.health.missing)


async def test_peer_that_cannot_be_honoured_is_named(confd: Confd) -> None:
    """A BGPPeer beyond what is supported leaves no session, and a reason in the status file."""
    await confd.node("node1", "198.19.0.2/20")
    await confd.put("BGPPeer", "tor", {"peerIP": "fd00::1", "asNumber": 64512})
    async with confd.running():
        await eventually(lambda: "tor" in confd.status.get("unsupported", {}))
        assert confd.peers == []


async def test_listen_port_is_in_the_file(confd: Confd) -> None:
    """The cluster's listen port is where this node listens and other nodes connect to."""
    await confd.node("node1", "198.19.0.2/20")
    await confd.node("node2", "198.19.0.3/20")
    await confd.put("BGPConfiguration", "default", {"listenPort": 1790})
    async with confd.running():
        await eventually(lambda: confd.peers == ["198.19.0.3"])
        text = confd.settings.exabgp_config.read_text()
        assert parse_header(text).listen == Listen("0.0.0.0", 1790)
        assert "connect 1790;" in text


# --- passwords ------------------------------------------------------------------------------------


async def test_session_waits_for_its_password(
    confd: Confd, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without its secret there is no session, and the reason is told; files win over the datastore.

    Every change is followed, the file holds the newest, and neither log nor status has any of them.
    """
    monkeypatch.setattr("confd.daemon.CHECK_PASSWORD_FILES_EVERY_S", 0.02)
    await confd.guarded_peer()
    async with confd.running():
        await eventually(
            lambda: "no password" in confd.status.get("unsupported", {}).get("tor", "")
        )
        assert confd.peers == []
        await put(confd.store, str(PasswordKey("bgp", "tor")), b"stored-1\n")
        await eventually(lambda: confd.passwords == [b"stored-1"])
        assert confd.status["unsupported"] == {}
        await put(confd.store, str(PasswordKey("bgp", "tor")), b"stored-2")
        await eventually(lambda: confd.passwords == [b"stored-2"])
        confd.write_password("filed-1\n")
        await eventually(lambda: confd.passwords == [b"filed-1"])
        confd.write_password("filed-22")
        await eventually(lambda: confd.passwords == [b"filed-22"])
        assert stat.S_IMODE(confd.settings.exabgp_config.stat().st_mode) == 0o600
        (confd.settings.bgp_password_dir / "bgp" / "tor").unlink()
        await eventually(lambda: confd.passwords == [b"stored-2"])
        await delete(confd.store, str(PasswordKey("bgp", "tor")))
        await eventually(lambda: confd.peers == [])
    told = capsys.readouterr()
    assert not re.search(r"stored-\d|filed-\d", told.out + told.err + json.dumps(confd.status))


@pytest.mark.parametrize(
    ("text", "mode", "reason"),
    [
        pytest.param("open", 0o640, "can be read by others", id="readable by a group"),
        pytest.param("", 0o600, "has 0 bytes", id="empty"),
        pytest.param("\n", 0o600, "has 0 bytes", id="only a newline"),
        pytest.param("x" * 81, 0o600, "has 81 bytes", id="too long for the kernel"),
    ],
)
async def test_password_that_cannot_be_used(
    confd: Confd, text: str, mode: int, reason: str
) -> None:
    """An unusable file is no password, also when the datastore has a good one."""
    confd.write_password(text, mode=mode)
    await put(confd.store, str(PasswordKey("bgp", "tor")), b"good")
    await confd.guarded_peer()
    async with confd.running():
        await eventually(lambda: reason in confd.status.get("unsupported", {}).get("tor", ""))
        assert confd.peers == []


async def test_mesh_waits_for_its_password(confd: Confd) -> None:
    """A mesh password that is missing leaves the mesh out, and other sessions in."""
    secret = {"secretKeyRef": {"name": "bgp", "key": "mesh"}}
    await confd.put("BGPConfiguration", "default", {"nodeMeshPassword": secret})
    await confd.node("node1", "198.19.0.2/20")
    await confd.node("node2", "198.19.0.3/20")
    await confd.put("BGPPeer", "router", {"peerIP": "198.19.15.254", "asNumber": 64512})
    async with confd.running():
        await eventually(lambda: confd.peers == ["198.19.15.254"])
        assert "bgp/mesh" in confd.status["unsupported"]["BGPConfiguration default"]
        await put(confd.store, str(PasswordKey("bgp", "mesh")), b"shared")
        await eventually(lambda: confd.peers == ["198.19.0.3", "198.19.15.254"])
        assert confd.passwords == [b"shared"]


async def test_ipv6_node_listens_in_both_families(confd: Confd) -> None:
    """A node with both addresses waits for peers on both, and has a mesh session in each."""
    for name, last in (("node1", 2), ("node2", 3)):
        bgp = {"ipv4Address": f"198.19.0.{last}/20", "ipv6Address": f"fd00::{last}/64"}
        await confd.put("Node", name, {"bgp": bgp})
    async with confd.running():
        await eventually(lambda: confd.peers == ["198.19.0.3", "fd00::3"])
        listen = parse_header(confd.settings.exabgp_config.read_text()).listen
        assert listen is not None
        assert listen.addresses == ("0.0.0.0", "::")


class WithoutRight(MemoryDatastore):
    """A datastore in which our role may not read passwords."""

    async def list(self, prefix: str) -> Listing:
        """Refuse what the role does not cover."""
        if prefix.startswith(BGP_PASSWORDS):
            raise PermissionDenied("passwords")
        return await super().list(prefix)


async def test_passwords_that_may_not_be_read_stop_nothing_else(
    confd: Confd, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sessions without password do not wait for a right that only passwords need."""
    monkeypatch.setattr("confd.daemon.WAIT_FOR_PASSWORDS_S", 0.05)
    confd.store = WithoutRight()
    await confd.guarded_peer()
    await confd.node("node2", "198.19.0.3/20")
    async with confd.running():
        await eventually(lambda: confd.peers == ["198.19.0.3"])
        assert "tor" in confd.status["unsupported"]
