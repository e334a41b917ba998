"""The command line on an empty datastore: in memory, and on a real etcd."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from cymric.cli.session import Session
from cymric.datastore.memory import MemoryDatastore
from tests.support.cymric_cli import Cymric, InEtcd, InMemory
from tests.support.etcd import EtcdServer


@pytest.fixture(scope="module")
def own_etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdServer]:
    """An etcd for this file alone: it is emptied before each test."""
    server = EtcdServer(tmp_path_factory.mktemp("cycli")).start()
    yield server
    server.kill()


@pytest.fixture(params=["memory", pytest.param("etcd", marks=pytest.mark.etcd)])
def cymric(request: pytest.FixtureRequest, tmp_path: Path) -> Cymric:
    """The command line on an empty datastore."""
    nowhere = tmp_path / "none"
    if request.param == "memory":
        store = MemoryDatastore()
        return Cymric(InMemory(store), Session(store=store, environ={}, calicoctl_file=nowhere))
    server: EtcdServer = request.getfixturevalue("own_etcd")
    server.etcdctl("del", "--prefix", "/calico/")
    environ = {"ETCD_ENDPOINTS": server.endpoint}
    return Cymric(InEtcd(server), Session(environ=environ, calicoctl_file=nowhere))
