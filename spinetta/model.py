"""The nouns: tasks, resources, nodes. Plain frozen values with no behaviour beyond their own arithmetic."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NewType, Protocol

from spinetta.access import Envelope
from spinetta.container import ContainerSpec as ContainerSpec
from spinetta.container import Mount as Mount
from spinetta.container import needs

TaskId = NewType("TaskId", str)
"""A UUID of version 7 in its canonical form, so that key order is submission order."""
NodeId = NewType("NodeId", str)
"""A node's name, unique in the cluster."""
IncarnationId = NewType("IncarnationId", str)
"""One life of a node, from registration to the end of all it started."""
Revision = NewType("Revision", int)
"""An etcd revision."""
LeaseId = NewType("LeaseId", int)

LOSSES_ALLOWED = 5  # by default: a task under which six nodes have died is more likely their killer than their victim
ATTEMPTS_KEPT_MAX = 16  # in a record: a task passed on for ever must not outgrow etcd's 1.5 MiB a request


class State(enum.IntEnum):
    """Where a task stands. The numbers are those of the stored records."""

    BLOCKED = 1
    QUEUED = 2
    RUNNING = 3
    COMPLETE = 4


class Outcome(enum.IntEnum):
    """How a task, or one attempt of it, ended. NONE: it has not."""

    NONE = 0
    SUCCEEDED = 1
    FAILED = 2
    CANCELLED = 3
    LOST = 4


class Reason(enum.StrEnum):
    """Why an attempt or a task ended as it did."""

    EXIT = "exit"  # the process ended by itself; see the exit code
    SIGNAL = "signal"  # a signal that was not ours
    OUT_OF_MEMORY = "out-of-memory"
    WALLTIME = "walltime"
    CANCELLED = "cancelled"
    NODE_LOST = "node-lost"
    RELEASED = "released"  # given back by its node (drain, stop)
    FENCED = "fenced"  # killed because its node no longer owned it
    SPAWN_FAILED = "spawn-failed"  # the program could not be started
    NODE_UNFIT = "node-unfit"  # the node could not start anything: its disk, control groups or process table
    SHIM_LOST = "shim-lost"  # the process died with the node's shim
    OUT_OF_PIDS = "out-of-pids"  # it failed, and the kernel had refused it a process or thread
    DISK_LIMIT = "disk-limit"  # its scratch directory outgrew what it may have


@dataclass(frozen=True, slots=True)
class Resources:
    """An amount of resources: a demand, a capacity or what is free.

    Attributes:
        cpu_millis: thousandths of a core.
        memory_bytes: bytes of memory.
        disk_bytes: bytes of scratch space.
        countables: named whole things such as ``gpu``, sorted by name, none of them zero.
    """

    cpu_millis: int = 0
    memory_bytes: int = 0
    disk_bytes: int = 0
    countables: tuple[tuple[str, int], ...] = ()

    @classmethod
    def of(
        cls,
        cpu_millis: int = 0,
        memory_bytes: int = 0,
        disk_bytes: int = 0,
        countables: Mapping[str, int] | Iterable[tuple[str, int]] = (),
    ) -> Resources:
        """Build from any mapping of countables, in normal form."""
        pairs = countables.items() if isinstance(countables, Mapping) else countables
        return cls(cpu_millis, memory_bytes, disk_bytes, tuple(sorted((k, v) for k, v in pairs if v)))

    def __add__(self, other: Resources) -> Resources:
        if not other.countables:  # most have none, and this is done for every event
            return Resources(
                self.cpu_millis + other.cpu_millis,
                self.memory_bytes + other.memory_bytes,
                self.disk_bytes + other.disk_bytes,
                self.countables,
            )
        counts = dict(self.countables)
        for name, n in other.countables:
            counts[name] = counts.get(name, 0) + n
        return Resources.of(
            self.cpu_millis + other.cpu_millis,
            self.memory_bytes + other.memory_bytes,
            self.disk_bytes + other.disk_bytes,
            counts,
        )

    def __sub__(self, other: Resources) -> Resources:
        """Difference; a component may become negative, which the caller must have excluded by `fits_in`."""
        if not other.countables:
            return Resources(
                self.cpu_millis - other.cpu_millis,
                self.memory_bytes - other.memory_bytes,
                self.disk_bytes - other.disk_bytes,
                self.countables,
            )
        counts = dict(self.countables)
        for name, n in other.countables:
            counts[name] = counts.get(name, 0) - n
        return Resources.of(
            self.cpu_millis - other.cpu_millis,
            self.memory_bytes - other.memory_bytes,
            self.disk_bytes - other.disk_bytes,
            counts,
        )

    def at_least_nothing(self) -> Resources:
        """With negative components raised to zero: a node whose capacity was lowered may hold more than it has."""
        if min(self.cpu_millis, self.memory_bytes, self.disk_bytes) >= 0 and all(n >= 0 for _, n in self.countables):
            return self
        return Resources.of(
            max(0, self.cpu_millis),
            max(0, self.memory_bytes),
            max(0, self.disk_bytes),
            ((name, max(0, n)) for name, n in self.countables),
        )

    def fits_in(self, room: Resources) -> bool:
        """True when every component is at most that of `room`."""
        if (
            self.cpu_millis > room.cpu_millis
            or self.memory_bytes > room.memory_bytes
            or self.disk_bytes > room.disk_bytes
        ):
            return False
        if not self.countables:
            return True
        counts = dict(room.countables)
        return all(n <= counts.get(name, 0) for name, n in self.countables)


