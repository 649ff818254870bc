#!/usr/bin/env python3
# ruff: noqa: D102 - methods of a benchmark
"""What a gateway costs: one voter that serves many workers, and a commit by way of it against one straight to etcd.

`fleet`: one etcd and one gateway, each a process of its own; this process plays the workers, each with a TLS
connection of its own: it registers, renews and keeps its lease alive every 3.3 s, watches the queue and what runs on
itself, claims the tasks that are for it (so that there are few races), and finishes them a second later. Tasks are
submitted straight to etcd at a steady rate. CPU and memory are those of the gateway's process (and etcd's beside it).
The workers' latencies include this process's own share, which is larger than the gateway's: 200 workers on one machine.

`ways`: commits of one small key by a voter, one after the other and 32 at once, over each way to the same etcd; and a
worker's renewals and claims, which the gateway judges.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import grpc.aio
import psutil

from bench import common
from spinetta import codec, keys, lifecycle, trustcodec, txn
from spinetta.access import NodeAcl, NodeRole
from spinetta.errors import Compacted, Denied, OutcomeUnknown, StoreUnavailable
from spinetta.model import (
    Exit,
    Holding,
    Incarnation,
    IncarnationId,
    LeaseId,
    Life,
    NodeId,
    NodeRecord,
    QueueHint,
    Reason,
    Resources,
    Revision,
    TaskId,
    TaskSpec,
)
from spinetta.node.acl import AclView
from spinetta.node.gateway.quota import GatewayLimits
from spinetta.node.gateway.server import GatewayService, add_gateway
from spinetta.store.etcd import EtcdStore
from spinetta.store.gateway import GatewayStore
from spinetta.store.process import EtcdSettings, EtcdTls, etcd_argv, etcd_env, initial_cluster
from spinetta.store.protocol import Store
from spinetta.trust import certificates as certs
from spinetta.trust.dial import Dialer, Pems, server_credentials
from spinetta.txn import Committed, Put, Txn

CLUSTER = "0123456789abcdef"
DAY_S = 86400.0
RENEW_S = 3.3
RUN_S = 1.0  # of a task
WAY_S = 4.0  # of one measurement


class Authority:
    """Certificates for one run."""

    def __init__(self) -> None:
        self.nodes = certs.create_authority("cluster", CLUSTER, now_s=time.time())
        self.etcd = certs.create_authority("etcd", CLUSTER, now_s=time.time())

    def node(self, name: str, role: NodeRole) -> Pems:
        key = certs.new_key()
        leaf = certs.issue_node(
            self.nodes, certs.csr(key, name), cluster=CLUSTER, name=name, role=role, now_s=time.time(), lifetime_s=DAY_S
        )
        return self.nodes.certificate_pem, leaf, certs.key_pem(key)

    def dialer(self, name: str, role: NodeRole) -> Dialer:
        pems = self.node(name, role)
        return Dialer.secured(lambda: pems)

    def etcd_files(self, folder: Path) -> EtcdTls:
        key = certs.new_key()
        leaf = certs.issue_etcd(
            self.etcd, certs.csr(key, "v1"), name="v1", address="127.0.0.1", now_s=time.time(), lifetime_s=DAY_S
        )
        files = {"etcd-ca.pem": self.etcd.certificate_pem, "etcd.pem": leaf, "etcd.key": certs.key_pem(key)}
        for name, data in files.items():
            (folder / name).write_bytes(data)
        return EtcdTls(folder / "etcd-ca.pem", folder / "etcd.pem", folder / "etcd.key")


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


# --- the processes -----------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def etcd(folder: Path, name: str, tls: EtcdTls | None) -> AsyncIterator[tuple[str, int]]:
    """An etcd of one member: its client endpoint and process id."""
    client, peer = (f"127.0.0.1:{free_port()}" for _ in range(2))
    scheme = "http" if tls is None else "https"
    settings = EtcdSettings(
        "etcd",
        name,
        folder / f"{name}.etcd",
        f"{scheme}://{client}",
        f"{scheme}://{peer}",
        initial_cluster([(name, f"{scheme}://{peer}")]),
        tls=tls,
    )
    settings.data_dir.mkdir(mode=0o700)
    with (folder / f"{name}.log").open("wb") as log:
        process = subprocess.Popen(  # noqa: ASYNC220 - milliseconds
            etcd_argv(settings),
            env=dict(etcd_env(os.environ["PATH"])),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
    try:
        store = EtcdStore([client], None if tls is None else lambda: tls)
        async with asyncio.timeout(30):
            while True:
                with contextlib.suppress(StoreUnavailable):
                    await store.read([])
                    break
                await asyncio.sleep(0.05)
        await store.close()
        yield client, process.pid
    finally:
        process.kill()
        process.wait()


@contextlib.asynccontextmanager
async def gateway(folder: Path, endpoint: str, pems: Pems | None, ca: bytes) -> AsyncIterator[tuple[str, int]]:
    """A gateway in a process of its own: its address and process id."""
    mine = folder / f"gateway{free_port()}"
    mine.mkdir()
    for name, data in zip(("ca", "cert", "key"), pems or (ca, b"", b""), strict=True):
        (mine / name).write_bytes(data)
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "bench.gateway", "--serve", str(mine), endpoint,
        stdout=asyncio.subprocess.PIPE, stdin=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdin is not None
    try:
        async with asyncio.timeout(30):
            address = (await process.stdout.readline()).decode().strip()
        yield address, process.pid
    finally:
        process.stdin.close()
        await process.wait()


async def serve(folder: Path, endpoint: str) -> None:
    """The gateway's process: until its standard input ends."""
    ca, certificate, key = ((folder / name).read_bytes() for name in ("ca", "cert", "key"))
    store = EtcdStore([endpoint])
    view = AclView(store)

    async def who(context: Any) -> tuple[NodeId, NodeAcl, Revision]:
        if certificate:
            pem = context.auth_context()["x509_pem_cert"][0]
            identity = certs.identity_of(pem, [ca], CLUSTER, now_s=time.time())
            if identity is None:
                raise Denied("nobody", reason="unauthenticated")
            name = NodeId(identity.name)
        else:
            name = NodeId("v1")  # plain text: nobody says who calls
        found = await view.node(name)
        if found is None:
            raise Denied("nobody")
        return name, *found

    service = GatewayService(store, who, limits=GatewayLimits(calls_per_s=1e6, calls_burst=1e6, bytes_burst=1e12))
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0), ("grpc.http2.min_ping_interval_without_data_ms", 5000)])
    add_gateway(server, service)
    if certificate:
        port = server.add_secure_port("127.0.0.1:0", server_credentials(lambda: (ca, certificate, key)))
    else:
        port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(service.run()), group.create_task(view.run())]
        print(f"127.0.0.1:{port}", flush=True)
        await asyncio.to_thread(sys.stdin.read)
        await server.stop(0)
        for task in tasks:
            task.cancel()
    await store.close()


