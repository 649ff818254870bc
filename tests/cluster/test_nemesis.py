"""A short run of the nemesis with a fixed seed; `python -m tests.cluster.nemesis` runs longer ones."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.cluster.nemesis.plan import Times
from tests.cluster.nemesis.run import Settings, run
from tests.cluster.nemesis.spaces import can_run

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.timeout(300),
    pytest.mark.skipif(not can_run(), reason="takes root, ip(8), nsenter(1), iptables and mount"),
]

# In half a minute each comes about once: what dies, what freezes, what is cut off.
KINDS = ("kill-node", "stop-daemon", "cut-etcd", "kill-daemon", "kill-shim")


def test_every_promise_is_kept_while_everything_breaks(tmp_path: Path) -> None:
    said: list[str] = []
    settings = Settings(
        seed=int(os.environ.get("NEMESIS_SEED", "7")), seconds=26, nodes=4, rate=8, times=Times(2, 5, 1.5),
        settle_s=90, kinds=KINDS, progress=said.append,
    )  # fmt: skip
    result = run(tmp_path, settings)
    story = f"{result.verdict.text()}\n{json.dumps(result.report, indent=1)}\n" + "\n".join(said)
    assert result.good, story
    # The run was worth something: things broke, tasks were lost and put back, and what was to be cancelled was.
    report = result.report
    assert sum(report["faults"].values()) >= 3, story
    assert report["tasks"]["acknowledged"] >= 100, story
    assert report["tasks"]["outcomes"]["cancelled"] >= 1, story
    assert report["attempts"]["claimed"] > report["tasks"]["acknowledged"], story
