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
from collections.abc import Collection
from dataclasses import dataclass, replace

from spinetta import codec, keys, taskgate, txn
from spinetta.access import MEMBERS, NodeAcl, NodeRole
from spinetta.evidence import Evidence, Known, NotAllowed, Over, seen_at, task_of
from spinetta.model import LeaseId, Life, NodeId, Revision, TaskId
from spinetta.txn import Put, Txn

NODE_BYTES_MAX = 32 << 10  # of what a node says of itself: every node mirrors it; ours have less than 2 KB
BEAT_BYTES_MAX = 16 << 10  # of a heartbeat: the tokens of all that a node may hold take less than 6 KB
LEASE_TTL_MAX_S = 300.0  # the longest that the settings allow, and how long killing may take


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


def needs(node: NodeId, body: Txn) -> tuple[str, ...]:
    """The keys that `admit` wants to know of, each once; those of one task stand together."""
    found: dict[str, None] = {}
    if len(body.nested) > txn.NESTED_MAX:
        return ()  # it is refused, whatever the store says
    if body.nested or any(isinstance(w, Put) and w.key != keys.beat(node) for w in body.then):
        found = dict.fromkeys((keys.node(node), keys.incarnation(node)))
    for each in body.nested:
        task = task_of(each)
        if task is not None:
            claim = seen_at(each.when, keys.queued(task)) is not None
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
    except NotAllowed as e:
        return Refused(str(e))
    except Over as e:
        return Moot(str(e))


