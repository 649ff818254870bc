"""The leader and rights: its own, under which it writes, and those of nodes that have been thrown out."""

from __future__ import annotations

from dataclasses import dataclass, replace

from spinetta import codec, keys, txn
from spinetta.events import CaseTag, Commit, CommitDone, Effect, GrantLease, LeaseGranted, Notice, RevokeLease
from spinetta.model import Life, NodeId, Revision
from spinetta.recover import RETRY_S
from spinetta.standing import Rights
from tests.unit import test_recover
from tests.unit.test_recover import CONDEMNED_AT, LEASE, LOST, ME, OFFICE_AT, life, registered

OWN_AT = Revision(15)
MINE = Rights(OWN_AT)
THROWN_OUT = replace(MINE, may_lead=False)


@dataclass
class Bench(test_recover.Bench):
    """A leader that has been approved."""

    rights: Rights = MINE

    def poll(self, now: float | None = None) -> list[Effect]:
        self.now = self.now if now is None else now
        return self.leader.poll(self.now, self.office, self.nodes, self.lives, self.own, self.rights)


def elected() -> Bench:
    b = Bench()
    assert b.poll() == [GrantLease("office", 3)]
    (take,) = b.leader.lease_granted(LeaseGranted("office", LEASE), b.now)
    assert take == Commit("office", txn.take_office(ME, LEASE, codec.encode_office(ME), OWN_AT))
    b.leader.office_answered(CommitDone("office", txn.Committed(OFFICE_AT)), b.now)
    b.poll()
    b.kept()
    b.show(life(ME), registered(ME))
    return b


def test_it_writes_under_its_rights_as_they_are_now() -> None:
    b = elected()
    b.show(life(LOST))
    b.rights = Rights(Revision(90))
    (commit,) = b.duties()
    assert isinstance(commit, Commit)
    assert txn.RevisionIs(keys.acl_node(ME), Revision(90)) in commit.txn.when


def test_a_refused_duty_is_tried_again_under_new_ones() -> None:
    b = elected()
    b.show(life(LOST))
    (first,) = b.duties()
    b.leader.condemned(LOST, b.now)
    assert b.duties() == []
    b.rights = Rights(Revision(90))
    (again,) = b.duties(b.now + RETRY_S)
    assert first != again


def test_thrown_out_it_gives_the_office_up() -> None:
    b = elected()
    b.show(life(LOST, Life.CONDEMNED, CONDEMNED_AT))
    b.rights = THROWN_OUT
    assert b.poll() == [RevokeLease(LEASE)]
    assert not b.leader.leading
    assert b.leader.next_s(office_taken=False) is None
    assert b.poll(b.now + 10.0) == []


def test_who_may_not_lead_does_not_stand() -> None:
    b = Bench(rights=THROWN_OUT)
    assert b.poll() == []
    assert b.leader.next_s(office_taken=False) is None


def test_a_lease_that_comes_after_the_news_is_given_back() -> None:
    b = Bench()
    assert b.poll() == [GrantLease("office", 3)]
    b.rights = THROWN_OUT
    b.poll()
    assert b.leader.lease_granted(LeaseGranted("office", LEASE), b.now) == [RevokeLease(LEASE)]


def test_the_dead_that_were_thrown_out_are_believed_to_be_dead() -> None:
    b = elected()
    gone = [NodeId(f"n{n}") for n in (2, 3, 4)]
    b.show(*(life(n) for n in gone), life(NodeId("n5")), registered(NodeId("n5")))
    (notice,) = b.duties()
    assert isinstance(notice, Notice), "three of five at once"
    b.rights = replace(MINE, revoked=frozenset(gone))
    assert [e.tag for e in b.duties() if isinstance(e, Commit)] == [CaseTag("condemn", n, Revision(10)) for n in gone]
    assert not b.leader.braking


def test_those_besides_are_still_not_believed() -> None:
    b = elected()
    names = [NodeId(f"n{n}") for n in (2, 3, 4)]
    b.show(*(life(n) for n in names))
    b.rights = replace(MINE, revoked=frozenset({NodeId("n2")}))
    effects = b.duties()
    assert [e.tag for e in effects if isinstance(e, Commit)] == [CaseTag("condemn", NodeId("n2"), Revision(10))]
    assert b.leader.braking
    assert any(isinstance(e, Notice) and "2 of 3" in e.text for e in effects)
