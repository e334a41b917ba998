"""The pure parts of CNI: the executable's imports, endpoints' names, errors, the journal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cni.daemon import as_cni_error
from cni.endpoint import identify
from cni.errors import CniError, Code
from cni.journal import Entry, Journal
from cni.request import Call, Request, parse
from cymric.datastore.api import NoSpace, OutcomeUnknown, Unavailable
from cymric.kernel.links import KernelError
from cymric.model.codec import Malformed
from ipam.errors import AddressTaken, BlockLimitReached, Contended, NoFreeAddresses, NoPool

CONFIG = {"cniVersion": "1.0.0", "name": "pods", "ipam": {"type": "calico-ipam"}}


def call(
    args: str = "",
    container_id: str = "aaaabbbbccccdddd",
    config: dict[str, Any] | None = None,
    **env: str,
) -> Call:
    variables = {
        "CNI_COMMAND": "ADD",
        "CNI_CONTAINERID": container_id,
        "CNI_IFNAME": "eth0",
        "CNI_NETNS": "/run/netns/x",
        "CNI_ARGS": args,
        **env,
    }
    made = parse(Request(False, variables, json.dumps({**CONFIG, **(config or {})}).encode()))
    assert isinstance(made, Call)
    return made


@pytest.mark.parametrize(
    ("args", "key", "interface", "status_file"),
    [
        pytest.param(
            "",
            "default/node--a-cni-aaaabbbbccccdddd-eth0",
            "caliaaaabbbbccc",
            "cni default%2Faaaabbbbccccdddd eth0",
            id="container",
        ),
        pytest.param(
            "K8S_POD_NAMESPACE=prod;K8S_POD_NAME=web-1",
            "prod/node--a-k8s-web--1-eth0",
            "cali91bef8fbcc9",
            "k8s prod%2Fweb-1 eth0",
            id="pod",
        ),
    ],
)
def test_names_of_an_endpoint(args: str, key: str, interface: str, status_file: str) -> None:
    """Key, host interface and status file have Calico's names."""
    identity = identify(call(args), "node-a")
    assert str(identity.key).endswith(f"/workloadendpoints/{key}")
    assert (identity.host_interface, identity.status_file) == (interface, status_file)


def test_a_name_that_cannot_be_stored_is_refused() -> None:
    """A container id that no endpoint can be named after is an error of the environment."""
    with pytest.raises(CniError) as caught:
        identify(call(container_id="ends-with-"), "node-a")
    assert caught.value.code is Code.INVALID_ENVIRONMENT


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (Unavailable("x"), 11),
        (OutcomeUnknown("x"), 11),
        (NoSpace("x"), 11),
        (TimeoutError(), 11),
        (Contended("x"), 11),
        (NoPool("x"), 100),
        (NoFreeAddresses("x"), 100),
        (BlockLimitReached("x"), 100),
        (AddressTaken("x"), 100),
        (KernelError(17, "create veth", "File exists"), 101),
        (Malformed("/calico/x", "bad"), 199),
        (AssertionError("bug"), 199),
    ],
)
def test_codes_of_failures(error: Exception, code: int) -> None:
    """Each failure has the code that tells the runtime what to do, and keeps its words."""
    told = as_cni_error(error)
    assert told.code == code
    assert not str(error) or str(error) in f"{told.message} {told.details}"


def test_journal_survives_and_forgets(tmp_path: Path) -> None:
    """What was begun is found by the next process until it is finished; garbage is removed."""
    identity = identify(call("K8S_POD_NAMESPACE=prod;K8S_POD_NAME=web-1"), "node-a")
    entry = Entry(handle="pods.x", is_ipam_only=False, identity=identity)
    Journal(tmp_path).begin(entry)
    (tmp_path / "garbage").write_text("{")
    journal = Journal(tmp_path)
    assert list(journal.entries()) == [entry]
    assert journal.has(entry)
    journal.finish(entry)
    journal.finish(entry)
    assert list(tmp_path.iterdir()) == []
