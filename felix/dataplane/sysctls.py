"""The kernel's switches below /proc/sys/net, which are those of the process's network namespace.

A value that already stands is not written. Sources: ip-sysctl in the kernel's documentation; the
list is Calico's.
"""

from __future__ import annotations

from pathlib import Path

import structlog

from felix.calc.values import Endpoint

PROC_SYS_NET = Path("/proc/sys/net")

WORKLOAD_IPV4 = (
    # A pod may send to a service on the host's loopback.
    ("ipv4/conf/{}/route_localnet", "1"),
    # The pod's gateway 169.254.1.1 is nobody's address: the host answers for it, at once.
    ("ipv4/neigh/{}/proxy_delay", "0"),
    ("ipv4/conf/{}/proxy_arp", "1"),
    ("ipv4/conf/{}/forwarding", "1"),
)
WORKLOAD_IPV6 = (
    ("ipv6/conf/{}/proxy_ndp", "1"),
    ("ipv6/conf/{}/forwarding", "1"),
)
ACCEPT_RA = "ipv6/conf/{}/accept_ra"
"""No pod tells its host where to route."""
FORWARDING_IPV6 = "ipv6/conf/all/forwarding"
RP_FILTER = "ipv4/conf/{}/rp_filter"

log = structlog.get_logger()


class Sysctls:
    """Reads and writes switches by their path below /proc/sys/net."""

    def __init__(self, root: Path = PROC_SYS_NET) -> None:
        self._root = root
        self._default_rp_filter = self._read(RP_FILTER.format("default")) or "1"

    def configure_node(self, *, forwarding: bool) -> None:
        """Let the node forward (unless told not to) and count the bytes of connections."""
        if forwarding:
            self._write("ipv4/ip_forward", "1")
        self._write_if_there("netfilter/nf_conntrack_acct", "1")

    @property
    def has_ipv6(self) -> bool:
        """Whether the kernel knows IPv6 at all."""
        return (self._root / "ipv6").is_dir()

    def forward_ipv6(self) -> None:
        """Let the node forward IPv6. From then on it heeds no router advertisements itself."""
        self._write(FORWARDING_IPV6, "1")

    def configure_workload(self, endpoint: Endpoint) -> None:
        """Switches of a workload's interface. Raises FileNotFoundError when it is gone."""
        interface = endpoint.interface
        if 4 in endpoint.ip_versions:
            for path, value in WORKLOAD_IPV4:
                self._write(path.format(interface), value)
        may_spoof = any(prefix.version == 4 for prefix in endpoint.spoofable)
        rp_filter = "0" if may_spoof else self._default_rp_filter
        self._write(RP_FILTER.format(interface), rp_filter)
        if 6 in endpoint.ip_versions:
            for path, value in WORKLOAD_IPV6:
                self._write(path.format(interface), value)
        self._write_if_there(ACCEPT_RA.format(interface), "0")

    def _read(self, path: str) -> str | None:
        try:
            return (self._root / path).read_text().strip()
        except OSError:
            return None

    def _write(self, path: str, value: str) -> None:
        name = (
            f"{self._root}/{path}"  # six of these for every pod: a Path costs more than the kernel
        )
        with open(name) as file:  # noqa: PTH123
            if file.read().strip() == value:
                return
        with open(name, "w") as file:  # noqa: PTH123
            file.write(value)

    def _write_if_there(self, path: str, value: str) -> None:
        try:
            self._write(path, value)
        except OSError as error:
            log.debug("switch not set", path=path, error=str(error))
