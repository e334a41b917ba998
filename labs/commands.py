"""What a person types: one command for each thing one can do to a lab.

Thin: it finds the lab, calls one method, says what came out. Everything is reached as `labs/lab`.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import replace

import click
from rich.live import Live

from labs import checks, summary
from labs.lab import DATASTORE, Lab
from labs.network import CommandFailed, entering
from labs.pods import CniError
from labs.progress import settle, steps_on
from labs.rack import Rack
from labs.router import Import
from labs.supervisor import NotRunning
from labs.topology import DAEMONS, EXTERNAL_POOL, HOST, LAB_NAME, Layout, Unknown

FREE = {"ignore_unknown_options": True, "help_option_names": []}
"""For commands that pass their words on to another program."""


class _Plain(click.Group):
    """Errors a person can act on are told in a line, without a traceback."""

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except NotRunning as failure:
            raise click.ClickException(f"the lab is not up: {failure}") from failure
        except (Unknown, CommandFailed, CniError, checks.NotSettled) as failure:
            raise click.ClickException(str(failure)) from failure


@click.group(cls=_Plain)
@click.option("--name", default=LAB_NAME, envvar="CYMRIC_LAB", help="Which lab; default cymric.")
@click.pass_context
def main(ctx: click.Context, name: str) -> None:
    """A Cymric cluster in network namespaces: three nodes, a router outside, five pods."""
    if os.geteuid() != 0:
        raise click.ClickException("the lab makes network namespaces and needs root")
    ctx.obj = Lab(Layout(name), steps_on(summary.make_console()))


@main.command()
@click.option("--wait", "patience_s", default=90.0, help="Seconds to wait for it to settle.")
@click.pass_obj
def up(lab: Lab, patience_s: float) -> None:
    """Build what is missing of the lab, wait until all works, show the summary."""
    console = summary.make_console()
    lab.up()
    settle(lab, console, patience_s=patience_s)
    console.print()
    console.print(summary.overview(lab))
    console.print(summary.findings_text(checks.findings(lab)))


@main.command()
@click.pass_obj
def down(lab: Lab) -> None:
    """Take the lab away without a trace: processes, namespaces, rules, files."""
    lab.down()
    if left := lab.remains():
        raise click.ClickException(f"still there: {', '.join(left)}")
    click.echo("Nothing is left of the lab.")


@main.command()
@click.pass_obj
def status(lab: Lab) -> None:
    """Every process, its state and its process id."""
    summary.make_console().print(summary.status_text(lab))


@main.command("summary")
@click.option("--watch", is_flag=True, help="Keep it on the screen and read it again.")
@click.pass_obj
def show_summary(lab: Lab, watch: bool) -> None:
    """Nodes, blocks, sessions, routes, who reaches whom."""
    console = summary.make_console()
    lab.supervisor.processes()
    if not watch:
        console.print(summary.overview(lab))
        return
    with Live(summary.live_overview(lab), console=console, screen=console.is_terminal) as live:
        while True:
            time.sleep(1)
            live.update(summary.live_overview(lab), refresh=True)


@main.command()
@click.option("--wait", "patience_s", default=0.0, help="Seconds to give it to become right.")
@click.pass_obj
def check(lab: Lab, patience_s: float) -> None:
    """Run every check; exit status 1 if one fails."""
    lab.supervisor.processes()
    if patience_s:
        settle(lab, summary.make_console(), patience_s=patience_s)
    found = checks.findings(lab)
    summary.make_console().print(summary.findings_text(found))
    sys.exit(1 if any(finding.wrong for finding in found) else 0)


@main.command(context_settings=FREE)
@click.argument("machine")
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
@click.pass_obj
def enter(lab: Lab, machine: str, command: tuple[str, ...]) -> None:
    """Open a shell in a node, in host1 or in a pod (or run COMMAND there)."""
    known = lab.records
    environment = dict(os.environ)
    if machine == HOST:
        namespace = lab.layout.namespace(HOST)
    elif any(pod.name == machine for pod in known.pods):
        namespace = lab.layout.pod_namespace(machine)
    else:
        environment |= lab.node_environment(known.node(machine))
        namespace = lab.layout.namespace(machine)
    words = (*entering(namespace), *(command or _shell(machine)))
    os.execvpe(words[0], words, environment)  # noqa: S606


def _shell(machine: str) -> tuple[str, ...]:
    return ("env", f"PS1=[{machine}] \\w # ", "bash", "--norc", "--noprofile")


@main.group()
def pod() -> None:
    """Create and delete pods, through the CNI executables."""


@pod.command("add")
@click.argument("node")
@click.argument("name")
@click.option("--external", is_flag=True, help=f"Take the address from {EXTERNAL_POOL}.")
@click.option("--pool", "pools", multiple=True, help="Take the address from this pool.")
@click.pass_obj
def pod_add(lab: Lab, node: str, name: str, external: bool, pools: tuple[str, ...]) -> None:
    """Create the pod NAME on NODE."""
    lab.supervisor.processes()
    chosen = (*pools, *([str(EXTERNAL_POOL)] if external else []))
    click.echo(lab.add_pod(node, name, pools=chosen).address)


@pod.command("del")
@click.argument("name")
@click.pass_obj
def pod_del(lab: Lab, name: str) -> None:
    """Delete the pod NAME."""
    lab.delete_pod(name)


@main.group()
def node() -> None:
    """Add, remove and reboot nodes."""


@node.command("add")
@click.argument("name")
@click.pass_obj
def node_add(lab: Lab, name: str) -> None:
    """A further node: its machine, its daemons, its place in the mesh."""
    lab.supervisor.processes()
    click.echo(lab.add_node(name).address)


@node.command("remove")
@click.argument("name")
@click.pass_obj
def node_remove(lab: Lab, name: str) -> None:
    """Take a node out of the cluster, with its pods and blocks."""
    lab.supervisor.processes()
    lab.remove_node(name)


@node.command("reboot")
@click.argument("name")
@click.pass_obj
def node_reboot(lab: Lab, name: str) -> None:
    """Destroy the node's namespace and bring the same node back, with its blocks."""
    lab.supervisor.processes()
    lab.reboot_node(name)


