"""``spinetta cluster restore`` and ``recover``, from the first check to the last: what they share is in `recovery`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from spinetta import names, units
from spinetta.access import NodeRole
from spinetta.config import Settings
from spinetta.errors import StoreUnavailable, UserError
from spinetta.node import recovery
from spinetta.node.entry import etcd_tls, free_port
from spinetta.node.recovery import Made, Place, Survey, Tell
from spinetta.runtime.generations import living
from spinetta.runtime.process import ProcessRuntime
from spinetta.store.identity import Identity, check_data_dir
from spinetta.store.members import status
from spinetta.store.offline import served
from spinetta.store.process import EtcdTls, etcd_version, find_etcd, parse_version
from spinetta.store.snapshot import find_tool, verify
from spinetta.store.supervisor import SERVICE, EtcdSupervisor, check_free
from spinetta.store.wal import wal_owner
from spinetta.trust.credentials import NodeCredentials

TOLD_EVERY_S = 10.0
ASK_S = 2.0

Confirm = Callable[[str], None]
"""Asks for the id of a cluster to be typed, or raises. Empty: the data does not say of which cluster it is."""


async def _place(settings: Settings, data_dir: Path, secured: bool, client_port: int, peer_port: int) -> Place:
    program = find_etcd(settings.etcd_program)
    version = parse_version(await etcd_version(program))
    scheme = "https" if secured else "http"
    if not secured:
        names.require_loopback(settings.address, "address")
    return Place(
        settings=settings,
        data_dir=data_dir,
        client_url=f"{scheme}://{settings.host}:{client_port}",
        peer_url=f"{scheme}://{settings.host}:{peer_port}",
        version=version,
        tool=await find_tool(program, version),
    )


async def _complete_earlier(data_dir: Path) -> None:
    """See that nothing here is half in place: that would be taken for data that was never there, or is damaged.

    Raises:
        UserError: something was, and has been put in place now; or it cannot be.
    """
    if await asyncio.to_thread(recovery.complete, data_dir):
        raise UserError(
            f"a restore or recovery of {data_dir} that was cut short has been completed now",
            field="data_dir",
            hint=f"start its node: spinetta node join --data-dir {data_dir}",
            reason="completed",
        )


# --- recover -------------------------------------------------------------------------------------------------------


async def recover(
    settings: Settings, data_dir: Path, known: Identity | None, *, confirm: Confirm, tell: Tell, nothing_runs: bool
) -> Made:
    """Make a one-voter cluster of what this voter has. Under the directory's lock.

    Args:
        known: what the node remembers.
        nothing_runs: an administrator vouches that no task of the time before runs anywhere.

    Raises:
        UserError: this node is no voter, its data is not there, or the cluster is not lost.
        StoreUnavailable: the data is not served.
    """
    await _complete_earlier(data_dir)
    if known is None or not known.has_joined or wal_owner(data_dir / "etcd") is None:
        raise UserError(
            f"there is no voter's data in {data_dir}",
            field="data_dir",
            hint="run this on the machine of a voter; without any voter's data: spinetta cluster restore",
            reason="no-data",
        )
    check_data_dir(known, data_dir / "etcd")
    credentials = await asyncio.to_thread(NodeCredentials.load, data_dir / "trust")
    place = await _place(settings, data_dir, credentials is not None, known.etcd_client_port, known.etcd_peer_port)
    tls = etcd_tls(credentials.etcd) if credentials is not None and credentials.etcd is not None else None
    await check_lost(known, place.client_url, tls)
    lost_s = time.monotonic()
    confirm(known.cluster_id)
    await _stop_own_etcd(place, data_dir, tls)
    for url in (place.client_url, place.peer_url):
        check_free(url)  # an etcd that its shim has lost would write on while its data is read
    size = await asyncio.to_thread(_size, data_dir / "etcd")
    await asyncio.to_thread(recovery.check_room, data_dir, recovery.COPIES * size)
    async with recovery.workshop(data_dir) as folder:
        file = await recovery.snapshot_of_own(place, folder, tell)
        made = await recovery.make(place, file, folder)
        file.unlink()
        async with served(place.etcd(made / "etcd"), made, place.version, alone=False) as store:
            found = await recovery.survey(store, settings)
            generation = recovery.next_generation(found, known.cluster_id, "recover")
            await recovery.fence(store, generation, nothing_runs=nothing_runs)
        tell(_said(found))
        await _wait_out(found, lost_s, tell, nothing_runs=nothing_runs)
        return recovery.plan(place, made, generation, incarnation_id=known.incarnation_id)


async def check_lost(known: Identity, own_url: str, tls: EtcdTls | None) -> None:
    """See that no voter that can be reached has a majority.

    Raises:
        UserError: one has.
    """
    source = (lambda: tls) if tls is not None else None

    async def look(url: str) -> None:
        try:
            found = await status(url, source, timeout_s=ASK_S)
        except StoreUnavailable:
            return
        if not found.healthy:
            return
        if found.cluster_id != known.cluster_id:
            raise UserError(
                f"etcd at {url} is of another cluster, {found.cluster_id}: this one may have been recovered there",
                hint="start this node as usual: it finds out, puts its data aside and joins that one",
                reason="recovered-elsewhere",
            )
        raise UserError(
            f"etcd at {url} has a majority: the cluster is not lost",
            hint="start this node as usual; voters that are gone are replaced by the cluster itself",
            reason="not-lost",
        )

    for url in dict.fromkeys((own_url, *known.endpoints)):
        await look(url)


async def _stop_own_etcd(place: Place, data_dir: Path, tls: EtcdTls | None) -> None:
    """The shim may keep it running, with tasks, when the daemon has ended; the tasks go on."""
    for folder in await living(data_dir / "shim"):
        async with ProcessRuntime.connect(folder, node="", kill_margin_s=0) as runtime:
            found = await runtime.service(SERVICE)
            if found is not None and found.exit is None:
                settings = replace(place.etcd(data_dir / "etcd"), tls=tls)
                await EtcdSupervisor(runtime, settings, log_path=(data_dir / "etcd.log").absolute()).stop()


def _size(folder: Path) -> int:
    return sum(each.stat().st_size for each in folder.rglob("*") if each.is_file())


# --- restore -------------------------------------------------------------------------------------------------------


async def restore(
    settings: Settings, data_dir: Path, file: Path, *, confirm: Confirm, tell: Tell, nothing_runs: bool
) -> Made:
    """Make a one-voter cluster of a backup. Under the directory's lock.

    In a secured cluster the data directory must hold the ``trust/`` of one of its voters, and nothing else.

    Raises:
        UserError: the file is not whole, something is there already, or the backup is of another kind of cluster.
        StoreUnavailable: the data is not served.
    """
    started_s = time.monotonic()
    await _complete_earlier(data_dir)
    await _check_empty(data_dir)
    credentials = await asyncio.to_thread(NodeCredentials.load, data_dir / "trust")
    ports = [p or free_port(settings.host) for p in (settings.etcd_client_port, settings.etcd_peer_port)]
    place = await _place(settings, data_dir, credentials is not None, ports[0], ports[1])
    for url in (place.client_url, place.peer_url):
        check_free(url)
    tell(f"checking {file}")
    whole = await asyncio.to_thread(verify, file)
    await asyncio.to_thread(recovery.check_room, data_dir, 2 * whole.file_bytes)
    async with recovery.workshop(data_dir) as folder:
        made = await recovery.make(place, file, folder)
        async with served(place.etcd(made / "etcd"), made, place.version, alone=False) as store:
            found = await recovery.survey(store, settings)
            _check_trust(found, credentials, settings.name, data_dir)
            tell(_said(found))
            former = found.backup.cluster_id if found.backup is not None else ""
            confirm(former)
            generation = recovery.next_generation(found, former, "restore")
            await recovery.fence(store, generation, nothing_runs=nothing_runs)
        await _wait_out(found, started_s, tell, nothing_runs=nothing_runs)
        return recovery.plan(place, made, generation, incarnation_id="")


async def _check_empty(data_dir: Path) -> None:
    there = next((n for n in ("identity.json", "etcd", "shim") if (data_dir / n).exists()), None)
    if there is None:
        return
    raise UserError(
        f"{data_dir / there} is there: this is the directory of a node",
        field="data_dir",
        hint="stop that node (spinetta node stop) and move its directory away, or name another --data-dir. In a "
        "secured cluster put the trust/ of a voter into it",
        reason="data-there",
    )


def _check_trust(found: Survey, credentials: NodeCredentials | None, name: str, data_dir: Path) -> None:
    trust = data_dir / "trust"
    if not found.cluster:
        if credentials is not None:
            raise UserError(f"the backup is of an open cluster, but there is {trust}", field="data_dir")
        return
    if credentials is None:
        raise UserError(
            f"the backup is of the secured cluster {found.cluster}, and opens nothing without a voter's keys",
            field="data_dir",
            hint=f"copy the trust/ of one of its voters to {trust}, and use that voter's --name",
            reason="no-trust",
        )
    if credentials.role is not NodeRole.VOTER or credentials.name != name or credentials.cluster != found.cluster:
        raise UserError(
            f"the credentials in {trust} are of {credentials.role.name.lower()} {credentials.name} of cluster "
            f"{credentials.cluster}; wanted are those of a voter named {name} of cluster {found.cluster}",
            field="data_dir",
            hint="use that node's --name, or the trust/ of a voter of this cluster",
            reason="other-cluster",
        )


# --- both ----------------------------------------------------------------------------------------------------------


def _said(found: Survey) -> str:
    counts = ", ".join(f"{number} {word}" for word, number in found.tasks)
    taken = ""
    if found.backup is not None and found.backup.taken_ms:
        moment = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(found.backup.taken_ms / 1000))
        taken = f"; its latest backup was taken at {moment} UTC"
    return f"the data holds {counts} tasks and knows of {len(found.nodes)} nodes{taken}"


async def _wait_out(found: Survey, since_s: float, tell: Tell, *, nothing_runs: bool) -> None:
    """Let pass what tasks of the time before may go on without renewals. `since_s`: since when there are none."""
    if nothing_runs:
        return
    while (left_s := since_s + found.wait_s - time.monotonic()) > 0:
        tell(
            f"waiting {units.format_duration(round(left_s))} more: until then tasks of before may still run somewhere "
            "(--nothing-runs: they do not)"
        )
        await asyncio.sleep(min(TOLD_EVERY_S, left_s))
