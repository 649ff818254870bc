#!/usr/bin/env python3
"""How long after a submit a task starts, on an idle cluster.

One task at a time. It prints the machine's monotonic clock as its first action; the submitter reads the same clock just
before it submits. So it is measured on one machine only, and includes everything: client, API, transaction, watch,
claim, shim, exec and the start of the shell. The answer to the submit is timed as well, and the time until `wait`
says that the task has ended.
"""

from __future__ import annotations

import subprocess
import sys
import time
from typing import Any

from bench import common
from spinetta.client import Client
from spinetta.errors import SpinettaError

# Without site packages Python starts in about 10 ms; the report tells how long exactly.
TASK = ["/usr/bin/python3", "-I", "-S", "-c", "import time; print(time.monotonic_ns())"]
WARM_UP = 5


def one(client: Client) -> tuple[float, float, float]:
    """Milliseconds from the submit to its answer, to the task's start, to the news of its end."""
    began_ns = time.monotonic_ns()
    task = client.submit(TASK, cpus=0.1)
    answered_ns = time.monotonic_ns()
    info = task.wait(60)
    ended_ns = time.monotonic_ns()
    if not info.succeeded:
        raise SystemExit(f"task {task.id}: {info.task.outcome.name} {info.task.message}")
    started_ns = int(b"".join(chunk.data for chunk in task.log()))
    return (answered_ns - began_ns) / 1e6, (started_ns - began_ns) / 1e6, (ended_ns - began_ns) / 1e6


def interpreter_ms() -> float:
    """What starting the measuring program costs by itself, which is part of `start`."""
    times = []
    for _ in range(20):
        began_ns = time.monotonic_ns()
        out = subprocess.run(TASK, capture_output=True, check=True).stdout
        times.append((int(out) - began_ns) / 1e6)
    return common.median(times)


def measure(addresses: tuple[str, ...], tasks: int) -> list[tuple[float, float, float]]:
    """One task after the other, at one node after the other."""
    clients = [Client(address) for address in addresses]
    try:
        for client in clients:
            for _ in range(WARM_UP):
                one(client)
        return [one(clients[i % len(clients)]) for i in range(tasks)]
    finally:
        for client in clients:
            client.close()


def main() -> int:
    """Measure and print."""
    parser = common.arguments(__doc__)
    parser.add_argument("--tasks", type=int, default=100, help="in each run (100)")
    parser.add_argument("--runs", type=int, default=3, help="the table shows the median run (3)")
    parser.add_argument("--size", type=int, default=3, help="nodes of a cluster of our own (3)")
    args = parser.parse_args()
    on = common.machine()
    with common.cluster(args.nodes, args.size, args.cpus) as cluster:
        try:
            runs = [measure(cluster.addresses, args.tasks) for _ in range(args.runs)]
        except SpinettaError as e:
            raise SystemExit(f"latency: {e}") from e
    rows: list[dict[str, Any]] = []
    for i, what in enumerate(("submit answered", "task started", "end known")):
        row: dict[str, Any] = {"milliseconds until": what}
        for label, q in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("max", 1.0)):
            row[label] = common.median([common.quantile([t[i] for t in run], q) for run in runs])
        rows.append(row)
    title = (
        f"latency: {len(cluster.addresses)} idle nodes, {args.tasks} tasks one by one, median of {args.runs} runs "
        f"(of 'task started', {interpreter_ms():.1f} ms are the start of the measuring program itself)"
    )
    common.report(title, rows, args.json, on)
    return 0


if __name__ == "__main__":
    sys.exit(main())
