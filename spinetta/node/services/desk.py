"""What happens around every call: who is it, may it, not too often; then a status for errors and a line of audit."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import grpc.aio

from spinetta import rights
from spinetta.access import Limits
from spinetta.errors import (
    AskElsewhere,
    CorruptRecord,
    Denied,
    OutcomeUnknown,
    SpinettaError,
    StoreUnavailable,
    UserError,
)
from spinetta.node.health import StoreHealth
from spinetta.node.hub import closing
from spinetta.node.port import NodePort
from spinetta.node.services import limits
from spinetta.node.services.callers import Callers, metadata, peer_address
from spinetta.node.services.errors import refuse
from spinetta.node.services.gate import Gate
from spinetta.node.services.peers import FORWARDED
from spinetta.node.services.throttle import Throttle
from spinetta.rights import Call, Caller, CallerKind

T = TypeVar("T")

NAMES_MAX = 20  # ids in one line of the audit log
NAME_CHARS_MAX = 64  # of what a caller calls something there
# What a worker answers to people: it holds logs, but not the cluster's records.
NEEDS_STORE = frozenset({Call.SUBMIT, Call.CANCEL, Call.STATUS, Call.NODES})
WORKERS_ANSWER = frozenset({Call.HEALTH, Call.REFLECTION, Call.ENROLL, Call.LOG, Call.EXEC, Call.COPY, Call.WHOAMI})


@dataclass(slots=True)
class Asked:
    """One call: who asks, what was checked for it, and what the audit log is to say of it.

    Attributes:
        caller: with the rights it had when they were last looked at. Its `guards` belong into every transaction.
        subject: what it is about, for the audit log: ids, a node, a user.
        revision: of the store, at which its change was made.
        is_forwarded: another node passes it on.
        is_counted: among its caller's calls.
        is_repeat: it tells nothing new: the audit log is not told of it when it goes well. None: not known yet.
    """

    desk: Desk
    context: Any
    call: Call
    caller: Caller
    subject: str = ""
    revision: int = 0
    is_forwarded: bool = False
    is_counted: bool = False
    is_repeat: bool | None = None
    _checked: dict[tuple[Call, str | None, tuple[str, ...]], None] = field(default_factory=dict)

    def may(self, call: Call, owner: str | None = None) -> bool:
        """Whether it may do this too, as far as is known here."""
        return rights.refusal(self.caller, call, owner=owner) is None

    async def check(self, call: Call | None = None, *, owner: str | None = None, clearance: Iterable[str] = ()) -> None:
        """It may do this (None: what it asks for) to something of this owner with these labels.

        Checked again by `again`.

        Raises:
            Denied: it may not.
            StoreUnavailable: that cannot be said now.
        """
        what = (call or self.call, owner, tuple(clearance))
        if what in self._checked:
            return
        self._checked[what] = None
        if _refusal(self.caller, what) is not None:
            await self.again()

    async def count_tasks(self, number: int) -> None:
        """Count tasks that are about to be submitted.

        Raises:
            Busy: too many lately.
        """
        if self.caller.kind is not CallerKind.LOCAL:
            self.desk.throttle.tasks(self.caller, number, await self.desk.policy())

    async def again(self) -> None:
        """Read the caller's rights from the store, and check anew all that was checked: before saying no, and after a
        guard did not hold.

        Raises:
            Denied: it may not (any more).
            StoreUnavailable: that cannot be said now.
        """
        await self.look(fresh=True)

    async def look(self, *, fresh: bool) -> None:
        """As `again`; unless `fresh`, from what is known here."""
        if self.caller.kind is CallerKind.LOCAL:
            return
        self.caller = await self.desk.callers.of(self.context, fresh=fresh)
        for what in self._checked:
            words = _refusal(self.caller, what)
            if words is not None:
                raise _denied(self.caller, words)


class Desk:
    """Lets calls in, to the services of a node."""

    def __init__(
        self, port: NodePort, callers: Callers, throttle: Throttle | None = None, health: StoreHealth | None = None
    ) -> None:
        self._port = port
        self._health = health
        self.callers = callers
        self.throttle = throttle or Throttle()
        self.gate = Gate(port, self.throttle)

    async def answer(
        self,
        context: Any,
        call: Call,
        work: Callable[[Asked], Awaitable[T]],
        *,
        subject: str = "",
        is_long: bool = False,
        anyhow: bool = False,
    ) -> T:
        """Answer a call with what `work` says; errors end the RPC with a status.

        Args:
            context: gRPC's.
            call: the right it takes. `work` checks owners and labels itself, by `Asked.check`.
            work: does it.
            subject: what it is about, for the audit log; `work` may set a better one.
            is_long: it may take minutes: counted as a stream, and rights are looked at meanwhile.
            anyhow: it has an answer also while the store has none.
        """
        asked = Asked(self, context, call, Caller.nobody(), subject)
        try:
            if not anyhow:
                self._refuse_while_lost(asked)
            with await self._admit(asked, is_open=is_long):
                if is_long and asked.caller.kind is not CallerKind.LOCAL:
                    result = await self._watched(asked, work(asked))
                else:
                    result = await work(asked)
        except asyncio.CancelledError:
            self._write_down(asked, "abandoned by the caller")
            raise
        except grpc.aio.AbortError:  # has been answered already
            raise
        except Exception as error:  # noqa: BLE001 - the boundary: the client gets a status, the log the rest
            self._failed(asked, error)
            await refuse(context, await self._explained(asked, error))
        if not asked.is_repeat:
            self._write_down(asked, "ok")
        return result

    async def stream(
        self, context: Any, call: Call, work: Callable[[Asked], AsyncIterator[T]], *, subject: str = ""
    ) -> AsyncIterator[T]:
        """As `answer`, for a stream; it is ended when its caller's rights are."""
        asked = Asked(self, context, call, Caller.nobody(), subject)
        try:
            with await self._admit(asked, is_open=True):
                has_begun = False
                is_local = asked.caller.kind is CallerKind.LOCAL
                items = work(asked) if is_local else self._watched_stream(asked, work(asked))
                async with closing(items):
                    async for item in items:
                        if not has_begun:  # whose it is has been checked by now
                            has_begun = True
                            self._write_down(asked, "begun")
                        yield item
        except grpc.aio.AbortError:
            raise
        except Exception as error:  # noqa: BLE001 - as in `answer`
            self._failed(asked, error)
            await refuse(context, await self._explained(asked, error))
        self._write_down(asked, "ok")

    def _refuse_while_lost(self, asked: Asked) -> None:
        """Without the store there is no answer: said at once, where trying would take until the caller gives up.

        Raises:
            StoreUnavailable: no majority of the voters has answered for a while.
        """
        if self._health is not None and asked.call in NEEDS_STORE:
            lost = self._health.lost(named=self._port.credentials is None)
            if lost is not None:
                raise lost

    async def _explained(self, asked: Asked, error: Exception) -> Exception:
        """The error, with what is wrong with the store when that is what is behind it."""
        if self._health is None or not isinstance(error, SpinettaError):
            return error
        named = self._port.credentials is None or asked.caller.kind is not CallerKind.NOBODY
        return await self._health.explain(error, named=named)

    async def _admit(self, asked: Asked, *, is_open: bool) -> AbstractContextManager[None]:
        context, throttle = asked.context, self.throttle
        asked.is_forwarded = bool(metadata(context).get(FORWARDED[0]))
        peer = peer_address(context)
        caller = asked.caller = await self.callers.of(context, before_no=partial(throttle.refusal, peer))
        if caller.kind is CallerKind.LOCAL:
            return contextlib.nullcontext()
        throttle.call(caller, peer, await self.policy() if caller.kind is not CallerKind.NOBODY else Limits())
        asked.is_counted = True
        await asked.check()
        if asked.is_forwarded and caller.kind is not CallerKind.NODE:
            raise _denied(caller, "only nodes pass calls on")
        if caller.kind is CallerKind.USER and self.callers.is_worker and asked.call not in WORKERS_ANSWER:
            raise ask_a_voter(self._port)
        if caller.kind is not CallerKind.NOBODY:
            self.gate.known(context)
        return throttle.open(caller) if is_open and caller.kind is not CallerKind.NOBODY else contextlib.nullcontext()

    async def policy(self) -> Limits:
        """What one identity may ask for unless its record says otherwise."""
        if self.callers.is_worker:  # it answers few calls: not worth a read each
            return Limits()
        try:
            return (await self.callers.acl.policy())[0].limits
        except CorruptRecord:  # what it grants is granted to nobody, but an administrator must get in to mend it
            return Limits()

    async def _watched(self, asked: Asked, work: Awaitable[T]) -> T:
        """Await it, and look at the caller's rights meanwhile."""
        working = asyncio.ensure_future(work)
        looking = asyncio.ensure_future(_look(asked))
        try:
            await asyncio.wait((working, looking), return_when=asyncio.FIRST_COMPLETED)
            if not working.done():
                looking.result()
            return await working
        finally:
            await _end(working, looking)

    async def _watched_stream(self, asked: Asked, items: AsyncIterator[T]) -> AsyncIterator[T]:
        """The items, as long as the caller has its rights. They are made in one task, a single one ahead."""
        made: asyncio.Queue[T] = asyncio.Queue(1)

        async def make() -> None:
            async with closing(items):
                async for item in items:
                    await made.put(item)

        making = asyncio.ensure_future(make())
        looking = asyncio.ensure_future(_look(asked))
        taking: asyncio.Future[T] | None = None
        try:
            while True:
                taking = taking or asyncio.ensure_future(made.get())
                await asyncio.wait((making, looking, taking), return_when=asyncio.FIRST_COMPLETED)
                if looking.done():
                    looking.result()
                if taking.done():
                    item, taking = taking.result(), None
                    yield item
                elif making.done() and made.empty():
                    making.result()
                    return
        finally:
            await _end(making, looking, *([taking] if taking else []))

    def _failed(self, asked: Asked, error: Exception) -> None:
        match error:
            case Denied():
                if asked.is_counted:
                    self.throttle.denied(asked.caller, peer_address(asked.context))
                self._audit(asked, f"{error.reason}: {error.message}")
            case OutcomeUnknown():
                self._write_down(asked, "unknown")
            case UserError() if error.reason == "busy":
                pass  # a flood must not fill the log too
            case UserError():
                self._write_down(asked, f"refused: {error.reason}")
            case SpinettaError():
                self._write_down(asked, "failed")
            case _:
                self._write_down(asked, "unknown")

    def _write_down(self, asked: Asked, outcome: str) -> None:
        if asked.call in rights.AUDITED and asked.caller.kind is not CallerKind.LOCAL:
            self._audit(asked, outcome)

    def _audit(self, asked: Asked, outcome: str) -> None:
        self._port.audit(asked.call.value, asked.caller.title, asked.subject, outcome, asked.revision)


