"""A fork whose child begins in a control group, instead of moving there.

Moving a process between groups makes the kernel wait until no fork is going on anywhere, ten milliseconds and more: a
quarter of a container's start. And there is no moment at which the child is not in the group yet.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
from collections.abc import Iterator

_SYS_CLONE3 = 435  # everywhere: it is younger than the numbers' unification
_CLONE_INTO_CGROUP = 0x2_0000_0000  # Linux 5.7
# The GIL is kept, as os.fork() does: nobody can hold it in the child.
_libc = ctypes.PyDLL(None, use_errno=True)


class _Arguments(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_uint64)
        for name in (
            *("flags", "pidfd", "child_tid", "parent_tid", "exit_signal", "stack", "stack_size", "tls"),
            *("set_tid", "set_tid_size", "cgroup"),
        )
    )


def fork_into(folder: str, oom_score_adj: int) -> tuple[int, bool]:
    """As os.fork(), and whether the child is in the group `folder`, of version 2. Some kernels and filters refuse.

    For a process with one thread only. The child does not do what Python does after a fork, so it must exec soon. It
    begins with `oom_score_adj`.
    """
    try:
        group = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return os.fork(), False  # whoever goes there later tells why it cannot
    try:
        arguments = _Arguments(flags=_CLONE_INTO_CGROUP, exit_signal=signal.SIGCHLD, cgroup=group)
        with _oom_score(oom_score_adj):
            pid = _libc.syscall(_SYS_CLONE3, ctypes.byref(arguments), ctypes.c_size_t(ctypes.sizeof(arguments)))
    finally:
        os.close(group)
    return (pid, True) if pid >= 0 else (os.fork(), False)


@contextlib.contextmanager
def _oom_score(value: int) -> Iterator[None]:
    """Have a child forked within with this one of its own.

    With ours, which says never, a child in a group with less memory than it takes to get so far as to change it would
    neither be killed nor go on: it faults for ever.
    """
    try:
        fd = os.open("/proc/self/oom_score_adj", os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        yield
        return
    try:
        own, me = os.read(fd, 16), os.getpid()
        with contextlib.suppress(OSError):
            os.pwrite(fd, str(value).encode(), 0)
        yield
        if os.getpid() == me:  # in the child it would still be the parent's
            with contextlib.suppress(OSError):
                os.pwrite(fd, own, 0)
    finally:
        os.close(fd)
