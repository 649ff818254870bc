"""``spinetta node drain`` and ``undrain``: a node takes no more tasks, and what becomes of those it has."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import TYPE_CHECKING

import click

from spinetta.cli import exits, output
from spinetta.cli.base import Finished, client_options, json_option, waiting_client_options, with_client
from spinetta.errors import NotFound, UserError

if TYPE_CHECKING:
    from spinetta.client.aio import AsyncClient
    from spinetta.client.views import NodeInfo

LOOK_EVERY_S = 1.0
SHOWN_MAX = 20  # tasks of the table; a node may hold hundreds


@click.command()
@click.argument("name", required=False)
@click.option("--release", is_flag=True, help="Give running tasks back, too, except those with --no-restart.")
@click.option("--force", is_flag=True, help="With --release: those as well; they begin again elsewhere.")
@click.option("--wait", "-w", is_flag=True, help="Until the node holds no task any more.")
@click.option("--timeout", "limit", metavar="TIME", help="With --wait: for so long (default: as long as it takes).")
@json_option
@waiting_client_options
def drain(
    name: str | None,
    release: bool,
    force: bool,
    wait: bool,
    limit: str | None,
    as_json: bool,
    node: str | None,
    config_file: str | None,
) -> None:
    """Let a node take no more tasks, until `undrain`, whatever is restarted. Without NAME the one that is asked.

    What it has claimed and not started goes back to the queue at once; what runs ends in peace, unless --release gives
    it back, too: it is stopped, and begins again on another node. A node that leads, or has a voter's seat, keeps them.

    Ctrl-C ends the waiting, not the drain. The exit code is 5 when the time is over and tasks still run.

    \b
    Examples:
      spinetta node drain n2
      spinetta node drain n2 --wait --timeout 2h && spinetta node stop
      spinetta node drain n2 --release --wait
    """
    from spinetta.units import parse_duration

    if limit is not None and not wait:
        raise UserError("--timeout says how long to wait", field="timeout", hint="add --wait")
    if force and not release:
        raise UserError("--force is for tasks that are given back", field="force", hint="with --release")
    limit_s = None if limit is None else parse_duration(limit, "timeout")

    asked = name or ""

    async def work(client: AsyncClient) -> bool:
        nonlocal asked
        wanted = asked = await chosen(client, name)
        await client.drain(wanted, release=release, force=force)
        if not wait:
            _say(wanted, await _look(client, wanted), as_json)
            return True
        return await _wait(client, wanted, limit_s, as_json)

    try:
        done = with_client(work, node, None, config_file)
    except KeyboardInterrupt:
        output.tell(f"\nno longer waiting; the node goes on draining, until: spinetta node undrain {asked}")
        raise Finished(exits.INTERRUPTED) from None
    if not done:
        if not as_json:
            more = " (--force gives those with --no-restart back, too)" if release and not force else ""
            output.tell(f"tasks still run after {limit}; the node goes on draining{more}")
        raise Finished(exits.TIMED_OUT)


@click.command()
@click.argument("name", required=False)
@json_option
@client_options
def undrain(name: str | None, as_json: bool, node: str | None, timeout: str | None, config_file: str | None) -> None:
    """Let a drained node take tasks again. Without NAME the one that is asked.

    \b
    Example:
      spinetta node undrain n2
    """

    async def work(client: AsyncClient) -> str:
        wanted = await chosen(client, name)
        await client.undrain(wanted)
        return wanted

    wanted = with_client(work, node, timeout, config_file)
    if as_json:
        output.put_json({"node": wanted, "status": "ready"})
    else:
        output.say(f"{wanted} takes tasks again")


async def chosen(client: AsyncClient, name: str | None) -> str:
    """The node that is meant: the one that answers when none is named."""
    return name or (await client.cluster()).node


def status_words(node: NodeInfo) -> str:
    """A node's status, for people: of a draining one with what is left."""
    if node.status != "draining":
        return node.status
    return f"draining, {node.record.running} left" if node.record.running else "drained"


async def _look(client: AsyncClient, name: str) -> NodeInfo:
    found = next((n for n in (await client.nodes()).nodes if n.record.name == name), None)
    if found is None:
        raise NotFound(f"node {name} is gone", field="node", hint="see: spinetta node list")
    return found


def _document(node: NodeInfo) -> dict[str, object]:
    return {"node": node.record.name, "status": node.status, "running": node.record.running}


def _say(name: str, node: NodeInfo, as_json: bool) -> None:
    if as_json:
        output.put_json(_document(node))
        return
    left = node.record.running
    output.say(f"{name} takes no more tasks" + (f"; {left} still run there" if left else ""))


async def _wait(client: AsyncClient, name: str, limit_s: float | None, as_json: bool) -> bool:
    """Until it holds nothing, telling how many are left; False when the time was over, or it was undrained, first."""
    end_s = None if limit_s is None else time.monotonic() + limit_s
    last = -1
    while True:
        found = await _look(client, name)
        left = found.record.running
        if found.status not in ("draining", "leaving"):
            raise UserError(
                f"node {name} is {found.status}: it does not drain any more",
                field="node",
                hint="see: spinetta node list",
                reason="not-draining",
            )
        if as_json and left != last:
            output.put_json_line({**_document(found), "done": not left})
        elif left and last < 0:
            await _show(client, name, left)
        elif left and left != last:
            output.tell(f"{name}: {left} task{'' if left == 1 else 's'} left")
        last = left
        if not left:
            if not as_json:
                output.say(f"{name} is drained")
            return True
        if end_s is not None and time.monotonic() >= end_s:
            return False
        await asyncio.sleep(LOOK_EVERY_S)


async def _show(client: AsyncClient, name: str, left: int) -> None:
    """What is waited for."""
    from spinetta.cli import tasks
    from spinetta.client.views import TaskFilter
    from spinetta.model import State

    wanted = TaskFilter(states=(State.RUNNING,), node=name)
    async with contextlib.aclosing(client.list(wanted, limit=SHOWN_MAX)) as running:
        found = [info async for info in running]
    output.tell(f"{name} takes no more tasks; waiting for {left} that run there")
    if found:
        tasks.task_table(found)
    if left > len(found) == SHOWN_MAX:  # fewer: some have ended since
        output.tell(f"… and {left - len(found)} more: spinetta list --state running --on {name}")
