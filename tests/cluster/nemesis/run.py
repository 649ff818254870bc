"""One run: a cluster, a load, faults, mending, and the judgement."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import random
import shutil
import statistics
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from spinetta.store.process import EtcdTls
from tests.cluster.harness import CLIENT_PORT, Node
from tests.cluster.nemesis import checker
from tests.cluster.nemesis.load import Load
from tests.cluster.nemesis.plan import Fault, Times, plan
from tests.cluster.nemesis.recorder import Recorder, boot_s
from tests.cluster.nemesis.spaces import World, hit, world

OPTIONS = ("--cpus", "2", "--memory", "1GiB", "--log-keep-time", "1h")
NEVER_ALL = 2  # nodes that are left alone by faults that come on top of others
PROGRESS_EVERY_S = 10.0
READY_S = 90.0


@dataclass
class Settings:
    """What to do.

    Attributes:
        seed: of the schedule and the load.
        seconds: of load and faults; mending and the check come after.
        settle_s: after everything is mended, for all tasks to end.
        kinds: of faults; none: all.
        progress: told of what happens.
    """

    seed: int
    seconds: float
    nodes: int = 5
    rate: float = 12.0
    times: Times = field(default_factory=Times)
    settle_s: float = 180.0
    kinds: Sequence[str] = ()
    progress: Callable[[str], None] = lambda _text: None


class Nemesis:
    """Carries the schedule out."""

    def __init__(self, made: World, recorder: Recorder, settings: Settings, out: TextIO) -> None:
        self._world, self._recorder, self._settings, self._out = made, recorder, settings, out
        self._busy: set[str] = set()
        self.counts: Counter[str] = Counter()
        self.skipped = 0
        self.ended_by_themselves: list[str] = []
        self.failed_starts: list[str] = []  # no peer in reach, a full disk: tried again, as a service manager would

    async def run(self, faults: Sequence[Fault]) -> None:
        """All faults, each at its time; returns when all are mended."""
        began_s = boot_s()
        async with asyncio.TaskGroup() as group:
            for fault in faults:
                await asyncio.sleep(max(0.0, began_s + fault.at_s - boot_s()))
                group.create_task(self._one(fault))

    async def watch_daemons(self) -> None:
        """Daemons that end though nobody ended them: noted, and started again as a service manager would.

        One that gives up while it starts says why and may be tried again; one that took part must not end.
        """
        while True:
            await asyncio.sleep(0.5)
            for node in self._world.nodes:
                code = node.process.poll() if node.process is not None else None
                if code is not None and node.name not in self._busy:
                    clear = node.tail(1).startswith("error: ") and not self._world.took_part(node)
                    noted = self.failed_starts if clear else self.ended_by_themselves
                    noted.append(f"{node.name} with {code}: {node.tail(3)}")
                    self._settings.progress(f"the daemon of {noted[-1]}")
                    self._world.restart(node)

    def _target(self, fault: Fault) -> Node | None:
        nodes = [n for n in self._world.nodes if n.name not in self._busy]
        role = fault.role
        if role == "leader":
            nodes = [n for n in nodes if n.name == self._recorder.leader] or nodes
        elif role == "voter":
            nodes = [n for n in nodes if n.name in self._recorder.members] or nodes
        return nodes[int(fault.pick * len(nodes))] if nodes else None

    async def _one(self, fault: Fault) -> None:
        node = self._target(fault)
        if node is None or len(self._busy) >= NEVER_ALL:
            self.skipped += 1
            return
        self._busy.add(node.name)
        leads = " (leader)" if node.name == self._recorder.leader else ""
        self._settings.progress(f"{fault.kind} {node.name}{leads} for {fault.hold_s:.1f} s")
        from_s = boot_s()
        try:
            mend = await asyncio.to_thread(hit, self._world, fault.kind, node, fault.hold_s)
            try:
                await asyncio.sleep(fault.hold_s)
            finally:
                mend()
        finally:
            self._busy.discard(node.name)
        self.counts[fault.kind] += 1
        row = {"kind": fault.kind, "nodes": [node.name], "leader": bool(leads), "from_s": from_s, "until_s": boot_s()}
        self._out.write(json.dumps(row) + "\n")


@dataclass
class Result:
    """How a run went."""

    report: dict[str, Any]
    verdict: checker.Verdict

    @property
    def good(self) -> bool:
        """Every promise was kept."""
        return self.verdict.good


async def run_in(made: World, directory: Path, settings: Settings) -> Result:
    """Load and faults on a cluster that is ready, in this directory; then the judgement."""
    trust = directory / "trust"
    shutil.copytree(made.nodes[0].data_dir / "trust" / "current", trust)
    shutil.copy(made.admin_pem, directory / "admin.pem")
    tls = EtcdTls(trust / "etcd-ca.pem", trust / "etcd.pem", trust / "etcd.key")
    recorder = Recorder([f"https://{n.host}:{CLIENT_PORT}" for n in made.nodes], tls, directory / "history")
    load = Load(
        [n.address for n in made.nodes], directory / "admin.pem", directory, settings.times,
        random.Random(f"load {settings.seed}"), settings.rate, lambda: len(recorder.complete),
    )  # fmt: skip
    load.ledger.touch()
    began_s, wrong = boot_s(), []
    with (directory / "hits").open("w", buffering=1) as out:
        nemesis = Nemesis(made, recorder, settings, out)
        async with beside(recorder.run(), nemesis.watch_daemons(), progress(settings, load, recorder, nemesis)):
            stop = asyncio.Event()
            async with asyncio.TaskGroup() as group:
                loading = group.create_task(load.run(stop, settings.settle_s))
                await nemesis.run(plan(settings.seed, settings.seconds, settings.times, settings.kinds))
                await asyncio.sleep(max(0.0, began_s + settings.seconds - boot_s()))
                stop.set()
                mended_s = boot_s()
                await loading
            wrong = await settle(settings, {n.name for n in made.nodes}, load, recorder)
            settled_s = boot_s() - mended_s
            present = await recorder.present()
            wrong += await caught_up(recorder, max((r for r, _ in present.values()), default=0))
    replay, ledger, told, hits, odd = checker.read_all(directory)
    verdict = checker.check(replay, ledger, told, hits, settings.times, present)
    for story in odd:
        verdict.say("an attempt is started once", story)
    for story in wrong:
        verdict.say("everything ends soon after all is mended", story)
    for story in nemesis.ended_by_themselves:
        verdict.say("a daemon does not end by itself", story)
    report = {
        "seed": settings.seed, "seconds": settings.seconds, "nodes": settings.nodes, "rate": settings.rate,
        "times": {"lease_ttl_s": settings.times.lease_ttl_s, "grace_s": settings.times.grace_s,
                  "kill_margin_s": settings.times.kill_margin_s},
        "faults": dict(sorted(nemesis.counts.items())), "faults_skipped": nemesis.skipped,
        "failed_starts": nemesis.failed_starts,
        "settled_after_s": round(settled_s, 1), "watch_breaks": recorder.breaks,
        "calls_repeated": dict(load.again), "tasks_held_back": load.held_back,
        **figures(replay, ledger, told, hits),
        "excused": dict(verdict.excused),
        "wrong": {promise: stories[: checker.STORIES_MAX] for promise, stories in verdict.wrong.items()},
    }  # fmt: skip
    return Result(report, verdict)


@contextlib.asynccontextmanager
async def beside(*works: Any) -> AsyncIterator[None]:
    """Run these beside the block, and end them with it; when one of them fails the block is cancelled."""
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(work) for work in works]
        yield
        for task in tasks:
            task.cancel()


async def progress(settings: Settings, load: Load, recorder: Recorder, nemesis: Nemesis) -> None:
    """Say now and then how far it is."""
    began_s = boot_s()
    while True:
        await asyncio.sleep(PROGRESS_EVERY_S)
        settings.progress(
            f"{boot_s() - began_s:.0f} s: {load.submitted} submitted, {len(load.acknowledged)} acknowledged, "
            f"{len(recorder.complete)} ended, {sum(nemesis.counts.values())} faults, leader {recorder.leader or '-'}"
        )


async def settle(settings: Settings, nodes: set[str], load: Load, recorder: Recorder) -> list[str]:
    """Wait until every acknowledged task has ended and every node takes part; what has not come about in time."""
    end_s = boot_s() + settings.settle_s
    while (left := load.acknowledged - recorder.complete) or nodes - recorder.nodes:
        if boot_s() > end_s:
            late = [f"{len(left)} tasks have not ended, such as {sorted(left)[:3]}"] if left else []
            away = sorted(nodes - recorder.nodes)
            return late + ([f"{', '.join(away)} have not come back"] if away else [])
        await asyncio.sleep(0.2)
    return []


async def caught_up(recorder: Recorder, revision: int) -> list[str]:
    """Wait until the history has all of what was read; what is wrong if it never has."""
    end_s = boot_s() + 60
    while recorder.revision < revision:
        if boot_s() > end_s:
            return [f"the history ends at {recorder.revision}, the store is at {revision}"]
        await asyncio.sleep(0.05)
    return []


def figures(
    replay: checker.Replay, ledger: dict[tuple[str, int], checker.Lived], told: checker.Told,
    hits: Sequence[checker.Hit],
) -> dict[str, Any]:  # fmt: skip
    """Counts and times."""
    outcomes = Counter(t.outcome.name.lower() for t in replay.tasks.values() if t.outcome)
    ended_twice = Counter(task for (task, _), lived in ledger.items() if lived.code == 0)
    detected: list[float] = []
    again: list[float] = []
    elsewhere: list[float] = []
    lost = [hit for hit in hits if hit.kind == "kill-node"]
    for fault in lost:
        node, at_s = fault.nodes[0], fault.from_s
        # Only while it was away: a node that came back first was given up for another reason later, if at all.
        detected += [t - at_s for t, name in replay.condemned if name == node and at_s < t < fault.until_s][:1]
        until_s = min((other.from_s for other in lost if node in other.nodes and other.from_s > at_s), default=math.inf)
        for t, task, name, number in replay.requeued:
            if name == node and replay.claimed_at[task, number] < at_s < t < until_s:
                again.append(t - at_s)
                following = ledger.get((task, number + 1))
                if following is not None:
                    elsewhere.append(following.begin_s - at_s)
    return {
        "tasks": {"sent": len(told.kinds), "acknowledged": len(told.acknowledged),
                  "kinds": dict(sorted(Counter(told.kinds.values()).items())),
                  "outcomes": dict(sorted(outcomes.items()))},
        "attempts": {"claimed": len(replay.claims), "begun": len(ledger),
                     "told_no_end": sum(lived.code is None for lived in ledger.values()),
                     "executed_to_success_more_than_once": sum(n > 1 for n in ended_twice.values())},
        "requeued_after_a_loss": len(replay.requeued),
        "condemned": len(replay.condemned), "revisions": replay.revisions,
        "detection_s": spread(detected), "requeued_s": spread(again), "running_elsewhere_s": spread(elsewhere),
    }  # fmt: skip


def spread(values: Sequence[float]) -> dict[str, float]:
    """How many, the median and the worst."""
    if not values:
        return {"count": 0}
    return {"count": len(values), "median": round(statistics.median(values), 2), "worst": round(max(values), 2)}


def run(directory: Path, settings: Settings) -> Result:
    """A cluster of its own, and a run on it."""
    began_s = time.monotonic()
    with world(directory, settings.nodes, *OPTIONS, *settings.times.options) as made:
        settings.progress(f"{settings.nodes} nodes are ready after {time.monotonic() - began_s:.0f} s, in {directory}")
        try:
            return asyncio.run(run_in(made, directory, settings))
        finally:
            keep_logs(made, directory)


def keep_logs(made: World, directory: Path) -> None:
    """What the nodes' disks tell, before they are gone."""
    for node in made.nodes:
        for name in ("etcd.log", "etcd.log.1", "shim/shim.log"):
            source = node.data_dir / name
            if source.exists():
                shutil.copy(source, directory / f"{node.name}.{source.name}")
