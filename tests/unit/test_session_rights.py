"""A node's membership and its rights: what it makes of a record that changed, forbids, is gone or cannot be read."""

from __future__ import annotations

import pytest

from spinetta import keys, trustcodec, txn
from spinetta.access import NodeAcl, NodeRole
from spinetta.events import (
    Commit,
    CommitDone,
    Entry,
    KeepAlive,
    LeaseGranted,
    Notice,
    ReadDone,
    RenewRuntime,
    RevokeLease,
)
from spinetta.model import LeaseId, Life, Revision
from spinetta.session import POLL_S, REFUSED_AFTER_S, RETRY_S, Phase, Session
from tests.builders import entry, settings
from tests.unit.test_session import LEASE, LIFE, ME, begun, commit_of, life_entry, node_entry, says

ACL_AT = Revision(15)


def acl_entry(at: int = ACL_AT, *labels: str, revoked: bool = False, reason: str = "") -> Entry:
    record = NodeAcl(ME, NodeRole.WORKER, labels, effective=labels, revoked=revoked, reason=reason)
    return entry(keys.acl_node(ME), trustcodec.encode(record), ACL_AT, at)


def approved() -> Session:
    """Active, under the rights of a secured cluster."""
    session = begun(LIFE)
    session.read_done(says(node_entry(), life_entry(), None, acl_entry()), 0.0, nothing_runs=True)
    session.commit_done(CommitDone("resume", txn.Committed(Revision(22))), 0.0)
    session.poll(0.0)
    session.read_done(says(node_entry(), life_entry(at=22), None, acl_entry()), 0.0, nothing_runs=True)
    session.poll(0.0)
    assert session.commit_done(CommitDone("renew", txn.Committed(Revision(40))), 0.1) == [RenewRuntime(0.0)]
    assert session.active
    return session


def hears(session: Session, acl: Entry | None, now: float, *, nothing_runs: bool = False) -> list[object]:
    """A guarded write was refused; it reads again, and this is its record."""
    session.suspect(now)
    session.poll(now)
    return list(session.read_done(says(node_entry(), life_entry(at=22), None, acl), now, nothing_runs=nothing_runs))


def test_every_write_is_under_the_rights_that_were_read() -> None:
    session = approved()
    assert session.registration is not None
    assert session.registration.acl_revision == session.acl_seen == ACL_AT
    assert txn.RevisionIs(keys.acl_node(ME), ACL_AT) in session.registration.guards()


def test_a_registration_is_under_them_too() -> None:
    session = begun()
    session.read_done(says(acl=acl_entry()), 0.0, nothing_runs=True)
    session.lease_granted(LeaseGranted("self", LEASE), 0.0)
    (commit,) = session._commit_registration()
    assert isinstance(commit, Commit)
    assert txn.RevisionIs(keys.acl_node(ME), ACL_AT) in commit.txn.when


def test_rights_written_anew_are_renewed_under_at_once() -> None:
    session = approved()
    assert hears(session, acl_entry(50, "red"), 0.5) == []
    assert session.active
    assert session.may_start, "what was renewed before still counts"
    assert not session.must_stop
    assert session.clearances == ("red",)
    effects = session.poll(0.5)
    renewal = commit_of(effects, "renew")
    assert txn.RevisionIs(keys.acl_node(ME), Revision(50)) in renewal.when


def test_a_node_thrown_out_stops_and_says_so_once() -> None:
    session = approved()
    (notice,) = hears(session, acl_entry(50, revoked=True, reason="stolen"), 0.5)
    assert isinstance(notice, Notice)
    assert "stolen" in notice.text
    assert session.phase is Phase.REVOKED
    assert session.must_stop
    assert not session.active
    assert session.registration is None
    assert session.life_seen == 0, "no end is recorded any more"
    assert session.acl_seen == ACL_AT, "and nothing is ever guarded by that record"


