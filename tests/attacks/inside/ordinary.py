"""What must work in a container as it does elsewhere."""

from __future__ import annotations

import os
import socket
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

from tests.attacks.inside.raw import call, in_child


def ordinary(ptrace: int) -> dict[str, object]:
    """Ordinary things; what did not work is in the values."""
    told: dict[str, object] = {}

    def told_by(name: str, function: Callable[[], object]) -> None:
        try:
            told[name] = function()
        except (OSError, subprocess.SubprocessError) as error:
            told[name] = repr(error)

    told_by("pipeline", lambda: _shell("seq 1 1000 | sort -n | tail -n 1"))
    told_by("redirect", lambda: _shell("echo ok > f && cat f && rm f"))
    told_by("threads", _threads)
    told_by("tcp", _tcp)
    told_by("unix", _unix)
    told_by("shared memory", _shared_memory)
    told_by("tmp", lambda: Path("/tmp/x").write_text("xx"))
    told_by("program in tmp", lambda: _shell("cp /bin/busybox /tmp/echo && /tmp/echo ran"))
    told_by("terminal", lambda: len(os.openpty()))
    told_by("random", lambda: len(os.urandom(8)))
    told_by("fifo", lambda: os.mkfifo("/work/fifo"))
    told_by("spawn", lambda: os.waitpid(os.posix_spawn("/bin/true", ["true"], {}), 0)[1])
    told_by("debugger", lambda: _traced(ptrace))
    told_by("home", lambda: Path.cwd().as_posix())
    told_by("secret", lambda: Path("/run/secrets/spinetta/token").read_text())
    told_by("hosts", lambda: socket.gethostbyname("localhost"))
    told_by("hostname", socket.gethostname)
    told_by("zombies", _adopted)
    told_by("own signal", _own_signal)
    return told


def _shell(command: str) -> str:
    return subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True, timeout=20).stdout.strip()


def _threads() -> int:
    sums: list[int] = []
    threads = [threading.Thread(target=lambda: sums.append(1)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return sum(sums)


def _tcp() -> str:
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname(), timeout=5) as client,
    ):
        peer, _ = server.accept()
        with peer:
            client.sendall(b"hello")
            return peer.recv(5).decode()


def _unix() -> str:
    one, other = socket.socketpair()
    with one, other:
        one.sendall(b"hello")
        return other.recv(5).decode()


def _shared_memory() -> int:
    import multiprocessing

    context = multiprocessing.get_context("fork")
    value = context.Value("i", 0)

    def add() -> None:
        with value.get_lock():
            value.value += 1

    workers = [context.Process(target=add) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(20)
    return int(value.value)


def _traced(number: int) -> int:
    """A child that is traced, as debuggers and leak checkers do."""

    def traced() -> int:
        call(number, 0, 0, 0, 0)
        return 0

    return in_child(traced)


def _adopted() -> str:
    """A grandchild whose parent ends is taken by the init, and leaves no zombie."""
    out = _shell("(sh -c 'sleep 0.05 & echo $!' )")
    path = Path(f"/proc/{out}")
    for _ in range(200):
        if not path.exists():
            return "reaped"
        threading.Event().wait(0.05)
    return path.joinpath("status").read_text()


def _own_signal() -> int:
    """SIGTERM to itself ends a program; a process 1 would ignore it."""
    return subprocess.run(["sh", "-c", "kill -TERM $$; exit 0"], check=False, timeout=20).returncode