@dataclass(frozen=True, slots=True)
class TaskSpec:
    """What a user asks for. See ``proto/spinetta/v1/record.proto`` for the meaning of each field."""

    id: TaskId
    command: tuple[str, ...]
    name: str = ""
    labels: tuple[tuple[str, str], ...] = ()
    env: tuple[tuple[str, str], ...] = ()
    working_directory: str = ""
    resources: Resources = field(default_factory=Resources)
    walltime_s: float = 0.0
    tags_required: tuple[str, ...] = ()
    tags_forbidden: tuple[str, ...] = ()
    priority: int = 0
    retries: int = 0
    retry_backoff_s: float = 0.0
    restart_on_node_failure: bool = True
    owner: str = ""
    grace_s: float = 0.0
    clearance: tuple[str, ...] = ()
    sealed: Envelope | None = None
    secrets: tuple[tuple[str, str], ...] = ()  # name of the secret, name of the file
    overlap: bool = False
    losses_allowed: int = LOSSES_ALLOWED
    container: ContainerSpec | None = None
    keep_scratch_s: float = 0.0
    open_files_max: int = 0


@dataclass(frozen=True, slots=True)
class Usage:
    """What an attempt consumed: CPU seconds, the highest memory use, block I/O, the most processes at once."""

    cpu_user_s: float = 0.0
    cpu_system_s: float = 0.0
    memory_peak_bytes: int = 0
    io_read_bytes: int = 0
    io_write_bytes: int = 0
    pids_peak: int = 0


@dataclass(frozen=True, slots=True)
class Attempt:
    """One try at a task. `token` is the create revision of its running key, known once it is over."""

    number: int
    node: NodeId
    incarnation: IncarnationId
    token: Revision = Revision(0)
    started_ms: int = 0
    ended_ms: int = 0
    outcome: Outcome = Outcome.NONE
    exit_code: int | None = None
    signal: int = 0
    reason: str = ""
    message: str = ""
    usage: Usage = field(default_factory=Usage)


@dataclass(frozen=True, slots=True)
class Task:
    """A task's record: the specification, where it stands, and its attempts so far (the latest ones).

    Attributes:
        failures: of the task itself: paid for out of `TaskSpec.retries`.
        losses: of nodes under it while it executed, or may have: paid for out of `TaskSpec.losses_allowed`.
        losses_excused: of nodes that had not started it: held against nobody.
        losses_preparing: of these, while what it needs was brought in: excused only so often.
    """

    spec: TaskSpec
    state: State
    outcome: Outcome = Outcome.NONE
    reason: str = ""
    message: str = ""
    attempts_started: int = 0
    attempts: tuple[Attempt, ...] = ()
    failures: int = 0
    losses: int = 0
    submitted_ms: int = 0
    completed_ms: int = 0
    submitted_at_node: str = ""
    losses_excused: int = 0
    losses_preparing: int = 0

    @property
    def id(self) -> TaskId:
        """The task's id."""
        return self.spec.id


@dataclass(frozen=True, slots=True)
class Beat:
    """What a node's heartbeat promises: tokens of attempts that it does not start before a later one leaves them out.

    `preparing`: what they need is being brought in, which could take a node down; of the others nothing was touched.
    """

    waiting: frozenset[Revision] = frozenset()
    preparing: frozenset[Revision] = frozenset()

    @property
    def promised(self) -> frozenset[Revision]:
        """All that is not started."""
        return self.waiting | self.preparing


@dataclass(frozen=True, slots=True)
class QueueHint:
    """The part of a specification that matching needs, stored with the queue key to save a read.

    `needs`: words of `container.needs`; `image`: what must be there before it can start.
    """

    resources: Resources
    tags_required: tuple[str, ...] = ()
    tags_forbidden: tuple[str, ...] = ()
    priority: int = 0
    delay_s: float = 0.0
    clearance: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    image: str = ""

    @classmethod
    def of(cls, spec: TaskSpec, delay_s: float = 0.0) -> QueueHint:
        """The hint for a task."""
        return cls(
            spec.resources,
            spec.tags_required,
            spec.tags_forbidden,
            spec.priority,
            delay_s,
            spec.clearance,
            needs(spec.container, spec.open_files_max),
            spec.container.image if spec.container is not None else "",
        )


