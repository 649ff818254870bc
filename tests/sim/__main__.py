"""Worlds from seeds. Many: ``python -m tests.sim --seeds 100000 [--start N] [--jobs 2] [--faults net,pause]``.

One seed with its story: ``--seed S -v``. Seeds from 200000 on mix in the kinds of faults that came later.
A sweep strikes the small world of a seed at every point between two effects or answers, in every way:
``--sweep S [--every N] [--strikes daemon,mute]``; one strike of it with its story: ``--sweep S --at daemon:17 -v``.
``--guards`` writes ``docs/guards.md``; ``--hunt`` looks for the seeds that notice each fault of the code.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from tests.sim import guards, hunt
from tests.sim.faults import KINDS
from tests.sim.more import MORE_KINDS, NAMED_KINDS, WILD, small
from tests.sim.mutants import MUTANTS
from tests.sim.points import SWEPT
from tests.sim.runs import Strike, attempt, strikes, struck, swept, tally
from tests.sim.tally import Tally

CHUNK = 50
PROGRESS_EVERY_S = 15.0
ALL_KINDS = (*KINDS, *MORE_KINDS, *NAMED_KINDS, WILD)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.sim", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=1000)
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--faults", default="", help=f"of {','.join(ALL_KINDS)}")
    parser.add_argument("--seed", type=int, help="this one only")
    parser.add_argument("-v", "--verbose", action="store_true", help="with --seed or --at: all that happens")
    parser.add_argument("--most", type=int, default=20, help="failures shown, and after how many to stop")
    parser.add_argument("--json", type=Path, help="write the summary there, too")
    parser.add_argument("--sweep", type=int, metavar="SEED", help="strike the small world of this seed everywhere")
    parser.add_argument("--every", type=int, default=1, help="of a sweep: every so many strikes only")
    parser.add_argument("--strikes", default="", help=f"of a sweep: of {','.join(SWEPT)}")
    parser.add_argument("--at", metavar="STRIKE:POINT", help="of a sweep: this one only")
    parser.add_argument("--guards", action="store_true", help="print what docs/guards.md is to say")
    parser.add_argument("--mutant", metavar="FAULT", help="with this fault in the code, see docs/guards.md")
    parser.add_argument("--hunt", nargs="*", metavar="FAULT", help="seeds that notice these faults of the code, or all")
    return parser


def main() -> int:
    """The command."""
    parser = _parser()
    args = parser.parse_args()
    only = tuple(k for k in args.faults.split(",") if k)
    if unknown := set(only) - set(ALL_KINDS):
        parser.error(f"no such faults: {', '.join(sorted(unknown))}")
    hows = tuple(k for k in args.strikes.split(",") if k) or tuple(SWEPT)
    if wrong_hows := set(hows) - set(SWEPT):
        parser.error(f"no such strikes: {', '.join(sorted(wrong_hows))}")
    if args.guards:
        print(guards.document(), end="")
        return 0
    if args.hunt is not None:
        for line in hunt.hunts(args.hunt, args.jobs):
            print(line, flush=True)
        return 0
    if args.mutant and args.mutant not in MUTANTS:
        parser.error(f"no such fault of the code: {args.mutant}; one of {', '.join(MUTANTS)}")
    with MUTANTS[args.mutant]() if args.mutant else nullcontext():  # before workers are forked, which inherit it
        return _run(only, hows, args)


def _run(only: tuple[str, ...], hows: tuple[str, ...], args: argparse.Namespace) -> int:
    if args.sweep is not None and args.at:
        how, _, at = args.at.partition(":")
        return _show(struck(small(args.sweep), (how, int(at)), trace=args.verbose))
    if args.sweep is not None:
        return _sweep(args.sweep, hows, args)
    if args.seed is not None:
        return _show(attempt(args.seed, only, trace=args.verbose))
    return _seeds(only, args)


def _show(told: tuple[Any, str]) -> int:
    world, wrong = told
    print("\n".join(world.lines))
    print(wrong or f"seed {world.plan.seed} holds; {world.steps} steps, {world.now:.1f} simulated seconds")
    return bool(wrong)


def _seeds(only: tuple[str, ...], args: argparse.Namespace) -> int:
    tail = f" --faults {args.faults}" if only else ""
    chunks = [(first, min(CHUNK, args.start + args.seeds - first), only) for first in _firsts(args)]
    total = Tally()
    for done in _work(args, tally, chunks, args.seeds, "seeds", lambda t: t.seeds):
        total.add(done)
        for seed, wrong in done.failures:
            print(f"seed {seed}: {wrong[:300]}\n    python -m tests.sim --seed {seed}{tail} -v", flush=True)
        if len(total.failures) >= args.most:
            break
    return _end(total, args)


def _firsts(args: argparse.Namespace) -> range:
    return range(args.start, args.start + args.seeds, CHUNK)


def _sweep(seed: int, hows: tuple[str, ...], args: argparse.Namespace) -> int:
    some: list[Strike] = strikes(seed, hows)[:: args.every]
    chunks = [(seed, some[i : i + CHUNK]) for i in range(0, len(some), CHUNK)]
    total = Tally()
    for done, found in _work(args, swept, chunks, len(some), "strikes", lambda d: d[0].seeds):
        total.add(done)
        for each in found:
            at = ":".join(map(str, each.strike))
            print(f"{at}: {each.wrong[:300]}\n    python -m tests.sim --sweep {seed} --at {at} -v", flush=True)
        if len(total.failures) >= args.most:
            break
    return _end(total, args)


def _work(
    args: argparse.Namespace,
    what: Callable[..., Any],
    chunks: list[tuple[Any, ...]],
    whole: int,
    of: str,
    count: Callable[[Any], int],
) -> Iterator[Any]:
    """Each chunk's result as it comes, with a line of progress now and then."""
    began_s = said_s = time.monotonic()
    done = 0
    with ProcessPoolExecutor(args.jobs) as pool:
        waits = [pool.submit(what, *chunk) for chunk in chunks]
        try:
            for wait in as_completed(waits):
                result = wait.result()
                done += count(result)
                now_s = time.monotonic()
                if now_s - said_s > PROGRESS_EVERY_S:
                    said_s = now_s
                    rate_hz = done / (now_s - began_s)
                    left_min = (whole - done) / rate_hz / 60
                    text = f"{done:,} of {whole:,} {of}, {rate_hz:.1f} a second, {left_min:.0f} min left"
                    print(text, file=sys.stderr, flush=True)
                yield result
        finally:
            pool.shutdown(cancel_futures=True)
    print(f"{done:,} {of} in {time.monotonic() - began_s:.1f} s", file=sys.stderr)


def _end(total: Tally, args: argparse.Namespace) -> int:
    print(total.text())
    if total.failures:
        kinds = Counter(w.split(":")[0] + w.split(":")[1][:16] for _, w in total.failures)
        print(f"failures: {dict(kinds)}")
    if args.json is not None:
        args.json.write_text(json.dumps(total.as_dict(), indent=1) + "\n")
    return bool(total.failures)


if __name__ == "__main__":
    sys.exit(main())
