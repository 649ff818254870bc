"""Break a live cluster for a while and check that every promise is kept.

    python -m tests.cluster.nemesis --minutes 5 --seed 7
    python -m tests.cluster.nemesis --minutes 240 --seed 1 --report soak.json     # a soak

Five nodes in network namespaces and on small disks that it makes itself (root, iproute2, iptables), a steady load, and
a nemesis that kills, freezes, cuts off and fills up, by a schedule from the seed. Then everything is mended, all tasks
must end, and a checker compares the store's history, what each attempt has written into a ledger, and what was
acknowledged. Exit code 0: every promise was kept. Logs, ledger and history are kept when one was not, or with
--keep.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

from tests.cluster.nemesis.plan import KINDS, Times
from tests.cluster.nemesis.run import Settings, run
from tests.cluster.nemesis.spaces import can_run


def arguments() -> argparse.Namespace:
    """From the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.cluster.nemesis",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--minutes", type=float, default=5, help="of load and faults (5)")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of schedule and load (the time)")
    parser.add_argument("--nodes", type=int, default=5, help="3 voters, spare ones, the last a worker (5)")
    parser.add_argument("--tasks-per-s", type=float, default=12, help="submitted (12)")
    parser.add_argument("--lease-ttl", type=float, default=3, help="seconds (3)")
    parser.add_argument("--grace", type=float, default=8, help="seconds (8)")
    parser.add_argument("--kill-margin", type=float, default=2, help="seconds (2)")
    parser.add_argument("--settle", type=float, default=180, help="seconds for all tasks to end, once mended (180)")
    parser.add_argument("--faults", default="", metavar="KIND,…", help=f"only these: {', '.join(KINDS)}")
    parser.add_argument("--report", type=Path, help="write the figures to this file, as JSON")
    parser.add_argument("--keep", action="store_true", help="logs, ledger and history, whatever comes out")
    return parser.parse_args()


def main() -> int:
    """Run, check, tell."""
    args = arguments()
    kinds = tuple(k for k in args.faults.split(",") if k)
    if unknown := sorted(set(kinds) - set(KINDS)):
        print(f"error: there is no fault {unknown[0]!r}: {', '.join(KINDS)}", file=sys.stderr)
        return 2
    if not can_run():
        print("error: this takes root, ip(8), nsenter(1), iptables and mount", file=sys.stderr)
        return 2
    began_s = time.monotonic()
    settings = Settings(
        args.seed, args.minutes * 60, args.nodes, args.tasks_per_s,
        Times(args.lease_ttl, args.grace, args.kill_margin), args.settle, kinds,
        lambda text: print(f"[{time.monotonic() - began_s:7.1f}] {text}", flush=True),
    )  # fmt: skip
    directory = Path(tempfile.mkdtemp(prefix="spinetta-nemesis-"))
    good = False
    try:
        result = run(directory, settings)
        good = result.good
        report = {**result.report, "load_average": [round(x, 1) for x in os.getloadavg()]}
        text = json.dumps(report, indent=2)
        print(text)
        if args.report:
            args.report.write_text(text + "\n")
        print(result.verdict.text())
    finally:
        if good and not args.keep:
            shutil.rmtree(directory, ignore_errors=True)
        else:
            print(f"logs, ledger and history are in {directory}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
