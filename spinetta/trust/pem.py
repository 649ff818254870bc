"""Keys and certificates as PEM: reading them with limits, and what can be told of one by itself."""

from __future__ import annotations

import hashlib
import re
import threading
import warnings
from typing import TypeAlias, TypeGuard

from cryptography import exceptions, x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.types import PublicKeyTypes
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.utils import CryptographyDeprecationWarning

from spinetta.errors import UserError

# The filters of warnings are the process's, and certificates are read in threads too.
_warnings_turn = threading.Lock()

PrivateKey: TypeAlias = ec.EllipticCurvePrivateKey
Certificate: TypeAlias = x509.Certificate

PEM_BYTES_MAX = 64 << 10  # of a certificate, key, request or bundle; ours have 1 KB each
BUNDLE_MAX = 16  # certificates; a rotation holds two or three

_PEM = re.compile(rb"-----BEGIN CERTIFICATE-----\s.*?-----END CERTIFICATE-----", re.DOTALL)
_CURVES = ("secp256r1", "secp384r1")
# What reading a certificate may raise, as its parts are parsed when they are first looked at.
MALFORMED = (
    ValueError,
    TypeError,
    x509.InvalidVersion,
    x509.DuplicateExtension,
    x509.ExtensionNotFound,
    x509.UnsupportedGeneralNameType,
    exceptions.UnsupportedAlgorithm,
    CryptographyDeprecationWarning,  # see `parse_certificate`
)


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
    return spki_hash(key.public_key())


def authority_hash(certificate_pem: bytes) -> bytes:
    """SHA-256 of the SubjectPublicKeyInfo: what a join token carries.

    Raises:
        UserError: not a certificate.
    """
    return spki_hash(load_certificate(certificate_pem).public_key())


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


def is_authority(certificate: Certificate) -> bool:
    """Whether this certificate may sign others."""
    try:
        return certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except MALFORMED:
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


def parse_certificate(pem: bytes) -> Certificate:
    """The first certificate in a PEM text; its parts may still turn out to be malformed, raising one of `MALFORMED`.

    What the library takes with a warning for now, such as a negative serial number, is malformed here: nobody whom we
    believe makes such certificates, and a stranger's must not write into a daemon's standard error.
    """
    with _warnings_turn, warnings.catch_warnings():
        warnings.simplefilter("error", CryptographyDeprecationWarning)
        return x509.load_pem_x509_certificate(pem)


def load_certificate(pem: bytes) -> Certificate:
    """The first certificate in a PEM text.

    Raises:
        UserError: there is none.
    """
    try:
        certificate = parse_certificate(pem[:PEM_BYTES_MAX])
        certificate.public_key(), certificate.extensions, certificate.subject, certificate.issuer
    except MALFORMED:
        raise UserError("this is no certificate in PEM", reason="bad-certificate") from None
    return certificate


def is_good_key(key: object) -> TypeGuard[ec.EllipticCurvePublicKey]:
    """Whether this public key is of a kind that we use."""
    return isinstance(key, ec.EllipticCurvePublicKey) and key.curve.name in _CURVES


def spki_hash(key: PublicKeyTypes) -> bytes:
    """SHA-256 of a public key, as SubjectPublicKeyInfo."""
    return hashlib.sha256(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).digest()
