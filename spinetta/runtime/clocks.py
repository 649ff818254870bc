"""The wall clock, by which files are dated, and whether somebody has set it."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable

log = logging.getLogger("spinetta.node")

STEP_S = 60.0  # more than a clock drifts between two sweeps, or is slewed by NTP


class SteppedClock:
    """The wall clock, and when it was last seen to be set: `set_at_s`, of the wall clock, minus infinity at first.

    Ages of files are worth nothing across such a step: a machine that starts with a wrong clock would have all its
    logs look years old once the clock is right. `known_s`: since when, by itself, it has not been set.
    """

    def __init__(
        self,
        wall: Callable[[], float] = time.time,
        steady: Callable[[], float] = lambda: time.clock_gettime(time.CLOCK_BOOTTIME),
        *,
        of: str = "logs",
    ) -> None:
        """`of`: whose ages are told by it, for people."""
        self._wall = wall
        self._steady = steady
        self._of = of
        self.known_s = wall()
        self._ahead_s = self.known_s - steady()
        self.set_at_s = -math.inf

    def now_s(self) -> float:
        """The wall clock's time; looks whether it was set."""
        now_s = self._wall()
        ahead_s = now_s - self._steady()
        if abs(ahead_s - self._ahead_s) > STEP_S:
            log.warning("the clock was set %+.0f s; ages of %s count from now", ahead_s - self._ahead_s, self._of)
            self.set_at_s = self.known_s = now_s
        self._ahead_s = ahead_s
        return now_s
