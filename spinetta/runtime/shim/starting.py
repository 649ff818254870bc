"""How a container starts: the runtime creates it, its first process becomes ours, and we let it go.

The runtime's ``create`` makes everything and leaves a first process that waits at a fifo. It ends, and that process, an
orphan, is our child. Whether it may still start is looked at then, once more; opening the fifo is what lets it go. So
the runtime's ``start`` and ``delete``, two processes more, are only there for when that does not work.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Callable, Mapping, Sequence

from . import child, proctable, sysapi
from .attempt import Held, Phase
from .bundle import PID_FILE, pid_file
from .cgroup import Group
from .container import PIDS_FOR_START, Container, Place, Stage, complaint, is_the_users_fault, says_out_of_memory
from .loop import READ, Loop
from .spawn import TASK_OOM_SCORE_ADJ, drain_report

CREATE_LIMIT_S = 60.0  # it takes 0.03 s on an idle machine
FIFO_LIMIT_S = 5.0  # for the first process to come to the fifo; past it the runtime's own `start` is tried
START_LIMIT_S = 20.0  # for that
SIGNAL_AGAIN_S = 0.01  # an init that has just begun
SIGNAL_TRIES_MAX = 100  # or another kind of program, which perhaps waits for signals, perhaps is not to be reached
CLEAN_TRIES_MAX = 50
CLEAN_AGAIN_S = 0.1


class Containers:
    """The way from the end of ``create`` to a command that runs, and what is to be removed when it has ended.

    Attributes:
        helpers: pids of processes of the runtime's that we have started for `start` and `delete`.
    """

    def __init__(self, loop: Loop, place: Place, mark: Mapping[str, str], log: Callable[[str], None]) -> None:
        self._loop = loop
        self.place = place
        self._mark = mark
        self._log = log
        self.helpers: set[int] = set()
        self.unreaped: set[int] = set()
        self.on_pidfd: Callable[[Held], None] = lambda _held: None
        self.kill: Callable[[Held], None] = lambda _held: None
        self.may_start: Callable[[Held], bool] = lambda _held: False
        self.running: Callable[[Held], None] = lambda _held: None
        self._creating: dict[str, Held] = {}
        self._watch_pid_files()

    def begun(self, held: Held) -> None:
        """The runtime is at it: it is given so long and no longer."""
        why = f"the container was not made within {CREATE_LIMIT_S:g} s"
        held.set_timer("create", self._loop.call_in(CREATE_LIMIT_S, lambda: self.give_up(held, why)))
        self._creating[held.key] = held

    def noted(self, held: Held, error: str) -> None:
        """The record that it is being started is on disk, or cannot be: it may go on, or may not."""
        if error:
            self.give_up(held, error)
        elif held.container is not None:
            held.container.noted = True
            self._begin(held)

    def passed(self, held: Held, status: tuple[bool, int]) -> tuple[bool, int] | None:
        """Its present main process has ended so; None when that is not the end of it, but a step of its start."""
        made = held.container
        if made is None or made.stage is Stage.STARTED:
            return status
        if self._has_passed(held):
            return status
        lines = _said(held)
        if made.stage is Stage.CREATED:
            if held.stop_why and held.signalled:
                return status
            held.spawn_unfit = True
            held.spawn_error = held.spawn_error or "its first process was killed before its command was started"
            return status
        held.cancel_timer("create")
        self._creating.pop(held.key, None)
        if held.stop_why and held.signalled:
            return status
        if status != (True, 0):
            if not held.spawn_error:
                _explain(held, lines, status)
            return status
        # Reaped now, so that its place can be taken; its end is no secret.
        self._reap(held.pidfd, held.pid)
        held.pidfd, held.outer_pid = -1, 0
        if not self._takes_over(held, made):
            made.stage = Stage.CREATED
            held.spawn_unfit = True
            held.spawn_error = "its first process was killed before its command was started"
            return False, int(signal.SIGKILL)
        self._loop.watch(held.pidfd, READ, lambda _mask: self.on_pidfd(held))
        # Not here: whoever is just looking whether it has ended may be about to stop it.
        held.set_timer("begin", self._loop.call_in(0, lambda: self._begin(held)))
        return None

    def clear(self, held: Held, tries: int = 0) -> None:
        """Remove what the runtime has made and remembers of an ended one."""
        made = held.container
        if made is None:
            return
        _close_fifo(held, self._loop)
        # Both, whatever becomes of the first: a group may need a moment longer, until a dying process has let go of it.
        groups, state = self.place.remove_groups(held.key), self.place.remove_state(held.key)
        if groups and state:
            return
        if not state and tries == 0:
            self._help(held, ["delete", "--force", held.key], lambda _code: self.clear(held, 1))
        elif tries < CLEAN_TRIES_MAX:
            self._loop.call_in(CLEAN_AGAIN_S, lambda: self.clear(held, tries + 1))
        else:
            self._log(f"{held.key}: what the container runtime made for it cannot be removed")

    def signal(self, held: Held, number: int, tries: int = 0) -> None:
        """To its first process, which passes it on to the command and its children, once it can."""
        if held.phase is not Phase.RUNNING or held.container is None:
            return
        # To the first process of a pid namespace the kernel gives no signal that it does not handle: it is lost. What
        # it waits for is not seen from outside; but an init that has started its command waits for all.
        # (The name first: what the runtime itself handles is of no use to the program that follows it.)
        ready = proctable.name_of(held.pid) != held.container.waiting_as and (
            proctable.handles(held.pid, number) or proctable.leads_another_group(held.pid)
        )
        if tries < SIGNAL_TRIES_MAX and not ready:
            held.set_timer("signal", self._loop.call_in(SIGNAL_AGAIN_S, lambda: self.signal(held, number, tries + 1)))
            return
        for each in (number, signal.SIGCONT):
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(held.pidfd, each)

    # Letting it go -----------------------------------------------------------------------------------------------

    def _watch_pid_files(self) -> None:
        """Hear when a container is made: its runtime writes the first process's number down, then it only ends.

        That takes it a few milliseconds, in which the command can begin. Not with version 2 alone: the runtime is in
        the attempt's group there, and would be counted to the command's limit of processes.
        """
        if self.place.why or self.place.pure_v2:
            return
        with contextlib.suppress(OSError):  # we go on when the runtime has ended
            fd = sysapi.renames_into(self.place.state)
            self._loop.watch(fd, READ, lambda _mask: self._look_at_pid_files(fd))

    def _look_at_pid_files(self, fd: int) -> None:
        for name in sysapi.renamed(fd):
            held = self._creating.pop(name.removeprefix(PID_FILE), None) if name.startswith(PID_FILE) else None
            if held is not None:
                self._is_made(held)

    def _is_made(self, held: Held) -> None:
        """Its first process takes the place of the runtime's, which is about to end."""
        made = held.container
        if made is None or made.stage is not Stage.CREATING or held.phase is not Phase.SPAWNING or held.signalled:
            return
        maker_fd, maker = held.pidfd, held.pid
        if not self._takes_over(held, made):
            return
        made.maker, made.maker_fd, held.outer_pid = maker, maker_fd, 0
        self._loop.watch(maker_fd, READ, lambda _mask: self._maker_ended(held, made))
        self._begin(held)

    def _maker_ended(self, held: Held, made: Container) -> None:
        self._reap(made.maker_fd, made.maker)
        made.maker, made.maker_fd = 0, -1
        held.cancel_timer("create")
        self._loop.watch(held.pidfd, READ, lambda _mask: self.on_pidfd(held))

    def _reap(self, pidfd: int, pid: int) -> None:
        self._loop.unwatch(pidfd)
        with contextlib.suppress(ChildProcessError):
            os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG)
        os.close(pidfd)
        self.unreaped.discard(pid)

    def _takes_over(self, held: Held, made: Container) -> bool:
        """Make the container's first process the main one; False when it is gone already."""
        pid = self._first_process(held)
        if pid == 0:
            return False
        made.stage = Stage.CREATED
        held.pid, made.waiting_as = pid, proctable.name_of(pid)
        self.unreaped.add(pid)
        return True

    def _first_process(self, held: Held) -> int:
        """Of the container that was made, with its pidfd; 0 when it is gone already."""
        try:
            # On a tmpfs, as all of the runtime's state: no disk can make us wait.
            pid = int(proctable.text_of(pid_file(self.place.state, held.key)))
            pidfd = os.pidfd_open(pid)
        except (OSError, ValueError):
            return 0
        # Should it have died and been reaped, its number may be another's by now.
        with contextlib.suppress(OSError):
            if f"/{held.key}" in proctable.text_of(f"/proc/{pid}/cgroup"):
                held.pidfd = pidfd
                return pid
        os.close(pidfd)
        return 0

    def _begin(self, held: Held) -> None:
        made = held.container
        if made is None or made.stage is not Stage.CREATED or held.phase is not Phase.SPAWNING or held.signalled:
            return
        if made.fifo_fd >= 0 or made.helper or not (made.noted or held.stop_why):
            return  # it is being let go, or will be when it is noted
        if not self.may_start(held):
            self.kill(held)
            return
        if self.place.pure_v2 and held.group and held.limits.pids_max:
            try:
                held.group.limit_pids(held.limits.pids_max)
            except OSError as error:
                self.give_up(held, f"cannot set the limits: {error}")
                return
        try:
            path = f"{self.place.state}/{held.key}/exec.fifo"
            made.fifo_fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            self._start_otherwise(held)
            return
        self._loop.watch(made.fifo_fd, READ, lambda _mask: self._let_go(held))
        held.set_timer("begin", self._loop.call_in(FIFO_LIMIT_S, lambda: self._start_otherwise(held)))

    def _let_go(self, held: Held) -> None:
        """There is something in the fifo: it has passed."""
        made = held.container
        if made is None or made.fifo_fd < 0:
            return
        try:
            said = os.read(made.fifo_fd, 16)
        except BlockingIOError:
            return
        _close_fifo(held, self._loop)
        if said:
            self._started(held)
        # else it has died, which its pidfd tells, or is about to come again: the timer looks

    def _has_passed(self, held: Held) -> bool:
        """Whether it was let go after all: a short command may have ended before we came to hear of its start."""
        self._let_go(held)
        made = held.container
        if made is None:
            return False
        if made.stage is Stage.CREATED and proctable.name_of(held.pid) not in ("", made.waiting_as):
            self._started(held)  # by the runtime's own `start`; it has become something else
        return made.stage is Stage.STARTED

    def _start_otherwise(self, held: Held) -> None:
        """By the runtime's own ``start``."""
        _close_fifo(held, self._loop)
        if held.phase is not Phase.SPAWNING or held.signalled:
            return
        if not self.may_start(held):
            self.kill(held)
            return

        def done(code: int) -> None:
            if held.phase is not Phase.SPAWNING:
                return
            if code == 0:
                self._started(held)
            else:
                self.give_up(held, "the container was made and could not be started")

        self._help(held, ["start", held.key], done, _join_files(held.group))
        why = f"the container was made and not started within {START_LIMIT_S:g} s"
        held.set_timer("begin", self._loop.call_in(START_LIMIT_S, lambda: self.give_up(held, why)))

    def _started(self, held: Held) -> None:
        if held.container is None or held.phase is not Phase.SPAWNING:
            return
        held.container.stage = Stage.STARTED
        held.cancel_timer("begin")
        with contextlib.suppress(OSError):  # as the runtime's `start` does, which tells its `exec` that it runs
            os.unlink(f"{self.place.state}/{held.key}/exec.fifo")  # noqa: PTH108 - as text, like above
        self.running(held)

    def give_up(self, held: Held, why: str) -> None:
        """The node cannot run it: kill what there is of it, unless it runs already."""
        if held.phase is Phase.SPAWNING:
            held.spawn_error, held.spawn_unfit = held.spawn_error or why, True
            self.kill(held)
        elif held.container is not None and held.made_beside:
            # The command runs, and the runtime, with nothing left to do, does not end.
            signal.pidfd_send_signal(held.container.maker_fd, signal.SIGKILL)

    # The runtime's own commands ----------------------------------------------------------------------------------

    def _help(
        self, held: Held, arguments: Sequence[str], done: Callable[[int], None], join: Sequence[str] = ()
    ) -> None:
        """Run the runtime beside us; `done` gets its exit code, or 255."""
        made = held.container
        if made is None:
            return
        try:
            pid = os.fork()
        except OSError:
            done(255)
            return
        if pid == 0:
            _become_helper([made.program, "--root", self.place.state, *arguments], dict(self._mark), join)
        made.helper = pid
        self.unreaped.add(pid)
        self.helpers.add(pid)
        try:
            pidfd = os.pidfd_open(pid)
        except OSError:
            self.unreaped.discard(pid)
            self.helpers.discard(pid)
            done(255)
            return

        def ended(_mask: int) -> None:
            result = os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG)
            if result is None:
                return
            self._loop.unwatch(pidfd)
            os.close(pidfd)
            self.unreaped.discard(pid)
            self.helpers.discard(pid)
            made.helper = 0
            done(result.si_status if result.si_code == os.CLD_EXITED else 255)

        self._loop.watch(pidfd, READ, ended)


