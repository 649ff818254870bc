"""A real etcd for a whole session, and the stores that must behave alike."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Protocol

import pytest

from spinetta.model import Revision
from spinetta.runtime.netplace import Place
from spinetta.store.etcd import EtcdStore
from spinetta.store.protocol import Store
from tests.contract.etcds import PROGRAMS, Etcd, Program, etcd_authority, find_program, shared_etcd
from tests.contract.gateways import gateway_store
from tests.contract.nets import World, place, world
from tests.sim.model_store import ModelStore

LIMIT_S = 60.0
_numbers = itertools.count(1)


class CompactingStore(Store, Protocol):
    async def compact(self, revision: Revision, *, timeout_s: float = 5.0) -> None: ...


Scenario = Callable[[CompactingStore, str], Awaitable[None]]
"""Given a store and a prefix of its own."""


@pytest.fixture(params=PROGRAMS, scope="session")
def program(request: pytest.FixtureRequest) -> Program:
    """Each etcd that there is to test with."""
    return find_program(request.param)


@pytest.fixture(scope="session")
def etcd_server() -> Iterator[Etcd]:
    with shared_etcd() as found:
        yield found


@pytest.fixture(scope="session")
def etcd_tls_server() -> Iterator[Etcd]:
    with shared_etcd(etcd_authority()) as found:
        yield found


SERVERS = {"etcd": "etcd_server", "etcd-tls": "etcd_tls_server", "gateway": "etcd_server"}


@contextlib.asynccontextmanager
async def _closing(store: CompactingStore) -> AsyncIterator[CompactingStore]:
    try:
        yield store
    finally:
        await store.close()


@pytest.fixture(params=["model", *SERVERS])
def on_store(request: pytest.FixtureRequest) -> Callable[[Scenario], None]:
    """Runs a scenario on the store of the parameter."""
    kind = request.param
    server: Etcd | None = request.getfixturevalue(SERVERS[kind]) if kind in SERVERS else None

    def run(scenario: Scenario) -> None:
        async def main() -> None:
            async with contextlib.AsyncExitStack() as stack:
                if server is None:
                    store: CompactingStore = await stack.enter_async_context(_closing(ModelStore()))
                elif kind == "gateway":
                    store = await stack.enter_async_context(gateway_store(server.client))
                else:
                    store = await stack.enter_async_context(_closing(EtcdStore([server.client], server.tls)))
                async with asyncio.timeout(LIMIT_S):
                    await scenario(store, f"/test/{os.getpid()}-{next(_numbers)}/")

        asyncio.run(main())

    return run


@pytest.fixture
def here() -> Iterator[World]:
    """A machine of a test's own, without containers."""
    with world() as made:
        yield made


@pytest.fixture
def where(tmp_path: Path) -> Iterator[Place]:
    """Where the networks of a test's node are kept."""
    with place(tmp_path) as made:
        yield made
