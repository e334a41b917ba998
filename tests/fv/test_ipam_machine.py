"""The state machine of IPAM on a real etcd: nodes crash at any call, nothing ever disagrees."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from cymric.datastore.api import Datastore
from tests.support.datastore import client
from tests.support.etcd import EtcdServer
from tests.support.ipam_machine import Cluster

pytestmark = pytest.mark.etcd

SETTINGS = settings(
    max_examples=12, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)


def test_on_a_real_etcd(etcd_server: EtcdServer) -> None:
    """What holds on the memory store holds on etcd."""

    class OnEtcd(Cluster):
        def open_store(self) -> Datastore:
            asyncio.set_event_loop(self.loop)  # gRPC takes the thread's
            etcd_server.etcdctl("del", "--prefix", "/calico/")
            return client(etcd_server.endpoint)

    run_state_machine_as_test(OnEtcd, settings=SETTINGS)  # type: ignore[no-untyped-call]
