"""How much one caller may ask for."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spinetta.access import Limits, NodeRole, UserRole
from spinetta.errors import Busy
from spinetta.node.services import limits
from spinetta.node.services.throttle import Bucket, Throttle
from spinetta.rights import Caller, CallerKind

ANN = Caller(CallerKind.USER, "ann", role=UserRole.USER)
BOB = Caller(CallerKind.USER, "bob", role=UserRole.USER)
NODE = Caller(CallerKind.NODE, "ann", node_role=NodeRole.WORKER)
FEW = Limits(calls_per_s=1.0, tasks_per_s=2.0)


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def until_busy(throttle: Throttle, caller: Caller, policy: Limits = FEW, peer: str = "p") -> int:
    for n in range(100_000):
        try:
            throttle.call(caller, peer, policy)
        except Busy:
            return n
    raise AssertionError("never")


@given(
    rate=st.floats(0.1, 1000),
    takes=st.lists(st.tuples(st.floats(0, 5), st.integers(1, 50)), max_size=200),
)
def test_no_more_than_the_rate_and_a_burst(rate: float, takes: list[tuple[float, int]]) -> None:
    bucket, now_s, got = Bucket(rate, 0.0), 0.0, 0
    for pause_s, amount in takes:
        now_s += pause_s
        if not bucket.take(amount, rate, now_s):
            got += amount
    assert got <= rate * (now_s + limits.BURST_S) + 51  # the last one may be taken on credit


@given(rate=st.floats(0.1, 1000), amount=st.integers(1, 10_000))
def test_who_waits_as_long_as_told_gets_in(rate: float, amount: int) -> None:
    bucket, now_s = Bucket(rate, 0.0), 0.0
    while not bucket.take(amount, rate, now_s):
        pass
    for _ in range(int(amount / rate / limits.BUSY_MAX_S) + 3):
        wait_s = bucket.take(amount, rate, now_s)
        if not wait_s:
            return
        assert limits.BUSY_MIN_S <= wait_s <= limits.BUSY_MAX_S
        now_s += wait_s
    raise AssertionError("never let in")


def test_each_has_its_own() -> None:
    throttle = Throttle(Clock())
    assert until_busy(throttle, ANN) == 10
    assert until_busy(throttle, BOB) == 10
    assert until_busy(throttle, NODE) == 10  # of the same name, but no user


def test_a_rest_helps() -> None:
    clock = Clock()
    throttle = Throttle(clock)
    until_busy(throttle, ANN)
    with pytest.raises(Busy) as caught:
        throttle.call(ANN, "p", FEW)
    assert caught.value.reason == "busy"
    clock.now_s += caught.value.retry_after_s
    throttle.call(ANN, "p", FEW)
    clock.now_s += 1000
    assert until_busy(throttle, ANN) == 10  # no more than one burst is saved up


def test_ones_own_limit_goes_before_the_policy() -> None:
    throttle = Throttle(Clock())
    favoured = Caller(CallerKind.USER, "cat", role=UserRole.USER, limits=Limits(calls_per_s=3.0))
    assert until_busy(throttle, favoured) == 30
    assert until_busy(throttle, ANN, Limits()) == limits.CALLS_PER_S * limits.BURST_S


def test_a_large_submit_passes_and_is_paid_for_afterwards() -> None:
    clock = Clock()
    throttle = Throttle(clock)
    throttle.tasks(ANN, 1000, FEW)
    with pytest.raises(Busy):
        throttle.tasks(ANN, 1, FEW)
    clock.now_s += 489
    with pytest.raises(Busy):
        throttle.tasks(ANN, 1, FEW)
    clock.now_s += 2
    throttle.tasks(ANN, 1, FEW)


def test_refused_calls_cost_more() -> None:
    throttle = Throttle(Clock())
    throttle.call(ANN, "p", FEW)
    throttle.denied(ANN, "p")
    assert until_busy(throttle, ANN) == 0


def test_guests_by_address_and_all_together() -> None:
    throttle = Throttle(Clock())
    guest = Caller.nobody()
    assert until_busy(throttle, guest, peer="one") == limits.GUEST_CALLS_PER_S * limits.BURST_S
    total = sum(until_busy(throttle, guest, peer=f"other {n}") for n in range(20))
    all_of_them = limits.GUESTS_CALLS_PER_S * limits.BURST_S
    assert total == all_of_them - limits.GUEST_CALLS_PER_S * limits.BURST_S
    throttle.call(ANN, "one", FEW)  # those we know are let in all the same


def test_what_is_remembered_is_bounded() -> None:
    throttle = Throttle(Clock())
    for n in range(limits.BUCKETS_MAX + 100):
        throttle.call(Caller(CallerKind.USER, f"u{n}", role=UserRole.USER), "p", FEW)
    assert throttle.remembered == limits.BUCKETS_MAX


def test_streams_at_once() -> None:
    throttle = Throttle(Clock())
    with contextlib.ExitStack() as stack:
        for _ in range(limits.STREAMS_PER_CALLER_MAX):
            stack.enter_context(throttle.open(ANN))
        with pytest.raises(Busy), throttle.open(ANN):
            pass
        with throttle.open(BOB):
            pass
    with throttle.open(ANN):
        pass


def test_plain_text_on_loopback_is_not_counted() -> None:
    throttle = Throttle(Clock())
    for _ in range(5000):
        throttle.call(Caller.local(), "p", FEW)
    throttle.tasks(Caller.local(), 10**9, FEW)
    assert throttle.remembered == 0
