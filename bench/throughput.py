#!/usr/bin/env python3
"""Tasks a second of `/bin/true`: with one node and with three, open and secured; then on a voter and on a worker.

All tasks are submitted, then waited for; the time runs from the first submit until the last end is known. Each task
asks for a tenth of a core, so that a node of two cores runs twenty at a time and the number tells what the machinery
costs, not what the tasks need.

On a voter and on a worker: all tasks of a run go to one node, which is not the one where they are submitted.
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

from bench import common
from spinetta.client import make_spec
from spinetta.errors import SpinettaError

WAIT_LIMIT_S = 600.0
WARM_UP = 20


def measure(variant: common.Variant, tasks: int, cpus: float) -> tuple[float, float]:
    """Seconds until all are submitted, and until all have ended."""
    with variant.cluster.client(variant.addresses, timeout_s=120) as client:
        specs = [make_spec(["/bin/true"], cpus=cpus, tags=variant.tag) for _ in range(tasks)]
        began_s = time.monotonic()
        ids = [s.id for s in client.submit_many(specs)]
        submitted_s = time.monotonic() - began_s
        result = client.wait(ids, timeout_s=WAIT_LIMIT_S)
        took_s = time.monotonic() - began_s
        if result.timed_out:
            raise SystemExit(f"not all of {tasks} tasks ended within {WAIT_LIMIT_S:g} s")
        bad = sum(not t.succeeded for t in result.tasks)
        if bad:
            raise SystemExit(f"{bad} of {tasks} tasks did not succeed")
        return submitted_s, took_s


def main() -> int:
    """Measure and print."""
    parser = common.arguments(__doc__)
    parser.add_argument("--tasks", type=int, default=500, help="in each run (500)")
    parser.add_argument("--runs", type=int, default=3, help="the table shows medians (3)")
    parser.add_argument("--task-cpus", type=float, default=0.1, help="what each task asks for (0.1)")
    parser.add_argument("--sizes", default="1,3", help="how many voters, one cluster each (1,3)")
    args = parser.parse_args()
    on = common.machine()
    rows: list[dict[str, Any]] = []
    # What runs on a worker needs a cluster that has one, which is the last.
    plan = [(0, 0)] if args.nodes else [(int(size), 0) for size in args.sizes.split(",")]
    if args.workers and not args.nodes:
        plan.append((plan[-1][0], args.workers))
    for voters, workers in plan:
        with common.clusters(args, voters, workers) as clusters:
            try:
                rows += measure_all(common.variants(clusters), args)
            except SpinettaError as e:
                raise SystemExit(f"throughput: {e}") from e
    common.report(f"throughput: {args.tasks} of /bin/true, medians of {args.runs} runs", rows, args.json, on)
    return 0


def measure_all(variants: list[common.Variant], args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each."""
    for variant in variants:
        measure(variant, WARM_UP, args.task_cpus)
    found = common.alternate(variants, args.runs, lambda v: measure(v, args.tasks, args.task_cpus))
    rates = {v: [args.tasks / took_s for _, took_s in runs] for v, runs in found.items()}
    return [
        {
            "nodes": common.sizes(v.cluster),
            "TLS": v.tls,
            "runs on": v.place,
            "submits/s": args.tasks / common.median([s for s, _ in runs]),
            "seconds": common.median([t for _, t in runs]),
            "tasks/s": common.median(rates[v]),
        }
        | common.ratios(rates, v)
        for v, runs in found.items()
    ]


if __name__ == "__main__":
    sys.exit(main())
