"""Layers made by somebody who means harm: each refused, or of no effect outside of the image."""

from __future__ import annotations

import gzip
import os
import stat
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest

from spinetta.errors import UserError
from spinetta.runtime.images import tools
from spinetta.runtime.images.limits import Limits, Refused
from spinetta.runtime.images.records import ImageRecord
from tests.contract import imagefiles as files
from tests.contract.image_world import BASE, LIMITS, MIB, had, left_over, opened, rootfs, run
from tests.contract.imagefiles import Entry, device, folder, hardlink, symlink

pytestmark = [pytest.mark.contract, pytest.mark.skipif(os.geteuid() != 0, reason="shifts owners: takes root")]

REFUSED = {
    "a name that leads upwards": ([Entry("../../escaped", b"x")], "leads upwards"),
    "one that does so on its way": ([folder("a"), Entry("a/../../../escaped", b"x")], "leads upwards"),
    "a hard link to the outside": ([hardlink("passwd", "../../../../../etc/passwd")], "leads upwards"),
    "a whiteout of the parent": ([folder("a"), Entry("a/.wh...", b"")], "no name of a file"),
    "a whiteout of the directory itself": ([Entry(".wh..", b"")], "no name of a file"),
    "a whiteout of nothing": ([Entry(".wh.", b"")], "no name of a file"),
    "a whiteout on a path upwards": ([Entry("../.wh.outside", b"")], "leads upwards"),
    "an owner beyond the range": ([Entry("a", b"x", uid=70000)], "belongs to user 70000"),
    "a group beyond the range": ([Entry("a", b"x", gid=65536)], "belongs to user"),
    "a path of many directories": ([Entry("/".join("a" * 200), b"x")], "128 directories deep"),
    "a long name": ([Entry("x" * 300, b"x")], "too long"),
    "a long path": ([Entry("/".join(["x" * 200] * 20), b"x")], "too long"),
    "a long link": ([symlink("a", "x" * 3000)], "leads to more than"),
    "a kind that nobody knows": ([Entry("a", b"", kind=b"Z")], "unknown kind"),
    "/dev that leads elsewhere": ([symlink("dev", "/etc")], "/dev in the image is a symbolic link"),
    "/proc that leads elsewhere": ([symlink("proc", "../../../proc")], "/proc in the image is a symbolic link"),
    "/sys that is a file": ([Entry("sys", b"x")], "/sys in the image is not a directory"),
    "/run that leads elsewhere": ([symlink("run", "/")], "/run in the image is a symbolic link"),
    "/run/secrets that leads elsewhere": ([folder("run"), symlink("run/secrets", "/etc")], "a symbolic link"),
    "the place of the init": ([folder(".spinetta"), symlink(".spinetta/init", "/etc/shadow")], "no plain file"),
    "the place of the init, hidden": ([symlink(".spinetta", "/etc")], "/.spinetta in the image is a symbolic link"),
    "too many files": ([Entry(f"f{i}") for i in range(LIMITS.files_max + 1)], "more than 5000 files"),
}


async def pulled(directory: Path, *layers: bytes, how: str = "gzip", **changes: object) -> ImageRecord:
    files.layout(directory / "layout", layers, how=how)
    limits = replace(LIMITS, **changes)  # type: ignore[arg-type]
    async with opened(directory, limits=limits) as store:
        try:
            return await had(store, f"oci:{directory}/layout")
        except UserError:
            assert store.images() == []
            assert left_over(directory) == []
            raise


@pytest.mark.parametrize("what", REFUSED)
def test_refused(what: str, tmp_path: Path) -> None:
    entries, why = REFUSED[what]
    outside = sorted(p.name for p in tmp_path.parent.iterdir())
    with pytest.raises(UserError, match=why):
        run(pulled(tmp_path, files.layer(*entries)))
    assert not (tmp_path / "escaped").exists()
    assert sorted(p.name for p in tmp_path.parent.iterdir()) == outside


