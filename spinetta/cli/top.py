"""``spinetta top``: nodes and tasks, live."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

from spinetta.cli import exits, output
from spinetta.cli.base import Finished, client_options, json_option, with_client
from spinetta.errors import StoreUnavailable

if TYPE_CHECKING:
    from rich.console import Group

    from spinetta.client.aio import AsyncClient
    from spinetta.client.views import NodeList, TaskInfo

RUNNING_SHOWN_MAX = 200  # more do not fit on any screen
WAITING_COUNTED_MAX = 1000  # one page
INTERVAL_MIN_S = 0.2


@dataclass(frozen=True, slots=True)
class Picture:
    """What there is to see at one moment. `problem`: why it could not be refreshed."""

    nodes: NodeList
    running: tuple[TaskInfo, ...]
    waiting: int
    ended: tuple[TaskInfo, ...]
    problem: str = ""


@click.command(epilog=exits.HELP)
@click.option("--interval", metavar="TIME", default="1s", show_default=True, help="Between two looks.")
@click.option("--once", is_flag=True, help="Look once, print and end; also when the output is piped.")
@json_option
@client_options
def top(
    interval: str, once: bool, as_json: bool, node: str | None, timeout: str | None, config_file: str | None
) -> None:
    """Watch nodes and running tasks. Ctrl-C ends it.

    \b
    Examples:
      spinetta top
      spinetta top --once
      spinetta top --json --interval 5s      # a line every five seconds
    """
    from spinetta.units import parse_duration

    every_s = max(parse_duration(interval, "interval"), INTERVAL_MIN_S)
    live = sys.stdout.isatty() and not once and not as_json

    async def work(client: AsyncClient) -> None:
        if live:
            await _live(client, every_s)
        while not live:
            picture = await look(client)
            if as_json:
                _put(picture)
            else:
                _print(picture)
            if once or not as_json:
                return
            await asyncio.sleep(every_s)

    try:
        with_client(work, node, timeout, config_file)
    except KeyboardInterrupt:
        raise Finished(exits.OK if live else exits.INTERRUPTED) from None


async def look(client: AsyncClient) -> Picture:
    """Ask for everything."""
    from spinetta.client.views import TaskFilter
    from spinetta.model import State

    async def some(state: State, limit: int, newest: bool) -> tuple[TaskInfo, ...]:
        tasks = client.list(
            TaskFilter(states=(state,)), limit=limit, newest_first=newest, with_usage=state is State.RUNNING
        )
        async with contextlib.aclosing(tasks):
            return tuple([info async for info in tasks])

    return Picture(
        nodes=await client.nodes(),
        running=await some(State.RUNNING, RUNNING_SHOWN_MAX, False),
        waiting=len(await some(State.QUEUED, WAITING_COUNTED_MAX, False)),
        ended=await some(State.COMPLETE, 10, True),
    )


def _put(picture: Picture) -> None:
    from spinetta.cli import show

    output.put_json_line(
        {
            "nodes": [show.node_document(n) for n in picture.nodes.nodes],
            "notices": list(picture.nodes.notices),
            "running": [show.task_document(i) for i in picture.running],
            "waiting": picture.waiting,
            "ended": [show.task_document(i) for i in picture.ended],
        }
    )


def _print(picture: Picture) -> None:
    from spinetta.cli.node import node_table
    from spinetta.cli.tasks import task_table

    node_table(picture.nodes)
    output.say()
    output.say(_summary(picture))
    if picture.running:
        output.say()
        task_table(picture.running, with_usage=True)


def _summary(picture: Picture) -> str:
    more = "+" if picture.waiting == WAITING_COUNTED_MAX else ""
    running = sum(n.record.running for n in picture.nodes.nodes)
    return f"{running} running, {picture.waiting}{more} waiting"


async def _live(client: AsyncClient, every_s: float) -> None:
    from dataclasses import replace

    from rich.console import Console
    from rich.live import Live

    picture = await look(client)
    with Live(_drawn(picture), console=Console(), screen=True, auto_refresh=False) as live:
        while True:
            await asyncio.sleep(every_s)
            try:
                picture = await look(client)
            except StoreUnavailable as e:  # show the last picture and say so: it may come back
                picture = replace(picture, problem=str(e))
            live.update(_drawn(picture), refresh=True)


def _drawn(picture: Picture) -> Group:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from spinetta import units
    from spinetta.cli import show
    from spinetta.cli.used import usage_cells

    nodes = Table(box=None, pad_edge=False, header_style="bold", expand=False)
    for heading in ("NODE", "STATUS", "ROLE", "CORES", "", "MEMORY", "RUNNING", "TAGS"):
        nodes.add_column(heading, no_wrap=True)
    for n in picture.nodes.nodes:
        r = n.record
        used = r.capacity.cpu_millis - r.free.cpu_millis
        nodes.add_row(
            r.name,
            Text(n.status, "green" if n.status == "ready" else "yellow" if "ing" in n.status else "red"),
            ("voter" if n.voter else "worker") + (" *" if n.leader else ""),
            f"{units.format_cpus(used)}/{units.format_cpus(r.capacity.cpu_millis)}",
            _bar(used, r.capacity.cpu_millis),
            f"{units.format_bytes(r.capacity.memory_bytes - r.free.memory_bytes)}"
            f"/{units.format_bytes(r.capacity.memory_bytes)}",
            str(r.running),
            Text(",".join(r.tags)),
        )
    tasks = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("TASK", "NAME", "STATE", "EXIT", "NODE", "TOOK", "CPU", "MEMORY", "PROCS", "COMMAND"):
        tasks.add_column(heading, no_wrap=True, overflow="ellipsis")
    for info in (*picture.running, *picture.ended):
        word = show.state_word(info)
        tasks.add_row(
            "…" + info.id[-12:],
            Text(output.printable(show.task_name(info.task.spec))),
            Text(word, show.STATE_COLOURS.get(word) or "none"),
            show.exit_word(info),
            info.node,
            show.run_time(info),
            *usage_cells(info),
            Text(output.printable(show.command_line(info.task.spec))),
        )
    lines = [Text(f"notice: {notice}", "yellow") for notice in picture.nodes.notices]
    if picture.problem:
        lines.append(Text(picture.problem, "red"))
    return Group(nodes, *lines, Text(""), Text(_summary(picture), "bold"), Text(""), tasks)


def _bar(used: int, total: int, cells: int = 12) -> str:
    """A part of a whole, drawn."""
    full = round(cells * min(used / total, 1.0)) if total > 0 else 0
    return "█" * full + "░" * (cells - full)
