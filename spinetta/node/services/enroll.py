# ruff: noqa: D102, N802 - RPCs are named, and told of, in the .proto file
"""``spinetta.v1.Enroll``: the door. Nodes and people come in with a token, and leave with a certificate."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar, cast

from spinetta import accesstxn, keys, names, tokens, trustcodec
from spinetta.access import (
    JoinRequest,
    NodeAcl,
    NodeRole,
    Policy,
    TokenRecord,
    TokenRole,
    UserAcl,
    effective_clearances,
)
from spinetta.accesstxn import Change
from spinetta.errors import AlreadyExists, Denied, UserError
from spinetta.model import NodeId
from spinetta.node import keyring as keyrings
from spinetta.node.keyring import Keyring, Known
from spinetta.node.port import NodePort
from spinetta.node.services import tokendesk
from spinetta.node.services.access import are_held, check_room, committed, read, read_groups, settle
from spinetta.node.services.callers import peer_address
from spinetta.node.services.certify import needs_keyring, node_certificates, open_cluster, user_certificates
from spinetta.node.services.desk import Asked, Desk
from spinetta.node.services.tokendesk import TokenDesk
from spinetta.rights import Call, CallerKind
from spinetta.store.protocol import KeyValue
from spinetta.trust import certificates, sealing
from spinetta.v1 import trust_pb2 as pb
from spinetta.v1 import trust_pb2_grpc as rpc

if TYPE_CHECKING:
    from spinetta.v1 import record_pb2

T = TypeVar("T")
log = logging.getLogger(__name__)

REQUESTS_MAX = 1000  # nodes that wait for approval: 2 KB each, and somebody has to look at every one
VERSION_CHARS_MAX = 64
CSR_BYTES_MAX = 4096  # ours have 400; those of nodes that wait are kept in the store
_DECIDE = "an administrator has to decide about them first: spinetta node requests"
_NODE_ROLES = {TokenRole.VOTER: NodeRole.VOTER, TokenRole.WORKER: NodeRole.WORKER}


@dataclass(frozen=True, slots=True)
class _Newcomer:
    """A `JoinRequest` that can be used."""

    token: tokens.JoinToken
    name: NodeId
    address: str
    csr: bytes
    etcd_csr: bytes
    sealing_key: bytes
    key_hash: bytes


class EnrollApi(rpc.EnrollServicer):
    """Answers guests. `keyring` is None on a worker and in an open cluster."""

    def __init__(self, port: NodePort, desk: Desk, keyring: Keyring | None, checker: TokenDesk | None = None) -> None:
        self._port = port
        self._desk = desk
        self._keyring = keyring
        self._checker = checker or TokenDesk()
        self._turn = asyncio.Lock()  # a hundred nodes with one token need not make each other's transactions conflict

    async def GetAuthorities(self, request: pb.GetAuthoritiesRequest, context: Any) -> pb.GetAuthoritiesResponse:  # noqa: ARG002
        return await self._desk.answer(context, Call.ENROLL, self._authorities)

    async def Join(self, request: pb.JoinRequest, context: Any) -> pb.JoinResponse:
        subject = f"node {request.name[: names.NODE_NAME_MAX]}"
        return await self._desk.answer(context, Call.ENROLL, lambda asked: self._join(request, asked), subject=subject)

    async def Login(self, request: pb.LoginRequest, context: Any) -> pb.LoginResponse:
        return await self._desk.answer(context, Call.ENROLL, lambda asked: self._login(request, asked))

    async def _authorities(self, asked: Asked) -> pb.GetAuthoritiesResponse:
        asked.is_repeat = True  # the same for everybody
        credentials = self._port.credentials
        if credentials is None:
            raise open_cluster()
        bundle = credentials.ca_pem if self._keyring is None else (await self._keyring.read()).cluster.bundle
        return pb.GetAuthoritiesResponse(
            cluster=credentials.cluster,
            ca_bundle=bundle,
            voters=self._port.voter_addresses(),
            wall_ms=self._port.wall_ms(),
            node=self._port.name,
        )

    # --- nodes ---

    async def _join(self, request: pb.JoinRequest, asked: Asked) -> pb.JoinResponse:
        keyring = needs_keyring(self._keyring, self._port)
        self._checker.admit(peer_address(asked.context))
        newcomer = self._newcomer(request)

        async def attempt() -> pb.JoinResponse | None:
            async with self._turn:
                return await self._try_join(keyring, newcomer, asked)

        return await settle(attempt)

    def _newcomer(self, request: pb.JoinRequest) -> _Newcomer:
        token = tokens.parse(request.token)
        tokendesk.check_clocks(request.wall_ms, self._port.wall_ms(), self._port.name)
        check_version(request.version, self._port.version, self._port.name)
        _check_size(request.csr, "csr")
        _check_size(request.etcd_csr, "etcd_csr")
        if len(request.sealing_key) != sealing.KEY_BYTES:
            raise UserError(f"a sealing key has {sealing.KEY_BYTES} bytes", field="sealing_key")
        sealing.seal(b"", request.sealing_key, b"probe")
        if request.etcd_csr:
            certificates.csr_key_hash(request.etcd_csr)
        return _Newcomer(
            token,
            NodeId(names.check_node_name(request.name, "name")),
            names.check_address(request.address, "address"),
            request.csr,
            request.etcd_csr,
            request.sealing_key,
            certificates.csr_key_hash(request.csr),
        )

    async def _try_join(self, keyring: Keyring, new: _Newcomer, asked: Asked) -> pb.JoinResponse | None:
        """One look and one try; None: something has changed meanwhile."""
        acl_key, request_key, token_key = keys.acl_node(new.name), keys.request(new.name), keys.token(new.token.id)
        found = await read(self._port.store, [acl_key, request_key, token_key, keys.POLICY, *keyrings.KEYS])
        known = keyrings.known_of(found.entries)
        peer = peer_address(asked.context)
        token = self._checker.verify(new.token, found.value(TokenRecord, token_key), known.cluster, peer)
        policy = found.value(Policy, keys.POLICY) or Policy()
        acl, waiting = found.value(NodeAcl, acl_key), found.value(JoinRequest, request_key)
        if acl is not None:
            _check_is_own(acl, new)
            return self._let_in(keyring, known, acl, new, policy)
        if waiting is not None and waiting.key_hash == new.key_hash and waiting.sealing_key == new.sealing_key:
            if asked.is_repeat is None:  # who waits asks every few seconds; what was decided has been told
                asked.is_repeat = True
            decision = pb.JoinResponse.REJECTED if waiting.rejected else pb.JoinResponse.PENDING
            return pb.JoinResponse(decision=decision)
        if waiting is not None and not waiting.rejected:
            raise _taken(new.name, "another machine waits for approval under it")
        tokendesk.check_usable(token, _NODE_ROLES.keys(), self._port.wall_ms())
        role = _NODE_ROLES[token.role]
        if role is NodeRole.VOTER and not new.etcd_csr:
            raise UserError("a node of role voter needs a certificate for its etcd", field="etcd_csr")
        spent = replace(token, uses_left=token.uses_left - 1, last_key_hash=new.key_hash)
        token_change = Change(found.seen(token_key), trustcodec.encode(spent))
        if token.approval or policy.approval:
            await check_room(self._port.store, keys.REQUEST, REQUESTS_MAX, "nodes that wait for approval", _DECIDE)
            request_change = Change(found.seen(request_key), trustcodec.encode(self._request(new, token, role)))
            txn = accesstxn.knock(token_change, request_change, [found.seen(acl_key), found.seen(keys.POLICY)])
            decided = pb.JoinResponse(decision=pb.JoinResponse.PENDING)
        else:
            groups = await read_groups(self._port.store, token.groups)
            acl = NodeAcl(
                new.name,
                role,
                token.clearances,
                token.groups,
                effective_clearances(token.clearances, groups.records),
                new.key_hash,
                new.sealing_key,
                created_ms=self._port.wall_ms(),
                created_by=f"token {token.id}",
            )
            wraps = keyring.shared_with(known, new.name, new.sealing_key) if role is NodeRole.VOTER else []
            txn = accesstxn.admit(
                token_change,
                Change(found.seen(acl_key), trustcodec.encode(acl)),
                [*wraps, *groups.touched],
                [found.seen(request_key), found.seen(keys.POLICY), *groups.absent],
            )
            decided = self._let_in(keyring, known, acl, new, policy)
        asked.is_repeat = False
        if not await committed(self._port.store, txn, asked):
            return None
        log.info("node %s: %s with token %s", new.name, decided.Decision.Name(decided.decision).lower(), token.id)
        return decided

    def _request(self, new: _Newcomer, token: TokenRecord, role: NodeRole) -> JoinRequest:
        return JoinRequest(
            new.name,
            role,
            token.id,
            new.csr,
            new.etcd_csr,
            new.sealing_key,
            new.address,
            new.key_hash,
            token.clearances,
            token.groups,
            created_ms=self._port.wall_ms(),
        )

    def _let_in(self, keyring: Keyring, known: Known, acl: NodeAcl, new: _Newcomer, policy: Policy) -> pb.JoinResponse:
        made = node_certificates(
            keyring,
            known,
            name=acl.name,
            role=acl.role,
            address=new.address,
            csr=new.csr,
            etcd_csr=new.etcd_csr,
            now_s=self._port.wall_ms() / 1000,
            lifetime_s=policy.node_certificate_s,
        )
        return pb.JoinResponse(
            decision=pb.JoinResponse.APPROVED,
            certificates=made,
            role=cast("record_pb2.NodeRole.ValueType", acl.role.value),
            clearances=acl.effective,
            voters=self._port.voter_addresses(),
        )

    # --- people ---

    async def _login(self, request: pb.LoginRequest, asked: Asked) -> pb.LoginResponse:
        keyring = needs_keyring(self._keyring, self._port)
        tokendesk.check_clocks(request.wall_ms, self._port.wall_ms(), self._port.name)
        key_hash = certificates.csr_key_hash(request.csr)
        if not request.token:
            return await settle(lambda: self._login_bearer(keyring, request, asked))
        self._checker.admit(peer_address(asked.context))
        token = tokens.parse(request.token)
        return await settle(lambda: self._try_login(keyring, request, token, key_hash, asked))

    async def _try_login(
        self, keyring: Keyring, request: pb.LoginRequest, token: tokens.JoinToken, key_hash: bytes, asked: Asked
    ) -> pb.LoginResponse | None:
        token_key = keys.token(token.id)
        found = await read(self._port.store, [token_key, keys.POLICY, *keyrings.KEYS])
        known = keyrings.known_of(found.entries)
        peer = peer_address(asked.context)
        record = self._checker.verify(token, found.value(TokenRecord, token_key), known.cluster, peer)
        again = record.role is TokenRole.CLIENT and record.last_key_hash == key_hash and not record.revoked
        if not again:
            tokendesk.check_usable(record, (TokenRole.CLIENT,), self._port.wall_ms())
        asked.subject = f"user {record.user}"
        user_key = keys.acl_user(record.user)
        user = await read(self._port.store, [user_key])
        acl = self._check_user(user.value(UserAcl, user_key), record.user)
        if _is_older(found.entries[token_key], user.entries[user_key]):
            raise Denied(
                f"the join token was made for an earlier user {record.user}",
                field="token",
                hint="ask an administrator for a new one",
                reason="token-revoked",
            )
        is_changed = _is_before_change(found.entries[token_key], user.entries[user_key])
        if again and (record.expires_ms <= self._port.wall_ms() or is_changed):
            # A lost answer is repeated; certificates that were called back are not given again, nor are old ones.
            again = False
            tokendesk.check_usable(record, (TokenRole.CLIENT,), self._port.wall_ms())
        if not again:
            spent = replace(record, uses_left=record.uses_left - 1, last_key_hash=key_hash)
            change = Change(found.seen(token_key), trustcodec.encode(spent))
            txn = accesstxn.change((change,), seen=(user.seen(user_key),))
            if not await committed(self._port.store, txn, asked):
                return None
        policy = found.value(Policy, keys.POLICY) or Policy()
        return self._welcome(keyring, known, acl, request.csr, policy)

    async def _login_bearer(self, keyring: Keyring, request: pb.LoginRequest, asked: Asked) -> pb.LoginResponse | None:
        caller = asked.caller
        if caller.kind is not CallerKind.USER:
            because = caller.unknown_because or "to log in takes a client token, or a bearer token of a known issuer"
            raise Denied(because, reason="unauthenticated", hint="spinetta login --token TOKEN")
        user_key = keys.acl_user(caller.name)
        found = await read(self._port.store, [user_key, keys.POLICY, *keyrings.KEYS])
        if not are_held(found, caller.guards):  # what it showed may have been called back
            await asked.again()
            return None
        # Rights that come from the bearer token's groups end with it; a certificate needs a record of its own.
        acl = self._check_user(found.value(UserAcl, user_key), caller.name)
        policy = found.value(Policy, keys.POLICY) or Policy()
        return self._welcome(keyring, keyrings.known_of(found.entries), acl, request.csr, policy)

    def _check_user(self, user: UserAcl | None, name: str) -> UserAcl:
        if user is None or user.revoked:
            what = "is not known here" if user is None else "has been revoked"
            raise Denied(f"user {name} {what}", hint=f"an administrator can change that: spinetta user add {name}")
        return user

    def _welcome(self, keyring: Keyring, known: Known, user: UserAcl, csr: bytes, policy: Policy) -> pb.LoginResponse:
        # Certificates tell whole seconds only: one made in the very second until which all are void must count.
        now_s = max(self._port.wall_ms(), user.issued_after_ms) / 1000
        name = user.name
        made = user_certificates(keyring, known, name=name, csr=csr, now_s=now_s, lifetime_s=policy.user_certificate_s)
        return pb.LoginResponse(user=name, certificates=made, voters=self._port.voter_addresses())


def check_version(theirs: str, ours: str, node: str) -> None:
    """Refuse a node whose version speaks another protocol: the first number differs, or the second after a 0.

    Raises:
        UserError: with both versions.
    """
    if len(theirs) > VERSION_CHARS_MAX:
        raise UserError("the version is too long", field="version", reason="too-large")
    names.check_printable(theirs, "the version", "version")
    if _protocol(theirs) != _protocol(ours):
        raise UserError(
            f"this machine has version {theirs or 'unknown'} of spinetta, node {node} has {ours}",
            field="version",
            hint="use the cluster's version",
            reason="version",
        )


def _check_size(csr: bytes, field: str) -> None:
    if len(csr) > CSR_BYTES_MAX:
        raise UserError(f"a signing request has at most {CSR_BYTES_MAX} bytes", field=field, reason="too-large")


def _protocol(version: str) -> tuple[str, ...]:
    parts = version.split(".")
    return tuple(parts[:2]) if parts[0] == "0" else tuple(parts[:1])


def _is_older(one: KeyValue | None, other: KeyValue | None) -> bool:
    """By the store's count: clocks of nodes differ."""
    return one is not None and other is not None and one.created < other.created


def _is_before_change(one: KeyValue | None, other: KeyValue | None) -> bool:
    """Whether one was made before the other was last changed."""
    return one is not None and other is not None and one.created < other.modified


def _check_is_own(acl: NodeAcl, new: _Newcomer) -> None:
    if new.key_hash not in (acl.key_hash, acl.next_key_hash) or new.sealing_key != acl.sealing_key:
        raise _taken(acl.name, "a node that was revoked had it" if acl.revoked else "another node has it")
    if acl.revoked:
        raise Denied(
            f"node {acl.name} has been revoked" + (f": {acl.reason}" if acl.reason else ""),
            hint=f"an administrator can free its name: spinetta node forget {acl.name}; then it may join anew",
            reason="revoked",
        )


def _taken(name: str, why: str) -> AlreadyExists:
    return AlreadyExists(
        f"the name {name} is taken: {why}",
        field="name",
        hint="choose another with --name; to replace a node whose data is lost: revoke it, then spinetta node forget "
        f"{name}",
        reason="name-taken",
    )
