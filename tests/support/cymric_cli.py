"""The command line against a datastore, which can be read and written past it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from click.testing import CliRunner, Result

from cymric.cli.main import cli
from cymric.cli.session import Session
from cymric.datastore import api
from cymric.datastore.api import Datastore
from cymric.datastore.memory import MemoryDatastore
from ipam.client import IPAM, Request
from tests.support.etcd import EtcdServer

LONG_AGO = "2026-01-02 03:04:05 +0000 UTC"
T = TypeVar("T")
RESOURCES = "/calico/resources/v3/projectcalico.org"


class Raw(Protocol):
    """The datastore without Cymric: what is stored, and a foreign hand that writes."""

    def get(self, key: str) -> str | None:
        """The value of a key, None if it does not exist."""
        ...

    def put(self, key: str, value: str) -> None:
        """Write a key."""
        ...


@dataclass
class Cymric:
    """The command line on one datastore."""

    raw: Raw
    session: Session

    def run(self, work: Callable[[Datastore], Awaitable[T]]) -> T:
        """What a coroutine makes of the same datastore."""
        return self.session.run(work)

    def __call__(self, *arguments: str, stdin: object = None) -> Result:
        """Run a command; `stdin` that is no text is given as JSON."""
        text = stdin if isinstance(stdin, str) or stdin is None else json.dumps(stdin)
        return CliRunner().invoke(cli, arguments, input=text, obj=self.session)

    def ok(self, *arguments: str, stdin: object = None) -> str:
        """What a command printed; it must succeed."""
        result = self(*arguments, stdin=stdin)
        assert result.exit_code == 0, result.output
        return result.stdout

    def refused(self, *arguments: str, stdin: object = None) -> str:
        """What a command said on refusing, in one line."""
        result = self(*arguments, stdin=stdin)
        assert result.exit_code == 1, result.output
        return " ".join(result.stderr.split())

    def stored(self, key: str) -> dict[str, Any]:
        """What is stored under a key."""
        value = self.raw.get(key)
        assert value is not None, f"nothing at {key}"
        tree: dict[str, Any] = json.loads(value)
        return tree


class InMemory:
    """A datastore of this process."""

    def __init__(self, store: MemoryDatastore) -> None:
        self._store = store

    def get(self, key: str) -> str | None:
        """The value of a key."""
        read = asyncio.run(self._store.get(key))
        return None if read is None else read.value.decode()

    def put(self, key: str, value: str) -> None:
        """Write a key."""
        asyncio.run(api.put(self._store, key, value.encode()))


class InEtcd:
    """A real etcd, through etcdctl."""

    def __init__(self, server: EtcdServer) -> None:
        self._server = server

    def get(self, key: str) -> str | None:
        """The value of a key."""
        lines = self._server.etcdctl("get", "--print-value-only", key)
        return lines.removesuffix("\n") or None

    def put(self, key: str, value: str) -> None:
        """Write a key."""
        self._server.etcdctl("put", key, value)


def resource(kind: str, name: str, spec: Mapping[str, object], **metadata: object) -> Any:
    """An object as a user writes it."""
    return {
        "kind": kind,
        "apiVersion": "projectcalico.org/v3",
        "metadata": {"name": name, **metadata},
        "spec": dict(spec),
    }


def pool(cidr: str = "10.244.0.0/16", name: str = "main", **spec: object) -> Any:
    """A pool as a user writes it."""
    return resource("IPPool", name, {"cidr": cidr, **spec})


def endpoint(node: str, container: str, address: str) -> Any:
    """A container's endpoint, as a user writes it."""
    spec = {
        "orchestrator": "cni",
        "node": node,
        "containerID": container,
        "endpoint": "eth0",
        "ipNetworks": [f"{address}/32"],
    }
    return resource("WorkloadEndpoint", "", spec)


def populate(cymric: Cymric, *, has_endpoints: bool = True) -> dict[str, str]:
    """Two nodes with two containers each; the address of every container."""
    cymric.ok("apply", "-f", "-", stdin=[pool("10.244.0.0/24", blockSize=30)])
    cymric.ok("apply", "-f", "-", stdin=[resource("Node", name, {}) for name in ("n1", "n2")])
    cymric.ok("datastore", "unlock")  # writes ClusterInformation
    wanted = [("n1", "a"), ("n1", "b"), ("n2", "c"), ("n2", "d")]

    async def assign(store: Datastore) -> dict[str, str]:
        addresses = IPAM(store)
        found = {}
        for node, container in wanted:
            attributes = {"node": node, "timestamp": LONG_AGO}
            request = Request(host=node, handle=f"net.{container}", attributes=attributes)
            found[container] = str((await addresses.assign(request)).address)
        return found

    given = cymric.run(assign)
    if has_endpoints:
        trees = [endpoint(node, name, given[name]) for node, name in wanted]
        cymric.ok("apply", "-f", "-", stdin=trees)
    return given
