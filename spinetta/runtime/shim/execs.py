"""Commands beside a running attempt: in its groups, with its environment, for as long as somebody listens.

Each belongs to the connection that asked for it, by which its standard streams came as descriptors: when that ends, as
it does when the daemon dies, the command is hung up, then killed. It is no part of any record, and never keeps its
attempt from ending: it is in the attempt's groups, and where there are none it is killed by name.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import struct
import termios
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from . import child, proctable, secretfiles, sysapi
from .attempt import Held, Phase
from .connection import Connection
from .container import Container, complaint
from .keeper import Keeper, Refused
from .loop import READ, Loop
from .spawn import TASK_OOM_SCORE_ADJ, Surroundings
from .terminals import Sizes
from .wire import EXECS_MAX, EXECS_PER_ATTEMPT_MAX, SIDE_MAX, Message, integer, key, text, text_map, texts

HANGUP_WAIT_S = 2.0  # between HUP and KILL, for a shell to write its history
KILL_AGAIN_S = 0.2
KILL_TRIES_MAX = 50
REPORT_BYTES_MAX = 4096
LOG_BYTES_MAX = 1 << 16  # of what a container's runtime says
RUNTIME_FAILED = 255  # its exit code when it could not do what it was asked for
CANNOT_START = 126  # as a shell says it
INIT_ENDS_S = 0.1
_KILLED_INSIDE = 128 + signal.SIGKILL  # as a container's runtime says it


@dataclass
class Exec:
    """One such command.

    Attributes:
        waits: the request's id, until it has been answered.
        report_fd: what goes wrong before the program runs comes from here; its end says that it runs.
        log_fd: what a container's runtime complains of, in memory; -1: there is none.
        oom_kills: of the attempt, when this was started.
    """

    held: Held
    connection: Connection
    waits: int
    pid: int
    pidfd: int
    report_fd: int
    program: str
    cwd: str
    log_fd: int = -1
    report: bytes = b""
    hung_up: bool = False
    tries: int = 0
    oom_kills: int = 0


@dataclass(frozen=True)
class Plan:
    """What the new process needs."""

    argv: Sequence[str]
    env: dict[str, str] = field(repr=False)
    cwd: str
    fds: Sequence[int]
    process: dict[str, Any] | None = field(repr=False)  # what the container runtime is to run; None: we do
    join: Sequence[str]
    mounts: str  # of a process whose mounts it is to see; empty: ours
    around: Surroundings
    open_files: tuple[int, int] | None
    parent: int
    log_fd: int = -1


class Execs:
    """All commands of this node that run beside attempts."""

    def __init__(self, loop: Loop, keeper: Keeper, log: Callable[[str], None]) -> None:
        self._loop = loop
        self._keeper = keeper
        self._around = keeper.around
        self._log = log
        self._all: dict[int, Exec] = {}  # by pid
        self._sizes = Sizes(loop, log)
        keeper.ending.companions = lambda held: {one.pid for one in self._all.values() if one.held is held}

    def start(self, connection: Connection, message: Message) -> None:
        """Start one; it is answered when the program runs, or cannot.

        Its descriptors come with the message: one of a terminal, or three.
        """
        fds = connection.take_descriptors()
        try:
            self._start(connection, message, fds)
        finally:
            for fd in fds:
                os.close(fd)

    def signal(self, connection: Connection, message: Message) -> None:
        """A signal to the process group of the command that belongs to this connection."""
        number = integer(message, "signal")
        if not 1 <= number <= 64:
            raise Refused("bad-request", "signal must be 1 to 64")
        for one in self._all.values():
            if one.connection is connection:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(one.pid, number)
        connection.send({"id": message["id"], "ok": True})

    def resize(self, connection: Connection, message: Message) -> None:
        """The terminal of the command that belongs to this connection has another size, which the caller has set.

        Answered at once; the runtime of a container may have to make the command's own terminal yet.
        """
        rows, columns = integer(message, "rows"), integer(message, "columns")
        if max(rows, columns) > SIDE_MAX:
            raise Refused("bad-request", f"a terminal has {SIDE_MAX} rows and columns at most")
        for one in self._all.values():
            if one.connection is connection and one.held.container is not None:
                self._sizes.want(one.pid, one.pidfd, rows, columns)
        connection.send({"id": message["id"], "ok": True})

    def _start(self, connection: Connection, message: Message, fds: Sequence[int]) -> None:
        held = self._keeper.attempts.get(key(message))
        argv, more, cwd = texts(message, "argv"), text_map(message, "env"), text(message, "cwd", "")
        if len(fds) not in (1, 3):
            raise Refused("bad-request", "one descriptor of a terminal must come along, or three others")
        if held is None or held.phase is not Phase.RUNNING or held.stop_why:
            raise Refused("not-running", "the attempt does not run" if held is None else "the attempt is ending")
        if sum(1 for one in self._all.values() if one.held is held) >= EXECS_PER_ATTEMPT_MAX:
            raise Refused("full", f"{EXECS_PER_ATTEMPT_MAX} commands run beside this attempt already")
        if len(self._all) >= EXECS_MAX:
            raise Refused("full", f"{EXECS_MAX} commands run beside attempts of this node already")
        if any(one.connection is connection for one in self._all.values()):
            raise Refused("bad-request", "one command for each connection")
        plan = self._plan(held, argv, more, cwd, fds)
        if problem := child.unusable(plan.argv, plan.env):
            raise Refused("cannot-start", problem)
        try:
            one = self._fork(plan, held, connection, integer(message, "id"))
        except OSError as error:
            if plan.log_fd >= 0:
                os.close(plan.log_fd)
            raise Refused("full", f"cannot fork: {error.strerror}") from None
        one.oom_kills = _oom_kills(held)
        self._all[one.pid] = one
        self._keeper.ending.unreaped.add(one.pid)
        self._loop.watch(one.report_fd, READ, lambda _mask: self._reported(one))
        self._loop.watch(one.pidfd, READ, lambda _mask: self._ended(one))
        connection.on_close = lambda: self._hang_up(one)

    def _plan(self, held: Held, argv: list[str], more: dict[str, str], cwd: str, fds: Sequence[int]) -> Plan:
        if held.container is not None:
            return self._contained(held, held.container, argv, more, cwd, fds)
        env = {**held.env, **self._around.mark, **more}
        if held.secret_names:
            env[secretfiles.VARIABLE] = self._around.place.of(held.key)
        base = held.cwd or str(held.scratch or "/")
        return Plan(
            argv=argv,
            env=env,
            cwd=os.path.join(base, cwd),  # noqa: PTH118 - as text: an absolute one stands for itself
            fds=fds,
            process=None,
            join=held.group.join_files() if held.group else [],
            mounts=f"/proc/{held.pid}/ns/mnt" if held.secret_names and self._around.place.mount else "",
            around=self._around,
            open_files=held.open_files,
            parent=os.getpid(),
        )

    def _contained(
        self, held: Held, made: Container, argv: list[str], more: dict[str, str], cwd: str, fds: Sequence[int]
    ) -> Plan:
        """By the container's runtime, as whom and with what its first command runs."""
        if problem := child.unusable(argv, more):
            raise Refused("cannot-start", problem)
        place, mark = self._around.containers, self._around.mark
        env = dict(item.split("=", 1) for item in made.process.get("env", []) if "=" in item)
        process = {
            **made.process,
            "args": argv,
            "env": [f"{name}={value}" for name, value in {**env, **mark, **more}.items()],
            "cwd": os.path.join(str(made.process.get("cwd") or "/"), cwd),  # noqa: PTH118 - as text
            "terminal": len(fds) == 1,
        }
        if len(fds) == 1:
            rows, columns, _, _ = struct.unpack("4H", fcntl.ioctl(fds[0], termios.TIOCGWINSZ, bytes(8)))
            process["consoleSize"] = {"height": rows, "width": columns}
        join = place.join_files(held.group)
        log_fd = os.memfd_create("log")
        log = ("--log", f"/proc/self/fd/{log_fd}", "--log-format", "json")
        return Plan(
            argv=[made.program, "--root", place.state, *log, "exec", "--process", "/proc/self/fd/{}", held.key],
            env={"PATH": child.DEFAULT_PATH, **mark},
            cwd="/",
            fds=fds,
            process=process,
            join=join,
            mounts="",
            around=self._around,
            open_files=held.open_files,
            parent=os.getpid(),
            log_fd=log_fd,
        )

    def _fork(self, plan: Plan, held: Held, connection: Connection, number: int) -> Exec:
        receive, send = os.pipe2(os.O_CLOEXEC)
        try:
            os.set_blocking(receive, False)
            pid = os.fork()
        except OSError:
            os.close(receive)
            os.close(send)
            raise
        if pid == 0:
            _run(plan, send)
        os.close(send)
        try:
            pidfd = os.pidfd_open(pid)
        except OSError:
            os.close(receive)
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise
        return Exec(held, connection, number, pid, pidfd, receive, plan.argv[0], plan.cwd, plan.log_fd)

    def _reported(self, one: Exec) -> None:
        """The program has taken over, or could not."""
        with contextlib.suppress(BlockingIOError):
            while data := os.read(one.report_fd, REPORT_BYTES_MAX):
                one.report += data
            self._loop.unwatch(one.report_fd)
            os.close(one.report_fd)
            one.report_fd = -1
            number, one.waits = one.waits, 0
            if not one.report:
                one.connection.send({"id": number, "ok": True})
                return
            failure = json.loads(one.report)
            why = child.explain(failure["stage"], failure["errno"], one.program, one.cwd)
            one.connection.send({"id": number, "error": "cannot-start", "message": why})

    def _ended(self, one: Exec) -> None:
        if one.report_fd >= 0:
            self._reported(one)  # all has been said by now
        result = os.waitid(os.P_PIDFD, one.pidfd, os.WEXITED | os.WNOHANG)
        if result is None:
            return
        del self._all[one.pid]
        self._sizes.forget(one.pid)
        self._keeper.ending.unreaped.discard(one.pid)
        self._loop.unwatch(one.pidfd)
        os.close(one.pidfd)
        one.connection.on_close = lambda: None
        said = _complaint(one)
        if one.report:
            return  # told already
        exited = result.si_code == os.CLD_EXITED
        code = result.si_status
        out_of_memory = code == (_KILLED_INSIDE if exited else signal.SIGKILL) and _was_chosen(one)
        if said and exited and code == RUNTIME_FAILED:
            why = f"the command could not be started: {said}"
            one.connection.send({"event": "exec-ended", "exit_code": CANNOT_START, "signal": 0, "message": why})
        elif one.held.container is not None and code == _KILLED_INSIDE and one.held.phase < Phase.ENDING:
            # When a container's first process ends all others do so before it, so that we hear of them first.
            self._loop.call_in(INIT_ENDS_S, lambda: self._tell(one, out_of_memory, exited=exited, code=code))
        else:
            self._tell(one, out_of_memory, exited=exited, code=code)

    def _tell(self, one: Exec, out_of_memory: bool, *, exited: bool, code: int) -> None:
        by_force = not exited or (one.held.container is not None and code == _KILLED_INSIDE)
        with_it = by_force and (one.held.phase >= Phase.ENDING or bool(one.held.stop_why))
        one.connection.send(
            {
                "event": "exec-ended",
                "exit_code": code if exited else None,
                "signal": 0 if exited else code,
                "message": "the task has ended" if with_it else "memory ran out" if out_of_memory else "",
            }
        )

    # Ending by force ---------------------------------------------------------------------------------------------

    def _hang_up(self, one: Exec) -> None:
        """Nobody listens any more."""
        if one.pid not in self._all or one.hung_up:
            return
        one.hung_up = True
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(one.pid, signal.SIGHUP)
            os.killpg(one.pid, signal.SIGCONT)
        self._loop.call_in(HANGUP_WAIT_S, lambda: self._kill(one))

    def _kill(self, one: Exec) -> None:
        """All of its session, until it is gone. Not reaped yet, so its number is not another's."""
        if one.pid not in self._all or one.tries >= KILL_TRIES_MAX:
            return
        one.tries += 1
        # Of a container's runtime also the command, which has a session of its own.
        proctable.kill_family(one.pid, (), strays=False)
        with contextlib.suppress(ProcessLookupError):  # before it has a session of its own
            os.kill(one.pid, signal.SIGKILL)
        self._loop.call_in(KILL_AGAIN_S, lambda: self._kill(one))