# --- a worker ----------------------------------------------------------------------------------------------------


@dataclass
class Numbers:
    """What the workers have seen."""

    latencies_s: dict[str, list[float]] = field(default_factory=dict)
    claimed: int = 0
    finished: int = 0
    lost: int = 0
    failed: int = 0

    async def timed(self, what: str, call: Awaitable[Any]) -> Any:
        began_s = time.perf_counter()
        result = await call
        self.latencies_s.setdefault(what, []).append(time.perf_counter() - began_s)
        return result


@dataclass
class Worker:
    """One simulated node."""

    number: int
    count: int
    store: GatewayStore
    numbers: Numbers
    lease: LeaseId = LeaseId(0)
    registration: txn.Registration | None = None
    turn: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(8))

    @property
    def node(self) -> NodeId:
        return NodeId(f"w{self.number}")

    @property
    def life(self) -> IncarnationId:
        return IncarnationId(f"life{self.number}")

    async def register(self) -> None:
        self.lease = await self.store.grant_lease(10)
        generation, acl = await self._revisions(keys.GENERATION, keys.acl_node(self.node))
        some = Resources.of(cpu_millis=4000, memory_bytes=8 << 30)
        record = NodeRecord(self.node, f"127.0.0.1:{self.number}", self.life, some, some, version="bench")
        begun = codec.encode_incarnation(Incarnation(self.life, Life.OPEN, "boot", 10, 5.0))
        body = txn.register(self.node, self.lease, codec.encode_node(record), begun, generation, acl)
        result = await self.store.commit(body)
        assert isinstance(result, Committed)
        self.registration = txn.Registration(self.node, result.revision, result.revision, generation, acl)

    async def _revisions(self, *wanted: str) -> list[Revision]:
        entries = (await self.store.read(wanted)).entries
        return [e.modified if (e := entries[key]) is not None else Revision(0) for key in wanted]

    async def run(self) -> None:
        await self.register()
        async with asyncio.TaskGroup() as group:
            group.create_task(self.renew())
            group.create_task(self.watch_own())
            group.create_task(self.watch_queue(group))

    async def renew(self) -> None:
        assert self.registration is not None
        await asyncio.sleep(RENEW_S * self.number / self.count)
        while True:
            began_s = time.perf_counter()
            with contextlib.suppress(StoreUnavailable, OutcomeUnknown):
                result = await self.numbers.timed("renew", self.store.commit(txn.renew(self.registration)))
                assert isinstance(result, Committed)
                await self.numbers.timed("keep alive", self.store.keep_alive(self.lease))
            await asyncio.sleep(max(0.0, RENEW_S - (time.perf_counter() - began_s)))

    async def watch_own(self) -> None:
        prefix = keys.running_on(self.node)
        while True:
            with contextlib.suppress(StoreUnavailable, Compacted):
                start = Revision((await self.store.list(prefix)).revision + 1)
                async with contextlib.aclosing(self.store.watch(prefix, start=start)) as changes:
                    async for _ in changes:
                        pass
            await asyncio.sleep(0.5)

    async def watch_queue(self, group: asyncio.TaskGroup) -> None:
        while True:
            with contextlib.suppress(StoreUnavailable, Compacted):
                page = await self.store.list(keys.QUEUED, limit=512)
                for entry in page.entries:
                    self.see(group, entry.key)
                start = Revision(page.revision + 1)
                async with contextlib.aclosing(self.store.watch(keys.QUEUED, start=start)) as watch:
                    async for changes in watch:
                        for event in changes.events:
                            if event.value is not None:
                                self.see(group, event.key)
            await asyncio.sleep(0.5)

    def see(self, group: asyncio.TaskGroup, key: str) -> None:
        if int(key[-6:], 16) % self.count == self.number:
            group.create_task(self.take(keys.parse_task(key)))

    async def take(self, task_id: TaskId) -> None:
        assert self.registration is not None
        async with self.turn:
            try:
                await self._take(task_id, self.registration)
            except (StoreUnavailable, OutcomeUnknown):
                self.numbers.failed += 1

    async def _take(self, task_id: TaskId, registration: txn.Registration) -> None:
        record = (await self.numbers.timed("read", self.store.read([keys.task(task_id)]))).entries[keys.task(task_id)]
        if record is None:
            self.numbers.lost += 1
            return
        task = lifecycle.claimed(codec.decode_task(record.value), self.node, self.life, now_ms=1)
        holding = codec.encode_holding(Holding(1, self.life, 60.0))
        claim = txn.claim(self.node, task_id, record.modified, codec.encode_task(task), holding)
        body = txn.batch([claim], registration.guards())
        result = await self.numbers.timed("claim", self.store.commit(body))
        if not isinstance(result, Committed) or not result.nested[0]:
            self.numbers.lost += 1
            return
        self.numbers.claimed += 1
        await asyncio.sleep(RUN_S)
        end = lifecycle.ended(task, Exit(Reason.EXIT, 0), result.revision, cancel_requested=False, now_ms=2)
        finish = txn.finish(self.node, task_id, result.revision, codec.encode_task(end.task))
        guards = txn.finish_guards(self.node, registration.incarnation_revision, registration.acl_revision)
        done = await self.numbers.timed("finish", self.store.commit(txn.batch([finish], guards)))
        assert isinstance(done, Committed)
        self.numbers.finished += done.nested == (True,)


