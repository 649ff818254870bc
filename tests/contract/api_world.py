"""What the tests of the API stand on: real etcd, real gRPC servers in this process, and nodes with a hand on them.

The daemon behind a server is `HandNode`: what a daemon would decide, the test does (claim, write a log, finish), with
the project's own transactions.
"""

from __future__ import annotations

import asyncio
import itertools
import shutil
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import grpc.aio
import pytest
import uuid6

from spinetta import codec, keys, lifecycle, messages, txn
from spinetta.errors import InvariantViolation
from spinetta.model import (
    Exit,
    Holding,
    Incarnation,
    IncarnationId,
    LeaseId,
    Life,
    Member,
    Membership,
    NodeId,
    NodeRecord,
    QueueHint,
    Reason,
    Resources,
    Revision,
    Task,
    TaskId,
    TaskSpec,
    Usage,
)
from spinetta.node.archive import Archive
from spinetta.node.hub import Hub
from spinetta.node.port import LeaveStep, RunningSample
from spinetta.node.services.errors import DETAIL_KEY
from spinetta.node.services.server import ApiServer, serve
from spinetta.runtime.images.store import ImageStore
from spinetta.store.etcd import EtcdStore
from spinetta.store.protocol import Store
from spinetta.trust.credentials import NodeCredentials
from spinetta.trust.dial import Dialer
from spinetta.v1 import api_pb2 as api
from spinetta.v1 import api_pb2_grpc as rpc
from spinetta.v1 import record_pb2 as pb
from tests.contract.etcds import free_port, loopback_host

T = TypeVar("T")
LIMIT_S = 60.0  # for a whole scenario


def run(scenario: Coroutine[Any, Any, T]) -> T:
    """Run a scenario, with a limit."""

    async def limited() -> T:
        async with asyncio.timeout(LIMIT_S):
            return await scenario

    return asyncio.run(limited())


async def eventually(condition: Callable[[], Any], *, within_s: float = 30.0, what: str = "") -> Any:
    """Wait for a condition with a limit; its value when it is true. The condition may be async."""
    end_s = time.monotonic() + within_s
    while True:
        value = condition()
        if isinstance(value, Awaitable):
            value = await value
        if value:
            return value
        assert time.monotonic() < end_s, f"not within {within_s} s: {what}"
        await asyncio.sleep(0.01)


# --- etcd ----------------------------------------------------------------------------------------------------------


