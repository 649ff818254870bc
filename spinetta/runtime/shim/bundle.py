"""What a container needs around it, made between fork and exec: mounts that nobody else sees, and its configuration.

All of it lies in a mount namespace of the new process's own, on tmpfs: the command, the environment and the secrets
never touch a disk, and the kernel removes everything with the last process in it, whatever becomes of us.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from . import sysapi
from .secretfiles import write_files

# Where the root file system is mounted. A user namespace's root, who is nobody outside, must get there, which it does
# not below our state directory. An empty folder that every kernel has, and into which nobody puts anything, is as good
# as one made for it, and need not be removed. (Not below /dev: runc then loses its way.)
ROOTS = ("/sys/kernel/debug", "/sys/kernel/config", "/sys/fs/fuse/connections", "/sys/kernel/security")
WORK = "work"  # in the attempt's own folder: what the container sees as its scratch directory
UPPER, OVERLAY_WORK = "upper", "overlay"  # beside it: what it writes to its root
PID_FILE = ".pid-"  # before the key
SOURCES_MAX = 256  # of mounts; a task may ask for 64
LOWER_MAX = 64  # folders of one overlay
OPTIONS_BYTES_MAX = 4000  # the kernel takes a page
_PAGE_BYTES = 4096


@dataclass(frozen=True)
class Plan:
    """How to make one.

    Attributes:
        program: absolute path of the OCI runtime.
        key: the container's id.
        config: its configuration, complete, as the runtime reads it: whoever forks is quicker to write it down.
        lower: folders that make up the root file system, topmost first.
        writable: an overlay with an upper folder in `folder`.
        owner: user and group that own the scratch directory.
        folder: the attempt's own.
        sources: paths that tasks may change, and where in `bundle` what is there now is to appear: between judging a
            path and mounting it somebody could have put a link on the way.
        bundle: where the configuration and the secrets appear, an empty folder shared by all as a mount point.
        root: the same for the root file system.
        state: of the runtime.
    """

    program: str
    key: str
    config: bytes = field(repr=False)
    lower: Sequence[str]
    writable: bool
    owner: tuple[int, int]
    folder: str
    sources: Sequence[tuple[str, str]]
    bundle: str
    root: str
    state: str

    def command(self, report: int) -> list[str]:
        """What makes the container, up to where its first process waits. Complaints go to descriptor `report`."""
        log = f"/proc/self/fd/{report}"
        return [
            *(self.program, "--root", self.state, "--log", log, "--log-format", "json"),
            *("create", "--bundle", self.bundle, "--pid-file", pid_file(self.state, self.key), self.key),
        ]


def pid_file(state: str, key: str) -> str:
    """Where the runtime writes the first process's number. No attempt's key begins with a dot."""
    return f"{state}/{PID_FILE}{key}"


# --- between fork and exec -------------------------------------------------------------------------------------------


def prepare(plan: Plan, secrets: Mapping[str, bytes], stage: list[str]) -> None:
    """Make all of it. OSError: it cannot be; `stage` then tells what."""
    stage[0] = "bundle"
    sysapi.unshare(sysapi.CLONE_NEWNS)
    sysapi.make_root_slave()
    pages = sum(len(content) // _PAGE_BYTES + 1 for content in (plan.config, *secrets.values())) + 3
    inodes = len(secrets) + len(plan.sources) + 6
    sysapi.mount_tmpfs(plan.bundle, f"mode=0700,size={pages * _PAGE_BYTES},nr_inodes={inodes}")
    write_files(plan.bundle, {"config.json": plan.config})
    _make_folder(f"{plan.bundle}/secrets", 0o700)
    write_files(f"{plan.bundle}/secrets", secrets)
    for name in secrets:
        os.chown(f"{plan.bundle}/secrets/{name}", *plan.owner)
    os.chown(f"{plan.bundle}/secrets", *plan.owner)
    os.chmod(f"{plan.bundle}/secrets", 0o500)  # noqa: PTH101 - no pathlib between fork and exec
    if plan.sources:
        stage[0] = "mount"
        _make_folder(_sources(plan.bundle), 0o700)
        for path, place in plan.sources:
            _bind_source(path, place)
    stage[0] = "scratch"
    _make_folder(plan.folder, 0o700)
    _make_folder(f"{plan.folder}/{WORK}", 0o700, plan.owner)
    stage[0] = "root"
    if not plan.writable and len(plan.lower) == 1:
        sysapi.bind_read_only(plan.lower[0], plan.root)
        return
    options = [f"lowerdir={':'.join(map(escape, plan.lower))}"]
    if plan.writable:
        _make_folder(f"{plan.folder}/{UPPER}", 0o755, plan.owner)
        _make_folder(f"{plan.folder}/{OVERLAY_WORK}", 0o700)
        options += [f"upperdir={escape(plan.folder)}/{UPPER}", f"workdir={escape(plan.folder)}/{OVERLAY_WORK}"]
    mount_overlay(plan.root, options, writable=plan.writable)


def source_place(bundle: str, number: int) -> str:
    """Where the source of a mount appears."""
    return f"{_sources(bundle)}/{number}"


def _sources(bundle: str) -> str:
    return f"{bundle}/sources"


def _bind_source(path: str, place: str) -> None:
    fd = open_plainly(path)
    try:
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            os.mkdir(place, 0o700)  # noqa: PTH102 - no pathlib between fork and exec
        else:
            os.close(os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        sysapi.bind(f"/proc/self/fd/{fd}", place)
    finally:
        os.close(fd)


def open_plainly(path: str) -> int:
    """A descriptor of what is at an absolute path, for its place only. OSError: a link is on the way, or nothing."""
    fd = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    for name in path.split("/"):
        if not name:
            continue
        try:
            inner = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
        finally:
            os.close(fd)
        fd = inner
        if stat.S_ISLNK(os.fstat(fd).st_mode):
            os.close(fd)
            raise OSError(errno.ELOOP, "a symbolic link is on the way")
    return fd


def escape(path: str) -> str:
    """A path as an overlay's options take it."""
    return re.sub(r"([\\:,])", r"\\\1", path)


def mount_overlay(where: str, options: Sequence[str], *, writable: bool) -> None:
    """OSError: the kernel will not have it."""
    text = ",".join(options)
    if len(os.fsencode(text)) > OPTIONS_BYTES_MAX:
        raise OSError(7, "the paths of its layers are too long together")
    if writable:
        # What is in it goes with the attempt: no reason to wait for the disk when it is unmounted.
        with contextlib.suppress(OSError):
            sysapi.mount_overlay(where, f"{text},volatile", read_only=False)
            return
    sysapi.mount_overlay(where, text, read_only=not writable)


def _make_folder(path: str, mode: int, owner: tuple[int, int] | None = None) -> None:
    with contextlib.suppress(FileExistsError):
        os.mkdir(path, mode)  # noqa: PTH102 - no pathlib between fork and exec
    if owner is not None:
        os.chown(path, *owner)
