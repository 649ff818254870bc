"""What `spinetta cp` writes: only where it was told to, whatever a node sends."""

from __future__ import annotations

import asyncio
import errno
import gc
import io
import os
import re
import sys
import tarfile
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

from spinetta.cli import copy
from spinetta.client.execs import CopiedEntry, CopySkipped
from spinetta.errors import OutcomeUnknown, StoreUnavailable, UserError
from spinetta.model import TaskId

Part = CopiedEntry | bytes | CopySkipped


def entry(name: str, *, is_directory: bool = False, **fields: Any) -> CopiedEntry:
    return CopiedEntry(TaskId("t"), 1, "n1", name, is_directory, fields.get("size", 0), fields.get("mode", 0o644), 1000)


def received(parts: Sequence[Part | Exception], target: Path) -> Any:
    async def come() -> AsyncIterator[Part]:
        for part in parts:
            if isinstance(part, Exception):
                raise part
            yield part

    async def scenario() -> Any:
        async with asyncio.timeout(20):
            return await copy._receive(come(), str(target), copy._Progress(shows=False))

    return asyncio.run(scenario())


def archive(*members: tuple[str, bytes, str]) -> bytes:
    """Members: name, type, and content or target of a link."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, kind, text in members:
            member = tarfile.TarInfo(name)
            member.type = kind
            data = text.encode() if kind == tarfile.REGTYPE else b""
            member.size = len(data)
            member.mode = 0o4777
            member.linkname = "" if kind == tarfile.REGTYPE else text
            tar.addfile(member, io.BytesIO(data))
    return out.getvalue()


def test_a_file(tmp_path: Path) -> None:
    for target, path in ((tmp_path, tmp_path / "a.csv"), (tmp_path / "b", tmp_path / "b")):
        done = received([entry("a.csv", mode=0o4640), b"one,", b"two"], target)
        assert path.read_bytes() == b"one,two"
        assert path.stat().st_mode & 0o7777 & ~0o027 == 0o640 & ~0o027
        assert path.stat().st_mtime == 1.0
        assert (done.path, done.bytes) == (str(path), 7)
    received([entry("a.csv"), b"three"], tmp_path)
    assert (tmp_path / "a.csv").read_bytes() == b"three"
    received([entry("a.csv"), b"gone"], Path("/dev/null"))


@pytest.mark.parametrize("name", ["../a", "/etc/a", "..", ".", "", "a/b"])
def test_a_name_that_leads_elsewhere_is_not_used(tmp_path: Path, name: str) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    received([entry(name), b"x"], inner)
    assert [p.name for p in inner.iterdir()] == ["t.1"]
    assert [p.name for p in tmp_path.iterdir()] == ["inner"]


def test_a_copy_that_broke_off_leaves_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a").write_text("before")
    with pytest.raises(OutcomeUnknown, match="only a part"):
        received([entry("a"), b"half", StoreUnavailable("it went away")], tmp_path)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a", "before")]
    with pytest.raises(UserError, match=f"^{re.escape(str(tmp_path / 'no/place'))} cannot be written: No such file"):
        received([entry("a"), b"x"], tmp_path / "no" / "place")
    half = archive(("file", tarfile.REGTYPE, "x" * 100_000))[:50_000]
    with pytest.raises(OutcomeUnknown, match="only a part"):
        received([entry("d", is_directory=True), half], tmp_path)
    with pytest.raises(OutcomeUnknown, match="only a part"):
        received([entry("e", is_directory=True), half, StoreUnavailable("it went away")], tmp_path)
    gc.collect()
    assert not caplog.records, "a traceback, of the thread that unpacked"


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Path("/dev/full").open("wb", buffering=0) as full, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", SimpleNamespace(buffer=full))
        with pytest.raises(UserError, match=r"^standard output cannot be written: No space left on device \("):
            received([entry("a"), b"x" * 100_000], Path("-"))

    def none_left(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tarfile.TarFile, "extract", none_left)
    half = archive(("file", tarfile.REGTYPE, "x"))
    with pytest.raises(UserError, match="d cannot be written: No space left on device; what is there is only a part"):
        received([entry("d", is_directory=True), half], tmp_path / "d")


def test_into_a_task() -> None:
    done = CliRunner().invoke(copy.copy, ["a.csv", "0190b6d3:a.csv"], standalone_mode=False)
    assert isinstance(done.exception, UserError)
    assert "spinetta exec -i 0190b6d3 -- sh -c 'cat > FILE' < a.csv" in done.exception.hint


def test_a_directory(tmp_path: Path) -> None:
    data = archive(("sub", tarfile.DIRTYPE, ""), ("sub/file", tarfile.REGTYPE, "x" * 3_000_000))
    pieces = [data[i : i + 10_000] for i in range(0, len(data), 10_000)]
    done = received([entry("d", is_directory=True), *pieces, CopySkipped(("fifo",), 3)], tmp_path)
    assert (tmp_path / "d/sub/file").stat().st_size == 3_000_000
    assert not (tmp_path / "d/sub/file").stat().st_mode & 0o7000, "no rights that a file is not to have"
    assert (done.path, done.skipped, done.skipped_count) == (str(tmp_path / "d"), ["fifo"], 3)
    received([entry("d", is_directory=True), data], tmp_path / "new")
    assert (tmp_path / "new/sub/file").exists()
    received([entry("", is_directory=True), data], tmp_path / "new")
    assert sorted(os.listdir(tmp_path / "new")) == ["sub"]  # noqa: PTH208 - only names


def test_an_archive_that_leads_elsewhere(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    members = (
        ("../outside/a", tarfile.REGTYPE, "x"),
        (f"{outside}/b", tarfile.REGTYPE, "x"),
        ("link", tarfile.SYMTYPE, "../outside"),
        ("link/c", tarfile.REGTYPE, "x"),
        ("absolute", tarfile.SYMTYPE, str(outside)),
        ("absolute/d", tarfile.REGTYPE, "x"),
        ("hard", tarfile.LNKTYPE, "../outside/e"),
        ("device", tarfile.CHRTYPE, ""),
        ("fifo", tarfile.FIFOTYPE, ""),
        ("fine", tarfile.REGTYPE, "x"),
    )
    done = received([entry("d", is_directory=True), archive(*members)], tmp_path)
    assert list(outside.iterdir()) == []
    assert (tmp_path / "d/fine").read_text() == "x"
    assert done.skipped_count >= 5
    assert not (tmp_path / "d/device").exists()
    assert not (tmp_path / "d/fifo").exists()
    assert not (tmp_path / "d/link").is_symlink()
