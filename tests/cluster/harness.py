"""Real nodes for the tests: daemons, shims and etcd, each node on a loopback address of its own."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spinetta.runtime import generations
from tests.contract.shims import clean_up

READY_S = 45.0  # for a node to answer: etcd, registration, on a busy machine
API_PORT, CLIENT_PORT, PEER_PORT = 7220, 7221, 7222


def eventually(condition: Callable[[], Any], *, within_s: float, what: str, every_s: float = 0.05) -> Any:
    """Wait for a condition with a limit; its value when it is true."""
    deadline_s = time.monotonic() + within_s
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline_s:
            raise AssertionError(f"not within {within_s} s: {what}")
        time.sleep(every_s)  # polling with a limit, not synchronisation


def free_base(count: int) -> str:
    """A loopback network, e.g. ``127.83.4.``, on whose first addresses our ports are free."""
    for _ in range(100):
        base = f"127.{random.randint(10, 250)}.{random.randint(1, 250)}."
        with contextlib.ExitStack() as stack:
            try:
                for i in range(1, count + 1):
                    for port in (API_PORT, CLIENT_PORT, PEER_PORT):
                        sock = stack.enter_context(socket.socket())
                        sock.bind((f"{base}{i}", port))
            except OSError:
                continue
            return base
    raise AssertionError("no free loopback addresses")


def alive(pid: int) -> bool:
    """True while the process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@dataclass
