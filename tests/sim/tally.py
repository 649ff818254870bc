"""What many seeds have shown, added up: faults by kind, steps, simulated time, how soon all was well again."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from tests.sim.liveness import recovery_limit_s, work_limit_s
from tests.sim.world import World

Worst = tuple[float, float, int]  # the part of its limit that was used, the seconds, the seed


@dataclass
class Tally:
    """Of some seeds. Times after the last fault are counted in steps of half a second."""

    seeds: int = 0
    failures: list[tuple[int, str]] = field(default_factory=list)
    steps: int = 0
    simulated_s: float = 0.0
    revisions: int = 0
    attempts: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    recovered_s: Counter[float] = field(default_factory=Counter)
    settled_s: Counter[float] = field(default_factory=Counter)
    worst_recovery: Worst = (0.0, 0.0, -1)
    worst_settling: Worst = (0.0, 0.0, -1)
    broken_by_clocks: int = 0

    def take(self, world: World, wrong: str) -> None:
        """Add one run."""
        seed, plan = world.plan.seed, world.plan
        self.seeds += 1
        self.steps += world.steps
        self.simulated_s += world.now
        self.revisions += world.model.revision
        self.attempts += len(world.checker.truths)
        self.faults += world.tally
        self.broken_by_clocks += world.checker.broken
        if wrong:
            self.failures.append((seed, wrong))
            return
        self.recovered_s[round(world.recovered_s, 1)] += 1
        self.settled_s[round(world.settled_s, 1)] += 1
        limit_s = recovery_limit_s(plan)
        self.worst_recovery = max(self.worst_recovery, (world.recovered_s / limit_s, world.recovered_s, seed))
        share = world.settled_s / (limit_s + work_limit_s(plan))
        self.worst_settling = max(self.worst_settling, (share, world.settled_s, seed))

    def add(self, other: Tally) -> None:
        """Add what other seeds have shown."""
        self.seeds += other.seeds
        self.failures += other.failures
        self.steps += other.steps
        self.simulated_s += other.simulated_s
        self.revisions += other.revisions
        self.attempts += other.attempts
        self.faults += other.faults
        self.recovered_s += other.recovered_s
        self.settled_s += other.settled_s
        self.worst_recovery = max(self.worst_recovery, other.worst_recovery)
        self.worst_settling = max(self.worst_settling, other.worst_settling)
        self.broken_by_clocks += other.broken_by_clocks

    def as_dict(self) -> dict[str, Any]:
        """For machines to read."""
        return {
            "seeds": self.seeds,
            "failures": [{"seed": seed, "why": why} for seed, why in sorted(self.failures)],
            "steps": self.steps,
            "simulated_hours": round(self.simulated_s / 3600, 2),
            "revisions": self.revisions,
            "attempts_executed": self.attempts,
            "faults": dict(sorted(self.faults.items())),
            "faults_total": self.faults.total(),
            "broken_by_clocks": self.broken_by_clocks,
            "recovered_s": self._spread(self.recovered_s, self.worst_recovery),
            "settled_s": self._spread(self.settled_s, self.worst_settling),
        }

    @staticmethod
    def _spread(times: Counter[float], worst: Worst) -> dict[str, Any]:
        share, seconds, seed = worst
        return {
            "median": percentile(times, 0.5),
            "p99": percentile(times, 0.99),
            "worst": percentile(times, 1.0),
            "nearest_its_limit": {"share": round(share, 3), "seconds": round(seconds, 1), "seed": seed},
        }

    def text(self) -> str:
        """For people."""
        lines = [
            f"{self.seeds:,} seeds, {len(self.failures)} failures; {self.steps:,} steps, "
            f"{self.simulated_s / 3600:,.1f} simulated hours, {self.revisions:,} revisions of the store, "
            f"{self.attempts:,} attempts executed, {self.faults.total():,} faults:",
            *(f"  {n:>10,} {kind}" for kind, n in self.faults.most_common()),
        ]
        for what, times, worst in (
            ("repaired", self.recovered_s, self.worst_recovery),
            ("all tasks at their end", self.settled_s, self.worst_settling),
        ):
            lines.append(
                f"{what} after the last fault: median {percentile(times, 0.5):.1f} s, 99 % within "
                f"{percentile(times, 0.99):.1f} s, worst {percentile(times, 1.0):.1f} s; "
                f"nearest its limit: {worst[0]:.0%} of it (seed {worst[2]})"
            )
        if self.broken_by_clocks:
            lines.append(f"invariant 9 was broken {self.broken_by_clocks:,} times, as it may be with such clocks")
        return "\n".join(lines)


def percentile(times: Counter[float], part: float) -> float:
    """The time within which that part of the runs was done; 0 without any."""
    left = part * times.total()
    for seconds in sorted(times):
        left -= times[seconds]
        if left <= 1e-9:
            return seconds
    return 0.0
