"""The signals that tell a daemon to stop, from its first moment to its last."""

from __future__ import annotations

import asyncio
import enum
import logging
import os
import signal
from collections.abc import Callable

log = logging.getLogger("spinetta.node")


class Wish(enum.IntEnum):
    """What is to become of a daemon; the higher one asks for more."""

    KEEP = 1  # end at once; tasks and etcd stay with the shim
    DRAIN = 2  # wait for the tasks within a limit, then give back what may be started again
    EVERYTHING = 3  # give all tasks back, deregister, end etcd and the shim


OF_TERMINATE = {"keep": Wish.KEEP, "drain": Wish.DRAIN, "release": Wish.EVERYTHING}
"""The setting ``on_terminate``: what SIGTERM means."""


class StopSignals:
    """SIGTERM, SIGINT (everything) and SIGUSR1 (keep, whatever the setting says).

    The first one is a wish. SIGINT after a lesser wish makes it greater. Any other further one ends the process at
    once, at whatever stage: that is no worse than ``kill -9``, which must lose nothing.
    """

    def __init__(self, on_terminate: str, *, leave: Callable[[int], None] = os._exit) -> None:
        """`leave`: ends the process with a code."""
        self.wish: Wish | None = None
        self._wishes = {
            signal.SIGTERM: OF_TERMINATE[on_terminate],
            signal.SIGINT: Wish.EVERYTHING,
            signal.SIGUSR1: Wish.KEEP,
        }
        self._leave = leave
        self._told = asyncio.Event()
        self._starting: asyncio.Task[int] | None = None

    def install(self, starting: asyncio.Task[int]) -> None:
        """From now on signals are wishes. Until `started` the first one cancels this task."""
        self.starting(starting)
        loop = asyncio.get_running_loop()
        for number in self._wishes:
            loop.add_signal_handler(number, self.signalled, number)

    def starting(self, task: asyncio.Task[int] | None) -> None:
        """The node comes up in this task, for the first time or anew: the first signal cancels it."""
        self._starting = task

    def started(self) -> None:
        """The daemon runs, and looks at `told` itself."""
        self._starting = None

    async def told(self) -> Wish:
        """Wait for the first wish, or a greater one than before if called again."""
        await self._told.wait()
        self._told.clear()
        return self.wish or Wish.KEEP

    def end(self) -> None:
        """The node has left: there is nothing more to do."""
        if self.wish is None:
            self.wish = Wish.KEEP
        self._told.set()

    def signalled(self, number: signal.Signals) -> None:
        """One has come."""
        wish, before = self._wishes[number], self.wish
        if before is not None and not (number is signal.SIGINT and wish > before):
            log.warning("stopping at once; what runs stays with the shim, and so does etcd")
            self._leave(128 + number)
            return
        self.wish = wish
        self._told.set()
        if self._starting is not None and before is None:
            self._starting.cancel()
