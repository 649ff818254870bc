"""The agent as a whole, driven by hand: one node or few, every effect in order, on the model of etcd."""

from __future__ import annotations

from collections.abc import Callable

from spinetta import keys, txn
from spinetta.events import (
    AttemptEnded,
    Commit,
    CommitDone,
    Effect,
    GrantLease,
    LeaveWanted,
    List,
    ListRuntime,
    Remember,
    RuntimeListed,
    SetCandidate,
    SetDraining,
    Start,
    Stop,
    Watch,
)
from spinetta.holdings import Step
from spinetta.model import NodeId, Outcome, Reason, State
from spinetta.session import Phase
from tests.builders import cpus, settings, spec, task_id
from tests.sim.direct import Direct, Node, answer_of
from tests.sim.shim_model import Script


def commits(tag: str) -> Callable[[Effect], bool]:
    return lambda e: isinstance(e, Commit) and e.tag == tag


def until_wanted(d: Direct, node: Node, wanted: Callable[[Effect], bool]) -> Effect:
    """Carry out what comes before; what is wanted is taken out and returned, not yet done."""
    for _ in range(2000):
        if any(wanted(e) for e in node.pending):
            return d.take(node, wanted)
        if node.pending:
            d.perform(node, node.pending.pop(0))
        else:
            assert node.agent.next_s is not None
            d.now = max(d.now, node.agent.next_s)
            d.model.advance(d.now)
            d.tell(node)
    raise AssertionError("it never wants that")


def long_tasks(_: Start) -> Script:
    return Script(1000.0)


def test_a_node_registers_claims_starts_and_finishes() -> None:
    d = Direct(settings())
    n1 = d.node()
    d.submit(spec(1))
    d.run(0.5)
    assert n1.agent.session.phase is Phase.ACTIVE
    assert d.task(task_id(1)).state is State.RUNNING
    assert len(n1.shim.alive()) == 1
    d.run(3.0)
    task = d.task(task_id(1))
    assert (task.state, task.outcome, task.attempts_started) == (State.COMPLETE, Outcome.SUCCEEDED, 1)
    assert n1.agent.holdings.empty
    assert not n1.shim.held
    assert sum(isinstance(e, Start) for e in n1.done) == 1


def test_many_tasks_on_three_nodes() -> None:
    d = Direct(settings("n1"), settings("n2"), settings("n3"))
    d.run(1.0)
    for n in range(1, 41):
        d.submit(spec(n))
    d.run(20.0)
    assert {d.task(task_id(n)).outcome for n in range(1, 41)} == {Outcome.SUCCEEDED}
    ran_at = {d.task(task_id(n)).attempts[-1].node for n in range(1, 41)}
    assert ran_at == {"n1", "n2", "n3"}
    assert sum(n.agent.leading for n in d.nodes.values()) == 1


def test_at_rest_little_happens() -> None:
    d = Direct(settings())
    d.run(5.0)
    n1 = d.node()
    before = len(n1.done)
    d.run(15.0)
    assert (len(n1.done) - before) / 10 < 10, n1.done[before:]


def test_a_restarted_daemon_goes_on() -> None:
    d = Direct(settings())
    n1 = d.node()
    d.submit(spec(1))
    d.run(0.5)
    started = sum(isinstance(e, Start) for e in n1.done)
    d.restart(n1)
    d.run(4.0)
    assert d.task(task_id(1)).outcome is Outcome.SUCCEEDED
    assert sum(isinstance(e, Start) for e in n1.done) == started == 1


def test_a_dead_node_is_condemned_and_its_task_runs_elsewhere() -> None:
    d = Direct(settings("n1"), settings("n2"))
    d.submit(spec(1))
    d.run(0.5)
    holder = d.task(task_id(1)).attempts[-1].node
    dead = d.nodes.pop(holder)
    assert len(dead.shim.alive()) == 1
    d.run(30.0)
    task = d.task(task_id(1))
    assert task.outcome is Outcome.SUCCEEDED
    assert task.attempts_started == 2
    assert task.losses == 1
    assert d.model.get(keys.incarnation(holder)) is None


