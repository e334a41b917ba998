"""Files of objects, and files of settings."""

from __future__ import annotations

from pathlib import Path

import pytest

from cymric.cli.manifest import BadManifest, read
from cymric.cli.session import Session
from cymric.runtime.settings import BadSettings


def test_documents_lists_and_arrays() -> None:
    """Every way to put objects in one file is read, in order."""
    text = """
kind: A
---
# nothing
---
kind: BList
items: [{kind: B, metadata: {name: one}}, {kind: C}]
---
[{kind: D}, {kind: E}]
"""
    found = read(text, "file")
    assert [item.tree["kind"] for item in found] == ["A", "B", "C", "D", "E"]
    assert [item.where for item in found][3:] == [
        "file, document 4, item 1",
        "file, document 4, item 2",
    ]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        pytest.param("2026-01-02T03:04:05Z", "2026-01-02T03:04:05Z", id="a time is text"),
        pytest.param("2026-01-02", "2026-01-02", id="a date is text"),
        pytest.param("64512:10", "64512:10", id="a community is text, not a number to base 60"),
        pytest.param("26", 26, id="a number"),
        pytest.param("true", True, id="a truth"),
        pytest.param("a == 'b' && has(c)", "a == 'b' && has(c)", id="a selector"),
    ],
)
def test_plain_values(text: str, value: object) -> None:
    """Values without quotes mean what Calico takes them for."""
    (found,) = read(f"kind: A\nspec: {text}", "file")
    assert found.tree["spec"] == value
    assert type(found.tree["spec"]) is type(value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no objects"),
        ("kind: [", "line 1"),
        ("text", "expected an object"),
        ("metadata: {}", "no kind"),
        ("kind: A\nspec: {a: 1, b: 2, a: 3}", "field 'a' is given twice"),
        ("kind: A\nkind: B", "field 'kind' is given twice"),
        ("[{kind: A}, 7]", "file, item 2: expected an object"),
    ],
)
def test_files_without_objects(text: str, said: str) -> None:
    """A file that cannot be read says where."""
    with pytest.raises(BadManifest) as caught:
        read(text, "file")
    assert said in str(caught.value)


CALICOCTL = """
apiVersion: projectcalico.org/v3
kind: CalicoAPIConfig
metadata:
spec:
  datastoreType: etcdv3
  etcdEndpoints: https://a:2379, https://b:2379
  etcdUsername: user
  etcdCACertFile: /ca.pem
"""


def test_calicoctl_file(tmp_path: Path) -> None:
    """A file named on the command line wins over the environment; the usual one does not."""
    path = tmp_path / "calicoctl.cfg"
    path.write_text(CALICOCTL)
    told = Session(config_file=path, environ={"ETCD_ENDPOINTS": "http://x:1"}).settings()
    assert told.etcd_endpoints == ("https://a:2379", "https://b:2379")
    assert (told.etcd_username, told.etcd_ca_cert_file) == ("user", "/ca.pem")
    usual = Session(calicoctl_file=path, environ={}).settings()
    assert usual.etcd_endpoints == told.etcd_endpoints
    other = Session(calicoctl_file=path, environ={"ETCD_ENDPOINTS": "http://x:1"}).settings()
    assert other.etcd_endpoints == ("http://x:1",)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("kind: Other", "not an object of kind CalicoAPIConfig"),
        ("kind: CalicoAPIConfig\nspec: {datastoreType: kubernetes}", "only etcdv3 is served"),
        ("kind: CalicoAPIConfig\nspec: {etcdKey: PEM}", "give certificates as files"),
        ("kind: CalicoAPIConfig\nspec: {etcdEndpoint: x}", "spec.etcdEndpoint is not supported"),
    ],
)
def test_bad_calicoctl_file(tmp_path: Path, text: str, said: str) -> None:
    """What cannot be honoured in the file is refused by name, not passed over."""
    path = tmp_path / "calicoctl.cfg"
    path.write_text(text)
    with pytest.raises(BadSettings, match=said):
        Session(config_file=path, environ={}).settings()
