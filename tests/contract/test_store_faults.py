"""What the store says while etcd is killed, stopped, cut off, full or gone. Real etcd only; each test has its own."""

# ruff: noqa: SIM117 - a server, then what is done to it

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import time
from collections.abc import AsyncIterator, Coroutine
from typing import Any

import grpc
import pytest

from spinetta.errors import OutcomeUnknown, StoreUnavailable
from spinetta.model import LeaseId, Revision
from spinetta.store import connection, watch, wire
from spinetta.store.etcd import EtcdStore
from spinetta.store.failures import GONE
from spinetta.store.protocol import Change
from spinetta.store.watch import Reassembly
from spinetta.txn import Absent, Committed, Conflict, Put, Txn
from tests.contract.api_world import eventually
from tests.contract.etcds import etcd, free_port, loopback_host

pytestmark = pytest.mark.contract

WRITE = Txn(then=(Put("/a", b"1"),))
Code = grpc.StatusCode


def run(scenario: Coroutine[Any, Any, None]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(90):
            await scenario

    asyncio.run(limited())


@contextlib.asynccontextmanager
async def store_of(*endpoints: str) -> AsyncIterator[EtcdStore]:
    store = EtcdStore(endpoints)
    try:
        yield store
    finally:
        await store.close()


async def until_committed(store: EtcdStore, limit_s: float) -> float:
    """Seconds until a write succeeds again."""
    start_s = time.monotonic()
    while True:
        try:
            assert isinstance(await store.commit(WRITE, timeout_s=1.0), Committed)
            return time.monotonic() - start_s
        except (StoreUnavailable, OutcomeUnknown):
            assert time.monotonic() - start_s < limit_s
            await asyncio.sleep(0.05)


# --- nobody there ------------------------------------------------------------------------------------------------


def test_nothing_listens() -> None:
    async def scenario() -> None:
        host = loopback_host()
        async with store_of(f"{host}:{free_port(host)}", f"{host}:{free_port(host)}") as store:
            for work in (
                store.commit(WRITE),
                store.read(["/a"]),
                store.list("/"),
                store.grant_lease(5),
                store.keep_alive(LeaseId(1)),
                store.revoke_lease(LeaseId(1)),
                anext(store.watch("/", start=Revision(1))),
            ):
                start_s = time.monotonic()
                with pytest.raises(StoreUnavailable):
                    await work
                assert time.monotonic() - start_s < 4.0  # of the 5 s that each has

    run(scenario())


def test_something_else_listens_and_says_nothing() -> None:
    async def scenario() -> None:
        with socket.create_server((loopback_host(), 0)) as silent:
            host, port = silent.getsockname()
            async with store_of(f"{host}:{port}") as store:
                start_s = time.monotonic()
                with pytest.raises(StoreUnavailable):  # it never connected, so that nothing was sent
                    await store.commit(WRITE)
                assert time.monotonic() - start_s < 4.0  # of its 5 s

    run(scenario())


# --- killed, stopped, and back -----------------------------------------------------------------------------------


def test_killed_in_the_middle_of_writes_and_back_again() -> None:
    async def scenario() -> None:
        async with etcd() as server, store_of(server.client) as store:
            answers: dict[int, str] = {}
            answered = asyncio.Event()

            async def write(number: int) -> None:
                try:
                    result = await store.commit(Txn(when=(Absent(f"/w/{number:04}"),), then=(Put(f"/w/{number:04}"),)))
                    answers[number] = type(result).__name__
                    answered.set()
                except (StoreUnavailable, OutcomeUnknown) as error:
                    answers[number] = type(error).__name__

            async with asyncio.TaskGroup() as group:
                for number in range(2000):
                    group.create_task(write(number))
                await answered.wait()
                server.kill()
            kinds = set(answers.values())
            assert kinds <= {"Committed", "StoreUnavailable", "OutcomeUnknown"}
            assert {"Committed", "OutcomeUnknown"} <= kinds

            server.launch()
            await until_committed(store, 15)
            found = {int(entry.key.removeprefix("/w/")) for entry in (await store.list("/w/")).entries}
            assert {number for number, kind in answers.items() if kind == "Committed"} <= found
            assert not {number for number, kind in answers.items() if kind == "StoreUnavailable"} & found

    run(scenario())


def test_a_frozen_etcd_is_unknown_and_not_a_hang() -> None:
    async def scenario() -> None:
        async with etcd() as server, store_of(server.client) as store:
            await store.commit(WRITE)
            server.send(signal.SIGSTOP)
            try:
                start_s = time.monotonic()
                with pytest.raises(OutcomeUnknown):
                    await store.commit(Txn(when=(Absent("/b"),), then=(Put("/b"),)), timeout_s=1.0)
                with pytest.raises(StoreUnavailable):
                    await store.read(["/a"], timeout_s=1.0)
                with pytest.raises(StoreUnavailable):
                    await store.keep_alive(LeaseId(1), timeout_s=1.0)
                with pytest.raises(OutcomeUnknown):
                    await store.grant_lease(5, timeout_s=1.0)
                assert time.monotonic() - start_s < 15.0
            finally:
                server.send(signal.SIGCONT)
            await until_committed(store, 15)
            # Whether the write that was sent meanwhile took place is a matter of milliseconds: unknown means unknown.
            assert isinstance(await store.commit(Txn(when=(Absent("/b"),), then=(Put("/b"),))), Committed | Conflict)

    run(scenario())


def test_cancelling_a_call_cancels_it() -> None:
    async def scenario() -> None:
        async with etcd() as server, store_of(server.client) as store:
            await store.commit(WRITE)
            server.send(signal.SIGSTOP)
            try:
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(0.2):
                        await store.commit(WRITE, timeout_s=30)
            finally:
                server.send(signal.SIGCONT)

    run(scenario())


def test_closing_under_a_call_does_not_cancel_the_caller() -> None:
    async def scenario() -> None:
        async with etcd() as server, store_of(server.client) as store:
            await store.commit(WRITE)
            server.send(signal.SIGSTOP)
            try:
                calls = [
                    asyncio.create_task(store.commit(WRITE, timeout_s=30)),
                    asyncio.create_task(anext_of(store)),
                ]
                await asyncio.sleep(0.2)  # let them be sent; nothing can be seen of it
                await store.close()
                done = await asyncio.gather(*calls, return_exceptions=True)
            finally:
                server.send(signal.SIGCONT)
            assert [type(each) for each in done] == [OutcomeUnknown, StoreUnavailable]

    async def anext_of(store: EtcdStore) -> object:
        return await anext(store.watch("/", start=Revision(1)))

    run(scenario())


# --- several endpoints -------------------------------------------------------------------------------------------


def test_a_second_endpoint_serves_while_the_preferred_one_is_down_and_then_no_more() -> None:
    async def scenario() -> None:
        async with etcd() as other, etcd() as preferred, store_of(preferred.client, other.client) as store:
            await store.commit(Txn(then=(Put("/who", b"preferred"),)))
            async with store_of(other.client) as side:
                await side.commit(Txn(then=(Put("/who", b"other"),)))

            async def who() -> bytes | None:
                entry = (await store.read(["/who"])).entries["/who"]
                return entry.value if entry else None

            assert await who() == b"preferred"
            preferred.kill()
            assert await who() == b"other"
            assert isinstance(await store.commit(WRITE), Committed)
            preferred.launch()
            await preferred.ready()
            end_s = time.monotonic() + 15
            while await who() != b"preferred":
                assert time.monotonic() < end_s
                await asyncio.sleep(0.05)

    run(scenario())


def test_a_frozen_preferred_endpoint_costs_one_unknown_write_only() -> None:
    async def scenario() -> None:
        async with etcd() as other, etcd() as preferred, store_of(preferred.client, other.client) as store:
            await store.commit(WRITE)
            # On a busy machine connecting may have taken so long that the other one was asked.
            await eventually(lambda: store.connections._order()[0].endpoint == preferred.client)
            preferred.send(signal.SIGSTOP)
            try:
                with pytest.raises(OutcomeUnknown):
                    await store.commit(WRITE, timeout_s=1.0)
                start_s = time.monotonic()
                for _ in range(20):
                    await store.commit(WRITE, timeout_s=5.0)
                assert time.monotonic() - start_s < 10.0
            finally:
                preferred.send(signal.SIGCONT)

    run(scenario())


def test_a_read_asks_the_next_one_within_its_own_time() -> None:
    async def scenario() -> None:
        async with etcd() as other, etcd() as preferred, store_of(preferred.client, other.client) as store:
            await store.commit(WRITE)
            preferred.send(signal.SIGSTOP)
            try:
                await store.read(["/a"], timeout_s=4.0)
            finally:
                preferred.send(signal.SIGCONT)

    run(scenario())


def test_endpoints_change_under_a_watch() -> None:
    async def scenario() -> None:
        async with etcd() as first, etcd() as second, store_of(first.client) as store:
            async with contextlib.aclosing(store.watch("/", start=Revision(2))) as changes:
                await anext(changes)
                await store.set_endpoints([f"http://{second.client}/", second.client])
                assert store.endpoints == (f"http://{second.client}",)
                with pytest.raises(StoreUnavailable):
                    await anext(changes)
            assert isinstance(await store.commit(WRITE), Committed)
            async with store_of(second.client) as side:
                assert (await side.read(["/a"])).entries["/a"] is not None

    run(scenario())


# --- watches -----------------------------------------------------------------------------------------------------


def test_a_watch_ends_when_etcd_is_killed_and_goes_on_from_where_it_was() -> None:
    async def scenario() -> None:
        async with etcd() as server, store_of(server.client) as store:
            async with contextlib.aclosing(store.watch("/", start=Revision(2))) as changes:
                await anext(changes)
                await store.commit(WRITE)
                seen = await anext(changes)
                server.kill()
                start_s = time.monotonic()
                with pytest.raises(StoreUnavailable):
                    await anext(changes)
                assert time.monotonic() - start_s < watch.IDLE_S / 2, "it was told, and did not have to ask"
            server.launch()
            await until_committed(store, 15)
            async with contextlib.aclosing(store.watch("/", start=Revision(seen.revision + 1))) as changes:
                await anext(changes)
                assert (await anext(changes)).events[0].revision == seen.revision + 1

    run(scenario())


def test_a_watch_on_a_frozen_etcd_ends_in_bounded_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "IDLE_S", 0.5)
    monkeypatch.setattr(watch, "ANSWER_S", 2.0)

    async def scenario() -> None:
        async with etcd() as server, store_of(server.client) as store:
            async with contextlib.aclosing(store.watch("/", start=Revision(2))) as changes:
                await anext(changes)
                quiet = asyncio.create_task(anext(changes))
                await asyncio.sleep(2.0)  # quiet, but alive: asked three times and answered
                assert not quiet.done()
                server.send(signal.SIGSTOP)
                try:
                    start_s = time.monotonic()
                    with pytest.raises(StoreUnavailable, match="silent"):
                        await quiet
                    assert time.monotonic() - start_s < 10.0
                finally:
                    server.send(signal.SIGCONT)

    run(scenario())


