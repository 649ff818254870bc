"""The dead-man's switch: kills what has had no renewal for its grace, less a margin, whatever else stands still."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from .attempt import Held
from .loop import Loop, Timer, now_s

NEVER = float("inf")


class DeadMansSwitch:
    """Keeps one timer, for the earliest deadline to come. `fence` is called with each attempt whose has passed."""

    def __init__(
        self, loop: Loop, attempts: Mapping[str, Held], kill_margin_s: float, fence: Callable[[Held], None]
    ) -> None:
        self._loop = loop
        self._attempts = attempts
        self._kill_margin_s = kill_margin_s
        self._fence = fence
        self._renewed_at_s: float | None = None
        self._timer = Timer(NEVER, self._due)

    @property
    def kill_margin_s(self) -> float:
        """The margin in force."""
        return self._kill_margin_s

    def renew(self, renewed_at_s: float) -> None:
        """A renewal that was sent at `renewed_at_s` has been committed. Never backwards, never in the future."""
        at_s = min(renewed_at_s, now_s())
        if self._renewed_at_s is None or at_s > self._renewed_at_s:
            self._renewed_at_s = at_s
            self.arm()

    def widen_margin(self, kill_margin_s: float) -> None:
        """Kill earlier, if a client counts on a wider margin than the one before."""
        if kill_margin_s > self._kill_margin_s:
            self._kill_margin_s = kill_margin_s
            self.arm()

    def overdue(self, held: Held) -> bool:
        """Whether its deadline has passed."""
        return now_s() >= self._deadline_s(held)

    def message(self, held: Held) -> str:
        """Why one that is overdue is not started."""
        if held.grace_s <= self._kill_margin_s:
            return (
                f"not started: its grace of {held.grace_s:g} s is not longer than the kill margin of "
                f"{self._kill_margin_s:g} s"
            )
        if self._renewed_at_s is None:
            return "not started: the node has not renewed its registration yet"
        return "not started: the node's latest renewal is too old"

    def arm(self, added: Held | None = None) -> None:
        """Set the timer to the earliest deadline to come; of all attempts, or with one more."""
        if added is not None:
            due_s = min(self._deadline_s(added), self._timer.due_s)
            if due_s == self._timer.due_s:
                return
        else:
            due_s = min((self._deadline_s(held) for held in self._attempts.values() if held.alive), default=NEVER)
        self._set(due_s)

    def _deadline_s(self, held: Held) -> float:
        if held.service:
            return NEVER
        if self._renewed_at_s is None:
            return float("-inf")
        return self._renewed_at_s + held.grace_s - self._kill_margin_s

    def _set(self, due_s: float) -> None:
        self._timer.cancel()
        self._timer = self._loop.call_at(due_s, self._due) if due_s < NEVER else Timer(NEVER, self._due)

    def _due(self) -> None:
        """Kill everything whose deadline has passed."""
        due_s = NEVER
        for held in list(self._attempts.values()):
            if not held.alive:
                continue
            if self.overdue(held):
                self._fence(held)
            else:
                due_s = min(due_s, self._deadline_s(held))
        self._set(due_s)
