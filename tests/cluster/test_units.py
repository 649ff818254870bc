"""What a task is given alone, on a real node: one card of two, also over the death of a daemon; and open files."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from spinetta.client import Client
from spinetta.errors import UserError
from spinetta.model import Outcome, State
from tests.cluster.harness import Cluster, eventually, running_cluster
from tests.contract.containers import make_rootfs
from tests.contract.test_units import two_cards

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(180)]
CALM = ("--lease-ttl", "30s", "--grace", "60s", "--kill-margin", "2s", "--cpus", "4", "--memory", "2GiB")
SHOWS = "echo $SPINETTA_DEVICES_GPU of $CUDA_VISIBLE_DEVICES; while [ ! -e gate ]; do sleep 0.1; done"


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_rootfs(tmp_path_factory.mktemp("units") / "image", 0)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, image: Path) -> Iterator[Cluster]:
    with two_cards() as cards:
        devices = f"gpu=0:{cards}/card0,1:{cards}/card1"
        options = (*CALM, "--devices", devices, "--allow", f"image:{image}", "--open-files-max", "5000")
        with running_cluster(tmp_path_factory.mktemp("cards"), 1, *options, "--open-files", "3000") as made:
            yield made


def said(client: Client, task: str) -> str:
    try:
        return b"".join(chunk.data for chunk in client.log(task)).decode()
    except UserError:  # it has not begun
        return ""


def open_gate(cluster: Cluster, task: str) -> None:
    (scratch,) = (cluster.nodes[0].data_dir / "shim" / "scratch").glob(f"{task}.*")
    (scratch / ("work" if (scratch / "work").is_dir() else "") / "gate").touch()


def test_one_card_of_two_each(cluster: Cluster, image: Path) -> None:
    node = cluster.nodes[0]
    with Client(node.address) as client:
        assert dict(client.nodes().nodes[0].record.capacity.countables) == {"gpu": 2}
        contained = client.submit(["sh", "-c", SHOWS], gpu=1, image=f"rootfs:{image}").id
        eventually(lambda: said(client, contained), within_s=60, what=f"it runs\n{cluster.tails()}")
        plain = client.submit(["sh", "-c", SHOWS], gpu=1).id
        eventually(lambda: said(client, plain), within_s=60, what=f"it runs\n{cluster.tails()}")
        assert (said(client, contained), said(client, plain)) == ("0 of 0\n", "1 of 1\n")
        third = client.submit(["sh", "-c", SHOWS], gpu=1).id

        def status(task: str) -> dict[str, Any]:
            found: dict[str, Any] = cluster.json("status", task)["tasks"][0]
            return found

        busy = "busy: 1 gpu wanted, 0 there"  # as the node tells of itself, a moment later
        eventually(lambda: busy in cluster.cli("status", third).stdout, within_s=60, what="it waits")
        node.kill_daemon()
        node.start()
        cluster.wait_ready()
        eventually(lambda: status(plain)["now"] and status(contained)["now"], within_s=60, what="they are known again")
        assert (status(plain)["now"]["units"], status(contained)["now"]["units"]) == ({"gpu": ["1"]}, {"gpu": ["0"]})
        assert "Given:" in cluster.cli("status", plain).stdout
        given = {"gpu": {"0": contained, "1": plain}}
        eventually(lambda: cluster.json("node", "show")["units_given"] == given, within_s=60, what="so it tells")
        assert f"gpu 0 ({contained[-6:]}), 1 ({plain[-6:]})" in cluster.cli("node", "show").stdout
        assert said(client, third) == ""
        open_gate(cluster, plain)  # the third takes its place
        eventually(lambda: said(client, third), within_s=60, what=f"it runs\n{cluster.tails()}")
        assert said(client, third) == "1 of 1\n"
        for task in (contained, third):
            open_gate(cluster, task)
        done = client.wait([contained, plain, third], timeout_s=60).tasks
        assert [(i.task.outcome, i.task.attempts_started) for i in done] == [(Outcome.SUCCEEDED, 1)] * 3
        units = node.data_dir / "units"
        eventually(lambda: not list(units.iterdir()), within_s=60, what="both are free again")


def test_no_card_is_with_two_at_once_while_daemons_die(cluster: Cluster, tmp_path: Path) -> None:
    locks, node = tmp_path / "locks", cluster.nodes[0]
    locks.mkdir()
    alone = 'cd "$0"; mkdir $SPINETTA_DEVICES_GPU || exit 9; sleep 0.3; rmdir $SPINETTA_DEVICES_GPU'
    with Client(node.address) as client:
        ids = [client.submit(["sh", "-c", alone, str(locks)], gpu=1, cpus=0.5).id for _ in range(24)]

        def ended(enough: int) -> bool:
            return sum(info.done for info in client.get_many(ids)) >= enough

        for so_many in (4, 12):
            eventually(partial(ended, so_many), within_s=60, what=f"they run\n{cluster.tails()}")
            node.kill_daemon()
            node.start()
            cluster.wait_ready()
        found = [info.task for info in client.wait(ids, timeout_s=60).tasks]
        assert [(t.outcome, t.attempts_started, t.message) for t in found] == [(Outcome.SUCCEEDED, 1, "")] * 24


def test_open_files_of_tasks(cluster: Cluster, image: Path) -> None:
    with Client(cluster.nodes[0].address) as client:
        shows = ["sh", "-c", "ulimit -Sn; ulimit -Hn"]
        asked = [
            (client.submit(shows, **more).id, numbers)
            for more, numbers in (
                ({}, "1024\n3000\n"),
                ({"image": f"rootfs:{image}"}, "1024\n3000\n"),
                ({"open_files": 5000}, "5000\n5000\n"),
                ({"open_files": 64, "image": f"rootfs:{image}"}, "64\n64\n"),
            )
        ]
        too_many = client.submit(shows, open_files=5001).id
        client.wait([task for task, _ in asked], timeout_s=60)
        for task, numbers in asked:
            assert said(client, task) == numbers, cluster.tails()
        assert client.get(too_many).task.state is State.QUEUED
        assert "n1: 5001 open files wanted, at most 5000 there" in cluster.cli("status", too_many).stdout
        assert "at most 5000 for a task" in cluster.cli("node", "show").stdout
        client.cancel([too_many])
