"""Which of a node's shims takes what is new, and the end of those that have nothing left."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from dataclasses import dataclass, field
from pathlib import Path

from spinetta.errors import RuntimeUnavailable
from spinetta.runtime import generations
from spinetta.runtime.feed import Hub
from spinetta.runtime.launch import code_of
from spinetta.runtime.process import ProcessRuntime
from spinetta.runtime.protocol import AttemptKey, Exited, ShimLost

log = logging.getLogger("spinetta.runtime")


@dataclass(eq=False, slots=True)
class Member:
    """One of the shims, connected.

    Attributes:
        opened: closes the connection; the shim goes on.
        held: attempts that it had when it was last looked at and that are not forgotten: incarnation and token by key.
            Complete for one that takes no new ones.
        past: all that it had when it was connected to.
        services: names of those that ran there when it was last looked at.
    """

    runtime: ProcessRuntime
    opened: contextlib.AsyncExitStack
    held: dict[AttemptKey, tuple[str, int]] = field(default_factory=dict)
    past: dict[AttemptKey, tuple[str, int]] = field(default_factory=dict)
    services: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        """Its state directory."""
        return self.runtime.state_dir

    @property
    def is_empty(self) -> bool:
        """It had nothing any more when it was last looked at."""
        return not self.held and not self.services

    async def look(self) -> None:
        """See what it has. RuntimeUnavailable: it does not say."""
        self.held = {one.key: (one.incarnation, one.token) for one in await self.runtime.held()}
        self.services = tuple(one.name for one in await self.runtime.services() if one.exit is None)

    def told(self) -> str:
        """Of one that takes no new attempts, for people."""
        count = len(self.held)
        left = f"{count} attempt{'' if count == 1 else 's'}"
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
        taken = await asyncio.to_thread(generations.occupied, self.home)
        alive = {folder for folder in taken if await generations.listens(folder)}
        for folder in taken:
            opened.append(await self._attach(folder))  # noqa: PERF401 - should one fail, the others must be closed
        members = list(opened)
        for member in members:
            await member.look()
            member.past = dict(member.held)
        if ours := [member for member in members if member.runtime.hello.code == code]:
            # One that lived rather than one that was started to clear up: etcd may be in it.
            newest = max(ours, key=lambda member: member.folder in alive)
            return Succession(newest, [member for member in members if member is not newest])
        for member in list(members):
            if member.is_empty:
                members.remove(member)  # its connection is closed, whether or not its directory is free
                if await end(member, self.home):
                    taken.remove(member.folder)
        if len(members) >= generations.GENERATIONS_MAX:
            newest = max(members, key=lambda member: member.runtime.hello.started_ms)
            outdated = (
                f"{len(members)} shims of other code run, and no more are started: what is new goes to one of them; "
                "start the node's daemon again when fewer are left"
            )
            return Succession(newest, [member for member in members if member is not newest], outdated)
        try:
            newest = await self._attach(generations.free_folder(self.home, taken))
        except RuntimeUnavailable as e:
            if not members:
                raise
            newest = max(members, key=lambda member: member.runtime.hello.started_ms)
            outdated = (
                f"no shim of the installed code can be started, what is new goes to one of other code: {e}; "
                "start the node's daemon again when that is mended"
            )
            return Succession(newest, [member for member in members if member is not newest], outdated)
        opened.append(newest)
        return Succession(newest, members)

    async def _attach(self, folder: Path) -> Member:
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
            )
        )
        return Member(runtime, opened)


async def end(member: Member, home: Path) -> bool:
    """End a shim that has nothing left, and remove what it had; False: something stays for the next start to clear up.

    May be cancelled anywhere, and then done again by another daemon.
    """
    try:
        await member.runtime.shutdown_shim()
    except (RuntimeUnavailable, OSError) as e:  # OSError: of a daemon that has no descriptor left
        log.warning("an earlier shim, which has nothing left, does not end: %s", e)
    await member.opened.aclose()
    if not await asyncio.to_thread(generations.clean, member.folder, home):
        log.warning("%s cannot be cleared up now; the next start of the daemon tries again", member.folder)
        return False
    log.info("an earlier shim had nothing left and has ended")
    return True
