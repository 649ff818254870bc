"""What the loops of a daemon outlive, and how they tell of it: once for each cause, not at each try."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from spinetta.errors import Compacted, Fenced, OutcomeUnknown, RuntimeUnavailable, StoreUnavailable, UserError

TROUBLE = (UserError, StoreUnavailable, RuntimeUnavailable, OutcomeUnknown, Compacted, Fenced)
"""What a loop tries again after: all errors of ours but `InvariantViolation`, which is a bug and ends the daemon."""

AGAIN_S = 300.0  # the same cause is told again, when it lasts or comes back
TEXTS_MAX = 100  # remembered; each is a line of a log


class Teller:
    """Writes to a log what was not written lately."""

    def __init__(self, log: logging.Logger, clock: Callable[[], float] = time.monotonic) -> None:
        self._log = log
        self._clock = clock
        self._told_s: dict[str, float] = {}

    def tell(self, text: str, level: int = logging.INFO) -> None:
        """Write a line, unless the very same one has been written in the last `AGAIN_S`."""
        now_s = self._clock()
        told_s = self._told_s.get(text)
        if told_s is not None and now_s - told_s < AGAIN_S:
            return
        self._told_s.pop(text, None)
        while len(self._told_s) >= TEXTS_MAX:
            del self._told_s[next(iter(self._told_s))]
        self._told_s[text] = now_s
        self._log.log(level, "%s", text)
