"""Five nodes, each in a network namespace and on a small disk of its own, and all that can be done to them."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.cluster.harness import CLIENT_PORT, PEER_PORT, Node, alive, eventually
from tests.cluster.netns import NetCluster, can_make_namespaces, ip

# etcd sets aside two 64 MiB segments of its log before it writes anything; the rest is room for the run.
DISK_MIB = 400
STARTED, UP = "--- started by the nemesis ---", ": API on "  # in a node's log: the latter once it takes part


def can_run() -> bool:
    """Whether this process may, and the tools are there."""
    return can_make_namespaces() and all(shutil.which(tool) for tool in ("iptables", "iptables-restore", "mount"))


@dataclass
class World(NetCluster):
    """A secured cluster of nodes that can be hit one by one."""

    frozen: dict[int, None] = field(default_factory=dict)

    def place(self, node: Node) -> None:
        """A namespace and a disk."""
        super().place(node)
        node.data_dir.mkdir()
        run("mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m,mode=700", "spinetta-nemesis", str(node.data_dir))

    def close(self) -> None:
        """Remove all that was made."""
        super().close()
        for node in self.nodes:
            subprocess.run(["umount", "--lazy", str(node.data_dir)], capture_output=True, check=False, timeout=30)

    def stop(self) -> None:
        """End all nodes at once: nothing of them is needed any more."""
        self.thaw(list(self.frozen))
        for node in self.nodes:
            if node.process is not None and node.process.poll() is None:
                node.process.kill()
                node.process.wait(10)
            node.clean_up()

    def found(self, size: int) -> None:
        """Start the nodes, and wait until they are ready; from four on the last one is a worker."""
        self.add(name="n1")
        self.wait_ready()
        voters = self.token("voter", "--uses", "16")
        for i in range(2, size + 1):
            last = i == size and size >= 4
            self.add(name="w1" if last else f"n{i}", token=self.token("worker") if last else voters)
        self.wait_ready(within_s=90)
        self.wait_voters(min(3, size) if size != 2 else 1, within_s=90)
        for node in self.nodes:
            node.token = ""  # it is known now

    # --- processes ---

    def etcd_pid(self, node: Node) -> int | None:
        """Of the node's etcd, if it has one that runs."""
        mark = os.fsencode(str(node.data_dir))
        for pid in pids():
            words = words_of(pid)
            if words and words[0].rpartition(b"/")[2] == b"etcd" and any(mark in w for w in words[1:]):
                return pid
        return None

    def all_pids(self, node: Node) -> list[int]:
        """Everything that runs for a node: daemon, shim, and all within the shim's process namespace."""
        shim, found = node.shim_pid(), []
        if shim is not None:
            space = process_space(shim)
            found = [pid for pid in pids() if process_space(pid) == space and space]
        if node.process is not None and node.process.poll() is None:
            found.append(node.process.pid)
        return found

    def freeze(self, some: Sequence[int | None]) -> list[int]:
        """SIGSTOP; those that were there."""
        done = []
        for pid in some:
            if pid is None:
                continue
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)
                self.frozen[pid] = None
                done.append(pid)
        return done

    def thaw(self, some: Sequence[int]) -> None:
        """SIGCONT."""
        for pid in some:
            self.frozen.pop(pid, None)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

    def kill_shim(self, node: Node) -> None:
        """kill -9 of the shim alone; the kernel then kills etcd and the tasks."""
        shim = node.shim_pid()
        if shim is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(shim, signal.SIGKILL)
            wait_dead(shim)

    def end_daemon(self, node: Node, number: signal.Signals, wait_s: float = 30) -> None:
        """A signal, and its end."""
        assert node.process is not None
        if node.process.poll() is None:
            node.process.send_signal(number)
            try:
                node.process.wait(wait_s)
            except subprocess.TimeoutExpired:
                node.process.kill()
                node.process.wait(10)

    def restart(self, node: Node) -> None:
        """Start the daemon unless it runs. It knows its cluster: no peers are named."""
        if node.process is None or node.process.poll() is not None:
            with node.log.open("a") as log:
                log.write(f"{STARTED}\n")
            node.start()

    @staticmethod
    def took_part(node: Node) -> bool:
        """Whether the daemon that was started last has come so far."""
        return UP in node.log.read_text(errors="replace").rpartition(STARTED)[2]

    # --- network ---

    def rules(self, node: Node, lines: Sequence[str] = ()) -> None:
        """The packet filter of a node's namespace, as a whole; none: everything passes."""
        text = "\n".join(["*filter", ":INPUT ACCEPT", ":OUTPUT ACCEPT", *lines, "COMMIT", ""])
        space = f"/run/netns/sp{self.tag}n{node.host.rpartition('.')[2]}"
        run("nsenter", f"--net={space}", "iptables-restore", stdin=text)

    def others(self, node: Node) -> str:
        """The addresses of all other nodes."""
        return ",".join(n.host for n in self.nodes if n is not node)

    def cut_in(self, node: Node) -> None:
        """It hears no other node."""
        self.rules(node, [f"-A INPUT -s {self.others(node)} -j DROP"])

    def cut_out(self, node: Node) -> None:
        """No other node hears it."""
        self.rules(node, [f"-A OUTPUT -d {self.others(node)} -j DROP"])

    def cut_both(self, node: Node, beyond: Sequence[Node] = ()) -> None:
        """Nothing between it and those (all others)."""
        those = ",".join(n.host for n in beyond) or self.others(node)
        self.rules(node, [f"-A INPUT -s {those} -j DROP", f"-A OUTPUT -d {those} -j DROP"])

    def cut_etcd(self, node: Node) -> None:
        """Only etcd's ports, its own and those of others."""
        ports = f"{CLIENT_PORT}:{PEER_PORT}"
        lines = [
            f"-A {chain} -{side} {self.others(node)} -p tcp --{end}port {ports} -j DROP"
            for chain, side in (("INPUT", "s"), ("OUTPUT", "d")) for end in ("d", "s")
        ]  # fmt: skip
        self.rules(node, lines)

    # --- disk ---

    def fill(self, node: Node) -> Path:
        """Take all that is free on a node's disk."""
        path = node.data_dir / "filler"
        with path.open("wb") as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(1 << 20))
                file.flush()
        with path.open("ab", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))
        return path


