"""Voters that stay away, with real etcds: replaced by a spare, at each stage of which something else happens."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from spinetta.errors import StoreUnavailable
from spinetta.node import keeper as keepers
from spinetta.store.etcd import EtcdStore
from spinetta.store.members import Members, statuses
from spinetta.store.wal import wal_owner
from spinetta.txn import Committed, Put, Txn
from tests.contract.api_world import eventually
from tests.contract.etcds import Program, find_program
from tests.contract.seats_world import World, insist, world

pytestmark = pytest.mark.contract

SOON_S = 1.0
LONG_S = 3600.0
WITHIN_S = 60.0


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looks often."""
    monkeypatch.setattr(keepers, "LOOK_EVERY_S", 0.05)
    monkeypatch.setattr(keepers, "WAIT_EVERY_S", 0.2)


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(150):
            await scenario()

    asyncio.run(limited())


async def voters_are(found: World, names: str) -> None:
    async def so() -> bool:
        return await found.members() == dict.fromkeys(names, True)

    await eventually(so, within_s=WITHIN_S)


async def write(found: World, *written: str) -> None:
    store = EtcdStore(found.endpoints)
    txn = Txn(then=tuple(Put(key) for key in written))
    assert isinstance(await insist(lambda: store.commit(txn)), Committed)
    await store.close()


async def held_by(found: World, name: str) -> set[str]:
    """The keys that one node's etcd has."""
    store = EtcdStore([found[name].client_url])
    page = await insist(lambda: store.list("/k/", keys_only=True))
    await store.close()
    return {entry.key for entry in page.entries}


def freeze(found: World, name: str) -> None:
    process = found[name].etcd
    process.send_signal(signal.SIGSTOP)


def test_a_dead_voter_is_replaced_and_is_a_spare_when_it_returns(program: Program, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path, "abcd", program) as found:
            await write(found, "/k/before")
            await found["c"].die()
            found.lead("a", replace_after_s=SOON_S)
            await voters_are(found, "abd")
            await write(found, "/k/after")
            assert await held_by(found, "d") == {"/k/before", "/k/after"}

            await found["c"].start(found.endpoints)
            assert found["c"].seat.member_id == 0
            assert not found["c"].memory.identity.has_joined
            assert wal_owner(found["c"].folder / "etcd") is None
            assert wal_owner(found["c"].folder / "etcd.removed") is not None

            await found["b"].die()  # and it is as good a spare as another
            await voters_are(found, "acd")
            assert await held_by(found, "c") == {"/k/before", "/k/after"}

    run(scenario)


def test_a_frozen_member_is_ill_and_replaced(tmp_path: Path) -> None:
    """Of the newer etcd: it would take the next one before it removes this one, and that one would not start."""

    async def scenario() -> None:
        async with world(tmp_path, "abcd", find_program("newer")) as found:
            freeze(found, "c")

            async def told() -> bool:
                with contextlib.suppress(StoreUnavailable):  # it may have been etcd's leader
                    return [m.name for m in (await found["a"].seat.membership()).members if not m.healthy] == ["c"]
                return False

            await eventually(told, within_s=WITHIN_S)
            found.lead("a", replace_after_s=SOON_S)
            await voters_are(found, "abd")
            # Its daemon finds out, and ends what is frozen.
            await eventually((found["c"].folder / "etcd.removed").exists, within_s=WITHIN_S)
            assert found["c"].seat.member_id == 0
            assert found["c"].services.running["etcd"].exit is not None

    run(scenario)


def test_a_member_whose_disk_is_stuck_is_ill(tmp_path: Path) -> None:
    """It still tells its status, from memory; what it does not do is to go forward."""

    async def scenario() -> None:
        async with world(tmp_path, "abc", find_program("installed")) as found:
            listed = (await found["a"].seat.members.members()).members
            one = {m.name: m for m in listed}["c"]
            how = (await statuses([one]))[one.member_id]
            assert how is not None
            assert how.healthy
            for name in "ab":
                freeze(found, name)
            how = (await statuses([one], timeout_s=0.5))[one.member_id]  # before it has noticed that it is alone
            assert how is None or not how.healthy

    run(scenario)


