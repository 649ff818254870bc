"""What the agent is told and what it wants done: events in, effects out, all of them values.

Each effect yields exactly one event, told at the effect, except `Watch`, which yields `Changed` until it is `Unwatch`ed
or lost. An effect that failed for want of an answer yields its event with None in the place of the answer: the agent
then reads back or tries again, and never takes "no answer" for "no".
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from spinetta.model import Exit, IncarnationId, LeaseId, NodeId, NodeRecord, Revision, TaskId, TaskSpec
from spinetta.txn import Result, Txn


@dataclass(frozen=True, slots=True)
class CaseTag:
    """Marks what the leader asks about one condemned (or to be condemned) node, as of a revision of its record."""

    step: Literal["condemn", "list", "read", "requeue", "close"]
    node: NodeId
    revision: Revision


@dataclass(frozen=True, slots=True)
class CollectTag:
    """Marks what the leader asks on its way through the finished tasks; `office`: as of when it holds the office."""

    step: Literal["count", "page", "read", "drop"]
    office: Revision


Tag = str | CaseTag | CollectTag
"""Set by the agent, handed back with the answer."""


# --- what the store holds, as the agent sees it ------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Entry:
    """A key with its revisions."""

    key: str
    value: bytes
    created: Revision
    modified: Revision
    lease: LeaseId = LeaseId(0)


@dataclass(frozen=True, slots=True)
class Change:
    """A key was put (`entry`) or deleted (None) at `revision`."""

    key: str
    entry: Entry | None
    revision: Revision


@dataclass(frozen=True, slots=True)
class Listing:
    """Keys of a prefix at one revision; `more`: it was cut at the limit. `total`: how many there are in the range;
    0: not known, as through the gateway."""

    revision: Revision
    entries: tuple[Entry, ...]
    more: bool = False
    total: int = 0


@dataclass(frozen=True, slots=True)
class Reading:
    """Single keys at one revision."""

    revision: Revision
    entries: Mapping[str, Entry | None]


# --- effects -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Commit:
    """Try a transaction. → `CommitDone`."""

    tag: Tag
    txn: Txn


@dataclass(frozen=True, slots=True)
class Read:
    """Read single keys at one revision. → `ReadDone`."""

    tag: Tag
    keys: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class List:
    """List keys of a prefix beyond `after`. → `ListDone`."""

    tag: Tag
    prefix: str
    after: str = ""
    limit: int = 0


@dataclass(frozen=True, slots=True)
class Watch:
    """Watch a prefix from a revision on. → `Changed`…, then `WatchLost` unless it was ended by `Unwatch`.

    `serial` tells this watch from earlier ones of the same tag, whose late events must be ignored.
    """

    tag: str
    serial: int
    prefix: str
    start: Revision


@dataclass(frozen=True, slots=True)
class Unwatch:
    """End a watch. Yields nothing."""

    tag: str


@dataclass(frozen=True, slots=True)
class GrantLease:
    """→ `LeaseGranted`."""

    tag: Tag
    ttl_s: int


@dataclass(frozen=True, slots=True)
class KeepAlive:
    """Renew a lease once. → `KeptAlive`."""

    tag: Tag
    lease: LeaseId


@dataclass(frozen=True, slots=True)
class RevokeLease:
    """Best effort; a lease that is not revoked runs out. Yields nothing."""

    lease: LeaseId


@dataclass(frozen=True, slots=True)
class Remember:
    """Write to disk which incarnation is ours, before it is registered. → `Remembered`."""

    incarnation: IncarnationId


@dataclass(frozen=True, slots=True)
class Start:
    """Start an attempt; doing it twice starts it once. One that has to be prepared waits for `Begin`, as soon as
    `Prepared` has been told. → `Started`."""

    spec: TaskSpec
    attempt: int
    token: Revision
    incarnation: IncarnationId
    grace_s: float


@dataclass(frozen=True, slots=True)
class Begin:
    """Let an attempt begin for which all has been brought in. The answer to its `Start` is still to come."""

    key: str


@dataclass(frozen=True, slots=True)
class Stop:
    """Ask for the end of an attempt; `AttemptEnded` follows when it has come. Yields nothing by itself."""

    key: str
    why: str


@dataclass(frozen=True, slots=True)
class Forget:
    """The end of an attempt has been dealt with: clean up. May be repeated. Yields nothing."""

    key: str


@dataclass(frozen=True, slots=True)
class ListRuntime:
    """Ask the runtime what it holds, after all that it was asked before. → `RuntimeListed`, or nothing: asked again."""


@dataclass(frozen=True, slots=True)
class RenewRuntime:
    """Feed the dead-man's switch with the time before a committed renewal was sent. Yields nothing."""

    renewed_at_s: float


@dataclass(frozen=True, slots=True)
class Archive:
    """Have a node write finished tasks (the values of their keys) into its archive. → `Archived`."""

    office: Revision
    node: NodeId
    records: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Notice:
    """Something an administrator should know; shown in the node's log. Yields nothing."""

    text: str


Effect = (
    Commit
    | Read
    | List
    | Watch
    | Unwatch
    | GrantLease
    | KeepAlive
    | RevokeLease
    | Remember
    | Start
    | Begin
    | Stop
    | Forget
    | ListRuntime
    | RenewRuntime
    | Archive
    | Notice
)


# --- events ------------------------------------------------------------------------------------------------------


