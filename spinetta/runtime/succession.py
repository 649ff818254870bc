"""Which of a node's shims takes what is new, and the end of those that have nothing left."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from dataclasses import dataclass, field
from pathlib import Path

from spinetta.errors import RuntimeUnavailable
from spinetta.runtime import generations, recorded
from spinetta.runtime.feed import Hub
from spinetta.runtime.launch import code_of
from spinetta.runtime.process import ATTACH_LIMIT_S, RETRY_FIRST_S, ProcessRuntime
from spinetta.runtime.protocol import AttemptKey, Exited, Held, ShimLost

log = logging.getLogger("spinetta.runtime")

EMPTY_END_LIMIT_S = 10.0  # of a shim that holds nothing: while a daemon starts, the others have no renewals
ANSWER_LIMIT_S = 10.0  # for a shim to say what it has, once another could; well below any usual grace


@dataclass(eq=False, slots=True)
class Member:
    """One of the shims, connected.

    Attributes:
        opened: closes the connection; the shim goes on.
        held: attempts that it had when it was last looked at and that are not forgotten: incarnation and token by key.
            Complete for one that takes no new ones.
        past: all that it had when it was connected to.
        services: names of those that ran there when it was last looked at.
        silent: it has not answered since we have begun; what it has is what its records say.
        records: of a silent one: its attempts, as if all ran.
    """

    runtime: ProcessRuntime
    opened: contextlib.AsyncExitStack
    held: dict[AttemptKey, tuple[str, int]] = field(default_factory=dict)
    past: dict[AttemptKey, tuple[str, int]] = field(default_factory=dict)
    services: tuple[str, ...] = ()
    silent: bool = True
    records: list[Held] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        """Its state directory."""
        return self.runtime.state_dir

    @property
    def is_empty(self) -> bool:
        """It had nothing any more when it was last looked at."""
        return not self.silent and not self.held and not self.services

    async def look(self) -> None:
        """See what it has. RuntimeUnavailable: it does not say."""
        held = {one.key: (one.incarnation, one.token) for one in await self.runtime.held()}
        self.services = tuple(one.name for one in await self.runtime.services() if one.exit is None)
        self.held = held
        if self.silent:
            self.past |= held
            self.silent, self.records = False, []

    async def meet(self) -> None:
        """Wait for its first answer, and look. RuntimeUnavailable: it does not say; UserError: see `connect`.

        One that dies meanwhile is none that does not say: another comes up in its place, and is asked.
        """
        await self.runtime.attached()
        while True:
            try:
                return await self.look()
            except RuntimeUnavailable:
                if self.runtime.is_open:
                    raise
            await asyncio.sleep(RETRY_FIRST_S)

    async def read(self) -> None:
        """See what a silent one's records say. RuntimeUnavailable: they cannot be read, so that nothing is known."""
        try:
            records = await asyncio.to_thread(recorded.attempts, self.folder)
            services = await asyncio.to_thread(recorded.services, self.folder)
        except OSError as e:
            raise RuntimeUnavailable(
                f"no shim answers for {self.folder}, and its records cannot be read: {e}"
            ) from None
        if self.silent:
            self.records, self.services = records, services
            self.held = {one.key: (one.incarnation, one.token) for one in records}
            self.past = dict(self.held)

    def told(self) -> str:
        """Of one that takes no new attempts, for people."""
        count = len(self.held)
        left = f"{count} attempt{'' if count == 1 else 's'}"
        if self.silent:
            why = self.runtime.failure or f"nothing is heard from {self.folder}"
            return f"a shim of this node does not answer, and what it holds is taken for running, {left}: {why}"
        if self.services and not count:
            left = ", ".join(self.services)
        release = self.runtime.hello.release
        of = f" (version {release})" if release else ""
        return f"an earlier shim{of} goes on with {left}, and ends after that"


@dataclass(frozen=True, slots=True)
class Succession:
    """All shims of a node.

    Attributes:
        newest: takes what is new.
        retiring: the others.
        outdated: why the newest is not of the installed code; empty: it is.
    """

    newest: Member
    retiring: list[Member]
    outdated: str = ""


