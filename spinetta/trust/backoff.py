"""How long to wait before something that failed is tried again: longer each time, and by chance.

Chance, because those who lost the same node would otherwise all come back in the same moment, again and again.
"""

from __future__ import annotations

import asyncio

import tenacity


class Backoff:
    """The waits of one loop that tries for ever. `reset` when it got on.

    Attributes:
        tries: failures since the last reset.
    """

    def __init__(self, first_s: float, most_s: float) -> None:
        """Each wait is between half of and the whole of `first_s` doubled at each failure, up to `most_s`."""
        self._first_s, self._most_s = first_s, most_s
        self.tries = 0

    def reset(self) -> None:
        """It got on: the next wait is a short one again."""
        self.tries = 0

    def next_s(self) -> float:
        """The wait after one more failure, in seconds."""
        self.tries += 1
        state = tenacity.RetryCallState(tenacity.Retrying(), None, (), {})
        state.attempt_number = min(self.tries, 30)  # doubled thirty times is more than any limit
        high_s = tenacity.wait_exponential(multiplier=self._first_s, max=self._most_s)(state)
        return tenacity.wait_random(high_s / 2, high_s)(state)

    async def pause(self) -> None:
        """Wait so long."""
        await asyncio.sleep(self.next_s())
