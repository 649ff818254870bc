"""Looking for seeds that notice a fault of the code: for `noticed.py`, when a guard is new or seeds have changed."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed

from tests.sim.more import small
from tests.sim.mutants import MUTANTS
from tests.sim.runs import Strike, aimed, attempt, struck

SEEDS = 40  # of each mixture: what takes more luck than that is looked for by hand
MIXTURES = (
    "",
    "partition,net",
    "rights,net",
    "point",
    "lease,elect",
    "daemon,net",
    "machine,admin",
    "oneway,slowdisk",
    "point,lease,drift",
    "echo,lease",
    "machine,partition,net",
    "admin,point,net",
)


def notices(mutant: str, kinds: tuple[str, ...], seed: int) -> bool:
    """Whether a seed goes wrong with a fault in the code."""
    with MUTANTS[mutant]():
        return bool(attempt(seed, kinds)[1])


def strikes_notice(mutant: str, aim: str, seed: int) -> Strike | None:
    """The first strike of this sort in the small world of a seed that does no harm but with a fault in the code."""
    some = aimed(seed, aim)
    made = small(seed)
    with MUTANTS[mutant]():
        found = next((strike for strike in some if struck(made, strike)[1]), None)
    return found if found is not None and not struck(made, found)[1] else None


def hunt(mutant: str, mixtures: Iterable[str] = MIXTURES, seeds: int = SEEDS) -> tuple[str, int] | None:
    """The first seed that holds without the fault and does not with it, and its kinds of faults."""
    for mixture in mixtures:
        kinds = tuple(k for k in mixture.split(",") if k)
        for seed in range(seeds):
            if notices(mutant, kinds, seed) and not attempt(seed, kinds)[1]:
                return mixture, seed
    return None


def hunts(mutants: list[str], jobs: int) -> Iterator[str]:
    """What is found for each, as lines for `noticed.py`."""
    began_s = time.monotonic()
    with ProcessPoolExecutor(jobs) as pool:
        waits = {pool.submit(hunt, m): m for m in mutants or MUTANTS}
        for wait in as_completed(waits):
            found = wait.result()
            says = "nothing notices it" if found is None else f'("{found[0]}", {found[1]}),'
            yield f'    "{waits[wait]}": {says}  # {time.monotonic() - began_s:.0f} s'