@pytest.mark.parametrize(
    ("stage", "leader_dies"),
    [("removed", False), ("added", False), ("promoted", False), ("added", True), ("promoted", True)],
)
def test_at_each_stage_the_leader_changes_and_the_lost_one_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, leader_dies: bool
) -> None:
    """The leader's daemon ends, or its machine dies with a voter. While there are two voters that stops the cluster,
    which goes on where it was once the machine is back; with three it is one more to be replaced."""
    method = {"removed": "remove", "added": "add_learner", "promoted": "promote"}[stage]
    done = getattr(Members, method)

    async def scenario() -> None:
        reached = asyncio.Event()

        async def staged(self: Members, *args: Any, **named: Any) -> Any:
            answer = await done(self, *args, **named)
            if not reached.is_set():
                reached.set()
                await asyncio.sleep(WITHIN_S)  # this leader is ended before
            return answer

        monkeypatch.setattr(Members, method, staged)
        async with world(tmp_path, "abcd", find_program("installed")) as found:
            await write(found, "/k/before")
            await found["c"].die()
            found.lead("a", replace_after_s=SOON_S)
            async with asyncio.timeout(WITHIN_S):
                await reached.wait()
            await found.unlead()
            if leader_dies:
                await found["a"].die()
                if stage == "added":
                    await found["a"].start([found["b"].client_url])
            await found["c"].start(found.endpoints)
            assert found["c"].seat.member_id == 0, "it has heard that it is no member any more"
            found.lead("b", replace_after_s=SOON_S)
            stay = {"a", "b"} if found["a"].here else {"b", "c", "d"}

            async def three_vote() -> bool:
                now = await found.members()
                return len(now) == 3 and all(now.values()) and stay <= now.keys()

            await eventually(three_vote, within_s=WITHIN_S)
            now = await found.members()
            for name in now:
                assert await held_by(found, name) == {"/k/before"}

    run(scenario)


def test_it_returns_in_time_and_keeps_its_seat(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path, "abcd", find_program("installed")) as found:
            ids = {n: found[n].seat.member_id for n in "abc"}
            await found["c"].die()
            found.lead("a", replace_after_s=LONG_S, office=False)
            await found["c"].start(found.endpoints)
            await voters_are(found, "abc")
            assert {n: found[n].seat.member_id for n in "abc"} == ids
            assert not (found["c"].folder / "etcd.removed").exists()

            # Who is not the leader any more changes nothing, whatever it sees.
            await found.unlead()
            await found["c"].die()
            found.lead("a", replace_after_s=SOON_S, office=False)
            await eventually(lambda: found.asked >= 3, within_s=WITHIN_S)
            await voters_are(found, "abc")
            await found.unlead()

            # An administrator's word, however long it would have to wait.
            found.lead("b", replace_after_s=LONG_S)
            found.vouched.add("c")
            await voters_are(found, "abd")

    run(scenario)


def test_a_voter_whose_daemon_is_gone_votes_until_another_does(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path, "abcd", find_program("installed")) as found:
            await found["c"].end_daemon()
            sizes = set()
            found.lead("a", replace_after_s=SOON_S)

            async def replaced() -> bool:
                now = await found.members()
                sizes.add(sum(now.values()))
                return now == dict.fromkeys("abd", True)

            await eventually(replaced, within_s=WITHIN_S)
            assert min(sizes) == 3
            await eventually(lambda: not psutil.pid_exists(found["c"].etcd.pid) or found["c"].etcd.poll() is not None,
                             within_s=WITHIN_S)  # fmt: skip

    run(scenario)


def test_a_machine_that_was_made_anew_gets_its_seat_again(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path, "abc", find_program("installed")) as found:
            await write(found, "/k/before")
            old = found["c"].seat.member_id
            await found["c"].die()
            shutil.rmtree(found["c"].folder)
            found["c"].folder.mkdir()
            await found["c"].start(found.endpoints)
            assert found["c"].seat.member_id == 0
            found.lead("a", replace_after_s=SOON_S)
            await eventually(lambda: found["c"].seat.member_id not in (0, old), within_s=WITHIN_S)
            await voters_are(found, "abc")
            assert await held_by(found, "c") == {"/k/before"}

    run(scenario)


def test_a_spare_that_cannot_is_tried_again_and_then_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(keepers, "LEARNER_STALE_S", 0.5)
    monkeypatch.setattr(keepers, "REST_S", 0.5)
    caplog.set_level("INFO", "spinetta.node")

    async def scenario() -> None:
        async with world(tmp_path, "abcde", find_program("installed")) as found:
            found["d"].takes_seats = False
            await found["c"].die()
            found["e"].here = False
            found.lead("a", replace_after_s=SOON_S)
            await eventually(lambda: caplog.text.count("voters: d becomes a learner") >= 2, within_s=WITHIN_S)
            found["e"].here = True
            await voters_are(found, "abe")
            assert caplog.text.count("voters: c is to be removed: it stays away; d takes its seat") == 1
            assert caplog.text.count("voters: c is removed: it stays away") == 1

    run(scenario)
