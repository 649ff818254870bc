"""``spinetta log``, and following a task to its end."""

from __future__ import annotations

import asyncio
import base64
import sys
from typing import TYPE_CHECKING, Any

import click

from spinetta.cli import exits, output
from spinetta.cli.base import Finished, client_options, json_option, with_client
from spinetta.cli.waiting import TELL_AFTER_S, tell_hopeless
from spinetta.errors import UserError

if TYPE_CHECKING:
    from spinetta.client.aio import AsyncClient
    from spinetta.client.views import LogChunk, TaskInfo

# A task that never ran has no log; that is no failure of following it to its end.
_NO_LOG = frozenset({"no-log", "not-started"})


@click.command(epilog=exits.HELP)
@click.argument("task_id", metavar="ID")
@click.option("--follow", "-f", is_flag=True, help="Go on until the task has ended, over all its attempts.")
@click.option("--stderr", is_flag=True, help="Standard error instead of standard output.")
@click.option("--both", is_flag=True, help="Both, each to its own stream.")
@click.option("--tail", metavar="SIZE", help="Begin this many bytes before the end, e.g. 4KiB.")
@click.option("--attempt", metavar="N", type=click.IntRange(1), help="Which; default: the latest.")
@json_option
@client_options
def log(
    task_id: str,
    follow: bool,
    stderr: bool,
    both: bool,
    tail: str | None,
    attempt: int | None,
    as_json: bool,
    node: str | None,
    timeout: str | None,
    config_file: str | None,
) -> None:
    """Print what a task has written, from whichever node has it.

    ID may be the beginning (4 or more characters) or the end (6 or more) of a task's id, if it is the only one.

    \b
    Examples:
      spinetta log 0190b6d3-…
      spinetta log -f --both ID
      spinetta log --stderr --tail 4KiB ID
    """
    from spinetta.units import parse_bytes

    if stderr and both:
        raise UserError("--stderr and --both are given", field="both", hint="give one of them")
    tail_bytes = parse_bytes(tail, "tail") if tail is not None else 0
    if tail is not None and tail_bytes == 0:
        raise UserError("a tail of nothing", field="tail", hint="e.g. --tail 4KiB")
    options: dict[str, Any] = {
        "follow": follow,
        "attempt": attempt or 0,
        "tail_bytes": tail_bytes,
    }
    streams = ("stdout", "stderr") if both else ("stderr",) if stderr else ("stdout",)

    async def work(client: AsyncClient) -> None:
        # One stream alone goes to standard output, whichever it is: that is what pipes are for.
        async with asyncio.TaskGroup() as group:
            for stream in streams:
                group.create_task(pump(client, task_id, stream, as_json=as_json, apart=both, **options))

    try:
        with_client(work, node, timeout, config_file)
    except KeyboardInterrupt:
        if follow:
            tell_detached(task_id)
        raise Finished(exits.INTERRUPTED) from None


async def pump(
    client: AsyncClient, task_id: str, stream: str, *, as_json: bool, apart: bool = True, **options: Any
) -> None:
    """Copy a task's stream to ours."""
    out = sys.stderr.buffer if stream == "stderr" and apart else sys.stdout.buffer

    def tell_gap(why: str) -> None:
        output.tell(f"the log broke off ({why}); it goes on from the same byte once a node answers")

    async for chunk in client.log(task_id, stream=stream, on_gap=tell_gap, **options):
        if as_json:
            output.put_json_line(chunk_document(chunk, stream))
        else:
            out.write(chunk.data)
            out.flush()


def chunk_document(chunk: LogChunk, stream: str) -> dict[str, Any]:
    """A chunk for programs: ``data`` when its bytes are UTF-8, else ``data_base64``."""
    found: dict[str, Any] = {
        "stream": stream,
        "attempt": chunk.attempt,
        "offset": chunk.offset,
        "node": chunk.node,
    }
    return {**found, **data_document(chunk.data)}


def data_document(data: bytes) -> dict[str, str]:
    """Bytes for programs."""
    try:
        return {"data": data.decode()}
    except UnicodeDecodeError:
        return {"data_base64": base64.b64encode(data).decode()}


async def follow_to_end(client: AsyncClient, task_id: str, *, as_json: bool) -> TaskInfo:
    """Show both streams of a task until it has ended; how it ended."""

    async def one(stream: str) -> None:
        try:
            await pump(client, task_id, stream, as_json=as_json, follow=True)
        except UserError as e:
            if e.reason not in _NO_LOG:
                raise

    async def tell() -> None:
        await asyncio.sleep(TELL_AFTER_S)
        await tell_hopeless(client, [task_id])

    async with asyncio.TaskGroup() as group:
        telling = None if as_json else group.create_task(tell())
        async with asyncio.TaskGroup() as pumps:
            pumps.create_task(one("stdout"))
            pumps.create_task(one("stderr"))
        if telling is not None:
            telling.cancel()
    info = (await client.wait([task_id])).tasks[0]
    if as_json:
        from spinetta.cli.show import task_document

        output.put_json_line({"task": task_document(info)})
    return info


def tell_detached(task_id: str) -> None:
    """After Ctrl-C: the task goes on."""
    output.tell(f"\ndetached; the task goes on. To follow again: spinetta log -f {task_id}")
    output.tell(f"To cancel: spinetta cancel {task_id}")
