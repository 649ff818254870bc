"""Secrets as files for one attempt: in memory, for it alone, gone with it.

Where we may mount, the new process gets a mount namespace and a small tmpfs of its own, seen by it and its children
only. The kernel removes both with the last of them, whatever becomes of us. Elsewhere a folder in /dev/shm serves,
removed when the attempt has ended, or by the next shim.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from . import sysapi

VARIABLE = "SPINETTA_SECRETS"  # tells a task where its secrets are
CAPABILITY = "secret-files"
FILES_MAX = 32
FILE_BYTES_MAX = 64 << 10
_SHM = Path("/dev/shm")  # noqa: S108 - checked to be a tmpfs, and only a folder of our own in it is used
_PAGE_BYTES = 4096


@dataclass(frozen=True)
class Place:
    """Where attempts get their secrets.

    Attributes:
        mount: the folder over which each attempt mounts a tmpfs of its own; empty where we may not.
        folder: else, the folder that holds one for each attempt; empty when there is no way.
        why: what is in the way of mounting.
    """

    mount: str = ""
    folder: str = ""
    why: str = ""

    def __bool__(self) -> bool:
        return bool(self.mount or self.folder)

    def of(self, key: str) -> str:
        """Where an attempt finds its files."""
        return self.mount or f"{self.folder}/{key}"


def find_place(root: Path, name: str) -> Place:
    """What this machine allows. `root`: the state directory; `name`: unique to it, for a folder in /dev/shm."""
    mount = root / "secrets"
    why = _probe(mount)
    if not why:
        return Place(mount=str(mount))
    if not _is_tmpfs(_SHM):
        return Place(why=f"{why}, and {_SHM} is no tmpfs")
    return Place(folder=_folder(name), why=why)


def _folder(name: str) -> str:
    return str(_SHM / f"{name}-{os.geteuid()}")


def _probe(mount: Path) -> str:
    """Mount once in a child of our own; why that fails, or nothing."""
    try:
        mount.mkdir(mode=0o700, exist_ok=True)
        pid = os.fork()
    except OSError as error:
        return error.strerror or str(error)
    if pid == 0:
        code = 255
        try:
            mount_own(str(mount), {})
            code = 0
        except OSError as error:
            code = error.errno or 255
        finally:
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    return os.strerror(code) if code else ""


def _is_tmpfs(path: Path) -> bool:
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/mountinfo").read_text("utf-8", "surrogateescape").splitlines():
            before, _, after = line.partition(" - ")
            fields, kind = before.split(), after.split()[:1]
            if len(fields) > 4 and fields[4] == str(path) and kind == ["tmpfs"]:
                return os.access(path, os.W_OK | os.X_OK)
    return False


# --- in the new process, between fork and exec ---------------------------------------------------------------------


def provide(place: Place, key: str, files: Mapping[str, bytes]) -> None:
    """Put the files where `place.of(key)` says. OSError when they cannot be."""
    if place.mount:
        mount_own(place.mount, files)
        return
    _own_folder(place.folder)
    folder = place.of(key)
    os.mkdir(folder, 0o700)  # noqa: PTH102 - no pathlib between fork and exec
    write_files(folder, files)
    os.chmod(folder, 0o500)  # noqa: PTH101 - no pathlib between fork and exec


def mount_own(path: str, files: Mapping[str, bytes]) -> None:
    """Into a mount namespace of our own, with a tmpfs at `path` that nobody else sees, no larger than the files."""
    sysapi.unshare(sysapi.CLONE_NEWNS)
    sysapi.make_root_slave()
    pages = sum(len(data) // _PAGE_BYTES + 1 for data in files.values()) + 1
    sysapi.mount_tmpfs(path, f"mode=0700,size={pages * _PAGE_BYTES},nr_inodes={len(files) + 2}")
    write_files(path, files)
    sysapi.remount_read_only(path)


def write_files(folder: str, files: Mapping[str, bytes]) -> None:
    """New files, for their owner to read."""
    for name, data in files.items():
        fd = os.open(f"{folder}/{name}", os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o400)
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(fd, view) :]
        finally:
            os.close(fd)


def _own_folder(path: str) -> None:
    """Everybody may write to /dev/shm: what is there under our name must be ours, and for us alone."""
    with contextlib.suppress(FileExistsError):
        os.mkdir(path, 0o700)  # noqa: PTH102 - no pathlib between fork and exec
    found = os.lstat(path)
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise OSError(errno.EPERM, "not ours")


# --- in the shim ---------------------------------------------------------------------------------------------------


def remove(place: Place, key: str, names: Iterable[str]) -> bool:
    """An attempt has ended: remove its files where the kernel does not. False: something else is there as well."""
    if not place.folder:
        return True
    folder = place.of(key)
    with contextlib.suppress(OSError):
        os.chmod(folder, 0o700)  # noqa: PTH101 - as text, like above
    for name in names:
        with contextlib.suppress(OSError):
            os.unlink(f"{folder}/{name}")  # noqa: PTH108 - as text, like above
    try:
        os.rmdir(folder)  # noqa: PTH106 - as text, like above
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True


def left_over(name: str) -> Path | None:
    """The folder in which an earlier shim of this name may have left something; None when there is none of ours."""
    folder = _folder(name)
    with contextlib.suppress(OSError):
        if Path(folder).exists():
            _own_folder(folder)
            return Path(folder)
    return None


def remove_folder(place: Place) -> None:
    """The shim ends: remove the folder of all, if it is empty."""
    if place.folder:
        with contextlib.suppress(OSError):
            os.rmdir(place.folder)  # noqa: PTH106 - as text, like above
