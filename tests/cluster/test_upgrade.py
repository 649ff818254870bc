"""Nodes that are upgraded while they work: real daemons of two versions, real shims, runc and etcd."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import spinetta
from tests.cluster.harness import Cluster, Node, alive, eventually, free_base
from tests.contract.containers import make_rootfs
from tests.contract.oldshims import UNSAID
from tests.contract.shims import identity, kill_shim

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(240)]

CALM = ("--lease-ttl", "10s", "--grace", "60s", "--kill-margin", "2s", "--cpus", "4", "--memory", "2GiB")


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


def shims_of(cluster: Cluster, node: Node) -> list[dict[str, Any]]:
    """As the node tells of them; none yet when it does not answer."""
    shown = cluster.cli("node", "list", "--json", node=cluster.nodes.index(node), check=False)
    if shown.returncode:
        return []
    found = cluster.json("node", "show", node.name, node=cluster.nodes.index(node))
    return list(found["shims"])


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
    with of_earlier(tmp_path, earlier, 1, "--allow", f"image:{image}") as cluster:
        (node,) = cluster.nodes
        first = identity(node.data_dir / "shim")["pid"]
        (etcd,) = etcd_of(node)
        assert parent(etcd) == first
        go = tmp_path / "go"
        plain = cluster.cli("submit", "--", *waiting(go)).stdout.split()[-1]
        cell = cluster.cli("submit", "--image", f"rootfs:{image}", "--", *waiting(Path("go"))).stdout.split()[-1]
        for task in (plain, cell):
            eventually(lambda t=task: "begun" in cluster.cli("log", t, check=False).stdout, within_s=30, what="begun")
        log = subprocess.Popen(
            [sys.executable, "-m", "spinetta.cli", "log", "-f", plain],
            stdout=subprocess.PIPE, text=True, env={**os.environ, "SPINETTA_NODE": node.address},
        )  # fmt: skip
        try:
            node.kill_daemon()
            for is_killed in (True, False):  # in the midst of it
                node.start()
                eventually(
                    lambda: (node.data_dir / "shim" / "generations" / "2" / "shim.sock").exists(),
                    within_s=30, what="a shim beside the first",
                )  # fmt: skip
                if is_killed:
                    node.kill_daemon()
            cluster.wait_ready()
            newest, old = eventually(lambda: shims_of(cluster, node), within_s=20, what="the node answers")
            assert (newest["retiring"], newest["code"] != "") == (False, True)
            assert (old["retiring"], old["attempts"], old["services"], old["code"]) == (True, 2, ["etcd"], "")
            assert "retiring with 2 attempts and etcd" in cluster.cli("node", "show").stdout
            assert "goes on with 2 attempts" in cluster.cli("node", "show").stdout
            new = cluster.cli("submit", "--wait", "--", "sh", "-c", "echo new in $PWD").stdout
            new = cluster.json("list", "--state", "complete")["tasks"][0]["id"]
            assert "generations/2/scratch" in cluster.cli("log", new).stdout
            assert cluster.cli("exec", cell, "--", "touch", "/work/file").returncode == 0
            assert cluster.cli("cp", f"{cell}:file", str(tmp_path / "copied")).returncode == 0
            assert parent(etcd_of(node)[0]) == first, "etcd stays where it is while it costs nothing"
            go.touch()
            cluster.cli("exec", cell, "--", "touch", "go")
            cluster.cli("wait", plain, cell, timeout_s=60)
            for task in (plain, cell):
                found = cluster.json("status", task)["tasks"][0]
                assert (found["outcome"], len(found["attempts"])) == ("succeeded", 1), found
            out, _err = log.communicate(timeout=30)
            assert [line.split()[0] for line in out.splitlines()] == ["begun", "done"]
        finally:
            log.kill()
            log.wait()
        eventually(lambda: not alive(first), within_s=40, what="the first shim has ended")
        second = identity(node.data_dir / "shim" / "generations" / "2")["pid"]
        assert parent(eventually(lambda: etcd_of(node), within_s=10, what="etcd runs")[0]) == second
        cluster.wait_ready()
        eventually(lambda: len(shims_of(cluster, node)) == 1, within_s=20, what="one shim is left")
        assert not list((node.data_dir / "shim" / "attempts").iterdir())
        # The machine goes down: all of it is found again, in the first directory.
        node.kill_daemon()
        kill_shim(node.data_dir / "shim" / "generations" / "2")
        node.start()
        cluster.wait_ready()
        cluster.cli("submit", "--wait", "--", "true")
        stopped = cluster.cli("node", "stop", "--data-dir", str(node.data_dir), node=None)
        assert "stopped" in stopped.stdout
        assert not etcd_of(node)
