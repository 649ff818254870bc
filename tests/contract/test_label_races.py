"""What comes between reading and writing wins: each guard of the keepers of keys, with the race that needs it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence

import pytest

from spinetta import codec, keys, lifecycle, trustcodec, txn
from spinetta.access import LabelKey, SecretRecord
from spinetta.labelkeys import extended
from spinetta.model import Holding, IncarnationId, LeaseId, NodeId, Revision
from spinetta.node.labeldesk import DirectDesk
from spinetta.node.resealing import Resealer
from spinetta.node.vault import wrap_for
from spinetta.store.protocol import Changes, Page, Snapshot, Store
from tests.contract.api_world import Etcd, etcd, etcd_member, run
from tests.contract.sealed_world import Sealed, sealed_world
from tests.contract.test_label_keys import MARK, secret_task

pytestmark = pytest.mark.contract
_ = (etcd, etcd_member)  # fixtures

Meanwhile = Callable[[], Awaitable[object]]


class Interrupted(Store):
    """A store in which something happens just before the first write."""

    def __init__(self, inner: Store, meanwhile: Meanwhile) -> None:
        self._inner = inner
        self._meanwhile: Meanwhile | None = meanwhile

    async def commit(self, txn: txn.Txn, *, timeout_s: float = 5.0) -> txn.Result:
        if self._meanwhile is not None:
            meanwhile, self._meanwhile = self._meanwhile, None
            await meanwhile()
        return await self._inner.commit(txn, timeout_s=timeout_s)

    async def read(self, keys: Sequence[str], *, timeout_s: float = 5.0) -> Snapshot:
        return await self._inner.read(keys, timeout_s=timeout_s)

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
        return await self._inner.list(
            prefix,
            after=after,
            limit=limit,
            keys_only=keys_only,
            newest_first=newest_first,
            revision=revision,
            timeout_s=timeout_s,
        )

    def watch(self, prefix: str, *, start: Revision) -> AsyncGenerator[Changes, None]:
        return self._inner.watch(prefix, start=start)

    async def grant_lease(self, ttl_s: int, *, timeout_s: float = 5.0) -> LeaseId:
        return await self._inner.grant_lease(ttl_s, timeout_s=timeout_s)

    async def keep_alive(self, lease: LeaseId, *, timeout_s: float = 5.0) -> float | None:
        return await self._inner.keep_alive(lease, timeout_s=timeout_s)

    async def revoke_lease(self, lease: LeaseId, *, timeout_s: float = 5.0) -> None:
        await self._inner.revoke_lease(lease, timeout_s=timeout_s)

    async def close(self) -> None:
        """Belongs to another."""


async def replaced(world: Sealed) -> LabelKey:
    """The key of phi has been replaced, and what waits is not sealed anew yet."""
    a = world.parties["a"]
    keeping, a.keeper._resealer = a.keeper._resealer, None
    await world.grant("b")
    await world.settle()
    a.keeper._resealer = keeping
    return await world.key("phi")


def test_a_task_that_is_claimed_meanwhile_stays_claimed(etcd: Etcd) -> None:
    async def scenario() -> None:
        async with sealed_world(etcd) as world:
            a = await world.join("a", "phi")
            await world.join("b", "phi")
            await world.settle()
            spec = secret_task("phi")
            await world.submit(spec)
            key = await replaced(world)

            async def claim() -> None:
                task = lifecycle.claimed(await world.task(spec), NodeId("a"), IncarnationId("i"), now_ms=1)
                held = codec.encode_holding(Holding(1, IncarnationId("i"), 9.0))
                seen = (await world.store.read([keys.queued(spec.id)])).entries[keys.queued(spec.id)]
                assert seen is not None
                body = txn.claim(NodeId("a"), spec.id, seen.modified, codec.encode_task(task), held)
                assert isinstance(await world.store.commit(body), txn.Committed)

            in_use = await Resealer(Interrupted(world.store, claim)).run(key, a.vault.private_of)
            assert in_use == {1}
            assert (await world.store.read([keys.queued(spec.id)])).entries[keys.queued(spec.id)] is None
            task = await world.task(spec)
            assert task.attempts_started == 1
            assert task.spec.sealed is not None
            assert task.spec.sealed.shares[0].generation == 1

    run(scenario())


def test_a_secret_that_is_set_meanwhile_stays_set(etcd: Etcd) -> None:
    async def scenario() -> None:
        async with sealed_world(etcd) as world:
            a = await world.join("a", "phi")
            await world.join("b", "phi")
            await world.settle()
            await world.put_secret("ann", "token", b"old", "phi")
            key = await replaced(world)
            where = keys.secret("ann", "token")
            await Resealer(
                Interrupted(world.store, lambda: world.put_secret("ann", "token", MARK.encode(), "phi"))
            ).run(key, a.vault.private_of)
            entry = (await world.store.read([where])).entries[where]
            assert entry is not None
            secret = trustcodec.decode(SecretRecord, entry.value)
            assert secret.envelope.shares[0].generation == 2
            opened = await a.vault.open_task(secret_task("phi", secrets=(("token", "x"),)))
            assert opened.secrets == (("x", MARK.encode()),)

    run(scenario())


@pytest.mark.parametrize("whose", ["of the one it is handed to", "of the one who hands it", "the record's"])
def test_rights_that_go_meanwhile(etcd: Etcd, whose: str) -> None:
    async def scenario() -> None:
        async with sealed_world(etcd) as world:
            a = await world.join("a", "phi")
            c = await world.join("c")
            await world.settle()
            await world.grant("c", "phi")
            private = a.vault.private_of("phi", 1)
            assert private is not None
            before = await world.key("phi")
            more = extended(before, {1: [wrap_for("phi", 1, private, "c", c.acl.sealing_key)]})

            async def meanwhile() -> None:
                if whose == "of the one it is handed to":
                    await world.grant("c")
                elif whose == "of the one who hands it":
                    await world.grant("a", revoked=True)
                else:
                    await world.store.commit(txn.Txn(then=(txn.Put(keys.label("phi"), trustcodec.encode(before)),)))

            desk = DirectDesk(Interrupted(world.store, meanwhile), NodeId("a"))
            seen = (await desk.states(["phi"]))[0]
            assert not await desk.update(more, seen.revision)
            assert await world.key("phi") == before

    run(scenario())
