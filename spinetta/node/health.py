"""How the store stands, as this node sees it: whether it takes writes, how full it is, and why a call failed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from spinetta import upkeep
from spinetta.errors import OutcomeUnknown, SpinettaError, StoreFull, StoreUnavailable, UserError
from spinetta.store.connection import Connections
from spinetta.store.maintenance import look, own_status, view_of
from spinetta.store.members import Member, MemberStatus
from spinetta.upkeep import EtcdView

GLANCE_EVERY_S = 3.0  # at the nearest member: at 10,000 tasks a second 3 % of the quota go by meanwhile
GLANCE_EVERY_ILL_S = 1.0
FRESH_S = 2.0  # a view of all members this old still explains a failure
LOST_AFTER_S = 2.0  # an election takes about a second, and calls outlast it
SAME_IDS = "submit the same tasks with the same ids again: those that are there already are not made twice"


class StoreHealth:
    """Looks at the nearest member now and then, and at all of them when something is wrong or somebody asks.

    Args:
        connections: of the node's store.
        quota_bytes: of etcd's database: the setting of this node, which should be that of all.
        cluster_id: of the cluster, as this node remembers it.
    """

    def __init__(
        self,
        connections: Connections,
        quota_bytes: int,
        cluster_id: Callable[[], str],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.quota_bytes = quota_bytes
        self.members: tuple[Member, ...] = ()
        self._connections = connections
        self._cluster_id = cluster_id
        self._clock = clock
        self._nearest: EtcdView | None = None
        self._taken_bytes = 0  # by submits since the glance that told `_nearest`
        self._view: EtcdView | None = None
        self._seen_s = float("-inf")
        self._lost_since_s: float | None = None
        self._looking = asyncio.Lock()
        self._glancing = asyncio.Lock()

    @property
    def cluster_id(self) -> str:
        """Etcd's, hexadecimal."""
        return self._cluster_id()

    async def run(self) -> None:
        """Look until cancelled."""
        while True:
            ill = await self.glance()
            if ill:
                await self.look()
            else:
                self._lost_since_s = None
            await asyncio.sleep(GLANCE_EVERY_ILL_S if ill else GLANCE_EVERY_S)

    async def glance(self) -> bool:
        """Look at the nearest member; True: something is wrong."""
        try:
            status = await own_status(self._connections)
        except StoreUnavailable:
            self._nearest, self._taken_bytes = None, 0  # how full it is, is not known
            return True
        self._nearest, self._taken_bytes = view_of([_member(status)], {status.member_id: status}), 0
        return not status.healthy

    async def look(self, *, max_age_s: float = 0.0) -> EtcdView:
        """All members, seen now or so long ago at most. About three seconds at the longest; never fails."""
        asked_s = self._clock()
        async with self._looking:
            # Whoever waited for somebody else's look has what it came for.
            if self._view is None or self._seen_s < asked_s - max_age_s:
                seen_s = self._clock()
                self._view, self.members = await look(self._connections.endpoints, self.members, self._connections.tls)
                self._seen_s = seen_s
                if self._view.has_majority:
                    self._lost_since_s = None
                elif self._lost_since_s is None:
                    self._lost_since_s = seen_s
            return self._view

    def lost(self, *, named: bool = True) -> StoreUnavailable | None:
        """That the store takes no writes and answers no reads, when that has been seen for a while; None: it may."""
        now_s, since_s, view = self._clock(), self._lost_since_s, self._view
        if since_s is None or view is None or now_s < since_s + LOST_AFTER_S:
            return None
        if now_s - self._seen_s > GLANCE_EVERY_ILL_S + 2 * LOST_AFTER_S:  # nobody has looked lately
            return None
        return _no_majority(view, named=named)

    @property
    def is_full(self) -> bool:
        """The nearest member tells of the alarm NOSPACE."""
        return self._nearest is not None and bool(self._nearest.raised(upkeep.NOSPACE))

    async def room_for_submits(self, size_bytes: int) -> UserError | None:
        """As `refusal_of_submits`, from a new glance if much was taken since the last one: other nodes take, too."""
        if self._taken_much:
            async with self._glancing:
                if self._taken_much:  # whoever waited has what it came for
                    await self.glance()
        return self.refusal_of_submits(size_bytes)

    @property
    def _taken_much(self) -> bool:
        return self._taken_bytes >= upkeep.SUBMITS_LOOK_EACH * self.quota_bytes

    def refusal_of_submits(self, size_bytes: int) -> UserError | None:
        """Why tasks of this size may not be submitted now; None: they may, as far as is known, and are counted."""
        if self._nearest is None:
            return None
        words = upkeep.full_words(self._nearest, self.quota_bytes, self._taken_bytes)
        if words:
            return store_full(words)
        self._taken_bytes += size_bytes  # until the next glance: a quick client must not run past the limit by then
        return None

    async def explain(self, error: SpinettaError, *, named: bool = True) -> SpinettaError:
        """The error with what is behind it, if that is the store.

        `named`: the caller may know which voters there are.
        """
        if not isinstance(error, StoreUnavailable | OutcomeUnknown) or isinstance(error, StoreFull):
            return error
        if isinstance(error, StoreUnavailable) and error.reason != StoreUnavailable.reason:
            return error  # it says why already
        view = await self.look(max_age_s=FRESH_S)
        if view.has_majority:
            return error
        why = _no_majority(view, named=named)
        if isinstance(error, OutcomeUnknown):
            hint = f"{error.hint}; {upkeep.back_words(view)}" if error.hint else upkeep.back_words(view)
            return OutcomeUnknown(f"{error}; {upkeep.no_majority_words(view, named=named)}", hint=hint)
        return why

    def notices(self, view: EtcdView) -> list[str]:
        """What an administrator should know of it."""
        return upkeep.notices(view, self.quota_bytes)


def store_full(words: str) -> UserError:
    """A refused submit. Nothing was written."""
    return UserError(f"{words}: nothing was submitted", hint=upkeep.FULL_HINT, reason="store-full")


def _no_majority(view: EtcdView, *, named: bool) -> StoreUnavailable:
    cut_off = not any(m.answers for m in view.voters)
    return StoreUnavailable(
        f"{upkeep.no_majority_words(view, named=named)}; nothing has been changed",
        hint=upkeep.back_words(view),
        reason="cut-off" if cut_off else "no-quorum",
    )


def _member(status: MemberStatus) -> Member:
    return Member(status.member_id, "", (), (), status.learner)
