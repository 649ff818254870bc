"""A node's images: had once however many want them, kept while they are wanted, whole or not at all."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from spinetta.errors import NotFound, UserError
from spinetta.imageref import parse
from spinetta.runtime.images import errands, records
from tests.contract import imagefiles as files
from tests.contract.image_world import (
    LIMITS,
    MIB,
    Registry,
    children_of,
    had,
    hub,
    left_over,
    opened,
    rootfs,
    run,
    shared,
    until,
)

pytestmark = [pytest.mark.contract, pytest.mark.skipif(os.geteuid() != 0, reason="shifts owners: takes root")]
_ = (hub, shared)  # fixtures


def test_many_who_want_the_same_get_it_from_one_unpacking(shared: Path, hub: Registry, tmp_path: Path) -> None:
    async def scenario() -> None:
        hub.push(shared / "zipped", "lab/many:1")
        before = hub.asked("blobs/sha256")
        names = [f"docker://{hub.host}/lab/many:1", f"oci:{shared}/zipped"]
        steps: list[str] = []
        async with opened(tmp_path) as store:
            changes: list[tuple[tuple[str, ...], tuple[str, ...]]] = []
            store.listen(lambda: changes.append((store.digests(), store.coming())))
            async with asyncio.TaskGroup() as group:
                wanted = [
                    group.create_task(
                        store.acquire(parse(names[i % 2]), f"t.{i}", tell=lambda step: steps.append(step.phase))
                    )
                    for i in range(20)
                ]
            assert len({w.result().digest for w in wanted}) == 1
            digest = wanted[0].result().digest
            assert store.images()[0].uses == 20
            assert {"fetch", "check", "unpack", "list"} <= set(steps)
            await asyncio.sleep(0)
            assert any(digest in coming and digest not in here for here, coming in changes), "it was coming"
            assert changes[-1][1] == ()
            assert digest in changes[-1][0]
        assert hub.asked("blobs/sha256") - before <= 6  # the pushing asks, too
        assert left_over(tmp_path) == [digest.removeprefix("sha256:")]

    run(scenario())


def test_one_who_leaves_does_not_take_the_image_from_the_others_and_the_last_one_stops_it(
    shared: Path, tmp_path: Path
) -> None:
    async def scenario() -> None:
        slow = tmp_path / "slow"
        files.layout(slow, [files.base(), files.layer(*(files.Entry(f"f{i}", os.urandom(2000)) for i in range(1500)))])
        async with opened(tmp_path) as store:
            ref = parse(f"oci:{slow}")
            first = asyncio.create_task(store.acquire(ref, "t.1"))
            second = asyncio.create_task(store.acquire(ref, "t.2"))
            await until(store.coming, "it is being unpacked")
            first.cancel()
            prepared = await second
            assert first.cancelled()
            assert prepared.rootfs.is_dir()
            store.release("t.2")
            store.remove(prepared.digest)

            alone = [asyncio.create_task(store.acquire(ref, f"t.{i}")) for i in range(3)]
            await until(store.coming, "it is being unpacked again")
            await until(lambda: children_of(str(tmp_path)), "the tools run")
            for task in alone:
                task.cancel()
            await asyncio.wait(alone)
            assert all(t.cancelled() for t in alone)
            assert store.coming() == ()
            assert store.digests() == ()
            await until(lambda: not children_of(str(tmp_path)), "nothing runs any more")
            assert left_over(tmp_path) == []
            assert (await store.acquire(ref, "t.9")).rootfs.is_dir()

    run(scenario())


def test_a_store_that_is_closed_ends_what_is_under_way(shared: Path, tmp_path: Path) -> None:
    async def scenario() -> None:
        slow = tmp_path / "slow"
        files.layout(slow, [files.layer(*(files.Entry(f"f{i}", os.urandom(2000)) for i in range(1500)))])
        async with opened(tmp_path) as store:
            task = asyncio.create_task(store.acquire(parse(f"oci:{slow}"), "t.1"))
            await until(store.coming, "it is being unpacked")
        with pytest.raises(Exception, match="being closed"):
            await task
        await until(lambda: not children_of(str(tmp_path)), "nothing runs any more")
        async with opened(tmp_path) as store:
            assert left_over(tmp_path) == []
            await until(lambda: not [*(tmp_path / "images/trash").iterdir()], "the trash is empty")

    run(scenario())


DAEMON = """
import asyncio, sys
from pathlib import Path
from spinetta.imageref import parse
from tests.contract.image_world import opened

