"""A machine's way to the store: requests that are lost, late or unanswered, and watches that lag and break."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from spinetta.agent import Agent
from spinetta.errors import Compacted
from spinetta.events import Changed, Effect, Happening, KeepAlive, KeptAlive, Start, Watch, WatchLost
from spinetta.model import NodeId, Revision
from spinetta.settings import AgentSettings
from spinetta.store.protocol import Changes
from tests.sim.direct import answer_of, changed_of, no_answer_of
from tests.sim.points import REQUEST

if TYPE_CHECKING:
    from tests.sim.world import World

ANSWER_LIMIT_S = 1.0  # after it the daemon is told that nobody answered
LATE_S = 2.5  # how long after that a request may still arrive
STUCK_S = 4.0  # how long a request of a daemon that has died may be held up
LOST_IN_ELECTION, UNSAID_IN_ELECTION = 0.35, 0.3  # of the requests that arrive while the store has no leader


@dataclass
class Seen:
    """A watch as the store serves it."""

    tag: str
    serial: int
    prefix: str
    start: Revision
    next: Revision
    pumping: bool = False
    over: bool = False


@dataclass
class Daemon:
    """One life of a daemon: what it knows is lost with it."""

    agent: Agent
    inbox: list[Happening] = field(default_factory=list)
    watches: dict[str, Seen] = field(default_factory=dict)
    preparing: dict[str, Start] = field(default_factory=dict)
    turn_at_s: float | None = None
    wake_at_s: float | None = None
    paused_until_s: float = 0.0
    turns: int = 0
    effects: int = 0


@dataclass(slots=True)
class _Asked:
    daemon: Daemon
    effect: Effect
    no_answer: Happening | None
    over: bool = False
    stuck: bool = False


class StoreLink:
    """The part of a machine that talks with the store."""

    world: World
    name: NodeId
    rng: random.Random
    settings: AgentSettings
    daemon: Daemon | None
    chance: random.Random
    cut_until_s: float
    cut_mode: str

    def passes(self, what: str) -> str:
        """A point has been reached; what is to become of the request at hand."""
        raise NotImplementedError

    def _post(self, daemon: Daemon, delay_s: float, event: Happening) -> None:
        """The daemon hears of it after a while, if it is still the same."""
        raise NotImplementedError

    def _arrive(self, daemon: Daemon, event: Happening) -> None:
        """The daemon hears of it now."""
        raise NotImplementedError

    def cut(self) -> bool:
        """Whether it is cut off from the store now."""
        return self.world.now < self.cut_until_s

    def _latency_s(self) -> float:
        if self.rng.random() < self.world.rates.slow:
            return self.rng.uniform(0.0, 0.6)
        return self.rng.uniform(0.0005, 0.008)

    def _to_store(self, daemon: Daemon, effect: Effect) -> None:
        world, rates = self.world, self.world.rates
        asked = _Asked(daemon, effect, no_answer_of(effect))
        world.after(ANSWER_LIMIT_S, self._give_up, asked)
        fate = self.rng.random()
        if self._is_cut_from(effect):
            world.tally["request cut off"] += 1
            if self.cut_mode == "both" and self.rng.random() < 0.3:
                world.after(self.rng.uniform(0, ANSWER_LIMIT_S + LATE_S), self._reach_store, asked, False)
            return
        if self.cut() and self.cut_mode == "echo" and isinstance(effect, KeepAlive):
            # A former leader of the store that is frozen still answers keep-alives; the lease runs out all the same.
            world.tally["keep-alive echoed"] += 1
            answer = KeptAlive(effect.tag, effect.lease, float(self.settings.lease_ttl_s))
            world.after(self._latency_s(), self._answered, asked, answer)
            return
        if fate < rates.lost:
            world.tally["request lost"] += 1
            return
        if fate < rates.lost + rates.late:
            world.tally["request late"] += 1
            world.after(ANSWER_LIMIT_S + self.rng.uniform(-0.2, LATE_S), self._reach_store, asked, True)
            return
        world.after(self._latency_s(), self._reach_store, asked, fate > 1.0 - rates.answer_lost)

    def _is_cut_from(self, effect: Effect) -> bool:
        if not self.cut() or self.cut_mode == "answers":
            return False
        if self.cut_mode == "echo":
            return not isinstance(effect, KeepAlive)
        if self.cut_mode == "lease" and self.name in self.world.checker.nodes:
            # Renewals go through and keep-alives do not; all is dark once the lease has run out. No node can have
            # renewed later, so that whoever waits too short is found out.
            return isinstance(effect, KeepAlive)
        return self.cut_mode != "keep" or isinstance(effect, KeepAlive)

    def _is_dark(self) -> bool:
        """Whether no answers come."""
        if self.cut_mode == "lease":
            return self.cut() and self.name not in self.world.checker.nodes
        return self.cut() and self.cut_mode not in ("keep", "outward", "echo")

    def _is_deaf(self) -> bool:
        """Whether no events come: a member that is frozen has none."""
        return self._is_dark() or (self.cut() and self.cut_mode == "echo")

    def _reach_store(self, asked: _Asked, silent: bool) -> None:
        world = self.world
        if asked.daemon is not self.daemon and not asked.stuck:
            # It was under way when its daemon died, and may have been held up anywhere.
            asked.stuck = True
            if self.rng.random() < 0.4:
                world.after(self.rng.uniform(0.0, STUCK_S), self._reach_store, asked, silent)
                return
        if world.now < world.stalled_until_s:
            if world.electing:  # what a leader had taken in is lost with it, or was passed on and nobody says so
                fate = world.chance.random()
                if fate < LOST_IN_ELECTION:
                    world.tally["request lost in an election"] += 1
                    return
                silent = silent or fate < LOST_IN_ELECTION + UNSAID_IN_ELECTION
            world.at(world.stalled_until_s + self.rng.uniform(0, 0.01), self._reach_store, asked, silent)
            return
        fate_of_it = self.passes(REQUEST) if world.striker is not None else ""
        if fate_of_it == "lose":
            return
        if fate_of_it == "late":
            world.after(ANSWER_LIMIT_S + LATE_S / 2, self._reach_store, asked, True)
            return
        silent = silent or fate_of_it == "mute"
        answer = world.on_store(lambda: answer_of(world.model, asked.effect), self.name)
        world.tally["answer lost"] += silent
        if world.striker is not None:
            self.passes("done by the store")
        if world.trace:
            world.log(self.name, f"  * {type(asked.effect).__name__} {getattr(asked.effect, 'tag', '')} done: {answer}")
        if answer is not None and not silent and not self._is_dark():
            world.after(self._latency_s(), self._answered, asked, answer)

    def _answered(self, asked: _Asked, answer: Happening) -> None:
        if not asked.over and not self._is_dark():
            asked.over = True
            self._arrive(asked.daemon, answer)

    def _give_up(self, asked: _Asked) -> None:
        if not asked.over:
            asked.over = True
            if asked.no_answer is not None:
                self._arrive(asked.daemon, asked.no_answer)

    # --- watches ---

    def _watch(self, daemon: Daemon, effect: Watch) -> None:
        if daemon is not self.daemon:
            return
        old = daemon.watches.get(effect.tag)
        if old is not None and old.serial > effect.serial:
            return
        seen = Seen(effect.tag, effect.serial, effect.prefix, effect.start, effect.start)
        daemon.watches[effect.tag] = seen
        self._pump_later(daemon, seen, 0.0)

    def _end_watch(self, daemon: Daemon, tag: str) -> None:
        seen = daemon.watches.pop(tag, None)
        if seen is not None:
            if self.rng.random() < 0.3:  # what was already under way comes all the same
                self._pump(daemon, seen)
            seen.over = True

    def changed(self, batch: Changes) -> None:
        """The store has changed: whoever watches will hear of it."""
        daemon = self.daemon
        if daemon is None:
            return
        for seen in daemon.watches.values():
            if not seen.pumping and any(e.key.startswith(seen.prefix) for e in batch.events):
                self._pump_later(daemon, seen, self._watch_delay_s())

    def _watch_delay_s(self) -> float:
        if self.rng.random() < self.world.rates.slow_watch:
            return self.rng.uniform(0.0, 1.5)
        return self.rng.uniform(0.0005, 0.01)

    def _pump_later(self, daemon: Daemon, seen: Seen, delay_s: float) -> None:
        seen.pumping = True
        self.world.after(delay_s, self._pump, daemon, seen)

    def _pump(self, daemon: Daemon, seen: Seen) -> None:
        world = self.world
        seen.pumping = False
        if daemon is not self.daemon or seen.over:
            return
        if self._is_deaf() or world.now < world.stalled_until_s:
            if self._is_deaf() and self.rng.random() < 0.3:
                self.lose_watch(seen.tag)
            else:
                until_s = max(self.cut_until_s, world.stalled_until_s) - world.now
                self._pump_later(daemon, seen, min(until_s, 2.0) + self.rng.uniform(0.0, 0.05))
            return
        try:
            owed = world.model.events_since(seen.next, seen.prefix)
        except Compacted:
            self.lose_watch(seen.tag)
            return
        if len(owed) > 1 and self.rng.random() < 0.3:
            owed = owed[: self.rng.randint(1, len(owed))]
            self._pump_later(daemon, seen, self._watch_delay_s())
        if not owed:
            return
        seen.next = Revision(owed[-1].revision + 1)
        told = changed_of(seen.tag, seen.serial, owed)
        if world.rates.drop_event:
            kept = tuple(c for c in told.changes if self.rng.random() >= world.rates.drop_event)
            world.tally["event dropped"] += len(told.changes) - len(kept)
            told = Changed(told.tag, told.serial, kept, told.revision)
        if told.changes:
            self._post(daemon, 0.0, told)
            if world.rates.replay and self.chance.random() < world.rates.replay:
                self._replay(daemon, seen, told)

    def _replay(self, daemon: Daemon, seen: Seen, told: Changed) -> None:
        """The same delivery again, a little later; or the watch takes up again further back than it had come."""
        self.world.tally["events told again"] += 1
        if self.chance.random() < 0.5:
            self._post(daemon, self.chance.uniform(0.0, 1.0), told)
            return
        seen.next = Revision(max(seen.start, self.world.model.compacted + 1, seen.next - self.chance.randint(1, 8)))
        if not seen.pumping:
            self._pump_later(daemon, seen, self.chance.uniform(0.0, 0.5))

    def lose_watch(self, tag: str) -> None:
        """A watch breaks by itself."""
        daemon = self.daemon
        seen = daemon.watches.pop(tag, None) if daemon is not None else None
        if daemon is not None and seen is not None:
            seen.over = True
            self._post(daemon, self.rng.uniform(0.0, 0.05), WatchLost(tag, seen.serial))
