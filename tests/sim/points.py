"""Await points: every place at which a machine can be struck between two of its effects or answers.

A world that has a `Striker` tells it of each point as it is reached. `Armed` strikes machines of a seed after some
points of theirs; `Sweep` strikes one machine at one point of a run, so that a whole run can be gone through.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from spinetta.model import NodeId

if TYPE_CHECKING:
    from tests.sim.machine import Machine
    from tests.sim.world import World

REQUEST = "request"  # a request is about to reach the store
MESSAGES = ("mute", "lose", "late")  # done to a request; all else is done to a machine or to the store


class Striker(Protocol):
    """Told of each point; whoever calls looks afterwards whether the machine is still there."""

    def point(self, machine: Machine, what: str) -> str:
        """What is to become of the request when `what` is `REQUEST`: one of `MESSAGES`, or nothing."""
        ...


def strike(world: World, machine: Machine, how: str, for_s: float) -> None:
    """Do something to a machine, or to the store, now."""
    world.log("STRIKE", f"{how} {machine.name} for {for_s:.2f} s")
    world.tally[f"strike: {how}"] += 1
    match how:
        case "daemon":
            machine.crash_daemon()
            world.after(for_s, machine.start_daemon)
        case "shim":
            machine.crash_shim(min(for_s, 1.0))
        case "machine":
            machine.crash()
            world.after(for_s, machine.boot)
        case "freeze" | "long-freeze":
            if machine.daemon is not None:
                lasts_s = for_s if how == "freeze" else for_s + world.plan.grace_s + world.plan.lease_ttl_s
                machine.daemon.paused_until_s = min(world.now + lasts_s, world.plan.horizon_s)
        case "cut" | "outward" | "answers" | "echo" | "lease-cut":
            machine.cut_mode = {"cut": "requests", "lease-cut": "lease"}.get(how, how)
            machine.cut_until_s = min(world.now + for_s, world.plan.horizon_s)
        case "elect":
            world.elect(min(for_s, 2.0))
        case "compact":
            world.compact()
        case "node-lease" | "office-lease":
            world.misjudge(machine, how.removesuffix("-lease"))
        case "slow":
            machine.shim_free_s = max(machine.shim_free_s, world.now + min(for_s, 2.0))
        case "watches":
            for tag in sorted(machine.daemon.watches) if machine.daemon is not None else ():
                machine.lose_watch(tag)
        case _:
            raise AssertionError(f"nothing is called {how}")


SWEPT: dict[str, float] = {  # what a sweep does at a point, and for how long, in seconds
    "daemon": 0.3,
    "shim": 0.3,
    "machine": 1.0,
    "freeze": 3.0,
    "long-freeze": 3.0,
    "cut": 3.5,
    "outward": 3.5,
    "answers": 3.5,
    "echo": 3.5,
    "lease-cut": 4.0,
    "elect": 1.5,
    "compact": 0.0,
    "node-lease": 0.0,
    "office-lease": 0.0,
    "slow": 2.0,
    "watches": 0.0,
    "mute": 0.0,
    "lose": 0.0,
    "late": 0.0,
}


@dataclass(slots=True)
class _Aim:
    how: str
    left: int
    for_s: float


class Armed:
    """Strikes a machine once it has passed some more points; several may be aimed at."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._aims: dict[NodeId, list[_Aim]] = {}

    def aim(self, machine: Machine, how: str, after_points: int, for_s: float) -> None:
        """After so many more points of a machine."""
        self._aims.setdefault(machine.name, []).append(_Aim(how, after_points, for_s))
        self._world.striker = self

    def point(self, machine: Machine, what: str) -> str:
        """See `Striker`."""
        fate = ""
        for aim in list(self._aims.get(machine.name, ())):
            aim.left -= 1
            if aim.left >= 0 or (aim.how in MESSAGES and what != REQUEST):
                continue
            self._aims[machine.name].remove(aim)
            if aim.how in MESSAGES:
                fate = aim.how
                self._world.tally[f"strike: {fate}"] += 1
            else:
                strike(self._world, machine, aim.how, aim.for_s)
        if not any(self._aims.values()):
            self._world.striker = None
        return fate


class Sweep:
    """Counts the points of a run and strikes at one of them.

    Attributes:
        seen: what each point was, in order, with the machine's name.
    """

    def __init__(self, world: World, how: str = "", index: int = -1) -> None:
        self._world = world
        self._how = how
        self._index = index
        self.seen: list[tuple[str, str]] = []

    def point(self, machine: Machine, what: str) -> str:
        """See `Striker`."""
        if self._world.now >= self._world.plan.horizon_s:
            self._world.striker = None
            return ""
        at = len(self.seen)
        self.seen.append((machine.name, what))
        if at != self._index:
            return ""
        if self._how in MESSAGES:
            return self._how
        strike(self._world, machine, self._how, SWEPT[self._how])
        return ""


def applies(how: str, what: str) -> bool:
    """Whether a strike makes sense at a point."""
    return what == REQUEST if how in MESSAGES else True
