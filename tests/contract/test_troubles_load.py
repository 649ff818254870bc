"""A shim that is killed while it has much to do."""

from __future__ import annotations

import asyncio
import os
import signal
import uuid
from collections import Counter
from pathlib import Path

import pytest

from spinetta.errors import RuntimeUnavailable
from spinetta.model import Exit, Reason
from tests.contract.shims import asynchronous, isolate, kill_shim, living, runtime, shell, state_dir, until

pytestmark = pytest.mark.contract
_ = (isolate, state_dir)  # fixtures

ATTEMPTS = 60
SHORT = {f"short-{number}.1": number % 7 for number in range(ATTEMPTS // 2)}


@asynchronous
async def test_all_ends_are_told_once_and_truthfully(state_dir: Path, isolate: bool) -> None:
    marker, ledger = uuid.uuid4().hex, state_dir.parent / "ledger"
    note = f"echo $KEY >> {ledger}; : {marker}; "
    scripts = {key: note + f"exit {code}" for key, code in SHORT.items()}
    scripts |= {f"long-{number}.1": note + "(setsid sleep 1000 &); sleep 1000" for number in range(ATTEMPTS // 2)}
    order = sorted(scripts, key=lambda key: key.partition("-")[2])  # one of each in turn
    async with runtime(state_dir, isolate=isolate) as rt:
        starts = [asyncio.create_task(rt.start(shell(key, scripts[key], env={"KEY": key}))) for key in order]
        await until(lambda: ledger.exists() and ledger.read_text().count("\n") > ATTEMPTS // 3)
        os.kill(rt.shim_pid(), signal.SIGKILL)
        answers = await asyncio.gather(*starts, return_exceptions=True)
        assert all(isinstance(answer, Exit | RuntimeUnavailable | None) for answer in answers)
        told = {held.key: held.exit for held in await rt.held()}
        assert living(marker) == []
    ran = Counter(ledger.read_text().split())
    assert set(ran.values()) == {1}
    assert set(ran) <= set(told), "what has run is known"
    for key, end in told.items():
        assert end is not None
        if end.reason is Reason.EXIT:
            assert (key in ran, end.exit_code) == (True, SHORT.get(key))
        elif end.reason is Reason.FENCED:  # asked for again of the new shim, which had heard of no renewal yet
            assert key not in ran
        else:
            assert end.reason is Reason.SHIM_LOST
    # And said again by every shim to come.
    kill_shim(state_dir)
    async with runtime(state_dir, isolate=isolate) as rt:
        again = {held.key: held.exit for held in await rt.held()}
    for key in ran:
        # Not when: that it was lost with the first shim may not have been on disk when the second was killed.
        first, second = told[key], again[key]
        assert first is not None
        assert second is not None
        assert (second.reason, second.exit_code) == (first.reason, first.exit_code)
