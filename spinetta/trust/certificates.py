"""Certificates: making authorities, signing requests, and telling who a certificate names.

Of a signing request only the public key is taken: names, lifetimes and uses are the issuer's to say. `identity_of` is
stricter than TLS: it knows every certificate that an authority of ours issues, and takes nothing else.
"""

from __future__ import annotations

import datetime
import hashlib
import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal, TypeAlias

from cryptography import exceptions, x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from spinetta import names
from spinetta.access import NodeRole
from spinetta.errors import UserError

PrivateKey: TypeAlias = ec.EllipticCurvePrivateKey
Certificate: TypeAlias = x509.Certificate

YEAR_S = 365 * 86400.0
BACKDATE_S = 300.0  # clocks of a cluster may be this far apart: a new certificate must be good everywhere at once
PEM_BYTES_MAX = 64 << 10  # of a certificate, key, request or bundle; ours have 1 KB each
BUNDLE_MAX = 16  # certificates; a rotation holds two or three
IDENTITIES_MAX = 2048  # remembered: 2 KB each; more peers than that cost a verification more often

DOMAIN = "spinetta.internal"
ETCD_NAME = f"etcd.{DOMAIN}"  # in every etcd certificate
ANY_NODE_NAME = f"node.{DOMAIN}"  # in every node's certificate: any node will do
ROLE_NAMES = {NodeRole.VOTER: f"voter.{DOMAIN}", NodeRole.WORKER: f"worker.{DOMAIN}"}

_SUBJECTS = {"cluster": "Spinetta cluster", "etcd": "Spinetta etcd"}
_CLUSTER = re.compile(r"[0-9a-f]{16}", re.ASCII)
_URI = re.compile(r"spiffe://([0-9a-f]{16})/(node|user)/([A-Za-z0-9_][A-Za-z0-9._@+-]{0,127})", re.ASCII)
_PEM = re.compile(rb"-----BEGIN CERTIFICATE-----\s.*?-----END CERTIFICATE-----", re.DOTALL)
_CURVES = ("secp256r1", "secp384r1")
_EXTENSIONS = (x509.BasicConstraints, x509.KeyUsage, x509.ExtendedKeyUsage, x509.SubjectAlternativeName)
# What reading a certificate may raise, as its parts are parsed when they are first looked at.
_MALFORMED = (
    ValueError,
    TypeError,
    x509.InvalidVersion,
    x509.DuplicateExtension,
    x509.ExtensionNotFound,
    x509.UnsupportedGeneralNameType,
    exceptions.UnsupportedAlgorithm,
)


@dataclass(frozen=True, slots=True)
class Authority:
    """A certificate authority with its private key."""

    certificate_pem: bytes
    key: PrivateKey = field(repr=False)


@dataclass(frozen=True, slots=True)
class Identity:
    """Whom a certificate names.

    Attributes:
        cluster: the trust domain.
        not_before_s, not_after_s: when it is good, in seconds since 1970.
        key_hash: SHA-256 of its public key (the SubjectPublicKeyInfo).
        role: of a node, as its certificate says; rights come from the node's acl record.
    """

    kind: Literal["node", "user"]
    name: str
    cluster: str
    not_before_s: float
    not_after_s: float
    key_hash: bytes
    role: NodeRole | None = None

    @property
    def issued_s(self) -> float:
        """When it was signed, by the issuer's clock, in whole seconds: what an ``issued_after`` is compared with."""
        return self.not_before_s + BACKDATE_S


class _NotOurs(Exception):
    """A certificate that names nobody here."""


def new_key() -> PrivateKey:
    """A new P-256 key."""
    return ec.generate_private_key(ec.SECP256R1())


def key_pem(key: PrivateKey) -> bytes:
    """The key as PKCS #8 PEM, not encrypted."""
    return key.private_bytes(Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())


def load_key(pem: bytes) -> PrivateKey:
    """The key in a PEM text.

    Raises:
        UserError: there is none that we use, i.e. none on P-256 or P-384 that is not encrypted.
    """
    try:
        key = serialization.load_pem_private_key(pem[:PEM_BYTES_MAX], None)
    except (ValueError, TypeError, exceptions.UnsupportedAlgorithm):
        raise UserError("this is no private key in PEM", reason="bad-key") from None  # its text may hold a secret
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.curve.name not in _CURVES:
        raise UserError("this private key is not on the curve P-256 or P-384", reason="bad-key")
    return key


def public_key_hash(key: PrivateKey) -> bytes:
    """SHA-256 of the public half, as in `Identity.key_hash`."""
    return _spki_hash(key.public_key())


def node_dns(name: str) -> str:
    """The DNS name that is in this node's certificate only."""
    return f"{name}.{ANY_NODE_NAME}"


