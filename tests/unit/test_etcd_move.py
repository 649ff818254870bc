"""Etcd's move to the new shim: one voter at a time, and only while all are well."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace

import pytest

from spinetta import keys
from spinetta.model import Member, Membership, NodeId
from spinetta.node.etcdmove import EtcdMove
from tests.sim.model_store import ModelStore

WELL = tuple(
    Member(f"n{n}", n, f"http://127.0.0.{n}:1", f"http://127.0.0.{n}:2", learner=False, healthy=True) for n in (1, 2, 3)
)


@dataclass
class Seat:
    """A voter's: its restarts take as long as the test wants."""

    members: tuple[Member, ...] = WELL
    member_id: int = 1
    may_end: asyncio.Event = field(default_factory=asyncio.Event)
    begun: asyncio.Event = field(default_factory=asyncio.Event)
    restarts: int = 0

    async def membership(self) -> Membership:
        return Membership("abc", 1, self.members)

    async def restart(self) -> None:
        self.begun.set()
        await self.may_end.wait()
        self.restarts += 1


class Always:
    """Shims of which one goes on for etcd alone."""

    def strands(self, name: str) -> bool:
        return name == "etcd"


async def held(store: ModelStore) -> bool:
    """Whether somebody may restart now."""
    return (await store.read([keys.ETCD_RESTART])).entries[keys.ETCD_RESTART] is not None


def test_one_voter_at_a_time() -> None:
    async def scenario() -> None:
        store = ModelStore()
        first, second = Seat(), Seat()
        moves = [EtcdMove(Always(), seat, store, NodeId(name)) for seat, name in ((first, "n1"), (second, "n2"))]
        moving = asyncio.create_task(moves[0].step())
        await first.begun.wait()
        assert await moves[1].step() == "another voter restarts its etcd"
        assert not second.begun.is_set()
        first.may_end.set()
        assert await moving == ""
        second.may_end.set()
        assert await moves[1].step() == ""
        assert (first.restarts, second.restarts) == (1, 1)
        assert not await held(store)

    asyncio.run(scenario())


def test_a_daemon_that_ends_in_the_midst_holds_nobody_up() -> None:
    async def scenario() -> None:
        store = ModelStore()
        first, second = Seat(), Seat()
        moving = asyncio.create_task(EtcdMove(Always(), first, store, NodeId("n1")).step())
        await first.begun.wait()
        moving.cancel()
        await asyncio.gather(moving, return_exceptions=True)
        second.may_end.set()
        assert await EtcdMove(Always(), second, store, NodeId("n2")).step() == ""

    asyncio.run(scenario())


@pytest.mark.parametrize("member", [replace(WELL[2], healthy=False), replace(WELL[2], learner=True)])
def test_not_while_one_is_unwell(member: Member) -> None:
    async def scenario() -> None:
        store = ModelStore()
        seat = Seat((*WELL[:2], member))
        assert "n3" in await EtcdMove(Always(), seat, store, NodeId("n1")).step()
        assert not seat.begun.is_set()
        assert not await held(store)

    asyncio.run(scenario())
