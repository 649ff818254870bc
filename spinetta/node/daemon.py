"""The daemon: brings up what a node consists of, keeps it together, and takes it down in order."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

from spinetta import __version__
from spinetta.agent import Agent
from spinetta.config import Resolved, Settings
from spinetta.errors import OutcomeUnknown, RuntimeUnavailable, StoreUnavailable, UserError
from spinetta.events import LeaveWanted, SelfChanged, SetCandidate, SetDraining, attempt_key
from spinetta.model import IncarnationId, NodeId, NodeRecord, TaskId, Usage
from spinetta.node import detect
from spinetta.node.driver import Driver, LaunchSettings, wall_ms
from spinetta.node.entry import Entrance, enter
from spinetta.node.keeper import SeatKeeper
from spinetta.node.lock import DirectoryLock
from spinetta.node.logsweep import sweep_logs
from spinetta.node.port import LeaveStep, Membership
from spinetta.node.seats import OwnSeat
from spinetta.node.services.server import serve
from spinetta.runtime.process import ProcessRuntime
from spinetta.settings import AgentSettings
from spinetta.store.etcd import EtcdStore
from spinetta.store.protocol import Store
from spinetta.store.supervisor import SERVICE as ETCD_SERVICE

log = logging.getLogger("spinetta.node")

STOP_S = 20.0  # for tasks to end when the node is stopped: TERM, ten seconds, KILL
DEREGISTER_S = 5.0  # for giving them back and deregistering then; past it, without a quorum, the others find out
ENDPOINTS_EVERY_S = 5.0  # how often the voters to talk to are looked up
SWEEP_EVERY_S = 300.0
LEAVE_STEP_S = 0.5
EXIT_OK = 0


def boot_id() -> str:
    """What the kernel calls this boot; changes when the machine restarts."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


