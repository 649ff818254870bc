"""``spinetta status``, ``list``, ``cancel`` and ``wait``."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import click

from spinetta.cli import exits, output
from spinetta.cli.base import Finished, client_options, json_option, waiting_client_options, with_client
from spinetta.errors import UserError

if TYPE_CHECKING:
    from spinetta.client.aio import AsyncClient
    from spinetta.client.views import CancelResult, NodeList, TaskFilter, TaskInfo, WaitResult

F = TypeVar("F", bound=Callable[..., Any])

LIST_LIMIT = 100  # a few screens; --limit 0 for all
PENDING_COUNTED_MAX = 1000  # for the summary: one page
_STATES = {"blocked": "BLOCKED", "pending": "QUEUED", "queued": "QUEUED", "running": "RUNNING", "complete": "COMPLETE"}
_OUTCOMES = ("succeeded", "failed", "cancelled", "lost")


# --- status ------------------------------------------------------------------------------------------------------


@click.command(epilog=exits.HELP)
@click.argument("ids", nargs=-1, metavar="[ID]…")
@json_option
@client_options
def status(ids: tuple[str, ...], as_json: bool, node: str | None, timeout: str | None, config_file: str | None) -> None:
    """Show tasks in full; without ID the state of the cluster.

    ID may be the beginning (4 or more characters) or the end (6 or more) of a task's id, if it is the only one.

    \b
    Examples:
      spinetta status
      spinetta status 3f2a9c
      spinetta status --json ID | jq .tasks[0].attempts
    """
    if not ids:
        _cluster_status(as_json, (node, timeout, config_file))
        return

    async def work(client: AsyncClient) -> tuple[list[TaskInfo], NodeList | None]:
        found = await client.get_many(ids)
        waits = any(i.task.state.name == "QUEUED" for i in found)
        return found, await client.nodes() if waits else None

    found, nodes = with_client(work, node, timeout, config_file)
    from spinetta.cli import show

    waiting = [show.why_waiting(i, nodes) if nodes else [] for i in found]
    if as_json:
        documents = [show.task_document(i) | {"why_waiting": why} for i, why in zip(found, waiting, strict=True)]
        output.put_json({"tasks": documents})
        return
    for n, info in enumerate(found):
        if n:
            output.say()
        for heading, text in show.task_lines(info):
            output.say(f"{heading + ':':<14}{output.printable(text)}")
        for line, why in enumerate(waiting[n]):
            output.say(f"{'' if line else 'Waits because:':<14} {output.printable(why)}")
        rows = show.attempt_rows(info.task)
        if len(rows) > 1 or info.task.attempts_started > 1:
            output.say()
            output.table(("ATTEMPT", "NODE", "OUTCOME", "EXIT", "TOOK", "USED", "MESSAGE"), rows)


def _cluster_status(as_json: bool, where: tuple[str | None, str | None, str | None]) -> None:
    from spinetta import units

    async def work(client: AsyncClient) -> tuple[NodeList, int]:
        from spinetta.client.views import TaskFilter
        from spinetta.model import State

        nodes = await client.nodes()
        waiting = 0
        wanted = TaskFilter(states=(State.QUEUED, State.BLOCKED))
        async with contextlib.aclosing(client.list(wanted, limit=PENDING_COUNTED_MAX)) as tasks:
            async for _ in tasks:
                waiting += 1
        return nodes, waiting

    found, waiting = with_client(work, *where)
    ready = [n for n in found.nodes if n.status == "ready"]
    running = sum(n.record.running for n in found.nodes)
    leader = next((n.record.name for n in found.nodes if n.leader), "")
    if as_json:
        output.put_json(
            {
                "nodes": len(found.nodes),
                "ready": len(ready),
                "voters": sum(n.voter for n in found.nodes),
                "leader": leader,
                "running": running,
                "waiting": waiting,
                "waiting_at_least": waiting == PENDING_COUNTED_MAX,
                "notices": list(found.notices),
            }
        )
        return
    free = sum(n.record.free.cpu_millis for n in ready)
    all_ = sum(n.record.capacity.cpu_millis for n in ready)
    more = " or more" if waiting == PENDING_COUNTED_MAX else ""
    output.say(f"Nodes:   {len(ready)} ready of {len(found.nodes)}, leader {leader or 'none'}")
    output.say(f"Tasks:   {running} running, {waiting}{more} waiting")
    output.say(f"Cores:   {units.format_cpus(free)} free of {units.format_cpus(all_)}")
    for notice in found.notices:
        output.tell(f"notice: {notice}")


# --- list --------------------------------------------------------------------------------------------------------


def filter_options(command: F) -> F:
    """Which tasks."""
    for decorate in (
        click.option("--on", "on_node", metavar="NODE", help="Run, or ran last, on this node."),
        click.option("--name", "task_name", metavar="NAME", help="With exactly this name."),
        click.option("--mine", is_flag=True, help="Short for --owner with your own name, as submit has it."),
        click.option("--owner", metavar="NAME", help="Of this owner."),
        click.option("--label", "labels", multiple=True, metavar="KEY=VALUE", help="With this label; may be repeated."),
    ):
        command = decorate(command)
    return command


def _named(filters: dict[str, Any], where: tuple[str | None, str | None, str | None]) -> dict[str, Any]:
    """The filter's options with the owner that --mine means."""
    from spinetta.cli.submit import own_name

    owner = filters["owner"]
    if filters["mine"]:
        if owner is not None:
            raise UserError("--mine and --owner are given", field="owner", hint="give one of them")
        owner = own_name(*where)
    return {key: value for key, value in filters.items() if key != "mine"} | {"owner": owner}


