"""A process that looks at what tasks put on the disk: the room their scratch takes, the length of their logs.

The kernel sets no such limits (see ADR 0032), so somebody has to look; not the shim, which never touches the disk. A
child of its own, made when there is first something to look at, made again when it dies. Each look is paid for with a
pause, so that together they take a small share of one core.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import os
import resource
import select
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from . import sysapi
from .attempt import Held
from .bundle import UPPER
from .cgroup import members
from .logcap import cut, hoards
from .loop import READ, WRITE, Loop, now_s
from .usedspace import Scan, removed_bytes
from .wire import BadMessage, Lines, Message, decode, encode

SCANS_SHARE = 0.035  # of one core
LOGS_SHARE = 0.01
DISK_LOOK_MIN_S = 0.1
DISK_LOOK_MAX_S = 2.0  # where nothing grows
LOG_LOOK_S = 0.25
LOG_CUT_LOOK_S = 0.1  # one that is full and still written to
TURN_S = 0.005  # of scanning, before it is looked whether something else is due
AGAIN_S = 1.0  # one that dies at once, or cannot be started, is not tried in a loop


# In the watching process --------------------------------------------------------------------------------------------


@dataclass
class _Target:
    """What is watched of one attempt; logs and the room that was found at the latest look, when, how soon again."""

    folder: str
    disk_bytes_max: int
    logs: list[str]
    log_bytes_max: int
    group: str
    used_bytes: int = 0
    looked_s: float = 0.0
    wait_s: float = DISK_LOOK_MIN_S


class _Queue:
    """What is to be looked at, and when; never more often than its share of one core pays for."""

    def __init__(self, share: float) -> None:
        self._pause = 1 / share
        self._due: list[tuple[float, int, str]] = []
        self._sequence = itertools.count()
        self._free_s = 0.0

    def add(self, key: str, due_s: float) -> None:
        heapq.heappush(self._due, (due_s, next(self._sequence), key))

    def wait_s(self, at_s: float) -> float | None:
        """Until the next look; None: there is none."""
        return max(self._due[0][0], self._free_s) - at_s if self._due else None

    def pop(self, at_s: float) -> str | None:
        """The key to look at now."""
        if self._due and max(self._due[0][0], self._free_s) <= at_s:
            return heapq.heappop(self._due)[2]
        return None

    def paid(self, cost_s: float) -> None:
        """A look has cost so much."""
        self._free_s = time.monotonic() + cost_s * (self._pause - 1)


class _Watch:
    """The process's life."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._lines = Lines()
        self._targets: dict[str, _Target] = {}
        self._logs = _Queue(LOGS_SHARE)
        self._disks = _Queue(SCANS_SHARE)
        self._scan: Scan | None = None
        self._scanned = ""
        self._cost_s = 0.0

    def serve(self) -> None:
        """Until the shim is gone."""
        poll = select.poll()
        poll.register(self._sock, select.POLLIN)
        while True:
            if poll.poll(self._wait_ms()):
                data = self._sock.recv(1 << 18)
                if not data:
                    return
                for line in self._lines.feed(data):
                    self._hear(decode(line))
            self._look_at_logs()
            self._look_at_disks()

    def _wait_ms(self) -> float | None:
        if self._scan is not None:
            return 0
        at_s = time.monotonic()
        waits = [wait for wait in (self._logs.wait_s(at_s), self._disks.wait_s(at_s)) if wait is not None]
        return max(min(waits) * 1000, 0) + 1 if waits else None

    def _hear(self, message: Message) -> None:
        key = message["key"]
        if message["op"] == "unwatch":
            self._targets.pop(key, None)
            if self._scanned == key:
                self._give_up()
            return
        at_s = time.monotonic()
        target = _Target(
            message["folder"], message["disk_bytes_max"], message["logs"], message["log_bytes_max"], message["group"]
        )
        self._targets[key] = target
        target.looked_s = at_s
        if target.log_bytes_max:
            self._logs.add(key, at_s + LOG_LOOK_S)
        if target.disk_bytes_max:
            self._disks.add(key, at_s + target.wait_s)

    def _look_at_logs(self) -> None:
        while (key := self._logs.pop(time.monotonic())) is not None:
            target = self._targets.get(key)
            if target is None:
                continue
            began_s, full = time.thread_time(), False
            for path in target.logs:
                with contextlib.suppress(OSError):
                    found = os.stat(path, follow_symlinks=False)  # noqa: PTH116 - often
                    if found.st_size >= target.log_bytes_max or hoards(found, target.log_bytes_max):
                        full = cut(path, target.log_bytes_max) or full
            self._logs.add(key, time.monotonic() + (LOG_CUT_LOOK_S if full else LOG_LOOK_S))
            self._logs.paid(time.thread_time() - began_s)

    def _look_at_disks(self) -> None:
        if self._scan is None:
            key = self._disks.pop(time.monotonic())
            if key is None or key not in self._targets:
                return
            self._scan, self._scanned, self._cost_s = Scan(self._targets[key].folder), key, 0.0
        began_s, until_s = time.thread_time(), time.monotonic() + TURN_S
        more, used_bytes, target = True, 0, self._targets[self._scanned]
        while more and time.monotonic() < until_s:
            more = self._scan.step()
        if not more:
            used_bytes = self._scan.used_bytes
            if target.group and self._scan.device:
                upper = f"/{self._scanned}/{UPPER}"
                used_bytes += removed_bytes(members(Path(target.group)), self._scan.device, upper)
        self._cost_s += time.thread_time() - began_s
        if not more:
            self._scanned_all(target, used_bytes)

    def _scanned_all(self, target: _Target, used_bytes: int) -> None:
        at_s = time.monotonic()
        room, grown = target.disk_bytes_max - used_bytes, used_bytes - target.used_bytes
        if room < 0:
            self._sock.sendall(encode({"over": self._scanned, "used_bytes": used_bytes}))
        if grown > 0:
            # At the latest when half of what is left would be full.
            until_full_s = max(room, 0) * (at_s - target.looked_s) / grown
            target.wait_s = min(max(until_full_s / 2, DISK_LOOK_MIN_S), DISK_LOOK_MAX_S)
        else:
            target.wait_s = min(target.wait_s * 2, DISK_LOOK_MAX_S)
        target.used_bytes, target.looked_s = used_bytes, at_s
        self._disks.add(self._scanned, at_s + target.wait_s)
        self._give_up()

    def _give_up(self) -> None:
        if self._scan is not None:
            self._scan.close()
        self._scan, self._scanned = None, ""
        self._disks.paid(self._cost_s)


