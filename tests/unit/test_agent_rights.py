"""Stories of nodes whose rights change under them: thrown out, forgotten, cleared for more or less."""

from __future__ import annotations

import pytest

from spinetta import keys, txn
from spinetta.events import (
    ClearancesChanged,
    Commit,
    Effect,
    LeaveWanted,
    List,
    Remember,
    RenewRuntime,
    Start,
    Stop,
)
from spinetta.model import NodeId, Outcome, Reason, State
from spinetta.session import Phase
from spinetta.settings import AgentSettings
from tests.builders import cpus, settings, spec, task_id
from tests.sim.direct import Direct, Node, commits, long_tasks, until_wanted, until_wanted_later
from tests.sim.shim_model import Script

ROOM = cpus(4, 1 << 33)


def secured(name: str = "n1", *, candidate: bool = True) -> AgentSettings:
    return settings(name, ROOM, secured=True, candidate=candidate)


def cluster(*names: str, labels: tuple[str, ...] = (), seconds: float = 1000.0) -> Direct:
    """Nodes that have been approved, and are up. The first of them leads."""
    d = Direct(script=lambda _: Script(seconds))
    for name in names:
        d.rights(name, *labels)
    for i, name in enumerate(names):
        d.add(secured(name, candidate=i < 3))
        d.run(d.now + 0.5)
    assert d.node(names[0]).agent.leading
    return d


def alone(*labels: str, seconds: float = 1000.0) -> tuple[Direct, Node]:
    d = cluster("n1", labels=labels, seconds=seconds)
    return d, d.node()


def holder(d: Direct, n: int = 1) -> Node:
    return d.node(d.task(task_id(n)).attempts[-1].node)


def written_by(effects: list[Effect]) -> list[Effect]:
    return [e for e in effects if isinstance(e, Commit)]


def queued_keys(d: Direct) -> list[str]:
    return [e.key for e in d.model.list(keys.QUEUED).entries]


def untouched(d: Direct, n: int = 1) -> bool:
    return queued_keys(d) == [keys.queued(task_id(n))] and d.task(task_id(n)).attempts_started == 0


# --- thrown out ----------------------------------------------------------------------------------------------------


def test_a_node_that_is_thrown_out_stops_all_and_its_task_runs_elsewhere() -> None:
    d = cluster("n1", "n2", "n3", seconds=12.0)
    for n in range(1, 7):
        d.submit(spec(n))
    d.run(d.now + 0.5)
    out = d.node("n2")
    held = [p.key for p in out.shim.alive()]
    assert held
    before = len(out.done)
    d.rights("n2", revoked=True)
    d.deliver()
    d.run(d.now + 0.1)
    assert out.agent.session.phase is Phase.REVOKED
    assert {e.key for e in out.done[before:] if isinstance(e, Stop)} == set(held)
    assert not out.shim.alive()
    d.run(d.now + 60.0)
    tasks = [d.task(task_id(n)) for n in range(1, 7)]
    assert {t.outcome for t in tasks} == {Outcome.SUCCEEDED}
    assert {t.attempts[-1].node for t in tasks} == {"n1", "n3"}
    again = [t for t in tasks if t.attempts_started == 2]
    assert [a.reason for t in again for a in t.attempts] == ["node-lost", "exit"] * len(held)
    assert written_by(out.done[before:]) == [], "it may not write anything"
    assert len([n for n in out.notices if "revoked" in n]) == 1
    assert out.agent.holdings.empty
    assert d.model.get(keys.incarnation(NodeId("n2"))) is None, "closed by the leader"


def test_the_leader_waits_for_what_a_node_that_was_thrown_out_may_still_run() -> None:
    """It may not be believed, and it may be cut off: nothing but the wait proves that its processes are gone."""
    d = cluster("n1", "n2", "n3")
    d.submit(spec(1, tags_required=()))
    d.run(d.now + 0.5)
    name = d.task(task_id(1)).attempts[-1].node
    d.nodes.pop(name)
    d.rights(name, revoked=True)
    at_s = d.now
    d.deliver()
    d.run(60.0, stop=lambda: d.task(task_id(1)).attempts_started == 2)
    assert d.now - at_s >= 8.0


def test_of_a_claim_under_way_nothing_comes() -> None:
    d, n1 = alone()
    d.submit(spec(1))
    claim = until_wanted(d, n1, commits("claim"))
    d.rights("n1", revoked=True)
    d.perform(n1, claim)
    d.run(d.now + 5.0)
    assert n1.agent.session.phase is Phase.REVOKED
    assert untouched(d)


