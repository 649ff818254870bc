"""Certificate authorities: shown, exchanged for new ones, and the step of the exchange that the leader makes."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

from spinetta import accesstxn, codec, keys, rotation
from spinetta.access import Authorities, NodeAcl, NodeRole, Policy
from spinetta.errors import UserError
from spinetta.model import IncarnationId, NodeId, NodeRecord, Resources
from spinetta.node import keyring as keyrings
from spinetta.node.keyring import KINDS, Keyring, Kind, Known
from spinetta.node.port import NodePort
from spinetta.node.services.access import committed, read, read_readable, settle
from spinetta.node.services.callers import certificate
from spinetta.node.services.certify import needs_keyring
from spinetta.node.services.desk import Asked
from spinetta.node.services.nodeadmin import NODES_MAX
from spinetta.node.services.renew import is_certified
from spinetta.node.services.useradmin import OVERLAP_MAX_S
from spinetta.node.trouble import Teller
from spinetta.rotation import NodeTrust
from spinetta.store.protocol import Store
from spinetta.trust import certificates
from spinetta.txn import Committed, Guard
from spinetta.v1 import trust_pb2 as pb

log = logging.getLogger("spinetta.node")


class AuthorityAdmin:
    """The calls about authorities."""

    def __init__(self, port: NodePort, keyring: Keyring | None) -> None:
        self._port = port
        self._keyring = keyring

    async def rotate(self, request: pb.RotateAuthorityRequest, asked: Asked) -> pb.RotateAuthorityResponse:
        """Begin to exchange an authority for a new one, or end the overlap of an exchange early. The leader does the
        rest, see `RotationKeeper`.

        Raises:
            UserError: one is under way; or none is, whose overlap could be ended.
        """
        keyring = needs_keyring(self._keyring, self._port)
        if request.kind not in KINDS:
            raise UserError("there is no such kind of authority", field="kind", hint="cluster or etcd")
        kind: Kind = "etcd" if request.kind == "etcd" else "cluster"
        if not (math.isfinite(request.overlap_s) and 0 <= request.overlap_s <= OVERLAP_MAX_S):
            raise UserError("the overlap is out of range", field="overlap_s", hint="up to a year")
        asked.subject = f"authority {kind}"

        async def attempt() -> pb.RotateAuthorityResponse | None:
            found = await read(self._port.store, [keys.POLICY, *keyrings.KEYS])
            known = keyrings.known_of(found.entries)
            old, now_ms = known.authorities[kind], self._port.wall_ms()
            if request.retire_now:
                check_stays_in(old, asked)
                live = trusts_of(kind, await live_nodes(self._port.store))
                new = rotation.retire_now(old, live, now_ms=now_ms)
            else:
                overlap_s = request.overlap_s or (found.value(Policy, keys.POLICY) or Policy()).overlap_s
                rotation.check_may_begin(old)
                entry = keyring.successor(known, kind, await self._voters(), now_s=now_ms / 1000)
                new = rotation.begin(old, entry, now_ms=now_ms, overlap_s=overlap_s)
            # A voter that joins or is revoked meanwhile changes this record too, so that it conflicts.
            txn = accesstxn.change((known.change(new),), asked.caller.guards)
            if await committed(self._port.store, txn, asked):
                signs_now = request.retire_now and new.generation != old.generation
                what = "goes on without some workers" if signs_now else "ends early" if request.retire_now else "begins"
                log.warning("authority %s: a rotation %s", kind, what)
                return pb.RotateAuthorityResponse(generation=new.generation, signs_now=signs_now)
            await asked.again()
            return None

        return await settle(attempt)

    async def _voters(self) -> list[tuple[str, bytes]]:
        nodes = await read_readable(self._port.store, keys.ACL_NODE, NodeAcl, NODES_MAX)
        # One whose rights cannot be read gets no key: it can do nothing anyway.
        return [(n.name, n.sealing_key) for n in nodes.values() if n and n.role is NodeRole.VOTER and not n.revoked]

    async def show(self) -> pb.ListAuthoritiesResponse:
        """All authorities, how many of the live nodes believe each, and which ones a rotation waits for."""
        keyring = needs_keyring(self._keyring, self._port)
        known = await keyring.read()
        live = await live_nodes(self._port.store)
        return pb.ListAuthoritiesResponse(
            authorities=[one for kind in KINDS for one in _shown(known.authorities[kind], trusts_of(kind, live))]
        )


def check_stays_in(authorities: Authorities, asked: Asked) -> None:
    """See that whoever wants an overlap ended early does not shut themselves out.

    Raises:
        UserError: the caller's own certificate is by the authority that is to go.
    """
    if authorities.kind != "cluster" or rotation.is_announced(authorities) or not rotation.under_way(authorities):
        return
    if not is_certified(asked):
        return
    pem, active = certificate(asked.context), authorities.active.certificate_pem
    by_active = certificates.identity_of(
        pem, (active,), certificates.cluster_of(active), now_s=certificates.expiry(pem)[1]
    )
    if by_active is None:
        raise UserError(
            "your own certificate is by the old authority: without that one you would be shut out",
            hint="log in anew, then again; other people will have to log in, too",
            reason="would-shut-out",
        )


def _shown(authorities: Authorities, nodes: list[NodeTrust]) -> list[pb.ListAuthoritiesResponse.Authority]:
    believing = sum(n.believes >= authorities.generation for n in nodes)
    late = [n.name for n in rotation.lagging(authorities, nodes)]
    return [
        pb.ListAuthoritiesResponse.Authority(
            kind=authorities.kind,
            hash=certificates.authority_hash(e.certificate_pem).hex(),
            state=e.state.value,
            created_ms=e.created_ms,
            expires_ms=int(certificates.expiry(e.certificate_pem)[1] * 1000),
            retire_at_ms=e.retire_at_ms,
            nodes_believing=believing,
            nodes=len(nodes),
            lagging=late[: rotation.NAMED_MAX],
            nodes_lagging=len(late),
        )
        for e in authorities.entries
    ]


class RotationKeeper:
    """Makes the next step of a rotation when it is due. For the leader; two at once do no harm."""

    def __init__(self, store: Store, wall_ms: Callable[[], int]) -> None:
        self._store = store
        self._wall_ms = wall_ms
        self._teller = Teller(log)

    async def step(self, guards: tuple[Guard, ...] = ()) -> None:
        """Look, and step if it is due. `guards`: of the office.

        Raises:
            StoreUnavailable, OutcomeUnknown: try again later.
        """
        known = keyrings.known_of((await self._store.read(keyrings.KEYS)).entries)
        if not any(rotation.under_way(a) for a in known.authorities.values()):
            return
        live = await live_nodes(self._store)
        for kind in KINDS:
            await self._step(known, kind, trusts_of(kind, live), guards)

    async def _step(self, known: Known, kind: Kind, nodes: list[NodeTrust], guards: tuple[Guard, ...]) -> None:
        old = known.authorities[kind]
        new = rotation.advance_rotation(old, nodes, self._wall_ms())
        if new == old:
            late = [n.name for n in rotation.lagging(old, nodes)]
            if late and self._wall_ms() >= max(e.retire_at_ms for e in old.entries):
                words = f"authority {kind}: the overlap is over, but still waits for "
                self._teller.tell(words + ", ".join(late[: rotation.NAMED_MAX]), logging.WARNING)
            return
        result = await self._store.commit(accesstxn.change((known.change(new),), guards))
        if isinstance(result, Committed):
            log.warning(
                "authority %s: generation %d: %s",
                kind,
                new.generation,
                ", ".join(
                    f"{certificates.authority_hash(e.certificate_pem).hex()[:8]} {e.state.name.lower()}"
                    for e in new.entries
                ),
            )


async def live_nodes(store: Store) -> list[tuple[NodeRecord, NodeRole]]:
    """The registered nodes, with their roles.

    One whose record cannot be read counts as believing nothing, one whose rights cannot be read as a voter.
    """
    acls = await read_readable(store, keys.ACL_NODE, NodeAcl, NODES_MAX)
    found = []
    for entry in (await store.list(keys.NODE)).entries:
        name = keys.parse_node(entry.key)
        key = keys.acl_node(name)
        acl = acls.get(key)
        if key in acls and (acl is None or not acl.revoked):
            record = codec.readable(codec.decode_node, entry.value)
            found.append((record or unreadable(name), acl.role if acl is not None else NodeRole.VOTER))
    return found


def trusts_of(kind: Kind, nodes: list[tuple[NodeRecord, NodeRole]]) -> list[NodeTrust]:
    """What they say of their certificates of a kind; etcd's are those of nodes of role voter only."""
    if kind == "cluster":
        return [NodeTrust(n.name, n.trust_generation, n.authority_signed, role) for n, role in nodes]
    return [
        NodeTrust(n.name, n.etcd_trust_generation, n.etcd_authority_signed)
        for n, role in nodes
        if role is NodeRole.VOTER
    ]


def unreadable(name: NodeId) -> NodeRecord:
    """A node whose record cannot be read."""
    nothing = Resources.of(0)
    return NodeRecord(name, "", IncarnationId(""), nothing, nothing)
