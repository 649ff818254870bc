"""What is too large or too much for etcd, what failures mean, and what an endpoint is. Real etcd only."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Coroutine
from typing import Any
from unittest.mock import ANY

import grpc
import pytest

from spinetta import keys
from spinetta.errors import OutcomeUnknown, StoreFull, UserError
from spinetta.model import NodeId
from spinetta.store.connection import normal_endpoints
from spinetta.store.etcd import EtcdStore
from spinetta.store.failures import Meaning, meaning_of
from spinetta.txn import Absent, Committed, Conflict, Delete, Put, Txn, take_office
from tests.contract.etcds import etcd

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


# --- limits ------------------------------------------------------------------------------------------------------


def test_a_list_larger_than_a_message_comes_in_pages() -> None:
    async def scenario() -> None:
        async with etcd() as server, store_of(server.client) as store:
            for number in range(40):
                await store.commit(Txn(then=(Put(f"/l/{number:02}", b"x" * 1_000_000),)), timeout_s=20)
            page = await store.list("/l/", timeout_s=20)
            assert (len(page.entries), page.more) == (40, False)
            assert [entry.key for entry in page.entries] == sorted(entry.key for entry in page.entries)
            limited = await store.list("/l/", limit=39, newest_first=True, timeout_s=20)
            assert (len(limited.entries), limited.more) == (39, True)
            assert limited.entries[0].key == "/l/39"

    run(scenario())


def test_a_full_store_says_so_of_writes_that_it_took_too() -> None:
    """Whether a write fits is answered when it has been applied already: nobody may take the refusal for a "no"."""

    async def fill(store: EtcdStore, lane: int) -> str:
        for number in range(100):
            key = f"/{lane}/{number}"
            try:
                await store.commit(Txn(then=(Put(key, b"x" * 8_000),)))
            except StoreFull:
                return key
        raise AssertionError("never full")

    async def scenario() -> None:
        async with etcd("--quota-backend-bytes=4194304") as server, store_of(server.client) as store:
            lease = await store.grant_lease(60)
            # How many of these are there all the same depends on how fast the machine is: up to all but one.
            refused = await asyncio.gather(*(fill(store, lane) for lane in range(32)))
            assert issubclass(StoreFull, OutcomeUnknown)
            with pytest.raises(StoreFull, match="NOSPACE"):  # once the alarm is raised nothing is taken …
                await store.commit(Txn(then=(Put("/late", b""),)))
            assert (await store.read(["/late"])).entries["/late"] is None
            # … but renewals, which keep tasks alive, a leader, that a node is dead, what comes nested, and …
            assert isinstance(await store.commit(Txn(when=(Absent("/n"),), then=(Put("/beat/n1", b"b"),))), Committed)
            assert isinstance(await store.commit(Txn(when=(Absent("/0/0"),), then=(Put("/beat/n1", b"c"),))), Conflict)
            assert (await store.read(["/beat/n1"])).entries["/beat/n1"].value == b"b"  # type: ignore[union-attr]
            elected = await store.commit(take_office(NodeId("n1"), lease, b"o"))
            assert isinstance(elected, Committed)
            assert (await store.read([keys.OFFICE])).entries[keys.OFFICE].created == elected.revision  # type: ignore[union-attr]
            condemned = await store.commit(Txn(then=(Put(keys.incarnation(NodeId("n2")), b"c"),)))
            assert isinstance(condemned, Committed)
            assert await store.commit(Txn(nested=(Txn(then=(Put("/nested"),)),))) == Committed(ANY, (True,))
            assert isinstance(await store.commit(Txn(then=(Delete(refused[0]),))), Committed)  # … what makes room

    run(scenario())


@pytest.mark.parametrize("size", [1_600_000, 5_000_000])
def test_a_request_too_large_says_so(size: int) -> None:
    async def scenario() -> None:
        async with etcd() as server, store_of(server.client) as store:
            with pytest.raises(UserError, match=r"1\.5 MiB"):
                await store.commit(Txn(then=(Put("/a", b"x" * size),)))
            assert isinstance(await store.commit(WRITE), Committed)

    run(scenario())


def test_keys_of_others_need_not_be_text() -> None:
    async def scenario() -> None:
        async with etcd() as server, store_of(server.client) as store:
            odd = b"/odd/\xff\xfe\x00".decode("utf-8", "surrogateescape")
            await store.commit(Txn(then=(Put(odd, b"\xff"),)))
            (entry,) = (await store.list("/odd/")).entries
            assert (entry.key, entry.value) == (odd, b"\xff")

    run(scenario())


# --- the meaning of failures -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "text", "meaning"),
    [
        (Code.UNAVAILABLE, "failed to connect to all addresses; last error: …", Meaning.NOT_DONE),
        (Code.UNAVAILABLE, "etcdserver: no leader", Meaning.NOT_DONE),
        (Code.UNAVAILABLE, "etcdserver: rpc not supported for learner", Meaning.NOT_DONE),
        (Code.RESOURCE_EXHAUSTED, "etcdserver: too many requests", Meaning.NOT_DONE),
        (Code.UNAVAILABLE, "etcdserver: request timed out", Meaning.UNKNOWN),
        (Code.UNAVAILABLE, "etcdserver: request timed out, possibly due to previous leader failure", Meaning.UNKNOWN),
        (Code.UNAVAILABLE, "etcdserver: leader changed", Meaning.UNKNOWN),
        (Code.UNAVAILABLE, "etcdserver: server stopped", Meaning.UNKNOWN),
        (Code.UNAVAILABLE, "Socket closed", Meaning.UNKNOWN),
        (Code.UNAVAILABLE, "", Meaning.UNKNOWN),
        (Code.CANCELLED, "the connection was closed", Meaning.UNKNOWN),
        (Code.DEADLINE_EXCEEDED, "Deadline Exceeded", Meaning.UNKNOWN),
        (Code.UNKNOWN, "anything", Meaning.UNKNOWN),
        (Code.RESOURCE_EXHAUSTED, "GOAWAY received; ENHANCE_YOUR_CALM", Meaning.UNKNOWN),
        (Code.RESOURCE_EXHAUSTED, "CLIENT: Received message larger than max (9 vs. 8)", Meaning.UNKNOWN),
        (Code.RESOURCE_EXHAUSTED, "grpc: received message larger than max (9 vs. 8)", Meaning.REFUSED),
        (Code.RESOURCE_EXHAUSTED, "etcdserver: mvcc: database space exceeded", Meaning.REFUSED),
        (Code.INVALID_ARGUMENT, "etcdserver: duplicate key given in txn request", Meaning.REFUSED),
        (Code.NOT_FOUND, "etcdserver: requested lease not found", Meaning.REFUSED),
        (Code.UNAVAILABLE, "etcdserver: unhealthy cluster", Meaning.REFUSED),
    ],
)
def test_what_a_failure_means_for_a_write(code: grpc.StatusCode, text: str, meaning: Meaning) -> None:
    assert meaning_of(code, text) is meaning


@pytest.mark.parametrize("endpoint", ["", "127.0.0.1", "127.0.0.1:", ":2379", "https://127.0.0.1:2379", "127.0.0.1:x"])
def test_what_is_no_endpoint(endpoint: str) -> None:
    with pytest.raises(UserError):
        EtcdStore([endpoint])


def test_endpoints_in_normal_form() -> None:
    assert normal_endpoints(["http://127.0.0.1:1/", "127.0.0.1:2", "127.0.0.1:1"]) == ("127.0.0.1:1", "127.0.0.1:2")
    with pytest.raises(UserError):
        normal_endpoints([])
