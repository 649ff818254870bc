"""Two of three voters freeze: no task outlives its grace, refusals say why, and all goes on without a hand."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

from spinetta.client import AsyncClient
from spinetta.errors import SpinettaError, StoreUnavailable
from spinetta.model import State, TaskId
from tests.cluster.harness import CLIENT_PORT, Cluster, Node, eventually, running_cluster
from tests.cluster.history import check_history

pytestmark = pytest.mark.cluster

GRACE_S, MARGIN_S = 8.0, 2.0
ANSWER_S = 4.0  # the client's limit


@pytest.fixture(scope="module")
def trio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    options = ("--lease-ttl", "2s", "--kill-margin", f"{MARGIN_S:g}s", "--grace", f"{GRACE_S:g}s")
    with running_cluster(tmp_path_factory.mktemp("quorum"), 3, *options) as cluster:
        cluster.wait_voters(3)
        yield cluster


def etcd_pid(node: Node) -> int:
    wanted = os.fsencode(f"--data-dir={node.data_dir / 'etcd'}")
    for proc in Path("/proc").iterdir():
        try:
            if proc.name.isdigit() and wanted in (proc / "cmdline").read_bytes().split(b"\0"):
                return int(proc.name)
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
    raise AssertionError(f"{node.name} runs no etcd")


def asked(node: Node, call: Callable[[AsyncClient], Coroutine[Any, Any, Any]]) -> tuple[float, SpinettaError | None]:
    """How long a call took, and how it failed."""

    async def work() -> SpinettaError | None:
        async with AsyncClient(node.address, timeout_s=ANSWER_S) as client:
            try:
                await call(client)
            except SpinettaError as error:
                return error
            return None

    began_s = time.monotonic()
    error = asyncio.run(work())
    return time.monotonic() - began_s, error


async def _list(client: AsyncClient) -> None:
    async for _ in client.list():
        pass


def test_all_stands_still_safely_and_goes_on_by_itself(trio: Cluster, tmp_path: Path) -> None:
    ledger, second = tmp_path / "ledger", tmp_path / "second"
    # The first attempt lives for ever and says so; the next one ends at once.
    alive = f"cut -d' ' -f1 /proc/uptime >> {ledger}"
    script = f"test -e {second} && exit 0; touch {second}; while :; do {alive}; sleep 0.2; done"
    long = trio.cli("submit", "--", "sh", "-c", script).stdout.strip()
    waiting = [trio.cli("submit", "--tag", "nowhere", "--", "true").stdout.strip() for _ in range(2)]
    eventually(ledger.exists, within_s=60, what="it runs")
    frozen = [etcd_pid(node) for node in trio.nodes[1:]]
    for pid in frozen:
        os.kill(pid, signal.SIGSTOP)
    lost_s = float(Path("/proc/uptime").read_text().split()[0])
    try:
        survivor = trio.nodes[0]

        def no_quorum() -> bool:
            error = asked(survivor, lambda c: c.submit(["true"]))[1]
            return isinstance(error, StoreUnavailable) and error.reason == "no-quorum"

        eventually(no_quorum, within_s=60, what="a submit is refused because there is no majority")
        calls: dict[str, Callable[[AsyncClient], Coroutine[Any, Any, Any]]] = {
            "submit": lambda c: c.submit(["true"]),
            "list": _list,
            "get": lambda c: c.get(long),
            "cancel": lambda c: c.cancel([waiting[0]]),
            "nodes": lambda c: c.nodes(),
        }
        for name, call in calls.items():
            took_s, error = asked(survivor, call)
            assert isinstance(error, StoreUnavailable), name
            assert error.reason == "no-quorum", name
            assert "n1 answers but sees no leader; n2, n3 do not answer; nothing has been changed" in str(error)
            assert "goes on by itself when one more of them is back" in error.hint
            assert took_s < ANSWER_S + 3, name
        told = trio.cli("cluster", "status", node=0, check=False)
        assert told.returncode == 4
        assert "does not answer" in told.stdout
        assert "no majority of the 3 voters" in told.stderr
        elsewhere = asked(trio.nodes[1], lambda c: c.submit(["true"]))[1]
        assert isinstance(elsewhere, StoreUnavailable)

        def silent() -> bool:
            last_s = float(ledger.read_text().split()[-1])
            return float(Path("/proc/uptime").read_text().split()[0]) - last_s > 2.0

        eventually(silent, within_s=GRACE_S + 30, what="the task that nobody renews is dead")
        assert float(ledger.read_text().split()[-1]) < lost_s + GRACE_S
    finally:
        for pid in frozen:
            os.kill(pid, signal.SIGCONT)
    back = eventually(
        lambda: asked(trio.nodes[0], lambda c: c.submit(["true"]))[1] is None, within_s=60, what="a submit is taken"
    )
    assert back

    async def ended() -> list[str]:
        async with AsyncClient(trio.nodes[2].address) as client:
            return [i.task.spec.id async for i in client.list() if i.task.state is not State.COMPLETE]

    eventually(lambda: asyncio.run(ended()) == sorted(waiting), within_s=90, every_s=0.5, what="all acknowledged ends")
    seen = trio.json("status", long)["tasks"][0]
    assert seen["outcome"] == "succeeded"
    assert trio.cli("cluster", "status", check=False).returncode == 0
    trio.cli("cancel", *waiting)
    checker = check_history(f"{trio.nodes[0].host}:{CLIENT_PORT}")
    assert checker.recorded[TaskId(long)] == 1
