"""A one-voter cluster made from data: of a backup, or of what one surviving voter has. Nothing of ours runs meanwhile.

The new etcd cluster has another id, so that no member of the old one can ever be part of it, and another generation.
It is served to this process alone while everything older is fenced in it; then it is put in its place, in steps that
may be repeated after a crash.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from uuid import uuid4

from spinetta import codec, keys
from spinetta.config import Settings
from spinetta.errors import CorruptRecord, InvariantViolation, UserError
from spinetta.lineage import (
    BackupRecord,
    Generation,
    decode_backup,
    decode_generation,
    encode_generation,
    successor,
)
from spinetta.model import Life
from spinetta.node.driver import wall_ms
from spinetta.recover import wait_out_s
from spinetta.store import identity as identities
from spinetta.store.etcd import EtcdStore
from spinetta.store.identity import Identity
from spinetta.store.offline import served
from spinetta.store.process import EtcdSettings, Version, initial_cluster
from spinetta.store.snapshot import RestoreTool, SnapshotWriter, fsync_folder, restore, stream
from spinetta.store.wal import wal_owner
from spinetta.store.walend import commit_tail
from spinetta.trust import certificates
from spinetta.txn import Committed, Delete, Put, Txn, Write
from spinetta.units import format_bytes
from spinetta.v1 import record_pb2 as pb

PLAN_FILE = "recovery.json"  # in the data directory: what is to be put in place; there only while that is under way
PLAN_BYTES_MAX = 64 << 10
SERVE_S = 120.0  # until a private etcd answers; the rest of its work has limits of its own
PAGE_KEYS = 4096
WRITES_MAX = 100  # in one transaction: below etcd's 128 operations
SPARE_BYTES = 256 << 20  # etcd's log files, allocated in advance, and some room
COPIES = 3  # of the database, at most at once, while a member's own data is recovered

Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Place:
    """Where the new cluster's one voter is to be.

    Attributes:
        settings: of its node.
        data_dir: of its node.
        client_url, peer_url: of its etcd member.
        version: of its etcd program, which `settings` names.
        tool: makes data of snapshots.
    """

    settings: Settings
    data_dir: Path
    client_url: str
    peer_url: str
    version: Version
    tool: RestoreTool

    def etcd(self, data_dir: Path) -> EtcdSettings:
        """How its member is started."""
        return EtcdSettings(
            program=self.settings.etcd_program,
            name=self.settings.name,
            data_dir=data_dir,
            client_url=self.client_url,
            peer_url=self.peer_url,
            initial_cluster=initial_cluster([(self.settings.name, self.peer_url)]),
            quota_bytes=self.settings.etcd_quota_bytes,
        )


@dataclass(frozen=True, slots=True)
class Survey:
    """What the data holds.

    Attributes:
        cluster: the id of a secured cluster; empty: it is an open one.
        generation, backup: as recorded; None: there is none.
        tasks: by state, in the words of people.
        nodes: whose lives it knows.
        wait_s: how long after the old cluster's end nothing that this data says is waiting, or running, can still
            run anywhere: the longest grace, and what belongs to it.
    """

    cluster: str
    generation: Generation | None
    backup: BackupRecord | None
    tasks: tuple[tuple[str, int], ...]
    nodes: tuple[str, ...]
    wait_s: float


@dataclass(frozen=True, slots=True)
class Made:
    """What has been put in place."""

    cluster_id: str
    member_id: str
    generation: Generation
    put_aside: str  # where the data of before is; empty: there was none


# --- looking and fencing -----------------------------------------------------------------------------------------


async def survey(store: EtcdStore, settings: Settings) -> Survey:
    """Look through the data."""
    entries = (await store.read([keys.GENERATION, keys.BACKUP, keys.authority("cluster")])).entries
    generation, backup, authority = (entries[k] for k in (keys.GENERATION, keys.BACKUP, keys.authority("cluster")))
    lives = await store.list(keys.INCARNATION)
    margin_s = settings.kill_margin_s
    for kv in lives.entries:
        life = codec.readable(codec.decode_incarnation, kv.value)
        margin_s = max(margin_s, life.kill_margin_s if life is not None else 0.0)
    counts = {"waiting": 0, "running": 0, "complete": 0}
    grace_s, cursor = settings.grace_s, ""
    for kv in (await store.list(keys.RUNNING)).entries:  # a task that asks for none has that of its node
        holding = codec.readable(codec.decode_holding, kv.value)
        grace_s = max(grace_s, holding.grace_s if holding is not None else 0.0)
    while True:
        page = await store.list(keys.TASK, after=cursor, limit=PAGE_KEYS)
        for kv in page.entries:
            task = _task(kv.value)
            if task is None:
                continue
            word = {pb.COMPLETE: "complete", pb.RUNNING: "running"}.get(task.state, "waiting")
            counts[word] += 1
            if word != "complete":
                grace_s = max(grace_s, task.spec.grace_s)
        if not page.more:
            break
        cursor = page.entries[-1].key
    return Survey(
        cluster=_cluster_of(authority.value) if authority is not None else "",
        generation=decode_generation(generation.value) if generation is not None else None,
        backup=decode_backup(backup.value) if backup is not None else None,
        tasks=tuple(counts.items()),
        nodes=tuple(kv.key.removeprefix(keys.INCARNATION) for kv in lives.entries),
        wait_s=wait_out_s(grace_s, margin_s, settings.clock_rate_error),
    )


def _task(value: bytes) -> pb.Task | None:
    try:
        return codec.parse(pb.Task(), value, "a task")
    except CorruptRecord:
        return None


def _cluster_of(value: bytes) -> str:
    try:
        message = codec.parse(pb.Authorities(), value, "the authorities")
        return certificates.cluster_of(message.entries[0].certificate_pem) or "secured"
    except (CorruptRecord, UserError, IndexError, ValueError):
        return "secured"


async def fence(store: EtcdStore, generation: Generation, *, nothing_runs: bool) -> None:
    """End everything that the data knows to be alive, and write the generation. May be repeated.

    Every life is condemned, so that no claim, renewal or end of its time commits, and the leader puts back what it
    held: after its wait, or at once if it is certain that nothing runs. Registrations and the leader's office go.
    """
    state = Life.DEAD if nothing_runs else Life.CONDEMNED
    writes: list[Write] = [Put(keys.GENERATION, encode_generation(generation))]
    for kv in (await store.list(keys.INCARNATION)).entries:
        life = codec.readable(codec.decode_incarnation, kv.value)
        if life is not None and life.state is not Life.DEAD:  # one that cannot be read is as good as condemned
            writes.append(Put(kv.key, codec.encode_incarnation(replace(life, state=state))))
    for prefix in (keys.NODE, keys.LEADER, keys.ETCD_RESTART):  # all that hangs on leases
        writes += [Delete(kv.key) for kv in (await store.list(prefix, keys_only=True)).entries]
    for at in range(0, len(writes), WRITES_MAX):
        if not isinstance(await store.commit(Txn(then=tuple(writes[at : at + WRITES_MAX]))), Committed):
            raise InvariantViolation("a write without guards had a conflict")


# --- making --------------------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def workshop(data_dir: Path) -> AsyncIterator[Path]:
    """A directory on the same disk, for its owner alone; gone afterwards, unless a plan needs it.

    Raises:
        UserError: it cannot be made.
    """
    try:
        await asyncio.to_thread(_sweep, data_dir)
        folder = Path(tempfile.mkdtemp(prefix=WORKSHOP_PREFIX, dir=data_dir))
    except OSError as e:
        raise UserError(f"{data_dir} cannot be written: {e.strerror}", field="data_dir", reason="disk") from e
    try:
        yield folder
    finally:
        if not (data_dir / PLAN_FILE).exists():  # else it is needed still: putting in place was cut short
            await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)


WORKSHOP_PREFIX = ".recovery-"


def _sweep(data_dir: Path) -> None:
    """Remove what an earlier attempt that was killed has left. The directory's lock is held."""
    if (data_dir / PLAN_FILE).exists():
        return  # the plan refers to it
    for each in data_dir.glob(f"{WORKSHOP_PREFIX}*"):
        shutil.rmtree(each, ignore_errors=True)


