"""Errands for the worker: started, listened to, ended with all that they have started."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from spinetta.errors import Denied, InvariantViolation, NotFound, RuntimeUnavailable, UserError

LINE_BYTES_MAX = 16 << 20  # the result carries the image's configuration, 4 MiB at most, escaped
SAID_LINES_MAX = 40  # of what a worker says when it fails in a way nobody thought of
TRANSIENT = frozenset({"no-space", "registry-unreachable", "stalled", "too-slow"})
"""Reasons for which another try, or another node, may succeed."""


@dataclass(frozen=True, slots=True)
class Step:
    """How far something is: ``wait``, ``look``, ``fetch``, ``check``, ``unpack``, ``list``, ``sync``, ``verify``.

    Attributes:
        total: bytes that `done` will come to; 0: not known.
    """

    phase: str
    done: int = 0
    total: int = 0


Tell = Callable[[Step], None]


async def run(errand: str, told: Mapping[str, Any], *, limit_s: float, tell: Tell = lambda _: None) -> dict[str, Any]:
    """Have an errand done in a process of its own; its result.

    Cancelled, or when the time is over, the process and all that it started are killed before this returns.

    Raises:
        UserError: it was refused, with the worker's reason; `NotFound` when something is not there, `Denied` when a
            registry does not let us in.
        RuntimeUnavailable: the process could not be started, or was killed by somebody.
    """
    try:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-P",
            "-m",
            "spinetta.runtime.images.worker",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,
            limit=LINE_BYTES_MAX,
        )
    except OSError as e:
        raise RuntimeUnavailable(f"no process for images can be started: {e.strerror}") from e
    try:
        async with asyncio.timeout(limit_s):
            return await _listen(process, {"errand": errand, "parent": os.getpid(), **told}, tell)
    except TimeoutError:
        raise UserError(
            f"it took longer than {limit_s:g} s", reason="too-slow", hint="see to the network and the disk of the node"
        ) from None
    finally:
        await _end(process)


async def _listen(process: asyncio.subprocess.Process, told: Mapping[str, Any], tell: Tell) -> dict[str, Any]:
    if process.stdin is None or process.stdout is None:
        raise InvariantViolation("pipes that were asked for are not there")
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # what it says instead comes below
        process.stdin.write(json.dumps(told).encode() + b"\n")
        await process.stdin.drain()
    process.stdin.close()
    said: deque[str] = deque(maxlen=SAID_LINES_MAX)
    while line := await process.stdout.readline():
        match _document(line):
            case {"result": dict(result)}:
                return result
            case {"refused": {"message": str(message), "reason": str(reason), "hint": str(hint)}}:
                raise refused(message, reason, hint)
            case {"phase": str(phase), "bytes": int(done), "total": int(total)}:
                tell(Step(phase, done, total))
            case _:
                said.append(line.decode(errors="replace").rstrip())
    code = await process.wait()
    if code < 0 and not said:
        raise RuntimeUnavailable(f"the process for an image was killed by signal {-code}")
    raise InvariantViolation(f"the process for an image ended with {code}: " + "\n".join(said))


def _document(line: bytes) -> object:
    try:
        return json.loads(line)
    except ValueError:
        return None


def refused(message: str, reason: str, hint: str) -> UserError:
    """The worker's refusal as an error of ours."""
    match reason:
        case "not-found":
            return NotFound(message, field="image", hint=hint)
        case "registry-denied":
            return Denied(message, field="image", hint=hint, reason=reason)
        case _:
            return UserError(message, field="image", hint=hint, reason=reason)


async def _end(process: asyncio.subprocess.Process) -> None:
    """Kill the group: what the worker has started is in it."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    # To the end of its output, or the pipe is reported as left open. Its children may hold it for a moment longer.
    if process.stdout is not None:
        while await process.stdout.read(1 << 16):
            pass
    await process.wait()
