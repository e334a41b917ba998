"""`cymric policy apply --confirm`, `confirm`, `rollback`, `trials`: changes that undo themselves.

    apply --confirm 60s ─▶ object with annotations ─▶ every node: in force for 60 s, then as before
    confirm ─▶ the annotations go, all of them in one transaction, while there is time
    rollback ─▶ what nodes have in force, or had before, is written

Nodes do the undoing by themselves, see docs/design/felix.md; nothing here has to run or to be
reachable for it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import click

from cymric.cli import kinds, output
from cymric.cli.durations import span
from cymric.cli.objects import ObjectError, Objects
from cymric.cli.resource import Target
from cymric.cli.schema import Tree
from cymric.cli.session import Session
from cymric.datastore import api
from cymric.datastore.api import Compare, Conflict, Datastore, Delete, Operation, Put, Transaction
from cymric.model import codec, trial
from cymric.model.durations import duration_s
from cymric.model.keys import ResourceKey

SHORTEST_S, LONGEST_S = 5, 3600


class Late(ObjectError):
    """A trial was over before it was confirmed."""


@dataclass(frozen=True, slots=True)
class OnTrial:
    """One stored object that carries a trial, as it was read."""

    key: ResourceKey
    tree: Tree
    revision: int
    trial: trial.Trial

    @property
    def name(self) -> str:
        """How people call it."""
        place = f"{self.key.namespace}/{self.key.name}" if self.key.namespace else self.key.name
        return f"{self.key.kind} {place}"


def seconds(text: str) -> float:
    """How long a trial lasts. Raises click.BadParameter."""
    try:
        found = duration_s(text)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None
    if not SHORTEST_S <= found <= LONGEST_S:
        raise click.BadParameter(f"{text} is not between {SHORTEST_S} s and {LONGEST_S // 60} min")
    return found


def apply(session: Session, targets: Sequence[Target], within_s: float) -> None:
    """Apply objects on trial. Raises ObjectError."""
    for target in targets:
        if target.kind.name not in trial.KINDS:
            known = ", ".join(sorted(trial.KINDS))
            raise ObjectError(f"{target.kind.name} cannot be on trial, only {known}")
    until = time.time() + within_s

    async def all_of_them(store: Datastore) -> None:
        objects = Objects(store)
        for done, target in enumerate(targets):
            try:
                await _apply_one(objects, target, until - within_s, within_s)
            except ObjectError as error:
                if not done:
                    raise
                told = f"the first {done} of {len(targets)} are on trial; undo with rollback"
                raise ObjectError(f"{error}\n{told}") from error

    session.run(all_of_them)
    click.echo(
        f"{len(targets)} resource(s) on trial until {trial.time_text(until)};"
        " undone by the nodes then, unless: cymric policy confirm"
    )


async def _apply_one(objects: Objects, target: Target, now: float, within_s: float) -> None:
    stored = await objects.find(target.key)
    try:
        before = None if stored is None else trial.in_force(stored, now=now)
    except ValueError as error:
        raise ObjectError(f"{target.key}: {error}") from None
    tree = trial.put_on(target.tree, before, now=now, within_s=within_s)
    await objects.apply(target.kind, tree)


def confirm(session: Session, targets: Sequence[Target]) -> None:
    """Make what is on trial stay: these objects, or all. Raises Late, ObjectError."""

    async def all_of_them(store: Datastore) -> Sequence[OnTrial]:
        found = await _chosen(store, targets)
        now = time.time()
        if late := [one.name for one in found if now >= one.trial.ends_at]:
            raise Late(
                f"too late for {', '.join(late)}: the nodes have undone it."
                " Write what is in force with: cymric policy rollback"
            )
        await _write(store, found, [trial.ended(one.tree) for one in found])
        return found

    for one in session.run(all_of_them):
        click.echo(f"{one.name} stays")


def rollback(session: Session, targets: Sequence[Target]) -> None:
    """Write what was there before a trial: of these objects, or of all. Raises ObjectError."""

    async def all_of_them(store: Datastore) -> Sequence[OnTrial]:
        found = await _chosen(store, targets)
        await _write(store, found, [one.trial.before for one in found])
        return found

    for one in session.run(all_of_them):
        what = "is gone" if one.trial.before is None else "is as it was before"
        click.echo(f"{one.name} {what}")


def show(session: Session) -> None:
    """What is on trial, and what was and is undone."""
    now = time.time()
    rows = []
    for one in session.run(_all):
        left_s = one.trial.ends_at - now
        state = f"undone in {span(left_s)}" if left_s > 0 else f"undone {span(-left_s)} ago"
        before = "nothing" if one.trial.before is None else "another"
        rows.append((one.name, state, before))
    output.table(("OBJECT", "UNLESS CONFIRMED", "BEFORE"), rows)


async def _all(store: Datastore) -> list[OnTrial]:
    found = []
    for name in sorted(trial.KINDS):
        listed = await Objects(store).list(kinds.find(name))
        for tree in listed.trees:
            metadata = tree["metadata"]
            try:
                seen = trial.of(metadata.get("annotations") or {})
            except ValueError as error:
                output.note(f"{name} {metadata.get('name')}: {error}")
                continue
            if seen is not None:
                key = ResourceKey(name, metadata["name"], metadata.get("namespace", ""))
                found.append(OnTrial(key, tree, int(metadata["resourceVersion"]), seen))
    return found


async def _chosen(store: Datastore, targets: Sequence[Target]) -> list[OnTrial]:
    """What is on trial among these, or all of it. Raises ObjectError if there is none."""
    found = await _all(store)
    if targets:
        wanted = {target.key for target in targets}
        found = [one for one in found if one.key in wanted]
    if not found:
        raise ObjectError("nothing is on trial")
    return found


async def _write(store: Datastore, found: Sequence[OnTrial], trees: Sequence[Tree | None]) -> None:
    """All or nothing, and only if nobody wrote any of them since."""
    compares = [Compare(str(one.key), one.revision) for one in found]
    operations: list[Operation] = []
    for one, tree in zip(found, trees, strict=True):
        key = str(one.key)
        operations.append(Delete(key) if tree is None else Put(key, _bytes(tree)))
    try:
        await store.commit(Transaction(compares, operations))
    except Conflict:
        raise ObjectError("somebody changed it meanwhile, nothing was written") from None
    except api.OutcomeUnknown:
        output.note("the answer was lost; see: cymric policy trials")
        raise


def _bytes(tree: Tree) -> bytes:
    metadata = {name: text for name, text in tree["metadata"].items() if name != "resourceVersion"}
    return codec.encode_tree({**tree, "metadata": metadata})
