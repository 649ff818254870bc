"""The beginning of a secured cluster: its authorities, its first node, and its administrator.

The first node's etcd needs its certificate before there is a store for the records to go into. So they are kept in a
file, the authorities' keys sealed as in the store, until one transaction has written them. Each step may be repeated
after a crash: what counts is the last file written, the node's credentials; before it everything is made anew.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spinetta import accesstxn, keys, trustcodec
from spinetta.access import (
    Authorities,
    AuthorityEntry,
    AuthorityState,
    NodeAcl,
    NodeRole,
    Policy,
    UserAcl,
    UserRole,
)
from spinetta.errors import OutcomeUnknown, StoreUnavailable, UserError
from spinetta.model import NodeId
from spinetta.node.keyring import ETCD_LIFETIMES, KINDS, host_of, known_of, wrap
from spinetta.store.protocol import Store
from spinetta.trust import certificates, sealing
from spinetta.trust.backoff import Backoff
from spinetta.trust.credentials import EtcdPems, NodeCredentials, UserCredentials
from spinetta.trust.files import write_private
from spinetta.txn import Committed

ADMIN = "admin"
ADMIN_FILE = "admin.pem"
RECORDS_FILE = "founding.json"
CHANCE_BYTES = 8
FOUNDER = "founding"  # `created_by` of what nobody has made
_FILE_BYTES_MAX = 1 << 20  # ours has 6 KB
COMMIT_S = 60.0  # an etcd that has just been started may need as long to elect itself on a slow disk
RETRY_S = 0.2


@dataclass(frozen=True, slots=True)
class Founded:
    """What a cluster begins with.

    Attributes:
        node: what `NodeCredentials.create` takes.
        admin: of the first administrator.
        records: keys and values of the store; hold no secret in clear.
    """

    cluster: str
    node: dict[str, Any] = field(repr=False)
    admin: UserCredentials
    records: tuple[tuple[str, bytes], ...]


def new_cluster(name: str, address: str, *, now_s: float, chance: bytes, policy: Policy | None = None) -> Founded:
    """Make a cluster's authorities, its first node's certificates, and user `admin`.

    Args:
        name: of the node.
        address: HOST:PORT of its API; etcd's certificate names the host.
        now_s: seconds since 1970.
        chance: `CHANCE_BYTES` random bytes, the cluster's id.
        policy: None: the defaults.

    Raises:
        UserError: the name or address cannot be used.
    """
    policy = policy or Policy()
    cluster, now_ms = chance[:CHANCE_BYTES].hex(), int(now_s * 1000)
    made = {kind: certificates.create_authority(kind, cluster, now_s=now_s) for kind in KINDS}
    node_key, etcd_key, admin_key = (certificates.new_key() for _ in range(3))
    private = sealing.new_sealing_key()
    public = sealing.public_of(private)
    node_pem = certificates.issue_node(
        made["cluster"],
        certificates.csr(node_key, name),
        cluster=cluster,
        name=name,
        role=NodeRole.VOTER,
        now_s=now_s,
        lifetime_s=policy.node_certificate_s,
    )
    etcd_pem = certificates.issue_etcd(
        made["etcd"],
        certificates.csr(etcd_key, name),
        name=name,
        address=host_of(address),
        now_s=now_s,
        lifetime_s=policy.node_certificate_s * ETCD_LIFETIMES,
    )
    admin_pem = certificates.issue_user(
        made["cluster"],
        certificates.csr(admin_key, ADMIN),
        cluster=cluster,
        name=ADMIN,
        now_s=now_s,
        lifetime_s=policy.user_certificate_s,
    )
    ca_pem = made["cluster"].certificate_pem
    acl = NodeAcl(
        name,
        NodeRole.VOTER,
        key_hash=certificates.public_key_hash(node_key),
        sealing_key=public,
        created_ms=now_ms,
        created_by=FOUNDER,
    )
    values: list[tuple[str, Any]] = [
        (
            keys.authority(kind),
            Authorities(
                kind,
                1,
                (
                    AuthorityEntry(
                        authority.certificate_pem,
                        AuthorityState.ACTIVE,
                        (wrap(kind, authority, name, public),),
                        created_ms=now_ms,
                    ),
                ),
            ),
        )
        for kind, authority in made.items()
    ]
    values += [
        (keys.acl_node(NodeId(name)), acl),
        (keys.acl_user(ADMIN), UserAcl(ADMIN, UserRole.ADMIN, created_ms=now_ms, created_by=FOUNDER)),
        (keys.POLICY, policy),
    ]
    return Founded(
        cluster,
        {
            "ca_pem": ca_pem,
            "node_pem": node_pem,
            "node_key_pem": certificates.key_pem(node_key),
            "sealing_private": private,
            "etcd": EtcdPems(made["etcd"].certificate_pem, etcd_pem, certificates.key_pem(etcd_key)),
        },
        UserCredentials.create(ca_pem, admin_pem, certificates.key_pem(admin_key)),
        tuple((key, trustcodec.encode(value)) for key, value in values),
    )


async def found_cluster(
    directory: Path, name: str, address: str, *, now_s: float | None = None, policy: Policy | None = None
) -> NodeCredentials:
    """The credentials of a cluster's first node in DATA/trust, made and saved unless that has happened.

    Writes DATA/admin.pem too, and what `commit` will write into the store. May be repeated after a crash.

    Raises:
        UserError: something cannot be read or written.
    """
    return await asyncio.to_thread(_found, directory, name, address, time.time() if now_s is None else now_s, policy)


def _found(directory: Path, name: str, address: str, now_s: float, policy: Policy | None) -> NodeCredentials:
    there = NodeCredentials.load(directory)
    if there is not None:
        return there
    founded = new_cluster(name, address, now_s=now_s, chance=os.urandom(CHANCE_BYTES), policy=policy)
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        directory.chmod(0o700)
        write_private(directory / RECORDS_FILE, _to_json(founded.records))
    except OSError as e:
        raise UserError(f"{directory} cannot be written: {e.strerror}", reason="disk") from e
    founded.admin.to_file(directory.parent / ADMIN_FILE, f"# nodes: {address}\n")
    return NodeCredentials.create(directory, **founded.node)


def is_pending(directory: Path) -> bool:
    """Whether there are first records that may not be in the store yet."""
    return (directory / RECORDS_FILE).exists()


async def commit(store: Store, credentials: NodeCredentials) -> bool:
    """Write the first records, if they have not been; then remove their file. May be repeated.

    Returns: whether they were written now.

    Raises:
        UserError: the store is another cluster's, or the file is damaged.
        StoreUnavailable, OutcomeUnknown: try again.
    """
    path = credentials.directory / RECORDS_FILE
    if not path.exists():
        return False
    records = _from_json(path)
    end_s, written, wait = time.monotonic() + COMMIT_S, False, Backoff(RETRY_S, 1.0)
    while True:
        try:
            # Guarded by there being none, so that it may be tried again whatever became of it before.
            written = isinstance(await store.commit(accesstxn.found(records)), Committed) or written
            known = known_of((await store.read([keys.authority(kind) for kind in KINDS])).entries)
            break
        except (StoreUnavailable, OutcomeUnknown):
            if time.monotonic() > end_s:
                raise
            await wait.pause()
    if certificates.cluster_of(known.cluster.active.certificate_pem) != credentials.cluster:
        raise UserError(
            "this node's etcd holds the records of another cluster",
            hint="its data directory has been mixed with another one's: restore it, or begin with an empty one",
            reason="other-cluster",
        )
    path.unlink(missing_ok=True)
    return written


def _to_json(records: tuple[tuple[str, bytes], ...]) -> bytes:
    return json.dumps({"format": 1, "records": {k: base64.b64encode(v).decode() for k, v in records}}).encode()


def _from_json(path: Path) -> tuple[tuple[str, bytes], ...]:
    try:
        with path.open("rb") as file:
            document = json.loads(file.read(_FILE_BYTES_MAX))
        if document["format"] != 1:
            raise ValueError("of a later version")
        return tuple((str(k), base64.b64decode(v, validate=True)) for k, v in document["records"].items())
    except OSError as e:
        raise UserError(f"{path} cannot be read: {e.strerror}", reason="disk") from e
    except (ValueError, TypeError, KeyError, AttributeError):
        raise UserError(
            f"{path} is damaged", hint="move the data directory away and begin anew", reason="bad-credentials"
        ) from None
