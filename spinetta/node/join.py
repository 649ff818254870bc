"""Getting to know a cluster through any of its nodes, before this node becomes one of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import grpc

from spinetta import units
from spinetta.errors import UserError
from spinetta.options import PEERS_MAX
from spinetta.trust.certificates import CLOCK_SKEW_MAX_S
from spinetta.trust.dial import ANY, VOTER, Dialer
from spinetta.v1 import api_pb2 as pb
from spinetta.v1 import trust_pb2 as trust
from spinetta.v1.api_pb2_grpc import SpinettaStub
from spinetta.v1.trust_pb2_grpc import EnrollStub

ASK_S = 5.0  # a node that needs longer than this to describe its cluster is as good as absent
GATEWAYS_MAX = 16  # voters that a worker remembers: a few times as many as there are
UNREACHABLE = "unreachable"


@dataclass(frozen=True, slots=True)
class Introduction:
    """What a peer told of its cluster."""

    peer: str
    cluster_id: str
    client_urls: tuple[str, ...]
    gateways: tuple[str, ...]  # API addresses of the voters

    def to_remember(self, earlier: Sequence[str]) -> tuple[str, ...]:
        """Where a worker looks for voters from now on: those told of, who told, then the `earlier` ones.

        Nothing known is forgotten for what one node says: in bad times it may see no voter at all.
        """
        return tuple(dict.fromkeys((*self.gateways, self.peer, *earlier)))[:GATEWAYS_MAX]


async def introduce(peers: Sequence[str], *, name: str, returning: bool, wall_ms: int, dialer: Dialer) -> Introduction:
    """Ask the peers in turn; the first answer counts. In a secured cluster only voters tell; workers know of them.

    Args:
        peers: API addresses.
        name: of this node; must not be alive in the cluster unless this node is `returning` to it.
        returning: this node's data directory says that it has been part of a cluster before.
        wall_ms: this machine's clock, to compare with the peer's.

    Raises:
        UserError: no peer answers, the clocks are apart, the name is taken, or the cluster has no voter to talk to.
    """
    failures: dict[str, str] = {}
    asked = list(peers)
    for peer in asked:  # grows meanwhile
        try:
            return await _ask(peer, name, returning, wall_ms, dialer)
        except grpc.aio.AioRpcError as e:
            failures[peer] = _why(e)
        if dialer.is_secured and len(asked) < PEERS_MAX:
            asked += [v for v in await _voters_known_to(peer, dialer) if v not in asked]
    raise UserError(
        f"no peer can be reached: {'; '.join(f'{peer}: {why}' for peer, why in failures.items())}",
        field="node.peers",
        hint="check the address and that a node runs there; without --peers a new cluster is started",
        reason=UNREACHABLE,
    )


def _why(error: grpc.aio.AioRpcError) -> str:
    if error.code() is grpc.StatusCode.UNIMPLEMENTED:
        return "something answers there that is no node of Spinetta"
    if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
        return f"no answer within {ASK_S:g} s"
    return (error.details() or error.code().name.lower()).splitlines()[0]


async def _voters_known_to(peer: str, dialer: Dialer) -> tuple[str, ...]:
    """Where a node that may be a worker says that voters are. They prove it themselves."""
    async with dialer.channel(peer, ANY) as channel:
        try:
            told = await EnrollStub(channel).GetAuthorities(trust.GetAuthoritiesRequest(), timeout=ASK_S)
        except grpc.aio.AioRpcError:
            return ()
    return tuple(told.voters)


async def _ask(peer: str, name: str, returning: bool, wall_ms: int, dialer: Dialer) -> Introduction:
    async with dialer.channel(peer, VOTER) as channel:
        stub = SpinettaStub(channel)
        described = await stub.DescribeCluster(pb.DescribeClusterRequest(), timeout=ASK_S)
        listed = await stub.ListNodes(pb.ListNodesRequest(), timeout=ASK_S)
    skew_s = abs(described.wall_ms - wall_ms) / 1000
    if skew_s > CLOCK_SKEW_MAX_S:
        raise UserError(
            f"this machine's clock and that of {described.node} ({peer}) are {units.format_duration(skew_s)} apart",
            field="node.clock",
            hint=f"set both by NTP; at most {CLOCK_SKEW_MAX_S:g} s are allowed",
            reason="clock-skew",
        )
    alive = {n.node.name: n.node.address for n in listed.nodes if n.status not in ("lost", "condemned")}
    if name in alive and not returning:
        raise UserError(
            f"a node named {name} is alive in this cluster, at {alive[name]}",
            field="node.name",
            hint="choose another name with --name",
            reason="already-exists",
        )
    urls = tuple(v.client_url for v in described.voters if v.client_url and not v.learner)
    if not urls:
        raise UserError(f"{described.node} ({peer}) knows of no voter", field="node.peers", hint="try another peer")
    gateways = tuple(n.node.address for n in listed.nodes if n.voter and n.node.address)
    return Introduction(peer, described.cluster_id, urls, gateways)
