#!/usr/bin/env python3
"""How long after a death its tasks run again, for several leases and graces, and what shortens the wait.

For each lease a cluster of three voters of its own, all idle. In each run one node is killed whole (`kill -9` of its
daemon and shim, and so of etcd and of all tasks), with a task for each grace on it and one with `overlap`. Timed from
the kill: until the node's leased key is gone (*lost*), until the leader has condemned it (*condemned*, the detection),
and until each task's next attempt has written its first line on another node. *formula* is what the wait must be at
least: two thirds of the lease (its last renewal may be a third old) until it is condemned, and from then on
grace x (1 + clock_rate_error) + kill_margin.

Then, with the longest grace: the node is started again at once and says itself that nothing of its former life runs;
an administrator vouches for the death as soon as the node is seen to be lost (timed from that word); only the daemon is
killed and started again (tasks are adopted; timed until the node is ready again, and tasks lost are counted).
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import common
from spinetta.client import Client, TaskHandle
from spinetta.errors import SpinettaError
from tests.cluster.harness import Cluster, Node, eventually, running_cluster
from tests.cluster.nemesis.load import PYTHON, WITNESS

KILL_MARGIN_S = 2.0
RATE_ERROR = 0.01
NODES = 3
FOR_EVER_S = 3600
CONDEMNED = frozenset({"condemned", "dead", "gone"})
LIMIT_S = 180.0  # beyond any formula: something is wrong
SETTING_UP = threading.Lock()  # clusters that start at the same time get in each other's way


def now_s() -> float:
    """The clock that the tasks write down, too."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


@dataclass
class Field:
    """A cluster to measure, and a ledger that its tasks write."""

    cluster: Cluster
    client: Client
    ledger: Path
    graces_s: Sequence[float]

    def node(self, name: str) -> Node:
        """By name."""
        return next(n for n in self.cluster.nodes if n.name == name)

    def status(self, name: str) -> str:
        """As the others see it."""
        return next((n.status for n in self.client.nodes().nodes if n.record.name == name), "gone")

    def ready(self) -> None:
        """Wait until all nodes are."""
        eventually(
            lambda: sum(n.status == "ready" for n in self.client.nodes().nodes) == NODES,
            within_s=LIMIT_S, what=f"all nodes are ready\n{self.cluster.tails()}",
        )  # fmt: skip

    def submit(self, **options: Any) -> TaskHandle:
        """A task that writes when it begins, and stays."""
        argv = [PYTHON, "-I", "-S", str(WITNESS), str(self.ledger), str(FOR_EVER_S), "0"]
        return self.client.submit(argv, cpus=0.1, **options)

    def began_s(self, task: TaskHandle, attempt: int) -> float:
        """When an attempt wrote its first line; 0: not yet."""
        for line in self.ledger.read_text().splitlines():
            what, of, number, _, ns = line.split()[:5]
            if (what, of, int(number)) == ("B", task.id, attempt):
                return int(ns) / 1e9
        return 0.0

    def place(self, victim: str, options: Sequence[dict[str, Any]]) -> list[TaskHandle]:
        """Tasks on this one node, which others may take later."""
        others = [n.name for n in self.cluster.nodes if n.name != victim]
        for name in others:
            self.client.drain(name)
        tasks = [self.submit(**each) for each in options]
        for task in tasks:
            self.begin_of(task, 1)
        for name in others:
            self.client.undrain(name)
        self.ready()
        return tasks

    def clear(self, tasks: Sequence[TaskHandle]) -> None:
        """End them and begin a new ledger."""
        self.client.cancel([t.id for t in tasks])
        self.client.wait([t.id for t in tasks], timeout_s=LIMIT_S)
        self.ledger.write_text("")

    def back(self, victim: Node) -> None:
        """Start a node that was killed."""
        victim.start(self.cluster.peers_of(victim))
        self.ready()

    def begin_of(self, task: TaskHandle, attempt: int) -> float:
        """When an attempt began, once it has."""
        what = f"attempt {attempt} of {task.id} begins"
        return float(eventually(lambda: self.began_s(task, attempt), within_s=LIMIT_S, what=what))

    def until(self, node: str, statuses: frozenset[str]) -> None:
        """Wait until the others see it as one of these."""
        what = f"{node} is {' or '.join(sorted(statuses))}"
        eventually(lambda: self.status(node) in statuses, within_s=LIMIT_S, every_s=0.02, what=what)


