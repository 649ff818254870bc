"""How much one caller may ask for: calls and tasks a second, and streams at once."""

from __future__ import annotations

import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from spinetta.access import Limits
from spinetta.errors import Busy
from spinetta.node.services import limits
from spinetta.rights import Caller, CallerKind


class Bucket:
    """Lets through `rate` a second, and `BURST_S` seconds' worth at once after a rest.

    A charge is taken whole as soon as one is left, so that one larger than a burst passes too, and is paid for
    afterwards.
    """

    __slots__ = ("_at_s", "_left")

    def __init__(self, rate: float, now_s: float) -> None:
        self._left = _most(rate)
        self._at_s = now_s

    def take(self, amount: float, rate: float, now_s: float) -> float:
        """Take so much; 0 when it was let through, else the seconds after which to try again."""
        self._left = min(_most(rate), self._left + (now_s - self._at_s) * rate)
        self._at_s = now_s
        if self._left < 1:
            return min(max((1 - self._left) / rate, limits.BUSY_MIN_S), limits.BUSY_MAX_S)
        self._left -= amount
        return 0.0

    def charge(self, amount: float) -> None:
        """Take so much, whatever is left: for what has been done already."""
        self._left -= amount


def _most(rate: float) -> float:
    return max(rate * limits.BURST_S, 1.0)


class Throttle:
    """The buckets of all callers of this node. Each node counts for itself."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._buckets: OrderedDict[str, Bucket] = OrderedDict()
        self._open: Counter[str] = Counter()

    @property
    def remembered(self) -> int:
        """How many buckets there are."""
        return len(self._buckets)

    @property
    def open_now(self) -> int:
        """How many places are taken."""
        return self._open.total()

    def call(self, caller: Caller, peer: str, policy: Limits) -> None:
        """Count one call. `peer`: the address that a guest calls from.

        Raises:
            Busy: too many lately.
        """
        match caller.kind:
            case CallerKind.LOCAL:
                return
            case CallerKind.NOBODY:
                self._take(f"guest {peer}", 1, limits.GUEST_CALLS_PER_S, f"newcomers at {peer}", "calls")
                self._take("guests", 1, limits.GUESTS_CALLS_PER_S, "newcomers", "calls")
            case _:
                rate = caller.limits.calls_per_s or policy.calls_per_s or limits.CALLS_PER_S
                self._take(f"calls {caller.title}", 1, rate, caller.title, "calls")

    def refusal(self, peer: str, named: str) -> None:
        """Count one who would be refused a place here: the store is read before, which is not for free.

        Args:
            peer: the address it calls from.
            named: whom its certificate names; empty: it has none.

        Raises:
            Busy: too many lately.
        """
        if named:  # counted by itself, so that guests at the same address cannot keep a newly approved one out
            self._take(f"refused {named}", 1, limits.GUEST_CALLS_PER_S, named, "calls")
        else:
            self.call(Caller.nobody(), peer, Limits())

    def denied(self, caller: Caller, peer: str) -> None:
        """Charge for a call that was refused: asking again and again for what one may not have is no use of a node."""
        key = f"guest {peer}" if caller.kind is CallerKind.NOBODY else f"calls {caller.title}"
        if key in self._buckets:
            self._buckets[key].charge(limits.DENIED_COSTS - 1)

    def tasks(self, caller: Caller, number: int, policy: Limits) -> None:
        """Count tasks that are submitted.

        Raises:
            Busy: too many lately.
        """
        if caller.kind is not CallerKind.LOCAL and number:
            rate = caller.limits.tasks_per_s or policy.tasks_per_s or limits.TASKS_PER_S
            self._take(f"tasks {caller.title}", number, rate, caller.title, "tasks")

    @contextmanager
    def open(self, caller: Caller) -> Iterator[None]:
        """For as long as a stream or a wait of a caller is open.

        Raises:
            Busy: too many are.
        """
        if caller.kind is CallerKind.LOCAL:
            yield
            return
        with self.place(f"stream {caller.title}", caller.title, limits.STREAMS_PER_CALLER_MAX):
            yield

    @contextmanager
    def place(self, key: str, who: str, limit: int) -> Iterator[None]:
        """One of `limit` places under `key`, for as long as the context lasts.

        Raises:
            Busy: all are taken.
        """
        if self._open[key] >= limit:
            raise Busy(f"{who}: {limit} calls are open at this node", retry_after_s=1.0)
        self._open[key] += 1
        try:
            yield
        finally:
            self._open[key] -= 1
            if not self._open[key]:
                del self._open[key]

    def _take(self, key: str, amount: float, rate: float, who: str, what: str) -> None:
        now_s = self._clock()
        bucket = self._buckets.get(key)
        if bucket is None:
            while len(self._buckets) >= limits.BUCKETS_MAX:
                self._buckets.popitem(last=False)
            bucket = self._buckets[key] = Bucket(rate, now_s)
        self._buckets.move_to_end(key)
        wait_s = bucket.take(amount, rate, now_s)
        if wait_s:
            raise Busy(f"too many {what} from {who}: {rate:g} a second are let through here", retry_after_s=wait_s)