def check_room(data_dir: Path, needed_bytes: int) -> None:
    """See that there is room before anything is begun.

    Raises:
        UserError: there is not.
    """
    free_bytes = shutil.disk_usage(data_dir).free
    if free_bytes < needed_bytes + SPARE_BYTES:
        needed, free = format_bytes(needed_bytes + SPARE_BYTES), format_bytes(free_bytes)
        raise UserError(
            f"{needed} of disk are needed under {data_dir}, {free} are free",
            field="data_dir",
            hint="make room",
            reason="disk",
        )


async def make(place: Place, file: Path, folder: Path) -> Path:
    """Data of a new one-member cluster from a snapshot; the folder that it is in, as ``etcd``."""
    target = folder / "made"
    target.mkdir(mode=0o700)
    token = uuid4().hex
    await restore(place.tool, file, target / "etcd", name=place.settings.name, peer_url=place.peer_url, token=token)
    return target


async def snapshot_of_own(place: Place, folder: Path, tell: Tell) -> Path:
    """A snapshot of this node's own data, with all that its member was ever sent. Its etcd must not run."""
    copy = folder / "copy"
    copy.mkdir(mode=0o700)
    try:
        await asyncio.to_thread(shutil.copytree, place.data_dir / "etcd", copy / "etcd")
        await asyncio.to_thread(commit_tail, copy / "etcd")
    except (OSError, shutil.Error) as e:
        raise UserError(f"etcd's data cannot be copied: {str(e)[:300]}", field="data_dir", reason="disk") from e
    file = folder / "own.snapshot"
    tell("reading this voter's own data")
    async with served(place.etcd(copy / "etcd"), copy, place.version) as store:
        with SnapshotWriter(file) as writer:
            async with contextlib.aclosing(stream(store.connections)) as pieces:
                async for piece in pieces:
                    writer.write(piece.data)
            writer.finish()
    await asyncio.to_thread(shutil.rmtree, copy, ignore_errors=True)
    return file


