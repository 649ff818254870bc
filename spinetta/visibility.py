"""What of the store a worker may see through the gateway. What it may not see is, for it, not there.

What leaks all the same is told in ``docs/adr/0017-gateway.md``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from spinetta import codec, keys, trustcodec
from spinetta.access import MEMBERS, NodeAcl, NodeRole
from spinetta.codec import readable
from spinetta.model import NodeId, State, Task


def listable(node: NodeId, prefix: str) -> bool:
    """Whether a worker may list keys that begin with `prefix`."""
    return prefix in (keys.NODE, keys.INCARNATION, keys.QUEUED, keys.LEADER, keys.running_on(node))


def watchable(node: NodeId, prefix: str) -> bool:
    """Whether a worker may watch `prefix`: of all these but the queue its events are of keys that it may see.

    Of the queue every deletion is told, as its value is gone: see the record of decisions.
    """
    return prefix in (keys.NODE, keys.QUEUED, keys.LEADER, keys.running_on(node))


def visible(node: NodeId, acl: NodeAcl, key: str, value: bytes, *, secrets: Collection[str] = ()) -> bool:
    """Whether the worker `node` may see this key and what it holds.

    Args:
        acl: its rights.
        secrets: the keys of secrets that tasks which it runs now refer to, see `secrets_of`.
    """
    if key in (keys.GENERATION, keys.OFFICE, keys.acl_node(node), keys.incarnation(node), keys.beat(node)):
        return True
    if key.startswith(keys.NODE):
        return True  # every node ranks its peers
    if key.startswith(keys.QUEUED):
        return covers(acl, queued_clearance(value))
    if key.startswith(keys.TASK):
        return _sees_task(node, acl, value)
    if key.startswith(keys.running_on(node)):
        return True
    if key.startswith(keys.LABEL):
        label = key.removeprefix(keys.LABEL)
        return label == MEMBERS or label in acl.effective
    if key.startswith(keys.ACL_USER):
        return True  # who may read a log that lies on this node
    if key.startswith(keys.ACL_NODE):
        other = readable(_node_acl, value)  # voters pass calls on: the node must know them when they do
        return other is not None and other.role is NodeRole.VOTER
    return key in secrets


def queued_clearance(value: bytes) -> tuple[str, ...] | None:
    """The labels in a queue key's value; None: it does not say, and the task's record must be asked."""
    hint = codec.decode_hint(value)
    return None if hint is None else hint.clearance


def covers(acl: NodeAcl, clearance: Iterable[str] | None) -> bool:
    """Whether the node is cleared for all of these labels; None: it is not known which."""
    if not clearance:  # most tasks have no label, and this is asked for each of them, for each worker
        return clearance is not None
    return set(clearance) <= {*acl.effective, MEMBERS}


def secrets_of(node: NodeId, tasks: Iterable[Task]) -> frozenset[str]:
    """The keys of the secrets that those of `tasks` refer to which `node` runs."""
    return frozenset(
        keys.secret(task.spec.owner, name)
        for task in tasks
        if task.state is State.RUNNING and task.attempts and task.attempts[-1].node == node
        for name, _ in task.spec.secrets
    )


def _sees_task(node: NodeId, acl: NodeAcl, value: bytes) -> bool:
    task = readable(codec.decode_task, value)
    if task is None:
        return False
    if any(attempt.node == node for attempt in task.attempts):
        return True
    return task.state is State.QUEUED and covers(acl, task.spec.clearance)


def _node_acl(value: bytes) -> NodeAcl:
    return trustcodec.decode(NodeAcl, value)
