"""The archives of a simulated world: what of the finished tasks is on which machine's disk, and how writing it fails.

Draws on a chance of its own, so that worlds without it keep their stories.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import TYPE_CHECKING

from spinetta import codec
from spinetta.events import Archive, Archived
from spinetta.model import NodeId, State, TaskId
from spinetta.settings import AgentSettings
from tests.sim.link import Daemon

if TYPE_CHECKING:
    from tests.sim.machine import Machine
    from tests.sim.world import World

KIND = "collect"  # asked for by name
EPOCH_MS = 1 << 20  # later than the times that the tasks' ids tell: see `tests.builders.task_id`
SILENT_S = 1.0  # after which the leader is told that there was no answer


class Archives:
    """All of them."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.on = KIND in world.plan.kinds
        self.kept: dict[NodeId, set[TaskId]] = {}
        self._chance = random.Random(f"archives {world.plan.seed}")
        self._after_s, self._keep = self._chance.choice((1.0, 8.0, 0.0)), self._chance.choice((1, 2, 4))

    @property
    def epoch_ms(self) -> int:
        """What the machines' wall clocks show when the world begins."""
        return EPOCH_MS if self.on else 0

    def settle(self, settings: AgentSettings) -> AgentSettings:
        """A machine's settings: as long as nobody asks, nothing is collected."""
        if not self.on:
            return replace(settings, collect_after_s=0.0, collect_keep=0)
        return replace(settings, collect_after_s=self._after_s, collect_keep=self._keep, reconcile_s=3.0)

    def has(self, task: TaskId) -> bool:
        """Whether it is on a disk."""
        return any(task in kept for kept in self.kept.values())

    def carry_out(self, machine: Machine, daemon: Daemon, effect: Archive) -> None:
        """Write it down, after a while."""
        self.world.after(self._chance.uniform(0.001, 0.4), self._write, machine, daemon, effect)

    def _write(self, machine: Machine, daemon: Daemon, effect: Archive) -> None:
        target, rates, chance = self.world.machines[effect.node], self.world.rates, self._chance
        here = target is machine
        away = target.daemon is None or target.cut() or machine.cut() or chance.random() < rates.lost
        tasks = [codec.decode_task(r) for r in effect.records]
        done = [t.id for t in tasks if t.state is State.COMPLETE]
        if (not here and away) or not target.up or (rates.disk and chance.random() < rates.disk):
            done = []
        elif chance.random() < 0.1:  # it was killed in the middle, or has read only some of them
            done = done[: chance.randrange(len(done) + 1)]
        self.kept.setdefault(effect.node, set()).update(done)
        if not here and chance.random() < rates.answer_lost:
            done = []
        self.world.log(machine.name, f"archived on {effect.node}: {done}")
        delay_s = chance.uniform(0.0, 0.2) if done else SILENT_S
        machine._post(daemon, delay_s, Archived(effect.office, effect.node, frozenset(done)))
