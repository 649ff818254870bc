"""Every guard of every transaction: the store in which it alone does not hold, and what it saves us from.

Each case stands on a store in which the transaction commits. Breaking one guard must make it a conflict; without that
guard the same transaction must commit, which shows that no other guard does its work in this case.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest

from spinetta import keys, txn
from spinetta.model import LeaseId, NodeId, Revision, TaskId
from tests.builders import task_id
from tests.sim.etcd_model import EtcdModel

ME = NodeId("n1")
LEADER = NodeId("n2")
T = task_id(1)
Q = keys.queued(T)
R = keys.running(ME, T)
ACL = keys.acl_node(ME)
LEADERS_ACL = keys.acl_node(LEADER)


@dataclass
class Ground:
    """A store with one node, its task, and a leader; what each of them knows of it."""

    etcd: EtcdModel
    lease: LeaseId = LeaseId(0)
    registration: txn.Registration | None = None
    office: txn.OfficeHeld | None = None

    def put(self, key: str, value: bytes = b"", lease: LeaseId = LeaseId(0)) -> Revision:
        result = self.etcd.commit(txn.Txn(then=(txn.Put(key, value, lease),)))
        return result.revision

    def delete(self, *names: str) -> None:
        self.etcd.commit(txn.Txn(then=tuple(txn.Delete(k) for k in names)))

    def again(self, key: str) -> None:
        """Delete and create: the same key, another life."""
        self.delete(key)
        self.put(key)

    def modified(self, key: str) -> Revision:
        kv = self.etcd.get(key)
        return kv.modified if kv is not None else Revision(0)

    def created(self, key: str) -> Revision:
        kv = self.etcd.get(key)
        return kv.created if kv is not None else Revision(0)

    def registered(self) -> txn.Registration:
        assert self.registration is not None
        return self.registration

    def office_held(self) -> txn.OfficeHeld:
        assert self.office is not None
        return self.office


def bare() -> Ground:
    ground = Ground(EtcdModel())
    ground.lease = ground.etcd.grant_lease(10)
    return ground


def cluster() -> Ground:
    """A registered node, a generation, an office."""
    ground = bare()
    generation = ground.put(keys.GENERATION, b"g")
    rights, leaders = ground.put(ACL, b"approved"), ground.put(LEADERS_ACL, b"approved")
    made = ground.etcd.commit(txn.register(ME, ground.lease, b"node", b"open", generation, rights))
    assert isinstance(made, txn.Committed)
    ground.registration = txn.Registration(ME, made.revision, made.revision, generation, rights)
    taken = ground.etcd.commit(txn.take_office(LEADER, ground.etcd.grant_lease(10), b"n2", leaders))
    assert isinstance(taken, txn.Committed)
    ground.office = txn.OfficeHeld(taken.revision, LEADER, leaders)
    return ground


def with_queued() -> Ground:
    ground = cluster()
    assert isinstance(ground.etcd.commit(txn.submit(T, b"task", b"hint")), txn.Committed)
    return ground


def with_running() -> Ground:
    ground = with_queued()
    claim = txn.claim(ME, T, ground.modified(Q), b"task", b"held")
    assert ground.etcd.commit(txn.batch([claim], ground.registered().guards())).revision == ground.created(R)
    return ground


def with_finished() -> Ground:
    ground = with_running()
    assert isinstance(ground.etcd.commit(txn.finish(ME, T, ground.created(R), b"over")), txn.Committed)
    return ground


def lost() -> Ground:
    """The node's lease has run out; its incarnation is open."""
    ground = cluster()
    ground.etcd.expire(ground.lease)
    return ground


def condemned() -> Ground:
    ground = lost()
    ground.etcd.commit(
        txn.condemn(ground.office_held(), ME, ground.modified(keys.incarnation(ME)), b"condemned"),
    )
    return ground


def condemned_with_running() -> Ground:
    ground = with_running()
    ground.etcd.expire(ground.lease)
    ground.etcd.commit(txn.condemn(ground.office_held(), ME, ground.modified(keys.incarnation(ME)), b"condemned"))
    return ground


