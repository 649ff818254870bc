"""System calls that Python does not offer, through ctypes. Each raises OSError as the os module would."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import resource
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

CLONE_NEWNS = 0x0002_0000
CLONE_NEWPID = 0x2000_0000
CLOCK_BOOTTIME = 7
GROWTH_BYTES = 256 << 20  # a full shim, and what the largest messages take while they are read
_CAP_IPC_LOCK = 14

_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_REMOUNT = 1, 2, 4, 8, 32
_MS_BIND, _MS_REC, _MS_SLAVE = 4096, 16384, 1 << 19
_SIG_SETMASK, _SIGSET_BYTES = 2, 128
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_NAME, _PR_SET_CHILD_SUBREAPER = 1, 4, 15, 36
_MCL_CURRENT, _MCL_FUTURE, _MCL_ONFAULT = 1, 2, 4
_IN_MOVED_TO, _IN_NONBLOCK, _IN_CLOEXEC = 0x80, 0o4000, 0o2000000
_INOTIFY_EVENT = struct.Struct("@iIII")  # watch, mask, cookie, bytes of the name that follows
_TFD_NONBLOCK, _TFD_CLOEXEC, _TFD_TIMER_ABSTIME = 0o4000, 0o2000000, 1
_SYS_WAITID = {"x86_64": 247, "aarch64": 95, "riscv64": 95, "ppc64le": 272, "s390x": 281}
_WAITID = _SYS_WAITID.get(os.uname().machine)
_PIDFD_GETFD = 438  # on every machine: calls from 424 on have one number
_BLOCK_BYTES = 512  # of ru_inblock and ru_oublock, whatever the disk's
_P_PIDFD, _WEXITED, _WNOHANG, _WNOWAIT = 3, 4, 1, 0x0100_0000

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def unshare(flags: int) -> None:
    """Leave the namespaces named by `flags`."""
    _check(_libc.unshare(ctypes.c_int(flags)), "unshare")


def setns(fd: int, kind: int) -> None:
    """Enter the namespace that `fd` stands for, of this kind."""
    _check(_libc.setns(ctypes.c_int(fd), ctypes.c_int(kind)), "setns")


def pidfd_getfd(pidfd: int, number: int) -> int:
    """A descriptor of ours for what that one of another process stands for; closed when we exec."""
    return _check(_libc.syscall(ctypes.c_long(_PIDFD_GETFD), pidfd, number, 0), "pidfd_getfd")


def make_root_slave() -> None:
    """Mounts of the host still arrive here, ours never reach the host."""
    _check(_libc.mount(None, b"/", None, ctypes.c_ulong(_MS_REC | _MS_SLAVE), None), "mount --make-rslave /")


def mount_proc() -> None:
    """Mount a fresh /proc, which shows the pid namespace that we are in."""
    flags = ctypes.c_ulong(_MS_NOSUID | _MS_NODEV | _MS_NOEXEC)
    _check(_libc.mount(b"proc", b"/proc", b"proc", flags, None), "mount /proc")


def mount_tmpfs(path: str, options: str) -> None:
    """Mount a tmpfs from which nothing can be run; never swapped out where the kernel can promise that (6.4)."""
    flags = ctypes.c_ulong(_MS_NOSUID | _MS_NODEV | _MS_NOEXEC)
    where = os.fsencode(path)
    if _libc.mount(b"tmpfs", where, b"tmpfs", flags, f"{options},noswap".encode()) < 0:
        _check(_libc.mount(b"tmpfs", where, b"tmpfs", flags, options.encode()), f"mount {path}")


def remount_read_only(path: str) -> None:
    """Nothing can be written there any more."""
    flags = ctypes.c_ulong(_MS_REMOUNT | _MS_RDONLY | _MS_NOSUID | _MS_NODEV | _MS_NOEXEC)
    _check(_libc.mount(None, os.fsencode(path), None, flags, None), f"remount {path}")


def bind(source: str, where: str) -> None:
    """`source` appears at `where` too, with all that is mounted below it."""
    flags = ctypes.c_ulong(_MS_BIND | _MS_REC)
    _check(_libc.mount(os.fsencode(source), os.fsencode(where), None, flags, None), f"bind {source}")


def bind_read_only(source: str, where: str) -> None:
    """`source` appears at `where` too, and cannot be written to there, nor devices in it used."""
    target = os.fsencode(where)
    _check(_libc.mount(os.fsencode(source), target, None, ctypes.c_ulong(_MS_BIND), None), f"bind {source}")
    flags = ctypes.c_ulong(_MS_REMOUNT | _MS_BIND | _MS_RDONLY | _MS_NODEV)
    _check(_libc.mount(None, target, None, flags, None), f"remount {where}")


def mount_overlay(where: str, options: str, *, read_only: bool) -> None:
    """Mount an overlay, in which devices cannot be used."""
    flags = ctypes.c_ulong(_MS_NODEV | (_MS_RDONLY if read_only else 0))
    _check(_libc.mount(b"overlay", os.fsencode(where), b"overlay", flags, os.fsencode(options)), f"mount {where}")


def set_child_subreaper() -> None:
    """Orphans among our descendants become our children."""
    _check(_libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0), "prctl(PR_SET_CHILD_SUBREAPER)")


def keep_memory_private() -> None:
    """No core dumps of us, and no look into our memory by others of our user. Programs that we start are as ever."""
    _check(_libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0), "prctl(PR_SET_DUMPABLE)")


def set_parent_death_signal(number: int) -> None:
    """Have the kernel send us `number` when our parent dies."""
    _check(_libc.prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0), "prctl(PR_SET_PDEATHSIG)")


def default_signals(numbers: Iterable[int]) -> None:
    """None of them is ignored any more, and none at all blocked. Python does not learn of it: just before an exec."""
    for number in numbers:
        _libc.signal(number, None)
    _libc.sigprocmask(_SIG_SETMASK, bytes(_SIGSET_BYTES), None)


def set_name(name: str) -> None:
    """Name shown by ps and top (15 bytes)."""
    _libc.prctl(_PR_SET_NAME, ctypes.c_char_p(name.encode()[:15]), 0, 0, 0)


def lock_memory() -> None:
    """Keep every page that we ever touched in memory, now and later.

    On fault only: locking the whole of libpython and libc would triple our resident memory. Not under a limit that we
    might come to: from then on we would be given no memory at all, and to die of that would kill every task.
    """
    if not may_lock(
        resource.getrlimit(resource.RLIMIT_MEMLOCK)[0], Path("/proc/self/status").read_text("ascii", "replace")
    ):
        raise OSError(errno.ENOMEM, "the limit on locked memory is too low")
    _check(_libc.mlockall(_MCL_CURRENT | _MCL_FUTURE | _MCL_ONFAULT), "mlockall")


def may_lock(limit_bytes: int, status: str) -> bool:
    """Whether a process may lock all that it will ever have. `limit_bytes` counts address space; -1: there is none.

    `status`: of the process, as /proc tells it.
    """
    told = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    if limit_bytes < 0 or int(told.get("CapEff", "0"), 16) >> _CAP_IPC_LOCK & 1:
        return True
    size_kib = (told.get("VmSize", "").split() or ["0"])[0]
    return limit_bytes >= int(size_kib) * 1024 + GROWTH_BYTES


def timerfd() -> int:
    """A timer descriptor on CLOCK_BOOTTIME, which also counts while the machine is suspended."""
    return _check(_libc.timerfd_create(CLOCK_BOOTTIME, _TFD_NONBLOCK | _TFD_CLOEXEC), "timerfd_create")


def timerfd_set(fd: int, due_s: float | None) -> None:
    """Fire at `due_s` of CLOCK_BOOTTIME; None: never."""
    if due_s is None:
        seconds, nanos = 0, 0
    else:
        seconds, nanos = divmod(max(1, int(due_s * 1e9)), 1_000_000_000)
    spec = struct.pack("@qqqq", 0, 0, seconds, nanos)
    _check(_libc.timerfd_settime(fd, _TFD_TIMER_ABSTIME, spec, None), "timerfd_settime")


def renames_into(path: str) -> int:
    """A descriptor that tells what is renamed to a name in this folder; see `renamed`."""
    fd = _check(_libc.inotify_init1(_IN_NONBLOCK | _IN_CLOEXEC), "inotify_init1")
    try:
        _check(_libc.inotify_add_watch(fd, os.fsencode(path), ctypes.c_uint32(_IN_MOVED_TO)), f"watch {path}")
    except OSError:
        os.close(fd)
        raise
    return fd


def renamed(fd: int) -> list[str]:
    """The names of some; empty when there are no more now. The kernel drops what it has no room for."""
    names = []
    with contextlib.suppress(BlockingIOError):
        data = os.read(fd, 4096)
        while data:
            *_, size = _INOTIFY_EVENT.unpack_from(data)
            name, data = data[_INOTIFY_EVENT.size :][:size], data[_INOTIFY_EVENT.size + size :]
            names.append(os.fsdecode(name.rstrip(b"\0")))
    return names


@dataclass(frozen=True)
class EndedUsage:
    """What an ended process and the descendants that were waited for have used.

    Attributes:
        peak_bytes: resident at most, of the largest of them.
        io_read_bytes, io_write_bytes: read from disks; written by them or left in the cache to be written.
    """

    user_s: float
    system_s: float
    peak_bytes: int
    io_read_bytes: int
    io_write_bytes: int


def ended_usage(pidfd: int) -> EndedUsage | None:
    """Of an ended child that is not reaped yet. None where this machine's call number is not known."""
    if _WAITID is None:
        return None
    info = ctypes.create_string_buffer(128)
    usage = ctypes.create_string_buffer(256)
    result = _libc.syscall(
        ctypes.c_long(_WAITID), _P_PIDFD, ctypes.c_long(pidfd), info, _WEXITED | _WNOHANG | _WNOWAIT, usage
    )
    if result < 0:
        return None
    user_s, user_us, system_s, system_us, maxrss_kib, *_, blocks_in, blocks_out = struct.unpack_from("@13q", usage.raw)
    return EndedUsage(
        user_s=user_s + user_us / 1e6,
        system_s=system_s + system_us / 1e6,
        peak_bytes=maxrss_kib * 1024,
        io_read_bytes=blocks_in * _BLOCK_BYTES,
        io_write_bytes=blocks_out * _BLOCK_BYTES,
    )


def raise_priority() -> str:
    """Ask for the CPU before others: real-time if allowed, else a negative nice value. Returns what was got.

    SCHED_RESET_ON_FORK gives our children ordinary priority without their doing.
    """
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_RR | os.SCHED_RESET_ON_FORK, os.sched_param(1))
        return "real-time"
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, -10)
        return "nice"
    return ""
