"""Processes that are others' children, held by descriptors."""

from __future__ import annotations

import errno
import os


def open_process(pid: int) -> int:
    """A descriptor for a process, to be closed; ProcessLookupError: there is none of that number.

    Kernels such as Debian 12's say otherwise (EINVAL) while the number is that of a session or group whose first
    process has gone, or of a thread.
    """
    try:
        return os.pidfd_open(pid)
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.ENOENT) and pid > 0:
            raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH)) from None
        raise
