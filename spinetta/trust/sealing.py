"""Sealed boxes: bytes that only the holder of one private key can read.

HPKE (RFC 9180) in base mode with X25519, HKDF-SHA256 and AES-256-GCM. `info` says what is sealed and for what purpose
(``label:phi:3``); a box opened under another purpose does not open. Who sealed it cannot be told from the box: that is
for the record which holds it to say.
"""

from __future__ import annotations

from cryptography.exceptions import InvalidTag, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hpke
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key

from spinetta.errors import UserError

KEY_BYTES = 32
OVERHEAD_BYTES = 1 + 32 + 16  # version, encapsulated key, tag
PLAINTEXT_BYTES_MAX = 4 << 20  # more than etcd would keep; large things are sealed under a data key of their own

_VERSION = b"\x01"
_DOMAIN = b"spinetta/seal/1\0"  # a key of ours used by mistake elsewhere opens nothing here
_SUITE = hpke.Suite(hpke.KEM.X25519, hpke.KDF.HKDF_SHA256, hpke.AEAD.AES_256_GCM)


class SealBroken(UserError):
    """A sealed box that this key does not open under this purpose: altered, cut short, or not for us."""

    reason = "seal-broken"


def new_sealing_key() -> bytes:
    """A new private key, 32 bytes."""
    return X25519PrivateKey.generate().private_bytes_raw()


def public_of(private: bytes) -> bytes:
    """The public key of a private one, 32 bytes.

    Raises:
        UserError: it has not 32 bytes.
    """
    return _private(private).public_key().public_bytes_raw()


def seal(plaintext: bytes, public: bytes, info: bytes) -> bytes:
    """Seal for the holder of a key. The box is `OVERHEAD_BYTES` longer, and never twice the same.

    Raises:
        UserError: the public key is none, or there is too much to seal.
    """
    if len(plaintext) > PLAINTEXT_BYTES_MAX:
        raise UserError(f"{len(plaintext)} bytes cannot be sealed, at most {PLAINTEXT_BYTES_MAX}", reason="too-large")
    try:
        key = X25519PublicKey.from_public_bytes(public)
        return _VERSION + _SUITE.encrypt(plaintext, key, _DOMAIN + info)
    except ValueError:  # not 32 bytes, or one of the few points that give everybody the same secret
        raise UserError("this is no public key for sealing", reason="bad-key") from None


def unseal(sealed: bytes, private: bytes, info: bytes) -> bytes:
    """What was sealed for this key under this purpose.

    Raises:
        SealBroken: it does not open.
        UserError: the private key is none.
    """
    key = _private(private)
    if sealed[:1] != _VERSION or not OVERHEAD_BYTES <= len(sealed) <= PLAINTEXT_BYTES_MAX + OVERHEAD_BYTES:
        raise SealBroken("this is not a sealed box of this version")
    try:
        return _SUITE.decrypt(sealed[1:], key, _DOMAIN + info)
    except (InvalidTag, ValueError):
        raise SealBroken("the seal is broken: altered, or meant for another key or purpose") from None


def _private(private: bytes) -> X25519PrivateKey:
    try:
        return X25519PrivateKey.from_private_bytes(private)
    except ValueError:
        raise UserError(f"a private key for sealing has {KEY_BYTES} bytes", reason="bad-key") from None


def to_pem(private: bytes) -> bytes:
    """The private key as PKCS #8 PEM, to keep beside others in one file."""
    return _private(private).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def from_pem(pem: bytes) -> bytes:
    """The private key in a PEM text.

    Raises:
        UserError: there is none.
    """
    try:
        key = load_pem_private_key(pem, None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise UserError("this is no private key in PEM", reason="bad-key") from None
    if not isinstance(key, X25519PrivateKey):
        raise UserError("this private key is not for sealing", reason="bad-key")
    return key.private_bytes_raw()
