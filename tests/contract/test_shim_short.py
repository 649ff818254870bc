"""A shim that has no descriptor left goes on with what it has, and with all else as soon as there is one."""

from __future__ import annotations

import asyncio
import contextlib
import json
import resource
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from spinetta.model import Reason
from spinetta.runtime.launch import open_socket
from spinetta.runtime.shim.wire import encode
from tests.contract.containers import rootfs, script
from tests.contract.shims import asynchronous, end_of, isolate, ran, runtime, shell, state_dir, until

pytestmark = pytest.mark.contract
_ = (isolate, rootfs, state_dir)  # fixtures
MIB = 1 << 20


@contextlib.contextmanager
def short_of_descriptors(pid: int, left: int) -> Iterator[None]:
    """A process may open so many more."""
    count = len(list(Path(f"/proc/{pid}/fd").iterdir()))
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (count + left, before[1]))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, before)


def cpu_ticks(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


@asynchronous
async def test_a_client_that_cannot_be_let_in_is_no_reason_to_spin(state_dir: Path, isolate: bool) -> None:
    log = state_dir / "shim.log"
    async with runtime(state_dir, isolate=isolate) as rt, contextlib.AsyncExitStack() as later:
        with short_of_descriptors(rt.shim_pid(), 0):
            sock = later.enter_context(await open_socket(state_dir))
            await until(lambda: "nobody can be let in now" in log.read_text())
            ticks = cpu_ticks(rt.shim_pid())
            for _round in range(20):  # two looks at least; what it has goes on
                assert list(await rt.held()) == []
                await asyncio.sleep(0.05)
            assert cpu_ticks(rt.shim_pid()) - ticks < 50, "half a second of processor time in one"
            assert log.read_text().count("let in") < 10
        sock.sendall(b"nonsense\n")
        sock.setblocking(True)
        sock.settimeout(30)
        assert b"bad-message" in await asyncio.to_thread(sock.recv, 1000)
        assert (await ran(rt, shell("a.1", "exit 3"))).exit_code == 3


@asynchronous
async def test_a_limit_counts_though_nobody_could_be_made_to_watch_at_once(state_dir: Path) -> None:
    async with runtime(state_dir) as rt:
        with short_of_descriptors(rt.shim_pid(), 3):  # to start with: a pipe and a pidfd
            fills = shell("a.1", "head -c 5000000 /dev/zero > big; exec sleep 1000", disk_bytes_max=MIB)
            assert await rt.start(fills) is None
        ended = await end_of(rt, "a.1")
        assert ended.reason is Reason.DISK_LIMIT, ended


@asynchronous
async def test_what_cannot_be_had_is_answered_and_what_came_behind_it_too(state_dir: Path, rootfs: Path) -> None:
    async with runtime(state_dir) as rt:
        assert await rt.start(script(state_dir, rootfs, "a.1", "sleep 1000")) is None
        with await open_socket(state_dir) as sock:
            sock.setblocking(True)
            sock.settimeout(10)
            asked = [
                {"id": 1, "op": "hello", "version": 2, "kill_margin_s": 1},
                {"id": 2, "op": "exec", "key": "a.1", "argv": ["true"], "env": {}},  # with a terminal that is none
                {"id": 3, "op": "services"},
            ]
            socket.send_fds(sock, [b"".join(map(encode, asked))], [sock.fileno()])
            with sock.makefile("rb") as answers:
                said = [json.loads(await asyncio.to_thread(answers.readline)) for _request in asked]
        assert [(one["id"], one.get("error", "")) for one in said] == [(1, ""), (2, "full"), (3, "")]
        assert "ioctl" in said[1]["message"], said
