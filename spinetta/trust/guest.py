"""The guest certificate: what those show who have no certificate of the cluster yet.

A gRPC server can either not ask for a client's certificate or require one. We want one port where nodes and people
prove who they are and newcomers may knock. So there is a *guest authority*, whose private key follows from a public
phrase: anybody can make certificates with it, and one of them is worth as much as none. It is believed by servers, so
that the handshake goes through; `certificates.identity_of` knows nothing of it.
"""

from __future__ import annotations

import datetime
import hashlib
from functools import cache

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from spinetta.trust.certificates import key_pem, new_key

PHRASE = b"Spinetta guest authority, version 1: everybody knows this key"
# It proves nothing, so nothing is gained by its expiring; and a newcomer's clock may be wrong.
_SINCE = datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)
_UNTIL = datetime.datetime(2120, 1, 1, tzinfo=datetime.UTC)
_NAME = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Spinetta guests")])


@cache
def guest_authority_pem() -> bytes:
    """The certificate of the guest authority; the same bytes everywhere."""
    key = guest_authority_key()
    certificate = (
        _builder(_NAME, key.public_key(), 1)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256(), ecdsa_deterministic=True)
    )
    return certificate.public_bytes(Encoding.PEM)


@cache
def guest_pair() -> tuple[bytes, bytes]:
    """A guest's private key and certificate, as PEM; one pair per process."""
    key = new_key()
    certificate = (
        _builder(
            x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "guest")]),
            key.public_key(),
            x509.random_serial_number(),
        )
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False)
        .sign(guest_authority_key(), hashes.SHA256())
    )
    return key_pem(key), certificate.public_bytes(Encoding.PEM)


@cache
def guest_authority_key() -> ec.EllipticCurvePrivateKey:
    """The private key that is no secret."""
    return ec.derive_private_key(int.from_bytes(hashlib.sha256(PHRASE).digest(), "big"), ec.SECP256R1())


def _builder(subject: x509.Name, key: ec.EllipticCurvePublicKey, serial: int) -> x509.CertificateBuilder:
    issuer_key = guest_authority_key().public_key()
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(_NAME)
        .public_key(key)
        .serial_number(serial)
        .not_valid_before(_SINCE)
        .not_valid_after(_UNTIL)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key), critical=False)
    )
