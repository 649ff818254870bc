"""Where this machine's control groups are: version 1, version 2, or both at once (hybrid).

`detect` and `everywhere` are functions of the texts of ``/proc/self/mountinfo`` and ``/proc/self/cgroup``; `base_v2`
touches files.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path

WANTED = ("memory", "cpu", "cpuacct", "pids", "freezer", "blkio")
OPTIONAL_V2 = ("io",)  # counts only: often not handed on to services and users, and no reason to look higher up for it
LEAF = "spinetta-self"  # where we move ourselves in a delegated cgroup2, whose inner groups may hold no processes


@dataclass(frozen=True)
class Hierarchy:
    """One mounted tree of groups.

    Attributes:
        version: 1 or 2.
        controllers: those of WANTED that it has, or all (version 2: none, see `base_v2`).
        mount: where it is mounted.
        own: the group that we are in.
    """

    version: int
    controllers: frozenset[str]
    mount: Path
    own: Path


def _unescape(field: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda m: chr(int(m.group(1), 8)), field)


def _own_paths(cgroup: str) -> dict[str, str]:
    """Our group by controller; version 2 under the empty name."""
    paths = {}
    for line in cgroup.splitlines():
        parts = line.split(":", 2)
        if len(parts) == 3:
            for name in parts[1].split(","):
                paths[name] = parts[2]
    return paths


def detect(mountinfo: str, cgroup: str) -> tuple[list[Hierarchy], list[str]]:
    """The hierarchies of use to us, and what is wrong with others, in words."""
    return _find(mountinfo, cgroup, frozenset(WANTED))


def everywhere(mountinfo: str, cgroup: str) -> list[Hierarchy]:
    """All hierarchies in which groups can be made, also those of no use to us: devices, cpuset, net_cls, name=systemd.

    A container runtime makes groups in each of them, under the same relative path below our own group there.
    """
    return _find(mountinfo, cgroup, None)[0]


def _find(mountinfo: str, cgroup: str, wanted: AbstractSet[str] | None) -> tuple[list[Hierarchy], list[str]]:
    own_paths = _own_paths(cgroup)
    found: list[Hierarchy] = []
    problems: list[str] = []
    taken: set[str] = set()
    for line in mountinfo.splitlines():
        fields = line.split(" ")
        if "-" not in fields:
            continue
        dash = fields.index("-")
        kind, options = fields[dash + 1], fields[dash + 3].split(",")
        if kind not in ("cgroup", "cgroup2"):
            continue
        root, mount = _unescape(fields[3]), Path(_unescape(fields[4]))
        names = [""] if kind == "cgroup2" else [name for name in options if wanted is None or name in wanted]
        names = [name for name in names if name in own_paths and name not in taken]
        if not names:
            continue
        own = own_paths[names[0]]
        relative = own.removeprefix(root.rstrip("/")) if own == root or own.startswith(root.rstrip("/") + "/") else None
        if relative is None:
            # In a container with the host's paths in /proc/self/cgroup and another part of the tree mounted.
            problems.append(f"the cgroup {own} is not below {root}, which is mounted at {mount}")
            continue
        if "ro" in fields[5].split(","):
            problems.append(f"{mount} is mounted read-only")
            continue
        taken.update(names)
        path = mount / relative.strip("/")
        found.append(Hierarchy(2 if kind == "cgroup2" else 1, frozenset(names) - {""}, mount, path))
    return found, problems


def read_text(path: Path) -> str:
    """The content of a control file."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        chunks = []
        while chunk := os.read(fd, 1 << 16):
            chunks.append(chunk)
        return b"".join(chunks).decode("ascii", "replace")
    finally:
        os.close(fd)


def write_text(path: Path, content: str) -> None:
    """Write to a control file, which must exist."""
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, content.encode("ascii"))
    finally:
        os.close(fd)


def _words(path: Path) -> set[str]:
    with contextlib.suppress(OSError):
        return set(read_text(path).split())
    return set()


def delegated(group: Path, mount: Path) -> bool:
    """Whether we were handed this group of version 2, so that we may empty it into a leaf. One of three ways:

    The service manager says so (systemd marks it). It is ours, and the one above it is not: nobody else manages it. It
    is the top of all that is mounted, and not the kernel's own: that of a cgroup namespace, as in a container.
    """
    for name in ("user.delegate", "trusted.delegate"):
        with contextlib.suppress(OSError):
            if os.getxattr(group, name) == b"1":
                return True
    if group == mount:
        return (group / "cgroup.type").exists()
    try:
        owner, above = (path.stat().st_uid for path in (group / "cgroup.procs", group.parent))
    except OSError:
        return False
    return owner == os.geteuid() != above


def _enable(group: Path, wanted: Sequence[str]) -> None:
    missing = [name for name in wanted if name not in _words(group / "cgroup.subtree_control")]
    if missing:
        write_text(group / "cgroup.subtree_control", " ".join(f"+{name}" for name in missing))


def _pass_on(group: Path, offered: Sequence[str]) -> frozenset[str]:
    """Enable them for the groups inside, and what else is of use; what is enabled then."""
    optional = [name for name in OPTIONAL_V2 if name in _words(group / "cgroup.controllers")]
    try:
        _enable(group, [*offered, *optional])
        return frozenset([*offered, *optional])
    except OSError:
        if not optional:
            raise
    _enable(group, offered)
    return frozenset(offered)


def _move_into_leaf(group: Path) -> None:
    """Empty a delegated group of its processes (the daemon and ourselves), so that it may have groups with limits."""
    leaf = group / LEAF
    leaf.mkdir(exist_ok=True)
    for pid in read_text(group / "cgroup.procs").split():
        with contextlib.suppress(ProcessLookupError):
            write_text(leaf / "cgroup.procs", pid)


def base_v2(tree: Hierarchy) -> tuple[Path, frozenset[str], list[str]]:
    """The group under which ours can be made with limits, the controllers it gives, and what is wrong.

    Our own group if it may pass on all controllers that there are; else, being allowed, the nearest above that may.
    When none may, the nearest that may pass on some: users are often given those of memory and processes only.
    """
    own = tree.own.parent if tree.own.name == LEAF else tree.own
    offered = [name for name in WANTED if name in _words(tree.mount / "cgroup.controllers")]
    if not offered:
        return own, frozenset(), []  # hybrid: version 1 has the controllers
    problems: dict[str, None] = {}
    for all_of_them in (True, False):
        for group in (own, *own.parents):
            here = [name for name in offered if name in _words(group / "cgroup.controllers")]
            if here == offered or (here and not all_of_them):
                lacking = (
                    [f"{group} has no {', '.join(n for n in offered if n not in here)}"] if here != offered else []
                )
                try:
                    return (
                        group,
                        _handed_on(tree, group, here, may_empty=group == own),
                        [*problems, *lacking] if lacking else [],
                    )
                except OSError as error:
                    busy = error.errno == errno.EBUSY
                    why = "it holds processes and is not delegated" if busy else error.strerror
                    problems[f"{group} cannot pass on its controllers: {why}"] = None
            if group == tree.mount:
                break
    passed = _words(own / "cgroup.subtree_control") & {*offered, *OPTIONAL_V2}
    return own, frozenset(passed), list(problems) or [f"{own} lacks controllers"]


def _handed_on(tree: Hierarchy, group: Path, names: Sequence[str], *, may_empty: bool) -> frozenset[str]:
    try:
        return _pass_on(group, names)
    except OSError as error:
        if error.errno != errno.EBUSY or not may_empty or not delegated(group, tree.mount):
            raise
    _move_into_leaf(group)
    return _pass_on(group, names)
