"""Networks of containers behind the machine's address: made by CNI plugins, kept from each other by rules of our own.

A container gets a cable of its own to the machine (the plugin `ptp`) and an address out of the node's subnet; what
passes is said by one table of nftables, which does not change while containers come and go. All that is made for an
attempt is written down before, and taken down by `release`, or by the next daemon if this one cannot.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager

from spinetta import cni
from spinetta.errors import UserError
from spinetta.runtime import netrecord
from spinetta.runtime.netattempts import Attempts, Joined, NoNetwork
from spinetta.runtime.netcommands import CommandFailed, Commands
from spinetta.runtime.netgates import Gates, NetworkSettings, read_subnet
from spinetta.runtime.netplace import Place

log = logging.getLogger("spinetta.runtime")

BEGIN_S = 10.0  # a daemon that starts renews nothing meanwhile; it takes a second
CLEARED_S = 4.0  # of these, for what others left
CLOSE_S = 30.0  # for what is being taken down; what is not is left to the next start
GUARD_EVERY_S = 5.0  # for so long at most containers are without the rules if somebody flushes all


class Network:
    """See the module. Made by `open`.

    Attributes:
        trouble: why there is no network for new containers; empty: there is one.
        warnings: what is weaker than it should be.
    """

    def __init__(self, place: Place, settings: NetworkSettings, commands: Commands, *, wanted: bool) -> None:
        self._place = place
        self._settings = settings
        self._commands = commands
        self._wanted = wanted
        self._gates: Gates | None = None
        self._attempts = Attempts(place, commands, settings.hostname)
        self._guard: asyncio.Task[None] | None = None
        self.trouble = "" if wanted else "this node does not allow it"
        self.warnings: tuple[str, ...] = ()

    @classmethod
    @asynccontextmanager
    async def open(
        cls,
        place: Place,
        settings: NetworkSettings,
        *,
        keep: Collection[str] | None,
        wanted: bool = True,
        prefix: Sequence[str] = (),
    ) -> AsyncIterator[Network]:
        """The network of a node whose `place` has been made; its `trouble` says whether there is one.

        Leaving the block leaves containers their networks; when there are none, nothing is left but the folder.

        Args:
            place: where it is kept.
            settings: what an administrator says.
            keep: attempts of an earlier daemon that still run; what others had is removed. None: not known, so all of
                it stays.
            wanted: new containers are to have networks; else those of before are only kept.
            prefix: put before each command, to be in another network namespace.
        """
        self = cls(place, settings, Commands(place.commands, prefix), wanted=wanted)
        try:
            try:
                async with asyncio.timeout(BEGIN_S):
                    await self._begin(keep)
            except TimeoutError:
                slow = f" ({self._commands.cut} did not end)" if self._commands.cut else ""
                self.trouble = f"a network for a trial was not made and taken down within {BEGIN_S:g} s{slow}"
            except UserError as e:
                self.trouble = f"{e.message} ({e.hint})" if e.hint else e.message
            except (CommandFailed, cni.PluginError, NoNetwork, OSError) as e:
                self.trouble = str(e)
            if self.trouble:
                await self._give_up()
            yield self
        finally:
            await self._close()

    # --- for attempts ---

    def joining(self, key: str) -> AbstractAsyncContextManager[Joined]:
        """Make the network of an attempt, which it has until `release`. An error within the block releases it.

        Raises:
            NoNetwork: it cannot be made, or no address became free in time.
        """
        if self.trouble:
            raise NoNetwork(f"no network for containers: {self.trouble}")
        assert self._gates is not None  # noqa: S101 - else there is trouble
        return self._attempts.joining(key, self._gates)

    def release(self, key: str) -> None:
        """The attempt has ended, or will not start: take its network down, by and by. May be repeated."""
        self._attempts.release(key)

    def keep_only(self, keys: Collection[str]) -> None:
        """These attempts, and no others, still have networks."""
        self._attempts.keep_only(keys)

    # --- the whole ---

    async def _begin(self, keep: Collection[str] | None) -> None:
        place = self._place
        await self._commands.settled()
        self._attempts.adopt(await asyncio.to_thread(place.names))
        if keep is not None:
            self._attempts.keep_only(keep)
        with contextlib.suppress(TimeoutError):  # it goes on meanwhile
            async with asyncio.timeout(CLEARED_S):
                await self._attempts.all_done()
        if not self._wanted and not self._attempts and read_subnet(place) is None:
            return
        self._gates = Gates(place, self._settings, self._commands)
        if not self._wanted and not self._attempts:
            return  # what an earlier daemon left is removed when we leave
        if not self._attempts:  # else these are seen to whatever becomes of new ones
            await self._attempts.talk()
        cables = [await asyncio.to_thread(netrecord.cable, place.of(key)) for key in self._attempts.known()]
        subnet = await self._gates.open(keep=bool(self._attempts), cables=cables)
        self._guard = asyncio.create_task(self._watch_over(self._gates), name="rules of networks")
        if self._wanted:
            await self._attempts.talk()
            await self._attempts.have_trial(self._gates, subnet)
            self.warnings = await self._gates.warnings()

    async def _watch_over(self, gates: Gates) -> None:
        while True:
            await asyncio.sleep(GUARD_EVERY_S)
            try:
                if self._attempts:
                    await gates.mend()
            except (CommandFailed, UserError, OSError) as e:  # it may be had again the next time
                log.error("the rules of containers' networks cannot be looked after: %s", e)

    async def _give_up(self) -> None:
        """There is trouble: take down what was tried, without what failed. What is of earlier daemons goes on."""
        try:
            async with asyncio.timeout(CLEARED_S):
                await self._attempts.end_trial()
                await self._attempts.all_done()
                if not self._attempts:
                    await self._shut()
        except (TimeoutError, CommandFailed, UserError, OSError) as e:
            log.warning("networks of containers are not quite removed, it is tried again later: %s", e)

    async def _close(self) -> None:
        """Wait for what is being taken down; with the last container the rules go."""
        try:
            async with asyncio.timeout(CLOSE_S):
                await self._attempts.all_done()
                await self._attempts.end_trial()
                if not self._attempts:
                    await self._shut()
        except (TimeoutError, CommandFailed, UserError, OSError) as e:
            log.warning("networks of containers are not quite removed, the next start tries again: %s", e)
        finally:
            await self._end_guard()
            self._attempts.cancel()
            await self._attempts.all_done()

    async def _shut(self) -> None:
        await self._end_guard()  # else it would put the rules back
        if self._gates is not None:
            await self._gates.shut()
            self._gates = None

    async def _end_guard(self) -> None:
        if self._guard is not None:
            self._guard.cancel()
            await asyncio.wait([self._guard])
