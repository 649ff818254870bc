"""The shim's socket, spoken to by hand: what is malformed, too much, too slow or not allowed."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from spinetta.errors import RuntimeUnavailable
from spinetta.runtime.client import ShimClient
from spinetta.runtime.shim.wire import CONNECTIONS_MAX, MESSAGE_BYTES_MAX, OUTPUT_BYTES_MAX
from tests.contract.shims import asynchronous, launch, ran, runtime, state_dir

pytestmark = pytest.mark.contract
_ = state_dir  # fixture
HELLO = {"id": 1, "op": "hello", "version": 1}


@contextmanager
def connected(state_dir: Path, *messages: Any) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(20)
        sock.connect(str(state_dir / "shim.sock"))
        for message in messages:
            sock.sendall(json.dumps(message).encode() + b"\n")
        yield sock


def answers(sock: socket.socket) -> list[dict[str, Any]]:
    """All until the other side closes."""
    sock.shutdown(socket.SHUT_WR)
    data = b""
    try:
        while chunk := sock.recv(1 << 16):
            data += chunk
    except ConnectionResetError:
        pass
    return [json.loads(line) for line in data.splitlines()]


MALFORMED: dict[str, bytes] = {
    "not JSON": b"hello\n",
    "not an object": b"[1]\n",
    "no id": b'{"op":"hello","version":1}\n',
    "id of another type": b'{"id":"1","op":"hello","version":1}\n',
    "id below zero": b'{"id":-1,"op":"hello","version":1}\n',
    "id is true": b'{"id":true,"op":"hello","version":1}\n',
    "no op": b'{"id":1}\n',
    "no version": b'{"id":1,"op":"hello"}\n',
    "not greeted": b'{"id":1,"op":"held"}\n',
    "deep": b"[" * 100_000 + b"\n",
    "binary": bytes(range(256)) + b"\n",
    "too long": b" " * (MESSAGE_BYTES_MAX + 1) + b"\n",
    "endless": b"x" * (MESSAGE_BYTES_MAX + 1),
    "not a number": json.dumps(HELLO).encode() + b'\n{"id":2,"op":"renew","renewed_at_s":NaN}\n',
    "key": json.dumps(HELLO).encode() + b'\n{"id":2,"op":"forget","key":"../../etc"}\n',
    "argv": json.dumps(HELLO).encode() + b'\n{"id":2,"op":"start","key":"a","argv":"ls","env":{},"grace_s":9}\n',
    "env": json.dumps(HELLO).encode() + b'\n{"id":2,"op":"start","key":"a","argv":["ls"],"env":{"a":1},"grace_s":9}\n',
    **{
        f"container {number}": json.dumps(HELLO).encode()
        + b'\n{"id":2,"op":"start","key":"a","argv":["ls"],"env":{},"grace_s":9,"container":%s}\n' % container
        for number, container in enumerate(
            (
                b"1",
                b"{}",
                b'{"program":"/r","config":[],"lower":["/l"],"owner":[1,1]}',
                b'{"program":"/r","config":{},"lower":"/l","owner":[1,1]}',
                b'{"program":"/r","config":{},"lower":["/l"],"owner":[-1,1]}',
                b'{"program":"/r","config":{},"lower":["/l"],"owner":[1]}',
                b'{"program":1,"config":{},"lower":["/l"],"owner":[1,1]}',
            )
        )
    },
    "limit": json.dumps(HELLO).encode()
    + b'\n{"id":2,"op":"start","key":"a","argv":["ls"],"env":{},"grace_s":9,"memory_bytes":1e400}\n',
}


@asynchronous
async def test_malformed_messages_close_their_connection_only(state_dir: Path) -> None:
    async with runtime(state_dir) as rt:
        for name, data in MALFORMED.items():
            with connected(state_dir) as sock:
                try:
                    sock.sendall(data)
                except (BrokenPipeError, ConnectionResetError):
                    continue  # cut before it had said all
                got = answers(sock)
                assert not got or got[-1]["error"] == "bad-message", name
        assert (await ran(rt, launch("after.1", "true"))).exit_code == 0
        assert [held.key for held in await rt.held()] == ["after.1"]


@asynchronous
async def test_refusals_keep_the_connection(state_dir: Path) -> None:
    requests = [
        HELLO,
        {"id": 2, "op": "fly"},
        {"id": 3, "op": "stop", "key": "a.1", "why": "boredom"},
        {"id": 4, "op": "start", "key": "a.1", "argv": ["ls"], "env": {}, "cwd": "relative", "grace_s": 5},
        {"id": 5, "op": "start_service", "key": "s", "argv": ["ls"], "env": {}, "log_path": "relative"},
        {"id": 6, "op": "shutdown", "why": "boredom"},
        {"id": 7, "op": "held"},
    ]
    async with runtime(state_dir):
        with connected(state_dir, *requests) as sock:
            got = answers(sock)
    assert [answer.get("error", "ok") for answer in got] == [
        "ok",
        "unknown-operation",
        "bad-request",
        "bad-request",
        "bad-request",
        "bad-request",
        "ok",
    ]


@asynchronous
async def test_what_an_earlier_daemon_asked_for_is_heard_before_the_next_one_is_answered(state_dir: Path) -> None:
    """It died, its requests wait in the socket, and the shim was not run for a while."""
    starts = [
        {"id": n, "op": "start", "key": f"late.{n}", "argv": ["true"], "env": {"PAD": "x" * 40_000}, "grace_s": None}
        for n in range(2, 8)
    ]
    async with runtime(state_dir) as rt:
        shim = rt.shim_pid()
        with connected(state_dir, HELLO) as earlier:
            assert json.loads(earlier.recv(1 << 16))["ok"]
            earlier.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
            os.kill(shim, signal.SIGSTOP)
            try:
                for start in starts:
                    earlier.sendall(json.dumps(start).encode() + b"\n")
                earlier.close()
                with connected(state_dir, HELLO, {"id": 2, "op": "held"}) as sock:
                    os.kill(shim, signal.SIGCONT)
                    got = answers(sock)
            finally:
                os.kill(shim, signal.SIGCONT)
    assert {held["key"] for held in got[1]["held"]} == {start["key"] for start in starts}


@asynchronous
@pytest.mark.parametrize(("theirs", "both"), [(1, 1), (2, 2), (3, 2), (1000, 2)])
async def test_the_highest_version_that_both_know_is_spoken(state_dir: Path, theirs: int, both: int) -> None:
    async with runtime(state_dir):
        with connected(state_dir, {**HELLO, "version": theirs}) as sock:
            (answer,) = answers(sock)
        assert answer["version"] == both


@asynchronous
async def test_a_version_that_is_too_old_is_told_so(state_dir: Path) -> None:
    async with runtime(state_dir):
        with connected(state_dir, {**HELLO, "version": 0}) as sock:
            (answer,) = answers(sock)
        assert answer["error"] == "version"
        assert "1 to 2" in answer["message"]


@asynchronous
async def test_a_client_that_does_not_read_is_cut(state_dir: Path) -> None:
    async with runtime(state_dir) as rt:
        for n in range(100):
            await ran(rt, launch(f"n.{n}", "no-such-program"))
        request = b'{"id":2,"op":"held"}\n'
        with connected(state_dir, HELLO) as sock:
            cut = False
            try:
                for _n in range(OUTPUT_BYTES_MAX // 10_000):
                    sock.sendall(request)
            except (BrokenPipeError, ConnectionResetError):
                cut = True
            assert cut
        assert len(await rt.held()) == 100


@asynchronous
async def test_no_more_than_so_many_clients(state_dir: Path) -> None:
    async with runtime(state_dir) as rt:
        socks = [socket.socket(socket.AF_UNIX) for _n in range(CONNECTIONS_MAX)]
        try:
            for sock in socks:
                sock.settimeout(20)
                sock.connect(str(state_dir / "shim.sock"))
            assert json.loads(socks[-1].recv(1000))["error"] == "full"
        finally:
            for sock in socks:
                sock.close()
        assert (await ran(rt, launch("after.1", "true"))).exit_code == 0
    async with runtime(state_dir) as rt:
        assert len(await rt.held()) == 1


FOREIGN = """
import os, socket, sys
os.setgid(65534); os.setuid(65534)
sock = socket.socket(socket.AF_UNIX)
sock.settimeout(20)
try:
    sock.connect(sys.argv[1])