class _Worker(Evidence):
    """The judgement of one transaction of a worker."""

    __slots__ = ()

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
        raise NotAllowed("a worker may commit only what belongs to the life of its node")

    # --- the node itself ---

    def _renew(self, body: Txn) -> Verdict | None:
        registration = self.registration(body.when)
        if registration is None or len(body.then) != 1 or not isinstance(put := body.then[0], Put):
            return None
        if body != txn.renew(registration, put.value):
            return None
        if len(put.value) > BEAT_BYTES_MAX:
            raise NotAllowed(f"a heartbeat has at most {BEAT_BYTES_MAX} bytes")
        return Admitted(Kind.RENEW, body)

    def _deregister(self, body: Txn) -> Verdict | None:
        registration = self.registration(body.when)
        if registration is None or body != txn.deregister(registration):
            return None
        return Admitted(Kind.DEREGISTER, body)

    def _advertise(self, body: Txn) -> Verdict | None:
        registration = self.registration(body.when)
        if registration is None or len(body.then) != 1 or not isinstance(put := body.then[0], Put):
            return None
        if body != txn.advertise(registration, put.lease, put.value):
            return None
        self.stored(keys.node(self.node), created=registration.node_created)
        self.check_lease(put.lease)
        return Admitted(Kind.ADVERTISE, txn.advertise(registration, put.lease, self._node_record(put.value)))

    def _register(self, body: Txn) -> Verdict | None:
        if len(body.then) != 3 or not isinstance(put := body.then[0], Put) or not isinstance(life := body.then[1], Put):
            return None
        generation, acl = seen_at(body.when, keys.GENERATION), seen_at(body.when, keys.acl_node(self.node))
        if generation is None or acl is None:
            return None
        if body != txn.register(self.node, put.lease, put.value, life.value, generation, acl):
            return None
        begun = self.readable(codec.decode_incarnation, life.value, "the incarnation")
        record = self._node_record(put.value)
        times = (begun.lease_ttl_s, begun.kill_margin_s)
        if not begun.id or begun.state is not Life.OPEN or len(begun.id) + len(begun.boot_id) > 256:
            raise NotAllowed("a life begins open, with an id")
        if codec.decode_node(record).incarnation != begun.id:
            raise NotAllowed("the node's record is of another life than the one it begins")
        if not all(math.isfinite(t) and 0 <= t <= LEASE_TTL_MAX_S for t in times):
            raise NotAllowed(f"a lease and the time for killing last {LEASE_TTL_MAX_S:g} s at most")
        self.check_lease(put.lease)
        value = codec.encode_incarnation(begun)
        return Admitted(Kind.REGISTER, txn.register(self.node, put.lease, record, value, generation, acl))

    def _reattach(self, body: Txn) -> Verdict | None:
        if len(body.then) != 1 or not isinstance(put := body.then[0], Put):
            return None
        life, generation = seen_at(body.when, keys.incarnation(self.node)), seen_at(body.when, keys.GENERATION)
        acl = seen_at(body.when, keys.acl_node(self.node))
        if not life or generation is None or acl is None:
            return None
        if body != txn.reattach(self.node, put.lease, put.value, life, generation, acl):
            return None
        record = self._node_record(put.value)
        if codec.decode_node(record).incarnation != self.life(life).id:
            raise NotAllowed("the node's record is of another life than the one it goes on with")
        self.check_lease(put.lease)
        return Admitted(Kind.REATTACH, txn.reattach(self.node, put.lease, record, life, generation, acl))

    def _resume(self, body: Txn) -> Verdict | None:
        registration = self.registration(body.when)
        if registration is None or len(body.then) != 1 or not isinstance(put := body.then[0], Put):
            return None
        if body != txn.resume(registration, put.value):
            return None
        entry = self.stored(keys.incarnation(self.node), modified=registration.incarnation_revision)
        if put.value != entry.value:
            raise NotAllowed("going on with a life does not change its record")
        return Admitted(Kind.RESUME, body)

    def _concede(self, body: Txn) -> Verdict | None:
        seen = seen_at(body.when, keys.incarnation(self.node))
        acl = seen_at(body.when, keys.acl_node(self.node))
        if not seen or acl is None or len(body.then) != 1 or not isinstance(put := body.then[0], Put):
            return None
        if body != txn.concede(self.node, seen, put.value, acl):
            return None
        dead = replace(self.life(seen), state=Life.DEAD)
        if self.readable(codec.decode_incarnation, put.value, "the incarnation") != dead:
            raise NotAllowed("of its life a node may say only that it is over")
        return Admitted(Kind.CONCEDE, txn.concede(self.node, seen, codec.encode_incarnation(dead), acl))

    def _node_record(self, value: bytes) -> bytes:
        if len(value) > NODE_BYTES_MAX:
            raise NotAllowed(f"what a node says of itself has at most {NODE_BYTES_MAX} bytes")
        record = self.readable(codec.decode_node, value, "the node's record")
        if record.name != self.node:
            raise NotAllowed(f"{self.node} may not speak for {record.name!r}")
        if record.candidate or record.etcd_member_id:
            raise NotAllowed("a worker is no candidate for a voter's seat and has no etcd member")
        if not set(record.clearances) <= {*self.acl.effective, MEMBERS}:
            raise NotAllowed("a node may not say that it is cleared for more than it is")
        return codec.encode_node(replace(record, etcd_client_url="", etcd_peer_url=""))

    # --- tasks ---

    def _batch(self, body: Txn) -> Verdict:
        if body.then or any(each.nested for each in body.nested):
            raise NotAllowed("a worker's batch is of claims or of ends, one level deep, with nothing beside them")
        if len(body.nested) > txn.NESTED_MAX:
            raise NotAllowed(f"a batch has at most {txn.NESTED_MAX} parts")
        tasks = tuple(t for each in body.nested if (t := task_of(each)) is not None)
        if len(set(tasks)) != len(body.nested):
            raise NotAllowed("each part of a batch is about one task, and no two about the same")
        registration = self.registration(body.when)
        if registration is not None and body.when == registration.guards():
            self.stored(keys.node(self.node), created=registration.node_created)
            life = self.life(registration.incarnation_revision)
            parts = tuple(taskgate.claim(self, t, each, life) for t, each in zip(tasks, body.nested, strict=True))
            return Admitted(Kind.CLAIM, txn.batch(parts, body.when), tasks)
        seen = seen_at(body.when, keys.incarnation(self.node))
        acl = seen_at(body.when, keys.acl_node(self.node))
        if seen and acl is not None and body.when == txn.finish_guards(self.node, seen, acl):
            life = self.life(seen)
            parts = tuple(taskgate.end(self, t, each, life) for t, each in zip(tasks, body.nested, strict=True))
            return Admitted(Kind.END, txn.batch(parts, body.when), tasks)
        raise NotAllowed("a worker's batch stands under its registration (claims) or under its life and rights (ends)")
