"""Why no connection stands: a node that has just begun to listen is not one that does not believe us."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from spinetta.client import diagnose
from spinetta.errors import Denied, UserError
from spinetta.trust.dial import Dialer, Pems


@pytest.mark.parametrize(("looks", "denied"), [((False, True, True), False), ((False, True, False), True)])
def test_a_node_that_begins_to_listen_between_two_looks_is_believed(
    monkeypatch: pytest.MonkeyPatch, looks: Sequence[bool], denied: bool
) -> None:
    """Ours, a guest's, ours again. No real node can be made to begin at just that moment."""
    left = list(looks)

    async def gets_in(dialer: Dialer, address: str, timeout_s: float) -> bool:
        return left.pop(0)

    monkeypatch.setattr(diagnose, "_gets_in", gets_in)
    monkeypatch.setattr(Dialer, "guest", lambda _authorities: Dialer.open())
    pems: Pems = (b"ca", b"mine", b"key")

    async def look() -> UserError | None:
        return await diagnose._look("10.0.0.1:7220", Dialer.secured(lambda: pems), pems, 1.0)

    found = asyncio.run(look())
    assert isinstance(found, Denied) == denied
    assert left == []
