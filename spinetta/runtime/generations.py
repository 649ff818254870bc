"""State directories of a node's shims: the first one's, and below it those of shims started beside one that runs on.

A shim goes on with the code it was started with. One of other code gets a directory of its own, with its own lock,
socket, records and control groups; logs and kept scratch directories are common to all, in the first one's.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import time
from collections.abc import Collection, Iterator
from pathlib import Path

from spinetta.runtime import removing
from spinetta.runtime.launch import open_socket
from spinetta.runtime.shim.records import put_aside
from spinetta.runtime.shim.remains import identity_of
from spinetta.runtime.shim.wire import SOCKET_NAME

LATER = "generations"  # in the first one's directory: those of later ones, by number
GENERATIONS_MAX = 4  # at once: 20 MiB each; more is an upgrade a week with tasks that run for a month
SWEEP_AT_END_S = 5.0  # when there may be no next start; enough for what a task usually leaves
LOCK_WAIT_S = 5.0  # for the process that wrote a shim's records to end after it
GONE_MAX = 1000  # swept at once: a command line has room for so many
_AGAIN_S = 0.05
_GONE = ".gone-"


def folders(home: Path) -> list[Path]:
    """All that there are, the first one's before the others, by number. OSError: it cannot be seen."""
    later = {int(path.name): path for path in _children(home / LATER) if path.name.isdigit()}
    return ([home] if home.is_dir() else []) + [later[number] for number in sorted(later)]


def occupied(home: Path) -> list[Path]:
    """Those with a shim, or with something that a shim has left and only another can clear up; others are removed.

    OSError: it cannot be seen.
    """
    found = []
    for folder in folders(home):
        if is_occupied(folder):
            found.append(folder)
        elif folder != home:
            remove(folder)
    return found


def is_occupied(folder: Path) -> bool:
    """There is a shim, or one has died and left attempts, or anything that shows that it did not end in order.

    Also when that cannot be seen: to take it for free could have tasks run twice.
    """
    try:
        if (folder / SOCKET_NAME).exists() or any(path.name[:1] != "." for path in _children(folder / "attempts")):
            return True
        if any(Path(str(group)).is_dir() for group in _groups(folder)):
            return True
    except OSError:
        return True
    with _locked(folder) as is_ours:
        return not is_ours


def are_scattered(home: Path) -> bool:
    """Whether anything is outside the first shim's directory."""
    try:
        return any(is_occupied(folder) for folder in folders(home) if folder != home)
    except OSError:
        return True  # it could be


async def listens(folder: Path) -> bool:
    """Whether a shim takes connections there."""
    try:
        (await open_socket(folder)).close()
    except (OSError, TimeoutError):
        return False
    return True


async def living(home: Path) -> list[Path]:
    """Those with a shim that takes connections, the latest first. OSError: it cannot be seen."""
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
    with contextlib.suppress(OSError):  # then the next shim there clears up
        gone = folder / LATER / _gone_name("first")
        gone.mkdir(mode=0o700, parents=True)
        for part in ("services", "scratch", "trash"):
            with contextlib.suppress(OSError):
                (folder / part).rename(gone / part)
    return True


def tidy(home: Path) -> None:
    """Put all that nobody needs out of the way, for `sweep`."""
    with contextlib.suppress(OSError):  # the next start does
        occupied(home)


async def sweep(home: Path, limit_s: float = removing.REMOVE_S) -> None:
    """Remove what was put out of the way; that may take long: tasks may have left millions of files.

    What resists, or is left when the time is over or this is cancelled, goes at the next start.
    """
    with contextlib.suppress(OSError):
        if gone := await asyncio.to_thread(_swept, home):
            await removing.remove(*gone[:GONE_MAX], limit_s=limit_s)
            (home / LATER).rmdir()  # if these were the last


def _swept(home: Path) -> list[Path]:
    return [path for path in _children(home / LATER) if path.name.startswith(_GONE)]


def remove(folder: Path) -> bool:
    """A later one's directory, put out of the way at once for `sweep`. False: a shim has its lock.

    Records that were damaged stay for people to look at, in the first one's directory.
    """
    gone = folder.with_name(_gone_name(folder.name))
    with _locked(folder) as is_ours:
        if not is_ours:
            return False
        try:
            for path in _children(folder / "broken"):
                put_aside(path, folder.parent.parent / "broken")
            folder.rename(gone)
        except OSError:
            return False
    return True


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """With a shim's lock; False when somebody has it, or could."""
    try:
        fd = os.open(folder / "shim.lock", os.O_RDWR | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        yield True  # never used
        return
    except OSError:
        yield False
        return
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_ours = True
        except OSError:
            is_ours = False
        yield is_ours
    finally:
        os.close(fd)


def _groups(folder: Path) -> list[object]:
    """Control groups that its latest shim has noted. OSError: they cannot be seen."""
    groups = identity_of(folder).get("cgroups")
    return groups if isinstance(groups, list) else []


def _children(folder: Path) -> list[Path]:
    """OSError: they cannot be seen, which does not mean that there are none."""
    try:
        return sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def _gone_name(name: str) -> str:
    return f"{_GONE}{name}-{os.urandom(4).hex()}"