def test_links_to_the_outside_stay_inside(tmp_path: Path) -> None:
    """Written through, removed through, linked to: all of it happens within the image."""
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "kept").write_text("kept")
    up = "../" * 20
    first = files.layer(
        symlink("absolute", str(victim)),
        symlink("relative", f"{up}{str(victim).lstrip('/')}"),
        symlink("file", str(victim / "kept")),
        symlink("twice", "absolute"),
    )
    second = files.layer(
        Entry("absolute/one", b"1"),
        Entry("relative/two", b"2"),
        Entry("twice/three", b"3"),
        Entry("file", b"overwritten"),
        Entry("absolute/.wh.kept"),
        Entry("relative/.wh..wh..opq"),
        hardlink("stolen", "absolute/kept2"),
    )
    third = files.layer(hardlink("shadow", "/etc/shadow"))
    with pytest.raises(UserError):  # there is no such file in the image, and that of the machine does not count
        run(pulled(tmp_path, first, second))
    inside = tmp_path / "b"
    inside.mkdir()
    harmless = files.layer(
        Entry("absolute/one", b"1"), Entry("relative/two", b"2"), Entry("twice/three", b"3"), Entry("file", b"x"),
        Entry("absolute/.wh.kept"), Entry("relative/.wh..wh..opq"),
    )  # fmt: skip
    record = run(pulled(inside, first, harmless))
    with pytest.raises(UserError):
        run(pulled(tmp_path, third))
    assert [p.name for p in victim.iterdir()] == ["kept"]
    assert (victim / "kept").read_text() == "kept"
    at = rootfs(inside, record)
    assert (at / "file").read_bytes() == b"x"
    assert not (at / "file").is_symlink()


def test_names_that_begin_at_the_root_are_within_the_image(tmp_path: Path) -> None:
    mark = f"/spinetta-test-{os.getpid()}"
    record = run(
        pulled(tmp_path, files.layer(Entry(mark, b"x"), Entry(f"//{mark}-2", b"y"), Entry("././/a/./b", b"z")))
    )
    at = rootfs(tmp_path, record)
    assert (at / mark.lstrip("/")).read_bytes() == b"x"
    assert (at / "a/b").read_bytes() == b"z"
    assert not Path(mark).exists()
    assert not Path(f"{mark}-2").exists()


def test_a_root_that_is_not_a_directory_is_refused(tmp_path: Path) -> None:
    """The trick of a link in the place of the root itself, through which all later layers are written."""
    victim = tmp_path / "victim"
    victim.mkdir()
    for i, entry in enumerate((symlink(".", str(victim)), symlink("./", str(victim)), Entry(".wh..wh..opq"))):
        at = tmp_path / f"n{i}"
        at.mkdir()
        try:
            record = run(pulled(at, files.layer(entry), files.layer(Entry("written", b"x"))))
        except UserError:
            pass
        else:
            assert rootfs(at, record).is_dir()
            assert not rootfs(at, record).is_symlink()
    assert [*victim.iterdir()] == []


def test_devices_are_left_out_and_setuid_files_are_out_of_reach(tmp_path: Path) -> None:
    record = run(
        pulled(
            tmp_path,
            files.layer(
                folder("dev"),
                device("dev/mem", number=(1, 1)),
                device("disk", tarfile.BLKTYPE, (8, 0)),
                device("whiteout", number=(0, 0)),
                Entry("fifo", kind=tarfile.FIFOTYPE),
                Entry("su", b"#!/bin/sh\n", mode=0o6755),
                Entry("odd\n\x1b[31m\udcff name", b"x"),
                Entry(".wh..wh.aufs", b""),
            ),
        )
    )
    at = rootfs(tmp_path, record)
    assert record.left_out == 3
    kinds = {p.name: p.lstat().st_mode for p in at.rglob("*")}
    assert not any(stat.S_ISCHR(m) or stat.S_ISBLK(m) for m in kinds.values())
    su = (at / "su").lstat()
    assert su.st_uid == BASE, "of nobody on this machine"
    assert stat.S_IMODE(at.parent.stat().st_mode) == 0o710, "nobody but root and containers' root get there"
    assert at.parent.stat().st_gid == BASE


def test_extended_attributes_that_give_rights_or_steer_overlayfs_are_left_out(tmp_path: Path) -> None:
    pax = (
        ("SCHILY.xattr.user.plain", "kept"),
        ("SCHILY.xattr.user.overlay.opaque", "y"),
        ("SCHILY.xattr.trusted.overlay.redirect", "/etc"),
        ("SCHILY.xattr.security.capability", "\1\0\0\2\0\40" + "\0" * 14),
    )  # fmt: skip
    record = run(pulled(tmp_path, files.layer(Entry("a", b"x", pax=pax))))
    names = os.listxattr(rootfs(tmp_path, record) / "a")
    assert set(names) <= {"user.plain"}


