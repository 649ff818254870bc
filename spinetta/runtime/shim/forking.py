"""A fork whose child begins in a control group, instead of moving there.

Moving a process between groups makes the kernel wait until no fork is going on anywhere, ten milliseconds and more: a
quarter of a container's start. And there is no moment at which the child is not in the group yet.
"""

from __future__ import annotations

import ctypes
import os
import signal

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


def fork_into(folder: str) -> tuple[int, bool]:
    """As os.fork(), and whether the child is in the group `folder`, of version 2. Some kernels and filters refuse.

    For a process with one thread only. The child does not do what Python does after a fork, so it must exec soon.
    """
    try:
        group = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return os.fork(), False  # whoever goes there later tells why it cannot
    try:
        arguments = _Arguments(flags=_CLONE_INTO_CGROUP, exit_signal=signal.SIGCHLD, cgroup=group)
        pid = _libc.syscall(_SYS_CLONE3, ctypes.byref(arguments), ctypes.c_size_t(ctypes.sizeof(arguments)))
    finally:
        os.close(group)
    return (pid, True) if pid >= 0 else (os.fork(), False)
