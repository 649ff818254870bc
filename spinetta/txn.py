"""Transactions as values: guards, writes, and the transitions of the design built from them.

A transition takes values that are already encoded, so that this module knows keys and revisions but no records.
What `Committed` and `Conflict` mean is told at each; a lost answer is no value but `errors.OutcomeUnknown`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from spinetta import keys
from spinetta.model import LeaseId, NodeId, Revision, TaskId

NESTED_MAX = 120  # nested transactions of up to three writes: 120 + 3 stay below etcd's 128 along a path
BATCH_BYTES_MAX = 1_000_000  # of keys and values in one transaction: etcd's limit is 1.5 MiB a request
OPERATION_BYTES = 64  # what a guard or write takes beside its key and value, generously


# --- guards ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Absent:
    """The key does not exist."""

    key: str


@dataclass(frozen=True, slots=True)
class CreatedAt:
    """The key exists and was created at this revision (later puts do not matter)."""

    key: str
    revision: Revision


@dataclass(frozen=True, slots=True)
class RevisionIs:
    """The key was last written at this revision; 0 means that it does not exist."""

    key: str
    revision: Revision


@dataclass(frozen=True, slots=True)
class NoneUnder:
    """No key begins with this prefix."""

    prefix: str


Guard = Absent | CreatedAt | RevisionIs | NoneUnder


# --- writes ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Put:
    """Write a key. A put on a leased key must name the lease again, or the key comes loose from it."""

    key: str
    value: bytes = b""
    lease: LeaseId = LeaseId(0)


@dataclass(frozen=True, slots=True)
class Delete:
    """Delete a key; no error if it does not exist."""

    key: str


Write = Put | Delete


@dataclass(frozen=True, slots=True)
class Txn:
    """Guards and writes, and nested transactions with guards of their own.

    If all of `when` hold, `then` is written and each of `nested` is tried by itself; one that fails does not spoil
    the others. All guards see the state before the whole transaction. No key may be put twice in it. `nested` is one
    level deep, at most `NESTED_MAX` long.
    """

    when: tuple[Guard, ...] = ()
    then: tuple[Write, ...] = ()
    nested: tuple[Txn, ...] = ()


@dataclass(frozen=True, slots=True)
class Committed:
    """The guards held and the writes were made, at this revision; `nested` tells which nested ones held."""

    revision: Revision
    nested: tuple[bool, ...] = ()


@dataclass(frozen=True, slots=True)
class Conflict:
    """A guard did not hold; nothing was written. `revision` is the store's when it found so."""

    revision: Revision


Result = Committed | Conflict


@dataclass(frozen=True, slots=True)
class Registration:
    """What a node must still own for its writes to count: every claim and renewal is guarded by it."""

    node: NodeId
    node_created: Revision
    incarnation_revision: Revision
    generation_revision: Revision
    acl_revision: Revision = Revision(0)  # of the node's rights; 0: it has none, as in an open cluster

    @property
    def since(self) -> Revision:
        """No claim of an earlier daemon or registration commits after this revision."""
        return max(self.node_created, self.incarnation_revision)

    def guards(self) -> tuple[Guard, ...]:
        """Alive under the same lease, not condemned, the cluster not restored from a backup since, and the node's
        rights as they were seen: what takes them away is atomic with stealing."""
        return (
            CreatedAt(keys.node(self.node), self.node_created),
            RevisionIs(keys.incarnation(self.node), self.incarnation_revision),
            RevisionIs(keys.GENERATION, self.generation_revision),
            rights_guard(self.node, self.acl_revision),
        )


@dataclass(frozen=True, slots=True)
class OfficeHeld:
    """Proof that we are the leader: the office key as we created it, and our rights as we know them."""

    created: Revision
    node: NodeId
    acl_revision: Revision = Revision(0)

    def guards(self) -> tuple[Guard, ...]:
        """Hold as long as the office has not been lost since, and its holder's rights have not been changed."""
        return (CreatedAt(keys.OFFICE, self.created), rights_guard(self.node, self.acl_revision))


# --- transitions of tasks ----------------------------------------------------------------------------------------


def submit(task: TaskId, record: bytes, hint: bytes) -> Txn:
    """A new task enters the queue. Conflict: the id exists; read it and answer with it if it is the same submit."""
    return Txn(
        when=(Absent(keys.task(task)),),
        then=(Put(keys.task(task), record), Put(keys.queued(task), hint)),
    )


def size_bytes(txn: Txn) -> int:
    """About what a transaction takes in a request, never less."""
    written = sum(len(w.key) + (len(w.value) if isinstance(w, Put) else 0) + OPERATION_BYTES for w in txn.then)
    guarded = sum(len(g.prefix if isinstance(g, NoneUnder) else g.key) + OPERATION_BYTES for g in txn.when)
    return written + guarded + sum(size_bytes(n) for n in txn.nested)


