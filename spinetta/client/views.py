"""What nodes answer, as plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from spinetta import messages
from spinetta.model import NodeRecord, Outcome, State, Task, TaskId
from spinetta.v1 import api_pb2 as api
from spinetta.v1 import record_pb2 as pb


@dataclass(frozen=True, slots=True)
class UsageNow:
    """Memory, processes and threads of a running task, and by countable the labels of the units that it was given."""

    memory_bytes: int
    pids: int
    units: tuple[tuple[str, tuple[str, ...]], ...] = ()


@dataclass(frozen=True, slots=True)
class TaskInfo:
    """A task and where it stands.

    Attributes:
        task: its record.
        node: where it runs, or ran last; empty before it ran.
        revision: of the store, when the record was last written.
        cancel_requested: its node has been asked to stop it. Not known in what `watch` yields.
        spec_omitted: the answer was too large: of the specification only id and name are here.
        withheld: what the task runs is not for the caller: command, environment, directory and messages are left out.
        now: what a running task has at this moment; what it has used so far is in its last attempt. None: its node did
            not tell, or was not asked.
    """

    task: Task
    node: str = ""
    revision: int = 0
    cancel_requested: bool = False
    spec_omitted: bool = False
    withheld: bool = False
    now: UsageNow | None = None

    @property
    def id(self) -> TaskId:
        """The task's id."""
        return self.task.spec.id

    @property
    def done(self) -> bool:
        """It has ended."""
        return self.task.state is State.COMPLETE

    @property
    def succeeded(self) -> bool:
        """It has ended well."""
        return self.task.outcome is Outcome.SUCCEEDED


@dataclass(frozen=True, slots=True)
class TaskFilter:
    """Which tasks: all that is given must hold. Empty: all tasks."""

    states: tuple[State, ...] = ()
    outcomes: tuple[Outcome, ...] = ()
    labels: tuple[tuple[str, str], ...] = ()
    owner: str = ""
    name: str = ""
    node: str = ""


ALL_TASKS = TaskFilter()


@dataclass(frozen=True, slots=True)
class Submitted:
    """A task that the cluster has. `existed`: the same one had been submitted before."""

    id: TaskId
    existed: bool = False


@dataclass(frozen=True, slots=True)
class CancelResult:
    """COMPLETE: it is over (`was_complete`: it was already). RUNNING: its node has been asked to stop it."""

    id: TaskId
    state: State
    was_complete: bool = False


@dataclass(frozen=True, slots=True)
class WaitResult:
    """The tasks waited for, in order. `timed_out`: not all (or, with `any_`, none) have ended."""

    tasks: tuple[TaskInfo, ...]
    timed_out: bool = False


@dataclass(frozen=True, slots=True)
class TaskChanges:
    """Tasks as they are now.

    Attributes:
        tasks: those that are new or have changed.
        removed: complete ones that have left the cluster's store.
        initial_done: what was there when the watch began has been sent whole, with this or before.
        restarted: some changes were lost: forget what you have; all tasks follow.
    """

    tasks: tuple[TaskInfo, ...] = ()
    removed: tuple[TaskId, ...] = ()
    initial_done: bool = False
    restarted: bool = False


@dataclass(frozen=True, slots=True)
class ArchivedPage:
    """Some archived tasks. `silent`: nodes that have others, perhaps, and did not tell, with the reason of each."""

    tasks: tuple[TaskInfo, ...]
    silent: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class LogChunk:
    """Bytes of one attempt's log; `offset` is that of the first."""

    data: bytes
    offset: int
    attempt: int
    node: str


@dataclass(frozen=True, slots=True)
class NodeInfo:
    """A node; `status` is ready, draining, leaving, lost, condemned or dead; `beat_age_ms` -1 when unknown."""

    record: NodeRecord
    voter: bool
    leader: bool
    etcd_leader: bool
    status: str
    beat_age_ms: int

    @property
    def known(self) -> bool:
        """Whether the record says anything: what a lost node had, and still has, is gone with its registration."""
        return bool(self.record.address)


