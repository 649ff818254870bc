"""runc and crun: versions and what they lack, which of them to use, and which ids of this machine are whose."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

Version = tuple[int, int, int]

AUTO, RUNC, CRUN = "auto", "runc", "crun"
FIXES = "CVE-2025-31133, CVE-2025-52565 and CVE-2025-52881"
# The first releases with those fixes; a later line begins with the release candidate that has them.
_FIXED_1_2, _FIXED_1_3, _FIXED_1_4_RC = (1, 2, 8), (1, 3, 3), 3
_VERSION = re.compile(r"^\s*(runc|crun) version v?(\d+)\.(\d+)(?:\.(\d+))?(?:-rc\.?(\d+))?", re.M)

ID_COUNT = 65536  # what one container needs: ids 0 to 65535
SUBID_LINES_MAX = 100_000  # of /etc/subuid: as many users as a large site has


# --- programs ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Program:
    """A program that runs containers. `candidate` is the number of a release candidate, 0 for a release."""

    path: str
    kind: str
    version: Version
    text: str = ""
    candidate: int = 0

    @property
    def name(self) -> str:
        """E.g. ``runc 1.1.5``."""
        return f"{self.kind} {'.'.join(map(str, self.version))}" + (f"-rc.{self.candidate}" if self.candidate else "")


def parse_program(path: str, text: str) -> Program | None:
    """What ``PROGRAM --version`` printed says of it; None when it is neither runc nor crun."""
    found = _VERSION.search(text)
    if found is None:
        return None
    kind, *numbers, candidate = found.groups()
    major, minor, patch = (int(n or 0) for n in numbers)
    return Program(path, kind, (major, minor, patch), text.strip().partition("\n")[0][:200], int(candidate or 0))


def lacks_fixes(program: Program) -> bool:
    """Whether its version is one without the fixes of `FIXES`, so that only careful configurations are safe with it.

    A distribution may have put them into an older version without changing its number; then this says yes all the same.
    crun's authors found that it has none of these faults.
    """
    if program.kind != RUNC:
        return False
    if program.version < (1, 3, 0):
        return program.version < _FIXED_1_2
    if program.version == (1, 4, 0) and program.candidate:
        return program.candidate < _FIXED_1_4_RC
    return program.version < _FIXED_1_3


def program_warnings(program: Program) -> tuple[str, ...]:
    """What its version means for those who run containers with it."""
    if not lacks_fixes(program):
        return ()
    return (
        f"{program.name} lacks, by its version, the fixes of {FIXES} (runc 1.2.8, 1.3.3): containers run as an "
        "ordinary user in a user namespace, in a checked root file system, and never as root",
    )


def candidates(wanted: str, found: Sequence[Program], cgroup_mode: str) -> tuple[list[Program], list[str]]:
    """Which programs to try, the best first, and in words why others are not.

    crun starts faster and needs less memory, but refuses machines with both versions of cgroups at once.
    """
    if wanted not in (AUTO, RUNC, CRUN):
        return list(found), []
    if wanted != AUTO:
        return [p for p in found if p.kind == wanted], []
    refused = [p for p in found if p.kind == CRUN and cgroup_mode == HYBRID]
    reasons = [f"{p.name} refuses a machine with both versions of cgroups at once (hybrid)" for p in refused]
    tried = [p for p in found if p not in refused]
    return sorted(tried, key=lambda p: p.kind != CRUN), reasons


# --- cgroups -----------------------------------------------------------------------------------------------------

V1, V2, HYBRID, NONE = "v1", "v2", "hybrid", "none"
LIMITING = ("cpu", "memory", "pids")  # controllers whose limits a task may ask for
# What holds whatever the cgroups are: the kernel or the shim sees to it for each process or folder.
ALWAYS_HOLD = ("open files", "log size", "scratch size", "walltime")


def cgroup_mode(mountinfo: str) -> str:
    """Which versions of cgroups are mounted: v1, v2, hybrid (both at once) or none."""
    kinds = set()
    for line in mountinfo.splitlines():
        _, dash, right = line.partition(" - ")
        words = right.split()
        if dash and words:
            kinds.add(words[0])
    if "cgroup" in kinds:
        return HYBRID if "cgroup2" in kinds else V1
    return V2 if "cgroup2" in kinds else NONE


def limits_held(controllers: Iterable[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Limits that hold with these controllers, and those that do not."""
    have = frozenset(controllers)
    held = tuple(name for name in LIMITING if name in have)
    return (*held, *ALWAYS_HOLD), tuple(name for name in LIMITING if name not in have)


# --- ids ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, order=True)
class HostIds:
    """`count` ids of this machine from `first` on."""

    first: int
    count: int
    owner: str = field(default="", compare=False)

    @property
    def end(self) -> int:
        """The first id behind it."""
        return self.first + self.count

    def overlaps(self, other: HostIds) -> bool:
        """Whether an id is in both."""
        return self.first < other.end and other.first < self.end

    def __str__(self) -> str:
        return f"{self.first}-{self.end - 1}"


def parse_subids(text: str) -> tuple[HostIds, ...]:
    """The lines of /etc/subuid or /etc/subgid, ``OWNER:FIRST:COUNT``; what is none is left out."""
    found = []
    for line in text.splitlines()[:SUBID_LINES_MAX]:
        parts = line.strip().split(":")
        if len(parts) == 3 and parts[0] and all(p.isascii() and p.isdecimal() for p in parts[1:]):
            found.append(HostIds(int(parts[1]), int(parts[2]), parts[0]))
    return tuple(found)


def own_range(ranges: Iterable[HostIds], user: str, uid: int, count: int = ID_COUNT) -> HostIds | None:
    """The first range of a user, by name or number, with `count` ids, cut to that; None when there is none."""
    for r in ranges:
        if r.owner in (user, str(uid)) and r.count >= count:
            return HostIds(r.first, count, r.owner)
    return None


def mapped(uid_map: str) -> tuple[HostIds, ...]:
    """The ids that there are in a user namespace, by its /proc/self/uid_map, in order, neighbours as one.

    Outside of all namespaces that is one range with nearly all numbers.
    """
    found: list[HostIds] = []
    lines = (line.split() for line in uid_map.splitlines())
    for inside, count in sorted((int(w[0]), int(w[2])) for w in lines if len(w) == 3 and all(x.isdecimal() for x in w)):
        if found and found[-1].end == inside:
            found[-1] = HostIds(found[-1].first, found[-1].count + count)
        else:
            found.append(HostIds(inside, count))
    return tuple(found)


def range_within(ranges: Iterable[HostIds], wanted: HostIds) -> HostIds | None:
    """`wanted` if all of it is there; else the first ids that are, as many, without 0; None: they do not suffice."""
    usable = [HostIds(max(r.first, 1), r.end - max(r.first, 1)) for r in ranges]
    if any(r.first <= wanted.first and wanted.end <= r.end for r in usable):
        return wanted
    return next((HostIds(r.first, wanted.count) for r in usable if r.count >= wanted.count), None)


def others_in(ranges: Iterable[HostIds], ours: HostIds, owners: Iterable[str]) -> tuple[HostIds, ...]:
    """Ranges of others than `owners` that share ids with ours: their containers and ours would be the same users."""
    own = frozenset(owners)
    return tuple(r for r in ranges if r.owner not in own and r.overlaps(ours))


def free_range(ranges: Iterable[HostIds], count: int = ID_COUNT, first: int = 1_000_000) -> int:
    """From which id on `count` of them are nobody's, `first` or higher; what to write into /etc/subuid."""
    at = first
    for r in sorted(ranges):
        if r.end > at and r.first < at + count:
            at = r.end
    return at
