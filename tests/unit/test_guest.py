"""The guest certificate: everybody can make one, and it says nothing."""

from __future__ import annotations

import subprocess
import sys

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.x509.oid import ExtendedKeyUsageOID

from spinetta.trust import certificates as c
from spinetta.trust import guest
from tests.unit.trust_world import CLUSTER, World

NOW_S = 1_800_000_000.0


def test_the_guest_authority_is_the_same_everywhere() -> None:
    """Also in another process: nodes of any version believe each other's guests."""
    code = "import sys; from spinetta.trust import guest; sys.stdout.buffer.write(guest.guest_authority_pem())"
    other = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)
    assert other.stdout == guest.guest_authority_pem()


def test_its_key_stays_the_same_through_versions() -> None:
    assert c.authority_hash(guest.guest_authority_pem()).hex() == (
        "73d52a90c4224ba646797371098f405dff0e376b1e832fa3700dddaf4dc7ab00"
    )


def test_a_guest_is_certified_by_it() -> None:
    key, pem = guest.guest_pair()
    certificate = c.load_certificate(pem)
    certificate.verify_directly_issued_by(c.load_certificate(guest.guest_authority_pem()))
    assert c.authority_hash(pem) == c.public_key_hash(c.load_key(key))
    uses = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(uses) == [ExtendedKeyUsageOID.CLIENT_AUTH]  # nobody believes a guest as a server, and this is why not
    assert not c.is_authority(certificate)


def test_a_guests_key_is_its_own() -> None:
    code = "import sys; from spinetta.trust import guest; sys.stdout.buffer.write(guest.guest_pair()[0])"
    other = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)
    assert other.stdout != guest.guest_pair()[0]
    assert guest.guest_pair() is guest.guest_pair()


def test_a_guest_is_nobody() -> None:
    world = World(NOW_S)
    for bundle in ([], [world.ca], [guest.guest_authority_pem()], [world.ca, guest.guest_authority_pem()]):
        for pem in (guest.guest_pair()[1], guest.guest_authority_pem()):
            assert c.identity_of(pem, bundle, CLUSTER, now_s=NOW_S) is None


def test_the_guest_authority_has_not_issued_what_the_cluster_has() -> None:
    pem, _ = World(NOW_S).node()
    authority = c.load_certificate(guest.guest_authority_pem())
    try:
        c.load_certificate(pem).verify_directly_issued_by(authority)
    except (ValueError, InvalidSignature):
        return
    raise AssertionError("it says it has")


def test_a_guest_may_have_a_wrong_clock() -> None:
    for pem in (guest.guest_pair()[1], guest.guest_authority_pem()):
        since_s, until_s = c.expiry(pem)
        assert since_s < 1_600_000_000
        assert until_s > 4_000_000_000
