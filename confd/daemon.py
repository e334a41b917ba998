"""The wiring of confd: the datastore's view of BGP peering becomes ExaBGP's configuration.

    etcd ─▶ Syncer ─▶ View ─ kick ─▶ render ─▶ changed? ─▶ check ─▶ rename ─▶ exabgp.conf
                                                                          ─▶ confd-status.json

Nodes, BGPPeers, BGPConfigurations and the passwords of sessions are all it reads. Nothing is
written before the datastore is in sync: earlier, peers not wanted and peers not yet seen look
alike. confd does not reload ExaBGP: bgpd does, which knows when the speaker is quiet. A node
without a BGP address, or without any peer, gets a file without sessions, which ExaBGP runs, so that
a peer is later added by a reload. A session whose password cannot be had is left out and named.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import structlog
from prometheus_client import Counter, Gauge

from confd.check import refusal
from confd.install import Installer, Outcome, State, write
from confd.passwords import Missing, Passwords
from confd.render import SpeakerInputs, labels_of, render_exabgp
from cymric.datastore.api import Datastore
from cymric.datastore.etcd import open_datastore
from cymric.datastore.syncer import Syncer, Update
from cymric.kernel.command import Commands, HostCommands
from cymric.model.keys import BGP_PASSWORDS, ResourceKey, resource_prefix
from cymric.model.peering import PasswordRef, PeeringInputs, Session, peering_of
from cymric.model.resources import BGPConfiguration, BGPPeer, Node
from cymric.runtime.daemon import run_daemon
from cymric.runtime.health import Health
from cymric.runtime.pacing import Backoff, Kick
from cymric.runtime.settings import Settings

T = TypeVar("T")

log = structlog.get_logger()

KINDS = ("Node", "BGPPeer", "BGPConfiguration")
IN_SYNC, INSTALLED = "datastore in sync", "speaker configuration installed"
STATUS_FILE = "confd-status.json"
MESH = "BGPConfiguration default"
"""Under this name problems of the mesh are reported, beside those of BGPPeers."""

CHECK_PASSWORD_FILES_EVERY_S = 2.0
WAIT_FOR_PASSWORDS_S = 10.0
"""How long the first file waits for them, so that no session is left out for a moment."""
CHECK_EVERY_S = 30.0
"""How often the file is compared though nothing changed: somebody may have removed it."""

SESSIONS = Gauge("cymric_confd_sessions", "BGP sessions in the last rendered configuration.")
UNSUPPORTED = Gauge("cymric_confd_unsupported_peers", "BGPPeers that cannot be honoured.")
REFUSED = Gauge("cymric_confd_refused", "1 while the wanted configuration is refused.")
OUTCOMES = Counter("cymric_confd_installs", "Attempts to install, by how they ended.", ["state"])


def main() -> None:
    """The console script `cymric-confd`."""
    run_daemon("confd", serve)


async def serve(settings: Settings, health: Health) -> None:
    """Run on the real datastore until cancelled."""
    async with open_datastore(settings) as store:
        await run(settings, health, store, HostCommands())


async def run(settings: Settings, health: Health, store: Datastore, commands: Commands) -> None:
    """Run on any datastore until cancelled."""
    health.expect(IN_SYNC, INSTALLED)
    in_sync, passwords_in_sync = asyncio.Event(), asyncio.Event()
    kick = Kick()
    view = View()
    passwords = Passwords(settings.bgp_password_dir)
    writer = Writer(settings, commands, passwords)

    def on_updates(updates: Sequence[Update]) -> None:
        if view.update(updates) | passwords.update(updates):
            kick()

    def on_in_sync() -> None:
        health.set_ready(IN_SYNC)
        in_sync.set()

    async def write_when_kicked() -> None:
        await in_sync.wait()
        try:
            async with asyncio.timeout(WAIT_FOR_PASSWORDS_S):
                await passwords_in_sync.wait()
        except TimeoutError:
            # An etcd role that may not read them: sessions without password still work.
            log.warning("no passwords can be read from the datastore", prefix=BGP_PASSWORDS)
        backoff = Backoff(first_s=0.5, most_s=10.0)
        while True:
            try:
                outcome = await writer.write(view.inputs)
            except OSError as error:
                log.error("cannot write the speaker configuration", error=str(error))
                health.set_ready(INSTALLED, is_ready=False)
                await asyncio.sleep(backoff.next_s())
                continue
            backoff.succeeded()
            health.set_ready(INSTALLED, is_ready=outcome.state is not State.REFUSED)
            await kick.wait(CHECK_EVERY_S)

    async def watch_password_files() -> None:
        while True:
            await asyncio.sleep(CHECK_PASSWORD_FILES_EVERY_S)
            if writer.are_passwords_changed():
                kick()

    syncer = Syncer(store, [resource_prefix(kind) for kind in KINDS], on_updates, on_in_sync)
    secrets = Syncer(store, [BGP_PASSWORDS], on_updates, passwords_in_sync.set)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(syncer.run(), name="syncer")
        tasks.create_task(secrets.run(), name="syncer of passwords")
        tasks.create_task(write_when_kicked(), name="write")
        tasks.create_task(watch_password_files(), name="watch password files")


class View:
    """The objects that decide about peering, by kind and name."""

    def __init__(self) -> None:
        self._by_kind: dict[str, dict[str, object]] = {kind: {} for kind in KINDS}

    def update(self, updates: Sequence[Update]) -> bool:
        """Take in what changed; whether anything did. None means gone."""
        has_changed = False
        for update in updates:
            if not isinstance(update.key, ResourceKey) or update.key.kind not in self._by_kind:
                continue
            objects, name = self._by_kind[update.key.kind], update.key.name
            has_changed |= objects.get(name) != update.value
            if update.value is None:
                objects.pop(name, None)
            else:
                objects[name] = update.value
        return has_changed

    @property
    def inputs(self) -> PeeringInputs:
        """All of it, as peering wants it."""
        return PeeringInputs(
            nodes=self._of(Node), peers=self._of(BGPPeer), configurations=self._of(BGPConfiguration)
        )

    def _of(self, kind: type[T]) -> dict[str, T]:
        objects = self._by_kind[kind.__name__]
        return {name: value for name, value in objects.items() if isinstance(value, kind)}


class Writer:
    """Renders, installs and tells how it went."""

    def __init__(self, settings: Settings, commands: Commands, passwords: Passwords) -> None:
        self._settings = settings
        self._commands = commands
        self._passwords = passwords
        self._password_refs: frozenset[PasswordRef] = frozenset()
        self._password_files = passwords.signature(())
        self._installer = Installer(settings.exabgp_config)
        self._told: object = None

    def are_passwords_changed(self) -> bool:
        """Whether files have changed since the last `write`."""
        return self._passwords.signature(self._password_refs) != self._password_files

    async def write(self, inputs: PeeringInputs) -> Outcome:
        """Bring the file in step with `inputs`. Raises OSError if it cannot be written."""
        node = self._settings.node_name
        peering = peering_of(node, inputs)
        sessions, passwords, unsupported = self._with_passwords(peering.sessions)
        text = render_exabgp(
            SpeakerInputs(
                node=node,
                sessions=sessions,
                listen_address=",".join(peering.listen) or "0.0.0.0",
                listen_port=inputs.listen_port(node),
                relay_command=relay_command(self._settings.speaker_socket),
                passwords=passwords,
            )
        )
        labels = labels_of(text)
        outcome = await self._installer.install(
            text, lambda path: refusal(self._commands, path, labels)
        )
        self._tell(sessions, {**peering.unsupported, **unsupported}, outcome)
        return outcome

    def _with_passwords(
        self, wanted: Sequence[Session]
    ) -> tuple[list[Session], dict[PasswordRef, bytes], dict[str, str]]:
        """The sessions that can have the password they ask for; the others, by name, and why."""
        refs = frozenset(each.password for each in wanted if each.password is not None)
        # Read before the files: a file changed in between is then noticed the next time.
        self._password_refs, self._password_files = refs, self._passwords.signature(refs)
        passwords: dict[PasswordRef, bytes] = {}
        missing: dict[PasswordRef, str] = {}
        for ref in refs:
            try:
                passwords[ref] = self._passwords.read(ref)
            except Missing as error:
                missing[ref] = str(error)
        sessions = [each for each in wanted if each.password not in missing]
        reasons = {
            each.bgp_peer or MESH: missing[each.password]
            for each in wanted
            if each.password in missing
        }
        return sessions, passwords, reasons

    def _tell(
        self, sessions: Sequence[Session], unsupported: Mapping[str, str], outcome: Outcome
    ) -> None:
        OUTCOMES.labels(outcome.state).inc()
        SESSIONS.set(len(sessions))
        UNSUPPORTED.set(len(unsupported))
        REFUSED.set(outcome.state is State.REFUSED)
        status = {
            "state": "refused" if outcome.state is State.REFUSED else "installed",
            "reason": outcome.reason,
            "sessions": [
                {"name": each.name, "peer": str(each.peer_address), "type": each.peer_type}
                for each in sessions
            ],
            "unsupported": dict(unsupported),
        }
        if outcome.state is State.INSTALLED:
            log.info("speaker configuration installed", sessions=len(sessions))
        if status == self._told:
            return
        self._told = status
        if outcome.state is State.REFUSED:
            log.error("speaker configuration refused, the old one stays", reason=outcome.reason)
        for name, reason in sorted(unsupported.items()):
            log.warning("BGPPeer is not honoured", peer=name, reason=reason)
        path = self._settings.run_dir / STATUS_FILE
        temporary = path.with_name(path.name + ".new")
        write(temporary, json.dumps({**status, "at": time.time()}, indent=2) + "\n")
        temporary.rename(path)


def relay_command(socket: Path) -> tuple[str, ...]:
    """What ExaBGP runs as its API process: a file of bgpd, found without importing it."""
    found = importlib.util.find_spec("bgpd")
    assert found is not None
    assert found.origin is not None
    relay = Path(found.origin).with_name("relay.py")
    return (sys.executable, "-I", "-S", str(relay), str(socket))


if __name__ == "__main__":
    main()