def test_a_cancelled_task_is_stopped() -> None:
    d = Direct(settings())
    d.submit(spec(1))
    d.run(0.5)
    d.cancel(task_id(1))
    d.run(0.6)
    assert d.task(task_id(1)).outcome is Outcome.CANCELLED
    assert d.node().agent.holdings.empty


def test_leaving_deregisters() -> None:
    d = Direct(settings())
    d.submit(spec(1))
    d.run(0.5)
    d.tell(d.node(), LeaveWanted(release=False))
    d.run(4.0)
    assert d.node().agent.left
    assert d.task(task_id(1)).outcome is Outcome.SUCCEEDED
    assert d.model.get(keys.node(NodeId("n1"))) is None
    assert d.model.get(keys.incarnation(NodeId("n1"))) is None


def test_a_claim_whose_answer_was_lost_is_read_back() -> None:
    for arrives in (False, True):
        d = Direct(settings())
        n1 = d.node()
        d.run(1.0)
        d.submit(spec(1))
        while not any(isinstance(e, Commit) and e.tag == "claim" for e in n1.pending):
            d.perform(n1, n1.pending.pop(0))
        d.lose(n1, d.take(n1, lambda e: isinstance(e, Commit) and e.tag == "claim"), arrives=arrives)
        d.run(5.0)
        task = d.task(task_id(1))
        assert (task.outcome, task.attempts_started) == (Outcome.SUCCEEDED, 1)


# --- lost answers --------------------------------------------------------------------------------------------------


def test_a_claim_made_again_may_lose_to_its_own_first_proposal() -> None:
    """The first proposal commits after the reading back: its room must not be given away, and its task is run."""
    d = Direct(settings(capacity=cpus(1, 1 << 33)), script=long_tasks)
    n1 = d.node()
    d.run(1.0)
    d.submit(spec(1))
    first = until_wanted(d, n1, commits("claim"))
    d.lose(n1, first)
    again = until_wanted(d, n1, commits("claim"))
    n1.watches.pop("mine")  # the watch is slower than all this
    assert isinstance(answer_of(d.model, first), CommitDone)
    d.submit(spec(2))
    d.perform(n1, again)
    d.run(d.now + 3.0)
    running = [e.key for e in d.model.list(keys.running_on(n1.settings.name)).entries]
    assert running == [keys.running(n1.settings.name, task_id(1))]
    assert len(n1.shim.alive()) == 1


def test_an_end_whose_answer_was_lost_is_read_back() -> None:
    for arrives in (False, True):
        d = Direct(settings())
        n1 = d.node()
        d.submit(spec(1))
        d.lose(n1, until_wanted_later(d, n1, commits("finish")), arrives=arrives)
        d.run(d.now + 3.0)
        assert d.task(task_id(1)).outcome is Outcome.SUCCEEDED
        assert n1.agent.holdings.empty


def until_wanted_later(d: Direct, node: Node, wanted: Callable[[Effect], bool]) -> Effect:
    """As `until_wanted`, letting processes end meanwhile."""
    for _ in range(2000):
        if any(wanted(e) for e in node.pending):
            return d.take(node, wanted)
        if node.pending:
            d.perform(node, node.pending.pop(0))
            continue
        assert node.agent.next_s is not None
        d.now = max(d.now, min(node.agent.next_s, node.shim.next_s))
        d.model.advance(d.now)
        for process in node.shim.advance(d.now):
            assert process.exit is not None
            d.tell(node, AttemptEnded(process.key, process.exit))
        d.tell(node)
    raise AssertionError("it never wants that")


def test_a_start_that_was_not_answered_is_looked_up_not_guessed() -> None:
    """Cancelled meanwhile: the attempt must not be called 'not started' while its process runs."""
    for arrives in (False, True):
        d = Direct(settings(), script=long_tasks)
        n1 = d.node()
        d.submit(spec(1))
        start = until_wanted(d, n1, lambda e: isinstance(e, Start))
        if arrives:
            assert isinstance(start, Start)
            n1.shim.start(start, d.now)
        d.cancel(task_id(1))
        d.lose(n1, start)
        d.settle()
        assert d.task(task_id(1)).state is State.RUNNING
        assert not n1.agent.holdings.nothing_runs
        d.run(d.now + 2.0)
        assert any(isinstance(e, ListRuntime) for e in n1.done)
        assert d.task(task_id(1)).outcome is Outcome.CANCELLED
        assert not n1.shim.alive()
        assert n1.agent.holdings.nothing_runs


