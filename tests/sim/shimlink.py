"""A machine's way to its shim: requests in order over one connection, answers and ends back."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from spinetta.events import (
    AttemptEnded,
    Forget,
    Happening,
    NoAnswer,
    RenewRuntime,
    Start,
    Started,
    Stop,
    attempt_key,
)
from spinetta.model import NodeId
from spinetta.settings import AgentSettings
from tests.sim.link import Daemon
from tests.sim.shim_model import ShimModel

if TYPE_CHECKING:
    from tests.sim.world import World

WIRE_S = 0.001  # daemon to shim and back; constant, because a socket keeps the order
EPSILON_S = 1e-6
SLOW_DISK_S = 1.5  # what a request to the shim takes at most when its disk is slow


class ShimLink:
    """The part of a machine that talks with the shim, and lets it do what is due."""

    world: World
    name: NodeId
    rng: random.Random
    chance: random.Random
    settings: AgentSettings
    daemon: Daemon | None
    up: bool
    shim: ShimModel
    shim_up: bool
    shim_free_s: float
    connected: bool
    _shim_wake_s: float

    def clock(self) -> float:
        """Seconds on this machine's own clock."""
        raise NotImplementedError

    def at(self, clock_s: float) -> float:
        """When, in the world's time, this machine's clock will show that."""
        raise NotImplementedError

    def disconnect(self, for_s: float) -> None:
        """The shim does not answer for a while."""
        raise NotImplementedError

    def passes(self, what: str) -> str:
        """A point has been reached; what is to become of the request at hand."""
        raise NotImplementedError

    def _post(self, daemon: Daemon, delay_s: float, event: Happening) -> None:
        """The daemon hears of it after a while, if it is still the same."""
        raise NotImplementedError

    def _shim_wire_s(self) -> float:
        """How long the next request to the shim takes: those before it, and a disk that may be slow, come first."""
        if self.world.rates.slow_disk and self.chance.random() < self.world.rates.slow_disk:
            self.shim_free_s = max(self.shim_free_s, self.world.now) + self.chance.uniform(0.0, SLOW_DISK_S)
            self.world.tally["shim held up by its disk"] += 1
        return max(WIRE_S, self.shim_free_s - self.world.now)

    # --- the shim ---

    def _to_shim(self, daemon: Daemon, effect: Start | Stop | Forget | RenewRuntime) -> None:
        if not self.connected:
            if isinstance(effect, Start):
                self._post(daemon, self.rng.uniform(0.0, 0.3), _unanswered(effect))
            return
        arrives = True
        if isinstance(effect, Start) and self.rng.random() < self.world.rates.runtime:
            # The daemon gives the connection up, and lists again over a new one.
            arrives = self.rng.random() < 0.5
            self._post(daemon, self.rng.uniform(0.0, 0.3), _unanswered(effect))
            if arrives:
                self.world.after(self._shim_wire_s(), self._at_shim, daemon, effect, False)
            self.disconnect(self.rng.uniform(0.01, 0.5))
            return
        self.world.after(self._shim_wire_s(), self._at_shim, daemon, effect, True)

    def _at_shim(self, daemon: Daemon, effect: Start | Stop | Forget | RenewRuntime, answers: bool) -> None:
        if self.world.striker is not None:
            self.passes("at the shim")
        if not self.up or not self.shim_up:
            if isinstance(effect, Start) and answers:
                self._post(daemon, 0.1, _unanswered(effect))
            return
        self.shim_moves()
        now = self.clock()
        match effect:
            case Start(spec, attempt, token):
                process, exit_ = self.shim.start(effect, now)
                if process is not None:
                    self.world.log(self.name, f"process {process.key} runs until {self.at(process.ends_s):.3f}")
                    self.world.checker.started(self.name, process)
                if answers:
                    if self.connected:
                        self._post(daemon, WIRE_S, Started(attempt_key(spec.id, attempt), token, exit_))
                    else:
                        self._post(daemon, 0.1, _unanswered(effect))
            case Stop(key, why):
                held = self.shim.held.get(key)
                if held is not None and held.exit is None:
                    self.world.checker.stopped(self.name, held, why)
                self.shim.stop(key, why, now)
            case Forget(key):
                self.shim.forget(key, self.clock())
            case RenewRuntime(at_s):
                self.shim.renew(at_s)
        self.shim_moves()
        if self.world.striker is not None:
            self.passes("done by the shim")

    def shim_moves(self) -> None:
        """Let the shim do what is due, and come back when more is."""
        if not self.up:
            return
        for process in self.shim.advance(self.clock()):
            assert process.exit is not None
            self.world.log(self.name, f"process {process.key} ended: {process.exit.reason} {process.exit.exit_code}")
            self.world.checker.ended(process)
            if self.daemon is not None and self.connected:
                self._post(self.daemon, WIRE_S, AttemptEnded(process.key, process.exit))
                if self.rng.random() < self.world.rates.repeat:
                    delay_s = self.rng.choice((WIRE_S, 0.05, 1.0))
                    self._post(self.daemon, delay_s, AttemptEnded(process.key, process.exit))
        wake_s = self.at(self.shim.next_s) + EPSILON_S
        if wake_s < float("inf") and wake_s != self._shim_wake_s:
            self._shim_wake_s = wake_s
            self.world.at(wake_s, self._shim_due, wake_s)

    def _shim_due(self, at_s: float) -> None:
        if self._shim_wake_s == at_s:
            self._shim_wake_s = float("inf")
            self.shim_moves()

    def check_deadlines(self) -> None:
        """Nothing executes past its deadline and the margin."""
        now = self.clock()
        for process in self.shim.alive():
            limit_s = (self.shim.renewed_at_s or 0.0) + process.grace_s
            self.world.checker.overdue(self.name, process, now - limit_s)


def _unanswered(start: Start) -> Started:
    return Started(attempt_key(start.spec.id, start.attempt), start.token, NoAnswer.UNKNOWN)
