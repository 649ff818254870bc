"""A small model of etcd: synchronous, deterministic, no I/O. The contract tests hold it to the real one.

What it leaves out is what `spinetta.txn` cannot say: versions, values in guards, range deletes, several members.
Time is an argument: a lease ends when `advance` or `expire` says so, never by itself.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from spinetta.errors import Compacted, InvariantViolation
from spinetta.model import LeaseId, Revision
from spinetta.store.protocol import Change, Changes, KeyValue, Page, Snapshot
from spinetta.txn import (
    Absent,
    Committed,
    Conflict,
    CreatedAt,
    Delete,
    Guard,
    Put,
    Result,
    RevisionIs,
    Txn,
    Write,
)

OPS_MAX = 128  # etcd's default --max-txn-ops, counted along a path into nested transactions
LEASE_TTL_MIN_S = 2  # etcd raises shorter ones: 1.5 election timeouts, rounded up
KeyOrder = list[str]  # by this name because a method of the model is called list
KEY_END = "\U0010ffff"  # beyond every key


@dataclass(slots=True)
class _Lease:
    ttl_s: int
    ends_s: float
    keys: set[str] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class _Entry:
    """What one revision changed, and what stood there before (for reads of the past)."""

    revision: Revision
    events: tuple[Change, ...]
    before: tuple[KeyValue | None, ...]


class EtcdModel:
    """One etcd, as a value that changes only when called.

    Attributes:
        revision: of the latest change; an empty store has 1, as etcd does.
        compacted: history up to and including this revision is gone; 0: none.
    """

    def __init__(self) -> None:
        self.revision = Revision(1)
        self.compacted = Revision(0)
        self._now_s = 0.0
        self._live: dict[str, KeyValue] = {}
        self._order: list[str] = []
        self._log: list[_Entry] = []
        self._leases: dict[LeaseId, _Lease] = {}
        self._next_lease = 1

    # --- transactions ------------------------------------------------------------------------------------------

    def commit(self, txn: Txn) -> Result:
        """Carry out a transaction. A put under a lease that is gone is a guard that fails: `Conflict`.

        Raises:
            InvariantViolation: etcd would refuse its form (a key put twice, too many operations, nested too deep).
        """
        _check_form(txn)
        if not self._holds(txn.when):
            return Conflict(self.revision)
        taken = tuple(self._holds(each.when) for each in txn.nested)
        writes = [*txn.then]
        for each, held in zip(txn.nested, taken, strict=True):
            if held:
                writes += each.then
        for write in writes:
            if isinstance(write, Put) and write.lease and write.lease not in self._leases:
                return Conflict(self.revision)
        self._write(writes)
        return Committed(self.revision, taken)

    def _holds(self, guards: Iterable[Guard]) -> bool:
        live = self._live
        for guard in guards:  # not by `match`, which takes twice as long: this is the simulator's innermost loop
            if isinstance(guard, RevisionIs):
                entry = live.get(guard.key)
                if (entry.modified if entry else 0) != guard.revision:
                    return False
            elif isinstance(guard, CreatedAt):
                entry = live.get(guard.key)
                if (entry.created if entry else 0) != guard.revision:
                    return False
            elif isinstance(guard, Absent):
                if guard.key in live:
                    return False
            else:
                at = bisect_left(self._order, guard.prefix)
                if at < len(self._order) and self._order[at].startswith(guard.prefix):
                    return False
        return True

    def _write(self, writes: Sequence[Write]) -> None:
        revision = Revision(self.revision + 1)
        events: list[Change] = []
        before: list[KeyValue | None] = []
        for write in writes:
            old = self._live.get(write.key)
            if isinstance(write, Put):
                new = KeyValue(write.key, write.value, old.created if old else revision, revision, write.lease)
                self._set(old, new)
                events.append(Change(write.key, new, revision))
                before.append(old)
            elif old is not None:
                self._remove(old)
                events.append(Change(old.key, None, revision))
                before.append(old)
        if events:  # deleting what is not there makes no revision
            self.revision = revision
            self._log.append(_Entry(revision, tuple(events), tuple(before)))

    def _set(self, old: KeyValue | None, new: KeyValue) -> None:
        if old is None:
            insort(self._order, new.key)
        elif old.lease and old.lease != new.lease:
            self._leases[old.lease].keys.discard(old.key)  # a put that does not name the lease detaches
        if new.lease:
            self._leases[new.lease].keys.add(new.key)
        self._live[new.key] = new

    def _remove(self, old: KeyValue) -> None:
        del self._live[old.key]
        del self._order[bisect_left(self._order, old.key)]
        if old.lease:
            self._leases[old.lease].keys.discard(old.key)

    # --- reading -----------------------------------------------------------------------------------------------

    def get(self, key: str) -> KeyValue | None:
        """One key as it is now."""
        return self._live.get(key)

    def read(self, keys: Iterable[str]) -> Snapshot:
        """Single keys, all as they are now."""
        return Snapshot(self.revision, {key: self._live.get(key) for key in keys})

    def list(
        self,
        prefix: str,
        *,
        after: str = "",
        limit: int = 0,
        keys_only: bool = False,
        newest_first: bool = False,
        revision: Revision = Revision(0),
    ) -> Page:
        """As `Store.list`. Raises `Compacted` when `revision` is older than the compaction."""
        past = bool(revision) and revision != self.revision
        live, order = self._at(revision) if past else (self._live, self._order)
        low, high = prefix, _end(prefix)
        if after and newest_first:
            high = min(high, after)
        elif after:
            low = max(low, after + "\0")
        found = order[bisect_left(order, low) : bisect_left(order, high)]
        if newest_first:
            found.reverse()
        more, total = 0 < limit < len(found), len(found)
        if more:
            del found[limit:]
        entries = (live[key] for key in found)
        if keys_only:
            entries = (KeyValue(e.key, b"", e.created, e.modified, e.lease) for e in entries)
        return Page(revision or self.revision, tuple(entries), more, total)

    def _at(self, revision: Revision) -> tuple[dict[str, KeyValue], KeyOrder]:
        """The keys as they were, found by undoing: slow, for the few reads of the past."""
        if revision < self.compacted:
            raise Compacted(self.compacted)
        if revision > self.revision:
            raise InvariantViolation(f"revision {revision} has not been: the store is at {self.revision}")
        live = dict(self._live)
        for entry in reversed(self._log):
            if entry.revision <= revision:
                break
            for event, before in zip(reversed(entry.events), reversed(entry.before), strict=True):
                if before is None:
                    live.pop(event.key, None)
                else:
                    live[event.key] = before
        return live, sorted(live)

    def events_since(self, revision: Revision, prefix: str = "") -> tuple[Changes, ...]:
        """What a watch from `revision` on is owed by now, one `Changes` a revision; revisions without a match left out.

        Raises:
            Compacted: some of it is gone.
        """
        if revision <= self.compacted:
            raise Compacted(self.compacted)
        found = []
        for entry in self._log[self._place(revision) :]:
            events = tuple(event for event in entry.events if event.key.startswith(prefix))
            if events:
                found.append(Changes(entry.revision, events))
        return tuple(found)

    def _place(self, revision: Revision) -> int:
        """Where in the log a revision is: each of them has made exactly one entry."""
        return max(0, revision - self._log[0].revision) if self._log else 0

    def history(self) -> tuple[Changes, ...]:
        """All that has not been compacted, for checkers."""
        return tuple(Changes(entry.revision, entry.events) for entry in self._log)

    def compact(self, revision: Revision) -> None:
        """Forget the history up to and including `revision`; what lives is not touched."""
        if not self.compacted < revision <= self.revision:
            raise InvariantViolation(f"cannot compact at {revision}: {self.compacted} … {self.revision}")
        self.compacted = revision
        del self._log[: self._place(Revision(revision + 1))]

    # --- leases ------------------------------------------------------------------------------------------------

    def grant_lease(self, ttl_s: int) -> LeaseId:
        """A new lease that lasts `ttl_s` from the latest `advance`; at least `LEASE_TTL_MIN_S`."""
        lease = LeaseId(self._next_lease)
        self._next_lease += 1
        ttl_s = max(ttl_s, LEASE_TTL_MIN_S)
        self._leases[lease] = _Lease(ttl_s, self._now_s + ttl_s)
        return lease

    def keep_alive(self, lease: LeaseId) -> float | None:
        """Renew; the time to live in seconds, None when there is no such lease."""
        found = self._leases.get(lease)
        if found is None:
            return None
        found.ends_s = self._now_s + found.ttl_s
        return float(found.ttl_s)

    def revoke_lease(self, lease: LeaseId) -> None:
        """End a lease and delete its keys in one revision; no error if it does not exist."""
        found = self._leases.get(lease)
        if found is not None:
            self._write([Delete(key) for key in sorted(found.keys)])
            del self._leases[lease]

    expire = revoke_lease

    def due_leases(self, now_s: float) -> tuple[LeaseId, ...]:
        """Leases that have run out at `now_s`, in the order they did: for a simulator that delays their end."""
        due = sorted((held.ends_s, lease) for lease, held in self._leases.items() if held.ends_s <= now_s)
        return tuple(lease for _, lease in due)

    def next_expiry_s(self) -> float | None:
        """When the next lease runs out; None when there is none."""
        return min((held.ends_s for held in self._leases.values()), default=None)

    def advance(self, now_s: float) -> tuple[LeaseId, ...]:
        """Time is now `now_s` (never backwards): end the leases that have run out, and say which."""
        self._now_s = max(self._now_s, now_s)
        due = self.due_leases(self._now_s)
        for lease in due:
            self.expire(lease)
        return due

    def restart_leases(self) -> None:
        """A new etcd leader gives every lease its full time again."""
        for held in self._leases.values():
            held.ends_s = self._now_s + held.ttl_s


def _end(prefix: str) -> str:
    return prefix[:-1] + chr(ord(prefix[-1]) + 1) if prefix else KEY_END


def _check_form(txn: Txn) -> None:
    """What etcd checks before it looks at the guards; the order of its steps shows in what it lets through."""
    own_ops = max(len(txn.when), len(txn.then) + len(txn.nested))
    if own_ops > OPS_MAX:
        raise InvariantViolation(f"{own_ops} operations in one transaction: etcd takes {OPS_MAX}")
    deleted = {write.key for write in txn.then if not isinstance(write, Put)}
    put: set[str] = set()
    for each in txn.nested:
        if each.nested:
            raise InvariantViolation("transactions nest one level deep")
        if own_ops + max(len(each.when), len(each.then)) > OPS_MAX:
            raise InvariantViolation(f"too many operations along a path: etcd takes {OPS_MAX}")
        their_deletes = {write.key for write in each.then if not isinstance(write, Put)}
        their_puts: set[str] = set()
        for write in each.then:
            if isinstance(write, Put):
                if write.key in their_puts or write.key in their_deletes:
                    raise InvariantViolation(f"{write.key} is written twice in one transaction")
                their_puts.add(write.key)
        for key in their_puts:
            if key in put or key in deleted:
                raise InvariantViolation(f"{key} is written twice in one transaction")
        put |= their_puts
        deleted |= their_deletes
    for write in txn.then:
        if isinstance(write, Put):
            if write.key in put or write.key in deleted:
                raise InvariantViolation(f"{write.key} is written twice in one transaction")
            put.add(write.key)
