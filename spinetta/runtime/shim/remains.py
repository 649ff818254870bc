"""What an earlier shim of this state directory left behind: found, told apart from other people's things, ended.

Everything of ours bears one name, made of what the state directory is (its device and inode), so that it is found again
when every file in it is lost, and so that a copy of the directory does not take the original's processes for its own.
All of this runs before we enter namespaces of our own, where we could not see the processes any more.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import proctable
from .cgroup import sweep
from .disk import Layout
from .hierarchy import Hierarchy, detect, everywhere
from .records import overwrite, put_file, read_records, seal, unseal
from .wire import IDENTITY_NAME

# Without hashlib, which brings all of OpenSSL: a megabyte of each of our processes, for one name.
try:
    sha256 = importlib.import_module("_sha2" if sys.version_info >= (3, 12) else "_sha256").sha256
except ImportError:
    from hashlib import sha256

SWEEP_LIMIT_S = 10.0
MOVED_MAX = 10_000  # leftover folders at one start; the rest the next time
MARK = "SPINETTA_HOLDER"  # in the environment of all that we start where no pid namespace ends it with us
LOOK_AGAIN_S = 0.01
ENVIRONMENT_BYTES_MAX = 4 << 20  # more than the kernel lets a process begin with
PREFIX = "spinetta-"


@dataclass(frozen=True)
class Swept:
    """What came of it.

    Attributes:
        name: of all that is ours.
        trees, problems: the control groups' hierarchies, and what is wrong with others.
        all_trees: those of no use to us, too, in which container runtimes make groups.
        stuck: control groups that could not be removed.
        warnings: for people.
    """

    name: str
    trees: tuple[Hierarchy, ...]
    all_trees: tuple[Hierarchy, ...]
    problems: tuple[str, ...]
    stuck: tuple[str, ...]
    warnings: tuple[str, ...]


def place_of(root: Path) -> str:
    """What the directory is, as long as this machine runs; a copy of it is another."""
    found = root.stat()
    return f"{found.st_dev}:{found.st_ino}"


def name_of(root: Path, node: str) -> str:
    """The name of all that the shim of `root` makes outside of it."""
    clean = "".join(c if c.isalnum() and c.isascii() else "-" for c in node)[:40]
    return f"{PREFIX}{clean}-{sha256(place_of(root).encode()).hexdigest()[:12]}"


def identity_of(root: Path) -> dict[str, Any]:
    """What the latest shim wrote of itself; empty when there is nothing that can be trusted.

    Of a file from before there was a `place` in it all is believed but the shape of its control groups' names.
    OSError: it cannot be seen, which does not mean that there is none.
    """
    try:
        identity = unseal((root / IDENTITY_NAME).read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return {}
    return identity if identity.get("place", place := place_of(root)) == place else {}


def read_identity(root: Path) -> dict[str, Any]:
    """As `identity_of`, for those who do the same when it cannot be seen as when it cannot be trusted."""
    try:
        return identity_of(root)
    except OSError:
        return {}


def living_pid(identity: Mapping[str, Any]) -> int:
    """The pid of the shim that wrote this, if that is still there, dying perhaps; 0: it is not."""
    pid = identity.get("pid")
    process = proctable.read(pid) if isinstance(pid, int) and identity.get("boot_id") == proctable.boot_id() else None
    if process is None or process.state in "ZX" or process.start_ticks != identity.get("start_ticks"):
        return 0
    return process.pid


def write_identity(root: Path, identity: dict[str, Any]) -> None:
    """Replace it. On a full disk over what is there: that takes no new room, and a half-written one does no harm."""
    data = json.dumps(seal({"v": 2, "place": place_of(root), **identity})).encode()
    path = root / IDENTITY_NAME
    try:
        put_file(path, data)
    except OSError:
        if not overwrite(path, data):
            raise


def sweep_remains(layout: Layout, node: str) -> Swept:
    """Kill and remove what an earlier shim of this state directory left, and nothing else. The lock must be held."""
    name = name_of(layout.root, node)
    trees, problems, all_trees = _hierarchies()
    identity = read_identity(layout.root)
    folders = _candidates(name, all_trees)
    noted = identity.get("cgroups")
    if isinstance(noted, list):
        mounts = [tree.mount for tree in all_trees]
        folders += [Path(str(folder)) for folder in noted if _is_ours(Path(str(folder)), mounts)]
    stuck = sweep(list(dict.fromkeys(folders)), SWEEP_LIMIT_S)
    warnings = [f"left by an earlier shim and cannot be removed: {folder}" for folder in stuck]
    _until_none(lambda: _kill(_marked(name)))
    if identity:  # else the records may be a copy of another node's, and that node alive
        _until_none(lambda: _kill_recorded(layout))
    if still := _marked(name):
        pids = ", ".join(str(pid) for pid in still[:10])
        warnings.append(f"processes of an earlier shim cannot be killed: {pids}")
    return Swept(
        name, tuple(trees), tuple(all_trees), tuple(problems), tuple(str(folder) for folder in stuck), tuple(warnings)
    )


def intended_groups(swept: Swept) -> list[str]:
    """All folders that we are about to make, or may: written down first."""
    return [*dict.fromkeys([*map(str, _candidates(swept.name, swept.all_trees)), *swept.stuck])]


def clear_scratch(layout: Layout, kept: Iterable[str]) -> int:
    """Move working directories that belong to no record to the trash; how many."""
    known, moved = set(kept), 0
    with contextlib.suppress(OSError):
        for path in sorted(layout.scratch.iterdir())[:MOVED_MAX]:
            if path.name not in known:
                path.rename(layout.trash / f"{path.name[:200]}.{os.urandom(4).hex()}")
                moved += 1
    return moved


# --- control groups --------------------------------------------------------------------------------------------------


def _hierarchies() -> tuple[list[Hierarchy], list[str], list[Hierarchy]]:
    try:
        mountinfo = Path("/proc/self/mountinfo").read_text("utf-8", "surrogateescape")
        cgroup = Path("/proc/self/cgroup").read_text("utf-8", "surrogateescape")
    except OSError as error:
        return [], [f"cannot read where cgroups are: {error}"], []
    return *detect(mountinfo, cgroup), everywhere(mountinfo, cgroup)


def _candidates(name: str, trees: Iterable[Hierarchy]) -> list[Path]:
    """Wherever a group of ours can be: in the group that we are in, or (version 2) in one above it."""
    found = []
    for tree in trees:
        group = tree.own
        while True:
            found.append(group / name)
            if group in (tree.mount, group.parent):
                break
            group = group.parent
    return found


def _is_ours(folder: Path, mounts: Iterable[Path]) -> bool:
    """The file may be damaged or of another version: never anything that cannot be a group of a shim."""
    return (
        folder.name.startswith(PREFIX)
        and ".." not in folder.parts
        and any(folder.is_relative_to(mount) for mount in mounts)
    )


# --- processes -------------------------------------------------------------------------------------------------------


def _until_none(kill_some: Callable[[], bool]) -> None:
    """Again and again, for a fork may race with it; at most for a while."""
    deadline = time.monotonic() + SWEEP_LIMIT_S
    while kill_some() and time.monotonic() < deadline:
        time.sleep(LOOK_AGAIN_S)


def _marked(name: str) -> list[int]:
    """Living processes that began with our mark in their environment."""
    mark, me, found = f"{MARK}={name}".encode(), os.getpid(), []
    for process in proctable.read_all():
        if process.pid == me or process.state in "ZX":
            continue
        with contextlib.suppress(OSError), open(f"/proc/{process.pid}/environ", "rb") as file:  # noqa: PTH123 - no path needed
            if mark in file.read(ENVIRONMENT_BYTES_MAX).split(b"\0"):
                found.append(process.pid)
    return found


def _kill(pids: Iterable[int]) -> bool:
    some = False
    for pid in pids:
        some = True
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)
    return some


def _kill_recorded(layout: Layout) -> bool:
    """Sessions that records name. Records are sealed: a damaged one names nobody."""
    boot, some = proctable.boot_id(), False
    for folder in (layout.attempts, layout.services):
        for record in read_records(folder).found.values():
            pid, ticks = record.get("pid"), record.get("start_ticks")
            if record.get("state") == "ended" or record.get("boot_id") != boot:
                continue
            if isinstance(pid, int) and isinstance(ticks, int) and pid > 1 and proctable.kill_session(pid, ticks):
                some = True
    return some
