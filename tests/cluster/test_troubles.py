"""Nodes on machines in trouble: disks full or read-only, clocks that are set, shims and daemons that die."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from spinetta.client import Client
from spinetta.model import NodeRecord, Outcome, State, Task, TaskId
from tests.cluster import dying
from tests.cluster.harness import Cluster, Node, eventually, free_base

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]
# Long, so that no node is given up on a busy machine: that is not what is tried here.
CALM = ("--lease-ttl", "3m", "--grace", "6m", "--kill-margin", "2s")
WITHIN_S = 90.0


class OnSmallDisks(Cluster):
    """Each node but the first has a disk of eight megabytes of its own for its data."""

    def place(self, node: Node) -> None:
        if not self.nodes:
            return
        node.data_dir.mkdir(mode=0o700)
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=8m,mode=700", "spinetta-test", str(node.data_dir)], check=True
        )


@contextlib.contextmanager
def small_disks(directory: Path) -> Iterator[OnSmallDisks]:
    """A voter, and a node that never will be one, on a small disk."""
    cluster = OnSmallDisks(directory, free_base(4), CALM)
    try:
        cluster.add(name="n1")
        cluster.wait_ready()
        cluster.add("--candidate", "no", "--tags", "small", name="n2")
        cluster.wait_ready()
        yield cluster
    finally:
        cluster.stop()
        for node in cluster.nodes[1:]:
            assert gone(node)
            while os.path.ismount(node.data_dir):
                subprocess.run(["umount", "-l", str(node.data_dir)], check=True)


def gone(node: Node) -> bool:
    """Whether its shim ends; waits for it."""
    return bool(eventually(lambda: node.shim_pid() is None, within_s=60, what=f"the shim of {node.name} is gone"))


def fill(folder: Path) -> Path:
    """Leave no room on a disk."""
    filler = folder / "filler"
    with filler.open("ab", buffering=0) as file:
        for size in (1 << 20, 4096, 1):
            with contextlib.suppress(OSError):
                while file.write(b"x" * size) == size:
                    pass
    return filler


def record(client: Client, name: str) -> NodeRecord:
    return next(n.record for n in client.nodes().nodes if n.record.name == name)


def state_is(cluster: Cluster, client: Client, task: TaskId, wanted: State) -> Task:
    eventually(
        lambda: client.get(task).task.state is wanted,
        within_s=WITHIN_S,
        every_s=0.2,
        what=f"{task} {wanted}\n{cluster.tails()}",
    )
    return client.get(task).task


def is_unfit(cluster: Cluster, client: Client, text: str) -> None:
    eventually(
        lambda: text in record(client, "n2").unfit if text else not record(client, "n2").unfit,
        within_s=WITHIN_S,
        every_s=0.2,
        what=f"n2 is unfit: {text}\n{cluster.tails()}",
    )


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts need root")
def test_a_disk_that_is_full_and_one_that_is_read_only(tmp_path: Path) -> None:
    with small_disks(tmp_path) as cluster, Client(cluster.nodes[0].address) as client:
        n2 = cluster.nodes[1]
        go = [tmp_path / f"go{i}" for i in range(3)]
        waiting = "echo begun; until [ -e {0} ]; do sleep 0.1; done; echo done; exit 3"
        first, second, third = (
            client.submit(["sh", "-c", waiting.format(path)], cpus=0.1, tags=["small"]).id for path in go
        )
        for one in (first, second, third):
            state_is(cluster, client, one, State.RUNNING)
            log = n2.data_dir / "shim" / "logs" / f"{one}.1" / "stdout"
            eventually(lambda log=log: log.exists() and log.read_text(), within_s=WITHIN_S, what="it has begun")  # type: ignore[misc]
        filler = fill(n2.data_dir)
        is_unfit(cluster, client, "is full")
        listed = cluster.cli("node", "list")
        assert " unfit " in listed.stdout
        assert "node n2 takes no tasks: the disk of its data directory" in listed.stderr
        later = client.submit(["true"], cpus=0.1, tags=["small"]).id
        # Its end cannot be written there, and is recorded all the same.
        go[0].touch()
        ended = state_is(cluster, client, first, State.COMPLETE)
        assert (ended.outcome, ended.attempts[-1].exit_code) == (Outcome.FAILED, 3)
        assert "its exit could not be recorded: No space left on device; its logs may be cut" in ended.message
        # A daemon that dies comes back on the full disk and goes on with what runs.
        n2.kill_daemon()
        n2.start(cluster.peers_of(n2))
        go[1].touch()
        assert state_is(cluster, client, second, State.COMPLETE).attempts[-1].exit_code == 3
        is_unfit(cluster, client, "is full")
        assert client.get(later).task.state is State.QUEUED
        filler.unlink()
        state_is(cluster, client, later, State.COMPLETE)
        log = n2.data_dir / "shim" / "logs" / f"{first}.1" / "stderr"
        eventually(lambda: "the disk was full" in log.read_text(), within_s=60, what="the log says that it was cut")

        # Read-only while it runs, and at its start.
        subprocess.run(["mount", "--bind", str(n2.data_dir), str(n2.data_dir)], check=True)
        subprocess.run(["mount", "-o", "remount,bind,ro", str(n2.data_dir)], check=True)
        is_unfit(cluster, client, "read-only")
        n2.kill_daemon()
        argv = n2.argv(cluster.peers_of(n2))
        refused = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
        assert refused.returncode == 2, refused.stderr
        assert "cannot be opened: Read-only file system" in refused.stderr
        assert "Traceback" not in refused.stderr
        subprocess.run(["umount", str(n2.data_dir)], check=True)
        n2.start(cluster.peers_of(n2))
        go[2].touch()
        over = state_is(cluster, client, third, State.COMPLETE)
        assert len(over.attempts) == 1, f"{over.attempts}\n{cluster.tails()}"
        assert "Traceback" not in n2.log.read_text()
        _logs_that_are_no_more(cluster, n2, third)


def _logs_that_are_no_more(cluster: Cluster, node: Node, task: TaskId) -> None:
    folder = node.data_dir / "shim" / "logs" / f"{task}.1"
    (folder / "stdout").unlink()
    (folder / "stdout").mkdir()
    unread = cluster.cli("log", task, check=False)
    assert unread.returncode != 0
    assert "cannot be read: it is not a file" in unread.stderr
    (folder / "stdout").rmdir()
    (folder / "stderr").unlink()
    folder.rmdir()
    missing = cluster.cli("log", task, check=False)
    assert missing.returncode != 0
    assert "does not exist" in missing.stderr
    assert "Traceback" not in unread.stderr + missing.stderr + node.log.read_text()


FAKETIME = next(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"), None)


@dataclass(frozen=True)
class Alone:
    """One node whose wall clock, and that of commands with `env`, says what is in a file."""

    cluster: Cluster
    node: Node
    client: Client
    clock: Path
    env: dict[str, str]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Alone]:
    folder = tmp_path_factory.mktemp("alone")
    clock = folder / "clock"
    clock.write_text("+0")
    faked = {
        "LD_PRELOAD": str(FAKETIME),
        "FAKETIME_TIMESTAMP_FILE": str(clock),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }
    env = faked if FAKETIME is not None else {}
    cluster = Cluster(folder, free_base(2), (*CALM, "--cpus", "8", "--memory", "1GiB"))
    try:
        node = cluster.add(name="n1", start=False)
        node.start(env=env)
        cluster.wait_ready()
        with Client(node.address) as client:
            yield Alone(cluster, node, client, clock, env)
    finally:
        cluster.stop()


@pytest.mark.skipif(FAKETIME is None, reason="needs Debian's libfaketime")
def test_a_clock_that_is_set_fences_nobody(alone: Alone, tmp_path: Path) -> None:
    cluster, client, ledger, gate = alone.cluster, alone.client, tmp_path / "ledger", tmp_path / "gate"
    held = client.submit(["sh", "-c", f"until [ -e {gate} ]; do sleep 0.1; done"], cpus=0.1).id
    state_is(cluster, client, held, State.RUNNING)
    tasks = [held]
    for offset in ("+7h", "-7h", "+400d", "+0"):
        alone.clock.write_text(offset)
        # The command line has the same clock, and so makes ids of the past and the future.
        note = ["sh", "-c", f"echo $SPINETTA_TASK_ID >> {ledger}"]
        done = cluster.cli("submit", "--cpus", "0.1", "--", *note, env=alone.env)
        task = TaskId(done.stdout.strip())
        tasks.append(task)
        assert state_is(cluster, client, task, State.COMPLETE).outcome is Outcome.SUCCEEDED
        found = {i.task.id for i in client.list()}
        assert found >= set(tasks), f"lists at {offset} miss {set(tasks) - found}"
        assert client.get(held).task.state is State.RUNNING
        assert record(client, "n1").name == "n1"
    gate.touch()
    ended = state_is(cluster, client, held, State.COMPLETE)
    assert (ended.outcome, len(ended.attempts)) == (Outcome.SUCCEEDED, 1)
    assert Counter(ledger.read_text().split()) == Counter(tasks[1:])
    log = alone.node.log.read_text()
    assert "Traceback" not in log
    assert "condemned" not in log


def test_a_shim_that_dies_under_load(alone: Alone, tmp_path: Path) -> None:
    """It takes etcd and all tasks with it; the daemon starts another, and everything that was lost runs again."""
    cluster, client, node, ledger = alone.cluster, alone.client, alone.node, tmp_path / "ledger"
    script = f'echo "$SPINETTA_TASK_ID.$SPINETTA_ATTEMPT" >> {ledger}; sleep 1'
    tasks = [client.submit(["sh", "-c", script], cpus=1).id for _ in range(24)]
    eventually(lambda: ledger.exists() and ledger.read_text().count("\n") >= 4, within_s=WITHIN_S, what="load")
    shim = node.shim_pid()
    assert shim is not None
    os.kill(shim, signal.SIGKILL)
    ends = [state_is(cluster, client, task, State.COMPLETE) for task in tasks]
    assert {end.outcome for end in ends} == {Outcome.SUCCEEDED}
    assert set(Counter(ledger.read_text().split()).values()) == {1}, "an attempt ran twice"
    assert [a for end in ends for a in end.attempts if a.reason == "shim-lost"], "nothing was lost: nothing is tested"
    assert node.shim_pid() not in (None, shim)
    assert node.process is not None
    assert node.process.poll() is None, "the daemon has outlived it"
    attempts = node.data_dir / "shim" / "attempts"
    eventually(lambda: not list(attempts.iterdir()), within_s=60, what="nothing is left over")


def test_a_daemon_that_dies_at_any_of_its_effects(tmp_path: Path) -> None:
    assert dying.live(tmp_path, [3, 16]) == []  # of many: `python -m tests.cluster.dying`
