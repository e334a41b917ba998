"""`get`, `create`, `apply`, `replace`, `delete`: objects by kind and name, or from files.

Flags, file format and messages are calicoctl's. Work on a file stops at the first object that is
refused; what was done before stays done, and the message says how much that was.
"""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from cymric.cli import kinds, manifest, output, removal
from cymric.cli.defaults import DEFAULT_NAMESPACE
from cymric.cli.kinds import GLOBAL_ASN, Kind
from cymric.cli.objects import AlreadyExists, NotFound, ObjectError, Objects, complain
from cymric.cli.schema import Tree
from cymric.cli.session import Session
from cymric.datastore.api import Datastore
from cymric.model.keys import ResourceKey
from cymric.model.resources import DEFAULT_ASN

_namespace = click.option(
    "-n", "--namespace", default="", help=f"Namespace of the objects ({DEFAULT_NAMESPACE})."
)
_file = click.option("-f", "--filename", help="A file of objects, or - for standard input.")
_kind = click.argument("kind", required=False)
_names = click.argument("names", nargs=-1)


@dataclass(frozen=True, slots=True)
class Target:
    """One object that a command is about. `tree` is what the file says of it, empty if no file."""

    kind: Kind
    key: ResourceKey
    tree: Tree


class PartialSuccess(ObjectError):
    """Some objects of a file were done before one was refused."""


@click.command()
@_kind
@_names
@_file
@_namespace
@click.option("-a", "--all-namespaces", is_flag=True, help="Objects of every namespace.")
@click.option(
    "-o",
    "--output",
    "form",
    type=click.Choice(["ps", "wide", "yaml", "json", "name"]),
    default="ps",
    help="Table (ps, wide), document (yaml, json) or kind/name lines.",
)
@click.option("--export", is_flag=True, help="Leave out what only this cluster knows of them.")
@click.pass_obj
def get(
    session: Session,
    kind: str | None,
    names: tuple[str, ...],
    filename: str | None,
    namespace: str,
    all_namespaces: bool,
    form: str,
    export: bool,
) -> None:
    """Show objects of KIND: all, or those called NAMES."""
    if all_namespaces and (namespace or names):
        raise click.UsageError("--all-namespaces goes with neither --namespace nor names")
    if kind and not names and not filename:
        wanted = kinds.find(kind)
        inside = (
            "" if all_namespaces or not wanted.is_namespaced else namespace or DEFAULT_NAMESPACE
        )
        session.run(lambda store: _show_all(store, wanted, inside, form, export=export))
        return
    targets = targets_of(kind, names, filename, namespace)
    session.run(lambda store: _show(store, targets, form, export=export))


@click.command()
@_file
@_namespace
@click.option("--skip-exists", is_flag=True, help="Pass over objects that exist already.")
@click.pass_obj
def create(session: Session, filename: str | None, namespace: str, skip_exists: bool) -> None:
    """Create the objects of a file; each must be new."""
    skipped = (AlreadyExists,) if skip_exists else ()
    _write(session, "created", filename, namespace, Objects.create, skipped)


@click.command()
@_file
@_namespace
@click.pass_obj
def apply(session: Session, filename: str | None, namespace: str) -> None:
    """Create the objects of a file, or write over those that exist."""
    _write(session, "applied", filename, namespace, Objects.apply, ())


@click.command()
@_file
@_namespace
@click.pass_obj
def replace(session: Session, filename: str | None, namespace: str) -> None:
    """Write over existing objects with those of a file."""
    _write(session, "replaced", filename, namespace, Objects.replace, ())


@click.command()
@_kind
@_names
@_file
@_namespace
@click.option("--skip-not-exists", is_flag=True, help="Pass over objects that do not exist.")
@click.pass_obj
def delete(
    session: Session,
    kind: str | None,
    names: tuple[str, ...],
    filename: str | None,
    namespace: str,
    skip_not_exists: bool,
) -> None:
    """Delete objects, by KIND and NAMES or as a file lists them."""
    if kind and not names and not filename:
        raise click.UsageError("name the objects to delete")
    targets = targets_of(kind, names, filename, namespace)
    _refuse_read_only(targets, "deleted")

    async def remove(objects: Objects, target: Target) -> None:
        await removal.remove(objects, target.key, _revision_seen(target.tree))

    _work(session, "deleted", targets, remove, (NotFound,) if skip_not_exists else ())


COMMANDS = (get, create, apply, replace, delete)

Write = Callable[[Objects, Kind, Tree], Awaitable[Tree]]
Skipped = tuple[type[ObjectError], ...]


def _write(
    session: Session, done: str, filename: str | None, namespace: str, write: Write, skip: Skipped
) -> None:
    if not filename:
        raise click.UsageError("give the file with -f")
    targets = targets_of(None, (), filename, namespace)
    _refuse_read_only(targets, done)

    async def one(objects: Objects, target: Target) -> None:
        from cymric.cli.checks import warnings

        written = await write(objects, target.kind, target.tree)
        for warning in warnings(written):
            output.note(f"Warning: {warning}")

    _work(session, done, targets, one, skip)