def test_of_an_end_under_way_nothing_comes() -> None:
    d = cluster("n1", "n2", seconds=1.0)
    d.submit(spec(1))
    d.run(d.now + 0.5)
    out = holder(d)
    finish = until_wanted_later(d, out, commits("finish"))
    d.rights(out.settings.name, revoked=True)
    d.perform(out, finish)
    assert d.task(task_id(1)).state is State.RUNNING
    d.run(d.now + 40.0)
    task = d.task(task_id(1))
    first = task.attempts[0]
    assert (first.node, first.reason) == (out.settings.name, "node-lost")
    assert task.outcome is Outcome.SUCCEEDED
    assert task.attempts[-1].node != out.settings.name


def test_rights_written_anew_cost_no_result() -> None:
    """The guard of the end no longer holds; what is told is read again, and the end recorded under what stands now."""
    d, n1 = alone(seconds=1.0)
    d.submit(spec(1))
    finish = until_wanted_later(d, n1, commits("finish"))
    d.rights("n1", "red")
    d.perform(n1, finish)
    assert d.task(task_id(1)).state is State.RUNNING
    d.run(d.now + 3.0)
    task = d.task(task_id(1))
    assert (task.outcome, task.attempts_started) == (Outcome.SUCCEEDED, 1)


def test_a_node_that_was_thrown_out_stays_out_when_it_is_started_again() -> None:
    d = cluster("n1", "n2")
    d.submit(spec(1))
    d.run(d.now + 0.5)
    out = holder(d)
    out.watches.clear()
    d.rights(out.settings.name, revoked=True)
    before = len(out.done)
    d.restart(out)
    d.run(d.now + 30.0)
    assert out.agent.session.phase is Phase.REVOKED
    assert not out.shim.alive()
    assert written_by(out.done[before:]) == []
    assert not any(isinstance(e, Remember) for e in out.done[before:])


def test_one_that_was_thrown_out_and_is_told_to_leave_may_end() -> None:
    d, n1 = alone()
    d.submit(spec(1))
    d.run(d.now + 0.5)
    d.rights("n1", revoked=True)
    d.deliver()
    d.run(d.now + 1.0)
    assert not n1.agent.left
    d.tell(n1, LeaveWanted(release=False))
    d.run(d.now + 1.0)
    assert n1.agent.left


def test_those_who_were_thrown_out_are_no_mass_death() -> None:
    """Two of three: the leader would rather wait for an administrator, but it was one who did this."""
    d = cluster("n1", "n2", "n3")
    for n in range(1, 7):
        d.submit(spec(n))
    d.run(d.now + 0.5)
    for name in ("n2", "n3"):
        d.rights(name, revoked=True)
    d.deliver()
    d.run(d.now + 40.0)
    assert [e.key for e in d.model.list(keys.INCARNATION).entries] == [keys.incarnation(NodeId("n1"))]


# --- the leader ----------------------------------------------------------------------------------------------------


def test_a_leader_that_is_thrown_out_gives_up_the_office() -> None:
    d = cluster("n1", "n2", "n3")
    d.rights("n1", revoked=True)
    d.deliver()
    d.run(d.now + 0.5)
    assert not d.node("n1").agent.leading
    d.run(d.now + 5.0)
    assert [n.settings.name for n in d.nodes.values() if n.agent.leading] in (["n2"], ["n3"])
    assert not any(commits("office")(e) for e in d.node("n1").pending)


@pytest.mark.parametrize("duty", ["condemn", "requeue", "close"])
def test_a_duty_under_way_comes_to_nothing(duty: str) -> None:
    d = cluster("n1", "n2", "n3")
    for n in range(1, 7):
        d.submit(spec(n))
    d.run(d.now + 0.5)
    assert d.node("n2").shim.alive()
    d.nodes.pop(NodeId("n2"))
    leader = d.node("n1")
    while not any(_is_duty(duty)(e) for e in leader.pending):
        while any(n.pending for n in d.nodes.values()) and not any(_is_duty(duty)(e) for e in leader.pending):
            node = next(n for n in d.nodes.values() if n.pending)
            d.perform(node, node.pending.pop(0))
        if not any(_is_duty(duty)(e) for e in leader.pending):
            d.now = min(t for n in d.nodes.values() if (t := n.agent.next_s) is not None)
            d.model.advance(d.now)
            d.deliver()
            for node in d.nodes.values():
                d.tell(node)
    late = d.take(leader, _is_duty(duty))
    assert isinstance(late, Commit)
    d.rights("n1", revoked=True)
    assert isinstance(d.model.commit(late.txn), txn.Conflict)
    d.run(d.now + 60.0)
    assert d.model.get(keys.incarnation(NodeId("n2"))) is None, "the next leader has done it"


