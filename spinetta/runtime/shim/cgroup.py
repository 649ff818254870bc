"""Control groups of attempts: limits, counters, and the end of everything in them.

Per attempt one group in each hierarchy of use, ``OWN/spinetta-NODE-ID/KEY``. What a machine lacks is said
(`Cgroups.missing`), never silently left out.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from .counters import Counters, Now, flat, processes_io, read_counters, read_now
from .hierarchy import Hierarchy, base_v2, read_text, write_text

CPU_PERIOD_US = 100_000
CPU_QUOTA_US_MIN = 1_000  # the kernel takes no less: a hundredth of a core
SHARES_PER_CORE, SHARES_MIN, SHARES_MAX = 1024, 2, 1 << 18  # version 1: 256 cores and more count the same
WEIGHT_PER_CORE, WEIGHT_MAX = 100, 10_000  # version 2: 100 cores and more
CAPABILITIES = (
    "memory-limit",
    "swap-limit",
    "cpu-limit",
    "pids-limit",
    "cpu-usage",
    "memory-peak",
    "oom-report",
    "cgroup-kill",
)
DEPTH_MAX = 32  # of groups that a task made below its own

MakeDir = Callable[[Path], None]


@dataclass(frozen=True)
class Limits:
    """Limits of one group; 0 means none."""

    cpu_millis: int = 0
    memory_bytes: int = 0
    pids_max: int = 0


def _below(group: Path, depth: int = 0) -> Iterator[Path]:
    """A group and those inside it, innermost first."""
    if depth < DEPTH_MAX:
        inner: list[Path] = []
        with contextlib.suppress(OSError), os.scandir(group) as entries:
            inner = [Path(entry.path) for entry in entries if entry.is_dir(follow_symlinks=False)]
        for child in inner:
            yield from _below(child, depth + 1)
    yield group


def members(group: Path) -> list[int]:
    """Processes in a group and below it, as far as our pid namespace sees them."""
    pids = []
    for inner in _below(group):
        with contextlib.suppress(OSError):
            pids += [int(pid) for pid in read_text(inner / "cgroup.procs").split()]
    return [pid for pid in pids if pid > 1 and pid != os.getpid()]


def remove_group(group: Path) -> bool:
    """Remove a group and those inside it; False when processes are still in it."""
    try:
        group.rmdir()  # few have any inside
        return True
    except FileNotFoundError:
        return True
    except OSError:
        pass
    for inner in _below(group):
        try:
            inner.rmdir()
        except FileNotFoundError:
            pass
        except OSError:
            return False
    return True


class Group:
    """The groups of one attempt, one in each hierarchy."""

    def __init__(self, v2: Path | None, v2_controllers: frozenset[str], v1: dict[str, Path]) -> None:
        self._v2 = v2
        self._v2_controllers = v2_controllers
        self._v1 = v1
        paths = ([v2] if v2 else []) + list(v1.values())
        self.paths: list[Path] = list(dict.fromkeys(paths))
        self._io_most = (0, 0)
        self._pids_most = 0

    @property
    def v2(self) -> Path | None:
        """The group of version 2, with or without controllers."""
        return self._v2

    @property
    def kills(self) -> bool:
        """Whether there is any group to find the attempt's processes by."""
        return bool(self.paths)

    def create(self, limits: Limits, make_dir: MakeDir) -> None:
        """Make the groups and set the limits. OSError names the file that refused."""
        for path in self.paths:
            with contextlib.suppress(FileExistsError):
                make_dir(path)
        if limits.memory_bytes:
            self._limit_memory(limits.memory_bytes)
        if limits.cpu_millis:
            self._share_cpu(limits.cpu_millis)
            self._limit_cpu(limits.cpu_millis)
        if limits.pids_max:
            self.limit_pids(limits.pids_max)

    def limit_pids(self, pids_max: int) -> None:
        """So many processes and threads from now on; those that there are already live on. OSError names the file."""
        if pids := self._for("pids"):
            write_text(pids / "pids.max", str(pids_max))

    def join_files(self) -> list[str]:
        """A process that writes ``0`` to each of these is in the groups."""
        return [str(path / "cgroup.procs") for path in self.paths]

    def kill_at_once(self) -> bool:
        """SIGKILL to all members in one atomic step (Linux 5.14); False where the kernel cannot."""
        if self._v2:
            with contextlib.suppress(OSError):
                write_text(self._v2 / "cgroup.kill", "1")
                return True
        return False

    def kill(self) -> None:
        """One round of SIGKILL to all members. Repeat until `populated` is False: a fork may race with it.

        Finds also those that moved themselves to another group of one hierarchy, but not of all.
        """
        self.kill_at_once()
        # Frozen, they cannot fork while we go through the list; on version 1 the signal works once they are thawed.
        self._freeze("FROZEN", "1")
        for path in self.paths:
            for pid in members(path):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self._freeze("THAWED", "0")

    def _freeze(self, v1: str, v2: str) -> None:
        for path, name, value in ((self._v1.get("freezer"), "freezer.state", v1), (self._v2, "cgroup.freeze", v2)):
            if path:
                with contextlib.suppress(OSError):
                    write_text(path / name, value)

    def populated(self) -> bool:
        """Whether a living process is in the groups. Zombies do not count."""
        if self._v2:
            try:
                return "populated 1" in read_text(self._v2 / "cgroup.events")
            except OSError:
                return False  # gone
        return any(members(path) for path in self.paths)

    def counters(self) -> Counters:
        """Use so far, and the most that was ever seen by `sample`."""
        counters = read_counters(self._v2, self._v2_controllers, self._v1)
        if not self._pids_most:
            return counters
        return replace(
            counters,
            io_read_bytes=max(counters.io_read_bytes or 0, self._io_most[0]),
            io_write_bytes=max(counters.io_write_bytes or 0, self._io_most[1]),
            pids_peak=self._pids_most if counters.pids_peak is None else counters.pids_peak,
        )

    def sample(self) -> tuple[Counters, Now]:
        """Use so far and at this moment, while it runs: what a kernel does not count is asked of the processes."""
        now = read_now(self._v2, self._v2_controllers, self._v1)
        pids = [pid for path in self.paths[:1] for pid in members(path)]
        self._pids_most = max(self._pids_most, now.pids or len(pids))
        read, write = processes_io(pids)
        self._io_most = max(self._io_most[0], read), max(self._io_most[1], write)
        return self.counters(), replace(now, pids=len(pids) if now.pids is None else now.pids)

    def remove(self) -> bool:
        """Remove the groups; False when one is not empty yet. May be repeated."""
        left = [path for path in self.paths if not remove_group(path)]  # all, even after one that refuses
        return not left

    def _for(self, controller: str) -> Path | None:
        if controller in self._v1:
            return self._v1[controller]
        return self._v2 if controller in self._v2_controllers else None

    def _limit_memory(self, limit_bytes: int) -> None:
        if path := self._v1.get("memory"):
            write_text(path / "memory.limit_in_bytes", str(limit_bytes))
            try:
                write_text(path / "memory.memsw.limit_in_bytes", str(limit_bytes))
            except OSError:
                with contextlib.suppress(OSError):
                    write_text(path / "memory.swappiness", "0")
        elif self._v2 and "memory" in self._v2_controllers:
            write_text(self._v2 / "memory.max", str(limit_bytes))
            with contextlib.suppress(OSError):
                write_text(self._v2 / "memory.swap.max", "0")

    def _share_cpu(self, cpu_millis: int) -> None:
        """In proportion to what it asked for when the machine has less than all want; a core's worth is the default."""
        if path := self._v1.get("cpu"):
            shares = min(max(cpu_millis * SHARES_PER_CORE // 1000, SHARES_MIN), SHARES_MAX)
            write_text(path / "cpu.shares", str(shares))
        elif self._v2 and "cpu" in self._v2_controllers:
            weight = min(max(cpu_millis * WEIGHT_PER_CORE // 1000, 1), WEIGHT_MAX)
            write_text(self._v2 / "cpu.weight", str(weight))

    def _limit_cpu(self, cpu_millis: int) -> None:
        quota_us = max(CPU_QUOTA_US_MIN, cpu_millis * CPU_PERIOD_US // 1000)
        if path := self._v1.get("cpu"):
            write_text(path / "cpu.cfs_period_us", str(CPU_PERIOD_US))
            try:
                write_text(path / "cpu.cfs_quota_us", str(quota_us))
            except OSError as error:
                # More than a group above us allows: that limit holds in any case, and it is the smaller one.
                if error.errno != errno.EINVAL:
                    raise
        elif self._v2 and "cpu" in self._v2_controllers:
            write_text(self._v2 / "cpu.max", f"{quota_us} {CPU_PERIOD_US}")


class Cgroups:
    """All groups of one node.

    Attributes:
        capabilities: what works here: ``memory-limit``, ``swap-limit``, ``cpu-limit``, ``pids-limit``, ``cpu-usage``,
            ``memory-peak``, ``oom-report``, ``cgroup-kill``.
        missing: what does not, by capability, with the reason.
    """

    def __init__(
        self,
        name: str,
        trees: Sequence[Hierarchy],
        problems: Sequence[str] = (),
        make_dir: MakeDir = Path.mkdir,
    ) -> None:
        self._name = name
        self._make_dir = make_dir
        self._v2: Path | None = None
        self._v2_controllers: frozenset[str] = frozenset()
        self._v1: dict[str, Path] = {}
        self._problems = list(problems)
        for tree in trees:
            if tree.version == 2:
                self._prepare_v2(tree)
        for tree in trees:
            if tree.version == 1:
                self._prepare_v1(tree)
        self.capabilities, self.missing = self._probe()

    @property
    def folders(self) -> list[Path]:
        """Our groups' common parents, one in each hierarchy."""
        return list(dict.fromkeys(([self._v2] if self._v2 else []) + list(self._v1.values())))

    @property
    def has_bare_v2(self) -> bool:
        """There is version 2 without controllers: to find processes by, while limits are version 1's."""
        return self._v2 is not None and not self._v2_controllers

    def group(self, key: str) -> Group:
        """The groups of one attempt; not made yet."""
        v1 = {controller: path / key for controller, path in self._v1.items()}
        return Group(self._v2 / key if self._v2 else None, self._v2_controllers, v1)

    def create(self, key: str, limits: Limits) -> Group:
        """Make an attempt's groups with their limits. OSError when one is refused; nothing is left then."""
        group = self.group(key)
        self.complete(group, limits)
        return group

    def begin(self, key: str) -> Group:
        """Make the one of version 2 only: `complete` makes the others. OSError: it cannot be made.

        For a process that is to begin there while the limits are set, and is in the other groups later.
        """
        group = self.group(key)
        if group.v2:
            with contextlib.suppress(FileExistsError):
                self._make_dir(group.v2)
        return group

    def complete(self, group: Group, limits: Limits) -> None:
        """Make what there is not of it yet, and set the limits. OSError when one is refused; nothing is left then."""
        try:
            group.create(limits, self._make_dir)
        except OSError:
            group.remove()
            raise

    def _prepare_v2(self, tree: Hierarchy) -> None:
        base, controllers, problems = base_v2(tree)
        self._problems += problems
        folder = base / self._name
        try:
            with contextlib.suppress(FileExistsError):
                self._make_dir(folder)
            if controllers:
                write_text(folder / "cgroup.subtree_control", " ".join(f"+{name}" for name in sorted(controllers)))
        except OSError as error:
            self._problems.append(f"{folder}: {error.strerror}")
            return
        self._v2, self._v2_controllers = folder, controllers

    def _prepare_v1(self, tree: Hierarchy) -> None:
        controllers = tree.controllers - self._v2_controllers
        if self._v2:
            controllers -= {"freezer", "cpuacct"}  # cgroup.kill and cpu.stat do it better
        if "io" in self._v2_controllers:
            controllers -= {"blkio"}  # its name there
        if not controllers:
            return
        folder = tree.own / self._name
        try:
            with contextlib.suppress(FileExistsError):
                self._make_dir(folder)
        except OSError as error:
            self._problems.append(f"{folder}: {error.strerror}")
            return
        self._v1.update(dict.fromkeys(controllers, folder))

    def _probe(self) -> tuple[tuple[str, ...], dict[str, str]]:
        """Find what works by making a group and looking at its files."""
        why_none = "; ".join(self._problems) or "no usable cgroup hierarchy is mounted"
        if not self.folders:
            return (), dict.fromkeys(CAPABILITIES, why_none)
        try:
            group = self.create(".probe", Limits())
        except OSError as error:
            return (), dict.fromkeys(CAPABILITIES, f"cannot make groups: {error}")
        v2 = group.paths[0] if self._v2 else None
        memory, cpu, pids = (self._folder(group, name) for name in ("memory", "cpu", "pids"))
        counters = group.counters()
        swap = ("memory.memsw.limit_in_bytes", "memory.swap.max")
        have = {
            "memory-limit": bool(memory),
            "swap-limit": bool(memory and any((memory / name).exists() for name in swap)),
            "cpu-limit": bool(cpu and any((cpu / name).exists() for name in ("cpu.cfs_quota_us", "cpu.max"))),
            "pids-limit": bool(pids),
            "cpu-usage": counters.cpu_user_s is not None,
            "memory-peak": counters.memory_peak_bytes is not None,
            "oom-report": bool(memory and self._says_oom(memory)),
            "cgroup-kill": bool(v2 and (v2 / "cgroup.kill").exists()) or bool(self._v1),
        }
        group.remove()
        reason = why_none if self._problems else "this kernel does not offer it here"
        return tuple(n for n in CAPABILITIES if have[n]), {n: reason for n in CAPABILITIES if not have[n]}

    def _folder(self, group: Group, controller: str) -> Path | None:
        if controller in self._v1:
            return self._v1[controller] / ".probe"
        return group.paths[0] if controller in self._v2_controllers else None

    @staticmethod
    def _says_oom(memory: Path) -> bool:
        return "oom_kill" in flat(memory / "memory.oom_control") or "oom_kill" in flat(memory / "memory.events")


def sweep(folders: Sequence[Path], limit_s: float) -> list[Path]:
    """Kill and remove all groups below `folders`, then the folders. Returns what resisted for `limit_s`.

    For the groups that an earlier shim of the same state directory left; waits, so only for the start.
    """
    deadline = time.monotonic() + limit_s
    left = [folder for folder in folders if folder.is_dir()]
    while left:
        for folder in left:
            _kill_below(folder)
        left = [folder for folder in left if not remove_group(folder)]
        if not left or time.monotonic() > deadline:
            break
        time.sleep(0.01)
    return left


def _kill_below(folder: Path) -> None:
    with contextlib.suppress(OSError):
        write_text(folder / "cgroup.kill", "1")
        return
    with contextlib.suppress(OSError):
        write_text(folder / "freezer.state", "THAWED")  # should it have died between freezing and thawing
    for pid in members(folder):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
