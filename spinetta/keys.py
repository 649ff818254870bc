"""Every etcd key. Nothing else in the project spells one."""

from __future__ import annotations

from spinetta.errors import InvariantViolation
from spinetta.model import NodeId, TaskId

TASK = "/task/"
BLOCKED = "/status/blocked/"
QUEUED = "/status/queued/"
RUNNING = "/status/running/"
COMPLETE = "/status/complete/"
NODE = "/node/"
INCARNATION = "/incarnation/"
BEAT = "/beat/"
LEADER = "/leader/"
OFFICE = "/leader/office"
GENERATION = "/generation"
BACKUP = "/backup"
ACL = "/acl/"
ACL_NODE = "/acl/node/"
ACL_USER = "/acl/user/"
ACL_GROUP = "/acl/group/"
TOKEN = "/acl/token/"  # noqa: S105 - a key, not a secret
REQUEST = "/acl/request/"
POLICY = "/acl/policy"
AUTHORITY = "/trust/authority/"
ETCD_RESTART = "/trust/restart"  # leased: one voter at a time restarts its etcd
LABEL = "/trust/label/"
ARCHIVE = "/archive/"
SECRET = "/secret/"  # noqa: S105 - a key, not a secret


def task(task_id: TaskId) -> str:
    """The record of a task."""
    return TASK + task_id


def blocked(task_id: TaskId) -> str:
    """Present while the task waits for something other than a node."""
    return BLOCKED + task_id


def queued(task_id: TaskId) -> str:
    """Present while the task waits for a node."""
    return QUEUED + task_id


def running_on(node: NodeId) -> str:
    """The prefix of all that a node holds."""
    return f"{RUNNING}{node}/"


def running(node: NodeId, task_id: TaskId) -> str:
    """Present while `node` holds the task; its create revision is the attempt's token."""
    return f"{RUNNING}{node}/{task_id}"


def complete(task_id: TaskId) -> str:
    """Present once the task has ended."""
    return COMPLETE + task_id


def node(name: NodeId) -> str:
    """What a live node says of itself (leased)."""
    return NODE + name


def incarnation(name: NodeId) -> str:
    """The life-or-death record of a node (not leased)."""
    return INCARNATION + name


def beat(name: NodeId) -> str:
    """The guarded heartbeat of a node."""
    return BEAT + name


def acl_node(name: NodeId) -> str:
    """The rights of a node."""
    return ACL_NODE + name


def acl_user(name: str) -> str:
    """The rights of a person."""
    return ACL_USER + name


def acl_group(name: str) -> str:
    """What nodes of a group may be cleared for at most."""
    return ACL_GROUP + name


def token(token_id: str) -> str:
    """A join token, its secret hashed."""
    return TOKEN + token_id


def request(name: NodeId) -> str:
    """A node that waits for approval."""
    return REQUEST + name


def authority(kind: str) -> str:
    """The certificate authorities of a kind, ``cluster`` or ``etcd``."""
    return AUTHORITY + kind


def label(name: str) -> str:
    """The keys of a clearance label."""
    return LABEL + name


def archive(name: NodeId) -> str:
    """Present once the node has finished tasks in its archive that have left the store."""
    return ARCHIVE + name


def secrets_of(owner: str) -> str:
    """The prefix of an owner's secrets."""
    return f"{SECRET}{owner}/"


def secret(owner: str, name: str) -> str:
    """A sealed secret for tasks."""
    return f"{SECRET}{owner}/{name}"


def parse_task(key: str) -> TaskId:
    """The task of a ``/task/``, ``/status/blocked|queued|complete/`` key."""
    for prefix in (TASK, QUEUED, COMPLETE, BLOCKED):
        if key.startswith(prefix):
            return TaskId(key[len(prefix) :])
    raise InvariantViolation(f"not the key of a task: {key!r}")


def find_running(key: str) -> tuple[NodeId, TaskId] | None:
    """The node and task of a ``/status/running/`` key; None when it is not one, such as one that somebody made up."""
    node_name, slash, task_id = key.removeprefix(RUNNING).partition("/")
    if not key.startswith(RUNNING) or not slash or not node_name or not task_id:
        return None
    return NodeId(node_name), TaskId(task_id)


def parse_running(key: str) -> tuple[NodeId, TaskId]:
    """The node and task of a ``/status/running/`` key."""
    found = find_running(key)
    if found is None:
        raise InvariantViolation(f"not a running key: {key!r}")
    return found


def parse_node(key: str) -> NodeId:
    """The node of a ``/node/``, ``/incarnation/``, ``/beat/`` or ``/archive/`` key."""
    for prefix in (NODE, INCARNATION, BEAT, ARCHIVE):
        if key.startswith(prefix):
            return NodeId(key[len(prefix) :])
    raise InvariantViolation(f"not the key of a node: {key!r}")


def after(key: str) -> str:
    """The first key that can follow `key`."""
    return key + "\0"
