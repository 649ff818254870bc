"""Replays everything that etcd has recorded since revision 1 and checks the design's invariants at every revision."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from spinetta import codec, keys
from spinetta.model import Life, NodeId, Outcome, Resources, Revision, State, Task, TaskId
from spinetta.store.etcd import EtcdStore
from spinetta.store.protocol import Change, KeyValue


class Violation(AssertionError):
    """An invariant was broken, with the story."""


@dataclass
class Checker:
    """The state of the store as of the latest revision fed in, and what has been seen."""

    now: dict[str, KeyValue] = field(default_factory=dict)
    status: dict[TaskId, set[str]] = field(default_factory=lambda: defaultdict(set))
    tasks: dict[TaskId, Task] = field(default_factory=dict)
    tokens: dict[TaskId, list[int]] = field(default_factory=lambda: defaultdict(list))
    recorded: dict[TaskId, int] = field(default_factory=lambda: defaultdict(int))
    held: dict[NodeId, set[TaskId]] = field(default_factory=lambda: defaultdict(set))
    revisions: int = 0
    collected: set[TaskId] = field(default_factory=set)

    def feed(self, revision: Revision, events: Sequence[Change]) -> None:
        """All events of one revision."""
        before = {e.key: self.now.get(e.key) for e in events}
        touched: set[TaskId] = set()
        nodes: set[NodeId] = set()
        for e in events:
            if e.key.startswith(keys.RUNNING):
                node, task = keys.parse_running(e.key)
                nodes.add(node)
                touched.add(task)
                if e.value is not None and before[e.key] is None:
                    self._claim(node, task, revision)
            elif e.key.startswith((keys.TASK, keys.QUEUED, keys.BLOCKED, keys.COMPLETE)):
                touched.add(keys.parse_task(e.key))
        for e in events:
            if e.value is None:
                self.now.pop(e.key, None)
            else:
                self.now[e.key] = e.value
            if e.key.startswith(keys.RUNNING):
                node, task = keys.parse_running(e.key)
                (self.held[node].discard if e.value is None else self.held[node].add)(task)
                (self.status[task].discard if e.value is None else self.status[task].add)(e.key)
            elif e.key.startswith("/status/"):
                task = keys.parse_task(e.key)
                (self.status[task].discard if e.value is None else self.status[task].add)(e.key)
        for e in events:
            if e.key.startswith(keys.TASK) and e.value is not None:
                self._record(codec.decode_task(e.value.value), revision, before)
            elif e.key.startswith(keys.TASK):
                self._collected(keys.parse_task(e.key), revision)
        for task in touched:
            self._agree(task, revision)
        for node in nodes:
            self._room(node, revision)
        self.revisions += 1

    def _claim(self, node: NodeId, task: TaskId, revision: Revision) -> None:
        life = self.now.get(keys.incarnation(node))
        if keys.node(node) not in self.now or life is None:
            raise Violation(f"2: {node} claimed {task} at {revision} without being registered")
        if codec.decode_incarnation(life.value).state is not Life.OPEN:
            raise Violation(f"2: {node} claimed {task} at {revision} though condemned")
        known = self.tasks.get(task)
        if known is not None and known.state is not State.QUEUED:
            raise Violation(f"5: {node} claimed {task} at {revision}, which was {known.state.name}")
        if self.tokens[task] and self.tokens[task][-1] >= revision:
            raise Violation(f"4: the tokens of {task} do not grow: {self.tokens[task]}, {revision}")
        self.tokens[task].append(revision)

    def _record(self, task: Task, revision: Revision, before: dict[str, KeyValue | None]) -> None:
        old = self.tasks.get(task.id)
        if old is not None and old.state is State.COMPLETE and task != old:
            raise Violation(f"3: {task.id} was complete and changed at {revision}: {old} → {task}")
        if old is not None and task.attempts_started < old.attempts_started:
            raise Violation(f"4: the attempts of {task.id} shrink at {revision}")
        if old is not None and old.state is State.RUNNING and task.state is not State.RUNNING:
            last = task.attempts[-1]
            held = before.get(keys.running(last.node, task.id))
            if held is None or held.created != last.token:
                raise Violation(f"3: the end of {task.id} at {revision} has token {last.token}, held was {held}")
        if task.state is State.COMPLETE and (old is None or old.state is not State.COMPLETE):
            self.recorded[task.id] += 1
            if task.outcome is Outcome.NONE:
                raise Violation(f"3: {task.id} is complete at {revision} without an outcome")
        self.tasks[task.id] = task

    def _collected(self, task: TaskId, revision: Revision) -> None:
        """Its record has left the store, for an archive."""
        known = self.tasks.get(task)
        if known is None or known.state is not State.COMPLETE:
            raise Violation(f"1: the record of {task} was removed at {revision}, it was {known}")
        self.collected.add(task)

    def _agree(self, task: TaskId, revision: Revision) -> None:
        record = self.tasks.get(task)
        present = self.status[task]
        if task in self.collected:
            if present or keys.task(task) in self.now:
                raise Violation(f"1: {task} was collected, and has {present} at {revision}")
            return
        if record is None:
            if present:
                raise Violation(f"1: {task} has {present} at {revision} and no record")
            return
        if record.state is State.RUNNING:
            expected = {keys.running(record.attempts[-1].node, task)}
        else:
            key = {State.QUEUED: keys.queued, State.BLOCKED: keys.blocked, State.COMPLETE: keys.complete}[record.state]
            expected = {key(task)}
        if present != expected:
            raise Violation(f"1: {task} is {record.state.name} at {revision} and has {present}")

    def _room(self, node: NodeId, revision: Revision) -> None:
        described = self.now.get(keys.node(node))
        if described is None:
            return
        capacity = codec.decode_node(described.value).capacity
        used = Resources()
        for task in self.held[node]:
            used = used + self.tasks[task].spec.resources
        if not used.fits_in(capacity):
            raise Violation(f"7: {node} holds {used} of {capacity} at {revision}")


async def replay(endpoint: str) -> Checker:
    """Feed the whole history of a live etcd to a checker, up to its present revision."""
    store = EtcdStore([endpoint])
    checker = Checker()
    try:
        last = (await store.read([keys.GENERATION])).revision
        pending: dict[Revision, list[Change]] = {}
        async with asyncio.timeout(120):
            async for changes in store.watch("/", start=Revision(1)):
                for event in changes.events:
                    pending.setdefault(event.revision, []).append(event)
                for revision in sorted(pending):
                    checker.feed(revision, pending.pop(revision))
                if changes.events and changes.revision >= last:
                    break
    finally:
        await store.close()
    return checker


def check_history(endpoint: str) -> Checker:
    """`replay`, from synchronous code."""
    return asyncio.run(replay(endpoint))
