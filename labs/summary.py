"""What a person sees of a lab: tables of what `observe` reads, and the findings of `checks`.

rich draws boxes on a terminal and plain text elsewhere; the width is fixed where there is none, so
that a log reads the same everywhere.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

from rich import box
from rich.columns import Columns
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from labs import checks, observe
from labs.lab import Lab
from labs.network import CommandFailed
from labs.probe import Answer
from labs.topology import DEFAULT_POOL, EXTERNAL_POOL, HOST, HOST_ADDRESS, POD_RANGE, Node, Pod

PLAIN_WIDTH = 118


def make_console() -> Console:
    """Colours and the width of the window on a terminal; plain text of a fixed width elsewhere."""
    console = Console()
    return console if console.is_terminal else Console(width=PLAIN_WIDTH)


def overview(lab: Lab) -> RenderableType:
    """The whole summary, read now, one table below the other."""
    return Group(*_tables(lab))


def _tables(lab: Lab) -> Sequence[Table]:
    known = lab.records
    return (
        nodes_table(lab, known.nodes),
        blocks_table(observe.blocks(lab)),
        sessions_table(lab, known.nodes),
        matrix_table(known.pods, observe.matrix(lab)),
        routes_table(lab, known.nodes),
        outside_table(lab, known.pods),
    )


def _table(title: str, *columns: str) -> Table:
    table = Table(
        title=f"\n{title}",
        title_justify="left",
        title_style="bold",
        box=box.ROUNDED if sys.stdout.isatty() else box.ASCII,
    )
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def nodes_table(lab: Lab, nodes: Sequence[Node]) -> Table:
    """Each node: its address, its processes, its pods."""
    table = _table("Nodes", "node", "address", "processes", "pods")
    processes = lab.supervisor.processes()
    for node in nodes:
        mine = [process for process in processes if process.group == node.name]
        shown = Text(" ").join(
            Text(process.name, style="green")
            if process.running
            else Text(f"{process.name}:{process.state.lower()}", style="red")
            for process in mine
        )
        pods = "\n".join(f"{pod.name} {pod.address}" for pod in lab.records.pods_on(node.name))
        table.add_row(node.name, str(node.address), shown, pods)
    table.add_row(HOST, str(HOST_ADDRESS), f"bird ({lab.records.imports} import)", "")
    return table


def blocks_table(blocks: Sequence[observe.Block]) -> Table:
    """The blocks in etcd."""
    table = _table("Blocks (etcdctl get --prefix /calico/ipam/v2/assignment)", "block", "pool")
    for column in ("owner", "addresses in use"):
        table.add_column(column)
    for block in blocks:
        pool = next((p for p in (DEFAULT_POOL, EXTERNAL_POOL) if block.cidr.subnet_of(p)), "")
        size = block.cidr.num_addresses
        table.add_row(str(block.cidr), str(pool), block.owner, f"{block.used} of {size}")
    return table


def sessions_table(lab: Lab, nodes: Sequence[Node]) -> Table:
    """Who has a BGP connection with whom; host1's column as its BIRD tells it."""
    names = {node.address: node.name for node in nodes} | {HOST_ADDRESS: HOST}
    table = _table("BGP sessions (ss on the nodes, birdc on host1)", "", *names.values())
    for node in nodes:
        connected = observe.bgp_connections(lab, node.name)
        table.add_row(
            node.name,
            *(
                "-" if address == node.address else _state(len(connected.get(address, ())) == 1)
                for address in names
            ),
        )
    bird = {session.neighbour: session for session in lab.router.sessions()}
    row = [
        Text(session.state, style="green" if session.established else "red")
        if (session := bird.get(node.address))
        else "-"
        for node in nodes
    ]
    table.add_row(HOST, *row, "-")
    return table


def _state(up: bool) -> Text:
    return Text("connected", style="green") if up else Text("none", style="red")


def routes_table(lab: Lab, nodes: Sequence[Node]) -> Table:
    """Every pod route in every kernel."""
    table = _table("Pod routes in the kernels (ip route)", "machine", "routes")
    for machine in (*(node.name for node in nodes), HOST):
        shown = [
            str(route)
            for route in observe.routes(lab, machine)
            if route.prefix.subnet_of(POD_RANGE)
        ]
        table.add_row(machine, "\n".join(sorted(shown)) or "none", end_section=True)
    return table


def matrix_table(pods: Sequence[Pod], answers: Mapping[tuple[str, str], Answer]) -> Table:
    """Which pod reaches which, and whether the server saw the pod's own address."""
    table = _table("Pod to pod by HTTP: what the server sees", "from")
    for target in pods:
        table.add_column(target.name)
    for source in pods:
        row = [_seen(answers[(source.name, target.name)], source.address) for target in pods]
        table.add_row(source.name, *row)
    return table


def _seen(answer: Answer, own: str) -> Text:
    if answer.seen == own:
        return Text("its own", style="green")
    return Text(answer.seen or answer.error, style="red")


def outside_table(lab: Lab, pods: Sequence[Pod]) -> Table:
    """What host1 sees of each pod, and whether host1 reaches it."""
    table = _table("Pods and the host outside", "pod", "node", "natOutgoing")
    for column in ("host1 sees it as", "it sees host1 as"):
        table.add_column(column)
    nat = checks.nat_outgoing(lab)
    seen = observe.seen_outside(lab, [pod.name for pod in pods])
    reached = observe.reached_from_outside(lab)
    nodes = {node.name: str(node.address) for node in lab.records.nodes}
    for pod in pods:
        there, back = seen[pod.name], reached[pod.name]
        words = {nodes.get(pod.node, ""): "the node", pod.address: "the pod itself"}
        outcome = f"{there.seen} ({words.get(there.seen, 'somebody else')})"
        table.add_row(
            pod.name,
            pod.node,
            "on" if checks.translates(pod, nat) else "off",
            outcome if there.ok else f"no answer ({there.error})",
            back.seen if back.ok else f"no answer ({back.error})",
        )
    return table


def findings_text(findings: Sequence[checks.Finding]) -> Text:
    """One line for each promise, and what is wrong below it."""
    text = Text()
    for finding in findings:
        good = not finding.wrong
        text.append("ok      " if good else "WRONG   ", style="green" if good else "red")
        text.append(f"{finding.promise}\n")
        for wrong in finding.wrong:
            text.append(f"        {wrong}\n", style="red")
    text.rstrip()
    return text


def status_text(lab: Lab) -> RenderableType:
    """Processes only: what runs, since when, and why not."""
    table = _table("Processes", "group", "name", "state", "pid")
    table.add_column("", overflow="fold")
    for process in lab.supervisor.processes():
        style = "green" if process.running else "red"
        state = Text(process.state.lower(), style=style)
        table.add_row(process.group, process.name, state, str(process.pid), process.why)
    return table


def live_overview(lab: Lab) -> RenderableType:
    """The summary while things change under it, tables beside each other where they fit.

    A failed reading is shown, not raised: the next may be better.
    """
    try:
        return Columns(_tables(lab), padding=(0, 3))
    except CommandFailed as failure:
        return Text(str(failure), style="red")
