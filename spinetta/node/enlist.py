"""How a node gets its first certificates: with a token, at the door of a cluster.

Its keys are made once and kept on disk (`PendingKeys`) until they are certified: a node that is stopped while it waits
for an approval, or whose answer was lost, asks again with the same keys and gets the same answer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import grpc.aio

from spinetta import __version__, tokens
from spinetta.access import NodeRole, TokenRole, fingerprint
from spinetta.errors import InvariantViolation, OutcomeUnknown, SpinettaError, StoreUnavailable, UserError
from spinetta.node.answers import error_of
from spinetta.tokens import JoinToken
from spinetta.trust import certificates, sealing
from spinetta.trust.backoff import Backoff
from spinetta.trust.contact import Met, meet
from spinetta.trust.credentials import EtcdPems, NodeCredentials, PendingKeys
from spinetta.trust.dial import VOTER, Dialer
from spinetta.v1 import trust_pb2 as pb
from spinetta.v1.trust_pb2_grpc import EnrollStub

ASK_S = 10.0  # one Join: two reads and a transaction
ASK_FIRST_S = 0.2  # after no voter has answered, then longer
ASK_AGAIN_S = 2.0  # while an administrator decides; an hour of it is 1,800 small reads
ASK_AGAIN_MAX_S = 15.0
REACH_S = 60.0  # how long a cluster that let itself be seen may be silent before a node gives up joining
_ROLES = {TokenRole.VOTER: NodeRole.VOTER, TokenRole.WORKER: NodeRole.WORKER}


async def enlist(
    peers: Sequence[str],
    token: str,
    *,
    name: str,
    address: str,
    directory: Path,
    say: Callable[[str], None],
    role: NodeRole | None = None,
    own: NodeCredentials | None = None,
) -> NodeCredentials:
    """Join a secured cluster: the node's credentials, saved in `directory` (DATA/trust).

    Waits for as long as it takes until an administrator has approved it, if that is needed; may be cancelled and asked
    again.

    Args:
        peers: API addresses of any of the cluster's nodes.
        token: a join token's text.
        name: of this node.
        address: HOST:PORT of its API.
        directory: where its credentials go; keys that wait are kept there too.
        say: told, in words, what is being waited for.
        role: the token must be for this one; None: whichever.
        own: credentials that this node has had, and that have ended: with the same keys it is the same node.

    Raises:
        UserError: the token, the name, a clock or the cluster is not what it should be, or a file cannot be written.
        StoreUnavailable: nobody answers.
    """
    if not token:
        raise UserError(
            "to join a secured cluster takes a join token",
            field="node.token",
            hint="an administrator makes one: spinetta token create --role worker; then: spinetta node join --token …",
            reason="no-token",
        )
    parsed = tokens.parse(token)
    _check_role(parsed, role)
    met = await meet(peers, parsed.authority_hash)
    keys = _keys_of(own) or PendingKeys.load_or_create(directory)
    request = pb.JoinRequest(
        token=token.strip(),
        name=name,
        address=address,
        csr=certificates.csr(certificates.load_key(keys.node_key_pem), name),
        etcd_csr=certificates.csr(certificates.load_key(keys.etcd_key_pem), name),
        sealing_key=sealing.public_of(keys.sealing_private),
        version=__version__,
    )
    answer = await _ask_until_decided(request, met, say)
    credentials = _save(directory, keys, answer.certificates, met)
    PendingKeys.forget(directory)
    say(f"this node has joined cluster {credentials.cluster} as {credentials.role.name.lower()}")
    return credentials


def _keys_of(own: NodeCredentials | None) -> PendingKeys | None:
    """The keys of earlier credentials. A worker has none for etcd, and needs none."""
    if own is None:
        return None
    etcd = own.etcd_pems
    etcd_key = etcd.key_pem if etcd is not None else certificates.key_pem(certificates.new_key())
    return PendingKeys(own.node_key_pem, etcd_key, own.sealing_private)


def _check_role(token: JoinToken, role: NodeRole | None) -> None:
    found = _ROLES.get(token.role)
    if found is None:
        raise UserError(
            "the join token is for a person",
            field="token",
            hint="use it with: spinetta login --token; for a node: spinetta token create --role worker",
            reason="token-role",
        )
    if role is not None and role is not found:
        raise UserError(
            f"the join token is for a node of role {found.name.lower()}, not {role.name.lower()}",
            field="token",
            hint=f"spinetta token create --role {role.name.lower()}",
            reason="token-role",
        )


async def _ask_until_decided(request: pb.JoinRequest, met: Met, say: Callable[[str], None]) -> pb.JoinResponse:
    dialer = Dialer.guest(met.ca_bundle)
    addresses = list(dict.fromkeys([*met.voters, met.address]))
    wait, said = Backoff(ASK_AGAIN_S, ASK_AGAIN_MAX_S), False
    while True:
        answer = await _ask_any(dialer, addresses, request, say)
        if answer.decision == pb.JoinResponse.APPROVED:
            return answer
        if answer.decision == pb.JoinResponse.REJECTED:
            raise UserError(
                f"an administrator has rejected node {request.name}",
                field="node.name",
                hint="ask why; it can still be approved: spinetta node approve " + request.name,
                reason="rejected",
            )
        if answer.decision != pb.JoinResponse.PENDING:
            raise UserError("the cluster's answer is of a later version", hint="use the cluster's version of spinetta")
        if not said:
            say(
                f"waiting to be approved by an administrator: spinetta node approve {request.name}; "
                f"the key of this node, as `spinetta node requests` shows it: {_fingerprint(request.csr)}"
            )
            said = True
        await wait.pause()


def _fingerprint(csr_pem: bytes) -> str:
    """What tells this node from another that says the same name, in the form of `spinetta node requests`."""
    return fingerprint(certificates.csr_key_hash(csr_pem))


async def _ask_any(
    dialer: Dialer, addresses: Sequence[str], request: pb.JoinRequest, say: Callable[[str], None]
) -> pb.JoinResponse:
    """Ask voters in turn until one answers, for a limited time: asking again is safe, whatever became of it before."""
    end_s = time.monotonic() + REACH_S
    wait = Backoff(ASK_FIRST_S, ASK_AGAIN_S)
    said = False
    while True:
        failure: SpinettaError | None = None
        for address in addresses:
            try:
                return await _ask(dialer, address, request)
            except (StoreUnavailable, OutcomeUnknown) as e:
                failure = e
            except UserError as e:
                if e.reason != "ask-a-voter":
                    raise
                failure = e
        if time.monotonic() > end_s:
            raise StoreUnavailable(f"no voter lets this node in: {failure}")
        if not said:
            say(f"no voter answers yet, trying again: {failure}")
            said = True
        await wait.pause()


async def _ask(dialer: Dialer, address: str, request: pb.JoinRequest) -> pb.JoinResponse:
    request.wall_ms = time.time_ns() // 1_000_000
    async with dialer.channel(address, VOTER) as channel:
        try:
            return await EnrollStub(channel).Join(request, timeout=ASK_S)
        except grpc.aio.AioRpcError as e:
            raise error_of(e, address) from e


def _save(directory: Path, keys: PendingKeys, given: pb.Certificates, met: Met) -> NodeCredentials:
    if given.cluster != met.cluster:
        raise InvariantViolation(f"node {met.node} of cluster {met.cluster} certifies for cluster {given.cluster}")
    etcd = None
    if given.etcd_certificate:
        etcd = EtcdPems(given.etcd_ca_bundle, given.etcd_certificate, keys.etcd_key_pem)
    return NodeCredentials.create(
        directory,
        ca_pem=given.ca_bundle,
        node_pem=given.certificate,
        node_key_pem=keys.node_key_pem,
        sealing_private=keys.sealing_private,
        etcd=etcd,
    )
