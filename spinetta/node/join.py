"""Getting to know a cluster through any of its nodes, before this node becomes one of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import grpc

from spinetta import units
from spinetta.errors import UserError
from spinetta.v1 import api_pb2 as pb
from spinetta.v1.api_pb2_grpc import SpinettaStub

ASK_S = 5.0  # a node that needs longer than this to describe its cluster is as good as absent
CLOCK_SKEW_MAX_S = 30.0  # ids are ordered by the submitting node's clock, and people compare times across nodes


@dataclass(frozen=True, slots=True)
class Introduction:
    """What a peer told of its cluster."""

    peer: str
    cluster_id: str
    client_urls: tuple[str, ...]


async def introduce(peers: Sequence[str], *, name: str, returning: bool, wall_ms: int) -> Introduction:
    """Ask the peers in turn; the first answer counts.

    Args:
        peers: API addresses.
        name: of this node; must not be alive in the cluster unless this node is `returning` to it.
        returning: this node's data directory says that it has been part of a cluster before.
        wall_ms: this machine's clock, to compare with the peer's.

    Raises:
        UserError: no peer answers, the clocks are apart, the name is taken, or the cluster has no voter to talk to.
    """
    failures = []
    for peer in peers:
        try:
            return await _ask(peer, name, returning, wall_ms)
        except grpc.aio.AioRpcError as e:
            failures.append(f"{peer}: {_why(e)}")
    raise UserError(
        f"no peer can be reached: {'; '.join(failures)}",
        field="node.peers",
        hint="check the address and that a node runs there; without --peers a new cluster is started",
    )


def _why(error: grpc.aio.AioRpcError) -> str:
    if error.code() is grpc.StatusCode.UNIMPLEMENTED:
        return "something answers there that is no node of Spinetta"
    if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
        return f"no answer within {ASK_S:g} s"
    return (error.details() or error.code().name.lower()).splitlines()[0]


async def _ask(peer: str, name: str, returning: bool, wall_ms: int) -> Introduction:
    async with grpc.aio.insecure_channel(peer) as channel:
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
    return Introduction(peer, described.cluster_id, urls)