def test_keepalive_finds_a_dead_connection_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "IDLE_S", 60.0)
    options = {**dict(connection.CHANNEL_OPTIONS), "grpc.keepalive_time_ms": 5000, "grpc.http2.ping_timeout_ms": 1000}
    monkeypatch.setattr(connection, "CHANNEL_OPTIONS", tuple(options.items()))

    async def scenario() -> None:
        async with etcd() as server, store_of(server.client) as store:
            async with contextlib.aclosing(store.watch("/", start=Revision(2))) as changes:
                await anext(changes)
                server.send(signal.SIGSTOP)
                try:
                    start_s = time.monotonic()
                    with pytest.raises(StoreUnavailable, match="broke"):
                        await anext(changes)
                    assert time.monotonic() - start_s < 30.0
                finally:
                    server.send(signal.SIGCONT)

    run(scenario())


def test_a_slow_consumer_holds_etcd_back_and_loses_nothing() -> None:
    async def scenario() -> None:
        async with etcd() as server, store_of(server.client) as store:
            async with contextlib.aclosing(store.watch("/big/", start=Revision(2))) as changes:
                await anext(changes)
                for number in range(60):  # 60 MB, far beyond what gRPC buffers
                    await store.commit(Txn(then=(Put(f"/big/{number % 3}", b"x" * 1_000_000),)))
                seen: list[int] = []
                while len(seen) < 60:
                    seen += [event.revision for event in (await anext(changes)).events]
                assert seen == list(range(2, 62))

    run(scenario())


