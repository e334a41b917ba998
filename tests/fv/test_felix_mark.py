"""Felix marks that its data plane is up, for bgpd of the same node."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cymric.runtime.boot_mark import is_marked
from tests.support.eventually import eventually_now
from tests.support.felix_lab import FelixLab

pytestmark = [pytest.mark.root, pytest.mark.etcd]

LOOK = "import sys; from pathlib import Path; from cymric.runtime.boot_mark import is_marked; "
LOOK += "print(is_marked(Path(sys.argv[1])))"


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[FelixLab]:
    made = FelixLab(tmp_path, "nft")
    try:
        made.open()
        yield made
    finally:
        made.close()


def test_the_mark_of_a_real_felix(lab: FelixLab) -> None:
    """It is there when felix is ready, seen in the node's namespace and in no other, and stays
    when felix ends, as the data plane does.
    """
    mark = str(lab.directory / "felix.ready")
    assert not Path(mark).exists()
    lab.start_felix()
    eventually_now(lambda: lab.on_node(sys.executable, "-c", LOOK, mark).strip() == "True", 30)
    assert "cali-FORWARD" in lab.on_node("iptables-nft-save", "-t", "filter")
    lab.kill_felix()
    assert lab.on_node(sys.executable, "-c", LOOK, mark).strip() == "True"
    assert not is_marked(Path(mark))
