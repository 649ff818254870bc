"""The keeper of the voters' seats, as far as it takes no etcd."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

from spinetta.model import NodeId
from spinetta.node.keeper import SeatKeeper
from spinetta.trust.dial import Dialer
from tests.builders import node_record


def test_of_two_nodes_with_one_peer_url_none_is_given_a_seat() -> None:
    """Which of them would be added? The member is known by its URL alone."""
    other: Any = SimpleNamespace()
    keeper = SeatKeeper(other, other, 3, Dialer.open(), other, replace_after_s=0.0, holds_office=other)
    url = "http://127.0.0.9:7222"
    nodes = {url: node_record(NodeId("b"))}  # the record of "a", with the same URL, came before it
    assert asyncio.run(cast("Any", keeper)._answers("a", nodes)) is False