Times = dict[str, list[float]]


def node_killed(field: Field, victim: Node, times: Times) -> None:
    """The whole node, for good."""
    options: list[dict[str, Any]] = [{"grace": g} for g in field.graces_s] + [{"overlap": True}]
    tasks = field.place(victim.name, options)
    killed_s = now_s()
    victim.crash()
    field.until(victim.name, CONDEMNED | {"lost"})
    times.setdefault("lost", []).append(now_s() - killed_s)
    field.until(victim.name, CONDEMNED)
    times.setdefault("condemned", []).append(now_s() - killed_s)
    for option, task in zip(options, tasks, strict=True):
        what = f"runs elsewhere, grace {option['grace']:g} s" if "grace" in option else "runs elsewhere, overlap"
        times.setdefault(what, []).append(field.begin_of(task, 2) - killed_s)
    field.back(victim)
    field.clear(tasks)


def own_word(field: Field, victim: Node, times: Times) -> None:
    """Killed, and started again at once, as after a quick reboot."""
    tasks = field.place(victim.name, [{"grace": max(field.graces_s)}])
    killed_s = now_s()
    victim.crash()
    victim.start(field.cluster.peers_of(victim))
    times.setdefault("runs again, node back at once", []).append(field.begin_of(tasks[0], 2) - killed_s)
    field.ready()
    field.clear(tasks)


def vouched(field: Field, victim: Node, times: Times) -> None:
    """An administrator says that it is dead."""
    tasks = field.place(victim.name, [{"grace": max(field.graces_s)}])
    victim.crash()
    field.until(victim.name, CONDEMNED | {"lost"})
    said_s = now_s()
    field.client.confirm_dead(victim.name)
    times.setdefault("runs elsewhere, after confirm-dead", []).append(field.begin_of(tasks[0], 2) - said_s)
    field.back(victim)
    field.clear(tasks)


def daemon_killed(field: Field, victim: Node, times: Times) -> None:
    """Only the daemon, started again at once: nothing is lost."""
    tasks = field.place(victim.name, [{"grace": max(field.graces_s)}] * 10)
    killed_s = now_s()
    victim.kill_daemon()
    victim.start(field.cluster.peers_of(victim))
    eventually(
        lambda: (answer := field.cluster.cli("node", "list", node=field.cluster.nodes.index(victim), check=False))
        and answer.returncode == 0,
        within_s=LIMIT_S, what=f"{victim.name} answers", every_s=0.02,
    )  # fmt: skip
    field.ready()
    times.setdefault("daemon killed: node is back", []).append(now_s() - killed_s)
    infos = field.client.wait([t.id for t in tasks], timeout_s=1.0).tasks
    times.setdefault("daemon killed: of 10 tasks lost", []).append(
        float(sum(i.task.attempts_started != 1 or i.done for i in infos))
    )
    field.clear(tasks)


def formula_s(what: str, lease_s: int) -> float | None:
    """The least that it can take, without the time that anything itself takes."""
    renewed_s = lease_s * 2 / 3  # the last renewal may be a third of the lease old
    if what in ("lost", "condemned", "runs elsewhere, overlap"):
        return renewed_s
    if what.startswith("runs elsewhere, grace "):
        grace_s = float(what.removeprefix("runs elsewhere, grace ").removesuffix(" s"))
        return renewed_s + grace_s * (1 + RATE_ERROR) + KILL_MARGIN_S
    return None


