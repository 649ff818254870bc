"""A store that runs full, by tasks and then by what is none: nothing is lost, and there is room again by itself."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import secrets
import subprocess
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from spinetta.client import AsyncClient
from spinetta.errors import OutcomeUnknown, SpinettaError, StoreFull, StoreUnavailable
from spinetta.model import Outcome, Revision, TaskId
from spinetta.store.etcd import EtcdStore
from spinetta.store.protocol import Change
from spinetta.txn import Put, Txn
from tests.cluster.harness import CLIENT_PORT, Cluster, eventually, running_cluster
from tests.cluster.history import Checker

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]

log = logging.getLogger(__name__)

GRACE_S = 20.0
ENV_BYTES = 200_000
CLIENTS = 3
FILLS_MAX = 8
REFUSED = 4  # the exit code of a command that a full store refuses
RUNNING = 6  # all the time, on half of the cores
RELIEF_S = 120.0  # about 30 s: history is kept for 15 s, given up every 15 s; then a second for each step
OPTIONS = (
    "--lease-ttl", "10s", "--grace", f"{GRACE_S:g}s", "--kill-margin", "2s", "--cpus", "4", "--memory", "2GiB",
    "--reconcile", "1s", "--collect-after", "1s", "--etcd-quota", "32MiB",
)  # fmt: skip


class Follower:
    """Feeds each revision to a checker as it comes: the history is given up meanwhile."""

    def __init__(self, endpoints: list[str]) -> None:
        self.checker = Checker()
        self.seen = Revision(0)
        self._endpoints = endpoints
        self._stop = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))
        self.failure: BaseException | None = None

    async def _run(self) -> None:
        store = EtcdStore(self._endpoints)
        following = asyncio.create_task(self._follow(store))
        try:
            stopped = asyncio.create_task(asyncio.to_thread(self._stop.wait))
            done, _ = await asyncio.wait([following, stopped], return_when=asyncio.FIRST_COMPLETED)
            if following in done:
                self.failure = following.exception()
        finally:
            following.cancel()
            await asyncio.wait([following])
            await store.close()

    async def _follow(self, store: EtcdStore) -> None:
        async with contextlib.aclosing(store.watch("/", start=Revision(1))) as watch:
            async for changes in watch:
                events: dict[Revision, list[Change]] = {}
                for event in changes.events:
                    events.setdefault(event.revision, []).append(event)
                for revision in sorted(events):
                    self.checker.feed(revision, events[revision])
                self.seen = changes.revision

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> Checker:
        """End it; what it has found."""
        self._stop.set()
        self._thread.join(20)
        if self.failure is not None:
            raise self.failure
        return self.checker


async def submit_until_refused(
    address: str, command: list[str], most: int
) -> tuple[list[TaskId], SpinettaError | None]:
    """Large tasks, one after the other; those that were acknowledged, and why there are no more."""
    taken: list[TaskId] = []
    async with AsyncClient(address) as client:
        for _ in range(most):
            try:
                env = {f"V{i}": secrets.token_hex(10_000) for i in range(ENV_BYTES // 20_000)}
                handle = await client.submit(command, env=env, cpus=1, retries=3)
            except SpinettaError as error:
                return taken, error
            taken.append(TaskId(handle.id))
    return taken, None


def fill(cluster: Cluster, command: list[str]) -> tuple[list[TaskId], subprocess.CompletedProcess[str]]:
    """All clients at once, until none of them gets through, nor one more; what was taken, and how that one ended.

    Again when it did get through: the history is given up every 15 s, and a slow disk takes as long to fill the store.
    """

    async def work() -> list[tuple[list[TaskId], SpinettaError | None]]:
        clients = [submit_until_refused(cluster.nodes[i].address, command, 300) for i in range(CLIENTS)]
        return await asyncio.gather(*clients)

    taken: list[TaskId] = []
    for _ in range(FILLS_MAX):
        done = asyncio.run(work())
        for tasks, error in done:
            taken += tasks
            assert error is not None
            assert isinstance(error, StoreUnavailable) or getattr(error, "reason", "") == "store-full", error
        one_more = cluster.cli("submit", "--", "true", check=False)
        if one_more.returncode == REFUSED:
            return taken, one_more
    raise AssertionError(f"not refused, though {len(taken)} tasks of {ENV_BYTES} bytes were taken: {one_more}")


def gate_command(gate: Path) -> list[str]:
    """It ends when that file is there."""
    return ["sh", "-c", f"while [ ! -e {gate} ]; do sleep 0.2; done"]


def put_junk(cluster: Cluster) -> None:
    """Values of a megabyte until etcd refuses them."""

    async def work() -> None:
        store = EtcdStore([f"http://{cluster.nodes[0].host}:{CLIENT_PORT}"])
        try:
            for n in range(200):
                try:
                    await store.commit(Txn(then=(Put(f"/junk/{n}", secrets.token_bytes(1_000_000)),)))
                except StoreFull:
                    return
                except OutcomeUnknown:  # a slow disk
                    continue
        finally:
            await store.close()
        raise AssertionError("200 MB went into a store of 32 MiB")

    asyncio.run(work())


def has_no_alarms(cluster: Cluster) -> bool:
    """False also when a member does not answer, as one that is being defragmented."""
    try:
        return not cluster.etcdctl("alarm", "list").strip()
    except subprocess.CalledProcessError:
        return False


def answers(cluster: Cluster, command: tuple[str, ...], code: int, words: str) -> bool:
    """Whether a command ends with that code and says those words."""
    said = cluster.cli(*command, check=False)
    return said.returncode == code and words in said.stdout + said.stderr


def takes_submits(cluster: Cluster) -> bool:
    return cluster.cli("submit", "--", "true", check=False).returncode == 0


def sizes(cluster: Cluster) -> str:
    """In use and file of each voter, MiB."""
    status = json.loads(cluster.cli("cluster", "status", "--json", check=False).stdout)
    return " ".join(f"{v['db_in_use_bytes'] >> 20}/{v['db_bytes'] >> 20}" for v in status["voters"])


@pytest.fixture
def trio(tmp_path: Path) -> Iterator[Cluster]:
    with running_cluster(tmp_path, 3, *OPTIONS) as cluster:
        cluster.wait_voters(3)
        yield cluster


@pytest.fixture
def follower(trio: Cluster) -> Iterator[Follower]:
    found = Follower([f"http://{n.host}:{CLIENT_PORT}" for n in trio.nodes])
    found.start()
    try:
        yield found
    finally:
        found.stop()


def test_a_store_that_runs_full_is_emptied_and_nothing_is_lost(
    trio: Cluster, follower: Follower, tmp_path: Path
) -> None:
    recorded = follower.checker.recorded
    seen: list[str] = []

    def tell(what: str) -> None:
        seen.append(f"{time.monotonic() - began_s:.1f} s: {what}; MiB used/file: {sizes(trio)}")
        log.info("%s", seen[-1])

    def story() -> str:
        return "\n".join((*seen, trio.tails()))

    def relieved() -> bool:
        return has_no_alarms(trio) and takes_submits(trio)

    # By tasks, as fast as three clients can: twice that will be written of them before they leave.
    gate = tmp_path / "gate"
    gated, error = asyncio.run(submit_until_refused(trio.nodes[0].address, gate_command(gate), RUNNING))
    assert error is None
    began_s = time.monotonic()
    tasks, refused = fill(trio, ["true"])
    tell(f"{len(tasks)} tasks")
    assert "nothing was submitted" in refused.stderr
    assert "spinetta cluster status" in refused.stderr
    eventually(lambda: follower.checker.collected >= set(tasks), within_s=60, what=f"all leave\n{story()}")
    tell("all have left")
    eventually(relieved, within_s=RELIEF_S, every_s=0.5, what=f"there is room\n{story()}")
    tell("there is room")

    # By what is no task.
    put_junk(trio)
    tell("junk")
    # Nodes look every three seconds.
    for command, code, words in (
        (("cluster", "status"), 1, "etcd alarm NOSPACE on n"),
        (("node", "list"), 0, "etcd alarm NOSPACE on n"),
        (("submit", "--", "true"), REFUSED, "nothing was submitted"),
    ):
        what = f"{command} ends with {code} and says {words!r}\n{story()}"
        eventually(partial(answers, trio, command, code, words), within_s=60, what=what)
    trio.etcdctl("del", "--prefix", "/junk/")
    tell("junk is deleted")
    eventually(relieved, within_s=RELIEF_S, every_s=0.5, what=f"there is room again\n{story()}")
    tell("there is room again")
    assert time.monotonic() - began_s > 2 * GRACE_S  # what ran was renewed all the while, or would have been killed
    assert not any(t in recorded for t in gated), story()
    gate.touch()
    eventually(lambda: recorded.keys() >= set(gated), within_s=60, what=f"all end\n{story()}")
    checker = follower.stop()
    for task in (*tasks, *gated):
        ended = checker.tasks[task]
        assert (recorded[task], len(ended.attempts), ended.outcome) == (1, 1, Outcome.SUCCEEDED), (task, story())
