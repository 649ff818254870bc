"""When a machine is fit for tasks, and what its node says when it is not."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from spinetta.events import SetUnfit
from spinetta.model import NodeId, Outcome, State
from spinetta.node import fitness
from spinetta.node.fitness import FULL_BYTES_MAX, FULL_BYTES_MIN, Fitness, Room, no_memory, no_process, room, why_unfit
from spinetta.node.threads import standing_threads
from tests.builders import cpus, settings, spec, task_id
from tests.sim.direct import Direct
from tests.sim.shim_model import Script

HERE = Path("/srv/n1")
GIB = 1 << 30
LARGE = Room(100 * GIB, 200 * GIB, 1_000_000, read_only=False)


def judged(*, was_unfit: bool = False, **changes: object) -> str:
    return why_unfit(HERE, replace(LARGE, **changes), was_unfit=was_unfit)  # type: ignore[arg-type]


def test_a_disk_with_room() -> None:
    assert judged() == ""
    assert judged(free_files=None) == ""
    assert "read-only" in judged(read_only=True)
    assert "no room for more files" in judged(free_files=3)


@pytest.mark.parametrize(
    ("total_bytes", "least_bytes"), [(200 * GIB, FULL_BYTES_MAX), (100 << 20, 2 << 20), (1 << 20, FULL_BYTES_MIN)]
)
def test_full_is_a_part_of_a_small_disk_and_a_node_does_not_waver(total_bytes: int, least_bytes: int) -> None:
    assert "is full" in judged(total_bytes=total_bytes, free_bytes=least_bytes - 1)
    assert judged(total_bytes=total_bytes, free_bytes=least_bytes) == ""
    assert "is full" in judged(total_bytes=total_bytes, free_bytes=2 * least_bytes - 1, was_unfit=True)
    assert judged(total_bytes=total_bytes, free_bytes=2 * least_bytes, was_unfit=True) == ""


def test_memory(tmp_path: Path) -> None:
    info = tmp_path / "meminfo"
    assert no_memory(info) == "", "unknown is not used up"
    info.write_text("MemTotal: 1000000 kB\nMemAvailable: 1000 kB\n")
    assert no_memory(info) == "memory is used up: less than 32MiB left"
    info.write_text("MemTotal: 1000000 kB\nMemAvailable: 900000 kB\n")
    assert no_memory(info) == ""
    assert no_process() == ""


def test_a_disk_that_hangs_or_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        answer = asyncio.Event()
        loop = asyncio.get_running_loop()

        def slow(path: Path) -> Room:
            asyncio.run_coroutine_threadsafe(answer.wait(), loop).result()
            return room(path)

        monkeypatch.setattr(fitness, "ANSWER_S", 0.01)
        monkeypatch.setattr(fitness, "room", slow)
        looking = Fitness(tmp_path)
        assert "does not answer" in await looking.look()
        assert "does not answer" in await looking.look(), "and it is asked only once"
        answer.set()
        monkeypatch.setattr(fitness, "ANSWER_S", 10.0)
        monkeypatch.setattr(fitness, "why_unfit", lambda *_, was_unfit: f"was unfit: {was_unfit}")
        assert await looking.look() == "was unfit: True"
        monkeypatch.setattr(fitness, "room", room)
        gone = Fitness(tmp_path / "gone")
        assert "cannot be looked at: No such file or directory" in await gone.look()
        gone.close()
        looking.close()

    asyncio.run(scenario())


def test_an_executor_that_needs_no_more_threads() -> None:
    with standing_threads(3) as pool:
        assert len(pool._threads) == 3
        assert list(pool.map(lambda x: x + 1, range(10))) == list(range(1, 11))
        assert len(pool._threads) == 3


def test_a_node_that_is_unfit_takes_nothing_and_says_why() -> None:
    d = Direct(settings(), script=lambda _: Script(1.0))
    n1 = d.node()
    d.submit(spec(1))
    d.run(0.5)
    d.tell(n1, SetUnfit("the disk is full"))
    d.submit(spec(2))
    d.run(20.0)
    assert d.task(task_id(1)).outcome is Outcome.SUCCEEDED, "what runs goes on"
    assert d.task(task_id(2)).state is State.QUEUED
    assert n1.agent.session.record.unfit == "the disk is full"
    d.tell(n1, SetUnfit(""))
    d.run(25.0)
    assert d.task(task_id(2)).outcome is Outcome.SUCCEEDED
    assert n1.agent.session.record.unfit == ""
    assert n1.agent.settings.name == NodeId("n1")


def test_what_kept_a_task_from_starting_is_said_for_as_long_as_none_is_taken() -> None:
    d = Direct(settings(), script=lambda _: Script(1.0))
    n1 = d.node()
    d.run(0.5)
    n1.shim.unfit = True
    d.submit(spec(1))
    d.run(2.0)
    assert n1.agent.session.record.unfit == "cannot fork"
    n1.shim.unfit = False
    d.run(60.0)
    assert n1.agent.session.record.unfit == ""
    task = d.task(task_id(1))
    assert (task.outcome, task.failures, task.losses) == (Outcome.SUCCEEDED, 0, 0)


def test_what_a_node_is_short_of_costs_no_other_task_its_turn() -> None:
    d = Direct(settings(capacity=cpus(4, 1 << 33, gpu=2)), script=lambda _: Script(1.0))
    n1 = d.node()
    d.run(0.5)
    n1.shim.short_of = "gpu"
    d.submit(spec(1, resources=cpus(1, gpu=1)))
    d.run(2.0)
    assert len(d.task(task_id(1)).attempts) == 1
    d.submit(spec(2))
    d.run(6.0)
    assert d.task(task_id(2)).outcome is Outcome.SUCCEEDED
    assert (d.task(task_id(1)).state, len(d.task(task_id(1)).attempts)) == (State.QUEUED, 1), "not again and again"
    assert n1.agent.session.record.unfit == "", "it takes others"
    n1.shim.short_of = ""
    d.run(60.0)
    task = d.task(task_id(1))
    assert (task.outcome, task.failures, task.losses) == (Outcome.SUCCEEDED, 0, 0)
