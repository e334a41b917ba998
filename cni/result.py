"""What a successful call prints, in the shape of each CNI version; and errors.

0.3.1 and 0.4.0 mark each address with its family, 1.0.0 does not; from 1.1.0 on interfaces tell
their MTU. An address under our own main plugin is a /32 or /128. IPAM alone gives the block's
prefix length and a route to the address itself, as Calico's plugins expect; another main plugin
(ptp) gets a gateway, which it needs, and no routes: it would set a default route before the gateway
can be reached, which the kernel refuses.

What plugins before us in a chain made (`prevResult`) stays, ours comes after it.
Source: CNI specification 1.1.0 section 5; 0.4.0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from cni.errors import CniError
from cni.netconf import NetConf
from cni.request import Call
from cymric.model.endpoints import POD_GATEWAY
from cymric.model.net import Address, Network, host_network

MAIN_PLUGINS_LIKE_CALICO = ("calico", "cymric-cni")
POD_GATEWAY_V6 = "fe80::ecee:eeff:feee:eeee"
"""The link-local address that the node's end has by its MAC."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attached:
    """What ADD made. `mtu` 0 when nobody knows; `routes` as IPAM gave them."""

    host_interface: str
    mac: str
    mtu: int
    addresses: tuple[Address, ...]
    routes: tuple[Network, ...]


def of_endpoint(call: Call, made: Attached) -> bytes:
    """The result of ADD: our end, the container's end, and its addresses."""
    former = call.config.previous_tree or {}
    before = list(former.get("interfaces", ()))
    mtu = {"mtu": made.mtu} if call.config.has.gc_and_status and made.mtu else {}
    container = {"name": call.interface, "mac": made.mac, **mtu, "sandbox": str(call.netns)}
    index = len(before) + 1
    return _encoded(
        {
            **former,
            "cniVersion": call.config.cni_version,
            "interfaces": [*before, {"name": made.host_interface, **mtu}, container],
            "ips": [
                *former.get("ips", ()),
                *(_ip(call.config, host_network(a), a.version, index) for a in made.addresses),
            ],
            "routes": [*former.get("routes", ()), *({"dst": str(net)} for net in made.routes)],
            "dns": former.get("dns", {}),
        }
    )


def of_addresses(call: Call, given: Sequence[tuple[Address, Network]]) -> bytes:
    """The result of IPAM alone: addresses and the blocks that they are from."""
    is_like_calico = call.config.type in MAIN_PLUGINS_LIKE_CALICO
    ips = []
    for address, block in given:
        ip = _ip(call.config, f"{address}/{block.prefixlen}", address.version)
        if not is_like_calico:
            ip["gateway"] = POD_GATEWAY if address.version == 4 else POD_GATEWAY_V6
        ips.append(ip)
    routes = [{"dst": str(host_network(address))} for address, _ in given if is_like_calico]
    version = call.config.cni_version
    return _encoded({"cniVersion": version, "ips": ips, "routes": routes, "dns": {}})


def of_error(cni_version: str, error: CniError) -> bytes:
    """An error as the runtime wants to read it."""
    tree = {"cniVersion": cni_version, "code": int(error.code), "msg": error.message}
    if error.details:
        tree["details"] = error.details
    return _encoded(tree)


def _ip(
    config: NetConf, address: Network | str, version: int, interface: int | None = None
) -> dict[str, Any]:
    family = {} if config.has.plain_ips else {"version": str(version)}
    where = {} if interface is None else {"interface": interface}
    return {**family, "address": str(address), **where}


def _encoded(tree: dict[str, Any]) -> bytes:
    return msgspec.json.encode(tree) + b"\n"