def test_a_request_to_end_is_made_again() -> None:
    d = Direct(settings(), script=long_tasks)
    n1 = d.node()
    d.submit(spec(1))
    d.run(0.5)
    d.cancel(task_id(1))
    lost = d.take(n1, lambda e: isinstance(e, Stop))
    assert lost == Stop(f"{task_id(1)}.1", Reason.CANCELLED.value)
    d.run(d.now + 3.0)
    assert len(n1.shim.alive()) == 1
    d.run(d.now + 3.0)
    assert d.task(task_id(1)).outcome is Outcome.CANCELLED


def test_a_registration_whose_answer_was_lost_is_recognised() -> None:
    for arrives in (False, True):
        d = Direct(settings())
        n1 = d.node()
        d.lose(n1, until_wanted(d, n1, commits("register")), arrives=arrives)
        d.run(5.0)
        assert n1.agent.session.phase is Phase.ACTIVE
        assert d.model.get(keys.incarnation(n1.settings.name)) is not None


def test_a_registration_that_commits_late_is_recognised() -> None:
    """It was read back as 'not there', and another is under way when it commits after all."""
    d = Direct(settings())
    n1 = d.node()
    first = until_wanted(d, n1, commits("register"))
    d.lose(n1, first)
    second = until_wanted(d, n1, commits("register"))
    answer_of(d.model, first)
    d.perform(n1, second)
    d.run(8.0)
    assert n1.agent.session.phase is Phase.ACTIVE


def test_leaving_ends_when_its_answer_was_lost() -> None:
    d = Direct(settings())
    n1 = d.node()
    d.run(1.0)
    d.tell(n1, LeaveWanted(release=False))
    d.lose(n1, until_wanted(d, n1, commits("deregister")), arrives=True)
    d.run(3.0)
    assert n1.agent.left
    assert d.model.get(keys.incarnation(n1.settings.name)) is None


# --- lives ---------------------------------------------------------------------------------------------------------


def test_a_name_used_twice_is_refused_and_harmless() -> None:
    """The second must neither run, nor give back, nor end what the first holds under their name."""
    d = Direct(settings(), script=long_tasks)
    n1 = d.node()
    d.submit(spec(1))
    d.run(0.5)
    other = Direct.add(d, settings(), None)  # takes the first one's place in the table; that one goes on below
    d.nodes[NodeId("first")] = n1
    d.run(10.0)
    assert other.agent.session.phase is Phase.WAITING
    assert any("alive in this cluster elsewhere" in n for n in other.notices)
    assert not any(isinstance(e, Start | Stop) for e in other.done)
    assert d.task(task_id(1)).state is State.RUNNING
    assert len(n1.shim.alive()) == 1
    assert n1.agent.session.phase is Phase.ACTIVE


def test_a_single_node_that_lost_its_disk_ends_its_own_earlier_life() -> None:
    d = Direct(settings())
    n1 = d.node()
    d.submit(spec(1))
    d.run(0.5)
    n1.shim.held.clear()
    n1.disk = None
    d.restart(n1)
    d.run(30.0)
    assert n1.agent.session.phase is Phase.ACTIVE
    task = d.task(task_id(1))
    assert (task.outcome, task.losses) == (Outcome.SUCCEEDED, 1)


