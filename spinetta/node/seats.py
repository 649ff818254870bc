"""This node's seat among the voters: its own etcd member, if it has one."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import shutil
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from uuid import uuid4

from spinetta.errors import Fenced, InvariantViolation, RuntimeUnavailable, StoreUnavailable, UserError
from spinetta.model import Member, Membership
from spinetta.store.etcd import EtcdStore
from spinetta.store.identity import Identity, check_data_dir
from spinetta.store.members import Member as EtcdMember
from spinetta.store.members import Members, MemberStatus, hex_id, statuses
from spinetta.store.process import QUOTA_BYTES, EtcdSettings, EtcdTls, Version, initial_cluster
from spinetta.store.supervisor import EtcdSupervisor, Services
from spinetta.store.wal import wal_owner

log = logging.getLogger("spinetta.node")

JOINING = "spinetta"  # the token of a member that joins: etcd takes the cluster's id from the others then
START_S = 60.0  # etcd's start, on a busy machine with a slow disk


class OwnSeat:
    """The etcd member of this node: taken, kept running, given up. `member_id` is 0 while it has none."""

    def __init__(
        self,
        services: Services,
        *,
        name: str,
        data_dir: Path,
        program: str,
        version: Version,
        client_url: str,
        peer_url: str,
        identity: Callable[[], Identity],
        update: Callable[..., None],
        quota_bytes: int = QUOTA_BYTES,
        tls: Callable[[], EtcdTls] | None = None,
        before_resuming: Callable[[EtcdSupervisor], Awaitable[None]] | None = None,
    ) -> None:
        self._services = services
        self._name = name
        self._etcd_dir = data_dir / "etcd"
        self._log_path = (data_dir / "etcd.log").absolute()
        self._program = program
        self._version = version
        self.client_url = client_url
        self.peer_url = peer_url
        self._identity = identity
        self._update = update
        self._quota_bytes = quota_bytes
        self._tls = tls
        self._before_resuming = before_resuming
        self._members: Members | None = None
        self._supervisor: EtcdSupervisor | None = None
        self._changing = asyncio.Lock()
        self._reseated = asyncio.Event()
        self._heard_of = ""  # the id of the cluster whose etcd answered last

    def attach(self, store: EtcdStore) -> None:
        """The store through which etcd is asked about its membership."""
        self._members = Members(store.connections)

    @property
    def member_id(self) -> int:
        """Of this node's member; 0: it has none."""
        text = self._identity().member_id
        return int(text, 16) if text else 0

    @property
    def cluster_id(self) -> str:
        """Of the cluster, hexadecimal."""
        return self._identity().cluster_id

    @property
    def strayed(self) -> bool:
        """True when the etcd that answers is of another cluster than this node remembers."""
        return bool(self._heard_of and self.cluster_id) and self._heard_of != self.cluster_id

    @property
    def empty(self) -> bool:
        """True when there is no data of a member."""
        return wal_owner(self._etcd_dir) is None

    @property
    def members(self) -> Members:
        """What etcd says of itself, and changes of it."""
        if self._members is None:
            raise InvariantViolation("the seat is used before it has a store")
        return self._members

    # --- taking and giving up ---

    async def bootstrap(self) -> None:
        """Begin a new cluster with this node as its only voter. May be repeated after a crash."""
        # etcd makes the cluster's id from its first members' URLs and this word: a fixed one would give every cluster
        # that begins at the same address the same id, and data of one could pass for data of another.
        await self._start(initial_cluster([(self._name, self.peer_url)]), existing=False, token=uuid4().hex)

    async def resume(self) -> None:
        """Start the member that this node has had before.

        Raises:
            UserError: its data is gone or of something else.
            Fenced: it has been removed meanwhile; the seat has been given up.
        """
        cluster = self._identity().initial_cluster
        if self._before_resuming is not None:
            check_data_dir(self._identity(), self._etcd_dir)
            await self._before_resuming(self._supervisor_of(cluster, existing=True, token=JOINING))
        try:
            await self._start(cluster, existing=True)
        except StoreUnavailable as e:
            log.warning("etcd is not ready yet and goes on trying (a majority of the voters must be up): %s", e)
        except Fenced:
            await self._put_away()
            raise

    async def take(self, member_id: int, cluster: str, cluster_id: str) -> None:
        """Start the member that the leader has added for this node. May be repeated."""
        async with self._changing:
            known = self._identity()
            if known.cluster_id and known.cluster_id != cluster_id:
                raise UserError(f"this node belongs to etcd cluster {known.cluster_id}, not {cluster_id}")
            if self.member_id and self.member_id != member_id:
                # Its earlier member was removed without this node hearing of it: there is only one of a peer URL.
                await self._put_away()
            if self._supervisor is not None:
                return
            self._update(cluster_id=cluster_id)
            owner = wal_owner(self._etcd_dir)
            if owner is not None and owner[0] != hex_id(member_id):  # a crash has come between forgetting and this
                await asyncio.to_thread(self._put_aside)
            await self._start(cluster, existing=True, member_id=hex_id(member_id))

    async def give_up(self, member_id: int) -> None:
        """The member has been removed from the cluster. May be repeated; another member's id is ignored."""
        async with self._changing:
            if self.member_id == member_id:
                await self._put_away()

    async def stop(self) -> None:
        """Stop etcd in order; the seat is kept."""
        await self._stop_etcd()

    async def restart(self) -> None:
        """Stop etcd and start it again, because it reads the authorities it believes only then. No seat: nothing."""
        async with self._changing:
            if self._supervisor is not None:
                await self._supervisor.restart(timeout_s=START_S)

    async def _start(self, cluster: str, *, existing: bool, member_id: str = "", token: str = JOINING) -> None:
        check_data_dir(self._identity(), self._etcd_dir)
        supervisor = self._supervisor_of(cluster, existing=existing, token=token)
        if self._identity().has_joined:
            self._seat(supervisor)  # to be kept running even when it is not ready in time
        status: MemberStatus = await supervisor.start(timeout_s=START_S)
        if member_id and hex_id(status.member_id) != member_id:
            raise UserError(f"etcd started as member {hex_id(status.member_id)}, expected {member_id}")
        self._update(
            cluster_id=status.cluster_id,
            member_id=hex_id(status.member_id),
            initial_cluster=cluster,
            has_joined=True,
        )
        self._seat(supervisor)

    def _supervisor_of(self, cluster: str, *, existing: bool, token: str) -> EtcdSupervisor:
        settings = EtcdSettings(
            program=self._program,
            name=self._name,
            data_dir=self._etcd_dir,
            client_url=self.client_url,
            peer_url=self.peer_url,
            initial_cluster=cluster,
            existing=existing,
            token=token,
            quota_bytes=self._quota_bytes,
            tls=None if self._tls is None else self._tls(),
        )
        return EtcdSupervisor(self._services, settings, log_path=self._log_path, version=self._version)

    async def _put_away(self) -> None:
        """Stop the member for good. Its data is kept once, under another name, for a person to look at."""
        await self._stop_etcd()
        # Forgotten first. After a crash in between, data of a forgotten member is found and put aside by `take`; the
        # other way round the data would be missed, and the node refuse to start as one whose disk was wiped.
        self._update(member_id="", has_joined=False, initial_cluster="")
        await asyncio.to_thread(self._put_aside)
        log.info("this node has given up its voter's seat")

    async def abandon(self, cluster_id: str) -> None:
        """The cluster has been made anew without this member, under another id. Its data is kept for good: it may hold
        what that cluster lacks. May be repeated."""
        async with self._changing:
            known = self._identity()
            if known.has_joined:
                await self._supervisor_of(known.initial_cluster, existing=True, token=JOINING).stop()
                self._seat(None)
            self._update(member_id="", has_joined=False, initial_cluster="", cluster_id=cluster_id)
            owner = wal_owner(self._etcd_dir)
            if owner is not None and owner[1] != cluster_id:
                await asyncio.to_thread(self._put_aside, f"etcd.of-{owner[1]}")

    def _put_aside(self, name: str = "etcd.removed") -> None:
        old = self._etcd_dir.with_name(name)
        try:
            if self._etcd_dir.exists():
                shutil.rmtree(old, ignore_errors=True)
                self._etcd_dir.rename(old)
        except OSError as e:
            raise UserError(f"{self._etcd_dir} cannot be put aside: {e.strerror}", hint="move it away") from e

    async def _stop_etcd(self) -> None:
        supervisor = self._supervisor
        if supervisor is None:
            return
        self._seat(None)  # first: whoever keeps it running must not start it again
        try:
            await supervisor.stop()
        except BaseException:
            self._seat(supervisor)  # it may still run
            raise

    async def run(self) -> None:
        """Keep etcd running while there is a seat. Runs until it is cancelled."""
        while True:
            self._reseated.clear()
            supervisor = self._supervisor
            if supervisor is None:
                await self._reseated.wait()
            elif await self._keep(supervisor):
                async with self._changing:
                    if self._supervisor is supervisor:
                        await self._put_away_later()

    async def _put_away_later(self) -> None:
        try:
            await self._put_away()
        except (RuntimeUnavailable, UserError) as e:
            log.warning("the removed member cannot be put away now: %s", e)

    def _seat(self, supervisor: EtcdSupervisor | None) -> None:
        self._supervisor = supervisor
        self._reseated.set()

    async def _keep(self, supervisor: EtcdSupervisor) -> bool:
        """Keep it running until the seat changes (False) or etcd says that it has been removed (True)."""
        removed = False

        async def keep() -> None:
            nonlocal removed
            try:
                await supervisor.run()
            except Fenced as e:
                log.warning("%s", e)
                removed = True
                self._reseated.set()

        async with asyncio.TaskGroup() as group:
            keeping = group.create_task(keep())
            await self._reseated.wait()
            keeping.cancel()
        return removed

    # --- looking ---

    async def statuses(self, members: Iterable[EtcdMember]) -> dict[int, MemberStatus | None]:
        """How each member is; None for those that do not answer."""
        return await statuses(members, self._tls)

    async def look_for_itself(self) -> None:
        """See whether this node's member has been removed from the cluster without this node hearing of it.

        Etcd finds that out itself as long as it reaches a member whose address has not changed since it was away; and
        not while it is frozen.

        Raises:
            StoreUnavailable: nobody can tell now.
        """
        member_id = self.member_id
        if not member_id:
            return
        listed = await self.members.members()
        if listed.cluster_id == self.cluster_id and all(m.member_id != member_id for m in listed.members):
            log.warning("this node's etcd member has been removed from its cluster")
            await self.give_up(member_id)

    async def others_vote(self) -> bool:
        """True when some other node is a voter."""
        listed = await self.members.members()
        return any(not m.learner and m.member_id != self.member_id for m in listed.members)

    async def endpoints(self) -> list[str]:
        """Client URLs of the voters: the own one first, else in an order that spreads the workers over them."""
        listed = await self.members.members()
        self._heard_of = listed.cluster_id
        urls = sorted(m.client_url for m in listed.members if m.client_url and not m.learner)
        if self.client_url in urls and self._supervisor is not None:
            urls.remove(self.client_url)
            return [self.client_url, *urls]
        turn = int.from_bytes(hashlib.blake2b(self._name.encode(), digest_size=4).digest(), "big")
        return urls[turn % len(urls) :] + urls[: turn % len(urls)] if urls else []

    async def membership(self) -> Membership:
        """etcd's members, leader and alarms, for people."""
        listed = await self.members.members()
        seen = await self.statuses(listed.members)
        names = {m.member_id: m.name for m in listed.members}
        alarms = await self.members.alarms()
        return Membership(
            cluster_id=listed.cluster_id,
            leader_member_id=next((s.leader_id for s in seen.values() if s is not None and s.leader_id), 0),
            members=tuple(
                Member(
                    m.name,
                    m.member_id,
                    m.client_url,
                    m.peer_url,
                    m.learner,
                    (how := seen[m.member_id]) is not None and how.healthy,
                )
                for m in sorted(listed.members, key=lambda m: (m.name, m.member_id))
            ),
            alarms=tuple(f"etcd alarm {a.name} on {names.get(a.member_id, hex_id(a.member_id))}" for a in alarms),
        )

    async def check_may_leave(self, *, successor: bool) -> None:
        """See that the cluster's data will be somewhere when this node has left.

        Args:
            successor: some other live node could take a seat.

        Raises:
            UserError: it would not.
        """
        listed = await self.members.members()
        if self.member_id and len(listed.members) == 1 and not successor:
            raise UserError(
                f"{self._name} is the last node that can hold the cluster's data",
                field="node",
                hint="let another node join first; or stop this one with: spinetta node stop",
            )
