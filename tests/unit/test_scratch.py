"""Reading what a task has left: nothing outside is reached, nothing but files and directories is opened."""

from __future__ import annotations

import io
import os
import socket
import stat
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from spinetta.errors import NotFound, UserError
from spinetta.node import scratch
from spinetta.node.scratch import Skipped, kept_folder, open_beneath, read_file, read_tree


@pytest.fixture
def space(tmp_path: Path) -> Path:
    """A scratch space with all sorts of things, and a secret beside it."""
    (tmp_path / "secret").write_text("secret")
    space = tmp_path / "space"
    (space / "deep/er").mkdir(parents=True)
    (space / "file").write_text("content")
    (space / "deep/er/file").write_text("inner")
    for name, target in (
        ("inside", "deep/er/file"), ("up", "../secret"), ("absolute", str(tmp_path / "secret")), ("loop", "loop"),
        ("root", "/"), ("folder", "deep"), ("self", "/proc/self"), ("dangling", "nothing"),
    ):  # fmt: skip
        (space / name).symlink_to(target)
    os.mkfifo(space / "fifo")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(os.path.relpath(space / "socket"))
    if os.geteuid() == 0:
        os.mknod(space / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    return space


@pytest.fixture(params=["kernel", "steps"])
def resolver(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With the kernel's help, and without."""
    if request.param == "steps":
        monkeypatch.setattr(scratch, "_resolve", scratch.walk)
    return str(request.param)


def content(space: Path, path: str) -> bytes:
    fd = open_beneath(space, path)
    try:
        return b"".join(read_file(fd))
    finally:
        os.close(fd)


def test_files_within(space: Path, resolver: str) -> None:
    assert content(space, "file") == b"content"
    assert content(space, "./deep//er/file") == b"inner"
    if resolver == "kernel":
        assert content(space, "inside") == content(space, "folder/er/file") == content(space, "deep/../inside")


@pytest.mark.usefixtures("resolver")
@pytest.mark.parametrize(
    "path",
    ["up", "absolute", "root", "root/etc/passwd", "../secret", "deep/../../secret", "/etc/passwd", "loop", "..",
     "self/environ", "/proc/self/root/etc/passwd"],
)  # fmt: skip
def test_ways_out_are_refused(space: Path, path: str) -> None:
    with pytest.raises(UserError, match="leads out"):
        open_beneath(space, path)


@pytest.mark.usefixtures("resolver")
@pytest.mark.parametrize("path", ["fifo", "socket", "null"])
def test_what_is_no_file_is_not_opened(space: Path, path: str) -> None:
    if not (space / path).exists():
        pytest.skip("only root makes devices")
    with pytest.raises(UserError, match="neither a file nor a directory"):
        open_beneath(space, path)


@pytest.mark.usefixtures("resolver")
def test_what_is_not_there(space: Path) -> None:
    for path in ("nothing", "file/below", "deep/nothing"):
        with pytest.raises(NotFound):
            open_beneath(space, path)
    with pytest.raises(FileNotFoundError):
        open_beneath(space / "nothing", "file")
    with pytest.raises(UserError, match="NUL"):
        open_beneath(space, "a\0b")


def archived(space: Path, skipped: Skipped, between: Callable[[bytes], None] = lambda _: None) -> dict[str, bytes]:
    """What is in the archive of a space: content of files, targets of links, nothing of directories."""
    fd = open_beneath(space, ".")
    whole = b""
    try:
        for part in read_tree(fd, skipped):
            whole += part
            between(whole)
    finally:
        os.close(fd)
    found = {}
    with tarfile.open(fileobj=io.BytesIO(whole)) as archive:
        for member in archive:
            file = archive.extractfile(member) if member.isreg() else None
            found[member.name] = file.read() if file else member.linkname.encode()
    return found


def test_an_archive_holds_links_unread(space: Path) -> None:
    skipped = Skipped()
    found = archived(space, skipped)
    assert found["file"] == b"content"
    assert found["deep/er/file"] == b"inner"
    assert found["up"] == b"../secret"
    assert not any(name.startswith("root/") or data == b"secret" for name, data in found.items())
    assert sorted(skipped.names) == sorted({"fifo", "socket"} | ({"null"} if os.geteuid() == 0 else set()))


def test_files_that_change_meanwhile(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"a" * 1_000_000)

    def shorten(_whole: bytes) -> None:
        os.truncate(path, 10)

    found = archived(tmp_path, Skipped(), shorten)
    assert len(found["file"]) == 1_000_000
    path.write_bytes(b"b" * 600_000)
    fd = open_beneath(tmp_path, "file")
    parts = read_file(fd)
    first = next(parts)
    with path.open("ab") as more:
        more.write(b"c" * 600_000)
    assert first + b"".join(parts) == b"b" * 600_000
    os.close(fd)


def test_a_directory_exchanged_for_a_link(space: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    (outside / "er").mkdir(parents=True)
    (outside / "er/file").write_text("not yours")
    done = False

    def exchange(_whole: bytes) -> None:
        nonlocal done
        if not done:
            (space / "deep").rename(space / "gone")
            (space / "deep").symlink_to(outside)
            done = True

    assert b"not yours" not in archived(space, Skipped(), exchange).values()


def test_deep_and_strange_names(tmp_path: Path) -> None:
    at = tmp_path
    for _ in range(scratch.DEPTH_MAX + 2):
        at /= "d"
        at.mkdir()
    (tmp_path / "ü \n$(x)").write_text("odd")
    with open(os.fsencode(tmp_path) + b"/\xff", "wb") as odd:  # noqa: PTH123 - a name that is no text
        odd.write(b"bytes")
    (tmp_path / ("long" * 60)).write_text("long")
    skipped = Skipped()
    found = archived(tmp_path, skipped)
    assert found["ü \n$(x)"] == b"odd"
    assert found["\udcff"] == b"bytes"
    assert found["long" * 60] == b"long"
    assert skipped.count == 1


def test_where_a_space_is_kept(tmp_path: Path) -> None:
    assert kept_folder(tmp_path, "t.1") is None
    (tmp_path / "kept/t.1@60").mkdir(parents=True)
    (tmp_path / "kept/t.10@60").mkdir()
    assert kept_folder(tmp_path, "t.1") == tmp_path / "kept/t.1@60"
    assert kept_folder(tmp_path, "t.2") is None


def descriptors() -> Iterator[str]:
    yield from os.listdir("/proc/self/fd")  # noqa: PTH208 - only names


def test_no_descriptor_is_left(space: Path) -> None:
    before = len(list(descriptors()))
    for path in ("up", "fifo", "nothing", "root/etc"):
        with pytest.raises(UserError):
            open_beneath(space, path)
    archived(space, Skipped())
    fd = open_beneath(space, ".")
    tree = read_tree(fd, Skipped())
    next(tree)
    tree.close()  # type: ignore[attr-defined] # a generator
    os.close(fd)
    assert len(list(descriptors())) == before
