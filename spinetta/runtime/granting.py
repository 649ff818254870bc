"""Giving each attempt units of its own: a runtime around the others."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from spinetta import devices
from spinetta.model import Exit, Reason, Usage
from spinetta.runtime.protocol import AttemptKey, Exited, Held, Launch, Runtime, ShimLost
from spinetta.runtime.unitbook import UnitBook

log = logging.getLogger("spinetta.node")

WAIT_S = 20.0  # for units: an end is recorded, and counts as room, a moment before the shim has forgotten the attempt
NOT_GIVEN, NO_START = "no task is given this unit", "what is given it cannot start in a container"
LISTINGS = 2  # without it in a row, before an attempt of this daemon's that is not there is taken for gone


class GrantingRuntime:
    """Implements `protocol.Runtime` by another one. An attempt has its units from `prepare` to `forget`.

    What an earlier daemon gave and the shim does not hold is free again with the first listing. Of what this one gave,
    and what became of it nobody has said, the second listing decides: a start may be under way while the first is made.
    """

    def __init__(
        self, inner: Runtime, directory: Path, of: Mapping[str, devices.Devices], *, wait_s: float = WAIT_S
    ) -> None:
        """`directory`: see `UnitBook`; `wait_s`: for units that others are just giving back. UserError: it cannot be
        read.
        """
        self._inner = inner
        self._wait_s = wait_s
        self._freed = asyncio.Event()
        self._of = dict(of)
        self._book = UnitBook(directory, of)
        self._book.open()
        self._left_over = set(self._book.keys)
        self._starting: set[AttemptKey] = set()
        self._missed: dict[AttemptKey, int] = {}
        self._counted = 0  # listings

    def labels(self, key: AttemptKey) -> devices.Labels:
        """The units that an attempt has."""
        return self._book.labels(key)

    def capabilities(self) -> tuple[str, ...]:
        """Names of what is enforced here."""
        return self._inner.capabilities()

    async def prepare(self, launch: Launch) -> Launch | Exit:
        """Give it its units, and bring in what else it needs; see `protocol.Runtime.prepare`."""
        key = launch.key
        self._starting.add(key)
        self._left_over.discard(key)
        self._missed.pop(key, None)
        try:
            ready = await self._given(launch)
            if isinstance(ready, Launch):
                ready = await self._inner.prepare(ready)
        except BaseException:
            self._starting.discard(key)
            raise
        if isinstance(ready, Exit):
            self._starting.discard(key)
        return ready

    async def start(self, launch: Launch) -> Exit | None:
        """Start an attempt that was prepared; see `protocol.Runtime.start`."""
        try:
            return await self._inner.start(launch)
        finally:
            self._starting.discard(launch.key)

    async def stop(self, key: AttemptKey, why: str) -> None:
        """Ask for the end of an attempt; see `protocol.Runtime.stop`."""
        await self._inner.stop(key, why)

    async def renew(self, renewed_at_s: float) -> None:
        """Tell of a committed renewal; see `protocol.Runtime.renew`."""
        await self._inner.renew(renewed_at_s)

    async def forget(self, key: AttemptKey) -> None:
        """Remove all but the logs of an ended attempt; others may have its units."""
        await self._inner.forget(key)
        self._release(key)
        self._missed.pop(key, None)
        self._starting.discard(key)

    async def held(self) -> Sequence[Held]:
        """All attempts that run or have ended and are not forgotten, by key."""
        # A listing that takes long may be older than a start that has ended meanwhile, and so may several at once be:
        # it judges what was neither new nor being started when it began, and one that overlaps another says nothing.
        judged, counted = self._book.keys - self._starting, self._counted
        found = await self._inner.held()
        if counted == self._counted:
            self._counted += 1
            self._keep_only({held.key for held in found}, judged)
        return found

    async def usage(self, key: AttemptKey) -> Usage | None:
        """Use so far of a running attempt; None when it is over or nothing here counts it."""
        return await self._inner.usage(key)

    def events(self) -> AsyncIterator[Exited | ShimLost]:
        """Ends of attempts as they happen, beginning with those not forgotten yet."""
        return self._inner.events()

    def log_path(self, key: AttemptKey, stream: str) -> Path:
        """Where ``stdout`` or ``stderr`` of an attempt is, or would be."""
        return self._inner.log_path(key, stream)

    async def _given(self, launch: Launch) -> Launch | Exit:
        try:
            found = await self._acquired(launch)
        except OSError as e:
            return _unfit(f"which devices it has cannot be written down: {e.strerror}")
        if isinstance(found, devices.Short):
            log.warning("%s: %s", launch.key, found)
            return _unfit(str(found), found.name)
        if found:
            log.info("%s has %s", launch.key, "; ".join(f"{name} {', '.join(labels)}" for name, labels in found))
        told = devices.environment(found, self._of, contained=launch.wants is not None)
        return replace(launch, env={**launch.env, **told}, units=found) if told or found else launch

    async def _acquired(self, launch: Launch) -> devices.Labels | devices.Short:
        found: devices.Labels | devices.Short = ()
        try:
            async with asyncio.timeout(self._wait_s):
                while isinstance(found := self._book.acquire(launch.key, launch.countables), devices.Short):
                    if found.is_lasting:
                        break
                    self._freed.clear()
                    await self._freed.wait()
        except TimeoutError:
            pass
        return found

    def _release(self, key: AttemptKey) -> None:
        self._book.release(key)
        self._freed.set()

    def _keep_only(self, there: set[AttemptKey], judged: frozenset[AttemptKey]) -> None:
        for key in self._book.keys:
            if key in there or key in self._starting:
                self._missed.pop(key, None)
                continue
            if key not in judged:
                continue
            self._missed[key] = self._missed.get(key, 0) + 1
            if key in self._left_over or self._missed[key] >= LISTINGS:
                log.info("%s is gone; its units are free again", key)
                self._release(key)
                del self._missed[key]
        self._left_over.clear()


def device_troubles(of: Mapping[str, devices.Devices], *, contained: bool) -> tuple[str, ...]:
    """Words on device files that are named and cannot be used.

    `contained`: by containers, whose users are nobody here.
    """
    said = []
    for name, found in sorted(of.items()):
        owned = [(path, f"{name} {label}", NOT_GIVEN) for label, paths in found.units for path in paths]
        for path, whose, follows in (*owned, *((path, name, NO_START) for path in found.common)):
            try:
                mode = Path(path).stat().st_mode
            except OSError as e:
                said.append(f"the device {path} of {whose}: {e.strerror}: {follows}")
                continue
            if contained and mode & 0o006 != 0o006:
                said.append(
                    f"the device {path} of {whose} is not open to everybody (chmod 666, or a rule for udev): "
                    "containers that are given it cannot open it"
                )
    return tuple(said)


def _unfit(message: str, lacks: str = "") -> Exit:
    return Exit(Reason.NODE_UNFIT, message=message, ended_ms=time.time_ns() // 1_000_000, lacks=lacks)