def measure(lease_s: int, args: argparse.Namespace, directory: Path) -> list[dict[str, Any]]:
    """One lease, all graces. What was measured before something failed counts; what failed is told."""
    times: Times = {}
    try:
        _measure(lease_s, args, directory, times)
    except (SpinettaError, AssertionError) as e:
        print(f"lease {lease_s} s: not all runs: {e}", file=sys.stderr, flush=True)
    rows = []
    for what, values in times.items():
        row: dict[str, Any] = {"lease s": lease_s, "what": what, "runs": len(values)}
        formula = formula_s(what, lease_s)
        row["formula"] = "" if formula is None else formula
        rows.append(row | {"median": common.median(values), "worst": max(values)})
    return rows


def _measure(lease_s: int, args: argparse.Namespace, directory: Path, times: Times) -> None:
    # Shorter ones are refused: a task would end between two renewals.
    least_s = lease_s + KILL_MARGIN_S + 1
    graces_s = [grace_s for grace_s in args.grace if grace_s >= least_s] or [least_s]
    node_grace_s = max(graces_s)
    options = (
        "--lease-ttl", f"{lease_s}s", "--grace", f"{node_grace_s:g}s", "--kill-margin", f"{KILL_MARGIN_S:g}s",
        "--clock-rate-error", str(RATE_ERROR), "--cpus", "2", "--memory", "1GiB",
    )  # fmt: skip
    with contextlib.ExitStack() as stack:
        with SETTING_UP:
            cluster = stack.enter_context(running_cluster(directory, NODES, *options))
            cluster.wait_voters(NODES, within_s=120)
        ledger = directory / "ledger"
        ledger.touch()
        client = stack.enter_context(Client([n.address for n in cluster.nodes], timeout_s=10))
        field = Field(cluster, client, ledger, graces_s)
        steps: list[Callable[[Field, Node, Times], None]] = [node_killed, own_word, vouched, daemon_killed]
        end_s = now_s() + (args.minutes * 60 or float("inf"))
        for run in range(args.runs):
            if now_s() > end_s:
                break
            for i, step in enumerate(steps):
                victim = cluster.nodes[(run + i) % NODES]  # the leader and etcd's among them in a third of the runs
                step(field, victim, times)
            print(f"lease {lease_s} s: run {run + 1} of {args.runs}", file=sys.stderr, flush=True)


def numbers(text: str) -> list[float]:
    """Seconds with commas between."""
    return [float(word) for word in text.split(",")]


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=10, help="of each (10)")
    parser.add_argument("--lease", type=numbers, default=[2, 5, 10], help="seconds (2,5,10)")
    parser.add_argument(
        "--grace",
        type=numbers,
        default=[8, 20, 60],
        help="seconds; those below lease + 3 are left out (8,20,60)",
    )
    parser.add_argument("--minutes", type=float, default=0, help="begin no run after so many (0: no limit)")
    parser.add_argument("--one-by-one", action="store_true", help="the clusters of the leases, instead of all at once")
    parser.add_argument("--json", action="store_true", help="the numbers as JSON")
    args = parser.parse_args()
    on = common.machine()
    leases = [int(x) for x in args.lease]
    with (
        tempfile.TemporaryDirectory(prefix="spinetta-recovery-", ignore_cleanup_errors=True) as parent,
        concurrent.futures.ThreadPoolExecutor(1 if args.one_by_one else len(leases)) as pool,
    ):
        directories = [Path(parent) / f"lease-{lease_s}" for lease_s in leases]
        for directory in directories:
            directory.mkdir()
        found = list(pool.map(lambda pair: measure(pair[0], args, pair[1]), zip(leases, directories, strict=True)))
    on["load_after"] = round(os.getloadavg()[0], 2)
    title = f"recovery: {NODES} voters, kill margin {KILL_MARGIN_S:g} s, clock rate error {RATE_ERROR:g}, seconds"
    common.report(title, [row for rows in found for row in rows], args.json, on)
    return 0


if __name__ == "__main__":
    sys.exit(main())