def _oom_kills(held: Held) -> int:
    """Processes of the attempt that were killed because memory ran out, without commands beside it."""
    return held.group.counters().oom_kills - held.oom_kills_beside if held.group else 0


def _was_chosen(one: Exec) -> bool:
    """Whether a command that was killed was what the kernel killed because memory ran out: then its task was not.

    One kill at the most is put down to it. Of several, or when a process of its own was killed and it went on, nobody
    can tell whose they were; then they are the task's, whose output may lack something.
    """
    if one.held.phase >= Phase.ENDING or one.hung_up or _oom_kills(one.held) <= one.oom_kills:
        return False
    one.held.oom_kills_beside += 1
    return True


def _complaint(one: Exec) -> str:
    """What the container's runtime has said of a failure of its own; empty when there was none."""
    if one.log_fd < 0:
        return ""
    lines = os.pread(one.log_fd, LOG_BYTES_MAX, 0).splitlines()
    os.close(one.log_fd)
    one.log_fd = -1
    return complaint(lines)


# --- in the new process -------------------------------------------------------------------------------------------


def _run(plan: Plan, report: int) -> NoReturn:
    """Become the program. Never returns, whatever happens."""
    stage = ["setup"]
    try:
        _become(plan, stage)
    except OSError as error:
        os.write(report, json.dumps({"stage": stage[0], "errno": error.errno or 0}).encode())
    finally:
        os._exit(127)


