"""What a hostile worker tries at the gateway, over real TLS and a real etcd: all is refused, and changes nothing."""

from __future__ import annotations

import asyncio
import gc as memory
import os
import random
import time
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any

import grpc
import grpc.aio
import psutil
import pytest

from spinetta import codec, gatewaycodec, keys, txn
from spinetta.access import NodeRole
from spinetta.errors import Denied, InvariantViolation, SpinettaError, StoreUnavailable, UserError
from spinetta.model import LeaseId, NodeId, Revision
from spinetta.node.gateway import service
from spinetta.node.gateway.quota import GatewayLimits
from spinetta.store.protocol import KeyValue
from spinetta.trust import guest
from spinetta.trust.dial import Dialer
from spinetta.txn import Conflict, Delete, Put, RevisionIs, Txn
from spinetta.v1 import gateway_pb2 as pb
from tests import builders, lives
from tests.contract.api_world import eventually
from tests.contract.gateways import Authority, GateWorld
from tests.contract.workers import Follower, Worker, fresh, get, put, run, submit

pytestmark = pytest.mark.contract

T1, T2, T3 = (builders.task_id(n) for n in (1, 2, 3))
EVIL, GOOD = NodeId("evil"), NodeId("good")


class Scene:
    """A hostile and a good worker; 1 is queued, 2 runs at the good one, 3 is labelled."""

    def __init__(self, world: GateWorld, evil: Worker, good: Worker) -> None:
        self.world, self.evil, self.good = world, evil, good

    async def state(self) -> dict[str, KeyValue]:
        page = await self.world.etcd.list("")
        return {entry.key: entry for entry in page.entries}

    async def claim(self, n: int, **changes: Any) -> Txn:
        """As the evil one would make it, knowing all."""
        task = builders.task_id(n)
        queued, record = await get(self.world.etcd, keys.queued(task)), await get(self.world.etcd, keys.task(task))
        part = lives.claim(EVIL, queued, record, **changes)
        return txn.batch([part], (await self.evil.registration()).guards())

    async def registration_of_good(self) -> txn.Registration:
        return await replace(self.good, store=self.world.etcd).registration()


async def scene(world: GateWorld) -> Scene:
    await submit(world, 1, 2, 4)
    await submit(world, 3, clearance=("red",))
    evil, good = await Worker.begin(world, EVIL), await Worker.begin(world, GOOD, effective=("red",))
    assert await good.claim(2) == (True,)
    return Scene(world, evil, good)


async def _claims_uncleared(s: Scene) -> Txn:
    return await s.claim(3)


async def _claims_with_other_spec(s: Scene) -> Txn:
    return await s.claim(1, spec=builders.spec(1, owner="evil"))


async def _claims_for_good(s: Scene) -> Txn:
    queued, record = await get(s.world.etcd, keys.queued(T1)), await get(s.world.etcd, keys.task(T1))
    return txn.batch([lives.claim(GOOD, queued, record)], (await s.evil.registration()).guards())


async def _renews_good(s: Scene) -> Txn:
    return txn.renew(await s.registration_of_good())


async def _advertises_good(s: Scene) -> Txn:
    return txn.advertise(await s.registration_of_good(), s.good.lease, lives.node_value("good", draining=True))


async def _deregisters_good(s: Scene) -> Txn:
    return txn.deregister(await s.registration_of_good())


async def _concedes_good(s: Scene) -> Txn:
    now = await s.registration_of_good()
    return txn.concede(GOOD, now.incarnation_revision, b"", now.acl_revision)


async def _ends_of_good(s: Scene) -> Txn:
    return await replace(s.good, store=s.world.etcd).ends(2)


async def _ends_of_good_under_own_life(s: Scene) -> Txn:
    now = await s.evil.registration()
    theirs = await _ends_of_good(s)
    return replace(theirs, when=txn.finish_guards(EVIL, now.incarnation_revision, now.acl_revision))


async def _takes_key_of_good(s: Scene) -> Txn:
    running = await get(s.world.etcd, keys.running(GOOD, T2))
    return Txn(when=(RevisionIs(running.key, running.modified),), then=(Delete(running.key),))


async def _cancels_for_good(s: Scene) -> Txn:
    running = await get(s.world.etcd, keys.running(GOOD, T2))
    holding = replace(codec.decode_holding(running.value), cancel_requested=True)
    return txn.cancel_running(GOOD, T2, running.modified, codec.encode_holding(holding))


async def _submits(_: Scene) -> Txn:
    return lives.submit(builders.queued(9))