# --- putting in place ----------------------------------------------------------------------------------------------


def plan(place: Place, made: Path, generation: Generation, *, incarnation_id: str) -> Made:
    """Write down what is to be put in place, so that it can be gone on with after a crash; then do it."""
    owner = wal_owner(made / "etcd")
    if owner is None:
        raise InvariantViolation("the data that was made is not there")
    member_id, cluster_id = owner
    settings = place.settings
    etcd = place.etcd(place.data_dir / "etcd")
    client_port, peer_port = (int(url.rpartition(":")[2]) for url in (place.client_url, place.peer_url))
    identity = Identity(
        node=settings.name,
        cluster_id=cluster_id,
        member_id=member_id,
        has_joined=True,
        initial_cluster=etcd.initial_cluster,
        address=settings.address,
        etcd_client_port=client_port,
        etcd_peer_port=peer_port,
        endpoints=(place.client_url,),
        gateways=(settings.address,) if place.client_url.startswith("https") else (),
        incarnation_id=incarnation_id,
    )
    aside = _aside(place.data_dir)
    document = {
        "format": 1,
        "made": str(made.relative_to(place.data_dir)),
        "aside": aside,
        "cluster_id": cluster_id,
    }
    identities.save(made / "identity.json", identity)
    _write(place.data_dir / PLAN_FILE, json.dumps(document).encode())
    complete(place.data_dir)
    gone = place.data_dir / aside
    return Made(cluster_id, member_id, generation, str(gone) if gone.exists() else "")


def _aside(data_dir: Path) -> str:
    stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime())
    name, n = f"etcd.before-{stamp}", 1
    while (data_dir / name).exists():
        n += 1
        name = f"etcd.before-{stamp}-{n}"
    return name


def complete(data_dir: Path) -> bool:
    """Put in place what has been planned; False: there is no plan. May be repeated after a crash at any point.

    To be called, under the directory's lock, before anything looks at the data.

    Raises:
        UserError: it cannot be done now, or the plan is damaged.
    """
    path = data_dir / PLAN_FILE
    try:
        with path.open("rb") as file:
            document = json.loads(file.read(PLAN_BYTES_MAX))
        made, aside = data_dir / str(document["made"]), data_dir / str(document["aside"])
        cluster_id = str(document["cluster_id"])
    except FileNotFoundError:
        return False
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(
            f"{path} cannot be read: {e}",
            hint="the cluster was being restored or recovered here: remove the file and do that again",
            reason="recovery",
        ) from e
    identity = identities.load(made / "identity.json")
    if identity is None:
        raise UserError(f"{made} is not there", hint=f"remove {path} and restore or recover again", reason="recovery")
    try:
        _put(data_dir, made / "etcd", aside, cluster_id)
        fsync_folder(data_dir)
        identities.save(data_dir / "identity.json", identity)
        path.unlink()
        fsync_folder(data_dir)
        _sweep(data_dir)
    except OSError as e:
        raise UserError(f"{data_dir} cannot be written: {e.strerror}", field="data_dir", reason="disk") from e
    return True


def _put(data_dir: Path, made: Path, aside: Path, cluster_id: str) -> None:
    etcd = data_dir / "etcd"
    owner = wal_owner(etcd)
    if owner is not None and owner[1] == cluster_id:
        return  # a crash came later
    if etcd.exists():
        etcd.rename(aside)
    made.rename(etcd)


def _write(path: Path, data: bytes) -> None:
    temporary = path.with_name(path.name + ".tmp")
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        fsync_folder(path.parent)
    except OSError as e:
        raise UserError(f"{path} cannot be written: {e.strerror}", field="data_dir", reason="disk") from e


def next_generation(found: Survey, cluster_id: str, how: str) -> Generation:
    """What is to be written into the new cluster. `cluster_id`: of etcd's cluster that the data is of."""
    return successor(found.generation, cluster_id, generation_id=uuid4().hex, made_ms=wall_ms(), how=how)
