"""What the loops of a daemon outlive, and how they tell of it: once for each cause, not at each try."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable

from spinetta.errors import Compacted, Fenced, OutcomeUnknown, RuntimeUnavailable, StoreUnavailable, UserError

TROUBLE = (UserError, StoreUnavailable, RuntimeUnavailable, OutcomeUnknown, Compacted, Fenced)
"""What a loop tries again after: all errors of ours but `InvariantViolation`, which is a bug and ends the daemon."""

AGAIN_S = 300.0  # the same cause is told again, when it lasts or comes back
TEXTS_MAX = 100  # remembered; each is a line of a log


_ADDRESS = re.compile(r"\S+:\d+\b")
_PART = re.compile(r"[:;] ")


class Teller:
    """Writes to a log what was not written lately. Which of several nodes did not answer, and in what order they were
    asked, makes no other cause of it."""

    def __init__(self, log: logging.Logger, clock: Callable[[], float] = time.monotonic) -> None:
        self._log = log
        self._clock = clock
        self._told_s: dict[frozenset[str], float] = {}

    def tell(self, text: str, level: int = logging.INFO) -> bool:
        """Write a line, unless one of the same cause has been written in the last `AGAIN_S`; whether it was."""
        now_s, cause = self._clock(), _cause(text)
        told_s = self._told_s.get(cause)
        if told_s is not None and now_s - told_s < AGAIN_S:
            return False
        self._told_s.pop(cause, None)
        while len(self._told_s) >= TEXTS_MAX:
            del self._told_s[next(iter(self._told_s))]
        self._told_s[cause] = now_s
        self._log.log(level, "%s", text)
        return True


def _cause(text: str) -> frozenset[str]:
    return frozenset(_PART.split(_ADDRESS.sub("", text)))
