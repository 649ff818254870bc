"""Commands beside tasks, files out of their scratch spaces, and a log that is followed over a daemon's restart."""

from __future__ import annotations

import contextlib
import io
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import tarfile
import termios
import time
from collections.abc import Iterator, Sequence
from fcntl import ioctl
from pathlib import Path
from typing import Any, Self

import pytest

from spinetta.client import Client
from tests.cluster.harness import Cluster, eventually, free_base
from tests.contract.containers import make_rootfs
from tests.contract.shims import living

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(240)]

QUICK = ("--lease-ttl", "30s", "--grace", "60s", "--kill-margin", "2s", "--cpus", "8", "--memory", "2GiB")
LIMIT_S = 30.0


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_rootfs(tmp_path_factory.mktemp("exec-image") / "image", 0)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, image: Path) -> Iterator[Cluster]:
    """A voter tagged `home` and a worker tagged `away`."""
    options = ("--runtimes", "process,container", "--allow", f"image:{image}")
    cluster = Cluster(tmp_path_factory.mktemp("exec"), free_base(2), QUICK)
    try:
        cluster.add("--tags", "home")
        cluster.wait_ready()
        cluster.add("--tags", "away", *options)
        cluster.wait_ready()
        yield cluster
    finally:
        cluster.stop()


def started(cluster: Cluster, script: str, **options: Any) -> str:
    """A task that has written ``up``."""
    with Client(cluster.nodes[0].address) as client:
        task = client.submit(["sh", "-c", f"{script.strip()}; echo up; exec sleep 200"], tags=["away"], **options)
        for chunk in task.log(follow=True):
            if b"up" in chunk.data:
                return task.id
    raise AssertionError(f"{task.id} has ended\n{cluster.tails()}")


def popen(cluster: Cluster, *argv: str, node: int = 0) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "spinetta.cli", *argv],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0,
        env={**os.environ, "SPINETTA_NODE": cluster.nodes[node].address},
    )  # fmt: skip


class Terminal:
    """The command line in a terminal of its own."""

    def __init__(self, cluster: Cluster, argv: Sequence[str]) -> None:
        self.master, slave = pty.openpty()
        ioctl(self.master, termios.TIOCSWINSZ, struct.pack("4H", 40, 100, 0, 0))
        self.before = termios.tcgetattr(slave)
        self.slave = slave
        self.process = subprocess.Popen(
            [sys.executable, "-m", "spinetta.cli", *argv], stdin=slave, stdout=slave, stderr=slave,
            env={**os.environ, "SPINETTA_NODE": cluster.nodes[0].address, "TERM": "xterm"},
            start_new_session=True, preexec_fn=lambda: ioctl(0, termios.TIOCSCTTY, 0),
        )  # fmt: skip
        self.seen = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.master)
        os.close(self.slave)

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def until(self, pattern: bytes) -> None:
        """Wait until something is shown, and forget all before its end."""
        end_s = time.monotonic() + LIMIT_S
        while not (found := re.search(pattern, self.seen)):
            assert time.monotonic() < end_s, (pattern, self.seen)
            if select.select([self.master], [], [], 0.1)[0]:
                self.seen += os.read(self.master, 4096)
        self.seen = self.seen[found.end() :]


def test_a_shell_in_a_terminal(pair: Cluster) -> None:
    marker = f"500{os.getpid()}"
    task = started(pair, "echo in the task > here", env={"WHO": "me"})
    with Terminal(pair, ["exec", task, "--", "sh", "-i"]) as terminal:
        terminal.until(rb"[#$] ")
        terminal.type("echo $TERM-$WHO-$(cat here); stty size\n")
        terminal.until(rb"xterm-me-in the task\r\n40 100\r\n")
        ioctl(terminal.master, termios.TIOCSWINSZ, struct.pack("4H", 50, 120, 0, 0))
        terminal.type(f"until stty size | grep '50 120'; do sleep 0.1; done; sleep {marker}\n")
        terminal.until(rb"50 120\r\n")
        eventually(lambda: living(marker), within_s=LIMIT_S, what="it sleeps")
        terminal.type("\x03")
        terminal.until(rb"[#$] ")
        terminal.type("exit 3\n")
        assert terminal.process.wait(LIMIT_S) == 3
        assert termios.tcgetattr(terminal.slave) == terminal.before, "the terminal is as it was"
    with Terminal(pair, ["exec", task, "--", "sh", "-c", "echo began; exec sleep 4711"]) as terminal:
        terminal.until(rb"began")
        terminal.process.terminate()
        assert terminal.process.wait(LIMIT_S) == 130
        assert termios.tcgetattr(terminal.slave) == terminal.before
    pair.cli("cancel", task)


