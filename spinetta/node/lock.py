"""One daemon per data directory: a lock that ends with its holder, and the holder's process id for `node stop`."""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path
from types import TracebackType
from typing import Self

from spinetta.errors import UserError


class DirectoryLock:
    """Holds a data directory for the life of a daemon."""

    def __init__(self, data_dir: Path) -> None:
        self._path = data_dir / "daemon.lock"
        self._fd: int | None = None

    def __enter__(self) -> Self:
        try:
            fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as e:
            raise _unusable(self._path, "opened", e) from e
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = holder(self._path.parent)
            os.close(fd)
            raise UserError(
                f"a daemon runs on {self._path.parent} already{f' (process {pid})' if pid else ''}",
                field="node.data_dir",
                hint="give this node a --data-dir of its own, or stop the other with: spinetta node stop",
                reason="already-exists",
            ) from None
        text = f"{os.getpid()}\n".encode()
        # Over what is there, which takes no room. On a full disk a daemon must start all the same: results of tasks may
        # wait for it. Should even that fail, `holder` asks the kernel.
        with contextlib.suppress(OSError):
            os.pwrite(fd, text, 0)
        with contextlib.suppress(OSError):
            os.ftruncate(fd, len(text))
        self._fd = fd
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


def holder(data_dir: Path) -> int | None:
    """The process id of the daemon that holds a data directory; None when there is none.

    Raises:
        UserError: the directory is another user's.
    """
    path = data_dir / "daemon.lock"
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as e:
        raise _unusable(path, "opened", e) from e
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return _locker(os.fstat(fd)) or _written(fd)
    else:
        return None
    finally:
        os.close(fd)


def _locker(file: os.stat_result) -> int | None:
    """Who holds the lock, as the kernel tells it; None where it does not."""
    wanted = f"{os.major(file.st_dev):02x}:{os.minor(file.st_dev):02x}:{file.st_ino}"
    try:
        lines = Path("/proc/locks").read_text("ascii", "replace").splitlines()
    except OSError:
        return None
    for line in lines:
        words = line.split()
        # "7: FLOCK  ADVISORY  WRITE 1234 fe:00:99 0 EOF"; one that waits for it has an arrow behind the number
        if len(words) > 5 and words[1] == "FLOCK" and words[5] == wanted and words[4].isdigit():
            return int(words[4]) or None  # 0: in another pid namespace
    return None


def _written(fd: int) -> int | None:
    text = os.pread(fd, 32, 0).decode(errors="replace").strip()
    return int(text) if text.isascii() and text.isdigit() else None


def _unusable(path: Path, what: str, error: OSError) -> UserError:
    return UserError(
        f"{path} cannot be {what}: {error.strerror}",
        field="node.data_dir",
        hint="use a --data-dir that you may write to, on a disk with room",
    )