except PermissionError:
    print("not let in")
else:
    print(sock.recv(1000).decode())
"""


@asynchronous
async def test_another_user_is_refused(state_dir: Path) -> None:
    def ask() -> str:
        command = ["/usr/bin/python3", "-c", FOREIGN, str(state_dir / "shim.sock")]
        return subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True, timeout=30).stdout

    # Debian's own: that of a virtual environment may be in a place where another user has no access.
    async with runtime(state_dir) as rt:
        assert ask() == "not let in\n"
        # And should the modes of files fail us, by the kernel's word on who it is.
        for path in (state_dir.parent, state_dir):
            path.chmod(0o755)
        os.chmod(state_dir / "shim.sock", 0o666)  # noqa: PTH101, S103
        assert json.loads(ask())["error"] == "forbidden"
        assert (await ran(rt, launch("after.1", "true"))).exit_code == 0


@asynchronous
async def test_a_connection_whose_writing_breaks_is_broken() -> None:
    """Writing may tell of it before reading does: whoever asks whether the shim is just dying is to hear yes."""
    ours, theirs = socket.socketpair()
    theirs.close()
    ours.setblocking(False)
    client = ShimClient(ours, lambda _message: None)
    await client.start()
    try:
        with pytest.raises(RuntimeUnavailable, match="broke"):
            await client.hello(1.0)
        assert client.broken.is_set()
    finally:
        await client.close()
