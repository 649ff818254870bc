#!/usr/bin/env python3
"""How long after a submit a task starts, on an idle cluster: open or secured, on a voter or on a worker.

One task at a time. It prints the machine's monotonic clock as its first action; the submitter reads the same clock just
before it submits. So it is measured on one machine only, and includes everything: client, API, transaction, watch,
claim, shim, exec and the start of the shell. Timed as well: the answer to the submit, the time until `wait` says that
the task has ended, and how long it then takes to read its log.

The tasks are submitted at a voter that is not the one they run on. A voter claims straight at its etcd. A worker of a
secured cluster goes through the gateway of a voter; one of an open cluster, straight to the etcd of a voter. With
`--workers 0` tasks may run anywhere, and each node is asked in turn.
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


WHAT = ("submit answered", "task started", "end known", "its log read, after that")
Times = tuple[float, float, float, float]


def one(client: Client, tag: str) -> Times:
    """Milliseconds: from the submit to its answer, to the task's start, to the news of its end; to read its log."""
    began_ns = time.monotonic_ns()
    task = client.submit(TASK, cpus=0.1, tags=tag)
    answered_ns = time.monotonic_ns()
    info = task.wait(60)
    ended_ns = time.monotonic_ns()
    if not info.succeeded:
        raise SystemExit(f"task {task.id}: {info.task.outcome.name} {info.task.message}")
    started_ns = int(b"".join(chunk.data for chunk in task.log()))
    read_ns = time.monotonic_ns()
    since_ns = (answered_ns - began_ns, started_ns - began_ns, ended_ns - began_ns, read_ns - ended_ns)
    return since_ns[0] / 1e6, since_ns[1] / 1e6, since_ns[2] / 1e6, since_ns[3] / 1e6


def interpreter_ms() -> float:
    """What starting the measuring program costs by itself, which is part of `start`."""
    times = []
    for _ in range(20):
        began_ns = time.monotonic_ns()
        out = subprocess.run(TASK, capture_output=True, check=True).stdout
        times.append((int(out) - began_ns) / 1e6)
    return common.median(times)


def measure(variant: common.Variant, tasks: int) -> list[Times]:
    """One task after the other, at one address after the other."""
    clients = [variant.cluster.client([address]) for address in variant.addresses]
    try:
        for client in clients:
            for _ in range(WARM_UP):
                one(client, variant.tag)
        return [one(clients[i % len(clients)], variant.tag) for i in range(tasks)]
    finally:
        for client in clients:
            client.close()


def main() -> int:
    """Measure and print."""
    parser = common.arguments(__doc__)
    parser.add_argument("--tasks", type=int, default=100, help="in each run (100)")
    parser.add_argument("--runs", type=int, default=3, help="the table shows medians of the runs' numbers (3)")
    parser.add_argument("--size", type=int, default=3, help="voters of a cluster of our own (3)")
    args = parser.parse_args()
    on = common.machine()
    with common.clusters(args, args.size, args.workers) as clusters:
        try:
            found = common.alternate(common.variants(clusters), args.runs, lambda v: measure(v, args.tasks))
        except SpinettaError as e:
            raise SystemExit(f"latency: {e}") from e
    rows: list[dict[str, Any]] = []
    for i, what in enumerate(WHAT):
        middles = {v: [common.quantile([t[i] for t in run], 0.5) for run in runs] for v, runs in found.items()}
        for variant, runs in found.items():
            row: dict[str, Any] = {"milliseconds until": what, "TLS": variant.tls, "runs on": variant.place}
            for label, q in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("max", 1.0)):
                row[label] = common.median([common.quantile([t[i] for t in run], q) for run in runs])
            rows.append(row | common.ratios(middles, variant))
    title = (
        f"latency: {common.sizes(clusters[0])}, idle, {args.tasks} tasks one by one, median of {args.runs} runs "
        f"(of 'task started', {interpreter_ms():.1f} ms are the start of the measuring program itself)"
    )
    common.report(title, rows, args.json, on)
    return 0


if __name__ == "__main__":
    sys.exit(main())