def make_filter(
    states: Sequence[str] = (),
    outcomes: Sequence[str] = (),
    labels: Sequence[str] = (),
    owner: str | None = None,
    task_name: str | None = None,
    on_node: str | None = None,
) -> TaskFilter:
    """A filter from options.

    Raises:
        UserError: names the option.
    """
    from spinetta.cli.submit import pair
    from spinetta.client.views import TaskFilter
    from spinetta.model import Outcome, State
    from spinetta.validate import check_filter

    found = TaskFilter(
        states=tuple(sorted({State[_STATES[s]] for s in states})),
        outcomes=tuple(sorted({Outcome[o.upper()] for o in outcomes})),
        labels=tuple(sorted(dict(pair(text, "label") for text in labels).items())),
        owner=owner or "",
        name=task_name or "",
        node=on_node or "",
    )
    check_filter(found.labels, found.owner, found.name, found.node)
    return found


@click.command("list", epilog=exits.HELP)
@click.option("--state", "states", multiple=True, type=click.Choice(list(_STATES)), help="May be repeated.")
@click.option("--outcome", "outcomes", multiple=True, type=click.Choice(_OUTCOMES), help="May be repeated.")
@filter_options
@click.option("--limit", metavar="N", type=click.IntRange(0), default=LIST_LIMIT, show_default=True, help="0: all.")
@click.option("--oldest-first", is_flag=True, help="In order of submission; else the newest come first.")
@click.option("--quiet", "-q", is_flag=True, help="Print ids only.")
@click.option("--archived", is_flag=True, help="Finished tasks that have left the cluster's store instead.")
@click.option("--since", metavar="TIME", help="With --archived: submitted since then; 30d ago, or a date.")
@click.option("--before", metavar="TIME", help="With --archived: submitted before then.")
@click.option("--watch", is_flag=True, help="Go on and print a line for each change, until Ctrl-C.")
@json_option
@client_options
def list_tasks(
    states: tuple[str, ...],
    outcomes: tuple[str, ...],
    limit: int,
    oldest_first: bool,
    quiet: bool,
    archived: bool,
    since: str | None,
    before: str | None,
    watch: bool,
    as_json: bool,
    node: str | None,
    timeout: str | None,
    config_file: str | None,
    **filters: Any,
) -> None:
    """List tasks. With --json, one document; with --json --watch, one line for each change.

    Some time after its end a task leaves the cluster's store for an archive on the node that finished it: --archived
    lists those. Times are those of submission.

    \b
    Examples:
      spinetta list --state running
      spinetta list --outcome failed --label run=7 --limit 0
      spinetta list --mine -q --state pending | xargs spinetta cancel
      spinetta list --archived --outcome failed --since 30d
    """
    where = (node, timeout, config_file)
    wanted = make_filter(states, outcomes, **_named(filters, where))
    if archived:
        from spinetta.cli.archived import show_archived

        if watch:
            raise UserError("--watch and --archived are given", field="watch", hint="nothing there changes any more")
        show_archived(
            wanted, states=states, since=since, before=before, limit=limit, oldest_first=oldest_first,
            quiet=quiet, as_json=as_json, where=where,
        )  # fmt: skip
        return
    if since is not None or before is not None:
        raise UserError("--since or --before without --archived", field="since", hint="add --archived")
    if watch:
        _watch(wanted, quiet, as_json, (node, timeout, config_file))
        return

    async def work(client: AsyncClient) -> tuple[list[TaskInfo], bool]:
        ask = limit + 1 if limit else 0
        async with contextlib.aclosing(client.list(wanted, newest_first=not oldest_first, limit=ask)) as tasks:
            found = [info async for info in tasks]
        return (found[:limit], True) if limit and len(found) > limit else (found, False)

    found, more = with_client(work, node, timeout, config_file)
    from spinetta.cli import show

    if as_json:
        output.put_json({"tasks": [show.task_document(i) for i in found], "more": more})
        return
    if quiet:
        for info in found:
            output.say(info.id)
    elif found:
        task_table(found)
    else:
        output.tell("no tasks match" if wanted != make_filter() else "there are no tasks")
    if more:
        output.tell(f"there are more than these {limit}; --limit 0 shows all")


