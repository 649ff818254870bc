"""Voters that stay away, in a secured cluster of real nodes: a spare takes the seat, and they return as spares."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.cluster.harness import Cluster, Node, eventually, running_cluster

pytestmark = pytest.mark.cluster

QUICK = (
    "--lease-ttl",
    "2s",
    "--grace",
    "6s",
    "--kill-margin",
    "2s",
    "--reconcile",
    "5s",
    "--voter-replace-after",
    "4s",
)
WITHIN_S = 60.0


def listed(cluster: Cluster, by: int) -> Mapping[str, Any]:
    return {n["name"]: n for n in cluster.json("node", "list", node=by)["nodes"]}


def wait_voters(cluster: Cluster, *names: str, by: int) -> float:
    """Wait until these are the voters; for how long."""
    start_s = time.monotonic()

    def so() -> bool:
        done = cluster.cli("node", "list", "--json", node=by, check=False)
        found = json.loads(done.stdout)["nodes"] if done.returncode == 0 else []
        return sorted(n["name"] for n in found if n["voter"]) == sorted(names)

    try:
        eventually(so, within_s=WITHIN_S, every_s=0.3, what=f"{names} vote")
    except AssertionError as e:
        raise AssertionError(f"{e}\n{cluster.tails()}") from None
    return time.monotonic() - start_s


def etcd_of(node: Node) -> psutil.Process:
    """Its etcd's process."""
    data_dir = f"--data-dir={node.data_dir / 'etcd'}"
    return next(p for p in psutil.process_iter(["cmdline"]) if data_dir in (p.info["cmdline"] or ()))


def submit(cluster: Cluster, by: int) -> str:
    return str(json.loads(cluster.cli("submit", "--json", "--", "true", node=by).stdout)["tasks"][0]["id"])


def test_voters_that_stay_away_are_replaced_and_come_back_as_spares(tmp_path: Path) -> None:
    with running_cluster(tmp_path, 4, *QUICK, secured=True) as cluster:
        wait_voters(cluster, "n1", "n2", "n3", by=0)
        n1, _n2, n3, _n4 = cluster.nodes
        before = submit(cluster, 0)
        cluster.cli("wait", before, node=0)

        n3.crash()
        took_s = wait_voters(cluster, "n1", "n2", "n4", by=0)
        print(f"a dead voter was replaced after {took_s:.1f} s")  # noqa: T201

        n3.start()  # it finds out that it has been replaced, and is a spare
        eventually(
            lambda: listed(cluster, 0).get("n3", {}).get("status") == "ready", within_s=WITHIN_S, what="n3 is back"
        )
        eventually((n3.data_dir / "etcd.removed").is_dir, within_s=WITHIN_S, what="its data is put aside")
        assert not (n3.data_dir / "etcd").exists()

        n1.crash()  # it held the office, and founded the cluster
        took_s = wait_voters(cluster, "n2", "n3", "n4", by=1)
        print(f"the dead leader was replaced after {took_s:.1f} s")  # noqa: T201

        frozen = etcd_of(n3)
        frozen.send_signal(signal.SIGSTOP)  # its daemon lives and talks to the others
        try:
            ill = "voter n3 has an etcd that does not answer, or makes no progress; no other node could take its seat"
            eventually(
                lambda: any(ill in line for line in cluster.json("node", "list", node=1)["notices"]),
                within_s=WITHIN_S, what="it is told",
            )  # fmt: skip
        finally:
            os.kill(frozen.pid, signal.SIGCONT)
        after = submit(cluster, 1)
        cluster.cli("wait", after, node=1, timeout_s=90)
        states = {t["id"]: t["state"] for t in cluster.json("status", before, after, node=1)["tasks"]}
        assert set(states.values()) == {"complete"}, states
        for node in cluster.nodes:
            said = node.log.read_text()
            assert "Traceback" not in said
            for line in ("n3 is to be removed: it stays away", "n1 is to be removed: it stays away"):
                assert said.count(line) <= 1, "told once"