@main.group("rack")
def rack_group() -> None:
    """The lab as a rack: reflectors, and two top-of-rack routers with BFD."""


@rack_group.command("up")
@click.option("--wait", "patience_s", default=90.0, help="Seconds to wait for it to settle.")
@click.pass_obj
def rack_up(lab: Lab, patience_s: float) -> None:
    """Make a rack of the standing lab."""
    Rack(lab).up()
    console = summary.make_console()
    settle(lab, console, patience_s=patience_s)
    console.print(summary.findings_text(checks.findings(lab)))


@rack_group.command("silence")
@click.argument("router")
@click.pass_obj
def rack_silence(lab: Lab, router: str) -> None:
    """Make ROUTER drop every packet while its interface stays up."""
    Rack(lab).silence(router)


@rack_group.command("restore")
@click.argument("router")
@click.pass_obj
def rack_restore(lab: Lab, router: str) -> None:
    """Let a silenced ROUTER speak again."""
    Rack(lab).restore(router)


def _process(machine: str, daemon: str) -> tuple[str, str]:
    """The supervisor's group and name; etcd is found wherever one looks for it."""
    return (DATASTORE, daemon) if daemon == "etcd" else (machine, daemon)


def _on_process(verb: str, text: str) -> None:
    @main.command(verb, help=text)
    @click.argument("machine", metavar="NODE")
    @click.argument("daemon", metavar=f"[{'|'.join(DAEMONS)}|etcd|bird|http]")
    @click.pass_obj
    def command(lab: Lab, machine: str, daemon: str) -> None:
        group, name = _process(machine, daemon)
        if verb in ("stop", "restart"):
            lab.supervisor.stop(group, name)
        if verb in ("start", "restart"):
            lab.supervisor.start(group, name)
        if verb == "kill":
            lab.supervisor.kill(group, name)


_on_process("stop", "Stop a daemon of NODE; it stays down.")
_on_process("start", "Start a daemon of NODE.")
_on_process("restart", "Stop a daemon of NODE kindly and start it again.")
_on_process("kill", "Kill -9 a daemon of NODE; the supervisor starts it again.")


@main.command()
@click.argument("imports", type=click.Choice([str(choice) for choice in Import]))
@click.pass_obj
def host1(lab: Lab, imports: str) -> None:
    """What host1 takes from the nodes: strict (no default-pool block) or permissive."""
    lab.supervisor.processes()
    lab.set_import(Import(imports))


@main.command(context_settings=FREE)
@click.argument("words", nargs=-1, type=click.UNPROCESSED)
@click.pass_obj
def etcdctl(lab: Lab, words: tuple[str, ...]) -> None:
    """Run etcdctl on the lab's etcd."""
    _become(lab, "control", "etcdctl", *words)


@main.command("cymric", context_settings=FREE)
@click.argument("node")
@click.argument("words", nargs=-1, type=click.UNPROCESSED)
@click.pass_obj
def run_cymric(lab: Lab, node: str, words: tuple[str, ...]) -> None:
    """Run the cymric command line on NODE."""
    _become(lab, node, "cymric", *words)


def _become(lab: Lab, node: str, *words: str) -> None:
    machine = lab.records.node(node)
    command = (*entering(lab.layout.namespace(node)), *words)
    os.execvpe(command[0], command, dict(lab.node_environment(machine)))  # noqa: S606


@main.command()
@click.argument("machine")
@click.argument("daemon")
@click.option("-f", "--follow", is_flag=True)
@click.option("-n", "lines", default=50, help="How many lines from the end.")
@click.pass_obj
def logs(lab: Lab, machine: str, daemon: str, follow: bool, lines: int) -> None:
    """The log of a daemon."""
    group, name = _process(machine, daemon)
    path = lab.layout.logs / f"{group}-{name}.log"
    if not path.exists():
        raise click.ClickException(f"there is no {path}")
    words = ("tail", f"-n{lines}", *(["-F"] if follow else []), str(path))
    os.execvp("tail", words)  # noqa: S606


@main.command()
@click.argument("verb", type=click.Choice(["ADD", "DEL", "CHECK", "VERSION"]))
@click.argument("node")
@click.argument("name")
@click.option("--version", "version", default=None, help="cniVersion of the configuration.")
@click.pass_obj
def cni(lab: Lab, verb: str, node: str, name: str, version: str | None) -> None:
    """Call the CNI executable for a pod of the lab, once, and print its answer.

    For trying things: the lab's record of the pod is not changed.
    """
    subject = lab.records.pod(name)
    machine = lab.records.node(node)
    config = lab.cni.netconf(machine, subject.pools)
    if version:
        config = {**config, "cniVersion": version}
    answer = lab.cni.call(verb, machine, replace(subject, node=node), config=config)
    click.echo(json.dumps(answer, indent=2))