def _is_duty(step: str):  # type: ignore[no-untyped-def]
    return lambda e: isinstance(e, Commit) and getattr(e.tag, "step", "") == step


def test_a_leader_whose_rights_are_written_anew_leads_on() -> None:
    d = cluster("n1", "n2", "n3")
    d.rights("n1", "red")
    d.deliver()
    d.run(d.now + 0.5)
    assert d.node("n1").agent.leading
    d.nodes.pop(NodeId("n3"))
    d.run(d.now + 40.0)
    assert d.node("n1").agent.leading
    assert d.model.get(keys.incarnation(NodeId("n3"))) is None


def test_who_waits_for_a_lease_for_the_office_when_thrown_out_does_not_take_it() -> None:
    """Seed 2042: the lease came just after the news, and the office was guarded by the very record that forbade it."""
    d = cluster("n1", "n2")
    n2 = d.node("n2")
    d.node("n1").agent.leadership.resign()
    d.model.commit(txn.Txn(then=(txn.Delete(keys.OFFICE),)))
    d.deliver()
    grant = until_wanted(d, n2, lambda e: getattr(e, "tag", "") == "office")
    d.rights("n2", revoked=True)
    d.deliver()
    d.settle()
    d.perform(n2, grant)
    d.run(d.now + 0.5)
    office = d.model.get(keys.OFFICE)
    assert office is None or b"n2" not in office.value


def test_a_candidate_that_is_thrown_out_on_its_way_into_office_does_not_get_there() -> None:
    d = Direct()
    d.rights("n1")
    n1 = d.add(secured())
    take = until_wanted(d, n1, commits("office"))
    d.rights("n1", revoked=True)
    d.perform(n1, take)
    assert d.model.get(keys.OFFICE) is None
    d.run(d.now + 5.0)
    assert not n1.agent.leading
    assert d.model.get(keys.OFFICE) is None


# --- no rights, or none that can be read ---------------------------------------------------------------------------


def test_in_a_secured_cluster_nobody_does_anything_without_a_record() -> None:
    d = Direct(secured())
    n1 = d.node()
    d.submit(spec(1))
    d.run(10.0)
    assert n1.agent.session.phase is Phase.REVOKED
    assert written_by(n1.done) == []
    assert queued_keys(d)


def test_a_node_whose_record_is_gone_is_out() -> None:
    d = cluster("n1", "n2")
    d.submit(spec(1))
    d.run(d.now + 0.5)
    out = holder(d)
    name = out.settings.name
    d.model.commit(txn.Txn(then=(txn.Delete(keys.acl_node(name)), txn.Delete(keys.node(name)))))
    d.deliver()
    d.run(d.now + 4.0)
    assert out.agent.session.phase is Phase.REVOKED
    assert not out.shim.alive()
    d.run(d.now + 30.0)
    assert d.task(task_id(1)).attempts[-1].node != name


def test_a_record_that_cannot_be_read_is_neither_yes_nor_no() -> None:
    d, n1 = alone()
    d.submit(spec(1))
    d.run(d.now + 0.5)
    d.model.commit(txn.Txn(then=(txn.Put(keys.acl_node(NodeId("n1")), b"\xff\xff"),)))
    d.deliver()
    d.submit(spec(2))
    d.run(d.now + 3.0)
    assert n1.agent.session.phase is Phase.LOOKING
    assert [p.key for p in n1.shim.alive()] == [f"{task_id(1)}.1"]
    assert queued_keys(d) == [keys.queued(task_id(2))]
    d.rights("n1")
    d.run(d.now + 3.0)
    assert len(n1.shim.alive()) == 2
    assert d.task(task_id(1)).attempts_started == 1


# --- clearance -----------------------------------------------------------------------------------------------------


def test_rights_written_anew_disturb_nothing() -> None:
    """No lease is lost and no renewal is late, however often they are written."""
    d, n1 = alone("red")
    d.submit(spec(1, clearance=("red",)))
    d.run(d.now + 0.5)
    before, end_s = len(n1.done), d.now + 30.0
    n = 0
    while d.now < end_s:
        n += 1
        d.rights("n1", "red", f"more{n}")
        d.deliver()
        d.run(d.now + 0.4)
        assert d.model.get(keys.node(NodeId("n1"))) is not None
        assert d.now - (n1.agent.session.renewed_at_s or 0.0) <= 1.5
    done = n1.done[before:]
    assert not any(isinstance(e, Start | Stop) for e in done)
    assert any(isinstance(e, RenewRuntime) for e in done)
    assert d.task(task_id(1)).attempts_started == 1


