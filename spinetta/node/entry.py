"""How a daemon comes into its cluster: a new one, one it is told of, or the one it has been part of before."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from spinetta.access import NodeRole
from spinetta.config import Settings
from spinetta.errors import Fenced, StoreUnavailable, UserError
from spinetta.model import IncarnationId
from spinetta.node.driver import wall_ms
from spinetta.node.following import find_successor
from spinetta.node.join import UNREACHABLE, introduce
from spinetta.node.lock import DirectoryLock
from spinetta.node.revival import have_ended, revive
from spinetta.node.seats import OwnSeat
from spinetta.node.trouble import Teller
from spinetta.runtime import generations
from spinetta.store import identity as identities
from spinetta.store.identity import Identity
from spinetta.store.offline import read_offline
from spinetta.store.process import EtcdTls, Version, check_version, etcd_version, find_etcd, parse_version
from spinetta.store.protocol import Snapshot
from spinetta.store.supervisor import EtcdSupervisor, Services
from spinetta.store.tls import TlsSource
from spinetta.trust.credentials import EtcdFiles, NodeCredentials
from spinetta.trust.dial import Dialer

log = logging.getLogger("spinetta.node")

IDENTITY_FILE = "identity.json"
PEERS_TELL_S = 5.0  # whether the cluster was made anew: a voter's return must not wait for machines that are off


class Memory:
    """What this node remembers on disk; each change is written before it counts.

    Changes come from the event loop and from threads. Two at once must not undo one another, or a node could forget
    that its member has joined.
    """

    def __init__(self, path: Path, identity: Identity) -> None:
        self._path = path
        self._changing = threading.Lock()
        self._teller = Teller(log)
        self.identity = identity

    def update(self, **changes: Any) -> None:
        """Change some fields.

        Raises:
            UserError: they cannot be written; nothing has changed.
        """
        with self._changing:
            changed = replace(self.identity, **changes)
            if changed != self.identity:
                identities.save(self._path, changed)
                self.identity = changed

    def note_shims(self, *, later: bool) -> None:
        """Whether something is held outside the first shim's directory; see `Identity.shims`."""
        try:
            self.update(shims="later" if later else "")
        except UserError as e:  # a full disk: results may wait for this daemon, which must go on
            said = f"an earlier version of Spinetta must not be started on this data directory now: {e}"
            self._teller.tell(said, logging.WARNING)  # asked every few seconds

    def plan(self, **changes: Any) -> None:
        """Change some fields in memory; they are written with the next change, once the node has found its cluster."""
        with self._changing:
            self.identity = replace(self.identity, **changes)

    def write(self) -> None:
        """Write what has been planned."""
        with self._changing:
            identities.save(self._path, self.identity)

    def forget(self) -> None:
        """The node has left for good: its directory may join any cluster."""
        self._path.unlink(missing_ok=True)


class Entrance:
    """The way in, once found: whom to talk to, the seat, and what an administrator should know."""

    def __init__(self, memory: Memory, seat: OwnSeat, endpoints: Sequence[str], warnings: Sequence[str]) -> None:
        self.memory = memory
        self.seat = seat
        self.endpoints = tuple(endpoints)
        self.warnings = tuple(warnings)

    @property
    def incarnation(self) -> IncarnationId | None:
        """Of this node's latest life, if it ever had one."""
        return IncarnationId(self.memory.identity.incarnation_id) if self.memory.identity.incarnation_id else None


def remembered(settings: Settings, data_dir: Path) -> Identity | None:
    """What this node remembers of itself.

    Raises:
        UserError: the data directory is another node's, or the file is damaged.
    """
    known = identities.load(data_dir / IDENTITY_FILE)
    if known is not None and known.node != settings.name:
        raise UserError(
            f"the data directory {data_dir} belongs to node {known.node}, not {settings.name}",
            field="node.name",
            hint=f"use --name {known.node}, or another --data-dir",
            reason="foreign-data",
        )
    return known


def remembered_any(data_dir: Path) -> Identity | None:
    """What the node of this directory remembers, whatever its name. Raises `UserError`: the file is damaged."""
    return identities.load(data_dir / IDENTITY_FILE)


