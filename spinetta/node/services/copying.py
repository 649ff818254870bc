"""CopyOut: a file or directory of an attempt's scratch space, from the node that has it."""

from __future__ import annotations

import os
import stat
from collections.abc import AsyncIterator, Iterator
from pathlib import PurePosixPath

from spinetta.errors import NotFound, UserError
from spinetta.events import attempt_key
from spinetta.node import scratch
from spinetta.node.hub import closing
from spinetta.node.port import NodePort
from spinetta.node.services import limits
from spinetta.node.services.desk import Asked
from spinetta.node.services.errors import busy
from spinetta.node.services.forwarding import asked_of_holder
from spinetta.node.services.holder import Found, find
from spinetta.node.services.peers import FORWARDED, Peers
from spinetta.node.threads import in_thread
from spinetta.runtime.shim.bundle import WORK
from spinetta.v1 import api_pb2 as api

INSIDE = "/work"  # where a container sees its scratch space


class Copying:
    """Sends files out of scratch spaces."""

    def __init__(self, port: NodePort, peers: Peers) -> None:
        self._port = port
        self._peers = peers
        self._open = 0

    async def copy_out(self, request: api.CopyOutRequest, asked: Asked) -> AsyncIterator[api.CopyOutChunk]:
        """What it is, then its bytes.

        Raises:
            Denied: the task is not the caller's, or carries labels that the caller lacks.
            AskElsewhere: its labels are not this node's to handle, or this node is a worker and does not have it.
            NotFound: no such task, attempt or file, or its scratch space is no longer there.
            UserError: it has none, the file cannot be read, or the node that has it does not answer.
        """
        if self._open >= limits.COPIES_MAX:
            raise busy("copies of files", limits.COPIES_MAX)
        self._open += 1
        try:
            found = await find(
                self._port, self._peers, asked, request.id, attempt=request.attempt, local_only=request.local_only
            )
            items = self._local(found, request) if found.peer is None else self._remote(found, request)
            async with closing(items):
                async for item in items:
                    yield item
        finally:
            self._open -= 1

    async def _local(self, found: Found, request: api.CopyOutRequest) -> AsyncIterator[api.CopyOutChunk]:
        spec, number = found.task.spec, found.attempt.number
        if spec.working_directory and spec.container is None:
            raise UserError(
                f"task {spec.id} runs in a directory of its own choice, not in a scratch space",
                field="id",
                reason="unreadable",
                hint="while it runs: spinetta exec ID -- cat FILE",
            )
        path = _inside(request.path) if spec.container is not None else request.path
        fd = await in_thread(lambda: self._open_path(found, path))
        try:
            seen = os.fstat(fd)
            is_directory = stat.S_ISDIR(seen.st_mode)
            yield api.CopyOutChunk(
                entry=api.CopyOutEntry(
                    id=spec.id,
                    attempt=number,
                    node=self._port.name,
                    name=_last_part(path),
                    is_directory=is_directory,
                    size_bytes=0 if is_directory else seen.st_size,
                    mode=stat.S_IMODE(seen.st_mode),
                    modified_ms=seen.st_mtime_ns // 1_000_000,
                )
            )
            skipped = scratch.Skipped()
            parts = scratch.read_tree(fd, skipped) if is_directory else scratch.read_file(fd)
            try:
                while data := await in_thread(lambda: _gather(parts)):
                    yield api.CopyOutChunk(data=data)
            finally:
                await in_thread(parts.close)  # type: ignore[attr-defined] # a generator
            if skipped.count:
                yield api.CopyOutChunk(skipped=[_told(n) for n in skipped.names], skipped_count=skipped.count)
        except OSError as e:
            raise UserError(f"{request.path} cannot be read: {e.strerror}", field="path", reason="unreadable") from e
        finally:
            os.close(fd)

    def _open_path(self, found: Found, path: str) -> int:
        key = attempt_key(found.task.spec.id, found.attempt.number)
        running = self._port.holder_dir(key) / "scratch" / key / (WORK if found.task.spec.container is not None else "")
        for _ in range(2):  # it may be put aside between the two looks
            for folder in (running, scratch.kept_folder(self._port.shim_dir, key)):
                try:
                    if folder is not None:
                        return scratch.open_beneath(folder, path)
                except FileNotFoundError:
                    continue
        raise NotFound(
            f"attempt {found.attempt.number} of task {found.task.spec.id} has no scratch space any more",
            field="id",
            reason="no-scratch",
            hint="it is removed when an attempt ends, unless submitted with --keep-scratch TIME",
        )

    async def _remote(self, found: Found, request: api.CopyOutRequest) -> AsyncIterator[api.CopyOutChunk]:
        assert found.peer is not None  # noqa: S101 - see copy_out
        ask = api.CopyOutRequest(
            id=found.task.spec.id, path=request.path, attempt=found.attempt.number, local_only=True
        )
        call = (await self._peers.stub(found.peer)).CopyOut(ask, metadata=(FORWARDED,))
        try:
            with asked_of_holder(f"node {found.peer.name}, which has the files,"):
                async for item in call:
                    yield item
        finally:
            call.cancel()


def _inside(path: str) -> str:
    """A container's path as one within the scratch space."""
    if path == INSIDE or path.startswith(INSIDE + "/"):
        return path[len(INSIDE) :].lstrip("/")
    return path


def _last_part(path: str) -> str:
    name = PurePosixPath(path).name
    return "" if name == ".." else name


def _gather(parts: Iterator[bytes]) -> bytes:
    """Some of what comes: headers of small files together, so that each need not be sent alone."""
    data = b""
    for part in parts:
        data += part
        if len(data) >= scratch.READ_BYTES:
            break
    return data


def _told(name: str) -> str:
    return os.fsencode(name).decode(errors="backslashreplace")
