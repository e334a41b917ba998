"""`cymric cni`: makes a container runtime on this machine use Cymric, and undoes it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import click

from cymric.cli import cni_files
from cymric.cli.cni_files import Places, Wanted
from cymric.cli.session import Session
from cymric.runtime.cni_executables import SYSTEM_PYTHON

_PATH = click.Path(path_type=Path, file_okay=False)


def _places(command: Callable[..., None]) -> Callable[..., None]:
    for option in (
        click.option("--bin-dir", type=_PATH, default="/opt/cni/bin", show_default=True),
        click.option("--conf-dir", type=_PATH, default="/etc/cni/net.d", show_default=True),
        click.option("--conf-name", default=cni_files.CONFLIST, show_default=True),
    ):
        command = option(command)
    return command


@click.group("cni")
def group() -> None:
    """What a container runtime calls on this machine."""


@group.command("install")
@_places
@click.option("--name", default="cymric", show_default=True, help="The network's name.")
@click.option("--socket", type=click.Path(path_type=Path), help="Where cnid listens.")
@click.option("--mtu", type=click.IntRange(0, 65535), default=0, help="0: as cnid decides.")
@click.option("--kubernetes", is_flag=True, help="Profiles by namespace and service account.")
@click.option("--chain", "chained", multiple=True, help="A plugin to run after, such as portmap.")
@click.option(
    "--python",
    type=click.Path(path_type=Path, dir_okay=False),
    default=str(SYSTEM_PYTHON),
    show_default=True,
    help="The Python (3.9 or newer) that runs the executables.",
)
@click.option(
    "--client",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    help="A client compiled elsewhere (cymric cni build); else it is compiled here if it can be.",
)
@click.pass_obj
def install(
    session: Session,
    bin_dir: Path,
    conf_dir: Path,
    conf_name: str,
    python: Path,
    client: Path | None,
    name: str,
    socket: Path | None,
    mtu: int,
    kubernetes: bool,
    chained: tuple[str, ...],
) -> None:
    """Write the executables and the configuration list, each whole or not at all."""
    places = Places(
        bin_dir=bin_dir, conf_dir=conf_dir, conf_name=conf_name, python=python, client=client
    )
    wanted = Wanted(
        name=name,
        socket=socket or session.settings().cni_socket,
        mtu=mtu,
        is_kubernetes=kubernetes,
        chained=chained,
    )
    for line in cni_files.install(places, wanted):
        click.echo(line)


@group.command("build")
@click.argument("output", type=click.Path(path_type=Path, dir_okay=False))
def build(output: Path) -> None:
    """Compile the client for machines that have no compiler; it needs nothing there."""
    click.echo(cni_files.build(output))


@group.command("uninstall")
@_places
def uninstall(bin_dir: Path, conf_dir: Path, conf_name: str) -> None:
    """Take back what install wrote. Pods that run keep their network."""
    places = Places(bin_dir=bin_dir, conf_dir=conf_dir, conf_name=conf_name)
    for line in cni_files.uninstall(places):
        click.echo(line)
