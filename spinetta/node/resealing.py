"""After the key of a label has been replaced: what waits is sealed to the new one.

Only the small shares are sealed anew; what they protect is not touched. Each write is guarded by the revisions of what
was read, so that a claim, a cancel or a new version of a secret that comes meanwhile wins.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from dataclasses import replace

from spinetta import codec, keys, payload, trustcodec, txn
from spinetta.access import Envelope, LabelKey, SecretRecord
from spinetta.errors import CorruptRecord, OutcomeUnknown, UserError
from spinetta.model import Task
from spinetta.node.trouble import Teller
from spinetta.store.protocol import KeyValue, Store
from spinetta.trust.envelope import LabelPublicKey, PrivateKeys, reseal

log = logging.getLogger("spinetta.node")

PAGE_KEYS = 64  # with records of up to 400 KB each, and as many single reads
BATCH_MAX = 16  # tasks sealed anew in one transaction, which `txn.leading` bounds in bytes
PAUSE_S = 0.02  # between pages: this is not urgent


class Resealer:
    """Goes through all that waits, for one label at a time."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._teller = Teller(log)

    async def run(self, key: LabelKey, private_of: PrivateKeys) -> set[int]:
        """Seal anew what is sealed to an older generation; the generations that something still refers to.

        Raises:
            StoreUnavailable, OutcomeUnknown: half done; run it again.
        """
        latest = LabelPublicKey(key.label, key.latest.number, key.latest.public_key)
        in_use: set[int] = set()
        for prefix in (keys.QUEUED, keys.BLOCKED):
            async for page in self._pages(prefix):
                in_use |= await self._tasks(page, latest, private_of)
        async for page in self._pages(keys.RUNNING, keys_only=True):
            ids = [found[1] for e in page if (found := keys.find_running(e.key)) is not None]
            for entry in (await self._store.read([keys.task(t) for t in ids])).entries.values():
                task = _task(entry)
                if task is not None and task.spec.sealed is not None:
                    in_use |= _generations(task.spec.sealed, key.label)
        async for page in self._pages(keys.SECRET):
            in_use |= await self._secrets(page, latest, private_of)
        return in_use

    async def _pages(self, prefix: str, *, keys_only: bool = False) -> AsyncIterator[tuple[KeyValue, ...]]:
        after = ""
        while True:
            page = await self._store.list(prefix, after=after, limit=PAGE_KEYS, keys_only=keys_only)
            if page.entries:
                yield page.entries
            if not page.more or not page.entries:
                return
            after = page.entries[-1].key
            await asyncio.sleep(PAUSE_S)

    async def _tasks(self, page: tuple[KeyValue, ...], latest: LabelPublicKey, private_of: PrivateKeys) -> set[int]:
        waiting = {
            keys.task(keys.parse_task(e.key)): e
            for e in page
            if (hint := codec.decode_hint(e.value)) is None or latest.label in hint.clearance
        }
        if not waiting:
            return set()
        in_use: set[int] = set()
        changes: list[txn.Txn] = []
        for key, entry in (await self._store.read(list(waiting))).entries.items():
            task = _task(entry)
            if entry is None or task is None or task.spec.sealed is None:
                continue
            found = _generations(task.spec.sealed, latest.label) - {latest.generation}
            in_use |= found
            if not found:
                continue
            purpose = payload.task_purpose(task.id, task.spec.clearance)
            new = _resealed(task.spec.sealed, latest, purpose, private_of, f"task {task.id}")
            if new is None:
                continue
            record = codec.encode_task(replace(task, spec=replace(task.spec, sealed=new)))
            status = waiting[key]
            changes.append(
                txn.Txn(
                    when=(txn.RevisionIs(status.key, status.modified), txn.RevisionIs(key, entry.modified)),
                    # Both, for a claim takes the record only as it was written together with its queue key.
                    then=(txn.Put(status.key, status.value), txn.Put(key, record)),
                )
            )
        await self._commit(changes)
        return in_use

    async def _secrets(self, page: tuple[KeyValue, ...], latest: LabelPublicKey, private_of: PrivateKeys) -> set[int]:
        in_use: set[int] = set()
        changes: list[txn.Txn] = []
        for entry in page:
            try:
                secret = trustcodec.decode(SecretRecord, entry.value)
            except CorruptRecord as e:
                self._teller.tell(f"{entry.key}: {e}", logging.WARNING)
                continue
            found = _generations(secret.envelope, latest.label) - {latest.generation}
            in_use |= found
            if not found:
                continue
            purpose = payload.secret_purpose(secret.owner, secret.name, secret.labels)
            new = _resealed(secret.envelope, latest, purpose, private_of, f"secret {secret.name} of {secret.owner}")
            if new is not None:
                value = trustcodec.encode(replace(secret, envelope=new))
                changes.append(
                    txn.Txn(when=(txn.RevisionIs(entry.key, entry.modified),), then=(txn.Put(entry.key, value),))
                )
        await self._commit(changes)
        return in_use

    async def _commit(self, changes: list[txn.Txn]) -> None:
        """Each stands for itself; those that lost a race are seen again at the next look."""
        todo = changes
        while todo:
            n = min(txn.leading(todo), BATCH_MAX)
            try:
                await self._store.commit(txn.batch(todo[:n]))
            except OutcomeUnknown as e:
                log.debug("sealing anew: %s", e)  # the next look finds out
            todo = todo[n:]


def _task(entry: KeyValue | None) -> Task | None:
    return codec.readable(codec.decode_task, entry.value) if entry is not None else None


def _generations(envelope: Envelope, label: str) -> set[int]:
    return {s.generation for s in envelope.shares if s.label == label}


def _resealed(
    envelope: Envelope, latest: LabelPublicKey, purpose: bytes, private_of: PrivateKeys, what: str
) -> Envelope | None:
    try:
        return reseal(envelope, latest, purpose, private_of)
    except UserError as e:  # an older key that this node never had, or something that was never sealed right
        log.debug("%s stays as it is: %s", what, e)
        return None
