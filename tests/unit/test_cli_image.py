"""How a pull shows how far it is: a bar on a terminal, a line for each phase elsewhere, JSON for programs."""

from __future__ import annotations

import io
import json
import sys

import pytest

from spinetta.cli.imageprogress import Shown
from spinetta.client.images import ImageStep

STEPS = [
    ImageStep("wait", 0, 0),
    ImageStep("fetch", 0, 4 << 20),
    ImageStep("fetch", 2 << 20, 4 << 20),
    ImageStep("unpack", 1 << 20, 0),
    ImageStep("unpack", 3 << 20, 0),
]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def tell_all(*, as_json: bool) -> None:
    with Shown("x\x1b[31m:1", as_json=as_json) as shown:
        for step in STEPS:
            shown.tell(step)


def test_a_line_for_each_phase(capsys: pytest.CaptureFixture[str]) -> None:
    tell_all(as_json=False)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == ["x\\x1b[31m:1: fetching", "x\\x1b[31m:1: unpacking"]


def test_json_for_programs(capsys: pytest.CaptureFixture[str]) -> None:
    tell_all(as_json=True)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == len(STEPS)
    assert lines[2] == {"phase": "fetch", "done_bytes": 2 << 20, "total_bytes": 4 << 20}


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    tell_all(as_json=False)
    assert "unpacking" in terminal.getvalue()
    assert "3.1" in terminal.getvalue(), "what has come, in megabytes"
