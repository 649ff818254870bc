"""Requests as they come over the wire, made into what the keeper holds; and how that is told of."""

from __future__ import annotations

import base64
from typing import Any

from . import secretfiles
from .attempt import Held, Phase
from .bundle import LOWER_MAX, SOURCES_MAX, WORK
from .cgroup import Limits
from .container import Container
from .disk import Layout
from .keeper import Refused
from .wire import FILE_NAME, BadMessage, Message, integer, key, number, text, text_map, texts


def attempt_of(message: Message, layout: Layout) -> Held:
    """An attempt that is to be started."""
    name = key(message)
    walltime_s = number(message, "walltime_s", 0)
    secrets = _secrets(message)
    contained = container_of(message)
    return Held(
        key=name,
        service=False,
        argv=texts(message, "argv"),
        env=text_map(message, "env"),
        cwd="" if contained else _folder(message),
        stdout=str(layout.logs / name / "stdout"),
        stderr=str(layout.logs / name / "stderr"),
        record_path=layout.attempts / name,
        scratch=None if message.get("cwd") and not contained else layout.scratch / name,
        limits=Limits(*(integer(message, limit, 0) for limit in ("cpu_millis", "memory_bytes", "pids_max"))),
        walltime_s=0.0 if walltime_s == float("inf") else walltime_s,
        grace_s=number(message, "grace_s"),
        stop_wait_s=number(message, "stop_wait_s", 10.0),
        token=integer(message, "token", 0),
        incarnation=text(message, "incarnation", ""),
        disk_bytes_max=integer(message, "disk_bytes_max", 0),
        log_bytes_max=integer(message, "log_bytes_max", 0),
        open_files=_open_files(message),
        keep_scratch_s=integer(message, "keep_scratch_s", 0),
        keep_part=WORK if contained else "",
        private=message.get("private") is True,
        secrets=secrets,
        secret_names=tuple(secrets),
        container=contained,
    )


def service_of(message: Message, layout: Layout) -> Held:
    """A service that is to be started."""
    name = key(message)
    log_path = text(message, "log_path")
    if not log_path.startswith("/"):
        raise Refused("bad-request", "log_path must be absolute")
    return Held(
        key=name,
        service=True,
        argv=texts(message, "argv"),
        env=text_map(message, "env"),
        cwd=_folder(message),
        stdout=log_path,
        stderr=log_path,
        record_path=layout.services / name,
        scratch=None if message.get("cwd") else layout.scratch / f"service@{name}",
        limits=Limits(),
        walltime_s=0.0,
        grace_s=0.0,
        stop_wait_s=10.0,
        token=0,
        incarnation="",
    )


def container_of(message: Message) -> Container | None:
    """How it is to be contained; None for a plain process."""
    given = message.get("container")
    if given is None:
        return None
    if not isinstance(given, dict) or not isinstance(given.get("config"), dict):
        raise BadMessage("container must be an object with a config")
    program, lower, owner = text(given, "program"), texts(given, "lower"), given.get("owner")
    if not isinstance(owner, list) or len(owner) != 2 or not all(_is_id(number) for number in owner):
        raise BadMessage("container's owner must be the numbers of a user and a group")
    sources = texts(given, "sources") if "sources" in given else []
    if len(sources) > SOURCES_MAX or not all(map(_is_absolute, sources)):
        raise Refused("bad-request", f"container may have {SOURCES_MAX} sources of mounts, all absolute paths")
    if not 1 <= len(lower) <= LOWER_MAX or not all(_is_absolute(path) for path in (program, *lower)):
        raise Refused("bad-request", f"container needs a program and 1 to {LOWER_MAX} folders, all absolute paths")
    return Container(
        program=program,
        config=given["config"],
        lower=lower,
        writable=given.get("writable") is True,
        owner=(owner[0], owner[1]),
        sources=sources,
    )


def _is_absolute(path: str) -> bool:
    return path.startswith("/") and "\0" not in path


def _is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 32


def _open_files(message: Message) -> tuple[int, int] | None:
    given = message.get("open_files")
    if given is None:
        return None
    if not isinstance(given, list) or len(given) != 2 or not all(_is_id(number) for number in given):
        raise BadMessage("open_files must be a soft and a hard limit")
    if not 0 < given[0] <= given[1]:
        raise Refused("bad-request", "the soft limit of open files must not be above the hard one")
    return given[0], given[1]


def _folder(message: Message) -> str:
    cwd = text(message, "cwd", "")
    if cwd and (not cwd.startswith("/") or "\0" in cwd):
        raise Refused("bad-request", "cwd must be an absolute path")
    return cwd


def _secrets(message: Message) -> dict[str, bytes]:
    """Files by name; their content is never part of an error."""
    if "secrets" not in message:
        return {}
    given = text_map(message, "secrets")
    if len(given) > secretfiles.FILES_MAX:
        raise Refused("bad-request", f"at most {secretfiles.FILES_MAX} secrets")
    files = {}
    for name, data in given.items():
        if not FILE_NAME.match(name):
            raise Refused("bad-request", "a secret's file has a name that no file may have")
        try:
            files[name] = base64.b64decode(data.encode("ascii"), validate=True)
        except ValueError:
            raise Refused("bad-request", f"the secret {name} is not in base64") from None
        if len(files[name]) > secretfiles.FILE_BYTES_MAX:
            raise Refused("bad-request", f"the secret {name} has more than {secretfiles.FILE_BYTES_MAX} bytes")
    return files


def describe(held: Held) -> dict[str, Any]:
    """As it is told of in answers."""
    return {
        "key": held.key,
        "token": held.token,
        "incarnation": held.incarnation,
        "started_ms": held.started_ms,
        "pid": held.outer_pid or held.pid,
        "exit": held.exit if held.phase is Phase.ENDED else None,
    }


def end_event(held: Held) -> Message:
    """What is told of its end, unasked."""
    if held.service:
        return {"event": "service-exited", "name": held.key, "started_ms": held.started_ms, "exit": held.exit}
    return {"event": "exited", "key": held.key, "exit": held.exit}