def note_shims_ended(data_dir: Path) -> None:
    """Nothing may be left outside the first shim's directory, now that no daemon runs and its shims have ended."""
    with contextlib.suppress(UserError, OSError), DirectoryLock(data_dir):  # else a daemon sees to it, or will
        generations.tidy(data_dir / "shim")
        known = remembered_any(data_dir)
        if known is not None and known.shims and not generations.are_scattered(data_dir / "shim"):
            Memory(data_dir / IDENTITY_FILE, known).note_shims(later=False)


async def enter(
    settings: Settings,
    data_dir: Path,
    services: Services,
    known: Identity | None,
    credentials: NodeCredentials | None,
    dialer: Dialer,
) -> Entrance:
    """Find the cluster, and start this node's etcd member if it has or founds one.

    Args:
        known: what the node remembers.
        credentials: in a secured cluster.
        dialer: to its nodes.

    Raises:
        UserError: it cannot be done like this.
    """
    memory = Memory(data_dir / IDENTITY_FILE, known or Identity(node=settings.name))
    worker = credentials is not None and credentials.role is NodeRole.WORKER
    needed = not worker and (settings.candidate or not settings.peers)
    program, version, warnings = await _etcd(settings, needed=needed)
    _choose_ports(settings, memory)
    identity = memory.identity
    files = None if credentials is None else credentials.etcd
    tls = None if files is None else etcd_tls(files)
    scheme = "http" if credentials is None else "https"
    seat = OwnSeat(
        services,
        name=settings.name,
        data_dir=data_dir,
        program=program,
        version=version,
        client_url=f"{scheme}://{settings.host}:{identity.etcd_client_port}",
        peer_url=f"{scheme}://{settings.host}:{identity.etcd_peer_port}",
        identity=lambda: memory.identity,
        update=memory.update,
        quota_bytes=settings.etcd_quota_bytes,
        tls=None if tls is None else lambda: tls,
        before_resuming=None if credentials is None else _reviver(settings, credentials, version),
    )
    if worker:
        await _find_gateways(settings, memory, dialer)
        memory.update(address=settings.address)
        return Entrance(memory, seat, (), warnings)
    await _follow(settings, memory, seat, dialer, None if tls is None else lambda: tls)
    endpoints = await _find_cluster(settings, memory, seat, dialer)
    memory.update(address=settings.address, endpoints=tuple(endpoints))
    return Entrance(memory, seat, endpoints, warnings)


def _reviver(
    settings: Settings, credentials: NodeCredentials, version: Version
) -> Callable[[EtcdSupervisor], Awaitable[None]]:
    """For a voter that was off until its certificates had ended: new ones from its own data, before etcd starts."""

    async def revive_if_needed(supervisor: EtcdSupervisor) -> None:
        if not have_ended(credentials, time.time()):
            return
        await supervisor.stop()  # it may run on under the shim; its data is read

        async def read_own(keys: Sequence[str]) -> Snapshot:
            return await read_offline(supervisor.settings, keys, version=version)

        try:
            await revive(credentials, read_own, settings.address, now_s=time.time())
        except StoreUnavailable as e:
            log.warning("this node's certificates have ended, and new ones cannot be made now: %s", e)

    return revive_if_needed


def etcd_tls(files: EtcdFiles) -> EtcdTls:
    """Where etcd and those who talk to it find their certificates."""
    return EtcdTls(files.ca, files.certificate, files.key)


async def _find_gateways(settings: Settings, memory: Memory, dialer: Dialer) -> None:
    """Voters for a worker to go through: those it knows, or those that its peers tell of."""
    identity = memory.identity
    returning = bool(identity.cluster_id)
    peers = (*settings.peers, *(g for g in identity.gateways if g not in settings.peers))
    if not peers:
        raise UserError("this node does not know where its cluster is", field="node.peers", hint="give --peers")
    try:
        met = await introduce(peers, name=settings.name, returning=returning, wall_ms=wall_ms(), dialer=dialer)
    except UserError as e:
        if not identity.gateways or e.reason != UNREACHABLE:
            raise
        log.warning("no voter answers yet; this worker goes on trying: %s", e)
        return
    memory.update(cluster_id=met.cluster_id, gateways=met.to_remember(identity.gateways))


