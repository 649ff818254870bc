"""``spinetta cp``: files out of a task's scratch space."""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import queue
import sys
import tarfile
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING

import click

from spinetta.cli import exits, output
from spinetta.cli.base import client_options, json_option, with_client
from spinetta.errors import OutcomeUnknown, StoreUnavailable, UserError

if TYPE_CHECKING:
    from spinetta.client.aio import AsyncClient
    from spinetta.client.execs import CopiedEntry, CopySkipped

SHOW_EVERY_S = 0.2
AHEAD = 8  # pieces of an archive that wait to be unpacked
NAMES_SHOWN = 5


@click.command("cp", epilog=exits.HELP)
@click.argument("source", metavar="ID:PATH")
@click.argument("target", metavar="LOCAL")
@click.option("--attempt", metavar="N", type=click.IntRange(1), help="Which; default: the latest.")
@click.option("--quiet", "-q", is_flag=True, help="Show no progress.")
@json_option
@client_options
def copy(
    source: str,
    target: str,
    attempt: int | None,
    quiet: bool,
    as_json: bool,
    node: str | None,
    timeout: str | None,
    config_file: str | None,
) -> None:
    """Copy a file or directory out of a task's scratch space, while it runs or as long as it is kept.

    PATH is relative to the scratch space, "." all of it. Into a LOCAL directory that exists it goes under its own name.
    With - for LOCAL a file is written to standard output, of a directory a tar archive.

    A scratch space is removed when its attempt ends, unless the task was submitted with --keep-scratch TIME.

    \b
    Examples:
      spinetta cp ID:result.csv .
      spinetta cp ID:plots/ plots
      spinetta cp ID:. - | tar -tv
    """
    task_id, colon, path = source.partition(":")
    if not colon or not task_id:
        hint = "ID:PATH, e.g. 0190b6d3:result.csv"
        if ":" in target:
            hint += f"; into a task: spinetta exec -i {target.partition(':')[0]} -- sh -c 'cat > FILE' < {source}"
        raise UserError(f"{source!r} names no task and file", field="source", hint=hint)
    if target == "-" and as_json:
        raise UserError("--json and standard output as target", field="json", hint="give a LOCAL file")
    shows = sys.stderr.isatty() and not quiet and not as_json

    async def work(client: AsyncClient) -> _Copied:
        async with contextlib.aclosing(client.copy_out(task_id, path, attempt=attempt or 0)) as parts:
            with contextlib.closing(_Progress(shows)) as progress:
                return await _receive(parts, target, progress)

    copied = with_client(work, node, timeout, config_file)
    if as_json:
        document = {"path": copied.path, "bytes": copied.bytes, "node": copied.node, "attempt": copied.attempt}
        output.put_json({**document, "skipped": copied.skipped, "skipped_count": copied.skipped_count})
    elif copied.skipped_count:
        more = ", …" if copied.skipped_count > NAMES_SHOWN else ""
        names = ", ".join(output.printable(name) for name in copied.skipped[:NAMES_SHOWN])
        what = "neither files, directories nor links within it, or unreadable"
        output.tell(f"left out {copied.skipped_count} that are {what}: {names}{more}")


@dataclass
class _Copied:
    path: str
    node: str
    attempt: int
    bytes: int = 0
    skipped: list[str] = field(default_factory=list)
    skipped_count: int = 0

    def skip(self, names: tuple[str, ...], count: int) -> None:
        self.skipped += names
        self.skipped_count += count


class _Progress:
    """How much has come, on a terminal."""

    def __init__(self, shows: bool) -> None:
        self._shows = shows
        self._next_s = time.monotonic() + SHOW_EVERY_S
        self._shown = False

    def tell(self, done: int, whole: int) -> None:
        from spinetta.units import format_bytes

        if not self._shows or time.monotonic() < self._next_s:
            return
        self._next_s, self._shown = time.monotonic() + SHOW_EVERY_S, True
        of = f" of {format_bytes(whole)}" if whole else ""
        sys.stderr.write(f"\r\x1b[K{format_bytes(done)}{of}")
        sys.stderr.flush()

    def close(self) -> None:
        if self._shown:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()