# --- the fleet ---------------------------------------------------------------------------------------------------


async def submitting(store: EtcdStore, tasks_per_s: float) -> None:
    number = 0
    began_s = time.perf_counter()
    while True:
        number += 1
        task_id = TaskId(f"{number:08x}-0000-7000-8000-{number:012x}")
        spec = TaskSpec(task_id, ("/bin/true",), resources=Resources.of(cpu_millis=1000, memory_bytes=1 << 28))
        task = lifecycle.submitted(spec, now_ms=1, at_node="v1")
        await store.commit(txn.submit(task_id, codec.encode_task(task), codec.encode_hint(QueueHint.of(spec))))
        await asyncio.sleep(max(0.0, began_s + number / tasks_per_s - time.perf_counter()))


@dataclass
class Usage:
    """CPU seconds and resident bytes of a process."""

    cpu_s: float
    rss_bytes: int

    @classmethod
    def of(cls, pid: int) -> Usage:
        process = psutil.Process(pid)
        times = process.cpu_times()
        return cls(times.user + times.system, process.memory_info().rss)


async def fleet(folder: Path, authority: Authority, workers: int, tasks_per_s: float, seconds: float) -> dict[str, Any]:
    """One gateway and its workers; the row that tells what it cost."""
    numbers = Numbers()
    async with (
        etcd(folder, "fleet", None) as (endpoint, etcd_pid),
        gateway(folder, endpoint, authority.node("v1", NodeRole.VOTER), b"") as (address, pid),
    ):
        direct = EtcdStore([endpoint])
        await approve(direct, *(f"w{n}" for n in range(workers)))
        await asyncio.sleep(1)
        before = Usage.of(pid)
        stores = [
            GatewayStore(authority.dialer(f"w{n}", NodeRole.WORKER), [address], name=f"w{n}") for n in range(workers)
        ]
        players = [Worker(n, workers, store, numbers) for n, store in enumerate(stores)]
        running = [asyncio.create_task(player.run()) for player in players]
        async with asyncio.timeout(120):
            while any(player.registration is None for player in players):
                await asyncio.sleep(0.1)
                if broken := next((t for t in running if t.done()), None):
                    broken.result()
        await asyncio.sleep(5)
        registered = Usage.of(pid)
        quiet = await spent(pid, etcd_pid, seconds / 2)
        numbers.latencies_s.clear()
        submitter = asyncio.create_task(submitting(direct, tasks_per_s))
        claimed = numbers.claimed
        own = psutil.Process().cpu_times()
        began_s = time.perf_counter()
        busy = await spent(pid, etcd_pid, seconds)
        took_s = time.perf_counter() - began_s
        after = psutil.Process().cpu_times()
        claims_per_s = (numbers.claimed - claimed) / took_s
        end = Usage.of(pid)
        for each in (submitter, *running):
            each.cancel()
        await asyncio.wait((submitter, *running))
        for store in stores:
            await store.close()
        await direct.close()
    if numbers.failed:
        print(f"  {numbers.failed} claims or finishes had no answer", file=sys.stderr)
    row: dict[str, Any] = {
        "workers": workers,
        "RSS MiB before": before.rss_bytes / 2**20,
        "connected": registered.rss_bytes / 2**20,
        "at the end": end.rss_bytes / 2**20,
        "CPU % idle": quiet[0],
        "CPU % busy": busy[0],
        "etcd CPU %": busy[1],
        "workers' CPU %": 100 * (after.user + after.system - own.user - own.system) / took_s,
        "claims/s": claims_per_s,
        "lost": numbers.lost,
    }
    for what in ("renew", "claim", "finish"):
        found = numbers.latencies_s.get(what) or [0.0]
        row[f"{what} p50 ms"] = 1000 * common.quantile(found, 0.5)
        row[f"{what} p99 ms"] = 1000 * common.quantile(found, 0.99)
    return row


