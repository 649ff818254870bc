"""Envelopes: whoever lacks one label's key reads nothing, and nothing can be altered, dropped or moved."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spinetta import payload
from spinetta.access import Envelope
from spinetta.errors import CorruptRecord, UserError
from spinetta.trust.envelope import Box, KeyMissing, LabelPublicKey, open_envelope, reseal, seal_envelope
from spinetta.trust.sealing import SealBroken, new_sealing_key, public_of
from tests.builders import spec

PRIVATE = {(label, n): new_sealing_key() for label in ("hpc", "pci", "phi") for n in (1, 2)}
PURPOSE = payload.task_purpose("a-task", ["phi", "pci"])
CONTENT = b"reads the patients' names"


def public(label: str, number: int = 1) -> LabelPublicKey:
    return LabelPublicKey(label, number, public_of(PRIVATE[label, number]))


def private_of(label: str, number: int) -> bytes | None:
    return PRIVATE.get((label, number))


def sealed(*labels: str) -> Envelope:
    return seal_envelope(CONTENT, [public(label) for label in labels], PURPOSE)


def opened(envelope: Envelope, *labels: str, purpose: bytes = PURPOSE) -> bytes:
    return open_envelope(envelope, labels, purpose, private_of)


def test_all_labels_open_it() -> None:
    assert opened(sealed("pci", "phi"), "phi", "pci") == CONTENT
    assert opened(sealed("phi"), "phi") == CONTENT


@given(content=st.binary(max_size=2000))
@settings(max_examples=20, deadline=None)
def test_any_content_comes_back_and_is_not_to_be_seen(content: bytes) -> None:
    envelope = seal_envelope(content, [public("phi")], PURPOSE)
    assert opened(envelope, "phi") == content
    assert len(content) < 8 or content not in envelope.ciphertext


@pytest.mark.parametrize("missing", ["pci", "phi"])
def test_one_label_alone_opens_nothing(missing: str) -> None:
    def some(label: str, number: int) -> bytes | None:
        return None if label == missing else private_of(label, number)

    with pytest.raises(KeyMissing) as e:
        open_envelope(sealed("pci", "phi"), ["pci", "phi"], PURPOSE, some)
    assert (e.value.label, e.value.generation, e.value.reason) == (missing, 1, "label-key-missing")


def test_the_wrong_key_opens_nothing() -> None:
    other = new_sealing_key()
    with pytest.raises(SealBroken):
        open_envelope(sealed("phi"), ["phi"], PURPOSE, lambda *_: other)


def test_a_dropped_share_is_noticed() -> None:
    envelope = sealed("pci", "phi")
    for label, share in (("pci", envelope.shares[0]), ("phi", envelope.shares[1])):
        less = replace(envelope, shares=(share,))
        for labels in ([label], ["pci", "phi"], []):
            with pytest.raises(SealBroken):
                opened(less, *labels)


def test_an_added_share_is_noticed() -> None:
    envelope = sealed("phi")
    more = replace(envelope, shares=(*envelope.shares, *sealed("hpc").shares))
    for labels in (["phi"], ["phi", "hpc"]):
        with pytest.raises(SealBroken):
            opened(more, *labels)


@pytest.mark.parametrize(
    "purpose",
    [
        payload.task_purpose("another-task", ["phi", "pci"]),
        payload.task_purpose("a-task", ["phi"]),
        payload.task_purpose("a-task", ["phi", "pci", "hpc"]),
        payload.secret_purpose("a-task", "pci", ["phi"]),
        b"",
    ],
)
def test_it_cannot_be_moved(purpose: bytes) -> None:
    with pytest.raises(SealBroken):
        opened(sealed("pci", "phi"), "pci", "phi", purpose=purpose)


def test_shares_cannot_be_exchanged_between_envelopes() -> None:
    one, two = sealed("pci", "phi"), sealed("pci", "phi")
    with pytest.raises(SealBroken):
        opened(replace(one, shares=(two.shares[0], one.shares[1])), "pci", "phi")


def test_generations_and_labels_are_part_of_a_share() -> None:
    envelope = sealed("phi")
    for change in ({"generation": 2}, {"label": "pci"}):
        share = replace(envelope.shares[0], **change)
        with pytest.raises(SealBroken):
            open_envelope(replace(envelope, shares=(share,)), [share.label], PURPOSE, lambda *_: PRIVATE["phi", 1])


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_any_changed_bit_is_noticed(data: st.DataObject) -> None:
    envelope = sealed("pci", "phi")
    part = data.draw(st.sampled_from(["nonce", "ciphertext", "share 0", "share 1"]))

    def flipped(raw: bytes) -> bytes:
        bit = data.draw(st.integers(0, len(raw) * 8 - 1))
        return bytes(b ^ (1 << bit % 8 if i == bit // 8 else 0) for i, b in enumerate(raw))

    if part == "nonce":
        altered = replace(envelope, nonce=flipped(envelope.nonce))
    elif part == "ciphertext":
        altered = replace(envelope, ciphertext=flipped(envelope.ciphertext))
    else:
        shares = list(envelope.shares)
        n = int(part[-1])
        shares[n] = replace(shares[n], sealed=flipped(shares[n].sealed))
        altered = replace(envelope, shares=tuple(shares))
    with pytest.raises(SealBroken):
        opened(altered, "pci", "phi")


@given(nonce=st.binary(max_size=20), ciphertext=st.binary(max_size=100), box=st.binary(max_size=100))
@settings(max_examples=40, deadline=None)
def test_nonsense_is_refused_in_words(nonce: bytes, ciphertext: bytes, box: bytes) -> None:
    envelope = sealed("phi")
    for altered in (
        replace(envelope, nonce=nonce),
        replace(envelope, ciphertext=ciphertext),
        replace(envelope, shares=(replace(envelope.shares[0], sealed=box),)),
    ):
        with pytest.raises(SealBroken):
            opened(altered, "phi")


def test_resealing_needs_the_one_label_only_and_leaves_the_content() -> None:
    def phi_only(label: str, number: int) -> bytes | None:
        return private_of(label, number) if label == "phi" else None

    before = sealed("pci", "phi")
    after = reseal(before, public("phi", 2), PURPOSE, phi_only)
    assert opened(after, "pci", "phi") == CONTENT
    assert (after.nonce, after.ciphertext, after.shares[0]) == (before.nonce, before.ciphertext, before.shares[0])
    assert [s.generation for s in after.shares] == [1, 2]
    assert reseal(after, public("phi", 2), PURPOSE, phi_only) == after

    def old_only(label: str, number: int) -> bytes | None:
        return private_of(label, number) if (label, number) != ("phi", 2) else None

    with pytest.raises(KeyMissing):
        open_envelope(after, ["pci", "phi"], PURPOSE, old_only)


def test_a_box_can_be_sealed_again_as_the_same() -> None:
    box = Box.of(CONTENT, PURPOSE)
    first, second = box.envelope([public("phi")]), box.envelope([public("phi", 2)])
    assert (first.nonce, first.ciphertext) == (second.nonce, second.ciphertext)
    assert opened(second, "phi") == CONTENT
    one, two = (payload.comparable(payload.hollow(spec(clearance=("phi",)), e)) for e in (first, second))
    assert one == two
    assert one != payload.comparable(payload.hollow(spec(clearance=("phi",)), sealed("phi")))


def test_nothing_secret_is_shown() -> None:
    box = Box.of(CONTENT, PURPOSE)
    assert box._data_key.hex() not in repr(box)
    assert repr(box._data_key) not in repr(box)


@pytest.mark.parametrize("labels", [[], ["phi", "phi"]])
def test_labels_are_given_once(labels: list[str]) -> None:
    with pytest.raises(UserError):
        sealed(*labels)


def test_a_payload_comes_back_whole() -> None:
    whole = spec(
        name="scan", labels=(("a", "b"),), env=(("K", "v"),), working_directory="/data", clearance=("phi",), priority=3
    )
    envelope = seal_envelope(payload.encode_payload(whole), [public("phi")], PURPOSE)
    empty = payload.hollow(whole, envelope)
    assert (empty.command, empty.env, empty.working_directory, empty.name, empty.labels) == ((), (), "", "", ())
    assert payload.with_payload(empty, opened(envelope, "phi")) == whole
    with pytest.raises(CorruptRecord):
        payload.with_payload(empty, b"\xff\xff")


@given(a=st.lists(st.text(max_size=5), max_size=4), b=st.lists(st.text(max_size=5), max_size=4))
def test_no_two_lists_of_texts_make_one_purpose(a: list[str], b: list[str]) -> None:
    assert (payload.framed(*a) == payload.framed(*b)) == (a == b)
