"""Turns the agent: gathers events, lets it decide, carries out the effects. Decides nothing itself."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from spinetta.agent import Agent
from spinetta.errors import Compacted, Denied, OutcomeUnknown, RuntimeUnavailable, StoreUnavailable, UserError
from spinetta.events import (
    Archive,
    Archived,
    AttemptEnded,
    Begin,
    Change,
    Changed,
    Commit,
    CommitDone,
    Effect,
    Entry,
    Forget,
    GrantLease,
    Happening,
    HeldAttempt,
    KeepAlive,
    KeptAlive,
    LeaseGranted,
    List,
    ListDone,
    Listing,
    ListRuntime,
    NoAnswer,
    Notice,
    Prepared,
    Read,
    ReadDone,
    Reading,
    Refused,
    Rejected,
    Remember,
    Remembered,
    RenewRuntime,
    RevokeLease,
    RuntimeListed,
    Start,
    Started,
    Stop,
    Tag,
    Tick,
    Unwatch,
    Watch,
    WatchLost,
    attempt_key,
)
from spinetta.model import Exit, IncarnationId, Reason, Revision, TaskSpec
from spinetta.node.archiving import Archivist, Nowhere
from spinetta.node.launching import LaunchSettings, launch_of
from spinetta.node.trouble import Teller
from spinetta.node.vault import CannotOpen, Opened, Vault
from spinetta.runtime.protocol import Exited, Launch, Runtime, ShimLost
from spinetta.store.protocol import KeyValue, Store
from spinetta.trust.backoff import Backoff
from spinetta.txn import Result

log = logging.getLogger("spinetta.node")

INBOX_EVENTS_MAX = 4096  # about a second at several kHz; watches wait when it is full, answers are bounded by questions
TURN_EVENTS_MAX = 512  # handled in one turn, so that a flood does not keep effects waiting
IDLE_S = 5.0  # the longest sleep, in case a wake-up was forgotten
RUNTIME_RETRY_S = 0.5
UNLISTED_S = 5.0  # ends are passed on for so long before a shim that did not say what it holds is asked again
PAUSE_FIRST_S, PAUSE_MOST_S = 0.2, 2.0  # before the failure of an effect is told, from the second one in a row on
UNPACED = frozenset({"renew", "advertise"})  # they have a rhythm of their own, and a task's life hangs on the first
NEVER = frozenset({"too-large", "too-many-operations"})  # reasons for which the same write would be refused again
REMARK_EVERY_S = 10.0  # of the same kind; the rest are at level debug


def boot_time_s() -> float:
    """Seconds on CLOCK_BOOTTIME: never goes back, and counts while the machine sleeps, as the shim's deadlines do."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def wall_ms() -> int:
    """Milliseconds of the wall clock, for people only."""
    return time.time_ns() // 1_000_000


@dataclass(slots=True)
class Preparing:
    """What an attempt needs is being brought in. `scope` ends it, for the reason `why`; `go`: it may begin."""

    scope: asyncio.Timeout
    go: asyncio.Event
    why: str = ""


def entry_of(kv: KeyValue | None) -> Entry | None:
    """A stored key as the agent sees it."""
    return None if kv is None else Entry(kv.key, kv.value, kv.created, kv.modified, kv.lease)


def _name_of(tag: Tag) -> str:
    return tag if isinstance(tag, str) else tag.step