async def spent(pid: int, etcd_pid: int, seconds: float) -> tuple[float, float]:
    """CPU of gateway and etcd over some seconds, in per cent of one core."""
    before = Usage.of(pid), Usage.of(etcd_pid)
    began_s = time.perf_counter()
    await asyncio.sleep(seconds)
    took_s = time.perf_counter() - began_s
    after = Usage.of(pid), Usage.of(etcd_pid)
    gateway_, etcd_ = (100 * (b.cpu_s - a.cpu_s) / took_s for a, b in zip(before, after, strict=True))
    return gateway_, etcd_


async def approve(store: EtcdStore, *workers: str) -> None:
    """Rights for a voter v1 and these workers, and a generation."""
    acls = [NodeAcl("v1", NodeRole.VOTER), *(NodeAcl(name, NodeRole.WORKER) for name in workers)]
    puts = [Put(keys.acl_node(NodeId(acl.name)), trustcodec.encode(acl)) for acl in acls]
    puts.append(Put(keys.GENERATION, codec.encode_generation("bench")))
    for at in range(0, len(puts), 100):
        await store.commit(Txn(then=tuple(puts[at : at + 100])))


# --- the ways ----------------------------------------------------------------------------------------------------


async def measure(label: str, call: Callable[[int], Awaitable[Any]]) -> dict[str, Any]:
    """One after the other, then 32 at once."""
    for n in range(20):
        await call(n)
    times: list[float] = []
    until_s = time.perf_counter() + WAY_S / 2
    while time.perf_counter() < until_s:
        began_s = time.perf_counter()
        await call(len(times))
        times.append(time.perf_counter() - began_s)
    count = 0
    until_s = time.perf_counter() + WAY_S

    async def many(lane: int) -> None:
        nonlocal count
        while time.perf_counter() < until_s:
            await call(lane)
            count += 1

    async with asyncio.TaskGroup() as group:
        for lane in range(32):
            group.create_task(many(lane))
    return {
        "way": label,
        "p50 ms": 1000 * common.quantile(times, 0.5),
        "p99 ms": 1000 * common.quantile(times, 0.99),
        "a second, 32 at once": count / WAY_S,
    }


