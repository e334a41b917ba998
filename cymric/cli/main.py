"""`cymric`: the operator's command line.

Each noun has a file; this one holds the group, what belongs to no noun, and the one place where
errors become words and an exit code:

    0  done
    1  refused: the object or the situation does not allow it, the message says which field or why
    2  the command line itself is wrong
    3  the datastore did not answer, or refused us

Heavy modules (gRPC, rich, pyroute2) are imported inside the commands that need them, so that
`cymric --help` and completion stay quick.
"""

from __future__ import annotations

import errno
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click

import cymric
from cymric.cli import (
    bgp,
    cni,
    datastore,
    felix,
    ipam,
    node,
    output,
    policy,
    resource,
    tor_config,
)
from cymric.cli.kinds import UnknownKind
from cymric.cli.manifest import BadManifest
from cymric.cli.objects import ObjectError
from cymric.cli.session import Session
from cymric.datastore import api
from cymric.model.codec import Malformed
from cymric.runtime.settings import BadSettings
from ipam.errors import IPAMError

_SECRETS = ("etcd_password",)


class Refused(click.ClickException):
    """The object or the situation does not allow it."""

    exit_code = 1


class Misused(click.ClickException):
    """The command line or the settings are wrong."""

    exit_code = 2


class NoDatastore(click.ClickException):
    """The datastore did not answer, or refused us."""

    exit_code = 3


class _Group(click.Group):
    """A group whose commands' errors reach the person as one message, never as a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (UnknownKind, BadSettings) as error:
            raise Misused(str(error)) from error
        except (BadManifest, ObjectError, IPAMError, Malformed) as error:
            raise Refused(str(error)) from error
        except api.OutcomeUnknown as error:
            raise NoDatastore(
                f"the connection to etcd broke; the write may or may not have landed: {error}"
            ) from error
        except api.Unavailable as error:
            endpoints = ", ".join(ctx.obj.settings().etcd_endpoints)
            raise NoDatastore(f"etcd does not answer at {endpoints}: {error}") from error
        except api.DatastoreError as error:
            raise NoDatastore(f"etcd refused: {_told(error)}") from error
        except OSError as error:
            if error.errno == errno.EPIPE:
                raise  # whoever reads our output has had enough: click ends quietly
            raise Refused(str(error)) from error


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "-c",
    "--config",
    "config_file",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    help="calicoctl's configuration file; wins over environment and /etc/cymric/cymric.toml.",
)
@click.pass_context
def cli(ctx: click.Context, config_file: Path | None) -> None:
    """Look at and change what Cymric keeps in etcd, and ask its daemons how they are."""
    session = ctx.obj or Session()
    ctx.obj = replace(session, config_file=config_file) if config_file else session


for _command in (
    *resource.COMMANDS,
    ipam.group,
    node.group,
    bgp.group,
    datastore.group,
    cni.group,
    felix.group,
    policy.group,
    tor_config.command,
):
    cli.add_command(_command)


@cli.group("config")
def config() -> None:
    """What this machine is configured to do."""


@config.command("show")
@click.option("-o", "--output", "form", type=click.Choice(["ps", "yaml", "json"]), default="ps")
@click.pass_obj
def config_show(session: Session, form: str) -> None:
    """Print the settings that daemons started with this environment would use."""
    settings: dict[str, Any] = {}
    for name, value in asdict(session.settings()).items():
        shown = list(value) if isinstance(value, tuple) else value
        shown = str(shown) if isinstance(shown, Path) else shown
        settings[name] = "(set)" if name in _SECRETS and shown else shown
    if form != "ps":
        output.document(settings, form)
    else:
        rows = [(k, ",".join(v) if isinstance(v, list) else str(v)) for k, v in settings.items()]
        output.table(("SETTING", "VALUE"), rows)


@cli.command("version")
def version() -> None:
    """Print the version, and the data model that it speaks."""
    click.echo(f"cymric {cymric.__version__}\ndata model: Calico v3.32, etcdv3")


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def main() -> None:
    """The console script."""
    cli(prog_name="cymric")


if __name__ == "__main__":
    main()
