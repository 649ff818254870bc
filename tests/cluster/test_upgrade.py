"""Nodes that are upgraded while they work: real daemons of two versions, real shims, runc and etcd."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import spinetta
from spinetta.client import Client
from spinetta.errors import StoreUnavailable, UserError
from spinetta.model import Outcome, ShimInfo
from tests.cluster.harness import READY_S, Cluster, Node, alive, eventually, free_base
from tests.contract.containers import make_rootfs
from tests.contract.oldshims import UNSAID
from tests.contract.shims import identity

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(240)]

CALM = ("--lease-ttl", "60s", "--grace", "120s", "--kill-margin", "2s", "--cpus", "4", "--memory", "2GiB")


@pytest.fixture(scope="session")
def earlier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package of an earlier version: its shim does not say what code it is."""
    folder = tmp_path_factory.mktemp("earlier")
    there = Path(spinetta.__file__).parent
    shutil.copytree(there, folder / "spinetta", ignore=shutil.ignore_patterns("__pycache__", ".mypy_cache"))
    server = folder / "spinetta" / "runtime" / "shim" / "server.py"
    text = server.read_text()
    for line in UNSAID:
        assert line in text
        text = text.replace(line, "")
    server.write_text(text)
    return folder


@contextlib.contextmanager
def of_earlier(directory: Path, package: Path, count: int, *options: str) -> Iterator[Cluster]:
    """A cluster of nodes of that version, all ready; they are of the installed one when they start again."""
    cluster = Cluster(directory, free_base(count), (*CALM, *options))
    try:
        for _ in range(count):
            node = cluster.add(start=False)
            node.prefix = ("env", "-C", str(package), f"PYTHONPATH={package}")
            node.start(cluster.peers_of(node))
            cluster.wait_ready()
            node.prefix = ()
        yield cluster
    finally:
        cluster.stop()


def shims_of(client: Client, name: str) -> tuple[ShimInfo, ...]:
    """As the node tells of them; none while it does not answer."""
    try:
        return next(n.record.shims for n in client.nodes().nodes if n.record.name == name)
    except (StoreUnavailable, StopIteration):
        return ()


def read(client: Client, task: str) -> str:
    """What is in its log now; nothing before it has started."""
    try:
        return b"".join(chunk.data for chunk in client.log(task)).decode()
    except UserError:
        return ""


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def etcd_of(node: Node) -> list[int]:
    """Pids of its etcd."""
    wanted = os.fsencode(str(node.data_dir / "etcd"))
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            try:
                words = (process / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if words[0].endswith(b"etcd") and wanted in b"".join(words):
                found.append(int(process.name))
    return found


def waiting(go: Path) -> list[str]:
    return ["sh", "-c", f"echo begun in $PWD; while [ ! -e {go} ]; do sleep 0.1; done; echo done"]


def test_tasks_go_on_over_an_upgrade(tmp_path: Path, earlier: Path) -> None:
    image = make_rootfs(tmp_path / "image", 0)
    go = tmp_path / "go"
    with contextlib.ExitStack() as stack:
        cluster = stack.enter_context(of_earlier(tmp_path, earlier, 1, "--allow", f"image:{image}"))
        (node,) = cluster.nodes
        home, second = node.data_dir / "shim", node.data_dir / "shim" / "generations" / "2"
        client = stack.enter_context(Client(node.address))
        first = identity(home)["pid"]
        (etcd,) = etcd_of(node)
        assert parent(etcd) == first
        plain = client.submit(waiting(go))
        cell = client.submit(waiting(Path("go")), image=f"rootfs:{image}")
        eventually(lambda: all("begun" in read(client, t.id) for t in (plain, cell)), within_s=60, what="both run")
        log = subprocess.Popen(
            [sys.executable, "-m", "spinetta.cli", "log", "-f", plain.id],
            stdout=subprocess.PIPE, text=True, env={**os.environ, "SPINETTA_NODE": node.address},
        )  # fmt: skip
        stack.callback(log.wait)
        stack.callback(log.kill)
        node.kill_daemon()
        for is_killed in (True, False):  # in the midst of it
            node.start()
            eventually(lambda: (second / "shim.sock").exists(), within_s=60, what="a shim beside the first")
            if is_killed:
                node.kill_daemon()
        newest, old = eventually(
            lambda: len(found := shims_of(client, node.name)) == 2 and found,
            within_s=READY_S,
            what="the node tells of both",
        )
        assert (newest.retiring, newest.code != "") == (False, True)
        assert (old.retiring, old.attempts, old.services, old.code) == (True, 2, ("etcd",), "")
        assert json.loads((node.data_dir / "identity.json").read_text())["shims"] == "later"
        shown = cluster.cli("node", "show").stdout
        assert "retiring with 2 attempts and etcd" in shown
        assert "goes on with 2 attempts" in shown
        assert (
            "2 shims run"
            in cluster.cli("doctor", "--only", "node", "--data-dir", str(node.data_dir), check=False, node=None).stdout
        )
        new = client.submit(["sh", "-c", "echo new in $PWD"])
        assert client.wait([new.id], timeout_s=30).tasks[0].task.outcome is Outcome.SUCCEEDED
        assert "generations/2/scratch" in read(client, new.id)
        assert cluster.cli("exec", cell.id, "--", "touch", "/work/file").returncode == 0
        assert cluster.cli("cp", f"{cell.id}:file", str(tmp_path / "copied")).returncode == 0
        assert parent(etcd_of(node)[0]) == first, "etcd stays where it is while it costs nothing"
        (home / "scratch" / cell.id).with_name(f"{cell.id}.1").joinpath("work", "go").touch()
        go.touch()
        done = client.wait([plain.id, cell.id], timeout_s=60).tasks
        assert [(i.task.outcome, len(i.task.attempts)) for i in done] == [(Outcome.SUCCEEDED, 1)] * 2, cluster.tails()
        out, _ = log.communicate(timeout=30)
        assert [line.split()[0] for line in out.splitlines()] == ["begun", "done"]
        eventually(lambda: not alive(first), within_s=40, what="the first shim has ended")
        etcd = eventually(lambda: etcd_of(node), within_s=60, what="etcd runs")[0]
        assert parent(etcd) == identity(second)["pid"]
        eventually(lambda: len(shims_of(client, node.name)) == 1, within_s=READY_S, what="one shim is left")
        assert not list((home / "attempts").iterdir())
        # All that is stopped is, and the next start finds one directory.
        assert "stopped" in cluster.cli("node", "stop", "--data-dir", str(node.data_dir), node=None).stdout
        assert not etcd_of(node)
        assert "shims" not in json.loads((node.data_dir / "identity.json").read_text()), "the earlier one may come back"
        assert node.process is not None
        node.process.wait(10)
        node.start()
        eventually(lambda: shims_of(client, node.name), within_s=READY_S, what="it is there again")
        assert not second.exists()
