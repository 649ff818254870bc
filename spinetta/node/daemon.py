"""The daemon: brings up what a node consists of, keeps it together, and takes it down in order."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Coroutine, Iterable, Iterator
from contextlib import AbstractAsyncContextManager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spinetta import __version__, devices, openfiles
from spinetta.access import NodeRole
from spinetta.agent import Agent
from spinetta.config import Settings
from spinetta.errors import OutcomeUnknown, RuntimeUnavailable, UserError
from spinetta.events import SelfChanged, SetCandidate, SetDraining, SetUnfit, attempt_key
from spinetta.model import IncarnationId, Membership, NodeId, NodeRecord, TaskId
from spinetta.node import detect
from spinetta.node.archive import Archive
from spinetta.node.archiving import NodeArchivist
from spinetta.node.containers import Containers
from spinetta.node.driver import Driver, wall_ms
from spinetta.node.ending import Ending
from spinetta.node.entry import Entrance
from spinetta.node.etcdcare import EtcdCare
from spinetta.node.etcdmove import EtcdMove
from spinetta.node.fitness import LOOK_EVERY_S, Fitness
from spinetta.node.health import StoreHealth
from spinetta.node.join import GATEWAYS_MAX
from spinetta.node.keeper import SeatKeeper
from spinetta.node.launching import LaunchSettings
from spinetta.node.leaving import Leaving
from spinetta.node.logsweep import SteppedClock, sweep_logs, sweep_removed
from spinetta.node.port import LeaveStep, RunningSample
from spinetta.node.renewal import Report
from spinetta.node.scratch import KEPT
from spinetta.node.scratchsweep import ScratchSweep
from spinetta.node.seats import OwnSeat
from spinetta.node.secured import Hooks, Secured
from spinetta.node.services.server import ApiServer, serve
from spinetta.node.signals import StopSignals
from spinetta.node.trouble import TROUBLE, Teller
from spinetta.node.vault import Vault
from spinetta.runtime.granting import GrantingRuntime, device_troubles
from spinetta.runtime.images.store import ImageStore
from spinetta.runtime.shims import Shims
from spinetta.settings import AgentSettings
from spinetta.store.etcd import EtcdStore
from spinetta.store.protocol import Store
from spinetta.trust.audit import AuditLog
from spinetta.trust.credentials import NodeCredentials
from spinetta.trust.dial import Dialer
from spinetta.txn import Committed, Txn

if TYPE_CHECKING:
    from spinetta.store.gateway import GatewayStore

log = logging.getLogger("spinetta.node")

TOLD_S = 7.0  # for the others to know that this node is drained; a client waits 10 s for one answer
DRAIN, RELEASE, FORCE = "drain", "release", "force"  # as remembered
ENDPOINTS_EVERY_S = 5.0  # how often the voters to talk to are looked up
SWEEP_EVERY_S = 300.0
EXIT_OK = 0
BEGIN_ANEW = -1  # no exit code: the daemon is to be made anew in this process


def boot_id() -> str:
    """What the kernel calls this boot; changes when the machine restarts."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


