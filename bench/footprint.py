#!/usr/bin/env python3
"""What an idle node costs: CPU and memory of its daemon, its shim and its etcd; a voter and a worker, open and secured.

The shim has a second process that writes, and once there are tasks with limits on disk or logs a third that watches.

CPU is the time that the processes used during the measurement, in percent of one core. Memory is the resident set
(RSS) and, because Python processes share pages, the proportional set (PSS). Each row is the mean over the nodes of its
kind; the clusters are measured at the same time. Needs to read other processes of the same user, so it measures
clusters on this machine.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import psutil

from bench import common

PARTS = {"etcd": "etcd", "spinetta-writer": "writer", "spinetta-watch": "watcher"}  # of the shim's children
SETTLE_S = 10.0  # after the start: voters join, caches fill


def processes(state: Path) -> dict[str, dict[str, list[psutil.Process]]]:
    """Node → part (daemon, shim, its writer and watcher, etcd) → processes."""
    found: dict[str, dict[str, list[psutil.Process]]] = {}
    for pid_file in sorted(state.glob("n*.pid")):
        name = pid_file.stem
        daemon = psutil.Process(int(pid_file.read_text().split()[0]))
        shim = psutil.Process(int(json.loads((state / name / "shim" / "shim.json").read_text())["pid"]))
        parts: dict[str, list[psutil.Process]] = defaultdict(list)
        parts["daemon"].append(daemon)
        parts["shim"].append(shim)
        for child in shim.children(recursive=True):
            parts[PARTS.get(child.name(), "tasks")].append(child)
        found[name] = parts
    return found


def cpu_s(group: list[psutil.Process]) -> float:
    """CPU seconds so far."""
    return sum(sum(p.cpu_times()[:2]) for p in group)


def main() -> int:
    """Measure and print."""
    parser = common.arguments(__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="how long to measure (60)")
    parser.add_argument("--size", type=int, default=3, help="voters of a cluster of our own (3)")
    parser.add_argument("--state", type=Path, help="measure the cluster of devcluster.sh in this directory")
    args = parser.parse_args()
    if args.nodes or args.credentials:
        parser.error("--nodes says nothing of processes; use --state")
    on = common.machine()
    if args.state:
        rows = measure({"": args.state}, args.seconds)
    else:
        with common.clusters(args, args.size, args.workers) as clusters:
            time.sleep(SETTLE_S)  # to let it come to rest is the point
            states = {"yes" if c.tls else "no": c.state for c in clusters if c.state is not None}
            rows = measure(states, args.seconds)
    common.report(f"footprint of idle nodes over {args.seconds:g} s", rows, args.json, on)
    return 0


def measure(states: dict[str, Path], seconds: float) -> list[dict[str, Any]]:
    """A row for each part of each kind of node. `states`: whether it is secured, and its directory."""
    groups: dict[tuple[str, str, str], list[list[psutil.Process]]] = defaultdict(list)
    for tls, state in states.items():
        for parts in processes(state).values():
            for part, group in parts.items():
                groups["voter" if "etcd" in parts else "worker", part, tls].append(group)
    before = {key: [cpu_s(node) for node in nodes] for key, nodes in groups.items()}
    time.sleep(seconds)
    used = {
        key: [100 * (cpu_s(node) - was) / seconds for node, was in zip(nodes, before[key], strict=True)]
        for key, nodes in groups.items()
    }
    rows = []
    for key in sorted(groups):
        role, part, tls = key
        memory = [[p.memory_full_info() for p in node] for node in groups[key]]
        row = {"node": role, "part": part, "TLS": tls, "nodes": len(memory), "CPU %": statistics.fmean(used[key])}
        row["most"] = max(used[key])
        for label, kind in (("RSS MiB", "rss"), ("PSS MiB", "pss")):
            row[label] = statistics.fmean(sum(getattr(m, kind) for m in node) for node in memory) / 2**20
        if base := used.get((role, part, "no")):
            row["CPU x open"] = statistics.fmean(used[key]) / max(statistics.fmean(base), 0.001)
        rows.append(row)
    return rows


if __name__ == "__main__":
    sys.exit(main())
