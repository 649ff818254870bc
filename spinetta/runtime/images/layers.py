"""Layers looked at before they are unpacked: what the unpacking tool might be tricked or flooded with is refused."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import stat
import subprocess
import tarfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from spinetta.runtime.images.limits import COMPONENT_BYTES_MAX, DEPTH_MAX, NAME_BYTES_MAX, Limits, Refused

CHUNK_BYTES = 1 << 20
WHITEOUT = ".wh."
OPAQUE = ".wh..wh..opq"
# A layer's headers and padding: what a tar file may have beside its files, for each of them.
HEADERS_BYTES = 4096
_KNOWN = frozenset(
    {
        tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE,
        tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CONTTYPE, tarfile.GNUTYPE_SPARSE,
    }
)  # fmt: skip
_MAGIC = ((b"\x1f\x8b", "gzip"), (b"\xfd7zXZ\0", "xz"), (b"\x28\xb5\x2f\xfd", "zstd"), (b"BZh", "bzip2"))

Tell = Callable[[int], None]
"""Is told how many bytes more have been worked through."""


@dataclass(slots=True)
class Tally:
    """What all layers of an image come to.

    Attributes:
        ids: how many user and group ids there are; those of files must be below.
        devices: nodes that will be left out.
    """

    limits: Limits
    ids: int
    files: int = 0
    size_bytes: int = 0
    raw_bytes: int = 0
    devices: int = 0
    _tell: Tell = field(default=lambda _: None)

    def take(self, member: tarfile.TarInfo) -> None:
        """One entry of a layer.

        Raises:
            Refused: it could do harm, or is too much.
        """
        _check_name(member.name, "a file")
        parts = member.name.split("/")
        if parts[-1].startswith(WHITEOUT):
            of = parts[-1].removeprefix(WHITEOUT)
            if of in ("", ".", ".."):
                raise Refused(f"a layer removes {_shown(member.name)}, which is no name of a file")
            if len(parts) == 2 and parts[0] in ("", ".") and parts[1] == WHITEOUT + ".":
                raise Refused(f"a layer removes {_shown(member.name)}")
        if member.type not in _KNOWN:
            raise Refused(f"{_shown(member.name)} in a layer is of the unknown kind {member.type!r}")
        if member.islnk():
            _check_name(member.linkname, "a hard link")
        elif member.issym() and len(_encoded(member.linkname)) > NAME_BYTES_MAX:
            raise Refused(f"the symbolic link {_shown(member.name)} leads to more than {NAME_BYTES_MAX} characters")
        if not (0 <= member.uid < self.ids and 0 <= member.gid < self.ids):
            raise Refused(
                f"{_shown(member.name)} belongs to user {member.uid} and group {member.gid}; containers here have ids "
                f"below {self.ids}",
                hint="make the image with ordinary owners",
            )
        self.files += 1
        self.devices += member.ischr() or member.isblk()
        size = member.size if member.isreg() or member.type == tarfile.GNUTYPE_SPARSE else 0
        if size < 0 or size > self.limits.file_bytes_max:
            raise Refused(
                f"{_shown(member.name)} has {size} bytes; a file of an image may have {self.limits.file_bytes_max}",
                reason="too-large",
                hint="data belongs in a mount",
            )
        self.size_bytes += size
        if self.size_bytes > self.limits.bytes_max:
            raise _too_large(self.limits)
        if self.files > self.limits.files_max:
            raise Refused(
                f"the image has more than {self.limits.files_max} files", reason="too-large", hint="make it smaller"
            )

    def read(self, count: int) -> None:
        """So many bytes of layers, unpacked, have been read."""
        self.raw_bytes += count
        self._tell(count)
        if self.raw_bytes > self.limits.bytes_max + HEADERS_BYTES * (self.files + 1024):
            raise _too_large(self.limits)


def _too_large(limits: Limits) -> Refused:
    return Refused(
        f"the image unpacks to more than {limits.bytes_max} bytes", reason="too-large", hint="data belongs in a mount"
    )


def _encoded(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")


def _shown(name: str) -> str:
    return ascii(name if len(name) <= 100 else name[:97] + "...")


def _check_name(name: str, what: str) -> None:
    raw = _encoded(name)
    parts = [p for p in raw.split(b"/") if p not in (b"", b".")]
    if b".." in parts:
        raise Refused(f"the name of {what} in a layer leads upwards: {_shown(name)}")
    if not raw or b"\0" in raw:
        raise Refused(f"{what} in a layer has no usable name: {_shown(name)}")
    if len(raw) > NAME_BYTES_MAX or any(len(p) > COMPONENT_BYTES_MAX for p in parts):
        raise Refused(f"the name of {what} in a layer is too long: {_shown(name)}")
    if len(parts) > DEPTH_MAX:
        raise Refused(f"{what} in a layer is more than {DEPTH_MAX} directories deep: {_shown(name)}")


class Counted(io.RawIOBase):
    """A stream that tells a tally what is read from it."""

    def __init__(self, inner: IO[bytes], tally: Tally) -> None:
        super().__init__()
        self._inner = inner
        self._tally = tally

    def readable(self) -> bool:
        """It is."""
        return True

    def read(self, size: int = -1) -> bytes:
        """At most so many bytes; of a damaged stream Refused."""
        try:
            data = self._inner.read(size if 0 <= size <= CHUNK_BYTES else CHUNK_BYTES)
        except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as e:
            raise Refused(f"a layer is damaged: {e}") from None
        self._tally.read(len(data))
        return data


def check_layer(stream: IO[bytes], tally: Tally) -> None:
    """Look at every entry of a tar stream, to its very end.

    Raises:
        Refused: one could do harm, or it is no tar file.
    """
    counted = Counted(stream, tally)
    try:
        with tarfile.open(fileobj=_Whole(counted), mode="r|", errorlevel=0) as tar:
            for member in tar:
                tally.take(member)
                vars(tar)["members"] = []  # or millions of them would be kept
    except (tarfile.TarError, ValueError, UnicodeError, MemoryError, RecursionError) as e:
        raise Refused(f"a layer is no tar file that can be read: {type(e).__name__} {e}".rstrip()) from None
    while counted.read(CHUNK_BYTES):
        pass


class _Whole(io.RawIOBase):
    """Reads that give as much as is asked for, as tarfile wants them."""

    def __init__(self, inner: Counted) -> None:
        super().__init__()
        self._inner = inner

    def read(self, size: int = -1) -> bytes:
        """Exactly so many bytes, fewer at the end only."""
        parts = []
        while size > 0:
            data = self._inner.read(size)
            if not data:
                break
            parts.append(data)
            size -= len(data)
        return b"".join(parts)


def compression_of(path: Path) -> str:
    """``gzip``, ``xz``, ``zstd``, ``bzip2`` by how a file begins; empty: none of them."""
    with path.open("rb") as file:
        begins = file.read(8)
    return next((name for magic, name in _MAGIC if begins.startswith(magic)), "")


@contextmanager
def decompressed(path: Path, how: str) -> Iterator[IO[bytes]]:
    """A file's content, unpacked as it is read.

    Raises:
        Refused: there is no program for it.
    """
    if how == "zstd":
        with _zstd(path) as stream:
            yield stream
        return
    with path.open("rb") as file:
        match how:
            case "gzip":
                yield gzip.GzipFile(fileobj=file, mode="rb")  # type: ignore[misc] # enough of an IO
            case "xz":
                yield lzma.LZMAFile(file)  # noqa: SIM115 - the file below it is closed
            case "bzip2":
                yield bz2.BZ2File(file)
            case _:
                yield file


def there(stream: IO[bytes] | None) -> IO[bytes]:
    """A pipe that was asked for."""
    if stream is None:
        raise RuntimeError("a pipe that was asked for is not there")
    return stream


@contextmanager
def _zstd(path: Path) -> Iterator[IO[bytes]]:
    try:
        process = subprocess.Popen(
            ["zstd", "-q", "-d", "-c", "--", str(path)], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE
        )
    except FileNotFoundError:
        raise Refused(
            f"{path.name} is compressed with zstd, and there is no program for it here",
            reason="missing-tool",
            hint="install zstd",
        ) from None
    with process:
        stdout = there(process.stdout)
        done = False
        try:
            yield stdout
            done = True
        finally:
            if not done or stdout.read(1):
                process.kill()
    if done and process.returncode:
        raise Refused(f"{path.name} is damaged: zstd cannot unpack it")


def is_special(mode: int) -> bool:
    """A device or a socket: nothing that an image may bring."""
    return stat.S_ISCHR(mode) or stat.S_ISBLK(mode) or stat.S_ISSOCK(mode)
