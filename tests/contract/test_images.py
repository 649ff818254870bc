"""Images from every kind of place, had once, kept while they are wanted. Real skopeo, umoci and registry."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import stat
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from spinetta.errors import Denied, NotFound, UserError
from spinetta.imageref import parse
from spinetta.runtime.images import errands, records
from tests.contract import imagefiles as files
from tests.contract.image_world import (
    BASE,
    LIMITS,
    MIB,
    Registry,
    children_of,
    had,
    left_over,
    opened,
    registry,
    rootfs,
    run,
    until,
)

pytestmark = [pytest.mark.contract, pytest.mark.skipif(os.geteuid() != 0, reason="shifts owners: takes root")]
CONFIG = {
    "Env": ["A=b", "PATH=/bin"],
    "Entrypoint": ["/bin/sh", "-c"],
    "Cmd": ["true"],
    "User": "ann",
    "WorkingDir": "/home/ann",
}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One image in every form, built once."""
    at = tmp_path_factory.mktemp("images")
    base = files.base()
    files.layout(at / "layout", [base], config=CONFIG)
    files.layout(at / "zipped", [base], config=CONFIG, how="gzip")
    files.oci_archive(at / "oci.tar", at / "layout")
    files.docker_archive(at / "docker.tar", [base], config=CONFIG)
    root = at / "root"
    root.mkdir()
    subprocess.run(["tar", "-xpf", "-", "-C", root], input=base, check=True)
    (at / "root.tar").write_bytes(base)
    for program, end in (("gzip", "gz"), ("xz", "xz"), ("zstd", "zst")):
        packed = subprocess.run([program, "-1", "-c"], input=base, check=True, capture_output=True).stdout
        (at / f"root.tar.{end}").write_bytes(packed)
    return at


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory, shared: Path) -> Iterator[Registry]:
    with registry(tmp_path_factory.mktemp("registry")) as found:
        found.push(shared / "layout", "lab/tool:1")
        yield found


FORMS = [
    "oci:{}/layout", "oci:{}/layout:latest", "oci:{}/zipped", "oci-archive:{}/oci.tar", "docker-archive:{}/docker.tar",
    "docker-archive:{}/docker.tar:tool:1", "rootfs:{}/root", "rootfs:{}/root.tar", "rootfs:{}/root.tar.gz",
    "rootfs:{}/root.tar.zst", "{}/layout", "{}/oci.tar", "{}/docker.tar", "{}/root", "{}/root.tar.xz",
]  # fmt: skip