def test_a_condemned_node_stops_all_says_so_and_begins_again() -> None:
    """Its grace is long: without its word the leader would have to wait for it."""
    slow = settings("n1", grace_s=1000.0)
    d = Direct(slow, settings("n2", capacity=cpus(0.5)), script=lambda s: Script(1000.0 if s.attempt == 1 else 1.0))
    n1 = d.node("n1")
    d.submit(spec(1))
    d.run(0.5)
    life = n1.agent.session.incarnation
    del d.nodes[NodeId("n1")]  # its daemon is not run for a while
    d.run(8.0)
    assert d.model.get(keys.node(NodeId("n1"))) is None
    d.nodes[NodeId("n1")] = n1
    d.run(20.0)
    assert n1.agent.session.phase is Phase.ACTIVE
    assert n1.agent.session.incarnation != life
    task = d.task(task_id(1))
    assert (task.outcome, task.attempts_started, task.losses) == (Outcome.SUCCEEDED, 2, 1)


def test_a_lease_that_ran_out_does_not_end_the_life() -> None:
    """Nobody condemned it: the node registers again under the same incarnation, and its task runs on."""
    d = Direct(settings(), script=lambda _: Script(6.0))
    n1 = d.node()
    d.submit(spec(1))
    d.run(0.5)
    lease = n1.agent.session.lease
    assert lease is not None
    d.model.expire(lease)
    d.run(10.0)
    task = d.task(task_id(1))
    assert (task.outcome, task.attempts_started) == (Outcome.SUCCEEDED, 1)


def test_an_incarnation_is_on_disk_before_it_is_registered() -> None:
    d = Direct(settings())
    n1 = d.node()
    remember = until_wanted(d, n1, lambda e: isinstance(e, Remember))
    d.settle()
    assert not any(commits("register")(e) for e in [*n1.done, *n1.pending])
    d.lose(n1, remember)
    d.run(5.0)
    assert n1.agent.session.phase is Phase.ACTIVE
    assert n1.disk == n1.agent.session.incarnation


def test_two_leases_under_way_register_once_it_is_on_disk() -> None:
    """A suspicion while the first lease is still being granted must not lead to a registration that is not on disk."""
    d = Direct(settings())
    n1 = d.node()
    remember = until_wanted(d, n1, lambda e: isinstance(e, Remember))
    n1.agent.session.suspect(d.now)
    d.run(3.0)
    assert not any(commits("register")(e) for e in n1.done)
    assert sum(isinstance(e, GrantLease) and e.tag == "self" for e in n1.done) == 1
    d.perform(n1, remember)
    d.run(5.0)
    assert n1.agent.session.phase is Phase.ACTIVE


# --- the daemon alone ----------------------------------------------------------------------------------------------


def test_claims_of_a_dead_daemon_come_too_late() -> None:
    d = Direct(settings(capacity=cpus(1, 1 << 33)), script=long_tasks)
    n1 = d.node()
    d.run(1.0)
    d.submit(spec(1))
    late = until_wanted(d, n1, commits("claim"))
    assert isinstance(late, Commit)
    d.restart(n1)
    d.submit(spec(2))
    d.run(d.now + 2.0)
    assert isinstance(d.model.commit(late.txn), txn.Conflict)


def test_a_claim_committed_between_listing_and_registration_is_counted() -> None:
    """The next daemon lists what it holds, then a claim of the one before commits, then it goes on with the life."""
    d = Direct(settings(capacity=cpus(1, 1 << 33)), script=long_tasks)
    n1 = d.node()
    d.run(1.0)
    d.submit(spec(1))
    late = until_wanted(d, n1, commits("claim"))
    assert isinstance(late, Commit)
    d.restart(n1)
    resume = until_wanted(d, n1, commits("resume"))
    d.settle()
    n1.watches.pop("mine")  # the watch lags
    assert isinstance(d.model.commit(late.txn), txn.Committed)
    d.submit(spec(2))
    d.perform(n1, resume)
    d.run(d.now + 3.0)
    running = [e.key for e in d.model.list(keys.running_on(n1.settings.name)).entries]
    assert len(running) == 1
    assert len(n1.shim.alive()) == 1


def test_what_a_dead_daemon_gave_back_is_not_taken_from_the_next_one() -> None:
    """Seed 101407: it was to give back an attempt before its start, and died; the next daemon started it."""
    d = Direct(settings("n1"), script=long_tasks)
    n1 = d.node()
    d.submit(spec(1))
    late = until_given_back(d, n1)
    d.restart(n1)
    d.run(d.now + 1.0)
    assert len(n1.shim.alive()) == 1
    assert isinstance(d.model.commit(late.txn), txn.Conflict)
    assert d.task(task_id(1)).state is State.RUNNING