def archived(ground: Ground) -> txn.Leaving:
    return txn.Leaving(T, ground.modified(keys.task(T)), ground.modified(keys.complete(T)))


INC = keys.incarnation(ME)
NODE = keys.node(ME)
Break = Callable[[Ground], None]


@dataclass(frozen=True)
class Case:
    """A transaction, the ground it commits on, and for each of its guards how to break that one alone."""

    name: str
    ground: Callable[[], Ground]
    build: Callable[[Ground], txn.Txn]
    breaks: tuple[Break, ...]


def _registration_breaks() -> tuple[Break, ...]:
    return (
        lambda g: g.again(NODE),  # the lease ran out, and somebody registered under the name
        lambda g: _ignore(g.put(INC, b"condemned")),
        lambda g: _ignore(g.put(keys.GENERATION, b"restored")),
        _revoked,
    )


def _ignore(_: object) -> None:
    return None


def _revoked(ground: Ground) -> None:
    ground.put(ACL, b"revoked")


def _leader_revoked(ground: Ground) -> None:
    ground.put(LEADERS_ACL, b"revoked")


def _seen(key: str) -> Callable[[Ground], Revision]:
    return lambda g: g.modified(key)


CASES = (
    Case("submit", cluster, lambda _: txn.submit(T, b"r", b"h"), (lambda g: _ignore(g.put(keys.task(T))),)),
    Case(
        "claim",
        with_queued,
        lambda g: txn.claim(ME, T, g.modified(Q), b"r", b"h"),
        (lambda g: _ignore(g.put(Q, b"requeued meanwhile")),),
    ),
    Case(
        "claims in a batch",
        with_queued,
        lambda g: txn.batch([txn.claim(ME, T, g.modified(Q), b"r", b"h")], g.registered().guards()),
        _registration_breaks(),
    ),
    Case(
        "finish",
        with_running,
        lambda g: txn.finish(ME, T, g.created(R), b"r"),
        (lambda g: g.again(R),),
    ),
    Case(
        "ends in a batch",
        with_running,
        lambda g: txn.batch(
            [txn.finish(ME, T, g.created(R), b"r")], txn.finish_guards(ME, g.modified(INC), g.modified(ACL))
        ),
        (lambda g: _ignore(g.put(INC, b"resumed")), _revoked),
    ),
    Case(
        "give_back",
        with_running,
        lambda g: txn.give_back(ME, T, g.modified(R), b"r", b"h"),
        (lambda g: _ignore(g.put(R, b"a request to cancel")),),
    ),
    Case(
        "cancel_waiting",
        with_queued,
        lambda g: txn.cancel_waiting(T, Q, g.modified(Q), b"r"),
        (lambda g: g.delete(Q),),
    ),
    Case(
        "cancel_running",
        with_running,
        lambda g: txn.cancel_running(ME, T, g.modified(R), b"cancel"),
        (lambda g: g.delete(R),),
    ),
    Case(
        "register",
        bare,
        lambda g: txn.register(ME, g.lease, b"n", b"i", Revision(0)),
        (
            lambda g: _ignore(g.put(NODE)),
            lambda g: _ignore(g.put(INC)),
            lambda g: _ignore(g.put(keys.GENERATION)),
            _revoked,
        ),
    ),
    Case(
        "reattach",
        lost,
        lambda g: txn.reattach(
            ME, g.etcd.grant_lease(9), b"n", g.modified(INC), g.modified(keys.GENERATION), g.modified(ACL)
        ),
        (
            lambda g: _ignore(g.put(NODE)),
            lambda g: _ignore(g.put(INC, b"condemned")),
            lambda g: _ignore(g.put(keys.GENERATION)),
            _revoked,
        ),
    ),
    Case("resume", cluster, lambda g: txn.resume(g.registered(), b"open"), _registration_breaks()),
    Case("renew", cluster, lambda g: txn.renew(g.registered()), _registration_breaks()),
    Case("advertise", cluster, lambda g: txn.advertise(g.registered(), g.lease, b"n"), _registration_breaks()),
    Case(
        "concede",
        condemned,
        lambda g: txn.concede(ME, g.modified(INC), b"dead", g.modified(ACL)),
        (lambda g: g.again(INC), _revoked),
    ),
    Case(
        "confirm_dead",
        lost,
        lambda g: txn.confirm_dead(
            ME, g.modified(INC), b"dead", (txn.RevisionIs(LEADERS_ACL, g.modified(LEADERS_ACL)),)
        ),
        (lambda g: _ignore(g.put(NODE)), lambda g: _ignore(g.put(INC, b"open")), _leader_revoked),
    ),
    Case(
        "deregister",
        cluster,
        lambda g: txn.deregister(g.registered()),
        (*_registration_breaks(), lambda g: _ignore(g.put(R))),
    ),
    Case(
        "take_office",
        bare,
        lambda g: txn.take_office(ME, g.lease, b"n1"),
        (lambda g: _ignore(g.put(keys.OFFICE)), _revoked),
    ),
    Case("resign", cluster, lambda g: txn.resign(g.office_held()), (lambda g: g.again(keys.OFFICE),)),
    Case(
        "condemn",
        lost,
        lambda g: txn.condemn(g.office_held(), ME, g.modified(INC), b"condemned"),
        (
            lambda g: g.again(keys.OFFICE),
            _leader_revoked,
            lambda g: _ignore(g.put(NODE)),
            lambda g: g.again(INC),
        ),
    ),
    Case(
        "requeue in a batch",
        condemned_with_running,
        lambda g: txn.batch(
            [txn.give_back(ME, T, g.modified(R), b"r", b"h")],
            txn.requeue_guards(g.office_held(), ME, g.modified(INC)),
        ),
        (lambda g: g.again(keys.OFFICE), _leader_revoked, lambda g: g.again(INC)),
    ),
    Case(
        "close",
        condemned,
        lambda g: txn.close(g.office_held(), ME, g.modified(INC)),
        (lambda g: g.again(keys.OFFICE), _leader_revoked, lambda g: g.again(INC), lambda g: _ignore(g.put(R))),
    ),
    Case(
        "collect",
        with_finished,
        lambda g: txn.collect(g.office_held(), [archived(g)], [ME]),
        (lambda g: g.again(keys.OFFICE), _leader_revoked),
    ),
    Case(
        "collect each",
        with_finished,
        lambda g: txn.collect(g.office_held(), [archived(g)], [ME]).nested[0],
        (lambda g: _ignore(g.put(keys.task(T), b"mended")), lambda g: g.again(keys.complete(T))),
    ),
    Case(
        "collect each 2",
        with_finished,
        lambda g: txn.collect(g.office_held(), [archived(g)], [ME]).nested[1],
        (lambda g: _ignore(g.put(keys.archive(ME))),),
    ),
)
GUARDS = [(case, i) for case in CASES for i in range(len(case.breaks))]


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_it_commits_when_all_guards_hold(case: Case) -> None:
    ground = case.ground()
    result = ground.etcd.commit(case.build(ground))
    assert isinstance(result, txn.Committed)
    assert all(result.nested)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_each_guard_has_a_case(case: Case) -> None:
    assert len(case.build(case.ground()).when) == len(case.breaks)


