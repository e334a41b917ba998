"""IPAM as a state machine on the memory store; `tests/fv` runs it on a real etcd."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

from tests.support.ipam_machine import Cluster

TestCluster = Cluster.TestCase
TestCluster.settings = settings(
    max_examples=30, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)
