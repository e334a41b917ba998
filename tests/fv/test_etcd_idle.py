"""A connection that nobody uses for a while stays as it is."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys

import pytest

from tests.support.etcd import EtcdServer

pytestmark = pytest.mark.etcd

IDLE = """
import asyncio, sys
from cymric.datastore import etcd_channel
from cymric.datastore.etcd import open_datastore
from cymric.runtime.settings import Settings

# The same options, ten times as impatient, so that the test takes seconds.
options = dict(etcd_channel.CHANNEL_OPTIONS) | {"grpc.keepalive_time_ms": 1_000}
etcd_channel.CHANNEL_OPTIONS = tuple(options.items())

async def main() -> None:
    async with open_datastore(Settings(etcd_endpoints=(sys.argv[1],))) as store:
        await store.get("/idle")
        await asyncio.sleep(6)
        await store.get("/idle")

asyncio.run(main())
"""


async def test_etcd_does_not_take_an_idle_connection_for_an_attack(
    etcd_server: EtcdServer,
) -> None:
    """Etcd closes a connection that is pinged while no call runs on it; ours is not pinged then."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        IDLE,
        etcd_server.endpoint,
        stderr=subprocess.PIPE,
        env={**os.environ, "GRPC_VERBOSITY": "error"},
    )
    _, errors = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == 0, errors.decode()
    assert b"too_many_pings" not in errors
