"""Files of attempts' scratch spaces, for others than the attempt: which may have put anything at all there.

Nothing outside the space is ever reached, whatever links there are, nor is anything opened but files and directories:
names are resolved by the kernel beneath a descriptor of the space (or, on an old kernel, step by step without any
link), and looked at before they are opened.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import stat
import struct
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from spinetta.errors import NotFound, UserError

KEPT = "kept"  # in the shim's state directory: scratch spaces of ended attempts, as KEY@SECONDS
READ_BYTES = 256 << 10
DEPTH_MAX = 64  # of directories: one descriptor each
NAMES_MAX = 20  # of what was left out
_OPENAT2 = 437  # on every machine
_NO_MAGICLINKS, _BENEATH = 0x02, 0x08
_BLOCK = tarfile.BLOCKSIZE
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(slots=True)
class Skipped:
    """What was left out of an archive: some of the names, and how many."""

    names: list[str] = field(default_factory=list)
    count: int = 0

    def add(self, name: str) -> None:
        """One more."""
        self.count += 1
        if len(self.names) < NAMES_MAX:
            self.names.append(name)


def kept_folder(state_dir: Path, key: str) -> Path | None:
    """Where the scratch space of an ended attempt is kept; None when it is not."""
    with contextlib.suppress(FileNotFoundError), os.scandir(state_dir / KEPT) as entries:
        for entry in entries:
            if entry.name.partition("@")[0] == key:
                return Path(entry.path)
    return None


def open_beneath(root: Path, path: str) -> int:
    """Open a file or directory in `root` for reading, without ever leaving it or waiting for anybody.

    Raises:
        FileNotFoundError: there is no `root`.
        NotFound: no such file.
        UserError: the way leads out, or there is something else than a file or directory, or it may not be read.
    """
    if "\0" in path:
        raise UserError("a path holds no NUL character", field="path")
    base = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        seen = _resolve(base, path or ".")
    except OSError as error:
        raise _refused(path, error) from None
    finally:
        os.close(base)
    try:
        kind = stat.S_IFMT(os.fstat(seen).st_mode)
        if kind not in (stat.S_IFREG, stat.S_IFDIR):
            raise UserError(f"{path} is neither a file nor a directory", field="path", reason="unreadable")
        # Looked at first: to open a FIFO or a device may do something, or take for ever.
        return os.open(f"/proc/self/fd/{seen}", os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError as error:
        raise _refused(path, error) from None
    finally:
        os.close(seen)


def _resolve(base: int, path: str) -> int:
    how = struct.pack("=QQQ", os.O_PATH | os.O_CLOEXEC, 0, _BENEATH | _NO_MAGICLINKS)
    found = _libc.syscall(
        ctypes.c_long(_OPENAT2), ctypes.c_int(base), os.fsencode(path), how, ctypes.c_size_t(len(how))
    )
    if found >= 0:
        return int(found)
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EPERM):  # before Linux 5.6, or forbidden around us
        return walk(base, path)
    raise OSError(number, os.strerror(number))


def walk(base: int, path: str) -> int:
    """The same without the kernel's help: no link at all, and no way up."""
    if path.startswith("/"):
        raise OSError(errno.EXDEV, "leads out")
    at = os.dup(base)
    try:
        for part in path.split("/"):
            if part in ("", "."):
                continue
            if part == "..":
                raise OSError(errno.EXDEV, "leads up")
            step = os.open(part, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=at)
            os.close(at)
            at = step
            if stat.S_ISLNK(os.fstat(at).st_mode):
                raise OSError(errno.ELOOP, "a link")
    except OSError:
        os.close(at)
        raise
    return at


def _refused(path: str, error: OSError) -> UserError:
    match error.errno:
        case errno.ENOENT | errno.ENOTDIR:
            return NotFound(f"there is no {path} in its scratch space", field="path", hint="copy . to get all of it")
        case errno.EXDEV | errno.ELOOP:
            return UserError(
                f"{path} leads out of the scratch space",
                field="path",
                reason="unreadable",
                hint="links are followed only within it; name the file itself",
            )
        case _:
            return UserError(f"{path} cannot be read: {error.strerror}", field="path", reason="unreadable")


def read_file(fd: int) -> Iterator[bytes]:
    """The bytes of a file as it is now: not what is appended while it is read."""
    left = os.fstat(fd).st_size
    while left > 0 and (data := os.read(fd, min(left, READ_BYTES))):
        left -= len(data)
        yield data


def read_tree(fd: int, skipped: Skipped) -> Iterator[bytes]:
    """A tar archive (POSIX) of what is in a directory: files, directories and symbolic links, the latter unread.

    A file that becomes shorter meanwhile ends in zeros, for its size has been told by then.
    """
    yield from _entries(os.dup(fd), "", skipped, 0)
    yield bytes(2 * _BLOCK)


def _entries(fd: int, prefix: str, skipped: Skipped, depth: int) -> Iterator[bytes]:
    """Of one directory, whose descriptor is closed in the end."""
    try:
        with os.scandir(fd) as entries:
            for entry in entries:
                name = prefix + entry.name
                try:
                    yield from _entry(fd, entry.name, name, skipped, depth)
                except OSError:  # gone meanwhile, or not ours to read
                    skipped.add(name)
    finally:
        os.close(fd)


def _entry(folder: int, name: str, path: str, skipped: Skipped, depth: int) -> Iterator[bytes]:
    seen = os.stat(name, dir_fd=folder, follow_symlinks=False)
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    if stat.S_ISLNK(seen.st_mode):
        header = _header(path, seen, tarfile.SYMTYPE)
        header.linkname = os.readlink(name, dir_fd=folder)
        yield _encoded(header)
    elif stat.S_ISDIR(seen.st_mode) and depth < DEPTH_MAX:
        inner = os.open(name, flags | os.O_DIRECTORY, dir_fd=folder)
        yield _encoded(_header(path, seen, tarfile.DIRTYPE))
        yield from _entries(inner, path + "/", skipped, depth + 1)
    elif stat.S_ISREG(seen.st_mode):
        fd = os.open(name, flags, dir_fd=folder)
        try:
            now = os.fstat(fd)
            if not stat.S_ISREG(now.st_mode):  # exchanged a moment ago
                skipped.add(path)
                return
            yield from _file(fd, path, now)
        finally:
            os.close(fd)
    else:
        skipped.add(path)


def _file(fd: int, path: str, seen: os.stat_result) -> Iterator[bytes]:
    header = _header(path, seen, tarfile.REGTYPE)
    header.size = seen.st_size
    yield _encoded(header)
    left = header.size
    while left > 0:
        data = os.read(fd, min(left, READ_BYTES)) or bytes(min(left, READ_BYTES))
        left -= len(data)
        yield data
    if over := header.size % _BLOCK:
        yield bytes(_BLOCK - over)


def _header(path: str, seen: os.stat_result, kind: bytes) -> tarfile.TarInfo:
    header = tarfile.TarInfo(path)
    header.type = kind
    header.mode = stat.S_IMODE(seen.st_mode)
    header.mtime = int(seen.st_mtime)
    return header


def _encoded(header: tarfile.TarInfo) -> bytes:
    return header.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")
