"""``spinetta list --archived``: times as people write them, and what does not go together."""

from __future__ import annotations

import datetime
import json

import pytest

from spinetta.cli.app import run
from spinetta.cli.archived import time_ms
from spinetta.errors import UserError

NOW_S = 1_800_000_000.0


@pytest.mark.parametrize(
    ("text", "expected_s"),
    [
        (None, 0.0),
        ("1h", NOW_S - 3600),
        ("30d", NOW_S - 30 * 86400),
        ("2026-01-31", datetime.datetime(2026, 1, 31).astimezone().timestamp()),
        ("2026-01-31T08:00", datetime.datetime(2026, 1, 31, 8).astimezone().timestamp()),
        ("2026-01-31T08:00:00+00:00", 1769846400.0),
    ],
)
def test_times(text: str | None, expected_s: float) -> None:
    assert time_ms(text, "since", NOW_S) == int(expected_s * 1000)


@pytest.mark.parametrize("text", ["", "yesterday", "2026-13-01", "99999d", "-1h", "1969-12-01"])
def test_what_is_no_time(text: str) -> None:
    with pytest.raises(UserError) as raised:
        time_ms(text, "since", NOW_S)
    assert raised.value.field == "since"
    assert "2026-01-31" in raised.value.hint


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--archived", "--state", "running"], "all archived tasks are complete"),
        (["--archived", "--watch"], "--watch and --archived"),
        (["--since", "1d"], "without --archived"),
        (["--before", "1d"], "without --archived"),
        (["--archived", "--since", "soon"], "not a time"),
    ],
)
def test_what_does_not_go_together(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["list", "--json", *options]) == 2
    assert message in json.loads(capsys.readouterr().out)["error"]["message"]
