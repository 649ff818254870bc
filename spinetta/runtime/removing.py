"""Removing what strangers have left, perhaps millions of files: by a process with an owner and a limit."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from pathlib import Path

REMOVE_S = 3600.0  # a disk removes some thousand files in a second
KILLED_WAIT_S = 5.0  # for one that was killed; longer only if it is stuck in the kernel, and nobody waits for that


async def remove(*paths: Path, limit_s: float = REMOVE_S) -> bool:
    """Remove directories with all that strangers have put into them; False when something is left.

    By rm: it follows no link, crosses into no mount, and is not stopped by any depth. Cancelled, or when the time is
    over, it is killed; what it has not come to may be removed another time. OSError: no process can be started.
    """
    process = await asyncio.create_subprocess_exec(
        "rm",
        "-rf",
        "--one-file-system",
        "--",
        *map(str, paths),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        async with asyncio.timeout(limit_s):
            return await process.wait() == 0
    except TimeoutError:
        return False
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(KILLED_WAIT_S):
                    await process.wait()
