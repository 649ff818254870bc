"""A voter that was off until after the end of its certificates makes itself new ones.

Its etcd needs a good certificate to take part, and to sign one takes the authorities, which are in etcd. But this
node's own data holds them too, sealed to it: they are read from there, without the cluster. That gives nobody anything
he did not have: whoever has a voter's disk has its keys, and rights are looked up in the store at each call.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence

from spinetta import keys, trustcodec
from spinetta.access import NodeAcl, Policy
from spinetta.errors import UserError
from spinetta.model import NodeId
from spinetta.node import keyring as keyrings
from spinetta.node.keyring import Signer
from spinetta.node.renewal import check_place
from spinetta.node.services.certify import node_certificates
from spinetta.store.protocol import Snapshot
from spinetta.trust import certificates
from spinetta.trust.credentials import EtcdPems, NodeCredentials

log = logging.getLogger("spinetta.node")

ReadOwn = Callable[[Sequence[str]], Awaitable[Snapshot]]
"""Reads keys from this node's own data, such as `store.offline.read_offline`."""


def have_ended(credentials: NodeCredentials, now_s: float) -> bool:
    """Whether one of the node's certificates has ended."""
    etcd = credentials.etcd_pems
    those = [credentials.node_pem, *([etcd.cert_pem] if etcd is not None else [])]
    return any(certificates.expiry(pem)[1] <= now_s for pem in those)


async def revive(credentials: NodeCredentials, read_own: ReadOwn, address: str, *, now_s: float) -> bool:
    """New certificates for the same keys, if those that there are have ended. False: they are good still.

    Args:
        credentials: of a node of role voter that has been a member; changed in place.
        read_own: reads from its own data.
        address: HOST:PORT of its API.
        now_s: seconds since 1970.

    Raises:
        Denied: this node had been revoked when it last heard of the cluster.
        StoreUnavailable, UserError: its data cannot be read, or does not hold what is needed.
    """
    old = credentials.etcd_pems
    if old is None or not have_ended(credentials, now_s):
        return False
    acl_key = keys.acl_node(NodeId(credentials.name))
    entries = (await read_own([acl_key, keys.POLICY, *keyrings.KEYS])).entries
    acl_entry, policy_entry = entries[acl_key], entries[keys.POLICY]
    acl = check_place(trustcodec.decode(NodeAcl, acl_entry.value) if acl_entry else None, credentials.name)
    policy = trustcodec.decode(Policy, policy_entry.value) if policy_entry else Policy()
    if credentials.identity.key_hash not in (acl.key_hash, acl.next_key_hash):
        raise UserError(
            f"the key of node {acl.name} is not the one that was approved",
            hint="join anew with a token",
            reason="denied",
        )
    made = node_certificates(
        Signer(credentials),
        keyrings.known_of(entries),
        name=acl.name,
        role=acl.role,
        address=address,
        csr=certificates.csr(certificates.load_key(credentials.node_key_pem), acl.name),
        etcd_csr=certificates.csr(certificates.load_key(old.key_pem), acl.name),
        now_s=now_s,
        lifetime_s=policy.node_certificate_s,
    )
    etcd = EtcdPems(made.etcd_ca_bundle, made.etcd_certificate, old.key_pem)
    await asyncio.to_thread(credentials.update, ca_pem=made.ca_bundle, node_pem=made.certificate, etcd=etcd)
    log.warning("this node's certificates had ended; it has made itself new ones from its own data")
    return True
