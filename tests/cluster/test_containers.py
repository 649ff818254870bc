"""Tasks in containers on real nodes: who runs them, why not, and what becomes of them when daemons die."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from spinetta.client import Client
from spinetta.errors import UserError
from spinetta.model import Outcome, State, Task
from tests.cluster.harness import Cluster, eventually, free_base, running_cluster
from tests.contract.containers import make_rootfs
from tests.contract.shims import groups_of

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(240)]

CALM = ("--lease-ttl", "30s", "--grace", "60s", "--kill-margin", "2s", "--cpus", "2", "--memory", "2GiB")


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_rootfs(tmp_path_factory.mktemp("cells") / "image", 0)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, image: Path) -> Iterator[Cluster]:
    """One node that runs processes only, and one that runs containers only."""
    with running_cluster(tmp_path_factory.mktemp("pair"), 1, *CALM, "--runtimes", "process") as cluster:
        cluster.options = (*CALM, "--runtimes", "container", "--allow", f"image:{image}")
        cluster.add("--tags", "cells")
        cluster.wait_ready()
        yield cluster


@pytest.fixture(scope="module")
def client(pair: Cluster) -> Iterator[Client]:
    with Client(pair.nodes[0].address) as opened:
        yield opened


def read(client: Client, task: str) -> bytes:
    """What is in its log now; nothing before it has started."""
    try:
        return b"".join(chunk.data for chunk in client.log(task))
    except UserError:
        return b""


def ended(client: Client, task: str) -> Task:
    """Its record, once it has ended."""
    done = client.wait([task], timeout_s=60)
    assert not done.timed_out
    return done.tasks[0].task


def test_each_runs_where_it_may(pair: Cluster, client: Client, image: Path) -> None:
    plain = [client.submit(["sh", "-c", "id -u"]) for _ in range(4)]
    cells = [client.submit(["sh", "-c", "id -u; touch /x"], image=f"rootfs:{image}") for _ in range(4)]
    done = {i.id: i for i in client.wait([h.id for h in (*plain, *cells)], timeout_s=60).tasks}
    expected = (
        (plain, "n1", b"0\n", Outcome.SUCCEEDED),
        (cells, "n2", b"1000\n", Outcome.FAILED),  # nothing writes to the root
    )
    for handles, node, output, outcome in expected:
        for handle in handles:
            found = done[handle.id]
            assert (found.node, found.task.outcome) == (node, outcome), pair.tails()
            assert read(client, handle.id) == output

    def describe(name: str) -> dict[str, Any]:
        return next(n for n in pair.json("node", "list")["nodes"] if n["name"] == name)

    assert describe("n1")["allows"] == ["process"]
    assert describe("n2")["allows"] == ["container", f"image:{image}"]
    eventually(lambda: describe("n2")["images"], within_s=60, what="its image is in its record")


def test_what_no_node_allows_waits_and_says_why(pair: Cluster, client: Client, image: Path) -> None:
    waits = client.submit(["true"], image=f"rootfs:{image}", network="host")
    eventually(lambda: client.get(waits.id).task.state is State.QUEUED, within_s=60, what="it waits")
    said = pair.cli("status", waits.id).stdout
    assert "n1: the node runs no containers" in said
    assert "n2: the node does not allow network:host" in said
    client.cancel([waits.id])
    assert ended(client, waits.id).outcome is Outcome.CANCELLED


def test_an_image_that_does_not_come_is_given_up_on_when_the_task_is_cancelled(pair: Cluster, client: Client) -> None:
    """The registry does not answer, which is tried again for a while."""
    nobody = f"{free_base(1)}1:5000"
    waits = client.submit(["true"], image=f"docker://{nobody}/tools:1")
    eventually(lambda: client.get(waits.id).task.state is State.RUNNING, within_s=60, what="it is taken")
    began_s = time.monotonic()
    client.cancel([waits.id])
    found = ended(client, waits.id)
    assert (found.outcome, found.attempts[-1].reason) == (Outcome.CANCELLED, "cancelled"), found
    assert "before it was started" in found.attempts[-1].message
    assert time.monotonic() - began_s < 20


def test_a_daemon_that_dies_leaves_containers_alone(pair: Cluster, client: Client, image: Path, tmp_path: Path) -> None:
    handle = client.submit(
        ["sh", "-c", "i=0; while [ ! -e /work/gate ]; do echo $i; i=$((i+1)); sleep 0.1; done; exit 5"],
        image=f"rootfs:{image}",
    )
    n2 = pair.nodes[1]
    eventually(lambda: b"1\n" in read(client, handle.id), within_s=60, what="it runs")
    n2.kill_daemon()
    n2.start(pair.peers_of(n2))
    pair.wait_ready()
    before = len(read(client, handle.id))
    eventually(lambda: len(read(client, handle.id)) > before, within_s=60, what="it runs on")
    (scratch,) = (n2.data_dir / "shim" / "scratch").glob(f"{handle.id}.*")
    (scratch / "work" / "gate").touch()
    found = ended(client, handle.id)
    assert (found.attempts[-1].exit_code, found.attempts_started) == (5, 1), pair.tails()
    eventually(lambda: not groups_of(f"{handle.id}.1"), within_s=60, what="its groups are gone")
    eventually(lambda: not scratch.exists(), within_s=60, what="its scratch directory is gone")


def test_a_shim_that_dies_takes_its_containers_along_and_they_run_again(
    pair: Cluster, client: Client, image: Path
) -> None:
    handle = client.submit(["sh", "-c", "echo begun; sleep 1000"], image=f"rootfs:{image}")
    n2 = pair.nodes[1]
    eventually(lambda: b"begun" in read(client, handle.id), within_s=60, what="it runs")
    shim = n2.shim_pid()
    assert shim is not None
    assert any(groups_of(f"{handle.id}.1"))
    os.kill(shim, signal.SIGKILL)
    eventually(lambda: client.get(handle.id).task.attempts_started == 2, within_s=60, what=f"again\n{pair.tails()}")
    eventually(lambda: not groups_of(f"{handle.id}.1"), within_s=60, what="nothing is left of the first")
    client.cancel([handle.id])
    assert ended(client, handle.id).outcome is Outcome.CANCELLED


def test_a_node_that_dies_while_an_image_comes_in_costs_the_task_nothing(tmp_path: Path, image: Path) -> None:
    """A registry that takes the call and says nothing: the node has told in its heartbeat that nothing runs."""
    brief = ("--lease-ttl", "3s", "--grace", "5s", "--kill-margin", "1s", "--cpus", "2", "--memory", "2GiB")
    with ExitStack() as stack:
        silent = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        cluster = stack.enter_context(running_cluster(tmp_path, 1, *brief, "--runtimes", "process"))
        cluster.options = (*brief, "--runtimes", "container")
        n2 = cluster.add()
        cluster.wait_ready()
        client = stack.enter_context(Client(cluster.nodes[0].address))
        nobody = f"127.0.0.1:{silent.getsockname()[1]}"
        waits = client.submit(["true"], image=f"docker://{nobody}/tools:1", losses_allowed=0)
        eventually(lambda: client.get(waits.id).task.state is State.RUNNING, within_s=60, what="it is taken")
        eventually(
            lambda: '"value"' in cluster.etcdctl("get", "/beat/n2", "--write-out=json"),
            within_s=60,
            what=f"the heartbeat says that it is being prepared\n{cluster.tails()}",
        )
        n2.crash()
        eventually(lambda: client.get(waits.id).task.state is State.QUEUED, within_s=60, what="it is put back")
        found = client.get(waits.id).task
        assert (found.losses, found.losses_excused, found.losses_preparing) == (0, 1, 1), found
        assert "while it brought in what this needs" in found.attempts[-1].message
        client.cancel([waits.id])
        assert ended(client, waits.id).outcome is Outcome.CANCELLED
