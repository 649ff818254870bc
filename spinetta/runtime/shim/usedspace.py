"""How much room a directory takes, measured piece by piece."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Generator

SLICE_ENTRIES = 500  # between two looks at what else there is to do: about two milliseconds
LINKS_MAX = 20_000  # files with several names that are remembered; of others each name counts its share
FOLDERS_MAX = 100_000  # directories that wait to be looked into, about 10 MB
BLOCK_BYTES = 512  # of st_blocks, whatever the disk's
_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class Scan:
    """One measurement: of blocks, not of lengths; no link is followed, no other file system entered.

    Whoever owns the directory may change it meanwhile, and is not trusted: each step goes from an open directory to one
    that is found in it, and back only to where it came from. One directory is open at a time, however deep.

    Attributes:
        used_bytes: found so far.
        whole: nothing was left out; else it is more than that.
    """

    def __init__(self, root: str) -> None:
        self.used_bytes = 0
        self.whole = True
        self._links: set[int] = set()
        self._waiting = 0
        self._device = 0
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
        try:
            here = os.fstat(fd)
            self._device = here.st_dev
            self._count(here)
            above: list[tuple[int, list[str]]] = []  # inodes, and what is still to be looked into there
            folders = yield from self._list(fd)
            while folders or above:
                if folders:
                    self._waiting -= 1
                    try:
                        inner = os.open(folders.pop(), _FLAGS, dir_fd=fd)
                    except OSError:  # gone, or not ours to read
                        continue
                    above.append((here.st_ino, folders))
                    os.close(fd)
                    fd, here = inner, os.fstat(inner)
                    folders = (yield from self._list(fd)) if here.st_dev == self._device else []
                else:
                    inode, folders = above.pop()
                    outer = os.open("..", _FLAGS, dir_fd=fd)
                    os.close(fd)
                    fd, here = outer, os.fstat(outer)
                    if (here.st_dev, here.st_ino) != (self._device, inode):
                        self.whole = False  # it was moved under us
                        return
        except OSError:
            self.whole = False
        finally:
            os.close(fd)

    def _list(self, fd: int) -> Generator[int, None, list[str]]:
        folders: list[str] = []
        try:
            with os.scandir(fd) as entries:
                for number, entry in enumerate(entries, 1):
                    if number % SLICE_ENTRIES == 0:
                        yield 0
                    with contextlib.suppress(OSError):  # gone
                        found = entry.stat(follow_symlinks=False)
                        if found.st_dev != self._device:
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
