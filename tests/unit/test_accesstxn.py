from __future__ import annotations

from spinetta import accesstxn, keys
from spinetta.accesstxn import Change, Seen
from spinetta.model import LeaseId, NodeId, Revision
from spinetta.txn import Absent, Delete, Put, RevisionIs, Txn

N = NodeId("n2")
ADMIN = RevisionIs("/acl/user/admin", Revision(9))
TOKEN = Change(Seen("/acl/token/t", Revision(5)), b"token")
ACL = Change(Seen("/acl/node/n2", Revision(0)), b"acl")
REQUEST = Seen("/acl/request/n2", Revision(4))
CA = Change(Seen("/trust/authority/cluster", Revision(2)), b"ca")
POLICY = Seen("/acl/policy", Revision(3))


def test_a_cluster_is_founded_once() -> None:
    txn = accesstxn.found([("/a", b"1"), ("/b", b"2")])
    assert txn == Txn(when=(Absent("/trust/authority/cluster"),), then=(Put("/a", b"1"), Put("/b", b"2")))


def test_a_token_is_redeemed_with_everything_that_it_gives() -> None:
    assert accesstxn.admit(TOKEN, ACL, [CA], [REQUEST, POLICY]) == Txn(
        when=(
            RevisionIs("/acl/request/n2", Revision(4)),
            RevisionIs("/acl/policy", Revision(3)),
            RevisionIs("/acl/token/t", Revision(5)),
            RevisionIs("/acl/node/n2", Revision(0)),
            RevisionIs("/trust/authority/cluster", Revision(2)),
        ),
        then=(Put("/acl/token/t", b"token"), Put("/acl/node/n2", b"acl"), Put("/trust/authority/cluster", b"ca")),
    )


def test_a_request_costs_a_use_and_needs_the_name_free() -> None:
    txn = accesstxn.knock(TOKEN, Change(REQUEST, b"r"), [ACL.seen, POLICY])
    assert set(txn.when) == {TOKEN.seen.guard(), REQUEST.guard(), ACL.seen.guard(), POLICY.guard()}
    assert txn.then == (Put("/acl/token/t", b"token"), Put("/acl/request/n2", b"r"))


def test_who_approves_must_still_be_an_administrator() -> None:
    txn = accesstxn.approve(REQUEST, ACL, [CA], [POLICY], (ADMIN,))
    assert set(txn.when) == {ADMIN, REQUEST.guard(), POLICY.guard(), ACL.seen.guard(), CA.seen.guard()}
    assert txn.then == (Put("/acl/node/n2", b"acl"), Put("/trust/authority/cluster", b"ca"), Delete("/acl/request/n2"))


def test_a_revoked_node_loses_its_registration_at_once() -> None:
    other = Seen("/acl/node/n1", Revision(7))
    txn = accesstxn.revoke_node(N, ACL, [CA], other, (ADMIN,))
    assert set(txn.when) == {ADMIN, other.guard(), ACL.seen.guard(), CA.seen.guard()}
    assert txn.then == (Put("/acl/node/n2", b"acl"), Put("/trust/authority/cluster", b"ca"), Delete(keys.node(N)))
    assert other.guard() not in accesstxn.revoke_node(N, ACL, [], None, (ADMIN,)).when


def test_a_record_goes_with_what_changes_with_it() -> None:
    txn = accesstxn.remove(REQUEST, (ADMIN,), [ACL], [POLICY])
    assert set(txn.when) == {ADMIN, REQUEST.guard(), POLICY.guard(), ACL.seen.guard()}
    assert txn.then == (Put("/acl/node/n2", b"acl"), Delete("/acl/request/n2"))


def test_one_voter_restarts_its_etcd_at_a_time() -> None:
    assert accesstxn.take_restart(N, LeaseId(3)) == Txn(
        when=(Absent(keys.ETCD_RESTART),), then=(Put(keys.ETCD_RESTART, b"n2", LeaseId(3)),)
    )
