"""The store and etcd's members under mutual TLS: files, who is refused, growing. Real etcds."""

from __future__ import annotations

import asyncio
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest

from spinetta.errors import OutcomeUnknown, StoreUnavailable, UserError
from spinetta.model import Revision
from spinetta.store.connection import normal_endpoints
from spinetta.store.etcd import EtcdStore
from spinetta.store.members import Members, status, statuses
from spinetta.store.process import etcd_argv
from spinetta.store.tls import read
from spinetta.trust.certificates import key_pem, new_key
from spinetta.txn import Committed, Put, Txn
from tests.contract.etcds import Etcd, etcd, etcd_authority, replace_file
from tests.contract.test_membership import cluster
from tests.contract.tls_stores import (
    WRITE,
    eventually,
    run,
    store_of,
    urls_of,
    voter,
)

pytestmark = pytest.mark.contract


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
