"""Envelopes: bytes that only who is cleared for *all* of their labels can read.

The content is encrypted once, with AES-256-GCM under a fresh data key. The data key is the XOR of one random share for
each label, and each share is sealed to the latest key of its label (see `sealing`). So a label is added or withdrawn by
sealing a few bytes anew, and one label's key alone opens nothing that carries two.

Everything is bound to a *purpose* (`payload.task_purpose`, `payload.secret_purpose`), which names the object and its
labels: an envelope that was moved to another object, lost a share or was given another's does not open.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from spinetta.access import Envelope, SealedKeyShare
from spinetta.errors import UserError
from spinetta.trust.sealing import SealBroken, seal, unseal

DATA_KEY_BYTES = 32
NONCE_BYTES = 12
_DOMAIN = b"spinetta/envelope/1\0"

PrivateKeys = Callable[[str, int], bytes | None]
"""The private key of a label's generation; None: not to be had here, or not yet."""


@dataclass(frozen=True, slots=True)
class LabelPublicKey:
    """What a share for a label is sealed to."""

    label: str
    generation: int
    public_key: bytes


class KeyMissing(UserError):
    """This node has no private key for a share: it is not cleared, or nobody has given it the key yet."""

    reason = "label-key-missing"

    def __init__(self, label: str, generation: int) -> None:
        super().__init__(
            f"the key of label {label}, generation {generation}, is not to be had here",
            hint="a node that has it hands it to newly cleared ones within a minute",
        )
        self.label = label
        self.generation = generation


@dataclass(frozen=True, slots=True)
class Box:
    """Encrypted content with its data key, still in the hands of who sealed it.

    Kept for as long as the envelope may have to be made again: the content stays the same, so that a submit that is
    tried again after a change of keys is still the same submit.
    """

    purpose: bytes
    nonce: bytes
    ciphertext: bytes
    _data_key: bytes = field(repr=False)

    @classmethod
    def of(cls, content: bytes, purpose: bytes) -> Box:
        """Encrypt."""
        data_key, nonce = os.urandom(DATA_KEY_BYTES), os.urandom(NONCE_BYTES)
        return cls(purpose, nonce, AESGCM(data_key).encrypt(nonce, content, _DOMAIN + purpose), data_key)

    def envelope(self, keys: Sequence[LabelPublicKey]) -> Envelope:
        """With a share for each of these labels.

        Raises:
            UserError: no label, one twice, or a key that is none.
        """
        ordered = sorted(keys, key=lambda k: k.label)
        if not ordered or len({k.label for k in ordered}) != len(ordered):
            raise UserError("an envelope needs labels, each once", field="clearance", hint="give each label once")
        parts = [os.urandom(DATA_KEY_BYTES) for _ in ordered[1:]]
        parts.append(_xor(self._data_key, *parts))
        shares = tuple(_seal_share(part, key, self.purpose) for part, key in zip(parts, ordered, strict=True))
        return Envelope(shares, self.nonce, self.ciphertext)


def seal_envelope(content: bytes, keys: Sequence[LabelPublicKey], purpose: bytes) -> Envelope:
    """Seal for who is cleared for all these labels. Raises as `Box.envelope`."""
    return Box.of(content, purpose).envelope(keys)


def open_envelope(envelope: Envelope, labels: Sequence[str], purpose: bytes, private_of: PrivateKeys) -> bytes:
    """The content.

    Args:
        envelope: what is stored.
        labels: those that the object carries: there must be exactly one share for each.
        purpose: what it must have been sealed for.
        private_of: the keys at hand.

    Raises:
        KeyMissing: a key is not at hand.
        SealBroken: altered, incomplete, or sealed for something else.
    """
    shares = sorted(envelope.shares, key=lambda s: s.label)
    if not shares or [s.label for s in shares] != sorted(labels):
        raise SealBroken("the envelope is not sealed to the labels of what it belongs to")
    parts = [_open_share(share, purpose, private_of) for share in shares]
    try:
        return AESGCM(_xor(*parts)).decrypt(envelope.nonce, envelope.ciphertext, _DOMAIN + purpose)
    except (InvalidTag, ValueError):  # the latter: a nonce of a wrong length
        raise SealBroken("the envelope does not open: altered, or moved from something else") from None


def reseal(envelope: Envelope, key: LabelPublicKey, purpose: bytes, private_of: PrivateKeys) -> Envelope:
    """The envelope with one label's share sealed to another generation of its key; the content is not touched.

    Raises as `open_envelope`, but needs the key of this label only.
    """
    shares = []
    for share in envelope.shares:
        if share.label == key.label and share.generation != key.generation:
            shares.append(_seal_share(_open_share(share, purpose, private_of), key, purpose))
        else:
            shares.append(share)
    return replace(envelope, shares=tuple(shares))


def _info(label: str, generation: int, purpose: bytes) -> bytes:
    name = label.encode()
    return b"share\0" + len(name).to_bytes(4, "big") + name + generation.to_bytes(8, "big") + purpose


def _seal_share(part: bytes, key: LabelPublicKey, purpose: bytes) -> SealedKeyShare:
    sealed = seal(part, key.public_key, _info(key.label, key.generation, purpose))
    return SealedKeyShare(key.label, key.generation, sealed)


def _open_share(share: SealedKeyShare, purpose: bytes, private_of: PrivateKeys) -> bytes:
    private = private_of(share.label, share.generation)
    if private is None:
        raise KeyMissing(share.label, share.generation)
    part = unseal(share.sealed, private, _info(share.label, share.generation, purpose))
    if len(part) != DATA_KEY_BYTES:
        raise SealBroken(f"the share for label {share.label} is not part of a key")
    return part


def _xor(*parts: bytes) -> bytes:
    total = 0
    for part in parts:
        total ^= int.from_bytes(part, "big")
    return total.to_bytes(DATA_KEY_BYTES, "big")
