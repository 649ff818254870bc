"""Channels to the other nodes of the cluster, opened when needed and kept."""

from __future__ import annotations

from collections import OrderedDict, deque

import grpc.aio

from spinetta import codec, keys, validate
from spinetta.errors import NotFound, UserError
from spinetta.model import NodeId, NodeRecord
from spinetta.node.services import limits
from spinetta.store.protocol import Store
from spinetta.trust.dial import Dialer, node_name
from spinetta.v1 import api_pb2_grpc as rpc

FORWARDED = ("spinetta-forwarded", "1")  # a node that gets such a call answers it itself or refuses: no loops
OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.keepalive_time_ms", 10_000),  # a frozen machine must not hold a followed log for ever
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    ("grpc.max_receive_message_length", validate.MESSAGE_BYTES_MAX),
    ("grpc.enable_http_proxy", 0),
)


class Peers:
    """Stubs for other nodes, by name. What answers must prove that it is the node meant."""

    def __init__(self, store: Store, dialer: Dialer) -> None:
        self._store = store
        self._dialer = dialer
        self._serial = dialer.serial
        self._channels: OrderedDict[tuple[str, NodeId], grpc.aio.Channel] = OrderedDict()
        self._retired: deque[grpc.aio.Channel] = deque()  # made with an earlier certificate; streams on them go on

    async def record(self, name: NodeId, *, field: str = "node") -> NodeRecord:
        """What a live node says of itself.

        Raises:
            NotFound: no such node is known.
            UserError: it is known, but not alive (reason ``node-unreachable``).
        """
        snapshot = await self._store.read([keys.node(name), keys.incarnation(name)])
        here, life = snapshot.entries[keys.node(name)], snapshot.entries[keys.incarnation(name)]
        if here is not None:
            return codec.decode_node(here.value)
        if life is not None:
            raise UserError(
                f"node {name} is lost", field=field, reason="node-unreachable", hint="see `spinetta node list`"
            )
        raise NotFound(f"there is no node {name}", field=field, hint="see `spinetta node list`")

    async def stub(self, node: NodeRecord) -> rpc.SpinettaAsyncStub:
        """A stub for a node."""
        return rpc.SpinettaStub(await self._channel(node))

    async def peer_stub(self, node: NodeRecord) -> rpc.PeerAsyncStub:
        """The same for what nodes ask of each other."""
        return rpc.PeerStub(await self._channel(node))

    async def _channel(self, node: NodeRecord) -> grpc.aio.Channel:
        if self._serial != self._dialer.serial:  # this node's certificate has been renewed
            self._serial = self._dialer.serial
            self._retired.extend(self._channels.values())
            self._channels.clear()
            while len(self._retired) > limits.CHANNELS_MAX:
                await self._retired.popleft().close()
        key = (node.address, node.name)
        channel = self._channels.get(key)
        if channel is None:
            while len(self._channels) >= limits.CHANNELS_MAX:
                _, old = self._channels.popitem(last=False)
                await old.close(grace=limits.FORWARD_TIMEOUT_S)
            channel = self._channels[key] = self._dialer.channel(node.address, node_name(node.name), OPTIONS)
        self._channels.move_to_end(key)
        return channel

    async def close(self) -> None:
        """Close all channels. May be called twice."""
        channels = [*self._channels.values(), *self._retired]
        self._channels.clear()
        self._retired.clear()
        for channel in channels:
            await channel.close()
