"""What a worker may commit: all that its own daemon commits, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spinetta import codec, gatekeeper, keys, lifecycle, trustcodec, txn
from spinetta.access import NodeAcl, NodeRole
from spinetta.gatekeeper import Admitted, Kind, Moot, Refused, Verdict, admit, needs
from spinetta.model import (
    Exit,
    Holding,
    IncarnationId,
    LeaseId,
    Life,
    NodeId,
    Outcome,
    QueueHint,
    Reason,
    Revision,
    State,
    Task,
    TaskId,
    Usage,
)
from spinetta.store.protocol import KeyValue
from spinetta.txn import Absent, Committed, Conflict, CreatedAt, Delete, NoneUnder, Put, RevisionIs, Txn
from tests import builders, lives
from tests.sim.etcd_model import EtcdModel

ME, OTHER = NodeId("n1"), NodeId("n2")


class Yard:
    """A store with two workers: n1 (cleared for red) and n2 (cleared for nothing)."""

    def __init__(self) -> None:
        self.model = EtcdModel()
        self.acls = {ME: NodeAcl(ME, NodeRole.WORKER, effective=("red",)), OTHER: NodeAcl(OTHER, NodeRole.WORKER)}
        self.put(keys.GENERATION, codec.encode_generation("g"))
        for node, acl in self.acls.items():
            self.put(keys.acl_node(node), trustcodec.encode(acl))
        self.leases = {node: self.model.grant_lease(60) for node in self.acls}

    def put(self, key: str, value: bytes, lease: LeaseId = LeaseId(0)) -> None:
        assert isinstance(self.model.commit(Txn(then=(Put(key, value, lease),))), Committed)

    def get(self, key: str) -> KeyValue:
        found = self.find(key)
        assert found is not None, key
        return found

    def find(self, key: str) -> KeyValue | None:
        return self.model.read([key]).entries[key]

    def judge(self, body: Txn, node: NodeId = ME, **more: Any) -> Verdict:
        acl = self.acls[node]
        snapshot = self.model.read(needs(node, body))
        more.setdefault("leases", {self.leases[node]})
        return admit(node, acl.role, acl, body, snapshot.entries, revision=snapshot.revision, **more)

    def commit(self, body: Txn, node: NodeId = ME) -> Committed:
        """What is admitted, and commits."""
        verdict = self.judge(body, node)
        assert isinstance(verdict, Admitted), verdict
        result = self.model.commit(verdict.txn)
        assert isinstance(result, Committed)
        return result

    def registration(self, node: NodeId = ME) -> txn.Registration:
        return txn.Registration(
            node,
            self.get(keys.node(node)).created,
            self.get(keys.incarnation(node)).modified,
            self.get(keys.GENERATION).modified,
            self.acl(node),
        )

    def acl(self, node: NodeId = ME) -> Revision:
        return self.get(keys.acl_node(node)).modified

    def register(self, node: NodeId = ME, **fields: Any) -> Txn:
        return lives.register(node, self.leases[node], self.get(keys.GENERATION).modified, self.acl(node), **fields)

    def begin(self, node: NodeId = ME) -> Yard:
        self.commit(self.register(node), node)
        return self

    def submit(self, *numbers: int, **fields: Any) -> Yard:
        for n in numbers:
            assert isinstance(self.model.commit(lives.submit(builders.queued(n, **fields))), Committed)
        return self

    def claim(self, n: int, node: NodeId = ME, **changes: Any) -> Txn:
        task = builders.task_id(n)
        return lives.claim(node, self.get(keys.queued(task)), self.get(keys.task(task)), **changes)

    def claims(self, *parts: Txn, node: NodeId = ME) -> Txn:
        return txn.batch(parts, self.registration(node).guards())

    def take(self, *numbers: int, node: NodeId = ME) -> Yard:
        result = self.commit(self.claims(*(self.claim(n, node) for n in numbers), node=node), node)
        assert all(result.nested)
        return self

    def end(self, n: int, how: Exit | None = None, node: NodeId = ME, **changes: Any) -> Txn:
        task = builders.task_id(n)
        return lives.end(node, self.get(keys.running(node, task)), self.get(keys.task(task)), how, **changes)

    def ends(self, *parts: Txn, node: NodeId = ME) -> Txn:
        life = self.get(keys.incarnation(node)).modified
        return txn.batch(parts, txn.finish_guards(node, life, self.acl(node)))

    def task(self, n: int) -> Task:
        return codec.decode_task(self.get(keys.task(builders.task_id(n))).value)

    def refuses(self, body: Txn, why: str, node: NodeId = ME) -> None:
        verdict = self.judge(body, node)
        assert isinstance(verdict, Refused), verdict
        assert why in verdict.reason


# --- a whole life ------------------------------------------------------------------------------------------------


def test_a_whole_life() -> None:
    yard = Yard().submit(1, 2, 3).submit(4, clearance=("red",))
    yard.begin()
    yard.commit(txn.renew(yard.registration()))
    yard.commit(txn.advertise(yard.registration(), yard.leases[ME], lives.node_value("n1", running=3)))
    yard.commit(txn.resume(yard.registration(), yard.get(keys.incarnation(ME)).value))
    yard.take(1, 2, 4)
    assert [yard.task(n).state for n in (1, 2, 3, 4)] == [State.RUNNING, State.RUNNING, State.QUEUED, State.RUNNING]
    failed = Exit(Reason.EXIT, 3, started_ms=2500, ended_ms=3000)
    released = Exit(Reason.RELEASED, message="draining", ended_ms=3000)
    result = yard.commit(yard.ends(yard.end(1), yard.end(2, failed), yard.end(4, released)))
    assert result.nested == (True, True, True)
    assert [yard.task(n).outcome for n in (1, 2)] == [Outcome.SUCCEEDED, Outcome.FAILED]
    assert yard.task(4).state is State.QUEUED
    yard.commit(txn.deregister(yard.registration()))
    assert yard.find(keys.node(ME)) is None


def test_a_life_that_ends_by_others() -> None:
    yard = Yard().begin()
    yard.model.commit(Txn(then=(Delete(keys.node(ME)),)))
    entry = yard.get(keys.incarnation(ME))
    generation = yard.get(keys.GENERATION).modified
    again = txn.reattach(ME, yard.leases[ME], lives.node_value("n1"), entry.modified, generation, yard.acl())
    yard.commit(again)
    condemned = replace(lives.life_of("n1"), state=Life.CONDEMNED)
    yard.put(keys.incarnation(ME), codec.encode_incarnation(condemned))
    dead = codec.encode_incarnation(replace(condemned, state=Life.DEAD))
    yard.commit(txn.concede(ME, yard.get(keys.incarnation(ME)).modified, dead, yard.acl()))


@pytest.mark.parametrize(
    "how",
    [
        Exit(Reason.EXIT, 0, started_ms=2000, ended_ms=3000, usage=Usage(1.5, 0.5, 1 << 20)),
        Exit(Reason.EXIT, 0),
        Exit(Reason.EXIT, 7, started_ms=9000, ended_ms=10_000),
        Exit(Reason.SIGNAL, signal=11, started_ms=2100, ended_ms=3000),
        Exit(Reason.OUT_OF_MEMORY, signal=9, message="used 2 GiB", started_ms=2100, ended_ms=3000),
        Exit(Reason.OUT_OF_PIDS, 3, message="refused twice", started_ms=2100, ended_ms=3000, usage=Usage(pids_peak=9)),
        Exit(Reason.DISK_LIMIT, signal=9, started_ms=2100, ended_ms=3000, usage=Usage(0, 0, 0, 1 << 20, 1 << 30, 2)),
        Exit(Reason.WALLTIME, signal=15, started_ms=2100, ended_ms=3000),
        Exit(Reason.CANCELLED, signal=15, started_ms=2100, ended_ms=3000),
        Exit(Reason.CANCELLED, message="before it was started", ended_ms=4000),
        Exit(Reason.RELEASED, signal=15, started_ms=2100, ended_ms=3000),
        Exit(Reason.FENCED, message="before it was started", ended_ms=4000),
        Exit(Reason.FENCED, signal=9, started_ms=2100, ended_ms=3000),
        Exit(Reason.SHIM_LOST, started_ms=2100, ended_ms=3000),
        Exit(Reason.NODE_UNFIT, message="no space left", ended_ms=4000),
        Exit(Reason.SPAWN_FAILED, message="no such file", ended_ms=4000),
    ],
)
@pytest.mark.parametrize("retries", [0, 2])
@pytest.mark.parametrize("restart", [True, False])
@pytest.mark.parametrize("cancelled", [True, False])
@pytest.mark.parametrize("knows", [True, False])
def test_every_end_that_a_daemon_records(how: Exit, retries: int, restart: bool, cancelled: bool, knows: bool) -> None:
    yard = Yard().submit(1, retries=retries, restart_on_node_failure=restart, retry_backoff_s=2.0).begin().take(1)
    running = yard.get(keys.running(ME, builders.task_id(1)))
    if cancelled:
        asked = replace(codec.decode_holding(running.value), cancel_requested=True, cancel_reason="no more")
        body = txn.cancel_running(ME, builders.task_id(1), running.modified, codec.encode_holding(asked))
        assert isinstance(yard.model.commit(body), Committed)
    part = yard.end(1, how, knows=knows)
    if cancelled and not knows and len(part.when) == 1 and isinstance(part.when[0], RevisionIs):
        # A give-back that has not seen the request is guarded by the revision before it: it can only be lost.
        part = replace(part, when=(RevisionIs(running.key, running.modified),))
        assert yard.commit(yard.ends(part)).nested == (False,)
        return
    assert yard.commit(yard.ends(part)).nested == (True,)


def test_a_voter_may_commit_anything() -> None:
    acl = NodeAcl("v1", NodeRole.VOTER)
    body = Txn(then=(Delete(keys.POLICY), Put("/anything", b"")))
    assert admit(NodeId("v1"), NodeRole.VOTER, acl, body, {}, revision=Revision(1)) == Admitted(Kind.ANY, body)


def test_what_is_read_first() -> None:
    yard = Yard().submit(1, 2).begin()
    one, two = builders.task_id(1), builders.task_id(2)
    assert needs(ME, txn.renew(yard.registration())) == ()
    both = needs(ME, yard.claims(yard.claim(1), yard.claim(2)))
    mine = (keys.node(ME), keys.incarnation(ME))
    assert both == (*mine, keys.task(one), keys.queued(one), keys.task(two), keys.queued(two))
    yard.take(1)
    assert needs(ME, yard.ends(yard.end(1))) == (*mine, keys.task(one), keys.running(ME, one))
    too_many = txn.batch([Txn(then=(Delete(keys.task(builders.task_id(n))),)) for n in range(txn.NESTED_MAX + 1)])
    assert needs(ME, too_many) == ()


# --- what is lost stays lost -------------------------------------------------------------------------------------


def test_a_claim_that_came_late_is_lost_whatever_it_says() -> None:
    yard = Yard().submit(1, 2).begin().begin(OTHER)
    late, liar = yard.claim(1), yard.claim(2, spec=replace(builders.spec(2), owner="me"))
    yard.take(1, 2, node=OTHER)
    verdict = yard.judge(yard.claims(late, liar))
    assert isinstance(verdict, Admitted)
    assert all(not part.then for part in verdict.txn.nested)  # nothing of it could be written
    assert yard.commit(yard.claims(late, liar)).nested == (False, False)


def test_under_an_old_registration_everything_is_moot() -> None:
    yard = Yard().submit(1).begin()
    old, part = yard.registration(), yard.claim(1)
    yard.commit(txn.resume(old, yard.get(keys.incarnation(ME)).value))
    assert isinstance(yard.judge(txn.batch([part], old.guards())), Moot)
    assert isinstance(
        yard.judge(txn.advertise(replace(old, node_created=Revision(1)), LeaseId(1), lives.node_value("n1"))), Moot
    )
    # A renewal is not looked at: its guards say it all.
    assert isinstance(yard.model.commit(yard.judge(txn.renew(old)).txn), Conflict)  # type: ignore[union-attr]


def test_a_finish_whose_token_is_spent_is_lost() -> None:
    yard = Yard().submit(1).begin().take(1)
    part = yard.end(1)
    yard.commit(yard.ends(part))
    assert yard.commit(yard.ends(part)).nested == (False,)


def test_a_lease_of_another_is_as_one_that_is_gone() -> None:
    yard = Yard().begin(OTHER)
    body = lives.register(ME, yard.leases[OTHER], yard.get(keys.GENERATION).modified, yard.acl())
    assert isinstance(yard.judge(body), Moot)
    yard.begin()
    for lease in (yard.leases[OTHER], LeaseId(0)):
        assert isinstance(yard.judge(txn.advertise(yard.registration(), lease, lives.node_value("n1"))), Moot)
    # The one that the registration is bound to counts, though this voter has not granted it.
    body = txn.advertise(yard.registration(), yard.leases[ME], lives.node_value("n1"))
    assert isinstance(yard.judge(body, leases=()), Admitted)


def test_the_record_that_was_looked_at_is_guarded() -> None:
    yard = Yard().submit(1).begin()
    verdict = yard.judge(yard.claims(yard.claim(1)))
    assert isinstance(verdict, Admitted)
    changed = replace(yard.task(1), submitted_at_node="elsewhere")
    yard.put(keys.task(builders.task_id(1)), codec.encode_task(changed))  # without its queue key, against all habit
    result = yard.model.commit(verdict.txn)
    assert isinstance(result, Committed)
    assert result.nested == (False,)


def test_what_is_committed_is_made_here() -> None:
    yard = Yard().submit(1).begin()
    part = yard.claim(1)
    junk = b"\xfa\x7f\x05hello"  # a field that no version knows
    longer = (replace(w, value=w.value + junk) if isinstance(w, Put) else w for w in part.then)
    padded = replace(part, then=tuple(longer))
    yard.commit(yard.claims(padded))
    assert b"hello" not in yard.get(keys.task(builders.task_id(1))).value
    assert b"hello" not in yard.get(keys.running(ME, builders.task_id(1))).value


# --- attacks -----------------------------------------------------------------------------------------------------

FUTURE = Revision(1 << 40)


def ready() -> Yard:
    """Two nodes alive; 1 to 3 queued (3 labelled), 5 runs here, 6 there."""
    yard = Yard().submit(1, 2, 5, 6, retries=3).submit(3, clearance=("blue",)).begin().begin(OTHER)
    return yard.take(5).take(6, node=OTHER)


LIES: dict[str, tuple[str, Callable[[Yard], Txn]]] = {
    "uncleared task": ("not cleared for blue", lambda y: y.claims(y.claim(3))),
    "another owner": ("may change nothing", lambda y: y.claims(y.claim(1, spec=replace(y.task(1).spec, owner="eve")))),
    "another command": (
        "may change nothing",
        lambda y: y.claims(y.claim(1, spec=replace(y.task(1).spec, command=("/bin/sh",)))),
    ),
    "label removed": ("not cleared", lambda y: y.claims(y.claim(3, spec=replace(y.task(3).spec, clearance=())))),
    "claimed as complete": ("may change nothing", lambda y: y.claims(y.claim(1, state=State.COMPLETE))),
    "attempts dropped": ("begins an attempt", lambda y: y.claims(y.claim(1, attempts=()))),
    "attempts counted up": ("may change nothing", lambda y: y.claims(y.claim(1, attempts_started=99))),
    "another's attempt": ("may change nothing", lambda y: y.claims(lying_claim(y, "node"))),
    "another life": ("may change nothing", lambda y: y.claims(lying_claim(y, "incarnation"))),
    "grace of a century": ("a grace", lambda y: y.claims(y.claim(1, grace_s=3e9))),
    "grace that is no number": ("a grace", lambda y: y.claims(y.claim(1, grace_s=float("nan")))),
    "holding cancelled": ("holding", lambda y: y.claims(lying_holding(y, cancel_requested=True))),
    "holding of another attempt": ("holding", lambda y: y.claims(lying_holding(y, attempt=7))),
    "claim for another node": ("not a claim", lambda y: y.claims(y.claim(1, OTHER))),
    "claim under another's guards": (
        "stands under its registration",
        lambda y: txn.batch([y.claim(1)], y.registration(OTHER).guards()),
    ),
    "claim without guards": ("stands under its registration", lambda y: txn.batch([y.claim(1)])),
    "claim with fewer guards": (
        "stands under its registration",
        lambda y: txn.batch([y.claim(1)], y.registration().guards()[:3]),
    ),
    "claim of a key that is absent": (
        "not a claim",
        lambda y: y.claims(replace(y.claim(1), when=(RevisionIs(keys.queued(builders.task_id(1)), Revision(0)),))),
    ),
    "claim at a future revision": (
        "nothing has been written",
        lambda y: y.claims(replace(y.claim(1), when=(RevisionIs(keys.queued(builders.task_id(1)), FUTURE),))),
    ),
    "claim without its guard": ("not a claim", lambda y: y.claims(replace(y.claim(1), when=()))),
    "claim with another key": (
        "about one task",
        lambda y: y.claims(replace(y.claim(1), then=(*y.claim(1).then, Put("/acl/policy", b"")))),
    ),
    "a task twice": ("no two about the same", lambda y: y.claims(y.claim(1), y.claim(1))),
    "a claim and an end": ("neither", lambda y: y.ends(y.end(5), y.claim(1))),
    "an end under a registration": ("not a claim", lambda y: y.claims(y.end(5))),
    "writes beside the batch": ("nothing beside", lambda y: replace(y.claims(y.claim(1)), then=(Put("/x"),))),
    "deeper nesting": ("one level deep", lambda y: y.claims(replace(y.claim(1), nested=(y.claim(2),)))),
    "too many parts": (
        "at most 120",
        lambda y: y.claims(*(Txn(then=(Delete(keys.task(builders.task_id(n))),)) for n in range(121))),
    ),
    "another's finish": ("neither", lambda y: y.ends(y.end(6, node=OTHER))),
    "another's finish under our key": (
        "about one task",
        lambda y: y.ends(replace(y.end(6, node=OTHER), then=(Delete(keys.running(OTHER, builders.task_id(6))),))),
    ),
    "finish with another spec": (
        "may change nothing",
        lambda y: y.ends(y.end(5, spec=replace(y.task(5).spec, command=("x",)))),
    ),
    "finish with dropped attempts": ("may change nothing", lambda y: y.ends(y.end(5, attempts=()))),
    "finish with another submission": ("may change nothing", lambda y: y.ends(y.end(5, submitted_ms=1))),
    "finish with failures": ("may change nothing", lambda y: y.ends(y.end(5, failures=3))),
    "finish as queued": ("may change nothing", lambda y: y.ends(y.end(5, state=State.QUEUED))),
    "finish with a reason of its own": ("may change nothing", lambda y: y.ends(y.end(5, reason="because"))),
    "finish with an outcome of its own": ("may change nothing", lambda y: y.ends(y.end(5, outcome=Outcome.LOST))),
    "finish with a long story": ("at most", lambda y: y.ends(y.end(5, Exit(Reason.EXIT, 0, message="x" * 5000)))),
    "finish with endless use": (
        "is a number",
        lambda y: y.ends(y.end(5, Exit(Reason.EXIT, 0, usage=Usage(float("inf"))))),
    ),
    "finish before time": ("no time", lambda y: y.ends(y.end(5, Exit(Reason.EXIT, 0, started_ms=-5)))),
    "finish of a retry": ("gives the task back", lambda y: y.ends(finish_of_retry(y))),
    "give-back of a success": ("is the end of the task", lambda y: y.ends(give_back_of_success(y))),
    "finish without a token": (
        "neither",
        lambda y: y.ends(replace(y.end(5), when=(CreatedAt(keys.running(ME, builders.task_id(5)), Revision(0)),))),
    ),
    "finish with a future token": (
        "nothing has been written",
        lambda y: y.ends(replace(y.end(5), when=(CreatedAt(keys.running(ME, builders.task_id(5)), FUTURE),))),
    ),
    "finish alone": ("belongs to the life", lambda y: y.end(5)),
    "registration of another": ("belongs to the life", lambda y: y.register(OTHER)),
    "renewal of another": ("belongs to the life", lambda y: txn.renew(y.registration(OTHER))),
    "description of another": (
        "belongs to the life",
        lambda y: txn.advertise(y.registration(OTHER), y.leases[OTHER], lives.node_value("n2")),
    ),
    "deregistration of another": ("belongs to the life", lambda y: txn.deregister(y.registration(OTHER))),
    "resuming another": (
        "belongs to the life",
        lambda y: txn.resume(y.registration(OTHER), y.get(keys.incarnation(OTHER)).value),
    ),
    "another's death": (
        "belongs to the life",
        lambda y: txn.concede(OTHER, y.get(keys.incarnation(OTHER)).modified, b"", y.acl(OTHER)),
    ),
    "speaking for another": ("may not speak for", lambda y: describe(y, name=OTHER)),
    "an etcd member": ("no etcd member", lambda y: describe(y, etcd_member_id=7)),
    "a candidate": ("no candidate", lambda y: describe(y, candidate=True)),
    "more clearances": ("not say that it is cleared", lambda y: describe(y, clearances=("blue", "red"))),
    "a huge description": ("bytes", lambda y: describe(y, warnings=("x" * 40_000,))),
    "a description that is none": (
        "cannot be read",
        lambda y: txn.advertise(y.registration(), y.leases[ME], b"\xff\xff"),
    ),
    "a life brought back": ("may say only", lambda y: concede(y, state=Life.OPEN)),
    "another's boot": ("may say only", lambda y: concede(y, boot_id="x")),
    "a life rewritten": ("does not change", lambda y: txn.resume(y.registration(), b"")),
    "a cancel": (
        "belongs to the life",
        lambda y: txn.cancel_waiting(
            builders.task_id(1), keys.queued(builders.task_id(1)), y.get(keys.queued(builders.task_id(1))).modified, b""
        ),
    ),
    "a submit": ("belongs to the life", lambda _: lives.submit(builders.queued(9))),
    "the office": ("belongs to the life", lambda y: txn.take_office(ME, y.leases[ME], b"", y.acl())),
    "a condemnation": (
        "belongs to the life",
        lambda y: txn.condemn(txn.OfficeHeld(Revision(5), ME, y.acl()), OTHER, Revision(5), b""),
    ),
    "the generation": ("belongs to the life", lambda _: Txn(then=(Put(keys.GENERATION, b"x"),))),
    "rights": ("belongs to the life", lambda _: Txn(then=(Put(keys.acl_node(ME), b"x"),))),
    "a label's key": ("belongs to the life", lambda _: Txn(then=(Put(keys.label("red"), b"x"),))),
    "an authority": ("belongs to the life", lambda _: Txn(then=(Delete(keys.authority("cluster")),))),
    "nothing": ("belongs to the life", lambda _: Txn()),
    "a question": ("belongs to the life", lambda _: Txn(when=(NoneUnder("/secret/ann/"),))),
    "a question beside a renewal": (
        "belongs to the life",
        lambda y: replace(txn.renew(y.registration()), when=(*y.registration().guards(), Absent("/secret/ann/x"))),
    ),
    "a beat of another": (
        "belongs to the life",
        lambda y: replace(txn.renew(y.registration()), then=(Put(keys.beat(OTHER), b""),)),
    ),
    "a beat and more": (
        "belongs to the life",
        lambda y: replace(txn.renew(y.registration()), then=(Put(keys.beat(ME)), Put(keys.beat(NodeId(ME + "x"))))),
    ),
    "a beat like a book": (
        "at most",
        lambda y: txn.renew(y.registration(), b"x" * (gatekeeper.BEAT_BYTES_MAX + 1)),
    ),
    "a beat under a lease": (
        "belongs to the life",
        lambda y: replace(txn.renew(y.registration()), then=(Put(keys.beat(ME), b"", y.leases[OTHER]),)),
    ),
}


def lying_claim(yard: Yard, what: str) -> Txn:
    task = lifecycle.claimed(yard.task(1), ME, lives.life_of("n1").id, now_ms=2000)
    value = OTHER if what == "node" else IncarnationId("another")
    last = replace(task.attempts[-1], **{what: value})  # type: ignore[arg-type]
    holding = Holding(1, lives.life_of("n1").id, 8.0)
    return lives.claim_of(ME, yard.get(keys.queued(task.id)), replace(task, attempts=(last,)), holding)


def lying_holding(yard: Yard, **changes: Any) -> Txn:
    task = lifecycle.claimed(yard.task(1), ME, lives.life_of("n1").id, now_ms=2000)
    holding = replace(Holding(1, lives.life_of("n1").id, 8.0), **changes)
    return lives.claim_of(ME, yard.get(keys.queued(task.id)), task, holding)


def finish_of_retry(yard: Yard) -> Txn:
    part = yard.end(5, Exit(Reason.EXIT, 1, started_ms=2500, ended_ms=3000))
    put = part.then[2]
    assert isinstance(put, Put)
    return txn.finish(ME, builders.task_id(5), yard.get(keys.running(ME, builders.task_id(5))).created, put.value)


def give_back_of_success(yard: Yard) -> Txn:
    put = yard.end(5).then[2]
    assert isinstance(put, Put)
    seen = yard.get(keys.running(ME, builders.task_id(5))).modified
    hint = codec.encode_hint(QueueHint.of(yard.task(5).spec))
    return txn.give_back(ME, builders.task_id(5), seen, put.value, hint)


def describe(yard: Yard, **fields: Any) -> Txn:
    record = replace(builders.node_record("n1"), **fields)
    return txn.advertise(yard.registration(), yard.leases[ME], codec.encode_node(record))


def concede(yard: Yard, **changes: Any) -> Txn:
    life = replace(replace(lives.life_of("n1"), state=Life.DEAD), **changes)
    return txn.concede(ME, yard.get(keys.incarnation(ME)).modified, codec.encode_incarnation(life), yard.acl())


@pytest.mark.parametrize("lie", LIES)
def test_lies_are_refused_with_their_reason(lie: str) -> None:
    why, make = LIES[lie]
    yard = ready()
    yard.refuses(make(yard), why)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"state": Life.DEAD}, "begins open"),
        ({"id": IncarnationId("")}, "begins open"),
        ({"id": IncarnationId("another")}, "another life"),
        ({"boot_id": "x" * 300}, "begins open"),
        ({"kill_margin_s": 1e12}, "at most"),
        ({"kill_margin_s": -1.0}, "at most"),
        ({"lease_ttl_s": float("nan")}, "at most"),
    ],
)
def test_lives_that_may_not_begin(changes: dict[str, Any], why: str) -> None:
    yard = Yard()
    yard.refuses(yard.register(life=replace(lives.life_of("n1"), **changes)), why)


def test_rights_of_another_name_are_none() -> None:
    yard = Yard().begin()
    body = txn.renew(yard.registration())
    assert isinstance(admit(ME, NodeRole.WORKER, yard.acls[OTHER], body, {}, revision=Revision(9)), Refused)
    assert isinstance(admit(ME, 0, yard.acls[ME], body, {}, revision=Revision(9)), Refused)  # type: ignore[arg-type]


def test_an_end_of_an_earlier_life_is_refused() -> None:
    yard = ready()
    later = replace(lives.life_of("n1"), id=IncarnationId("later"))
    yard.put(keys.incarnation(ME), codec.encode_incarnation(later))
    yard.refuses(yard.ends(yard.end(5)), "not of this life")


def test_records_that_cannot_be_read_are_nobodys() -> None:
    yard = ready()
    claim, end = yard.claim(1), yard.end(5)
    for n in (1, 5):
        task = builders.task_id(n)
        status = keys.queued(task) if n == 1 else keys.running(ME, task)
        found = yard.get(status)
        yard.model.commit(Txn(then=(Put(keys.task(task), b"\xff"), Put(status, found.value))))
    queued, running = (yard.get(k) for k in (keys.queued(builders.task_id(1)), keys.running(ME, builders.task_id(5))))
    yard.refuses(yard.claims(replace(claim, when=(RevisionIs(queued.key, queued.modified),))), "cannot be read")
    yard.refuses(yard.ends(replace(end, when=(CreatedAt(running.key, running.created),))), "cannot be read")
    yard.model.commit(Txn(then=(Put(running.key, b"\xff"),)))
    yard.refuses(yard.ends(replace(end, when=(CreatedAt(running.key, running.created),))), "cannot be read")


# --- whatever comes ----------------------------------------------------------------------------------------------

YARD = ready()
GOOD: tuple[Txn, ...] = (
    YARD.claims(YARD.claim(1), YARD.claim(2)),
    YARD.ends(YARD.end(5)),
    YARD.ends(YARD.end(5, Exit(Reason.EXIT, 1, started_ms=2500, ended_ms=3000))),
    txn.renew(YARD.registration()),
    txn.deregister(YARD.registration()),
    txn.resume(YARD.registration(), YARD.get(keys.incarnation(ME)).value),
    describe(YARD),
    concede(YARD),
    YARD.claims(YARD.claim(3)),
    YARD.ends(YARD.end(6, node=OTHER)),
    txn.renew(YARD.registration(OTHER)),
)
KEYS = sorted(
    {e.key for e in YARD.model.list("/").entries}
    | {keys.complete(builders.task_id(5)), keys.OFFICE, keys.POLICY, keys.running(ME, builders.task_id(1)), "", "/"}
    | {keys.running(OTHER, builders.task_id(5)), keys.label("red"), keys.node(NodeId("n3"))}
)
REVISIONS = st.sampled_from(sorted({0, 1, int(FUTURE)} | {int(e.modified) for e in YARD.model.list("/").entries}))
VALUES = st.one_of(
    st.sampled_from(sorted({e.value for e in YARD.model.list("/").entries})),
    st.binary(max_size=40),
    st.sampled_from(
        [w.value for body in GOOD for part in (body, *body.nested) for w in part.then if isinstance(w, Put)]
    ),
)
GUARDS = st.one_of(
    st.builds(Absent, st.sampled_from(KEYS)),
    st.builds(CreatedAt, st.sampled_from(KEYS), REVISIONS.map(Revision)),
    st.builds(RevisionIs, st.sampled_from(KEYS), REVISIONS.map(Revision)),
    st.builds(NoneUnder, st.sampled_from(KEYS)),
)
LEASES = st.sampled_from([LeaseId(0), *YARD.leases.values(), LeaseId(99)])
WRITES = st.one_of(st.builds(Put, st.sampled_from(KEYS), VALUES, LEASES), st.builds(Delete, st.sampled_from(KEYS)))


@st.composite
def mutated(draw: st.DrawFn, body: Txn) -> Txn:
    """A good transaction with one to three things changed in it."""
    for _ in range(draw(st.integers(1, 3))):
        part_at = draw(st.integers(-1, len(body.nested) - 1))
        part = body if part_at < 0 else body.nested[part_at]
        when, then = list(part.when), list(part.then)
        match draw(st.integers(0, 5)):
            case 0 if when:
                when[draw(st.integers(0, len(when) - 1))] = draw(GUARDS)
            case 1 if when:
                del when[draw(st.integers(0, len(when) - 1))]
            case 2 if then:
                then[draw(st.integers(0, len(then) - 1))] = draw(WRITES)
            case 3 if then:
                at = draw(st.integers(0, len(then) - 1))
                old = then[at]
                then[at] = replace(old, value=draw(VALUES)) if isinstance(old, Put) else draw(WRITES)
            case 4:
                then.append(draw(WRITES))
            case _:
                when.append(draw(GUARDS))
        part = replace(part, when=tuple(when), then=tuple(then))
        body = part if part_at < 0 else replace(
            body, nested=(*body.nested[:part_at], part, *body.nested[part_at + 1 :])
        )  # fmt: skip
    return body


PLAIN = st.builds(Txn, st.lists(GUARDS, max_size=5).map(tuple), st.lists(WRITES, max_size=4).map(tuple))
ANY = st.one_of(
    PLAIN,
    st.builds(txn.batch, st.lists(PLAIN, min_size=1, max_size=3), st.lists(GUARDS, max_size=5)),
    st.sampled_from(GOOD).flatmap(mutated),
    st.sampled_from(GOOD),
)


def own(task: TaskId) -> set[str]:
    """The keys that n1 may write for a task, as things stand: none for one that is not for it."""
    queued = YARD.find(keys.queued(task))
    if queued is not None and set(YARD_TASKS[task].spec.clearance) <= {"red"}:
        return {keys.queued(task), keys.running(ME, task), keys.task(task)}
    if YARD.find(keys.running(ME, task)) is not None:
        return {keys.running(ME, task), keys.complete(task), keys.queued(task), keys.task(task)}
    return set()


YARD_TASKS = {builders.task_id(n): YARD.task(n) for n in (1, 2, 3, 5, 6)}
NODE_KEYS = {keys.node(ME), keys.incarnation(ME), keys.beat(ME)}
KEYS_ALLOWED = NODE_KEYS | {k for t in YARD_TASKS for k in own(t)}
ASKED_ALLOWED = KEYS_ALLOWED | {keys.GENERATION, keys.acl_node(ME), keys.running_on(ME)}


@settings(max_examples=1500, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(ANY)
def test_whatever_is_admitted_touches_only_what_is_ones_own(body: Txn) -> None:
    verdict = YARD.judge(body)
    if not isinstance(verdict, Admitted):
        return
    for part in (verdict.txn, *verdict.txn.nested):
        assert not any(each.nested for each in verdict.txn.nested)
        for write in part.then:
            assert write.key in KEYS_ALLOWED
            assert not isinstance(write, Put) or write.lease in (0, YARD.leases[ME])
            assert not isinstance(write, Put) or (write.lease != 0) is (write.key == keys.node(ME))
        for guard in part.when:
            assert (guard.prefix if isinstance(guard, NoneUnder) else guard.key) in ASKED_ALLOWED
        for write in part.then:
            if isinstance(write, Put) and write.key.startswith(keys.TASK):
                was, now = YARD_TASKS[keys.parse_task(write.key)], codec.decode_task(write.value)
                assert (now.spec, now.submitted_ms, now.submitted_at_node) == (was.spec, was.submitted_ms, "")
                assert now.attempts[: len(was.attempts) - 1] == was.attempts[:-1]
                assert all(a.node == ME for a in now.attempts)


@settings(max_examples=300, deadline=None)
@given(ANY, st.sampled_from([{}, None]))
def test_nothing_known_is_no_reason_to_admit_what_needs_it(body: Txn, known: dict[str, None] | None) -> None:
    entries = dict.fromkeys(needs(ME, body)) if known is None else {}
    verdict = admit(ME, NodeRole.WORKER, YARD.acls[ME], body, entries, revision=YARD.model.revision)
    if isinstance(verdict, Admitted):
        assert all(not part.then for part in verdict.txn.nested)
        # A heartbeat is judged by its size alone.
        assert not any(isinstance(w, Put) and w.value and w.key != keys.beat(ME) for w in verdict.txn.then)


def test_the_kinds_are_all_there() -> None:
    assert {k.value for k in gatekeeper.Kind} == {
        "any", "register", "reattach", "resume", "renew", "advertise", "concede", "deregister", "claim", "end"
    }  # fmt: skip
