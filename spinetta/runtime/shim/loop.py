"""One epoll loop: descriptors, and timers on CLOCK_BOOTTIME."""

from __future__ import annotations

import contextlib
import heapq
import itertools
import os
import select
import signal
import time
import traceback
from collections.abc import Callable

from . import sysapi

TIMERS_MIN = 256  # that are kept before cancelled ones are looked for: a wall time is days away when its task has ended
FAR_S = float(1 << 32)  # a century: the kernel takes no infinite time
READ = select.EPOLLIN
WRITE = select.EPOLLOUT


def now_s() -> float:
    """Seconds of CLOCK_BOOTTIME: no wall clock, and it counts while the machine is suspended."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Timer:
    """One call in the future."""

    __slots__ = ("call", "due_s")

    def __init__(self, due_s: float, call: Callable[[], None]) -> None:
        self.due_s = due_s
        self.call: Callable[[], None] | None = call

    def cancel(self) -> None:
        """Do not call. May be repeated, also after the call."""
        self.call = None


class Loop:
    """Waits for everything at once.

    `on_error` gets the text of an error that a callback let through: a bug, but to die of it would kill every task of
    the node, so it is reported and the loop goes on. `on_turn` is called after each turn.
    """

    def __init__(self, on_error: Callable[[str], None]) -> None:
        self._epoll = select.epoll()
        self._calls: dict[int, Callable[[int], None]] = {}
        self._timers: list[tuple[float, int, Timer]] = []
        self._timers_most = TIMERS_MIN
        self._sequence = itertools.count()
        self._on_error = on_error
        self._running = True
        self.on_turn: Callable[[], None] = lambda: None
        self._timerfd = sysapi.timerfd()
        self._armed_s: float | None = None
        self.watch(self._timerfd, READ, self._drain_timerfd)

    def watch(self, fd: int, mask: int, call: Callable[[int], None]) -> None:
        """Call `call(mask)` whenever `fd` is ready; replaces an earlier wish."""
        if fd in self._calls:
            self._epoll.modify(fd, mask)
        else:
            self._epoll.register(fd, mask)
        self._calls[fd] = call

    def unwatch(self, fd: int) -> None:
        """Forget `fd`. To be called before it is closed."""
        if self._calls.pop(fd, None) is not None:
            with contextlib.suppress(OSError):
                self._epoll.unregister(fd)

    def call_at(self, due_s: float, call: Callable[[], None]) -> Timer:
        """Call once when CLOCK_BOOTTIME reaches `due_s`."""
        timer = Timer(due_s, call)
        if len(self._timers) >= self._timers_most:
            self._timers = [each for each in self._timers if each[2].call is not None]
            heapq.heapify(self._timers)
            self._timers_most = max(2 * len(self._timers), TIMERS_MIN)
        heapq.heappush(self._timers, (due_s, next(self._sequence), timer))
        return timer

    def call_in(self, delay_s: float, call: Callable[[], None]) -> Timer:
        """Call once, `delay_s` from now."""
        return self.call_at(now_s() + delay_s, call)

    def on_child(self, call: Callable[[], None]) -> None:
        """Call after one or more SIGCHLD."""
        receive, send = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.signal(signal.SIGCHLD, lambda _number, _frame: None)
        signal.set_wakeup_fd(send, warn_on_full_buffer=False)

        def drain(_mask: int) -> None:
            with contextlib.suppress(BlockingIOError):
                while os.read(receive, 4096):
                    pass
            call()

        self.watch(receive, READ, drain)

    def stop(self) -> None:
        """Leave `run` after this turn."""
        self._running = False

    def run(self) -> None:
        """Serve until `stop`."""
        while self._running:
            self._arm()
            for fd, mask in self._epoll.poll():
                call = self._calls.get(fd)
                if call is not None:
                    self.guarded(lambda call=call, mask=mask: call(mask))  # type: ignore[misc]  # defaults bind now
            self._run_due()
            self.guarded(self.on_turn)

    def _run_due(self) -> None:
        now = now_s()
        while self._timers and self._timers[0][0] <= now:
            _, _, timer = heapq.heappop(self._timers)
            if timer.call is not None:
                call, timer.call = timer.call, None
                self.guarded(call)

    def _arm(self) -> None:
        while self._timers and self._timers[0][2].call is None:
            heapq.heappop(self._timers)
        due_s = self._timers[0][0] if self._timers else None
        if due_s != self._armed_s:
            sysapi.timerfd_set(self._timerfd, None if due_s is None else min(due_s, FAR_S))
            self._armed_s = due_s

    def _drain_timerfd(self, _mask: int) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._timerfd, 8)
        self._armed_s = None

    def guarded(self, call: Callable[[], None]) -> None:
        """Call it; an error is told to `on_error`."""
        try:
            call()
        except Exception:  # noqa: BLE001 - see the class: dying would kill every task
            self._on_error(traceback.format_exc())
