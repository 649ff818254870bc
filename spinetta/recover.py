"""What must be repaired after a death: the leader's duties, as a state machine.

The leader holds an office under a lease of its own. It condemns the incarnation of a node whose leased key is gone,
waits until nothing of it can run any more, puts its tasks back, and closes it. Every write is guarded by the office and
by the record it was decided on, so that two who both believe to be the leader do no harm.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from spinetta import codec, keys, lifecycle, txn
from spinetta.events import (
    CaseTag,
    Commit,
    CommitDone,
    Effect,
    Entry,
    GrantLease,
    KeepAlive,
    KeptAlive,
    LeaseGranted,
    List,
    ListDone,
    NoAnswer,
    Notice,
    Read,
    ReadDone,
    RevokeLease,
)
from spinetta.model import (
    Beat,
    Exit,
    Holding,
    Incarnation,
    IncarnationId,
    LeaseId,
    Life,
    NodeId,
    QueueHint,
    Reason,
    Revision,
    TaskId,
)
from spinetta.settings import AgentSettings
from spinetta.standing import NO_RIGHTS, Rights

RETRY_S = 1.0
REQUEUE_MAX = 100  # records read and written at once: below etcd's 128 operations a transaction
BRAKE_NODES_MIN = 3  # with fewer nodes, one death would be "more than half"
LOST_WHEN = {
    lifecycle.Reached.WAITING: "was lost before it had started this",
    lifecycle.Reached.PREPARING: "was lost while it brought in what this needs",
    lifecycle.Reached.EXECUTING: "was lost",
}


def wait_out_s(grace_s: float, kill_margin_s: float, clock_rate_error: float) -> float:
    """How long after a committed condemnation nothing of an attempt with this grace can still run.

    Its last renewal was sent before the condemnation was committed; its shim kills it at the latest grace - margin
    after that on its own clock, which may be slow by `clock_rate_error`, and has the margin to do so.
    """
    return grace_s * (1 + clock_rate_error) + kill_margin_s


def _reached(token: Revision, said: Beat) -> lifecycle.Reached:
    if token in said.preparing:
        return lifecycle.Reached.PREPARING
    return lifecycle.Reached.WAITING if token in said.waiting else lifecycle.Reached.EXECUTING  # or it may have been


@dataclass(frozen=True, slots=True)
class Stray:
    """A running key of a condemned node, and when its task may be put back."""

    task: TaskId
    token: Revision
    seen: Revision
    holding: Holding
    due_s: float


@dataclass(slots=True)
class Case:
    """A condemned incarnation that the leader deals with."""

    node: NodeId
    revision: Revision
    life: Incarnation
    since_s: float
    act_at_s: float
    busy: bool = False
    strays: dict[TaskId, Stray] = field(default_factory=dict)
    batch: tuple[Stray, ...] = ()


class Leadership:
    """The candidate for the office and, while it holds it, the leader's duties."""

    def __init__(self, settings: AgentSettings) -> None:
        self.settings = settings
        self.office: txn.OfficeHeld | None = None
        self.candidate = settings.candidate
        self.brake = ""  # why nobody is given up, while that is so
        self._lease: LeaseId | None = None
        self._campaigning = False
        self._campaign_at_s = 0.0
        self._keep_alive_at_s = 0.0
        self._keeping_alive = False
        self._office_until_s = 0.0
        self._cases: dict[NodeId, Case] = {}
        self._condemning: dict[NodeId, float] = {}  # until when not to try again
        self._vouched: set[NodeId] = set()  # seen dead by an administrator's word, and not back since
        self._notice = ""
        self._rights = NO_RIGHTS

    # --- outside view ---

    @property
    def braking(self) -> bool:
        """True while more than half of the nodes look dead at once, which is not believed."""
        return bool(self.brake)

    @property
    def vouched_dead(self) -> frozenset[NodeId]:
        """Nodes that an administrator has said are dead while we were leading, and that have not come back."""
        return frozenset(self._vouched)

    @property
    def leading(self) -> bool:
        """True while we believe to hold the office; the guards make a mistake harmless."""
        return self.office is not None

    def next_s(self, office_taken: bool) -> float | None:
        """When `poll` has something to do."""
        times = []
        if self.office is not None:
            times.append(self._office_until_s)
            if not self._keeping_alive:
                times.append(self._keep_alive_at_s)
            times += [c.act_at_s for c in self._cases.values() if not c.busy]
        elif self.candidate and not office_taken and not self._campaigning and self._rights.may_lead:
            times.append(self._campaign_at_s)
        return min(times, default=None)

    # --- office ---

    def poll(
        self,
        now: float,
        office: Entry | None,
        nodes: Mapping[str, Entry],
        lives: Mapping[str, Entry] | None,
        own: IncarnationId | None,
        rights: Rights = NO_RIGHTS,
    ) -> list[Effect]:
        """What time and the view ask for.

        `nodes` and `lives` mirror their prefixes; `lives` is None until synced. `own`: our incarnation, whose
        registration is our session's business.
        """
        self._rights = rights
        if self.office is None:
            return self._campaign(now, office)
        if not rights.may_lead:
            return self._lose()
        if self.office.acl_revision != rights.own:
            self.office = replace(self.office, acl_revision=rights.own)
        if office is not None and office.created > self.office.created:
            return self._lose()
        if now >= self._office_until_s:
            return self._lose()
        effects: list[Effect] = []
        if self._keep_alive_at_s <= now and not self._keeping_alive and self._lease is not None:
            self._keeping_alive = True
            self._keep_alive_at_s = now + self.settings.renew_every_s
            effects.append(KeepAlive("office", self._lease))
        if lives is None:
            return effects
        effects += self._condemn_absent(now, nodes, lives, own)
        self._vouched = {n for n in self._vouched if keys.node(n) not in nodes}
        self._open_cases(now, lives)
        for case in list(self._cases.values()):
            if not case.busy and case.act_at_s <= now:
                effects += self._act(case, now)
        return effects

    def _campaign(self, now: float, office: Entry | None) -> list[Effect]:
        if not self.candidate or office is not None or self._campaigning or self._campaign_at_s > now:
            return []
        if not self._rights.may_lead:
            return []
        self._campaigning = True
        if self._lease is not None:
            return [self._take()]
        return [GrantLease("office", self.settings.lease_ttl_s)]

    def _take(self) -> Effect:
        assert self._lease is not None  # noqa: S101 - the caller looked
        me = self.settings.name
        return Commit("office", txn.take_office(me, self._lease, codec.encode_office(me), self._rights.own))

    def lease_granted(self, granted: LeaseGranted, now: float) -> list[Effect]:
        """A lease for the office: try to take it."""
        if granted.lease is None or not self.candidate or not self._rights.may_lead:
            self._campaigning = False
            self._campaign_at_s = now + RETRY_S
            return [RevokeLease(granted.lease)] if granted.lease is not None else []
        self._lease = granted.lease
        self._office_until_s = now + self.settings.lease_ttl_s
        return [self._take()]

    def office_answered(self, done: CommitDone, now: float) -> list[Effect]:
        """Whether we have become the leader. An unknown outcome is resolved by giving the lease up."""
        self._campaigning = False
        self._campaign_at_s = now + RETRY_S
        if isinstance(done.result, txn.Committed) and self._lease is not None:  # None: we have resigned meanwhile
            self.office = txn.OfficeHeld(done.result.revision, self.settings.name, self._rights.own)
            self._keep_alive_at_s = now
            return []
        lease, self._lease = self._lease, None
        return [RevokeLease(lease)] if lease is not None else []

    def kept_alive(self, kept: KeptAlive, now: float) -> list[Effect]:
        """The office's lease was renewed, or is gone."""
        self._keeping_alive = False
        if kept.lease != self._lease:
            return []
        if kept.ttl_s is None:
            self._lease = None
            return self._lose()
        if not isinstance(kept.ttl_s, NoAnswer):
            self._office_until_s = now + kept.ttl_s
        return []

    def resign(self) -> list[Effect]:
        """Give up the office and do not stand again."""
        self.candidate = False
        lease = self._lease
        self._lose()
        return [RevokeLease(lease)] if lease is not None else []

    def _lose(self) -> list[Effect]:
        lease, self._lease = self._lease, None
        self.office = None
        self._cases.clear()
        self._condemning.clear()
        self._vouched.clear()
        self.brake = ""
        return [RevokeLease(lease)] if lease is not None else []

    # --- condemning ---

    def _condemn_absent(
        self, now: float, nodes: Mapping[str, Entry], incarnations: Mapping[str, Entry], own: IncarnationId | None
    ) -> list[Effect]:
        assert self.office is not None  # noqa: S101 - poll looked
        lives = {keys.parse_node(k): (e, self._life(e)) for k, e in sorted(incarnations.items())}
        absent = [n for n, (_, life) in lives.items() if life.state is Life.OPEN and keys.node(n) not in nodes]
        # Nodes whose rights were revoked do not count: an administrator *has* looked at them.
        silent = [n for n in absent if n not in self._rights.revoked]
        approved = [life for n, (_, life) in lives.items() if n not in self._rights.revoked]
        down = len(silent) + sum(1 for life in approved if life.state is not Life.OPEN)
        too_many = bool(silent) and len(approved) >= BRAKE_NODES_MIN and 2 * down > len(approved)
        self.brake = ""
        if too_many:
            self.brake = (
                f"{down} of {len(approved)} nodes look dead at once: none is given up before somebody has looked"
                " (spinetta node confirm-dead NAME)"
            )
        effects: list[Effect] = []
        if self.brake:
            effects += self._say(self.brake)
        else:
            self._notice = ""
        for node in absent:
            if self.braking and node in silent:
                continue
            entry, life = lives[node]
            # By the incarnation, not the name: an earlier life of this very node must be ended by somebody, and this
            # may be the only node there is.
            if life.id == own or self._condemning.get(node, now) > now:
                continue
            self._condemning[node] = math.inf
            value = codec.encode_incarnation(replace(life, state=Life.CONDEMNED))
            effects.append(
                Commit(CaseTag("condemn", node, entry.modified), txn.condemn(self.office, node, entry.modified, value))
            )
        return effects

    def condemned(self, node: NodeId, now: float) -> None:
        """A condemnation was answered, or not; the mirror will show the new record, and the case begins then."""
        self._condemning[node] = now + RETRY_S

    def _life(self, entry: Entry) -> Incarnation:
        # One that cannot be read was written by some other hand, and that has changed the revision which every guard of
        # that life knows: none of its claims or renewals commits any more, as if it had been condemned.
        margin_s = self.settings.kill_margin_s
        unreadable = Incarnation(IncarnationId(""), Life.CONDEMNED, "", self.settings.lease_ttl_s, margin_s)
        return codec.readable(codec.decode_incarnation, entry.value) or unreadable

    def _open_cases(self, now: float, incarnations: Mapping[str, Entry]) -> None:
        for key, entry in sorted(incarnations.items()):
            node = keys.parse_node(key)
            life = self._life(entry)
            case = self._cases.get(node)
            if life.state is Life.OPEN:
                continue
            if life.vouched:
                self._vouched.add(node)
            if case is None:
                # The wait counts from when *this* leader saw the condemnation: never too early.
                self._cases[node] = Case(node, entry.modified, life, now, now)
            elif case.revision != entry.modified:  # it reported itself dead meanwhile, or is another life
                since_s = case.since_s if case.life.id == life.id else now
                self._cases[node] = Case(node, entry.modified, life, since_s, now)
        for node in list(self._cases):
            if keys.incarnation(node) not in incarnations:
                del self._cases[node]

    # --- one condemned node: list, wait, read, requeue, close ---

    def _act(self, case: Case, now: float) -> list[Effect]:
        assert self.office is not None  # noqa: S101 - poll looked
        due = sorted((s for s in case.strays.values() if s.due_s <= now), key=lambda s: s.task)[:REQUEUE_MAX]
        case.busy = True
        if not due:
            return [List(CaseTag("list", case.node, case.revision), keys.running_on(case.node))]
        case.batch = tuple(due)
        wanted = (*(keys.task(s.task) for s in due), keys.beat(case.node))
        return [Read(CaseTag("read", case.node, case.revision), wanted)]

    def _case(self, node: NodeId, revision: Revision) -> Case | None:
        case = self._cases.get(node)
        return case if case is not None and case.revision == revision and self.office is not None else None

    def strays_listed(self, node: NodeId, revision: Revision, done: ListDone, now: float) -> list[Effect]:
        """What a condemned node still holds according to the store."""
        case = self._case(node, revision)
        if case is None:
            return []
        case.busy = False
        case.act_at_s = now + RETRY_S
        if done.listing is None:
            return []
        case.strays.clear()
        for e in done.listing.entries:
            found, holding = keys.find_running(e.key), codec.readable(codec.decode_holding, e.value)
            if found is None or holding is None:
                continue
            task = found[1]
            wait_s = wait_out_s(holding.grace_s, case.life.kill_margin_s, self.settings.clock_rate_error)
            no_wait = case.life.state is Life.DEAD or holding.overlap
            due_s = case.since_s + (0.0 if no_wait else wait_s)
            case.strays[task] = Stray(task, e.created, e.modified, holding, due_s)
        if case.strays:
            case.act_at_s = max(now, min(s.due_s for s in case.strays.values()))
            return []
        if done.listing.entries:
            case.act_at_s = now + self.settings.reconcile_s
            return self._say(f"a key under {keys.running_on(node)} cannot be read; node {node} waits for its removal")
        case.busy = True
        assert self.office is not None  # noqa: S101 - _case looked
        return [Commit(CaseTag("close", node, revision), txn.close(self.office, node, revision))]

    def strays_read(self, node: NodeId, revision: Revision, done: ReadDone, now: float, now_ms: int) -> list[Effect]:
        """The records of the tasks to be put back."""
        case = self._case(node, revision)
        if case is None:
            return []
        if done.reading is None:
            case.busy = False
            case.act_at_s = now + RETRY_S
            return []
        beat = done.reading.entries.get(keys.beat(node))
        said = codec.decode_beat(beat.value) if beat is not None else Beat()
        nested = []
        for stray in case.batch:
            entry = done.reading.entries.get(keys.task(stray.task))
            reached = _reached(stray.token, said)
            body = self._put_back(node, stray, entry, reached, now_ms) if entry is not None else None
            if body is not None:
                nested.append(body)
        case.strays.clear()
        if not nested:  # their holder has recorded their ends just now; or a record is gone or cannot be read
            case.busy = False
            case.act_at_s = now + RETRY_S
            return []
        assert self.office is not None  # noqa: S101 - _case looked
        guards = txn.requeue_guards(self.office, node, revision)
        nested = nested[: txn.leading(nested)]  # the next listing shows the rest
        return [Commit(CaseTag("requeue", node, revision), txn.batch(nested, guards))]

    def _put_back(
        self, node: NodeId, stray: Stray, entry: Entry, reached: lifecycle.Reached, now_ms: int
    ) -> txn.Txn | None:
        task = codec.readable(codec.decode_task, entry.value)
        if task is None or not lifecycle.is_attempt(task, node, stray.holding):
            return None  # its holder recorded the end after the listing
        # A heartbeat may have been committed late, after a newer one: enough for a budget, but not for starting a
        # second time what must be started once at most.
        if not task.spec.restart_on_node_failure:
            reached = lifecycle.Reached.EXECUTING
        lost = Exit(Reason.NODE_LOST, message=f"node {node} {LOST_WHEN[reached]}", ended_ms=now_ms)
        end = lifecycle.ended(
            task,
            lost,
            stray.token,
            cancel_requested=stray.holding.cancel_requested,
            cancel_reason=stray.holding.cancel_reason,
            reached=reached,
            now_ms=now_ms,
        )
        record = codec.encode_task(end.task)
        if end.event is lifecycle.Event.NODE_LOST:
            hint = codec.encode_hint(QueueHint.of(task.spec))
            return txn.give_back(node, stray.task, stray.seen, record, hint)
        completed = codec.completed_by(self.settings.name, end.task)
        return txn.finish(node, stray.task, stray.token, record, completed)

    def case_answered(self, tag: CaseTag, done: CommitDone, now: float) -> None:
        """A requeue or a close was answered, or not: the next listing says what is left."""
        case = self._case(tag.node, tag.revision)
        if case is not None:
            case.busy = False
            again = tag.step == "requeue" and isinstance(done.result, txn.Committed)
            case.act_at_s = now if again else now + RETRY_S

    def _say(self, text: str) -> list[Effect]:
        if text == self._notice:
            return []
        self._notice = text
        return [Notice(text)]