def task_table(found: Sequence[TaskInfo], *, with_usage: bool = False) -> None:
    """Tasks as a table. `with_usage`: with CPU time so far, and the memory and processes that running ones have now."""
    from spinetta.cli import show
    from spinetta.cli.used import usage_cells

    used = ("CPU", "MEMORY", "PROCS") if with_usage else ()
    header = ("ID", "NAME", "STATE", "EXIT", "NODE", "TRIES", "AGE", "TOOK", *used, "COMMAND")
    rows, colours = [], {}
    for n, info in enumerate(found):
        t = info.task
        word = show.state_word(info)
        rows.append(
            (
                info.id,
                show.task_name(t.spec),
                word,
                show.exit_word(info),
                info.node,
                str(t.attempts_started),
                show.age(t.submitted_ms),
                show.run_time(info),
                *(usage_cells(info) if with_usage else ()),
                show.command_line(t.spec),
            )
        )
        colours[(n, 2)] = show.STATE_COLOURS.get(word, "")
    output.table(header, rows, right=(5,), colours=colours)


def _watch(wanted: TaskFilter, quiet: bool, as_json: bool, where: tuple[str | None, str | None, str | None]) -> None:
    from spinetta.cli import show

    async def work(client: AsyncClient) -> None:
        async with contextlib.aclosing(client.watch(wanted)) as changes:
            async for change in changes:
                for info in change.tasks:
                    if as_json:
                        output.put_json_line(show.task_document(info))
                    elif quiet:
                        output.say(info.id)
                    else:
                        words = (info.id, show.state_word(info), info.node, show.exit_word(info), info.task.spec.name)
                        output.say("  ".join(output.printable(w) for w in words if w))
                sys.stdout.flush()

    try:
        with_client(work, *where)
    except KeyboardInterrupt:
        raise Finished(exits.INTERRUPTED) from None


# --- cancel ------------------------------------------------------------------------------------------------------


