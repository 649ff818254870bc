"""Claiming: the window on the queue while there is room, and one batch of claims at a time.

A round reads the records of the tasks it wants, claims them in one transaction, and hands what it got to the holdings.
Its resources stay reserved until every claim of it is known to have been won or lost: a claim whose answer was lost may
still commit as long as its queue key has the revision it is guarded by.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import replace

from spinetta import codec, keys, lifecycle, steal, txn
from spinetta.bids import Bid, Round, Stage
from spinetta.container import needs, refusals
from spinetta.events import (
    Changed,
    Commit,
    CommitDone,
    Effect,
    List,
    ListDone,
    Notice,
    Read,
    ReadDone,
    Rejected,
    Unwatch,
    Watch,
    WatchLost,
)
from spinetta.holdings import Holdings
from spinetta.match import uncleared
from spinetta.model import Holding, IncarnationId, NodeRecord, QueueHint, Resources, Revision, State, Task, TaskId
from spinetta.queue import PAGE_KEYS, Waiting, Window
from spinetta.settings import AgentSettings

RETRY_S = 0.5
HOLD_OFF_S = 30.0  # an unfit node would otherwise take the whole queue, a task at a time, and give it back
LINGER_S = 10.0  # a full node keeps its window this long: a slot may be free again in a moment
QUEUE = "queue"


class Claims:
    """The thief: one node's window on the queue and its claims."""

    def __init__(self, settings: AgentSettings) -> None:
        self.settings = settings
        record = settings.record
        self.window = Window(
            record.capacity, frozenset(record.tags), frozenset(record.clearances), frozenset(record.allows)
        )
        self.round: Round | None = None
        self._open = False
        self._watching = False
        self._serial = 0
        self._listing_after: str | None = None
        self._listing_void = False  # the window was cleared meanwhile: a page from its middle is of no use
        self._bids_max = txn.NESTED_MAX
        self._paused = False
        self._not_before_s = 0.0  # after a failure: a pause, or an unreachable store would be asked in a tight loop
        self._reconcile_at_s = 0.0
        self._reading_hints = False
        self._full_since_s: float | None = None
        self._look_again_at_s: float | None = None
        self._short: dict[str, float] = {}  # what this node is short of, and until when it takes nothing that needs it
        self._stale = True  # something changed since the last plan
        self._hungry = False  # as of the last poll; a full node has nothing to look again for

    # --- outside view ---

    def reserved(self, counted: Collection[TaskId] = ()) -> Resources:
        """What the claims under way would take, without tasks that are counted as held already."""
        total = Resources()
        if self.round is not None:
            for task_id, bid in self.round.bids.items():
                if task_id not in counted:
                    total = total + bid.demand
        return total

    @property
    def next_s(self) -> float | None:
        """When `poll` has something to do."""
        times = []
        if self._open and self._watching and self._listing_after is None:
            times.append(self._reconcile_at_s)
        if self._open and self._full_since_s is not None:
            times.append(self._full_since_s + LINGER_S)
        if self._hungry and self.round is None and self._look_again_at_s is not None:
            times.append(self._look_again_at_s)
        if self._paused:  # nothing else is done before the pause is over
            times = [max(t, self._not_before_s) for t in (*times, self._not_before_s)]
        if self.round is not None and self.round.stage is Stage.DOUBTFUL:
            times.append(self.round.act_at_s)
        return min(times, default=None)

    @property
    def clearances(self) -> tuple[str, ...]:
        """The labels that tasks may carry to be claimed here, sorted."""
        return tuple(sorted(self.window.clearances))

    def set_clearances(self, clearances: Collection[str]) -> None:
        """What this node is cleared for has changed: drop what it may no longer run, look again for what it may now.

        A claim under way is guarded by the node's rights as they were, so it cannot commit against the new ones.
        """
        if self.window.clearances == frozenset(clearances):
            return
        gained = frozenset(clearances) - self.window.clearances
        self.window.set_clearances(frozenset(clearances))
        if gained and self._open:
            self._clear()
            self._reconcile_at_s = -math.inf
        self._stale = True

    def touch(self) -> None:
        """Something that a plan depends on has changed (room, peers, the window)."""
        self._stale = True

    # --- the window ---

    def poll(
        self,
        now: float,
        registration: txn.Registration | None,
        incarnation: IncarnationId | None,
        free: Resources | None,
        slots: int,
        peers: Sequence[NodeRecord],
    ) -> list[Effect]:
        """What time and room ask for. `free` None: do not take anything now (draining, fenced, or not known yet)."""
        effects: list[Effect] = []
        if self.round is not None and incarnation != self.round.incarnation:
            self.life_ended()
        if self.round is not None:
            effects += self._pursue(now)
        if self._not_before_s > now:
            return effects
        self._paused = False
        hungry = free is not None and registration is not None and slots > 0 and free.cpu_millis > 0
        self._hungry = hungry
        effects += self._tend_window(now, hungry)
        if hungry and registration is not None and incarnation is not None and free is not None and self.round is None:
            due = self._look_again_at_s is not None and self._look_again_at_s <= now
            if self._stale or due:
                effects += self._plan(now, incarnation, free, slots, peers)
        return effects

    def _tend_window(self, now: float, hungry: bool) -> list[Effect]:
        if hungry:
            self._full_since_s = None
        elif self._open and self._full_since_s is None:
            self._full_since_s = now
        if self._full_since_s is not None and now >= self._full_since_s + LINGER_S:
            return self._close()
        if hungry and not self._open:
            self._open = True
        if not self._open or self._listing_after is not None:
            return []
        if not self._watching or self._reconcile_at_s <= now:
            return self._list("")
        after = self.window.wants_page_after
        return self._list(after) if hungry and after is not None else self._read_hints()

    def _list(self, after: str) -> list[Effect]:
        self._listing_after = after
        return [List(QUEUE, keys.QUEUED, after, PAGE_KEYS)]

    def _close(self) -> list[Effect]:
        effects: list[Effect] = [Unwatch(QUEUE)] if self._watching else []
        self._open = self._watching = False
        self._full_since_s = None
        self._clear()
        return effects

    def _clear(self) -> None:
        self.window.clear()
        self._listing_void = self._listing_after is not None

    def listed(self, done: ListDone, now: float) -> list[Effect]:
        """A page of the queue."""
        after, self._listing_after = self._listing_after, None
        void, self._listing_void = self._listing_void, False
        if not self._open or after is None or (void and after != ""):
            return []
        if done.listing is None:
            self._pause(now)
            return []
        self.window.page(done.listing, after, now)
        self._stale = True
        if after == "":
            self._reconcile_at_s = now + self.settings.reconcile_s
        if self._watching:
            return []
        self._serial += 1
        self._watching = True
        return [Watch(QUEUE, self._serial, keys.QUEUED, Revision(done.listing.revision + 1))]

    def changed(self, changed: Changed, now: float) -> None:
        """Events of the queue."""
        if self._watching and changed.serial == self._serial:
            for change in changed.changes:
                self.window.change(change, now)
            self._stale = True

    def watch_lost(self, lost: WatchLost, now: float) -> None:
        """The watch broke: deletions may have been missed, so nothing in the window can be believed."""
        if self._watching and lost.serial == self._serial:
            self._watching = False
            self._pause(now)
            self._clear()

    def _read_hints(self) -> list[Effect]:
        wanted = () if self._reading_hints else self.window.without_hint()
        if not wanted:
            return []
        self._reading_hints = True
        return [Read("hints", tuple(keys.task(t) for t in wanted))]

    def hints_read(self, done: ReadDone, now: float) -> None:
        """Records of tasks whose queue key had no hint. The record is written with the key, at the same revision."""
        self._reading_hints = False
        if done.reading is None:
            self._pause(now)
            return
        for key, entry in done.reading.entries.items():
            task_id = keys.parse_task(key)
            task = codec.readable(codec.decode_task, entry.value) if entry is not None else None
            if entry is not None and task is not None:
                self.window.set_hint(task_id, entry.modified, QueueHint.of(task.spec))
            # Gone, moved on, unreadable, or not written together with its key: to read it again at once is no use.
            waiting = self.window.entries.get(task_id)
            if waiting is not None and waiting.hint is None:
                self.window.drop(task_id, done.reading.revision)
        self._stale = True

    def hold_off(self, now: float, lacks: str = "") -> None:
        """This node cannot start anything at present: let the others have the queue for a while.

        With `lacks`, as in `Exit`, only what needs that; the rest it goes on taking.
        """
        if lacks:
            self._short[lacks] = now + HOLD_OFF_S
            self._stale = True
        else:
            self._pause(now, HOLD_OFF_S)

    def _pause(self, now: float, for_s: float = RETRY_S) -> None:
        self._paused = True
        self._not_before_s = max(self._not_before_s, now + for_s)

    # --- rounds ---

    def _plan(
        self, now: float, incarnation: IncarnationId, free: Resources, slots: int, peers: Sequence[NodeRecord]
    ) -> list[Effect]:
        self._stale = False
        self._short = {lacks: until_s for lacks, until_s in self._short.items() if until_s > now}
        waiting = [w for w in self.window.entries.values() if not self._short or not self._lacks(w)]
        plan = steal.plan(self.settings.name, waiting, peers, free, now, slots=slots)
        again = (plan.look_again_at_s, *self._short.values())
        self._look_again_at_s = min((s for s in again if s is not None), default=None)
        for w in plan.considered:
            self.window.entries[w.id] = w
        if not plan.claims:
            return []
        bids = {w.id: Bid(w, w.hint.resources) for w in plan.claims[: self._bids_max] if w.hint is not None}
        self.round = Round(Stage.READING, incarnation, bids)
        return [Read("claim", tuple(keys.task(t) for t in bids))]

    def records_read(
        self, done: ReadDone, now: float, now_ms: int, registration: txn.Registration | None
    ) -> list[Effect]:
        """The records of the tasks wanted: claim those that are still as the window showed them."""
        current = self.round
        if current is None or current.stage is not Stage.READING:
            return []
        if done.reading is None or registration is None:
            self._pause(now)
            return self._abandon()
        size_bytes = 0
        for task_id, bid in list(current.bids.items()):
            entry = done.reading.entries.get(keys.task(task_id))
            if entry is None or entry.modified != bid.waiting.revision:
                self.window.drop(task_id, bid.waiting.revision)
                del current.bids[task_id]
                continue
            size_bytes += len(entry.value) + 512
            task = codec.readable(codec.decode_task, entry.value)
            if task is None or task.id != task_id or not self._claimable(task):
                self.window.drop(task_id, bid.waiting.revision)
                del current.bids[task_id]
                continue
            if size_bytes > txn.BATCH_BYTES_MAX and len(current.bids) > 1:
                del current.bids[task_id]
                continue
            self._bid(bid, task, current.incarnation, now_ms)
        return self._commit(registration)

    def _claimable(self, task: Task) -> bool:
        """As the record says: the window has only seen the hint, which anybody who may write could have falsified."""
        spec = task.spec
        return (
            task.state is State.QUEUED
            and not uncleared(spec.clearance, self.window.clearances)
            and not refusals(needs(spec.container, spec.open_files_max), self.window.allows)
        )

    def _lacks(self, waiting: Waiting) -> bool:
        hint = waiting.hint
        return hint is not None and not self._short.keys().isdisjoint((*hint.needs, *dict(hint.resources.countables)))

    def _bid(self, bid: Bid, task: Task, incarnation: IncarnationId, now_ms: int) -> None:
        me = self.settings.name
        bid.demand = task.spec.resources
        bid.task = lifecycle.claimed(task, me, incarnation, now_ms=now_ms)
        grace_s = task.spec.grace_s or self.settings.grace_s
        bid.holding = Holding(bid.task.attempts_started, incarnation, grace_s, overlap=task.spec.overlap)
        record, holding = codec.encode_task(bid.task), codec.encode_holding(bid.holding)
        bid.txn = txn.claim(me, task.id, bid.waiting.revision, record, holding)

    def _commit(self, registration: txn.Registration) -> list[Effect]:
        assert self.round is not None  # noqa: S101 - the caller looked
        nested = [b.txn for b in self.round.bids.values() if b.txn is not None]
        if not nested:
            return self._abandon()
        self.round.stage = Stage.COMMITTING
        return [Commit("claim", txn.batch(nested, registration.guards()))]

    def answered(self, done: CommitDone, now: float, holdings: Holdings) -> bool:
        """The answer to a batch of claims. False: the registration itself was refused."""
        current = self.round
        if current is None or current.stage is not Stage.COMMITTING:
            return True
        if done.result is None:
            current.doubted = True
            current.stage = Stage.DOUBTFUL
            current.act_at_s = now + RETRY_S
            return True
        refused = isinstance(done.result, txn.Conflict)
        self._bids_max = min(2 * self._bids_max, txn.NESTED_MAX)
        if isinstance(done.result, txn.Committed):
            for (task_id, bid), won in zip(list(current.bids.items()), done.result.nested, strict=True):
                if won and bid.task is not None and bid.holding is not None:
                    holdings.claimed(bid.task, done.result.revision, bid.holding)
                elif current.doubted:
                    continue  # lost perhaps to our own earlier proposal
                self.window.drop(task_id, bid.waiting.revision)
                del current.bids[task_id]
        if current.doubted and current.bids:
            current.stage = Stage.DOUBTFUL
            current.act_at_s = now + (RETRY_S if refused else 0.0)
        else:
            self._abandon()
        return not refused

    def rejected(self, why: Rejected, now: float) -> list[Effect]:
        """The store does not take a batch of claims as it is: fewer of them, until it shows which one it is.

        That one is left alone until the whole queue is looked through again; others, who have an etcd that takes more,
        may claim it, and it can be cancelled.
        """
        current = self.round
        if current is None or current.stage is not Stage.COMMITTING:
            return []
        self._pause(now)
        if current.doubted:  # an earlier proposal of the same may still commit
            current.stage = Stage.DOUBTFUL
            current.act_at_s = now + RETRY_S
            return []
        self._abandon()
        if len(current.bids) > 1:
            self._bids_max = len(current.bids) // 2
            return []
        ((task_id, bid),) = current.bids.items()
        self.window.drop(task_id, bid.waiting.revision)
        return [Notice(f"task {task_id} is left in the queue, because it cannot be claimed: {why.text}")]

    def _abandon(self) -> list[Effect]:
        self.round = None
        self._stale = True
        return []

    # --- lost answers ---

    def _pursue(self, now: float) -> list[Effect]:
        current = self.round
        if current is None or current.stage is not Stage.DOUBTFUL or current.act_at_s > now:
            return []
        current.stage = Stage.READING_BACK
        me = self.settings.name
        return [Read("claim-doubt", tuple(k for t in current.bids for k in (keys.running(me, t), keys.queued(t))))]

    def read_back(
        self, done: ReadDone, now: float, registration: txn.Registration | None, holdings: Holdings
    ) -> list[Effect]:
        """What became of claims whose answer was lost.

        A running key of this incarnation: won. A queue key that has changed: lost. Otherwise the proposal may still
        be under way, and the claim is made again: both carry the same guard, so at most one of them commits.
        """
        current = self.round
        if current is None or current.stage is not Stage.READING_BACK:
            return []
        current.stage = Stage.DOUBTFUL
        current.act_at_s = now + RETRY_S
        if done.reading is None:
            return []
        me, labels = self.settings.name, self.window.clearances
        for task_id, bid in list(current.bids.items()):
            running = done.reading.entries.get(keys.running(me, task_id))
            queued = done.reading.entries.get(keys.queued(task_id))
            if running is not None and bid.is_won_by(running):
                assert bid.task is not None and bid.holding is not None  # noqa: S101, PT018 - is_won_by looked
                holdings.claimed(bid.task, running.created, bid.holding)
            elif (
                queued is not None
                and queued.modified == bid.waiting.revision
                # What is no longer covered was proposed under rights that were gone at this reading: lost for good.
                and (
                    registration is None
                    or bid.is_covered_by(labels)
                    or done.reading.revision < registration.acl_revision
                )
            ):
                continue
            self.window.drop(task_id, bid.waiting.revision)
            del current.bids[task_id]
        if not current.bids:
            return self._abandon()
        if registration is None or not all(bid.is_covered_by(labels) for bid in current.bids.values()):
            return []
        return self._commit(registration)

    def life_ended(self) -> None:
        """The incarnation has been condemned or closed: none of its claims can commit any more."""
        self.round = None
        self._stale = True

    def without_wait(self) -> None:
        """Peers came or went: the ranks must be computed anew."""
        for task_id, w in self.window.entries.items():
            self.window.entries[task_id] = replace(w, wait_s=None)
        self._stale = True
