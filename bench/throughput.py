#!/usr/bin/env python3
"""Tasks a second of `/bin/true`, with one and with three nodes.

All tasks are submitted, then waited for; the time runs from the first submit until the last end is known. Each task
asks for a tenth of a core, so that a node of two cores runs twenty at a time and the number tells what the machinery
costs, not what the tasks need.
"""

from __future__ import annotations

import sys
import time
from typing import Any

from bench import common
from spinetta.client import Client, make_spec
from spinetta.errors import SpinettaError

WAIT_LIMIT_S = 600.0
WARM_UP = 20


def measure(addresses: tuple[str, ...], tasks: int, cpus: float) -> tuple[float, float]:
    """Seconds until all are submitted, and until all have ended."""
    with Client(addresses, timeout_s=120) as client:
        specs = [make_spec(["/bin/true"], cpus=cpus) for _ in range(tasks)]
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
    parser.add_argument("--sizes", default="1,3", help="how many nodes, one row each (1,3)")
    args = parser.parse_args()
    on = common.machine()
    rows: list[dict[str, Any]] = []
    sizes = [int(size) for size in args.sizes.split(",")] if not args.nodes else [len(args.nodes.split(","))]
    for size in sizes:
        with common.cluster(args.nodes, size, args.cpus) as cluster:
            try:
                measure(cluster.addresses, WARM_UP, args.task_cpus)
                runs = [measure(cluster.addresses, args.tasks, args.task_cpus) for _ in range(args.runs)]
            except SpinettaError as e:
                raise SystemExit(f"throughput: {e}") from e
        rows.append(
            {
                "nodes": size,
                "tasks": args.tasks,
                "submits/s": args.tasks / common.median([s for s, _ in runs]),
                "seconds": common.median([t for _, t in runs]),
                "tasks/s": args.tasks / common.median([t for _, t in runs]),
            }
        )
    common.report(f"throughput: /bin/true, medians of {args.runs} runs", rows, args.json, on)
    return 0


if __name__ == "__main__":
    sys.exit(main())