@click.command(epilog=exits.HELP)
@click.argument("ids", nargs=-1, metavar="[ID]…")
@click.option("--all", "all_", is_flag=True, help="All unfinished tasks that match the options below.")
@filter_options
@click.option(
    "--state", "states", multiple=True, type=click.Choice(["blocked", "pending", "running"]), help="With --all."
)
@click.option("--yes", "-y", is_flag=True, help="Do not ask.")
@click.option("--reason", metavar="TEXT", default="", help="Kept with the task.")
@json_option
@client_options
def cancel(
    ids: tuple[str, ...],
    all_: bool,
    states: tuple[str, ...],
    yes: bool,
    reason: str,
    as_json: bool,
    node: str | None,
    timeout: str | None,
    config_file: str | None,
    **filters: Any,
) -> None:
    """Cancel tasks. Those that wait are over at once; of those that run the node is asked to end them.

    Cancelling a task that has ended changes nothing and is no error.

    \b
    Examples:
      spinetta cancel 3f2a9c 77ab01
      spinetta cancel --all --label run=7
      spinetta cancel --all --mine --yes --reason "wrong reference"
    """
    where = (node, timeout, config_file)
    wanted = make_filter(states or ("blocked", "queued", "running"), **_named(filters, where))
    if all_ and ids:
        raise UserError("ids and --all are given", field="ids", hint="give one of them")
    if not all_ and (states or wanted != make_filter(("blocked", "queued", "running"))):
        raise UserError("a filter without --all", field="all", hint="add --all, or name tasks by id")
    if not all_ and not ids:
        raise UserError("no task is named", field="ids", hint="spinetta cancel ID…, or --all with a filter")
    chosen = list(ids) if ids else _confirmed(wanted, yes, as_json, where)
    done: list[CancelResult] = []

    async def work(client: AsyncClient) -> None:
        done.extend(await client.cancel(chosen, reason))

    if chosen:
        with_client(work, *where)
    if as_json:
        output.put_json(
            {"tasks": [{"id": c.id, "state": c.state.name.lower(), "was_complete": c.was_complete} for c in done]}
        )
        return
    for c in done:
        what = "had ended before" if c.was_complete else "is being ended" if c.state.name == "RUNNING" else "cancelled"
        output.say(f"{c.id}  {what}")


def _confirmed(
    wanted: TaskFilter, yes: bool, as_json: bool, where: tuple[str | None, str | None, str | None]
) -> list[str]:
    """The ids of the tasks that match, once somebody has agreed."""

    async def collect(client: AsyncClient) -> list[TaskInfo]:
        async with contextlib.aclosing(client.list(wanted)) as tasks:
            return [info async for info in tasks]

    found = with_client(collect, *where)
    if not found:
        if not as_json:
            output.tell("no unfinished tasks match")
        return []
    if yes:
        return [i.id for i in found]
    running = sum(1 for i in found if i.task.state.name == "RUNNING")
    if as_json or not sys.stdin.isatty():
        raise UserError(
            f"{len(found)} tasks would be cancelled and there is nobody to ask", field="yes", hint="add --yes"
        )
    click.confirm(f"Cancel {len(found)} tasks, {running} of them running?", abort=True, err=True)
    return [i.id for i in found]


# --- wait --------------------------------------------------------------------------------------------------------


@click.command(epilog=exits.HELP)
@click.argument("ids", nargs=-1, required=True, metavar="ID…")
@click.option("--timeout", "limit", metavar="TIME", help="How long; default: as long as it takes.")
@click.option("--any", "any_", is_flag=True, help="Until the first one has ended.")
@json_option
@waiting_client_options
def wait(
    ids: tuple[str, ...], limit: str | None, any_: bool, as_json: bool, node: str | None, config_file: str | None
) -> None:
    """Wait until tasks have ended, then list them.

    Exits with 0 when all of them (with --any: those that have ended) succeeded, 1 when not, 5 when the time was over.

    \b
    Examples:
      spinetta wait 3f2a9c 77ab01 --timeout 1h
      spinetta submit --file tasks.yaml | xargs spinetta wait
    """
    from spinetta.cli import show
    from spinetta.cli.waiting import wait_for_end
    from spinetta.units import parse_duration

    limit_s = parse_duration(limit, "timeout") if limit is not None else None

    async def work(client: AsyncClient) -> WaitResult:
        return await wait_for_end(client, ids, timeout_s=limit_s, any_=any_, tells=not as_json)

    try:
        result = with_client(work, node, None, config_file)
    except KeyboardInterrupt:
        output.tell("\nno longer waiting; the tasks go on")
        raise Finished(exits.INTERRUPTED) from None
    if as_json:
        output.put_json({"tasks": [show.task_document(i) for i in result.tasks], "timed_out": result.timed_out})
    else:
        task_table(result.tasks)
    if result.timed_out:
        if not as_json:
            output.tell(f"not all have ended within {limit}")
        raise Finished(exits.TIMED_OUT)
    ended = [i for i in result.tasks if i.done]
    raise Finished(exits.OK if all(i.succeeded for i in ended) else exits.TASK_FAILED)
