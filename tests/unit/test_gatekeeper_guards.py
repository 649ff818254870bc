"""Each look that a worker's transaction is given, by itself: what comes through when it alone is forgotten."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from spinetta import codec, keys, lifecycle, txn
from spinetta.gatekeeper import Admitted, Moot, Refused
from spinetta.model import Exit, Holding, IncarnationId, LeaseId, Reason, Revision, State
from spinetta.txn import Delete, Put, RevisionIs, Txn
from tests import builders, lives
from tests.unit.test_gatekeeper import ME, OTHER, Yard, ready

ONE, FIVE = builders.task_id(1), builders.task_id(5)


def test_a_task_whose_record_does_not_say_that_it_is_queued_is_not_claimed() -> None:
    yard = Yard().submit(1).begin()
    body = yard.claims(yard.claim(1))
    for state in (State.RUNNING, State.COMPLETE, State.BLOCKED):
        yard.put(keys.task(ONE), codec.encode_task(replace(builders.queued(1), state=state)))
        yard.refuses(body, "does not say that it is queued")


def test_a_queue_key_without_a_record_or_with_another_tasks_gives_nothing() -> None:
    yard = Yard().submit(1, 2).begin()
    body = yard.claims(yard.claim(1))
    yard.put(keys.task(ONE), yard.get(keys.task(builders.task_id(2))).value)
    yard.refuses(body, "of another task")
    yard.model.commit(Txn(then=(Delete(keys.task(ONE)),)))
    yard.refuses(body, "there is no such task")


def test_a_claim_is_committed_under_its_queue_key_as_it_was_seen() -> None:
    yard = Yard().submit(1).begin()
    seen = yard.get(keys.queued(ONE)).modified
    verdict = yard.judge(yard.claims(yard.claim(1)))
    assert isinstance(verdict, Admitted)
    assert RevisionIs(keys.queued(ONE), seen) in verdict.txn.nested[0].when


def test_an_end_is_committed_under_its_holding_as_it_was_seen() -> None:
    yard = ready()
    verdict = yard.judge(yard.ends(part := yard.end(5)))
    assert isinstance(verdict, Admitted)
    assert set(part.when) <= set(verdict.txn.nested[0].when)


@pytest.mark.parametrize("holding", [b"\xff", codec.encode_holding(Holding(7, lives.life_of("n1").id, 8.0))])
def test_an_end_is_of_the_attempt_that_is_held(holding: bytes) -> None:
    yard = ready()
    yard.put(keys.running(ME, FIVE), holding)
    value = codec.encode_task(
        lifecycle.ended(
            yard.task(5),
            Exit(Reason.EXIT, 0, started_ms=2500, ended_ms=3000),
            yard.get(keys.running(ME, FIVE)).created,
            cancel_requested=False,
            cancel_reason="",
            now_ms=4000,
        ).task
    )
    part = txn.finish(ME, FIVE, yard.get(keys.running(ME, FIVE)).created, value)
    yard.refuses(yard.ends(part), "not of this life")


def test_an_attempt_does_not_end_before_time() -> None:
    yard = ready()
    yard.refuses(yard.ends(yard.end(5, Exit(Reason.EXIT, 0, started_ms=2500, ended_ms=-5))), "no time")


def other_forms(part: Txn) -> list[Txn]:
    """The same with another kind of write, or one less or more."""
    then = part.then
    forms = [(*then[:i], Delete(w.key), *then[i + 1 :]) for i, w in enumerate(then)]
    forms += [then[1:], then[-1:], (then[0], *then)]
    return [replace(part, then=form) for form in forms if form != then]


def test_parts_of_another_form_are_refused_and_break_nothing() -> None:
    yard = ready()
    for form in other_forms(yard.claim(1)):
        assert isinstance(yard.judge(yard.claims(form)), Refused), form
    for end in (yard.end(5), yard.end(5, Exit(Reason.EXIT, 1, started_ms=2500, ended_ms=3000))):
        for form in other_forms(end):
            assert isinstance(yard.judge(yard.ends(form)), Refused), form


def again(yard: Yard, lease: LeaseId | None = None, **record: Any) -> Txn:
    """A node whose lease ran out goes on."""
    life, generation = yard.get(keys.incarnation(ME)).modified, yard.get(keys.GENERATION).modified
    value = lives.node_value("n1", **record)
    return txn.reattach(ME, yard.leases[ME] if lease is None else lease, value, life, generation, yard.acl())


ALONE: dict[str, Callable[[Yard], Txn]] = {
    "register": lambda y: y.register(),
    "reattach": again,
    "advertise": lambda y: txn.advertise(y.registration(), y.leases[ME], lives.node_value("n1")),
    "resume": lambda y: txn.resume(y.registration(), y.get(keys.incarnation(ME)).value),
    "renew": lambda y: txn.renew(y.registration()),
    "deregister": lambda y: txn.deregister(y.registration()),
}


@pytest.mark.parametrize("what", ALONE)
def test_no_guard_may_be_left_away_and_no_write_changed(what: str) -> None:
    """Also where the voter would put it in again: who leaves it away is not one of ours."""
    yard = Yard() if what == "register" else Yard().begin()
    body = ALONE[what](yard)
    assert isinstance(yard.judge(body), Admitted)
    for i in range(len(body.when)):
        yard.refuses(replace(body, when=(*body.when[:i], *body.when[i + 1 :])), "belongs to the life")
    for form in (*other_forms(body), replace(body, then=(*body.then, Put("/acl/policy")))):
        yard.refuses(form, "belongs to the life")


def test_a_node_goes_on_with_its_own_life_and_under_its_own_lease() -> None:
    yard = Yard().begin()
    assert isinstance(yard.judge(again(yard)), Admitted)
    yard.refuses(again(yard, incarnation=IncarnationId("another")), "another life")
    for lease in (yard.leases[OTHER], LeaseId(0)):
        assert isinstance(yard.judge(again(yard, lease)), Moot)


def test_no_lease_is_nobodys_lease() -> None:
    yard = Yard().begin()
    yard.put(keys.node(ME), lives.node_value("n1"))  # as a fault of ours might leave it: bound to no lease
    body = txn.advertise(yard.registration(), LeaseId(0), lives.node_value("n1"))
    assert isinstance(yard.judge(body), Moot)


def test_claims_under_a_registration_that_has_been_made_anew_are_moot() -> None:
    yard = Yard().submit(1).begin()
    old = yard.registration()
    yard.model.commit(Txn(then=(Delete(keys.node(ME)),)))
    yard.put(keys.node(ME), lives.node_value("n1"), yard.leases[ME])
    assert isinstance(yard.judge(txn.batch([yard.claim(1)], old.guards())), Moot)


def test_a_give_back_names_the_queue_as_the_voter_would() -> None:
    yard = ready()
    part = yard.end(5, Exit(Reason.EXIT, 1, started_ms=2500, ended_ms=3000))
    lie = replace(part, then=(part.then[0], Put(keys.queued(FIVE), b"\xff"), part.then[2]))
    verdict = yard.judge(yard.ends(lie))
    assert isinstance(verdict, Admitted)
    put = verdict.txn.nested[0].then[1]
    assert isinstance(put, Put)
    assert codec.decode_hint(put.value) is not None


def test_a_batch_has_no_guard_beside_its_own() -> None:
    """Or a worker could ask by it whether a key that it may not see is there."""
    yard = ready()
    asks = RevisionIs("/acl/token/abcdefgh", Revision(3))
    for body in (yard.claims(yard.claim(1)), yard.ends(yard.end(5))):
        yard.refuses(replace(body, when=(*body.when, asks)), "stands under its registration")