async def ways(folder: Path, authority: Authority) -> list[dict[str, Any]]:
    """A row for each way."""
    rows: list[dict[str, Any]] = []

    def put(store: Store) -> Callable[[int], Awaitable[Any]]:
        return lambda n: store.commit(Txn(then=(Put(f"/bench/{n % 64}", bytes(300)),)))

    tls = authority.etcd_files(folder)
    async with etcd(folder, "tls", tls) as (endpoint, _):
        store = EtcdStore([endpoint], lambda: tls)
        rows.append(await measure("voter, straight to etcd, TLS", put(store)))
        await store.close()
    async with etcd(folder, "plain", None) as (endpoint, _):
        direct = EtcdStore([endpoint])
        await approve(direct, "w0")
        rows.insert(0, await measure("voter, straight to etcd, plain", put(direct)))
        async with gateway(folder, endpoint, None, b"") as (address, _):
            through = GatewayStore(Dialer.open(), [address])
            rows.append(await measure("voter without a seat, gateway, plain", put(through)))
            await through.close()
        async with gateway(folder, endpoint, authority.node("v1", NodeRole.VOTER), b"") as (address, _):
            through = GatewayStore(authority.dialer("v1", NodeRole.VOTER), [address])
            rows.append(await measure("voter without a seat, gateway, TLS", put(through)))
            rows.append(await measure("the same, read of one key", lambda _: through.read([keys.GENERATION])))
            await through.close()
            rows += await as_worker(authority, address)
        await direct.close()
    return rows


async def as_worker(authority: Authority, address: str) -> list[dict[str, Any]]:
    """What a worker's judged commits cost: a renewal needs no look at the store, a description does."""
    store = GatewayStore(authority.dialer("w0", NodeRole.WORKER), [address])
    worker = Worker(0, 1, store, Numbers())
    await worker.register()
    registration = worker.registration
    assert registration is not None
    some = Resources.of(cpu_millis=4000, memory_bytes=8 << 30)
    record = NodeRecord(worker.node, "127.0.0.1:1", worker.life, some, some, version="bench")

    def described(n: int) -> Awaitable[Any]:
        value = codec.encode_node(replace(record, running=n))
        return store.commit(txn.advertise(registration, worker.lease, value))

    rows = [
        await measure("worker, gateway, TLS: renewals", lambda _: store.commit(txn.renew(registration))),
        await measure("worker, gateway, TLS: descriptions", described),
    ]
    await store.close()
    return rows


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--serve", nargs=2, metavar=("DIR", "ETCD"), help=argparse.SUPPRESS)
    parser.add_argument("--workers", type=int, default=200, help="of the fleet (200)")
    parser.add_argument("--tasks-per-s", type=float, default=50.0, help="submitted to the fleet (50)")
    parser.add_argument("--seconds", type=float, default=30.0, help="of the busy part; idle half as long (30)")
    parser.add_argument("--only", choices=("fleet", "ways"), help="one of the two")
    parser.add_argument("--json", action="store_true", help="the numbers as JSON")
    args = parser.parse_args()
    if args.serve:
        asyncio.run(serve(Path(args.serve[0]), args.serve[1]))
        return 0
    on = common.machine()
    folder = Path(tempfile.mkdtemp(prefix="spinetta-bench-"))
    authority = Authority()
    try:
        if args.only != "fleet":
            common.report("ways to the store", asyncio.run(ways(folder, authority)), args.json, on)
        if args.only != "ways":
            row = asyncio.run(fleet(folder, authority, args.workers, args.tasks_per_s, args.seconds))
            title = f"fleet: {args.workers} workers on one gateway, {args.tasks_per_s:g} tasks a second"
            common.report(title, [{"what": k, "value": v} for k, v in row.items()], args.json, on)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
