"""etcd's snapshots: taken as a stream, kept as a file, checked, and made into a member's data directory.

A snapshot is a member's database as of one revision, with its SHA-256 behind it: what ``etcdctl snapshot save`` writes.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import os
import shutil
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import grpc

from spinetta.errors import StoreUnavailable, UserError
from spinetta.store import wire
from spinetta.store.connection import REQUIRE_LEADER, Connections
from spinetta.store.failures import GONE, cancelled_ourselves
from spinetta.store.process import Version, etcd_env, parse_version

HASH_BYTES = hashlib.sha256().digest_size
SECTOR_BYTES = 512  # a database is a multiple of this; what is behind the last one is the hash
READ_BYTES = 1 << 20
STALL_S = 60.0  # between two pieces: a member that reads from a slow disk under load
PICK_S = 5.0
TOOL_START_S, TOOL_BYTES_PER_S = 60.0, 5 << 20  # a limit for the tool: generously, by what there is to write
END_S = 5.0


@dataclass(frozen=True, slots=True)
class Piece:
    """Part of a snapshot. `remaining_bytes`: after this one, about."""

    data: bytes
    remaining_bytes: int


@dataclass(frozen=True, slots=True)
class SnapshotFile:
    """A snapshot that is whole. `sha256` is of the database, without the hash behind it; `file_bytes` with it."""

    path: Path
    file_bytes: int
    sha256: str


async def stream(connections: Connections) -> AsyncGenerator[Piece, None]:
    """A snapshot of one member, which must not be behind: it has asked its leader just before.

    Raises:
        StoreUnavailable: no member answers, or it stopped in the middle. What came before is then worth nothing.
    """
    connection = await connections.pick(PICK_S)
    # Without bound on the whole, but on each step: it may be gigabytes. Endless: new certificates need not wait.
    with connection.use(endless=True) as stubs:
        call = None
        try:
            probe = wire.range_request(wire.ALL_KEYS, b"", keys_only=True)
            await stubs.kv.Range(probe, timeout=PICK_S, metadata=REQUIRE_LEADER)
            call = stubs.maintenance.Snapshot(wire.snapshot_request())
            while True:
                async with asyncio.timeout(STALL_S):
                    message = await call.read()
                if message is grpc.aio.EOF:
                    return
                yield Piece(message.blob, message.remaining_bytes)
        except grpc.aio.AioRpcError as error:
            raise StoreUnavailable(f"{connection.endpoint}: no snapshot: {error.details()}") from error
        except TimeoutError:
            raise StoreUnavailable(f"{connection.endpoint}: the snapshot stopped for {STALL_S:g} s") from None
        except GONE as error:
            if cancelled_ourselves():
                raise
            raise StoreUnavailable(f"{connection.endpoint}: no snapshot: the connection was closed") from error
        finally:
            if call is not None:
                call.cancel()


class SnapshotWriter:
    """Writes a snapshot's pieces into a file that appears under its name only when it is whole and on the disk.

    Used as a context: whatever ends it before `finish`, nothing is left behind. Its calls block.

    Args:
        path: must not exist. Readable for its owner alone: it holds everything.

    Raises:
        UserError: the file is there already, or cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.written_bytes = 0
        self._temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
        self._hash = hashlib.sha256()
        self._tail = b""
        self._fd: int | None = None

    def __enter__(self) -> Self:
        if self.path.exists():
            raise UserError(
                f"{self.path} is there already", field="file", hint="name another file", reason="already-exists"
            )
        try:
            with contextlib.suppress(FileNotFoundError):
                self._temporary.unlink()  # of a process that had our number and was killed
            self._fd = os.open(self._temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise _cannot(self.path, error) from error
        return self

    def write(self, data: bytes) -> None:
        """Append a piece."""
        assert self._fd is not None  # noqa: S101 - used as a context
        try:
            left = memoryview(data)
            while left:
                left = left[os.write(self._fd, left) :]
        except OSError as error:
            raise _cannot(self.path, error) from error
        self.written_bytes += len(data)
        held = self._tail + data
        self._hash.update(held[:-HASH_BYTES])
        self._tail = held[-HASH_BYTES:]

    def finish(self) -> SnapshotFile:
        """See that it is whole, and give it its name.

        Raises:
            StoreUnavailable: it is not what the member meant to send.
        """
        assert self._fd is not None  # noqa: S101 - used as a context
        if self.written_bytes % SECTOR_BYTES != HASH_BYTES or self._hash.digest() != self._tail:
            raise StoreUnavailable("the snapshot arrived damaged: its hash is another; try again")
        try:
            os.fsync(self._fd)
            self._take_name()
            fsync_folder(self.path.parent)
        except FileExistsError:
            raise UserError(f"{self.path} has appeared meanwhile", field="file", reason="already-exists") from None
        except OSError as error:
            raise _cannot(self.path, error) from error
        return SnapshotFile(self.path, self.written_bytes, self._hash.hexdigest())

    def _take_name(self) -> None:
        try:
            os.link(self._temporary, self.path)  # not a rename: whoever was faster must not lose his file
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.EOPNOTSUPP):  # file systems without such links
                raise
            self._temporary.rename(self.path)
        else:
            self._temporary.unlink()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None
        with contextlib.suppress(OSError):
            self._temporary.unlink()


