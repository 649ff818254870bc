"""A revocation against everything that may be under way: from its revision on nothing of that node commits."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from spinetta import accesstxn, keys, txn
from spinetta.model import NodeId, Revision
from tests.unit.test_txn import (
    ACL,
    INC,
    LEADER,
    LEADERS_ACL,
    ME,
    Ground,
    Q,
    R,
    T,
    bare,
    cluster,
    condemned,
    condemned_with_running,
    lost,
    with_queued,
    with_running,
)

WRITES: dict[str, tuple[NodeId, Callable[[], Ground], Callable[[Ground], txn.Txn]]] = {
    "claim": (
        ME,
        with_queued,
        lambda g: txn.batch([txn.claim(ME, T, g.modified(Q), b"r", b"h")], g.registered().guards()),
    ),
    "finish": (
        ME,
        with_running,
        lambda g: txn.batch([txn.finish(ME, T, g.created(R), b"r")], _ends(g)),
    ),
    "give back": (
        ME,
        with_running,
        lambda g: txn.batch([txn.give_back(ME, T, g.modified(R), b"r", b"h")], _ends(g)),
    ),
    "renew": (ME, cluster, lambda g: txn.renew(g.registered())),
    "resume": (ME, cluster, lambda g: txn.resume(g.registered(), b"open")),
    "advertise": (ME, cluster, lambda g: txn.advertise(g.registered(), g.lease, b"n")),
    "deregister": (ME, cluster, lambda g: txn.deregister(g.registered())),
    "register": (ME, bare, lambda g: txn.register(ME, g.lease, b"n", b"i", Revision(0))),
    "reattach": (
        ME,
        lost,
        lambda g: txn.reattach(ME, g.lease, b"n", g.modified(INC), g.modified(keys.GENERATION), g.modified(ACL)),
    ),
    "concede": (ME, condemned, lambda g: txn.concede(ME, g.modified(INC), b"dead", g.modified(ACL))),
    "take office": (ME, bare, lambda g: txn.take_office(ME, g.lease, b"n1")),
    "condemn": (LEADER, lost, lambda g: txn.condemn(g.office_held(), ME, g.modified(INC), b"condemned")),
    "requeue": (
        LEADER,
        condemned_with_running,
        lambda g: txn.batch(
            [txn.give_back(ME, T, g.modified(R), b"r", b"h")],
            txn.requeue_guards(g.office_held(), ME, g.modified(INC)),
        ),
    ),
    "close": (LEADER, condemned, lambda g: txn.close(g.office_held(), ME, g.modified(INC))),
}


def _ends(ground: Ground) -> tuple[txn.Guard, ...]:
    return txn.finish_guards(ME, ground.modified(INC), ground.modified(ACL))


def revoke(ground: Ground, node: NodeId) -> None:
    key = ACL if node == ME else LEADERS_ACL
    change = accesstxn.Change(accesstxn.Seen(key, ground.modified(key)), b"revoked")
    assert isinstance(ground.etcd.commit(accesstxn.revoke_node(node, change, (), None, ())), txn.Committed)


@pytest.mark.parametrize("what", WRITES)
def test_what_is_under_way_when_its_node_is_thrown_out_comes_to_nothing(what: str) -> None:
    node, ground_of, build = WRITES[what]
    ground = ground_of()
    body = build(ground)
    revoke(ground, node)
    at = ground.etcd.revision
    assert isinstance(ground.etcd.commit(body), txn.Conflict)
    assert ground.etcd.revision == at


@pytest.mark.parametrize("what", ["claim", "finish", "give back", "renew", "condemn", "requeue", "close"])
def test_what_was_first_stands_and_the_revocation_takes_place_after_it(what: str) -> None:
    node, ground_of, build = WRITES[what]
    ground = ground_of()
    body = build(ground)
    assert isinstance(ground.etcd.commit(body), txn.Committed)
    revoke(ground, node)
    assert ground.etcd.get(keys.node(node)) is None


def test_the_revoked_are_condemned_and_their_tasks_put_back() -> None:
    ground = with_running()
    revoke(ground, ME)
    made = ground.etcd.commit(txn.condemn(ground.office_held(), ME, ground.modified(INC), b"condemned"))
    assert isinstance(made, txn.Committed)
    guards = txn.requeue_guards(ground.office_held(), ME, ground.modified(INC))
    body = txn.batch([txn.give_back(ME, T, ground.modified(R), b"r", b"h")], guards)
    assert ground.etcd.commit(body) == txn.Committed(ground.etcd.revision, (True,))
    assert ground.etcd.get(Q) is not None
    assert isinstance(ground.etcd.commit(txn.close(ground.office_held(), ME, ground.modified(INC))), txn.Committed)
