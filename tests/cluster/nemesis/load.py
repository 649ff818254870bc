"""The load: tasks of many kinds, submitted and cancelled through changing nodes, with what was acknowledged."""

from __future__ import annotations

import asyncio
import json
import os
import random
import sys
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO, TypeVar

from spinetta.client import AsyncClient, make_spec
from spinetta.errors import Busy, OutcomeUnknown, StoreUnavailable
from spinetta.model import State, TaskId, TaskSpec
from tests.cluster.nemesis.plan import Times
from tests.cluster.nemesis.recorder import boot_s

T = TypeVar("T")

WITNESS = Path(__file__).with_name("witness.py")
# Not sys.executable itself: a virtual environment's takes longer to start.
PYTHON = os.path.realpath(sys.executable)
CALLS_MAX = 32  # submits and cancels under way at once
UNFINISHED_MAX = 400  # tasks: with the cluster down the load waits rather than grow without end
CALL_S = 10.0
AGAIN_S = (0.1, 0.6)
EVERY_S, BATCH_MAX = 0.25, 40
NOWHERE = "no-such-node"  # a tag that no node has

# kind → share. What each must come to is in `checker`.
KINDS: dict[str, float] = {
    "short": 59, "medium": 10, "long": 4, "patient": 3, "no-restart": 4, "fails-then-succeeds": 4, "fails": 3,
    "overlap": 4, "cancelled-at-once": 4, "cancelled-waiting": 3, "cancelled-running": 2,
}  # fmt: skip
RETRIES_THEN, RETRIES_FAILS = 4, 2
CPUS = 0.2  # of the two that a node offers: what all of them start at once must not bring the machine down
PATIENCE = 2.0  # its grace, in those of the others
# The nemesis takes nodes down far more often than machines fail; which task is to blame is not what is tested here.
LOSSES_ALLOWED = 50


def make(kind: str, ledger: Path, times: Times, rng: random.Random) -> TaskSpec:
    """A task of a kind."""
    long_s = times.grace_s * rng.uniform(1.3, 2.0)
    seconds, codes = rng.uniform(0.02, 0.3), "0"
    more: dict[str, Any] = {}
    match kind:
        case "medium" | "no-restart":
            seconds = rng.uniform(1.0, 4.0)
            more = {"restart": kind != "no-restart"}
        case "long" | "cancelled-running":
            seconds = long_s
        case "patient":  # its node is given up long before its own deadline: put back too soon it would run twice
            more = {"grace": times.grace_s * PATIENCE}
            seconds = times.grace_s * PATIENCE * rng.uniform(1.1, 1.4)
        case "overlap":
            seconds = rng.uniform(1.0, times.grace_s)
            more = {"overlap": True}
        case "fails-then-succeeds":
            codes, more = "3,4,0", {"retries": RETRIES_THEN, "backoff": 0.2}
        case "fails":
            codes, more = "7", {"retries": RETRIES_FAILS}
        case "cancelled-waiting":
            more = {"tags": NOWHERE}
    argv = [PYTHON, "-I", "-S", str(WITNESS), str(ledger), f"{seconds:.3f}", codes]
    return make_spec(argv, cpus=CPUS, labels={"kind": kind}, losses_allowed=LOSSES_ALLOWED, **more)