class Daemon:
    """One node, as its services see it (`NodePort`), and its life from start to end."""

    def __init__(self, settings: Settings, entrance: Entrance, runtime: ProcessRuntime, store: EtcdStore) -> None:
        self.settings = settings
        self._entrance = entrance
        self._runtime = runtime
        self._store = store
        self.seat: OwnSeat = entrance.seat
        self._stop = asyncio.Event()
        self._release = settings.on_terminate == "release"
        self._stop_everything = False
        self._leave: asyncio.Task[None] | None = None
        self._leave_steps: LeaveStep | None = None
        self._leave_wanted = asyncio.Event()
        self._leave_deadline_s = 0.0
        self.agent = Agent(self._agent_settings(), entrance.incarnation)
        self.driver = Driver(
            self.agent,
            store,
            runtime,
            LaunchSettings(settings.name, settings.pids_max, settings.address),
            remember=self._remember,
        )
        self.keeper = SeatKeeper(self.agent, self.seat, settings.voters_wanted)

    # --- NodePort ---

    @property
    def name(self) -> NodeId:
        """This node."""
        return NodeId(self.settings.name)

    @property
    def store(self) -> Store:
        """The cluster's truth."""
        return self._store

    @property
    def version(self) -> str:
        """Of the software."""
        return __version__

    def wall_ms(self) -> int:
        """The wall clock."""
        return wall_ms()

    def log_path(self, task_id: TaskId, attempt: int, stream: str) -> Path:
        """Where a stream of an attempt made here is."""
        return self._runtime.log_path(attempt_key(task_id, attempt), stream)

    async def running_usage(self, task_id: TaskId) -> Usage | None:
        """What a task that runs here has used so far."""
        held = self.agent.holdings.held.get(task_id)
        if held is None:
            return None
        try:
            return await self._runtime.usage(held.key)
        except RuntimeUnavailable:
            return None

    async def membership(self) -> Membership:
        """etcd's members, leader and alarms."""
        return await self.seat.membership()

    async def set_draining(self, draining: bool) -> None:
        """Stop, or start again, taking tasks."""
        await self.driver.tell(SetDraining(draining))
        if not await self.driver.until(lambda a: a.draining == draining and a.session.told, 10.0):
            raise OutcomeUnknown("the node has been told, but the others do not know yet; look at: spinetta node list")

    @property
    def grace_min_s(self) -> float:
        """As for the default grace: longer than the lease lasts and killing takes."""
        return self.settings.lease_ttl_s + self.settings.kill_margin_s

    async def leave(self, timeout_s: float | None) -> AsyncIterator[LeaveStep]:
        """Drain, give up the seat, deregister, end. Goes on when nobody listens."""
        await self.seat.check_may_leave(successor=any(p.candidate and not p.leaving for p in self.agent.peers))
        if not self._leave_wanted.is_set():
            limit_s = self.settings.drain_timeout_s if timeout_s is None else timeout_s
            self._leave_deadline_s = time.monotonic() + limit_s
            self._leave_wanted.set()
        last: LeaveStep | None = None
        while last is None or not last.done:
            step = self._leave_steps
            if step is not None and step != last:
                last = step
                yield step
            else:
                await asyncio.sleep(LEAVE_STEP_S / 5)

    async def take_seat(self, member_id: int, initial_cluster: str, cluster_id: str) -> None:
        """Start an etcd member."""
        await self.seat.take(member_id, initial_cluster, cluster_id)
        await self._seat_changed()

    async def give_up_seat(self, member_id: int) -> None:
        """Stop the etcd member, which has been removed."""
        await self.seat.give_up(member_id)
        await self._seat_changed()

    # --- life ---

    async def run(self) -> int:
        """Serve until told to stop or leave; the exit code."""
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self._told_to_stop, False)
        loop.add_signal_handler(signal.SIGINT, self._told_to_stop, True)
        try:
            async with asyncio.TaskGroup() as group, serve(self, [self.settings.address]):
                work = [
                    group.create_task(self.driver.run(), name="agent"),
                    group.create_task(self.seat.run(), name="etcd"),
                    group.create_task(self.keeper.run(), name="voters"),
                    group.create_task(self._keep_endpoints(), name="endpoints"),
                    group.create_task(self._sweep(), name="logs"),
                    group.create_task(self._leave_when_wanted(), name="leave"),
                ]
                await self._report_ready()
                await self._stop.wait()
                await self._finish()
                for task in work:
                    task.cancel()
        finally:
            loop.remove_signal_handler(signal.SIGTERM)
            loop.remove_signal_handler(signal.SIGINT)
        return EXIT_OK

    def _told_to_stop(self, everything: bool) -> None:
        if self._stop.is_set():
            log.warning("stopping at once; tasks and etcd stay with the shim")
            raise SystemExit(130 if everything else 143)
        self._stop_everything = everything or self._release
        self._stop.set()

    async def _report_ready(self) -> None:
        record = self.agent.settings.record
        role = "voter" if self.seat.member_id else "worker"
        log.info("node %s: API on %s, %s, etcd cluster %s", record.name, record.address, role, self.seat.cluster_id)

    async def _finish(self) -> None:
        """What is done between the wish to stop and the end."""
        self.driver.hush()
        if self.agent.left:
            await self.seat.stop()
            await self._runtime.shutdown_shim()
            self._entrance.memory.forget()
            return
        if not self._stop_everything:
            log.info("stopping; %d tasks stay with the shim", len(self.agent.holdings.held))
            return
        log.info("stopping; %d tasks are given back", len(self.agent.holdings.held))
        await self.driver.tell(LeaveWanted(release=True))
        await self.driver.until(lambda a: a.left or a.holdings.nothing_runs, STOP_S)
        if not await self.driver.until(lambda a: a.left, DEREGISTER_S):
            log.warning("not deregistered within %g s; the others will find out", DEREGISTER_S)
        await self.seat.stop()
        await self._runtime.shutdown_shim()

    # --- leaving ---

    async def _leave_when_wanted(self) -> None:
        await self._leave_wanted.wait()
        holdings = self.agent.holdings
        await self.driver.tell(SetDraining(draining=True, leaving=True))
        while holdings.held and time.monotonic() < self._leave_deadline_s:
            self._leave_steps = LeaveStep("waiting for running tasks", len(holdings.held))
            await self.driver.until(lambda a: not a.holdings.held, 1.0)
        if holdings.held:
            self._leave_steps = LeaveStep("giving running tasks back to the queue", len(holdings.held))
            await self.driver.tell(SetDraining(draining=True, leaving=True, release=True))
            await self.driver.until(lambda a: not a.holdings.held, STOP_S)
        # From here on it waits as long as it takes, and says for what: without a quorum there is no leaving in order.
        looked = False
        while self.seat.member_id:
            self._leave_steps = LeaveStep("giving up the voter's seat")
            with contextlib.suppress(StoreUnavailable):
                if not looked and await self.seat.others_vote():
                    # While this node is the leader it would have to remove itself; another voter does it better.
                    await self.driver.tell(SetCandidate(False))
                looked = True
            await asyncio.sleep(LEAVE_STEP_S)
        self._leave_steps = LeaveStep("deregistering")
        await self.driver.tell(LeaveWanted(release=True))
        while not await self.driver.until(lambda a: a.left, STOP_S):
            log.warning("not deregistered yet: the store does not answer, or something is still held")
        self._leave_steps = LeaveStep("left", done=True)
        await asyncio.sleep(LEAVE_STEP_S)  # those who listen read the last step before the server ends
        self._stop.set()

    # --- background work ---

    async def _keep_endpoints(self) -> None:
        """Talk to the own member first, then to the other voters; workers spread over them by name."""
        while True:
            try:
                urls = await self.seat.endpoints()
                if urls and tuple(urls) != self._store.endpoints:
                    await self._store.set_endpoints(urls)
                    self._entrance.memory.update(endpoints=tuple(urls))
            except (StoreUnavailable, UserError) as e:  # the latter: the disk is full
                log.info("the voters cannot be looked up now: %s", e)
            await self._seat_changed()
            await asyncio.sleep(ENDPOINTS_EVERY_S)

    async def _seat_changed(self) -> None:
        record = replace(
            self.agent.session.record,
            etcd_member_id=self.seat.member_id,
            etcd_client_url=self.seat.client_url,
            etcd_peer_url=self.seat.peer_url,
            warnings=self._warnings(),
        )
        if record != self.agent.session.record:
            await self.driver.tell(SelfChanged(record))
        may_lead = bool(self.seat.member_id) and not self._leave_wanted.is_set()
        if may_lead and not self.agent.leadership.candidate:
            await self.driver.tell(SetCandidate(True))

    async def _sweep(self) -> None:
        while True:
            holdings = self.agent.holdings
            # An earlier daemon may have left attempts running: nothing is swept before they are known.
            await self.driver.until(lambda a: a.holdings.runtime_known, SWEEP_EVERY_S)
            if holdings.runtime_known:
                try:
                    await asyncio.to_thread(
                        sweep_logs,
                        self._runtime.logs_dir,
                        {h.key for h in holdings.held.values()} | set(holdings.processes),
                        now_s=time.time(),
                        keep_bytes=self.settings.log_keep_bytes,
                        keep_s=self.settings.log_keep_s,
                    )
                except OSError as e:
                    log.warning("old logs cannot be removed now: %s", e)
            await asyncio.sleep(SWEEP_EVERY_S)

    # --- inside ---

    def _agent_settings(self) -> AgentSettings:
        s = self.settings
        capacity, warnings = detect.capacity(s)
        for warning in warnings:
            log.warning("%s", warning)
        record = NodeRecord(
            name=NodeId(s.name),
            address=s.address,
            incarnation=IncarnationId(""),
            capacity=capacity,
            free=capacity,
            tags=tuple(sorted(s.tags)),
            etcd_client_url=self.seat.client_url,
            etcd_peer_url=self.seat.peer_url,
            etcd_member_id=self.seat.member_id,
            candidate=s.candidate,
            version=__version__,
            started_ms=wall_ms(),
            boot_id=boot_id(),
            runtimes=s.runtimes,
            warnings=self._warnings(),
        )
        return AgentSettings(
            record=record,
            boot_id=boot_id(),
            lease_ttl_s=s.lease_ttl_s,
            grace_s=s.grace_s,
            kill_margin_s=s.kill_margin_s,
            clock_rate_error=s.clock_rate_error,
            reconcile_s=s.reconcile_s,
            candidate=bool(self.seat.member_id),
        )

    def _remember(self, incarnation: IncarnationId) -> None:
        self._entrance.memory.update(incarnation_id=incarnation)

    def _warnings(self) -> tuple[str, ...]:
        return (*self._runtime.warnings(), *self._entrance.warnings)


