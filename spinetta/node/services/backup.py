"""Backups: all of the store, streamed from the member that this node talks to."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing

from spinetta import keys
from spinetta.errors import AskElsewhere, Busy
from spinetta.lineage import BackupRecord, encode_backup
from spinetta.node.port import NodePort
from spinetta.node.services.access import committed, settle
from spinetta.node.services.desk import Asked
from spinetta.store.etcd import EtcdStore
from spinetta.store.snapshot import stream
from spinetta.txn import Put, Txn
from spinetta.v1 import api_pb2 as api

BACKUPS_MAX = 2  # at once on one node: each reads the whole database
CHUNK_BYTES = 256 << 10  # etcd sends 32 KiB; fewer messages cost less


class Backups:
    """The call `Backup`."""

    def __init__(self, port: NodePort) -> None:
        self._port = port
        self._running = 0

    async def backup(self, asked: Asked) -> AsyncIterator[api.BackupChunk]:
        """The snapshot in pieces; the last one ends with its hash.

        Raises:
            AskElsewhere: this node does not reach etcd itself.
            Busy: others are being taken.
            StoreUnavailable: etcd does not answer, or has no majority. What came before is worth nothing.
        """
        store = self._port.store
        if not isinstance(store, EtcdStore):
            raise AskElsewhere("this node has no way to etcd", addresses=self._port.voter_addresses())
        if self._running >= BACKUPS_MAX:
            raise Busy(f"{self._running} backups are being taken of this node", retry_after_s=10.0)
        self._running += 1
        try:
            cluster_id = await self._write_down(asked)
            chunk = api.BackupChunk(node=self._port.name, cluster_id=cluster_id)
            held = bytearray()
            async with aclosing(stream(store.connections)) as pieces:
                async for piece in pieces:
                    held += piece.data
                    if len(held) < CHUNK_BYTES:
                        continue
                    chunk.data, chunk.remaining_bytes = bytes(held), piece.remaining_bytes
                    held.clear()
                    yield chunk
                    chunk = api.BackupChunk()
            chunk.data, chunk.remaining_bytes = bytes(held), 0
            yield chunk
        finally:
            self._running -= 1

    async def _write_down(self, asked: Asked) -> str:
        """Into the store, so that the backup says itself of which cluster it is, and when it was taken."""
        cluster_id = (await self._port.membership()).cluster_id
        record = BackupRecord(cluster_id, self._port.wall_ms(), asked.caller.title, self._port.name)

        async def attempt() -> str | None:
            # Nested, because a store that is full refuses plain puts, and then a backup is wanted most.
            put = Txn(then=(Put(keys.BACKUP, encode_backup(record)),))
            txn = Txn(when=asked.caller.guards, nested=(put,))
            if await committed(self._port.store, txn, asked):
                return cluster_id
            await asked.again()  # it is the caller's rights that have changed
            return None

        return await settle(attempt)
