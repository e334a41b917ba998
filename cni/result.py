"""What a successful call prints, in the shape of each CNI version; and errors.

0.3.1 and 0.4.0 mark each address with its family, 1.0.0 does not. An address under our own main
plugin is a /32. IPAM alone gives the block's prefix length and a route to the address itself, as
Calico's plugins expect; another main plugin (ptp) gets a gateway, which it needs, and no routes: it
would set a default route before the gateway can be reached, which the kernel refuses.
Source: CNI specification 1.0.0 section 5; 0.4.0.
"""

from __future__ import annotations

from typing import Any

import msgspec

from cni.errors import CniError
from cni.request import Call
from cymric.model.endpoints import POD_GATEWAY
from cymric.model.net import Address, Network

MAIN_PLUGINS_LIKE_CALICO = ("calico", "cymric-cni")


def of_endpoint(call: Call, address: Address, host_interface: str, mac: str) -> bytes:
    """The result of ADD: our end, the container's end, and its address."""
    return _encoded(
        {
            "cniVersion": call.config.cni_version,
            "interfaces": [
                {"name": host_interface},
                {"name": call.interface, "mac": mac, "sandbox": str(call.netns)},
            ],
            "ips": [_ip(call, f"{address}/{address.max_prefixlen}", interface=1)],
            "routes": [{"dst": f"{address}/{address.max_prefixlen}"}],
            "dns": {},
        }
    )


def of_address(call: Call, address: Address, block: Network) -> bytes:
    """The result of IPAM alone."""
    length = f"{address}/{block.prefixlen}"
    routes = [{"dst": f"{address}/{address.max_prefixlen}"}]
    if call.config.type in MAIN_PLUGINS_LIKE_CALICO:
        ips = [_ip(call, length)]
    else:
        ips, routes = [_ip(call, length, gateway=POD_GATEWAY)], []
    tree = {"cniVersion": call.config.cni_version, "ips": ips, "routes": routes, "dns": {}}
    return _encoded(tree)


def of_error(cni_version: str, error: CniError) -> bytes:
    """An error as the runtime wants to read it."""
    tree = {"cniVersion": cni_version, "code": int(error.code), "msg": error.message}
    if error.details:
        tree["details"] = error.details
    return _encoded(tree)


def _ip(call: Call, address: str, **more: str | int) -> dict[str, Any]:
    family = {} if call.config.cni_version == "1.0.0" else {"version": "4"}
    return {**family, "address": address, **more}


def _encoded(tree: dict[str, Any]) -> bytes:
    return msgspec.json.encode(tree) + b"\n"
