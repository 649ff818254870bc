"""From fork to exec: what happens in the new process before the program takes over.

Errors go to the shim through a pipe that exec closes: first a line with the pid as the host sees it, then, if something
failed, a JSON object with stage and errno.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import os
import resource
import signal
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NoReturn

from . import bundle, secretfiles, sysapi

DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@dataclass(frozen=True)
class Spawn:
    """All that a child needs. Paths are absolute.

    Attributes:
        stdout, stderr: files to append to; their folder is made when `make_folders`.
        scratch: folder to make and start in when `cwd` is empty.
        join: control files to write ``0`` to.
        oom_score_adj: how readily the kernel picks it when memory runs out.
        die_with_parent: have the kernel kill it when the shim dies; only without a pid namespace of our own.
        parent: the shim's pid.
        nofile, core: limits to give back.
        open_files: the limit that it must have instead of `nofile`; None: none.
        secrets: files to provide at `place`.
        bundle: of a container, whose runtime is started instead of `argv`.
    """

    argv: Sequence[str]
    env: dict[str, str]
    cwd: str
    scratch: str
    stdout: str
    stderr: str
    join: Sequence[str]
    oom_score_adj: int
    die_with_parent: bool
    parent: int
    nofile: tuple[int, int]
    core: tuple[int, int]
    open_files: tuple[int, int] | None
    key: str
    secrets: dict[str, bytes] = field(repr=False)
    place: secretfiles.Place
    bundle: bundle.Plan | None = None


def unusable(argv: Sequence[str], env: dict[str, str]) -> str:
    """Why no program can ever be started with these; empty when one might."""
    if not argv or not argv[0]:
        return "the command is empty"
    if any("\0" in item for item in argv):
        return "an argument contains a NUL character"
    try:
        for item in (*argv, *env, *env.values()):
            os.fsencode(item)
    except UnicodeEncodeError:
        return "an argument or environment variable cannot be written in bytes"
    for name, value in env.items():
        if not name or "=" in name or "\0" in name or "\0" in value:
            return f"the environment variable {name!r} has a name or value that no process can have"
    return ""


def explain(stage: str, number: int, program: str, cwd: str) -> str:
    """What went wrong between fork and exec, for people."""
    why = os.strerror(number)
    match stage:
        case "exec":
            if number == errno.ENOENT:
                return f"program not found: {program}"
            if number == errno.EACCES:
                return f"not executable: {program} (permission denied)"
            if number == errno.ENOEXEC:
                return f"not executable: {program} is neither a program for this machine nor a script with a #! line"
            if number == errno.E2BIG:
                return "the arguments and environment together are too long for this machine"
            return f"cannot execute {program}: {why}"
        case "interpreter":
            return f"cannot execute {program}: the interpreter named in its first line was not found"
        case "cwd":
            if number in (errno.ENOENT, errno.ENOTDIR):
                return f"working directory missing: {cwd}"
            return f"cannot enter the working directory {cwd}: {why}"
        case "scratch":
            return f"cannot make the scratch directory: {why}"
        case "logs":
            return f"cannot open the log files: {why}"
        case "secrets":
            return f"cannot provide the secrets' files: {why}"
        case "bundle":
            return f"cannot make the mounts of a container: {why}"
        case "mount":
            return f"cannot mount what it asks for of this node, which has changed meanwhile: {why}"
        case "root":
            return f"cannot mount the root file system: {why}"
        case "runtime":
            return f"cannot execute the container runtime {program}: {why}"
        case "open-files":
            return f"cannot set its limit of open files: this node's own is lower, or the kernel's ({why})"
        case "cgroup":
            return f"cannot enter the cgroup: {why}"
        case _:
            return f"cannot start (at {stage}): {why}"


def run(spawn: Spawn, report: int, outer_proc: int, *, joined: bool = False) -> NoReturn:
    """Become the program. Called in the child; never returns, whatever happens. `joined`: it is in its group already.

    Each page of memory that we touch is copied or mapped first, which is most of what all of this costs.
    """
    stage = ["setup"]
    try:
        with contextlib.suppress(OSError):
            os.write(report, os.readlink("self", dir_fd=outer_proc).encode() + b"\n")
        _become(spawn, report, stage, joined=joined)
    except OSError as error:
        text = json.dumps({"stage": stage[0], "errno": error.errno or 0})
        os.write(report, text.encode())
    finally:
        os._exit(127)


def join_groups(files: Sequence[str]) -> None:
    """Enter the control groups of these files, ``cgroup.procs``. OSError: the first that refuses."""
    for path in files:
        fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, b"0")
        finally:
            os.close(fd)


def _become(spawn: Spawn, report: int, stage: list[str], *, joined: bool) -> NoReturn:
    os.setsid()
    reset_priority(spawn.oom_score_adj)  # first: in a group that has too little memory we could not be killed otherwise
    stage[0] = "cgroup"
    if not joined:
        join_groups(spawn.join)
    stage[0] = "setup"
    if spawn.die_with_parent:
        sysapi.set_parent_death_signal(signal.SIGKILL)
        if os.getppid() != spawn.parent:
            os._exit(127)  # it died before we asked
    reset_signals()
    with contextlib.suppress(OSError, ValueError):
        restore_limits(spawn.nofile, spawn.core)
    os.umask(0o022)
    stage[0] = "logs"
    _open_streams(spawn)
    if spawn.bundle:
        bundle.prepare(spawn.bundle, spawn.secrets, stage)
        stage[0] = "open-files"
        limit_files(spawn.open_files, for_runtime=True)
        stage[0] = "runtime"
        os.set_inheritable(report, True)
        os.execve(spawn.bundle.program, spawn.bundle.command(report), spawn.env)  # noqa: S606 - no shell
    if spawn.secrets:
        stage[0] = "secrets"
        secretfiles.provide(spawn.place, spawn.key, spawn.secrets)
    stage[0] = "scratch"
    if not spawn.cwd:
        with contextlib.suppress(FileExistsError):
            os.mkdir(spawn.scratch, 0o700)  # noqa: PTH102 - no pathlib between fork and exec
        os.chdir(spawn.scratch)
    else:
        stage[0] = "cwd"
        os.chdir(spawn.cwd)
    stage[0] = "open-files"
    limit_files(spawn.open_files)  # last: what we have inherited may be more
    stage[0] = "exec"
    become_program(spawn.argv, spawn.env, stage)


@functools.cache
def changed_signals() -> tuple[int, ...]:
    """Those that the shim ignores or handles: always the same once it serves."""
    defaults = (signal.SIG_DFL, None)  # None: libc keeps it for itself
    return tuple(number for number in range(1, signal.NSIG) if signal.getsignal(number) not in defaults)


def reset_signals() -> None:
    """What the shim ignores or blocks its children need not. What it handles exec resets, but it may come before."""
    sysapi.default_signals(changed_signals())


def reset_priority(oom_score_adj: int) -> None:
    """Ordinary priority, and a place among those that go when memory runs out."""
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, 0)
    with contextlib.suppress(OSError):
        fd = os.open("/proc/self/oom_score_adj", os.O_WRONLY | os.O_CLOEXEC)
        os.write(fd, str(oom_score_adj).encode())
        os.close(fd)


def restore_limits(nofile: tuple[int, int], core: tuple[int, int]) -> None:
    """Give back the limits on open files and core dumps that the shim changed for itself."""
    resource.setrlimit(resource.RLIMIT_CORE, core)
    resource.setrlimit(resource.RLIMIT_NOFILE, nofile)


def limit_files(limits: tuple[int, int] | None, *, for_runtime: bool = False) -> None:
    """Set the limit on open files. OSError: this machine does not let us.

    `for_runtime`: this is a container's runtime, which sets it itself: it must be able to.
    """
    if limits is None:
        return
    if for_runtime:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if limits[1] <= hard:
            return
        limits = (soft, limits[1])
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    except ValueError:  # so Python calls EPERM here
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM)) from None


def _open_streams(spawn: Spawn) -> None:
    os.dup2(_nothing(for_runtime=spawn.bundle is not None), 0)
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    for number, path in ((1, spawn.stdout), (2, spawn.stderr)):
        with contextlib.suppress(FileExistsError):
            os.mkdir(os.path.dirname(path), 0o700)  # noqa: PTH102, PTH120 - no pathlib between fork and exec
        fd = os.open(path, flags, 0o640)
        os.dup2(fd, number)


def _nothing(*, for_runtime: bool) -> int:
    """An input that ends at once.

    For a container's runtime not /dev/null: crun 1.8 makes the user of the container its owner, on the machine.
    """
    if not for_runtime:
        return os.open("/dev/null", os.O_RDONLY)
    reading, writing = os.pipe()
    os.close(writing)
    return reading


def become_program(argv: Sequence[str], env: dict[str, str], stage: list[str]) -> NoReturn:
    """Exec, looking for the program in the PATH of `env`. OSError: it cannot be; `stage` then tells of what kind."""
    program = argv[0]
    if "/" in program:
        candidates = [program]
    else:
        folders = (env.get("PATH") or DEFAULT_PATH).split(":")
        candidates = [f"{folder or '.'}/{program}" for folder in folders]
    refused: OSError | None = None
    for path in candidates:
        try:
            os.execve(path, list(argv), env)  # noqa: S606 - a shell is the caller's choice
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR):
                if os.path.isfile(path):  # noqa: PTH113 - no pathlib between fork and exec
                    stage[0] = "interpreter"
                    raise
                continue
            if error.errno != errno.EACCES or not os.path.exists(path):  # noqa: PTH110 - no pathlib between fork and exec
                raise
            refused = refused or error
    if refused is not None:
        raise refused
    raise FileNotFoundError(errno.ENOENT, "not found")