@pytest.mark.parametrize(("case", "index"), GUARDS, ids=lambda v: v.name if isinstance(v, Case) else str(v))
def test_each_guard_is_needed(case: Case, index: int) -> None:
    ground = case.ground()
    body = case.build(ground)
    case.breaks[index](ground)
    before = ground.etcd.revision
    assert isinstance(ground.etcd.commit(body), txn.Conflict)
    assert ground.etcd.revision == before
    without = replace(body, when=tuple(g for i, g in enumerate(body.when) if i != index))
    assert isinstance(ground.etcd.commit(without), txn.Committed)


# --- what each leaves behind ---------------------------------------------------------------------------------------


def _left(ground: Ground, *prefixes: str) -> list[str]:
    return [e.key for p in prefixes for e in ground.etcd.list(p).entries]


def test_a_task_has_one_status_key_all_along() -> None:
    ground = cluster()
    etcd = ground.etcd
    etcd.commit(txn.submit(T, b"1", b"hint"))
    assert _left(ground, "/status/") == [Q]
    etcd.commit(txn.claim(ME, T, ground.modified(Q), b"2", b"held"))
    assert _left(ground, "/status/") == [R]
    etcd.commit(txn.cancel_running(ME, T, ground.modified(R), b"held, cancel"))
    assert _left(ground, "/status/") == [R]
    etcd.commit(txn.give_back(ME, T, ground.modified(R), b"3", b"hint"))
    assert _left(ground, "/status/") == [Q]
    token = etcd.commit(txn.claim(ME, T, ground.modified(Q), b"4", b"held")).revision
    assert ground.created(R) == token
    etcd.commit(txn.finish(ME, T, token, b"5"))
    assert _left(ground, "/status/") == [keys.complete(T)]
    found = etcd.get(keys.task(T))
    assert found is not None
    assert found.value == b"5"