def create_authority(
    kind: Literal["cluster", "etcd"], cluster: str, *, now_s: float, lifetime_s: float = 10 * YEAR_S
) -> Authority:
    """A new authority of a cluster.

    Raises:
        UserError: `cluster` is not 16 hexadecimal digits.
    """
    _check_cluster(cluster)
    key = new_key()
    subject = x509.Name(
        [
            x509.NameAttribute(NameOID.COMMON_NAME, f"{_SUBJECTS[kind]} {cluster}"),
            # Two authorities of one cluster, as during a rotation, must not have the same name.
            x509.NameAttribute(NameOID.SERIAL_NUMBER, _spki_hash(key.public_key())[:8].hex()),
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
    return _spki_hash(_requested_key(csr_pem))


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


def identity_of(pem: bytes, authorities: Sequence[bytes], cluster: str, *, now_s: float) -> Identity | None:
    """Whom a certificate names, if one of the cluster's authorities has issued it directly.

    Args:
        pem: the certificate; what follows the first one is ignored.
        authorities: certificates, or bundles of them, of the authorities that are believed.
        cluster: the trust domain.
        now_s: seconds since 1970.

    Returns:
        None for a guest, for whatever is foreign, expired, not good yet or malformed.
    """
    try:
        identity, since_s, until_s = _identity(pem, tuple(authorities), cluster)
    except _NotOurs:
        return None
    return identity if since_s <= now_s <= until_s else None


@lru_cache(maxsize=IDENTITIES_MAX)  # what raises is not kept: strangers cannot push out those who belong here
def _identity(pem: bytes, authorities: tuple[bytes, ...], cluster: str) -> tuple[Identity, float, float]:
    """The identity, and when both its certificate and its authority's are good."""
    if len(pem) > PEM_BYTES_MAX:
        raise _NotOurs
    try:
        certificate = x509.load_pem_x509_certificate(pem)
        for issuer in _issuers(authorities):
            if issuer.subject == certificate.issuer and _has_issued(issuer, certificate):
                if cluster_of(issuer.public_bytes(Encoding.PEM)) != cluster:
                    raise _NotOurs
                identity = _read(certificate, cluster)
                since_s = max(identity.not_before_s, issuer.not_valid_before_utc.timestamp())
                return identity, since_s, min(identity.not_after_s, issuer.not_valid_after_utc.timestamp())
    except _MALFORMED:
        raise _NotOurs from None
    except UserError:  # from `cluster_of`
        raise _NotOurs from None
    raise _NotOurs


@lru_cache(maxsize=8)
def _issuers(authorities: tuple[bytes, ...]) -> tuple[Certificate, ...]:
    return tuple(x509.load_pem_x509_certificate(one) for bundle in authorities for one in split_pem(bundle))


def _has_issued(issuer: Certificate, certificate: Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(issuer)
    except (ValueError, TypeError, exceptions.InvalidSignature):
        return False
    return True


def _read(certificate: Certificate, cluster: str) -> Identity:
    """What a certificate says, if it is of the very form that `issue_node` and `issue_user` give."""
    extensions = certificate.extensions
    usage = extensions.get_extension_for_class(x509.KeyUsage).value
    sans = extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    uris = sans.get_values_for_type(x509.UniformResourceIdentifier)
    dns = sans.get_values_for_type(x509.DNSName)
    lawful = (
        certificate.version is x509.Version.v3
        and not extensions.get_extension_for_class(x509.BasicConstraints).value.ca
        and usage.digital_signature
        and not usage.key_cert_sign
        and ExtendedKeyUsageOID.CLIENT_AUTH in extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        and not any(e.critical and not isinstance(e.value, _EXTENSIONS) for e in extensions)
        and len(uris) == 1
        and len(list(sans)) == 1 + len(dns)
        and _is_good_key(certificate.public_key())
    )
    match = _URI.fullmatch(uris[0]) if lawful else None
    if match is None or match[1] != cluster:
        raise _NotOurs
    kind: Literal["node", "user"] = "node" if match[2] == "node" else "user"
    role = None
    if kind == "node":
        names.check_node_name(match[3])
        roles = [r for r, name in ROLE_NAMES.items() if name in dns]
        role = roles[0] if len(roles) == 1 else None
        if role is None or sorted(dns) != sorted((node_dns(match[3]), ROLE_NAMES[role], ANY_NODE_NAME)):
            raise _NotOurs
    elif dns:
        raise _NotOurs
    since_s, until_s = certificate.not_valid_before_utc.timestamp(), certificate.not_valid_after_utc.timestamp()
    return Identity(kind, match[3], cluster, since_s, until_s, _spki_hash(certificate.public_key()), role)


def describe(pem: bytes) -> Identity:
    """Whom a certificate of our form names, whoever has issued it and whenever it is good: of one's own only.

    Raises:
        UserError: it is none of ours.
    """
    certificate = load_certificate(pem)
    try:
        uris = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value.get_values_for_type(
            x509.UniformResourceIdentifier
        )
        match = _URI.fullmatch(uris[0]) if uris else None
        if match is None:
            raise _NotOurs
        return _read(certificate, match[1])
    except (_NotOurs, UserError, *_MALFORMED):
        raise UserError("this certificate is not one of a node or user of Spinetta", reason="bad-certificate") from None


def authority_hash(certificate_pem: bytes) -> bytes:
    """SHA-256 of the SubjectPublicKeyInfo: what a join token carries.

    Raises:
        UserError: not a certificate.
    """
    return _spki_hash(load_certificate(certificate_pem).public_key())


def expiry(pem: bytes) -> tuple[float, float]:
    """From when to when a certificate is good, in seconds since 1970.

    Raises:
        UserError: not a certificate.
    """
    certificate = load_certificate(pem)
    return certificate.not_valid_before_utc.timestamp(), certificate.not_valid_after_utc.timestamp()


def renew_at(pem: bytes) -> float:
    """When a certificate should be replaced: at two thirds of its life, in seconds since 1970.

    Raises:
        UserError: not a certificate.
    """
    since_s, until_s = expiry(pem)
    return since_s + (until_s - since_s) * 2 / 3


def cluster_of(ca_pem: bytes) -> str:
    """The trust domain of an authority's certificate.

    Raises:
        UserError: it is not one of a cluster's authorities.
    """
    certificate = load_certificate(ca_pem)
    for attribute in certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME):
        kind, _, cluster = str(attribute.value).rpartition(" ")
        if kind in _SUBJECTS.values() and _CLUSTER.fullmatch(cluster) and is_authority(certificate):
            return cluster
    raise UserError("this is not the certificate of a cluster's authority", reason="bad-certificate")


def is_authority(certificate: Certificate) -> bool:
    """Whether this certificate may sign others."""
    try:
        return certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except _MALFORMED:
        return False


def split_pem(bundle: bytes) -> tuple[bytes, ...]:
    """The certificates in a bundle, one PEM text each; other text is left out.

    Raises:
        UserError: more bytes or certificates than a bundle of ours may have.
    """
    found = tuple(m.group() + b"\n" for m in _PEM.finditer(bundle)) if len(bundle) <= PEM_BYTES_MAX else ()
    if len(bundle) > PEM_BYTES_MAX or len(found) > BUNDLE_MAX:
        raise UserError(f"a bundle may have {BUNDLE_MAX} certificates and {PEM_BYTES_MAX} bytes", reason="too-large")
    return found


def load_certificate(pem: bytes) -> Certificate:
    """The first certificate in a PEM text.

    Raises:
        UserError: there is none.
    """
    try:
        certificate = x509.load_pem_x509_certificate(pem[:PEM_BYTES_MAX])
        certificate.public_key(), certificate.extensions
    except _MALFORMED:
        raise UserError("this is no certificate in PEM", reason="bad-certificate") from None
    return certificate


def _requested_key(csr_pem: bytes) -> ec.EllipticCurvePublicKey:
    if len(csr_pem) > PEM_BYTES_MAX:
        raise UserError(f"a signing request may have {PEM_BYTES_MAX} bytes", field="csr", reason="too-large")
    try:
        request = x509.load_pem_x509_csr(csr_pem)
        signed, key = request.is_signature_valid, request.public_key()
    except (*_MALFORMED, exceptions.InvalidSignature):
        raise UserError("this is no signing request in PEM", field="csr", reason="bad-csr") from None
    if not _is_good_key(key):
        raise UserError("the key of a signing request must be on P-256 or P-384", field="csr", reason="bad-csr")
    if not signed:
        raise UserError("the signing request is not signed with its own key", field="csr", reason="bad-csr")
    assert isinstance(key, ec.EllipticCurvePublicKey)  # noqa: S101 - told by `_is_good_key`
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
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name[:64])])  # 64: the most that X.509 allows


def _uri(cluster: str, kind: Literal["node", "user"], name: str) -> x509.UniformResourceIdentifier:
    _check_cluster(cluster)
    return x509.UniformResourceIdentifier(f"spiffe://{cluster}/{kind}/{name}")


def _check_cluster(cluster: str) -> None:
    if not _CLUSTER.fullmatch(cluster):
        raise UserError(f"not the id of a cluster: {names.quoted(cluster)}", hint="16 hexadecimal digits")


def _is_good_key(key: object) -> bool:
    return isinstance(key, ec.EllipticCurvePublicKey) and key.curve.name in _CURVES


def _spki_hash(key: object) -> bytes:
    return hashlib.sha256(
        key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)  # type: ignore[attr-defined]
    ).digest()
