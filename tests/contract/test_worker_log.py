"""A log that is followed on a worker, which may not watch all tasks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

import pytest

from spinetta import keys
from spinetta.access import NodeRole, UserRole
from spinetta.client import AsyncClient
from spinetta.errors import Denied
from spinetta.trust import certificates
from spinetta.trust.credentials import UserCredentials
from tests.contract.api_world import Etcd, etcd, etcd_member, run
from tests.contract.rights_world import secured

__all__ = ["etcd", "etcd_member"]
pytestmark = pytest.mark.contract


class Narrow:
    """A worker's store: as the gateway it refuses to watch all tasks, which ends whoever relies on it."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    async def watch(self, prefix: str, **options: Any) -> AsyncIterator[Any]:
        if prefix.startswith(keys.TASK):
            raise Denied(f"a worker may not watch {prefix!r}")
        async for changes in self._inner.watch(prefix, **options):
            yield changes


def test_a_voter_follows_a_log_on_a_worker(etcd: Etcd, tmp_path: Path) -> None:
    async def story() -> None:
        async with (
            secured(etcd, tmp_path) as cluster,
            cluster.serving("a") as voter,
            cluster.serving("w", NodeRole.WORKER, wrap=cast("Any", Narrow)) as worker,
        ):
            certificate, key = await cluster.user("ann", UserRole.USER)
            own = UserCredentials.create(cluster.world.ca, certificate, key)
            assert certificates.describe(certificate).name == "ann"
            async with AsyncClient(voter.address, credentials=own) as client:
                task = await client.submit(["true"])
                assert await worker.claim(task.id)
                worker.write_log(task.id, b"one\n")
                chunks = task.log(follow=True)
                first = await anext(aiter(chunks))
                assert (first.data, first.node) == (b"one\n", "w")
                worker.write_log(task.id, b"two\n")
                await worker.end(task.id)
                async with asyncio.timeout(10):
                    assert b"".join([c.data async for c in chunks]) == b"two\n"

    run(story())
