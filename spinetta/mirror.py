"""A small prefix of the store kept in memory: list, watch from there on, list again after any loss and now and then.

Known watch bugs of etcd 3.4 make one delivery of an event no certainty; the periodic listing can do all that the watch
does, only later.
"""

from __future__ import annotations

from dataclasses import dataclass

from spinetta.events import Change, Changed, Effect, Entry, List, ListDone, Listing, Unwatch, Watch, WatchLost
from spinetta.model import Revision

RETRY_S = 0.5  # after an unanswered listing or a lost watch: soon, but not in a storm


@dataclass(frozen=True, slots=True)
class Delta:
    """A key that changed in the mirror. `revision`: of the change, or of the listing that showed it."""

    key: str
    old: Entry | None
    new: Entry | None
    revision: Revision


class Mirror:
    """All keys of one prefix, as of the latest revision heard of."""

    def __init__(self, tag: str, prefix: str, reconcile_s: float) -> None:
        self.tag = tag
        self.prefix = prefix
        self.entries: dict[str, Entry] = {}
        self.synced = False
        self.wanted = False
        self._reconcile_s = reconcile_s
        self._serial = 0
        self._watching = False
        self._listing = False
        self._pausing = False
        self._list_at_s: float | None = None
        self._recent: dict[str, Revision] = {}
        self._listed_at = Revision(0)

    @property
    def next_s(self) -> float | None:
        """When `poll` has something to do."""
        return None if not self.wanted or self._listing else self._list_at_s

    def open(self, now: float) -> None:
        """Begin to mirror."""
        if not self.wanted:
            self.wanted = True
            self._list_at_s = now

    def refresh(self, now: float) -> None:
        """List as soon as the pause after a failure allows."""
        if self.wanted and not self._listing and not self._pausing:
            self._list_at_s = now

    def close(self) -> list[Effect]:
        """Stop mirroring and forget."""
        effects: list[Effect] = [Unwatch(self.tag)] if self._watching else []
        self.wanted = self.synced = self._watching = False
        self._list_at_s = None
        self.entries.clear()
        return effects

    def poll(self, now: float) -> list[Effect]:
        """List when it is time."""
        if self.next_s is None or self.next_s > now:
            return []
        self._listing = True
        self._pausing = False
        self._recent.clear()
        return [List(self.tag, self.prefix)]

    def listed(self, done: ListDone, now: float) -> tuple[list[Delta], list[Effect]]:
        """Take in a listing."""
        self._listing = False
        if not self.wanted:
            return [], []
        if done.listing is None:
            self._pausing = True
            self._list_at_s = now + RETRY_S
            return [], []
        self._list_at_s = now + self._reconcile_s
        deltas = self._compare(done.listing)
        self.synced = True
        if self._watching:
            return deltas, []
        self._serial += 1
        self._watching = True
        return deltas, [Watch(self.tag, self._serial, self.prefix, Revision(done.listing.revision + 1))]

    def changed(self, changed: Changed) -> list[Delta]:
        """Take in events."""
        if not self._watching or changed.serial != self._serial:
            return []
        return [d for c in changed.changes if (d := self._apply(c)) is not None]

    def lost(self, lost: WatchLost, now: float) -> None:
        """The watch broke: what is in memory stays, and is compared with a new listing soon."""
        if self._watching and lost.serial == self._serial:
            self._watching = False
            if not self._listing:
                self._pausing = True
                self._list_at_s = now + RETRY_S

    def _apply(self, change: Change) -> Delta | None:
        if change.revision <= self._listed_at:
            return None  # a watch that lags behind a listing would bring back what is gone
        if self._listing:
            self._recent[change.key] = change.revision
        old = self.entries.get(change.key)
        if old is not None and old.modified >= change.revision:
            return None
        if change.entry is None:
            if old is None:
                return None
            del self.entries[change.key]
        else:
            self.entries[change.key] = change.entry
        return Delta(change.key, old, change.entry, change.revision)

    def _compare(self, listing: Listing) -> list[Delta]:
        # Events that came while the listing was under way may be newer than it: for their keys the event counts.
        shown = {e.key: e for e in listing.entries}
        deltas = []
        for key in sorted(shown.keys() | self.entries.keys()):
            old, new = self.entries.get(key), shown.get(key)
            if self._recent.get(key, 0) > listing.revision or (old is not None and old.modified > listing.revision):
                continue
            if (old and old.modified) == (new and new.modified):
                continue
            if new is None:
                del self.entries[key]
            else:
                self.entries[key] = new
            deltas.append(Delta(key, old, new, listing.revision))
        self._recent.clear()
        self._listed_at = listing.revision
        return deltas
