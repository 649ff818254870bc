"""All shims of a node: one of the installed code, which takes what is new, and those before it, until they are empty.

Why so: docs/adr/0039-upgrading-the-shim.md.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal as signals
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar

from spinetta.errors import RuntimeUnavailable, SpinettaError
from spinetta.model import Exit, Reason, ShimInfo, Usage
from spinetta.runtime import generations
from spinetta.runtime.client import Sample
from spinetta.runtime.feed import Hub
from spinetta.runtime.launch import IDLE_END_S
from spinetta.runtime.process import LOST, ProcessRuntime, Service
from spinetta.runtime.protocol import AttemptKey, Exited, Held, Launch, ShimLost
from spinetta.runtime.succession import Member, Opening, Succession, end

log = logging.getLogger("spinetta.runtime")

LOOK_EVERY_S = 5.0  # whether one that retires is empty, unless an end is forgotten before
LISTEN_EVERY_S = 0.5  # whether one that did not answer has: a look at memory
T = TypeVar("T")


class Shims:
    """Runs attempts as `ProcessRuntime` does with one shim; implements `protocol.Runtime`. See `connect`.

    Which shim takes what is new is decided once, when the daemon starts.
    """

    def __init__(self, home: Path, shims: Succession, hub: Hub[Exited | ShimLost]) -> None:
        self._home = home
        self._newest = shims.newest
        self._retiring = shims.retiring
        self._outdated = shims.outdated
        self._hub = hub
        self._gone: dict[AttemptKey, tuple[str, int]] = {}  # what shims that have ended had held
        self._look = asyncio.Event()
        self._sweepings = asyncio.Event()
        self._sweepings.set()  # an earlier daemon may have left some
        self._tending = asyncio.create_task(self._tend())
        self._sweeping = asyncio.create_task(self._sweep())

    @classmethod
    @asynccontextmanager
    async def connect(
        cls,
        home: Path,
        *,
        node: str,
        kill_margin_s: float,
        isolate: bool = True,
        idle_end_s: float = IDLE_END_S,
    ) -> AsyncIterator[Shims]:
        """Attach to all shims of `home`, starting one of the installed code when there is none.

        Those of other code go on with what they hold; one that holds nothing ends. Directories of shims that have died
        are cleared up, and the ends of what they held are told. One that does not answer in time keeps nobody from
        the others: what its records say is taken for running until it answers, and what is asked about that raises
        RuntimeUnavailable. Leaving the block leaves all running. The arguments and errors are those of
        `ProcessRuntime.connect`.
        """
        hub: Hub[Exited | ShimLost] = Hub()
        opening = Opening(home, node, kill_margin_s, isolate, idle_end_s, hub)
        opened: list[Member] = []
        try:
            shims = cls(opening.home, await opening.open(opened), hub)
            for member in shims._retiring:
                if not member.silent:
                    log.info("%s", member.told())
            try:
                yield shims
            finally:
                await shims._stop_working()
        finally:
            for member in opened:
                await member.opened.aclose()
            hub.close()

    # protocol.Runtime --------------------------------------------------------------------------------------------

    def capabilities(self) -> tuple[str, ...]:
        """Names of what is enforced for what is new."""
        return self._newest.runtime.capabilities()

    async def prepare(self, launch: Launch) -> Launch | Exit:
        """See `ProcessRuntime.prepare`."""
        return await self._newest.runtime.prepare(launch)

    async def start(self, launch: Launch) -> Exit | None:
        """Start an attempt, in the newest shim unless another has it; see `protocol.Runtime.start`."""
        identity = (launch.incarnation, launch.token)
        for member in self._retiring:
            if launch.key in member.held or member.past.get(launch.key) == identity:
                return await _asked(member).start(launch)
        if self._gone.get(launch.key) == identity:  # a start that comes late and twice: it must not run again
            return Exit(Reason.SHIM_LOST, message="an earlier shim held it, and has ended")
        return await self._newest.runtime.start(launch)

    async def stop(self, key: AttemptKey, why: str) -> None:
        """Ask for the end of an attempt; see `protocol.Runtime.stop`."""
        await _asked(self._of(key)).stop(key, why)

    async def renew(self, renewed_at_s: float) -> None:
        """Tell all shims of a committed renewal: one that does not answer keeps it from no other."""
        await self._each(lambda runtime: runtime.renew(renewed_at_s))

    async def forget(self, key: AttemptKey) -> None:
        """Remove all but the logs of an ended attempt; see `protocol.Runtime.forget`."""
        member = self._of(key)
        await _asked(member).forget(key)
        if member.held.pop(key, None) is not None:
            self._look.set()

    async def held(self) -> Sequence[Held]:
        """All attempts that run or have ended and are not forgotten, by key. RuntimeUnavailable: one does not say."""
        found = {one.key: one for member in self._retiring if member.silent for one in member.records}
        for held in await self._each(lambda runtime: runtime.held()):
            found.update((one.key, one) for one in held)
        return sorted(found.values(), key=lambda one: one.key)

    async def usage(self, key: AttemptKey) -> Usage | None:
        """Use so far of a running attempt; None when it is over or nothing here counts it."""
        return await _asked(self._of(key)).usage(key)

    async def sample(self, key: AttemptKey) -> Sample | None:
        """Use so far of a running attempt and at this moment; None when it is over or nothing here counts it."""
        return await _asked(self._of(key)).sample(key)

    def events(self) -> AsyncIterator[Exited | ShimLost]:
        """Ends of attempts in all shims, as `ProcessRuntime.events`. Any shim may be the one that is lost."""
        feed = self._hub.open()
        for member in self._members:
            for key, exited in member.runtime.unforgotten.items():
                feed.put(key, exited)
        return feed

    @property
    def home(self) -> Path:
        """The first shim's directory, where logs and kept scratch directories are."""
        return self._home

    @property
    def state_dir(self) -> Path:
        """Where the shim that takes what is new keeps everything else."""
        return self._newest.runtime.state_dir

    def state_dir_of(self, key: AttemptKey) -> Path:
        """The directory of the shim that holds an attempt, or would."""
        return self._of(key).runtime.state_dir

    @property
    def logs_dir(self) -> Path:
        """Holds one directory of logs for each attempt, by key."""
        return self._home / "logs"

    def log_path(self, key: AttemptKey, stream: str) -> Path:
        """Where ``stdout`` or ``stderr`` of an attempt is, or would be."""
        return self.logs_dir / key / stream

    # Services ----------------------------------------------------------------------------------------------------

    async def start_service(
        self, name: str, argv: Sequence[str], env: Mapping[str, str], cwd: str, log_path: Path
    ) -> Service:
        """Start a program of the node itself in the newest shim; one of that name that runs in any is left alone."""
        member = await self._runs(name) or self._newest
        return await member.runtime.start_service(name, argv, env, cwd, log_path)

    async def stop_service(
        self, name: str, signal: int = signals.SIGTERM, wait_s: float = 10.0, limit_s: float = 30.0
    ) -> Service | None:
        """See `ProcessRuntime.stop_service`: wherever it runs."""
        member = await self._runs(name) or self._newest
        ended = await member.runtime.stop_service(name, signal, wait_s, limit_s)
        self._look.set()
        return ended

    async def service(self, name: str) -> Service | None:
        """A service that runs in any shim, or has ended in the newest; None when none of that name was started."""
        member = await self._runs(name) or self._newest
        return await member.runtime.service(name)

    def strands(self, name: str) -> bool:
        """Whether a service is all that a shim goes on for that would else have ended."""
        return any(not member.silent and not member.held and name in member.services for member in self._retiring)

    async def _runs(self, name: str) -> Member | None:
        for member in self._members:  # the newest first
            if member.silent:
                if name in member.services:  # it could run
                    _asked(member)
                continue
            try:
                found = await member.runtime.service(name)
            except RuntimeUnavailable:
                if self._has_left(member):
                    continue
                raise  # it could have it
            if found is not None and found.exit is None:
                return member
        return None

    # The shims ---------------------------------------------------------------------------------------------------

    def are_scattered(self) -> bool:
        """Whether anything is outside the first shim's directory, where a daemon of before upgrades would not look.

        Reads the disk: not for the event loop.
        """
        return generations.are_scattered(self._home)

    def described(self) -> tuple[ShimInfo, ...]:
        """All of them, the one that takes what is new first."""
        return tuple(
            ShimInfo(
                code=hello.code if (hello := None if member.silent else member.runtime.hello) else "",
                release=hello.release if hello else "",
                started_ms=hello.started_ms if hello else 0,
                retiring=member is not self._newest,
                attempts=len(member.held),
                services=member.services,
            )
            for member in self._members
        )

    def warnings(self) -> tuple[str, ...]:
        """What this machine lacks and what that weakens, for people; and what an upgrade waits for."""
        stuck = (self._outdated,) if self._outdated else ()
        return (*self._newest.runtime.warnings(), *stuck, *(member.told() for member in self._retiring))

    def shim_pid(self) -> int:
        """The pid of the shim that takes what is new, as we see it."""
        return self._newest.runtime.shim_pid()

    def shim_id(self) -> str:
        """Changes with every new shim."""
        return self._newest.runtime.shim_id()

    async def shutdown_shim(self, why: str = "released", wait_s: float = 10.0, limit_s: float = 60.0) -> None:
        """End all attempts, services and shims; see `ProcessRuntime.shutdown_shim`. One that fails keeps none other."""
        await self._stop_working()
        await self._listen()
        await self._each(lambda runtime: runtime.shutdown_shim(why, wait_s, limit_s))
        await asyncio.to_thread(generations.tidy, self._home)
        await generations.sweep(self._home, generations.SWEEP_AT_END_S)
        for member in self._retiring:
            if member.silent:
                _asked(member)

    # Inside ------------------------------------------------------------------------------------------------------

    @property
    def _members(self) -> list[Member]:
        return [self._newest, *self._retiring]

    def _of(self, key: AttemptKey) -> Member:
        return next((member for member in self._retiring if key in member.held), self._newest)

    async def _each(self, ask: Callable[[ProcessRuntime], Awaitable[T]]) -> list[T]:
        """Ask all that have ever answered at once, to the end; then raise what one of them has raised."""
        members = [member for member in self._members if not member.silent]
        answers = await asyncio.gather(*(ask(member.runtime) for member in members), return_exceptions=True)
        found: list[T] = []
        for member, answer in zip(members, answers, strict=True):
            if not isinstance(answer, BaseException):
                found.append(answer)
            elif not isinstance(answer, RuntimeUnavailable) or not self._has_left(member):
                raise answer
        return found

    def _has_left(self, member: Member) -> bool:
        """It had nothing left and is ending, or has ended, since we have asked it."""
        return member not in self._members

    async def _tend(self) -> None:
        """Let those that retire end when they are empty."""
        while True:
            self._look.clear()
            await self._listen()
            for member in [member for member in self._retiring if not member.silent]:
                try:
                    await member.look()
                    if member.is_empty:
                        await self._end(member)
                except (SpinettaError, OSError) as e:
                    log.warning("an earlier shim cannot be looked after now: %s", e)
            with contextlib.suppress(TimeoutError):
                silent = any(member.silent for member in self._retiring)
                async with asyncio.timeout(LISTEN_EVERY_S if silent else LOOK_EVERY_S):
                    await self._look.wait()

    async def _listen(self) -> None:
        """Whether one that has not answered has; then it is one like the others."""
        for member in self._retiring:
            if not member.silent or not member.runtime.is_open:
                continue
            try:
                await member.look()
            except (SpinettaError, OSError) as e:
                log.warning("an earlier shim does not say what it has: %s", e)
                continue
            log.info("a shim that did not answer does: %s", member.told())
            self._hub.put(LOST, ShimLost())  # what it holds is to be listed anew

    async def _end(self, member: Member) -> None:
        self._retiring.remove(member)  # first: nobody is to wait for one that is ending
        self._gone |= member.past
        try:
            await end(member, self._home)
            self._sweepings.set()
        except asyncio.CancelledError:
            if member.runtime.is_open:  # all are to be shut down, perhaps; a closed one could not be asked
                self._retiring.append(member)
            raise

    async def _sweep(self) -> None:
        """Remove what shims that have ended have left; nobody waits for that."""
        while True:
            await self._sweepings.wait()
            self._sweepings.clear()
            await generations.sweep(self._home)

    async def _stop_working(self) -> None:
        working = (self._tending, self._sweeping)
        for task in working:
            task.cancel()
        await asyncio.wait(working)
        for task in working:
            if not task.cancelled() and (error := task.exception()) is not None:
                log.error("earlier shims have not been looked after: %r", error)  # all are ended all the same


def _asked(member: Member) -> ProcessRuntime:
    """To be asked something. RuntimeUnavailable: it has not answered yet."""
    if member.silent:
        raise RuntimeUnavailable(member.told())
    return member.runtime


async def end_all(home: Path) -> bool:
    """End all shims that take connections and that no daemon looks after, with all that they hold; False: none.

    One that fails keeps none other. Raises RuntimeUnavailable or UserError of one that does not end, or OSError: they
    cannot be seen.
    """

    async def end_one(folder: Path) -> None:
        async with ProcessRuntime.connect(folder, node="", kill_margin_s=0, home=home) as runtime:
            await runtime.shutdown_shim()

    folders = await generations.living(home)
    answers = await asyncio.gather(*(end_one(folder) for folder in folders), return_exceptions=True)
    for answer in answers:
        if isinstance(answer, BaseException):
            raise answer
    return bool(folders)
