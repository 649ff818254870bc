"""What containers need is brought in: at once or in seconds; and images that take their machine down."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from spinetta.events import Happening, Prepared, Start, Started, Stop, attempt_key
from spinetta.model import Exit, NodeId, Reason
from tests.sim.link import Daemon

if TYPE_CHECKING:
    from tests.sim.world import World

HERE_S, BROUGHT_S = 0.05, 6.0  # what it takes at most, with the image at hand and without
BOOT_S = 9.0  # after which a machine is back at most that an image has taken down: most are given up by then


class PreparingLink:
    """The part of a machine that prepares containers."""

    world: World
    name: NodeId
    daemon: Daemon | None

    def crash(self) -> None:
        """Power off."""
        raise NotImplementedError

    def boot(self) -> None:
        """The machine comes up, with nothing but its disk."""
        raise NotImplementedError

    def _post(self, daemon: Daemon, delay_s: float, event: Happening) -> None:
        """The daemon hears of it after a while, if it is still the same."""
        raise NotImplementedError

    def _prepare(self, daemon: Daemon, start: Start) -> None:
        key = attempt_key(start.spec.id, start.attempt)
        chance = random.Random(f"prepare {self.world.plan.seed} {key}")
        daemon.preparing[key] = start
        takes_s = chance.uniform(0.0, chance.choice((HERE_S, BROUGHT_S)))
        if start.spec.id in self.world.plan.bombs and self.world.now < self.world.plan.horizon_s:
            self.world.after(chance.uniform(0.0, BROUGHT_S), self._blow_up, daemon, key, chance.uniform(1.0, BOOT_S))
        else:
            self.world.after(takes_s, self._prepared, daemon, key)

    def _prepared(self, daemon: Daemon, key: str) -> None:
        if daemon is self.daemon and key in daemon.preparing:
            self._post(daemon, 0.0, Prepared(key))

    def _blow_up(self, daemon: Daemon, key: str, back_s: float) -> None:
        if daemon is self.daemon and key in daemon.preparing:
            self.world.tally["taken down by an image"] += 1
            self.crash()
            self.world.after(back_s, self.boot)

    def _end_preparing(self, daemon: Daemon, stop: Stop) -> None:
        start = daemon.preparing.pop(stop.key)
        self._post(daemon, 0.0, Started(stop.key, start.token, Exit(Reason(stop.why), message="before it was started")))
