"""A daemon that ends in order is waited for: its node's key hangs on a longer lease until the next one has come."""

from __future__ import annotations

import pytest

from spinetta import keys
from spinetta.events import Commit, GrantLease, LeaseGranted, PauseWanted, RevokeLease
from spinetta.model import LeaseId, NodeId, State
from spinetta.tenancy import RETRY_S, TAG, LeaseChange
from tests.builders import key_of, settings, spec, task_id
from tests.sim.direct import Direct, Node, commits, long_tasks, until_wanted

N2 = NodeId("n2")
PAUSE_S = 30


def two_nodes() -> tuple[Direct, Node]:
    """The second one runs a task; the first one leads."""
    d = Direct(settings("n1", grace_s=60.0), settings("n2", grace_s=60.0, candidate=False), script=long_tasks)
    d.run(1.0)
    d.node("n1").agent.draining = True
    d.submit(spec(1))
    d.run(d.now + 3.0)
    assert [p.key for p in d.node("n2").shim.alive()] == [key_of(1)]
    return d, d.node("n2")


def lease_of(d: Direct) -> tuple[LeaseId, float]:
    kv = d.model.get(keys.node(N2))
    assert kv is not None
    ttl_s = d.model.keep_alive(kv.lease)
    assert ttl_s is not None
    return kv.lease, ttl_s


def away(d: Direct, node: Node, for_s: float) -> None:
    del d.nodes[N2]
    d.run(d.now + for_s)
    d.nodes[N2] = node


def test_a_daemon_that_ends_in_order_may_be_away_for_longer_than_a_lease() -> None:
    d, n2 = two_nodes()
    short, _ = lease_of(d)
    d.tell(n2, PauseWanted(PAUSE_S))
    d.run(d.now + 0.5)
    assert n2.agent.session.paused
    assert lease_of(d)[1] == PAUSE_S
    assert d.model.keep_alive(short) is None, "nothing hangs on the one of before"
    away(d, n2, 5 * n2.settings.lease_ttl_s)
    d.restart(n2)
    d.run(d.now + 5.0)
    assert lease_of(d)[1] == n2.settings.lease_ttl_s, "from now on a death is noticed as before"
    task = d.task(task_id(1))
    assert (task.state, task.attempts_started, task.losses) == (State.RUNNING, 1, 0)
    assert [p.key for p in n2.shim.alive()] == [key_of(1)]


def test_a_daemon_that_dies_is_waited_for_a_lease_only() -> None:
    d, n2 = two_nodes()
    away(d, n2, 5 * n2.settings.lease_ttl_s)
    assert d.model.get(keys.node(N2)) is None


def test_one_that_does_not_come_back_is_given_up_in_the_end() -> None:
    d, n2 = two_nodes()
    d.tell(n2, PauseWanted(PAUSE_S))
    d.run(d.now + 0.5)
    away(d, n2, PAUSE_S + 90.0)
    task = d.task(task_id(1))
    assert (task.state, task.losses) == (State.QUEUED, 1)


@pytest.mark.parametrize("arrives", [False, True])
def test_when_the_answer_is_lost_the_key_is_put_again_under_the_lease_that_is_kept(arrives: bool) -> None:
    d, n2 = two_nodes()
    short, _ = lease_of(d)
    d.tell(n2, PauseWanted(PAUSE_S))
    d.perform(n2, d.take(n2, lambda e: isinstance(e, GrantLease)))
    d.lose(n2, until_wanted(d, n2, commits("advertise")), arrives=arrives)
    (again,) = [e for e in [until_wanted(d, n2, commits("advertise"))] if isinstance(e, Commit)]
    d.perform(n2, again)
    assert lease_of(d)[0] == short
    d.run(d.now + RETRY_S + 1.0)
    assert n2.agent.session.paused
    assert lease_of(d)[1] == PAUSE_S
    assert d.task(task_id(1)).attempts_started == 1


def test_a_key_is_changed_to_its_own_lease_without_losing_it() -> None:
    """The change was made, its answer lost, and the node has read what the store says meanwhile."""
    d, n2 = two_nodes()
    d.tell(n2, PauseWanted(PAUSE_S))
    d.perform(n2, d.take(n2, lambda e: isinstance(e, GrantLease)))
    d.lose(n2, until_wanted(d, n2, commits("advertise")), arrives=True)
    n2.agent.session.suspect(d.now)
    d.tell(n2)
    d.run(d.now + RETRY_S + 2.0)
    assert lease_of(d)[1] == PAUSE_S
    assert d.model.get(keys.node(N2)) is not None
    assert d.task(task_id(1)).attempts_started == 1


def test_a_shorter_pause_than_a_lease_needs_nothing() -> None:
    d, n2 = two_nodes()
    d.tell(n2, PauseWanted(n2.settings.lease_ttl_s))
    assert n2.agent.session.paused
    assert not [e for e in n2.pending if isinstance(e, GrantLease)]


# --- the change by itself ------------------------------------------------------------------------------------------


def test_a_lease_that_was_not_to_be_had_is_asked_for_again() -> None:
    change = LeaseChange()
    assert change.poll(0.0) == []
    change.want(20)
    assert change.poll(0.0) == [GrantLease(TAG, 20)]
    assert change.poll(0.0) == [], "one at a time"
    change.granted(LeaseGranted(TAG, None), 1.0)
    assert change.next_s == 1.0 + RETRY_S
    assert change.poll(1.1) == []
    assert change.poll(1.0 + RETRY_S) == [GrantLease(TAG, 20)]
    change.granted(LeaseGranted(TAG, LeaseId(9)), 8.0)
    assert (change.lease, change.wanted) == (LeaseId(9), True)
    assert change.poll(100.0) == [], "nothing more is to be asked for"
    change.done()
    assert not change.wanted


@pytest.mark.parametrize("well", [True, False])
def test_what_is_wanted_during_a_change_comes_after_it(well: bool) -> None:
    """A daemon that is told to end just after its start: it has not put its key under a short lease yet."""
    change = LeaseChange()
    change.want(5)
    assert change.poll(0.0) == [GrantLease(TAG, 5)]
    change.want(60)
    change.granted(LeaseGranted(TAG, LeaseId(9)), 1.0)
    assert change.poll(1.0) == []
    if well:
        change.done()
    else:
        change.failed(1.0)
    assert change.wanted
    assert change.poll(1.0 + RETRY_S) == [GrantLease(TAG, 60)]
    change.granted(LeaseGranted(TAG, LeaseId(10)), 7.0)
    change.done()
    assert not change.wanted


def test_a_lease_that_nobody_waits_for_any_more_is_given_up() -> None:
    change = LeaseChange()
    change.want(20)
    change.poll(0.0)
    change.done()
    assert change.granted(LeaseGranted(TAG, LeaseId(9)), 1.0) == [RevokeLease(LeaseId(9))]


def test_a_change_that_failed_is_made_anew_with_another_lease() -> None:
    change = LeaseChange()
    change.want(20)
    change.poll(0.0)
    change.granted(LeaseGranted(TAG, LeaseId(9)), 1.0)
    change.failed(1.0)
    assert change.lease is None
    assert change.poll(1.0 + RETRY_S) == [GrantLease(TAG, 20)]
