"""Stories of one node or few, each step by step: lost answers, lives that end and begin, daemons that die."""

from __future__ import annotations

from spinetta import keys, txn
from spinetta.attempt import Step
from spinetta.events import (
    Commit,
    CommitDone,
    GrantLease,
    LeaveWanted,
    List,
    ListRuntime,
    Remember,
    RuntimeListed,
    SetDraining,
    Start,
    Stop,
)
from spinetta.model import NodeId, Outcome, Reason, State
from spinetta.session import Phase
from tests.builders import cpus, settings, spec, task_id
from tests.sim.direct import Direct, Node, answer_of, commits, long_tasks, until_wanted, until_wanted_later
from tests.sim.shim_model import Script

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
    node.agent.holdings._runtime._asked.clear()
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
