"""Fixtures that more than one folder of tests needs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from tests.support.etcd import EtcdServer

# A test's time says more of what else the machine does than of the code.
settings.register_profile("cymric", deadline=None, max_examples=50)
settings.register_profile("thorough", deadline=None, max_examples=2_000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "cymric"))

StartEtcd = Callable[..., EtcdServer]


@pytest.fixture(scope="session")
def etcd_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdServer]:
    """One real etcd for the whole run; use keys of your own and do not stop it."""
    server = EtcdServer(tmp_path_factory.mktemp("etcd"))
    server.start()
    yield server
    server.stop()


@pytest.fixture
def start_etcd(tmp_path: Path) -> Iterator[StartEtcd]:
    """Start etcds of your own, to kill and to wipe; arguments are those of `EtcdServer`."""
    servers: list[EtcdServer] = []

    def start(**options: Any) -> EtcdServer:
        servers.append(EtcdServer(tmp_path / f"etcd{len(servers)}", **options))
        return servers[-1].start()

    yield start
    for server in servers:
        server.kill()
