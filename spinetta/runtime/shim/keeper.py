"""Starts, stops, fences and remembers what the shim holds. How things end is in `ending`."""

from __future__ import annotations

import contextlib
import os
import signal
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import replace

from . import child, proctable, secretfiles
from .attempt import ExitDict, Held, Phase, make_exit, now_ms
from .cgroup import Cgroups, Limits
from .deadman import DeadMansSwitch
from .disk import Layout, Writer
from .ending import Ending
from .loop import READ, Loop, now_s
from .spawn import Surroundings, drain_report, read_report, spawn
from .starting import Containers
from .watcher import Watcher
from .wire import ATTEMPTS_MAX, SERVICES_MAX
from .writing import TO_TRASH

FORGOTTEN_MAX = 1024  # ends still known after `forget`, for a start that comes late and again
KILL_AGAIN_S = 0.2
DISK_LIMIT = "disk-limit"
DISK_OVER_MIN_BYTES = 64 << 20  # so much more than it may have, or a quarter, and it gets no time to tidy up
UNFIT = "node-unfit"  # the node's fault, not the task's: it may run elsewhere


class Refused(Exception):
    """A request cannot be carried out. `code` is for programs."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class Keeper:
    """All attempts and services of one node.

    Attributes:
        closing: nothing is started any more.
        switch: kills what has had no renewal for too long.
        trash_waits: there is something to remove that takes time.
        on_end: called with each attempt or service that has ended.
    """

    def __init__(
        self,
        loop: Loop,
        layout: Layout,
        writer: Writer,
        cgroups: Cgroups,
        around: Surroundings,
        kill_margin_s: float,
        log: Callable[[str], None],
    ) -> None:
        self._loop = loop
        self._layout = layout
        self._writer = writer
        self._cgroups = cgroups
        self._around = around
        self._log = log
        self._forgotten: OrderedDict[tuple[str, str, int], ExitDict] = OrderedDict()  # by `_name`
        self.attempts: dict[str, Held] = {}
        self.services: dict[str, Held] = {}
        self.closing = False
        self.trash_waits = False
        self.on_end: Callable[[Held], None] = lambda _held: None
        self.ending = Ending(loop, writer, log, self._ended)
        self.switch = DeadMansSwitch(loop, self.attempts, kill_margin_s, self._fence)
        self.containers = Containers(loop, around.containers, around.mark, log)
        self.containers.unreaped = self.ending.unreaped
        self.containers.on_pidfd = self.ending.on_pidfd
        self.containers.may_start = self._may_begin
        self.containers.kill = self._kill
        self.containers.running = self._running
        self.ending.passed = self.containers.passed
        self.ending.clear_container = self.containers.clear
        self.watcher = Watcher(loop, log, self._over_disk)

    # Asked for by clients ----------------------------------------------------------------------------------------

    def start(self, request: Held, done: Callable[[ExitDict | None], None]) -> None:
        """Start an attempt; `done` gets None when it runs, else how it ended. The same key again changes nothing."""
        held = self.attempts.get(request.key)
        if held is not None and held.token and _name(held) != _name(request):
            # Of a store that was restored since: its end is not this one's. (Of a damaged record, without a token,
            # nobody knows whose it is.)
            raise Refused("full", f"another attempt that was called {request.key} is not forgotten yet")
        if held is None and (old := self._forgotten.get(_name(request))) is not None:
            done(old)
            return
        if held is None:
            self._may_start(self.attempts, ATTEMPTS_MAX, "attempts")
            held = self.attempts[request.key] = request
            held.waiters.append(lambda: done(request.exit))
            self._prepare(held)
        elif held.phase >= Phase.RUNNING:
            done(held.exit)
        else:
            waiting = held
            held.waiters.append(lambda: done(waiting.exit))

    def start_service(self, request: Held, done: Callable[[Held], None]) -> None:
        """Start a service; one that has ended is replaced, one that runs is left alone."""
        held = self.services.get(request.key)
        if held is None or held.phase is Phase.ENDED:
            if held is None:
                self._may_start(self.services, SERVICES_MAX, "services")
            elif self.closing:
                raise Refused("closing", "the shim is ending")
            else:
                self.ending.drop(held)
            held = self.services[request.key] = request
            held.waiters.append(lambda: done(request))
            self._prepare(held)
        elif held.phase >= Phase.RUNNING:
            done(held)
        else:
            waiting = held
            held.waiters.append(lambda: done(waiting))

    def stop(self, held: Held, why: str, wait_s: float | None = None, number: int = signal.SIGTERM) -> None:
        """Ask for the end: a signal to the process group, after `wait_s` SIGKILL to everything.

        The first reason stays.
        """
        if held.phase >= Phase.ENDING or self.ending.noticed(held):
            return  # it ended by itself: its exit is its own
        held.stop_why = held.stop_why or why
        held.stop_signal = number
        if held.phase is Phase.PREPARING:
            return  # seen when the intent is on disk
        if held.phase is Phase.RUNNING:
            self._signal(held, number)
        # else when the program has taken over: until then the signal would be lost
        if "kill" not in held.timers:
            delay_s = held.stop_wait_s if wait_s is None else wait_s
            held.set_timer("kill", self._loop.call_in(delay_s, lambda: self._kill(held)))

    @property
    def around(self) -> Surroundings:
        """What all children share."""
        return self._around

    def forget(self, key: str, done: Callable[[str], None]) -> None:
        """Remove all but the logs of an ended attempt; `done` gets an empty text or what the disk said."""
        held = self.attempts.get(key)
        if held is None:
            done("")
            return
        if held.phase is not Phase.ENDED:
            raise Refused("running", f"{key} has not ended")

        held.forgetters.append(done)
        if len(held.forgetters) > 1:
            return  # asked again while a slow disk is at it
        self.ending.drop(held)
        if held.scratch:
            if held.keep_scratch_s:
                kept = self._layout.kept / f"{key}@{held.keep_scratch_s}"
                self._writer.keep(held.scratch / held.keep_part, kept, self._kept)
            self._writer.discard(held.scratch, self._discarded)
        self._writer.remove(held.record_path, lambda error: self._removed(held, error))

    def adopt_ended(self, held: Held) -> None:
        """Take over what an earlier shim left behind: an end, recorded or not."""
        (self.services if held.service else self.attempts)[held.key] = held
        held.phase = Phase.ENDED
        if not held.recorded:
            self.ending.record(held)

    @property
    def idle(self) -> bool:
        """Nothing runs, and all that has ended is on disk."""
        return all(held.phase is Phase.ENDED and (held.recorded or not held.has_intent) for held in self.all_held())

    def all_held(self) -> Iterable[Held]:
        """Attempts and services."""
        yield from self.attempts.values()
        yield from self.services.values()

    def _removed(self, held: Held, error: str) -> None:
        if not error:
            del self.attempts[held.key]
            self._forgotten[_name(held)] = held.exit or make_exit("shim-lost")
            if len(self._forgotten) > FORGOTTEN_MAX:
                self._forgotten.popitem(last=False)
        forgetters, held.forgetters = held.forgetters, []
        for done in forgetters:
            done(error)

    # Starting ----------------------------------------------------------------------------------------------------

    def _may_start(self, table: dict[str, Held], most: int, what: str) -> None:
        if self.closing:
            raise Refused("closing", "the shim is ending")
        if len(table) >= most:
            raise Refused("full", f"the shim holds {most} {what}, some of which may wait to be forgotten")

    def _prepare(self, held: Held) -> None:
        if problem := child.unusable(held.argv, held.env):
            self._not_started(held, "spawn-failed", problem)
        elif held.container and (problem := self.containers.place.why):
            self._not_started(held, UNFIT, f"this node cannot run containers: {problem}")
        elif held.secrets and not held.container and not self._around.place:
            self._not_started(held, UNFIT, f"this node cannot give secrets to tasks: {self._around.place.why}")
        elif self.switch.overdue(held):
            self._not_started(held, "fenced", self.switch.message(held))
        else:
            held.started_ms = now_ms()
            self._writer.put(held.record_path, held.intent(), lambda error: self._intended(held, error))
            if held.container:
                held.has_intent = True  # on its way, before whatever is to be written next
                self._spawn(held)

    def _intended(self, held: Held, error: str) -> None:
        if held.container:
            if held.phase is not Phase.SPAWNING:
                return  # it has ended meanwhile, which is recorded after this
            held.has_intent = not error
            self.containers.noted(held, f"cannot write the record of the attempt: {error}" if error else "")
            return
        held.has_intent = not error
        if error:
            self._not_started(held, UNFIT, f"cannot write the record of the attempt: {error}")
        elif held.stop_why:
            self._not_started(held, held.stop_why, "ended before it was started")
        elif self.switch.overdue(held):
            # Again: the disk may have taken its time.
            self._not_started(held, "fenced", self.switch.message(held))
        else:
            self._spawn(held)

    def _not_started(self, held: Held, reason: str, message: str) -> None:
        held.started_ms = 0
        held.exit = make_exit(reason, message=message)
        self.ending.finish(held)

    def _spawn(self, held: Held) -> None:
        self.ending.begins(held)
        try:
            name = f"service@{held.key}" if held.service else held.key
            # With version 2 alone the runtime is in the group itself: it is not to fail for the task's limit.
            inside = held.container is not None and self.containers.place.pure_v2 is not None
            limits = replace(held.limits, pids_max=0) if inside else held.limits
            # A container's runtime begins in the group of version 2, and takes long to come to where the limits are.
            later = held.container is not None and self._cgroups.has_bare_v2
            held.group = self._cgroups.begin(name) if later else self._cgroups.create(name, limits)
        except OSError as error:
            self._not_started(held, UNFIT, f"cannot set the limits: {error}")
            return
        try:
            spawn(held, self._around)
        except OSError as error:
            held.group.remove()
            self._not_started(held, UNFIT, f"cannot fork: {error.strerror}")
            return
        held.secrets = {}  # the new process has them; we have no more use for them
        if held.container:
            held.container.config = {}
            self.containers.begun(held)
        held.phase = Phase.SPAWNING
        held.started_ms = now_ms()
        self.ending.unreaped.add(held.pid)
        self._loop.watch(held.report_fd, READ, lambda _mask: self._reported(held))
        self._loop.watch(held.pidfd, READ, lambda _mask: self.ending.on_pidfd(held))
        if held.walltime_s:
            due_s = now_s() + held.walltime_s
            held.set_timer("walltime", self._loop.call_at(due_s, lambda: self.stop(held, "walltime")))
        self.switch.arm(held)
        if not self._around.isolated and not held.container:
            self._note_pid(held)
        self.watcher.watch(held)
        if later:
            self._limit(held, limits)

    def _limit(self, held: Held, limits: Limits) -> None:
        """Of a container that is being made: it is not let go before."""
        if held.group is None:
            return
        try:
            self._cgroups.complete(held.group, limits)
        except OSError as error:
            self.containers.give_up(held, f"cannot set the limits: {error}")

    def _note_pid(self, held: Held) -> None:
        """Without a pid namespace a later shim may have to find it: pid and start time name it for ever."""
        process = proctable.read(held.pid)
        if process is not None:
            where = {"pid": held.pid, "start_ticks": process.start_ticks, "boot_id": proctable.boot_id()}
            # For as long as this machine runs: a later one has none of its processes.
            self._writer.put_later(held.record_path, {**held.intent(), **where}, lambda: None, lambda _error: None)

    def _reported(self, held: Held) -> None:
        if not (drain_report(held) if held.container else read_report(held)):
            return
        self._loop.unwatch(held.report_fd)
        os.close(held.report_fd)
        held.report_fd = -1
        if held.phase is not Phase.SPAWNING or held.spawn_error or held.container:
            return  # its exit tells the rest
        self._running(held)

    def _may_begin(self, held: Held) -> bool:
        """Whether a container that was made may be started: wanted and allowed, when it comes to it."""
        if not held.stop_why and self.switch.overdue(held):
            held.stop_why = "fenced"
        return not held.stop_why

    def _running(self, held: Held) -> None:
        """What the user has asked for runs."""
        if held.container:
            held.started_ms = now_ms()
            if held.walltime_s:
                again_s = now_s() + held.walltime_s
                held.set_timer("walltime", self._loop.call_at(again_s, lambda: self.stop(held, "walltime")))
            if not self._around.isolated:
                self._note_pid(held)
        held.phase = Phase.RUNNING
        if held.stop_why:
            self._signal(held, held.stop_signal)
        _call_all(held.waiters)

    # Ending ------------------------------------------------------------------------------------------------------

    def _signal(self, held: Held, number: int) -> None:
        held.signalled = True
        if held.container:
            self.containers.signal(held, number)
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(held.pid, number)
            os.killpg(held.pid, signal.SIGCONT)  # a stopped process sees the signal only once it goes on

    def _kill(self, held: Held, *, again: bool = False) -> None:
        if not held.alive or self.ending.noticed(held):
            return
        held.signalled = True
        self.ending.kill_all(held, thoroughly=again)
        held.set_timer("kill", self._loop.call_in(KILL_AGAIN_S, lambda: self._kill(held, again=True)))

    def _fence(self, held: Held) -> None:
        if not self.ending.noticed(held):
            held.stop_why = held.stop_why or "fenced"
            self._kill(held)

    def _over_disk(self, key: str, used_bytes: int) -> None:
        """Its scratch holds more than it may: ended as others are, and at once if it goes on filling the disk."""
        held = self.attempts.get(key)
        if held is None or not held.alive:
            return
        if not held.stop_why:
            held.disk_used_bytes = used_bytes
            self.stop(held, DISK_LIMIT)
        most_bytes = held.disk_bytes_max + max(held.disk_bytes_max // 4, DISK_OVER_MIN_BYTES)
        if held.stop_why == DISK_LIMIT and used_bytes > most_bytes:
            self._kill(held)

    def _ended(self, held: Held) -> None:
        self.watcher.unwatch(held.key)
        held.secrets = {}
        if (
            held.secret_names
            and not held.container
            and not secretfiles.remove(self._around.place, held.key, held.secret_names)
        ):
            self._log(f"{held.key}: it left more than its secrets in {self._around.place.of(held.key)}")
        _call_all(held.waiters)
        _call_all(held.end_waiters)
        self.on_end(held)

    def _kept(self, error: str) -> None:
        if error:
            self._log(f"cannot keep a scratch directory: {error}")

    def _discarded(self, error: str) -> None:
        if error == TO_TRASH:
            self.trash_waits = True
        elif error:
            self._log(f"cannot remove a scratch directory: {error}")


def _name(held: Held) -> tuple[str, str, int]:
    """Which attempt this is for ever. In a cluster that was restored from a backup numbers of attempts come again."""
    return held.key, held.incarnation, held.token


def _call_all(waiters: list[Callable[[], None]]) -> None:
    calls = list(waiters)
    waiters.clear()
    for call in calls:
        call()
