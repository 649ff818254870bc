"""The design's invariants, checked at every revision of the store and at every start, stop and end of a process.

The checker keeps its own view of the store, fed with each revision's events, so that "in the revision before" is there
to be looked at. The numbers are those of the list in the design.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from spinetta import codec, keys, lifecycle, trustcodec
from spinetta.access import NodeAcl
from spinetta.model import (
    Exit,
    Holding,
    Incarnation,
    Life,
    NodeId,
    NodeRecord,
    Outcome,
    QueueHint,
    Reason,
    Resources,
    Revision,
    State,
    Task,
    TaskId,
)
from spinetta.store.protocol import Changes, KeyValue
from tests.sim.contained import allowed
from tests.sim.shim_model import Process

ADMINISTRATOR = NodeId("an administrator")
_STATES = {keys.BLOCKED: State.BLOCKED, keys.QUEUED: State.QUEUED, keys.COMPLETE: State.COMPLETE}


Name = tuple[TaskId, Revision]
"""A task and a token name one attempt for ever; one revision may hold many claims, so a token alone does not."""


class Violated(AssertionError):
    """An invariant does not hold. The number is that of the design's list; 0: what it says besides."""

    def __init__(self, number: int, text: str) -> None:
        super().__init__(f"invariant {number}: {text}")
        self.number = number


@dataclass(frozen=True, slots=True)
class Held:
    """A running key."""

    node: NodeId
    token: Revision
    holding: Holding


@dataclass(slots=True)
class Truth:
    """What really became of an attempt."""

    node: NodeId
    token: Revision
    incarnation: str
    exit: Exit | None = None


@dataclass(frozen=True, slots=True)
class Ability:
    """What a node really has, whatever its record says."""

    capacity: Resources
    tags: frozenset[str]
    allows: tuple[str, ...] = ()


