"""``spinetta list --archived``: finished tasks that have left the cluster's store."""

from __future__ import annotations

import contextlib
import datetime
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from spinetta.cli import output
from spinetta.cli.base import with_client
from spinetta.errors import UserError

if TYPE_CHECKING:
    from spinetta.client.aio import AsyncClient
    from spinetta.client.views import TaskFilter, TaskInfo

TIME_HINT = "how long ago, e.g. 30d, or a day, e.g. 2026-01-31, or a time, e.g. 2026-01-31T08:00"


def time_ms(text: str | None, field: str, now_s: float) -> int:
    """A moment in milliseconds since 1970, from how long ago it was or a date in this machine's time zone; 0: none.

    Raises:
        UserError: it is neither.
    """
    if text is None:
        return 0
    try:
        found_s = datetime.datetime.fromisoformat(text).astimezone().timestamp()
    except ValueError:
        from spinetta import units

        try:
            found_s = now_s - units.parse_duration(text, field)
        except UserError:
            raise UserError(f"not a time: {text!r}", field=field, hint=TIME_HINT) from None
    if found_s <= 0:
        raise UserError(f"{text!r} is before 1970", field=field, hint=TIME_HINT)
    return int(found_s * 1000)


def show_archived(
    wanted: TaskFilter,
    *,
    states: Sequence[str],
    since: str | None,
    before: str | None,
    limit: int,
    oldest_first: bool,
    quiet: bool,
    as_json: bool,
    where: tuple[str | None, str | None, str | None],
) -> None:
    """List what the archives of all nodes hold, and name the nodes that did not tell."""
    if set(states) - {"complete"}:
        raise UserError("--state with --archived: all archived tasks are complete", field="state", hint="use --outcome")
    now_s = time.time()
    since_ms, before_ms = time_ms(since, "since", now_s), time_ms(before, "before", now_s)

    async def work(client: AsyncClient) -> tuple[list[TaskInfo], bool, dict[str, str]]:
        found: list[TaskInfo] = []
        silent: dict[str, str] = {}
        pages = client.list_archived(
            wanted,
            since_ms=since_ms,
            before_ms=before_ms,
            newest_first=not oldest_first,
            limit=limit + 1 if limit else 0,
        )
        async with contextlib.aclosing(pages) as answers:
            async for page in answers:
                found += page.tasks
                silent |= page.silent
        return (found[:limit], True, silent) if limit and len(found) > limit else (found, False, silent)

    found, more, silent = with_client(work, *where)
    from spinetta.cli import show
    from spinetta.cli.tasks import task_table

    if as_json:
        document = {"tasks": [show.task_document(i) for i in found], "more": more, "silent": silent}
        output.put_json(document)
        return
    if quiet:
        for info in found:
            output.say(info.id)
    elif found:
        task_table(found)
    else:
        output.tell("no archived tasks match" if silent else "no archived tasks match; all archives have answered")
    if more:
        output.tell(f"there are more than these {limit}; --limit 0 shows all")
    for node, why in sorted(silent.items()):
        output.tell(f"warning: the archive of node {node} is not in this list: {why}")
