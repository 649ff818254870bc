"""How far the getting of an image, or its verification, is."""

from __future__ import annotations

import sys
from collections.abc import Callable, Coroutine
from dataclasses import asdict
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from spinetta.cli import output
from spinetta.cli.base import with_client

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from spinetta.client.aio import AsyncClient
    from spinetta.client.images import ImageStep

_WORDS = {
    "wait": "waiting",
    "look": "asking the registry",
    "fetch": "fetching",
    "check": "looking through layers",
    "unpack": "unpacking",
    "list": "listing files",
    "sync": "writing to disk",
    "verify": "comparing files",
}


class Shown:
    """Progress for people: a bar on a terminal, a line for each phase otherwise; for programs a line of JSON each."""

    def __init__(self, what: str, *, as_json: bool) -> None:
        self._what = what
        self._as_json = as_json
        self._phase = ""
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        if not self._as_json and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                DownloadColumn(),
                console=Console(stderr=True),
                transient=True,
            )
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def tell(self, step: ImageStep) -> None:
        """It is so far."""
        if self._as_json:
            output.put_json_line(asdict(step))
            return
        is_new, self._phase = step.phase != self._phase, step.phase
        words = _WORDS.get(step.phase, step.phase)
        if self._bar is None:
            if is_new and step.phase != "wait":
                output.tell(f"{output.printable(self._what)}: {words}")
            return
        if is_new and self._task is not None:
            self._bar.remove_task(self._task)
            self._task = None
        if self._task is None:
            self._task = self._bar.add_task(words, total=step.total_bytes or None)
        self._bar.update(self._task, completed=step.done_bytes)


def with_progress(
    what: str,
    work: Callable[[AsyncClient, Callable[[ImageStep], None]], Coroutine[Any, Any, Any]],
    node: str | None,
    config_file: str | None,
    *,
    as_json: bool,
) -> Any:
    """Do it and show how far it is."""
    with Shown(what, as_json=as_json) as shown:
        return with_client(lambda client: work(client, shown.tell), node, None, config_file)
