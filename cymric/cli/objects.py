"""Objects in the datastore as trees: get, list, create, replace, apply, delete.

The way of a write: the user's tree is conformed, compared with what is stored, filled with
defaults, checked, and lands by compare-and-swap on the revision that was read. A `resourceVersion`
given by the user stands for the revision they saw: then a change in between is theirs to resolve;
without one, `apply` and `replace` read again, up to five times.

Invariants: fields that this version does not know survive (they are kept when stored already, and
refused as mistakes when new); nothing is stored that a daemon could not decode. Source: Calico's
clientv3 and calicoctl, described in our own words.
"""

from __future__ import annotations

import difflib
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import msgspec

from cymric.cli import checks, defaults, schema
from cymric.cli.fields import METADATA
from cymric.cli.kinds import Kind
from cymric.cli.rules import Surroundings
from cymric.cli.schema import Problem, Tree
from cymric.datastore import api
from cymric.datastore.api import Datastore, KeyValue
from cymric.model import codec
from cymric.model.keys import (
    BlockKey,
    MalformedKey,
    ResourceKey,
    block_prefix,
    parse_key,
    resource_prefix,
)
from cymric.model.net import Network, parse_network
from cymric.model.resources import DEFAULT_ALLOW_PROFILE

APPLY_ATTEMPTS = 5

BUILT_IN_PROFILE: Tree = {
    **defaults.empty_resource("Profile", DEFAULT_ALLOW_PROFILE),
    "spec": {"ingress": [{"action": "Allow"}], "egress": [{"action": "Allow"}]},
}
"""Shown with the profiles as calicoctl does; it is never stored."""


class ObjectError(Exception):
    """An object that cannot be shown or written; the message is for the user."""


class NotFound(ObjectError):
    """There is no such object."""

    def __init__(self, key: ResourceKey) -> None:
        super().__init__(f"resource does not exist: {_told(key)}")


class AlreadyExists(ObjectError):
    """Create found the object there."""

    def __init__(self, key: ResourceKey) -> None:
        super().__init__(f"resource already exists: {_told(key)}")


class Changed(ObjectError):
    """Somebody else wrote the object since the user (or we, five times) read it."""

    def __init__(self, key: ResourceKey, why: str) -> None:
        super().__init__(f"update conflict: {_told(key)}: {why}")


class Invalid(ObjectError):
    """The object breaks rules; one line a field."""

    def __init__(self, kind: Kind, name: str, problems: Sequence[Problem]) -> None:
        lines = "".join(f"\n  {problem}" for problem in problems)
        super().__init__(f"{kind.name} {name or '(without a name)'} is not valid:{lines}")
        self.problems = tuple(problems)


class Unreadable(ObjectError):
    """The stored bytes are not even an object."""


@dataclass(frozen=True, slots=True)
class Listed:
    """The objects found, and a line for each stored value that a daemon would not accept."""

    trees: tuple[Tree, ...]
    complaints: tuple[str, ...]
    revision: int


def _utc_now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _random_uid() -> str:
    return str(uuid.uuid4())


