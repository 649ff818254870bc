"""A node's departure for good: drain, give up the seat, deregister."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable

from spinetta.events import LeaveWanted, SetCandidate, SetDraining
from spinetta.node.driver import Driver
from spinetta.node.port import LeaveStep
from spinetta.node.seats import OwnSeat
from spinetta.node.trouble import TROUBLE

log = logging.getLogger("spinetta.node")

STOP_S = 20.0  # for tasks to end when they are given back: TERM, ten seconds, KILL
STEP_S = 0.5


class Leaving:
    """Leaves once it is wanted; goes on when nobody listens."""

    def __init__(self, driver: Driver, seat: OwnSeat, *, left: Callable[[], None]) -> None:
        self._driver = driver
        self._seat = seat
        self._left = left
        self._step: LeaveStep | None = None
        self._wanted = asyncio.Event()
        self._deadline_s = 0.0

    @property
    def wanted(self) -> bool:
        """True once it has begun."""
        return self._wanted.is_set()

    async def leave(self, limit_s: float) -> AsyncIterator[LeaveStep]:
        """Begin, unless it has begun, and tell of each step.

        Args:
            limit_s: how long to wait for running tasks before they are given back.

        Raises:
            UserError: the cluster's data would be nowhere.
        """
        peers = self._driver.agent.peers
        if self._seat.member_id:
            await self._seat.check_may_leave(successor=any(p.candidate and not p.leaving for p in peers))
        if not self.wanted:
            self._deadline_s = time.monotonic() + limit_s
            self._wanted.set()
        last: LeaveStep | None = None
        while last is None or not last.done:
            step = self._step
            if step is not None and step != last:
                last = step
                yield step
            else:
                await asyncio.sleep(STEP_S / 5)

    async def run(self) -> None:
        """Wait for the wish, then leave."""
        await self._wanted.wait()
        driver, holdings = self._driver, self._driver.agent.holdings
        await driver.tell(SetDraining(draining=True, leaving=True))
        while holdings.held and time.monotonic() < self._deadline_s:
            self._step = LeaveStep("waiting for running tasks", len(holdings.held))
            await driver.until(lambda a: not a.holdings.held, 1.0)
        if holdings.held:
            self._step = LeaveStep("giving running tasks back to the queue", len(holdings.held))
            await driver.tell(SetDraining(draining=True, leaving=True, release=True))
            await driver.until(lambda a: not a.holdings.held, STOP_S)
        await self._give_up_seat()
        self._step = LeaveStep("deregistering")
        await driver.tell(LeaveWanted(release=True))
        while not await driver.until(lambda a: a.left, STOP_S):
            log.warning("not deregistered yet: the store does not answer, or something is still held")
        self._step = LeaveStep("left", done=True)
        await asyncio.sleep(STEP_S)  # those who listen read the last step before the server ends
        self._left()

    async def _give_up_seat(self) -> None:
        """Wait as long as it takes, and say for what: without a quorum there is no leaving in order."""
        looked = False
        while self._seat.member_id:
            self._step = LeaveStep("giving up the voter's seat")
            with contextlib.suppress(*TROUBLE):
                if not looked and await self._seat.others_vote():
                    # While this node is the leader it would have to remove itself; another voter does it better.
                    await self._driver.tell(SetCandidate(False))
                looked = True
            await asyncio.sleep(STEP_S)