class Daemon:
    """One node, as its services see it (`NodePort`), and its life from start to end."""

    def __init__(
        self,
        settings: Settings,
        entrance: Entrance,
        runtime: Shims,
        containers: Containers,
        store: EtcdStore | GatewayStore,
        credentials: NodeCredentials | None,
        dialer: Dialer,
        audit: AuditLog,
        stop: StopSignals,
    ) -> None:
        self.settings = settings
        self.credentials = credentials
        self.dialer = dialer
        self._audit = audit
        self._entrance = entrance
        self._runtime = runtime
        self.containers = containers
        self._store = store
        self.seat: OwnSeat = entrance.seat
        self._stop = stop
        self._report: Report | None = None
        self._devices = devices.read(settings.devices)
        self._granting = GrantingRuntime(containers.runtime, Path(settings.data_dir) / "units", self._devices)
        self._open_files_most = min(settings.open_files_max, detect.open_files_most())
        name = NodeId(settings.name)
        vault = Vault(store, name, lambda: credentials.sealing_private) if credentials is not None else None
        self.archive = Archive(Path(settings.data_dir) / "archive", settings.archive_keep_bytes)
        self.agent = Agent(self._agent_settings(), entrance.incarnation)
        self.driver = Driver(
            self.agent,
            store,
            self._granting,
            LaunchSettings(
                settings.name,
                settings.pids_max,
                settings.address,
                settings.log_max_bytes,
                settings.open_files,
                self._open_files_most,
            ),
            remember=self._remember,
            vault=vault,
            archivist=NodeArchivist(name, self.archive, dialer, lambda: self.agent.peers),
        )
        self._health = (
            StoreHealth(store.connections, settings.etcd_quota_bytes, lambda: self.seat.cluster_id)
            if isinstance(store, EtcdStore)
            else None
        )
        self.keeper = SeatKeeper(
            self.agent,
            self.seat,
            settings.voters_wanted,
            self.dialer,
            self._revoked,
            replace_after_s=settings.voter_replace_after_s,
            holds_office=self._holds_office,
        )
        self._leaving = Leaving(self.driver, self.seat, left=stop.end)
        self._ending = Ending(self.driver, self.seat, runtime, entrance.memory, stop, settings.drain_timeout_s)
        self._secured: Secured | None = None
        if credentials is not None and vault is not None:
            hooks = Hooks(
                report=self._certificates_changed,
                restart_etcd=self.seat.restart,
                is_seated=lambda: bool(self.seat.member_id),
                is_leading=lambda: self.agent.leading,
                clearances=lambda: self.clearances,
            )
            self._secured = Secured(self, credentials, store, vault, hooks, settings.address)

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

    @property
    def clearances(self) -> frozenset[str]:
        """The labels that count for this node now."""
        acl = self.agent.session.acl
        return frozenset(acl.effective) if acl is not None else frozenset()

    @property
    def images(self) -> ImageStore | None:
        """The images of this node."""
        return self.containers.images

    def voter_addresses(self) -> tuple[str, ...]:
        """API addresses of the nodes with a seat."""
        records = (self.agent.session.record, *self.agent.peers)
        found = tuple(sorted(r.address for r in records if r.etcd_member_id))
        return found or self._entrance.memory.identity.gateways

    def audit(self, call: str, caller: str, object_: str, outcome: str, revision: int) -> None:
        """Write down who did what, or was refused."""
        self._audit.record(call, caller, object_, outcome, revision)

    def wall_ms(self) -> int:
        """The wall clock."""
        return wall_ms()

    @property
    def shim_dir(self) -> Path:
        """The state directory of this node's first shim."""
        return self._runtime.home

    def holder_dir(self, key: str) -> Path:
        """The state directory of the shim that holds an attempt."""
        return self._runtime.state_dir_of(key)

    def log_path(self, task_id: TaskId, attempt: int, stream: str) -> Path:
        """Where a stream of an attempt made here is."""
        return self._runtime.log_path(attempt_key(task_id, attempt), stream)

    async def running_sample(self, task_id: TaskId) -> RunningSample | None:
        """What a task that runs here uses."""
        held = self.agent.holdings.held.get(task_id)
        if held is None:
            return None
        try:
            found = await self._runtime.sample(held.key)
        except RuntimeUnavailable:
            return None
        if found is None:
            return None
        given = self._granting.labels(held.key)
        return RunningSample(held.holding.attempt, found.usage, found.memory_bytes, found.pids, given)

    async def membership(self) -> Membership:
        """etcd's members, leader and alarms."""
        if isinstance(self._store, EtcdStore):
            return await self.seat.membership()
        return await self._store.members()

    async def set_draining(self, draining: bool, *, release: bool = False, force: bool = False) -> None:
        """Stop, or start again, taking tasks. It is remembered: a drained node is drained after a restart, too."""
        if not draining and (self._leaving.wanted or self._stop.wish is not None):
            raise UserError(
                f"node {self.name} is {'leaving' if self._leaving.wanted else 'being stopped'}: it takes no more tasks",
                field="node",
                reason="leaving",
                hint="start it again when it has ended",
            )
        how = DRAIN if not release else FORCE if force else RELEASE
        unwritten: UserError | None = None
        try:
            await asyncio.to_thread(self._entrance.memory.update, drain=how if draining else "")
        except UserError as e:  # a full disk is a reason to drain: done all the same, and told
            unwritten = e
        await self.driver.tell(SetDraining(draining, self._leaving.wanted, release, spare=not force))
        # With claims under way it could seem to hold nothing, and get a task a moment later.
        if not await self.driver.until(lambda a: _is_told(a, draining), TOLD_S):
            raise OutcomeUnknown("the node has been told, but the others do not know yet; look at: spinetta node list")
        if unwritten is not None:
            raise UserError(
                f"node {self.name} {'is draining' if draining else 'takes tasks again'}, but its next daemon will not "
                f"remember that: {unwritten.message}",
                field="node",
                hint="mend that, then say it again",
                reason=unwritten.reason,
            )

    @property
    def grace_min_s(self) -> float:
        """As for the default grace: longer than the lease lasts and killing takes."""
        return self.settings.lease_ttl_s + self.settings.kill_margin_s

    def leave(self, timeout_s: float | None) -> AsyncIterator[LeaveStep]:
        """Drain, give up the seat, deregister, end. Goes on when nobody listens."""
        return self._leaving.leave(self.settings.drain_timeout_s if timeout_s is None else timeout_s)

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
        drained = self._entrance.memory.identity.drain
        if drained:
            log.info("this node has been drained and takes no tasks; see: spinetta node undrain")
            await self.driver.tell(SetDraining(True, release=drained != DRAIN, spare=drained != FORCE))
        async with asyncio.TaskGroup() as group, self._serve():
            work = [
                group.create_task(self.driver.run(), name="agent"),
                group.create_task(self.seat.run(), name="etcd"),
                group.create_task(self.keeper.run(), name="voters"),
                *[group.create_task(work, name="etcd care") for work in self._etcd_work()],
                group.create_task(self._keep_endpoints(), name="endpoints"),
                group.create_task(self._tell_images(), name="images"),
                group.create_task(self._sweep(), name="logs"),
                group.create_task(self._keep_fit(), name="fitness"),
                group.create_task(self._leaving.run(), name="leave"),
            ]
            if self._secured is not None:
                work.append(group.create_task(self._secured.run(), name="trust"))
            await self._report_ready()
            told = group.create_task(self._stop.told(), name="told")
            anew = group.create_task(self._made_anew(), name="generation")
            await asyncio.wait((told, anew), return_when=asyncio.FIRST_COMPLETED)
            if told.done():
                await self._ending.finish(told.result())
            else:
                self.driver.hush()
            for task in (*work, told, anew):
                task.cancel()
        return EXIT_OK if told.done() and not told.cancelled() else BEGIN_ANEW

    async def _made_anew(self) -> None:
        """Return when the cluster turns out to have been restored or recovered: all in memory is of another history."""
        while not self.agent.restored and not self.seat.strayed:
            await self.driver.until(lambda a: a.restored, ENDPOINTS_EVERY_S)

    def _etcd_work(self) -> Iterator[Coroutine[Any, Any, None]]:
        if isinstance(self._store, EtcdStore) and self._health is not None:
            yield self._health.run()
            pause_s = self.settings.lease_ttl_s / 2
            yield EtcdCare(self.agent, self.seat, self._store, self._health, pause_s=pause_s).run()
            yield EtcdMove(self._runtime, self.seat, self._store, self.name).run()

    def _serve(self) -> AbstractAsyncContextManager[ApiServer]:
        addresses = [self.settings.address]
        if self._secured is None:
            return serve(self, addresses, store_health=self._health)
        trust = self._secured
        return serve(
            self, addresses, acl=trust.acl, tokens=trust.tokens, extra=trust.services, store_health=self._health
        )

    async def _report_ready(self) -> None:
        record = self.agent.settings.record
        role = "voter" if self.seat.member_id else "worker" if not record.candidate else "without a seat yet"
        log.info("node %s: API on %s, %s, etcd cluster %s", record.name, record.address, role, self.seat.cluster_id)

    # --- background work ---

    async def _keep_endpoints(self) -> None:
        """Talk to the own member first, then to the other voters; workers spread over them by name."""
        teller = Teller(log)
        while True:
            try:
                await self._look_for_voters()
            except TROUBLE as e:  # e.g. the disk is full
                teller.tell(f"the voters cannot be looked up now: {e}")
            await asyncio.to_thread(self._note_shims)
            await self._seat_changed()
            await asyncio.sleep(ENDPOINTS_EVERY_S)

    def _note_shims(self) -> None:
        self._entrance.memory.note_shims(later=self._runtime.are_scattered())

    async def _tell_images(self) -> None:
        """Say at once which images have come or gone: others choose by it."""
        changed = asyncio.Event()
        if self.containers.images is not None:
            self.containers.images.listen(changed.set)
        while True:
            await changed.wait()
            changed.clear()
            await self._seat_changed()

    async def _look_for_voters(self) -> None:
        memory = self._entrance.memory
        gateways = self.voter_addresses() if self.credentials is not None else ()
        if gateways and not isinstance(self._store, EtcdStore):
            # The others behind them, not forgotten: of all voters one that was away may be the only one to come back.
            gateways = (*gateways, *(g for g in memory.identity.gateways if g not in gateways))[:GATEWAYS_MAX]
        if gateways and gateways != memory.identity.gateways:
            memory.update(gateways=gateways)
        if not isinstance(self._store, EtcdStore):
            if gateways:
                await self._store.set_endpoints(gateways)
            return
        await self.seat.look_for_itself()
        urls = tuple(await self.seat.endpoints())
        if urls and urls != self._store.endpoints:
            await self._store.set_endpoints(urls)
            memory.update(endpoints=urls)

    async def _seat_changed(self) -> None:
        images, images_coming = self.containers.described()
        record = replace(
            self.agent.session.record,
            etcd_member_id=self.seat.member_id,
            etcd_client_url=self.seat.client_url,
            etcd_peer_url=self.seat.peer_url,
            warnings=self._warnings(),
            **(asdict(self._report) if self._report is not None else {}),
            clearances=tuple(sorted(self.clearances)),
            images=images,
            images_coming=images_coming,
            shims=self._runtime.described(),
        )
        if record != self.agent.session.record:
            await self.driver.tell(SelfChanged(record))
        may_lead = bool(self.seat.member_id) and not self._leaving.wanted
        if may_lead and not self.agent.leadership.candidate:
            await self.driver.tell(SetCandidate(True))
        elif not self.seat.member_id and self.agent.leadership.candidate:
            # Its seat has been given to another. The office goes to a node that can care for the voters.
            await self.driver.tell(SetCandidate(False))

    async def _certificates_changed(self, report: Report) -> None:
        """Tell the others how this node's certificates stand; its own connections to etcd use the new ones."""
        self._report = report
        if isinstance(self._store, EtcdStore) and not await self._store.refresh():
            log.info("a member does not take this node's new certificate yet; the connection to it stays as it is")
        await self._seat_changed()

    async def _keep_fit(self) -> None:
        """Take no tasks while the machine has no room for them, and say why."""
        fitness = Fitness(Path(self.settings.data_dir))
        try:
            while True:
                why = await fitness.look()
                if why != self.agent.unfit:
                    log.warning("this node takes no tasks: %s", why) if why else log.info("this node takes tasks again")
                    await self.driver.tell(SetUnfit(why))
                await asyncio.sleep(LOOK_EVERY_S)
        finally:
            fitness.close()

    async def _sweep(self) -> None:
        clock = SteppedClock()
        kept = ScratchSweep(self.shim_dir / KEPT, self.settings.scratch_keep_bytes)
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
                        now_s=clock.now_s(),
                        keep_bytes=self.settings.log_keep_bytes,
                        keep_s=self.settings.log_keep_s,
                        since_s=clock.set_at_s,
                    )
                    await asyncio.to_thread(kept.sweep, now_s=clock.now_s(), set_at_s=clock.set_at_s)
                    await asyncio.to_thread(
                        sweep_removed,
                        Path(self.settings.data_dir),
                        now_s=clock.now_s(),
                        since_s=clock.set_at_s,
                    )
                except OSError as e:
                    log.warning("old logs cannot be removed now: %s", e)
            await asyncio.sleep(SWEEP_EVERY_S)

    # --- inside ---

    async def _holds_office(self) -> bool:
        """Whether the store says that this node is the leader now."""
        office = self.agent.leadership.office
        return office is not None and isinstance(await self._store.commit(Txn(when=office.guards())), Committed)

    async def _revoked(self, nodes: Iterable[str]) -> frozenset[str]:
        """Those of these nodes that are trusted no more."""
        if self._secured is None:
            return frozenset()
        found = [(name, await self._secured.acl.node(NodeId(name))) for name in nodes]
        return frozenset(name for name, entry in found if entry is not None and entry[0].revoked)

    @property
    def _is_worker(self) -> bool:
        return self.credentials is not None and self.credentials.role is NodeRole.WORKER

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
            candidate=s.candidate and not self._is_worker,
            version=__version__,
            started_ms=wall_ms(),
            boot_id=boot_id(),
            runtimes=s.runtimes,
            units=devices.labels_of(s.devices),
            allows=(*self.containers.allows, openfiles.word(self._open_files_most)),
            warnings=self._warnings(),
            shims=self._runtime.described(),
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
            secured=self.credentials is not None,
            collect_after_s=s.collect_after_s,
            collect_keep=s.collect_keep,
        )

    def _remember(self, incarnation: IncarnationId) -> None:
        self._entrance.memory.update(incarnation_id=incarnation)

    def _warnings(self) -> tuple[str, ...]:
        trouble = tuple(t for t in (self._audit.trouble, self.archive.trouble) if t)
        trouble = (*device_troubles(self._devices, contained=self.containers.images is not None), *trouble)
        return (*self._runtime.warnings(), *self.containers.warnings, *self._entrance.warnings, *trouble)


def _is_told(agent: Agent, draining: bool) -> bool:
    settled = agent.claims.round is None if draining else True
    return agent.draining == draining and settled and agent.session.told
