"""Users, tokens, permissions and certificates at a real etcd."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from cymric.datastore.api import NotAuthenticated, PermissionDenied, Unavailable, put
from cymric.datastore.etcd import EtcdDatastore
from cymric.datastore.etcd_auth import LOGINS
from cymric.datastore.etcd_channel import Tls, UrlEndpoint
from cymric.datastore.etcd_connection import Connection
from cymric.datastore.etcd_errors import TokenRefused
from cymric.datastore.etcd_messages_pb2 import WatchResponse
from cymric.datastore.etcd_watch import Watch
from tests.conftest import StartEtcd
from tests.support.datastore import client, listening
from tests.support.etcd import EtcdServer, make_certificates
from tests.support.eventually import eventually
from tests.support.forwarder import Forwarder

pytestmark = pytest.mark.etcd

SHORT_TOKENS = ("--auth-token=simple", "--auth-token-ttl=2", "--bcrypt-cost=4")


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdServer]:
    """An etcd with users: root, and cymric who may use /mine/. Tokens live 2 s."""
    server = EtcdServer(tmp_path_factory.mktemp("guarded"), flags=SHORT_TOKENS).start()
    server.enable_auth(("cymric", "secret", "/mine/"))
    yield server
    server.stop()


async def token_to_expire(server: EtcdServer, store: EtcdDatastore) -> None:
    """Wait until etcd itself says that it deleted the token this client has."""
    token = await store._connection.login.token()
    assert token
    await eventually(
        lambda: any("deleted" in line and token in line for line in server.log.splitlines()),
        10,
        what="the token expires",
    )


async def test_user_and_password_over_plain_tcp(guarded: EtcdServer) -> None:
    """A user with a password reads, writes, lists and watches what its role allows."""
    async with client(guarded.endpoint, etcd_username="cymric", etcd_password="secret") as store:
        start = await put(store, "/mine/a", b"1")
        assert len((await store.list("/mine/")).items) == 1
        async with listening(store, "/mine/", start) as heard:
            await eventually(lambda: heard.values == [b"1"])


async def test_many_callers_cause_one_login(guarded: EtcdServer) -> None:
    """Callers that all find no token log in once between them."""
    async with client(guarded.endpoint, etcd_username="cymric", etcd_password="secret") as store:
        before = LOGINS._value.get()
        await asyncio.gather(*(store.get(f"/mine/{n}") for n in range(20)))
        assert LOGINS._value.get() == before + 1


async def test_wrong_password(guarded: EtcdServer) -> None:
    """A refused login is NotAuthenticated, for calls and for watches."""
    async with client(guarded.endpoint, etcd_username="cymric", etcd_password="wrong") as store:
        with pytest.raises(NotAuthenticated):
            await store.get("/mine/a")
        async with listening(store, "/mine/", 2) as heard:
            await eventually(lambda: heard.error)
        assert isinstance(heard.error, NotAuthenticated)


async def test_no_user_where_one_is_needed(guarded: EtcdServer) -> None:
    """Without a user, a guarded etcd answers NotAuthenticated, never silence."""
    async with client(guarded.endpoint) as store:
        with pytest.raises(NotAuthenticated):
            await store.get("/mine/a")
        async with listening(store, "/mine/", 2) as heard:
            await eventually(lambda: heard.error)
        assert isinstance(heard.error, NotAuthenticated | PermissionDenied)


async def test_a_user_where_none_is_needed(etcd_server: EtcdServer) -> None:
    """User and password given to an etcd without authentication do no harm."""
    user = {"etcd_username": "cymric", "etcd_password": "secret"}
    async with client(etcd_server.endpoint, **user) as store:
        await put(store, "/unneeded/a", b"1")
        assert await store.get("/unneeded/a") is not None


async def test_permission_denied(guarded: EtcdServer) -> None:
    """What the role does not allow is PermissionDenied: get, put, list and watch."""
    async with client(guarded.endpoint, etcd_username="cymric", etcd_password="secret") as store:
        with pytest.raises(PermissionDenied):
            await store.get("/theirs/a")
        with pytest.raises(PermissionDenied):
            await put(store, "/theirs/a", b"1")
        with pytest.raises(PermissionDenied):
            await store.list("/")
        async with listening(store, "/theirs/", 2) as heard:
            await eventually(lambda: heard.error)
        assert isinstance(heard.error, PermissionDenied)


async def test_a_first_denial_of_a_watch_is_taken_for_an_old_token() -> None:
    """Early etcd 3.4 says 'permission denied' for an expired token too: only twice is believed."""
    endpoint = UrlEndpoint("http://127.0.0.1:1", Tls())
    denied = WatchResponse(canceled=True, cancel_reason="etcdserver: permission denied")
    watch = Watch(Connection([endpoint], user="cymric", password="secret"), "/mine/", 2)
    assert isinstance(watch._why(denied), TokenRefused)
    assert isinstance(watch._why(denied), PermissionDenied)
    without_user = Watch(Connection([endpoint]), "/mine/", 2)
    assert isinstance(without_user._why(denied), PermissionDenied)


async def test_an_expired_token_is_renewed(guarded: EtcdServer) -> None:
    """After its token expired, the next call logs in again and succeeds; so does a commit."""
    async with client(guarded.endpoint, etcd_username="cymric", etcd_password="secret") as store:
        await put(store, "/mine/a", b"1")
        await token_to_expire(guarded, store)
        before = LOGINS._value.get()
        assert await store.get("/mine/a") is not None
        assert LOGINS._value.get() == before + 1
        await token_to_expire(guarded, store)
        await put(store, "/mine/a", b"2")
        assert LOGINS._value.get() == before + 2


async def test_a_watch_reopens_with_a_new_token(guarded: EtcdServer) -> None:
    """A watch whose token expired before it had to reconnect logs in again and goes on."""
    async with Forwarder(guarded.client_port) as forwarder:
        user = {"etcd_username": "cymric", "etcd_password": "secret"}
        async with client(forwarder.endpoint, **user) as store:
            start = await put(store, "/mine/a", b"1")
            async with listening(store, "/mine/", start) as heard:
                await eventually(lambda: heard.values == [b"1"])
                await token_to_expire(guarded, store)
                forwarder.cut()
                guarded.etcdctl("put", "/mine/a", "2", user="root:root")
                await eventually(lambda: heard.values == [b"1", b"2"])
            assert heard.error is None


async def test_tokens_of_before_a_restart(guarded: EtcdServer) -> None:
    """A restart of etcd forgets all tokens; calls and the watch go on with new ones."""
    async with client(guarded.endpoint, etcd_username="cymric", etcd_password="secret") as store:
        start = await put(store, "/mine/a", b"1")
        async with listening(store, "/mine/", start) as heard:
            await eventually(lambda: heard.values == [b"1"])
            guarded.kill()
            await asyncio.to_thread(guarded.start)
            await put(store, "/mine/a", b"2")
            await eventually(lambda: heard.values == [b"1", b"2"])


async def test_authentication_switched_on_later(start_etcd: StartEtcd) -> None:
    """A client with a user, connected before authentication was enabled, logs in when it is."""
    server = start_etcd(flags=SHORT_TOKENS)
    async with client(server.endpoint, etcd_username="cymric", etcd_password="secret") as store:
        await put(store, "/mine/a", b"1")
        server.enable_auth(("cymric", "secret", "/mine/"))
        await put(store, "/mine/a", b"2")


async def test_tls_with_a_client_certificate(start_etcd: StartEtcd, tmp_path: Path) -> None:
    """Over TLS, a client certificate is user enough: its common name is the etcd user."""
    files = make_certificates(tmp_path / "tls", client_name="root")
    server = start_etcd(tls=files)
    server.etcdctl("user", "add", "root:root")
    server.etcdctl("user", "grant-role", "root", "root")
    server.etcdctl("auth", "enable", user="root:root")
    tls = {
        "etcd_ca_cert_file": str(files.ca_cert),
        "etcd_cert_file": str(files.client_cert),
        "etcd_key_file": str(files.client_key),
    }
    async with client(server.endpoint, **tls) as store:
        start = await put(store, "/a", b"1")
        async with listening(store, "/a", start) as heard:
            await eventually(lambda: heard.values == [b"1"])


async def test_tls_refusals(start_etcd: StartEtcd, tmp_path: Path) -> None:
    """An unknown authority or a missing client certificate ends in a typed error, quickly."""
    files = make_certificates(tmp_path / "tls")
    strangers = make_certificates(tmp_path / "strangers")
    server = start_etcd(tls=files)
    async with client(server.endpoint, call_s=1, etcd_ca_cert_file=str(strangers.ca_cert)) as store:
        with pytest.raises(Unavailable, match=r"(?i)certificate"):
            await store.get("/a")
    async with client(server.endpoint, call_s=1, etcd_ca_cert_file=str(files.ca_cert)) as store:
        with pytest.raises(Unavailable):
            await store.get("/a")
