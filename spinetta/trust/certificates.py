"""Certificates: authorities, signing requests, and what is issued for them.

Of a signing request only the public key is taken: names, lifetimes and uses are the issuer's to say. Reading them is in
`pem` and `identity`; this module has it all.
"""

from __future__ import annotations

import datetime
import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from cryptography import exceptions, x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from spinetta import names
from spinetta.access import NodeRole
from spinetta.errors import UserError
from spinetta.trust.identity import (
    ANY_NODE_NAME,
    BACKDATE_S,
    CLOCK_SKEW_MAX_S,
    ETCD_NAME,
    ROLE_NAMES,
    SUBJECTS,
    Identity,
    check_cluster,
    cluster_of,
    describe,
    identity_of,
    node_dns,
)
from spinetta.trust.pem import (
    BUNDLE_MAX,
    MALFORMED,
    PEM_BYTES_MAX,
    Certificate,
    PrivateKey,
    authority_hash,
    expiry,
    is_authority,
    is_good_key,
    key_pem,
    load_certificate,
    load_key,
    new_key,
    public_key_hash,
    renew_at,
    spki_hash,
    split_pem,
)

__all__ = [
    "ANY_NODE_NAME",
    "BACKDATE_S",
    "BUNDLE_MAX",
    "CLOCK_SKEW_MAX_S",
    "ETCD_NAME",
    "PEM_BYTES_MAX",
    "ROLE_NAMES",
    "Authority",
    "Certificate",
    "Identity",
    "PrivateKey",
    "authority_hash",
    "cluster_of",
    "create_authority",
    "cross_sign",
    "csr",
    "csr_key_hash",
    "describe",
    "expiry",
    "identity_of",
    "is_authority",
    "issue_etcd",
    "issue_node",
    "issue_user",
    "key_pem",
    "load_certificate",
    "load_key",
    "new_key",
    "node_dns",
    "public_key_hash",
    "renew_at",
    "split_pem",
]

YEAR_S = 365 * 86400.0


@dataclass(frozen=True, slots=True)
class Authority:
    """A certificate authority with its private key."""

    certificate_pem: bytes
    key: PrivateKey = field(repr=False)


def create_authority(
    kind: Literal["cluster", "etcd"], cluster: str, *, now_s: float, lifetime_s: float = 10 * YEAR_S
) -> Authority:
    """A new authority of a cluster.

    Raises:
        UserError: `cluster` is not 16 hexadecimal digits.
    """
    check_cluster(cluster)
    key = new_key()
    subject = x509.Name(
        [
            x509.NameAttribute(NameOID.COMMON_NAME, f"{SUBJECTS[kind]} {cluster}"),
            # Two authorities of one cluster, as during a rotation, must not have the same name.
            x509.NameAttribute(NameOID.SERIAL_NUMBER, spki_hash(key.public_key())[:8].hex()),
        ]
    )
    certificate = (
        _builder(subject, subject, key.public_key(), key.public_key(), now_s - BACKDATE_S, now_s + lifetime_s)
        # 1: when its time comes it certifies its successor, see `cross_sign`.
        .add_extension(x509.BasicConstraints(ca=True, path_length=1), critical=True)
        .add_extension(_usage(signs=True), critical=True)
        .sign(key, hashes.SHA256())
    )
    return Authority(certificate.public_bytes(Encoding.PEM), key)


def cross_sign(old: Authority, new_pem: bytes, *, now_s: float) -> bytes:
    """The successor's key certified by the authority before it. Sent along with a node's own certificate, it lets
    those in who know the old authority only. It ends when the old one does.

    Raises:
        UserError: the successor's certificate is none.
    """
    new, issuer = load_certificate(new_pem), load_certificate(old.certificate_pem)
    key = new.public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)  # noqa: S101 - made by `create_authority`
    until_s = min(new.not_valid_after_utc.timestamp(), issuer.not_valid_after_utc.timestamp())
    certificate = (
        _builder(new.subject, issuer.subject, key, old.key.public_key(), now_s - BACKDATE_S, until_s)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs=True), critical=True)
        .sign(old.key, hashes.SHA256())
    )
    return certificate.public_bytes(Encoding.PEM)


def csr(key: PrivateKey, name: str) -> bytes:
    """A signing request: proves that its sender has the key. The name in it is for people to read."""
    request = x509.CertificateSigningRequestBuilder().subject_name(_common_name(name)).sign(key, hashes.SHA256())
    return request.public_bytes(Encoding.PEM)


def csr_key_hash(csr_pem: bytes) -> bytes:
    """`Identity.key_hash` of the certificate that this request will give.

    Raises:
        UserError: not a request, not signed by its own key, or not for a key that we use.
    """
    return spki_hash(_requested_key(csr_pem))