def test_fragments_are_put_together_into_whole_revisions() -> None:
    def change(revision: int, key: str) -> Change:
        return Change(key, None, Revision(revision))

    whole = Reassembly(Revision(5))
    assert whole.add([change(5, "a")], fragment=True) == []
    assert whole.add([change(5, "b")], fragment=True) == []
    (found,) = whole.add([change(5, "c"), change(6, "a"), change(7, "a")], fragment=True)
    assert (found.revision, len(found.events)) == (6, 4)
    assert whole.add([], fragment=True) == []
    (found,) = whole.add([change(7, "b")], fragment=False)
    assert (found.revision, [event.key for event in found.events]) == (7, ["a", "b"])
    assert whole.add([change(7, "a"), change(6, "a")], fragment=False) == []  # told twice
    assert whole.add([], fragment=False) == []


def test_a_watch_whose_end_comes_between_two_steps_is_lost_like_any_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked for a sign of life at every turn, it is asked at its very end: gRPC then says that the call is over."""

    async def scenario() -> None:
        async with etcd() as server:
            for _ in range(5):
                store = EtcdStore([server.client])
                changes = store.watch("/", start=Revision(0))
                await anext(changes)
                reader = asyncio.ensure_future(anext(changes))
                await asyncio.sleep(0.02)  # some turns
                await store.close()
                with pytest.raises(StoreUnavailable):
                    await asyncio.wait_for(reader, 10)

    monkeypatch.setattr(watch, "IDLE_S", 0.0)
    monkeypatch.setattr(watch, "ANSWER_S", 5.0)
    run(scenario())


def test_writing_to_a_call_that_is_over_is_a_connection_that_is_gone() -> None:
    async def scenario() -> None:
        async with etcd() as server:
            one = connection.Connection(server.client, None)
            with one.use() as stubs:
                call = stubs.watch.Watch()
                call.cancel()
                with pytest.raises(GONE):
                    await call.write(wire.watch_progress())
            await one.close()

    run(scenario())
