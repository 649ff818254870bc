"""Containers, as the shim sees them: whether this machine can have any, and what is known of one."""

from __future__ import annotations

import contextlib
import enum
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import sysapi
from .bundle import ROOTS, WORK, Plan, escape, mount_overlay, pid_file, source_place
from .cgroup import Cgroups, Group, remove_group
from .hierarchy import Hierarchy

CAPABILITY = "containers"
OVERLAY = "overlay"
PURE_V2 = "cgroup2-only"
STARTER = ".starter"  # version 2: the runtime's own group below the attempt's, which may hold no processes itself
INSIDE = "container"
STATE_FILES_MAX = 32  # of one container, in the runtime's state; it makes two
STATE_BYTES = 512 << 20  # of all of them: some 60 KiB each with a seccomp profile, 4096 at most
MESSAGE_CHARS = 500
PIDS_FOR_START = 16  # runc's first process has some 8 threads
_MARKS_OF_THE_USERS_FAULT = (
    'exec: "',
    "executable file `",  # crun
    "open executable:",
    "chdir to cwd",
    "chdir to `",  # crun
    "mkdir cwd",
    "invalid uid",
    "invalid gid",
    "unknown capability",
    "cannot set uid to unmapped user",
    "cannot set gid to unmapped",
    "cannot set any additional groups",
    "invalid sysctl",
    "setrlimits",
)
_MARKS_OF_THE_DISKS_FAULT = ("no space left", "quota exceeded", "input/output error", "cannot allocate memory")


class Stage(enum.IntEnum):
    """How far a container's start has come; only ever grows."""

    CREATING = 1  # the runtime is at it
    CREATED = 2  # its first process waits to be told
    STARTED = 3  # which is what the user has asked for


@dataclass
class Container:
    """What is to be contained how, and how far it has come.

    Attributes:
        config: emptied once it has been handed over.
        process: as what its command runs, without the command: for others that are to run beside it.
        sources: of its mounts, those to which no link may lead; see `bundle.Plan`.
        noted: the record that it is being started is on disk; it is made meanwhile, and not let go before.
        waiting_as: name of its first process while it waits; another says that the runtime has made way for what it was
            to run.
        too_small: what the runtime said shows that memory ran out on the way: it removes the groups that would tell.
        fifo_fd: from which we hear that it has started.
        maker, maker_fd: pid and pidfd of the runtime's process that makes it, while that runs beside the container's
            first process already; else 0 and -1. Until it has ended the first process is its child, not ours.
        helper: pid of a process of the runtime's that starts or removes it; 0 for none.
    """

    program: str
    config: dict[str, Any] = field(repr=False)
    lower: list[str]
    writable: bool
    owner: tuple[int, int]
    sources: list[str] = field(default_factory=list)
    process: dict[str, Any] = field(init=False, repr=False)
    stage: Stage = Stage.CREATING
    noted: bool = False
    waiting_as: str = ""
    too_small: bool = False
    fifo_fd: int = -1
    maker: int = 0
    maker_fd: int = -1
    helper: int = 0

    def __post_init__(self) -> None:
        """Keep what is needed later."""
        self.process = {name: value for name, value in _section(self.config, "process").items() if name != "args"}


@dataclass(frozen=True)
class Place:
    """Where containers are made.

    Attributes:
        bundle, root, state: see `bundle.Plan`; `state` is on a tmpfs that goes with us.
        groups: name of our control groups, in every hierarchy.
        extra: our folders in the hierarchies of version 1 that only the runtime uses.
        pure_v2: where version 2 is mounted if there is nothing else.
        overlay: why the kernel has none for us; empty when it has.
        why: no container can be had here; empty when one can.
    """

    bundle: str = ""
    root: str = ""
    state: str = ""
    groups: str = ""
    extra: tuple[Path, ...] = ()
    pure_v2: Path | None = None
    overlay: str = ""
    why: str = "not looked for"

    @property
    def capabilities(self) -> tuple[str, ...]:
        """For `hello`."""
        if self.why:
            return ()
        return (CAPABILITY, *(() if self.overlay else (OVERLAY,)), *((PURE_V2,) if self.pure_v2 else ()))

    @property
    def warnings(self) -> tuple[str, ...]:
        """For people."""
        if self.why:
            return (f"{CAPABILITY} are missing: {self.why}",)
        if self.overlay:
            return (f"{OVERLAY} is missing: {self.overlay}",)
        return ()

    def plan(self, key: str, held: Container, group: Group | None, scratch: str, mark: Mapping[str, str]) -> Plan:
        """How to make the container `key`."""
        found = [(path, source_place(self.bundle, i)) for i, path in enumerate(dict.fromkeys(held.sources))]
        config = with_sources(held.config, {scratch: f"{scratch}/{WORK}", **dict(found)})
        config["root"] = {**_section(config, "root"), "path": self.root}
        config["linux"] = {**_section(config, "linux"), "cgroupsPath": self._groups_path(key, group)}
        if mark:
            process = _section(config, "process")
            added = [f"{name}={value}" for name, value in mark.items()]
            config["process"] = {**process, "env": [*process.get("env", []), *added]}
        return Plan(
            program=held.program,
            key=key,
            config=json.dumps(config).encode(),
            lower=held.lower,
            writable=held.writable,
            owner=held.owner,
            folder=scratch,
            sources=found,
            bundle=self.bundle,
            root=self.root,
            state=self.state,
        )

    def join_files(self, group: Group | None) -> list[str]:
        """What the runtime's own process is to write ``0`` to. OSError: its group cannot be made.

        Version 2 only, so that one write kills all, however far it has come. In the others the runtime looks for its
        own group, to make the container's below it: there it must stay where we are.
        """
        unified = group.v2 if group else None
        if unified is None:
            return []
        if self.pure_v2:
            unified = unified / STARTER
            unified.mkdir(exist_ok=True)
        return [str(unified / "cgroup.procs")]

    def remove_groups(self, key: str) -> bool:
        """Those that only the runtime has made; False while one is not empty."""
        left = [path for path in self.extra if not remove_group(path / key)]
        return not left

    def remove_state(self, key: str) -> bool:
        """What the runtime remembers of it, as its own ``delete`` would; False: something else is there too."""
        folder = f"{self.state}/{key}"
        with contextlib.suppress(FileNotFoundError):
            os.unlink(pid_file(self.state, key))  # noqa: PTH108 - as text, like all of it
        try:
            names = os.listdir(folder)  # noqa: PTH208 - only names
            for name in names[:STATE_FILES_MAX]:
                os.unlink(f"{folder}/{name}")  # noqa: PTH108
            os.rmdir(folder)  # noqa: PTH106
        except FileNotFoundError:
            return True
        except OSError:
            return False
        return True

    def _groups_path(self, key: str, group: Group | None) -> str:
        if self.pure_v2 and group and group.v2:
            return f"/{(group.v2 / INSIDE).relative_to(self.pure_v2)}"
        return f"{self.groups}/{key}"