@dataclass
class Load:
    """Submits until told to stop; every call is made again, with the same ids, until it is answered.

    Attributes:
        rate: tasks a second.
        complete: how many tasks have ended, as the store tells.
        submitted: tasks.
        acknowledged: ids.
        again: calls that had to be made again, by error.
        held_back: tasks not submitted, because too many were unfinished or too many calls unanswered.
    """

    addresses: Sequence[str]
    credentials: Path
    directory: Path
    times: Times
    rng: random.Random
    rate: float
    complete: Callable[[], int]
    submitted: int = 0
    acknowledged: set[str] = field(default_factory=set)
    again: Counter[str] = field(default_factory=Counter)
    held_back: int = 0
    _calls: int = 0
    _batches: int = 0  # whose submits and cancels have not all been answered
    _abandoned: bool = False

    @property
    def ledger(self) -> Path:
        """Where attempts tell of themselves."""
        return self.directory / "ledger"

    async def run(self, stop: asyncio.Event, limit_s: float) -> None:
        """Load until `stop`; returns when every call has been answered, or about `limit_s` later."""
        turns = [[*self.addresses[i:], *self.addresses[:i]] for i in range(len(self.addresses))]
        clients = [AsyncClient(t, timeout_s=CALL_S, credentials=self.credentials) for t in turns]
        try:
            with (self.directory / "acks").open("a", buffering=1) as acks:
                async with asyncio.TaskGroup() as group:
                    await self._produce(stop, group, clients, acks)
                    end_s = boot_s() + limit_s
                    while self._batches and boot_s() < end_s:  # noqa: ASYNC110 - once a run
                        await asyncio.sleep(0.1)
                    self._abandoned = True
        finally:
            for client in clients:
                await client.close()

    async def _produce(
        self, stop: asyncio.Event, group: asyncio.TaskGroup, clients: Sequence[AsyncClient], acks: TextIO
    ) -> None:
        kinds, weights = list(KINDS), list(KINDS.values())
        owed, last_s = 0.0, boot_s()
        while not stop.is_set():
            now_s = boot_s()
            owed, last_s = owed + (now_s - last_s) * self.rate, now_s
            room = UNFINISHED_MAX - (self.submitted - self.complete()) if self._calls < CALLS_MAX else 0
            count = max(0, min(int(owed), room, BATCH_MAX))
            self.held_back += max(0, int(owed) - count - BATCH_MAX)
            owed = min(owed - count, BATCH_MAX)
            if count:
                chosen = self.rng.choices(kinds, weights, k=count)
                specs = [make(k, self.ledger, self.times, self.rng) for k in chosen]
                group.create_task(self._one_batch(specs, chosen, clients, acks))
            try:
                async with asyncio.timeout(EVERY_S):
                    await stop.wait()
            except TimeoutError:
                continue

    async def _one_batch(
        self, specs: Sequence[TaskSpec], kinds: Sequence[str], clients: Sequence[AsyncClient], acks: TextIO
    ) -> None:
        self.submitted += len(specs)
        self._batches += 1
        try:
            await self._submit_and_cancel(specs, kinds, clients, acks)
        finally:
            self._batches -= 1

    async def _submit_and_cancel(
        self, specs: Sequence[TaskSpec], kinds: Sequence[str], clients: Sequence[AsyncClient], acks: TextIO
    ) -> None:
        ids = [s.id for s in specs]
        _note(acks, op="sent", ids=ids, kinds=list(kinds))
        done = await self._until_answered(clients, lambda client: client.submit_many(specs))
        if done is None:
            return
        _note(acks, op="acknowledged", ids=ids)
        self.acknowledged.update(ids)
        async with asyncio.TaskGroup() as group:
            for task, kind in zip(ids, kinds, strict=True):
                delay_s = {
                    "cancelled-at-once": 0.0, "cancelled-waiting": self.rng.uniform(1, 5),
                    "cancelled-running": self.rng.uniform(1, self.times.grace_s),
                }.get(kind)  # fmt: skip
                if delay_s is not None:
                    group.create_task(self._cancel(task, delay_s, clients, acks))

    async def _cancel(self, task: TaskId, delay_s: float, clients: Sequence[AsyncClient], acks: TextIO) -> None:
        await asyncio.sleep(delay_s)
        done = await self._until_answered(clients, lambda client: client.cancel([task]))
        if done is not None:
            one = done[0]
            _note(acks, op="cancelled", ids=[task], waiting=one.state is State.COMPLETE and not one.was_complete)

    async def _until_answered(
        self, clients: Sequence[AsyncClient], call: Callable[[AsyncClient], Awaitable[T]]
    ) -> T | None:
        """Make a call until it is answered; None: it never was."""
        self._calls += 1
        try:
            while not self._abandoned:
                try:
                    return await call(self.rng.choice(clients))
                except (StoreUnavailable, OutcomeUnknown, Busy) as error:
                    self.again[type(error).__name__] += 1
                    await asyncio.sleep(self.rng.uniform(*AGAIN_S))
            return None
        finally:
            self._calls -= 1


def _note(acks: TextIO, **row: Any) -> None:
    acks.write(json.dumps({"t": boot_s(), **row}) + "\n")
