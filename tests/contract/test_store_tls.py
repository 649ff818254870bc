"""The store and etcd's members under mutual TLS: growing, renewal, expiry, and a new authority. Real etcds."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import itertools
import signal
import socket
import ssl
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509

from spinetta.errors import OutcomeUnknown, StoreUnavailable, UserError
from spinetta.model import Revision
from spinetta.store.connection import REFRESH_GRACE_S, normal_endpoints
from spinetta.store.etcd import EtcdStore
from spinetta.store.members import Members, status, statuses
from spinetta.store.offline import read_offline
from spinetta.store.process import EtcdTls, etcd_argv
from spinetta.store.protocol import Changes
from spinetta.store.supervisor import EtcdSupervisor
from spinetta.store.tls import read, revocation_list
from spinetta.trust.certificates import Authority, key_pem, new_key
from spinetta.txn import Committed, Put, Txn
from tests.contract.etcds import Etcd, VoterFiles, etcd, etcd_authority, replace_file
from tests.contract.test_membership import Cluster, Node, cluster

pytestmark = pytest.mark.contract

LIMIT_S = 100.0
CALL_S = 10.0
WRITE = Txn(then=(Put("/a", b"1"),))


def run(scenario: Coroutine[Any, Any, None]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(LIMIT_S):
            await scenario

    asyncio.run(limited())


async def until(what: Callable[[], bool], limit_s: float = 30.0) -> None:
    end_s = time.monotonic() + limit_s
    while not what():
        assert time.monotonic() < end_s
        await asyncio.sleep(0.02)


async def eventually(what: Callable[[], Coroutine[Any, Any, object]], limit_s: float = 30.0) -> float:
    """Try until it raises nothing; how long that took."""
    start_s = time.monotonic()
    while True:
        try:
            await what()
            return time.monotonic() - start_s
        except (StoreUnavailable, OutcomeUnknown):
            assert time.monotonic() - start_s < limit_s
            await asyncio.sleep(0.05)


@contextlib.asynccontextmanager
async def store_of(*endpoints: str, tls: Callable[[], EtcdTls] | None) -> AsyncIterator[EtcdStore]:
    store = EtcdStore(endpoints, tls)
    try:
        yield store
    finally:
        await store.close()


def voter(folder: Path, authority: Authority, name: str = "x", **more: float) -> VoterFiles:
    folder.mkdir(exist_ok=True)
    files = VoterFiles(folder, name, "127.0.0.1", authority)
    files.renew(**more)
    return files


def shown_by(address: str, files: VoterFiles) -> x509.Certificate:
    """The certificate that a server shows to a new connection."""
    host, _, port = address.rpartition("//")[2].rpartition(":")
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    made.check_hostname, made.verify_mode = False, ssl.CERT_NONE
    made.load_cert_chain(files.tls.cert_file, files.tls.key_file)
    with (
        socket.create_connection((host, int(port)), timeout=CALL_S) as raw,
        made.wrap_socket(raw) as sock,
    ):
        found = sock.getpeercert(binary_form=True)
    assert found is not None
    return x509.load_der_x509_certificate(found)


def in_file(files: VoterFiles) -> x509.Certificate:
    return x509.load_pem_x509_certificate(files.tls.cert_file.read_bytes())


# --- endpoints and files -----------------------------------------------------------------------------------------


def test_endpoints_are_all_of_one_kind(tmp_path: Path) -> None:
    tls = voter(tmp_path, etcd_authority()).tls
    assert normal_endpoints(["https://10.0.0.1:1/", "10.0.0.1:1"], secured=True) == ("10.0.0.1:1",)
    store = EtcdStore(["https://10.0.0.1:1", "10.0.0.2:1"], lambda: tls)
    assert store.endpoints == ("https://10.0.0.1:1", "https://10.0.0.2:1")
    for endpoints, source in ((["https://127.0.0.1:1", "http://127.0.0.1:2"], lambda: tls), (["https://x:1"], None)):
        with pytest.raises(UserError) as caught:
            EtcdStore(endpoints, source)
        assert caught.value.reason == "endpoint-scheme"


@pytest.mark.parametrize("damage", ["missing", "no-certificate", "no-key", "other-key", "no-ca"])
def test_files_that_will_not_do_are_a_reason_to_try_again(tmp_path: Path, damage: str) -> None:
    """They may be in the middle of being replaced; and the message names the file, never what is in it."""

    async def scenario() -> None:
        async with etcd(authority=etcd_authority()) as server:
            assert server.files is not None
            files = voter(tmp_path, server.files.authority)
            tls = files.tls
            pem, key, ca = (path.read_bytes() for path in (tls.cert_file, tls.key_file, tls.ca_file))
            match damage:
                case "missing":
                    tls.key_file.unlink()
                case "no-certificate":
                    tls.cert_file.write_bytes(b"nonsense")
                case "no-key":
                    tls.key_file.write_bytes(key[:100])
                case "other-key":
                    tls.key_file.write_bytes(key_pem(new_key()))
                case "no-ca":
                    tls.ca_file.write_bytes(b"")
            async with store_of(server.client, tls=lambda: tls) as store:
                with pytest.raises(StoreUnavailable) as caught:
                    await store.commit(WRITE, timeout_s=2.0)
                assert str(tmp_path) in str(caught.value)
                assert key.decode().splitlines()[1] not in str(caught.value)
                with pytest.raises(StoreUnavailable):
                    await store.refresh()
                for path, data in ((tls.cert_file, pem), (tls.key_file, key), (tls.ca_file, ca)):
                    replace_file(path, data)
                assert isinstance(await store.commit(WRITE), Committed)

    run(scenario())


def test_certificate_and_key_may_be_one_file(tmp_path: Path) -> None:
    """So that both are replaced at once, also when the key is a new one."""

    async def scenario() -> None:
        async with etcd(authority=etcd_authority()) as server:
            assert server.files is not None
            separate = voter(tmp_path, server.files.authority).tls
            both = tmp_path / "both.pem"
            both.write_bytes(separate.cert_file.read_bytes() + separate.key_file.read_bytes())
            one = replace(separate, cert_file=both, key_file=both)
            async with store_of(server.client, tls=lambda: one) as store:
                assert isinstance(await store.commit(WRITE), Committed)
        node = Etcd(tmp_path, "b", etcd_authority())
        assert node.files is not None
        replace_file(both, node.files.tls.cert_file.read_bytes() + node.files.tls.key_file.read_bytes())
        node.settings = replace(node.settings, tls=replace(node.files.tls, cert_file=both, key_file=both))
        node.launch()
        try:
            await node.ready()
        finally:
            node.kill()

    run(scenario())


def test_nothing_secret_is_shown(tmp_path: Path) -> None:
    files = voter(tmp_path, etcd_authority())
    secret = files.key_pem.decode().splitlines()[1]
    assert secret not in repr(read(files.tls))
    server = Etcd(tmp_path, "b", etcd_authority())
    argv = " ".join(etcd_argv(server.settings))
    assert str(server.settings.tls and server.settings.tls.key_file) in argv
    assert "PRIVATE" not in argv


# --- who is refused, as our own client sees it --------------------------------------------------------------------


@pytest.mark.parametrize("who", ["plain", "foreign", "expired", "of-tomorrow"])
def test_a_write_that_is_not_let_in_is_certainly_not_done(tmp_path: Path, who: str) -> None:
    async def scenario() -> None:
        async with etcd(authority=etcd_authority()) as server:
            assert server.files is not None
            ours = server.files.authority
            match who:
                case "plain":
                    tls = None
                case "foreign":
                    files = voter(tmp_path, etcd_authority())
                    files.trust(ours)
                    tls = files.tls
                case _:
                    days = -1 if who == "expired" else 1
                    tls = voter(tmp_path, ours, now_s=time.time() + days * 86400.0).tls
            source = (lambda: tls) if tls is not None else None
            async with store_of(server.client, tls=source) as store:
                for work in (
                    store.commit(WRITE),
                    store.read(["/a"]),
                    store.grant_lease(5),
                    anext(store.watch("/", start=Revision(1))),
                    Members(store.connections).members(),
                    status(server.client, source),
                ):
                    with pytest.raises(StoreUnavailable) as caught:
                        await work
                    why = {"expired": "ended at", "of-tomorrow": "clock"}.get(who, "")
                    assert why in str(caught.value)

    run(scenario())


def test_a_server_of_another_authority_gets_no_request(tmp_path: Path) -> None:
    """Whoever takes over a voter's address learns nothing from us."""

    async def scenario() -> None:
        async with etcd(authority=etcd_authority()) as server:
            assert server.files is not None
            files = voter(tmp_path, server.files.authority)
            files.trust(etcd_authority())
            async with store_of(server.client, tls=lambda: files.tls) as store:
                with pytest.raises(StoreUnavailable):
                    await store.commit(WRITE)

    run(scenario())


