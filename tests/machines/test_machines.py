"""Limits, containers and a node without root on machines unlike this one. Each test here is many inside."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.machines.machine import ROOT, Machine, missing, ran
from tests.machines.runs import REPORT, RUNS, Chosen, argv, problems_of, run

ALL = os.environ.get("SPINETTA_MACHINES") == "all"
pytestmark = [
    pytest.mark.skipif(bool(missing()), reason=missing() or "all is there"),
    pytest.mark.timeout(max(chosen.limit_s for chosen in RUNS) + 60),
]


@pytest.mark.parametrize("chosen", [each for each in RUNS if each.usual or ALL], ids=lambda chosen: chosen.name)
def test_inside(chosen: Chosen) -> None:
    run(chosen)


def test_what_goes_wrong_inside_is_told() -> None:
    """A test that is skipped, one that fails, and too few of them; and a machine that does not end."""
    chosen = Chosen("trouble", Machine("v2"), ("tests/machines/trouble.py",), passing=2, skipped=("known",))
    with ran(chosen.machine, argv(chosen.tests), limit_s=60, fetched=[REPORT]) as done:
        told = problems_of(chosen, done)
    assert [words for words in told if "test_that_fails" in words and "assert 1 == 2" in words], (told, done.output)
    assert [words for words in told if "test_that_is_skipped is skipped there: nobody knows why" in words]
    assert "only 1 tests passed; there should be 2" in told
    assert len(told) == 3
    with ran(chosen.machine, ["sleep", "1000"], limit_s=4) as done:
        assert problems_of(chosen, done) == [f"the machine did not come to its end within {chosen.limit_s:g} s"]


def test_nothing_of_this_machine_can_be_written_to() -> None:
    places = [Path("/"), Path("/usr"), Path("/etc"), ROOT]
    files = [place / f"spinetta-was-here-{os.getpid()}" for place in places]
    script = "mount -o remount,rw /; touch " + " ".join(map(str, files)) + "; true"
    with ran(Machine("v1"), ["sh", "-c", script], limit_s=60) as done:
        assert done.status == 0, done.console
        assert "Read-only" in done.output
    assert [file for file in files if file.exists()] == []