def issue_node(
    authority: Authority,
    csr_pem: bytes,
    *,
    cluster: str,
    name: str,
    role: NodeRole,
    now_s: float,
    lifetime_s: float,
) -> bytes:
    """A node's certificate, as PEM. It never outlives its authority.

    Raises:
        UserError: the request, the cluster or the name cannot be used.
    """
    names.check_node_name(name)
    sans = [x509.DNSName(node_dns(name)), x509.DNSName(ROLE_NAMES[role]), x509.DNSName(ANY_NODE_NAME)]
    uses = [ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH]
    return _issue(authority, csr_pem, name, [_uri(cluster, "node", name), *sans], uses, now_s, lifetime_s)


def issue_user(
    authority: Authority, csr_pem: bytes, *, cluster: str, name: str, now_s: float, lifetime_s: float
) -> bytes:
    """A person's certificate, as PEM. It never outlives its authority.

    Raises:
        UserError: the request, the cluster or the name cannot be used.
    """
    if not name:
        raise UserError("a user needs a name")
    names.check_owner(name)
    uses = [ExtendedKeyUsageOID.CLIENT_AUTH]
    return _issue(authority, csr_pem, name, [_uri(cluster, "user", name)], uses, now_s, lifetime_s)


def issue_etcd(
    authority: Authority, csr_pem: bytes, *, name: str, address: str, now_s: float, lifetime_s: float
) -> bytes:
    """The certificate of a node's etcd: for its server, its peer and its clients. `address` is the node's host.

    Raises:
        UserError: the request, the name or the address cannot be used.
    """
    names.check_node_name(name)
    sans: list[x509.GeneralName] = [x509.DNSName(ETCD_NAME), x509.DNSName("localhost")]
    # etcd compares its caller's address with these, and on one machine that is 127.0.0.1 whatever was dialled.
    addresses = {ipaddress.ip_address("127.0.0.1"): None}
    try:
        addresses[ipaddress.ip_address(address.strip("[]"))] = None
    except ValueError:
        try:
            sans.append(x509.DNSName(address))
        except ValueError:
            raise UserError(f"not a host: {names.quoted(address)}") from None
    sans.extend(x509.IPAddress(a) for a in addresses)
    uses = [ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH]
    return _issue(authority, csr_pem, name, sans, uses, now_s, lifetime_s)


def _requested_key(csr_pem: bytes) -> ec.EllipticCurvePublicKey:
    if len(csr_pem) > PEM_BYTES_MAX:
        raise UserError(f"a signing request may have {PEM_BYTES_MAX} bytes", field="csr", reason="too-large")
    try:
        request = x509.load_pem_x509_csr(csr_pem)
        signed, key = request.is_signature_valid, request.public_key()
    except (*MALFORMED, exceptions.InvalidSignature):
        raise UserError("this is no signing request in PEM", field="csr", reason="bad-csr") from None
    if not is_good_key(key):
        raise UserError("the key of a signing request must be on P-256 or P-384", field="csr", reason="bad-csr")
    if not signed:
        raise UserError("the signing request is not signed with its own key", field="csr", reason="bad-csr")
    return key


def _issue(
    authority: Authority,
    csr_pem: bytes,
    name: str,
    sans: Sequence[x509.GeneralName],
    uses: Sequence[x509.ObjectIdentifier],
    now_s: float,
    lifetime_s: float,
) -> bytes:
    key = _requested_key(csr_pem)
    issuer = load_certificate(authority.certificate_pem)
    until_s = min(now_s + lifetime_s, issuer.not_valid_after_utc.timestamp())
    since_s = now_s - BACKDATE_S
    if until_s <= now_s:
        raise UserError("the certificate authority has expired", hint="rotate it", reason="authority-expired")
    certificate = (
        _builder(_common_name(name), issuer.subject, key, authority.key.public_key(), since_s, until_s)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage(uses), critical=False)
        .add_extension(x509.SubjectAlternativeName(sans), critical=False)
        .sign(authority.key, hashes.SHA256())
    )
    return certificate.public_bytes(Encoding.PEM)


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    issuer_key: ec.EllipticCurvePublicKey,
    since_s: float,
    until_s: float,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(_utc(since_s))
        .not_valid_after(_utc(until_s))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key), critical=False)
    )


def _usage(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs,
        crl_sign=signs,
        encipher_only=False,
        decipher_only=False,
    )


def _utc(time_s: float) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(int(time_s), datetime.UTC)


def _common_name(name: str) -> x509.Name:
    """For people to read. X.509 allows 1 to 64 bytes."""
    text = name.encode(errors="replace")[:64].decode(errors="ignore") or "-"
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _uri(cluster: str, kind: Literal["node", "user"], name: str) -> x509.UniformResourceIdentifier:
    check_cluster(cluster)
    return x509.UniformResourceIdentifier(f"spiffe://{cluster}/{kind}/{name}")
