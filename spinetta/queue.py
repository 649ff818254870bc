"""What is waiting: a bounded window on the queue, holding only tasks that this node could run when empty.

The window covers the keys from the beginning of the queue up to `covered_to` (None: all of it). Tasks that can never
run here take no place in it, so that a thousand of them at the head do not hide the one behind them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from spinetta import keys
from spinetta.codec import decode_hint
from spinetta.events import Change, Entry, Listing
from spinetta.match import why_never
from spinetta.model import QueueHint, Resources, Revision, TaskId

WINDOW_MAX = 512  # choice enough for packing a few hundred cores; 512 hints are about 50 KB
PAGE_KEYS = 256  # a listing stays below 100 KB and a few milliseconds
SEEN_MAX = 4 * WINDOW_MAX  # times remembered over windows that were closed soon after one another
HINTS_READ_MAX = 64  # tasks without a hint read at once


@dataclass(frozen=True, slots=True)
class Waiting:
    """A queued task as this node sees it. `hint` is None until the task's record has been read."""

    id: TaskId
    revision: Revision
    hint: QueueHint | None
    seen_at_s: float
    wait_s: float | None = None  # set by stealing; None: not considered yet


class Window:
    """A node's bounded view of ``/status/queued/``."""

    def __init__(
        self,
        capacity: Resources,
        tags: frozenset[str],
        clearances: frozenset[str] = frozenset(),
        allows: frozenset[str] = frozenset(),
    ) -> None:
        self.capacity = capacity
        self.tags = tags
        self.clearances = clearances
        self.allows = allows
        self.entries: dict[TaskId, Waiting] = {}
        self.covered_to: str | None = ""
        self._never: dict[TaskId, Revision] = {}
        self._seen: dict[TaskId, tuple[Revision, float]] = {}

    def clear(self) -> None:
        """Forget all but when each was first seen: the next page begins at the head of the queue.

        A node that is full most of the time would otherwise see a large task for the first time again and again, and
        never know that it starves.
        """
        shown = {t: (w.revision, w.seen_at_s) for t, w in self.entries.items()}
        self._seen = shown if len(self._seen) > SEEN_MAX else {**self._seen, **shown}
        self.entries.clear()
        self._never.clear()
        self.covered_to = ""

    @property
    def wants_page_after(self) -> str | None:
        """The key after which the next page should begin; None when there is enough or no more."""
        if self.covered_to is None or len(self.entries) > WINDOW_MAX // 2:
            return None
        return self.covered_to

    def page(self, listing: Listing, after: str, now: float) -> None:
        """Take in a page that was listed beyond `after`.

        Entries within the page's range that the page does not show are gone, unless they are newer than it.
        """
        end = listing.entries[-1].key if listing.more and listing.entries else None
        shown = {e.key for e in listing.entries}
        for task, waiting in list(self.entries.items()):
            key = keys.queued(task)
            inside = key > after and (end is None or key <= end)
            if inside and key not in shown and waiting.revision <= listing.revision:
                del self.entries[task]
        for entry in listing.entries:
            self._put(entry, now)
        self.covered_to = end

    def change(self, change: Change, now: float) -> None:
        """Take in one event of the watch."""
        task = keys.parse_task(change.key)
        known = self.entries.get(task)
        if change.entry is None:
            self._never.pop(task, None)
            if known is not None and known.revision < change.revision:
                del self.entries[task]
        elif known is not None or self.covered_to is None or change.key <= self.covered_to:
            self._put(change.entry, now)
            self._shrink()

    def set_clearances(self, clearances: frozenset[str]) -> None:
        """What this node is cleared for has changed.

        What it may no longer run leaves the window. For more to show, clear it and list again: tasks that did not
        match are not kept.
        """
        self.clearances = clearances
        self._never.clear()
        for task, waiting in list(self.entries.items()):
            if waiting.hint is not None and self._never_here(waiting.hint):
                del self.entries[task]

    def drop(self, task: TaskId, revision: Revision) -> None:
        """It turned out that the key no longer has this revision."""
        known = self.entries.get(task)
        if known is not None and known.revision <= revision:
            del self.entries[task]

    def without_hint(self) -> tuple[TaskId, ...]:
        """Tasks whose record must be read before they can be matched."""
        return tuple(t for t, w in self.entries.items() if w.hint is None)[:HINTS_READ_MAX]

    def set_hint(self, task: TaskId, revision: Revision, hint: QueueHint) -> None:
        """The record of a task without a hint has been read."""
        known = self.entries.get(task)
        if known is None:
            return
        if known.revision != revision:  # the key has moved on since; the watch will bring it as it is now
            self.drop(task, revision)
            return
        if self._never_here(hint):
            del self.entries[task]
            self._remember_never(task, revision)
        else:
            self.entries[task] = replace(known, hint=hint)

    def _put(self, entry: Entry, now: float) -> None:
        task = keys.parse_task(entry.key)
        known = self.entries.get(task)
        if known is not None and known.revision >= entry.modified:
            return
        if self._never.get(task) == entry.modified:
            return
        hint = decode_hint(entry.value)
        if hint is not None and self._never_here(hint):
            self.entries.pop(task, None)
            return
        revision, seen_at_s = self._seen.get(task, (0, now))
        if revision != entry.modified:
            seen_at_s = now
        self.entries[task] = Waiting(task, entry.modified, hint, seen_at_s)

    def _never_here(self, hint: QueueHint) -> bool:
        return why_never(hint, self.capacity, self.tags, self.clearances, self.allows) is not None

    def _remember_never(self, task: TaskId, revision: Revision) -> None:
        # Only tasks without a hint are remembered: reading their record again on every reconcile would be waste.
        if len(self._never) >= WINDOW_MAX:
            self._never.clear()
        self._never[task] = revision

    def _shrink(self) -> None:
        if len(self.entries) <= 2 * WINDOW_MAX:
            return
        kept = sorted(self.entries)[:WINDOW_MAX]
        self.covered_to = keys.queued(kept[-1])
        self.entries = {t: self.entries[t] for t in kept}
