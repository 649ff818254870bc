"""The certificate authorities as a voter's daemon uses them: read from the store, their keys in memory only."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from spinetta import keys, trustcodec
from spinetta.access import Authorities, AuthorityEntry, AuthorityState, NodeRole, Wrap
from spinetta.accesstxn import Change, Seen
from spinetta.errors import CorruptRecord, StoreUnavailable, UserError
from spinetta.model import Revision
from spinetta.store.protocol import KeyValue, Store
from spinetta.trust import certificates, sealing
from spinetta.trust.certificates import Authority
from spinetta.trust.credentials import NodeCredentials

Kind = Literal["cluster", "etcd"]
KINDS: tuple[Kind, ...] = ("cluster", "etcd")
KEYS = tuple(keys.authority(kind) for kind in KINDS)
# Etcd's certificates live longer than the nodes' by this factor. A voter whose etcd certificate has ended while it was
# cut off could never take part again: the key to renew it with is in etcd. Their length protects nothing: a voter knows
# the authorities' keys, so it is shut out by removing its member and by new authorities, not by a certificate's end.
ETCD_LIFETIMES = 10


@dataclass(frozen=True, slots=True)
class Known:
    """The authorities of both kinds, as they were read, with the revisions that guard a change."""

    authorities: Mapping[str, Authorities]
    revisions: Mapping[str, Revision]

    @property
    def cluster(self) -> Authorities:
        """Those of nodes and people."""
        return self.authorities["cluster"]

    @property
    def etcd(self) -> Authorities:
        """Those of etcd's members."""
        return self.authorities["etcd"]

    def change(self, new: Authorities) -> Change:
        """The write of one kind's record."""
        return Change(Seen(keys.authority(new.kind), self.revisions[new.kind]), trustcodec.encode(new))


def known_of(entries: Mapping[str, KeyValue | None]) -> Known:
    """The authorities among what was read.

    Raises:
        StoreUnavailable: the cluster's first records have not been written yet.
        CorruptRecord: a record cannot be read.
    """
    found = {kind: entries[keys.authority(kind)] for kind in KINDS}
    values = {k: e for k, e in found.items() if e is not None}
    if len(values) != len(KINDS):
        raise StoreUnavailable("the cluster's certificate authorities are not in the store yet")
    return Known(
        {k: _readable(k, e.value) for k, e in values.items()},
        {k: e.modified for k, e in values.items()},
    )


def _readable(kind: str, value: bytes) -> Authorities:
    try:
        found = trustcodec.decode(Authorities, value)
    except CorruptRecord as e:
        raise CorruptRecord(f"{keys.authority(kind)}: {e}") from e
    if found.kind != kind or [e.state for e in found.entries].count(AuthorityState.ACTIVE) != 1:
        raise CorruptRecord(f"{keys.authority(kind)}: it cannot be read: not exactly one authority signs")
    return found