def _join_files(group: Group | None) -> list[str]:
    """Helpers are killed with what they help, where they can be without being counted to it."""
    path = group.v2 if group else None
    return [str(path / "cgroup.procs")] if path else []


def _become_helper(argv: list[str], env: dict[str, str], join: Sequence[str]) -> None:
    try:
        os.setsid()
        with contextlib.suppress(OSError):  # gone, or it has groups below
            child.join_groups(join)
        child.reset_signals()
        child.reset_priority(TASK_OOM_SCORE_ADJ)
        null = os.open("/dev/null", os.O_RDWR)
        for number in range(3):
            os.dup2(null, number)
        os.execve(argv[0], argv, {"PATH": child.DEFAULT_PATH, **env})  # noqa: S606 - no shell
    finally:
        os._exit(127)


def _close_fifo(held: Held, loop: Loop) -> None:
    made = held.container
    if made is not None and made.fifo_fd >= 0:
        loop.unwatch(made.fifo_fd)
        os.close(made.fifo_fd)
        made.fifo_fd = -1


def _said(held: Held) -> list[bytes]:
    """What has been said of its start so far, without the first line."""
    if held.report_fd >= 0:
        drain_report(held)
    return held.report.splitlines()[1:]


def _explain(held: Held, lines: Sequence[bytes], status: tuple[bool, int]) -> None:
    """Why it was not made."""
    exited, number = status
    failure = {}
    with contextlib.suppress(ValueError, IndexError):
        failure = json.loads(lines[-1])
    if isinstance(failure, dict) and "stage" in failure and held.container is not None:
        # Before the runtime took over.
        held.spawn_error = child.explain(failure["stage"], failure["errno"], held.container.program, "")
        held.spawn_unfit = True
        return
    said = complaint(lines)
    low = 0 < held.limits.pids_max < PIDS_FOR_START
    held.spawn_unfit = not (low or is_the_users_fault(said))
    if held.container is not None:
        held.container.too_small = says_out_of_memory(said)
    if said:
        what = "(sealed)" if held.private else said
        held.spawn_error = f"the container could not be made: {what}"
    else:
        how = f"ended with exit code {number}" if exited else f"was killed by signal {number}"
        held.spawn_error = f"the container could not be made: its runtime {how}"
    if low:
        held.spawn_error += (
            f"; its limit of {held.limits.pids_max} processes and threads may not be enough even for that"
        )
