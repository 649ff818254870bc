"""Every limit of a task exceeded on a real node: what `status` and the exit codes tell of it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.harness import Cluster, free_base

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(180)]
CALM = ("--lease-ttl", "30s", "--grace", "60s", "--kill-margin", "2s", "--cpus", "8", "--memory", "2GiB")
SETTINGS = (*CALM, "--log-max", "64KiB", "--pids-max", "12", "--disk", "1GiB")
FORKS = "for n in 1 2 3 4 5 6 7 8 9 10 11 12 13 14; do sleep 100 & done; exit 5"
FILLS = "head -c 8000000 /dev/zero > f; exec sleep 100"
HOGS = "head -c 200000000 /dev/zero | tail -n 1; exit 3"
SAYS = "head -c 100000 /dev/zero; exit 4"
TASKS: dict[str, tuple[dict[str, str], str]] = {
    "memory": ({"memory": "32MiB"}, HOGS),
    "pids": ({}, FORKS),
    "disk": ({"disk": "4MiB"}, FILLS),
    "time": ({"time": "1s"}, "exec sleep 100"),
    "log": ({}, SAYS),
    "signal": ({"memory": "32MiB"}, "kill -9 $$"),
    "fits": ({"memory": "64MiB", "disk": "64MiB", "time": "60s"}, "head -c 8000000 /dev/zero > f; sleep 0.1 & wait"),
}
TOLD = {
    "memory": ("out-of-memory", "memory limit of 33554432 bytes"),
    "pids": ("out-of-pids", "its limit is 12"),
    "disk": ("disk-limit", "more than its disk limit of 4194304 bytes"),
    "time": ("walltime", "its wall time of 1 s"),
    "log": ("exit", "stdout was cut at the limit of 64KiB"),
    "signal": ("signal", ""),
    "fits": ("exit", ""),
}


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, dict[str, Any]]]:
    """What `status` says of each of them, all run at once on one node."""
    cluster = Cluster(tmp_path_factory.mktemp("limits"), free_base(1), SETTINGS)
    try:
        cluster.add()
        cluster.wait_ready()
        tasks = json.dumps([{**needs, "command": ["sh", "-c", script]} for needs, script in TASKS.values()])
        ids = cluster.cli("submit", "--file", "-", "--format", "json", "--cpus", "0.5", stdin=tasks).stdout.split()
        cluster.cli("wait", *ids, check=False)
        answer = json.loads(cluster.cli("status", *ids, "--json").stdout)
        yield dict(zip(TASKS, answer["tasks"], strict=True))
    finally:
        cluster.stop()


@pytest.mark.parametrize("name", TASKS)
def test_each_limit_is_told(told: dict[str, dict[str, Any]], name: str, tmp_path: Path) -> None:
    reason, words = TOLD[name]
    attempt = told[name]["attempts"][-1]
    assert attempt["reason"] == reason, attempt
    assert (words in attempt["message"]) if words else attempt["message"] == "", attempt
    assert attempt["usage"]["pids_peak"] >= 1
    if name == "fits":
        assert told[name]["outcome"] == "succeeded"
        written = attempt["usage"]["io_write_bytes"]
        assert written >= 8_000_000 or not os.major(tmp_path.stat().st_dev)  # memory, or a layer of a container