@dataclass(frozen=True, slots=True)
class Holding:
    """The value of a running key: which attempt, under which incarnation, and a request to the holder."""

    attempt: int
    incarnation: IncarnationId
    grace_s: float
    cancel_requested: bool = False
    cancel_reason: str = ""
    overlap: bool = False


@dataclass(frozen=True, slots=True)
class Completed:
    """The value of a complete key: who recorded the end, and so archives the task, and when (for people)."""

    node: NodeId
    completed_ms: int


@dataclass(frozen=True, slots=True)
class ShimInfo:
    """One of a node's shims.

    Attributes:
        code: a digest of its code; empty: it is from before shims were told.
        release: of the software its code was part of; may be empty.
        started_ms: wall clock; 0: it does not say.
        retiring: it takes nothing new, and ends when it has nothing left.
        attempts: that one which retires still has.
        services: the same, programs of the node itself.
    """

    code: str
    release: str
    started_ms: int
    retiring: bool = False
    attempts: int = 0
    services: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class NodeRecord:
    """What a node says of itself, bound to its lease."""

    name: NodeId
    address: str
    incarnation: IncarnationId
    capacity: Resources
    free: Resources
    tags: tuple[str, ...] = ()
    running: int = 0
    draining: bool = False
    leaving: bool = False
    etcd_client_url: str = ""
    etcd_peer_url: str = ""
    etcd_member_id: int = 0
    candidate: bool = False
    version: str = ""
    started_ms: int = 0
    boot_id: str = ""
    runtimes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    trust_generation: int = 0
    certificate_expires_ms: int = 0
    clearances: tuple[str, ...] = ()
    authority_signed: int = 0
    etcd_trust_generation: int = 0
    etcd_authority_signed: int = 0
    brake: str = ""
    unfit: str = ""
    allows: tuple[str, ...] = ()
    images: tuple[str, ...] = ()
    images_coming: tuple[str, ...] = ()
    shims: tuple[ShimInfo, ...] = ()
    units: tuple[tuple[str, tuple[str, ...]], ...] = ()  # by countable, labels of those that are given one by one


class Life(enum.IntEnum):
    """The state of an incarnation."""

    OPEN = 1
    CONDEMNED = 2
    DEAD = 3  # nothing of it runs any more: the node itself has reported it, or an administrator has vouched for it


@dataclass(frozen=True, slots=True)
class Incarnation:
    """The life-or-death record of one life of a node; never leased.

    `vouched`: it is DEAD by an administrator's word: its voter's seat, if it has one, need not wait for it either.
    """

    id: IncarnationId
    state: Life
    boot_id: str
    lease_ttl_s: float
    kill_margin_s: float
    vouched: bool = False


@dataclass(frozen=True, slots=True)
class Exit:
    """How a process ended, as its runtime reports it.

    Exactly one of `exit_code` and `signal` is meaningful; `exit_code` is None when a signal ended it or when it
    never started. `reason` names the limit or request that ended it, `Reason.EXIT` or `Reason.SIGNAL` when none did.
    `lacks`, with `Reason.NODE_UNFIT`: all that the node is short of, a countable or a word of `container.needs`; empty:
    it could start nothing else either. It is for the agent alone, and not recorded.
    """

    reason: Reason
    exit_code: int | None = None
    signal: int = 0
    message: str = ""
    started_ms: int = 0
    ended_ms: int = 0
    usage: Usage = field(default_factory=Usage)
    lacks: str = ""


@dataclass(frozen=True, slots=True)
class Member:
    """One etcd member. `healthy`: it answers, sees a leader and makes progress; also True when nobody has asked."""

    name: str
    member_id: int
    client_url: str
    peer_url: str
    learner: bool = False
    healthy: bool = True


@dataclass(frozen=True, slots=True)
class Membership:
    """What etcd says of itself.

    Attributes:
        cluster_id: etcd's, hexadecimal.
        leader_member_id: 0 when there is none.
        alarms: such as ``NOSPACE`` or ``CORRUPT``, each with the member that raised it, ready to be shown.
    """

    cluster_id: str
    leader_member_id: int
    members: tuple[Member, ...]
    alarms: tuple[str, ...] = ()


class Stored(Protocol):
    """A key as the store holds it."""

    @property
    def key(self) -> str:
        """Its name."""
        ...

    @property
    def value(self) -> bytes:
        """What it holds."""
        ...

    @property
    def created(self) -> Revision:
        """Where it was created."""
        ...

    @property
    def modified(self) -> Revision:
        """Where it was last written."""
        ...

    @property
    def lease(self) -> LeaseId:
        """That it is bound to; 0: none."""
        ...
