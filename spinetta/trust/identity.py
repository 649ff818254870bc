"""Whom a certificate names. Stricter than TLS: every certificate that an authority of ours issues is known by its form,
and nothing else is taken."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from cryptography import exceptions, x509
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from spinetta import names
from spinetta.access import NodeRole
from spinetta.errors import InvariantViolation, UserError
from spinetta.trust.pem import (
    MALFORMED,
    PEM_BYTES_MAX,
    Certificate,
    is_authority,
    is_good_key,
    load_certificate,
    parse_certificate,
    spki_hash,
    split_pem,
)

# By how much the clocks of a cluster's nodes and of those who come to it may differ: tokens end to the second, ids are
# ordered by the submitting node's clock, and people compare times across nodes. The one limit.
CLOCK_SKEW_MAX_S = 30.0
BACKDATE_S = 300.0  # a new certificate is good everywhere at once, also where a clock has gone astray since it was seen
IDENTITIES_MAX = 2048  # remembered: 2 KB each; more peers than that cost a verification more often

DOMAIN = "spinetta.internal"
ETCD_NAME = f"etcd.{DOMAIN}"  # in every etcd certificate
ANY_NODE_NAME = f"node.{DOMAIN}"  # in every node's certificate: any node will do
ROLE_NAMES = {NodeRole.VOTER: f"voter.{DOMAIN}", NodeRole.WORKER: f"worker.{DOMAIN}"}
SUBJECTS = {"cluster": "Spinetta cluster", "etcd": "Spinetta etcd"}

_CLUSTER = re.compile(r"[0-9a-f]{16}", re.ASCII)
_URI = re.compile(r"spiffe://([0-9a-f]{16})/(node|user)/([A-Za-z0-9_][A-Za-z0-9._@+-]{0,127})", re.ASCII)
_EXTENSIONS = (x509.BasicConstraints, x509.KeyUsage, x509.ExtendedKeyUsage, x509.SubjectAlternativeName)


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


def node_dns(name: str) -> str:
    """The DNS name that is in this node's certificate only."""
    return f"{name}.{ANY_NODE_NAME}"


def check_cluster(cluster: str) -> None:
    """Raise UserError unless this is the id of a cluster: 16 hexadecimal digits in lower case."""
    if not _CLUSTER.fullmatch(cluster):
        raise UserError(f"not the id of a cluster: {names.quoted(cluster)}", hint="16 hexadecimal digits")


def cluster_of(ca_pem: bytes, kind: Literal["cluster", "etcd"] | None = None) -> str:
    """The trust domain of an authority's certificate.

    Raises:
        UserError: it is not one of a cluster's authorities, or not of this kind.
    """
    certificate = load_certificate(ca_pem)
    for attribute in certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME):
        subject, _, cluster = str(attribute.value).rpartition(" ")
        lawful = SUBJECTS.values() if kind is None else (SUBJECTS[kind],)
        if subject in lawful and _CLUSTER.fullmatch(cluster) and is_authority(certificate):
            return cluster
    raise UserError("this is not the certificate of a cluster's authority", reason="bad-certificate")


def identity_of(pem: bytes, authorities: Sequence[bytes], cluster: str, *, now_s: float) -> Identity | None:
    """Whom a certificate names, if one of the cluster's authorities has issued it directly.

    Args:
        pem: the certificate; what follows the first one is ignored.
        authorities: certificates, or bundles of them, of the authorities that are believed.
        cluster: the trust domain.
        now_s: seconds since 1970.

    Returns:
        None for a guest, for whatever is foreign, expired, not good yet or malformed.

    Raises:
        InvariantViolation: the authorities cannot be read.
    """
    try:
        identity, since_s, until_s = _identity(pem, tuple(authorities), cluster)
    except _NotOurs:
        return None
    return identity if since_s <= now_s <= until_s else None


@lru_cache(maxsize=IDENTITIES_MAX)  # what raises is not kept: strangers cannot push out those who belong here
def _identity(pem: bytes, authorities: tuple[bytes, ...], cluster: str) -> tuple[Identity, float, float]:
    """The identity, and when both its certificate and its authority's are good."""
    issuers = _issuers(authorities)
    if len(pem) > PEM_BYTES_MAX:
        raise _NotOurs
    try:
        certificate = parse_certificate(pem)
        for issuer in issuers:
            if issuer.subject == certificate.issuer and _has_issued(issuer, certificate):
                if cluster_of(issuer.public_bytes(Encoding.PEM), "cluster") != cluster:
                    raise _NotOurs
                identity = _read(certificate, cluster)
                since_s = max(identity.not_before_s, issuer.not_valid_before_utc.timestamp())
                return identity, since_s, min(identity.not_after_s, issuer.not_valid_after_utc.timestamp())
    except MALFORMED:
        raise _NotOurs from None
    except UserError:  # from `cluster_of`
        raise _NotOurs from None
    raise _NotOurs


@lru_cache(maxsize=8)
def _issuers(authorities: tuple[bytes, ...]) -> tuple[Certificate, ...]:
    try:
        return tuple(load_certificate(one) for bundle in authorities for one in split_pem(bundle))
    except UserError as e:  # our own: taking everybody for a guest would hide it
        raise InvariantViolation(f"the authorities to believe cannot be read: {e}") from e


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
        and is_good_key(certificate.public_key())
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
    return Identity(kind, match[3], cluster, since_s, until_s, spki_hash(certificate.public_key()), role)


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
    except (_NotOurs, UserError, *MALFORMED):
        raise UserError("this certificate is not one of a node or user of Spinetta", reason="bad-certificate") from None
