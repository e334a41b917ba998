"""IP sets of the kernel kept as wanted.

Sets go in before the rules that name them (`create`, `write`) and out after (`delete_unwanted`):
the kernel refuses the rest. A set that is new, or whose type is wrong, or most of whose members
differ is built under a temporary name and swapped in, so that a rule never sees it half filled;
otherwise only the differences are written. Sets that rules of policy look at may have to change
together with each other or with the rules: `changes` tells what would change, `copy` makes the
wanted sets under other names meanwhile (felix/dataplane/ordering.py says when).

Ours is what is named `cali40…` (or `cali4t…`, a copy); for IPv6 `cali60…` and `cali6t…`. `check`
reads everything anew.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import count

import structlog

from cymric.kernel.command import DEFAULT_TIMEOUT_S, CommandFailed, Commands
from cymric.model.net import Network
from felix import metrics
from felix.rules.names import SET_PREFIX_BY_VERSION, set_name

TEMPORARY_PREFIX_BY_VERSION = {4: "cali4t", 6: "cali6t"}
_FAMILY_BY_VERSION = {4: "inet", 6: "inet6"}
_OURS = (*SET_PREFIX_BY_VERSION.values(), *TEMPORARY_PREFIX_BY_VERSION.values())
SAVE = ("ipset", "save")
RESTORE = ("ipset", "restore", "-exist")

MOST_S_PER_LINE = 0.005
"""Slower than that, added to what any program may take, a restore counts as stuck."""
RELEASE_S = 0.5
"""The kernel lets go of a set a while after the rule that named it went; earlier it refuses."""

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class IPSet:
    """A set of one family by its id; `type` is ipset's, members are in ipset's own text."""

    id: str
    members: frozenset[str]
    type: str = "hash:net"
    ip_version: int = 4
    is_policy: bool = False
    """Whether verdicts depend on it."""
    name: str = field(init=False, compare=False)
    """The kernel's name."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", set_name(self.id, self.ip_version))


@dataclass(frozen=True, slots=True)
class SavedSet:
    """A set as the kernel has it, members in canonical text."""

    type: str
    max_size: int
    members: frozenset[str]
    ip_version: int = 4


@dataclass(frozen=True, slots=True)
class SetChange:
    """What will change in a set that is there and that verdicts depend on."""

    name: str
    id: str
    ip_version: int
    gained: frozenset[str]
    lost: frozenset[str]


def texts(networks: Iterable[Network]) -> frozenset[str]:
    """Prefixes as members."""
    return frozenset(text for network in networks for text in canonical(network))


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


def plan(
    actual: Mapping[str, SavedSet],
    wanted: Mapping[str, SavedSet],
    at_once: Collection[str] = (),
    *,
    in_place: bool = False,
) -> list[str]:
    """The lines for `ipset restore` that make every wanted set be there as wanted.

    Sets `at_once` are swapped if more than one member differs; the others are if most members do,
    unless all is to be done `in_place`. Of all sets together, additions come first: what moves from
    one set to another, or changes its prefix length, is then never missing.
    """
    additions: list[str] = []
    swaps: list[str] = []
    deletions: list[str] = []
    names = _temporary_names(actual)
    differing = [name for name, want in wanted.items() if not _is_as(actual.get(name), want)]
    for name in sorted(differing):
        want, have = wanted[name], actual.get(name)
        if have is None:
            additions += _create(name, want)
            continue
        gone, new = have.members - want.members, want.members - have.members
        is_same_kind = replace(have, members=want.members) == want
        most = 1 if name in at_once else len(want.members)
        if is_same_kind and (len(gone) + len(new) <= most or (in_place and name not in at_once)):
            additions += (f"add {name} {member}" for member in sorted(new))
            deletions += (f"del {name} {member}" for member in sorted(gone))
            continue
        temporary = next(names[want.ip_version])
        swaps += _create(temporary, want)
        swaps += (f"swap {temporary} {name}", f"destroy {temporary}")
    return [*additions, *swaps, *deletions]


def _is_as(have: SavedSet | None, want: SavedSet) -> bool:
    """Whether a set is as wanted; asked of thousands, nearly all of which are the same object."""
    return have is want or have == want


def _temporary_names(actual: Collection[str]) -> Mapping[int, Iterator[str]]:
    """Names that are free, by family: what an earlier process left may still be in use."""
    return {
        version: _free_names(prefix, actual)
        for version, prefix in TEMPORARY_PREFIX_BY_VERSION.items()
    }