def test_what_is_no_longer_covered_is_given_back_and_all_else_goes_on() -> None:
    d, n1 = alone("blue", "red")
    d.submit(spec(1, clearance=("red",)))
    d.submit(spec(2))
    d.submit(spec(3, clearance=("blue",)))
    d.run(d.now + 0.5)
    assert len(n1.shim.alive()) == 3
    d.rights("n1", "blue")
    d.deliver()
    d.run(d.now + 0.2)
    assert [p.key for p in n1.shim.alive()] == [f"{task_id(n)}.1" for n in (2, 3)]
    task = d.task(task_id(1))
    assert (task.state, task.attempts[-1].reason) == (State.QUEUED, Reason.RELEASED.value)
    d.run(d.now + 20.0)
    assert d.task(task_id(1)).attempts_started == 1, "nothing starts there without the label"
    assert n1.agent.session.record.clearances == ("blue",)
    d.rights("n1", "blue", "red")
    d.deliver()
    d.run(d.now + 3.0)
    assert d.task(task_id(1)).attempts_started == 2
    assert [d.task(task_id(n)).attempts_started for n in (2, 3)] == [1, 1]


def test_a_claim_under_way_does_not_outlive_the_label() -> None:
    d, n1 = alone("red")
    d.submit(spec(1, clearance=("red",)))
    claim = until_wanted(d, n1, commits("claim"))
    d.rights("n1")
    d.perform(n1, claim)
    d.run(d.now + 5.0)
    assert untouched(d)
    assert not n1.shim.alive()


def test_a_round_planned_under_old_rights_is_not_claimed_under_new_ones() -> None:
    """The records are read before the rights change, and heard of after the registration has been made anew."""
    d, n1 = alone("red")
    d.submit(spec(1, clearance=("red",)))
    read = until_wanted(d, n1, lambda e: getattr(e, "tag", "") == "claim")
    d.rights("n1")
    d.deliver()
    d.settle()
    assert n1.agent.session.registration is not None
    d.perform(n1, read)
    d.run(d.now + 5.0)
    assert untouched(d)


def test_a_claim_in_doubt_is_not_made_again_without_the_label() -> None:
    d, n1 = alone("red")
    d.submit(spec(1, clearance=("red",)))
    d.lose(n1, until_wanted(d, n1, commits("claim")))
    d.rights("n1")
    d.deliver()
    d.run(d.now + 5.0)
    assert untouched(d)
    assert n1.agent.claims.round is None, "and its room is free again"


def test_a_claim_in_doubt_that_was_won_before_is_given_back() -> None:
    d, n1 = alone("red")
    d.submit(spec(1, clearance=("red",)))
    d.lose(n1, until_wanted(d, n1, commits("claim")), arrives=True)
    d.rights("n1")
    d.deliver()
    d.run(d.now + 5.0)
    task = d.task(task_id(1))
    assert (task.state, task.attempts_started) == (State.QUEUED, 1)
    assert not any(isinstance(e, Start) for e in n1.done)


def test_the_shells_word_makes_it_look_at_once() -> None:
    d, n1 = alone("red")
    n1.watches.pop("rights")  # as on a worker, which has no such watch
    d.rights("n1")
    d.tell(n1, ClearancesChanged(()))
    d.settle()
    assert n1.agent.session.clearances == ()
    assert n1.agent.session.active


def test_in_an_open_cluster_the_shells_word_is_all_there_is() -> None:
    d = Direct(settings(), script=long_tasks)
    n1 = d.node()
    d.run(1.0)
    d.submit(spec(1, clearance=("red",)))
    d.run(d.now + 1.0)
    assert queued_keys(d)
    d.tell(n1, ClearancesChanged(("red",)))
    d.run(d.now + 1.0)
    assert len(n1.shim.alive()) == 1


def test_a_worker_has_no_watch_on_the_rights_of_others() -> None:
    d = Direct()
    d.rights("n1")
    n1 = d.add(secured(candidate=False))
    d.run(5.0)
    assert n1.agent.session.active
    assert not any(isinstance(e, List) and e.prefix.startswith(keys.ACL) for e in n1.done)