def test_a_request_to_cancel_does_not_fence() -> None:
    ground = with_running()
    token = ground.created(R)
    ground.etcd.commit(txn.cancel_running(ME, T, ground.modified(R), b"cancel"))
    assert isinstance(ground.etcd.commit(txn.finish(ME, T, token, b"r")), txn.Committed)


def test_one_lost_claim_does_not_spoil_the_others() -> None:
    ground = with_queued()
    other = TaskId(task_id(2))
    ground.etcd.commit(txn.submit(other, b"r", b"h"))
    seen = ground.modified(Q), ground.modified(keys.queued(other))
    ground.etcd.commit(txn.cancel_waiting(T, Q, seen[0], b"r"))
    claims = [txn.claim(ME, t, rev, b"r", b"h") for t, rev in zip((T, other), seen, strict=True)]
    result = ground.etcd.commit(txn.batch(claims, ground.registered().guards()))
    assert isinstance(result, txn.Committed)
    assert result.nested == (False, True)


def test_what_a_node_says_of_itself_goes_with_its_lease() -> None:
    ground = cluster()
    ground.etcd.commit(txn.advertise(ground.registered(), ground.lease, b"more"))
    ground.etcd.expire(ground.lease)
    assert _left(ground, keys.NODE) == []
    assert _left(ground, keys.INCARNATION) == [INC]


def test_leaving_leaves_nothing() -> None:
    ground = cluster()
    ground.etcd.commit(txn.renew(ground.registered()))
    ground.etcd.commit(txn.deregister(ground.registered()))
    assert _left(ground, keys.NODE, keys.INCARNATION, keys.BEAT) == []


def test_a_resumed_life_shuts_out_the_daemon_before() -> None:
    ground = with_queued()
    old = ground.registered()
    late = txn.batch([txn.claim(ME, T, ground.modified(Q), b"r", b"h")], old.guards())
    resumed = ground.etcd.commit(txn.resume(old, b"open"))
    assert isinstance(ground.etcd.commit(late), txn.Conflict)
    new = replace(old, incarnation_revision=resumed.revision)
    assert new.since == resumed.revision
    again = txn.batch([txn.claim(ME, T, ground.modified(Q), b"r", b"h")], new.guards())
    assert isinstance(ground.etcd.commit(again), txn.Committed)


def test_a_full_batch_keeps_within_etcds_limits() -> None:
    """The model refuses more than 128 operations along a path, as etcd does."""
    ground = cluster()
    ids = [task_id(n) for n in range(1, txn.NESTED_MAX + 1)]
    for t in ids:
        ground.etcd.commit(txn.submit(t, b"r", b"h"))
    claims = [txn.claim(ME, t, ground.modified(keys.queued(t)), b"r", b"h") for t in ids]
    result = ground.etcd.commit(txn.batch(claims, ground.registered().guards()))
    assert isinstance(result, txn.Committed)
    assert all(result.nested)
