"""Channels that are kept, and opened anew when a certificate has been renewed."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import grpc.aio

from spinetta.trust.dial import Dialer, Option

CHANNELS_MAX = 64  # each is a connection here and there; the one unused for longest goes first
RETIRED_MAX = 64  # old ones, for the calls on them; beyond that the oldest is cut
GRACE_S = 60.0  # calls that were under way may end; streams that go on for longer are cut, and begin again


@dataclass(frozen=True, slots=True)
class _Kept:
    channel: grpc.aio.Channel
    serial: int


class Channels:
    """One channel for each address and expected name. Calls on one that has been replaced may go on for `grace_s`.

    A connection goes on under the certificate it was made with, which expires: so whoever calls asks `get` for each
    call, and keeps no channel.
    """

    def __init__(
        self,
        dialer: Dialer,
        options: Sequence[Option] = (),
        *,
        channels_max: int = CHANNELS_MAX,
        grace_s: float = GRACE_S,
    ) -> None:
        self._dialer = dialer
        self._options = tuple(options)
        self._channels_max = channels_max
        self._grace_s = grace_s
        self._kept: OrderedDict[tuple[str, str], _Kept] = OrderedDict()
        self._retired: OrderedDict[asyncio.Task[None], asyncio.Event] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, address: str, expect: str) -> grpc.aio.Channel:
        """The channel to a node. See `Dialer.channel` for the arguments and errors."""
        place, serial = (address, expect), self._dialer.serial
        kept = self._kept.get(place)
        if kept is None or kept.serial != serial:
            channel = self._dialer.channel(address, expect, self._options)  # may raise: then all is as before
            if kept is not None:
                self._retire(self._kept.pop(place).channel)
            while len(self._kept) >= self._channels_max:
                self._retire(self._kept.popitem(last=False)[1].channel)
            kept = self._kept[place] = _Kept(channel, serial)
        self._kept.move_to_end(place)
        return kept.channel

    def drop(self, address: str, expect: str) -> None:
        """Let a channel go, e.g. because its node has left."""
        kept = self._kept.pop((address, expect), None)
        if kept is not None:
            self._retire(kept.channel)

    async def close(self) -> None:
        """Close all channels and end all calls. May be called twice."""
        while self._kept:
            await self._kept.popitem()[1].channel.close()
        retired = list(self._retired)
        for enough in self._retired.values():
            enough.set()
        await asyncio.gather(*retired)

    def _retire(self, channel: grpc.aio.Channel) -> None:
        if len(self._retired) >= RETIRED_MAX:
            self._retired.popitem(last=False)[1].set()
        enough = asyncio.Event()
        task = asyncio.get_running_loop().create_task(_close_later(channel, enough, self._grace_s))
        self._retired[task] = enough
        task.add_done_callback(lambda t: self._retired.pop(t, None))


async def _close_later(channel: grpc.aio.Channel, enough: asyncio.Event, grace_s: float) -> None:
    # Not `close(grace_s)`: once begun, that can be neither cut short nor done again.
    try:
        async with asyncio.timeout(grace_s):
            await enough.wait()
    except TimeoutError:
        pass
    finally:
        await channel.close()
