"""Waiting for tasks to end, and saying so when it may be for ever."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from spinetta.cli import output
from spinetta.errors import SpinettaError

if TYPE_CHECKING:
    from spinetta.client.aio import AsyncClient
    from spinetta.client.views import WaitResult

TELL_AFTER_S = 5.0  # by then a node that can take a task has usually done so
LOOKED_MAX = 20  # tasks that are looked at: what is wrong with one is mostly wrong with all that came with it
TOLD_MAX = 3  # of these that are told


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
    await tell_hopeless(client, [i.id for i in found.tasks if i.task.state.name == "QUEUED"])
    left_s = None if timeout_s is None else timeout_s - TELL_AFTER_S
    return await client.wait(ids, timeout_s=left_s, any_=any_)


async def tell_hopeless(client: AsyncClient, ids: Sequence[str]) -> None:
    """Say of tasks that wait, and that no node of the cluster can ever run, why: a remark, if it can be had."""
    from spinetta.cli import show

    if not ids:
        return
    try:
        found, nodes = await client.get_many(ids[:LOOKED_MAX]), await client.nodes()
    except SpinettaError:
        return  # whoever waits for their end hears of it if it stays so
    hopeless = [(i.id, why) for i in found if (why := show.why_never_runs(i, nodes))]
    for task_id, why in hopeless[:TOLD_MAX]:
        output.tell("\n  ".join((f"task {task_id} waits: no node of the cluster can ever run it, as it is now:", *why)))
    if len(hopeless) > TOLD_MAX:
        output.tell("and others; spinetta status ID tells why")
