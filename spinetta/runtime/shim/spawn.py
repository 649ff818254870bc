"""Forking: the shim's side of `child`."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Mapping
from dataclasses import dataclass, field

from . import child, container, forking, secretfiles
from .attempt import Held

TASK_OOM_SCORE_ADJ = 300  # when the machine runs out of memory a task goes before the node's own processes
SERVICE_OOM_SCORE_ADJ = -500
REPORT_BYTES_MAX = 1 << 16  # of what is said on the way to a start; more is not listened to


@dataclass(frozen=True)
class Surroundings:
    """What all children share.

    Attributes:
        outer_proc: descriptor of the /proc that the host sees, opened before we left its pid namespace.
        isolated: whether we are PID 1 of a pid namespace.
        nofile, core: the limits on open files and core dumps that children get.
        place: where they get their secrets.
        containers: where they are contained.
        mark: what the next shim is to find in the environment of all that was ours; not needed when isolated.
    """

    outer_proc: int
    isolated: bool
    nofile: tuple[int, int]
    core: tuple[int, int]
    place: secretfiles.Place
    mark: Mapping[str, str] = field(default_factory=dict)
    containers: container.Place = field(default_factory=container.Place)


def spawn(held: Held, around: Surroundings) -> None:
    """Fork the process of `held`; fills its pid, pidfd and report_fd. OSError: nothing was started."""
    env, join = {**held.env, **around.mark}, held.group.join_files() if held.group else []
    if held.secrets:
        env[secretfiles.VARIABLE] = around.place.of(held.key)
    bundle = None
    if held.container is not None:
        bundle = around.containers.plan(held.key, held.container, held.group, str(held.scratch), around.mark)
        join = around.containers.join_files(held.group)
        env = {"PATH": child.DEFAULT_PATH, **around.mark}  # of the runtime
    plan = child.Spawn(
        argv=held.argv,
        env=env,
        cwd=held.cwd,
        scratch=str(held.scratch or ""),
        stdout=held.stdout,
        stderr=held.stderr,
        join=join,
        oom_score_adj=SERVICE_OOM_SCORE_ADJ if held.service else TASK_OOM_SCORE_ADJ,
        die_with_parent=not around.isolated,
        parent=os.getpid(),
        nofile=around.nofile,
        core=around.core,
        open_files=held.open_files,
        key=held.key,
        secrets=held.secrets,
        place=around.place,
        bundle=bundle,
    )
    child.changed_signals()  # looked for here, once, not in each child
    receive, send = os.pipe2(os.O_CLOEXEC)
    try:
        os.set_blocking(receive, False)
        # The runtime's process has one group to be in; see `container.Place.join_files`.
        inside = False
        if bundle is not None and len(join) == 1:
            folder = os.path.dirname(join[0])  # noqa: PTH120 - as text, like all of it
            pid, inside = forking.fork_into(folder, plan.oom_score_adj)
        else:
            pid = os.fork()
    except OSError:
        os.close(receive)
        os.close(send)
        raise
    if pid == 0:
        child.run(plan, send, around.outer_proc, joined=inside)
    os.close(send)
    try:
        # The pid is ours until we reap it: no race here.
        held.pidfd = os.pidfd_open(pid)
    except OSError:
        os.close(receive)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise
    held.pid = pid
    held.report_fd = receive


def drain_report(held: Held) -> bool:
    """Take what has been said so far; True when that is all."""
    while True:
        try:
            data = os.read(held.report_fd, 4096)
        except BlockingIOError:
            return False
        if not data:
            return True
        if len(held.report) < REPORT_BYTES_MAX:
            held.report += data


def read_report(held: Held) -> bool:
    """Take what the child has said so far; True when it has said all: the program runs, or `spawn_error` is set."""
    if not drain_report(held):
        return False
    pid_line, _, rest = held.report.partition(b"\n")
    if pid_line.isdigit():
        held.outer_pid = int(pid_line)
    elif pid_line:
        rest = pid_line
    if rest:
        failure = json.loads(rest)
        program, cwd = ("(sealed)", "(sealed)") if held.private else (held.argv[0], held.cwd)
        held.spawn_error = child.explain(failure["stage"], failure["errno"], program, cwd)
        held.spawn_unfit = failure["stage"] in ("secrets", "open-files")
    return True