class Signer:
    """Signs in the name of the cluster: for nodes of role voter, which the authorities' keys are sealed to."""

    def __init__(self, credentials: NodeCredentials) -> None:
        self._credentials = credentials
        self._unsealed: dict[bytes, Authority] = {}  # by certificate; the few that there are at a time

    @property
    def cluster(self) -> str:
        """The trust domain."""
        return self._credentials.cluster

    def sign_node(
        self, known: Known, csr_pem: bytes, *, name: str, role: NodeRole, now_s: float, lifetime_s: float
    ) -> bytes:
        """A node's certificate. During a rotation the signer's certificate by its predecessor follows it.

        Raises:
            UserError: the request cannot be used, or this node may not sign.
        """
        leaf = certificates.issue_node(
            self._signer(known.cluster),
            csr_pem,
            cluster=self.cluster,
            name=name,
            role=role,
            now_s=now_s,
            lifetime_s=lifetime_s,
        )
        return leaf + known.cluster.active.cross_pem

    def sign_user(self, known: Known, csr_pem: bytes, *, name: str, now_s: float, lifetime_s: float) -> bytes:
        """A person's certificate. Raises as `sign_node` does."""
        return certificates.issue_user(
            self._signer(known.cluster), csr_pem, cluster=self.cluster, name=name, now_s=now_s, lifetime_s=lifetime_s
        )

    def sign_etcd(
        self, known: Known, csr_pem: bytes, *, name: str, address: str, now_s: float, lifetime_s: float
    ) -> bytes:
        """The certificate of a voter's etcd, for `ETCD_LIFETIMES` times `lifetime_s`; `address`: HOST or HOST:PORT.

        Raises as `sign_node` does.
        """
        return certificates.issue_etcd(
            self._signer(known.etcd),
            csr_pem,
            name=name,
            address=host_of(address),
            now_s=now_s,
            lifetime_s=lifetime_s * ETCD_LIFETIMES,
        )

    def shared_with(self, known: Known, node: str, sealing_key: bytes) -> list[Change]:
        """The records with their keys sealed to one more node, which must be of role voter.

        Raises:
            UserError: the key is none, or this node does not have the authorities' keys itself.
        """
        changes = []
        for authorities in known.authorities.values():
            entries = tuple(
                e if e.state is AuthorityState.RETIRING else self._with_wrap(authorities.kind, e, node, sealing_key)
                for e in authorities.entries
            )
            changes.append(known.change(replace(authorities, entries=entries)))
        return changes

    def successor(
        self, known: Known, kind: Kind, voters: Iterable[tuple[str, bytes]], *, now_s: float
    ) -> AuthorityEntry:
        """A new authority, its key sealed to these nodes (name, sealing key) and certified by the present one.

        Raises:
            UserError: this node does not have the present one's key.
        """
        old = self._signer(known.authorities[kind])
        new = certificates.create_authority(kind, self.cluster, now_s=now_s)
        return AuthorityEntry(
            new.certificate_pem,
            AuthorityState.NEXT,
            tuple(wrap(kind, new, name, public) for name, public in voters),
            created_ms=int(now_s * 1000),
            cross_pem=certificates.cross_sign(old, new.certificate_pem, now_s=now_s),
        )

    def _with_wrap(self, kind: str, entry: AuthorityEntry, node: str, sealing_key: bytes) -> AuthorityEntry:
        others = tuple(w for w in entry.wraps if w.node != node)
        return replace(entry, wraps=(*others, wrap(kind, self._unseal(kind, entry), node, sealing_key)))

    def _signer(self, authorities: Authorities) -> Authority:
        return self._unseal(authorities.kind, authorities.active)

    def _unseal(self, kind: str, entry: AuthorityEntry) -> Authority:
        found = self._unsealed.get(entry.certificate_pem)
        if found is None:
            private = self._credentials.sealing_private
            mine = key_id(sealing.public_of(private))
            name = self._credentials.name
            sealed = next((w.sealed for w in entry.wraps if w.node == name and w.key_id == mine), None)
            if sealed is None:
                raise UserError(
                    f"node {name} does not have the key of the {kind} authority",
                    hint="ask another voter",
                    reason="no-authority-key",
                )
            pem = sealing.unseal(sealed, private, _purpose(kind, entry.certificate_pem, name))
            found = Authority(entry.certificate_pem, certificates.load_key(pem))
            self._unsealed[entry.certificate_pem] = found
        return found


class Keyring(Signer):
    """The same, with the store that the authorities are read from."""

    def __init__(self, store: Store, credentials: NodeCredentials) -> None:
        super().__init__(credentials)
        self._store = store

    async def read(self) -> Known:
        """The authorities as they are now.

        Raises:
            StoreUnavailable: the store does not answer, or has none yet.
        """
        return known_of((await self._store.read(KEYS)).entries)


def wrap(kind: str, authority: Authority, node: str, sealing_key: bytes) -> Wrap:
    """An authority's key sealed to a node.

    Raises:
        UserError: the node's sealing key is none.
    """
    purpose = _purpose(kind, authority.certificate_pem, node)
    sealed = sealing.seal(certificates.key_pem(authority.key), sealing_key, purpose)
    return Wrap(node, sealed, key_id(sealing_key))


def key_id(sealing_key: bytes) -> bytes:
    """As in `Wrap.key_id`."""
    return hashlib.sha256(sealing_key).digest()[:8]


def host_of(address: str) -> str:
    """The host of HOST:PORT, or of a host alone."""
    host, colon, port = address.rpartition(":")
    return host.strip("[]") if colon and port.isdecimal() and not (":" in host and "[" not in host) else address


def _purpose(kind: str, certificate_pem: bytes, node: str) -> bytes:
    return b"authority:%s:%s:%s" % (kind.encode(), certificates.authority_hash(certificate_pem), node.encode())