def _become(plan: Plan, stage: list[str]) -> NoReturn:
    os.setsid()
    stage[0] = "cgroup"
    child.reset_priority(TASK_OOM_SCORE_ADJ)  # before we are where memory is short
    child.join_groups(plan.join)
    stage[0] = "setup"
    if not plan.around.isolated:
        sysapi.set_parent_death_signal(signal.SIGKILL)
        if os.getppid() != plan.parent:
            os._exit(127)
    child.reset_signals()
    with contextlib.suppress(OSError, ValueError):
        child.restore_limits(plan.around.nofile, plan.around.core)
    os.umask(0o022)
    if plan.mounts:
        fd = os.open(plan.mounts, os.O_RDONLY | os.O_CLOEXEC)
        sysapi.setns(fd, sysapi.CLONE_NEWNS)
        os.close(fd)
    stage[0] = "terminal"
    if len(plan.fds) == 1:
        fcntl.ioctl(plan.fds[0], termios.TIOCSCTTY, 0)
    stage[0] = "cwd"
    os.chdir(plan.cwd)
    stage[0] = "setup"
    for number, fd in enumerate(plan.fds if len(plan.fds) == 3 else [plan.fds[0]] * 3):
        os.dup2(fd, number)
    if plan.log_fd >= 0:
        os.set_inheritable(plan.log_fd, True)
    argv = list(plan.argv)
    if plan.process is not None:  # in memory: it may say what nobody else is to know
        fd = os.memfd_create("process", 0)
        with open(fd, "w", encoding="utf-8", errors="surrogateescape", closefd=False) as file:
            json.dump(plan.process, file, ensure_ascii=False)
        argv = [item.replace("{}", str(fd)) for item in argv]
    stage[0] = "open-files"
    child.limit_files(plan.open_files, for_runtime=plan.process is not None)
    stage[0] = "exec"
    child.become_program(argv, plan.env, stage)
