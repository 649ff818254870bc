"""Sealed boxes: they open for one key and one purpose, whole."""

from __future__ import annotations

import pytest
from cryptography.hazmat.primitives import hpke
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from hypothesis import given, settings
from hypothesis import strategies as st

from spinetta.errors import UserError
from spinetta.trust import certificates, sealing

PRIVATE = sealing.new_sealing_key()
PUBLIC = sealing.public_of(PRIVATE)
BOX = sealing.seal(b"the plaintext", PUBLIC, b"purpose")


@settings(deadline=None)  # a busy machine is no failure
@given(st.binary(max_size=2000), st.binary(max_size=100))
def test_what_is_sealed_can_be_unsealed(plaintext: bytes, info: bytes) -> None:
    box = sealing.seal(plaintext, PUBLIC, info)
    assert len(box) == len(plaintext) + sealing.OVERHEAD_BYTES
    assert sealing.unseal(box, PRIVATE, info) == plaintext
    assert len(plaintext) < 8 or plaintext not in box


def test_the_same_is_never_sealed_alike() -> None:
    assert len({sealing.seal(b"x", PUBLIC, b"") for _ in range(50)}) == 50


@settings(deadline=None)  # a busy machine is no failure
@given(st.integers(0, len(BOX) - 1), st.integers(1, 255))
def test_a_changed_box_does_not_open(at: int, flip: int) -> None:
    box = bytearray(BOX)
    box[at] ^= flip
    with pytest.raises(sealing.SealBroken):
        sealing.unseal(bytes(box), PRIVATE, b"purpose")


@pytest.mark.parametrize("kept", range(len(BOX)))
def test_a_box_cut_short_does_not_open(kept: int) -> None:
    with pytest.raises(sealing.SealBroken):
        sealing.unseal(BOX[:kept], PRIVATE, b"purpose")
    with pytest.raises(sealing.SealBroken):
        sealing.unseal(BOX[-kept:] if kept else b"", PRIVATE, b"purpose")


@settings(deadline=None)  # a busy machine is no failure
@given(st.binary(min_size=1, max_size=50))
def test_a_box_with_something_added_does_not_open(more: bytes) -> None:
    for box in (BOX + more, more + BOX):
        with pytest.raises(sealing.SealBroken):
            sealing.unseal(box, PRIVATE, b"purpose")


@settings(deadline=None)  # a busy machine is no failure
@given(st.binary(max_size=100))
def test_another_purpose_does_not_open_it(info: bytes) -> None:
    if info != b"purpose":
        with pytest.raises(sealing.SealBroken):
            sealing.unseal(BOX, PRIVATE, info)


def test_another_key_does_not_open_it() -> None:
    with pytest.raises(sealing.SealBroken) as caught:
        sealing.unseal(BOX, sealing.new_sealing_key(), b"purpose")
    assert caught.value.reason == "seal-broken"


@settings(deadline=None)  # a busy machine is no failure
@given(st.binary(max_size=300))
def test_any_bytes_are_no_box(data: bytes) -> None:
    with pytest.raises(sealing.SealBroken):
        sealing.unseal(data, PRIVATE, b"purpose")
    with pytest.raises(sealing.SealBroken):
        sealing.unseal(b"\x01" + data, PRIVATE, b"purpose")


def test_boxes_of_others_that_use_the_same_suite_do_not_open() -> None:
    suite = hpke.Suite(hpke.KEM.X25519, hpke.KDF.HKDF_SHA256, hpke.AEAD.AES_256_GCM)
    foreign = suite.encrypt(b"x", X25519PublicKey.from_public_bytes(PUBLIC), b"purpose")
    for box in (foreign, b"\x01" + foreign):
        with pytest.raises(sealing.SealBroken):
            sealing.unseal(box, PRIVATE, b"purpose")


def test_the_box_is_rfc_9180() -> None:
    """What is written today must be readable by any implementation: version, then enc || ciphertext."""
    suite = hpke.Suite(hpke.KEM.X25519, hpke.KDF.HKDF_SHA256, hpke.AEAD.AES_256_GCM)
    key = X25519PrivateKey.from_private_bytes(PRIVATE)
    assert BOX[0] == 1
    assert suite.decrypt(BOX[1:], key, b"spinetta/seal/1\0purpose") == b"the plaintext"


LOW_ORDER = [
    bytes(32),
    bytes([1]) + bytes(31),
    bytes.fromhex("e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800"),
    bytes.fromhex("5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157"),
    bytes.fromhex("ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f"),
]


@pytest.mark.parametrize("public", [b"", b"x", bytes(31), bytes(33), *LOW_ORDER])
def test_nothing_is_sealed_to_what_is_no_key(public: bytes) -> None:
    with pytest.raises(UserError) as caught:
        sealing.seal(b"secret", public, b"")
    assert caught.value.reason == "bad-key"


@pytest.mark.parametrize("point", LOW_ORDER)
def test_a_box_with_a_weak_point_does_not_open(point: bytes) -> None:
    with pytest.raises(sealing.SealBroken):
        sealing.unseal(b"\x01" + point + bytes(32), PRIVATE, b"purpose")


@pytest.mark.parametrize("private", [b"", bytes(31), bytes(33)])
def test_a_private_key_has_32_bytes(private: bytes) -> None:
    for ask in (sealing.public_of, sealing.to_pem, lambda key: sealing.unseal(BOX, key, b"purpose")):
        with pytest.raises(UserError, match="32 bytes") as caught:
            ask(private)
        assert not isinstance(caught.value, sealing.SealBroken)


def test_there_is_a_limit() -> None:
    with pytest.raises(UserError) as caught:
        sealing.seal(bytes(sealing.PLAINTEXT_BYTES_MAX + 1), PUBLIC, b"")
    assert caught.value.reason == "too-large"
    largest = sealing.seal(bytes(sealing.PLAINTEXT_BYTES_MAX), PUBLIC, b"")
    assert len(sealing.unseal(largest, PRIVATE, b"")) == sealing.PLAINTEXT_BYTES_MAX
    with pytest.raises(sealing.SealBroken):
        sealing.unseal(largest + b"x", PRIVATE, b"")


def test_a_key_survives_being_written_as_pem() -> None:
    assert sealing.from_pem(sealing.to_pem(PRIVATE)) == PRIVATE


@pytest.mark.parametrize(
    "pem",
    [b"", b"x", sealing.to_pem(PRIVATE)[:-40], certificates.key_pem(certificates.new_key())],
    ids=["nothing", "x", "cut short", "another kind"],
)
def test_other_pem_is_no_sealing_key(pem: bytes) -> None:
    with pytest.raises(UserError) as caught:
        sealing.from_pem(pem)
    assert caught.value.reason == "bad-key"
