"""What a driver makes of writes that a real etcd does not take, and of no answer at all."""

from __future__ import annotations

import asyncio
import time
from typing import cast

import pytest

from spinetta.agent import Agent
from spinetta.events import Commit, CommitDone, Happening, Read, ReadDone, Rejected
from spinetta.node import driver as drivers
from spinetta.node.driver import Driver
from spinetta.node.launching import LaunchSettings
from spinetta.runtime.protocol import Runtime
from spinetta.store.etcd import EtcdStore
from spinetta.txn import Committed, Put, Txn
from tests.builders import settings
from tests.contract.api_world import Etcd, etcd, etcd_member, run

__all__ = ["etcd", "etcd_member"]
pytestmark = pytest.mark.contract

SMALL, LARGE = Txn(then=(Put("/refused/a", b"x"),)), Txn(then=(Put("/refused/a", b"x" * (2 << 20)),))


def driver(store: EtcdStore) -> Driver:
    return Driver(
        Agent(settings()), store, cast("Runtime", None), LaunchSettings("n1", 0, "h:1"), remember=lambda _: None
    )


async def told(made: Driver, effect: Commit | Read) -> Happening:
    if isinstance(effect, Commit):
        await made._commit(effect)
    else:
        await made._read(effect)
    return await asyncio.wait_for(made._inbox.get(), 5)


def test_what_is_too_large_is_told_from_what_is_not_known(etcd: Etcd) -> None:
    async def scenario() -> None:
        store, nobody = EtcdStore([etcd.endpoint]), EtcdStore(["127.0.0.1:1"])
        try:
            made = driver(store)
            refused = await told(made, Commit("finish", LARGE))
            assert isinstance(refused, CommitDone)
            assert isinstance(refused.result, Rejected)
            assert "1.5 MiB" in refused.result.text
            done = await told(made, Commit("finish", SMALL))
            assert isinstance(done, CommitDone)
            assert isinstance(done.result, Committed)
            assert await told(driver(nobody), Commit("finish", SMALL)) == CommitDone("finish", None)
        finally:
            await store.close()
            await nobody.close()

    run(scenario())


def test_failures_in_a_row_are_told_later_and_later_but_not_those_of_renewals(
    etcd: Etcd, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drivers, "PAUSE_FIRST_S", 0.1)
    monkeypatch.setattr(drivers, "PAUSE_MOST_S", 0.4)

    async def took_s(made: Driver, effect: Commit | Read) -> float:
        before_s = time.monotonic()
        await told(made, effect)
        return time.monotonic() - before_s

    async def scenario() -> None:
        store = EtcdStore([etcd.endpoint])
        try:
            made = driver(store)
            waits = [await took_s(made, Commit("finish", LARGE)) for _ in range(5)]
            assert waits[1] >= 0.05
            assert waits[2] >= 0.1
            assert waits[4] >= 0.2
            assert made._waits["finish"].tries == 4
            await told(made, Commit("finish", SMALL))
            assert not made._waits  # it got on: the next failure is told at once
            for _ in range(3):
                await told(made, Commit("renew", LARGE))
            assert not made._waits  # a life hangs on it
            found = await told(made, Read("self", ("/refused/a",)))
            assert isinstance(found, ReadDone)
            assert found.reading is not None
        finally:
            await store.close()

    run(scenario())