def find_place(state_dir: Path, name: str, cgroups: Cgroups, trees: Sequence[Hierarchy], *, isolated: bool) -> Place:
    """What this machine allows. `trees`: all hierarchies there are. We may get a mount namespace of our own."""
    bundle, state = state_dir / "bundle", state_dir / "runc"
    if not cgroups.folders:
        return Place(why="no control groups can be made")  # why that is is said of the limits
    root = next((path for path in ROOTS if Path(path).is_dir()), "")
    if not root:
        return Place(why=f"there is none of the folders {', '.join(ROOTS)} to mount a root file system on")
    try:
        for folder in (bundle, state):
            folder.mkdir(mode=0o700, exist_ok=True)
        overlay = _probe(state_dir, bundle, root)
        if not isolated:
            sysapi.unshare(sysapi.CLONE_NEWNS)
            sysapi.make_root_slave()
        sysapi.mount_tmpfs(str(state), f"mode=0700,size={STATE_BYTES}")
    except OSError as error:
        return Place(why=f"mounts of our own cannot be made: {error.strerror}")
    extra = [tree.own / name for tree in trees if tree.version == 1]
    return Place(
        bundle=str(bundle),
        root=root,
        state=str(state),
        groups=name,
        extra=tuple(path for path in dict.fromkeys(extra) if path not in cgroups.folders),
        pure_v2=trees[0].mount if len(trees) == 1 and trees[0].version == 2 else None,
        overlay=overlay,
        why="",
    )


def _probe(state_dir: Path, bundle: Path, root: str) -> str:
    """Mount once in children of our own; why there is no overlay, or nothing. OSError: we may not mount at all."""
    upper, work = folders = [state_dir / "trash" / name for name in ("probe-upper", "probe-work")]
    for folder in folders:
        folder.mkdir(mode=0o700, exist_ok=True)
    layers = [f"lowerdir={escape(str(bundle))}", f"upperdir={escape(str(upper))}", f"workdir={escape(str(work))}"]

    def mounts() -> None:
        sysapi.unshare(sysapi.CLONE_NEWNS)
        sysapi.make_root_slave()
        sysapi.mount_tmpfs(str(bundle), "mode=0700,size=65536")
        sysapi.bind_read_only(str(bundle), root)

    def overlay() -> None:
        mounts()
        mount_overlay(root, layers, writable=True)

    if number := _fails(mounts):
        raise OSError(number, os.strerror(number))
    number = _fails(overlay)
    return os.strerror(number) if number else ""


def _fails(attempt: Callable[[], None]) -> int:
    """Do it in a child; 0, or the number of its error."""
    pid = os.fork()
    if pid == 0:
        code = 255
        try:
            attempt()
            code = 0
        except OSError as error:
            code = error.errno or 255
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def with_sources(config: dict[str, Any], places: Mapping[str, str]) -> dict[str, Any]:
    """The same with sources of mounts replaced by where they are to be found instead."""
    mounts = config.get("mounts")
    if not isinstance(mounts, list):
        return dict(config)
    return {**config, "mounts": [_moved(mount, places) for mount in mounts]}


def _moved(mount: Any, places: Mapping[str, str]) -> Any:
    source = mount.get("source") if isinstance(mount, dict) else None
    return {**mount, "source": places[source]} if isinstance(source, str) and source in places else mount


def _section(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = config.get(name)
    return value if isinstance(value, dict) else {}


# --- what the runtime says -------------------------------------------------------------------------------------------


def complaint(lines: Sequence[bytes]) -> str:
    """The last error in a runtime's log, short enough for people; empty when there is none."""
    found = ""
    for line in lines:
        with contextlib.suppress(ValueError):
            entry = json.loads(line)
            if isinstance(entry, dict) and entry.get("level") in ("error", "fatal"):
                found = str(entry.get("msg", ""))
    return " ".join(found.split())[:MESSAGE_CHARS]


def says_out_of_memory(message: str) -> bool:
    """Whether it was for want of memory."""
    return "OOM-killed" in message


def is_the_users_fault(message: str) -> bool:
    """Whether no other node would do better with the same configuration."""
    if any(mark in message for mark in _MARKS_OF_THE_USERS_FAULT):
        return True
    # runc up to 1.1 makes the working directory, of which it says no more than that; all else has words before it.
    return "container init: mkdir /" in message and not any(mark in message for mark in _MARKS_OF_THE_DISKS_FAULT)
