"""A drain: what goes back, what stays, and what becomes of it."""

from __future__ import annotations

import asyncio
import signal

import pytest

from spinetta.attempt import GiveBack, Step
from spinetta.events import LeaveWanted, SetDraining, Start, Stop
from spinetta.model import Outcome, Reason, State
from spinetta.node.signals import StopSignals, Wish
from tests.builders import key_of, settings, spec, task_id
from tests.sim.direct import Direct
from tests.sim.shim_model import Script
from tests.unit.test_holdings import claimed, poll, running, written


def test_what_was_not_started_goes_back_at_once_and_what_runs_goes_on() -> None:
    held = claimed()
    held.give_back(GiveBack.UNSTARTED)
    (task,) = written(poll(held))
    assert (task.state, task.attempts[-1].reason) == (State.QUEUED, Reason.RELEASED.value)
    assert task.attempts[-1].message == "before it was started"
    held = running()
    held.give_back(GiveBack.UNSTARTED)
    assert poll(held) == []


@pytest.mark.parametrize(
    ("what", "restart", "stopped"),
    [
        (GiveBack.NOTHING, True, False),
        (GiveBack.UNSTARTED, True, False),
        (GiveBack.RESTARTABLE, True, True),
        (GiveBack.RESTARTABLE, False, False),
        (GiveBack.ALL, False, True),
    ],
)
def test_what_of_the_running_goes_back(what: GiveBack, restart: bool, stopped: bool) -> None:
    held = running(restart_on_node_failure=restart)
    held.give_back(what)
    assert poll(held) == ([Stop(key_of(1), Reason.RELEASED.value)] if stopped else [])


def test_what_must_not_start_twice_goes_back_as_long_as_it_was_not_started_once() -> None:
    held = claimed(restart_on_node_failure=False)
    held.give_back(GiveBack.RESTARTABLE)
    (task,) = written(poll(held))
    assert task.state is State.QUEUED


def test_a_start_under_way_is_not_given_back_until_it_is_known() -> None:
    held = claimed()
    (start,) = poll(held)
    assert isinstance(start, Start)
    held.give_back(GiveBack.UNSTARTED)
    assert poll(held) == []
    assert held.held[task_id(1)].step is Step.RUNNING


def test_released_tasks_run_elsewhere_and_the_others_end_here() -> None:
    d = Direct(settings("n1"), script=lambda _: Script(6.0))
    for n in (1, 2):
        d.submit(spec(n, restart_on_node_failure=n == 1))
    d.run(0.5)
    d.add(settings("n2"))
    d.run(1.0)
    n1 = d.nodes[settings("n1").name]
    d.tell(n1, SetDraining(True, release=True, spare=True))
    d.run(20.0)
    one, two = d.task(task_id(1)), d.task(task_id(2))
    assert {one.outcome, two.outcome} == {Outcome.SUCCEEDED}
    assert [a.node for a in one.attempts] == ["n1", "n2"]
    assert [a.node for a in two.attempts] == ["n1"]
    assert n1.agent.draining
    assert n1.agent.holdings.empty


def test_a_leave_does_not_take_back_a_release() -> None:
    d = Direct(settings("n1"))
    n1 = d.node()
    d.tell(n1, SetDraining(True, release=True))
    d.tell(n1, LeaveWanted(release=False))
    before = n1.agent.holdings.giving_back
    d.tell(n1, SetDraining(False))
    assert (before, n1.agent.holdings.giving_back) == (GiveBack.ALL, GiveBack.NOTHING)


# --- signals -------------------------------------------------------------------------------------------------------

TERM, INT, USR1 = signal.SIGTERM, signal.SIGINT, signal.SIGUSR1


@pytest.mark.parametrize(
    ("setting", "signals", "wish", "code"),
    [
        ("keep", [TERM], Wish.KEEP, None),
        ("drain", [TERM], Wish.DRAIN, None),
        ("release", [TERM], Wish.EVERYTHING, None),
        ("drain", [USR1], Wish.KEEP, None),
        ("keep", [INT], Wish.EVERYTHING, None),
        ("drain", [TERM, INT], Wish.EVERYTHING, None),
        ("drain", [TERM, TERM], Wish.DRAIN, 143),
        ("keep", [INT, INT], Wish.EVERYTHING, 130),
        ("keep", [INT, TERM], Wish.EVERYTHING, 143),
        ("drain", [TERM, INT, INT], Wish.EVERYTHING, 130),
        ("release", [TERM, INT], Wish.EVERYTHING, 130),
    ],
)
def test_signals(setting: str, signals: list[signal.Signals], wish: Wish, code: int | None) -> None:
    codes: list[int] = []
    stop = StopSignals(setting, leave=codes.append)
    for number in signals:
        stop.signalled(number)
    assert (stop.wish, codes) == (wish, [] if code is None else [code])


def test_while_a_node_comes_up_the_first_signal_cancels_that_and_a_second_one_ends_all() -> None:
    async def scenario() -> None:
        codes: list[int] = []
        stop = StopSignals("keep", leave=codes.append)

        async def coming_up() -> int:
            await asyncio.sleep(60)
            return 0

        for _ in range(2):  # also when it comes up anew
            stop = StopSignals("keep", leave=codes.append)
            task = asyncio.create_task(coming_up())
            stop.starting(task)
            await asyncio.sleep(0)
            stop.signalled(TERM)
            with pytest.raises(asyncio.CancelledError):
                await task
        assert codes == []
        stop.signalled(TERM)
        assert codes == [143]
        stop = StopSignals("drain", leave=codes.append)
        task = asyncio.create_task(coming_up())
        stop.starting(task)
        stop.started()
        stop.signalled(TERM)
        assert await stop.told() is Wish.DRAIN
        assert not task.cancelling()
        greater = asyncio.create_task(stop.told())
        await asyncio.sleep(0)
        stop.signalled(INT)
        assert await greater is Wish.EVERYTHING
        task.cancel()

    asyncio.run(scenario())