def check_port_free(address: str, what: str) -> None:
    """Find out early and say it clearly.

    Raises:
        UserError: the address cannot be bound.
    """
    host, _, port = address.rpartition(":")
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind((host, int(port)))
        except OSError as e:
            raise UserError(
                f"{what} cannot listen on {address}: {e.strerror}",
                field="node.address",
                hint="another program uses the port, or the address is not of this machine; choose another --address",
                reason="address-in-use",
            ) from e


def configure_logging(level: str) -> None:
    """Plain lines on standard error, for a terminal, a file or the journal."""
    logging.basicConfig(format="%(asctime)s %(levelname)-7s %(name)s: %(message)s", datefmt="%Y-%m-%dT%H:%M:%S")
    logging.getLogger("spinetta").setLevel(level.upper())  # not the root: libraries have other ideas of what matters


def run(resolved: Resolved) -> int:
    """`spinetta node join`: run a node until it is stopped or has left; the exit code.

    Raises:
        UserError: it cannot start, and says why and what to do.
    """
    configure_logging(resolved.settings.log_level)
    for warning in resolved.warnings:
        log.warning("%s", warning)
    data_dir = Path(resolved.settings.data_dir)
    try:
        data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(
            f"the data directory {data_dir} cannot be made: {e.strerror}",
            field="node.data_dir",
            hint="choose another with --data-dir",
        ) from e
    return asyncio.run(_main(resolved.settings, data_dir))


async def _main(settings: Settings, data_dir: Path) -> int:
    with DirectoryLock(data_dir):
        check_port_free(settings.address, "the API")
        async with contextlib.AsyncExitStack() as stack:
            runtime = await stack.enter_async_context(
                ProcessRuntime.connect(data_dir / "shim", node=settings.name, kill_margin_s=settings.kill_margin_s)
            )
            try:
                entrance = await enter(settings, data_dir, runtime)
            except UserError:
                await _leave_no_idle_shim(runtime)
                raise
            store = EtcdStore(entrance.endpoints)
            stack.push_async_callback(store.close)
            entrance.seat.attach(store)
            return await Daemon(settings, entrance, runtime, store).run()


async def _leave_no_idle_shim(runtime: ProcessRuntime) -> None:
    """A node that could not come up must not leave a shim behind, unless it holds something."""
    etcd = await runtime.service(ETCD_SERVICE)
    if not await runtime.held() and (etcd is None or etcd.exit is not None):
        await runtime.shutdown_shim()
