"""The first contact with a cluster, of a node that joins and of a person who logs in.

Whoever answers is not to be believed yet. So: look at the certificate that is shown, ask over a connection to the
holder of that very certificate which authorities there are, keep those alone whose public key has the hash that the
token says, and then begin anew, believing only them. Nothing secret is sent before that.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import grpc
import grpc.aio

from spinetta import names
from spinetta.errors import StoreUnavailable, UserError
from spinetta.trust import certificates
from spinetta.trust.certificates import CLOCK_SKEW_MAX_S
from spinetta.trust.dial import ANY, Dialer, fetch_leaf, unverified
from spinetta.v1 import trust_pb2 as trust
from spinetta.v1.trust_pb2_grpc import EnrollStub

ATTEMPT_S = 5.0  # of each step at one node: it is there and answers at once, or another is asked
ANSWER_BYTES_MAX = 1 << 20  # from somebody who is not believed yet; a bundle has 64 KiB at most
VOTERS_MAX = 64

_OPTIONS = (
    ("grpc.enable_http_proxy", 0),
    ("grpc.max_receive_message_length", ANSWER_BYTES_MAX),
    ("grpc.use_local_subchannel_pool", 1),  # a connection made under another belief must never be used again
)


@dataclass(frozen=True, slots=True)
class Met:
    """A cluster that was met.

    Attributes:
        cluster: the trust domain.
        ca_bundle: its authorities' certificates; if verified, only the one with that hash.
        ca_hash: of the authority that was believed, or (`verified` False) that is to be compared.
        voters: API addresses of nodes that answer Join and Login; where it was met, when none is known.
        wall_ms: its clock.
        node, address: who answered, and where.
        verified: whether `ca_hash` was given and agreed.
    """

    cluster: str
    ca_bundle: bytes
    ca_hash: bytes
    voters: tuple[str, ...]
    wall_ms: int
    node: str
    address: str
    verified: bool


async def meet(addresses: Sequence[str], ca_hash: bytes | None, *, timeout_s: float = ATTEMPT_S) -> Met:
    """Meet a cluster at the first of these addresses where it is.

    Args:
        addresses: HOST:PORT of any of its nodes.
        ca_hash: of the public key of one of its authorities, from a token or a person. None: nothing is believed, and
            nothing is verified of the answer: compare its `ca_hash`, and then meet again with it.
        timeout_s: of each step at one node.

    Raises:
        UserError: what answers is another cluster (reason ``other-cluster``), is not to be believed (``impostor``), is
            no node (``not-a-node``, ``not-tls``), or the clocks are apart (``clock``).
        StoreUnavailable: nobody answers.
    """
    wrong: UserError | None = None
    silent: StoreUnavailable | None = None
    for address in addresses:
        try:
            return await _meet(address, ca_hash, timeout_s)
        except UserError as e:
            wrong = wrong or e
        except StoreUnavailable as e:
            silent = e
    raise wrong or silent or UserError("no node is named", hint="HOST:PORT of any node of the cluster")


async def _meet(address: str, ca_hash: bytes | None, timeout_s: float) -> Met:
    leaf = await fetch_leaf(address, timeout_s)
    answer = await _ask(unverified(leaf), address, timeout_s)
    if answer is None:
        raise StoreUnavailable(f"the node at {address} does not answer")
    offered = certificates.split_pem(answer.ca_bundle)
    if not offered:
        raise UserError(f"the node at {address} names no authority", reason="not-a-node")
    if ca_hash is None:
        return _met(address, answer, certificates.authority_hash(offered[0]), verified=False)
    believed = [one for one in offered if certificates.authority_hash(one) == ca_hash]
    if not believed:
        raise UserError(
            f"the node at {address} is of cluster {certificates.cluster_of(offered[0])}, whose authority is not "
            "the one that was named",
            hint="the address or the token is another cluster's, or the authority has been changed since: make a new "
            "token with `spinetta token create`; if neither is so, somebody stands in between",
            reason="other-cluster",
        )
    # The other authorities that were offered may be anybody's.
    answer = await _ask(Dialer.guest(b"".join(believed)), address, timeout_s)
    if answer is None:
        raise UserError(
            f"what answers at {address} shows the cluster's authority, but no certificate signed by it",
            hint="somebody may stand in between; if the authority was changed a moment ago: make a new token",
            reason="impostor",
        )
    # Whoever has answered may be a worker, and a hostile one: what else it offers is still not believed. A voter tells
    # of the other authorities, with the certificate that it gives.
    met = replace(_met(address, answer, ca_hash, verified=True), ca_bundle=b"".join(believed))
    apart_s = abs(met.wall_ms / 1000 - time.time())
    if apart_s > CLOCK_SKEW_MAX_S:
        raise UserError(
            f"the clock here and that of node {met.node} are {apart_s:.0f} s apart",
            hint=f"set both, e.g. with NTP; at most {CLOCK_SKEW_MAX_S:g} s are allowed",
            reason="clock",
        )
    return met


def _met(address: str, answer: trust.GetAuthoritiesResponse, ca_hash: bytes, *, verified: bool) -> Met:
    bundle = certificates.split_pem(answer.ca_bundle)
    clusters = {certificates.cluster_of(one) for one in bundle}
    if clusters != {answer.cluster}:
        raise UserError(f"the node at {address} names authorities of other clusters", reason="not-a-node")
    voters = []
    for text in answer.voters[:VOTERS_MAX]:
        try:
            voters.append(names.check_address(text))
        except UserError:  # of a later version, perhaps: one that we can use is enough
            continue
    return Met(
        answer.cluster,
        b"".join(bundle),
        ca_hash,
        tuple(dict.fromkeys(voters)) or (address,),
        answer.wall_ms,
        answer.node,
        address,
        verified,
    )


async def _ask(dialer: Dialer, address: str, timeout_s: float) -> trust.GetAuthoritiesResponse | None:
    """The answer; None when there is no connection."""
    async with dialer.channel(address, ANY, _OPTIONS) as channel:
        try:
            return await EnrollStub(channel).GetAuthorities(trust.GetAuthoritiesRequest(), timeout=timeout_s)
        except grpc.aio.AioRpcError as e:
            if e.code() is grpc.StatusCode.UNAVAILABLE:
                return None
            if e.code() is grpc.StatusCode.UNIMPLEMENTED:
                raise UserError(f"the node at {address} lets nobody in: it is too old", reason="not-a-node") from e
            text = e.details() or e.code().name
            raise StoreUnavailable(f"the node at {address} does not answer: {text}") from e
