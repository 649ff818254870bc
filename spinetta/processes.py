"""What the runtime says of attempts on this node: which run, which have ended, and of which that is not known.

One of the two truths that `holdings` brings together. Answers and ends take different ways, come twice or not at all;
an attempt whose start was not answered may run, and is asked for until the runtime has said so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from spinetta.events import (
    AttemptEnded,
    Begin,
    Effect,
    Forget,
    ListRuntime,
    NoAnswer,
    RuntimeListed,
    Started,
    Stop,
)
from spinetta.model import Exit, Reason, Revision

RETRY_S = 0.5
STOP_AGAIN_S = 5.0  # a request that was lost is made again; one that was not changes nothing
PAST_MAX = 1024  # ends remembered after they were forgotten: about twice what a node may hold at once


class Processes:
    """The attempts that the runtime knows to run or has not forgotten, by their name on this node."""

    def __init__(self) -> None:
        self.known = False  # the runtime has said what it holds
        self.tokens: dict[str, Revision] = {}
        self.ends: dict[str, Exit] = {}
        self._past: dict[str, Exit] = {}  # of attempts that are forgotten: a listing that was under way may show them
        self._stopped: dict[str, float] = {}  # when the runtime was last asked to end it
        self._asked: dict[str, int] = {}  # starts that are to be answered
        self._preparing: dict[str, float] = {}  # of these, those that are not to begin yet, and since when
        self._prepared: set[str] = set()  # of these, those that could
        self._unsure: set[str] = set()  # starts that were not answered: they may run
        self._list_at_s: float | None = None  # when to ask the runtime what it holds

    # --- outside view ---

    @property
    def next_s(self) -> float | None:
        """When there is something to ask for again."""
        times = [self._list_at_s] if self._list_at_s is not None else []
        if self._stopped:
            times.append(min(self._stopped.values()) + STOP_AGAIN_S)
        return min(times, default=None)

    @property
    def nothing_runs(self) -> bool:
        """True once the runtime has said what it holds, none of it runs and nothing is being started."""
        sure = self.known and not self._asked and not self._unsure
        return sure and all(k in self.ends for k in self.tokens)

    def is_asked(self, key: str) -> bool:
        """Whether a start of it is to be answered."""
        return key in self._asked

    def is_preparing(self, key: str) -> bool:
        """Whether it was not told to begin, and can be ended at once until then."""
        return key in self._preparing

    def is_prepared(self, key: str) -> bool:
        """Whether it only waits for being told to begin."""
        return key in self._prepared

    def preparing_for_s(self, key: str, now: float) -> float:
        """How long it has been preparing; 0 for what is not."""
        return now - self._preparing.get(key, now)

    def may_run(self, key: str) -> bool:
        """Whether a start of it is to be answered, or was not: it must neither be started nor called "not started"."""
        return key in self._asked or key in self._unsure

    def is_past(self, key: str) -> bool:
        """Whether its end has been dealt with."""
        return key in self._past

    def end_of(self, key: str) -> Exit | None:
        """How it ended; None while that is not known. Also of what was ended for want of a key that has come back."""
        return self.ends.get(key) or (self._past.get(key) if key not in self.tokens else None)

    def forget_past(self) -> None:
        """Another life begins: what ended in an earlier one means nothing in it. Names may even come again, when the
        store has been restored from a backup."""
        self._past.clear()

    # --- from the runtime ---

    def listed(self, listed: RuntimeListed, now: float) -> None:
        """The runtime is connected (again): this is all it holds."""
        self.known = True
        self._stopped.clear()  # requests that were under way may have been lost: make them again
        # The listing may have been under way while other answers came: what is known to have ended stays so, and what
        # was running and is not shown is asked for once more.
        shown = {a.key: a.token for a in listed.held}
        ends = {**self._past, **self.ends, **{a.key: a.exit for a in listed.held if a.exit is not None}}
        self._unsure = {k for k in self.tokens if k not in shown and k not in self.ends}
        self._list_at_s = now + RETRY_S if self._unsure else None
        self.tokens = {**{k: token for k, token in self.tokens.items() if k in self.ends}, **shown}
        self.ends = {k: ends[k] for k in self.tokens if k in ends}

    def started(self, done: Started, now: float) -> list[Effect]:
        """The answer to a start."""
        left = self._asked.pop(done.key, 1) - 1
        if left:
            self._asked[done.key] = left
        else:
            self._leave(done.key)
        if isinstance(done.exit, NoAnswer):
            # It may run, so nothing is decided on it until the runtime has said what it holds.
            self._unsure.add(done.key)
            self._list_at_s = now + RETRY_S if self._list_at_s is None else self._list_at_s
            return []
        self._unsure.discard(done.key)
        if done.key in self._past and done.exit is not None:
            return [Forget(done.key)]
        self.tokens.setdefault(done.key, done.token)
        if done.exit is not None:
            self.ends[done.key] = done.exit
        return []

    def prepared(self, key: str) -> None:
        """All that it needs is here."""
        if key in self._preparing:
            self._prepared.add(key)

    def ended(self, ended: AttemptEnded, token: Revision) -> None:
        """A process is gone."""
        self.tokens.setdefault(ended.key, token)
        self.ends[ended.key] = ended.exit

    # --- what to do ---

    def ask(self, now: float) -> list[Effect]:
        """Ask the runtime what it holds, when it is time."""
        if self._list_at_s is None or self._list_at_s > now:
            return []
        self._list_at_s = now + STOP_AGAIN_S
        return [ListRuntime()]

    def start(self, key: str, now: float, *, prepares: bool) -> None:
        """It is being started; `prepares`: an image may have to be brought in first, and it waits for `begin`."""
        self._asked[key] = self._asked.get(key, 0) + 1
        if prepares:
            self._preparing[key] = now

    def begin(self, key: str) -> Effect:
        """It is told to begin: from now on it may run."""
        self._leave(key)
        return Begin(key)

    def _leave(self, key: str) -> None:
        self._preparing.pop(key, None)
        self._prepared.discard(key)

    def stop(self, key: str, why: Reason, now: float) -> list[Effect]:
        """Ask for its end, again only after a while."""
        if self._stopped.get(key, -math.inf) + STOP_AGAIN_S > now:
            return []
        self._stopped[key] = now
        return [Stop(key, why.value)]

    def let_run(self, key: str) -> None:
        """There is no reason any more to end it."""
        self._stopped.pop(key, None)

    def tend_strays(self, ours: Mapping[str, Revision], now: float) -> list[Effect]:
        """End, and then forget, what is not among those that the store says are ours."""
        effects: list[Effect] = []
        for key, token in list(self.tokens.items()):
            if ours.get(key) == token:
                continue
            if key in self.ends:
                effects += self._forget(key)
            else:
                effects += self.stop(key, Reason.FENCED, now)
        for key in self._preparing.keys() - set(ours) - set(self.tokens):
            effects += self.stop(key, Reason.FENCED, now)
        over = (k for k in self._stopped if k not in self._preparing and (k not in self.tokens or k in self.ends))
        for key in list(over):
            del self._stopped[key]
        return effects

    def _forget(self, key: str) -> list[Effect]:
        del self.tokens[key]
        self._past[key] = self.ends.pop(key)
        if len(self._past) > PAST_MAX:
            del self._past[next(iter(self._past))]
        return [Forget(key)]
