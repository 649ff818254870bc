"""The request to start an attempt: what a shim can read, what it is too old for, and the message itself."""

from __future__ import annotations

import base64
import math
from typing import Any

from spinetta.runtime.client import Hello
from spinetta.runtime.protocol import Launch
from spinetta.runtime.shim.container import CAPABILITY as CONTAINERS
from spinetta.runtime.shim.secretfiles import CAPABILITY as SECRET_FILES
from spinetta.runtime.shim.wire import CONTAINERS_SINCE, DISK_LIMIT, LIMITS, LIMITS_SINCE, LOG_LIMIT, OPEN_FILES_LIMIT

ARGUMENTS_CHARACTERS_MAX = 2 << 20  # as much as the kernel takes; escaped (six for one at worst) it is under 16 MiB


def fields_of(launch: Launch) -> dict[str, Any]:
    """Of the request ``start``."""
    fields: dict[str, Any] = {
        "key": launch.key,
        "argv": list(launch.argv),
        "env": dict(launch.env),
        "cwd": launch.working_directory,
        "cpu_millis": launch.cpu_millis,
        "memory_bytes": launch.memory_bytes,
        "pids_max": launch.pids_max,
        "walltime_s": launch.walltime_s,
        "grace_s": _finite(launch.grace_s),
        "stop_wait_s": _finite(launch.stop_wait_s),
        "log_bytes_max": launch.log_bytes_max,
        "keep_scratch_s": math.ceil(launch.keep_scratch_s),
        "disk_bytes_max": launch.disk_bytes_max,
        "token": launch.token,
        "incarnation": launch.incarnation,
    }
    if launch.private:
        fields["private"] = True
    if launch.secrets:
        fields["secrets"] = {name: base64.b64encode(data).decode() for name, data in launch.secrets}
    if launch.open_files[1]:
        fields["open_files"] = list(launch.open_files)
    if (contained := launch.container) is not None:
        fields["container"] = {
            "program": contained.program,
            "config": contained.config,
            "lower": list(contained.lower),
            "writable": contained.writable,
            "owner": list(contained.owner),
            "sources": list(contained.sources),
        }
    return fields


def _finite(seconds: float) -> float | None:
    """JSON has no infinity; null stands for it."""
    return None if math.isinf(seconds) else seconds


def lacking(launch: Launch, hello: Hello) -> str:
    """Why this shim cannot start it; empty when it can."""
    if launch.container is not None:
        if hello.version < CONTAINERS_SINCE:
            return "the shim of this node is of a version that runs no containers: it must end and be started anew"
        return "" if CONTAINERS in hello.capabilities else "this node cannot run containers: see its warnings"
    if launch.secrets and SECRET_FILES not in hello.capabilities:
        return "this node cannot give secrets to tasks: see its warnings"
    return ""


def limits_unheld(launch: Launch, hello: Hello) -> set[str]:
    """Limits that a task asks for and that its shim is too old to know, as they would be called."""
    wanted = {
        LOG_LIMIT: launch.log_bytes_max,
        DISK_LIMIT: launch.disk_bytes_max,
        OPEN_FILES_LIMIT: launch.open_files[1],
    }
    known = {*hello.capabilities, *(LIMITS if hello.version >= LIMITS_SINCE else ())}
    return {name for name, most in wanted.items() if most and name not in known}


def unusable(launch: Launch) -> str:
    """Why the shim could not even read this; empty when it can."""
    for name in ("cpu_millis", "memory_bytes", "pids_max", "token"):
        if not 0 <= getattr(launch, name) < 1 << 63:
            return f"{name} must be 0 to 2^63 - 1"
    for name in ("walltime_s", "grace_s", "stop_wait_s"):
        if not getattr(launch, name) >= 0:  # also when it is no number
            return f"{name} must not be negative"
    cwd = launch.working_directory
    if cwd and (not cwd.startswith("/") or "\0" in cwd):
        return f"the working directory must be an absolute path, not {'(sealed)' if launch.private else repr(cwd)}"
    characters = sum(map(len, launch.argv)) + sum(len(name) + len(value) for name, value in launch.env.items())
    if launch.container is not None:
        characters *= 2  # they are in its configuration as well
    if characters > ARGUMENTS_CHARACTERS_MAX:
        return "the arguments and environment together are too long for any machine"
    return ""
