"""Who calls, and whether it may: the one place that every call passes.

Identity comes from the certificate of the connection, or from a bearer token; rights from the records under ``/acl/``.
Both are looked at in each call, however old its connection, and every `limits.RECHECK_S` while a stream is open.
"""

from __future__ import annotations

import urllib.parse
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from spinetta import keys, txn
from spinetta.access import Issuer, NodeRole, UserAcl, UserRole
from spinetta.errors import Denied, UserError
from spinetta.model import NodeId, Revision
from spinetta.node.acl import AclView
from spinetta.node.port import NodePort
from spinetta.rights import Caller, CallerKind
from spinetta.trust import certificates
from spinetta.trust.certificates import Identity

BEARER_BYTES_MAX = 12 << 10  # longer ones would not fit into a call's metadata
LOGIN = "log in again: spinetta login"


class TokenIdentity(Protocol):
    """Whom a bearer token names, and with which rights."""

    @property
    def name(self) -> str:
        """The user, with the issuer's prefix."""
        ...

    @property
    def role(self) -> UserRole:
        """As the issuer's groups are mapped."""
        ...

    @property
    def projects(self) -> tuple[str, ...]:
        """The same."""
        ...

    @property
    def clearances(self) -> tuple[str, ...]:
        """The same."""
        ...

    @property
    def expires_s(self) -> float:
        """Seconds since 1970."""
        ...


class TokenVerifier(Protocol):
    """Knows the issuers whose bearer tokens are believed."""

    async def verify(self, token: str, issuers: Sequence[Issuer]) -> TokenIdentity:
        """Whom it names, if one of the issuers says so.

        Raises:
            Denied: it is not believed (reason ``unauthenticated``).
            StoreUnavailable: the issuer's keys cannot be had now.
        """
        ...

    def forget(self, issuers: Sequence[Issuer]) -> None:
        """Keep only what is known of these issuers."""
        ...


class Context(Protocol):
    """What is used of a gRPC context."""

    def auth_context(self) -> Any:
        """What is known of the other side of the connection."""
        ...

    def invocation_metadata(self) -> Any:
        """What came with the call."""
        ...

    def peer(self) -> str:
        """The address it came from."""
        ...


class Callers:
    """Tells who calls. Without credentials, on an open node, everybody is `Caller.local`."""

    def __init__(self, port: NodePort, acl: AclView, tokens: TokenVerifier | None = None) -> None:
        self._port = port
        self._tokens = tokens
        self._policy_seen = Revision(0)
        self.acl = acl

    async def of(
        self, context: Context, *, fresh: bool = False, before_no: Callable[[str], None] = lambda _: None
    ) -> Caller:
        """Who calls, with the rights it has now; `Caller.nobody` for a guest and whoever cannot be told.

        Args:
            context: of the call.
            fresh: read the rights from the store, whatever is known here. They are before anybody is refused.
            before_no: called before that is done for one who would be refused; what it raises is raised. It is told
                whom a certificate names, as ``user ann``; empty: there is none.

        Raises:
            Denied: it is known who it is, but it has no place here (any more); reason ``unauthenticated``.
            StoreUnavailable: the rights cannot be read now.
        """
        credentials = self._port.credentials
        if credentials is None:
            return Caller.local()
        pem = certificate(context)
        now_s = self._port.wall_ms() / 1000
        identity = certificates.identity_of(pem, (credentials.ca_pem,), credentials.cluster, now_s=now_s)
        if identity is None and not has_bearer(context):
            return Caller.nobody(_why_not(pem, now_s))
        try:
            return await self._of(context, identity, fresh)
        except Denied:
            before_no(f"{identity.kind} {identity.name}" if identity is not None else "")
            if fresh or self.acl.is_stale:  # they have just been read
                raise
        return await self._of(context, identity, True)

    async def _of(self, context: Context, identity: Identity | None, fresh: bool) -> Caller:
        if identity is None:
            return await self._of_token(_bearer(context), fresh)
        if has_bearer(context):
            raise _unknown(
                f"a certificate of {identity.kind} {identity.name} and a bearer token came together",
                "send one of them: two identities are none",
            )
        return await (self._of_node if identity.kind == "node" else self._of_user)(identity, fresh)

    async def _of_node(self, identity: Identity, fresh: bool) -> Caller:
        found = await self.acl.node(NodeId(identity.name), fresh=fresh)
        who = f"node {identity.name}"
        if found is None:
            raise _unknown(f"{who} has not been approved, or has been removed", "join anew with a token")
        acl, revision = found
        if acl.revoked:
            raise _unknown(f"{who} has been revoked{_because(acl.reason)}", "an administrator can let it join anew")
        if not identity.key_hash or identity.key_hash not in (acl.key_hash, acl.next_key_hash):
            raise _unknown(f"the certificate of {who} is for another key than the one approved", "join anew")
        if identity.issued_s * 1000 < acl.issued_after_ms:
            raise _unknown(f"the certificate of {who} is older than its administrator allows", "join anew")
        return Caller(
            CallerKind.NODE,
            identity.name,
            node_role=acl.role,
            clearances=acl.effective,
            guards=(txn.RevisionIs(keys.acl_node(NodeId(identity.name)), revision),),
            expires_s=identity.not_after_s,
        )

    async def _of_user(self, identity: Identity, fresh: bool) -> Caller:
        found = await self.acl.user(identity.name, fresh=fresh)
        if found is None:
            raise _unknown(
                f"there is no user {identity.name} here (any more)", "ask an administrator: spinetta user add"
            )
        acl, revision = found
        _check_not_revoked(acl)
        if identity.issued_s * 1000 < acl.issued_after_ms:
            raise _unknown(f"this certificate of user {acl.name} does not count any more", LOGIN)
        return _user(acl, (txn.RevisionIs(keys.acl_user(acl.name), revision),), identity.not_after_s)

    async def _of_token(self, token: str, fresh: bool) -> Caller:
        policy, policy_revision = await self.acl.policy(fresh=fresh)
        if self._tokens is None or not policy.issuers:
            raise _unknown("bearer tokens are not taken here", "use a certificate: spinetta login")
        if policy_revision != self._policy_seen:
            self._policy_seen = policy_revision
            self._tokens.forget(policy.issuers)
        shown = await self._tokens.verify(token, policy.issuers)
        found = await self.acl.user(shown.name, fresh=fresh)
        guards: tuple[txn.Guard, ...] = (
            txn.RevisionIs(keys.acl_user(shown.name), found[1] if found else Revision(0)),
            txn.RevisionIs(keys.POLICY, policy_revision),  # holds the issuers and what their groups may do
        )
        if found is not None:  # an administrator's word on this very person goes before one on a group
            _check_not_revoked(found[0])
            return _user(found[0], guards, shown.expires_s)
        return Caller(
            CallerKind.USER,
            shown.name,
            role=shown.role,
            projects=shown.projects,
            clearances=shown.clearances,
            guards=guards,
            expires_s=shown.expires_s,
        )

    @property
    def is_worker(self) -> bool:
        """This node does not answer for the cluster: people are sent to a voter."""
        credentials = self._port.credentials
        return credentials is not None and credentials.role is NodeRole.WORKER


