"""Tasks that do not agree with themselves: what the leader makes of them, guard by guard, in the model of etcd."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest

from spinetta import codec, keys, lifecycle, orphans, txn
from spinetta.model import (
    Holding,
    Incarnation,
    IncarnationId,
    Life,
    NodeId,
    Outcome,
    QueueHint,
    Revision,
    State,
    Task,
    TaskId,
)
from spinetta.orphans import Mending
from tests.builders import exit_code, queued, settings, task_id
from tests.sim.direct import entry_of
from tests.sim.etcd_model import EtcdModel

N1, N2 = NodeId("n1"), NodeId("n2")
T = task_id(1)
LIFE = IncarnationId("life")


@dataclass
class Ground:
    """A store, written to by hand."""

    etcd: EtcdModel = field(default_factory=EtcdModel)

    def put(self, key: str, value: bytes = b"") -> Ground:
        self.etcd.commit(txn.Txn(then=(txn.Put(key, value),)))
        return self

    def delete(self, key: str) -> Ground:
        self.etcd.commit(txn.Txn(then=(txn.Delete(key),)))
        return self

    def record(self, task: Task) -> Ground:
        return self.put(keys.task(T), codec.encode_task(task))

    def life(self, state: Life = Life.OPEN, id_: str = LIFE) -> Ground:
        value = codec.encode_incarnation(Incarnation(IncarnationId(id_), state, "boot", 3.0, 1.0))
        return self.put(keys.incarnation(N1), value)

    def hold(self, **fields: object) -> Ground:
        holding = replace(Holding(1, LIFE, 8.0), **fields)  # type: ignore[arg-type]
        return self.put(keys.running(N1, T), codec.encode_holding(holding))

    def judge(self, nodes: tuple[NodeId, ...] = (N1,)) -> Mending | str | None:
        snapshot = self.etcd.read(orphans.wanted_keys(T, nodes))
        seen = {k: entry_of(v) for k, v in snapshot.entries.items()}
        return orphans.mending(T, seen, settings("n9"), now_ms=7000)

    def mend(self) -> Mending:
        found = self.judge()
        assert isinstance(found, Mending)
        assert isinstance(self.etcd.commit(found.body), txn.Committed)
        assert self.judge() is None, "what was mended is whole"
        return found

    def now(self) -> Task:
        kv = self.etcd.get(keys.task(T))
        assert kv is not None
        return codec.decode_task(kv.value)

    def left(self) -> set[str]:
        return {kv.key for kv in self.etcd.list("/status/").entries}


def running(**fields: object) -> Task:
    return lifecycle.claimed(queued(1, **fields), N1, LIFE, now_ms=1)


def complete() -> Task:
    return lifecycle.ended(running(), exit_code(), Revision(5), cancel_requested=False, now_ms=2).task


WHOLE: dict[str, Callable[[], Ground]] = {
    "nothing": Ground,
    "queued": lambda: Ground().record(queued()).put(keys.queued(T)),
    "blocked": lambda: Ground().record(replace(queued(), state=State.BLOCKED)).put(keys.blocked(T)),
    "complete": lambda: Ground().record(complete()).put(keys.complete(T)),
    "running": lambda: Ground().record(running()).hold().life(),
    "asked to end": lambda: Ground().record(running()).hold(cancel_requested=True).life(),
    "of a condemned life": lambda: Ground().record(running()).hold().life(Life.CONDEMNED),
    "of a dead life": lambda: Ground().record(running()).hold().life(Life.DEAD),
    "of an unreadable life": lambda: Ground().record(running()).hold().put(keys.incarnation(N1), b"\xff"),
}


@pytest.mark.parametrize("name", WHOLE)
def test_what_is_whole_is_left_alone(name: str) -> None:
    assert WHOLE[name]().judge() is None


@pytest.mark.parametrize(
    ("task", "key"),
    [
        (queued(), keys.queued(T)),
        (replace(queued(), state=State.BLOCKED), keys.blocked(T)),
        (complete(), keys.complete(T)),
    ],
)
def test_a_missing_status_key_is_put_back(task: Task, key: str) -> None:
    ground = Ground().record(task)
    assert ground.mend().wait_s == 0
    assert ground.left() == {key}
    assert ground.now() == task
    value = ground.etcd.get(keys.queued(T))
    assert value is None or codec.decode_hint(value.value) == QueueHint.of(task.spec)


@pytest.mark.parametrize("extra", [keys.queued(T), keys.blocked(T), keys.running(N1, T)])
def test_a_second_status_key_goes(extra: str) -> None:
    ground = Ground().record(complete()).put(keys.complete(T)).put(extra)
    ground.mend()
    assert ground.left() == {keys.complete(T)}


def test_status_keys_without_a_record_go() -> None:
    ground = Ground().put(keys.queued(T)).hold().life()
    ground.mend()
    assert ground.left() == set()


@pytest.mark.parametrize("bad", [b"\xff\xff", codec.encode_task(replace(running(), attempts=()))])
def test_a_record_that_cannot_be_read_is_for_a_person(bad: bytes) -> None:
    ground = Ground().put(keys.task(T), bad).put(keys.queued(T))
    found = ground.judge()
    assert isinstance(found, str)
    assert T in found


def test_a_record_of_another_task_is_for_a_person() -> None:
    assert isinstance(Ground().put(keys.task(T), codec.encode_task(queued(2))).judge(), str)


@pytest.mark.parametrize("value", [b"\xff\xff", codec.encode_holding(Holding(7, LIFE, 1.0)), b""])
def test_a_running_key_is_written_again_as_it_was_claimed(value: bytes) -> None:
    """So that its holder, if it lives, goes on: the token stays."""
    ground = Ground().record(running(grace_s=33.0, overlap=True)).put(keys.running(N1, T), value).life()
    token = ground.etcd.get(keys.running(N1, T))
    ground.mend()
    kv = ground.etcd.get(keys.running(N1, T))
    assert kv is not None
    assert token is not None
    assert kv.created == token.created
    assert codec.decode_holding(kv.value) == Holding(1, LIFE, 33.0, overlap=True)


@pytest.mark.parametrize("life", ["", "another"])
def test_a_running_key_of_no_life_goes_back_to_the_queue_after_a_wait(life: str) -> None:
    ground = Ground().record(running()).hold(grace_s=50.0)
    if life:
        ground.life(id_=life)
    found = ground.mend()
    assert found.wait_s > 50.0 * 1.01 + 1.0 + 20.0, "grace, margin, and the time in which a holder compares"
    assert ground.left() == {keys.queued(T)}
    task = ground.now()
    assert (task.state, task.losses, task.attempts[-1].outcome) == (State.QUEUED, 1, Outcome.LOST)
    assert task.attempts[-1].token == 3, "the revision at which its running key was created"


def test_a_running_task_without_its_key_goes_back_to_the_queue_after_a_wait() -> None:
    ground = Ground().record(running()).life()
    assert ground.mend().wait_s > 8.0
    assert ground.left() == {keys.queued(T)}


def test_one_that_must_not_start_again_is_lost() -> None:
    ground = Ground().record(running(restart_on_node_failure=False)).life()
    ground.mend()
    assert (ground.left(), ground.now().outcome) == ({keys.complete(T)}, Outcome.LOST)


def test_a_request_to_cancel_in_an_orphaned_key_is_kept() -> None:
    ground = Ground().record(running()).hold(cancel_requested=True, cancel_reason="enough")
    ground.mend()
    assert (ground.left(), ground.now().outcome, ground.now().message) == (
        {keys.complete(T)},
        Outcome.CANCELLED,
        "enough",
    )


# --- each guard, in the store in which it alone does not hold ------------------------------------------------------

Change = Callable[[Ground], object]
GUARDED: list[tuple[str, Callable[[], Ground], Change]] = [
    ("no record, then one", lambda: Ground().put(keys.queued(T)), lambda g: g.record(queued())),
    ("no record, the key changes", lambda: Ground().put(keys.queued(T)), lambda g: g.put(keys.queued(T))),
    ("extra, the record moves on", lambda: WHOLE["complete"]().put(keys.queued(T)), lambda g: g.record(complete())),
    ("extra, it changes", lambda: WHOLE["complete"]().put(keys.queued(T)), lambda g: g.put(keys.queued(T))),
    ("missing, the record moves on", lambda: Ground().record(queued()), lambda g: g.record(queued())),
    ("missing, it comes", lambda: Ground().record(queued()), lambda g: g.put(keys.queued(T))),
    ("rewritten, the record moves on", lambda: WHOLE["running"]().hold(attempt=9), lambda g: g.record(running())),
    ("rewritten, it changes", lambda: WHOLE["running"]().hold(attempt=9), lambda g: g.hold()),
    ("orphaned, the record moves on", lambda: Ground().record(running()).hold(), lambda g: g.record(running())),
    ("orphaned, the key changes", lambda: Ground().record(running()).hold(), lambda g: g.hold(cancel_requested=True)),
    ("orphaned, its life comes", lambda: Ground().record(running()).hold(), lambda g: g.life()),
    ("orphaned, queued meanwhile", lambda: Ground().record(running()).hold(), lambda g: g.put(keys.queued(T))),
    ("keyless, the key comes", lambda: Ground().record(running()).life(), lambda g: g.hold()),
    ("keyless, the life changes", lambda: Ground().record(running()).life(), lambda g: g.life(Life.CONDEMNED)),
]


@pytest.mark.parametrize(("name", "make", "change"), GUARDED, ids=[g[0] for g in GUARDED])
def test_each_guard(name: str, make: Callable[[], Ground], change: Change) -> None:
    ground = make()
    found = ground.judge()
    assert isinstance(found, Mending), name
    without: list[bool] = []
    change(ground)
    assert isinstance(ground.etcd.commit(found.body), txn.Conflict)
    for i in range(len(found.body.when)):
        other = make()
        found = other.judge()
        assert isinstance(found, Mending)
        change(other)
        body = replace(found.body, when=found.body.when[:i] + found.body.when[i + 1 :])
        without.append(isinstance(other.etcd.commit(body), txn.Committed))
    assert sum(without) == 1, "exactly one guard stands against this"


def test_every_guard_is_needed() -> None:
    """Each guard of each kind of mending is the only one against some change."""
    kinds: dict[str, tuple[int, set[int]]] = {}
    for name, make, change in GUARDED:
        kind = name.partition(",")[0]
        for i in range(9):
            ground = make()
            found = ground.judge()
            assert isinstance(found, Mending)
            size, needed = kinds.setdefault(kind, (len(found.body.when), set()))
            if i >= size:
                break
            change(ground)
            body = replace(found.body, when=found.body.when[:i] + found.body.when[i + 1 :])
            if isinstance(ground.etcd.commit(body), txn.Committed):
                needed.add(i)
    alike = {"keyless": "orphaned"}  # the same transaction
    for kind, (size, needed) in kinds.items():
        also = kinds[alike[kind]][1] if kind in alike else set()
        assert needed | also == set(range(size)), kind


def test_what_must_be_seen() -> None:
    assert orphans.wanted_keys(TaskId("u"), [N2, N1]) == (
        "/task/u",
        "/status/queued/u",
        "/status/blocked/u",
        "/status/complete/u",
        "/status/running/n1/u",
        "/incarnation/n1",
        "/status/running/n2/u",
        "/incarnation/n2",
    )
