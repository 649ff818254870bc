"""What nodes and people ask about themselves: who am I, a fresh certificate, whom to believe."""

from __future__ import annotations

from dataclasses import replace

from spinetta import accesstxn, keys
from spinetta.access import NodeAcl, NodeRole, Policy, UserAcl
from spinetta.errors import Denied, UserError
from spinetta.model import NodeId
from spinetta.node import keyring as keyrings
from spinetta.node.keyring import Keyring
from spinetta.node.port import NodePort
from spinetta.node.services.access import are_held, committed, read, settle
from spinetta.node.services.callers import certificate, has_bearer
from spinetta.node.services.certify import needs_keyring, node_certificates, user_certificates
from spinetta.node.services.desk import Asked
from spinetta.rights import CallerKind
from spinetta.trust import certificates
from spinetta.v1 import trust_pb2 as pb


class Renewer:
    """Answers about the caller's own identity."""

    def __init__(self, port: NodePort, keyring: Keyring | None) -> None:
        self._port = port
        self._keyring = keyring

    async def who(self, asked: Asked) -> pb.WhoAmIResponse:
        """Who calls, as this node sees it."""
        caller, credentials = asked.caller, self._port.credentials
        return pb.WhoAmIResponse(
            kind=caller.kind.value,
            name=caller.name,
            role=caller.role_name,
            projects=caller.projects,
            clearances=caller.clearances,
            expires_ms=int(caller.expires_s * 1000),
            cluster=credentials.cluster if credentials is not None else "",
        )

    async def renew(self, request: pb.RenewRequest, asked: Asked) -> pb.RenewResponse:
        """A fresh certificate for the identity of the present one.

        A person's may be for any key. A node's for a new key makes that one good beside the present one; the present
        one ends once a certificate for the new one is used.

        Raises:
            Denied: the caller has shown no certificate.
            UserError: the signing request cannot be used.
        """
        keyring = needs_keyring(self._keyring, self._port)
        key_hash = certificates.csr_key_hash(request.csr)
        if asked.caller.kind is CallerKind.USER and is_certified(asked):
            return await settle(lambda: self._renew_user(keyring, request, asked))
        if asked.caller.kind is not CallerKind.NODE:
            raise Denied("only a certificate can be renewed", hint="for one: spinetta login", reason="unauthenticated")
        return await settle(lambda: self._renew_node(keyring, request, asked, key_hash))

    async def _renew_user(self, keyring: Keyring, request: pb.RenewRequest, asked: Asked) -> pb.RenewResponse | None:
        user_key = keys.acl_user(asked.caller.name)
        found = await read(self._port.store, [user_key, keys.POLICY, *keyrings.KEYS])
        if not are_held(found, asked.caller.guards):  # its certificates may have been called back
            await asked.again()
            return None
        user = found.value(UserAcl, user_key)
        policy = found.value(Policy, keys.POLICY) or Policy()
        made = user_certificates(
            keyring,
            keyrings.known_of(found.entries),
            name=asked.caller.name,
            csr=request.csr,
            now_s=max(self._port.wall_ms(), user.issued_after_ms if user is not None else 0) / 1000,
            lifetime_s=policy.user_certificate_s,
        )
        return pb.RenewResponse(certificates=made)

    async def _renew_node(
        self, keyring: Keyring, request: pb.RenewRequest, asked: Asked, key_hash: bytes
    ) -> pb.RenewResponse | None:
        name = asked.caller.name
        acl_key, node_key = keys.acl_node(NodeId(name)), keys.node(NodeId(name))
        found = await read(self._port.store, [acl_key, node_key, keys.POLICY, *keyrings.KEYS])
        acl = found.value(NodeAcl, acl_key)
        if acl is None or acl.revoked:
            raise Denied(f"node {name} has been revoked or removed", reason="revoked")
        changed = with_key(acl, shown=certificates.describe(certificate(asked.context)).key_hash, wanted=key_hash)
        if changed != acl and not await committed(
            self._port.store, accesstxn.change((found.change(acl_key, changed),)), asked
        ):
            return None
        policy = found.value(Policy, keys.POLICY) or Policy()
        made = node_certificates(
            keyring,
            keyrings.known_of(found.entries),
            name=name,
            role=acl.role,
            address=self._address_of(request, asked),
            csr=request.csr,
            etcd_csr=request.etcd_csr,
            now_s=self._port.wall_ms() / 1000,
            lifetime_s=policy.node_certificate_s,
        )
        return pb.RenewResponse(certificates=made)

    def _address_of(self, request: pb.RenewRequest, asked: Asked) -> str:
        """The host for a certificate of etcd: voters renew their own, so that only one that cannot asks another; then
        it is where the call comes from."""
        host = asked.context.peer().removeprefix("ipv4:").removeprefix("ipv6:").rpartition(":")[0]
        if request.etcd_csr and not host:
            raise UserError("it is not known for which address etcd's certificate is to be", field="etcd_csr")
        return str(host)

    async def trust(self, asked: Asked) -> pb.GetTrustResponse:
        """Whom to believe now. What concerns etcd is for nodes of role voter only."""
        keyring = needs_keyring(self._keyring, self._port)
        known = await keyring.read()
        answer = pb.GetTrustResponse(
            ca_bundle=known.cluster.bundle,
            generation=known.cluster.generation,
            voters=self._port.voter_addresses(),
        )
        if asked.caller.node_role is NodeRole.VOTER:
            answer.etcd_ca_bundle = known.etcd.bundle
            answer.etcd_generation = known.etcd.generation
        return answer


def with_key(acl: NodeAcl, *, shown: bytes, wanted: bytes) -> NodeAcl:
    """The node's keys after it has asked, by a certificate for the key `shown`, for one for the key `wanted`.

    The one shown is the present one from now on, whichever of the two it was: the node has it.
    """
    if shown not in (acl.key_hash, acl.next_key_hash):
        raise Denied(f"the certificate of node {acl.name} is for another key than the one approved", reason="denied")
    if wanted == shown:
        return replace(acl, key_hash=shown, next_key_hash=b"") if shown == acl.next_key_hash else acl
    return replace(acl, key_hash=shown, next_key_hash=wanted)


def is_certified(asked: Asked) -> bool:
    """Whether the caller is a person known by a certificate, not by a bearer token."""
    # Who shows a bearer token may show any certificate besides, also one that a guest has made in somebody's name.
    return asked.caller.kind is CallerKind.USER and not has_bearer(asked.context)