async def _takes_office(s: Scene) -> Txn:
    return txn.take_office(EVIL, s.evil.lease, codec.encode_office(EVIL), (await s.evil.registration()).acl_revision)


async def _nests_deeper(s: Scene) -> Txn:
    claim = await s.claim(1)
    return replace(claim, nested=(replace(claim.nested[0], then=(*claim.nested[0].then, Put("/x"))),))


async def _same_task_twice(s: Scene) -> Txn:
    claim = await s.claim(1)
    return replace(claim, nested=claim.nested * 2)


def _raw(*writes: Put | Delete) -> Callable[[Scene], Coroutine[Any, Any, Txn]]:
    async def make(_: Scene) -> Txn:
        return Txn(then=writes)

    return make


ATTACKS: dict[str, Callable[[Scene], Coroutine[Any, Any, Txn]]] = {
    "claims a task that it is not cleared for": _claims_uncleared,
    "claims a task and makes it its own": _claims_with_other_spec,
    "claims in another's name": _claims_for_good,
    "renews another": _renews_good,
    "describes another": _advertises_good,
    "deregisters another": _deregisters_good,
    "declares another dead": _concedes_good,
    "finishes another's attempt": _ends_of_good,
    "finishes another's attempt under its own life": _ends_of_good_under_own_life,
    "takes away another's task": _takes_key_of_good,
    "asks another to stop a task": _cancels_for_good,
    "submits": _submits,
    "takes the office": _takes_office,
    "writes beside a claim": _nests_deeper,
    "a task twice": _same_task_twice,
    "makes itself a voter": _raw(Put(keys.acl_node(EVIL), b"\x10\x01")),
    "removes another's rights": _raw(Delete(keys.acl_node(GOOD))),
    "makes a user": _raw(Put(keys.acl_user("evil"), b"")),
    "makes a token": _raw(Put(keys.token("x"), b"")),
    "changes the policy": _raw(Put(keys.POLICY, b"")),
    "takes the authorities": _raw(Delete(keys.authority("cluster"))),
    "takes a label's key": _raw(Put(keys.label("red"), b"")),
    "changes a secret": _raw(Put(keys.secret("ann", "db"), b"")),
    "changes the generation": _raw(Put(keys.GENERATION, b"x")),
    "writes any key": _raw(Put("/anything", b"")),
    "deletes a task": _raw(Delete(keys.task(T1)), Delete(keys.queued(T1))),
    "completes a task": _raw(Delete(keys.queued(T1)), Put(keys.complete(T1)), Put(keys.task(T1), b"")),
    "a key that is no text": _raw(Put("\udcff\udcfe", b"")),
    "an empty key": _raw(Put("", b"")),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_hostile_commit_is_denied_and_changes_nothing(attack: str) -> None:
    async def scenario() -> None:
        async with fresh() as world:
            s = await scene(world)
            body = await ATTACKS[attack](s)
            before = await s.state()
            with pytest.raises(Denied):
                await s.evil.store.commit(body)
            assert await s.state() == before
            assert [told[:2] for told in world.gates[0].refused] == [(EVIL, "Commit")]
            # An attacker's daemon is a daemon still: the good things work.
            assert await s.evil.claim(1) == (True,)

    run(scenario())


def test_deeply_nested_and_formless_transactions_are_no_transactions() -> None:
    async def scenario() -> None:
        async with fresh() as world:
            s = await scene(world)
            deep = pb.StoreTxn(nested=[pb.StoreTxn(nested=[pb.StoreTxn()])])
            very_deep = pb.StoreTxn()
            for _ in range(90):
                very_deep = pb.StoreTxn(nested=[very_deep])
            for message in (deep, very_deep, pb.StoreTxn(when=[pb.StoreGuard()]), pb.StoreTxn(then=[pb.StoreWrite()])):
                with pytest.raises(InvariantViolation):
                    await call(s.evil, gatewaycodec.COMMIT, pb.StoreCommitRequest(txn=message))

    run(scenario())


async def call(worker: Worker, method: gatewaycodec.Method, request: Any) -> Any:
    return await worker.store._links.call(method, request, timeout_s=5.0)  # type: ignore[attr-defined]


def test_ranges_that_a_worker_may_not_list_or_watch() -> None:
    async def scenario() -> None:
        async with fresh() as world:
            s = await scene(world)
            start = Revision((await world.etcd.read([])).revision + 1)
            for prefix in (
                "",
                "/",
                keys.TASK,
                keys.task(T1),
                "/status/",
                keys.RUNNING,
                keys.running_on(GOOD),
                keys.COMPLETE,
                keys.BLOCKED,
                keys.BEAT,
                keys.ACL,
                keys.ACL_NODE,
                keys.ACL_USER,
                keys.TOKEN,
                keys.SECRET,
                keys.AUTHORITY,
                keys.LABEL,
                "/nod",
                keys.queued(T1),
                "/status/running/evi",
                "\udcff",
            ):
                with pytest.raises(Denied):
                    await s.evil.store.list(prefix)
                follower = await Follower(s.evil.store, prefix, start).stands()
                assert isinstance(follower.error, Denied), prefix
            for bad in (0, -1):
                with pytest.raises(UserError):
                    await anext(s.evil.store.watch(keys.NODE, start=Revision(bad)))
            with pytest.raises(Denied):
                await anext(s.evil.store.watch(keys.INCARNATION, start=start))
            with pytest.raises(UserError):
                await call(s.evil, gatewaycodec.LIST, pb.StoreListRequest(prefix=b"/node/", limit=-1))

    run(scenario())


def test_guards_are_no_oracle() -> None:
    async def scenario() -> None:
        async with fresh() as world:
            s = await scene(world)
            await put(world.etcd, keys.secret("ann", "db"), b"x")
            now = await s.evil.registration()
            for more in (
                txn.Absent(keys.secret("ann", "db")),
                txn.NoneUnder("/secret/ann/"),
                txn.CreatedAt(keys.task(T3), now.since),
                RevisionIs(keys.running(GOOD, T2), now.since),
            ):
                for body in (Txn(when=(more,)), replace(txn.renew(now), when=(*now.guards(), more))):
                    with pytest.raises(Denied):
                        await s.evil.store.commit(body)

    run(scenario())


def test_leases_of_others_and_too_many_of_ones_own() -> None:
    async def scenario() -> None:
        async with fresh() as world:
            s = await scene(world)
            now = await s.evil.registration()
            theirs = txn.advertise(now, s.good.lease, lives.node_value("evil"))
            assert isinstance(await s.evil.store.commit(theirs), Conflict)
            assert await s.evil.store.keep_alive(s.good.lease) is None
            await s.evil.store.revoke_lease(s.good.lease)
            assert await world.etcd.keep_alive(s.good.lease) == 60.0
            for ttl_s in (0, -5, 301, 1 << 40):
                with pytest.raises(UserError, match="a lease lasts"):
                    await s.evil.store.grant_lease(ttl_s)
            for lease in (LeaseId(0), LeaseId(-1), LeaseId((1 << 63) - 1)):
                assert await s.evil.store.keep_alive(lease) is None
            for _ in range(7):
                await s.evil.store.grant_lease(60)
            with pytest.raises(StoreUnavailable, match="8 leases"):
                await s.evil.store.grant_lease(60)
            await s.good.store.grant_lease(60)

    run(scenario())


def test_an_oversized_request_is_refused_with_its_reason() -> None:
    async def scenario() -> None:
        async with fresh() as world:
            s = await scene(world)
            huge = Txn(then=(Put("/x", bytes(1_700_000)),))
            with pytest.raises(UserError, match="larger than"):
                await s.evil.store.commit(huge)
            dialer = world.authority.dialer(EVIL, NodeRole.WORKER)
            request = pb.StoreCommitRequest(txn=gatewaycodec.txn_to_pb(huge))
            # A client that does not look first: our limit, then the server's.
            for size, code in (
                (1_700_000, grpc.StatusCode.INVALID_ARGUMENT),
                (8 << 20, grpc.StatusCode.RESOURCE_EXHAUSTED),
            ):
                request.txn.then[0].put.value = bytes(size)
                assert await raw(dialer, world.gates[0].address, "Commit", request.SerializeToString()) is code

    run(scenario())


async def raw(dialer: Dialer, address: str, method: str, data: bytes, timeout_s: float = 5.0) -> grpc.StatusCode:
    """Any bytes to any method."""
    async with dialer.channel(address, "voter") as channel:
        path = f"/{gatewaycodec.SERVICE}/{method}"
        if method == "Watch":
            call = channel.unary_stream(path, _as_is, _as_is)(data, timeout=timeout_s)
            try:
                await call.read()
            except grpc.aio.AioRpcError as error:
                return error.code()
            call.cancel()
            return grpc.StatusCode.OK
        try:
            await channel.unary_unary(path, _as_is, _as_is)(data, timeout=timeout_s)
        except grpc.aio.AioRpcError as error:
            return error.code()
        return grpc.StatusCode.OK


def _as_is(data: bytes) -> bytes:
    return data


def test_who_is_no_node_of_this_cluster_gets_nothing() -> None:
    async def scenario() -> None:
        async with fresh() as world:
            s = await scene(world)
            address = world.gates[0].address
            key, certificate = guest.guest_pair()
            own, other = world.authority, Authority()
            strangers = {
                "guest": Dialer.secured(lambda: (own.pem, certificate, key)),
                "unknown node": own.dialer("nobody", NodeRole.WORKER),
                "calls itself a voter": own.dialer("nobody2", NodeRole.VOTER),
            }
            request = pb.StoreReadRequest(keys=[b"/generation"]).SerializeToString()
            for name, dialer in strangers.items():
                expected = grpc.StatusCode.UNAUTHENTICATED if name == "guest" else grpc.StatusCode.PERMISSION_DENIED
                for method in ("Read", "Commit", "List", "Watch", "GrantLease", "KeepAlive", "RevokeLease", "Members"):
                    data = request if method == "Read" else b""
                    assert await raw(dialer, address, method, data) is expected, (name, method)
            foreign = other.node(EVIL, NodeRole.WORKER)
            dialer = Dialer.secured(lambda: (own.pem, foreign[1], foreign[2]))
            assert await raw(dialer, address, "Read", request) is grpc.StatusCode.UNAVAILABLE  # the handshake fails
            assert (await s.evil.store.read([keys.GENERATION])).entries[keys.GENERATION] is not None

    run(scenario())


LIMITS = GatewayLimits(
    calls_per_s=20, calls_burst=60, bytes_per_s=50_000, bytes_burst=3_000_000, calls_max=4, watches_max=3
)


def test_too_many_calls_watches_and_bytes_are_refused_and_others_do_not_suffer() -> None:
    async def scenario() -> None:
        async with fresh(limits=LIMITS) as world:
            s = await scene(world)
            start = (await world.etcd.read([])).revision + 1
            followers = [await Follower(s.evil.store, keys.NODE, start).stands() for _ in range(5)]
            assert [f.error is None for f in followers] == [True] * 3 + [False] * 2
            assert all("watches open" in str(f.error) for f in followers[3:])
            answers: list[str] = []
            began_s = time.monotonic()

            async def ask(worker: Worker) -> None:
                try:
                    await worker.store.read([keys.GENERATION])
                    answers.append("")
                except StoreUnavailable as error:
                    answers.append(str(error))

            await asyncio.gather(*(ask(s.evil) for _ in range(200)))
            assert any("calls a second" in a or "under way" in a for a in answers)
            assert sum(not a for a in answers) <= 60 + 20 * (time.monotonic() - began_s)
            answers.clear()
            await ask(s.good)
            assert answers == [""]
            await eventually(lambda: _is_served(s.evil), within_s=40)
            await asyncio.gather(*(f.stop() for f in followers))
            await eventually(lambda: world.gates[0].service.quota.watching == 0)

    run(scenario())


async def _is_served(worker: Worker) -> bool:
    try:
        await worker.store.read([keys.GENERATION])
    except StoreUnavailable:
        return False
    return True


def test_a_hostile_worker_does_not_fill_the_logs(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        async with fresh() as world:
            s = await scene(world)

            async def attack(count: int) -> None:
                for _ in range(count):
                    with pytest.raises(Denied):
                        await s.evil.store.commit(Txn(then=(Put("/x"),)))

            await attack(50)
            told = world.gates[0].refused
            assert len(told) == service.REFUSALS_TOLD
            monkeypatch.setattr(service, "REFUSALS_EVERY_S", 0.0)
            await attack(1)
            assert len(told) == service.REFUSALS_TOLD + 1
            assert "20 more" in told[-1][2]

    run(scenario())


def test_too_many_bytes() -> None:
    async def scenario() -> None:
        async with fresh(limits=LIMITS) as world:
            s = await scene(world)
            body = Txn(then=(Put("/x", bytes(1_400_000)),))
            for _ in range(3):
                with pytest.raises(Denied):
                    await s.evil.store.commit(body)
            with pytest.raises(StoreUnavailable, match="bytes a second"):
                await s.evil.store.commit(body)
            assert await s.good.claim(1) == (True,)

    run(scenario())


def test_streams_that_are_opened_and_left_by_the_hundred_leave_nothing() -> None:
    async def scenario() -> None:
        async with fresh() as world:
            s = await scene(world)
            start = Revision((await world.etcd.read([])).revision + 1)
            gateway = world.gates[0].service

            async def open_and_leave() -> None:
                follower = await Follower(s.evil.store, keys.QUEUED, start).stands()
                await follower.stop()

            for _ in range(30):
                await asyncio.gather(*(open_and_leave() for _ in range(10)))
            await eventually(lambda: gateway.quota.watching == 0)
            assert not gateway.fanout._feeds[keys.QUEUED].listeners

    run(scenario())


METHODS = ("Commit", "Read", "List", "Watch", "GrantLease", "KeepAlive", "RevokeLease", "Members", "Nothing")
CLEAR = {
    grpc.StatusCode.OK,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.OUT_OF_RANGE,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.UNIMPLEMENTED,
}


def requests(rng: random.Random, good: list[bytes]) -> bytes:
    """Noise, a request with a few bytes changed, or two run together."""
    match rng.randrange(4):
        case 0:
            return rng.randbytes(rng.choice((0, 1, 5, 50, 500, 5000)))
        case 1:
            return rng.choice(good) + rng.choice(good)
        case _:
            data = bytearray(rng.choice(good))
            for _ in range(rng.randrange(1, 6)):
                if data:
                    data[rng.randrange(len(data))] = rng.randrange(256)
            return bytes(data[: rng.randrange(len(data) + 1)]) if rng.random() < 0.3 else bytes(data)


@pytest.mark.parametrize("seed", range(3))
def test_any_bytes_at_any_call_have_a_clear_answer_and_change_nothing_that_is_not_ones_own(seed: int) -> None:
    rng = random.Random(seed)

    async def scenario() -> None:
        async with fresh(limits=replace(GatewayLimits(), calls_burst=1e9, bytes_burst=1e12)) as world:
            s = await scene(world)
            before = await s.state()
            now = await s.evil.registration()
            bodies = [await s.claim(1), txn.renew(now), await _ends_of_good(s), await s.claim(3), txn.deregister(now)]
            good = [
                *(pb.StoreCommitRequest(txn=gatewaycodec.txn_to_pb(body)).SerializeToString() for body in bodies),
                pb.StoreReadRequest(keys=[b"/node/good", b"/task/x"]).SerializeToString(),
                pb.StoreListRequest(prefix=b"/node/", limit=3).SerializeToString(),
                pb.StoreWatchRequest(prefix=b"/node/", start=5).SerializeToString(),
                pb.StoreKeepAliveRequest(lease=s.good.lease).SerializeToString(),
            ]
            dialer = world.authority.dialer(EVIL, NodeRole.WORKER)
            process = psutil.Process(os.getpid())

            async def storm(count: int) -> None:
                async with dialer.channel(world.gates[0].address, "voter") as channel:
                    for _ in range(count):
                        code = await one(channel, rng.choice(METHODS), requests(rng, good))
                        assert code in CLEAR, code

            await storm(300)
            memory.collect()
            began_bytes = process.memory_info().rss
            await asyncio.gather(*(storm(150) for _ in range(8)))
            memory.collect()
            assert process.memory_info().rss - began_bytes < 24 << 20
            mine = {
                keys.node(EVIL),
                keys.incarnation(EVIL),
                keys.beat(EVIL),
                keys.running(EVIL, T1),
                keys.queued(T1),
                keys.task(T1),
            }
            after = await s.state()
            assert {k: v for k, v in after.items() if k not in mine} == {
                k: v for k, v in before.items() if k not in mine
            }
            assert world.gates[0].service.quota.watching == 0
            assert await s.good.end(2) == (True,)

    run(scenario())


async def one(channel: grpc.aio.Channel, method: str, data: bytes) -> grpc.StatusCode:
    path = f"/{gatewaycodec.SERVICE}/{method}"
    try:
        if method == "Watch":
            call = channel.unary_stream(path, _as_is, _as_is)(data, timeout=5)
            await call.read()
            call.cancel()
            await call.code()
        else:
            await channel.unary_unary(path, _as_is, _as_is)(data, timeout=5)
    except grpc.aio.AioRpcError as error:
        return error.code()
    except asyncio.CancelledError:
        pass
    return grpc.StatusCode.OK


def test_an_error_of_ours_leaves_the_outcome_open_and_tells_nothing() -> None:
    async def scenario() -> None:
        async with fresh() as world:
            s = await scene(world)

            async def broken(_: Any) -> Any:
                raise RuntimeError("a secret path")

            world.gates[0].service._who = broken
            with pytest.raises(SpinettaError) as caught:
                await s.evil.store.commit(txn.renew(await replace(s.evil, store=world.etcd).registration()))
            assert type(caught.value).__name__ == "OutcomeUnknown"
            assert "secret" not in str(caught.value)

    run(scenario())
