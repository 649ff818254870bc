"""`Store` over the model of etcd, in one process and in real time: for tests of what runs on a store."""

# ruff: noqa: ARG002 - a model answers at once: `timeout_s` is there because the protocol has it

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence

from spinetta.errors import InvariantViolation, StoreUnavailable
from spinetta.model import LeaseId, Revision
from spinetta.store.protocol import READ_KEYS_MAX, Changes, Page, Snapshot
from spinetta.txn import Result, Txn
from tests.sim.etcd_model import EtcdModel


class ModelStore:
    """A client of a model. Several of them may share one model; each sees what the others do."""

    def __init__(self, model: EtcdModel | None = None) -> None:
        self.model = model or EtcdModel()
        self._closed = False

    def _turn(self) -> EtcdModel:
        if self._closed:
            raise StoreUnavailable("this store has been closed")
        self.model.advance(asyncio.get_running_loop().time())
        return self.model

    async def commit(self, txn: Txn, *, timeout_s: float = 5.0) -> Result:
        return self._turn().commit(txn)

    async def read(self, keys: Sequence[str], *, timeout_s: float = 5.0) -> Snapshot:
        if len(set(keys)) > READ_KEYS_MAX:
            raise InvariantViolation(f"{len(keys)} keys in one read: at most {READ_KEYS_MAX}")
        return self._turn().read(keys)

    async def list(
        self,
        prefix: str,
        *,
        after: str = "",
        limit: int = 0,
        keys_only: bool = False,
        newest_first: bool = False,
        revision: Revision = Revision(0),
        timeout_s: float = 5.0,
    ) -> Page:
        return self._turn().list(
            prefix, after=after, limit=limit, keys_only=keys_only, newest_first=newest_first, revision=revision
        )

    async def watch(self, prefix: str, *, start: Revision) -> AsyncGenerator[Changes, None]:
        model = self._turn()
        if not start:
            start = Revision(model.revision + 1)
        model.events_since(start)
        yield Changes(Revision(start - 1), ())
        while True:
            for changes in self._turn().events_since(start, prefix):
                start = Revision(changes.revision + 1)
                yield changes
            await asyncio.sleep(0.005)  # a poll: the model has no wakeups, and other clients may change it

    async def grant_lease(self, ttl_s: int, *, timeout_s: float = 5.0) -> LeaseId:
        return self._turn().grant_lease(ttl_s)

    async def keep_alive(self, lease: LeaseId, *, timeout_s: float = 5.0) -> float | None:
        return self._turn().keep_alive(lease)

    async def revoke_lease(self, lease: LeaseId, *, timeout_s: float = 5.0) -> None:
        self._turn().revoke_lease(lease)

    async def compact(self, revision: Revision, *, timeout_s: float = 5.0) -> None:
        if revision > self.model.compacted:
            self._turn().compact(revision)

    async def close(self) -> None:
        self._closed = True
