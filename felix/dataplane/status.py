"""Endpoint status files: how the CNI plugin learns that a pod's network is complete.

A file exists exactly while its endpoint's policy, route and link are in place. Name and content are
Calico's. Files are written beside and renamed, so a reader never sees half of one. A fresh process
reads the directory first: what still holds is not touched, what does not is removed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import quote

from felix.calc.values import Endpoint, EndpointId

_UNESCAPED = "$&+=:@"
"""What Go's url.PathEscape leaves alone besides letters, digits and `-_.~`."""
_TEMPORARY = ".new-"


def file_name(endpoint_id: EndpointId) -> str:
    """`<orchestrator> <workload> <endpoint>`, each part escaped."""
    parts = (endpoint_id.orchestrator, endpoint_id.workload, endpoint_id.endpoint)
    return " ".join(quote(part, safe=_UNESCAPED) for part in parts)


def content(endpoint: Endpoint) -> str:
    """The JSON that Calico writes; empty fields are left out."""
    fields: dict[str, object] = {
        "ifaceName": endpoint.interface,
        "mac": endpoint.mac,
        "ipv4Nets": [f"{address}/32" for address in endpoint.addresses if address.version == 4],
        "ipv6Nets": [f"{address}/128" for address in endpoint.addresses if address.version == 6],
    }
    return json.dumps({name: value for name, value in fields.items() if value})


class StatusFiles:
    """The directory of status files; nobody else writes there."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._known: dict[str, str] | None = None

    def keep_only(self, endpoints: Mapping[EndpointId, Endpoint]) -> None:
        """Remove the files of endpoints that are gone or have changed."""
        wanted = {file_name(one.id): content(one) for one in endpoints.values()}
        for name, text in tuple(self._files().items()):
            if wanted.get(name) != text:
                self._remove(name)

    def forget(self, before: Endpoint, after: Endpoint | None) -> None:
        """Remove the file of an endpoint that went, or whose file would say something else now."""
        if after is None or after.id != before.id or content(after) != content(before):
            self.set_down(before.id)

    def set_up(self, endpoint: Endpoint) -> bool:
        """Say that an endpoint is complete; False if that was known."""
        name, text = file_name(endpoint.id), content(endpoint)
        if self._files().get(name) == text and (self._directory / name).exists():
            return False
        self._directory.mkdir(parents=True, exist_ok=True)
        beside = self._directory / f"{_TEMPORARY}{endpoint.interface}"
        beside.write_text(text)
        beside.rename(self._directory / name)
        self._files()[name] = text
        return True

    def set_down(self, endpoint_id: EndpointId) -> bool:
        """Say that an endpoint is not complete; False if that was known."""
        name = file_name(endpoint_id)
        if name not in self._files():
            return False
        self._remove(name)
        return True

    def is_up(self, endpoint_id: EndpointId) -> bool:
        """Whether an endpoint is said to be complete."""
        return file_name(endpoint_id) in self._files()

    def _files(self) -> dict[str, str]:
        if self._known is None:
            self._known = {}
            if self._directory.is_dir():
                for path in self._directory.iterdir():
                    if path.is_file():
                        self._known[path.name] = path.read_text(errors="replace")
        return self._known

    def _remove(self, name: str) -> None:
        (self._directory / name).unlink(missing_ok=True)
        self._files().pop(name, None)