class NoAnswer(enum.Enum):
    """There was no answer; the thing may have happened."""

    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Tick:
    """Nothing but time has passed."""


@dataclass(frozen=True, slots=True)
class Rejected:
    """The store took the write and refuses it as it is: nothing was done, and the same write again is no use."""

    text: str


@dataclass(frozen=True, slots=True)
class CommitDone:
    """The result; None when the outcome is unknown, or the write was certainly not made and may be tried again."""

    tag: Tag
    result: Result | Rejected | None


@dataclass(frozen=True, slots=True)
class ReadDone:
    """The answer to `Read`; None when there was none."""

    tag: Tag
    reading: Reading | None


@dataclass(frozen=True, slots=True)
class ListDone:
    """The answer to `List`; None when there was none."""

    tag: Tag
    listing: Listing | None


@dataclass(frozen=True, slots=True)
class Changed:
    """Events of whole revisions, up to `revision`."""

    tag: str
    serial: int
    changes: tuple[Change, ...]
    revision: Revision


@dataclass(frozen=True, slots=True)
class WatchLost:
    """The watch ended by itself (connection, compaction): list again."""

    tag: str
    serial: int


@dataclass(frozen=True, slots=True)
class Archived:
    """Which tasks are on that node's disk to stay; for the others nothing is known, and `why` may say a reason."""

    office: Revision
    node: NodeId
    tasks: frozenset[TaskId]
    why: str = ""


@dataclass(frozen=True, slots=True)
class LeaseGranted:
    """None: no answer; the lease, if there is one, runs out by itself."""

    tag: Tag
    lease: LeaseId | None


@dataclass(frozen=True, slots=True)
class KeptAlive:
    """The new time to live; None when the lease is gone; `NoAnswer.UNKNOWN` when nobody answered."""

    tag: Tag
    lease: LeaseId
    ttl_s: float | NoAnswer | None


@dataclass(frozen=True, slots=True)
class Remembered:
    """False: it could not be written."""

    incarnation: IncarnationId
    done: bool


@dataclass(frozen=True, slots=True)
class Started:
    """An attempt was started (None), could not be (its `Exit`), or the runtime did not answer (`NoAnswer`)."""

    key: str
    token: Revision
    exit: Exit | NoAnswer | None


@dataclass(frozen=True, slots=True)
class Prepared:
    """What an attempt needs has been brought in: it is not started before a `Begin`."""

    key: str


@dataclass(frozen=True, slots=True)
class AttemptEnded:
    """An attempt ended; told again after each reconnection until it is forgotten."""

    key: str
    exit: Exit


@dataclass(frozen=True, slots=True)
class HeldAttempt:
    """An attempt the runtime knows; `exit` is None while it runs."""

    key: str
    token: Revision
    incarnation: IncarnationId
    exit: Exit | None


@dataclass(frozen=True, slots=True)
class RuntimeListed:
    """All attempts that the runtime knows: after each connection to it, before anything is started."""

    held: tuple[HeldAttempt, ...]


@dataclass(frozen=True, slots=True)
class SetUnfit:
    """The machine is not fit for tasks (why, for people), or is again (empty). What runs goes on."""

    why: str


@dataclass(frozen=True, slots=True)
class SelfChanged:
    """The shell has new facts for what this node says of itself (seat, address, warnings)."""

    record: NodeRecord


@dataclass(frozen=True, slots=True)
class SetDraining:
    """An administrator wants no more tasks taken, or again.

    What has been claimed and not been started goes back to the queue. `leaving`: the node is about to leave, so that
    its seat may be given to another. `release`: running tasks are given back now instead of being waited for; with
    `spare` not those that must not be started twice.
    """

    draining: bool
    leaving: bool = False
    release: bool = False
    spare: bool = False


@dataclass(frozen=True, slots=True)
class PauseWanted:
    """This daemon ends, and leaves its tasks to one that follows within `for_s`, before which nobody is to worry."""

    for_s: int


@dataclass(frozen=True, slots=True)
class LeaveWanted:
    """Drain, then deregister once nothing is held. `release`: give running tasks back now instead of waiting."""

    release: bool


@dataclass(frozen=True, slots=True)
class SetCandidate:
    """Whether this node may hold the office (it runs a voter)."""

    candidate: bool


@dataclass(frozen=True, slots=True)
class ClearancesChanged:
    """What counts of the labels that this node is cleared for, sorted: as its rights say now."""

    clearances: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Refused:
    """Whoever keeps the store for this node does not let it in, in its words. Told besides what was not answered."""

    text: str


Happening = (
    Tick
    | CommitDone
    | ReadDone
    | ListDone
    | Archived
    | Changed
    | WatchLost
    | LeaseGranted
    | KeptAlive
    | Remembered
    | Started
    | Prepared
    | AttemptEnded
    | RuntimeListed
    | SelfChanged
    | SetUnfit
    | SetDraining
    | LeaveWanted
    | PauseWanted
    | SetCandidate
    | ClearancesChanged
    | Refused
)


def attempt_key(task: TaskId, attempt: int) -> str:
    """Names one attempt on a node; also the name of its directory and cgroup."""
    return f"{task}.{attempt}"


def parse_attempt_key(key: str) -> tuple[TaskId, int]:
    """The task and attempt number of an attempt key."""
    task, _, number = key.rpartition(".")
    return TaskId(task), int(number)
