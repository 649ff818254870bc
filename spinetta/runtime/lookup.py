"""Looking into an image's root file system: links are followed as its container sees them, never out of it."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Collection
from pathlib import Path, PurePosixPath

from spinetta.names import is_below

LINKS_MAX = 40  # as many as the kernel follows


class NotInImage(Exception):
    """There is no such path."""


def find(rootfs: Path, path: str) -> tuple[PurePosixPath, os.stat_result]:
    """Where a path of the container leads, and what is there.

    Raises:
        NotInImage: nothing, or it goes round in circles.
    """
    left = [part for part in PurePosixPath(path).parts if part != "/"]
    here = PurePosixPath("/")
    links = 0
    found = _look(rootfs, here)
    while left:
        part = left.pop(0)
        if part == ".":
            continue
        if part == "..":
            here = here.parent
            found = _look(rootfs, here)
            continue
        if not stat.S_ISDIR(found.st_mode):
            raise NotInImage(path)
        found = _look(rootfs, here / part)
        if stat.S_ISLNK(found.st_mode):
            links += 1
            if links > LINKS_MAX:
                raise NotInImage(path)
            target = PurePosixPath(os.readlink(_outside(rootfs, here / part)))  # noqa: PTH115 - as text
            if target.is_absolute():
                here = PurePosixPath("/")
            found = _look(rootfs, here)
            left = [p for p in target.parts if p != "/"] + left
        else:
            here = here / part
    return here, found


def kind_of(rootfs: Path, path: str) -> str:
    """``folder``, ``file``, or ``link`` when one is on the way: mounts must not go through links.

    Raises:
        NotInImage: there is nothing.
    """
    here, found = find(rootfs, path)
    if str(here) != path:
        return "link"
    return "folder" if stat.S_ISDIR(found.st_mode) else "file"


def program_missing(rootfs: Path, program: str, search: str, mounted: Collection[str]) -> str:
    """In words, when it is certain that a container of this image has no such program; else nothing.

    What is under `mounted` is not looked into, and never certain.
    """
    if "/" in program:
        if not program.startswith("/"):
            return ""  # relative to a working directory that changes
        candidates = [program]
    else:
        candidates = [f"{folder}/{program}" for folder in search.split(":") if folder.startswith("/")]
    refused = ""
    for path in candidates:
        if any(path == top or path.startswith(f"{top}/") for top in (*mounted, "/work", "/tmp", "/dev")):  # noqa: S108
            return ""
        try:
            _, found = find(rootfs, path)
        except NotInImage:
            continue
        if stat.S_ISREG(found.st_mode) and found.st_mode & 0o111:
            return ""
        refused = refused or f"not executable: {path}"
    return refused or f"program not found: {program}"


def directory_missing(rootfs: Path, path: str, mounted: Collection[str]) -> str:
    """In words, when it is certain that a container of this image has no such directory; else nothing.

    runc would make one, as its root's, where it can; and where it cannot, it fails as if the machine had.
    """
    if any(is_below(path, top) or is_below(top, path) for top in mounted):
        return ""  # only the container sees what is there; mount points that the image lacks are made
    at_first_empty = next((top for top in ("/work", "/tmp") if path != top and is_below(path, top)), "")  # noqa: S108
    if at_first_empty:
        return f"working directory missing: {path} ({at_first_empty} is empty when a task starts)"
    try:
        _, found = find(rootfs, path)
    except NotInImage:
        return "" if mounted and _has_link(rootfs, path) else f"working directory missing: {path}"
    return "" if stat.S_ISDIR(found.st_mode) else f"no directory to work in: {path}"


def _has_link(rootfs: Path, path: str) -> bool:
    """Whether a link is on the way, which may lead into a mount. From the top: behind one we would be elsewhere."""
    places = PurePosixPath(path)
    return any(Path(_outside(rootfs, place)).is_symlink() for place in (*reversed(places.parents), places))


def _outside(rootfs: Path, path: PurePosixPath) -> str:
    """As text: every start looks at a dozen of them."""
    return f"{rootfs}/{str(path).lstrip('/')}"


def _look(rootfs: Path, path: PurePosixPath) -> os.stat_result:
    try:
        return os.lstat(_outside(rootfs, path))
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG):
            raise NotInImage(str(path)) from None
        raise
