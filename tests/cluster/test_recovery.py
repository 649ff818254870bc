"""A cluster that lost its majority, or all of it, made anew: from one voter's data, and from a backup."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from spinetta.client import Client
from spinetta.client.specs import make_spec
from tests.cluster.harness import Cluster, Node, eventually, running_cluster

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(420)]

QUICK = ("--lease-ttl", "3s", "--grace", "8s", "--kill-margin", "2s", "--cpus", "4", "--memory", "2GiB")
SETTINGS = {"SPINETTA_LEASE_TTL": "3s", "SPINETTA_GRACE": "8s", "SPINETTA_KILL_MARGIN": "2s"}
LONG_S = 60.0  # for what takes seconds on a quiet machine


@contextmanager
def client_of(cluster: Cluster, node: Node) -> Iterator[Client]:
    with Client(node.address, credentials=str(cluster.admin_pem) if cluster.secured else None, timeout_s=30) as client:
        yield client


def submit(client: Client, *commands: Sequence[str], **options: Any) -> list[str]:
    return [str(done.id) for done in client.submit_many([make_spec(list(c), **options) for c in commands])]


def states(client: Client) -> dict[str, str]:
    return {str(t.id): t.task.state.name.lower() for t in client.list()}


def wait_running(client: Client, *ids: str) -> None:
    eventually(
        lambda: all(states(client)[i] == "running" for i in ids), within_s=LONG_S, every_s=0.3, what=f"{ids} run"
    )


def identity(node: Node) -> dict[str, Any]:
    return dict(json.loads((node.data_dir / "identity.json").read_text()))


def stop_keep(node: Node) -> None:
    argv = [sys.executable, "-m", "spinetta.cli", "node", "stop", "--keep", "--data-dir", str(node.data_dir)]
    subprocess.run(argv, check=True, capture_output=True, timeout=60)
    assert node.process is not None
    node.process.wait(30)


def refused(cluster: Cluster, words: str, *argv: str) -> None:
    done = cluster.cli("cluster", *argv, node=None, check=False)
    assert (done.returncode, words in done.stderr) == (2, True), done.stderr


def said(node: Node, text: str) -> bool:
    return text in node.log.read_text()


def test_one_survivor_of_three_voters_is_a_cluster_again(tmp_path: Path) -> None:
    with running_cluster(tmp_path, 4, *QUICK, secured=True, workers=1) as c:
        c.wait_voters(3)
        survivor, dead, worker = c.nodes[0], c.nodes[1:3], c.nodes[3]
        with client_of(c, survivor) as client:
            done = submit(client, *[["true"]] * 5)
            client.wait(done, timeout_s=LONG_S)
            long = submit(client, *[["sleep", "1000"]] * 6, cpus=4)
            eventually(
                lambda: list(states(client).values()).count("running") == 4, within_s=LONG_S, what="each node runs one"
            )

        # Any node takes a backup, a worker by way of a voter.
        file = tmp_path / "backup.db"
        taken = c.json("cluster", "backup", "--timeout", "60s", str(file), node=3)
        cluster_id = identity(survivor)["cluster_id"]
        assert (taken["cluster_id"], taken["bytes"]) == (cluster_id, file.stat().st_size)

        for node in dead:
            node.crash()
        place = ("--data-dir", str(survivor.data_dir))
        refused(c, "a daemon runs on", "recover", *place)
        stop_keep(survivor)
        before = identity(survivor)
        refused(c, "x was typed, not", "recover", *place, "--confirm", "x")
        assert identity(survivor) == before

        answer = c.cli("cluster", "recover", *place, "--confirm", cluster_id, "--json", env=SETTINGS, timeout_s=180)
        made = json.loads(answer.stdout)
        assert made["former_cluster_ids"] == [cluster_id] != [made["cluster_id"]]
        assert Path(made["put_aside"]).is_dir()
        assert not list(survivor.data_dir.glob(".recovery-*"))
        survivor.start()
        c.wait_ready(2)  # the worker has found out by itself that all it knew is of another time
        assert said(worker, "begins again with nothing in memory")

        with client_of(c, survivor) as client:
            now = states(client)
            assert set(now) == {*done, *long}, "all that was acknowledged is there"
            assert all(now[task] == "complete" for task in done)
            client.cancel(long)
            new = submit(client, ["sh", "-c", "exit 3"])
            client.wait([*new, *long], timeout_s=LONG_S)
            assert client.get(new[0]).task.attempts[-1].exit_code == 3

            # Those that were given up come back with all they have: they do no harm, and sit in the new cluster.
            for node in dead:
                node.start()
            c.wait_ready(4)
            c.wait_voters(3)
            for node in dead:
                assert said(node, f"cluster {cluster_id} has been made anew as {made['cluster_id']}")
                assert (node.data_dir / f"etcd.of-{cluster_id}").is_dir()
                assert identity(node)["cluster_id"] == made["cluster_id"]
            with client_of(c, dead[0]) as other:
                assert states(other) == states(client) == dict.fromkeys([*done, *long, *new], "complete")


def test_a_backup_becomes_a_cluster_and_what_is_left_of_the_old_one_follows(tmp_path: Path) -> None:
    with running_cluster(tmp_path, 2, *QUICK) as c:
        first, other = c.nodes
        slow, file = ["sleep", "1000"], tmp_path / "backup.db"
        with client_of(c, first) as client:
            done = submit(client, ["true"])
            client.wait(done, timeout_s=LONG_S)
            held = submit(client, slow, slow, cpus=3)
            wait_running(client, *held)
            waiting = submit(client, ["true"], ["true"], tags="later")

            # Taken under load.
            over, loaded = threading.Event(), list[str]()

            def load() -> None:
                with client_of(c, other) as more:
                    while not over.is_set():
                        loaded.extend(submit(more, ["true"], cpus=0.1))

            loading = threading.Thread(target=load)
            loading.start()
            try:
                eventually(lambda: loaded, within_s=LONG_S, what="a load")
                before = len(loaded)
                taken = c.json("cluster", "backup", "--timeout", "60s", str(file))
            finally:
                over.set()
                loading.join(LONG_S)

            # What comes after the backup is forgotten: ends, cancellations, tasks.
            client.cancel([held[0], waiting[0]])
            client.wait([held[0], *loaded], timeout_s=LONG_S)
            late = submit(client, slow, cpus=3)
            wait_running(client, *late)
            lost = submit(client, ["true"], cpus=0.1)
            client.wait(lost, timeout_s=LONG_S)
        first.crash()

        new = tmp_path / "new"
        place = ("--name", first.name, "--address", first.address, "--data-dir")
        cut = tmp_path / "cut.db"
        cut.write_bytes(file.read_bytes()[:-4096])
        refused(c, "is damaged", "restore", str(cut), *place, str(new))
        refused(c, "x was typed", "restore", str(file), *place, str(new), "--confirm", "x")
        refused(c, "a daemon runs on", "restore", str(file), *place, str(other.data_dir))
        refused(c, "this is the directory of a node", "restore", str(file), *place, str(first.data_dir))
        assert [p.name for p in new.iterdir()] == ["daemon.lock"], "nothing is left of what was refused"

        argv = ("restore", str(file), *place, str(new), "--confirm", taken["cluster_id"], "--json")
        made = json.loads(c.cli("cluster", *argv, node=None, env=SETTINGS, timeout_s=180).stdout)
        assert made["former_cluster_ids"] == [taken["cluster_id"]]
        first.data_dir = new
        first.start()
        c.wait_ready(2)  # the other one has noticed, stopped what it ran, and come back in a new life
        assert said(other, "begins again with nothing in memory")
        assert identity(other)["cluster_id"] == made["cluster_id"]

        with client_of(c, first) as client:
            wait_running(client, *held)  # both: the cancellation is undone
            now = states(client)
            assert now[waiting[0]] == now[waiting[1]] == "queued"
            assert {*done, *held, *waiting, *loaded[:before]} <= set(now)
            assert not {*late, *lost} & set(now)
            client.cancel([*held, *waiting])
            client.wait([i for i in now if i in loaded], timeout_s=LONG_S)
            client.wait(held, timeout_s=LONG_S)
            assert set(states(client).values()) == {"complete"}


def test_clients_mistakes_are_told(tmp_path: Path) -> None:
    """Without a cluster: what is wrong is said before anything is looked for."""
    c = Cluster(tmp_path, "127.0.0.", ())
    refused(c, "there is no data directory", "recover", "--data-dir", str(tmp_path / "none"))
    empty = tmp_path / "empty"
    empty.mkdir()
    refused(c, "there is no voter's data", "recover", "--data-dir", str(empty))
    refused(c, "cannot be read: No such file", "restore", str(tmp_path / "none.db"), "--data-dir", str(empty),
            "--etcd-client-port", "0", "--etcd-peer-port", "0")  # fmt: skip