def leading(txns: Sequence[Txn], bytes_max: int = BATCH_BYTES_MAX) -> int:
    """How many of these, from the first on, go into one batch: at least one, if there is one."""
    total_bytes = 0
    for n, each in enumerate(txns[:NESTED_MAX]):
        total_bytes += size_bytes(each)
        if total_bytes > bytes_max and n:
            return n
    return min(len(txns), NESTED_MAX)


def batch(txns: Sequence[Txn], when: Sequence[Guard] = ()) -> Txn:
    """Many transactions in one proposal, each with its own guards, all under common ones."""
    return Txn(when=tuple(when), nested=tuple(txns))


def claim(node: NodeId, task: TaskId, seen: Revision, record: bytes, holding: bytes) -> Txn:
    """`node` takes a queued task; to be nested under its `Registration.guards`. Conflict: somebody else was first."""
    return Txn(
        when=(RevisionIs(keys.queued(task), seen),),
        then=(
            Delete(keys.queued(task)),
            Put(keys.running(node, task), holding),
            Put(keys.task(task), record),
        ),
    )


def finish(node: NodeId, task: TaskId, token: Revision, record: bytes, completed: bytes = b"") -> Txn:
    """The holder records the end. Conflict: the attempt is no longer ours; discard its outputs.

    `completed`: who does, and when, for the collector.
    """
    return Txn(
        when=(CreatedAt(keys.running(node, task), token),),
        then=(
            Delete(keys.running(node, task)),
            Put(keys.complete(task), completed),
            Put(keys.task(task), record),
        ),
    )


def give_back(node: NodeId, task: TaskId, seen: Revision, record: bytes, hint: bytes) -> Txn:
    """The attempt ends and its task is queued again: a retry, a release or a requeue.

    Guarded by the revision seen, not by the token: a request to cancel that came meanwhile must not be lost.
    """
    return Txn(
        when=(RevisionIs(keys.running(node, task), seen),),
        then=(
            Delete(keys.running(node, task)),
            Put(keys.queued(task), hint),
            Put(keys.task(task), record),
        ),
    )


def cancel_waiting(task: TaskId, status_key: str, seen: Revision, record: bytes, completed: bytes = b"") -> Txn:
    """A queued or blocked task is cancelled. Conflict: it has moved on; read again."""
    return Txn(
        when=(RevisionIs(status_key, seen),),
        then=(Delete(status_key), Put(keys.complete(task), completed), Put(keys.task(task), record)),
    )


def cancel_running(node: NodeId, task: TaskId, seen: Revision, holding: bytes) -> Txn:
    """Ask the holder to stop. Changes the key's mod revision only, so that it does not fence the holder."""
    return Txn(
        when=(RevisionIs(keys.running(node, task), seen),),
        then=(Put(keys.running(node, task), holding),),
    )


# --- transitions of nodes ----------------------------------------------------------------------------------------


def life_guard(node: NodeId, seen: Revision) -> Guard:
    """The incarnation is as it was seen: neither condemned, nor gone on with by another daemon."""
    return RevisionIs(keys.incarnation(node), seen)


def rights_guard(node: NodeId, seen: Revision) -> Guard:
    """The node's rights are as they were seen; 0: it has no record of them, as in an open cluster."""
    return RevisionIs(keys.acl_node(node), seen)


def finish_guards(node: NodeId, life_seen: Revision, acl_seen: Revision) -> tuple[Guard, ...]:
    """What must hold for a node to record ends: to be the outer guards of a batch.

    They do not ask for its registration: a node whose lease ran out may still tell what became of its attempts. One
    whose rights were revoked may not. Conflict: read again what is told here, and try again if the node still may.
    """
    return (life_guard(node, life_seen), rights_guard(node, acl_seen))


def register(
    node: NodeId,
    lease: LeaseId,
    record: bytes,
    incarnation: bytes,
    generation: Revision,
    acl: Revision = Revision(0),
) -> Txn:
    """A node begins a life. Conflict: the name is alive, an earlier life of it has not been closed, or its rights
    (`acl`: their revision) have changed."""
    return Txn(
        when=(
            Absent(keys.node(node)),
            Absent(keys.incarnation(node)),
            RevisionIs(keys.GENERATION, generation),
            rights_guard(node, acl),
        ),
        then=(
            Put(keys.node(node), record, lease),
            Put(keys.incarnation(node), incarnation),
            Put(keys.beat(node)),
        ),
    )


def reattach(
    node: NodeId,
    lease: LeaseId,
    record: bytes,
    incarnation: Revision,
    generation: Revision,
    acl: Revision = Revision(0),
) -> Txn:
    """A node whose lease ran out, but that was not condemned, goes on with the same incarnation."""
    return Txn(
        when=(
            Absent(keys.node(node)),
            RevisionIs(keys.incarnation(node), incarnation),
            RevisionIs(keys.GENERATION, generation),
            rights_guard(node, acl),
        ),
        then=(Put(keys.node(node), record, lease),),
    )


