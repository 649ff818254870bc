"""State directories of a node's shims: the first one's, and below it those of shims started beside one that runs on.

A shim goes on with the code it was started with. One of other code gets a directory of its own, with its own lock,
socket, records and control groups; logs and kept scratch directories are common to all, in the first one's.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import time
from collections.abc import Collection, Iterator
from pathlib import Path

from spinetta.runtime.launch import open_socket
from spinetta.runtime.shim.remains import read_identity
from spinetta.runtime.shim.wire import SOCKET_NAME

LATER = "generations"  # in the first one's directory: those of later ones, by number
GENERATIONS_MAX = 4  # at once: 20 MiB each; more is an upgrade a week with tasks that run for a month
LOCK_WAIT_S = 5.0  # for the process that wrote a shim's records to end after it
_AGAIN_S = 0.05
_GONE = ".gone-"


def folders(home: Path) -> list[Path]:
    """All that there are, the first one's before the others, by number."""
    later = {int(path.name): path for path in _children(home / LATER) if path.name.isdigit()}
    return ([home] if home.is_dir() else []) + [later[number] for number in sorted(later)]


def occupied(home: Path) -> list[Path]:
    """Those with a shim, or with something that a shim has left and only another can clear up; others are removed."""
    found = []
    for path in _children(home / LATER):
        if path.name.startswith(_GONE):
            shutil.rmtree(path, ignore_errors=True)
    for folder in folders(home):
        if is_occupied(folder):
            found.append(folder)
        elif folder != home:
            remove(folder)
    return found


def is_occupied(folder: Path) -> bool:
    """There is a shim, or one has died and left attempts, or anything that shows that it did not end in order."""
    if (folder / SOCKET_NAME).exists() or any(not path.name.startswith(".") for path in _children(folder / "attempts")):
        return True
    groups = read_identity(folder).get("cgroups")
    if isinstance(groups, list) and any(Path(str(group)).is_dir() for group in groups):
        return True
    with _locked(folder) as is_ours:
        return not is_ours


async def listens(folder: Path) -> bool:
    """Whether a shim takes connections there."""
    try:
        (await open_socket(folder)).close()
    except (OSError, TimeoutError):
        return False
    return True


async def living(home: Path) -> list[Path]:
    """Those with a shim that takes connections, the latest first."""
    return [folder for folder in reversed(folders(home)) if await listens(folder)]


def free_folder(home: Path, taken: Collection[Path]) -> Path:
    """For one more shim: the first one's directory if nobody has it, else a new one."""
    if home not in taken:
        return home
    number = max((int(path.name) for path in folders(home) if path != home), default=1) + 1
    return home / LATER / str(number)


def clean(folder: Path, home: Path) -> bool:
    """After the end of its shim: remove a later one's directory, or what is of no use in the first one's.

    Takes until the shim's last process has ended, at most `LOCK_WAIT_S`. False: something is left in it that only
    another shim can clear up.
    """
    deadline = time.monotonic() + LOCK_WAIT_S
    while is_occupied(folder):
        if time.monotonic() > deadline:
            return False
        time.sleep(_AGAIN_S)
    if folder != home:
        return remove(folder)
    for part in ("services", "scratch", "trash"):
        for path in _children(folder / part):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                with contextlib.suppress(OSError):
                    path.unlink()
    return True


def remove(folder: Path) -> bool:
    """A later one's directory, at once: a half-removed one is none. False: a shim has its lock."""
    gone = folder.with_name(f"{_GONE}{folder.name}-{os.urandom(4).hex()}")
    with _locked(folder) as is_ours:
        if not is_ours:
            return False
        try:
            folder.rename(gone)
        except OSError:
            return False
    shutil.rmtree(gone, ignore_errors=True)  # what resists goes at the next start
    with contextlib.suppress(OSError):
        folder.parent.rmdir()  # if it was the last
    return True


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """With a shim's lock; False when somebody has it."""
    try:
        fd = os.open(folder / "shim.lock", os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        yield True  # never used
        return
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield True
    except BlockingIOError:
        yield False
    finally:
        os.close(fd)


def _children(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []
