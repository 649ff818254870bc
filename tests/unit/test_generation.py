"""A cluster made anew: what its generation says, and what a node makes of another one than it knew."""

from __future__ import annotations

import pytest

from spinetta import codec, keys, txn
from spinetta.agent import Agent
from spinetta.events import (
    AttemptEnded,
    CommitDone,
    Effect,
    Entry,
    Forget,
    KeptAlive,
    LeaseGranted,
    Notice,
    Read,
    ReadDone,
    Reading,
    Refused,
    RevokeLease,
)
from spinetta.lineage import (
    FORMER_MAX,
    BackupRecord,
    Generation,
    decode_backup,
    decode_generation,
    encode_backup,
    encode_generation,
    successor,
)
from spinetta.model import Exit, Incarnation, IncarnationId, LeaseId, Life, NodeId, Reason, Revision
from spinetta.processes import Processes
from spinetta.session import Phase, Session
from tests.builders import entry, node_record, settings

ME, LIFE, LEASE = NodeId("n1"), IncarnationId("0000000000000007"), LeaseId(7)
KEYS = (keys.node(ME), keys.incarnation(ME), keys.GENERATION, keys.acl_node(ME))
NEW = encode_generation(Generation("g2", ("abc",), 5, "recover"))
OLD = encode_generation(Generation("g1", (), 4, "restore"))


def says(generation: bytes | None, *, life: Life = Life.OPEN, at: int = 22) -> ReadDone:
    value = codec.encode_incarnation(Incarnation(LIFE, life, "boot", 3.0, 1.0))
    node = entry(keys.node(ME), codec.encode_node(node_record(ME, incarnation=LIFE)), 20, 20, LEASE)
    found: tuple[Entry | None, ...] = (
        node if life is Life.OPEN else None,
        entry(keys.incarnation(ME), value, 21, at),
        entry(keys.GENERATION, generation, 4, 4) if generation is not None else None,
        None,
    )
    return ReadDone("self", Reading(Revision(30), dict(zip(KEYS, found, strict=True))))


def active(generation: bytes | None) -> Session:
    session = Session(settings(), LIFE)
    session.begin(0.0)
    session.poll(0.0)
    session.read_done(says(generation), 0.0, nothing_runs=True)
    session.commit_done(CommitDone("resume", txn.Committed(Revision(22))), 0.0)
    session.poll(0.0)
    session.read_done(says(generation), 0.0, nothing_runs=True)
    assert session.phase is Phase.ACTIVE
    return session


@pytest.mark.parametrize(("before", "after"), [(None, NEW), (OLD, NEW), (OLD, None)])
@pytest.mark.parametrize("life", [Life.OPEN, Life.CONDEMNED])
def test_another_generation_ends_all_that_this_daemon_does(
    before: bytes | None, after: bytes | None, life: Life
) -> None:
    """Whatever its keys look like: with revisions gone back they may look as if nothing had happened."""
    session = active(before)
    session.suspect(1.0)
    session.poll(1.0)
    (notice,) = session.read_done(says(after, life=life), 1.0, nothing_runs=False)
    assert isinstance(notice, Notice)
    assert session.restored
    assert session.must_stop
    assert not session.active
    assert session.life_seen == 0, "nothing is recorded any more by what it knows"
    assert session.registration is None


def test_nothing_brings_it_back() -> None:
    """It knows only what was true in another history: a new one, with nothing in memory, takes its place."""
    session = active(None)
    session.suspect(1.0)
    session.poll(1.0)
    session.read_done(says(NEW), 1.0, nothing_runs=True)
    session.look_again(2.0)
    session.suspect(2.0)
    effects: list[Effect] = [
        *session.commit_done(CommitDone("renew", txn.Conflict(Revision(40))), 2.0),
        *session.commit_done(CommitDone("advertise", None), 2.0),
        *session.kept_alive(KeptAlive("self", LEASE, None), 2.0),
        *session.refused("no", 2.0),
        *session.lease_granted(LeaseGranted("self", LeaseId(9)), 2.0),
        *session.deregister(),
        *session.poll(100.0),
    ]
    assert effects == [RevokeLease(LeaseId(9))]
    assert session.restored
    assert session.next_s is None


def test_the_same_generation_is_no_news_and_the_first_one_is_taken_as_it_is() -> None:
    for generation in (None, OLD, NEW):
        session = active(generation)
        session.suspect(1.0)
        session.poll(1.0)
        session.read_done(says(generation), 1.0, nothing_runs=True)
        assert session.phase is Phase.ACTIVE


def test_the_agent_says_so_and_records_nothing() -> None:
    agent = Agent(settings(), LIFE)
    assert not agent.restored
    agent.session = active(None)
    agent.session.suspect(1.0)
    assert Read("self", KEYS) in agent.session.poll(1.0)
    agent.handle(1.0, 0, says(NEW), Refused("x"))
    assert agent.restored


def test_ends_of_an_earlier_life_do_not_count_for_attempts_of_the_same_name() -> None:
    """After a restore a task may be claimed as attempt 1 for the second time by the same daemon."""
    runtime, key = Processes(), "01a1ff3f-b1bd-7650-a3b7-003404c37d7b.1"
    runtime.ended(AttemptEnded(key, Exit(Reason.EXIT, exit_code=0)), Revision(150))
    assert runtime.tend_strays({}, 1.0) == [Forget(key)]
    assert runtime.is_past(key)
    runtime.forget_past()
    assert not runtime.is_past(key)
    assert runtime.end_of(key) is None


# --- records -------------------------------------------------------------------------------------------------------


def test_records_are_read_back() -> None:
    generation = Generation("g", ("a", "b"), 17, "restore")
    assert decode_generation(encode_generation(generation)) == generation
    record = BackupRecord("abc", 17, "user ann", "n1")
    assert decode_backup(encode_backup(record)) == record
    assert decode_generation(b"\xff") is None
    assert decode_backup(b"\xff") is None


def test_a_successor_knows_whom_it_follows() -> None:
    first = successor(None, "a", generation_id="g1", made_ms=1, how="recover")
    assert (first.id, first.former_cluster_ids, first.how) == ("g1", ("a",), "recover")
    second = successor(first, "b", generation_id="g2", made_ms=2, how="restore")
    assert second.former_cluster_ids == ("a", "b")
    assert second.follows("a")
    assert second.follows("b")
    assert not second.follows("c")
    assert not second.follows("")
    assert successor(second, "", generation_id="g3", made_ms=3, how="restore").former_cluster_ids == ("a", "b")
    assert successor(second, "a", generation_id="g3", made_ms=3, how="restore").former_cluster_ids == ("a", "b")


def test_the_past_is_bounded() -> None:
    generation = None
    for i in range(FORMER_MAX + 5):
        generation = successor(generation, f"{i:x}", generation_id="g", made_ms=0, how="recover")
    assert generation is not None
    assert len(generation.former_cluster_ids) == FORMER_MAX
    assert generation.follows(f"{FORMER_MAX + 4:x}")
    assert not generation.follows("0")