@dataclass(frozen=True, slots=True)
class Opening:
    """How shims are connected to, or started. As for `ProcessRuntime.connect`; `hub` is common to all."""

    home: Path
    node: str
    kill_margin_s: float
    isolate: bool
    idle_end_s: float
    hub: Hub[Exited | ShimLost]

    def __post_init__(self) -> None:
        """Shims run elsewhere than we do."""
        object.__setattr__(self, "home", self.home.absolute())

    async def open(self, opened: list[Member]) -> Succession:
        """Connect to all that there are and to those that must clear up, which are put into `opened`; choose."""
        code = await asyncio.to_thread(code_of)
        try:
            taken = await asyncio.to_thread(generations.occupied, self.home)
        except OSError as e:
            raise RuntimeUnavailable(f"the shims of {self.home} cannot be found: {e}") from None
        listening = await asyncio.gather(*(generations.listens(folder) for folder in taken))
        alive = {folder for folder, listens in zip(taken, listening, strict=True) if listens}
        for folder in taken:
            opened.append(await self._attach(folder, at_once=True))  # noqa: PERF401 - else the others were not closed
        members = list(opened)
        await self._meet(members)
        answering = [member for member in members if not member.silent]
        if ours := [member for member in answering if member.runtime.hello.code == code]:
            # One that lived rather than one that was started to clear up; of several the one that etcd is in, or most.
            lived = [member for member in ours if member.folder in alive]
            newest = max(lived, key=lambda one: (bool(one.services), len(one.held))) if lived else ours[0]
            return _of(members, newest)
        for member in [member for member in answering if member.is_empty]:
            answering.remove(member)  # its connection is closed, whether or not its directory is free
            members.remove(member)
            if await end(member, self.home):
                taken.remove(member.folder)
        if answering and len(members) >= generations.GENERATIONS_MAX:
            return _of(
                members,
                max(answering, key=lambda member: member.runtime.hello.started_ms),
                f"{len(members)} shims of other code run, and no more are started: what is new goes to one of them; "
                "start the node's daemon again when fewer are left",
            )
        try:
            newest = await self._attach(generations.free_folder(self.home, taken))
        except RuntimeUnavailable as e:
            if not answering:
                raise
            return _of(
                members,
                max(answering, key=lambda member: member.runtime.hello.started_ms),
                f"no shim of the installed code can be started, what is new goes to one of other code: {e}; "
                "start the node's daemon again when that is mended",
            )
        newest.silent = False  # and has nothing
        opened.append(newest)
        return _of([*members, newest], newest)

    async def _meet(self, members: list[Member]) -> None:
        """Wait until all have said what they have, or one has and the others have had their time.

        RuntimeUnavailable: none does. Then there is nobody who could wait for us, and we wait longer.
        """
        if not members:
            return
        meetings = {asyncio.create_task(member.meet()): member for member in members}
        try:
            _, waiting = await asyncio.wait(meetings, timeout=ANSWER_LIMIT_S)
            if waiting and all(member.silent for member in members):
                await asyncio.wait(
                    waiting, timeout=ATTACH_LIMIT_S - ANSWER_LIMIT_S, return_when=asyncio.FIRST_COMPLETED
                )
            for meeting, member in meetings.items():
                if meeting.done() and (error := meeting.exception()) is not None:
                    if not isinstance(error, RuntimeUnavailable):
                        raise error
                    log.warning("%s: %s", member.folder, error)
        finally:
            for meeting in meetings:
                meeting.cancel()
            await asyncio.gather(*meetings, return_exceptions=True)
        silent = [member for member in members if member.silent]
        if len(silent) == len(members):
            raise RuntimeUnavailable(silent[0].runtime.failure or f"no shim answers for {silent[0].folder}")
        for member in silent:
            await member.read()
            log.warning("%s", member.told())

    async def _attach(self, folder: Path, *, at_once: bool = False) -> Member:
        opened = contextlib.AsyncExitStack()
        runtime = await opened.enter_async_context(
            ProcessRuntime.connect(
                folder,
                node=self.node,
                kill_margin_s=self.kill_margin_s,
                isolate=self.isolate,
                idle_end_s=self.idle_end_s,
                home=self.home,
                hub=self.hub,
                at_once=at_once,
            )
        )
        return Member(runtime, opened)


def _of(members: list[Member], newest: Member, outdated: str = "") -> Succession:
    return Succession(newest, [member for member in members if member is not newest], outdated)


async def end(member: Member, home: Path) -> bool:
    """End a shim that has nothing left, and remove what it had; False: something stays for the next start to clear up.

    May be cancelled anywhere, and then done again by another daemon.
    """
    try:
        await member.runtime.shutdown_shim(limit_s=EMPTY_END_LIMIT_S)
    except (RuntimeUnavailable, OSError) as e:  # OSError: of a daemon that has no descriptor left
        log.warning("an earlier shim, which has nothing left, does not end: %s", e)
    await member.opened.aclose()
    if not await asyncio.to_thread(generations.clean, member.folder, home):
        log.warning("%s cannot be cleared up now; the next start of the daemon tries again", member.folder)
        return False
    log.info("an earlier shim had nothing left and has ended")
    return True
