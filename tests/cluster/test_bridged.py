"""Containers with a network of their own on real nodes, each of which is in a network namespace."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from spinetta.runtime import netplace
from tests.cluster.harness import API_PORT, CLIENT_PORT, Node, eventually
from tests.cluster.netns import NetCluster, can_make_namespaces, network
from tests.contract.containers import make_rootfs

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.timeout(240),
    pytest.mark.skipif(not can_make_namespaces(), reason="only root makes networks"),
]
CALM = ("--lease-ttl", "30s", "--grace", "60s", "--kill-margin", "2s", "--cpus", "4", "--memory", "2GiB")


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_rootfs(tmp_path_factory.mktemp("bridged") / "image", 0)


@pytest.fixture
def cluster(tmp_path: Path, image: Path) -> Iterator[NetCluster]:
    with network(tmp_path, *CALM, "--allow", f"image:{image},network:bridge") as made:
        yield made


@pytest.fixture
def outside(cluster: NetCluster) -> Iterator[tuple[str, list[str]]]:
    """A server beside the nodes: where it is, and whom it has heard."""
    heard: list[str] = []
    with socket.create_server((f"{cluster.base}254", 0)) as server:
        server.settimeout(0.2)
        over = threading.Event()

        def serve() -> None:
            while not over.is_set():
                try:
                    connection, caller = server.accept()
                except TimeoutError:
                    continue
                with connection:
                    heard.append(caller[0])
                    connection.sendall(b"hello\n")

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"{cluster.base}254 {server.getsockname()[1]}", heard
        finally:
            over.set()
            thread.join()


def tables(node: Node) -> str:
    return subprocess.run([*node.prefix, "nft", "list", "tables"], capture_output=True, text=True, check=True).stdout


def cables(node: Node) -> list[str]:
    shown = subprocess.run([*node.prefix, "ip", "-o", "link"], capture_output=True, text=True, check=True).stdout
    return [line for line in shown.splitlines() if "veth" in line.split()[1]]


def test_a_task_with_a_network_from_its_submit_to_the_end_of_its_node(
    cluster: NetCluster, image: Path, outside: tuple[str, list[str]]
) -> None:
    where, heard = outside
    first = cluster.add()
    cluster.wait_ready()
    assert "network:bridge" in cluster.json("node", "list")["nodes"][0]["allows"], cluster.tails()
    place = netplace.place_of(first.data_dir)
    bridged = ("submit", "--image", f"rootfs:{image}", "--network", "bridge")
    tries = [f"busybox nc -w 5 {where}"]
    tries.append("gateway=$(busybox ip route | busybox sed -n 's/default via \\([^ ]*\\).*/\\1/p')")
    for address in (first.host, "$gateway", "127.0.0.1"):
        ports = (API_PORT, CLIENT_PORT, CLIENT_PORT + 1)
        tries += [f"busybox nc -w 5 {address} {port} && echo REACHED-{address}" for port in ports]
    tries.append('[ -n "$gateway" ] && echo tried')
    script = "; ".join((*tries, "until [ -e /tmp/never ]; do sleep 1; done"))
    task = cluster.cli(*bridged, "--", "sh", "-c", script).stdout.strip()
    eventually(lambda: heard, within_s=60, what=f"the outside is reached\n{cluster.tails()}")
    assert heard == [first.host], "in the machine's name"

    first.kill_daemon()
    first.start()
    cluster.wait_ready()
    assert len(cables(first)) == 1, "it keeps its network"
    said = eventually(
        lambda: "tried" in (log := cluster.cli("log", task).stdout) and log, within_s=60, what="all tried"
    )
    assert said == "hello\ntried\n"
    cluster.cli("cancel", task)
    eventually(lambda: not cables(first), within_s=60, what="its network is gone")
    eventually(lambda: not place.names(), within_s=60, what="and what is written down of it")

    assert "spinetta" in tables(first)
    cluster.cli(*bridged, "--", "sleep", "1000")
    eventually(lambda: cables(first), within_s=60, what="another runs")
    first.kill_daemon()
    stop = (sys.executable, "-m", "spinetta.cli", "node", "stop", "--data-dir", str(first.data_dir))
    subprocess.run([*first.prefix, *stop], timeout=60, check=True, capture_output=True)
    assert (tables(first), cables(first)) == ("", [])
    assert not place.folder.exists()
