"""Run seeds: ``python -m tests.sim --seeds 100000 [--start N] [--jobs 2] [--faults net,pause]``.

One seed with its story: ``python -m tests.sim --seed S -v``.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

from tests.sim.faults import KINDS
from tests.sim.more import MORE_KINDS, WILD, plan
from tests.sim.world import World

CHUNK = 50


def attempt(seed: int, only: tuple[str, ...] = (), *, trace: bool = False) -> tuple[World, str]:
    """One seed; what went wrong, empty when nothing did."""
    world = World(plan(seed, only), trace=trace)
    try:
        world.run()
    except Exception as e:  # noqa: BLE001 - a crash of the code under test is a finding like any other
        if trace:
            world.lines.append(traceback.format_exc())
        return world, f"{type(e).__name__}: {e}"
    return world, ""


def chunk(first: int, count: int, only: tuple[str, ...]) -> list[tuple[int, str]]:
    """The seeds of a chunk that fail."""
    found = []
    for seed in range(first, first + count):
        _, wrong = attempt(seed, only)
        if wrong:
            found.append((seed, wrong))
    return found


def _chunks(start: int, seeds: int) -> Iterator[tuple[int, int]]:
    for first in range(start, start + seeds, CHUNK):
        yield first, min(CHUNK, start + seeds - first)


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tests.sim", description=__doc__)
    parser.add_argument("--seeds", type=int, default=1000)
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--faults", default="", help=f"of {','.join(KINDS)}")
    parser.add_argument("--seed", type=int, help="this one only")
    parser.add_argument("-v", "--verbose", action="store_true", help="with --seed: all that happens")
    parser.add_argument("--most", type=int, default=20, help="failures shown")
    args = parser.parse_args()
    only = tuple(k for k in args.faults.split(",") if k)
    if unknown := set(only) - {*KINDS, *MORE_KINDS, WILD}:
        parser.error(f"no such faults: {', '.join(sorted(unknown))}")
    if args.seed is not None:
        world, wrong = attempt(args.seed, only, trace=args.verbose)
        print("\n".join(world.lines))
        print(wrong or f"seed {args.seed} holds; {world.steps} steps, {world.now:.1f} simulated seconds")
        return bool(wrong)
    began_s = time.monotonic()
    failures: list[tuple[int, str]] = []
    with ProcessPoolExecutor(args.jobs) as pool:
        waits = [pool.submit(chunk, first, count, only) for first, count in _chunks(args.start, args.seeds)]
        for wait in waits:
            failures += wait.result()
            if len(failures) >= args.most:
                pool.shutdown(cancel_futures=True)
                break
    tail = f" --faults {args.faults}" if only else ""
    for seed, wrong in failures[: args.most]:
        print(f"seed {seed}: {wrong[:300]}\n    python -m tests.sim --seed {seed}{tail} -v")
    kinds = Counter(w.split(":")[0] + w.split(":")[1][:16] for _, w in failures)
    print(f"{args.seeds} seeds, {len(failures)} failures {dict(kinds)}, {time.monotonic() - began_s:.1f} s")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