@dataclass
class Checker:
    """All that is needed to judge the next step."""

    abilities: Mapping[NodeId, Ability]
    revision: Revision = Revision(1)
    tasks: dict[TaskId, tuple[Task, bytes]] = field(default_factory=dict)
    status: dict[TaskId, dict[str, KeyValue]] = field(default_factory=dict)
    holds: dict[NodeId, dict[TaskId, Held]] = field(default_factory=dict)
    nodes: dict[NodeId, NodeRecord] = field(default_factory=dict)
    lives: dict[NodeId, Incarnation] = field(default_factory=dict)
    tokens: dict[TaskId, tuple[int, Revision]] = field(default_factory=dict)
    truths: dict[Name, Truth] = field(default_factory=dict)
    excused: dict[TaskId, int] = field(default_factory=dict)  # losses that were held against nobody
    alive: dict[Name, Process] = field(default_factory=dict)
    never: set[TaskId] = field(default_factory=set)
    released: set[NodeId] = field(default_factory=set)
    office: NodeId | None = None
    author: NodeId | None = None
    rights: dict[NodeId, NodeAcl] = field(default_factory=dict)
    lost_rights: set[NodeId] = field(default_factory=set)  # ever thrown out
    lost_labels: set[tuple[NodeId, str]] = field(default_factory=set)  # ever withdrawn
    lying: frozenset[TaskId] = frozenset()  # with a queue key that its user falsified
    beyond: bool = False  # clocks or shims are worse than is assumed of them: what rests on them is counted only
    broken: int = 0
    collected: set[TaskId] = field(default_factory=set)  # have left the store
    archived: Callable[[TaskId], bool] = lambda _: False

    def _by_clock(self, text: str) -> None:
        """Invariant 9 does not hold: it alone rests on clock rates, and on shims that are run in time."""
        if not self.beyond:
            raise Violated(9, text)
        self.broken += 1

    # --- the store ---------------------------------------------------------------------------------------------

    def revision_made(self, changes: Changes, author: NodeId | None = None) -> None:
        """Judge one revision, and take it in. `author`: the node that wrote it; None: a user, or the store."""
        self.revision = changes.revision
        self.author = author
        touched: set[TaskId] = set()
        old: dict[TaskId, Held] = {}
        left: dict[TaskId, int] = {}
        for event in changes.events:
            key, kv = event.key, event.value
            self._may_write(key, kv)
            if key.startswith(keys.RUNNING):
                node, task = keys.parse_running(key)
                touched.add(task)
                held = self.holds.setdefault(node, {}).get(task)
                self._running_changed(node, task, held, kv)
                if held is not None and kv is None:
                    old[task] = held
                self._set_status(task, key, kv)
            elif key.startswith("/status/"):
                task = keys.parse_task(key)
                touched.add(task)
                if kv is None and key.startswith(keys.COMPLETE):
                    self._leaves(task, "end")
                    left[task] = left.get(task, 0) + 1
                self._set_status(task, key, kv)
            elif key.startswith(keys.TASK):
                task = keys.parse_task(key)
                touched.add(task)
                if kv is None:
                    self._leaves(task, "record")
                    left[task] = left.get(task, 0) + 1
                    continue
                self._record_changed(task, kv)
            elif key.startswith((keys.NODE, keys.INCARNATION)):
                self._life_changed(key, kv)
            elif key == keys.OFFICE:
                if kv is not None and self.office is not None:
                    raise Violated(0, f"{author} took the office of {self.office} at {self.revision}")
                self.office = codec.decode_office(kv.value) if kv is not None else None
            elif key.startswith(keys.ACL_NODE) and kv is not None:
                self._rights_changed(trustcodec.decode(NodeAcl, kv.value))
        for task, deleted in left.items():
            if deleted != 2 or self.status.get(task):
                raise Violated(1, f"{task} left the store in part, at {self.revision}")
            self.collected.add(task)
        for task in touched - self.collected:
            self._agrees(task)
            if task in old:
                self._after_holding(task, old[task])

    def _leaves(self, task: TaskId, what: str) -> None:
        """A key of a finished task is deleted: by the leader, and only if it is on a disk elsewhere."""
        known = self.tasks.get(task)
        if known is None or known[0].state is not State.COMPLETE or not self.archived(task):
            raise Violated(1, f"the {what} of {task} was deleted, which no archive has: {known and known[0].state}")
        if self.author is None or self.office != self.author:
            raise Violated(0, f"{self.author} deleted the {what} of {task}; {self.office} holds the office")

    def _may_write(self, key: str, kv: KeyValue | None) -> None:
        acl = self.rights.get(self.author) if self.author is not None else None
        gives_up = kv is None and key.startswith((keys.NODE, keys.OFFICE))  # a lease given up: no harm in that
        if acl is not None and acl.revoked and not gives_up:
            raise Violated(0, f"{self.author}, which was thrown out, wrote {key} at {self.revision}")

    def _rights_changed(self, acl: NodeAcl) -> None:
        node = NodeId(acl.name)
        before = self.rights.get(node)
        self.rights[node] = acl
        if acl.revoked:
            self.lost_rights.add(node)
        if before is not None:
            self.lost_labels |= {(node, label) for label in set(before.effective) - set(acl.effective)}

    def _set_status(self, task: TaskId, key: str, kv: KeyValue | None) -> None:
        found = self.status.setdefault(task, {})
        if kv is None:
            found.pop(key, None)
        else:
            found[key] = kv

    def _running_changed(self, node: NodeId, task: TaskId, held: Held | None, kv: KeyValue | None) -> None:
        if kv is None:
            if held is not None:
                process = self.alive.get((task, held.token))
                life = self.lives.get(node)
                overlaps = self.tasks[task][0].spec.overlap and life is not None and life.state is not Life.OPEN
                if process is not None and not overlaps:
                    self._by_clock(f"{process.key} was taken from {node} at {self.revision} while it executes there")
                if self.author != node:
                    self._taken(node, task)
                del self.holds[node][task]
            return
        holding = codec.decode_holding(kv.value)
        if held is None:
            self._claimed(node, task, kv.created, holding)
        elif held.holding.cancel_requested and not holding.cancel_requested:
            raise Violated(0, f"the request to cancel {task} was overwritten")
        self.holds[node][task] = Held(node, kv.created, holding)

    def _taken(self, node: NodeId, task: TaskId) -> None:
        """Another than the holder ends an attempt: only the leader may, and only of a life that is over."""
        if self.author is None or self.office != self.author:
            raise Violated(0, f"{self.author} took {task} from {node}; {self.office} holds the office")
        life = self.lives.get(node)
        if life is None or life.state is Life.OPEN:
            raise Violated(0, f"{task} was taken from {node}, whose life is {life}")

    def _claimed(self, node: NodeId, task: TaskId, token: Revision, holding: Holding) -> None:
        # Changes of this revision to lives are applied in the order of its events; no transaction mixes the two.
        life, record = self.lives.get(node), self.nodes.get(node)
        if life is None or life.state is not Life.OPEN or life.id != holding.incarnation:
            raise Violated(2, f"{node} claimed {task} at {token} for {holding.incarnation}, but its life is {life}")
        if record is None or record.incarnation != holding.incarnation:
            raise Violated(2, f"{node} claimed {task} at {token} without a registration")
        before = self.tokens.get(task)
        if before is not None and (holding.attempt <= before[0] or token <= before[1]):
            raise Violated(4, f"{task}: attempt {holding.attempt} with token {token} came after {before}")
        self.tokens[task] = (holding.attempt, token)
        spec = self.tasks[task][0].spec
        able = self.abilities[node]
        if not set(spec.tags_required) <= able.tags or set(spec.tags_forbidden) & able.tags:
            raise Violated(6, f"{node} with {set(able.tags)} claimed {spec}")
        if not allowed(spec, able.allows):
            raise Violated(6, f"{node}, which allows {able.allows}, claimed {spec}")
        acl = self.rights.get(node)
        if not set(spec.clearance) <= set(acl.effective if acl is not None else ()):
            raise Violated(6, f"{node}, cleared for {acl and acl.effective}, claimed {spec} at {token}")
        total = spec.resources
        for other in self.holds[node]:
            total = total + self.tasks[other][0].spec.resources
        if not total.fits_in(able.capacity):
            raise Violated(7, f"{node} holds {total} of {able.capacity} at {token}, with {task}")

    def _record_changed(self, task: TaskId, kv: KeyValue) -> None:
        record = codec.decode_task(kv.value)
        known = self.tasks.get(task)
        if task in self.collected:
            raise Violated(3, f"{task} has come back after it was archived")
        if known is not None:
            if known[0].state is State.COMPLETE and known[1] != kv.value:
                raise Violated(3, f"the end of {task} was written again: {known[0]} became {record}")
            if known[0].spec != record.spec:
                raise Violated(1, f"the specification of {task} changed")
            if record.attempts_started < known[0].attempts_started:
                raise Violated(4, f"{task} went back to attempt {record.attempts_started}")
        if record.state is State.COMPLETE and known is not None and known[0].state is State.QUEUED:
            self.never.add(task)
        self.tasks[task] = (record, kv.value)

    def _life_changed(self, key: str, kv: KeyValue | None) -> None:
        node = keys.parse_node(key)
        if key.startswith(keys.NODE):
            if kv is None:
                self.nodes.pop(node, None)
            else:
                self.nodes[node] = codec.decode_node(kv.value)
            return
        old = self.lives.get(node)
        vouched = self.author == ADMINISTRATOR and kv is not None and node not in self.nodes
        if self.author != node and self.office != self.author and not vouched:
            raise Violated(0, f"{self.author} wrote of the life of {node}; {self.office} holds the office")
        if kv is None:
            if self.holds.get(node):
                raise Violated(0, f"the life of {node} was closed while it holds {list(self.holds[node])}")
            self.lives.pop(node, None)
            return
        new = codec.decode_incarnation(kv.value)
        if vouched and new.state is not Life.DEAD:
            raise Violated(0, f"an administrator wrote more than a word on {node}: {new}")
        if old is not None and (old.id != new.id or new.state < old.state):
            raise Violated(0, f"the life of {node} went from {old} to {new}")
        if old is None:
            runs = [p.key for name, p in self.alive.items() if self.truths[name].node == node]
            if runs:
                raise Violated(9, f"{node} began a new life while {runs} execute there")
        if new.state is Life.CONDEMNED and (old is None or old.state is Life.OPEN) and node in self.nodes:
            raise Violated(0, f"{node} was condemned while it is registered")
        if new.state is Life.DEAD and (old is None or old.state is not Life.DEAD):
            runs = [p.key for p in self.alive.values() if p.incarnation == new.id]
            if runs:
                raise Violated(9, f"{node} reported itself dead while {runs} execute")
        self.lives[node] = new

    def _agrees(self, task: TaskId) -> None:
        found = self.status.get(task, {})
        if len(found) != 1 or task not in self.tasks:
            raise Violated(1, f"{task} has the keys {sorted(found)} at {self.revision}, record: {task in self.tasks}")
        record = self.tasks[task][0]
        ((key, kv),) = found.items()
        if key.startswith(keys.RUNNING):
            node, _ = keys.parse_running(key)
            held = self.holds[node][task]
            last = record.attempts[-1] if record.attempts else None
            if (
                record.state is not State.RUNNING
                or last is None
                or (last.number, last.node, last.incarnation) != (held.holding.attempt, node, held.holding.incarnation)
                or record.attempts_started != last.number
            ):
                raise Violated(1, f"{key} with {held.holding} does not agree with {record}")
            return
        wanted = next(s for prefix, s in _STATES.items() if key.startswith(prefix))
        if record.state is not wanted:
            raise Violated(1, f"{key} does not agree with {record.state.name}")
        if wanted is State.QUEUED and kv.value:
            hint = codec.decode_hint(kv.value)
            lie = task in self.lying and self.author is None  # a user's; what a node writes is true
            if hint is None or (hint != QueueHint.of(record.spec, hint.delay_s) and not lie):
                raise Violated(6, f"the hint of {task} is not that of its specification")
        if (wanted is State.COMPLETE) != (record.outcome is not Outcome.NONE):
            raise Violated(1, f"{task} is {record.state.name} with the outcome {record.outcome.name}")

    def _after_holding(self, task: TaskId, held: Held) -> None:
        """A running key went away: the attempt it named must be closed in the record, and truthfully."""
        record = self.tasks[task][0]
        last = record.attempts[-1]
        if (last.number, last.token) != (held.holding.attempt, held.token) or last.outcome is Outcome.NONE:
            raise Violated(3, f"{task}: the end of attempt {held.holding.attempt} at {held.token} is told as {last}")
        if held.holding.cancel_requested and record.state is not State.COMPLETE:
            raise Violated(5, f"{task} was asked to end, and was queued again")
        truth = self.truths.get((task, held.token))
        if record.losses_excused > self.excused.get(task, 0):
            self.excused[task] = record.losses_excused
            if truth is not None:
                raise Violated(3, f"{task}: the loss of attempt {last.number} was excused, but it had been started")
        if record.losses_preparing > lifecycle.PREPARING_LOSSES_MAX:
            raise Violated(3, f"{task}: {record.losses_preparing} losses were excused while its image came in")
        ran = truth.exit if truth is not None else None
        if last.reason in (Reason.EXIT, Reason.SIGNAL, Reason.WALLTIME) and (
            ran is None or (ran.reason, ran.exit_code) != (last.reason, last.exit_code)
        ):
            raise Violated(3, f"{task}: attempt {last.number} ended with {ran}, recorded was {last}")
        if record.state is State.COMPLETE and (record.outcome is Outcome.SUCCEEDED) != (
            last.outcome is Outcome.SUCCEEDED
        ):
            raise Violated(3, f"{task}: {record.outcome.name} after an attempt that {last.outcome.name}")

    # --- processes ---------------------------------------------------------------------------------------------

    def started(self, node: NodeId, process: Process) -> None:
        """A process begins to execute."""
        # An attempt of such a task may be on its way to the shim when its task has been put back already.
        overlap = self.tasks[process.task][0].spec.overlap
        if process.task in self.never and not overlap:
            raise Violated(5, f"{process.key} was started on {node} although it was cancelled before")
        held = self.holds.get(node, {}).get(process.task)
        if (held is None or held.token != process.token) and not overlap:
            self._by_clock(f"{process.key} with {process.token} starts on {node}, which holds {held}")
        name = process.task, process.token
        if name in self.truths:
            raise Violated(8, f"{process.key} was started twice")
        same = [p.key for p in self.alive.values() if p.task == process.task]
        if same and not overlap:
            self._by_clock(f"{process.key} starts on {node} while {same} executes")
        self.truths[name] = Truth(node, process.token, process.incarnation)
        self.alive[name] = process

    def ended(self, process: Process) -> None:
        """A process no longer executes."""
        name = process.task, process.token
        self.alive.pop(name, None)
        truth = self.truths.get(name)
        if truth is not None:
            truth.exit = process.exit

    def stopped(self, node: NodeId, process: Process, why: str) -> None:
        """A process is told to end: there must be a reason for it."""
        held = self.holds.get(node, {}).get(process.task)
        if held is None or held.token != process.token:
            return
        life = self.lives.get(node)
        if life is None or life.state is not Life.OPEN or life.id != process.incarnation:
            return
        if why == Reason.CANCELLED and held.holding.cancel_requested:
            return
        if why == Reason.RELEASED and node in self.released:
            return
        if why == Reason.RELEASED and any((node, label) in self.lost_labels for label in self.labels(process.task)):
            return
        if why == Reason.FENCED and node in self.lost_rights:
            return
        raise Violated(8, f"{process.key} on {node} was told to end as {why} without cause")

    def labels(self, task: TaskId) -> tuple[str, ...]:
        """The labels of a task."""
        return self.tasks[task][0].spec.clearance

    def overdue(self, node: NodeId, process: Process, late_s: float) -> None:
        """A process that executes is looked at: `late_s` past its deadline and the margin."""
        if late_s > 0:
            self._by_clock(f"{process.key} executes on {node} {late_s:.3f} s past its deadline and the margin")
