"""`cymric cni install`: the files a container runtime finds, and how they go again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from cymric.cli import cni_files
from cymric.cli.cni_files import Places, Wanted
from cymric.cli.main import cli
from cymric.cli.session import Session


@pytest.fixture
def places(tmp_path: Path) -> Places:
    """Folders of this test's own; the executables run under this Python."""
    return Places(
        bin_dir=tmp_path / "bin", conf_dir=tmp_path / "net.d", python=Path(sys.executable)
    )


def run(places: Places, command: str, *words: str) -> Result:
    session = Session(environ={"CYMRIC_RUN_DIR": "/run/here"}, calicoctl_file=Path("/none"))
    where = ["--bin-dir", str(places.bin_dir), "--conf-dir", str(places.conf_dir)]
    return CliRunner().invoke(cli, ["cni", command, *where, *words], obj=session)


def test_install_and_uninstall(places: Places) -> None:
    """The files are written, nothing else is left beside them, and all of it goes again."""
    result = run(places, "install", "--python", sys.executable)
    assert result.exit_code == 0, result.output
    written = [*places.executables, places.conflist]
    assert result.stdout.splitlines() == [f"{path}: written" for path in written]
    found = {p for d in (places.bin_dir, places.conf_dir) for p in d.iterdir()}
    assert found == set(written)
    assert all(os.access(path, os.X_OK) for path in places.executables)
    tree = json.loads(places.conflist.read_text())
    assert tree == {
        "cniVersion": "1.0.0",
        "cniVersions": ["0.3.1", "0.4.0", "1.0.0", "1.1.0"],
        "name": "cymric",
        "plugins": [
            {
                "type": "cymric-cni",
                "socket": "/run/here/cni.sock",
                "capabilities": {
                    "bandwidth": True,
                    "ips": True,
                    "mac": True,
                    "io.kubernetes.cri.pod-annotations": True,
                },
                "ipam": {"type": "cymric-cni-ipam", "assign_ipv4": "true"},
            }
        ],
    }
    again = run(places, "install", "--python", sys.executable)
    assert again.stdout.splitlines() == [f"{path}: as it should be" for path in written]
    gone = run(places, "uninstall")
    order = [places.conflist, *places.executables]
    assert gone.stdout.splitlines() == [f"{path}: removed" for path in order]
    assert "not there" in run(places, "uninstall").stdout


def test_the_executables_run(places: Places) -> None:
    """What is installed is the plugin: it answers VERSION by itself."""
    cni_files.install(places, Wanted(name="n", socket=Path("/none")))
    for path in places.executables:
        done = subprocess.run(
            [path],
            env={"CNI_COMMAND": "VERSION"},
            input=b'{"cniVersion":"1.0.0"}',
            capture_output=True,
            check=True,
        )
        assert json.loads(done.stdout)["supportedVersions"] == list(cni_files.CNI_VERSIONS)


def test_the_list_on_request(places: Places) -> None:
    """Socket, MTU, Kubernetes' policy and chained plugins are written as asked for."""
    words = ["--socket=/s", "--mtu=1400", "--kubernetes", "--chain=portmap", "--chain=tuning"]
    assert run(places, "install", *words, "--name=pods").exit_code == 0
    tree = json.loads(places.conflist.read_text())
    ours, *chained = tree["plugins"]
    assert tree["name"] == "pods"
    assert (ours["socket"], ours["mtu"], ours["policy"]) == ("/s", 1400, {"type": "k8s"})
    assert chained == [
        {"type": "portmap", "capabilities": {"portMappings": True}},
        {"type": "tuning"},
    ]


def chained(places: Places, answer: str) -> dict[str, Any]:
    """The list with a plugin after ours that answers VERSION so."""
    places.bin_dir.mkdir()
    plugin = places.bin_dir / "other"
    plugin.write_text(f"#!/bin/sh\n[ $CNI_COMMAND = VERSION ] && echo '{answer}'\n")
    plugin.chmod(0o755)
    result = run(places, "install", "--chain=other")
    assert result.exit_code == 0, result.output
    tree: dict[str, Any] = json.loads(places.conflist.read_text())
    is_told = "GC and STATUS will not be called" in result.stdout
    assert is_told == ("1.1.0" not in tree["cniVersions"])
    return tree


@pytest.mark.parametrize(
    ("answer", "offered", "said_to_old"),
    [
        ('{"supportedVersions":["1.0.0","1.1.0"]}', ["1.0.0", "1.1.0"], "1.0.0"),
        ('{"supportedVersions":["0.1.0","0.4.0","1.0.0"]}', ["0.4.0", "1.0.0"], "1.0.0"),
        ('{"supportedVersions":["0.4.0"]}', ["0.4.0"], "0.4.0"),
        ('{"supportedVersions":["1.1.0"]}', ["1.1.0"], "1.1.0"),
        ("nothing", ["0.3.1", "0.4.0", "1.0.0"], "1.0.0"),
        ("{}", ["0.3.1", "0.4.0", "1.0.0"], "1.0.0"),
    ],
)
def test_versions_are_those_of_all(
    places: Places, answer: str, offered: list[str], said_to_old: str
) -> None:
    """The list offers what all its plugins know, and 1.0.0 to runtimes that know no better."""
    tree = chained(places, answer)
    assert tree["cniVersions"] == offered
    assert tree["cniVersion"] == said_to_old


def test_no_version_in_common(places: Places) -> None:
    """A plugin that knows none of our versions is refused, and nothing is written."""
    places.bin_dir.mkdir()
    plugin = places.bin_dir / "other"
    plugin.write_text('#!/bin/sh\necho \'{"supportedVersions":["0.1.0"]}\'\n')
    plugin.chmod(0o755)
    result = run(places, "install", "--chain=other")
    assert result.exit_code == 1
    assert "other knows no version of CNI" in result.stderr
    assert list(places.bin_dir.iterdir()) == [plugin]
    assert not places.conf_dir.exists()


def test_bandwidth_has_one_master(places: Places) -> None:
    """With the bandwidth plugin in the list, the runtime hands bandwidth to that one alone."""
    assert run(places, "install", "--chain=bandwidth").exit_code == 0
    ours, other = json.loads(places.conflist.read_text())["plugins"]
    assert set(ours["capabilities"]) == {"ips", "mac", "io.kubernetes.cri.pod-annotations"}
    assert other["capabilities"] == {"bandwidth": True}


@pytest.mark.parametrize("name", ["cymric-cni", "10-cymric.conflist"])
@pytest.mark.parametrize("command", ["install", "uninstall"])
def test_what_is_not_ours_stays(places: Places, name: str, command: str) -> None:
    """A file of somebody else in one of our places is named and not touched; nor is anything."""
    folder = places.conf_dir if name.endswith("conflist") else places.bin_dir
    folder.mkdir()
    (folder / name).write_text('{"plugins": [{"type": "bridge"}]}')
    result = run(places, command)
    assert result.exit_code == 1
    assert f"{name} is not Cymric's" in result.stderr
    assert (folder / name).read_text() == '{"plugins": [{"type": "bridge"}]}'
    assert [path.name for path in folder.iterdir()] == [name]


def test_a_folder_that_cannot_be_written(places: Places) -> None:
    """A file in the way of a folder is a message, not a traceback."""
    places.bin_dir.write_text("")
    assert run(places, "install").exit_code in (1, 2)