def _free_names(prefix: str, taken: Collection[str]) -> Iterator[str]:
    for number in count():
        if (name := f"{prefix}{number}") not in taken:
            yield name


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
        release_s: float = RELEASE_S,
    ) -> None:
        self._commands = commands
        self._clock = clock
        self._refresh_s = refresh_s
        self._max_size = max_size
        self._release_s = release_s
        self._stated: dict[str, IPSet] = {}
        self._wanted: dict[str, SavedSet] = {}
        self._policy_ids: dict[str, str] = {}
        self._actual: dict[str, SavedSet] | None = None
        self._read_at_s = clock()
        self._unwanted_since_s: dict[str, float] = {}

    def want(self, sets: Iterable[IPSet]) -> None:
        """State all wanted sets. What is the same object as before costs next to nothing."""
        before, self._stated = self._stated, {one.name: one for one in sets}
        known, self._wanted = self._wanted, {}
        for name, one in self._stated.items():
            self._wanted[name] = (
                known[name]
                if before.get(name) is one
                else SavedSet(one.type, self._max_size, one.members, one.ip_version)
            )
        found = self._stated.values()
        self._policy_ids = {one.name: one.id for one in found if one.is_policy}
        for version in (4, 6):
            number = [one.ip_version for one in found].count(version)
            metrics.SETS.labels(str(version)).set(number)

    @property
    def check_due_s(self) -> float:
        """When, on the clock, `check` should be called next."""
        return self._read_at_s + self._refresh_s if self._refresh_s else float("inf")

    async def create(self) -> tuple[SetChange, ...]:
        """Create what is missing; tell what will change in sets that verdicts depend on.

        Raises CommandFailed.
        """
        actual = await self._known()
        missing = {name: self._wanted[name] for name in self._wanted.keys() - actual.keys()}
        if missing:
            await self._restore(plan({}, missing))
        self._actual = actual | missing
        return tuple(
            SetChange(
                name,
                set_id,
                self._wanted[name].ip_version,
                self._wanted[name].members - actual[name].members,
                actual[name].members - self._wanted[name].members,
            )
            for name, set_id in self._policy_ids.items()
            if name in actual and not _is_as(actual[name], self._wanted[name])
        )

    async def copy(self, names: Iterable[str]) -> Mapping[str, str]:
        """Make these wanted sets under other names; those by the sets' names.

        `delete_unwanted` removes them. Raises CommandFailed.
        """
        actual = await self._known()
        free = _temporary_names(actual)
        copies = {name: next(free[self._wanted[name].ip_version]) for name in sorted(names)}
        sets = {copied: self._wanted[name] for name, copied in copies.items()}
        if sets:
            await self._restore(plan({}, sets))
        self._actual = actual | sets
        return copies

    async def write(self, at_once: Collection[str] = (), *, in_place: bool = False) -> bool:
        """Create and update what is wanted; whether anything was written. Raises CommandFailed.

        Sets `at_once` change in one step, however many members do. `in_place`, no set loses any
        member before all of them have gained theirs.
        """
        actual = await self._known()
        lines = plan(actual, self._wanted, at_once, in_place=in_place)
        if lines:
            await self._restore(lines)
        self._actual = actual | self._wanted
        return bool(lines)

    async def _known(self) -> dict[str, SavedSet]:
        """What the kernel has. Forgotten until the caller says what it is now."""
        actual, self._actual = self._actual, None
        return await self._read() if actual is None else actual

    @property
    def delete_due_s(self) -> float:
        """When, on the clock, `delete_unwanted` should be called next."""
        return min(self._unwanted_since_s.values(), default=float("inf")) + self._release_s

    async def delete_unwanted(self) -> None:
        """Remove our sets that nothing has wanted for a while; a used one is left for later."""
        if self._actual is None:
            return
        now_s, before = self._clock(), self._unwanted_since_s
        unwanted = self._actual.keys() - self._wanted.keys()
        self._unwanted_since_s = {
            name: before.get(name, now_s) for name in unwanted if name.startswith(_OURS)
        }
        for name, since_s in sorted(self._unwanted_since_s.items()):
            if now_s - since_s < self._release_s:
                continue
            try:
                await self._restore([f"destroy {name}"])
            except CommandFailed as error:
                log.warning("set not removed, trying again later", name=name, error=str(error))
                self._unwanted_since_s[name] = self._clock()
                continue
            del self._actual[name], self._unwanted_since_s[name]

    async def check(self) -> bool:
        """Read the sets and repair them; whether that was needed. Raises CommandFailed."""
        self._actual = None
        was_repaired = await self.write()
        await self.delete_unwanted()
        if was_repaired:
            log.warning("sets were not as left, repaired")
        return was_repaired

    async def _read(self) -> dict[str, SavedSet]:
        metrics.SET_CALLS.inc()
        try:
            done = (await self._commands.run(SAVE)).checked()
        except CommandFailed:
            metrics.SET_ERRORS.inc()
            raise
        self._read_at_s = self._clock()
        return parse(done.stdout)

    async def _restore(self, lines: list[str]) -> None:
        metrics.SET_LINES.inc(len(lines))
        metrics.SET_CALLS.inc()
        try:
            # One process is kept and fed: starting it takes longer than the work.
            text = "\n".join((*lines, "COMMIT", ""))
            within_s = DEFAULT_TIMEOUT_S + len(lines) * MOST_S_PER_LINE
            await self._commands.feed(RESTORE, text, timeout_s=within_s)
        except CommandFailed:
            metrics.SET_ERRORS.inc()
            raise
