"""Histories, ledgers and acknowledgements as they might have been, for the tests of the checker."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from spinetta import codec, keys, lifecycle
from spinetta.model import (
    Exit,
    Holding,
    Incarnation,
    IncarnationId,
    Life,
    NodeId,
    NodeRecord,
    QueueHint,
    Reason,
    Resources,
    Revision,
    Task,
    TaskId,
    TaskSpec,
)
from spinetta.store.protocol import Change, KeyValue
from tests.cluster.nemesis import checker
from tests.cluster.nemesis.plan import Times
from tests.cluster.nemesis.recorder import line_of, read_history

TIMES = Times(lease_ttl_s=3, grace_s=8, kill_margin_s=2)
A, B = NodeId("a"), NodeId("b")
ONE = TaskId("018f3c5e-0000-7000-8000-000000000001")


@dataclass
class Forged:
    """A run as it might have been: two nodes that renew every second, and what the test lets happen."""

    now_s: float = 1000.0
    revision: int = 0
    created: dict[str, int] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    ledger: list[str] = field(default_factory=list)
    acks: list[str] = field(default_factory=list)
    hits: list[checker.Hit] = field(default_factory=list)
    tasks: dict[TaskId, Task] = field(default_factory=dict)
    silent: set[NodeId] = field(default_factory=set)

    def write(self, **changes: bytes | None) -> int:
        """One revision; the keys' names come in through `**`."""
        self.revision += 1
        for key, data in changes.items():
            value = None
            if data is None:
                self.created.pop(key, None)
            else:
                self.created.setdefault(key, self.revision)
                value = KeyValue(key, data, Revision(self.created[key]), Revision(self.revision))
            self.lines.append(line_of(Change(key, value, Revision(self.revision)), self.now_s))
        return self.revision

    def join(self, node: NodeId, life: Life = Life.OPEN) -> None:
        record = NodeRecord(node, f"{node}:1", IncarnationId(f"life-{node}"), Resources(2000, 1 << 30), Resources())
        self.write(**{keys.node(node): codec.encode_node(record), **self.life(node, life)})

    def life(self, node: NodeId, life: Life) -> dict[str, bytes | None]:
        record = Incarnation(IncarnationId(f"life-{node}"), life, "boot", TIMES.lease_ttl_s, TIMES.kill_margin_s)
        return {keys.incarnation(node): codec.encode_incarnation(record)}

    def wait(self, seconds: float, alive: tuple[tuple[int, NodeId], ...] = ()) -> None:
        """Nodes renew, and attempts (number, node) tell that they live."""
        for _ in range(round(seconds * 2)):
            self.now_s += 0.5
            for node in {A, B} - self.silent:
                self.write(**{keys.beat(node): b""})
            for number, node in alive:
                self.tell("H", number, node)

    def tell(self, what: str, number: int, node: NodeId, more: str = "", task: TaskId = ONE) -> None:
        self.ledger.append(f"{what} {task} {number} {node} {round(self.now_s * 1e9)}{more}")

    def submit(
        self, task: TaskId = ONE, kind: str = "short", answered: bool = True, spec: TaskSpec | None = None
    ) -> None:
        spec = spec or TaskSpec(task, ("true",), resources=Resources(100))
        self._ack("sent", ids=[task], kinds=[kind])
        self.put(lifecycle.submitted(spec, now_ms=1, at_node="a"), {keys.queued(task): codec.encode_hint(hint(spec))})
        if answered:
            self._ack("acknowledged", ids=[task])

    def _ack(self, op: str, **row: object) -> None:
        self.acks.append(json.dumps({"t": self.now_s, "op": op, **row}))

    def put(self, record: Task, status: dict[str, bytes | None]) -> int:
        self.tasks[record.id] = record
        return self.write(**{keys.task(record.id): codec.encode_task(record), **status})

    def claim(self, node: NodeId, task: TaskId = ONE) -> int:
        record = lifecycle.claimed(self.tasks[task], node, IncarnationId(f"life-{node}"), now_ms=2)
        holding = codec.encode_holding(Holding(record.attempts_started, IncarnationId(f"life-{node}"), TIMES.grace_s))
        return self.put(record, {keys.queued(task): None, keys.running(node, task): holding})

    def end(self, exit_: Exit, task: TaskId = ONE, token: int = 0) -> None:
        record = self.tasks[task]
        node = record.attempts[-1].node
        token = token or self.created[keys.running(node, task)]
        ended = lifecycle.ended(record, exit_, Revision(token), cancel_requested=False, now_ms=3)
        over = ended.event in (lifecycle.Event.FINISH, lifecycle.Event.GIVE_UP)
        status = keys.complete(task) if over else keys.queued(task)
        hint_of = codec.encode_hint(hint(ended.task.spec))
        self.put(ended.task, {keys.running(node, task): None, status: b"" if over else hint_of})

    def cancel_waiting(self, task: TaskId = ONE) -> None:
        record = lifecycle.cancelled_waiting(self.tasks[task], "", now_ms=4)
        self.put(record, {keys.queued(task): None, keys.complete(task): b""})
        self.cancel_told(task)

    def cancel_told(self, task: TaskId = ONE) -> None:
        self._ack("cancelled", ids=[task], waiting=True)

    def lose(self, node: NodeId, wait_s: float, alive: tuple[tuple[int, NodeId], ...] = ()) -> None:
        """It falls silent, is condemned, waited out; its task goes back."""
        self.silent.add(node)
        self.wait(TIMES.lease_ttl_s, alive)
        self.write(**{keys.node(node): None})
        self.write(**self.life(node, Life.CONDEMNED))
        self.wait(wait_s)
        self.end(Exit(Reason.NODE_LOST, message="node lost"))

    def run(self, node: NodeId, number: int, seconds: float = 1.0) -> None:
        """A whole attempt, from the claim to the record of its end."""
        self.claim(node)
        self.tell("B", number, node)
        self.wait(seconds, ((number, node),))
        self.tell("E", number, node, " 0")
        self.end(Exit(Reason.EXIT, exit_code=0, started_ms=1))

    def judge(self, directory: Path, present: dict[str, tuple[int, str]] | None = None) -> checker.Verdict:
        path = directory / "history"
        path.write_text("".join(line + "\n" for line in self.lines))
        ledger, wrong = checker.read_ledger(self.ledger)
        replay = checker.replayed(read_history(path))
        verdict = checker.check(replay, ledger, checker.read_acks(self.acks), self.hits, TIMES, present)
        for story in wrong:
            verdict.say("an attempt is started once", story)
        return verdict


def hint(spec: TaskSpec) -> QueueHint:
    return QueueHint.of(spec)
