"""A node takes no task that its administrator does not allow, whatever the queue says of it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from spinetta import codec, keys, steal
from spinetta.claims import Claims
from spinetta.events import Commit, Entry, Read, ReadDone, Reading
from spinetta.model import ContainerSpec, QueueHint, Revision
from spinetta.settings import AgentSettings
from tests.builders import contained, entry, hint, mounted, node_record, queued, settings, task_id
from tests.unit.test_claims import Bench, task_entry


def allowing(*allows: str) -> Bench:
    made: AgentSettings = settings()
    return Bench(Claims(replace(made, record=replace(made.record, allows=allows))))


def waiting_for(n: int, asked: ContainerSpec | None) -> Entry:
    return entry(keys.queued(task_id(n)), codec.encode_hint(QueueHint.of(queued(n, container=asked).spec)), n, n)


ASKED = [
    (None, ("process",), True),
    (None, (), True),
    (None, ("container",), False),
    (contained(), ("process", "container"), True),
    (contained(), ("container",), True),
    (contained(), ("process",), False),
    (contained(), (), False),
    (contained(network="host"), ("container",), False),
    (contained(network="host"), ("container", "network:host"), True),
    (contained(user="root"), ("container", "network:host"), False),
    (mounted("/data/x"), ("container", "mount:/data"), True),
    (mounted("/database"), ("container", "mount:/data"), False),
    (mounted("/data:/in:rw"), ("container", "mount:/data"), False),
    (contained("/srv/a.tar"), ("container", "image:/srv"), True),
    (contained("/srv/a.tar"), ("container",), False),
]


@pytest.mark.parametrize(("asked", "allows", "taken"), ASKED)
def test_the_queue_is_looked_through(asked: ContainerSpec | None, allows: tuple[str, ...], taken: bool) -> None:
    b = allowing(*allows)
    b.opened(waiting_for(1, asked))
    assert b.poll() == ([Read("claim", (keys.task(task_id(1)),))] if taken else [])


@pytest.mark.parametrize(("asked", "allows", "taken"), ASKED)
def test_a_falsified_hint_moves_nobody(asked: ContainerSpec | None, allows: tuple[str, ...], taken: bool) -> None:
    """The hint says that the task needs what this node allows; the record knows better, and is believed."""
    b = allowing(*allows)
    lie = hint(needs=tuple(w for w in allows if w != "process"))
    b.opened(entry(keys.queued(task_id(1)), codec.encode_hint(lie), 1, 1))
    assert b.poll() == [Read("claim", (keys.task(task_id(1)),))]
    effects = b.read(task_entry(1, task=queued(1, container=asked)))
    assert [type(e) for e in effects] == ([Commit] if taken else [])
    if not taken:
        assert b.claims.window.entries == {}  # nor is it tried again until its key is written again


def test_one_falsified_hint_holds_up_no_other_task() -> None:
    b = allowing("process")
    lies = [entry(keys.queued(task_id(n)), codec.encode_hint(hint()), n, n) for n in (1, 2)]
    b.opened(*lies)
    assert b.poll() == [Read("claim", tuple(keys.task(task_id(n)) for n in (1, 2)))]
    (commit,) = b.read(task_entry(1, task=queued(1, container=contained())), task_entry(2))
    assert isinstance(commit, Commit)
    assert list(b.claims.round.bids if b.claims.round else ()) == [task_id(2)]


def test_a_task_without_a_hint_is_judged_by_its_record() -> None:
    b = allowing("process")
    b.opened(entry(keys.queued(task_id(1)), b"", 1, 1))
    assert b.poll() == [Read("hints", (keys.task(task_id(1)),))]
    task = queued(1, container=contained())
    rows: dict[str, Entry | None] = {keys.task(task_id(1)): task_entry(1, task=task)}
    b.claims.hints_read(ReadDone("hints", Reading(Revision(100), rows)), b.now)
    assert b.poll() == []


def test_only_nodes_that_allow_it_are_rivals() -> None:
    """Or every node would leave the task to one that may not take it."""
    peers = [node_record("n2", allows=("process",)), node_record("n3", allows=("process", "container"))]
    wanted = QueueHint.of(queued(1, container=contained()).spec)
    assert steal.rivals(wanted, peers) == ["n3"]
    assert steal.rivals(hint(), peers) == ["n2", "n3"]
    assert steal.rivals(hint(), [node_record("n4", allows=("container",))]) == []
