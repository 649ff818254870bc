#!/usr/bin/env python3
"""What an idle node costs: CPU and memory of its daemon, its shim and its etcd.

CPU is the time that the processes used during the measurement, in percent of one core. Memory is the resident set
(RSS) and, because Python processes share pages, the proportional set (PSS). Needs to read other processes of the same
user, so it measures a cluster on this machine.
"""

from __future__ import annotations

import json
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import psutil

from bench import common

SETTLE_S = 10.0  # after the start: voters join, caches fill


def processes(state: Path) -> dict[str, dict[str, list[psutil.Process]]]:
    """Node → part (daemon, shim, etcd) → processes."""
    found: dict[str, dict[str, list[psutil.Process]]] = {}
    for pid_file in sorted(state.glob("n*.pid")):
        name = pid_file.stem
        daemon = psutil.Process(int(pid_file.read_text().split()[0]))
        shim = psutil.Process(int(json.loads((state / name / "shim" / "shim.json").read_text())["pid"]))
        parts: dict[str, list[psutil.Process]] = defaultdict(list)
        parts["daemon"].append(daemon)
        parts["shim"].append(shim)
        for child in shim.children(recursive=True):
            parts["etcd" if child.name() == "etcd" else "shim"].append(child)
        found[name] = parts
    return found


def cpu_s(group: list[psutil.Process]) -> float:
    """CPU seconds so far."""
    return sum(sum(p.cpu_times()[:2]) for p in group)


def main() -> int:
    """Measure and print."""
    parser = common.arguments(__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="how long to measure (60)")
    parser.add_argument("--size", type=int, default=3, help="nodes of a cluster of our own (3)")
    parser.add_argument("--state", type=Path, help="measure the cluster of devcluster.sh in this directory")
    args = parser.parse_args()
    if args.nodes:
        parser.error("--nodes says nothing of processes; use --state")
    on = common.machine()
    if args.state:
        rows = measure(args.state, args.seconds)
    else:
        with common.cluster("", args.size, args.cpus) as cluster:
            assert cluster.state is not None
            time.sleep(SETTLE_S)  # to let it come to rest is the point
            rows = measure(cluster.state, args.seconds)
    common.report(f"footprint of idle nodes over {args.seconds:g} s", rows, args.json, on)
    return 0


def measure(state: Path, seconds: float) -> list[dict[str, Any]]:
    """A row for each part of each node."""
    found = processes(state)
    before = {(n, part): cpu_s(group) for n, parts in found.items() for part, group in parts.items()}
    time.sleep(seconds)
    rows = []
    for name, parts in found.items():
        for part, group in parts.items():
            memory = [p.memory_full_info() for p in group]
            rows.append(
                {
                    "node": name,
                    "part": part,
                    "processes": len(group),
                    "CPU %": 100 * (cpu_s(group) - before[name, part]) / seconds,
                    "RSS MiB": sum(m.rss for m in memory) / 2**20,
                    "PSS MiB": sum(m.pss for m in memory) / 2**20,
                }
            )
    return rows


if __name__ == "__main__":
    sys.exit(main())
