"""Who may be here and with which rights, for programs: ``client.admin``. Records are those of `spinetta.access`."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from spinetta import access, keys, names, trustcodec
from spinetta.client import views
from spinetta.errors import CorruptRecord, NotFound, StoreUnavailable, UserError
from spinetta.v1 import api_pb2 as api
from spinetta.v1 import record_pb2 as pb
from spinetta.v1 import trust_pb2 as trust

if TYPE_CHECKING:
    from spinetta.client.channels import Nodes

T = TypeVar("T")
BACKUP_STALL_S = 90.0  # longer than a voter waits for its etcd


@dataclass(frozen=True, slots=True)
class WhoAmI:
    """Who the cluster takes the caller for.

    Attributes:
        kind: ``user``, ``node``, or ``local`` in an open cluster.
        expires_ms: of the certificate or bearer token, wall clock; 0: never.
    """

    kind: str
    name: str
    role: str
    projects: tuple[str, ...]
    clearances: tuple[str, ...]
    expires_ms: int
    cluster: str


@dataclass(frozen=True, slots=True)
class NewToken:
    """A join token: its text is told this once, and is a secret.

    Attributes:
        addresses: of nodes to join through.
    """

    text: str = field(repr=False)
    record: access.TokenRecord
    addresses: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Access:
    """All that is allowed in, and nodes that wait for it.

    Attributes:
        unreadable: keys of records that cannot be read: nobody has rights by them until they are mended.
    """

    nodes: tuple[access.NodeAcl, ...]
    requests: tuple[access.JoinRequest, ...]
    users: tuple[access.UserAcl, ...]
    groups: tuple[access.GroupAcl, ...]
    unreadable: tuple[str, ...] = ()

    def check_readable(self, key: str) -> None:
        """See that a record which is not among these is not there.

        Raises:
            CorruptRecord: it is there, and cannot be read.
        """
        if key in self.unreadable:
            raise CorruptRecord(
                f"the record {key} cannot be read", hint=f"on a voter: spinetta etcdctl del {key}; then make it anew"
            )


@dataclass(frozen=True, slots=True)
class Tokens:
    """All tokens; `unreadable`: keys of records that cannot be read."""

    records: tuple[access.TokenRecord, ...]
    unreadable: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class AuthorityInfo:
    """One certificate authority: `hash` of its public key in hexadecimal; how many of how many nodes believe it.

    Attributes:
        lagging: nodes that the next step of a rotation waits for, up to 20 of the `nodes_lagging`.
    """

    kind: str
    hash: str
    state: access.AuthorityState
    created_ms: int
    expires_ms: int
    retire_at_ms: int
    nodes_believing: int
    nodes: int
    lagging: tuple[str, ...] = ()
    nodes_lagging: int = 0


@dataclass(frozen=True, slots=True)
class Rotated:
    """What became of a rotation.

    Attributes:
        generation: of the authorities, which grows with every step.
        signs_now: with `retire_now`: the new authority signs from now on, without waiting for workers; the old one is
            believed still, and is dropped by asking again.
    """

    generation: int
    signs_now: bool = False


class AsyncAdmin:
    """What administrators do; each call says who may.

    Errors as of `AsyncClient`, and `Denied` (reasons ``denied``, ``unauthenticated``).
    """

    def __init__(self, nodes: Nodes) -> None:
        self._nodes = nodes

    async def whoami(self) -> WhoAmI:
        """Who the cluster takes us for; anyone may ask."""
        try:
            m = await self._nodes.trust(lambda stub: stub.WhoAmI, trust.WhoAmIRequest())
        except UserError as e:
            if e.reason != "open-cluster":
                raise
            return WhoAmI("local", "", "admin", (), (), 0, "")
        return WhoAmI(m.kind, m.name, m.role, tuple(m.projects), tuple(m.clearances), m.expires_ms, m.cluster)

    async def authorities_pem(self, timeout_s: float) -> bytes:
        """The certificates of the authorities to believe now, the signing one first; see `login.renew`."""
        answer = await self._nodes.trust(lambda stub: stub.GetTrust, trust.GetTrustRequest(), timeout_s=timeout_s)
        return answer.ca_bundle

    async def renew_certificate(self, csr_pem: bytes, timeout_s: float) -> trust.Certificates:
        """A fresh certificate for the identity of the present one; see `login.renew`."""
        request = trust.RenewRequest(csr=csr_pem)
        answer = await self._nodes.trust(lambda stub: stub.Renew, request, writes=True, timeout_s=timeout_s)
        return answer.certificates

    # --- tokens ------------------------------------------------------------------------------------------------

    async def create_token(
        self,
        role: access.TokenRole,
        *,
        ttl_s: float = 0.0,
        uses: int = 0,
        clearances: Sequence[str] = (),
        groups: Sequence[str] = (),
        user: str = "",
        approval: bool = False,
    ) -> NewToken:
        """A new token. Zeros: one hour, one use.

        Asked again after an answer was lost it makes another: the first one is spent by nobody and expires.
        """
        names.check_owner(user, "user")
        if role is access.TokenRole.CLIENT and not user:
            raise UserError("a client's token is for one user", field="user", hint="name the user")
        request = trust.CreateTokenRequest(
            role=role.value,  # type: ignore[arg-type] # the same numbers
            ttl_s=ttl_s,
            uses=uses,
            clearances=clearances,
            groups=groups,
            user=user,
            approval=approval,
        )
        m = await self._nodes.trust(lambda stub: stub.CreateToken, request, writes=True)
        return NewToken(m.token, trustcodec.from_pb(access.TokenRecord, m.record), tuple(m.addresses))

    async def tokens(self) -> list[access.TokenRecord]:
        """All tokens that can be read, without what is secret of them."""
        return list((await self.all_tokens()).records)

    async def all_tokens(self) -> Tokens:
        """The same, and the keys of those that cannot be read."""
        m = await self._nodes.trust(lambda stub: stub.ListTokens, trust.ListTokensRequest())
        return Tokens(tuple(trustcodec.from_pb(access.TokenRecord, t) for t in m.tokens), tuple(m.unreadable))

    async def revoke_token(self, token_id: str) -> None:
        """Nobody joins with it any more; who has is not touched."""
        await self._nodes.trust(lambda stub: stub.RevokeToken, trust.RevokeTokenRequest(id=token_id), writes=True)

    # --- nodes, users, groups ----------------------------------------------------------------------------------

    async def members(self) -> Access:
        """Nodes, requests, users and groups, sorted by name."""
        m = await self._nodes.trust(lambda stub: stub.ListAccess, trust.ListAccessRequest())
        return Access(
            _sorted(access.NodeAcl, m.nodes),
            _sorted(access.JoinRequest, m.requests),
            _sorted(access.UserAcl, m.users),
            _sorted(access.GroupAcl, m.groups),
            tuple(m.unreadable),
        )

    async def decide_join(
        self, name: str, *, approve: bool, key_hash: bytes = b"", clearances: Sequence[str] | None = None
    ) -> None:
        """Let a node in that waits for approval, or not.

        Args:
            name: of the node.
            approve: or reject.
            key_hash: of the request that was looked at (`members`): if another machine waits under the name by now the
                answer is a `UserError` with reason ``changed``. To approve takes it.
            clearances: instead of what its token grants.
        """
        request = trust.DecideJoinRequest(
            name=names.check_node_name(name, "name"),
            approve=approve,
            clearances=clearances or (),
            set_clearances=clearances is not None,
            key_hash=key_hash,
        )
        await self._nodes.trust(lambda stub: stub.DecideJoin, request, writes=True)

    async def set_node(
        self,
        name: str,
        *,
        revoke: bool = False,
        reason: str = "",
        grant: Sequence[str] = (),
        withdraw: Sequence[str] = (),
        join_groups: Sequence[str] = (),
        leave_groups: Sequence[str] = (),
        remove: bool = False,
    ) -> access.NodeAcl:
        """Change what a node may do; what it may after that. `remove` forgets a revoked one: its name is free."""
        request = trust.SetNodeRequest(
            name=names.check_node_name(name, "name"),
            revoke=revoke,
            reason=reason,
            grant=grant,
            withdraw=withdraw,
            join_groups=join_groups,
            leave_groups=leave_groups,
            remove=remove,
        )
        m = await self._nodes.trust(lambda stub: stub.SetNode, request, writes=True)
        # A removed node has no role any more, and 0 is none.
        return _node(m.node, name)

    async def set_user(self, user: access.UserAcl, *, create: bool = False) -> access.UserAcl:
        """Write a user's record as a whole; with `create` there must be none yet."""
        _check_user(user.name)
        request = trust.SetUserRequest(user=trustcodec.to_pb(user), create=create)
        m = await self._nodes.trust(lambda stub: stub.SetUser, request, writes=True)
        return trustcodec.from_pb(access.UserAcl, m.user)

    async def user(self, name: str) -> access.UserAcl:
        """One user. Raises NotFound, or CorruptRecord."""
        _check_user(name)
        members = await self.members()
        found = next((u for u in members.users if u.name == name), None)
        if found is None:
            members.check_readable(keys.acl_user(name))
            raise NotFound(f"there is no user {name}", field="name", hint="see: spinetta user list")
        return found

    async def revoke_user(self, name: str, reason: str = "") -> None:
        """A user may do nothing any more; the record stays."""
        await self._user(name, revoke=True, reason=reason)

    async def remove_user(self, name: str) -> None:
        """Forget a user. The same name added again would be the same person to tasks of the past."""
        await self._user(name, remove=True)

    async def invalidate_certificates(self, name: str) -> None:
        """Certificates that the user has so far do not count any more, e.g. because a key was lost."""
        await self._user(name, invalidate_certificates=True)

    async def _user(
        self,
        name: str,
        *,
        reason: str = "",
        revoke: bool = False,
        remove: bool = False,
        invalidate_certificates: bool = False,
    ) -> None:
        _check_user(name)
        request = trust.SetUserRequest(
            user=pb.UserAcl(name=name, reason=reason),
            revoke=revoke,
            remove=remove,
            invalidate_certificates=invalidate_certificates,
        )
        await self._nodes.trust(lambda stub: stub.SetUser, request, writes=True)

    async def set_group(self, name: str, clearances: Sequence[str]) -> int:
        """What nodes in a group may be cleared for at most; how many nodes this changes."""
        group = pb.GroupAcl(name=name, clearances=sorted(set(clearances)))
        m = await self._nodes.trust(lambda stub: stub.SetGroup, trust.SetGroupRequest(group=group), writes=True)
        return m.nodes_changed

    async def remove_group(self, name: str) -> int:
        """Nodes are in no such group any more; how many this changes."""
        request = trust.SetGroupRequest(group=pb.GroupAcl(name=name), remove=True)
        m = await self._nodes.trust(lambda stub: stub.SetGroup, request, writes=True)
        return m.nodes_changed

    # --- policy and authorities --------------------------------------------------------------------------------

    async def policy(self) -> access.Policy:
        """The cluster's rules."""
        m = await self._nodes.trust(lambda stub: stub.GetPolicy, trust.GetPolicyRequest())
        return trustcodec.from_pb(access.Policy, m.policy)

    async def set_policy(self, policy: access.Policy) -> None:
        """Write the rules as a whole."""
        request = trust.SetPolicyRequest(policy=trustcodec.to_pb(policy))
        await self._nodes.trust(lambda stub: stub.SetPolicy, request, writes=True)

    async def authorities(self) -> list[AuthorityInfo]:
        """Certificate authorities and where they stand."""
        m = await self._nodes.trust(lambda stub: stub.ListAuthorities, trust.ListAuthoritiesRequest())
        return [
            AuthorityInfo(
                a.kind,
                a.hash,
                access.AuthorityState(a.state),
                a.created_ms,
                a.expires_ms,
                a.retire_at_ms,
                a.nodes_believing,
                a.nodes,
                tuple(a.lagging),
                a.nodes_lagging,
            )
            for a in m.authorities
        ]

    async def rotate_authority(self, kind: str, *, overlap_s: float = 0.0, retire_now: bool = False) -> Rotated:
        """Begin a new authority, or with `retire_now` end the overlap with the old one.

        Args:
            kind: ``cluster`` or ``etcd``.
            overlap_s: how long the old one is believed beside the new; 0: as the policy says.
            retire_now: end an overlap early. Of the cluster's authority only with a certificate by the new one, or you
                would shut yourself out: that is refused.
        """
        request = trust.RotateAuthorityRequest(kind=kind, overlap_s=overlap_s, retire_now=retire_now)
        m = await self._nodes.trust(lambda stub: stub.RotateAuthority, request, writes=True)
        return Rotated(m.generation, m.signs_now)

    async def backup(self) -> AsyncGenerator[views.BackupPiece, None]:
        """All of the store in pieces: a snapshot of etcd with its hash behind it. Whole only when it ends by itself.

        Raises:
            StoreUnavailable: it broke off, or nothing came for a minute.
        """
        async with contextlib.aclosing(self._nodes.stream(lambda stub: stub.Backup, api.BackupRequest())) as chunks:
            while True:
                try:
                    async with asyncio.timeout(BACKUP_STALL_S):
                        m = await anext(chunks, None)
                except TimeoutError:
                    raise StoreUnavailable(f"the backup stopped for {BACKUP_STALL_S:g} s") from None
                if m is None:
                    return
                yield views.BackupPiece(m.data, m.remaining_bytes, m.node, m.cluster_id)

    # --- secrets -----------------------------------------------------------------------------------------------

    async def secrets(self, owner: str = "") -> list[access.SecretRecord]:
        """Secrets without what is in them; of an owner, or of all that one may see."""
        m = await self._nodes.trust(lambda stub: stub.ListSecrets, trust.ListSecretsRequest(owner=owner))
        return [trustcodec.from_pb(access.SecretRecord, s) for s in m.secrets]

    async def remove_secret(self, name: str, owner: str = "") -> None:
        """Forget a secret: tasks that ask for it fail to start. Owner empty: oneself."""
        request = trust.RemoveSecretRequest(owner=owner, name=names.check_secret_name(name, "name"))
        await self._nodes.trust(lambda stub: stub.RemoveSecret, request, writes=True)


def _sorted(kind: type[T], messages: Any) -> tuple[T, ...]:
    return tuple(sorted((trustcodec.from_pb(kind, m) for m in messages), key=lambda r: str(getattr(r, "name", ""))))


def _node(message: pb.NodeAcl, name: str) -> access.NodeAcl:
    if not message.role:
        return access.NodeAcl(message.name or name, access.NodeRole.WORKER, revoked=True)
    return trustcodec.from_pb(access.NodeAcl, message)


def _check_user(name: str) -> None:
    if not name:
        raise UserError("a user needs a name", field="name", hint="e.g. a login name or mail address")
    names.check_owner(name, "name")