def test_bombs_are_refused_before_they_fill_the_disk(tmp_path: Path) -> None:
    zeros = bytes(10 * MIB)
    with pytest.raises(UserError, match="unpacks to more") as e:
        run(pulled(tmp_path, *(files.layer(Entry(f"z{i}", zeros)) for i in range(3)), bytes_max=25 * MIB))
    assert e.value.reason == "too-large"
    (tmp_path / "one").mkdir()
    with pytest.raises(UserError, match="may have"):
        run(pulled(tmp_path / "one", files.layer(Entry("z", zeros)), file_bytes_max=5 * MIB))
    sparse = files.layer(
        Entry(
            "z", b"x", pax=(("GNU.sparse.major", "1"), ("GNU.sparse.minor", "0"), ("GNU.sparse.realsize", str(1 << 50)))
        )
    )
    (tmp_path / "sparse").mkdir()
    with pytest.raises(UserError):
        run(pulled(tmp_path / "sparse", sparse))


def test_what_comes_behind_the_end_of_a_layer_counts_too(tmp_path: Path) -> None:
    data = files.layer(Entry("a", b"x")) + bytes(30 * MIB)
    with pytest.raises(UserError, match="unpacks to more"):
        run(pulled(tmp_path, data, bytes_max=10 * MIB))


@pytest.mark.parametrize(
    "data",
    [
        b"no tar at all" * 100,
        files.layer(Entry("a", b"x" * 5000))[:3000],
        gzip.compress(b"twice"),
        files.layer(Entry("a", b"x", pax=(("path", "p" * (3 << 20)),))),
        files.layer(Entry("a", b"x", pax=(("size", "-1"),))),
        files.layer(Entry("a", b"x", pax=(("size", "9" * 400),))),
    ],
    ids=["nonsense", "cut", "compressed-twice", "a-header-of-3-MiB", "a-negative-size", "a-huge-size"],
)
def test_what_is_no_layer_is_refused(data: bytes, tmp_path: Path) -> None:
    with pytest.raises(UserError):
        run(pulled(tmp_path, data))


def test_a_layer_may_say_the_same_name_twice(tmp_path: Path) -> None:
    twice = files.layer(
        Entry("a", b"1"), Entry("a", b"2"), folder("a"), Entry("a/b", b"3"), symlink("c", "a"), Entry("c/d", b"4"),
        Entry("c", b"5"),
    )  # fmt: skip
    record = run(pulled(tmp_path, twice))
    at = rootfs(tmp_path, record)
    assert (at / "a/b").read_bytes() == b"3"
    assert (at / "c").read_bytes() == b"5"


@pytest.mark.parametrize(
    "config",
    [{"Env": "A=b"}, {"Env": ["A\0=b"]}, {"Cmd": [1]}, {"Entrypoint": {"a": 1}}, {"User": 5}, {"WorkingDir": ["/"]}],
    ids=str,
)
def test_a_configuration_that_is_not_of_the_right_form_is_refused(config: dict[str, object], tmp_path: Path) -> None:
    files.layout(tmp_path / "l", [files.layer(Entry("a", b"x"))], config=config)

    async def scenario() -> None:
        async with opened(tmp_path) as store:
            with pytest.raises(UserError):
                await had(store, f"oci:{tmp_path}/l")
        assert left_over(tmp_path) == []

    run(scenario())


def test_the_unpacking_tool_can_write_to_its_directory_and_nowhere_else(tmp_path: Path) -> None:
    """Whatever layers talk it into: the rest of the machine is read-only for it, and no file of it gives rights."""
    staging = tmp_path / "staging"
    staging.mkdir()
    words = f"touch inside && ! touch {tmp_path}/outside && ! touch /outside-{os.getpid()} && cat /proc/self/mountinfo"
    said = tools.run(["sh", "-c", words], staging, confine=staging).decode()
    assert (staging / "inside").exists()
    assert not (tmp_path / "outside").exists()
    own = next(line for line in said.splitlines() if f" {staging} " in line)
    assert {"rw", "nosuid", "nodev"} <= set(own.split()[5].split(","))
    with pytest.raises(Refused, match="too large"):
        tools.run(
            ["sh", "-c", "head -c 3000000 /dev/zero > big || kill -XFSZ $$"],
            staging,
            confine=staging,
            limits=Limits(file_bytes_max=MIB),
        )
