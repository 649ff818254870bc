"""Certificates of etcd that change: renewal, expiry, revocation and a new authority, under load. Real etcds."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import itertools
import ssl
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from spinetta.errors import OutcomeUnknown, StoreUnavailable, UserError
from spinetta.model import Revision
from spinetta.store.connection import REFRESH_GRACE_S
from spinetta.store.etcd import EtcdStore
from spinetta.store.members import status
from spinetta.store.offline import read_offline
from spinetta.store.protocol import Changes
from spinetta.trust.certificates import Authority
from spinetta.txn import Committed, Put, Txn
from tests.contract.etcds import VoterFiles, etcd, etcd_authority
from tests.contract.test_membership import Cluster, Node, cluster
from tests.contract.tls_stores import (
    WRITE,
    eventually,
    in_file,
    run,
    shown_by,
    store_of,
    until,
    urls_of,
    voter,
)

pytestmark = pytest.mark.contract


# --- renewal -----------------------------------------------------------------------------------------------------


async def settled(world: Cluster) -> None:
    await world.settle()
    await world.store.set_endpoints([node.client_url for node in world.nodes.values()])


def renew(world: Cluster, **more: float) -> None:
    for node in world.nodes.values():
        assert node.files is not None
        node.files.renew(**more)


@dataclass
class Load:
    """Writers that go on whatever happens; what is acknowledged must be there at the end."""

    store: EtcdStore
    written: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    watched: set[str] = field(default_factory=set)
    watches: int = 0

    async def write(self, name: str) -> None:
        for number in itertools.count():
            key = f"/load/{name}{number:06}"
            while True:
                try:
                    assert isinstance(await self.store.commit(Txn(then=(Put(key),))), Committed)
                    break
                except (StoreUnavailable, OutcomeUnknown) as error:
                    self.failed.append(str(error))
                    await asyncio.sleep(0.05)
            self.written.append(key)
            await asyncio.sleep(0.002)

    async def watch(self) -> None:
        """As agents do it: when a watch ends, from where it ended."""
        start = Revision(1)
        while True:
            try:
                async with contextlib.aclosing(self.store.watch("/load/", start=start)) as changes:
                    self.watches += 1
                    async for each in changes:
                        self.watched.update(change.key for change in each.events)
                        start = Revision(each.revision + 1)
            except StoreUnavailable:
                await asyncio.sleep(0.05)

    async def more(self, count: int) -> None:
        """Wait until so many more writes have been made."""
        wanted = len(self.written) + count
        await until(lambda: len(self.written) >= wanted)

    async def check(self) -> None:
        """Nothing has been lost, and the watch has told of everything."""
        written = set(self.written)
        assert {entry.key for entry in (await self.store.list("/load/", keys_only=True)).entries} >= written
        await until(lambda: self.watched >= written)


@contextlib.asynccontextmanager
async def load(store: EtcdStore) -> AsyncIterator[Load]:
    made = Load(store)
    tasks = [asyncio.create_task(work) for work in (made.write("a"), made.write("b"), made.watch())]
    try:
        yield made
        assert not [task for task in tasks if task.done()]
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


def test_renewal_under_load_fails_no_call(tmp_path: Path) -> None:
    """Certificates of a few seconds, renewed again and again: no restart, no failed call; watches begin again."""

    async def scenario() -> None:
        async with cluster(tmp_path, "abc", etcd_authority()) as world:
            await settled(world)
            async with load(world.store) as work:
                first = {name: in_file(files_of(node)).not_valid_after_utc for name, node in world.nodes.items()}
                renew(world, lifetime_s=4.0)
                short = max(in_file(files_of(node)).not_valid_after_utc for node in world.nodes.values())
                assert await world.store.connections.refresh(grace_s=1.0)
                rounds = 0
                while datetime.now(UTC) < short + timedelta(seconds=2.0):
                    renew(world, lifetime_s=4.0)
                    rounds += 1
                    assert await world.store.connections.refresh(grace_s=0.5)
                    for node in world.nodes.values():
                        for url in urls_of(node):
                            assert shown_by(url, files_of(node)) == in_file(files_of(node)), "no restart was needed"
                    await work.more(50)
                renew(world)
                assert await world.store.connections.refresh(grace_s=0.5)
                await work.more(50)
                assert work.failed == []
                assert work.watches > rounds
                await work.check()
                assert set(first) == set(world.nodes)
            print(f"{rounds} renewals of three voters under {len(work.written)} writes")  # noqa: T201

    run(scenario())


def files_of(node: Node) -> VoterFiles:
    assert node.files is not None
    return node.files


def test_what_is_under_way_ends_on_the_old_connection(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with etcd(authority=etcd_authority()) as server, store_of(server.client, tls=server.tls) as store:
            assert server.files is not None
            watch = store.watch("/a", start=Revision(0))
            await anext(watch)
            for _ in range(10):
                server.files.renew()
                writes = [asyncio.create_task(store.commit(WRITE)) for _ in range(40)]
                await asyncio.sleep(0)  # they are under way
                started_s = time.monotonic()
                assert await store.refresh()
                assert time.monotonic() - started_s < REFRESH_GRACE_S / 2, "it does not wait for a watch"
                assert all([isinstance(await each, Committed) for each in writes])
                assert await store.refresh(), "nothing to do"
            with pytest.raises(StoreUnavailable, match="closed"):
                await last_of(watch)

    run(scenario())


async def last_of(watch: AsyncIterator[Changes]) -> None:
    async for _ in watch:
        pass


def test_a_certificate_that_etcd_does_not_take_changes_nothing(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with etcd(authority=etcd_authority()) as server:
            assert server.files is not None
            files = voter(tmp_path, server.files.authority)
            async with store_of(server.client, tls=lambda: files.tls) as store:
                await store.commit(WRITE)
                files.authority = etcd_authority()
                files.renew()
                assert not await store.refresh()
                assert isinstance(await store.commit(WRITE), Committed)
                files.authority = server.files.authority
                files.renew()
                assert await store.refresh()
                assert isinstance(await store.commit(WRITE), Committed)

    run(scenario())


def test_a_lost_connection_is_made_again_with_the_renewed_certificate(tmp_path: Path) -> None:
    """Also when nobody has asked for it: a channel keeps the certificate that it was made with."""

    async def scenario() -> None:
        async with etcd(authority=etcd_authority()) as server:
            assert server.files is not None
            files = voter(tmp_path, server.files.authority, lifetime_s=3.0)
            end = in_file(files).not_valid_after_utc
            async with store_of(server.client, tls=lambda: files.tls) as store:
                await store.commit(WRITE)
                await until(lambda: datetime.now(UTC) > end + timedelta(seconds=0.1))
                assert isinstance(await store.commit(WRITE), Committed), "a connection outlives its certificate"
                server.kill()
                server.launch()
                await server.ready()
                with pytest.raises(StoreUnavailable, match="ended at"):
                    await store.commit(WRITE)
                files.renew()
                took_s = await eventually(lambda: store.commit(WRITE, timeout_s=1.0))
                assert took_s < 5.0

    run(scenario())


def test_voters_whose_certificates_have_ended(tmp_path: Path) -> None:
    """Connections that stand go on; new ones wait for new certificates, and then nobody needs a restart."""

    async def scenario() -> None:
        async with cluster(tmp_path, "abc", etcd_authority()) as world:
            await settled(world)
            a, _, c = world.nodes.values()
            async with store_of(*(n.client_url for n in world.nodes.values()), tls=a.tls) as store:
                end = await connected_until(world, store)
                await until(lambda: datetime.now(UTC) > end + timedelta(seconds=1.0))
                for _ in range(20):
                    assert isinstance(await store.commit(WRITE), Committed)
                with pytest.raises(StoreUnavailable, match="ended at"):
                    await status(a.client_url, a.tls)

                etcd_of_c = c.services.running["etcd"].process
                etcd_of_c.kill()
                await asyncio.to_thread(etcd_of_c.wait)
                assert c.supervisor is not None
                with pytest.raises(StoreUnavailable):
                    await c.supervisor.start(timeout_s=3.0)
                good = voter(tmp_path / "good", files_of(a).authority)
                assert not healthy(c, good), "it is alone"
                assert isinstance(await store.commit(WRITE), Committed), "a majority is still connected"

                renew(world)
                await c.supervisor.wait_healthy(timeout_s=20)
                await until(lambda: healthy(c, good))
                assert all(healthy(node, good) for node in world.nodes.values())

    run(scenario())


async def connected_until(world: Cluster, store: EtcdStore) -> datetime:
    """Have all connections made under certificates that soon end; when they do."""
    for lifetime_s in (7.0, 14.0, 28.0):  # a busy machine needs longer
        renew(world, lifetime_s=lifetime_s)
        end = max(in_file(files_of(node)).not_valid_after_utc for node in world.nodes.values())
        with contextlib.suppress(StoreUnavailable, OutcomeUnknown):
            for node in world.nodes.values():
                assert node.supervisor is not None
                await node.supervisor.restart(timeout_s=lifetime_s)
            await store.commit(WRITE)
        if datetime.now(UTC) < end - timedelta(seconds=1.0):
            return end
    raise AssertionError("three members cannot be restarted within half a minute")


def healthy(node: Node, files: VoterFiles) -> bool:
    """What the member itself says, whatever its certificate."""
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    made.check_hostname, made.verify_mode = False, ssl.CERT_NONE
    made.load_cert_chain(files.tls.cert_file, files.tls.key_file)
    host, _, port = node.client_url.rpartition("//")[2].rpartition(":")
    with contextlib.closing(http.client.HTTPSConnection(host, int(port), timeout=1.0, context=made)) as sent:
        try:
            sent.request("GET", "/health")
            return b'"true"' in sent.getresponse().read()
        except OSError:  # a member that has never reached the others does not serve yet
            return False


def test_what_is_needed_for_new_certificates_can_be_read_without_the_cluster(tmp_path: Path) -> None:
    """All voters were off for too long. Each finds the sealed authority in its own data, and all start again."""

    async def scenario() -> None:
        async with cluster(tmp_path, "abc", etcd_authority()) as world:
            await settled(world)
            assert isinstance(await world.store.commit(Txn(then=(Put("/authority", b"sealed"),))), Committed)
            for node in world.nodes.values():
                assert node.supervisor is not None
                await node.supervisor.stop()
            for node in world.nodes.values():
                found = await read_offline(node.settings(), ["/authority", "/none"])
                entry = found.entries["/authority"]
                assert entry is not None
                assert entry.value == b"sealed"
                assert found.entries["/none"] is None
            assert not leftovers(tmp_path)
            renew(world)
            async with asyncio.TaskGroup() as group:
                for node in world.nodes.values():
                    assert node.supervisor is not None
                    group.create_task(node.supervisor.start(timeout_s=30))
            await eventually(lambda: world.store.commit(WRITE))
            assert len((await world.members.members()).members) == 3

    run(scenario())


def test_reading_without_the_cluster_says_what_is_wrong(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with cluster(tmp_path, "a", etcd_authority()) as world:
            settings = world.first.settings()
            await world.store.commit(WRITE)
            await world.first.stop()
            with pytest.raises(StoreUnavailable, match="does not serve a copy"):
                await read_offline(replace(settings, program="/bin/false"), ["/a"])
            elsewhere = replace(settings, data_dir=tmp_path / "none")
            with pytest.raises(UserError) as caught:
                await read_offline(elsewhere, ["/a"])
            assert caught.value.reason == "no-data"
            (tmp_path / "none" / "member" / "snap").mkdir(parents=True)
            with pytest.raises(UserError) as caught:  # never "there is no such key"
                await read_offline(elsewhere, ["/a"])
            assert caught.value.reason == "no-data"
            assert not leftovers(tmp_path)

    run(scenario())


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if "reading" in path.name]


# --- a new authority ---------------------------------------------------------------------------------------------


def test_a_new_authority_under_load(tmp_path: Path) -> None:
    """Both are trusted before the first certificate is exchanged. Only the CAs' file takes a restart, one at a time."""

    async def scenario() -> None:
        old, new = etcd_authority(), etcd_authority()
        async with cluster(tmp_path, "abc", old) as world:
            await settled(world)
            nodes = list(world.nodes.values())
            last_of_old = voter(tmp_path / "old", old)
            first_of_new = voter(tmp_path / "new", new)
            first_of_new.trust(old, new)
            last_of_old.trust(old, new)

            async def trust(*authorities: Authority) -> None:
                for node in nodes:
                    files_of(node).trust(*authorities)
                for node in nodes:
                    assert node.supervisor is not None
                    await node.supervisor.restart(timeout_s=30)
                    await until(lambda: all(healthy(each, files_of(each)) for each in nodes))
                await world.store.connections.refresh(grace_s=0.5)

            async with load(world.store) as work, asyncio.TaskGroup() as group:
                keeping = [group.create_task(n.supervisor.run()) for n in nodes if n.supervisor is not None]
                files_of(nodes[0]).trust(old, new)
                with pytest.raises(StoreUnavailable):  # the file alone changes nothing
                    await status(nodes[0].client_url, lambda: first_of_new.tls)
                await trust(old, new)
                assert (await status(nodes[0].client_url, lambda: first_of_new.tls)).healthy
                for node in nodes:
                    files_of(node).authority = new
                    files_of(node).renew()
                assert await world.store.connections.refresh(grace_s=0.5)
                await work.more(20)
                await trust(new)
                for node in nodes:
                    assert shown_by(node.peer_url, files_of(node)).issuer == in_file(first_of_new).issuer
                    with pytest.raises(StoreUnavailable):
                        await status(node.client_url, lambda: last_of_old.tls)
                    assert (await status(node.client_url, lambda: first_of_new.tls)).healthy
                await work.more(20)
                await work.check()
                assert len({node.services.running["etcd"].pid for node in nodes}) == 3
                for task in keeping:
                    task.cancel()
            print(f"a new authority under {len(work.written)} writes, {len(work.failed)} of them tried again")  # noqa: T201

    run(scenario())