async def _follow(settings: Settings, memory: Memory, seat: OwnSeat, dialer: Dialer, tls: TlsSource | None) -> None:
    """If the cluster has been made anew elsewhere, from a backup or one voter's data: this node belongs there now."""
    identity = memory.identity

    async def told_by_peers() -> tuple[str, ...]:
        try:
            async with asyncio.timeout(PEERS_TELL_S):
                met = await introduce(
                    settings.peers, name=settings.name, returning=True, wall_ms=wall_ms(), dialer=dialer
                )
        except (UserError, TimeoutError):  # said later, if it matters
            return ()
        return met.client_urls

    others = [url for url in identity.endpoints if url != seat.client_url or not identity.has_joined]
    found = await find_successor(identity, others, tls, told_by_peers if settings.peers else None)
    if found is None:
        return
    log.warning(
        "cluster %s has been made anew as %s; this node goes on there%s",
        identity.cluster_id,
        found.cluster_id,
        ", and its etcd's data is put aside" if identity.has_joined else "",
    )
    await seat.abandon(found.cluster_id)
    memory.update(endpoints=found.endpoints)


async def _find_cluster(settings: Settings, memory: Memory, seat: OwnSeat, dialer: Dialer) -> list[str]:
    identity = memory.identity
    returning = bool(identity.cluster_id)
    if settings.peers and not identity.has_joined:
        met = await introduce(settings.peers, name=settings.name, returning=returning, wall_ms=wall_ms(), dialer=dialer)
        if returning and met.cluster_id != identity.cluster_id:
            raise UserError(
                f"this node's data directory belongs to cluster {identity.cluster_id}, and {met.peer} is of cluster "
                f"{met.cluster_id}",
                field="node.peers",
                hint="give the right --peers, or a --data-dir of its own for the other cluster",
                reason="foreign-data",
            )
        memory.update(cluster_id=met.cluster_id)
        return list(met.client_urls)
    if identity.has_joined:
        try:
            await seat.resume()
        except Fenced:
            log.warning("the member of this node was removed while it was away; it goes on as a worker")
        else:
            others = [u for u in identity.endpoints if u != seat.client_url]
            return [seat.client_url, *others]
    if returning:
        if not identity.endpoints:
            raise UserError("this node does not know where its cluster is", field="node.peers", hint="give --peers")
        return list(identity.endpoints)
    memory.write()  # before etcd has data: a node that does not remember having made it would refuse it
    try:
        await seat.bootstrap()
    except UserError:
        if seat.empty:
            memory.forget()
        raise
    return [seat.client_url]


async def _etcd(settings: Settings, *, needed: bool) -> tuple[str, tuple[int, int, int], tuple[str, ...]]:
    """The program, its version, and warnings about it. A node that can never be a voter may do without."""
    try:
        program = find_etcd(settings.etcd_program)
    except UserError:
        if needed:
            raise
        return settings.etcd_program, (0, 0, 0), ()
    text = await etcd_version(program)
    return program, parse_version(text), check_version(text)


def _choose_ports(settings: Settings, memory: Memory) -> None:
    """Ports stay the same for life once they have been chosen: the other members know them."""
    identity = memory.identity
    wanted = (settings.etcd_client_port, settings.etcd_peer_port)
    if identity.has_joined or (identity.etcd_client_port and 0 in wanted):
        return
    client, peer = (port or free_port(settings.host) for port in wanted)
    memory.plan(etcd_client_port=client, etcd_peer_port=peer)


def free_port(host: str) -> int:
    """A TCP port of this host that nobody listens on now."""
    bare = host.strip("[]")
    with socket.socket(socket.AF_INET6 if ":" in bare else socket.AF_INET) as sock:
        sock.bind((bare, 0))
        return int(sock.getsockname()[1])
