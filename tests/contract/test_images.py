"""Images from every kind of place, and what becomes of them. Real skopeo, umoci and registry."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import tarfile
from pathlib import Path

import pytest

from spinetta.errors import Denied, NotFound, UserError
from spinetta.imageref import parse
from tests.contract import imagefiles as files
from tests.contract.image_world import (
    BASE,
    MIB,
    Registry,
    had,
    hub,
    left_over,
    opened,
    rootfs,
    run,
    shared,
)

pytestmark = [pytest.mark.contract, pytest.mark.skipif(os.geteuid() != 0, reason="shifts owners: takes root")]
_ = (hub, shared)  # fixtures


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


def test_without_a_range_of_ids_everything_belongs_to_whoever_runs_the_node(shared: Path, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with opened(tmp_path, base=None) as store:
            record = await had(store, f"oci:{shared}/layout")
            at = rootfs(tmp_path, record)
            assert {p.lstat().st_uid for p in (at, *at.rglob("*"))} == {os.getuid()}
            assert record.user == (1234, 100, 500)
            assert await store.verify(record.digest) == []

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
