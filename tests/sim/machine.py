"""One machine of the simulated world: its clock, disk, shim and daemon, and the carrying out of effects."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import TYPE_CHECKING

from spinetta.agent import Agent
from spinetta.events import (
    Archive,
    Begin,
    Effect,
    Forget,
    Happening,
    ListRuntime,
    Notice,
    Remember,
    Remembered,
    RenewRuntime,
    RuntimeListed,
    Start,
    Stop,
    Unwatch,
    Watch,
)
from spinetta.model import IncarnationId, NodeId
from spinetta.settings import AgentSettings
from tests.sim.faults import Machine as MachinePlan
from tests.sim.invariants import Violated
from tests.sim.link import Daemon, StoreLink
from tests.sim.more import WILD_LAG_S
from tests.sim.preparing import PreparingLink
from tests.sim.shim_model import ShimModel
from tests.sim.shimlink import EPSILON_S, WIRE_S, ShimLink

if TYPE_CHECKING:
    from tests.sim.world import World

SLOW_DISK_S = 3.0  # what a write to disk takes at most when it is slow


class Machine(StoreLink, ShimLink, PreparingLink):
    """A node. What happens in it is scheduled in its world."""

    def __init__(self, world: World, plan: MachinePlan, settings: AgentSettings) -> None:
        self.world = world
        self.name: NodeId = plan.name
        self.settings = settings
        self.rng = random.Random(f"{world.plan.seed} {plan.name}")
        self.chance = random.Random(f"chance {world.plan.seed} {plan.name}")  # for what came later than the first seeds
        self.cuts = random.Random(f"cuts {world.plan.seed} {plan.name}")
        self.rate = plan.clock_rate
        self._clock_zero_s = plan.clock_s
        self.disk: IncarnationId | None = None
        self.daemon: Daemon | None = None
        self.up = False
        self.gone = False
        self.left = self.returning = False
        self.boots = 0
        self.crash_on: tuple[str, Callable[[], None], float, Callable[[], None]] | None = None
        self.rights_change_on: tuple[str, Callable[[], None]] | None = None
        self.cut_until_s = 0.0
        self.cut_mode = ""
        self.shim = self._new_shim()
        self.shim_up = True
        self.shim_free_s = 0.0
        self.connected = False
        self._shim_wake_s = float("inf")

    # --- time --------------------------------------------------------------------------------------------------

    def clock(self) -> float:
        """Seconds on this machine's own clock."""
        return self._clock_zero_s + self.world.now * self.rate

    def at(self, clock_s: float) -> float:
        """When, in the world's time, this machine's clock will show that."""
        return (clock_s - self._clock_zero_s) / self.rate

    def change_rate(self, rate: float) -> None:
        """From now on its clock runs at another rate; what is due by it comes when it shows that time."""
        shown_s = self.clock()
        self.rate = rate
        self._clock_zero_s = shown_s - self.world.now * rate
        self.shim_moves()
        if self.daemon is not None and self.daemon.wake_at_s is not None:
            next_s = self.daemon.agent.next_s
            if next_s is not None:
                self._wake_at(self.daemon, self.at(next_s) + EPSILON_S)

    # --- life --------------------------------------------------------------------------------------------------

    def boot(self) -> None:
        """The machine comes up, with nothing but its disk."""
        if self.gone or self.up:
            return
        self.boots += 1
        self.up = self.shim_up = True
        self.world.log(self.name, "boots")
        if self.boots > 1:
            self._clock_zero_s = self.rng.uniform(0.0, 100.0) - self.world.now * self.rate
        self.start_daemon()

    def start_daemon(self) -> None:
        """A new daemon, knowing what is on disk."""
        if self.daemon is not None or not self.up or self.gone:
            return
        self.left = False
        settings = self.settings
        self.daemon = Daemon(Agent(settings, self.disk))
        self.world.log(self.name, f"daemon starts, on disk: {self.disk}")
        self.connected = False
        self._tell_later(self.daemon, 0.0)
        self.world.after(self.rng.uniform(0.0, 0.05), self.connect, self.daemon)

    def crash_daemon(self) -> None:
        """The daemon is gone; the shim, and requests that are under way, go on."""
        if self.daemon is not None:
            self.world.log(self.name, "daemon crashes")
            self.daemon = None
            self.connected = False

    def stop_daemon(self, for_s: float) -> None:
        """The daemon has ended in order; the next one comes after a while."""
        self.crash_daemon()
        self.world.after(for_s, self.start_daemon)

    def crash(self) -> None:
        """Power off."""
        if not self.up:
            return
        self.world.log(self.name, "machine crashes")
        self.crash_daemon()
        self._shim_dies()
        if self.world.plan.unsynced:
            self.world.tally["records unsynced"] += self.shim.lose_power(self.clock(), self.cuts)
        self.up = False

    def wipe(self) -> None:
        """Its disk is lost, too."""
        self.disk = None
        self.shim.held.clear()

    def when_it_does(self, tag: str, crash: Callable[[], None], back_s: float, back: Callable[[], None]) -> None:
        """Crash now, or as soon as a transaction with this tag has been sent."""
        if tag:
            self.crash_on = (tag, crash, back_s, back)
        else:
            crash()
            self.world.after(back_s, back)

    def crash_shim(self, back_after_s: float) -> None:
        """The shim alone dies; the daemon starts a new one."""
        if not self.up or not self.shim_up:
            return
        self.world.log(self.name, "shim crashes")
        self._shim_dies()
        self.shim_up = self.connected = False
        self.world.after(back_after_s, self._shim_back)

    def _shim_back(self) -> None:
        self.shim_up = True
        if self.daemon is not None:
            self.connect(self.daemon)

    def _shim_dies(self) -> None:
        for process in self.shim.die():
            self.world.checker.ended(process)
        self.shim_up = self.connected = False

    def _new_shim(self) -> ShimModel:
        return ShimModel(
            self.settings.kill_margin_s,
            lambda start: self.world.script(start.spec.id, start.attempt),
            self._lag_s,
        )

    def _lag_s(self) -> float:
        if self.world.plan.wild:
            return self.chance.uniform(0.0, WILD_LAG_S)
        return self.rng.uniform(0.0, self.settings.kill_margin_s * 0.95)

    def passes(self, what: str) -> str:
        """A point has been reached; what is to become of the request at hand. See `points`."""
        return self.world.striker.point(self, what) if self.world.striker is not None else ""

    def connect(self, daemon: Daemon) -> None:
        """The daemon connects to its shim and lists what it holds."""
        if daemon is not self.daemon or not self.shim_up:
            return
        self.connected = True
        self.world.after(max(WIRE_S, self.shim_free_s - self.world.now), self._list_runtime, daemon)

    def _list_runtime(self, daemon: Daemon) -> None:
        if daemon is self.daemon and self.connected:
            self.shim_moves()
            # Answers and ends take different ways through the daemon, so that one may overtake the other.
            self._post(daemon, WIRE_S + self.rng.choice((0.0, 0.002)), RuntimeListed(self.shim.listing()))

    def disconnect(self, for_s: float) -> None:
        """The shim does not answer for a while; then the daemon connects again."""
        if self.daemon is not None and self.connected:
            self.world.log(self.name, "shim does not answer")
            self.connected = False
            self.world.after(for_s, self.connect, self.daemon)

    # --- turns -------------------------------------------------------------------------------------------------

    def tell(self, event: Happening) -> None:
        """An event from outside."""
        if self.daemon is not None:
            self._post(self.daemon, 0.0, event)

    def _post(self, daemon: Daemon, delay_s: float, event: Happening) -> None:
        self.world.after(delay_s, self._arrive, daemon, event)

    def _arrive(self, daemon: Daemon, event: Happening) -> None:
        if self.world.striker is not None and daemon is self.daemon:
            self.passes(f"told {type(event).__name__}")
        if daemon is self.daemon:
            daemon.inbox.append(event)
            self._tell_later(daemon, self.rng.choice((0.0, 0.0005)))

    def _tell_later(self, daemon: Daemon, delay_s: float) -> None:
        at_s = max(self.world.now + delay_s, daemon.paused_until_s)
        if daemon.turn_at_s is None or daemon.turn_at_s > at_s:
            daemon.turn_at_s = at_s
            self.world.at(at_s, self._turn, daemon, at_s)

    def _wake(self, daemon: Daemon, at_s: float) -> None:
        if daemon is self.daemon and daemon.wake_at_s == at_s:
            daemon.wake_at_s = None
            self._tell_later(daemon, 0.0)

    def _turn(self, daemon: Daemon, at_s: float) -> None:
        if daemon is not self.daemon or daemon.turn_at_s != at_s:
            return
        if self.world.now < daemon.paused_until_s:
            daemon.turn_at_s = None
            self._tell_later(daemon, 0.0)
            return
        daemon.turn_at_s = None
        events, daemon.inbox = daemon.inbox, []
        now = self.clock()
        if self.world.trace:
            for event in events:
                self.world.log(self.name, f"  < {event}")
        effects = daemon.agent.handle(now, int(self.world.now * 1000) + self.world.archives.epoch_ms, *events)
        daemon.turns += 1
        if not self._carry_out_all(daemon, effects):
            return
        next_s = daemon.agent.next_s
        if next_s is not None:
            if next_s <= now:
                raise Violated(0, f"{self.name} wants to be called again at {next_s}, which is not after {now}")
            self._wake_at(daemon, self.at(next_s) + EPSILON_S)
        if daemon.agent.left and not self.left:
            self.world.log(self.name, "has left")
            self.left = True
            self.daemon = None

    def _carry_out_all(self, daemon: Daemon, effects: list[Effect]) -> bool:
        """One after the other; False when the daemon died meanwhile."""
        for done, effect in enumerate(effects):
            if self.world.striker is not None:
                self.passes(type(effect).__name__)
                if daemon is not self.daemon:
                    return False
                if self.world.now < daemon.paused_until_s:  # frozen between two of them: the rest comes later
                    self.world.at(daemon.paused_until_s, self._go_on, daemon, effects[done:])
                    return True
            if self.world.trace:
                self.world.log(self.name, f"  > {effect}")
            self._carry_out(daemon, effect)
            if self.rights_change_on is not None and getattr(effect, "tag", "") == self.rights_change_on[0]:
                self.world.after(self.rng.uniform(0.0, 0.01), self.rights_change_on[1])
                self.rights_change_on = None
            if self.crash_on is not None and getattr(effect, "tag", "") == self.crash_on[0]:
                _, crash, back_s, back = self.crash_on
                self.crash_on = None
                crash()
                self.world.after(back_s, back)
                return False
        return True

    def _go_on(self, daemon: Daemon, effects: list[Effect]) -> None:
        if daemon is self.daemon or daemon.agent.left:
            self._carry_out_all(daemon, effects)

    def _wake_at(self, daemon: Daemon, at_s: float) -> None:
        if daemon.wake_at_s is None or at_s != daemon.wake_at_s:
            daemon.wake_at_s = at_s
            self.world.at(at_s, self._wake, daemon, at_s)

    # --- effects -----------------------------------------------------------------------------------------------

    def _carry_out(self, daemon: Daemon, effect: Effect) -> None:
        match effect:
            case Start(spec) if spec.container is not None:
                self._prepare(daemon, effect)
            case Begin(key):
                self._to_shim(daemon, daemon.preparing.pop(key))
            case Stop(key) if key in daemon.preparing:
                self._end_preparing(daemon, effect)
            case Start() | Stop() | Forget() | RenewRuntime():
                self._to_shim(daemon, effect)
            case ListRuntime():
                if self.connected:
                    self.world.after(self._shim_wire_s(), self._list_runtime, daemon)
            case Watch():
                self.world.after(self._latency_s(), self._watch, daemon, effect)
            case Unwatch(tag):
                self._end_watch(daemon, tag)
            case Remember(incarnation):
                delay_s = self.rng.uniform(0.001, 0.03)
                if self.world.rates.slow_disk and self.chance.random() < self.world.rates.slow_disk:
                    delay_s += self.chance.uniform(0.0, SLOW_DISK_S)
                    self.world.tally["disk slow"] += 1
                self.world.after(delay_s, self._remember, daemon, incarnation)
            case Archive():
                self.world.archives.carry_out(self, daemon, effect)
            case Notice(text):
                self.world.log(self.name, f"NOTICE {text}")
            case _:
                self._to_store(daemon, effect)

    def _remember(self, daemon: Daemon, incarnation: IncarnationId) -> None:
        if self.world.striker is not None:
            self.passes("remembers")
        if daemon is not self.daemon:
            return
        fails = self.rng.random() < self.world.rates.disk
        if not fails or self.rng.random() < 0.5:  # what failed may have been written all the same
            self.disk = incarnation
        self.world.tally["disk failed"] += fails
        self._post(daemon, 0.0, Remembered(incarnation, not fails))
