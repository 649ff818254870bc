"""What the services of trust have in common: reading records with what guards them, writing, asking for rights."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from spinetta import keys, names, trustcodec
from spinetta.access import GroupAcl
from spinetta.accesstxn import Change, Seen
from spinetta.codec import readable
from spinetta.errors import OutcomeUnknown, StoreUnavailable, UserError
from spinetta.model import Revision
from spinetta.node.services import limits
from spinetta.node.services.desk import Asked
from spinetta.store.protocol import KeyValue, Store
from spinetta.trust.backoff import Backoff
from spinetta.txn import Committed, Guard, RevisionIs, Txn

T = TypeVar("T")
A = TypeVar("A")

CLEARANCES_MAX = 64  # labels of one node, user, group or token: each is a key to wrap for every node that has it
GROUPS_MAX = 32  # of one node: all are read to decide about it


@dataclass(frozen=True, slots=True)
class Entries:
    """Records as they were read at one revision: what a decision rests on."""

    entries: Mapping[str, KeyValue | None] = field(repr=False)

    def value(self, kind: type[T], key: str) -> T | None:
        """The record; None when there is none."""
        entry = self.entries[key]
        return trustcodec.decode(kind, entry.value) if entry is not None else None

    def seen(self, key: str) -> Seen:
        """The guard that it is still so."""
        entry = self.entries[key]
        return Seen(key, entry.modified if entry is not None else Revision(0))

    def change(self, key: str, value: object) -> Change:
        """A new value for it."""
        return Change(self.seen(key), trustcodec.encode(value))


def are_held(found: Entries, guards: Iterable[Guard]) -> bool:
    """Whether the records that were read are those that these guards, a caller's, have seen: for what is done without a
    transaction, which would look itself."""
    return all(
        found.seen(g.key).revision == g.revision for g in guards if isinstance(g, RevisionIs) and g.key in found.entries
    )


async def read(store: Store, those: Sequence[str]) -> Entries:
    """Read records at one revision."""
    return Entries((await store.read(those)).entries)


async def read_under(store: Store, prefix: str, kind: type[T], limit: int) -> dict[str, tuple[T, Seen]]:
    """All records under a prefix, by key, each with its guard.

    Raises:
        UserError: there are more than `limit`, which cannot have come about by our calls.
    """
    page = await store.list(prefix, limit=limit + 1)
    if len(page.entries) > limit:
        raise UserError(f"there are more than {limit} records under {prefix}", reason="too-large")
    return {e.key: (trustcodec.decode(kind, e.value), Seen(e.key, e.modified)) for e in page.entries}


async def read_readable(store: Store, prefix: str, kind: type[T], limit: int) -> dict[str, T | None]:
    """As `read_under`, for who must go on all the same: None for a record that cannot be read, which is neither a yes
    nor a no."""
    page = await store.list(prefix, limit=limit + 1)
    if len(page.entries) > limit:
        raise UserError(f"there are more than {limit} records under {prefix}", reason="too-large")
    return {e.key: readable(partial(trustcodec.decode, kind), e.value) for e in page.entries}


async def read_apart(store: Store, prefix: str, kind: type[T], limit: int) -> tuple[list[T], list[str]]:
    """As `read_readable`, for lists: the records, and the keys of those that cannot be read, as text for messages."""
    found = await read_readable(store, prefix, kind, limit)
    unreadable = [key.encode("utf-8", "backslashreplace").decode() for key, value in found.items() if value is None]
    return [value for value in found.values() if value is not None], unreadable


@dataclass(frozen=True, slots=True)
class Groups:
    """Groups of a node, as they were read.

    Attributes:
        records: in the order asked for. A group without a record grants nothing.
        touched: the records written again as they are. Whoever derives a node's rights from a group writes it, so that
            a change of the group that has looked at its members before this node was one conflicts, and looks again.
        absent: those without a record must still be without.
    """

    records: tuple[GroupAcl, ...] = ()
    touched: tuple[Change, ...] = ()
    absent: tuple[Seen, ...] = ()

    @property
    def missing(self) -> tuple[str, ...]:
        """The names without a record."""
        return tuple(s.key.removeprefix(keys.ACL_GROUP) for s in self.absent)


async def read_groups(store: Store, wanted: Sequence[str]) -> Groups:
    """The records of groups, and what guards a decision on them."""
    if not wanted:
        return Groups()
    of = {keys.acl_group(name): name for name in wanted}
    found = await read(store, list(of))
    return Groups(
        tuple(found.value(GroupAcl, key) or GroupAcl(name) for key, name in of.items()),
        tuple(Change(found.seen(key), e.value) for key in of if (e := found.entries[key]) is not None),
        tuple(found.seen(key) for key in of if found.entries[key] is None),
    )


async def check_room(store: Store, prefix: str, limit: int, what: str, hint: str) -> None:
    """See that one more record may be made.

    Raises:
        UserError: there are as many as there may be.
    """
    page = await store.list(prefix, keys_only=True, limit=limit)
    if len(page.entries) >= limit:
        raise UserError(f"there are {limit} {what} already, and no more may be", hint=hint, reason="too-many")


async def settle(attempt: Callable[[], Awaitable[A | None]]) -> A:
    """Look and try until it is settled: None from `attempt`: something changed meanwhile, look again.

    An attempt whose answer was lost is made again too: it reads what has come about.

    Raises:
        StoreUnavailable: it does not come to rest.
        OutcomeUnknown: the last attempt's answer was lost.
    """
    unknown: OutcomeUnknown | None = None
    wait = Backoff(limits.TRY_WAIT_S, limits.TRY_WAIT_MAX_S)
    for _ in range(limits.TRIES_MAX):
        try:
            found = await attempt()
        except OutcomeUnknown as e:
            unknown, found = e, None
        else:
            unknown = None
        if found is not None:
            return found
        await wait.pause()
    raise unknown or StoreUnavailable("the records of rights change too fast: nothing was changed by this call")


async def committed(store: Store, txn: Txn, asked: Asked) -> bool:
    """Whether a transaction went through; False: look again. The audit log is told at which revision."""
    result = await store.commit(txn)
    if isinstance(result, Committed):
        asked.revision = result.revision
        return True
    return False


def clearances(labels: Iterable[str], where: str) -> tuple[str, ...]:
    """Labels, checked, sorted, each once.

    Raises:
        UserError: one is none, or there are too many.
    """
    found = sorted({names.check_clearance(label, where) for label in labels})
    if len(found) > CLEARANCES_MAX:
        raise UserError(f"at most {CLEARANCES_MAX} clearances", field=where, reason="too-many")
    return tuple(found)


def groups(those: Iterable[str], where: str) -> tuple[str, ...]:
    """Names of groups, checked, sorted, each once.

    Raises:
        UserError: one is none, or there are too many.
    """
    found = sorted({names.check_tag(name, where) for name in those})
    if len(found) > GROUPS_MAX:
        raise UserError(f"at most {GROUPS_MAX} groups", field=where, reason="too-many")
    return tuple(found)
