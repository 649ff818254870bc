"""Connections to nodes, kept for the next call: so many, and no more."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import grpc.aio

from spinetta.trust.dial import Dialer
from spinetta.v1.api_pb2_grpc import SpinettaStub
from spinetta.v1.trust_pb2_grpc import EnrollStub, TrustStub
from spinetta.validate import MESSAGE_BYTES_MAX

if TYPE_CHECKING:
    from spinetta.v1.api_pb2_grpc import SpinettaAsyncStub
    from spinetta.v1.trust_pb2_grpc import EnrollAsyncStub, TrustAsyncStub

LINKS_MAX = 64  # connections kept: who follows logs of many workers has one to each; the longest unused ones go
RETIRED_MAX = 8  # connections with an older certificate, or let go of, kept for the streams on them

_OPTIONS: Sequence[tuple[str, int]] = (
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
    ("grpc.enable_http_proxy", 0),  # nodes are never behind a web proxy, and loopback least of all
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    # A frozen node keeps its connections: a stream notices by these.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 0),
    ("grpc.http2.max_pings_without_data", 0),
)


@dataclass(frozen=True, slots=True)
class Link:
    """A connection to one node, and the services that are called through it."""

    channel: grpc.aio.Channel
    serial: int
    api: SpinettaAsyncStub
    trust: TrustAsyncStub
    enroll: EnrollAsyncStub


@dataclass(slots=True)
class Links:
    """The connections of one client."""

    dialer: Dialer
    _open: OrderedDict[tuple[str, str], Link] = field(default_factory=OrderedDict)
    _retired: deque[Link] = field(default_factory=deque)

    def __len__(self) -> int:
        return len(self._open) + len(self._retired)

    async def get(self, address: str, expect: str) -> Link:
        """The one to a node; `expect`: who it must prove to be. Connects when it is first used."""
        key, serial = (address, expect), self.dialer.serial
        link = self._open.get(key)
        if link is not None and link.serial != serial:
            # Made with a certificate that has been renewed meanwhile. Streams on it may go on.
            await self._retire(self._open.pop(key))
            link = self._open.get(key)  # another call may have made it meanwhile
        while link is None and len(self._open) >= LINKS_MAX:
            await self._retire(self._open.popitem(last=False)[1])
            link = self._open.get(key)
        if link is None:
            channel = self.dialer.channel(address, expect, _OPTIONS)
            link = Link(channel, serial, SpinettaStub(channel), TrustStub(channel), EnrollStub(channel))
            self._open[key] = link
        self._open.move_to_end(key)
        return link

    async def _retire(self, link: Link) -> None:
        """Not for new calls any more."""
        self._retired.append(link)
        if len(self._retired) > RETIRED_MAX:
            await self._retired.popleft().channel.close()

    async def close(self) -> None:
        """Close all. May be called twice."""
        links = [*self._open.values(), *self._retired]
        self._open.clear()
        self._retired.clear()
        for link in links:
            await link.channel.close()
