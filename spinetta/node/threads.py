"""Threads for what blocks, all started at the beginning: a machine that runs out of processes later takes none away."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from spinetta.errors import UserError

T = TypeVar("T")

THREADS = 12  # files, keys, measuring: seconds of waiting for a slow disk, seldom more than a few at once
START_S = 30.0


def standing_threads(count: int = THREADS) -> ThreadPoolExecutor:
    """An executor that never needs another thread.

    Raises:
        UserError: the machine has no room for so many.
    """
    pool = ThreadPoolExecutor(count, thread_name_prefix="spinetta")
    barrier = threading.Barrier(count + 1)
    try:
        for _ in range(count):
            pool.submit(barrier.wait)  # each waits, so the next one needs a thread of its own
        barrier.wait(START_S)
    except (RuntimeError, MemoryError) as e:  # a broken barrier is one too
        barrier.abort()
        pool.shutdown(wait=False)
        raise UserError(
            f"this machine has no room for {count} threads: {e}",
            hint="raise the limit on processes (ulimit -u, pids.max of its control group, TasksMax of its service) or "
            "free memory",
            reason="no-threads",
        ) from None
    return pool


async def in_thread(call: Callable[[], T]) -> T:
    """Run it in a thread, and if cancelled, wait for its end: files must not be closed under it."""
    running = asyncio.ensure_future(asyncio.to_thread(call))
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        await asyncio.wait([running])
        raise
