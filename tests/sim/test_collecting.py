"""Worlds in which finished tasks are archived and leave the store, under faults; a wrong collector is noticed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from unittest import mock

import pytest

from spinetta import collect, txn
from spinetta.collect import Collector
from spinetta.events import Archived, Effect
from tests.sim.archives import KIND
from tests.sim.runs import attempt

FAULTS = (
    (KIND,),
    (KIND, "net"),
    (KIND, "partition", "net"),
    (KIND, "daemon", "machine"),
    (KIND, "pause", "etcd", "watch", "compact"),
    (KIND, "disk", "admin"),
    (KIND, "rights", "net"),
    (KIND, "point"),
)
SEEDS = 4  # of each; python -m tests.sim --faults collect,net --seeds 1000 runs more
SEARCH = 30


@pytest.mark.parametrize("faults", FAULTS, ids=",".join)
def test_nothing_leaves_that_is_not_on_a_disk(faults: tuple[str, ...]) -> None:
    left = 0
    for seed in range(SEEDS):
        world, wrong = attempt(seed, faults)
        assert not wrong, f"python -m tests.sim --seed {seed} --faults {','.join(faults)} -v: {wrong}"
        left += len(world.checker.collected)
    assert left, "no world has collected anything"


def test_other_worlds_do_not_collect() -> None:
    """Or earlier seeds would tell other stories."""
    world, _ = attempt(3)
    assert not any(m.daemon.agent.collector.wanted for m in world.machines.values() if m.daemon is not None)


@contextmanager
def _believes_all() -> Iterator[None]:
    """No answer, or half of one, is taken for a yes."""
    real = Collector._archived

    def archived(self: Collector, done: Archived, now: float, now_ms: int) -> list[Effect]:
        asked = {t for t, n in self._batch.archiver.items() if n == done.node}
        return real(self, replace(done, tasks=frozenset(asked)), now, now_ms)

    with mock.patch.object(Collector, "_archived", archived):
        yield


@contextmanager
def _without_the_office() -> Iterator[None]:
    real = txn.collect

    def weakened(*args: object) -> txn.Txn:
        return replace(real(*args), when=())  # type: ignore[arg-type]

    with mock.patch.object(collect.txn, "collect", weakened):  # type: ignore[attr-defined]
        yield


@contextmanager
def _whatever_state() -> Iterator[None]:
    """Tasks that run are taken for finished: the complete key alone is looked at, and there is one too many."""
    real = txn.collect

    def half(*args: object) -> txn.Txn:
        made = real(*args)  # type: ignore[arg-type]
        return replace(made, nested=tuple(replace(n, then=n.then[:1]) for n in made.nested))

    with mock.patch.object(collect.txn, "collect", half):  # type: ignore[attr-defined]
        yield


@pytest.mark.parametrize(
    ("mutant", "faults", "seed"),
    [
        (_believes_all, (KIND, "net", "disk"), 7),
        (_without_the_office, (KIND, "net", "pause", "partition"), 22),
        (_whatever_state, (KIND,), 0),
    ],
    ids=["believes-all", "no-office", "half-deleted"],
)
def test_a_wrong_collector_is_noticed(
    mutant: type[AbstractContextManager[None]], faults: tuple[str, ...], seed: int
) -> None:
    with mutant():
        assert any(attempt(s, faults)[1] for s in (seed, *range(SEARCH))), "nothing notices it"
