"""What a node may commit through the gateway.

A voter is trusted with everything. A worker may commit what its own daemon commits in the life of a node, and nothing
else: a transaction is taken apart, made again with the function of `txn` that makes its kind, and compared. Then the
records inside are held against the stored ones: a worker says when an attempt began and how it ended, and the record
that follows from that is computed here. What is committed is the computed one, never the worker's bytes.

Every verdict holds until the commit, because what it was made from is guarded: by the guards of the transaction itself
(which are of its kind, or it would not have been recognised), and by one on each task's record that is added here.
A guard on a revision that is over can never hold again; what stands under one is not looked at, and cannot commit.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Protocol, TypeVar

from spinetta import codec, keys, lifecycle, txn, validate
from spinetta.access import MEMBERS, NodeAcl, NodeRole
from spinetta.errors import CorruptRecord
from spinetta.model import (
    Attempt,
    Exit,
    Holding,
    Incarnation,
    LeaseId,
    Life,
    NodeId,
    QueueHint,
    Reason,
    Revision,
    State,
    Task,
    TaskId,
)
from spinetta.txn import CreatedAt, Guard, Put, RevisionIs, Txn

T = TypeVar("T")

MESSAGE_CHARS_MAX = 4096  # of an attempt's end: what our shim says has a line or two; it is kept for 16 attempts
NODE_BYTES_MAX = 32 << 10  # of what a node says of itself: every node mirrors it; ours have less than 2 KB
LEASE_TTL_MAX_S = 300.0  # the longest that the settings allow, and how long killing may take
TIME_MS_MAX = 253_402_300_799_000  # the year 9999


class Stored(Protocol):
    """A key as the store holds it."""

    @property
    def value(self) -> bytes:
        """What it holds."""
        ...

    @property
    def created(self) -> Revision:
        """Where it was created."""
        ...

    @property
    def modified(self) -> Revision:
        """Where it was last written."""
        ...

    @property
    def lease(self) -> LeaseId:
        """That it is bound to; 0: none."""
        ...


Known = Mapping[str, Stored | None]


class Kind(enum.StrEnum):
    """What a transaction is in the life of a node."""

    ANY = "any"  # a voter's, not looked at
    REGISTER = "register"
    REATTACH = "reattach"
    RESUME = "resume"
    RENEW = "renew"
    ADVERTISE = "advertise"
    CONCEDE = "concede"
    DEREGISTER = "deregister"
    CLAIM = "claim"
    END = "end"  # finishes and give-backs


@dataclass(frozen=True, slots=True)
class Admitted:
    """It may be committed, in this form.

    Attributes:
        tasks: those that it is about.
    """

    kind: Kind
    txn: Txn
    tasks: tuple[TaskId, ...] = ()


@dataclass(frozen=True, slots=True)
class Moot:
    """It could not commit any more, whatever it says: to be answered as a conflict."""

    reason: str


@dataclass(frozen=True, slots=True)
class Refused:
    """The node may not do this. `reason` is in words, for its log and the audit log."""

    reason: str


Verdict = Admitted | Moot | Refused


class _No(Exception):
    """Refused."""


class _Over(Exception):
    """It cannot commit any more."""


def needs(node: NodeId, body: Txn) -> tuple[str, ...]:
    """The keys that `admit` wants to know of, each once; those of one task stand together."""
    found: dict[str, None] = {}
    if len(body.nested) > txn.NESTED_MAX:
        return ()  # it is refused, whatever the store says
    if body.nested or any(isinstance(w, Put) and w.key != keys.beat(node) for w in body.then):
        found = dict.fromkeys((keys.node(node), keys.incarnation(node)))
    for each in body.nested:
        task = _task_of(each)
        if task is not None:
            claim = _seen(each.when, keys.queued(task)) is not None
            found |= dict.fromkeys((keys.task(task), keys.queued(task) if claim else keys.running(node, task)))
    return tuple(found)


def admit(
    node: NodeId,
    role: NodeRole,
    acl: NodeAcl,
    body: Txn,
    known: Known,
    *,
    revision: Revision,
    leases: Collection[LeaseId] = (),
) -> Verdict:
    """Whether `node` may commit `body`, and in which form.

    Args:
        node: as its certificate says.
        role, acl: as its rights say.
        known: the store's word on all of `needs`.
        revision: at which that was read, or before.
        leases: granted to this node; the one its registration is bound to counts as well.
    """
    if role is NodeRole.VOTER:
        return Admitted(Kind.ANY, body)
    if role is not NodeRole.WORKER or acl.name != node:
        return Refused(f"nothing is known of what {node} may do")
    try:
        return _Worker(node, acl, known, revision, frozenset(leases)).admit(body)
    except _No as e:
        return Refused(str(e))
    except _Over as e:
        return Moot(str(e))


@dataclass(frozen=True, slots=True)
class _Worker:
    """The judgement of one transaction of a worker."""

    node: NodeId
    acl: NodeAcl
    known: Known
    revision: Revision
    leases: frozenset[LeaseId]

    def admit(self, body: Txn) -> Verdict:
        if body.nested:
            return self._batch(body)
        for recognise in (
            self._renew,
            self._advertise,
            self._register,
            self._reattach,
            self._resume,
            self._concede,
            self._deregister,
        ):
            found = recognise(body)
            if found is not None:
                return found
        raise _No("a worker may commit only what belongs to the life of its node")

    # --- the node itself ---

    def _renew(self, body: Txn) -> Verdict | None:
        registration = self._registration(body.when)
        if registration is None or body != txn.renew(registration):
            return None
        return Admitted(Kind.RENEW, body)

    def _deregister(self, body: Txn) -> Verdict | None:
        registration = self._registration(body.when)
        if registration is None or body != txn.deregister(registration):
            return None
        return Admitted(Kind.DEREGISTER, body)

    def _advertise(self, body: Txn) -> Verdict | None:
        registration = self._registration(body.when)
        if registration is None or len(body.then) != 1 or not isinstance(put := body.then[0], Put):
            return None
        if body != txn.advertise(registration, put.lease, put.value):
            return None
        self._stored(keys.node(self.node), created=registration.node_created)
        self._own_lease(put.lease)
        return Admitted(Kind.ADVERTISE, txn.advertise(registration, put.lease, self._node_record(put.value)))

    def _register(self, body: Txn) -> Verdict | None:
        if len(body.then) != 3 or not isinstance(put := body.then[0], Put) or not isinstance(life := body.then[1], Put):
            return None
        generation, acl = _seen(body.when, keys.GENERATION), _seen(body.when, keys.acl_node(self.node))
        if generation is None or acl is None:
            return None
        if body != txn.register(self.node, put.lease, put.value, life.value, generation, acl):
            return None
        begun = self._readable(codec.decode_incarnation, life.value, "the incarnation")
        record = self._node_record(put.value)
        times = (begun.lease_ttl_s, begun.kill_margin_s)
        if not begun.id or begun.state is not Life.OPEN or len(begun.id) + len(begun.boot_id) > 256:
            raise _No("a life begins open, with an id")
        if codec.decode_node(record).incarnation != begun.id:
            raise _No("the node's record is of another life than the one it begins")
        if not all(math.isfinite(t) and 0 <= t <= LEASE_TTL_MAX_S for t in times):
            raise _No(f"a lease and the time for killing last {LEASE_TTL_MAX_S:g} s at most")
        self._own_lease(put.lease)
        value = codec.encode_incarnation(begun)
        return Admitted(Kind.REGISTER, txn.register(self.node, put.lease, record, value, generation, acl))

    def _reattach(self, body: Txn) -> Verdict | None:
        if len(body.then) != 1 or not isinstance(put := body.then[0], Put):
            return None
        life, generation = _seen(body.when, keys.incarnation(self.node)), _seen(body.when, keys.GENERATION)
        acl = _seen(body.when, keys.acl_node(self.node))
        if not life or generation is None or acl is None:
            return None
        if body != txn.reattach(self.node, put.lease, put.value, life, generation, acl):
            return None
        record = self._node_record(put.value)
        if codec.decode_node(record).incarnation != self._life(life).id:
            raise _No("the node's record is of another life than the one it goes on with")
        self._own_lease(put.lease)
        return Admitted(Kind.REATTACH, txn.reattach(self.node, put.lease, record, life, generation, acl))

    def _resume(self, body: Txn) -> Verdict | None:
        registration = self._registration(body.when)
        if registration is None or len(body.then) != 1 or not isinstance(put := body.then[0], Put):
            return None
        if body != txn.resume(registration, put.value):
            return None
        entry = self._stored(keys.incarnation(self.node), modified=registration.incarnation_revision)
        if put.value != entry.value:
            raise _No("going on with a life does not change its record")
        return Admitted(Kind.RESUME, body)

    def _concede(self, body: Txn) -> Verdict | None:
        seen = _seen(body.when, keys.incarnation(self.node))
        acl = _seen(body.when, keys.acl_node(self.node))
        if not seen or acl is None or len(body.then) != 1 or not isinstance(put := body.then[0], Put):
            return None
        if body != txn.concede(self.node, seen, put.value, acl):
            return None
        dead = replace(self._life(seen), state=Life.DEAD)
        if self._readable(codec.decode_incarnation, put.value, "the incarnation") != dead:
            raise _No("of its life a node may say only that it is over")
        return Admitted(Kind.CONCEDE, txn.concede(self.node, seen, codec.encode_incarnation(dead), acl))

    def _node_record(self, value: bytes) -> bytes:
        if len(value) > NODE_BYTES_MAX:
            raise _No(f"what a node says of itself has at most {NODE_BYTES_MAX} bytes")
        record = self._readable(codec.decode_node, value, "the node's record")
        if record.name != self.node:
            raise _No(f"{self.node} may not speak for {record.name!r}")
        if record.candidate or record.etcd_member_id:
            raise _No("a worker is no candidate for a voter's seat and has no etcd member")
        if not set(record.clearances) <= set(self.acl.effective):
            raise _No("a node may not say that it is cleared for more than it is")
        return codec.encode_node(replace(record, etcd_client_url="", etcd_peer_url=""))

    # --- tasks ---

    def _batch(self, body: Txn) -> Verdict:
        if body.then or any(each.nested for each in body.nested):
            raise _No("a worker's batch is of claims or of ends, one level deep, with nothing beside them")
        if len(body.nested) > txn.NESTED_MAX:
            raise _No(f"a batch has at most {txn.NESTED_MAX} parts")
        tasks = tuple(t for each in body.nested if (t := _task_of(each)) is not None)
        if len(set(tasks)) != len(body.nested):
            raise _No("each part of a batch is about one task, and no two about the same")
        registration = self._registration(body.when)
        if registration is not None and body.when == registration.guards():
            self._stored(keys.node(self.node), created=registration.node_created)
            life = self._life(registration.incarnation_revision)
            parts = tuple(self._claim(t, each, life) for t, each in zip(tasks, body.nested, strict=True))
            return Admitted(Kind.CLAIM, txn.batch(parts, body.when), tasks)
        seen = _seen(body.when, keys.incarnation(self.node))
        acl = _seen(body.when, keys.acl_node(self.node))
        if seen and acl is not None and body.when == txn.finish_guards(self.node, seen, acl):
            life = self._life(seen)
            parts = tuple(self._end(t, each, life) for t, each in zip(tasks, body.nested, strict=True))
            return Admitted(Kind.END, txn.batch(parts, body.when), tasks)
        raise _No("a worker's batch stands under its registration (claims) or under its life and rights (ends)")

    def _claim(self, task: TaskId, part: Txn, life: Incarnation) -> Txn:
        seen = _seen(part.when, keys.queued(task))
        if not seen or len(part.then) != 3 or not isinstance(held := part.then[1], Put):
            raise _No(f"{task}: not a claim")
        if not isinstance(put := part.then[2], Put):
            raise _No(f"{task}: not a claim")
        if part != txn.claim(self.node, task, seen, put.value, held.value):
            raise _No(f"{task}: not a claim")
        try:
            self._stored(keys.queued(task), modified=seen)
        except _Over:
            return _lost(part)
        entry, stored = self._task(task)
        if stored.state is not State.QUEUED:
            raise _No(f"{task}: its record does not say that it is queued")
        missing = sorted(set(stored.spec.clearance) - set(self.acl.effective) - {MEMBERS})
        if missing:
            raise _No(f"{task}: {self.node} is not cleared for {', '.join(missing)}")
        record = self._readable(codec.decode_task, put.value, f"{task}: the record")
        if not record.attempts:
            raise _No(f"{task}: a claim begins an attempt")
        began_ms = _time(record.attempts[-1].started_ms)
        expected = lifecycle.claimed(stored, self.node, life.id, now_ms=began_ms)
        if record != expected:
            raise _No(f"{task}: a claim may change nothing of a task but begin this node's attempt")
        holding = self._readable(codec.decode_holding, held.value, f"{task}: the holding")
        grace_s = stored.spec.grace_s or holding.grace_s
        if not 0 < grace_s <= validate.GRACE_MAX_S:
            raise _No(f"{task}: a grace is between 0 and {validate.GRACE_MAX_S:g} s")
        if holding != Holding(expected.attempts_started, life.id, grace_s):
            raise _No(f"{task}: the holding is not of this attempt")
        made = txn.claim(self.node, task, seen, codec.encode_task(expected), codec.encode_holding(holding))
        return _guarded(made, keys.task(task), entry.modified)

    def _end(self, task: TaskId, part: Txn, life: Incarnation) -> Txn:
        running = keys.running(self.node, task)
        if len(part.then) != 3 or not isinstance(mark := part.then[1], Put) or not isinstance(put := part.then[2], Put):
            raise _No(f"{task}: neither a finish nor a give-back")
        token, seen = _created(part.when, running), _seen(part.when, running)
        over = bool(token) and part == txn.finish(self.node, task, token or Revision(0), put.value)
        again = bool(seen) and part == txn.give_back(self.node, task, seen or Revision(0), put.value, mark.value)
        if not over and not again:
            raise _No(f"{task}: neither a finish nor a give-back")
        try:
            held = self._stored(running, created=token) if over else self._stored(running, modified=seen)
        except _Over:
            return _lost(part)
        holding = codec.readable(codec.decode_holding, held.value)
        entry, stored = self._task(task)
        if holding is None or holding.incarnation != life.id or not lifecycle.is_attempt(stored, self.node, holding):
            raise _No(f"{task}: the attempt is not of this life of {self.node}")
        record = self._readable(codec.decode_task, put.value, f"{task}: the record")
        # A request to cancel does not fence its holder, who may finish without having seen it; a give-back would lose
        # it and is guarded by the revision seen.
        asked = (True, False) if over and holding.cancel_requested else (holding.cancel_requested,)
        end = _ended(stored, record, held.created, holding.cancel_reason, asked)
        if end is None:
            raise _No(f"{task}: an end may change nothing of a task but what follows from the end of this attempt")
        value = codec.encode_task(end.task)
        if over is not (end.task.state is State.COMPLETE):
            raise _No(f"{task}: this end {'gives the task back' if over else 'is the end of the task'}")
        if over:
            made = txn.finish(self.node, task, held.created, value)
        else:
            hint = codec.encode_hint(QueueHint.of(end.task.spec, end.delay_s))
            made = txn.give_back(self.node, task, held.modified, value, hint)
        return _guarded(made, keys.task(task), entry.modified)

    # --- what is known ---

    def _registration(self, when: tuple[Guard, ...]) -> txn.Registration | None:
        """The registration that these guards begin with; None: they do not."""
        created = _created(when, keys.node(self.node))
        life = _seen(when, keys.incarnation(self.node))
        generation = _seen(when, keys.GENERATION)
        acl = _seen(when, keys.acl_node(self.node))
        if not created or not life or generation is None or acl is None:
            return None
        return txn.Registration(self.node, created, life, generation, acl)

    def _stored(self, key: str, *, modified: Revision | None = None, created: Revision | None = None) -> Stored:
        """The entry that a guard is about. Raises when the guard does not hold: `_Over` if it never will."""
        entry = self.known.get(key)
        wanted = modified or created or Revision(0)
        if wanted > self.revision:
            raise _No(f"{key}: nothing has been written at revision {wanted} yet")
        if entry is None or wanted != (entry.modified if modified else entry.created):
            raise _Over(f"{key} has been written or deleted since revision {wanted}")
        return entry

    def _life(self, seen: Revision) -> Incarnation:
        entry = self._stored(keys.incarnation(self.node), modified=seen)
        return self._readable(codec.decode_incarnation, entry.value, "the stored incarnation")

    def _task(self, task: TaskId) -> tuple[Stored, Task]:
        entry = self.known.get(keys.task(task))
        if entry is None:
            raise _No(f"{task}: there is no such task")
        stored = self._readable(codec.decode_task, entry.value, f"{task}: the stored record")
        if stored.id != task:
            raise _No(f"{task}: the stored record is of another task")
        return entry, stored

    def _own_lease(self, lease: LeaseId) -> None:
        entry = self.known.get(keys.node(self.node))
        if not lease or (lease not in self.leases and (entry is None or entry.lease != lease)):
            # As for one that has run out: the node asks for another. It may have been granted by another voter.
            raise _Over("the lease is not known here")

    def _readable(self, decode: Callable[[bytes], T], value: bytes, what: str) -> T:
        try:
            return decode(value)
        except CorruptRecord:
            raise _No(f"{what} cannot be read") from None


# --- taking apart -------------------------------------------------------------------------------------------------


def _task_of(part: Txn) -> TaskId | None:
    """The task that a part of a batch says it is about: of its last write."""
    if not part.then or not part.then[-1].key.startswith(keys.TASK):
        return None
    task = part.then[-1].key.removeprefix(keys.TASK)
    return TaskId(task) if validate.is_task_id(task) else None


def _seen(when: tuple[Guard, ...], key: str) -> Revision | None:
    return next((g.revision for g in when if isinstance(g, RevisionIs) and g.key == key), None)


def _created(when: tuple[Guard, ...], key: str) -> Revision | None:
    return next((g.revision for g in when if isinstance(g, CreatedAt) and g.key == key), None)


def _guarded(part: Txn, key: str, modified: Revision) -> Txn:
    """Under the revision at which the record was looked at as well."""
    return replace(part, when=(*part.when, RevisionIs(key, modified)))


def _lost(part: Txn) -> Txn:
    """A part that cannot commit: its guards as they are, and nothing else."""
    return Txn(when=part.when)


def _time(time_ms: int) -> int:
    if not 0 <= time_ms <= TIME_MS_MAX:
        raise _No("a time is no time")
    return time_ms


def _ended(
    stored: Task, record: Task, token: Revision, cancel_reason: str, asked: tuple[bool, ...]
) -> lifecycle.Ended | None:
    """The end that `record` tells of; None when no end of the running attempt leads to it."""
    if not record.attempts:
        return None
    last = record.attempts[-1]
    _check_end(last)
    try:
        reason = Reason(last.reason)
    except ValueError:
        return None
    exit_ = Exit(reason, last.exit_code, last.signal, last.message, last.started_ms, last.ended_ms, last.usage)
    now_ms = _time(record.completed_ms) or last.ended_ms
    # A process that never started has no start of its own, and its attempt keeps the time of the claim.
    starts = {last.started_ms, 0} if last.started_ms == stored.attempts[-1].started_ms else {last.started_ms}
    for started_ms, cancelled in product(sorted(starts), asked):
        end = lifecycle.ended(
            stored,
            replace(exit_, started_ms=started_ms),
            token,
            cancel_requested=cancelled,
            cancel_reason=cancel_reason if cancelled else "",
            now_ms=now_ms,
        )
        if end.task == record:
            return end
    return None


def _check_end(last: Attempt) -> None:
    _time(last.started_ms)
    _time(last.ended_ms)
    usage = last.usage
    if len(last.message) > MESSAGE_CHARS_MAX:
        raise _No(f"what is said of an end has at most {MESSAGE_CHARS_MAX} characters")
    if not all(math.isfinite(s) and s >= 0 for s in (usage.cpu_user_s, usage.cpu_system_s)):
        raise _No("what an attempt has used is a number, and not less than nothing")