class Objects:
    """The objects of one datastore. `clock` and `new_uid` are the only sources of time, chance."""

    def __init__(
        self,
        store: Datastore,
        *,
        clock: Callable[[], str] = _utc_now,
        new_uid: Callable[[], str] = _random_uid,
    ) -> None:
        self.store = store
        self._clock = clock
        self._new_uid = new_uid

    async def get(self, key: ResourceKey) -> Tree:
        """The object with its resourceVersion. Raises NotFound, Unreadable."""
        if key == ResourceKey("Profile", DEFAULT_ALLOW_PROFILE):
            return BUILT_IN_PROFILE
        read = await self.store.get(str(key))
        if read is None:
            raise NotFound(key)
        return _tree(read)

    async def find(self, key: ResourceKey) -> Tree | None:
        """The object, or None. Raises Unreadable."""
        read = await self.store.get(str(key))
        return None if read is None else _tree(read)

    async def list(self, kind: Kind, namespace: str = "") -> Listed:
        """All objects of a kind, of one namespace if named, in key order."""
        listing = await self.store.list(resource_prefix(kind.name, namespace))
        trees: list[Tree] = []
        complaints: list[str] = []
        for item in listing.items:
            if complaint := complain(item):
                complaints.append(complaint)
            try:
                trees.append(_tree(item))
            except Unreadable:
                continue  # told by the complaint
        if kind.name == "Profile":
            trees.insert(0, BUILT_IN_PROFILE)
        return Listed(tuple(trees), tuple(complaints), listing.revision)

    async def create(self, kind: Kind, tree: Tree) -> Tree:
        """Write a new object. Raises AlreadyExists, Invalid."""
        wanted = self._stamped(await self._prepare(kind, tree, stored=None))
        key = checks.key_of(kind, wanted)
        try:
            return await self._write(key, wanted, api.ABSENT)
        except api.Conflict:
            raise AlreadyExists(key) from None

    async def replace(self, kind: Kind, tree: Tree) -> Tree:
        """Write over an existing object. Raises NotFound, Changed, Invalid."""
        return await self._put(kind, tree, may_create=False)

    async def apply(self, kind: Kind, tree: Tree) -> Tree:
        """Create the object or write over it. Raises Changed, Invalid."""
        return await self._put(kind, tree, may_create=True)

    async def delete(self, key: ResourceKey, revision: int | None = None) -> None:
        """Remove the object, at `revision` if given. Raises NotFound, Changed."""
        read = await self.store.get(str(key))
        if read is None:
            raise NotFound(key)
        try:
            await api.delete(self.store, str(key), if_revision=revision)
        except api.Conflict:
            raise Changed(key, "it was changed since that resourceVersion") from None

    async def _put(self, kind: Kind, tree: Tree, *, may_create: bool) -> Tree:
        conformed = self._conform(kind, tree)
        key = checks.key_of(kind, conformed.tree)
        seen = conformed.tree["metadata"].get("resourceVersion", "")
        for _ in range(APPLY_ATTEMPTS):
            read = await self.store.get(str(key))
            if read is None and not may_create:
                raise NotFound(key)
            if seen and read is not None and seen != str(read.revision):
                raise Changed(key, f"it is at resourceVersion {read.revision}, not {seen}")
            stored = None if read is None else _tree(read)
            wanted = self._stamped(await self._prepare(kind, tree, stored), stored)
            try:
                return await self._write(key, wanted, read.revision if read else api.ABSENT)
            except api.Conflict:
                continue  # another wrote first: look again
        raise Changed(key, f"others kept changing it, {APPLY_ATTEMPTS} times")

    async def _write(self, key: ResourceKey, tree: Tree, revision: int) -> Tree:
        value = codec.encode_tree(tree)
        try:
            landed = await api.update(self.store, str(key), value, if_revision=revision)
        except api.OutcomeUnknown:
            read = await self.store.get(str(key))
            if read is None or read.value != value or read.revision == revision:
                raise
            landed = read.revision  # the answer was lost, the write was not
        return _with_version(tree, landed)

    def fresh(self, kind: Kind, tree: Tree) -> Tree:
        """`tree` as a new object is stored, with no look at what else there is. Raises Invalid."""
        return self._stamped(self._conform(kind, tree).tree)

    def _conform(self, kind: Kind, tree: Tree) -> schema.Conformed:
        """The tree in stored form, told its name and namespace. Raises Invalid on wrong types."""
        done = schema.conform({"spec": {}, "metadata": {}, **tree}, kind.fields)
        metadata = done.tree.setdefault("metadata", {})
        done.tree.setdefault("spec", {})
        if done.problems:
            raise Invalid(kind, str(metadata.get("name", "")), done.problems)
        if kind.is_namespaced:
            metadata.setdefault("namespace", defaults.DEFAULT_NAMESPACE)
        if kind.name == "WorkloadEndpoint" and not metadata.get("name"):
            metadata["name"] = defaults.workload_endpoint_name(done.tree["spec"])
        if not metadata.get("name"):
            raise Invalid(kind, "", [Problem("metadata.name", "is required")])
        return done

    async def _prepare(self, kind: Kind, tree: Tree, stored: Tree | None) -> Tree:
        """The tree as it will be stored, all but uid and time. Raises Invalid."""
        done = self._conform(kind, tree)
        defaults.fill(done.tree, stored)
        filled = schema.conform(done.tree, kind.fields).tree
        around = await self._surroundings(kind, filled, is_new=stored is None)
        problems = _unknown(kind, done.unknown, stored)
        problems += checks.check(kind, filled, stored, around)
        if problems:
            raise Invalid(kind, filled["metadata"].get("name", ""), problems)
        return filled

    def _stamped(self, tree: Tree, stored: Tree | None = None) -> Tree:
        """The metadata that the datastore's side of the contract owns."""
        metadata = dict(tree["metadata"])
        for field in ("resourceVersion", "selfLink"):
            metadata.pop(field, None)
        before = {} if stored is None else stored["metadata"]
        metadata["uid"] = before.get("uid") or metadata.get("uid") or self._new_uid()
        metadata["creationTimestamp"] = (
            before.get("creationTimestamp") or metadata.get("creationTimestamp") or self._clock()
        )
        return {**tree, "metadata": schema.conform(metadata, METADATA).tree}

    async def _surroundings(self, kind: Kind, tree: Tree, *, is_new: bool) -> Surroundings:
        """What the kind's rules need of the rest of the cluster, read only when they do."""
        pools: dict[str, Network] = {}
        blocks: tuple[Network, ...] = ()
        filters: frozenset[str] = frozenset()
        if kind.name == "IPPool" and is_new:
            pools = await self.pools()
            pools.pop(tree["metadata"].get("name", ""), None)
            blocks = await self.blocks()
        if kind.name == "BGPPeer" and tree["spec"].get("filters"):
            listing = await self.store.list(resource_prefix("BGPFilter"))
            filters = frozenset(item.key.rpartition("/")[2] for item in listing.items)
        return Surroundings(pools=pools, blocks=blocks, filters=filters)

    async def pools(self) -> dict[str, Network]:
        """The prefix of every readable pool, by name."""
        listing = await self.store.list(resource_prefix("IPPool"))
        found: dict[str, Network] = {}
        for item in listing.items:
            try:
                found[item.key.rpartition("/")[2]] = parse_network(_tree(item)["spec"]["cidr"])
            except (Unreadable, KeyError, TypeError, ValueError):
                continue  # `get ippool` tells of it by key
        return found

    async def blocks(self) -> tuple[Network, ...]:
        """The prefix of every block, by its key."""
        found: list[Network] = []
        for item in (await self.store.list(block_prefix())).items:
            try:
                key = parse_key(item.key)
            except MalformedKey:
                continue  # no block that IPAM could use either
            if isinstance(key, BlockKey):
                found.append(key.cidr)
        return tuple(found)


