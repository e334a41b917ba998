"""IP sets of the kernel kept as wanted.

Sets go in before the rules that name them (`write`) and out after (`delete_unwanted`): the kernel
refuses the rest. A set that is new, or whose type is wrong, or most of whose members differ is
built under a temporary name and swapped in, so that a rule never sees it half filled; otherwise
only the differences are written. Ours is what is named `cali40…` (or `cali4t…`, left over from an
interrupted swap); for IPv6 `cali60…` and `cali6t…`. `check` reads everything anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import structlog

from cymric.kernel.command import CommandFailed, Commands
from cymric.model.net import Network
from felix import metrics
from felix.rules.names import SET_PREFIX_BY_VERSION, set_name

TEMPORARY_PREFIX_BY_VERSION = {4: "cali4t", 6: "cali6t"}
_FAMILY_BY_VERSION = {4: "inet", 6: "inet6"}
_OURS = (*SET_PREFIX_BY_VERSION.values(), *TEMPORARY_PREFIX_BY_VERSION.values())
SAVE = ("ipset", "save")
RESTORE = ("ipset", "restore", "-exist")

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class IPSet:
    """A set of one family by its id; `type` is ipset's, `hash:net` or `hash:ip`."""

    id: str
    members: frozenset[Network]
    type: str = "hash:net"
    ip_version: int = 4

    @property
    def name(self) -> str:
        """The kernel's name."""
        return set_name(self.id, self.ip_version)


@dataclass(frozen=True, slots=True)
class SavedSet:
    """A set as the kernel has it, members in canonical text."""

    type: str
    max_size: int
    members: frozenset[str]
    ip_version: int = 4


def canonical(network: Network) -> tuple[str, ...]:
    """As ipset prints it: a host without its length, a /0 (which it refuses) as two halves."""
    if network.prefixlen == network.max_prefixlen:
        return (str(network.network_address),)
    halves = network.subnets() if network.prefixlen == 0 else (network,)
    return tuple(map(str, halves))


def parse(text: str) -> dict[str, SavedSet]:
    """The sets in the output of `ipset save`, ours and others."""
    kinds: dict[str, tuple[str, int, int]] = {}
    members: dict[str, set[str]] = {}
    for line in text.splitlines():
        words = line.split()
        if words[:1] == ["create"]:
            limit = int(words[words.index("maxelem") + 1]) if "maxelem" in words else 0
            kinds[words[1]] = (words[2], limit, 6 if "inet6" in words else 4)
            members[words[1]] = set()
        elif words[:1] == ["add"]:
            members[words[1]].add(words[2])
    return {
        name: SavedSet(kind, limit, frozenset(members[name]), version)
        for name, (kind, limit, version) in kinds.items()
    }


def plan(actual: Mapping[str, SavedSet], wanted: Mapping[str, SavedSet]) -> list[str]:
    """The lines for `ipset restore` that make every wanted set be there as wanted."""
    lines: list[str] = []
    for number, name in enumerate(sorted(wanted)):
        want, have = wanted[name], actual.get(name)
        if have == want:
            continue
        if have is None:
            lines += _create(name, want)
            continue
        gone, new = have.members - want.members, want.members - have.members
        is_same_kind = replace(have, members=want.members) == want
        if is_same_kind and len(gone) + len(new) <= len(want.members):
            # Additions first: a member that changes its prefix length is never missing.
            lines += [f"add {name} {member}" for member in sorted(new)]
            lines += [f"del {name} {member}" for member in sorted(gone)]
            continue
        temporary = f"{TEMPORARY_PREFIX_BY_VERSION[want.ip_version]}{number}"
        if temporary in actual:
            lines.append(f"destroy {temporary}")
        lines += _create(temporary, want)
        lines += [f"swap {temporary} {name}", f"destroy {temporary}"]
    return lines


def _create(name: str, want: SavedSet) -> Iterable[str]:
    family = _FAMILY_BY_VERSION[want.ip_version]
    yield f"create {name} {want.type} family {family} maxelem {want.max_size}"
    yield from (f"add {name} {member}" for member in sorted(want.members))


class IPSets:
    """See the chapter. `clock` gives monotonic seconds; a check is due every `refresh_s`."""

    def __init__(
        self,
        commands: Commands,
        *,
        clock: Callable[[], float],
        refresh_s: float = 90.0,
        max_size: int = 1048576,
    ) -> None:
        self._commands = commands
        self._clock = clock
        self._refresh_s = refresh_s
        self._max_size = max_size
        self._wanted: dict[str, SavedSet] = {}
        self._actual: dict[str, SavedSet] | None = None
        self._read_at_s = clock()

    def want(self, sets: Iterable[IPSet]) -> None:
        """State all wanted sets."""
        self._wanted = {
            one.name: SavedSet(
                one.type,
                self._max_size,
                frozenset(text for member in one.members for text in canonical(member)),
                one.ip_version,
            )
            for one in sets
        }
        for version in (4, 6):
            count = sum(one.ip_version == version for one in self._wanted.values())
            metrics.SETS.labels(str(version)).set(count)

    @property
    def check_due_s(self) -> float:
        """When, on the clock, `check` should be called next."""
        return self._read_at_s + self._refresh_s if self._refresh_s else float("inf")

    async def write(self) -> bool:
        """Create and update what is wanted; whether anything was written. Raises CommandFailed."""
        # Until the answer is in, what the kernel has is not known.
        actual, self._actual = self._actual, None
        if actual is None:
            actual = await self._read()
        lines = plan(actual, self._wanted)
        if lines:
            await self._restore(lines)
        self._actual = actual | self._wanted
        return bool(lines)

    async def delete_unwanted(self) -> None:
        """Remove our sets that nothing wants; one that a rule still uses is left for later."""
        if self._actual is None:
            return
        for name in self._actual.keys() - self._wanted.keys():
            if not name.startswith(_OURS):
                continue
            try:
                await self._restore([f"destroy {name}"])
            except CommandFailed as error:
                log.warning("set not removed, trying again later", name=name, error=str(error))
                continue
            del self._actual[name]

    async def check(self) -> bool:
        """Read the sets and repair them; whether that was needed. Raises CommandFailed."""
        self._actual = None
        was_repaired = await self.write()
        await self.delete_unwanted()
        if was_repaired:
            log.warning("sets were not as left, repaired")
        return was_repaired

    async def _read(self) -> dict[str, SavedSet]:
        done = await self._run(SAVE, "")
        self._read_at_s = self._clock()
        return parse(done)

    async def _restore(self, lines: list[str]) -> None:
        metrics.SET_LINES.inc(len(lines))
        await self._run(RESTORE, "\n".join((*lines, "")))

    async def _run(self, argv: tuple[str, ...], stdin: str) -> str:
        metrics.SET_CALLS.inc()
        try:
            return (await self._commands.run(argv, stdin=stdin)).checked().stdout
        except CommandFailed:
            metrics.SET_ERRORS.inc()
            raise