class Node:
    """One node of a test cluster."""

    name: str
    host: str
    data_dir: Path
    log: Path
    options: tuple[str, ...]
    process: subprocess.Popen[bytes] | None = None
    token: str = field(default="", repr=False)
    prefix: tuple[str, ...] = ()  # a command that runs it elsewhere, such as in a network namespace

    @property
    def address(self) -> str:
        """Of its API."""
        return f"{self.host}:{API_PORT}"

    def argv(self, peers: Sequence[str]) -> list[str]:
        """The command line that starts it."""
        argv = [sys.executable, "-m", "spinetta.cli", "node", "join", "--name", self.name, "--address", self.address]
        argv += ["--data-dir", str(self.data_dir), *self.options]
        return argv + (["--peers", ",".join(peers)] if peers else [])

    def start(self, peers: Sequence[str] = (), env: Mapping[str, str] | None = None) -> None:
        """Start the daemon; its output goes to the node's log."""
        with self.log.open("ab") as out:
            self.process = subprocess.Popen(
                [*self.prefix, *self.argv(peers)], stdin=subprocess.DEVNULL, stdout=out, stderr=out,
                env={**os.environ, **({"SPINETTA_TOKEN": self.token} if self.token else {}), **(env or {})},
                start_new_session=True,
            )  # fmt: skip

    def shim_pid(self) -> int | None:
        """The shim's process, as this namespace sees it."""
        for proc in Path("/proc").iterdir():
            if not proc.name.isdigit():
                continue
            try:
                words = (proc / "cmdline").read_bytes().split(b"\0")
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue
            state_dir = os.fsencode(json.dumps(str(self.data_dir / "shim")))
            if any(w.endswith(b"/runtime/shim") for w in words) and any(state_dir in w for w in words):
                pid = int(proc.name)
                if "NSpid" in (status := (proc / "status").read_text()):
                    inner = next(line for line in status.splitlines() if line.startswith("NSpid")).split()[-1]
                    if inner == "1":
                        return pid
        return None

    def kill_daemon(self) -> None:
        """kill -9 of the daemon alone: shim, etcd and tasks go on."""
        assert self.process is not None
        self.process.kill()
        self.process.wait(10)

    def crash(self) -> None:
        """kill -9 of the daemon and the shim, and with it etcd and all tasks: as if the machine had died."""
        shim = self.shim_pid()
        self.kill_daemon()
        assert shim is not None, f"{self.name} has no shim"
        os.kill(shim, signal.SIGKILL)
        eventually(lambda: not alive(shim), within_s=60, what=f"the shim of {self.name} dies")

    def stop(self) -> None:
        """End everything of this node."""
        subprocess.run(
            [sys.executable, "-m", "spinetta.cli", "node", "stop", "--data-dir", str(self.data_dir)],
            stdin=subprocess.DEVNULL, capture_output=True, timeout=60, check=False,
        )  # fmt: skip
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait(10)
        self.clean_up()

    def clean_up(self) -> None:
        """End its shims and all that they hold, and remove their control groups: a shim that is killed leaves them."""
        for folder in generations.folders(self.data_dir / "shim"):
            clean_up(folder)

    def tail(self, lines: int = 40) -> str:
        """The end of its log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:]) if self.log.exists() else ""


@dataclass
class Cluster:
    """Nodes that belong together."""

    directory: Path
    base: str
    options: tuple[str, ...]
    nodes: list[Node] = field(default_factory=list)
    secured: bool = False

    @property
    def admin_pem(self) -> Path:
        """The administrator's credentials, in a secured cluster."""
        return self.nodes[0].data_dir / "admin.pem"

    def token(self, role: str = "voter", *options: str, node: int = 0) -> str:
        """A join token, as an administrator makes it."""
        return str(self.json("token", "create", "--role", role, *options, node=node)["token"])

    def add(
        self, *options: str, name: str | None = None, start: bool = True, role: str = "voter", token: str = ""
    ) -> Node:
        """One more node; joins the first one, in a secured cluster with a token of this role."""
        i = len(self.nodes) + 1
        name = name or f"n{i}"
        node = Node(
            name, f"{self.base}{i}", self.directory / name, self.directory / f"{name}.log", (*self.options, *options)
        )
        if self.secured and self.nodes:
            node.token = token or self.token(role)
        self.place(node)
        self.nodes.append(node)
        if start:
            node.start(self.peers_of(node))
        return node

    def place(self, node: Node) -> None:
        """Make ready where a node is to run."""

    def peers_of(self, node: Node) -> list[str]:
        """The addresses a node joins through: all others; none for the first one of all."""
        return [n.address for n in self.nodes if n is not node]

    def cli(
        self, *args: str, node: int | None = 0, check: bool = True, timeout_s: float = 60, stdin: str = "",
        env: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:  # fmt: skip
        """Run the command line against a node (by index)."""
        target = {} if node is None else {"SPINETTA_NODE": self.nodes[node].address}
        if self.secured:
            target["SPINETTA_CREDENTIALS"] = str(self.admin_pem)
        done = subprocess.run(
            [sys.executable, "-m", "spinetta.cli", *args],
            input=stdin, capture_output=True, text=True, timeout=timeout_s, check=False,
            env={**os.environ, **target, **(env or {})},
        )  # fmt: skip
        if check and done.returncode != 0:
            raise AssertionError(f"{args} → {done.returncode}\n{done.stdout}\n{done.stderr}\n{self.tails()}")
        return done

    def json(self, *args: str, node: int = 0) -> Any:
        """The command line's answer as data."""
        return json.loads(self.cli(*args, "--json", node=node).stdout)

    def etcdctl(self, *args: str, node: int = 0) -> str:
        """Run etcdctl against a node's own etcd."""
        host = self.nodes[node].host
        flags = [f"--endpoints=http{'s' if self.secured else ''}://{host}:{CLIENT_PORT}"]
        if self.secured:
            trust = self.nodes[node].data_dir / "trust" / "current"
            flags += [f"--cacert={trust / 'etcd-ca.pem'}", f"--cert={trust / 'etcd.pem'}"]
            flags += [f"--key={trust / 'etcd.key'}"]
        flags += ["--dial-timeout=10s", "--command-timeout=25s"]  # a busy machine, or a member that is defragmented
        return subprocess.run(
            ["etcdctl", *flags, *args],
            capture_output=True, text=True, timeout=60, check=True, env={**os.environ, "ETCDCTL_API": "3"},
        ).stdout  # fmt: skip

    def wait_ready(self, count: int | None = None, *, node: int = 0, within_s: float = READY_S) -> None:
        """Wait until so many nodes are ready as seen by one of them."""
        wanted = len(self.nodes) if count is None else count

        def ready() -> bool:
            listed = self.cli("node", "list", "--json", node=node, check=False)
            if listed.returncode != 0:
                return False
            return sum(1 for n in json.loads(listed.stdout)["nodes"] if n["status"] == "ready") >= wanted

        try:
            eventually(ready, within_s=within_s, every_s=0.3, what=f"{wanted} nodes ready")
        except AssertionError as e:
            raise AssertionError(f"{e}\n{self.tails()}") from None

    def wait_voters(self, count: int, *, node: int = 0, within_s: float = 60) -> None:
        """Wait until so many nodes are voters."""

        def voters() -> bool:
            listed = self.cli("node", "list", "--json", node=node, check=False)
            return (
                listed.returncode == 0 and sum(1 for n in json.loads(listed.stdout)["nodes"] if n.get("voter")) == count
            )

        eventually(voters, within_s=within_s, every_s=0.5, what=f"{count} voters\n{self.tails()}")

    def tails(self) -> str:
        """The ends of all logs, for a failure's message."""
        return "\n".join(f"--- {n.name} ---\n{n.tail()}" for n in self.nodes)

    def stop(self) -> None:
        """End all nodes."""
        for node in reversed(self.nodes):
            node.stop()


@contextlib.contextmanager
def running_cluster(
    directory: Path, count: int, *options: str, secured: bool = False, workers: int = 0
) -> Iterator[Cluster]:
    """A cluster of `count` nodes that are all ready; everything of it ends with the block.

    Args:
        directory: for all that the nodes keep.
        count: nodes.
        options: of each node.
        secured: with mutual TLS, joined by tokens.
        workers: how many of them, the last ones, join as workers.
    """
    cluster = Cluster(directory, free_base(count + 3), (*options, *(("--tls", "on") if secured else ())))
    cluster.secured = secured
    try:
        for i in range(count):
            cluster.add(role="worker" if i >= count - workers else "voter")
            if len(cluster.nodes) == 1:
                cluster.wait_ready()
        cluster.wait_ready()
        yield cluster
    finally:
        cluster.stop()
