"""Submit and Cancel over a store that loses answers: before the write, after it, once or for good."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import grpc
import pytest

from spinetta import codec, keys
from spinetta.errors import InvariantViolation, OutcomeUnknown, StoreUnavailable
from spinetta.model import Incarnation, IncarnationId, Life, NodeId, Outcome, State
from spinetta.node.services import limits
from spinetta.store.protocol import Snapshot, Store
from spinetta.txn import NESTED_MAX, Result, Txn
from spinetta.v1 import api_pb2 as api
from spinetta.v1 import record_pb2 as pb
from tests.contract.api_world import Etcd, etcd, etcd_member, failure, node, put, run, spec

__all__ = ["etcd", "etcd_member"]
pytestmark = pytest.mark.contract
Code = grpc.StatusCode

FINE = "fine"
REFUSED = "refused"  # certainly not done
LOST_BEFORE = "lost before"  # no answer, and not done
LOST_AFTER = "lost after"  # no answer, but done
LATE = "late"  # no answer, and done only after the next one has been tried


class Lossy:
    """A store whose next commits and reads go as told; after that all is fine."""

    def __init__(self, inner: Store) -> None:
        self.inner = inner
        self.commits: list[str] = []
        self.reads: list[str] = []
        self.seen = 0
        self._late: list[Txn] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    async def commit(self, txn: Txn, *, timeout_s: float = 5.0) -> Result:
        self.seen += 1
        fate = self.commits.pop(0) if self.commits else FINE
        if fate == REFUSED:
            raise StoreUnavailable("no leader")
        if fate == LATE:
            self._late.append(txn)
        if fate == LOST_AFTER:
            await self.inner.commit(txn, timeout_s=timeout_s)
        if fate in (LOST_BEFORE, LOST_AFTER, LATE):
            raise OutcomeUnknown("no answer")
        result = await self.inner.commit(txn, timeout_s=timeout_s)
        while self._late:
            await self.inner.commit(self._late.pop())
        return result

    async def read(self, wanted: Any, *, timeout_s: float = 5.0) -> Snapshot:
        fate = self.reads.pop(0) if self.reads else FINE
        if fate == REFUSED:
            raise StoreUnavailable("no leader")
        return await self.inner.read(wanted, timeout_s=timeout_s)


def lossy(made: list[Lossy]) -> Callable[[Store], Store]:
    def wrap(inner: Store) -> Store:
        made.append(Lossy(inner))
        return made[-1]

    return wrap


@pytest.mark.parametrize("fates", list(itertools.product([LOST_BEFORE, LOST_AFTER, LATE], repeat=2)))
def test_submit_gets_through_lost_answers(etcd: Etcd, tmp_path: Path, fates: tuple[str, str]) -> None:
    async def scenario() -> None:
        made: list[Lossy] = []
        async with node(etcd, tmp_path, wrap=lossy(made)) as a:
            (before,) = await a.submit()
            made[0].commits = list(fates)
            tasks = [spec(), spec(before), spec()]
            done = await a.api.Submit(api.SubmitRequest(tasks=tasks))
            assert [(t.id, t.existed) for t in done.tasks] == [(t.id, t.id == before) for t in tasks]
            for prefix in (keys.TASK, keys.QUEUED):
                assert len((await a.store.list(prefix)).entries) == 3
            for t in tasks:
                assert (await a.task(t.id)).state is State.QUEUED

    run(scenario())


def test_submit_says_when_it_does_not_know_and_the_same_again_finishes_it(etcd: Etcd, tmp_path: Path) -> None:
    async def scenario() -> None:
        made: list[Lossy] = []
        async with node(etcd, tmp_path, wrap=lossy(made)) as a:
            tasks = [spec() for _ in range(300)]
            made[0].commits = [FINE, LOST_AFTER, REFUSED]
            made[0].reads = [REFUSED]  # what was written cannot be read back either
            failed = await failure(a.api.Submit(api.SubmitRequest(tasks=tasks)))
            assert (failed.code, failed.detail.reason) == (Code.ABORTED, "outcome-unknown")
            assert len((await a.store.list(keys.TASK)).entries) == 240
            made[0].commits = []
            done = await a.api.Submit(api.SubmitRequest(tasks=tasks))
            assert [t.existed for t in done.tasks] == [True] * 240 + [False] * 60
            assert len((await a.store.list(keys.QUEUED)).entries) == 300

    run(scenario())


def test_submit_that_certainly_did_nothing_may_be_tried_again(etcd: Etcd, tmp_path: Path) -> None:
    async def scenario() -> None:
        made: list[Lossy] = []
        async with node(etcd, tmp_path, wrap=lossy(made)) as a:
            made[0].commits = [REFUSED]
            failed = await failure(a.api.Submit(api.SubmitRequest(tasks=[spec()])))
            assert (failed.code, failed.detail.reason) == (Code.UNAVAILABLE, "unavailable")
            assert made[0].seen == 1
            made[0].commits = [LOST_BEFORE, REFUSED]  # unknown once is unknown, whatever is certain later
            failed = await failure(a.api.Submit(api.SubmitRequest(tasks=[spec()])))
            assert failed.code is Code.ABORTED
            assert not (await a.store.list(keys.TASK)).entries

    run(scenario())


def test_a_store_that_never_answers_is_given_up(etcd: Etcd, tmp_path: Path) -> None:
    async def scenario() -> None:
        made: list[Lossy] = []
        async with node(etcd, tmp_path, wrap=lossy(made)) as a:
            (task_id,) = await a.submit()
            made[0].seen, made[0].commits = 0, [LOST_BEFORE] * 100
            with mock.patch.object(limits, "TRY_WAIT_S", 0.001):
                failed = await failure(a.api.Submit(api.SubmitRequest(tasks=[spec()])))
                assert (failed.code, failed.detail.reason) == (Code.ABORTED, "outcome-unknown")
                assert made[0].seen == 8
                failed = await failure(a.api.Cancel(api.CancelRequest(ids=[task_id])))
                assert (failed.code, failed.detail.reason) == (Code.ABORTED, "outcome-unknown")
                assert made[0].seen == 16
            assert (await a.task(task_id)).state is State.QUEUED

    run(scenario())


@pytest.mark.parametrize("fates", list(itertools.product([LOST_BEFORE, LOST_AFTER, LATE], repeat=2)))
def test_cancel_gets_through_lost_answers(etcd: Etcd, tmp_path: Path, fates: tuple[str, str]) -> None:
    async def scenario() -> None:
        made: list[Lossy] = []
        async with node(etcd, tmp_path, wrap=lossy(made)) as a:
            waiting, running, ended = await a.submit(spec(), spec(), spec())
            for task_id in (running, ended):
                assert await a.claim(task_id)
            await a.end(ended)
            made[0].commits = list(fates)
            done = await a.api.Cancel(api.CancelRequest(ids=[waiting, running, ended]))
            assert [(t.state, t.was_complete) for t in done.tasks] == [
                (pb.COMPLETE, False),  # it was we who ended it, although the answer was lost
                (pb.RUNNING, False),
                (pb.COMPLETE, True),
            ]
            assert (await a.task(waiting)).outcome is Outcome.CANCELLED
            assert not await a.claim(waiting)
            assert (await a.get(running)).cancel_requested

    run(scenario())


def test_no_store_no_harm(etcd: Etcd, tmp_path: Path) -> None:
    async def scenario() -> None:
        made: list[Lossy] = []
        async with node(etcd, tmp_path, wrap=lossy(made)) as a:
            (task_id,) = await a.submit()
            for call in (  # made one after the other: a call begins when it is made, not when it is awaited
                lambda: a.api.Get(api.GetRequest(ids=[task_id])),
                lambda: a.api.Cancel(api.CancelRequest(ids=[task_id])),
            ):
                made[0].reads = [REFUSED]
                failed = await failure(call())
                assert (failed.code, failed.detail.reason) == (Code.UNAVAILABLE, "unavailable")
                assert "no leader" in failed.text
                assert failed.detail.hint == "nothing was changed: try again"

    run(scenario())


class Broken:
    """A store with a bug in it."""

    def __init__(self, inner: Store, error: Exception) -> None:
        self.inner = inner
        self.error = error

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    async def commit(self, txn: Txn, *, timeout_s: float = 5.0) -> Result:  # noqa: ARG002
        raise self.error


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ZeroDivisionError("secret number"), "an error nobody thought of"),
        (InvariantViolation("task secret is in two places"), "a contradiction in the cluster's records"),
    ],
)
def test_bugs_are_logged_here_and_named_there(
    etcd: Etcd, tmp_path: Path, caplog: pytest.LogCaptureFixture, error: Exception, text: str
) -> None:
    async def scenario() -> None:
        async with node(etcd, tmp_path, wrap=lambda inner: Broken(inner, error)) as a:
            failed = await failure(a.api.Submit(api.SubmitRequest(tasks=[spec()])))
            assert (failed.code, failed.detail.reason) == (Code.INTERNAL, "bug")
            assert text in failed.text
            assert "secret" not in failed.text + str(failed.detail)
            assert "secret" in caplog.text
            assert "Traceback" in caplog.text

    run(scenario())


class GoneAfterOne(Broken):
    """A store that takes one transaction, and none after."""

    taken = 0

    async def commit(self, txn: Txn, *, timeout_s: float = 5.0) -> Result:
        self.taken += 1
        if self.taken > 1:
            raise self.error
        return await self.inner.commit(txn, timeout_s=timeout_s)


@pytest.mark.parametrize(("tasks", "code"), [(2 * NESTED_MAX, Code.ABORTED), (1, Code.UNAVAILABLE)])
def test_nothing_was_changed_is_said_only_when_it_is_true(etcd: Etcd, tmp_path: Path, tasks: int, code: Code) -> None:
    async def scenario() -> None:
        gone = StoreUnavailable("no etcd member answered")
        async with node(etcd, tmp_path, wrap=lambda inner: GoneAfterOne(inner, gone)) as a:
            if tasks == 1:
                await a.api.Submit(api.SubmitRequest(tasks=[spec()]))
            failed = await failure(a.api.Submit(api.SubmitRequest(tasks=[spec() for _ in range(tasks)])))
            assert failed.code == code
            assert len((await a.store.list(keys.QUEUED)).entries) == (1 if tasks == 1 else NESTED_MAX)

    run(scenario())


def test_nor_is_it_said_when_some_have_been_cancelled(etcd: Etcd, tmp_path: Path) -> None:
    async def scenario() -> None:
        gone = StoreUnavailable("no etcd member answered")
        async with node(etcd, tmp_path) as a:
            tasks = [spec() for _ in range(NESTED_MAX)]
            await a.api.Submit(api.SubmitRequest(tasks=tasks))
            async with node(etcd, tmp_path, "b", wrap=lambda inner: GoneAfterOne(inner, gone)) as b:
                failed = await failure(b.api.Cancel(api.CancelRequest(ids=[t.id for t in tasks])))
                assert failed.code == Code.ABORTED
            assert 0 < len((await a.store.list(keys.QUEUED)).entries) < NESTED_MAX

    run(scenario())


def test_a_client_that_gives_up_does_not_stop_others(etcd: Etcd, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with node(etcd, tmp_path) as a:
            specs = [[spec() for _ in range(50)] for _ in range(20)]
            calls = [a.api.Submit(api.SubmitRequest(tasks=s)) for s in specs]
            for call in calls[::2]:
                call.cancel()
            await asyncio.gather(*calls[1::2])
            for s in specs:  # whatever had become of the others, again finishes them
                await a.api.Submit(api.SubmitRequest(tasks=s))
            assert len((await a.store.list(keys.QUEUED)).entries) == 1000

    run(scenario())


@pytest.mark.parametrize("fate", [LOST_BEFORE, LOST_AFTER])
def test_a_word_on_a_dead_node_gets_through_lost_answers(etcd: Etcd, tmp_path: Path, fate: str) -> None:
    async def scenario() -> None:
        made: list[Lossy] = []
        async with node(etcd, tmp_path, wrap=lossy(made)) as a:
            life = Incarnation(IncarnationId("i"), Life.OPEN, "boot", 10.0, 1.0)
            await put(a.store, keys.incarnation(NodeId("b")), codec.encode_incarnation(life))
            made[0].commits, before = [fate], made[0].seen
            said = await a.api.ConfirmDead(api.ConfirmDeadRequest(node="b"))
            assert (said.incarnation, said.was_dead) == ("i", False)
            assert made[0].seen - before == (2 if fate == LOST_BEFORE else 1)

    run(scenario())


def test_a_word_whose_fate_is_not_known_is_told_as_such(etcd: Etcd, tmp_path: Path) -> None:
    async def scenario() -> None:
        made: list[Lossy] = []
        async with node(etcd, tmp_path, wrap=lossy(made)) as a:
            life = Incarnation(IncarnationId("i"), Life.OPEN, "boot", 10.0, 1.0)
            await put(a.store, keys.incarnation(NodeId("b")), codec.encode_incarnation(life))
            made[0].commits = [LOST_AFTER]
            made[0].reads = [FINE, REFUSED]
            failed = await failure(a.api.ConfirmDead(api.ConfirmDeadRequest(node="b")))
            assert failed.code is Code.ABORTED

    run(scenario())
