"""What is done about a full etcd at any moment: a backup, and taking the alarm back."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any, cast

import pytest

from spinetta import keys
from spinetta.errors import StoreFull
from spinetta.lineage import BackupRecord, decode_backup
from spinetta.model import Membership
from spinetta.node.etcdcare import EtcdCare
from spinetta.node.health import StoreHealth
from spinetta.node.services.backup import Backups
from spinetta.store.etcd import EtcdStore
from spinetta.txn import Put, Txn
from spinetta.upkeep import NOSPACE, Disarm
from tests.contract.etcds import etcd

pytestmark = pytest.mark.contract
QUOTA_BYTES = 6 << 20


async def fill(store: EtcdStore) -> None:
    for n in range(200):  # its file grows now and then, and is then looked at
        await store.commit(Txn(then=(Put(f"/{n}", os.urandom(500_000)),)))


@contextlib.asynccontextmanager
async def full_etcd() -> AsyncIterator[EtcdStore]:
    async with asyncio.timeout(60), etcd(f"--quota-backend-bytes={QUOTA_BYTES}") as server:
        store = EtcdStore([server.client])
        try:
            with pytest.raises(StoreFull):
                await fill(store)
            yield store
        finally:
            await store.close()


def test_a_backup_can_be_taken_of_it() -> None:
    async def membership() -> Membership:
        return Membership("abc", 0, ())

    async def scenario() -> None:
        async with full_etcd() as store:
            port = SimpleNamespace(store=store, name="n1", membership=membership, wall_ms=lambda: 1)
            asked = SimpleNamespace(caller=SimpleNamespace(guards=(), title="an administrator"), revision=0)
            chunks = [c async for c in Backups(cast("Any", port)).backup(cast("Any", asked))]
            assert sum(len(c.data) for c in chunks) > QUOTA_BYTES // 2
            told = (await store.read([keys.BACKUP])).entries[keys.BACKUP]
            assert told is not None
            assert decode_backup(told.value) == BackupRecord("abc", 1, "an administrator", "n1")

    asyncio.run(scenario())


def test_a_leader_that_has_just_lost_its_seat_takes_the_alarm_back() -> None:
    async def scenario() -> None:
        async with full_etcd() as store:
            health = StoreHealth(store.connections, QUOTA_BYTES, lambda: "abc")
            here = SimpleNamespace(member_id=1, leading=True)  # no member's id any more
            care = EtcdCare(here, here, store, health, pause_s=5.0)
            view = await health.look()
            (raised,) = view.raised(NOSPACE)
            await cast("Any", care)._carry_out(Disarm(raised), view)
            assert not (await health.look()).raised(NOSPACE)

    asyncio.run(scenario())