def test_nothing_is_started_on_the_word_of_an_old_listing() -> None:
    """The daemon before gave it back after this one had listed, and before it went on with the life."""
    d = Direct(settings("n1"), script=long_tasks)
    n1 = d.node()
    d.submit(spec(1))
    late = until_given_back(d, n1)
    d.restart(n1)
    resume = until_wanted(d, n1, commits("resume"))
    d.settle()
    n1.watches.pop("mine")  # the watch lags
    assert isinstance(d.model.commit(late.txn), txn.Committed)
    d.perform(n1, resume)
    listing = until_wanted(d, n1, lambda e: isinstance(e, List) and e.tag == "mine")
    d.run(d.now + 0.5)  # registered and renewed, and yet it must wait for that listing
    assert n1.agent.session.may_start
    assert not n1.shim.alive()
    d.perform(n1, listing)
    d.run(d.now + 0.5)
    assert [p.key for p in n1.shim.alive()] == [f"{task_id(1)}.2"]


def until_given_back(d: Direct, node: Node) -> Commit:
    """The node claims the task, is told to give everything back, and wants to write that of what it has not started."""
    d.perform(node, until_wanted(d, node, commits("claim")))
    start = next((e for e in node.pending if isinstance(e, Start)), None)
    assert start is None or d.take(node, lambda e: e is start) is start
    node.agent.holdings._asked.clear()
    for h in node.agent.holdings.held.values():
        h.step = Step.STARTING  # as if no renewal had been committed yet
    d.tell(node, SetDraining(True, leaving=True, release=True))
    finish = until_wanted(d, node, commits("finish"))
    assert isinstance(finish, Commit)
    return finish


def test_an_end_while_no_daemon_ran_is_recorded() -> None:
    d = Direct(settings(), script=lambda _: Script(1.0, code=7))
    n1 = d.node()
    d.submit(spec(1))
    d.run(0.5)
    d.now = 1.8
    n1.shim.advance(d.now)
    d.restart(n1)
    d.run(3.0)
    task = d.task(task_id(1))
    assert (task.outcome, task.attempts[-1].exit_code) == (Outcome.FAILED, 7)


def test_a_dead_shim_gives_its_tasks_back() -> None:
    d = Direct(settings(), script=lambda _: Script(1.0))
    n1 = d.node()
    d.submit(spec(1))
    d.run(0.5)
    n1.shim.die()
    d.tell(n1, RuntimeListed(n1.shim.listing()))
    d.run(5.0)
    task = d.task(task_id(1))
    assert [a.reason for a in task.attempts] == ["shim-lost", "exit"]
    assert task.outcome is Outcome.SUCCEEDED


# --- administration ------------------------------------------------------------------------------------------------


def test_a_draining_node_takes_nothing_and_finishes_what_it_has() -> None:
    d = Direct(settings(), script=lambda _: Script(1.0))
    n1 = d.node()
    d.submit(spec(1))
    d.run(0.5)
    d.tell(n1, SetDraining(True))
    d.submit(spec(2))
    d.run(20.0)
    assert d.task(task_id(1)).outcome is Outcome.SUCCEEDED
    assert d.task(task_id(2)).state is State.QUEUED
    assert not any(isinstance(w, Watch) and w.tag == "queue" for w in n1.watches.values())
    d.tell(n1, SetDraining(False))
    d.run(25.0)
    assert d.task(task_id(2)).outcome is Outcome.SUCCEEDED


def test_leaving_with_release_gives_back_at_once() -> None:
    d = Direct(settings("n1"), script=long_tasks)
    n1 = d.node()
    d.submit(spec(1))
    d.run(0.5)
    d.tell(n1, LeaveWanted(release=True))
    d.run(2.0)
    assert n1.agent.left
    task = d.task(task_id(1))
    assert (task.state, task.attempts[-1].reason, task.losses, task.failures) == (State.QUEUED, "released", 0, 0)


