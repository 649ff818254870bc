"""Programs that change networks: CNI plugins, ip and nft, each with a limit of time and of what it may say."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import signal
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spinetta import cni
from spinetta.errors import UserError
from spinetta.runtime.detect import USUAL_PATH, find_program

COMMAND_S = 20.0  # each takes some hundredths of a second, and a hundred times that on a busy machine
OUTPUT_BYTES_MAX = 1 << 20  # the routes of a machine; a plugin's result has 500 bytes
AT_ONCE = 8  # each is a process or two that take the kernel's one lock for networks
LOCK_S = 30.0  # longer than any command of another takes
LOOK_AGAIN_S = 0.02


class CommandFailed(Exception):
    """A program failed, or did not end in time; in words."""


@dataclass(frozen=True, slots=True)
class Done:
    """What came of a program."""

    code: int
    out: bytes
    err: str


class Commands:
    """Runs programs, for one node.

    Args:
        lock: a file that is locked by each of them: one that outlives a killed daemon is waited for by the next.
        prefix: put before each, to have them in another network namespace.

    Attributes:
        cut: the name of the last that was killed before its end; empty: none was.
    """

    def __init__(self, lock: Path, prefix: Sequence[str] = ()) -> None:
        self._lock = lock
        self._prefix = tuple(prefix)
        self._room = asyncio.Semaphore(AT_ONCE)
        self.cut = ""

    async def run(self, argv: Sequence[str], *, data: bytes = b"", env: Mapping[str, str] | None = None) -> Done:
        """Run one to its end, within `COMMAND_S`. Cancelled, it is killed with all that it started.

        Raises:
            CommandFailed: it is not there, or has not ended in time.
        """
        name = Path(argv[0]).name
        async with self._room:
            try:
                with self._held() as held:
                    process = await asyncio.create_subprocess_exec(
                        *self._prefix,
                        *argv,
                        stdin=asyncio.subprocess.PIPE,
                        stdout=asyncio.subprocess.PIPE,
                        stderr=asyncio.subprocess.PIPE,
                        env={"PATH": USUAL_PATH, "LANG": "C.UTF-8", **(env or {})},
                        start_new_session=True,
                        pass_fds=(held,),
                    )
            except OSError as error:
                raise CommandFailed(f"{name}: {error.strerror}") from None
            try:
                async with asyncio.timeout(COMMAND_S):
                    return await _outcome(process, data)
            except TimeoutError:
                raise CommandFailed(f"{name} did not end within {COMMAND_S:g} s") from None
            finally:
                if process.returncode is None:
                    self.cut = name
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGKILL)
                    await process.wait()

    @contextlib.contextmanager
    def _held(self) -> Iterator[int]:
        held = os.open(self._lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(held, fcntl.LOCK_SH | fcntl.LOCK_NB)
            yield held
        finally:
            os.close(held)

    async def settled(self) -> None:
        """Wait until no program of an earlier daemon runs any more. CommandFailed: one does not end."""
        async with locked(self._lock, "a program that an earlier daemon started has not ended"):
            pass

    async def well(self, argv: Sequence[str], *, data: bytes = b"") -> bytes:
        """What one printed. CommandFailed: it failed."""
        done = await self.run(argv, data=data)
        if done.code != 0:
            last = done.err.strip().splitlines()
            raise CommandFailed(f"{Path(argv[0]).name}: {last[0][:300] if last else f'ended with {done.code}'}")
        return done.out

    async def json(self, argv: Sequence[str]) -> Any:
        """What one printed, as JSON. CommandFailed: it failed or printed something else."""
        out = await self.well(argv)
        try:
            return json.loads(out or b"[]")
        except ValueError:
            raise CommandFailed(f"{Path(argv[0]).name}: printed no JSON") from None

    async def plugin(
        self, command: str, config: Mapping[str, object], *, key: str, netns: Path | None, folder: str
    ) -> dict[str, Any]:
        """Call the plugin of a network.

        Raises:
            cni.PluginError: it refused.
            CommandFailed: it is not there, or has not ended in time.
        """
        program = f"{folder}/{config['type']}"
        given = cni.variables(command, key, str(netns) if netns is not None else "", folder)
        done = await self.run([program], data=json.dumps(config).encode(), env=given)
        return cni.answered(done.out, done.code, done.err)


@asynccontextmanager
async def locked(path: Path, trouble: str) -> AsyncIterator[None]:
    """Hold the lock of a file. CommandFailed: somebody else does, for too long."""
    held = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            async with asyncio.timeout(LOCK_S):
                while True:
                    try:
                        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        break
                    except BlockingIOError:
                        await asyncio.sleep(LOOK_AGAIN_S)
        except TimeoutError:
            raise CommandFailed(f"{trouble} within {LOCK_S:g} s") from None
        yield
    finally:
        os.close(held)


def plugins_folder() -> str:
    """Where the plugins are. Raises `UserError`: they are not installed."""
    for folder in cni.FOLDERS:
        if all(os.access(f"{folder}/{name}", os.X_OK) for name in cni.PLUGINS):
            return folder
    raise UserError(
        f"there are no CNI plugins {' and '.join(cni.PLUGINS)} in {' or '.join(cni.FOLDERS)}",
        hint="apt install containernetworking-plugins",
    )


def tools() -> dict[str, str]:
    """Where ip, nft and unshare are. Raises `UserError`: one is not installed."""
    packages = {"ip": "iproute2", "nft": "nftables", "unshare": "util-linux", "mount": "mount"}
    found = {name: find_program(name) for name in packages}
    if lacking := [name for name, path in found.items() if not path]:
        raise UserError(
            f"there is no {' and no '.join(lacking)}",
            hint=f"apt install {' '.join(packages[name] for name in lacking)}",
        )
    return found


async def _outcome(process: asyncio.subprocess.Process, data: bytes) -> Done:
    assert process.stdin is not None and process.stdout is not None and process.stderr is not None  # noqa: S101, PT018
    async with asyncio.TaskGroup() as tasks:
        out, err = (tasks.create_task(_all_of(stream)) for stream in (process.stdout, process.stderr))
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it did not want to know; its code tells
            process.stdin.write(data)
            await process.stdin.drain()
        process.stdin.close()
    return Done(await process.wait(), out.result(), err.result().decode(errors="replace"))


async def _all_of(stream: asyncio.StreamReader) -> bytes:
    """All that comes, as much as counts of it: what is more is read and thrown away."""
    kept = bytearray()
    while chunk := await stream.read(1 << 16):
        kept += chunk[: OUTPUT_BYTES_MAX - len(kept)]
    return bytes(kept)