def _watcher_main(sock: socket.socket) -> NoReturn:
    status = 1
    try:
        sysapi.set_name("spinetta-watch")
        signal.set_wakeup_fd(-1)
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, 0, 0)  # the shim's own may be better
        with contextlib.suppress(OSError):
            sysapi.lock_memory()  # of the shim's memory we have a copy, and what it was about to give to a task
        kept = sock.fileno()
        os.dup2(0, 1)
        os.closerange(3, kept)
        os.closerange(kept + 1, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
        _Watch(sock).serve()
        status = 0
    except (OSError, BadMessage) as error:
        with contextlib.suppress(OSError):
            sys.stderr.write(f"watcher: {error}\n")
    finally:
        os._exit(status)


# In the shim --------------------------------------------------------------------------------------------------------


class Watcher:
    """The shim's end of it. Never blocks.

    Attributes:
        pid: of the process; 0 while there is none.
    """

    def __init__(self, loop: Loop, log: Callable[[str], None], over: Callable[[str, int], None]) -> None:
        """`over` is called with the key of an attempt and what its scratch holds, each time that is too much."""
        self._loop = loop
        self._log = log
        self._over = over
        self._watched: dict[str, Message] = {}
        self._sock: socket.socket | None = None
        self._out = bytearray()
        self._started_s = float("-inf")
        self._waits = False
        self.pid = 0

    def watch(self, held: Held) -> None:
        """Look at what an attempt puts on the disk from now on, as far as that is limited."""
        disk_bytes_max = held.disk_bytes_max if held.scratch else 0
        if held.service or not (disk_bytes_max or held.log_bytes_max):
            return
        message = {
            "op": "watch",
            "key": held.key,
            "folder": str(held.scratch or ""),
            "disk_bytes_max": disk_bytes_max,
            "logs": [held.stdout, held.stderr],
            "log_bytes_max": held.log_bytes_max,
            "group": str(held.group.paths[0]) if held.group and held.group.paths else "",
        }
        self._watched[held.key] = message
        if self._sock is None:
            self._start_soon()
        else:
            self._send(message)

    def unwatch(self, key: str) -> None:
        """No more; may be repeated."""
        if self._watched.pop(key, None) is not None and self._sock is not None:
            self._send({"op": "unwatch", "key": key})

    def _start_soon(self) -> None:
        if self._waits:
            return
        wait_s = self._started_s + AGAIN_S - now_s()
        if wait_s > 0:
            self._waits = True
            self._loop.call_in(wait_s, self._start)
        else:
            self._start()

    def _start(self) -> None:
        self._waits = False
        if self._sock is not None or not self._watched:
            return
        self._started_s = now_s()
        try:
            ours, theirs = socket.socketpair()
        except OSError:  # no descriptor is left
            self._start_soon()
            return
        try:
            pid = os.fork()
        except OSError:
            ours.close()
            theirs.close()
            self._start_soon()
            return
        if pid == 0:
            _watcher_main(theirs)
        theirs.close()
        ours.setblocking(False)
        self._sock, self.pid, self._lines = ours, pid, Lines()
        self._out = bytearray(b"".join(encode(message) for message in self._watched.values()))
        self._flush()

    def _send(self, message: Message) -> None:
        self._out += encode(message)
        self._flush()

    def _flush(self) -> None:
        if self._sock is None:
            return
        with contextlib.suppress(OSError):  # full for now, or gone, which reading will tell
            while self._out:
                del self._out[: self._sock.send(self._out)]
        self._loop.watch(self._sock.fileno(), READ | WRITE if self._out else READ, self._ready)

    def _ready(self, mask: int) -> None:
        if self._sock is None:
            return
        if mask & WRITE:
            self._flush()
        data = b""
        try:
            data = self._sock.recv(1 << 16)
        except BlockingIOError:
            return
        except OSError:
            pass
        if data:
            for line in self._lines.feed(data):
                message = decode(line)
                if message["over"] in self._watched:
                    self._over(message["over"], message["used_bytes"])
            return
        self._loop.unwatch(self._sock.fileno())
        self._sock.close()
        self._sock, self.pid = None, 0
        self._log("the watching process died")
        if self._watched:
            self._start_soon()
