"""Certificates for the tests of trust: lawful ones, and forged ones of any shape."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from spinetta.access import NodeRole
from spinetta.trust import certificates as c

CLUSTER = "0123456789abcdef"
OTHER = "fedcba9876543210"
BOTH_USES = (ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH)
NODE_DNS = ("n1.node.spinetta.internal", "voter.spinetta.internal", "node.spinetta.internal")


@dataclass
class World:
    """One cluster's authority, and what it issues at `now_s`."""

    now_s: float
    cluster: str = CLUSTER
    authority: c.Authority = field(init=False)

    def __post_init__(self) -> None:
        self.authority = c.create_authority("cluster", self.cluster, now_s=self.now_s)

    @property
    def ca(self) -> bytes:
        return self.authority.certificate_pem

    def node(
        self, name: str = "n1", role: NodeRole = NodeRole.VOTER, *, now_s: float | None = None, lifetime_s: float = 3600
    ) -> tuple[bytes, bytes]:
        """Certificate and key."""
        key = c.new_key()
        now_s = self.now_s if now_s is None else now_s
        request = c.csr(key, name)
        return (
            c.issue_node(
                self.authority, request, cluster=self.cluster, name=name, role=role, now_s=now_s, lifetime_s=lifetime_s
            ),
            c.key_pem(key),
        )

    def user(self, name: str = "ann", *, now_s: float | None = None, lifetime_s: float = 3600) -> tuple[bytes, bytes]:
        """Certificate and key."""
        key = c.new_key()
        now_s = self.now_s if now_s is None else now_s
        request = c.csr(key, name)
        return (
            c.issue_user(self.authority, request, cluster=self.cluster, name=name, now_s=now_s, lifetime_s=lifetime_s),
            c.key_pem(key),
        )

    def identity(self, pem: bytes, *, now_s: float | None = None) -> c.Identity | None:
        return c.identity_of(pem, [self.ca], self.cluster, now_s=self.now_s if now_s is None else now_s)

    def pems(self, pair: tuple[bytes, bytes]) -> tuple[bytes, bytes, bytes]:
        """What `dial` asks for."""
        return self.ca, *pair


def forge(
    issuer_key: ec.EllipticCurvePrivateKey,
    issuer: x509.Name,
    now_s: float,
    *,
    key: Any = None,
    uris: Sequence[str] = (f"spiffe://{CLUSTER}/node/n1",),
    dns: Sequence[str] = NODE_DNS,
    more_sans: Sequence[x509.GeneralName] = (),
    ca: bool | None = False,
    sign_usage: bool = False,
    usage: bool = True,
    uses: Sequence[x509.ObjectIdentifier] = BOTH_USES,
    since_s: float = -300,
    until_s: float = 3600,
    extra: Sequence[tuple[x509.ExtensionType, bool]] = (),
) -> tuple[bytes, Any]:
    """A certificate of any shape, signed with this key in this name; and its own key. Times from `now_s` on."""
    key = key or c.new_key()

    def at(s: float) -> datetime.datetime:
        return datetime.datetime.fromtimestamp(int(now_s + s), datetime.UTC)

    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "n1")]))
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(at(since_s))
        .not_valid_after(at(until_s))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False)
    )
    if ca is not None:
        builder = builder.add_extension(x509.BasicConstraints(ca=ca, path_length=0 if ca else None), critical=True)
    if usage:
        builder = builder.add_extension(
            x509.KeyUsage(not sign_usage, False, False, False, False, sign_usage, sign_usage, False, False),
            critical=True,
        )
    if uses:
        builder = builder.add_extension(x509.ExtendedKeyUsage(uses), critical=False)
    sans = [*map(x509.UniformResourceIdentifier, uris), *map(x509.DNSName, dns), *more_sans]
    if sans:
        builder = builder.add_extension(x509.SubjectAlternativeName(sans), critical=False)
    for extension, critical in extra:
        builder = builder.add_extension(extension, critical)
    return builder.sign(issuer_key, hashes.SHA256()).public_bytes(Encoding.PEM), key


def forged_by(authority: c.Authority, now_s: float, **shape: Any) -> tuple[bytes, Any]:
    """The same, truly signed by an authority: what it would never issue."""
    return forge(authority.key, c.load_certificate(authority.certificate_pem).subject, now_s, **shape)
