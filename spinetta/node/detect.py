"""What this machine has to offer: cores, memory, disk, less what the limits on our own control group take away."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import psutil

from spinetta import devices, units
from spinetta.config import Settings
from spinetta.model import Resources

MEMORY_KEPT_PART, MEMORY_KEPT_MAX_BYTES = 0.1, 2 << 30  # for the system, the daemon and etcd
DISK_KEPT_PART = 0.1  # of what is free, for logs and etcd
DISK_WARN_BYTES = 1 << 30  # etcd alone may take its quota
_UNLIMITED = 1 << 60  # v1 says "no limit" with a number near 2**63


@dataclass(frozen=True, slots=True)
class Machine:
    """What was found. `cpu_limit_millis` and `memory_limit_bytes` are of control groups, 0 for none."""

    cpu_count: int
    memory_bytes: int
    disk_free_bytes: int
    cpu_limit_millis: int = 0
    memory_limit_bytes: int = 0

    def offer(self) -> Resources:
        """What to offer when nothing else is said."""
        cpus = self.cpu_count * 1000
        if self.cpu_limit_millis:
            cpus = min(cpus, self.cpu_limit_millis)
        memory = min(self.memory_bytes, self.memory_limit_bytes or self.memory_bytes)
        memory -= min(int(memory * MEMORY_KEPT_PART), MEMORY_KEPT_MAX_BYTES)
        return Resources.of(cpus, memory, int(self.disk_free_bytes * (1 - DISK_KEPT_PART)))


def capacity(settings: Settings, root: Path = Path("/")) -> tuple[Resources, tuple[str, ...]]:
    """What this node offers, settings before detection, and warnings for the administrator."""
    machine = detect(Path(settings.data_dir), root)
    found = machine.offer()
    offered = Resources.of(
        settings.cpu_millis or found.cpu_millis,
        settings.memory_bytes or found.memory_bytes,
        settings.disk_bytes or found.disk_bytes,
        devices.offered(settings.countables, settings.devices),
    )
    warnings = []
    have = min(machine.cpu_count * 1000, machine.cpu_limit_millis or machine.cpu_count * 1000)
    if offered.cpu_millis > have:
        warnings.append(
            f"{units.format_cpus(offered.cpu_millis)} cores are offered, {units.format_cpus(have)} are there"
        )
    memory = min(machine.memory_bytes, machine.memory_limit_bytes or machine.memory_bytes)
    if offered.memory_bytes > memory:
        warnings.append(
            f"{units.format_bytes(offered.memory_bytes)} of memory are offered, {units.format_bytes(memory)} are there"
        )
    if offered.disk_bytes > machine.disk_free_bytes:
        warnings.append(
            f"{units.format_bytes(offered.disk_bytes)} of disk are offered, "
            f"{units.format_bytes(machine.disk_free_bytes)} are free under {settings.data_dir}"
        )
    if machine.disk_free_bytes < DISK_WARN_BYTES:
        warnings.append(f"only {units.format_bytes(machine.disk_free_bytes)} are free under {settings.data_dir}")
    return offered, tuple(warnings)


def open_files_most() -> int:
    """The highest limit of open files that this node can give to what it starts.

    With the right to (CAP_SYS_RESOURCE on the machine itself) all that the kernel takes, else our own hard limit. Found
    out by doing it, since within a user namespace root has that right only in name.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    text = _read(Path("/proc/sys/fs/nr_open"))
    kernel = int(text) if text.isdigit() else 1 << 20  # as it always was before it could be set
    if hard == resource.RLIM_INFINITY:
        return kernel
    if kernel <= hard:
        return hard
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, kernel))
    except (ValueError, OSError):
        return hard
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return kernel


def detect(data_dir: Path, root: Path = Path("/")) -> Machine:
    """Look at the machine. `root` is where /proc is looked for, for tests."""
    cpu_limit, memory_limit = cgroup_limits(root)
    return Machine(
        cpu_count=len(os.sched_getaffinity(0)),
        memory_bytes=psutil.virtual_memory().total,
        disk_free_bytes=psutil.disk_usage(str(_existing(data_dir))).free,
        cpu_limit_millis=cpu_limit,
        memory_limit_bytes=memory_limit,
    )


def _existing(path: Path) -> Path:
    """The path, or its nearest ancestor that exists: the data directory is made later."""
    while not path.exists():
        path = path.parent
    return path


def cgroup_limits(root: Path = Path("/")) -> tuple[int, int]:
    """Thousandths of a core and bytes of memory that our own control group and those above it allow; 0: no limit."""
    cpu, memory = 0, 0
    for controllers, directory in _groups(root):
        v2 = not controllers
        if v2 or "cpu" in controllers:
            cpu = _tighter(cpu, _cpu_limit(directory, v2=v2))
        if v2 or "memory" in controllers:
            name = "memory.max" if v2 else "memory.limit_in_bytes"
            memory = _tighter(memory, _number(directory / name))
    return cpu, memory


def _tighter(a: int, b: int) -> int:
    return min(a, b) if a and b else a or b


def _cpu_limit(directory: Path, *, v2: bool) -> int:
    if v2:
        words = _read(directory / "cpu.max").split()
        quota, period = (words[0], words[1]) if len(words) == 2 else ("max", "0")
    else:
        quota, period = _read(directory / "cpu.cfs_quota_us"), _read(directory / "cpu.cfs_period_us")
    if not (quota.isdigit() and period.isdigit()) or int(period) == 0:
        return 0  # "max", -1, or no such file
    return max(int(quota) * 1000 // int(period), 1)


def _number(path: Path) -> int:
    text = _read(path)
    return int(text) if text.isdigit() and int(text) < _UNLIMITED else 0


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""  # the group at the top has no such file, and other people's may not be readable


def _groups(root: Path) -> Iterator[tuple[frozenset[str], Path]]:
    """Our control group in each hierarchy and the groups above it, with the hierarchy's controllers (v2: none)."""
    mounts = list(_mounts(root))
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, names, path = line.split(":", 2)
        wanted = frozenset(name for name in names.split(",") if name)
        for controllers, mounted, top in mounts:
            if controllers != wanted:
                continue
            relative = PurePosixPath(path)
            # In a container the mount shows a part of the tree only, and our path may be told from above it.
            inner = relative.relative_to(mounted) if relative.is_relative_to(mounted) else PurePosixPath()
            directory = top / str(inner).lstrip("/")
            if not directory.is_dir():
                directory = top
            while True:
                yield controllers, directory
                if directory == top or directory == directory.parent:
                    break
                directory = directory.parent
            break


def _mounts(root: Path) -> Iterator[tuple[frozenset[str], PurePosixPath, Path]]:
    """Mounted hierarchies: controllers (v2: none), the path in the hierarchy that is mounted, and where."""
    for line in _read(root / "proc/self/mountinfo").splitlines():
        left, dash, right = line.partition(" - ")
        words, tail = left.split(), right.split()
        if not dash or len(words) < 5 or len(tail) < 3:
            continue
        where = root / words[4].lstrip("/")
        if tail[0] == "cgroup2":
            yield frozenset(), PurePosixPath(words[3]), where
        elif tail[0] == "cgroup":
            # The superblock's options name the controllers, among others such as rw.
            options = frozenset(tail[2].split(",")) - {"rw", "ro", "xattr", "clone_children"}
            controllers = frozenset(o for o in options if "=" not in o or o.startswith("name="))
            yield controllers, PurePosixPath(words[3]), where