# --- members -----------------------------------------------------------------------------------------------------


def test_three_members_grow_under_tls(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with cluster(tmp_path, "abc", etcd_authority()) as world:
            grown_s = await world.settle()
            assert world.steps == ["add b", "promote b", "add c", "promote c"]
            hosts = {node.host for node in world.nodes.values()}
            assert len(hosts) == 3
            assert all(url.startswith("https://") for node in world.nodes.values() for url in urls_of(node))
            await world.store.commit(WRITE)
            for node in world.nodes.values():
                async with store_of(node.client_url, tls=node.tls) as one:
                    assert (await one.read(["/a"])).entries["/a"] is not None
            found = (await world.members.members()).members
            seen = await statuses(found, world.first.tls)
            assert all(s is not None and s.healthy for s in seen.values())
            print(f"one to three under TLS: {grown_s:.2f} s")  # noqa: T201

    run(scenario())


def urls_of(node: Node) -> tuple[str, str]:
    return node.client_url, node.peer_url


def test_hundreds_of_watches_over_one_connection() -> None:
    """Under TLS etcd serves gRPC through an HTTP/2 server that stops at 250 streams where it is not told otherwise."""

    async def scenario() -> None:
        async with etcd(authority=etcd_authority()) as server, store_of(server.client, tls=server.tls) as store:
            watches = [store.watch(f"/w/{number}/", start=Revision(0)) for number in range(400)]
            await asyncio.gather(*(anext(watch) for watch in watches))
            await store.commit(Txn(then=tuple(Put(f"/w/{number}/a") for number in range(100))))
            for watch in watches[:100]:
                assert len((await anext(watch)).events) == 1
            assert isinstance(await store.commit(WRITE), Committed)
            for watch in watches:
                await watch.aclose()

    run(scenario())


def test_a_frozen_member_under_tls() -> None:
    async def scenario() -> None:
        async with etcd(authority=etcd_authority()) as server, store_of(server.client, tls=server.tls) as store:
            await store.commit(WRITE)
            server.send(signal.SIGSTOP)
            try:
                started_s = time.monotonic()
                with pytest.raises(OutcomeUnknown):
                    await store.commit(WRITE, timeout_s=1.0)
                with pytest.raises(StoreUnavailable):
                    await store.read(["/a"], timeout_s=1.0)
                with pytest.raises(StoreUnavailable):  # not even a handshake
                    await status(server.client, server.tls, timeout_s=1.0)
                assert time.monotonic() - started_s < 6.0
            finally:
                server.send(signal.SIGCONT)
            await eventually(lambda: store.commit(WRITE))

    run(scenario())


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


# --- thrown out --------------------------------------------------------------------------------------------------


def test_a_revoked_certificate_opens_nothing_more(tmp_path: Path) -> None:
    """Without a restart for whoever comes anew; what stands is ended by a restart."""

    async def scenario() -> None:
        async with cluster(tmp_path, "ab", etcd_authority()) as world:
            node = world.nodes["a"]
            files, gone = files_of(node), voter(tmp_path / "gone", files_of(node).authority)
            crl = tmp_path / "etcd.crl"

            def revoke(*serials: int) -> None:
                replace_file(crl, revocation_list(serials, read(files.tls), now_s=time.time()))

            revoke()
            assert node.supervisor is not None
            await node.supervisor.stop()
            settings = replace(node.settings(), tls=replace(files.tls, crl_file=crl))
            supervisor = EtcdSupervisor(node.services, settings, log_path=tmp_path / "a.log")
            await supervisor.start(timeout_s=30)
            async with store_of(node.client_url, tls=lambda: gone.tls) as store:
                assert isinstance(await store.commit(WRITE), Committed)
                assert shown_by(node.peer_url, gone) == in_file(files)
                revoke(in_file(gone).serial_number, 12345)
                assert isinstance(await store.commit(WRITE), Committed), "its connection stands"
                with pytest.raises(StoreUnavailable):
                    await status(node.client_url, lambda: gone.tls)
                for url in urls_of(node):
                    assert turned_away(url, gone)
                    assert not turned_away(url, files)
                await supervisor.restart(timeout_s=30)
                with pytest.raises(StoreUnavailable):
                    await store.commit(WRITE)
                gone.renew()  # another certificate: whoever issues it again lets it in again
                await eventually(lambda: store.commit(WRITE))
                crl.unlink()
                assert all(turned_away(url, files) for url in urls_of(node)), "without its list it lets nobody in"
                revoke(in_file(gone).serial_number)
                assert (await status(node.client_url, lambda: files.tls)).healthy

    run(scenario())


def turned_away(url: str, files: VoterFiles) -> bool:
    """Whether a request with this certificate gets no answer."""
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    made.check_hostname, made.verify_mode = False, ssl.CERT_NONE
    made.load_cert_chain(files.tls.cert_file, files.tls.key_file)
    host, _, port = url.rpartition("//")[2].rpartition(":")
    with contextlib.closing(http.client.HTTPSConnection(host, int(port), timeout=CALL_S, context=made)) as sent:
        try:
            sent.request("GET", "/version")
            return sent.getresponse().status != 200
        except (ConnectionError, ssl.SSLError):
            return True


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
