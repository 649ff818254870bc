"""How much room a directory takes, measured piece by piece."""

from __future__ import annotations

import contextlib
import itertools
import os
import stat
from collections.abc import Generator, Iterable

SLICE_ENTRIES = 500  # between two looks at what else there is to do: about two milliseconds
LINKS_MAX = 20_000  # files with several names that are remembered; of others each name counts its share
OPEN_FOLDERS_MAX = 64  # above the one that is looked into; those further down are found again by "..", if at all
DEPTH_MAX = 20_000  # of folders: about 3 MB
FOLDERS_MAX = 100_000  # directories that wait to be looked into, about 10 MB
BLOCK_BYTES = 512  # of st_blocks, whatever the disk's
PROCESSES_MAX = 256  # of one attempt that are looked at for removed files, and
OPEN_MAX = 1024  # files of each: less than a second
_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def removed_bytes(pids: Iterable[int], device: int, upper: str = "") -> int:
    """What files of a device take that are removed, but still open in one of these processes.

    No file is touched before it is known to be there: others may be on file systems that never answer.

    Args:
        pids: the processes.
        device: where the files are.
        upper: how the path ends of the folder to which a container's root writes, on that device. Of files of that root
            those count that are open for writing: they are in it, while others may be the image's.
    """
    seen: set[tuple[int, int]] = set()
    used = 0
    for pid in itertools.islice(pids, PROCESSES_MAX):
        folder, mounts = f"/proc/{pid}", dict[str, bool]()
        with contextlib.suppress(OSError, IndexError):  # gone
            for fd in os.listdir(f"{folder}/fd")[:OPEN_MAX]:  # noqa: PTH208 - only names
                if not os.readlink(f"{folder}/fd/{fd}").endswith(" (deleted)"):  # noqa: PTH115 - often
                    continue
                mounts = mounts or _mounts_of(folder, device, upper)
                info = dict(line.split(":", 1) for line in _text(f"{folder}/fdinfo/{fd}").splitlines() if ":" in line)
                is_root = mounts.get(info.get("mnt_id", "").strip())
                if is_root is None or (is_root and int(info["flags"], 8) & os.O_ACCMODE == os.O_RDONLY):
                    continue
                found = os.stat(f"{folder}/fd/{fd}")  # noqa: PTH116 - often
                name = found.st_dev, found.st_ino
                if found.st_nlink == 0 and (is_root or found.st_dev == device) and name not in seen:
                    seen.add(name)
                    used += found.st_blocks * BLOCK_BYTES
    return used


def _mounts_of(folder: str, device: int, upper: str) -> dict[str, bool]:
    """Numbers of the mounts of a device that a process sees; True: it is an overlay that writes to `upper` there."""
    wanted, found = f"{os.major(device)}:{os.minor(device)}", {}
    for line in _text(f"{folder}/mountinfo").splitlines():
        number, _parent, where, rest = line.split(" ", 3)
        kind, _source, options = rest.partition(" - ")[2].split(" ", 2)
        if where == wanted:
            found[number] = False
        elif upper and kind == "overlay" and any(_is_upper(option, upper) for option in options.split(",")):
            found[number] = True
    return found


def _is_upper(option: str, ends: str) -> bool:
    return option.startswith("upperdir=") and option.endswith(ends)


def _text(path: str) -> str:
    with open(path, encoding="utf-8", errors="replace") as file:  # noqa: PTH123 - often
        return file.read()


_Folder = tuple[int, int, list[str]]
"""Its descriptor, -1 if it was closed; its inode; what is still to be looked into there."""


class Scan:
    """One measurement: of blocks, not of lengths; no link is followed, no other file system entered.

    Whoever owns the directory may change it meanwhile, and is not trusted: each step goes from an open directory to one
    that is found in it, and back only to where it came from. Few directories are open at a time, however deep.

    Attributes:
        used_bytes: found so far.
        whole: nothing was left out; else it is more than that.
        device: where it is; 0 while that is not known.
    """

    def __init__(self, root: str) -> None:
        self.used_bytes = 0
        self.whole = True
        self._links: set[int] = set()
        self._waiting = 0
        self.device = 0
        self._steps = self._run(root)

    def step(self) -> bool:
        """Go on for a moment; False when all is done."""
        return next(self._steps, 1) == 0

    def close(self) -> None:
        """Give up."""
        self._steps.close()

    def _run(self, root: str) -> Generator[int, None, None]:
        try:
            fd = os.open(root, _FLAGS)
        except OSError:
            return
        above: list[_Folder] = []
        try:
            here = os.fstat(fd)
            self.device = here.st_dev
            self._count(here)
            folders = yield from self._list(fd)
            while folders or above:
                if not folders:
                    fd, here, folders = self._back(fd, above)
                    continue
                self._waiting -= 1
                try:
                    inner = os.open(folders.pop(), _FLAGS, dir_fd=fd)
                except OSError:  # gone, or not ours to read
                    continue
                if len(above) < OPEN_FOLDERS_MAX:
                    above.append((fd, here.st_ino, folders))
                else:
                    above.append((-1, here.st_ino, folders))
                    os.close(fd)
                fd, here, folders = inner, os.fstat(inner), []
                if here.st_dev == self.device and len(above) < DEPTH_MAX:
                    folders = yield from self._list(fd)
                elif here.st_dev == self.device:
                    self.whole = False
        except OSError:
            self.whole = False
        finally:
            for each in (fd, *(outer for outer, _, _ in above if outer >= 0)):
                os.close(each)

    def _back(self, fd: int, above: list[_Folder]) -> tuple[int, os.stat_result, list[str]]:
        """To the folder above, with what is still to be looked into there. OSError: it cannot be had."""
        outer, inode, folders = above[-1]
        if outer < 0 and (outer := self._outer(fd, inode)) < 0:
            # It was moved or removed under us. What is beside it up there is not known; we go on where we still are.
            self.whole = False
            while above[-1][0] < 0:
                self._waiting -= len(above.pop()[2])
            outer, _, folders = above[-1]
        found = os.fstat(outer)
        above.pop()
        os.close(fd)
        return outer, found, folders

    def _outer(self, fd: int, inode: int) -> int:
        """A descriptor of the folder above, if it still is the one with that inode; else -1."""
        try:
            outer = os.open("..", _FLAGS, dir_fd=fd)
        except OSError:
            return -1
        found = os.fstat(outer)
        if (found.st_dev, found.st_ino) == (self.device, inode):
            return outer
        os.close(outer)
        return -1

    def _list(self, fd: int) -> Generator[int, None, list[str]]:
        folders: list[str] = []
        try:
            with os.scandir(fd) as entries:
                for number, entry in enumerate(entries, 1):
                    if number % SLICE_ENTRIES == 0:
                        yield 0
                    with contextlib.suppress(OSError):  # gone
                        found = entry.stat(follow_symlinks=False)
                        if found.st_dev != self.device:
                            continue
                        self._count(found)
                        if stat.S_ISDIR(found.st_mode):
                            if self._waiting < FOLDERS_MAX:
                                self._waiting += 1
                                folders.append(entry.name)
                            else:
                                self.whole = False
        except OSError:
            self.whole = False
        yield 0
        return folders

    def _count(self, found: os.stat_result) -> None:
        size = found.st_blocks * BLOCK_BYTES
        if found.st_nlink > 1 and not stat.S_ISDIR(found.st_mode):
            if found.st_ino in self._links:
                return
            if len(self._links) < LINKS_MAX:
                self._links.add(found.st_ino)
            else:
                size //= found.st_nlink
        self.used_bytes += size
