"""Keeping the keys of labels: made when there is none, handed to nodes newly cleared, replaced when one no longer is.

Every node looks every few seconds and does what `labelkeys` says is its turn. Nodes with direct access to the store do
more: after a key has been replaced they seal the shares of waiting tasks and of secrets to the new one, and drop the
old one once nothing refers to it.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable, Collection, Sequence

from spinetta import labelkeys
from spinetta.access import MEMBERS, LabelGeneration, LabelKey, NodeRole, Wrap
from spinetta.errors import Denied, UserError
from spinetta.labelkeys import Create, Drop, HandOn, Replace, Step
from spinetta.model import NodeId
from spinetta.node.labeldesk import GUARDED_MAX, LabelDesk, LabelState
from spinetta.node.resealing import Resealer
from spinetta.node.trouble import TROUBLE, Teller
from spinetta.node.vault import Vault, wrap_for
from spinetta.trust.sealing import new_sealing_key, public_of

log = logging.getLogger("spinetta.node")

LOOK_AGAIN_S = 0.5  # while it is somebody else's turn, or nobody's yet; doubles up to LOOK_EVERY_S
LOOK_EVERY_S = 5.0  # how long a newly cleared node waits for its keys, at the most; `Vault.open` waits longer
STEPS_MAX = 50  # of one label in one look: 100 nodes each
DROP_AFTER_S = 600.0  # submits under way when a key was replaced have ended by then, however slow


class LabelKeeper:
    """Does what is to be done about the keys of the labels that this node is cleared for."""

    def __init__(
        self,
        desk: LabelDesk,
        vault: Vault,
        me: NodeId,
        role: NodeRole,
        clearances: Callable[[], Collection[str]],
        *,
        resealer: Resealer | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._desk = desk
        self._vault = vault
        self._me = me
        self._role = role
        self._clearances = clearances
        self._resealer = resealer
        self._clock = clock
        self._unused: dict[tuple[str, int], float] = {}
        self._teller = Teller(log)

    async def run(self) -> None:
        """Look, for ever."""
        unsettled = 0
        while True:
            try:
                unsettled = 0 if await self.look() else min(unsettled + 1, 10)
            except UserError as e:
                self._teller.tell(f"the keys of labels: {e}", _level(e))
            except TROUBLE as e:
                log.debug("the keys of labels are not looked at now: %s", e)
            # Apart from one another, so that the first to look has mostly done what the others would.
            wait_s = min(LOOK_AGAIN_S * 2 ** (unsettled - 1), LOOK_EVERY_S) if unsettled else LOOK_EVERY_S
            await asyncio.sleep(wait_s * random.uniform(0.7, 1.3))  # noqa: S311 - no secret

    async def look(self) -> bool:
        """Do all that it is this node's turn to do now. True: nothing is left to be done, by whomever.

        Raises:
            StoreUnavailable, OutcomeUnknown: look again later.
        """
        labels = sorted({*self._clearances(), MEMBERS})
        is_settled = True
        for state in await self._desk.states(labels):
            try:
                if state.key is not None:
                    self._vault.learn(state.key)
                is_settled = await self._settle(state) and is_settled
            except UserError as e:  # of this label only: the others are not to wait for it
                self._teller.tell(f"the key of label {state.label}: {e}", _level(e))
                is_settled = False
        return is_settled

    async def _settle(self, state: LabelState) -> bool:
        for _ in range(STEPS_MAX):
            step = labelkeys.plan(state.label, state.key, state.cleared, self._droppable(state))
            if step is None:
                break
            if labelkeys.doer(step, state.key, state.cleared) != self._me:
                return False
            made = self._made(step, state)
            if made is None or not await self._desk.update(made, state.revision):
                return False
            log.info("label %s: %s", state.label, _told(step))
            fresh = await self._desk.states([state.label])
            if not fresh:
                return False
            state = fresh[0]
            if state.key is not None:
                self._vault.learn(state.key)
        await self._reseal(state)
        return True

    def _made(self, step: Step, state: LabelState) -> LabelKey | None:
        """The record that a step leads to; None when this node cannot do it after all."""
        match step:
            case Create(label, nodes):
                return LabelKey(label, (self._new_generation(label, 1, nodes),))
            case Replace(label, number, nodes):
                assert state.key is not None  # noqa: S101 - what is replaced was there
                return labelkeys.replaced(state.key, self._new_generation(label, number, nodes), state.cleared)
            case HandOn(label, missing):
                assert state.key is not None  # noqa: S101 - what is handed on was there
                wraps = self._wraps(label, missing)
                return labelkeys.extended(state.key, wraps) if wraps else None
            case Drop(_, numbers):
                assert state.key is not None  # noqa: S101 - what is dropped was there
                return labelkeys.without(state.key, numbers)

    def _new_generation(self, label: str, number: int, nodes: Sequence[labelkeys.Cleared]) -> LabelGeneration:
        private = new_sealing_key()
        first = sorted(nodes, key=lambda n: n.name != self._me)[:GUARDED_MAX]  # the others are handed it next
        wraps = (wrap_for(label, number, private, n.name, n.sealing_key) for n in first)
        return LabelGeneration(number, public_of(private), tuple(sorted(wraps, key=lambda w: w.node)))

    def _wraps(self, label: str, missing: Sequence[tuple[int, tuple[labelkeys.Cleared, ...]]]) -> dict[int, list[Wrap]]:
        wraps: dict[int, list[Wrap]] = {}
        nodes: set[str] = set()
        for number, lacking in missing:
            private = self._vault.private_of(label, number)
            for node in lacking if private is not None else ():
                if node.name in nodes or len(nodes) < GUARDED_MAX:
                    nodes.add(node.name)
                    wraps.setdefault(number, []).append(
                        wrap_for(label, number, private or b"", node.name, node.sealing_key)
                    )
        return wraps

    # --- after a key has been replaced -----------------------------------------------------------------------------

    def _droppable(self, state: LabelState) -> set[int]:
        due_s = self._clock() - DROP_AFTER_S
        return {number for (label, number), since_s in self._unused.items() if label == state.label and since_s < due_s}

    async def _reseal(self, state: LabelState) -> None:
        """Seal waiting things to the latest key, and remember which older ones nothing refers to any more."""
        key = state.key
        older = {g.number for g in key.generations[:-1]} if key is not None else set()
        for known in [k for k in self._unused if k[0] == state.label and k[1] not in older]:
            del self._unused[known]
        if key is None or not older or self._resealer is None or not self._is_first(state, key):
            return
        in_use = await self._resealer.run(key, self._vault.private_of)
        for number in older:
            if number in in_use:
                self._unused.pop((state.label, number), None)
            else:
                self._unused.setdefault((state.label, number), self._clock())

    def _is_first(self, state: LabelState, key: LabelKey) -> bool:
        """One of those that can do it does: voters that have the latest key."""
        able = [n for n in state.cleared if n.live and n.role is NodeRole.VOTER and labelkeys.has_wrap(key.latest, n)]
        step = Drop(state.label, ())
        return labelkeys.doer(step, key, able) == self._me


def _level(error: UserError) -> int:
    return logging.INFO if isinstance(error, Denied) else logging.WARNING


def _told(step: Step) -> str:
    match step:
        case Create(_, nodes):
            return f"a key is made, for {len(nodes)} nodes"
        case HandOn(_, missing):
            names = sorted({n.name for _, nodes in missing for n in nodes})
            return f"the key is handed to {', '.join(names[:5])}{' and others' if len(names) > 5 else ''}"
        case Replace(_, number, nodes, withdrawn):
            why = f"without {', '.join(withdrawn)}" if withdrawn else "nobody has the old one"
            return f"key {number} is made, for {len(nodes)} nodes, {why}"
        case Drop(_, numbers):
            return f"nothing is sealed to key {', '.join(map(str, numbers))} any more"