@dataclass(frozen=True, slots=True)
class NodeList:
    """The nodes, sorted by name, and what an administrator should know."""

    nodes: tuple[NodeInfo, ...]
    notices: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class BackupPiece:
    """Part of a backup. `remaining_bytes`: after it, about. `node`, `cluster_id`: of the first piece, where from."""

    data: bytes
    remaining_bytes: int
    node: str = ""
    cluster_id: str = ""


@dataclass(frozen=True, slots=True)
class LeaveStep:
    """Progress of a node that leaves."""

    step: str
    running: int = 0
    done: bool = False


@dataclass(frozen=True, slots=True)
class ConfirmedDead:
    """A life of a node that is over by an administrator's word; `running`: tasks that it held then."""

    incarnation: str
    running: int
    was_dead: bool = False


@dataclass(frozen=True, slots=True)
class VoterInfo:
    """A node that runs an etcd member.

    Attributes:
        answers: its etcd does; what follows is known only then.
        healthy: it answers and sees a leader.
        leader: it leads etcd.
        version: of etcd.
        db_bytes, db_in_use_bytes: the file of its database, which the quota is for, and what of it is not holes.
        behind: changes that it has still to take over.
        alarms: ``NOSPACE``, ``CORRUPT``.
    """

    name: str
    member_id: int
    client_url: str
    peer_url: str
    learner: bool = False
    answers: bool = False
    healthy: bool = False
    leader: bool = False
    version: str = ""
    db_bytes: int = 0
    db_in_use_bytes: int = 0
    behind: int = 0
    alarms: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ClusterInfo:
    """The cluster, as one node sees it.

    Attributes:
        generation: empty while no majority answers.
        has_majority: of the voters; without one nothing can be read or written.
        quota_bytes: of each voter's database.
        notices: what an administrator should know, the worst first; none: all is well.
    """

    cluster_id: str
    voters: tuple[VoterInfo, ...]
    node: str
    wall_ms: int
    version: str
    generation: str
    address: str = field(default="")
    has_majority: bool = True
    quota_bytes: int = 0
    notices: tuple[str, ...] = ()


def task_info(m: api.TaskView) -> TaskInfo:
    """From the wire."""
    units = tuple(sorted((name, tuple(labels.split(","))) for name, labels in m.now.units.items()))
    now = UsageNow(m.now.memory_bytes, m.now.pids, units) if m.HasField("now") else None
    return TaskInfo(
        messages.task_from_pb(m.task), m.node, m.revision, m.cancel_requested, m.spec_omitted, m.withheld, now
    )


def node_info(m: api.NodeView) -> NodeInfo:
    """From the wire."""
    return NodeInfo(messages.node_from_pb(m.node), m.voter, m.leader, m.etcd_leader, m.status, m.beat_age_ms)


def cluster_info(m: api.DescribeClusterResponse, address: str) -> ClusterInfo:
    """From the wire; `address` is that of the node which answered."""
    voters = tuple(
        VoterInfo(
            v.name,
            v.member_id,
            v.client_url,
            v.peer_url,
            v.learner,
            v.answers,
            v.healthy,
            v.leader,
            v.version,
            v.db_bytes,
            v.db_in_use_bytes,
            v.behind,
            tuple(v.alarms),
        )
        for v in m.voters
    )
    return ClusterInfo(
        m.cluster_id,
        voters,
        m.node,
        m.wall_ms,
        m.version,
        m.generation,
        address,
        m.has_majority,
        m.quota_bytes,
        tuple(m.notices),
    )


def filter_to_pb(f: TaskFilter) -> api.Filter:
    """To the wire."""
    return api.Filter(
        states=[pb.State.ValueType(s) for s in f.states],
        outcomes=[pb.Outcome.ValueType(o) for o in f.outcomes],
        labels=dict(f.labels),
        owner=f.owner,
        name=f.name,
        node=f.node,
    )
