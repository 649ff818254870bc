"""What breaks when: a schedule from a seed. Pure; which node "the leader" is, is found out when it is due."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Times:
    """The cluster's times in seconds, which the schedule aims at."""

    lease_ttl_s: float = 3.0
    grace_s: float = 8.0
    kill_margin_s: float = 2.0

    @property
    def options(self) -> tuple[str, ...]:
        """As a node is told them."""
        return (
            "--lease-ttl", f"{self.lease_ttl_s:g}s", "--grace", f"{self.grace_s:g}s",
            "--kill-margin", f"{self.kill_margin_s:g}s",
        )  # fmt: skip

    @property
    def lost_s(self) -> float:
        """Silence after which a node has certainly been given up and its tasks put back."""
        return self.lease_ttl_s + self.grace_s * 1.01 + self.kill_margin_s


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that breaks, and is mended after a while.

    Attributes:
        at_s: since the load began.
        hold_s: until it is mended.
        kind: one of `KINDS`.
        role: whom it hits: `leader`, `voter` (with an etcd member), `other` (without), `any`.
        pick: 0 to 1: which of those.
    """

    at_s: float
    hold_s: float
    kind: str
    role: str
    pick: float

    def as_json(self) -> dict[str, Any]:
        """For the log."""
        return {"kind": self.kind, "role": self.role, "at_s": round(self.at_s, 2), "hold_s": round(self.hold_s, 2)}


BRIEF, LEASE, LONG = "brief", "lease", "long"  # shorter than the lease; past it; until its tasks are put back
# kind → how long it may hold. Of SIGSTOP to the shim only `brief` ones (within the kill margin) keep the assumption
# that the shim gets the CPU within its margin; the checker knows which did not.
KINDS: dict[str, Sequence[str]] = {
    "kill-daemon": (BRIEF, LEASE),
    "term-daemon": (BRIEF, LEASE),
    "kill-shim": (BRIEF,),
    "kill-etcd": (BRIEF,),
    "kill-node": (LEASE, LONG),
    "stop-daemon": (BRIEF, LEASE, LONG),
    "stop-shim": (BRIEF, LEASE),
    "stop-etcd": (BRIEF, LEASE),
    "stop-node": (BRIEF, LONG),
    "cut": (BRIEF, LEASE, LONG),
    "cut-in": (LEASE,),
    "cut-out": (LEASE,),
    "cut-etcd": (LEASE, LONG),
    "split": (LEASE, LONG),
    "no-quorum": (LEASE,),
    "full-disk": (LEASE, LONG),
}
ETCD_KINDS = frozenset({"kill-etcd", "stop-etcd", "cut-etcd"})
LIGHT = ("kill-daemon", "stop-daemon", "term-daemon")  # may come on top of another: they take no voter away
LEADER_SHARE, TOGETHER_SHARE = 0.3, 0.25
PAUSE_S = (1.0, 5.0)  # between the end of one and the next
CALM_EVERY, CALM_S = 6, 8.0  # now and then long enough that everything may settle


def hold_s(times: Times, length: str, rng: random.Random) -> float:
    """How long, within what the word means."""
    if length == BRIEF:
        return rng.uniform(0.2, 0.6) * min(times.kill_margin_s, times.lease_ttl_s)
    if length == LEASE:
        return times.lease_ttl_s + rng.uniform(1.0, 0.6 * times.grace_s)
    return times.lost_s + rng.uniform(1.0, 4.0)


def plan(seed: int, seconds: float, times: Times, kinds: Sequence[str] = ()) -> list[Fault]:
    """Faults for this long, in the order of their times; all are mended within it.

    Each kind comes once before any comes again.
    """
    rng = random.Random(f"nemesis {seed}")
    chosen = tuple(kinds) or tuple(KINDS)
    found: list[Fault] = []
    deck: list[str] = []
    now_s, count = rng.uniform(*PAUSE_S), 0
    while True:
        if not deck:
            deck = list(chosen)
            rng.shuffle(deck)
        kind = deck.pop()
        role = "leader" if rng.random() < LEADER_SHARE else "voter" if kind in ETCD_KINDS else "any"
        fault = Fault(now_s, hold_s(times, rng.choice(KINDS[kind]), rng), kind, role, rng.random())
        if fault.at_s + fault.hold_s > seconds:
            return sorted(found, key=lambda f: f.at_s)
        found.append(fault)
        if rng.random() < TOGETHER_SHARE:
            second = rng.choice(LIGHT)
            at_s = now_s + rng.uniform(0, fault.hold_s)
            short_s = hold_s(times, BRIEF, rng)
            found.append(Fault(at_s, short_s, second, "any", rng.random()))
            now_s = max(now_s, at_s + short_s - fault.hold_s)
        now_s += fault.hold_s + rng.uniform(*PAUSE_S)
        count += 1
        if count % CALM_EVERY == 0:
            now_s += CALM_S