def short_list(names: Sequence[str]) -> str:
    """A few of the names, and how many there are besides: for the audit log."""
    shown = " ".join(n[:NAME_CHARS_MAX] for n in names[:NAMES_MAX])
    return f"{shown} and {len(names) - NAMES_MAX} more" if len(names) > NAMES_MAX else shown


def ask_a_voter(port: NodePort) -> AskElsewhere:
    """This is a worker; the records are with the voters."""
    return AskElsewhere(f"node {port.name} is a worker: voters answer this", addresses=tuple(port.voter_addresses()))


async def _look(asked: Asked) -> None:
    """Look at the caller's rights now and then. Ends with an error only."""
    known_s = time.monotonic()
    while True:
        await asyncio.sleep(limits.RECHECK_S)
        try:
            try:
                await asked.look(fresh=False)
            except Denied:  # the caller's role or project: that has been read here only
                await asked.again()
            known_s = time.monotonic()
        except StoreUnavailable:
            if time.monotonic() - known_s > limits.UNKNOWN_MAX_S:
                raise


async def _end(*futures: asyncio.Future[Any]) -> None:
    for future in futures:
        future.cancel()
    await asyncio.wait(futures)
    for future in futures:
        if not future.cancelled():
            future.exception()  # seen, or raised already


def _refusal(caller: Caller, what: tuple[Call, str | None, tuple[str, ...]]) -> str | None:
    return rights.refusal(caller, what[0], owner=what[1], clearance=what[2])


def _denied(caller: Caller, words: str) -> Denied:
    if caller.kind is CallerKind.NOBODY:
        hint = "" if caller.unknown_because else "log in: spinetta login"
        return Denied(words, hint=hint, reason="unauthenticated")
    return Denied(words, hint="ask an administrator of the cluster for the right")
