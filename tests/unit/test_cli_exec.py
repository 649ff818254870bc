"""What `spinetta exec` says of itself and of an end."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from spinetta.cli import execute

SAID = 'exec failed: exec: "nope": executable file not found in $PATH'
COULD_NOT = "the command could not be started"


@pytest.mark.parametrize(
    ("message", "last", "told"),
    [
        (f"{COULD_NOT}: {SAID}", b"", f"{COULD_NOT}: {SAID}"),
        (f"{COULD_NOT}: {SAID}", SAID.encode() + b"\r\n", COULD_NOT),
        (f"{COULD_NOT}: {SAID}", b"of its own\n", f"{COULD_NOT}: {SAID}"),
        (SAID, SAID.encode(), SAID),
        ("memory ran out", b"\x1b[2J\xff", "memory ran out"),
    ],
)
def test_a_reason_is_told_once(message: str, last: bytes, told: str) -> None:
    assert execute._not_twice(message, last) == told


def test_its_help_tells_its_own_exit_codes() -> None:
    text = CliRunner().invoke(execute.exec_, ["--help"]).output
    assert "126    the command could not be started" in text
    assert "no such task or node" not in text