def wait_dead(pid: int) -> None:
    """Until a process that was killed is gone."""
    eventually(lambda: not alive(pid), within_s=15, what=f"process {pid} dies")


def pids() -> Iterator[int]:
    """All processes that are seen."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            yield int(entry.name)


def words_of(pid: int) -> list[bytes]:
    """A process's command line."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return []


def process_space(pid: int) -> str:
    """Which process namespace it is in; empty when it is gone."""
    try:
        return str(Path(f"/proc/{pid}/ns/pid").readlink())
    except OSError:
        return ""


def run(*argv: str, stdin: str = "") -> None:
    """Run a tool that must succeed."""
    done = subprocess.run(argv, input=stdin, capture_output=True, text=True, timeout=60, check=False)
    if done.returncode != 0:
        raise AssertionError(f"{' '.join(argv)}: {done.stderr}{stdin}")


Mend = Callable[[], None]


def hit(world: World, kind: str, node: Node, hold_s: float) -> Mend:
    """Break it now; what is returned mends it."""
    if kind in ("kill-daemon", "term-daemon"):
        world.end_daemon(node, signal.SIGKILL if kind == "kill-daemon" else signal.SIGTERM)
        return lambda: world.restart(node)
    if kind == "kill-node":
        world.end_daemon(node, signal.SIGKILL)
        world.kill_shim(node)
        return lambda: world.restart(node)
    if kind == "kill-shim":
        world.kill_shim(node)
        return lambda: None
    if kind == "kill-etcd":
        kill_etcd(world, [node])
        return lambda: None
    if kind == "no-quorum":
        with_etcd = [n for n in world.nodes if world.etcd_pid(n)]
        those = [n for n in with_etcd if n is not node][: len(with_etcd) // 2 + 1]
        frozen = world.freeze([world.etcd_pid(n) for n in those])
        return lambda: world.thaw(frozen)
    if kind.startswith("stop-"):
        frozen = world.freeze(targets(world, kind, node))
        return lambda: world.thaw(frozen)
    if kind == "split":
        at = world.nodes.index(node)
        near = [world.nodes[(at + i) % len(world.nodes)] for i in range(len(world.nodes) // 2)]
        far = [n for n in world.nodes if n not in near]
        for one in near:
            world.cut_both(one, far)
        return lambda: join(world, near)
    if kind == "full-disk":
        path = world.fill(node)
        return lambda: path.unlink(missing_ok=True)
    {"cut": world.cut_both, "cut-in": world.cut_in, "cut-out": world.cut_out, "cut-etcd": world.cut_etcd}[kind](node)
    return lambda: world.rules(node)


def targets(world: World, kind: str, node: Node) -> list[int | None]:
    """Whom a `stop-…` freezes."""
    match kind:
        case "stop-daemon":
            return [node.process.pid if node.process is not None and node.process.poll() is None else None]
        case "stop-shim":
            return [node.shim_pid()]
        case "stop-etcd":
            return [world.etcd_pid(node)]
        case _:
            return list(world.all_pids(node))


def join(world: World, nodes: Sequence[Node]) -> None:
    """They reach all others again."""
    for node in nodes:
        world.rules(node)


def kill_etcd(world: World, nodes: Sequence[Node]) -> None:
    """kill -9 of etcd alone."""
    for node in nodes:
        pid = world.etcd_pid(node)
        if pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@contextlib.contextmanager
def world(directory: Path, size: int, *options: str) -> Iterator[World]:
    """A cluster of this size, ready; everything of it ends with the block."""
    base = f"10.{random.randint(64, 250)}.{random.randint(0, 250)}."
    made = World(directory, base, options, secured=True, tag=f"{random.randrange(16**5):05x}")
    made.open()
    try:
        made.found(size)
        yield made
    finally:
        made.stop()
        made.close()


__all__ = ["DISK_MIB", "Mend", "World", "can_run", "hit", "ip", "world"]