class Etcd:
    """A member of its own, in a directory of its own."""

    def __init__(self, directory: Path) -> None:
        host = loopback_host()  # where nobody's outgoing connection has one of the ports meanwhile
        self.endpoint = f"http://{host}:{free_port(host)}"
        peer_url = f"http://{host}:{free_port(host)}"
        self._log = (directory / "etcd.log").open("wb")
        self.process = subprocess.Popen(
            [
                "etcd", "--name", "test", "--data-dir", str(directory / "data"),
                "--listen-client-urls", self.endpoint, "--advertise-client-urls", self.endpoint,
                "--listen-peer-urls", peer_url, "--initial-advertise-peer-urls", peer_url,
                "--initial-cluster", f"test={peer_url}", "--unsafe-no-fsync",
            ],
            stdout=self._log,
            stderr=self._log,
        )  # fmt: skip
        for _ in range(200):
            if self.ctl("endpoint", "health", check=False).returncode == 0:
                return
            assert self.process.poll() is None, (directory / "etcd.log").read_text()[-2000:]
        raise AssertionError("etcd did not start")

    def ctl(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[bytes]:
        """Run etcdctl."""
        return subprocess.run(
            ["etcdctl", "--endpoints", self.endpoint, "--command-timeout", "3s", *arguments],
            env={"ETCDCTL_API": "3", "PATH": "/usr/bin:/bin:/usr/local/bin"},
            check=check,
            capture_output=True,
        )

    def stop(self) -> None:
        """End it."""
        self.process.kill()
        self.process.wait()
        self._log.close()


@pytest.fixture(scope="session")
def etcd_member(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Etcd]:
    """One etcd for the session; see `etcd` for an empty one."""
    directory = tmp_path_factory.mktemp("etcd")
    member = Etcd(directory)
    yield member
    member.stop()
    shutil.rmtree(directory)


@pytest.fixture
def etcd(etcd_member: Etcd) -> Etcd:
    """An etcd with nothing in it."""
    etcd_member.ctl("del", "", "--from-key=true")
    return etcd_member


# --- nodes ---------------------------------------------------------------------------------------------------------


class HandNode:
    """A `NodePort` whose daemon is the test."""

    def __init__(self, name: str, store: Store, directory: Path) -> None:
        self.name = NodeId(name)
        self.store = store
        self.version = "0.test"
        self.credentials: NodeCredentials | None = None
        self.dialer = Dialer.open()
        self.clearances: frozenset[str] = frozenset()
        self.voters: tuple[str, ...] = ()
        self.audited: list[tuple[str, str, str, str, int]] = []
        self.directory = directory
        self.shim_dir = directory / "shim"
        self.draining: list[bool] = []
        self.given_back = (False, False)
        self.seats: list[tuple[int, str, str]] = []
        self.usage: Usage | None = None
        self.member = Membership("abc123", 7, (Member(name, 7, "http://127.0.0.1:1", "http://127.0.0.1:2"),))
        self.failure: Exception | None = None
        self.archive = Archive(directory / "archive", 0)
        self.images: ImageStore | None = None
        self.steps: list[LeaveStep] = [LeaveStep("draining", 2), LeaveStep("left", 0, done=True)]

    def audit(self, call: str, caller: str, object_: str, outcome: str, revision: int) -> None:
        self.audited.append((call, caller, object_, outcome, revision))

    def voter_addresses(self) -> tuple[str, ...]:
        return self.voters

    def wall_ms(self) -> int:
        return time.time_ns() // 1_000_000

    def holder_dir(self, key: str) -> Path:  # noqa: ARG002
        return self.shim_dir

    def log_path(self, task_id: TaskId, attempt: int, stream: str) -> Path:
        return self.directory / f"{task_id}.{attempt}.{stream}"

    async def running_sample(self, task_id: TaskId) -> RunningSample | None:  # noqa: ARG002
        return RunningSample(1, self.usage, 5 << 20, 3, (("gpu", ("0", "2")),)) if self.usage is not None else None

    async def membership(self) -> Membership:
        if self.failure is not None:
            raise self.failure
        return self.member

    async def set_draining(self, draining: bool, *, release: bool = False, force: bool = False) -> None:
        self.draining.append(draining)
        self.given_back = (release, force)

    @property
    def grace_min_s(self) -> float:
        return 3.0

    async def leave(self, timeout_s: float | None) -> AsyncIterator[LeaveStep]:  # noqa: ARG002
        for step in self.steps:
            yield step

    async def take_seat(self, member_id: int, initial_cluster: str, cluster_id: str) -> None:
        self.seats.append((member_id, initial_cluster, cluster_id))

    async def give_up_seat(self, member_id: int) -> None:
        self.seats.append((member_id, "", ""))


class Node:
    """A node under test: its server, a client of it, and what its daemon would do."""

    def __init__(self, port: HandNode, server: ApiServer, channel: grpc.aio.Channel) -> None:
        self.port = port
        self.server = server
        self.channel = channel
        self.address = server.addresses[0]
        self.api: rpc.SpinettaAsyncStub = rpc.SpinettaStub(channel)
        self.peer: rpc.PeerAsyncStub = rpc.PeerStub(channel)

    @property
    def store(self) -> Store:
        return self.port.store

    async def claim(self, task_id: str) -> bool:
        """Take a queued task, as a claim does; False when another was first."""
        key = keys.queued(TaskId(task_id))
        snapshot = await self.store.read([keys.task(TaskId(task_id)), key])
        record, queued = snapshot.entries[keys.task(TaskId(task_id))], snapshot.entries[key]
        if record is None or queued is None:
            return False
        task = lifecycle.claimed(codec.decode_task(record.value), self.port.name, IncarnationId("i"), now_ms=1)
        holding = codec.encode_holding(Holding(task.attempts_started, IncarnationId("i"), 60.0))
        result = await self.store.commit(
            txn.claim(self.port.name, task.id, queued.modified, codec.encode_task(task), holding)
        )
        return isinstance(result, txn.Committed)

    async def end(self, task_id: str, exit_: Exit | None = None) -> Task:
        """Record the end of the running attempt: complete, or queued again, as the lifecycle says."""
        while True:
            ended = await self._try_end(task_id, exit_ or Exit(Reason.EXIT, 0))
            if ended is not None:
                return ended

    async def _try_end(self, task_id: str, exit_: Exit) -> Task | None:
        task_key, key = keys.task(TaskId(task_id)), keys.running(self.port.name, TaskId(task_id))
        entries = (await self.store.read([task_key, key])).entries
        record, held = entries[task_key], entries[key]
        assert record is not None
        assert held is not None
        asked = codec.decode_holding(held.value).cancel_requested
        ended = lifecycle.ended(
            codec.decode_task(record.value), exit_, held.created, cancel_requested=asked, now_ms=2
        ).task
        encoded = codec.encode_task(ended)
        if ended.completed_ms:
            transition = txn.finish(self.port.name, ended.id, held.created, encoded)
        else:
            hint = codec.encode_hint(QueueHint.of(ended.spec))
            transition = txn.give_back(self.port.name, ended.id, held.modified, encoded, hint)
        return ended if isinstance(await self.store.commit(transition), txn.Committed) else None

    def write_log(self, task_id: str, data: bytes, *, attempt: int = 1, stream: str = "stdout") -> None:
        """Append to a log."""
        with self.port.log_path(TaskId(task_id), attempt, stream).open("ab") as f:
            f.write(data)

    async def submit(self, *specs: pb.TaskSpec) -> list[str]:
        """Submit; the ids."""
        done = await self.api.Submit(api.SubmitRequest(tasks=specs or [spec()]))
        return [t.id for t in done.tasks]

    async def get(self, task_id: str) -> api.TaskView:
        """One task."""
        return (await self.api.Get(api.GetRequest(ids=[task_id]))).tasks[0]

    async def task(self, task_id: str) -> Task:
        """The stored record."""
        entry = (await self.store.read([keys.task(TaskId(task_id))])).entries[keys.task(TaskId(task_id))]
        assert entry is not None
        return codec.decode_task(entry.value)

    async def read_log(self, task_id: str, **fields: Any) -> list[api.LogChunk]:
        """All chunks of a log."""
        return [c async for c in self.api.Log(api.LogRequest(id=task_id, **fields))]


@asynccontextmanager
async def node(
    etcd: Etcd,
    directory: Path,
    name: str = "a",
    *,
    wrap: Callable[[Store], Store] = lambda store: store,
    hub: Callable[[Store], Hub] = Hub,
    address: str = "127.0.0.1:0",
) -> AsyncIterator[Node]:
    """A node with a server of its own, known to the others."""
    logs = directory / name
    logs.mkdir(exist_ok=True)
    inner = EtcdStore([etcd.endpoint])
    store = wrap(inner)
    port = HandNode(name, store, logs)
    try:
        async with (
            serve(port, [address], hub=hub(store)) as server,
            grpc.aio.insecure_channel(server.addresses[0]) as channel,
        ):
            await announce(inner, name, server.addresses[0])
            yield Node(port, server, channel)
    finally:
        await inner.close()


async def announce(store: Store, name: str, address: str, **changes: Any) -> None:
    """Write the records of a live node (not leased: nobody would renew them)."""
    record = replace(
        NodeRecord(NodeId(name), address, IncarnationId("i"), Resources.of(1000), Resources.of(1000)), **changes
    )
    incarnation = Incarnation(IncarnationId("i"), Life.OPEN, "boot", 10.0, 1.0)
    await put(store, keys.node(NodeId(name)), codec.encode_node(record))
    await put(store, keys.incarnation(NodeId(name)), codec.encode_incarnation(incarnation))


async def put(store: Store, key: str, value: bytes = b"", lease: LeaseId = LeaseId(0)) -> Revision:
    """Write one key."""
    result = await store.commit(txn.Txn(then=(txn.Put(key, value, lease),)))
    if not isinstance(result, txn.Committed):
        raise InvariantViolation("a put without guards conflicted")
    return result.revision


async def delete(store: Store, *those: str) -> None:
    """Delete keys."""
    await store.commit(txn.Txn(then=tuple(txn.Delete(k) for k in those)))


# --- requests ------------------------------------------------------------------------------------------------------

_numbers = itertools.count()


def new_id() -> str:
    """A fresh id."""
    return str(uuid6.uuid7())


def spec(task_id: str = "", command: Sequence[str] = ("/bin/true",), **fields: Any) -> pb.TaskSpec:
    """A specification."""
    return pb.TaskSpec(id=task_id or new_id(), command=command, **fields)


def plain(message: pb.TaskSpec) -> TaskSpec:
    """The same as a model value."""
    return messages.spec_from_pb(message)


class Failed:
    """How a call failed."""

    def __init__(self, error: grpc.aio.AioRpcError) -> None:
        self.code = error.code()
        self.text = error.details() or ""
        raw = next((v for k, v in error.trailing_metadata() or () if k == DETAIL_KEY), None)
        assert isinstance(raw, bytes), f"no detail with {error}"
        self.detail = api.ErrorDetail.FromString(raw)

    def __repr__(self) -> str:
        return f"Failed({self.code}, {self.text!r})"


async def failure(call: Awaitable[Any]) -> Failed:
    """The call must fail."""
    try:
        answer = await call
    except grpc.aio.AioRpcError as e:
        return Failed(e)
    raise AssertionError(f"it succeeded: {answer}")
