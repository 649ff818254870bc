"""A daemon's end, once it has been told to stop: what becomes of the tasks it holds, of etcd and of the shim."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from spinetta.agent import Agent
from spinetta.events import LeaveWanted, PauseWanted, SetDraining
from spinetta.node.driver import Driver
from spinetta.node.entry import Memory
from spinetta.node.seats import OwnSeat
from spinetta.node.signals import StopSignals, Wish
from spinetta.runtime.shims import Shims

log = logging.getLogger("spinetta.node")

STOP_S = 20.0  # for tasks to end when they are given back: TERM, ten seconds, KILL
DEREGISTER_S = 5.0  # for giving them back and deregistering then; past it, without a quorum, the others find out
PAUSE_MAX_S = (
    120.0  # that a daemon may be away, if its tasks' grace allows: a machine that is gone is noticed only then
)
PAUSE_WITHIN_S = 2.0  # without an answer the next daemon has a lease's time, as after a crash
TELL_EVERY_S = 30.0  # how many tasks are waited for


class Ending:
    """What is done between the wish to stop and the end. Each step has a limit, and it may be cut anywhere."""

    def __init__(
        self,
        driver: Driver,
        seat: OwnSeat,
        runtime: Shims,
        memory: Memory,
        stop: StopSignals,
        drain_timeout_s: float,
    ) -> None:
        self._driver = driver
        self._seat = seat
        self._runtime = runtime
        self._memory = memory
        self._stop = stop
        self._drain_timeout_s = drain_timeout_s

    async def finish(self, wish: Wish) -> None:
        """End as wished."""
        driver, agent = self._driver, self._driver.agent
        if wish is Wish.DRAIN and not agent.left:
            wish = await self._drain()
        driver.hush()
        if agent.left:
            await self._end_shim()
            self._memory.forget()
            return
        held = len(agent.holdings.held)
        tasks = f"{held} task{'s' if held != 1 else ''}"
        if agent.leaving_soon:
            log.warning("the node had not left yet: it is of the cluster again as soon as it is started")
        if wish is not Wish.EVERYTHING:
            await self._pause(held)
            log.info("stopping; %s stay%s with the shim", tasks, "s" if held == 1 else "")
            return
        log.info("stopping; %s to be given back", tasks)
        await driver.tell(LeaveWanted(release=True))
        await driver.until(lambda a: a.left or a.holdings.nothing_runs, STOP_S)
        if not await driver.until(lambda a: a.left, DEREGISTER_S):
            log.warning("not deregistered within %g s; the others will find out", DEREGISTER_S)
        await self._end_shim()

    async def _pause(self, held: int) -> None:
        """Have the others wait for the next daemon as long as tasks may go on without one."""
        settings = self._driver.agent.settings
        for_s = int(min(settings.grace_s, PAUSE_MAX_S))
        if not held or for_s <= settings.lease_ttl_s or not self._driver.agent.session.active:
            return
        await self._driver.tell(PauseWanted(for_s))
        if await self._driver.until(lambda a: a.session.paused, PAUSE_WITHIN_S):
            log.info("the others wait %d s for this node's next daemon before they give its tasks to others", for_s)

    async def _end_shim(self) -> None:
        await self._seat.stop()
        await self._runtime.shutdown_shim()
        self._memory.note_shims(later=self._runtime.are_scattered())

    async def _drain(self) -> Wish:
        """Wait for the tasks, then give back what may be started again; what is to be done with the rest.

        A machine that goes down kills what stays with the shim: work is lost, and the tasks wait until the others are
        sure of that. But a task that must not be started twice is better left alone, in case only the daemon ends.
        """
        await self._driver.tell(SetDraining(draining=True))
        wish = await self._empty(self._drain_timeout_s)
        if wish is None:
            log.info("%g s are over; what may be started again is given back", self._drain_timeout_s)
            await self._driver.tell(SetDraining(draining=True, release=True, spare=True))
            wish = await self._empty(STOP_S, _only_unrestartable)
        if wish is Wish.EVERYTHING:  # asked for meanwhile
            return wish
        return Wish.EVERYTHING if _nothing_held(self._driver.agent) else Wish.KEEP

    async def _empty(self, limit_s: float, enough: Callable[[Agent], bool] | None = None) -> Wish | None:
        """DRAIN once nothing is held; a greater wish that came meanwhile; None when the time was over first."""
        end_s = time.monotonic() + limit_s
        greater = asyncio.create_task(self._stop.told())
        told_s = -TELL_EVERY_S
        try:
            while True:
                if await self._driver.until(enough or _nothing_held, min(1.0, max(end_s - time.monotonic(), 0.0))):
                    return Wish.DRAIN
                if greater.done():
                    return greater.result()
                left_s = end_s - time.monotonic()
                if left_s <= 0:
                    return None
                if time.monotonic() - told_s >= TELL_EVERY_S:
                    told_s = time.monotonic()
                    held = len(self._driver.agent.holdings.held)
                    log.info("draining; %d tasks still run, and are waited for %.0f s more", held, left_s)
        finally:
            greater.cancel()


def _nothing_held(agent: Agent) -> bool:
    return agent.holdings.empty and agent.claims.round is None


def _only_unrestartable(agent: Agent) -> bool:
    return agent.claims.round is None and not any(h.may_start_again for h in agent.holdings.held.values())
