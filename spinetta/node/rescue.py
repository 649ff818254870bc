"""The way back in, when no administrator has a certificate that counts: lost, expired, or of an authority that is gone.

For whoever can read a voter's data directory, i.e. root or the node's user there. They have the authorities' keys
within reach anyway; this spares them the craft.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from pathlib import Path

from spinetta import accesstxn, keys
from spinetta.access import NodeAcl, NodeRole, Policy, UserAcl, UserRole
from spinetta.errors import OutcomeUnknown, StoreUnavailable, UserError
from spinetta.model import NodeId
from spinetta.node import keyring as keyrings
from spinetta.node.founding import ADMIN, ADMIN_FILE
from spinetta.node.keyring import Signer
from spinetta.node.renewal import check_place
from spinetta.node.services.access import read
from spinetta.store.etcd import EtcdStore
from spinetta.store.identity import load
from spinetta.store.process import EtcdTls
from spinetta.store.protocol import Store
from spinetta.trust import certificates
from spinetta.trust.credentials import NodeCredentials, UserCredentials
from spinetta.txn import Committed

RESCUER = "rescue"  # `created_by` of a record made here
_TRIES = 10


async def rescue(data_dir: Path, name: str = ADMIN) -> Path:
    """Make an administrator's credentials on a voter's machine; the file they are in, DATA/admin.pem.

    The user is made an administrator, if it is none. The node must have a good certificate itself; its cluster must be
    up, its own daemon need not.

    Raises:
        UserError: this is not the data directory of a voter, or it cannot be read or written.
        StoreUnavailable, OutcomeUnknown: the store does not answer.
    """
    credentials = await asyncio.to_thread(NodeCredentials.load, data_dir / "trust")
    memory = await asyncio.to_thread(load, data_dir / "identity.json")
    if credentials is None or credentials.role is not NodeRole.VOTER or credentials.etcd is None or memory is None:
        raise UserError(
            f"{data_dir} is not the data directory of a node of role voter in a secured cluster",
            field="data_dir",
            hint="run this on a voter's machine, as root or the user of its node",
        )
    files = credentials.etcd
    tls = EtcdTls(files.ca, files.certificate, files.key)
    store = EtcdStore(list(memory.endpoints), lambda: tls)
    try:
        made = await make_administrator(store, credentials, name, now_s=time.time())
    finally:
        await store.close()
    path = data_dir / ADMIN_FILE
    await asyncio.to_thread(made.to_file, path, f"# nodes: {memory.address}\n")
    return path


async def make_administrator(store: Store, credentials: NodeCredentials, name: str, *, now_s: float) -> UserCredentials:
    """Credentials of a user who is an administrator from now on, signed by this voter.

    Raises:
        Denied: this node has been revoked.
        UserError: the name cannot be used, or this node may not sign.
        StoreUnavailable, OutcomeUnknown: the store does not answer.
    """
    user_key, acl_key = keys.acl_user(name), keys.acl_node(NodeId(credentials.name))
    key = certificates.new_key()
    for _ in range(_TRIES):
        found = await read(store, [user_key, acl_key, keys.POLICY, *keyrings.KEYS])
        check_place(found.value(NodeAcl, acl_key), credentials.name)
        policy = found.value(Policy, keys.POLICY) or Policy()
        known = keyrings.known_of(found.entries)
        old = found.value(UserAcl, user_key)
        user = old or UserAcl(name, UserRole.ADMIN, created_ms=int(now_s * 1000), created_by=RESCUER)
        user = replace(user, role=UserRole.ADMIN, revoked=False, reason="")
        pem = Signer(credentials).sign_user(
            known,
            certificates.csr(key, name),
            name=name,
            now_s=max(now_s, user.issued_after_ms / 1000),
            lifetime_s=policy.user_certificate_s,
        )
        made = UserCredentials.create(known.cluster.bundle, pem, certificates.key_pem(key))
        if user == old:
            return made
        try:
            # Only while this node still has its place: who has been revoked makes no administrators.
            txn = accesstxn.change((found.change(user_key, user),), seen=(found.seen(acl_key),))
            if isinstance(await store.commit(txn), Committed):
                return made
        except OutcomeUnknown:  # looked up in the next round
            continue
    raise StoreUnavailable("the records of rights change too fast")