def complain(read: KeyValue) -> str | None:
    """Why a daemon would treat the stored value as absent; None if it would not."""
    try:
        codec.decode(read.key, read.value)
    except codec.Malformed as error:
        return str(error)
    return None


def _tree(read: KeyValue) -> Tree:
    try:
        tree: Any = msgspec.json.decode(read.value)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Unreadable(f"{read.key}: {error}") from None
    if not isinstance(tree, dict):
        raise Unreadable(f"{read.key}: not an object")
    if not isinstance(tree.get("metadata", {}), dict) or not isinstance(tree.get("spec", {}), dict):
        raise Unreadable(f"{read.key}: metadata or spec is not an object")
    complete = {**tree, "metadata": tree.get("metadata", {}), "spec": tree.get("spec", {})}
    return _with_version(complete, read.revision)


def _with_version(tree: Tree, revision: int) -> Tree:
    metadata = {**tree["metadata"], "resourceVersion": str(revision)}
    return {**tree, "metadata": schema.conform(metadata, METADATA).tree}


def _unknown(kind: Kind, unknown: Sequence[str], stored: Tree | None) -> list[Problem]:
    """Fields we do not know are a mistake, unless another version stored them already."""
    known = [] if stored is None else schema.conform(stored, kind.fields).unknown
    kept = {schema.without_indices(path) for path in known}
    spec_names = kind.fields["spec"].fields
    problems = []
    for path in unknown:
        name = path.rpartition(".")[2]
        if schema.without_indices(path) in kept or _is_left_to_felix(kind, name):
            continue
        close = difflib.get_close_matches(name, spec_names, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        problems.append(Problem(path, f"{kind.name} has no such field{hint}"))
    return problems


def _is_left_to_felix(kind: Kind, name: str) -> bool:
    """The eBPF data plane's many fields: stored for a Calico node, of no meaning here."""
    return kind.name == "FelixConfiguration" and name.startswith("bpf")


def _told(key: ResourceKey) -> str:
    return f"{key.kind}({key.namespace}/{key.name})" if key.namespace else f"{key.kind}({key.name})"