def fsync_folder(folder: Path) -> None:
    """Make names in a directory survive a power cut."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _cannot(path: Path, error: OSError) -> UserError:
    hint = (
        "name a file on a disk with room"
        if error.errno in (errno.ENOSPC, errno.EDQUOT)
        else "name a file that you may write"
    )
    return UserError(f"{path} cannot be written: {error.strerror}", field="file", hint=hint, reason="disk")


def verify(path: Path) -> SnapshotFile:
    """Read a snapshot wholly and compare its hash. Blocks.

    Raises:
        UserError: it cannot be read, or is no snapshot, or not whole, or altered.
    """
    digest, tail = hashlib.sha256(), b""
    try:
        with path.open("rb") as file:
            file_bytes = os.fstat(file.fileno()).st_size
            while data := file.read(READ_BYTES):
                held = tail + data
                digest.update(held[:-HASH_BYTES])
                tail = held[-HASH_BYTES:]
    except OSError as error:
        raise UserError(
            f"{path} cannot be read: {error.strerror}", field="file", hint="check the name and its permissions"
        ) from error
    if file_bytes % SECTOR_BYTES != HASH_BYTES or file_bytes < SECTOR_BYTES:
        raise UserError(
            f"{path} is not a snapshot of etcd, or has been cut short ({file_bytes} bytes)",
            field="file",
            hint="use a file that `spinetta cluster backup` or `etcdctl snapshot save` has written, and all of it",
            reason="damaged-snapshot",
        )
    if digest.digest() != tail:
        raise UserError(
            f"{path} is damaged: it does not have the hash that it ends with",
            field="file",
            hint="copy it again, or use another backup",
            reason="damaged-snapshot",
        )
    return SnapshotFile(path, file_bytes, digest.hexdigest())


# --- restoring -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RestoreTool:
    """The program that makes a data directory from a snapshot: etcdutl where there is one, else etcdctl."""

    program: str
    version: Version


async def find_tool(etcd_program: str, etcd_version: Version) -> RestoreTool:
    """The tool that came with this etcd.

    Raises:
        UserError: there is none, or only one of another version: data directories differ between versions.
    """
    beside = Path(shutil.which(etcd_program) or etcd_program).parent
    found: list[str] = []
    for name in ("etcdutl", "etcdctl"):
        for each in (shutil.which(name, path=str(beside)), shutil.which(name)):
            if each is not None and each not in found:
                found.append(each)
    wrong = []
    for program in found:
        code, text = await _run([program, "version"], 10.0)
        if code:
            continue
        words = text.replace("etcdutl version:", "").replace("etcdctl version:", "").strip()
        try:
            version = parse_version(words)
        except UserError:
            continue
        if version[:2] == etcd_version[:2]:
            return RestoreTool(program, version)
        wrong.append(f"{program} is {'.'.join(map(str, version))}")
    name = ".".join(map(str, etcd_version))
    raise UserError(
        f"to make data from a snapshot for etcd {name} takes its etcdctl or etcdutl"
        + (f", but {'; '.join(wrong)}" if wrong else ", and there is none"),
        hint="on Debian: apt install etcd-client; elsewhere put it beside etcd",
        reason="no-etcdctl",
    )


async def restore(
    tool: RestoreTool, file: Path, data_dir: Path, *, name: str, peer_url: str, token: str, hashed: bool = True
) -> None:
    """Make the data directory of a one-member cluster; it must not exist. What fails leaves a part of it behind.

    Args:
        token: decides, with name and URL, the ids of cluster and member: a new one, a new cluster.
        hashed: the file ends with its hash; False for a member's database itself.

    Raises:
        UserError: the tool refuses.
    """
    argv = [
        tool.program,
        "snapshot",
        "restore",
        str(file),
        f"--data-dir={data_dir}",
        f"--name={name}",
        f"--initial-cluster={name}={peer_url}",
        f"--initial-advertise-peer-urls={peer_url}",
        f"--initial-cluster-token={token}",
        *([] if hashed else ["--skip-hash-check=true"]),
    ]
    size = await asyncio.to_thread(file.stat)
    limit_s = TOOL_START_S + size.st_size / TOOL_BYTES_PER_S
    code, text = await _run(argv, limit_s)
    if code:
        last = text.strip().splitlines()[-1:] or ["it said nothing"]
        full = "no space" in text
        raise UserError(
            f"{Path(tool.program).name} cannot make data of {file}: {last[0][:300]}",
            field="file",
            hint="make room, or name a --data-dir on another disk" if full else "use another backup",
            reason="disk" if full else "damaged-snapshot",
        )


async def _run(argv: list[str], limit_s: float) -> tuple[int, str]:
    env = {**etcd_env(os.environ.get("PATH", "/usr/bin:/bin")), "ETCDCTL_API": "3"}
    process = await asyncio.create_subprocess_exec(
        *argv,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env=env,
    )
    try:
        async with asyncio.timeout(limit_s):
            output, _ = await process.communicate()
    except TimeoutError:
        return 1, f"it did not end within {limit_s:g} s"
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return process.returncode or 0, output.decode(errors="replace")