def test_one_who_stays_after_all_takes_tasks_again() -> None:
    """It had been told to give everything back; it must not go on giving back what it takes."""
    d = Direct(settings(), script=lambda _: Script(1.0))
    n1 = d.node()
    d.submit(spec(1))
    d.run(0.5)
    d.tell(n1, SetDraining(True, leaving=True, release=True))
    d.run(2.0)
    assert d.task(task_id(1)).state is State.QUEUED
    d.tell(n1, SetDraining(False))
    d.run(5.0)
    assert (d.task(task_id(1)).outcome, d.task(task_id(1)).attempts_started) == (Outcome.SUCCEEDED, 2)


def test_a_cancel_between_the_end_and_its_record_is_not_lost() -> None:
    """The attempt failed and would be tried again; its user cancels before that is recorded."""
    d = Direct(settings(), script=lambda _: Script(1.0, code=1))
    n1 = d.node()
    d.submit(spec(1, retries=5))
    give_back = until_wanted_later(d, n1, commits("finish"))
    n1.watches.pop("mine")
    d.cancel(task_id(1))
    d.perform(n1, give_back)
    d.run(d.now + 3.0)
    assert d.task(task_id(1)).outcome is Outcome.CANCELLED
    assert d.task(task_id(1)).attempts_started == 1


def test_one_who_may_not_lead_does_not() -> None:
    d = Direct(settings("n1", candidate=False), settings("n2"))
    d.run(5.0)
    assert not d.node("n1").agent.leading
    assert d.node("n2").agent.leading


def test_a_leader_that_may_no_longer_lead_gives_up_the_office() -> None:
    d = Direct(settings("n1"), settings("n2", candidate=False))
    d.run(5.0)
    d.tell(d.node("n1"), SetCandidate(False))
    d.tell(d.node("n2"), SetCandidate(True))
    d.run(12.0)
    assert not d.node("n1").agent.leading
    assert d.node("n2").agent.leading


def test_more_than_half_dead_at_once_is_not_believed() -> None:
    d = Direct(*(settings(f"n{n}") for n in range(1, 6)))
    d.run(2.0)
    leader = next(n for n in d.nodes.values() if n.agent.leading)
    gone = [name for name, n in d.nodes.items() if n is not leader][:3]
    for name in gone:
        del d.nodes[name]
    d.run(30.0)
    assert any("look dead at once" in n for n in leader.notices)
    assert all(d.model.get(keys.incarnation(name)) is not None for name in gone)


def test_fewer_than_half_are_given_up() -> None:
    d = Direct(*(settings(f"n{n}") for n in range(1, 6)))
    d.run(2.0)
    gone = [name for name, n in d.nodes.items() if not n.agent.leading][:2]
    for name in gone:
        del d.nodes[name]
    d.run(30.0)
    assert all(d.model.get(keys.incarnation(name)) is None for name in gone)


def test_a_node_whose_capacity_was_lowered_holds_what_it_has() -> None:
    """It may hold more than it now has; what it says is free must not be negative."""
    d = Direct(settings(capacity=cpus(4)), script=long_tasks)
    n1 = d.node()
    for n in range(1, 5):
        d.submit(spec(n))
    d.run(1.0)
    assert len(n1.shim.alive()) == 4
    n1.settings = settings(capacity=cpus(2))
    d.restart(n1)
    d.run(5.0)
    assert len(n1.shim.alive()) == 4
    assert n1.agent.free().cpu_millis == 0
    assert n1.agent.session.phase is Phase.ACTIVE


def test_it_is_never_to_be_called_again_in_the_past() -> None:
    """Whatever does not answer: the daemon would turn in a tight loop."""
    d = Direct(settings())
    n1 = d.node()
    for n in range(1, 9):
        d.submit(spec(n))
    d.run(1.5)
    for _ in range(400):  # nothing is answered any more, only time passes
        n1.pending.clear()
        next_s = n1.agent.next_s
        assert next_s is not None
        assert next_s > d.now
        d.now = next_s
        d.tell(n1)
