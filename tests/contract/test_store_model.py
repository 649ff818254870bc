"""The model of etcd and real etcd, step by step, on whatever hypothesis makes up."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
from collections.abc import Coroutine
from dataclasses import replace
from typing import Any, ClassVar, TypeVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from spinetta.errors import Compacted, InvariantViolation
from spinetta.model import LeaseId, Revision
from spinetta.store.etcd import EtcdStore
from spinetta.store.protocol import Change, Changes, KeyValue, Page, Snapshot
from spinetta.txn import (
    Absent,
    Committed,
    Conflict,
    CreatedAt,
    Delete,
    Guard,
    NoneUnder,
    Put,
    Result,
    RevisionIs,
    Txn,
    Write,
)
from tests.contract.etcds import Etcd
from tests.sim.etcd_model import EtcdModel

pytestmark = pytest.mark.contract
T = TypeVar("T")

LEASE_S = 600  # never runs out by itself here
NAMES = ("a", "b", "b/", "b/x", "b0", "c")
names = st.sampled_from(NAMES)
prefixes = st.sampled_from(("", "a", "b", "b/", "none"))
revisions = st.integers(0, 40)
leases = st.integers(0, 3)
guards = st.one_of(
    st.builds(Absent, names),
    st.builds(CreatedAt, names, revisions),
    st.builds(RevisionIs, names, revisions),
    st.builds(NoneUnder, prefixes),
)
writes = st.one_of(st.builds(Put, names, st.binary(max_size=3), leases), st.builds(Delete, names))
plain = st.builds(Txn, st.lists(guards, max_size=2).map(tuple), st.lists(writes, max_size=3).map(tuple))
txns = st.builds(
    Txn,
    st.lists(guards, max_size=1).map(tuple),
    st.lists(writes, max_size=2).map(tuple),
    st.lists(plain, max_size=3).map(tuple),
)
_runs = itertools.count(1)


class Compare(RuleBasedStateMachine):
    """Every step on both, every answer the same.

    The real etcd is shared and has a past: its revisions are compared after taking that off, and its leases by the
    order of their granting.
    """

    endpoint: ClassVar[str]
    loop: ClassVar[asyncio.AbstractEventLoop]
    store: ClassVar[EtcdStore]

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        async def limited() -> T:
            async with asyncio.timeout(10):
                return await work

        return self.loop.run_until_complete(limited())

    @initialize()
    def begin(self) -> None:
        self.model = EtcdModel()
        self.prefix = f"/machine/{os.getpid()}-{next(_runs)}/"
        self.past = self.run(self.store.read([])).revision - self.model.revision
        self.granted: list[LeaseId] = []
        self.grant()
        self.grant()

    # --- between the two ---

    def key(self, name: str) -> str:
        return self.prefix + name

    def real_guard(self, guard: Guard) -> Guard:
        match guard:
            case Absent(name):
                return Absent(self.key(name))
            case CreatedAt(name, revision):
                return CreatedAt(self.key(name), Revision(revision + self.past if revision else 0))
            case RevisionIs(name, revision):
                return RevisionIs(self.key(name), Revision(revision + self.past if revision else 0))
            case NoneUnder(prefix):
                return NoneUnder(self.key(prefix))

    def real_write(self, write: Write) -> Write:
        if isinstance(write, Delete):
            return Delete(self.key(write.key))
        lease = self.granted[write.lease - 1] if 0 < write.lease <= len(self.granted) else LeaseId(write.lease)
        return Put(self.key(write.key), write.value, lease)

    def real_txn(self, txn: Txn) -> Txn:
        return Txn(
            tuple(map(self.real_guard, txn.when)),
            tuple(map(self.real_write, txn.then)),
            tuple(map(self.real_txn, txn.nested)),
        )

    def seen_revision(self, revision: int) -> Revision:
        return Revision(revision - self.past)

    def seen(self, entry: KeyValue | None) -> KeyValue | None:
        return None if entry is None else self.seen_entry(entry)

    def seen_entry(self, entry: KeyValue) -> KeyValue:
        return KeyValue(
            entry.key.removeprefix(self.prefix),
            entry.value,
            self.seen_revision(entry.created),
            self.seen_revision(entry.modified),
            LeaseId(self.granted.index(entry.lease) + 1 if entry.lease else 0),
        )

    def seen_result(self, result: Result) -> Result:
        return replace(result, revision=self.seen_revision(result.revision))

    def seen_page(self, page: Page) -> Page:
        entries = tuple(self.seen_entry(entry) for entry in page.entries)
        return Page(self.seen_revision(page.revision), entries, page.more, page.total)

    # --- steps ---

    @rule(txn=txns)
    def commit(self, txn: Txn) -> None:
        try:
            expected: Result | None = self.model.commit(txn)
        except InvariantViolation:
            expected = None
        try:
            found: Result | None = self.seen_result(self.run(self.store.commit(self.real_txn(txn))))
        except InvariantViolation:
            found = None
        assert found == expected
        assert isinstance(found, Committed | Conflict | None)

    @rule(name=names)
    def guard_exactly(self, name: str) -> None:
        """Guards that hold, which chance rarely finds."""
        entry = self.model.get(name)
        if entry is not None:
            self.commit(Txn((RevisionIs(name, entry.modified), CreatedAt(name, entry.created)), (Put(name),)))

    @rule(name=names, lease=st.integers(0, 2))
    def put(self, name: str, lease: int) -> None:
        """Plain puts: attaching to leases and detaching from them."""
        self.commit(Txn(then=(Put(name, b"", LeaseId(lease)),)))

    @rule()
    def grant(self) -> None:
        if len(self.granted) < 3:
            self.granted.append(self.run(self.store.grant_lease(LEASE_S)))
            assert self.model.grant_lease(LEASE_S) == len(self.granted)

    @rule(lease=st.integers(1, 3))
    def revoke(self, lease: int) -> None:
        if lease <= len(self.granted):
            self.run(self.store.revoke_lease(self.granted[lease - 1]))
            self.model.revoke_lease(LeaseId(lease))
            assert self.seen_revision(self.run(self.store.read([])).revision) == self.model.revision

    @rule(lease=st.integers(1, 3))
    def keep_alive(self, lease: int) -> None:
        if lease <= len(self.granted):
            found = self.run(self.store.keep_alive(self.granted[lease - 1]))
            assert found == self.model.keep_alive(LeaseId(lease))

    @rule(wanted=st.lists(names, max_size=3))
    def read(self, wanted: list[str]) -> None:
        snapshot = self.run(self.store.read([self.key(name) for name in wanted]))
        entries = {key.removeprefix(self.prefix): self.seen(entry) for key, entry in snapshot.entries.items()}
        assert Snapshot(self.seen_revision(snapshot.revision), entries) == self.model.read(wanted)

    @rule(
        prefix=prefixes,
        after=st.sampled_from(("", *NAMES, "zzz")),
        limit=st.integers(0, 4),
        keys_only=st.booleans(),
        newest_first=st.booleans(),
        back=st.integers(0, 8),
    )
    def list(self, prefix: str, after: str, limit: int, keys_only: bool, newest_first: bool, back: int) -> None:
        revision = Revision(self.model.revision - back if 0 < back < self.model.revision else 0)
        try:
            expected: Page | None = self.model.list(
                prefix, after=after, limit=limit, keys_only=keys_only, newest_first=newest_first, revision=revision
            )
        except Compacted:
            expected = None
        try:
            found: Page | None = self.seen_page(
                self.run(
                    self.store.list(
                        self.key(prefix),
                        after=self.key(after) if after else "",
                        limit=limit,
                        keys_only=keys_only,
                        newest_first=newest_first,
                        revision=Revision(revision + self.past if revision else 0),
                    )
                )
            )
        except Compacted:
            found = None
        assert found == expected

    @rule(back=st.integers(0, 10))
    def compact(self, back: int) -> None:
        revision = Revision(self.model.revision - back)
        if revision > max(self.model.compacted, 1):
            self.run(self.store.compact(Revision(revision + self.past)))
            self.model.compact(revision)

    @rule(prefix=prefixes, back=st.integers(0, 12))
    def watch(self, prefix: str, back: int) -> None:
        start = Revision(max(2, self.model.revision - back))
        try:
            expected: tuple[Change, ...] | None = tuple(
                event for changes in self.model.events_since(start, prefix) for event in changes.events
            )
        except Compacted:
            expected = None
        try:
            found: tuple[Change, ...] | None = self.run(self.watched(prefix, start, len(expected or ())))
        except Compacted:
            found = None
        assert found == expected

    async def watched(self, prefix: str, start: Revision, count: int) -> tuple[Change, ...]:
        found: list[Change] = []
        async with contextlib.aclosing(
            self.store.watch(self.key(prefix), start=Revision(start + self.past))
        ) as changes:
            assert await anext(changes) == Changes(Revision(start + self.past - 1), ())
            while len(found) < count:
                item = await anext(changes)
                assert item.revision == item.events[-1].revision
                found += item.events
        return tuple(
            Change(event.key.removeprefix(self.prefix), self.seen(event.value), self.seen_revision(event.revision))
            for event in found
        )


def test_the_model_is_like_etcd(etcd_server: Etcd) -> None:
    with contextlib.closing(asyncio.new_event_loop()) as loop:
        asyncio.set_event_loop(loop)
        Compare.loop = loop
        Compare.store = EtcdStore([etcd_server.client])
        try:
            run_state_machine_as_test(
                Compare,
                settings=settings(
                    max_examples=int(os.environ.get("SPINETTA_MODEL_EXAMPLES", "60")),
                    stateful_step_count=40,
                    deadline=None,
                    suppress_health_check=list(HealthCheck),
                ),
            )
        finally:
            loop.run_until_complete(Compare.store.close())
            asyncio.set_event_loop(None)
