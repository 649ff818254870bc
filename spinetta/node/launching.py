"""What an attempt is launched with: from a task's record, what was sealed in it, and the node's settings."""

from __future__ import annotations

from dataclasses import dataclass

from spinetta import openfiles
from spinetta.events import Start, attempt_key
from spinetta.model import TaskSpec
from spinetta.node.vault import Opened
from spinetta.runtime.protocol import Launch

DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@dataclass(frozen=True, slots=True)
class LaunchSettings:
    """What every task of this node is started with."""

    node: str
    pids_max: int
    api_address: str
    log_bytes_max: int = 0
    open_files: int = 0  # the hard limit of those that ask for nothing; 0: as the node itself
    open_files_most: int = openfiles.OPEN_FILES_MAX  # that this machine lets it set


def task_environment(spec: TaskSpec, attempt: int, settings: LaunchSettings) -> dict[str, str]:
    """The whole environment of a task: nothing of the daemon's own gets in."""
    usual = {"PATH": DEFAULT_PATH, "LANG": "C.UTF-8"} if spec.container is None else {}  # else its image says
    return {
        **usual,
        "SPINETTA_TASK_ID": spec.id,
        "SPINETTA_ATTEMPT": str(attempt),
        "SPINETTA_NODE_NAME": settings.node,
        "SPINETTA_NODE": settings.api_address,  # so that `spinetta` and the client work inside a task
        **dict(spec.env),
    }


def launch_of(start: Start, settings: LaunchSettings, opened: Opened | None = None) -> Launch:
    """What the runtime needs to start an attempt. `opened`: what was sealed for the task."""
    opened = opened or Opened(start.spec)
    spec = opened.spec
    return Launch(
        key=attempt_key(spec.id, start.attempt),
        argv=spec.command,
        env=task_environment(spec, start.attempt, settings),
        working_directory=spec.working_directory,
        cpu_millis=spec.resources.cpu_millis,
        memory_bytes=spec.resources.memory_bytes,
        pids_max=settings.pids_max,
        walltime_s=spec.walltime_s,
        grace_s=start.grace_s,
        token=start.token,
        incarnation=start.incarnation,
        private=opened.private,
        secrets=opened.secrets,
        log_bytes_max=settings.log_bytes_max,
        disk_bytes_max=spec.resources.disk_bytes,
        keep_scratch_s=spec.keep_scratch_s,
        open_files=openfiles.limits(spec.open_files_max, settings.open_files, settings.open_files_most),
        countables=spec.resources.countables,
        wants=spec.container,
    )
