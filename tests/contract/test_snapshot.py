"""Snapshots of a real etcd: streamed, kept, checked, made into a cluster; and the end of a survivor's log."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import shutil
import stat
import subprocess
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import pytest

from spinetta.errors import OutcomeUnknown, StoreUnavailable, UserError
from spinetta.store.etcd import EtcdStore
from spinetta.store.members import status
from spinetta.store.offline import served
from spinetta.store.process import etcd_version, find_etcd, initial_cluster, parse_version
from spinetta.store.snapshot import SnapshotWriter, find_tool, restore, stream, verify
from spinetta.store.wal import wal_owner
from spinetta.store.walend import commit_tail
from spinetta.txn import Put, Txn
from tests.contract.etcds import Etcd, etcd

pytestmark = pytest.mark.timeout(120)


@contextlib.asynccontextmanager
async def store_of(*members: Etcd) -> AsyncIterator[EtcdStore]:
    store = EtcdStore([m.settings.client_url for m in members])
    try:
        yield store
    finally:
        await store.close()


async def save(store: EtcdStore, path: Path) -> None:
    with SnapshotWriter(path) as writer:
        async with contextlib.aclosing(stream(store.connections)) as pieces:
            async for piece in pieces:
                writer.write(piece.data)
        writer.finish()


async def value(store: EtcdStore, key: str) -> bytes | None:
    entry = (await store.read([key])).entries[key]
    return None if entry is None else entry.value


def test_what_is_saved_under_load_is_whole_and_becomes_another_cluster(tmp_path: Path) -> None:
    async def main() -> None:
        async with etcd() as member, store_of(member) as store:
            await store.commit(Txn(then=tuple(Put(f"/task/{i}", os.urandom(4000)) for i in range(100))))
            await store.commit(Txn(then=(Put("/a", b"before"),)))
            file, done = tmp_path / "all.db", asyncio.Event()

            async def load() -> int:
                n = 0
                while not done.is_set():
                    await store.commit(Txn(then=(Put("/load", b"%d" % n),)))
                    n += 1
                return n

            async with asyncio.TaskGroup() as group:
                loading = group.create_task(load())
                await save(store, file)
                done.set()
            assert loading.result() > 0
            assert stat.S_IMODE(file.stat().st_mode) == 0o600
            assert verify(file).file_bytes == file.stat().st_size
            assert names(tmp_path) == ["all.db"]
            assert etcdctl("snapshot", "status", str(file))

            version = parse_version(await etcd_version(find_etcd()))
            tool = await find_tool("etcd", version)
            owners = set()
            for token in ("one", "two"):
                made = tmp_path / token
                made.mkdir(mode=0o700)
                await restore(
                    tool, file, made / "etcd", name="a", peer_url=member.settings.peer_url, token=token
                )  # fmt: skip
                owners.add(wal_owner(made / "etcd"))
                async with served(replace(member.settings, data_dir=made / "etcd"), made, version, alone=False) as new:
                    assert await value(new, "/a") == b"before"
            owners.add(wal_owner(member.settings.data_dir))
            assert len(owners) == 3, "each has ids of its own"

    asyncio.run(main())


def names(folder: Path) -> list[str]:
    return sorted(each.name for each in folder.iterdir())


def etcdctl(*args: str) -> str:
    env = {**os.environ, "ETCDCTL_API": "3"}
    return subprocess.run(["etcdctl", *args], env=env, capture_output=True, text=True, check=True).stdout


def write(path: Path, data: bytes, *, then: Callable[[], object] = lambda: None) -> None:
    with SnapshotWriter(path) as writer:
        for at in range(0, len(data), 700):
            writer.write(data[at : at + 700])
        then()
        writer.finish()


def interrupted() -> None:
    raise KeyboardInterrupt


def snapshot_like(path: Path, sectors: int = 8) -> Path:
    data = os.urandom(512 * sectors)
    path.write_bytes(data + hashlib.sha256(data).digest())
    return path


@pytest.mark.parametrize(
    ("harm", "word"),
    [
        (lambda d: d[:-1], "cut short"),
        (lambda d: d[: 512 * 3 + 32], "damaged"),  # as long as another snapshot could be
        (lambda d: d[:700] + bytes([d[700] ^ 1]) + d[701:], "damaged"),
        (lambda d: d[:-32], "cut short"),
        (lambda _: b"", "cut short"),
        (lambda _: hashlib.sha256(b"").digest(), "cut short"),
    ],
)
def test_a_file_that_is_not_whole_is_refused(tmp_path: Path, harm: object, word: str) -> None:
    assert callable(harm)
    file = snapshot_like(tmp_path / "a.db")
    assert verify(file).file_bytes == 8 * 512 + 32
    file.write_bytes(harm(file.read_bytes()))
    with pytest.raises(UserError, match=word) as caught:
        verify(file)
    assert caught.value.reason == "damaged-snapshot"


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        verify(tmp_path / "none.db")


def test_what_is_cut_off_leaves_nothing(tmp_path: Path) -> None:
    whole = snapshot_like(tmp_path / "whole.db").read_bytes()
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "a.db", whole, then=interrupted)
    with pytest.raises(StoreUnavailable, match="damaged"):
        write(tmp_path / "a.db", whole[:-40])
    assert names(tmp_path) == ["whole.db"]
    write(tmp_path / "a.db", whole)
    assert verify(tmp_path / "a.db").file_bytes == len(whole)


def test_a_file_that_is_there_is_not_written_over(tmp_path: Path) -> None:
    file, whole = tmp_path / "a.db", snapshot_like(tmp_path / "whole.db").read_bytes()
    file.write_bytes(b"mine")
    with pytest.raises(UserError, match="is there already"):
        write(file, whole)
    file.unlink()
    with pytest.raises(UserError, match="meanwhile"):
        write(file, whole, then=lambda: file.write_bytes(b"theirs"))
    assert file.read_bytes() == b"theirs"
    assert names(tmp_path) == ["a.db", "whole.db"]


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path: Path) -> None:
    mount = tmp_path / "small"
    mount.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(mount)], check=False).returncode:
        pytest.skip("this machine does not let us mount")
    try:
        with pytest.raises(UserError, match="No space left") as caught:
            write(mount / "a.db", os.urandom(1 << 20))
        assert caught.value.reason == "disk"
        assert names(mount) == []
    finally:
        subprocess.run(["umount", str(mount)], check=True)


def test_the_survivors_log_counts_to_its_end(tmp_path: Path) -> None:
    """A leader has a write in its log that it cannot know to be agreed upon: alone, etcd would drop it."""

    async def main() -> None:
        members = [Etcd(tmp_path, name) for name in "abc"]
        cluster = initial_cluster([(m.settings.name, m.settings.peer_url) for m in members])
        for m in members:
            m.settings = replace(m.settings, initial_cluster=cluster)
            m.launch()
        try:
            await asyncio.gather(*(m.ready() for m in members))
            async with store_of(*members) as store:
                await store.commit(Txn(then=(Put("/agreed", b"1"),)))
                leader = await _leader(members)
            for m in members:
                if m is not leader:
                    m.kill()
            async with store_of(leader) as store:
                with pytest.raises((OutcomeUnknown, StoreUnavailable)):
                    await store.commit(Txn(then=(Put("/sent", b"2"),)), timeout_s=0.5)
            leader.kill()
            version = parse_version(await etcd_version(find_etcd()))
            for name, wanted in (("as-it-is", None), ("to-its-end", b"2")):
                copy = tmp_path / name
                copy.mkdir(mode=0o700)
                shutil.copytree(leader.settings.data_dir, copy / "etcd")
                if wanted is not None:
                    assert commit_tail(copy / "etcd") >= 1
                    assert commit_tail(copy / "etcd") == 0, "once is enough"
                async with served(leader.settings, copy, version) as alone:
                    assert await value(alone, "/agreed") == b"1"
                    assert await value(alone, "/sent") == wanted
        finally:
            for m in members:
                m.kill()

    asyncio.run(main())


async def _leader(members: list[Etcd]) -> Etcd:
    for m in members:
        found = await status(m.settings.client_url)
        if found.leader_id == found.member_id:
            return m
    raise AssertionError("nobody leads")


@pytest.mark.parametrize("cut", [1, 9, 100])
def test_a_log_that_is_cut_short_counts_to_its_last_whole_record(tmp_path: Path, cut: int) -> None:
    async def main() -> None:
        async with etcd() as member, store_of(member) as store:
            for i in range(20):
                await store.commit(Txn(then=(Put(f"/k{i}", b"x" * 50),)))
            member.kill()
            version = parse_version(await etcd_version(find_etcd()))
            copy = tmp_path / "copy"
            copy.mkdir(mode=0o700)
            shutil.copytree(member.settings.data_dir, copy / "etcd")
            log = next((copy / "etcd" / "member" / "wal").glob("*.wal"))
            data = log.read_bytes()
            end = len(data.rstrip(b"\0"))
            log.write_bytes(data[: end - cut] + bytes(len(data) - end + cut))
            commit_tail(copy / "etcd")
            async with served(member.settings, copy, version) as alone:
                assert await value(alone, "/k0") is not None

    asyncio.run(main())