def _work(
    session: Session,
    done: str,
    targets: Sequence[Target],
    one: Callable[[Objects, Target], Awaitable[None]],
    skip: Skipped,
) -> None:
    """Do one target after the other and say what was done."""
    kind_names = {target.kind.name for target in targets}
    what = f"'{kind_names.pop()}' resource(s)" if len(kind_names) == 1 else "resource(s)"

    async def all_of_them(store: Datastore) -> int:
        objects, count = Objects(store), 0
        for target in targets:
            try:
                await one(objects, target)
            except skip as passed_over:
                output.note(f"Skipped: {passed_over}")
                continue
            except ObjectError as error:
                if not count:
                    raise
                told = f"partial success: {done} the first {count} of {len(targets)} {what}"
                raise PartialSuccess(f"{told}\nHit error: {error}") from error
            count += 1
        return count

    click.echo(f"Successfully {done} {session.run(all_of_them)} {what}")


def targets_of(
    kind: str | None, names: Sequence[str], filename: str | None, namespace: str
) -> list[Target]:
    """What a command is about: a kind and names, or the objects of a file."""
    if filename:
        if kind:
            raise click.UsageError("give either KIND and names or a file, not both")
        return [_target_of(found, namespace) for found in _read(filename)]
    if not kind:
        raise click.UsageError("give a KIND, or a file with -f")
    wanted = kinds.find(kind)
    inside = (namespace or DEFAULT_NAMESPACE) if wanted.is_namespaced else ""
    return [Target(wanted, ResourceKey(wanted.name, name, inside), {}) for name in names]


def _target_of(found: manifest.Found, namespace: str) -> Target:
    try:
        kind = kinds.find(found.tree["kind"])
    except kinds.UnknownKind as error:
        raise manifest.BadManifest(f"{found.where}: {error}") from None
    metadata = found.tree.get("metadata") or {}
    if not isinstance(metadata, dict):
        raise manifest.BadManifest(f"{found.where}: metadata is not an object")
    inside = ""
    if kind.is_namespaced:
        inside = metadata.get("namespace") or namespace or DEFAULT_NAMESPACE
        metadata = {**metadata, "namespace": inside}
    tree = {**found.tree, "kind": kind.name, "metadata": metadata}
    return Target(kind, ResourceKey(kind.name, str(metadata.get("name", "")), inside), tree)


def _revision_seen(tree: Tree) -> int | None:
    """The revision that a file says it was made from; None if it does not say."""
    version = tree.get("metadata", {}).get("resourceVersion", "")
    if not version:
        return None
    if not str(version).isdecimal():
        raise ObjectError(f"metadata.resourceVersion: {version!r} is no revision")
    return int(version)


def _read(filename: str) -> list[manifest.Found]:
    name = "standard input" if filename == "-" else filename
    try:
        if filename == "-":
            return manifest.read(sys.stdin.read(), name)
        return manifest.read(Path(filename).read_text(), name)
    except (OSError, UnicodeDecodeError) as error:
        raise manifest.BadManifest(f"{name}: {error}") from None


def _refuse_read_only(targets: Sequence[Target], done: str) -> None:
    for target in targets:
        if target.kind.is_read_only:
            raise ObjectError(f"{target.kind.name} is kept by the cluster and cannot be {done}")


async def _show_all(
    store: Datastore, kind: Kind, namespace: str, form: str, *, export: bool
) -> None:
    listed = await Objects(store).list(kind, namespace)
    for complaint in listed.complaints:
        output.note(f"Malformed, treated as absent by the daemons: {complaint}")
    trees = [_exported(tree) if export else tree for tree in listed.trees]
    if form in ("yaml", "json"):
        output.document(output.listed(kind.name, trees, listed.revision), form)
        return
    await _print_rows(store, kind, trees, form, with_namespace=kind.is_namespaced and not namespace)


async def _show(store: Datastore, targets: Sequence[Target], form: str, *, export: bool) -> None:
    objects = Objects(store)
    trees = []
    for target in targets:
        tree = await objects.get(target.key)
        if (read := await store.get(str(target.key))) and (complaint := complain(read)):
            output.note(f"Malformed, treated as absent by the daemons: {complaint}")
        trees.append(_exported(tree) if export else tree)
    if form in ("yaml", "json"):
        output.document(trees[0] if len(trees) == 1 else trees, form)
        return
    for name, kind in {target.kind.name: target.kind for target in targets}.items():
        chosen = [tree for tree in trees if tree.get("kind") == name]
        await _print_rows(store, kind, chosen, form, with_namespace=False)


async def _print_rows(
    store: Datastore, kind: Kind, trees: Sequence[Tree], form: str, *, with_namespace: bool
) -> None:
    if form == "name":
        for tree in trees:
            click.echo(f"{kind.name.lower()}/{tree['metadata'].get('name', '')}")
        return
    is_wide = form == "wide"
    rows = [kinds.row(kind, tree, wide=is_wide) for tree in trees]
    if kind.name == "Node" and is_wide:
        asn = f"({await _cluster_asn(store)})"
        rows = [tuple(asn if cell == GLOBAL_ASN else cell for cell in row) for row in rows]
    headings = tuple(heading for heading, _ in (kind.wide_columns if is_wide else kind.columns))
    if with_namespace:
        headings = ("NAMESPACE", *headings)
        rows = [
            (str(tree["metadata"].get("namespace", "")), *row)
            for tree, row in zip(trees, rows, strict=True)
        ]
    output.table(headings, rows)


async def _cluster_asn(store: Datastore) -> int:
    found = await Objects(store).find(ResourceKey("BGPConfiguration", "default"))
    asn = (found or {}).get("spec", {}).get("asNumber")
    return DEFAULT_ASN if asn is None else asn


def _exported(tree: Tree) -> Tree:
    own = ("uid", "resourceVersion", "creationTimestamp", "selfLink", "generation")
    metadata = {name: value for name, value in tree["metadata"].items() if name not in own}
    return {**tree, "metadata": metadata}