async def _receive(
    parts: AsyncIterator[CopiedEntry | bytes | CopySkipped], target: str, progress: _Progress
) -> _Copied:
    from spinetta.client.execs import CopiedEntry

    entry = await anext(aiter(parts), None)
    if not isinstance(entry, CopiedEntry):
        raise StoreUnavailable("the node ended the call without an answer")
    copied = _Copied(target, entry.node, entry.attempt)
    data = _data(parts, entry, copied, progress)
    try:
        if target == "-":
            async for piece in data:
                sys.stdout.buffer.write(piece)
            sys.stdout.buffer.flush()
        elif entry.is_directory:
            await _unpack(data, Path(target), entry, copied)
        else:
            await _write(data, Path(target), entry, copied)
    except BrokenPipeError:
        raise
    except OSError as e:
        where = "standard output" if target == "-" else e.filename if entry.is_directory else copied.path
        part = "; what is there is only a part" if entry.is_directory and copied.bytes else ""
        words = f"{where or target} cannot be written: {e.strerror}{part}"
        raise UserError(words, field="target", hint="give another LOCAL") from e
    except StoreUnavailable as e:
        raise OutcomeUnknown(f"only a part was copied: {e}", hint="copy it again") from e
    return copied


async def _data(
    parts: AsyncIterator[CopiedEntry | bytes | CopySkipped], entry: CopiedEntry, copied: _Copied, progress: _Progress
) -> AsyncIterator[bytes]:
    from spinetta.client.execs import CopySkipped

    async for part in parts:
        if isinstance(part, bytes):
            copied.bytes += len(part)
            progress.tell(copied.bytes, entry.size_bytes)
            yield part
        elif isinstance(part, CopySkipped):
            copied.skip(part.names, part.count)


async def _write(data: AsyncIterator[bytes], target: Path, entry: CopiedEntry, copied: _Copied) -> None:
    with _opened(target, entry, copied) as out:
        async for piece in data:
            out.write(piece)


@contextlib.contextmanager
def _opened(target: Path, entry: CopiedEntry, copied: _Copied) -> Iterator[IO[bytes]]:
    """A file to write to; it appears under its name once it is whole."""
    if target.is_dir():
        target /= _own_name(entry)
    copied.path = str(target)
    if target.exists() and not target.is_file():  # such as /dev/null
        with target.open("wb") as out:
            yield out
        return
    with tempfile.NamedTemporaryFile(dir=target.parent, prefix=f".{target.name}.", delete=False) as part:
        try:
            yield part.file
            part.flush()
            os.fchmod(part.fileno(), entry.mode & 0o777 & ~_umask())
            os.utime(part.name, (entry.modified_ms / 1000, entry.modified_ms / 1000))
            Path(part.name).replace(target)
        except BaseException:
            Path(part.name).unlink(missing_ok=True)
            raise


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _own_name(entry: CopiedEntry) -> str:
    """A name that is one: what a node says is not to lead elsewhere."""
    name = Path(entry.name).name
    return name if name == entry.name and name not in ("", "..") else f"{entry.task}.{entry.attempt}"


class _Feed(io.RawIOBase):
    """An archive as it comes, for a thread that reads it."""

    def __init__(self) -> None:
        self.pieces: queue.Queue[bytes] = queue.Queue(AHEAD)
        self._left = b""
        self._over = False

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1, /) -> bytes:
        while not self._left and not self._over:
            self._left = self.pieces.get()
            self._over = not self._left
        data, self._left = (self._left, b"") if size < 0 else (self._left[:size], self._left[size:])
        return data


async def _unpack(data: AsyncIterator[bytes], target: Path, entry: CopiedEntry, copied: _Copied) -> None:
    """A directory, under its own name if `target` is there already; all of a scratch space goes into it as it is."""
    if not hasattr(tarfile, "data_filter"):
        raise UserError(
            "this Python cannot unpack archives safely",
            field="target",
            hint="3.11.4 can; or take the archive: spinetta cp ID:PATH - > FILE.tar",
        )
    target = _made(target, entry)
    copied.path = str(target)
    feed = _Feed()
    working = asyncio.ensure_future(asyncio.to_thread(_extract, feed, target, copied))
    try:
        async for piece in data:
            while not working.done():
                try:
                    feed.pieces.put_nowait(piece)
                    break
                except queue.Full:
                    await asyncio.wait([working], timeout=0.005)
    finally:
        while not working.done():
            with contextlib.suppress(queue.Full):
                feed.pieces.put_nowait(b"")
            await asyncio.wait([working], timeout=0.005)
        working.exception()  # looked at: where what comes breaks off, that is told, and not what came of it
    working.result()


def _made(target: Path, entry: CopiedEntry) -> Path:
    if target.is_dir() and entry.name:
        target /= _own_name(entry)
    target.mkdir(exist_ok=True)
    return target


def _extract(feed: _Feed, target: Path, copied: _Copied) -> None:
    """What would land outside of `target`, or is no file, directory or link, is left out."""
    try:
        with tarfile.open(fileobj=feed, mode="r|") as archive:
            for member in archive:
                try:
                    archive.extract(member, target, filter="data")
                except tarfile.FilterError:
                    copied.skip((member.name,), 1)
    except tarfile.TarError as e:
        raise OutcomeUnknown(f"only a part was copied: {e}", hint="copy it again") from e
