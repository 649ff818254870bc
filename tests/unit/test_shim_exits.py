"""What a shim says of an end, read by value."""

from __future__ import annotations

import pytest

from spinetta.model import Reason
from spinetta.runtime.client import parse_exit
from spinetta.runtime.shim.attempt import make_exit


def test_every_reason_is_read_as_it_is() -> None:
    for reason in Reason:
        told = parse_exit(make_exit(str(reason), exit_code=3, message="why"))
        assert told is not None
        assert (told.reason, told.exit_code, told.message) == (reason, 3, "why")


@pytest.mark.parametrize(
    ("exit_code", "message", "reason", "said"),
    [
        (137, "too hot", Reason.EXIT, "heat-limit: too hot"),
        (0, "", Reason.SIGNAL, "heat-limit"),
        (None, "too hot", Reason.SIGNAL, "heat-limit: too hot"),
    ],
)
def test_a_reason_of_a_later_version_is_told_in_words(
    exit_code: int | None, message: str, reason: Reason, said: str
) -> None:
    """A daemon that was put back to an earlier version goes on with the later one's shim."""
    told = parse_exit(make_exit("heat-limit", exit_code=exit_code, signal=9, message=message))
    assert told is not None
    assert (told.reason, told.exit_code, told.message) == (reason, exit_code, said)
