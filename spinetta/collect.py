"""Which finished tasks leave the store, and when: a duty of the leader, as a state machine.

Now and then it goes through the complete keys from the oldest on, a bounded page at a time, and has those that are due
written into the archive of the node that finished them. Only what is on a disk to stay is deleted, under the office and
guarded by the revisions that were read; all else is found again the next time. Archiving twice is harmless.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Literal

from spinetta import codec, keys, txn
from spinetta.events import (
    Archive,
    Archived,
    CollectTag,
    Commit,
    CommitDone,
    Effect,
    Entry,
    List,
    ListDone,
    Notice,
    Read,
    ReadDone,
)
from spinetta.model import Completed, NodeId, Revision, State, TaskId
from spinetta.settings import AgentSettings
from spinetta.validate import is_task_id

PAGE_KEYS = 100  # looked at, read and deleted at once: below etcd's 128 operations a transaction
NODES_MAX = 20  # that archive at once: each costs a call, and a write beside the deletions
BATCH_BYTES_MAX = 4 << 20  # of records archived at once: they travel in one message
PAUSE_S = 0.05  # between pages: at most 2,000 tasks a second, a fraction of what etcd can do
RETRY_S = 1.0
IDLE_PAGES_MAX = 50  # in a row without anything due, 5,000 tasks: the rest is looked at the next time
ELSEWHERE_AFTER_S = 600.0  # a node that takes nothing for so long: its tasks go into the leader's own archive
WINDOW_DIGITS = 7  # of an id, shared by those of 17 minutes: a limited range counts all that lies behind it


@dataclass(frozen=True, slots=True)
class Due:
    """A finished task that is to leave. Without `told` its record must say whether it is due."""

    task: TaskId
    status_seen: Revision
    told: Completed | None


@dataclass(slots=True)
class Batch:
    """What is under way: for each task who archives it, and what was read of it."""

    archiver: dict[TaskId, NodeId] = field(default_factory=dict)
    leaving: dict[TaskId, txn.Leaving] = field(default_factory=dict)
    waiting_for: set[NodeId] = field(default_factory=set)
    durable: set[TaskId] = field(default_factory=set)


class Collector:
    """Goes through the finished tasks while this node holds the office."""

    def __init__(self, settings: AgentSettings) -> None:
        self.settings = settings
        self._office: txn.OfficeHeld | None = None
        self._nodes: Collection[str] = ()
        self._at_s = math.inf  # when to go on; infinite while an answer is awaited
        self._step = "rest"
        self._after = ""  # the last task looked at; empty: from the oldest
        self._window = False  # the last page was of a window of time only
        self._excess = 0  # how many more are to go by number
        self._idle_pages = 0
        self._due: tuple[Due, ...] = ()
        self._batch = Batch()
        self._silent: set[NodeId] = set()  # did not take what they were given in this pass
        self._failing: dict[NodeId, float] = {}  # since when they have not
        self._unreadable: set[TaskId] = set()

    @property
    def next_s(self) -> float | None:
        """When `poll` has something to do."""
        return self._at_s if self._office is not None and self._at_s < math.inf else None

    @property
    def wanted(self) -> bool:
        """Whether finished tasks leave the store at all."""
        return bool(self.settings.collect_after_s or self.settings.collect_keep)

    # --- the pass ---

    def poll(self, now: float, office: txn.OfficeHeld | None, nodes: Collection[str]) -> list[Effect]:
        """What time asks for. `nodes`: the keys of the live ones."""
        self._nodes = nodes
        if office is None or not self.wanted:
            self._office, self._at_s = None, math.inf
            return []
        if self._office is None or self._office.created != office.created:
            self._begin(now)
        self._office = office
        if self._at_s > now:
            return []
        self._at_s = math.inf
        if self._step == "rest":
            self._step = "count"
            return [List(self._tag("count"), keys.COMPLETE, limit=1)]
        return [self._next_page()]

    def took(self, event: CommitDone | ReadDone | ListDone | Archived, now: float, now_ms: int) -> list[Effect]:
        """The answer to something asked by this part."""
        match event:
            case Archived():
                return self._archived(event, now, now_ms) if self._is_ours(event.office) else []
            case ListDone(CollectTag() as tag) if self._is_ours(tag.office):
                return self._listed(tag, event, now, now_ms)
            case ReadDone(CollectTag() as tag) if self._is_ours(tag.office):
                return self._read(event, now, now_ms)
            case CommitDone(CollectTag() as tag) if self._is_ours(tag.office):
                return self._dropped(event, now, now_ms)
            case _:
                return []  # asked under an office that is over

    def _begin(self, now: float) -> None:
        self._step, self._after, self._at_s = "rest", "", now + RETRY_S
        self._batch, self._due = Batch(), ()
        self._silent.clear()
        self._failing.clear()
        self._unreadable.clear()

    @property
    def _held(self) -> txn.OfficeHeld:
        assert self._office is not None  # noqa: S101 - only asked for under an office
        return self._office

    def _tag(self, step: Literal["count", "page", "read", "drop"]) -> CollectTag:
        return CollectTag(step, self._held.created)

    def _is_ours(self, office: Revision) -> bool:
        return self._office is not None and self._office.created == office

    def _rest(self, now: float) -> list[Effect]:
        self._step, self._at_s = "rest", now + self.settings.reconcile_s
        self._idle_pages = 0
        self._silent.clear()
        return []

    def _next_page(self) -> Effect:
        prefix = keys.COMPLETE + (_window(self._after) if self._window else "")
        return List(self._tag("page"), prefix, keys.complete(TaskId(self._after)) if self._after else "", PAGE_KEYS)

    def _listed(self, tag: CollectTag, done: ListDone, now: float, now_ms: int) -> list[Effect]:
        """How many finished tasks there are, or a page of them."""
        if done.listing is None:
            return self._rest(now)
        if tag.step == "count":
            keep = self.settings.collect_keep
            self._excess = max(0, done.listing.total - keep) if keep else 0
            if not done.listing.entries:
                self._after = ""
                return self._rest(now)
            self._step, self._at_s, self._window = "page", now, False
            return []
        return self._page(done.listing.entries, done.listing.more, now, now_ms)

    def _page(self, entries: tuple[Entry, ...], more: bool, now: float, now_ms: int) -> list[Effect]:
        if not more and not self._window:  # the last page there is: the next pass begins with the oldest
            self._step = "last"
        found = [d for e in entries if (d := self._looked_at(e, now, now_ms)) is not None]
        if entries:
            self._after = keys.parse_task(entries[-1].key)
        self._window = bool(entries) and (more or not self._window) and is_task_id(self._after)
        self._idle_pages = 0 if found else self._idle_pages + 1
        if not found:
            return self._go_on(now, now_ms)
        self._due = tuple(found)
        return [Read(self._tag("read"), tuple(keys.task(d.task) for d in found))]

    def _go_on(self, now: float, now_ms: int) -> list[Effect]:
        """The next page, unless nothing behind this one can be due."""
        if self._step == "last" or (self._excess <= 0 and self._is_young(now_ms)):
            self._after = ""
            return self._rest(now)
        if self._idle_pages >= IDLE_PAGES_MAX:
            return self._rest(now)  # and then from here on
        self._at_s = now + PAUSE_S
        return []

    def _is_young(self, now_ms: int) -> bool:
        """Whether what was submitted after the last one looked at has not been there long enough to be due."""
        if not self.settings.collect_after_s:
            return True
        return is_task_id(self._after) and born_ms(self._after) > now_ms - 1000 * self._age_s

    @property
    def _age_s(self) -> float:
        return max(self.settings.collect_after_s, self.settings.collect_settle_s)

    def _looked_at(self, entry: Entry, now: float, now_ms: int) -> Due | None:
        task = keys.parse_task(entry.key)
        if not is_task_id(task):
            return None
        told = codec.decode_completed(entry.value)
        if told is not None and told.node and self._archiver(told.node, now) in self._silent:
            return None
        ended_ms = told.completed_ms if told is not None else born_ms(task)  # no earlier, if that
        return Due(task, entry.modified, told) if self._is_due(ended_ms, now_ms) else None

    def _is_due(self, ended_ms: int, now_ms: int) -> bool:
        age_s = (now_ms - ended_ms) / 1000
        by_age = bool(self.settings.collect_after_s) and age_s >= self._age_s
        by_number = self._excess > 0 and age_s >= self.settings.collect_settle_s
        if not (by_age or by_number):
            return False
        self._excess -= 1
        return True

    # --- archive, then delete ---

    def _read(self, done: ReadDone, now: float, now_ms: int) -> list[Effect]:
        """The records of tasks that are due: have them archived."""
        due, self._due = self._due, ()
        if done.reading is None:
            return self._rest(now)
        effects: list[Effect] = []
        records: dict[NodeId, list[bytes]] = {}
        self._batch = Batch()
        total_bytes = 0
        for n, d in enumerate(due):
            entry = done.reading.entries.get(keys.task(d.task))
            if entry is None:
                continue  # not ours to judge: the sweep for orphans finds its key
            ended = self._ended(d, entry.value)
            if ended is None:
                effects += self._unread(d.task)
                continue
            node = self._archiver(ended.node, now)
            if node in self._silent:
                continue
            total_bytes += len(entry.value)
            is_one_too_many = node not in records and len(records) == NODES_MAX
            if is_one_too_many or (total_bytes > BATCH_BYTES_MAX and records):
                self._step, self._after, self._window = "page", before(d.task), False  # the rest comes next
                self._excess += len(due) - n
                break
            if not self._still_due(d, ended, now_ms):
                continue
            records.setdefault(node, []).append(entry.value)
            self._batch.archiver[d.task] = node
            self._batch.leaving[d.task] = txn.Leaving(d.task, entry.modified, d.status_seen)
        self._batch.waiting_for = set(records)
        if not records:
            return effects + self._go_on(now, now_ms)
        office = self._held.created
        return effects + [Archive(office, n, tuple(r)) for n, r in sorted(records.items())]

    def _ended(self, due: Due, record: bytes) -> Completed | None:
        """Who finished it and when; None when nobody can read that, and nobody may delete it."""
        task = codec.readable(codec.decode_task, record)
        if task is None or task.state is not State.COMPLETE or task.id != due.task:
            return None
        if due.told is not None and due.told.node:
            return due.told
        return Completed(self.settings.name, task.completed_ms)

    def _still_due(self, due: Due, ended: Completed, now_ms: int) -> bool:
        """Of one whose key did not tell when it ended."""
        if due.told is not None:
            return True
        self._excess += 1
        return self._is_due(ended.completed_ms, now_ms)

    def _unread(self, task: TaskId) -> list[Effect]:
        if task in self._unreadable or len(self._unreadable) >= PAGE_KEYS:
            return []
        self._unreadable.add(task)
        return [Notice(f"the record of the finished task {task} cannot be read: it is not archived and stays")]

    def _archiver(self, node: NodeId, now: float) -> NodeId:
        """The node itself, or this one if that is gone, or has taken nothing for long."""
        gone = keys.node(node) not in self._nodes
        if gone or now - self._failing.get(node, now) >= ELSEWHERE_AFTER_S:
            return self.settings.name
        return node

    def _archived(self, done: Archived, now: float, now_ms: int) -> list[Effect]:
        """A node has written down what it was given, or not. When all have answered, what is durable is deleted."""
        batch = self._batch
        if done.node not in batch.waiting_for:
            return []
        effects: list[Effect] = []
        batch.waiting_for.discard(done.node)
        asked = {t for t, n in batch.archiver.items() if n == done.node}
        batch.durable |= asked & done.tasks
        if asked <= done.tasks:
            self._failing.pop(done.node, None)
        else:
            self._silent.add(done.node)
            if done.node not in self._failing:
                self._failing[done.node] = now
                why = done.why or "it did not say that it has them"
                effects.append(Notice(f"node {done.node} does not archive its finished tasks, which stay: {why}"))
        if batch.waiting_for:
            return effects
        if not batch.durable:
            return effects + self._go_on(now, now_ms)
        leaving = [leave for t, leave in sorted(batch.leaving.items()) if t in batch.durable]
        nodes = sorted({batch.archiver[t] for t in batch.durable})
        return [*effects, Commit(self._tag("drop"), txn.collect(self._held, leaving, nodes))]

    def _dropped(self, done: CommitDone, now: float, now_ms: int) -> list[Effect]:
        """They have left the store, or not: then the next pass finds them again."""
        self._batch = Batch()
        if not isinstance(done.result, txn.Committed):
            self._after = ""
            return self._rest(now)
        return self._go_on(now, now_ms)


def born_ms(task: str) -> int:
    """When a task was submitted, as its id tells: milliseconds since 1970."""
    return int(task.replace("-", "")[:12], 16)


def before(task: str) -> str:
    """The largest id before this one."""
    digits = f"{int(task.replace('-', ''), 16) - 1:032x}"
    return _dashed(digits)


def _window(task: str) -> str:
    return _dashed(task.replace("-", "")[:WINDOW_DIGITS])


def _dashed(digits: str) -> str:
    return "-".join(digits[i:j] for i, j in ((0, 8), (8, 12), (12, 16), (16, 20), (20, 32)) if digits[i:j])