async def main():
    async with opened(Path(sys.argv[1])) as store:
        store.listen(lambda: print("coming", flush=True) if store.coming() else None)
        await store.acquire(parse(sys.argv[2]), "t.1")

asyncio.run(main())
"""


def test_a_daemon_that_is_killed_takes_its_workers_with_it(tmp_path: Path) -> None:
    slow = tmp_path / "slow"
    files.layout(slow, [files.layer(*(files.Entry(f"f{i}", os.urandom(2000)) for i in range(1500)))])
    home = tmp_path / "home"
    home.mkdir()
    daemon = subprocess.Popen(
        [sys.executable, "-c", DAEMON, str(home), f"oci:{slow}"], stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]
    )
    assert daemon.stdout is not None
    assert daemon.stdout.readline() == b"coming\n"
    daemon.kill()
    daemon.wait()
    daemon.stdout.close()

    async def scenario() -> None:
        await until(lambda: not children_of(str(home)), "nothing runs any more")
        assert len(left_over(home)) == 1, "it was half done"
        async with opened(home) as store:
            assert left_over(home) == []
            assert (await store.acquire(parse(f"oci:{slow}"), "t.1")).rootfs.is_dir()

    run(scenario())


def test_images_in_use_or_pinned_stay_and_others_go_by_age_and_size(shared: Path, tmp_path: Path) -> None:
    async def scenario() -> None:
        names = []
        for i in range(4):
            files.layout(tmp_path / f"l{i}", [files.base(), files.layer(files.Entry(f"only{i}", b"x"))])
            names.append(f"oci:{tmp_path}/l{i}")
        async with opened(tmp_path) as store:
            found = [await had(store, n) for n in names]
            size = found[0].size_bytes
            assert 1 * MIB < size < 4 * MIB
            store.pin(found[0].digest, True)
            await store.acquire(parse(names[1]), "t.1")
            with pytest.raises(UserError, match="is in use by 1") as e:
                store.remove(found[1].digest)
            assert e.value.reason == "in-use"
            with pytest.raises(UserError, match="is pinned"):
                store.remove(found[0].digest)
        # As after a restart: the attempt may run still.
        async with opened(tmp_path, keep_bytes=size) as store:
            assert len(store.images()) == 4, "nothing goes before it is known what runs"
            store.keep_only(["t.1"])
            await until(lambda: len(store.images()) == 2, "what is neither used nor pinned goes")
            assert {i.record.digest for i in store.images()} == {found[0].digest, found[1].digest}
            assert (store.remove(found[1].digest, force=True))[1] == "marked"
            assert found[1].digest not in store.digests()
            store.release("t.1")
            await until(lambda: len(store.images()) == 1, "it was marked")
            store.pin(found[0].digest, False)
            assert len(store.images()) == 1, "it fits"
        async with opened(tmp_path, keep_s=0.000001) as store:
            await until(lambda: not store.images(), "too old")
            await until(lambda: not [*(tmp_path / "images/trash").iterdir()], "removed")
        assert left_over(tmp_path) == []

    run(scenario())


def test_names_are_removed_one_by_one_and_the_image_with_the_last(shared: Path, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with opened(tmp_path) as store:
            record = await had(store, f"oci:{shared}/layout", name="a:1")
            await had(store, f"oci:{shared}/layout", name="b:1")
            assert (store.remove("a:1"))[1] == "unnamed"
            with pytest.raises(NotFound):
                store.find("a:1")
            assert store.find(record.digest[:20]).digest == record.digest
            assert (store.remove(record.digest[7:19]))[1] == "removed"
            assert store.images() == []
            with pytest.raises(NotFound, match="spinetta image list"):
                store.remove("b:1")

    run(scenario())


def test_what_a_crash_leaves_half_done_is_cleaned_at_the_start(shared: Path, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with opened(tmp_path) as store:
            whole = await had(store, f"oci:{shared}/layout", name="whole:1")
            broken = await had(store, f"rootfs:{shared}/root")
            await store.acquire(parse("whole:1"), "alive.1")
            await store.acquire(parse("whole:1"), "dead.1")
        images = tmp_path / "images"
        (images / "staging" / "abc" / "rootfs").mkdir(parents=True)
        (images / "unpacked" / ("0" * 64) / "rootfs").mkdir(parents=True)  # power cut: no record
        record = images / "unpacked" / broken.directory / "image.json"
        record.write_bytes(record.read_bytes()[:100])  # half written
        (images / "unpacked" / whole.directory / "image.json.new").write_text("{")
        (images / "trash" / "xyz").mkdir()
        (images / "uses" / "odd").write_text("nonsense")
        async with opened(tmp_path) as store:
            assert [i.record.digest for i in store.images()] == [whole.digest]
            assert store.images()[0].uses == 2
            store.keep_only(["alive.1"])
            assert store.images()[0].uses == 1
            await until(lambda: not [*(images / "trash").iterdir()], "removed")
            assert left_over(tmp_path) == [whole.directory]
            assert await store.verify("whole:1") == []
        async with opened(tmp_path, base=2_000_000) as store:  # another range of ids: of no use any more
            assert store.images() == []

    run(scenario())


def test_verifying_names_what_is_not_as_it_was(shared: Path, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with opened(tmp_path) as store:
            record = await had(store, f"oci:{shared}/layout")
            at = rootfs(tmp_path, record)
            (at / "etc/passwd").write_text("root::0:0::/:/bin/sh\n")
            (at / "etc/added").write_text("x")
            (at / "bin/sh").unlink()
            (at / "home/ann").chmod(0o777)
            assert await store.verify(record.digest) == [
                "/bin/sh is missing", "/etc/added was not there", "/etc/passwd is not what it was",
                "/home/ann is not what it was",
            ]  # fmt: skip
            listing = at.parent / "files.gz"
            listing.write_bytes(b"\x1f\x8b" + b"0" * 20)
            with pytest.raises(UserError) as e:
                await store.verify(record.digest)
            assert e.value.reason == "damaged"

    run(scenario())


def test_a_full_disk_is_said_and_nothing_is_left(shared: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(small)], check=True)

    async def scenario() -> None:
        big = tmp_path / "big"
        files.layout(big, [files.layer(files.Entry("big", os.urandom(9 * MIB)))])
        tight = tmp_path / "tight"  # fits once, fetched, and not twice
        files.layout(tight, [files.layer(files.Entry("big", os.urandom(4 * MIB)))])
        for free_min_bytes in (MIB, 0):
            limits = replace(LIMITS, free_min_bytes=free_min_bytes)
            async with opened(small, limits=limits) as store:
                for image in (big, tight):
                    with pytest.raises(UserError, match="no room on the disk") as e:
                        await had(store, f"oci:{image}")
                    assert e.value.reason == "no-space"
                assert left_over(small) == []
                assert (await had(store, f"oci:{shared}/layout")).files > 5
                store.remove(store.images()[0].record.digest)
                await until(lambda: not [*(small / "images/trash").iterdir()], "removed")

    async def making_room() -> None:
        fits = tmp_path / "fits"  # when nothing else is there
        files.layout(fits, [files.layer(files.Entry("big", os.urandom(3300 << 10)))])
        limits = replace(LIMITS, free_min_bytes=0)
        async with opened(small, limits=limits) as store:
            await had(store, f"oci:{shared}/layout", name="unused:1")
        async with opened(small, limits=limits) as store:
            await store.acquire(parse("unused:1"), "t.1")
            with pytest.raises(UserError, match="no room on the disk"):
                await had(store, f"oci:{fits}")
            store.release("t.1")
            found = await had(store, f"oci:{fits}")
            assert [i.record.digest for i in store.images()] == [found.digest], "what nothing used has gone for it"

    try:
        run(scenario())
        run(making_room())
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_a_registry_that_never_answers_is_given_up_and_nothing_is_left_of_it(tmp_path: Path) -> None:
    async def scenario() -> None:
        async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read()
            writer.close()

        server = await asyncio.start_server(silent, "127.0.0.1", 0)
        host, port = server.sockets[0].getsockname()[:2]
        told = {
            "source": f"docker://{host}:{port}/a:1", "staging": str(tmp_path), "policy": "/nowhere", "insecure": True,
            "registries_conf": "",
        }  # fmt: skip
        async with server:
            with pytest.raises(UserError, match="took longer than 1 s") as e:
                await errands.run("peek", told, limit_s=1.0)
            assert e.value.reason == "too-slow"
            await until(lambda: not children_of(str(tmp_path)), "nothing runs any more")

    run(scenario())


def test_records_survive_only_whole(tmp_path: Path) -> None:
    record = records.ImageRecord("sha256:" + "ab" * 32, names={"a:1": records.Name("s", 5)}, user=(1, 2, 3), base=7)
    data = records.encode(record)
    assert records.decode(data) == record
    for cut in range(0, len(data) - 1, 7):
        assert records.decode(data[:cut]) is None