def test_streams_codes_and_reasons(pair: Cluster) -> None:
    task = started(pair, "true")

    def run(*argv: str, stdin: str = "", env: dict[str, str] | None = None) -> tuple[int, str, str]:
        done = pair.cli("exec", *argv, check=False, stdin=stdin, env=env)
        return done.returncode, done.stdout, done.stderr

    assert run(task, "--", "sh", "-c", "echo out; echo err >&2; exit 7") == (7, "out\n", "err\n")
    assert run("-i", task, "--", "wc", "-c", stdin="x" * 300_000) == (0, "300000\n", "")
    script = "cat; pwd; echo $A; kill -9 $$"
    assert run("-w", "/usr", "-e", "A=b", task, "--", "sh", "-c", script, stdin="no") == (137, "/usr\nb\n", "")
    assert run("-t", task, "--", "tty")[1].startswith("/dev/pts/")
    code, _, err = run(task, "--", "/no/such/program")
    assert (code, "program not found" in err) == (126, True)
    with popen(pair, "exec", task, "--", "sh", "-c", "trap 'echo told; exit 9' INT; echo up; sleep 100 & wait") as told:
        assert told.stdout is not None
        assert told.stdout.readline() == b"up\n"
        told.send_signal(signal.SIGINT)
        assert told.stdout.read() == b"told\n"
        assert told.wait(LIMIT_S) == 9
    with popen(pair, "exec", task, "--", "sh", "-c", "echo up; sleep 100") as cut:
        assert cut.stdout is not None
        assert cut.stdout.readline() == b"up\n"
        pair.cli("cancel", task)
        assert cut.wait(LIMIT_S) == 137
        assert cut.stderr is not None
        assert b"the task has ended" in cut.stderr.read()
    code, _, err = run(task, "--", "true")
    assert (code, "does not run" in err) == (125, True)


def test_files_are_copied(pair: Cluster, tmp_path: Path) -> None:
    script = """
        echo result > result.csv; chmod 600 result.csv; mkdir -p plots/deep; echo a > plots/a; echo b > plots/deep/b
        ln -s a plots/link; ln -s /etc/passwd plots/out; ln -s plots/a inside; ln -s /etc/passwd away; mkfifo plots/fifo
        ln -s / root; head -c 3000000 /dev/urandom > big; sha256sum big
    """
    task = started(pair, script)
    os.umask(0o022)
    pair.cli("cp", f"{task}:result.csv", str(tmp_path))
    assert (tmp_path / "result.csv").read_text() == "result\n"
    assert (tmp_path / "result.csv").stat().st_mode & 0o777 == 0o600
    assert pair.cli("cp", f"{task}:inside", "-").stdout == "a\n"
    pair.cli("cp", f"{task}:big", str(tmp_path / "other"))
    found = subprocess.run(["sha256sum", tmp_path / "other"], capture_output=True, text=True, check=True).stdout
    assert found.split()[0] in pair.cli("log", task).stdout
    done = pair.cli("cp", f"{task}:plots", str(tmp_path))
    assert (tmp_path / "plots/deep/b").read_text() == "b\n"
    assert (tmp_path / "plots/link").readlink() == Path("a")
    assert sorted(p.name for p in (tmp_path / "plots").iterdir()) == ["a", "deep", "link"]
    assert "left out 2" in done.stderr
    with popen(pair, "cp", f"{task}:plots", "-") as piped:
        assert piped.stdout is not None
        with tarfile.open(fileobj=io.BytesIO(piped.stdout.read())) as archive:
            assert "deep/b" in archive.getnames()
    refused = pair.cli("cp", f"{task}:away", str(tmp_path / "no"), check=False)
    assert (refused.returncode, "leads out" in refused.stderr) == (2, True)
    assert not (tmp_path / "no").exists()
    pair.cli("cancel", task)


def test_in_a_container(pair: Cluster, image: Path, tmp_path: Path) -> None:
    task = started(pair, "echo inside > file; ln -s /etc/passwd out", image=f"rootfs:{image}", keep_scratch="10m")
    with Terminal(pair, ["exec", task, "--", "sh"]) as terminal:
        terminal.until(rb"[$] ")
        terminal.type("cat file; id -u; hostname; echo more >> file; exit 6\n")
        terminal.until(rb"inside[\r\n]+1000[\r\n]+")
        assert terminal.process.wait(LIMIT_S) == 6
    refused = pair.cli("cp", f"{task}:/work/out", "-", check=False)
    assert "leads out" in refused.stderr
    pair.cli("cancel", task)
    pair.cli("wait", task, check=False)
    kept = pair.nodes[1].data_dir / "shim/kept"
    eventually(lambda: list(kept.iterdir()), within_s=LIMIT_S, what="the scratch directory is kept")
    pair.cli("cp", f"{task}:/work/file", str(tmp_path / "copy"))
    assert (tmp_path / "copy").read_text() == "inside\nmore\n"


def test_a_log_is_followed_and_commands_end_when_the_daemon_is_killed(pair: Cluster) -> None:
    counting = "i=0; while [ $i -lt 3000 ]; do i=$((i+1)); echo $i; sleep 0.002; done"
    task = pair.cli("submit", "--tag", "away", "--", "sh", "-c", counting).stdout.strip()
    away = pair.nodes[1]
    followers = [popen(pair, "log", "-f", task, node=node) for node in (0, 1)]
    with contextlib.ExitStack() as stack:
        for follower in followers:
            stack.enter_context(follower)
            stack.callback(follower.kill)
            assert follower.stdout is not None
            assert follower.stdout.readline() == b"1\n"
        command = stack.enter_context(popen(pair, "exec", task, "--", "sh", "-c", "echo up; sleep 4712"))
        stack.callback(command.kill)
        assert command.stdout is not None
        assert command.stdout.readline() == b"up\n"
        away.kill_daemon()
        assert command.wait(LIMIT_S) == 125
        assert command.stderr is not None
        assert b"the task goes on" in command.stderr.read().replace(b"\n", b" ")
        away.start(pair.peers_of(away))
        for i, follower in enumerate(followers):
            out, err = follower.communicate(timeout=90)
            assert follower.returncode == 0, err
            assert out.split() == [b"%d" % n for n in range(2, 3001)]
            assert err.count(b"broke off") == i, err  # who has asked the other node need not know
    assert pair.json("status", task)["tasks"][0]["outcome"] == "succeeded"
