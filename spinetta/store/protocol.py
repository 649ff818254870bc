"""What a store can do. Direct etcd implements it now; the gateway for workers will implement the same."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from spinetta.model import LeaseId, Revision
from spinetta.txn import Result, Txn


@dataclass(frozen=True, slots=True)
class KeyValue:
    """A key as the store holds it."""

    key: str
    value: bytes
    created: Revision
    modified: Revision
    lease: LeaseId = LeaseId(0)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Single keys read at one revision; None for those that do not exist."""

    revision: Revision
    entries: Mapping[str, KeyValue | None]


@dataclass(frozen=True, slots=True)
class Page:
    """A run of keys in key order, read at one revision. `more`: there are further keys in the range. `total`: how many
    there are in it; 0 when that is not known, as through the gateway."""

    revision: Revision
    entries: tuple[KeyValue, ...]
    more: bool
    total: int = 0


@dataclass(frozen=True, slots=True)
class Change:
    """One event: `value` is None when the key was deleted. `revision` is that of the event."""

    key: str
    value: KeyValue | None
    revision: Revision


@dataclass(frozen=True, slots=True)
class Changes:
    """All events of one or more whole revisions, in order, up to and including `revision`."""

    revision: Revision
    events: tuple[Change, ...]


class Store(Protocol):
    """The cluster's truth.

    Every call has a limit in time. Reads are linearizable unless told otherwise. Errors: `StoreUnavailable` when
    nothing can have happened, `OutcomeUnknown` when a write was sent and not answered, `Compacted` from `watch`.
    """

    async def commit(self, txn: Txn, *, timeout_s: float = 5.0) -> Result:
        """Try a transaction. A lost race is a value, `Conflict`; so is a put under a lease that is gone.

        Raises:
            StoreUnavailable: it was certainly not carried out.
            OutcomeUnknown: it may have been: read back.
        """
        ...

    async def read(self, keys: Sequence[str], *, timeout_s: float = 5.0) -> Snapshot:
        """Read single keys, all at one revision; at most `READ_KEYS_MAX` of them."""
        ...

    async def list(
        self,
        prefix: str,
        *,
        after: str = "",
        limit: int = 0,
        keys_only: bool = False,
        newest_first: bool = False,
        revision: Revision = Revision(0),
        timeout_s: float = 5.0,
    ) -> Page:
        """Keys that begin with `prefix`, in key order, those beyond `after` only.

        `after` is exclusive; with `newest_first` the order is reversed and only keys *before* `after` are returned.
        `limit` 0 means all. `revision` 0 means now; an older one may raise `Compacted`.
        """
        ...

    def watch(self, prefix: str, *, start: Revision) -> AsyncGenerator[Changes, None]:
        """Events of keys that begin with `prefix`, from revision `start` on, for ever.

        Never yields half a revision. The first item comes at once and is empty: it says that the watch stands, and
        that nothing from `start` on has been lost. Close it (``contextlib.aclosing``) when leaving it early.

        Raises:
            Compacted: `start` is no longer to be had; list again and watch from there.
            StoreUnavailable: the connection was lost; list again and watch from there.
        """
        ...

    async def grant_lease(self, ttl_s: int, *, timeout_s: float = 5.0) -> LeaseId:
        """A new lease. Raises as `commit` does; a lease nobody knows of ends by itself."""
        ...

    async def keep_alive(self, lease: LeaseId, *, timeout_s: float = 5.0) -> float | None:
        """Renew a lease once; its new time to live in seconds, or None when it no longer exists."""
        ...

    async def revoke_lease(self, lease: LeaseId, *, timeout_s: float = 5.0) -> None:
        """End a lease and delete its keys; no error if it does not exist."""
        ...

    async def close(self) -> None:
        """Let go of connections. May be called twice."""
        ...


READ_KEYS_MAX = 120  # single keys in one read: they are operations of one etcd transaction (limit 128)
