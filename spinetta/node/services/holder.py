"""Which node has an attempt of a task, and whether the caller may ask it for that: for what only that node can do."""

from __future__ import annotations

from dataclasses import dataclass

from spinetta import codec, keys, validate
from spinetta.access import NodeRole
from spinetta.errors import AskElsewhere, NotFound, UserError
from spinetta.match import uncleared
from spinetta.model import Attempt, NodeRecord, State, Task
from spinetta.node.port import NodePort
from spinetta.node.services import lookup
from spinetta.node.services.desk import Asked, ask_a_voter
from spinetta.node.services.forwarding import check_passed_on
from spinetta.node.services.peers import Peers


@dataclass(frozen=True, slots=True)
class Found:
    """An attempt, and the node that has it; `peer` None: this one."""

    task: Task
    attempt: Attempt
    peer: NodeRecord | None


async def find(
    port: NodePort, peers: Peers, asked: Asked, task: str, *, attempt: int = 0, local_only: bool = False
) -> Found:
    """The attempt with this number (0: the latest) of the task with this id or fragment.

    Raises:
        Denied: it is not the caller's, or carries labels that the caller lacks.
        AskElsewhere: its labels are not this node's to handle, or this node is a worker and does not have it.
        NotFound: no such task or attempt.
        UserError: it has not begun (``not-started``), or its node is not alive (``node-unreachable``).
    """
    check_passed_on(asked, local_only=local_only)
    is_worker = port.credentials is not None and port.credentials.role is NodeRole.WORKER
    if is_worker and not validate.is_task_id(task):
        raise ask_a_voter(port)  # which can look for what a fragment means
    task_id = await lookup.resolve_one(port, task)
    asked.subject = task_id
    entry = (await port.store.read([keys.task(task_id)])).entries[keys.task(task_id)]
    if entry is None:
        raise lookup.missing(task_id, "id")
    record = codec.decode_task(entry.value)
    await asked.check(owner=record.spec.owner, clearance=record.spec.clearance)
    number = attempt or record.attempts_started
    if not number:
        words = "ended before it was started" if record.state is State.COMPLETE else "has not started yet"
        raise UserError(f"task {task_id} {words}", field="id", reason="not-started", hint="see: spinetta status ID")
    made = next((a for a in record.attempts if a.number == number), None)
    if made is None:
        had = f"task {task_id} has had {record.attempts_started} attempts, and old ones are not remembered"
        raise NotFound(had, field="attempt", hint="0: the latest")
    if made.node == port.name:
        return Found(record, made, None)
    if local_only:
        raise NotFound(
            f"attempt {number} of task {task_id} was made on {made.node}, not on {port.name}", field="attempt"
        )
    if is_worker:
        raise ask_a_voter(port)
    peer = await peers.record(made.node, field="id")
    lacking = uncleared(record.spec.clearance, port.clearances)
    if lacking and port.credentials is not None:  # what passes through this node it could read
        raise AskElsewhere(
            f"{port.name} is not cleared for {', '.join(lacking)}; the task is on {made.node}",
            addresses=(peer.address,),
            field="id",
            object_=task_id,
            reason="ask-node",
        )
    return Found(record, made, peer)
