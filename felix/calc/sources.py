"""Where felix' parameters come from: environment, this node's object, scoped ones, the cluster's.

    FELIX_<NAME> ▶ FelixConfiguration node.<name> ▶ those with a nodeSelector ▶ default ▶ built in

A value that cannot be read is reported and the next source counts. `none` means the zero value.
What is set and has no effect here is named, with the reason, for somebody meant something by it.
Source: Calico 3.32, felix/config.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from felix.calc.config import FelixConfig
from felix.calc.parameters import PARAMETERS, Parameter, why_ignored

ANNOTATION_PREFIX = "config.projectcalico.org/"
ANNOTATION_LOG_ACTION = "cymric.io/log-action"
ENVIRONMENT_PREFIX = "felix_"

_PARAMETER_BY_LOWER_NAME = {
    spelling.lower(): name
    for name, parameter in PARAMETERS.items()
    for spelling in (name, *parameter.aliases)
}
_DEFAULTS = {item.name: getattr(FelixConfig(), item.name) for item in fields(FelixConfig)}


@dataclass(frozen=True, slots=True)
class Source:
    """One place parameters come from: its name for reports, and text by any spelling."""

    name: str
    texts: Mapping[str, str]


def from_environment(environment: Mapping[str, str]) -> Source:
    """The variables `FELIX_<NAME>`, case ignored."""
    return Source(
        "environment",
        {
            name[len(ENVIRONMENT_PREFIX) :]: text
            for name, text in environment.items()
            if name.lower().startswith(ENVIRONMENT_PREFIX)
        },
    )


def from_object(name: str, spec: Mapping[str, Any], annotations: Mapping[str, str]) -> Source:
    """One FelixConfiguration; its annotations may force a parameter by name."""
    texts = {
        key: _text(value)
        for key, value in spec.items()
        if value is not None and key not in _NO_PARAMETERS
    }
    for key, value in annotations.items():
        if key.startswith(ANNOTATION_PREFIX):
            texts[key[len(ANNOTATION_PREFIX) :]] = value
    if text := annotations.get(ANNOTATION_LOG_ACTION):
        texts["logAction"] = text
    return Source(f"FelixConfiguration {name}", texts)


def settle(sources: Sequence[Source]) -> tuple[FelixConfig, tuple[tuple[str, str], ...]]:
    """The parameters from `sources`, strongest first; (place, reason) of what was unreadable."""
    values: dict[str, Any] = {}
    rejected: list[tuple[str, str]] = []
    for source in reversed(sources):
        for spelling, text in source.texts.items():
            name = _PARAMETER_BY_LOWER_NAME.get(spelling.lower())
            if name is None:
                continue
            parameter = PARAMETERS[name]
            try:
                values[parameter.field] = _read(parameter, text)
            except ValueError as error:
                rejected.append((f"{source.name} {name}", str(error)))
    return FelixConfig(**values), tuple(rejected)


def without_effect(sources: Sequence[Source]) -> tuple[tuple[str, str], ...]:
    """(place, reason) of what is set and means nothing here."""
    return tuple(
        (f"{source.name} {spelling}", why_ignored(spelling))
        for source in sources
        for spelling in source.texts
        if spelling.lower() not in _PARAMETER_BY_LOWER_NAME and spelling.lower() != "felixhostname"
    )


def _read(parameter: Parameter, text: str) -> Any:
    default = _DEFAULTS[parameter.field]
    if text.strip().lower() not in ("none", ""):
        return parameter.parse(text.strip())
    zero = type(default)()
    # A parameter whose zero value is none of its words keeps its default.
    return zero if parameter.field in _ZERO_ALLOWED else default


_NO_PARAMETERS = frozenset({"nodeSelector"})
"""Fields of the object that say whom it is for."""
_ZERO_ALLOWED = frozenset(
    {
        "interface_exclude",
        "feature_overrides",
        "device_route_source",
        "device_route_source_ipv6",
        "log_rate_limit",
        "log_severity",
        "openstack_region",
        "reporting_interval_s",
        "iptables_refresh_interval_s",
        "iptables_post_write_check_interval_s",
        "ipsets_refresh_interval_s",
        "route_refresh_interval_s",
        "nat_outgoing_address",
        "nat_outgoing_interface_filter",
        "nat_port_range",
        "external_nodes",
        "log_prefix",
        "failsafe_inbound",
        "failsafe_outbound",
    }
)


def _text(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Mapping):  # a protocol with its port
        words = (value.get("protocol", "tcp"), value.get("net"), value.get("port"))
        return ":".join(str(word) for word in words if word not in (None, ""))
    if isinstance(value, Iterable) and not isinstance(value, str | Mapping):
        return ",".join(_text(item) for item in value)
    return str(value)
