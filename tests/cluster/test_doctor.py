"""`spinetta doctor` beside a node that runs, hangs, and has ended."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from spinetta.cli import exits
from tests.cluster.harness import Cluster, running_cluster

pytestmark = pytest.mark.cluster


def doctor(cluster: Cluster) -> tuple[int, list[Any]]:
    data_dir = str(cluster.nodes[0].data_dir)
    done = cluster.cli(
        "doctor", "--json", "--only", "node,ports,data-dir", "--data-dir", data_dir, node=None, check=False
    )
    assert done.stderr == ""
    return done.returncode, json.loads(done.stdout)["findings"]


def test_a_node_of_a_secured_cluster(tmp_path: Path) -> None:
    """Nothing but the data directory is named: address, ports and certificates are the node's own."""
    with running_cluster(tmp_path, 1, "--cpus", "1", "--memory", "1GiB", secured=True) as cluster:
        code, found = doctor(cluster)
        assert (code, [f for f in found if f["level"] != "ok"]) == (exits.OK, [])
        said = "\n".join(f["seen"] for f in found)
        process = cluster.nodes[0].process
        assert process is not None
        assert f"node n1 (process {process.pid}, {cluster.nodes[0].address}) answers and serves" in said
        assert "etcd: 1 voter, all take part" in said
        assert said.count("is in use by this node") == 3
        assert "the certificate of node n1 is good for" in said

        process.send_signal(signal.SIGSTOP)
        try:
            code, found = doctor(cluster)
        finally:
            os.kill(process.pid, signal.SIGCONT)
        assert code == exits.TASK_FAILED
        assert any("does not answer" in f["seen"] for f in found if f["level"] == "problem"), found

        cluster.stop()
        code, found = doctor(cluster)
        assert code == exits.OK
        assert any("its daemon does not run" in f["seen"] for f in found), found
