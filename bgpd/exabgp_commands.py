"""Changes to ExaBGP's command text: pure, in bulk, and nothing ExaBGP would quietly get wrong.

Source: ExaBGP 5.0.15's API. It accepts a community half above 65535 and sends another one, so
numbers are checked here. Prefixes that share next hop and attributes go in one line, which costs a
third of a line each.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from bgpd.announcement import Announcement, AsPathSegment, PathAttributes, SegmentKind

PREFIXES_PER_LINE = 200


def announce(peer: str, routes: Iterable[Announcement]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Command lines that announce `routes` to `peer`, each with the prefixes it names."""
    prefixes_by_attributes: dict[tuple[str, PathAttributes], list[str]] = {}
    for route in routes:
        key = (route.next_hop, route.attributes)
        prefixes_by_attributes.setdefault(key, []).append(route.prefix)
    for (next_hop, attributes), prefixes in prefixes_by_attributes.items():
        head = f"neighbor {peer} announce attributes {attribute_text(next_hop, attributes)} nlri "
        for chunk in _chunks(prefixes):
            yield head + " ".join(chunk), chunk


def withdraw(peer: str, prefixes: Iterable[str]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Command lines that withdraw `prefixes`; the next hop says nothing but has to be there."""
    by_version: dict[bool, list[str]] = {}
    for prefix in prefixes:
        by_version.setdefault(":" in prefix, []).append(prefix)
    for is_ipv6, of_version in by_version.items():
        nowhere = "::" if is_ipv6 else "0.0.0.0"
        for chunk in _chunks(of_version):
            line = f"neighbor {peer} withdraw attributes next-hop {nowhere} nlri {' '.join(chunk)}"
            yield line, chunk


def check(routes: Mapping[str, Announcement | None]) -> None:
    """Raises ValueError for a route that is not its key's, or that cannot be said in BGP."""
    said: tuple[str, PathAttributes] | None = None
    for prefix, route in routes.items():
        if route is None:
            continue
        if prefix != route.prefix:
            raise ValueError(f"{prefix} names a route for {route.prefix}")
        if said is None or said[1] is not route.attributes or said[0] != route.next_hop:
            attribute_text(route.next_hop, route.attributes)
            said = route.next_hop, route.attributes


def end_of_rib(peer: str, family: str) -> str:
    """The command that sends End-of-RIB."""
    return f"neighbor {peer} announce eor {family}"


def route_refresh(peer: str, family: str) -> str:
    """The command that asks the peer to send its routes again."""
    return f"neighbor {peer} announce route-refresh {family}"


def attribute_text(next_hop: str, attributes: PathAttributes) -> str:
    """Next hop and attributes in ExaBGP's words. Raises ValueError for numbers out of range."""
    words = [f"next-hop {next_hop}", f"origin {attributes.origin}"]
    if attributes.as_path:
        words.append(f"as-path {_as_path(attributes.as_path)}")
    if attributes.local_pref is not None:
        words.append(f"local-preference {_within(attributes.local_pref, 32)}")
    if attributes.med is not None:
        words.append(f"med {_within(attributes.med, 32)}")
    if attributes.atomic_aggregate:
        words.append("atomic-aggregate")
    if attributes.aggregator is not None:
        words.append(f"aggregator ( {attributes.aggregator} )")
    if attributes.communities:
        words.append(f"community [ {_colons(attributes.communities, 16)} ]")
    if attributes.large_communities:
        words.append(f"large-community [ {_colons(attributes.large_communities, 32)} ]")
    if attributes.extended_communities:
        values = " ".join(f"0x{_within(v, 64):016X}" for v in attributes.extended_communities)
        words.append(f"extended-community [ {values} ]")
    if attributes.originator_id is not None:
        words.append(f"originator-id {attributes.originator_id}")
    if attributes.cluster_list:
        words.append(f"cluster-list [ {' '.join(attributes.cluster_list)} ]")
    return " ".join(words)


def _as_path(path: Iterable[AsPathSegment]) -> str:
    texts = []
    for segment in path:
        asns = " ".join(str(_within(asn, 32)) for asn in segment.asns)
        if segment.kind is SegmentKind.SEQUENCE:
            texts.append(f"[ {asns} ]")
        elif segment.kind is SegmentKind.SET:
            texts.append(f"( {asns} )")
        else:
            raise ValueError("confederation segments do not leave the confederation")
    return " ".join(texts)


def _colons(communities: Iterable[tuple[int, ...]], bits: int) -> str:
    return " ".join(":".join(str(_within(part, bits)) for part in one) for one in communities)


def _within(number: int, bits: int) -> int:
    if not 0 <= number < 2**bits:
        raise ValueError(f"{number} does not fit into {bits} bits")
    return number


def _chunks(prefixes: list[str]) -> Iterator[tuple[str, ...]]:
    for start in range(0, len(prefixes), PREFIXES_PER_LINE):
        yield tuple(prefixes[start : start + PREFIXES_PER_LINE])
