"""Exec: a command beside a task that runs, on the node that holds it, for as long as its caller listens."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from google.protobuf.message import DecodeError

from spinetta import validate
from spinetta.errors import Busy, RuntimeUnavailable, UserError
from spinetta.events import attempt_key
from spinetta.model import State
from spinetta.node.hub import closing
from spinetta.node.port import NodePort
from spinetta.node.services import limits
from spinetta.node.services.desk import Asked
from spinetta.node.services.errors import busy
from spinetta.node.services.forwarding import asked_of_holder, check_passed_on
from spinetta.node.services.holder import Found, find
from spinetta.node.services.peers import FORWARDED, Peers
from spinetta.rights import Call, CallerKind
from spinetta.runtime.execs import Command, Ended, NotRunning, Output, Size, open_command
from spinetta.v1 import api_pb2 as api

SIGNAL_MAX = 64


class Execute:
    """Runs commands beside tasks."""

    def __init__(self, port: NodePort, peers: Peers) -> None:
        self._port = port
        self._peers = peers
        self._open = 0

    async def exec(self, requests: AsyncIterator[api.ExecRequest], asked: Asked) -> AsyncIterator[api.ExecResponse]:
        """Start what the first request says; then its output, and at last how it ended.

        Raises:
            Denied: the task is not the caller's, or carries labels that the caller lacks, or is given secrets that are
                not the caller's to handle.
            AskElsewhere: its labels are not this node's to handle, or this node is a worker and does not have it.
            NotFound: no such task.
            UserError: it does not run, the command cannot be started, or the node that holds it does not answer.
            Busy: too many run.
            RuntimeUnavailable: the shim does not answer, or has died.
        """
        check_passed_on(asked, local_only=True)  # before anything is read
        start = await _first(requests)
        if self._open >= limits.EXECS_MAX:
            raise busy("commands beside tasks", limits.EXECS_MAX)
        self._open += 1
        try:
            found = await find(self._port, self._peers, asked, start.id, local_only=start.local_only)
            spec = found.task.spec
            if spec.secrets and asked.caller.kind is not CallerKind.NODE:
                # It could read them: as with submitting in another's name, that is for who may handle them anyway.
                await asked.check(Call.SECRETS, owner=spec.owner)
            if found.task.state is not State.RUNNING:
                raise NotRunning(
                    f"task {spec.id} does not run: commands can be run beside running tasks only",
                    field="id",
                    hint=f"see: spinetta status {spec.id}",
                )
            items = self._local(found, start, requests) if found.peer is None else self._remote(found, start, requests)
            async with closing(items):
                async for item in items:
                    yield item
        finally:
            self._open -= 1

    async def _local(
        self, found: Found, start: api.ExecStart, requests: AsyncIterator[api.ExecRequest]
    ) -> AsyncIterator[api.ExecResponse]:
        task_id, number = found.task.spec.id, found.attempt.number
        key = attempt_key(task_id, number)
        async with open_command(
            self._port.holder_dir(key),
            key,
            list(start.command),
            env=dict(start.env),
            working_directory=start.working_directory,
            terminal=_size(start.size) if start.terminal else None,
            takes_input=start.takes_input,
        ) as command:
            yield api.ExecResponse(started=api.ExecStarted(id=task_id, attempt=number, node=self._port.name))
            feeding = asyncio.ensure_future(_feed(command, requests))
            try:
                async for item in command.outputs():
                    yield _response(item)
            finally:
                feeding.cancel()
                await asyncio.wait([feeding])

    async def _remote(
        self, found: Found, start: api.ExecStart, requests: AsyncIterator[api.ExecRequest]
    ) -> AsyncIterator[api.ExecResponse]:
        assert found.peer is not None  # noqa: S101 - see exec
        start.id, start.local_only = found.task.spec.id, True

        async def forward() -> AsyncIterator[api.ExecRequest]:
            yield api.ExecRequest(start=start)
            async for request in requests:
                yield request

        has_begun = False

        def so() -> str:
            return "; the command was ended, the task goes on" if has_begun else ""

        call = (await self._peers.stub(found.peer)).Exec(forward(), metadata=(FORWARDED,))
        try:
            with asked_of_holder(f"node {found.peer.name}", so):
                async for item in call:
                    has_begun = True
                    yield item
        finally:
            call.cancel()


async def _first(requests: AsyncIterator[api.ExecRequest]) -> api.ExecStart:
    try:
        async with asyncio.timeout(limits.REQUEST_S):
            request = await anext(aiter(requests))
    except StopAsyncIteration:
        raise UserError("the call has no request", field="request") from None
    except DecodeError:
        raise UserError("this is no request of this kind", field="request", hint="see the .proto files") from None
    except TimeoutError:
        raise Busy(f"the request has not arrived within {limits.REQUEST_S:g} s", retry_after_s=1.0) from None
    if request.WhichOneof("what") != "start":
        raise UserError("the first request says what to start", field="request", hint="see the .proto files")
    start = request.start
    validate.check_exec(start.command, start.env, start.working_directory)
    return start


async def _feed(command: Command, requests: AsyncIterator[api.ExecRequest]) -> None:
    """What the caller sends, as fast as it is taken."""
    with contextlib.suppress(RuntimeUnavailable):  # its end is told by the other side
        async for request in requests:
            match request.WhichOneof("what"):
                case "input":
                    await command.write(request.input)
                case "input_end":
                    command.end_input()
                case "resize":
                    await command.resize(_size(request.resize))
                case "signal" if 1 <= request.signal <= SIGNAL_MAX:
                    await command.signal(request.signal)


def _size(size: api.WindowSize) -> Size:
    return Size(size.rows or 24, size.columns or 80)


def _response(item: Output | Ended) -> api.ExecResponse:
    match item:
        case Output(data, is_error):
            return api.ExecResponse(errors=data) if is_error else api.ExecResponse(output=data)
        case Ended(code, signal, message):
            return api.ExecResponse(ended=api.ExecEnded(exit_code=code, signal=signal, message=message))
