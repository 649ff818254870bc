"""The node's brain: events in, effects out. Pure: time comes in as an argument, and nothing is done here.

Four parts share the work, each a state machine of its own: the session (membership), the holdings (attempts), the
claims (stealing) and the leadership (repairs, on the node that holds the office). This module passes events to them,
keeps the mirrors they look at, and asks each what it wants done.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from spinetta import keys
from spinetta.attempt import GiveBack
from spinetta.claims import HOLD_OFF_S, QUEUE, Claims
from spinetta.codec import decode_node, readable
from spinetta.collect import Collector
from spinetta.errors import InvariantViolation
from spinetta.events import (
    Archived,
    AttemptEnded,
    CaseTag,
    Changed,
    ClearancesChanged,
    CollectTag,
    CommitDone,
    Effect,
    Happening,
    KeptAlive,
    LeaseGranted,
    LeaveWanted,
    ListDone,
    NoAnswer,
    Notice,
    PauseWanted,
    Prepared,
    ReadDone,
    Refused,
    Rejected,
    Remembered,
    RenewRuntime,
    RuntimeListed,
    SelfChanged,
    SetCandidate,
    SetDraining,
    SetUnfit,
    Started,
    Tick,
    WatchLost,
)
from spinetta.holdings import Holdings
from spinetta.mirror import Delta, Mirror
from spinetta.model import Beat, Exit, IncarnationId, NodeRecord, Reason, Resources
from spinetta.recover import Leadership
from spinetta.session import Phase, Session
from spinetta.settings import AgentSettings
from spinetta.standing import Revocations, Rights
from spinetta.sweep import Sweep
from spinetta.txn import Conflict, Registration

POLLS_MAX = 16  # rounds of asking the parts until none has more to do; more would be two parts going in circles


class Agent:
    """One node, as a state machine.

    Call `handle` with whatever has happened, carry out the effects, and call again no later than `next_s`.
    """

    def __init__(self, settings: AgentSettings, incarnation: IncarnationId | None = None) -> None:
        self.settings = settings
        self.session = Session(settings, incarnation)
        self.holdings = Holdings(settings.name)
        self.claims = Claims(settings)
        self.leadership = Leadership(settings)
        self.collector = Collector(settings)
        self.sweep = Sweep(settings)
        self.draining = settings.record.draining
        self.unfit = ""  # why the machine is not fit for tasks now, as the shell has seen
        self._could_not_start = ("", 0.0)  # what kept it from starting one, and until when that counts
        self.leaving_soon = False
        self.leaving = False
        every_s = settings.reconcile_s
        self.nodes = Mirror("nodes", keys.NODE, every_s)
        self.mine = Mirror("mine", keys.running_on(settings.name), every_s)
        self.offices = Mirror("offices", keys.LEADER, every_s)
        self.lives = Mirror("lives", keys.INCARNATION, every_s)
        self.rights = Mirror("rights", keys.ACL_NODE, every_s)  # for those only who may lead
        self._mirrors = {m.tag: m for m in (self.nodes, self.mine, self.offices, self.lives, self.rights)}
        self._revocations = Revocations()
        self._records: dict[str, NodeRecord] = {}
        self._peers: tuple[NodeRecord, ...] = ()
        self._begun = False
        self._life = incarnation

    # --- outside view ---

    @property
    def left(self) -> bool:
        """True once the node has deregistered, or has nothing more to do here: the daemon may end."""
        thrown_out = self.leaving and self.session.revoked and self.holdings.nothing_runs
        return self.session.phase is Phase.LEFT or thrown_out

    @property
    def restored(self) -> bool:
        """True once the cluster has been made anew from older data: this agent is of no use any more, and whoever runs
        it puts a new one in its place. Nothing that was asked for this one may be answered to that one."""
        return self.session.restored

    @property
    def leading(self) -> bool:
        """True while this node believes to hold the office."""
        return self.leadership.leading

    @property
    def peers(self) -> tuple[NodeRecord, ...]:
        """The other live nodes, as they last described themselves."""
        return self._peers

    def free(self) -> Resources:
        """What is neither held nor reserved by claims under way."""
        room = self.settings.record.capacity - self.holdings.demand()
        if self.claims.round is not None:  # asked at every event; most of the time no claims are under way
            room = room - self.claims.reserved(self.holdings.counted())
        return room.at_least_nothing()

    @property
    def next_s(self) -> float | None:
        """When to call `handle` again if nothing happens before."""
        times = [
            self.session.next_s,
            self.holdings.next_s,
            self.claims.next_s,
            self.collector.next_s,
            self.leadership.next_s(keys.OFFICE in self.offices.entries) if self._may_lead else None,
            self.sweep.next_s,
            *(m.next_s for m in self._mirrors.values()),
        ]
        return min((t for t in times if t is not None), default=None)

    # --- the turn ---

    def handle(self, now: float, now_ms: int, *events: Happening) -> list[Effect]:
        """Take in events and say what is to be done.

        Args:
            now: seconds on a clock that never goes back and also counts while the machine sleeps.
            now_ms: wall-clock milliseconds, for the records that people read; nothing depends on them.
            events: in the order in which they happened.
        """
        effects: list[Effect] = []
        if not self._begun:
            self._begun = True
            self.mine.open(now)
            self.nodes.open(now)
            self.offices.open(now)
        for event in events:
            effects += self._take(event, now, now_ms)
        for _ in range(POLLS_MAX):
            more = self._poll(now, now_ms)
            if not more:
                return effects
            effects += more
        raise InvariantViolation(f"the agent of {self.settings.name} has not come to rest at {now}: {effects[-20:]}")

    def _take(self, event: Happening, now: float, now_ms: int) -> list[Effect]:
        match event:
            case Tick():
                return []
            case CommitDone(tag=CollectTag()) | ReadDone(tag=CollectTag()) | ListDone(tag=CollectTag()) | Archived():
                return self.collector.took(event, now, now_ms)
            case CommitDone():
                return self._committed(event, now)
            case ReadDone():
                return self._read(event, now, now_ms)
            case ListDone():
                return self._listed(event, now)
            case Changed():
                self._changed(event, now)
                return []
            case WatchLost():
                if event.tag == QUEUE:
                    self.claims.watch_lost(event, now)
                else:
                    self._mirrors[event.tag].lost(event, now)
                return []
            case LeaseGranted():
                part = self.leadership if event.tag == "office" else self.session
                return part.lease_granted(event, now)
            case KeptAlive():
                part = self.session if event.tag == "self" else self.leadership
                return part.kept_alive(event, now)
            case Remembered():
                return self.session.remembered(event, now)
            case Started():
                self.claims.touch()
                return self._ended_unfit(event.exit, now) + self.holdings.started(event, now)
            case Prepared():
                self.holdings.prepared(event.key)
                return []
            case AttemptEnded():
                return self._ended_unfit(event.exit, now) + self.holdings.attempt_ended(event)
            case RuntimeListed():
                return self._runtime_listed(event, now)
            case SelfChanged():
                self.session.describe(event.record)
                return []
            case SetUnfit():
                self.unfit = event.why
                self.claims.touch()
                return []
            case SetDraining():
                self.draining, self.leaving_soon = event.draining, event.leaving
                self.holdings.give_back(_given_back(event))
                self.claims.touch()
                return []
            case PauseWanted():
                self.session.pause(event.for_s)
                return []
            case LeaveWanted():
                self.draining = self.leaving = True
                if event.release or self.holdings.giving_back is GiveBack.NOTHING:
                    self.holdings.give_back(GiveBack.ALL if event.release else GiveBack.UNSTARTED)
                return []
            case ClearancesChanged():
                if self.session.acl is None:
                    self._set_clearances(event.clearances)
                self.session.look_again(now)
                return []
            case Refused():
                return self.session.refused(event.text, now)
            case SetCandidate():
                if event.candidate:
                    self.leadership.candidate = True
                    return []
                return self.leadership.resign()

    def _set_clearances(self, clearances: tuple[str, ...]) -> None:
        self.claims.set_clearances(clearances)
        if self.session.record.clearances != clearances:
            self.session.describe(replace(self.session.record, clearances=clearances))

    def _committed(self, done: CommitDone, now: float) -> list[Effect]:
        match done.tag:
            case "claim" if isinstance(done.result, Rejected):
                return self.claims.rejected(done.result, now)
            case "claim":
                if not self.claims.answered(done, now, self.holdings):
                    self.session.suspect(now)
                return []
            case "finish":
                self.claims.touch()
                if isinstance(done.result, Conflict):
                    self.session.suspect(now)
                return self.holdings.finished(done, now)
            case "office":
                return self.leadership.office_answered(done, now)
            case "sweep-mend":
                return self.sweep.mended(done, now)
            case CaseTag(step="condemn", node=node):
                self.leadership.condemned(node, now)
                return []
            case CaseTag() as tag:
                self.leadership.case_answered(tag, done, now)
                return []
            case _:
                return self.session.commit_done(done, now)

    def _read(self, done: ReadDone, now: float, now_ms: int) -> list[Effect]:
        match done.tag:
            case "self":
                effects = self.session.read_done(done, now, nothing_runs=self.holdings.nothing_runs)
                if self.session.clearances is not None:
                    # Together with the new registration: a round that was planned under the old rights would otherwise
                    # be claimed under the new ones.
                    self._set_clearances(self.session.clearances)
                return effects
            case "held":
                self.claims.touch()
                return self.holdings.read_done(done, now)
            case "doubtful":
                self.claims.touch()
                return self.holdings.doubts_read(done, now)
            case "claim":
                under = None if self.draining else self._claim_under  # it may have been drained since it asked
                return self.claims.records_read(done, now, now_ms, under)
            case "claim-doubt":
                return self.claims.read_back(done, now, self._claim_under, self.holdings)
            case "hints":
                self.claims.hints_read(done, now)
                return []
            case "sweep-page":
                return self.sweep.page_read(done, self.lives.entries, now)
            case "sweep-look":
                return self.sweep.looked(done, now, now_ms)
            case CaseTag(node=node, revision=revision):
                return self.leadership.strays_read(node, revision, done, now, now_ms)
        raise InvariantViolation(f"an answer to a question nobody asked: {done.tag}")

    def _listed(self, done: ListDone, now: float) -> list[Effect]:
        match done.tag:
            case "queue":
                return self.claims.listed(done, now)
            case "sweep":
                return self.sweep.listed(done, now)
            case CaseTag(node=node, revision=revision):
                return self.leadership.strays_listed(node, revision, done, now)
            case str() as tag:
                return self._mirror_listed(self._mirrors[tag], done, now)
        raise InvariantViolation(f"an answer to a question nobody asked: {done.tag}")

    def _mirror_listed(self, mirror: Mirror, done: ListDone, now: float) -> list[Effect]:
        deltas, effects = mirror.listed(done, now)
        if mirror is self.mine and done.listing is not None:
            self.holdings.follow(deltas)
            self.holdings.listed(mirror.entries, done.listing.revision)
            self.claims.touch()
        if mirror is self.nodes and deltas:
            self._peers_changed(deltas)
        if mirror is self.rights and deltas:
            self._rights_changed(deltas, now)
        return effects

    def _changed(self, changed: Changed, now: float) -> None:
        if changed.tag == QUEUE:
            self.claims.changed(changed, now)
            return
        mirror = self._mirrors[changed.tag]
        deltas = mirror.changed(changed)
        if mirror is self.mine and deltas:
            self.holdings.follow(deltas)
            self.claims.touch()
        if mirror is self.nodes and deltas:
            self._peers_changed(deltas)
        if mirror is self.rights and deltas:
            self._rights_changed(deltas, now)

    def _rights_changed(self, deltas: Sequence[Delta], now: float) -> None:
        self._revocations.follow(deltas)
        own = keys.acl_node(self.settings.name)
        if any(d.key == own and (d.new is None or d.new.modified != self.session.acl_seen) for d in deltas):
            self.session.look_again(now)

    def _peers_changed(self, deltas: Sequence[Delta]) -> None:
        for d in deltas:  # only what has changed is decoded: each node describes itself once a second
            record = readable(decode_node, d.new.value) if d.new is not None else None
            if record is None or record.name == self.settings.name or keys.node(record.name) != d.key:
                self._records.pop(d.key, None)
            else:
                self._records[d.key] = record
        self._peers = tuple(r for _, r in sorted(self._records.items()))
        if any(d.old is None or d.new is None for d in deltas):
            self.claims.without_wait()

    def _ended_unfit(self, ended: Exit | NoAnswer | None, now: float) -> list[Effect]:
        if not isinstance(ended, Exit) or ended.reason is not Reason.NODE_UNFIT:
            return []
        if ended.lacks:  # others can be started: this node goes on
            self.claims.hold_off(now, ended.lacks)
            return [Notice(f"this node takes no tasks that need {ended.lacks} for a while: {ended.message}")]
        self.claims.hold_off(now)
        self._could_not_start = (ended.message or "a task could not be started", now + HOLD_OFF_S)
        return [Notice(f"this node cannot start tasks and takes none for a while: {ended.message}")]

    def _runtime_listed(self, listed: RuntimeListed, now: float) -> list[Effect]:
        if not self.holdings.runtime_known:  # whether a new life may begin depends on what runs of an earlier one
            self.session.begin(now)
        self.holdings.runtime_listed(listed, now)
        # A new shim knows of no renewal yet and would refuse to start anything.
        if self.session.renewed_at_s is None:
            return []
        return [RenewRuntime(self.session.renewed_at_s)]

    # --- what the parts want ---

    @property
    def _claim_under(self) -> Registration | None:
        return self.session.registration if self.session.may_start else None

    @property
    def _may_lead(self) -> bool:
        return self.nodes.synced and self.offices.synced and self.rights.synced

    def _poll(self, now: float, now_ms: int) -> list[Effect]:
        effects: list[Effect] = []
        if self.leadership.candidate and not self.rights.wanted:
            self.rights.open(now)
        elif not self.leadership.candidate and self.rights.wanted:
            effects += self.rights.close()
        if self.leading and not self.lives.wanted:
            self.lives.open(now)
        elif not self.leading and self.lives.wanted:
            effects += self.lives.close()
        session = self.session
        if session.registration is not None and self.holdings.listed_at < session.registration.since:
            self.mine.refresh(now)
        for mirror in self._mirrors.values():
            effects += mirror.poll(now)
        if session.must_stop:
            self.claims.life_ended()
        life = session.incarnation
        if life != self._life:
            self._life = life
            self.holdings.life_changed()
        effects += self.holdings.poll(
            now,
            now_ms,
            life,
            session.life_seen,
            may_start=self._may_start,
            must_stop=session.must_stop,
            acl_seen=session.acl_seen,
            clearances=session.clearances,
            promised=session.promised,
        )
        if self.leaving and session.active and self.holdings.empty:
            effects += self.leadership.resign()
            effects += session.deregister()
        self._describe(now)
        unstarted = Beat(self.holdings.waiting, self.holdings.preparing)
        effects += session.poll(now, unstarted, self.holdings.wanted)
        if self._may_lead:
            office = self.offices.entries.get(keys.OFFICE)
            lives = self.lives.entries if self.lives.synced else None
            rights = self._rights()
            effects += self.leadership.poll(now, office, self.nodes.entries, lives, session.incarnation, rights)
        effects += self._sweep_on(now)
        effects += self._collect(now)
        effects += self.claims.poll(
            now, self._claim_under, session.incarnation, self._takeable(), self._slots(), self._peers
        )
        return effects

    def _sweep_on(self, now: float) -> list[Effect]:
        office = self.leadership.office
        if office is None or not self.lives.synced:
            if self.sweep.begun:
                self.sweep = Sweep(self.settings)  # the next leader begins its own round
            return []
        return self.sweep.poll(now, office)

    def _collect(self, now: float) -> list[Effect]:
        office = self.leadership.office if self.nodes.synced else None
        return self.collector.poll(now, office, self.nodes.entries)

    def _rights(self) -> Rights:
        needed = self.settings.secured
        rights = self._revocations.rights(self.settings.name, self.rights.entries, needed=needed)
        return replace(rights, may_lead=False) if self.session.revoked else rights

    @property
    def _up_to_date(self) -> bool:
        """Whether all is known that an earlier daemon, or registration, has written of what this node holds.

        It may have had claims and ends under way, which were committed after an older listing.
        """
        registration = self.session.registration
        return registration is not None and self.holdings.listed_at >= registration.since

    @property
    def _may_start(self) -> bool:
        return self.session.may_start and self._up_to_date

    def _takeable(self) -> Resources | None:
        known = self._up_to_date and self.holdings.runtime_known and self.holdings.all_read
        return self.free() if known and not self.draining and not self.unfit else None

    def _slots(self) -> int:
        return self.settings.attempts_max - len(self.holdings.held)

    def _describe(self, now: float) -> None:
        free = self.free() if self.holdings.all_read else Resources()
        running, leaving = len(self.holdings.held), self.leaving or self.leaving_soon
        said, brake = self.session.record, self.leadership.brake
        failure, until_s = self._could_not_start
        unfit = self.unfit or (failure if now < until_s else "")
        known = (said.free, said.running, said.draining, said.leaving, said.brake, said.unfit)
        if known == (free, running, self.draining, leaving, brake, unfit):  # nearly always: asked at every event
            return
        self.session.describe(
            replace(said, free=free, running=running, draining=self.draining, leaving=leaving, brake=brake, unfit=unfit)
        )


def _given_back(event: SetDraining) -> GiveBack:
    if not event.draining:
        return GiveBack.NOTHING
    if not event.release:
        return GiveBack.UNSTARTED
    return GiveBack.RESTARTABLE if event.spare else GiveBack.ALL