def test_every_form_of_an_image_becomes_the_same_root_file_system(shared: Path, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with opened(tmp_path) as store:
            found = {form: await had(store, form.format(shared)) for form in FORMS}
            assert {r.tree for r in found.values()} == {found[FORMS[0]].tree}
            by_content = {r.digest for f, r in found.items() if "root" in f}
            assert len(by_content) <= 2, (
                "a directory and a tar file of it may differ in times, compression does not count"
            )
            with_config = [r for f, r in found.items() if "root" not in f]
            for record in with_config:
                assert record.env == ("A=b", "PATH=/bin")
                assert (record.entrypoint, record.cmd) == (("/bin/sh", "-c"), ("true",))
                assert record.user == (1234, 100, 500)
                assert record.workdir == "/home/ann"
            at = rootfs(tmp_path, with_config[0])
            assert (at / "home/ann").stat().st_uid == BASE + 1234
            assert (at / "bin/sh").readlink() == Path("busybox")
            for point in ("proc", "dev", "sys", "tmp", "work", "run/secrets/spinetta", ".spinetta"):
                assert stat.S_ISDIR((at / point).lstat().st_mode)
                assert (at / point).stat().st_uid == BASE
            assert (at / ".spinetta/init").is_file()
            assert stat.S_IMODE((at / "tmp").stat().st_mode) == 0o1777
            whole = at.parent.stat()
            assert (whole.st_uid, whole.st_gid, stat.S_IMODE(whole.st_mode)) == (0, BASE, 0o710)
            assert await store.verify(with_config[0].digest) == []
        assert set(left_over(tmp_path)) == {r.directory for r in found.values()}

    run(scenario())


def test_a_registry_is_asked_once_and_a_moved_tag_is_noticed_when_pulled(
    shared: Path, hub: Registry, tmp_path: Path
) -> None:
    async def scenario() -> None:
        other = tmp_path / "other"
        files.layout(other, [files.base(), files.layer(files.Entry("etc/new", b"1"))])
        hub.push(shared / "layout", "lab/moving:1")
        name = f"docker://{hub.host}/lab/moving:1"
        async with opened(tmp_path) as store:
            first = await had(store, name)
            asked = hub.asked("lab/moving")
            async with store.use(parse(name), "t.1") as prepared:
                assert prepared.digest == first.digest
                assert prepared.user == (1234, 100)
                assert prepared.groups == (500,)
            assert hub.asked("lab/moving") == asked
            assert (await had(store, name)).digest == first.digest
            hub.push(other, "lab/moving:1")
            async with store.use(parse(name), "t.2") as prepared:
                assert prepared.digest == first.digest, "what is here is used"
            second = await had(store, name)
            assert second.digest != first.digest
            assert store.find(name).digest == second.digest
            assert store.find(first.digest).names == {}
            # By either digest, without the registry.
            for digest in (second.digest, *second.sources):
                async with store.use(parse(f"docker://nowhere.invalid/lab/moving@{digest}"), "t.3") as prepared:
                    assert prepared.digest == second.digest
                async with store.use(parse(digest), "t.4") as prepared:
                    assert prepared.digest == second.digest
        async with opened(tmp_path) as store:  # remembered
            assert store.find(name).digest == second.digest
            assert len(store.images()) == 2

    run(scenario())


def test_an_image_in_dockers_own_format_is_known_by_both_digests(shared: Path, hub: Registry, tmp_path: Path) -> None:
    async def scenario() -> None:
        hub.push(shared / "zipped", "lab/docker-format:1", "--format", "v2s2")
        name = f"docker://{hub.host}/lab/docker-format"
        async with opened(tmp_path) as store:
            record = await had(store, f"{name}:1")
            [source] = record.sources
            assert source != record.digest
            assert {record.digest, source} <= set(store.digests())
            asked = hub.asked("docker-format")
            assert (await had(store, f"{name}@{source}")).digest == record.digest
            assert hub.asked("docker-format") == asked
            store.remove(record.digest)
            again = await had(store, f"{name}@{source}")
            assert (again.digest, again.sources, again.tree) == (record.digest, (source,), record.tree)
            with pytest.raises(NotFound):
                await had(store, f"{name}@sha256:{'0' * 64}")

    run(scenario())


def test_what_a_registry_does_not_have_or_nobody_serves_is_said_clearly(hub: Registry, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with opened(tmp_path) as store:
            with pytest.raises(NotFound, match="no such image"):
                await had(store, f"docker://{hub.host}/lab/absent:1")
            with pytest.raises(UserError, match="cannot be reached") as e:
                await had(store, "docker://127.0.0.1:1/lab/tool:1")
            assert e.value.reason == "registry-unreachable"
            with pytest.raises(NotFound, match="no mirror is set"):
                await had(store, "tool:1")
            with pytest.raises(NotFound, match="this node has no image"):
                await had(store, "sha256:" + "00" * 32)
            for text in ("oci:/nowhere/at-all", "/nowhere/at-all", "rootfs:/nowhere"):
                with pytest.raises(NotFound, match="there is no"):
                    await had(store, text)
        assert left_over(tmp_path) == []

    run(scenario())


def test_bare_names_come_from_the_sites_mirror_or_are_an_administrators_own(
    shared: Path, hub: Registry, tmp_path: Path
) -> None:
    conf = tmp_path / "registries.conf"
    aliases = f'[aliases]\n"short" = "{hub.host}/lab/tool"\n'
    conf.write_text(f'unqualified-search-registries = ["{hub.host}"]\n{aliases}')
    hub.push(shared / "layout", "tool:1")

    async def scenario() -> None:
        async with opened(tmp_path, registries_conf=str(conf)) as store:
            found = await had(store, "tool:1")
            assert {"tool:1", f"docker://{hub.host}/tool:1"} <= set(found.names)
            assert (await had(store, "short:1")).digest == found.digest
            with pytest.raises(NotFound):
                await had(store, "unknown:1")
            with pytest.raises(NotFound):
                await had(store, "tool:2")
            mine = await had(store, f"rootfs:{shared}/root.tar", name="my/own:2")
            async with store.use(parse("my/own:2"), "t.1", allows=()) as prepared:
                assert prepared.digest == mine.digest
        conf.write_text(f'unqualified-search-registries = ["127.0.0.1:1", "{hub.host}"]')
        async with opened(tmp_path, registries_conf=str(conf)) as store:
            assert (await had(store, "tool:1")).digest == found.digest
            with pytest.raises(UserError, match="cannot be reached"):  # the first one may have it
                await had(store, "unknown:1")
        conf.write_text("unqualified = [")
        async with opened(tmp_path, registries_conf=str(conf)) as store:
            with pytest.raises(UserError, match="cannot be used"):
                await had(store, "another:1")

    run(scenario())


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


def test_without_a_range_of_ids_everything_belongs_to_whoever_runs_the_node(shared: Path, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with opened(tmp_path, base=None) as store:
            record = await had(store, f"oci:{shared}/layout")
            at = rootfs(tmp_path, record)
            assert {p.lstat().st_uid for p in (at, *at.rglob("*"))} == {os.getuid()}
            assert record.user == (1234, 100, 500)
            assert await store.verify(record.digest) == []

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


@pytest.mark.parametrize("what", ["layer", "config", "manifest", "cut"])
def test_what_is_not_as_its_digest_says_is_refused(what: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        at = tmp_path / "layout"
        digest = files.layout(at, [files.base()], how="gzip")
        blobs = sorted((at / "blobs/sha256").iterdir(), key=lambda p: p.stat().st_size)
        chosen = {
            "layer": blobs[-1],
            "cut": blobs[-1],
            "manifest": at / "blobs/sha256" / digest.removeprefix("sha256:"),
        }
        path = chosen.get(what) or next(b for b in blobs[:2] if b != chosen["manifest"])
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data if what != "cut" else data[: len(data) // 2])
        async with opened(tmp_path) as store:
            with pytest.raises(UserError):
                await had(store, f"oci:{at}")
            assert store.images() == []
        assert left_over(tmp_path) == []

    run(scenario())


def test_local_files_are_read_for_tasks_only_where_an_administrator_allows_it(shared: Path, tmp_path: Path) -> None:
    async def scenario() -> None:
        (tmp_path / "open").mkdir()
        (tmp_path / "open/link").symlink_to(shared / "root")
        shutil.copytree(shared / "layout", tmp_path / "open/layout")
        allows = [f"image:{tmp_path}/open"]
        async with opened(tmp_path) as store:
            for text in (f"rootfs:{shared}/root", f"oci:{shared}/layout", str(shared / "oci.tar"), "rootfs:/etc"):
                with pytest.raises(Denied) as e:
                    await store.acquire(parse(text), "t.1", allows=allows)
                assert e.value.reason == "not-allowed"
            with pytest.raises(Denied, match="is really"):
                await store.acquire(parse(f"rootfs:{tmp_path}/open/link"), "t.1", allows=allows)
            assert (await store.acquire(parse(f"{tmp_path}/open/layout"), "t.1", allows=allows)).rootfs.is_dir()
            with pytest.raises(Denied):
                await store.acquire(parse("docker://elsewhere.invalid/a"), "t.1", allows=["image:docker://r.invalid"])

    run(scenario())


def test_a_local_file_that_has_changed_is_read_anew(shared: Path, tmp_path: Path) -> None:
    async def scenario() -> None:
        path = tmp_path / "x.tar"
        shutil.copy(shared / "root.tar", path)
        async with opened(tmp_path) as store:
            first = (await store.acquire(parse(f"rootfs:{path}"), "t.1")).digest
            assert (await store.acquire(parse(f"rootfs:{path}"), "t.2")).digest == first
            path.write_bytes(files.layer(files.folder("bin"), files.Entry("bin/x", b"new")))
            second = (await store.acquire(parse(f"rootfs:{path}"), "t.3")).digest
            assert second != first
            assert store.find(first).names == {}

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


def test_a_user_that_the_image_does_not_know_is_told_and_not_guessed(tmp_path: Path) -> None:
    async def scenario() -> None:
        outside = tmp_path / "passwd"
        outside.write_text("eve:x:7:7::/:/bin/sh\n")
        linked = files.layer(files.folder("etc"), files.symlink("etc/passwd", str(outside)))
        inner = files.layer(
            files.folder("etc"), files.symlink("etc/passwd", "../../../real"), files.Entry("real", b"eve:x:8:9::/:\n")
        )
        files.layout(tmp_path / "a", [linked], config={"User": "eve"})
        files.layout(tmp_path / "b", [inner], config={"User": "eve:12"})
        files.layout(tmp_path / "c", [files.base()], config={"User": "99999"})
        files.layout(tmp_path / "d", [files.base()], config={"User": "4000:lab"})
        async with opened(tmp_path) as store:
            a, b, c, d = [await had(store, f"oci:{tmp_path}/{n}") for n in "abcd"]
            assert a.user is None
            assert "'eve' is not in its /etc/passwd" in a.user_trouble
            assert b.user == (8, 12)
            assert c.user is None
            assert "beyond" in c.user_trouble
            assert d.user == (4000, 500)

    run(scenario())


def test_records_survive_only_whole(tmp_path: Path) -> None:
    record = records.ImageRecord("sha256:" + "ab" * 32, names={"a:1": records.Name("s", 5)}, user=(1, 2, 3), base=7)
    data = records.encode(record)
    assert records.decode(data) == record
    for cut in range(0, len(data) - 1, 7):
        assert records.decode(data[:cut]) is None


def test_a_gzipped_image_of_several_layers_keeps_what_whiteouts_leave(tmp_path: Path) -> None:
    async def scenario() -> None:
        first = files.layer(
            files.folder("d"), files.Entry("d/a", b"1"), files.Entry("d/b", b"2"), files.folder("e"),
            files.Entry("e/x", b"1"), files.Entry("gone", b"3"), files.Entry("same", b"4"),
            files.hardlink("hard", "same"),
        )  # fmt: skip
        second = files.layer(
            files.Entry("d/.wh.a"), files.Entry("e/.wh..wh..opq"), files.Entry("e/y", b"5"), files.Entry(".wh.gone"),
            files.Entry("same", b"6"),
        )  # fmt: skip
        files.layout(tmp_path / "l", [first, second], how="gzip")
        async with opened(tmp_path) as store:
            at = rootfs(tmp_path, await had(store, f"oci:{tmp_path}/l"))
            assert not (at / "d/a").exists()
            assert (at / "d/b").read_bytes() == b"2"
            assert not (at / "e/x").exists()
            assert (at / "e/y").read_bytes() == b"5"
            assert not (at / "gone").exists()
            assert (at / "same").read_bytes() == b"6"
            assert (at / "hard").read_bytes() == b"4"
            assert not list(at.rglob(".wh.*"))

    run(scenario())


def test_layers_compressed_with_zstd(tmp_path: Path) -> None:
    base = files.base()
    packed = subprocess.run(["zstd", "-c"], input=base, check=True, capture_output=True).stdout

    async def scenario() -> None:
        at = tmp_path / "l"
        files.layout(at, [base])
        index = json.loads((at / "index.json").read_text())
        blobs = at / "blobs/sha256"
        manifest = json.loads((blobs / index["manifests"][0]["digest"].removeprefix("sha256:")).read_text())
        manifest["layers"] = [
            {"mediaType": files.LAYER + "+zstd", "digest": files.digest_of(packed), "size": len(packed)}
        ]
        data = json.dumps(manifest).encode()
        for content in (packed, data):
            (blobs / files.digest_of(content).removeprefix("sha256:")).write_bytes(content)
        index["manifests"][0].update(digest=files.digest_of(data), size=len(data))
        (at / "index.json").write_text(json.dumps(index))
        async with opened(tmp_path) as store:
            record = await had(store, f"oci:{at}")
            assert record.digest == files.digest_of(data)
            assert (rootfs(tmp_path, record) / "bin/busybox").stat().st_size > MIB

    run(scenario())


def test_a_tar_file_of_no_image_is_refused(tmp_path: Path) -> None:
    async def scenario() -> None:
        (tmp_path / "text").write_text("hello")
        (tmp_path / "empty").mkdir()
        with tarfile.open(tmp_path / "notes.tar", "w") as tar:
            tar.add(tmp_path / "text", "notes")
        async with opened(tmp_path) as store:
            for name in ("text", "empty", "notes.tar"):
                with pytest.raises(UserError, match=r"no image|no tar file"):
                    await had(store, str(tmp_path / name))
        assert left_over(tmp_path) == []

    run(scenario())