def certificate(context: Context) -> bytes:
    """The certificate that the other side has shown, as PEM; empty: none."""
    shown = list((context.auth_context() or {}).get("x509_pem_cert", ()))
    return bytes(shown[0]) if shown else b""


def peer_address(context: Context) -> str:
    """Where a call comes from, without the port; of IPv6 the network, as one machine has all of its addresses."""
    kind, _, rest = urllib.parse.unquote(context.peer() or "").partition(":")
    host = rest.rpartition(":")[0]
    if kind == "ipv6":
        return ":".join(host.strip("[]").split(":")[:4])
    return host or kind


def metadata(context: Context) -> dict[str, str | bytes]:
    """What came with the call."""
    return dict(context.invocation_metadata() or ())


def has_bearer(context: Context) -> bool:
    """Whether a bearer token came with the call."""
    return any(k == "authorization" for k, _ in context.invocation_metadata() or ())


def _bearer(context: Context) -> str:
    """The bearer token of a call.

    Raises:
        Denied: there are several, or it is something else.
    """
    given = [v for k, v in context.invocation_metadata() or () if k == "authorization"]
    scheme, _, token = str(given[0]).partition(" ")
    if len(given) > 1 or scheme.lower() != "bearer" or not token.strip() or len(token) > BEARER_BYTES_MAX:
        raise _unknown("this authorization cannot be used", "send one: Bearer TOKEN")
    return token.strip()


def _user(acl: UserAcl, guards: tuple[txn.Guard, ...], expires_s: float) -> Caller:
    return Caller(
        CallerKind.USER,
        acl.name,
        role=acl.role,
        projects=acl.projects,
        clearances=acl.clearances,
        guards=guards,
        limits=acl.limits,
        expires_s=expires_s,
    )


def _check_not_revoked(acl: UserAcl) -> None:
    if acl.revoked:
        raise _unknown(f"user {acl.name} has been revoked{_because(acl.reason)}", "ask an administrator")


def _why_not(pem: bytes, now_s: float) -> str:
    """Words for a certificate that names somebody and was not taken all the same; empty for a guest's."""
    try:
        claimed = certificates.describe(pem)
    except UserError:
        return ""
    who = f"{claimed.kind} {claimed.name}"
    if claimed.not_after_s < now_s:
        return f"the certificate of {who} has expired ({LOGIN if claimed.kind == 'user' else 'join anew with a token'})"
    if claimed.not_before_s > now_s:
        return f"the certificate of {who} is not good yet (are the clocks right?)"
    return f"the certificate that names {who} is of no authority that this cluster believes ({LOGIN})"


def _because(reason: str) -> str:
    return f": {reason}" if reason else ""


def _unknown(message: str, hint: str) -> Denied:
    return Denied(message, hint=hint, reason="unauthenticated")