class Driver:
    """Owns the agent and all that is done for it; nothing of it outlives `run`."""

    def __init__(
        self,
        agent: Agent,
        store: Store,
        runtime: Runtime,
        launch: LaunchSettings,
        *,
        remember: Callable[[IncarnationId], None],
        vault: Vault | None = None,
        archivist: Archivist | None = None,
    ) -> None:
        """`vault` opens what is sealed for this node; None in an open cluster, where nothing is."""
        self.agent = agent
        self._store = store
        self._runtime = runtime
        self._launch = launch
        self._remember = remember
        self._vault = vault
        self._archivist = archivist or Nowhere()
        self._inbox: asyncio.Queue[Happening] = asyncio.Queue(INBOX_EVENTS_MAX)
        self._tasks: asyncio.TaskGroup | None = None
        self._watches: dict[str, asyncio.Task[None]] = {}
        self._preparing: dict[str, Preparing] = {}
        self._changed = asyncio.Condition()
        self._remarked_s: dict[str, float] = {}
        self._teller = Teller(log)
        self._waits: dict[str, Backoff] = {}  # by the names of tags, of which there are two dozen
        self._hushed = False
        self._busy_s = agent.settings.renew_every_s
        self._relist_s = agent.settings.reconcile_s  # an end that the shim could not forget is found again

    async def tell(self, event: Happening) -> None:
        """Give the agent an event from outside."""
        await self._inbox.put(event)

    async def until(self, condition: Callable[[Agent], bool], timeout_s: float) -> bool:
        """Wait until something is true of the agent; False when the time is over first."""
        try:
            async with asyncio.timeout(timeout_s), self._changed:
                await self._changed.wait_for(lambda: condition(self.agent))
        except TimeoutError:
            return False
        return True

    async def run(self) -> None:
        """Turn until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            self._tasks = tasks
            tasks.create_task(self._follow_runtime(), name="runtime events")
            while True:
                events = await self._gather()
                for effect in self.agent.handle(boot_time_s(), wall_ms(), *events):
                    self._carry_out(effect)
                async with self._changed:
                    self._changed.notify_all()

    async def _gather(self) -> list[Happening]:
        next_s = self.agent.next_s
        wait_s = IDLE_S if next_s is None else min(max(0.0, next_s - boot_time_s()), IDLE_S)
        events: list[Happening] = []
        try:
            async with asyncio.timeout(wait_s):
                events.append(await self._inbox.get())
        except TimeoutError:
            events.append(Tick())
        while len(events) < TURN_EVENTS_MAX and not self._inbox.empty():
            events.append(self._inbox.get_nowait())
        return events

    def hush(self) -> None:
        """The node is being stopped: that its connections break is no news."""
        self._hushed = True

    def _remark(self, what: str, error: Exception) -> None:
        """Say that something had no answer: once for each cause, not each of hundreds of times. A node that was
        revoked stays up, or what starts daemons would start it again and again, and asks for ever."""
        now_s = boot_time_s()
        fresh = now_s - self._remarked_s.get(what, -math.inf) >= REMARK_EVERY_S
        if fresh and not self._hushed and self._teller.tell(f"{what}: {error}"):
            self._remarked_s[what] = now_s
        else:
            log.debug("%s: %s", what, error)

    # --- effects ---

    def _carry_out(self, effect: Effect) -> None:
        match effect:
            case Commit():
                self._spawn(self._commit(effect))
            case Read():
                self._spawn(self._read(effect))
            case List():
                self._spawn(self._list(effect))
            case Watch():
                self._end_watch(effect.tag)
                self._watches[effect.tag] = self._spawn(self._watch(effect))
            case Unwatch():
                self._end_watch(effect.tag)
            case GrantLease():
                self._spawn(self._grant(effect))
            case KeepAlive():
                self._spawn(self._keep_alive(effect))
            case RevokeLease():
                self._spawn(self._revoke(effect))
            case Remember():
                self._spawn(self._write_down(effect))
            case Start():
                self._spawn(self._start(effect))
            case Begin():
                self._begin(effect)
            case Stop():
                self._stop(effect)
            case Forget():
                self._spawn(self._quietly(self._runtime.forget(effect.key)))
            case ListRuntime():
                self._spawn(self._quietly(self._list_runtime()))
            case RenewRuntime():
                self._spawn(self._quietly(self._runtime.renew(effect.renewed_at_s)))
            case Archive():
                self._spawn(self._archive(effect))
            case Notice():
                self._teller.tell(effect.text, logging.WARNING)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        assert self._tasks is not None  # noqa: S101 - only called from run
        return self._tasks.create_task(work)

    def _end_watch(self, tag: str) -> None:
        task = self._watches.pop(tag, None)
        if task is not None:
            task.cancel()

    async def _commit(self, effect: Commit) -> None:
        # A renewal or description that takes longer than until the next one is worth nothing.
        timeout_s = self._busy_s if effect.tag in ("renew", "advertise") else 5.0
        try:
            result: Result | Rejected | None = await self._store.commit(effect.txn, timeout_s=timeout_s)
        except (OutcomeUnknown, StoreUnavailable) as e:  # also a store that is full: later it will not be
            self._remark("no answer to a write", e)
            result = None
        except Denied as e:
            await self._refused(e)
            result = None
        except UserError as e:
            self._remark(f"the store refuses to write ({_name_of(effect.tag)})", e)
            result = Rejected(e.message) if e.reason in NEVER else None
        await self._pace(effect.tag, failed=result is None or isinstance(result, Rejected))
        await self.tell(CommitDone(effect.tag, result))

    async def _pace(self, tag: Tag, *, failed: bool) -> None:
        """After a failure keep its answer for a while, longer each time and by chance: the agent tries again half a
        second after it. So a store that comes back is not met by all nodes at once, each with all that it has."""
        name = _name_of(tag)
        if not failed:
            self._waits.pop(name, None)
        elif name not in UNPACED:
            wait = self._waits.get(name)
            if wait is None:
                self._waits[name] = Backoff(PAUSE_FIRST_S, PAUSE_MOST_S)  # not at once: one failure is nothing
            else:
                await wait.pause()

    async def _refused(self, error: Denied) -> None:
        """The gateway does not let this node in: no answer to what was asked. The agent decides what follows."""
        self._remark("the cluster does not let this node in", error)
        await self.tell(Refused(error.message))

    async def _read(self, effect: Read) -> None:
        try:
            snapshot = await self._store.read(effect.keys)
        except Denied as e:
            await self._refused(e)
            await self.tell(ReadDone(effect.tag, None))
            return
        except (StoreUnavailable, UserError) as e:  # the latter: what a voter cannot tell this node now
            self._remark("no answer to a read", e)
            await self._pace(effect.tag, failed=True)
            await self.tell(ReadDone(effect.tag, None))
            return
        await self._pace(effect.tag, failed=False)
        entries = {k: entry_of(v) for k, v in snapshot.entries.items()}
        await self.tell(ReadDone(effect.tag, Reading(snapshot.revision, entries)))

    async def _list(self, effect: List) -> None:
        try:
            page = await self._store.list(effect.prefix, after=effect.after, limit=effect.limit)
        except (StoreUnavailable, Compacted, UserError) as e:  # a long list is read in pages, all at one revision
            self._remark("no answer to a list", e)
            await self._pace(effect.tag, failed=True)
            await self.tell(ListDone(effect.tag, None))
            return
        await self._pace(effect.tag, failed=False)
        entries = tuple(entry for kv in page.entries if (entry := entry_of(kv)) is not None)
        await self.tell(ListDone(effect.tag, Listing(page.revision, entries, page.more, page.total)))

    async def _watch(self, effect: Watch) -> None:
        try:
            async for changes in self._store.watch(effect.prefix, start=effect.start):
                told = tuple(Change(c.key, entry_of(c.value), c.revision) for c in changes.events)
                if told:
                    await self.tell(Changed(effect.tag, effect.serial, told, changes.revision))
        except (Compacted, StoreUnavailable, UserError) as e:
            self._remark("a watch ended and begins again", e)
        await self.tell(WatchLost(effect.tag, effect.serial))

    async def _grant(self, effect: GrantLease) -> None:
        try:
            lease = await self._store.grant_lease(effect.ttl_s)
        except (OutcomeUnknown, StoreUnavailable, UserError) as e:
            self._remark("no lease", e)
            lease = None
        await self.tell(LeaseGranted(effect.tag, lease))

    async def _keep_alive(self, effect: KeepAlive) -> None:
        ttl_s: float | NoAnswer | None
        try:
            ttl_s = await self._store.keep_alive(effect.lease, timeout_s=self._busy_s)
        except (OutcomeUnknown, StoreUnavailable, UserError) as e:
            self._remark("no answer to keeping a lease alive", e)
            ttl_s = NoAnswer.UNKNOWN
        await self.tell(KeptAlive(effect.tag, effect.lease, ttl_s))

    async def _revoke(self, effect: RevokeLease) -> None:
        try:
            await self._store.revoke_lease(effect.lease)
        except (OutcomeUnknown, StoreUnavailable, UserError) as e:
            self._remark("a lease was not revoked and will run out", e)

    async def _write_down(self, effect: Remember) -> None:
        try:
            await asyncio.to_thread(self._remember, effect.incarnation)
        except UserError as e:
            log.error("%s", e)
            await self.tell(Remembered(effect.incarnation, done=False))
        else:
            await self.tell(Remembered(effect.incarnation, done=True))

    async def _archive(self, effect: Archive) -> None:
        done, why = await self._archivist.archive(effect.node, effect.records)
        await self.tell(Archived(effect.office, effect.node, done, why))

    # --- the runtime ---

    async def _start(self, effect: Start) -> None:
        key = attempt_key(effect.spec.id, effect.attempt)
        try:
            launch = launch_of(effect, self._launch, await self._open(effect.spec))
        except CannotOpen as e:
            log.warning("%s: %s", key, e)
            refused = Exit(e.reason, message=str(e), ended_ms=wall_ms())
            await self.tell(Started(key, effect.token, refused))
            return
        try:
            ready = await self._prepare(launch)
            ended = ready if isinstance(ready, Exit) else await self._runtime.start(ready)
        except RuntimeUnavailable as e:
            log.warning("%s: the runtime does not answer: %s", launch.key, e)
            await self.tell(Started(launch.key, effect.token, NoAnswer.UNKNOWN))
        except UserError as e:  # nothing that this or any other node could run: the task's fault, not the node's
            refused = Exit(Reason.SPAWN_FAILED, message=e.message, ended_ms=wall_ms())
            await self.tell(Started(launch.key, effect.token, refused))
        else:
            await self.tell(Started(launch.key, effect.token, ended))

    async def _prepare(self, launch: Launch) -> Launch | Exit:
        """Bring in what a container needs, which may take long, and wait until it may begin: until then a stop ends it
        at once."""
        if launch.wants is None:
            return await self._runtime.prepare(launch)
        preparing = Preparing(asyncio.timeout(None), asyncio.Event())
        self._preparing[launch.key] = preparing
        try:
            async with preparing.scope:
                ready = await self._runtime.prepare(launch)
                if not isinstance(ready, Exit):
                    await self.tell(Prepared(launch.key))
                    await preparing.go.wait()
                return ready
        except TimeoutError:
            if not preparing.scope.expired():
                raise
            return Exit(Reason(preparing.why), message="before it was started", ended_ms=wall_ms())
        finally:
            self._preparing.pop(launch.key, None)

    def _begin(self, effect: Begin) -> None:
        preparing = self._preparing.pop(effect.key, None)  # what is to end it from now on is the runtime's business
        if preparing is not None:
            preparing.go.set()

    def _stop(self, effect: Stop) -> None:
        preparing = self._preparing.get(effect.key)
        if preparing is None:
            self._spawn(self._quietly(self._runtime.stop(effect.key, effect.why)))
        elif not preparing.why:
            preparing.why = effect.why
            preparing.scope.reschedule(asyncio.get_running_loop().time())

    async def _open(self, spec: TaskSpec) -> Opened:
        if spec.sealed is None and not spec.secrets:
            return Opened(spec)
        if self._vault is None:
            raise CannotOpen(Reason.NODE_UNFIT, "this node belongs to no secured cluster, and can open nothing sealed")
        return await self._vault.open_task(spec)

    async def _quietly(self, request: Coroutine[Any, Any, None]) -> None:
        try:
            await request
        except RuntimeUnavailable as e:
            self._remark("the runtime did not take a request; it is made again when it is back", e)

    async def _list_runtime(self) -> None:
        held = await self._runtime.held()
        now_held = (HeldAttempt(h.key, Revision(h.token), IncarnationId(h.incarnation), h.exit) for h in held)
        await self.tell(RuntimeListed(tuple(now_held)))

    async def _follow_runtime(self) -> None:
        """List what is held, then pass on the ends; again after every loss, and now and then for safety.

        A listing asks all shims, and one that hangs may not keep back what the others say: after a first listing, with
        which all begins, ends are passed on between tries.
        """
        is_known = False
        while True:
            ends = self._runtime.events()  # before it is asked: none comes between
            pass_on_s = self._relist_s
            try:
                try:
                    await self._list_runtime()
                    is_known = True
                except RuntimeUnavailable as e:
                    self._teller.tell(f"the runtime does not answer: {e}", logging.WARNING)
                    pass_on_s = UNLISTED_S
                if is_known:
                    async with asyncio.timeout(pass_on_s):
                        await self._pass_on(ends)
            except TimeoutError:
                continue
            except RuntimeUnavailable as e:
                self._teller.tell(f"the runtime does not answer: {e}", logging.WARNING)
            await asyncio.sleep(RUNTIME_RETRY_S)

    async def _pass_on(self, ends: AsyncIterator[Exited | ShimLost]) -> None:
        """Until the connection to the shim is lost."""
        async for event in ends:
            match event:
                case Exited(key, exit_):
                    await self.tell(AttemptEnded(key, exit_))
                case ShimLost():
                    log.warning("the connection to the shim is lost; if it has died, so has all that it held")
                    return