def resume(registration: Registration, incarnation: bytes) -> Txn:
    """A new daemon goes on with the life it finds, and shuts out what an earlier one may still have under way.

    Writing the incarnation again (unchanged) gives it a revision that no guard of the earlier daemon knows.
    """
    return Txn(when=registration.guards(), then=(Put(keys.incarnation(registration.node), incarnation),))


def renew(registration: Registration, beat: bytes = b"") -> Txn:
    """The guarded heartbeat. Committed: what runs may go on until the time before sending + grace - kill margin.

    `beat`: what of this node's attempts is not started before a later one.
    """
    return Txn(when=registration.guards(), then=(Put(keys.beat(registration.node), beat),))


def advertise(registration: Registration, lease: LeaseId, record: bytes) -> Txn:
    """Update what the node says of itself."""
    return Txn(when=registration.guards(), then=(Put(keys.node(registration.node), record, lease),))


def concede(node: NodeId, seen: Revision, incarnation: bytes, acl: Revision = Revision(0)) -> Txn:
    """The node itself reports that nothing of this incarnation runs any more: requeue need not wait.

    Under its rights: the word of a node that has been thrown out is not worth shortening the wait for.
    """
    return Txn(
        when=(RevisionIs(keys.incarnation(node), seen), rights_guard(node, acl)),
        then=(Put(keys.incarnation(node), incarnation),),
    )


def confirm_dead(node: NodeId, seen: Revision, incarnation: bytes, who: tuple[Guard, ...] = ()) -> Txn:
    """An administrator (`who`: what guards that person's rights) vouches that nothing of a life runs any more.

    As if the node itself had said so. Conflict: it is alive, or has moved on, or the rights have changed: look again.
    """
    return Txn(
        when=(Absent(keys.node(node)), RevisionIs(keys.incarnation(node), seen), *who),
        then=(Put(keys.incarnation(node), incarnation),),
    )


def deregister(registration: Registration) -> Txn:
    """A node that holds nothing leaves. Conflict: it still holds something, or was condemned."""
    node = registration.node
    return Txn(
        when=(*registration.guards(), NoneUnder(keys.running_on(node))),
        then=(Delete(keys.node(node)), Delete(keys.incarnation(node)), Delete(keys.beat(node))),
    )


# --- the leader --------------------------------------------------------------------------------------------------


def take_office(node: NodeId, lease: LeaseId, record: bytes, acl: Revision = Revision(0)) -> Txn:
    """Become leader. Conflict: somebody is, or the candidate's rights have changed."""
    return Txn(when=(Absent(keys.OFFICE), rights_guard(node, acl)), then=(Put(keys.OFFICE, record, lease),))


def resign(office: OfficeHeld) -> Txn:
    """Give up the office at once instead of letting the lease run out."""
    return Txn(when=(CreatedAt(keys.OFFICE, office.created),), then=(Delete(keys.OFFICE),))


def condemn(office: OfficeHeld, node: NodeId, seen: Revision, incarnation: bytes) -> Txn:
    """After this no renewal or claim of that incarnation can succeed. Conflict: it came back, or we lost office."""
    return Txn(
        when=(*office.guards(), Absent(keys.node(node)), RevisionIs(keys.incarnation(node), seen)),
        then=(Put(keys.incarnation(node), incarnation),),
    )


def requeue_guards(office: OfficeHeld, node: NodeId, condemned: Revision) -> tuple[Guard, ...]:
    """What must hold for the leader to take tasks from a condemned node: to be the outer guards of a batch."""
    return (*office.guards(), RevisionIs(keys.incarnation(node), condemned))


def close(office: OfficeHeld, node: NodeId, condemned: Revision) -> Txn:
    """The condemned incarnation holds nothing any more: the name is free again."""
    return Txn(
        when=(
            *requeue_guards(office, node, condemned),
            NoneUnder(keys.running_on(node)),
        ),
        then=(Delete(keys.incarnation(node)), Delete(keys.beat(node))),
    )


@dataclass(frozen=True, slots=True)
class Leaving:
    """A finished task that has been archived, and its keys as they were read."""

    task: TaskId
    record_seen: Revision
    status_seen: Revision


def collect(office: OfficeHeld, tasks: Sequence[Leaving], nodes: Sequence[NodeId]) -> Txn:
    """Finished tasks leave the store; each is nested, and its conflict means that its keys are others than those read.

    `nodes`: those that have written them down, which the store remembers.
    """
    # Nested and once only: a store that is full refuses plain puts, and this is what makes room in it.
    remembered = tuple(Txn(when=(Absent(keys.archive(n)),), then=(Put(keys.archive(n)),)) for n in nodes)
    nested = tuple(
        Txn(
            when=(RevisionIs(keys.task(t.task), t.record_seen), RevisionIs(keys.complete(t.task), t.status_seen)),
            then=(Delete(keys.task(t.task)), Delete(keys.complete(t.task))),
        )
        for t in tasks
    )
    return Txn(when=office.guards(), nested=nested + remembered)
