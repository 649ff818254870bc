"""Loops tell of their trouble once for each cause."""

from __future__ import annotations

import inspect
import logging
from pathlib import Path

import pytest

from spinetta import errors
from spinetta.errors import InvariantViolation, SpinettaError
from spinetta.node.entry import Memory
from spinetta.node.trouble import AGAIN_S, TEXTS_MAX, TROUBLE, Teller
from spinetta.store.identity import Identity


def test_all_of_our_errors_but_a_bug_are_outlived() -> None:
    ours = [e for _, e in inspect.getmembers(errors, inspect.isclass) if issubclass(e, SpinettaError)]
    assert {e for e in ours if not issubclass(e, TROUBLE)} == {SpinettaError, InvariantViolation}


def test_the_same_is_told_now_and_then(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    now_s = 0.0
    teller = Teller(logging.getLogger("test"), lambda: now_s)
    for _ in range(10):
        teller.tell("no store")
        teller.tell("bad record", logging.WARNING)
        now_s += 1.0
    assert [(r.levelname, r.message) for r in caplog.records] == [("INFO", "no store"), ("WARNING", "bad record")]
    now_s = AGAIN_S
    teller.tell("no store")
    assert len(caplog.records) == 3


def test_the_same_cause_at_other_nodes_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    teller = Teller(logging.getLogger("test"), lambda: 0.0)
    assert teller.tell("not followed now: the watch broke: 10.0.0.1:7221: Stream removed (Socket closed)")
    assert not teller.tell("not followed now: the watch broke: [fd00::2]:7221: Stream removed (Socket closed)")
    assert teller.tell("no member answered: a:1: no connection; b:2: no connection; c:3: refused")
    assert not teller.tell("no member answered: c:3: refused; b:2: no connection; a:1: no connection")
    assert teller.tell("no member answered: c:3: no connection; b:2: no connection; a:1: no connection")
    assert teller.tell("node n1 has been revoked")
    assert teller.tell("node n2 has been revoked")
    assert len(caplog.records) == 5


def test_what_is_remembered_has_a_limit(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    teller = Teller(logging.getLogger("test"), lambda: 0.0)
    for i in range(10 * TEXTS_MAX):
        teller.tell(str(i))
    assert len(teller._told_s) == TEXTS_MAX
    teller.tell(str(10 * TEXTS_MAX - 1))
    assert len(caplog.records) == 10 * TEXTS_MAX


def test_a_full_disk_is_told_once_by_who_writes_every_few_seconds(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    memory = Memory(tmp_path / "gone" / "identity.json", Identity(node="n1"))
    for _ in range(3):
        memory.note_shims(later=True)
    assert len(caplog.records) == 1
    assert "must not be started" in caplog.text
    assert memory.identity.shims == ""  # it is written when it can be