def test_nothing_brings_it_back() -> None:
    session = approved()
    hears(session, acl_entry(50, revoked=True), 0.5, nothing_runs=True)
    session.suspect(1.0)
    session.look_again(1.0)
    session.begin(1.0)
    assert session.next_s is None
    assert session.poll(100.0) == []
    assert session.deregister() == []
    assert session.lease_granted(LeaseGranted("self", LeaseId(9)), 1.0) == [RevokeLease(LeaseId(9))]
    for tag in ("renew", "advertise", "register", "concede", "resume"):
        session.commit_done(CommitDone(tag, txn.Conflict(Revision(60))), 2.0)
    assert session.phase is Phase.REVOKED
    assert session.poll(200.0) == []


def test_a_condemned_node_that_was_thrown_out_does_not_concede() -> None:
    session = begun(LIFE)
    reading = says(None, life_entry(Life.CONDEMNED), None, acl_entry(50, revoked=True))
    (notice,) = session.read_done(reading, 0.0, nothing_runs=True)
    assert isinstance(notice, Notice)
    assert session.poll(POLL_S) == []


def test_a_record_that_is_gone_after_it_was_seen() -> None:
    session = approved()
    (notice,) = hears(session, None, 0.5)
    assert isinstance(notice, Notice)
    assert "removed" in notice.text
    assert session.phase is Phase.REVOKED


@pytest.mark.parametrize(("secured", "phase"), [(True, Phase.REVOKED), (False, Phase.JOINING)])
def test_no_record_at_all(secured: bool, phase: Phase) -> None:
    session = Session(settings(secured=secured), None)
    session.begin(0.0)
    session.poll(0.0)
    session.read_done(says(), 0.0, nothing_runs=True)
    assert session.phase is phase


def test_a_record_that_cannot_be_read_stops_nothing_and_allows_nothing() -> None:
    session = approved()
    (notice,) = hears(session, entry(keys.acl_node(ME), b"\xff\xff", 15, 50), 0.5)
    assert isinstance(notice, Notice)
    assert session.phase is Phase.LOOKING
    assert not session.must_stop
    assert session.registration is None
    assert session.next_s == 0.5 + POLL_S
    session.poll(1.5)
    session.read_done(says(node_entry(), life_entry(at=22), None, acl_entry(60)), 1.6, nothing_runs=False)
    assert session.active


def test_to_look_again_disturbs_nothing() -> None:
    session = approved()
    session.look_again(0.5)
    assert session.active
    effects = session.poll(0.5)
    assert session.active
    session.read_done(says(node_entry(), life_entry(at=22), None, acl_entry()), 0.6, nothing_runs=False)
    assert session.active
    assert effects
    assert all(not isinstance(e, KeepAlive) or e.lease == LEASE for e in session.poll(0.6))


# --- refused by a voter --------------------------------------------------------------------------------------------


def test_one_refusal_stops_nothing() -> None:
    session = approved()
    assert session.refused("unknown", 1.0) == []
    assert session.active
    session.poll(1.0 + RETRY_S)
    session.read_done(says(node_entry(), life_entry(at=22), None, acl_entry()), 1.6, nothing_runs=False)
    assert session.refused("unknown", 1.0 + REFUSED_AFTER_S) == [], "it has been let in meanwhile"
    assert session.active


def test_who_is_refused_for_a_while_stops_says_so_and_keeps_asking() -> None:
    session = approved()
    session.refused("node n1 has been revoked", 1.0)
    (notice,) = session.refused("node n1 has been revoked", 1.0 + REFUSED_AFTER_S)
    assert isinstance(notice, Notice)
    assert "has been revoked" in notice.text
    assert session.must_stop
    assert session.registration is None
    assert session.refused("node n1 has been revoked", 5.0) == [], "once"
    session.poll(6.0)
    session.read_done(ReadDone("self", None), 6.0, nothing_runs=True)
    assert session.next_s == 6.0 + RETRY_S
    session.poll(7.0)
    session.read_done(says(None, life_entry(at=22), None, acl_entry(50)), 7.1, nothing_runs=True)
    assert not session.must_stop
    assert session.phase is Phase.JOINING
