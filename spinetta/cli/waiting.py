"""Waiting for tasks to end, and saying so when it may be for ever."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from spinetta.cli import output

if TYPE_CHECKING:
    from spinetta.client.aio import AsyncClient
    from spinetta.client.views import TaskInfo, WaitResult

TELL_AFTER_S = 5.0  # by then a node that can take a task has usually done so
TOLD_MAX = 3  # tasks; what is wrong with one is mostly wrong with all that were submitted with it


async def wait_for_end(
    client: AsyncClient, ids: Sequence[str], *, timeout_s: float | None = None, any_: bool = False, tells: bool
) -> WaitResult:
    """As `client.wait`. With `tells`: standard error says what is waited for, and which tasks no node can ever run."""
    if not tells:
        return await client.wait(ids, timeout_s=timeout_s, any_=any_)
    output.tell(f"waiting for task {ids[0]}" if len(ids) == 1 else f"waiting for {len(ids)} tasks")
    if timeout_s is not None and timeout_s <= TELL_AFTER_S:
        return await client.wait(ids, timeout_s=timeout_s, any_=any_)
    found = await client.wait(ids, timeout_s=TELL_AFTER_S, any_=any_)
    if not found.timed_out:
        return found
    await _tell_hopeless(client, [i for i in found.tasks if i.task.state.name == "QUEUED"])
    left_s = None if timeout_s is None else timeout_s - TELL_AFTER_S
    return await client.wait(ids, timeout_s=left_s, any_=any_)


async def _tell_hopeless(client: AsyncClient, waiting: Sequence[TaskInfo]) -> None:
    from spinetta.cli import show

    if not waiting:
        return
    nodes = await client.nodes()
    hopeless = [(i.id, why) for i in waiting if (why := show.why_never_runs(i, nodes))]
    for task_id, why in hopeless[:TOLD_MAX]:
        output.tell("\n  ".join((f"task {task_id} waits: no node of the cluster can ever run it, as it is now:", *why)))
    if len(hopeless) > TOLD_MAX:
        output.tell(f"and {len(hopeless) - TOLD_MAX} more; spinetta status ID tells why")
