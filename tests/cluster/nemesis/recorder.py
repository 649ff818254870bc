"""Keeps the store's whole history while it is made: every revision, as it comes, in a file of JSON lines."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from spinetta import codec, keys
from spinetta.errors import Compacted, StoreUnavailable
from spinetta.model import LeaseId, Revision
from spinetta.store.etcd import EtcdStore
from spinetta.store.process import EtcdTls
from spinetta.store.protocol import Change, KeyValue

KEPT = (keys.TASK, "/status/", keys.NODE, keys.INCARNATION, keys.BEAT, keys.LEADER, keys.GENERATION)
RETRY_S = 0.3


def boot_s() -> float:
    """Seconds on CLOCK_BOOTTIME, the one clock of everything here."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Recorder:
    """Follows the store through each of its members; what it has seen last is here for who steers the run.

    Whatever a majority of the members commits one of them tells at once, so that the time at which an event is seen is
    near that of its commit even while others are frozen, and never before it.

    Attributes:
        leader: the node that holds the office; empty: none.
        nodes: those that are registered.
        members: nodes with an etcd member.
        complete: tasks that have ended.
        revision: the latest that was seen.
        breaks: how often a watch had to begin again.
    """

    def __init__(self, endpoints: Sequence[str], tls: EtcdTls, path: Path) -> None:
        self._endpoints, self._tls, self._path = endpoints, tls, path
        self.leader = ""
        self.nodes: set[str] = set()
        self.members: set[str] = set()
        self.complete: set[str] = set()
        self.revision = Revision(0)
        self.breaks = 0

    async def run(self) -> None:
        """Record until cancelled. The history must not be compacted meanwhile."""
        with self._path.open("a", buffering=1) as file:
            async with asyncio.TaskGroup() as group:
                for endpoint in self._endpoints:
                    group.create_task(self._follow(endpoint, file))

    async def _follow(self, endpoint: str, file: TextIO) -> None:
        store = EtcdStore([endpoint], lambda: self._tls)
        try:
            while True:
                try:
                    await self._watch(store, file)
                except (StoreUnavailable, Compacted):  # a member that is behind; or has no seat, or was cut off
                    self.breaks += 1
                    await asyncio.sleep(RETRY_S)
        finally:
            await store.close()

    async def _watch(self, store: EtcdStore, file: TextIO) -> None:
        async with contextlib.aclosing(store.watch("/", start=Revision(self.revision + 1))) as watch:
            async for changes in watch:
                now_s = boot_s()
                for event in changes.events:
                    if event.revision > self.revision:  # else another member has told of it
                        self._note(event)
                        if event.key.startswith(KEPT):
                            file.write(line_of(event, now_s) + "\n")
                if changes.events:
                    self.revision = Revision(max(self.revision, changes.revision))

    def _note(self, event: Change) -> None:
        if event.key == keys.OFFICE:
            self.leader = codec.decode_office(event.value.value) if event.value else ""
        elif event.key.startswith(keys.COMPLETE) and event.value:
            self.complete.add(keys.parse_task(event.key))
        elif event.key.startswith(keys.NODE) and not event.value:
            self.nodes.discard(keys.parse_node(event.key))
        elif event.key.startswith(keys.NODE) and event.value:
            self.nodes.add(keys.parse_node(event.key))
            record = codec.decode_node(event.value.value)
            (self.members.add if record.etcd_member_id else self.members.discard)(record.name)

    async def present(self) -> dict[str, tuple[int, str]]:
        """All task records as a linearizable read gives them: key → revision written, value. For the last word."""
        store = EtcdStore(self._endpoints, lambda: self._tls)
        try:
            async with asyncio.timeout(60):
                page = await store.list(keys.TASK)
            return {e.key: (e.modified, base64.b64encode(e.value).decode()) for e in page.entries}
        finally:
            await store.close()


def line_of(event: Change, seen_s: float) -> str:
    """One event."""
    row: dict[str, Any] = {"r": event.revision, "t": round(seen_s, 4), "k": event.key}
    if event.value is not None:
        row |= {"c": event.value.created, "l": event.value.lease, "v": base64.b64encode(event.value.value).decode()}
    return json.dumps(row)


def read_history(path: Path) -> Iterator[tuple[Revision, float, list[Change]]]:
    """Whole revisions, each with when it was seen."""
    group: list[Change] = []
    seen_s = 0.0
    with path.open() as file:
        for text in file:
            row = json.loads(text)
            revision = Revision(row["r"])
            if group and revision != group[0].revision:
                yield group[0].revision, seen_s, group
                group = []
            value = None
            if "v" in row:
                data = base64.b64decode(row["v"])
                value = KeyValue(row["k"], data, Revision(row["c"]), revision, LeaseId(row["l"]))
            seen_s = row["t"]
            group.append(Change(row["k"], value, revision))
    if group:
        yield group[0].revision, seen_s, group
