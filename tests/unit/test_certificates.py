"""Certificates: what is issued, and that nothing else names anybody."""

from __future__ import annotations

import base64
import hashlib
import ipaddress
import warnings
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from hypothesis import example, given, settings
from hypothesis import strategies as st

from spinetta.access import NodeRole
from spinetta.errors import InvariantViolation, UserError
from spinetta.trust import certificates as c
from spinetta.trust import guest
from tests.unit.trust_world import CLUSTER, NODE_DNS, OTHER, World, forge, forged_by

NOW_S = 1_800_000_000.0
DAY_S = 86400.0
WORLD = World(NOW_S)
WORLD_KEY = c.new_key()


def san(pem: bytes) -> x509.SubjectAlternativeName:
    return c.load_certificate(pem).extensions.get_extension_for_class(x509.SubjectAlternativeName).value


# --- what is issued


@pytest.mark.parametrize("role", NodeRole)
def test_a_node_is_known_by_its_certificate(role: NodeRole) -> None:
    pem, key = WORLD.node("n1", role, lifetime_s=DAY_S)
    identity = WORLD.identity(pem)
    assert identity is not None
    assert (identity.kind, identity.name, identity.cluster, identity.role) == ("node", "n1", CLUSTER, role)
    assert identity.issued_s == NOW_S
    assert identity.not_after_s == NOW_S + DAY_S
    assert identity.key_hash == c.public_key_hash(c.load_key(key))


def test_a_user_is_known_by_the_certificate() -> None:
    pem, _ = WORLD.user("ann@example.org")
    identity = WORLD.identity(pem)
    assert identity is not None
    assert (identity.kind, identity.name, identity.role) == ("user", "ann@example.org", None)


def test_a_node_certificate_has_these_names_only() -> None:
    pem, _ = WORLD.node("n1", NodeRole.WORKER)
    assert san(pem).get_values_for_type(x509.UniformResourceIdentifier) == [f"spiffe://{CLUSTER}/node/n1"]
    assert san(pem).get_values_for_type(x509.DNSName) == [
        "n1.node.spinetta.internal",
        "worker.spinetta.internal",
        "node.spinetta.internal",
    ]


@pytest.mark.parametrize("make", [WORLD.node, WORLD.user])
def test_what_is_issued_signs_nothing(make: Any) -> None:
    certificate = c.load_certificate(make()[0])
    constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints)
    usage = certificate.extensions.get_extension_for_class(x509.KeyUsage)
    assert constraints.critical
    assert not constraints.value.ca
    assert usage.critical
    assert usage.value.digital_signature
    assert not usage.value.key_cert_sign
    assert not c.is_authority(certificate)


def test_a_user_is_no_server() -> None:
    certificate = c.load_certificate(WORLD.user()[0])
    uses = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(uses) == [ExtendedKeyUsageOID.CLIENT_AUTH]


def test_an_authority_names_its_cluster() -> None:
    etcd = c.create_authority("etcd", CLUSTER, now_s=NOW_S)
    assert c.cluster_of(WORLD.ca) == c.cluster_of(WORLD.ca, "cluster") == c.cluster_of(etcd.certificate_pem) == CLUSTER
    with pytest.raises(UserError, match="not the certificate"):
        c.cluster_of(etcd.certificate_pem, "cluster")
    for pem in (WORLD.node()[0], guest.guest_authority_pem()):
        with pytest.raises(UserError, match="not the certificate"):
            c.cluster_of(pem)


def test_two_authorities_of_a_cluster_have_different_names_and_hashes() -> None:
    one, two = (c.create_authority("cluster", CLUSTER, now_s=NOW_S).certificate_pem for _ in range(2))
    assert c.load_certificate(one).subject != c.load_certificate(two).subject
    assert c.authority_hash(one) != c.authority_hash(two)
    spki = c.load_certificate(one).public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    assert c.authority_hash(one) == hashlib.sha256(spki).digest()


@pytest.mark.parametrize("cluster", ["", "abc", CLUSTER.upper(), CLUSTER + "0", "../../etc/passwd", CLUSTER + "\n"])
def test_the_id_of_a_cluster_is_16_hexadecimal_digits(cluster: str) -> None:
    with pytest.raises(UserError, match="cluster"):
        c.create_authority("cluster", cluster, now_s=NOW_S)
    with pytest.raises(UserError, match="cluster"):
        c.issue_user(WORLD.authority, c.csr(c.new_key(), "a"), cluster=cluster, name="a", now_s=NOW_S, lifetime_s=DAY_S)


@pytest.mark.parametrize("name", ["", "N1", "n1.voter", "n1/x", "-n", "n1\n", "*", "n" * 64, "é", "n1 "])
def test_only_lawful_node_names_are_certified(name: str) -> None:
    with pytest.raises(UserError):
        WORLD.node(name)


@pytest.mark.parametrize("name", ["", "a b", "a/../b", "..", "a\n", "é", "a" * 129, "a%2fb"])
def test_only_lawful_user_names_are_certified(name: str) -> None:
    with pytest.raises(UserError):
        WORLD.user(name)


def test_a_long_user_name_is_kept_whole() -> None:
    identity = WORLD.identity(WORLD.user("a" * 128)[0])
    assert identity is not None
    assert identity.name == "a" * 128


def test_no_certificate_outlives_its_authority() -> None:
    old = c.create_authority("cluster", CLUSTER, now_s=NOW_S, lifetime_s=DAY_S)
    request = c.csr(c.new_key(), "a")
    pem = c.issue_user(old, request, cluster=CLUSTER, name="a", now_s=NOW_S, lifetime_s=30 * DAY_S)
    assert c.expiry(pem)[1] == c.expiry(old.certificate_pem)[1] == NOW_S + DAY_S
    with pytest.raises(UserError, match="authority has expired"):
        c.issue_user(old, request, cluster=CLUSTER, name="a", now_s=NOW_S + DAY_S, lifetime_s=DAY_S)


def test_renewal_is_at_two_thirds() -> None:
    pem, _ = WORLD.node(lifetime_s=30 * DAY_S)
    assert abs(c.renew_at(pem) - (NOW_S + 20 * DAY_S)) <= c.BACKDATE_S


def test_etcd_certificates_name_the_host_and_where_etcd_is_called_from() -> None:
    authority = c.create_authority("etcd", CLUSTER, now_s=NOW_S)

    def names(address: str) -> x509.SubjectAlternativeName:
        request = c.csr(c.new_key(), "n1")
        return san(c.issue_etcd(authority, request, name="n1", address=address, now_s=NOW_S, lifetime_s=DAY_S))

    of_ip = names("10.1.2.3")
    assert of_ip.get_values_for_type(x509.DNSName) == ["etcd.spinetta.internal", "localhost"]
    assert of_ip.get_values_for_type(x509.IPAddress) == [
        ipaddress.ip_address("127.0.0.1"),
        ipaddress.ip_address("10.1.2.3"),
    ]
    assert names("[fd00::1]").get_values_for_type(x509.IPAddress)[1] == ipaddress.ip_address("fd00::1")
    assert "n1.example.org" in names("n1.example.org").get_values_for_type(x509.DNSName)
    assert names("127.0.0.1").get_values_for_type(x509.IPAddress) == [ipaddress.ip_address("127.0.0.1")]
    with pytest.raises(UserError, match="not a host"):
        names("nö.example.org")


def test_an_etcd_certificate_names_nobody_at_the_api() -> None:
    authority = c.create_authority("etcd", CLUSTER, now_s=NOW_S)
    request = c.csr(c.new_key(), "n1")
    pem = c.issue_etcd(authority, request, name="n1", address="127.0.0.1", now_s=NOW_S, lifetime_s=DAY_S)
    for bundle in ([WORLD.ca], [authority.certificate_pem], [WORLD.ca, authority.certificate_pem]):
        assert c.identity_of(pem, bundle, CLUSTER, now_s=NOW_S) is None
    forged, _ = forged_by(authority, NOW_S)  # the etcd authority signs a node's certificate
    assert c.identity_of(forged, [authority.certificate_pem], CLUSTER, now_s=NOW_S) is None


# --- signing requests


def request_by(key: Any, *extensions: x509.ExtensionType, name: str = "n1") -> bytes:
    builder = x509.CertificateSigningRequestBuilder().subject_name(
        x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    )
    for extension in extensions:
        builder = builder.add_extension(extension, critical=True)
    digest = None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256()
    return builder.sign(key, digest).public_bytes(Encoding.PEM)


def issued_for(request: bytes) -> bytes:
    return c.issue_node(
        WORLD.authority, request, cluster=CLUSTER, name="n1", role=NodeRole.WORKER, now_s=NOW_S, lifetime_s=DAY_S
    )


def test_of_a_request_only_the_key_is_taken() -> None:
    key = c.new_key()
    request = request_by(
        key,
        x509.SubjectAlternativeName(
            [x509.DNSName("voter.spinetta.internal"), x509.UniformResourceIdentifier(f"spiffe://{CLUSTER}/user/admin")]
        ),
        x509.BasicConstraints(ca=True, path_length=None),
        x509.KeyUsage(True, False, False, False, False, True, True, False, False),
        name="admin",
    )
    identity = WORLD.identity(issued_for(request))
    assert identity is not None
    assert (identity.kind, identity.name, identity.role) == ("node", "n1", NodeRole.WORKER)
    assert identity.key_hash == c.csr_key_hash(request) == c.public_key_hash(key)
    assert not c.is_authority(c.load_certificate(issued_for(request)))


WEAK: dict[str, Any] = {
    "rsa-1024": rsa.generate_private_key(65537, 1024),  # noqa: S505 - to be refused
    "rsa-2048": rsa.generate_private_key(65537, 2048),
    "p-224": ec.generate_private_key(ec.SECP224R1()),
    "secp256k1": ec.generate_private_key(ec.SECP256K1()),
    "ed25519": ed25519.Ed25519PrivateKey.generate(),
}


RSA_512_CSR = b"""-----BEGIN CERTIFICATE REQUEST-----
MIHGMHICAQAwDTELMAkGA1UEAwwCbjEwXDANBgkqhkiG9w0BAQEFAANLADBIAkEA
xVw1tZBY8TfvO3qyS4aHCU70//q4GahApRQM98jA6iUsbyp1scUAhe5CE40T270y
7lrU1gQ9Wn3LCrRpg30CJQIDAQABoAAwDQYJKoZIhvcNAQELBQADQQAIQX1md66F
9lZITbu87Ad3WGQHuPVFcnzMT++Yy9KwC3rX1GlU2hRnbfrMb+4nvgpgVntu9yPw
nkblRmbthpGv
-----END CERTIFICATE REQUEST-----
"""  # the library that we use would not make it


@pytest.mark.parametrize("key", WEAK.values(), ids=WEAK)
def test_other_kinds_of_key_are_not_certified(key: Any) -> None:
    with pytest.raises(UserError, match="P-256") as caught:
        issued_for(request_by(key))
    assert caught.value.reason == "bad-csr"


def test_an_rsa_key_of_512_bits_is_not_certified() -> None:
    with pytest.raises(UserError) as caught:
        issued_for(RSA_512_CSR)
    assert caught.value.reason == "bad-csr"


def test_p384_is_good_too() -> None:
    assert WORLD.identity(issued_for(request_by(ec.generate_private_key(ec.SECP384R1())))) is not None


def with_another_key(request: bytes) -> bytes:
    """The request with another public key in it: its signature does not fit any more."""
    der = x509.load_pem_x509_csr(request).public_bytes(Encoding.DER)

    def point(key: ec.EllipticCurvePublicKey) -> bytes:
        return key.public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)

    key = x509.load_pem_x509_csr(request).public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)
    assert point(key) in der
    other = der.replace(point(key), point(c.new_key().public_key()))
    return x509.load_der_x509_csr(other).public_bytes(Encoding.PEM)


def test_a_request_must_be_signed_with_its_own_key() -> None:
    with pytest.raises(UserError, match="not signed") as caught:
        issued_for(with_another_key(c.csr(c.new_key(), "n1")))
    assert caught.value.reason == "bad-csr"


@settings(deadline=None)  # a busy machine is no failure
@given(st.binary(max_size=400) | st.text(max_size=200).map(str.encode))
def test_any_bytes_as_a_request_are_refused(data: bytes) -> None:
    for text in (data, b"-----BEGIN CERTIFICATE REQUEST-----\n" + data + b"\n-----END CERTIFICATE REQUEST-----\n"):
        with pytest.raises(UserError):
            issued_for(text)


@settings(deadline=None)  # a busy machine is no failure
@given(st.integers(0, 10_000), st.integers(1, 255))
def test_a_request_with_one_byte_changed_never_gives_another_key(at: int, flip: int) -> None:
    request = c.csr(WORLD_KEY, "n1")
    der = bytearray(x509.load_pem_x509_csr(request).public_bytes(Encoding.DER))
    der[at % len(der)] ^= flip
    text = base64.encodebytes(bytes(der))
    try:
        found = c.csr_key_hash(b"-----BEGIN CERTIFICATE REQUEST-----\n" + text + b"-----END CERTIFICATE REQUEST-----\n")
    except UserError:
        return
    assert found == c.public_key_hash(WORLD_KEY)  # a change outside of what is signed, such as a signature's form


def test_a_request_may_not_be_huge() -> None:
    with pytest.raises(UserError) as caught:
        issued_for(b"x" * (c.PEM_BYTES_MAX + 1))
    assert caught.value.reason == "too-large"


# --- who is who


def test_a_guest_is_nobody_even_in_the_name_of_a_node() -> None:
    assert WORLD.identity(guest.guest_pair()[1]) is None
    subject = c.load_certificate(guest.guest_authority_pem()).subject
    forged, _ = forge(guest.guest_authority_key(), subject, NOW_S)
    assert WORLD.identity(forged) is None
    assert c.identity_of(forged, [WORLD.ca, guest.guest_authority_pem()], CLUSTER, now_s=NOW_S) is None
    in_our_name, _ = forge(guest.guest_authority_key(), c.load_certificate(WORLD.ca).subject, NOW_S)
    assert WORLD.identity(in_our_name) is None


def test_the_forger_makes_what_is_believed_when_the_shape_is_right() -> None:
    """Else the refusals below would prove nothing."""
    assert WORLD.identity(forged_by(WORLD.authority, NOW_S)[0]) is not None


def test_another_clusters_authority_of_the_same_name_is_not_ours() -> None:
    foreign = World(NOW_S, CLUSTER)
    assert WORLD.identity(foreign.node()[0]) is None
    # Even with every name alike, and saying that its key is ours.
    in_our_name, _ = forge(c.new_key(), c.load_certificate(WORLD.ca).subject, NOW_S)
    assert WORLD.identity(in_our_name) is None


def test_a_certificate_names_nobody_in_another_cluster() -> None:
    other = World(NOW_S, OTHER)
    assert c.identity_of(other.node()[0], [other.ca], CLUSTER, now_s=NOW_S) is None
    crossed, _ = forged_by(other.authority, NOW_S)  # says it is of our cluster
    assert c.identity_of(crossed, [other.ca, WORLD.ca], CLUSTER, now_s=NOW_S) is None
    crossed, _ = forged_by(WORLD.authority, NOW_S, uris=[f"spiffe://{OTHER}/node/n1"])
    assert WORLD.identity(crossed) is None


def test_a_certificate_is_good_from_a_little_before_it_was_made_to_its_end() -> None:
    pem, _ = WORLD.node(lifetime_s=DAY_S)
    for moment_s, good in (
        (-c.BACKDATE_S - 1, False),
        (-c.BACKDATE_S, True),
        (0, True),
        (DAY_S, True),
        (DAY_S + 1, False),
    ):
        assert (WORLD.identity(pem, now_s=NOW_S + moment_s) is not None) == good, moment_s


def test_a_remembered_identity_still_expires() -> None:
    pem, _ = WORLD.node(lifetime_s=10)
    assert WORLD.identity(pem) is not None
    assert WORLD.identity(pem) is not None  # from memory
    assert WORLD.identity(pem, now_s=NOW_S + 11) is None


def test_an_identity_ends_with_its_authority() -> None:
    old = c.create_authority("cluster", CLUSTER, now_s=NOW_S, lifetime_s=100)
    pem, _ = forged_by(old, NOW_S, until_s=DAY_S)
    assert c.identity_of(pem, [old.certificate_pem], CLUSTER, now_s=NOW_S) is not None
    assert c.identity_of(pem, [old.certificate_pem], CLUSTER, now_s=NOW_S + 101) is None


def test_an_authority_that_is_believed_no_more_names_nobody() -> None:
    new = c.create_authority("cluster", CLUSTER, now_s=NOW_S)
    pem, _ = WORLD.node()
    assert c.identity_of(pem, [new.certificate_pem, WORLD.ca], CLUSTER, now_s=NOW_S) is not None
    assert c.identity_of(pem, [new.certificate_pem + WORLD.ca], CLUSTER, now_s=NOW_S) is not None
    assert c.identity_of(pem, [new.certificate_pem], CLUSTER, now_s=NOW_S) is None
    assert c.identity_of(pem, [], CLUSTER, now_s=NOW_S) is None


@pytest.mark.parametrize(
    "damage", [WORLD.ca[:200] + WORLD.ca[-40:], WORLD.ca * (c.BUNDLE_MAX + 1)], ids=["cut", "huge"]
)
def test_authorities_that_cannot_be_read_make_nobody_a_guest(damage: bytes) -> None:
    for bundle in ([damage], [WORLD.ca, damage]):
        with pytest.raises(InvariantViolation):
            c.identity_of(WORLD.node()[0], bundle, CLUSTER, now_s=NOW_S)


SHAPES: dict[str, dict[str, Any]] = {
    "no SAN": {"uris": [], "dns": []},
    "no URI": {"uris": []},
    "two URIs": {"uris": [f"spiffe://{CLUSTER}/node/n1", f"spiffe://{CLUSTER}/user/admin"]},
    "the same URI twice": {"uris": [f"spiffe://{CLUSTER}/node/n1"] * 2},
    "an upper-case name": {"uris": [f"spiffe://{CLUSTER}/node/N1"]},
    "an upper-case scheme": {"uris": [f"SPIFFE://{CLUSTER}/node/n1"]},
    "an upper-case cluster": {"uris": [f"spiffe://{CLUSTER.upper()}/node/n1"]},
    "another scheme": {"uris": [f"https://{CLUSTER}/node/n1"]},
    "a user of the URI": {"uris": [f"spiffe://x@{CLUSTER}/node/n1"]},
    "a port": {"uris": [f"spiffe://{CLUSTER}:1/node/n1"]},
    "a query": {"uris": [f"spiffe://{CLUSTER}/node/n1?x"]},
    "a fragment": {"uris": [f"spiffe://{CLUSTER}/node/n1#x"]},
    "a longer path": {"uris": [f"spiffe://{CLUSTER}/node/n1/x"]},
    "dots": {"uris": [f"spiffe://{CLUSTER}/node/../user/admin"]},
    "escapes": {"uris": [f"spiffe://{CLUSTER}/node/n%31"]},
    "no name": {"uris": [f"spiffe://{CLUSTER}/node/"]},
    "no kind": {"uris": [f"spiffe://{CLUSTER}/n1"]},
    "another kind": {"uris": [f"spiffe://{CLUSTER}/admin/n1"]},
    "a newline": {"uris": [f"spiffe://{CLUSTER}/node/n1\n"]},
    "a NUL": {"uris": [f"spiffe://{CLUSTER}/node/n1\0.evil"]},
    "a wildcard": {"uris": [f"spiffe://{CLUSTER}/node/*"]},
    "a wildcard DNS name": {"dns": ("*.node.spinetta.internal", *NODE_DNS[1:])},
    "one more DNS name": {"dns": (*NODE_DNS, "n2.node.spinetta.internal")},
    "both roles": {"dns": (*NODE_DNS, "worker.spinetta.internal")},
    "no role": {"dns": (NODE_DNS[0], NODE_DNS[2])},
    "another node's DNS name": {"dns": ("n2.node.spinetta.internal", *NODE_DNS[1:])},
    "no DNS name": {"dns": ()},
    "a user with DNS names": {"uris": [f"spiffe://{CLUSTER}/user/n1"]},
    "an address": {"more_sans": [x509.IPAddress(ipaddress.ip_address("10.0.0.1"))]},
    "a mail address": {"more_sans": [x509.RFC822Name("a@example.org")]},
    "a directory name": {"more_sans": [x509.DirectoryName(x509.Name([]))]},
    "an authority as a leaf": {"ca": True, "sign_usage": True},
    "an authority that may sign nothing": {"ca": True},
    "a leaf that may sign": {"sign_usage": True},
    "no basic constraints": {"ca": None},
    "no key usage": {"usage": False},
    "no extended use": {"uses": ()},
    "a server only": {"uses": [ExtendedKeyUsageOID.SERVER_AUTH]},
    "any use": {"uses": [ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE]},
    "expired": {"since_s": -DAY_S, "until_s": -1},
    "not good yet": {"since_s": 60, "until_s": DAY_S},
    "an unknown critical extension": {
        "extra": [(x509.UnrecognizedExtension(x509.ObjectIdentifier("1.3.6.1.4.1.99999.1"), b"\x05\x00"), True)]
    },
    "critical name constraints": {"extra": [(x509.NameConstraints([x509.DNSName("example.org")], None), True)]},
    "an RSA key": {"key": WEAK["rsa-2048"]},
    "another curve": {"key": WEAK["secp256k1"]},
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_what_our_authority_would_not_issue_names_nobody(shape: dict[str, Any]) -> None:
    pem, _ = forged_by(WORLD.authority, NOW_S, **shape)
    assert WORLD.identity(pem) is None


def test_the_authority_itself_names_nobody() -> None:
    assert WORLD.identity(WORLD.ca) is None


def test_a_node_certifies_nobody() -> None:
    pem, key = WORLD.node()
    forged, _ = forge(c.load_key(key), c.load_certificate(pem).subject, NOW_S)
    for text in (forged, forged + pem, forged + pem + WORLD.ca):
        assert WORLD.identity(text) is None
        assert c.identity_of(text, [WORLD.ca, pem], CLUSTER, now_s=NOW_S) is None


def test_only_the_first_certificate_of_a_chain_counts() -> None:
    guest_pem = guest.guest_pair()[1]
    pem, _ = WORLD.node()
    assert WORLD.identity(guest_pem + pem) is None
    assert WORLD.identity(pem + guest_pem) is not None


def test_a_successor_certified_by_its_predecessor_leads_to_the_same_identity() -> None:
    new = c.create_authority("cluster", CLUSTER, now_s=NOW_S)
    crossed = c.cross_sign(WORLD.authority, new.certificate_pem, now_s=NOW_S)
    assert c.cluster_of(crossed) == CLUSTER
    assert c.authority_hash(crossed) == c.authority_hash(new.certificate_pem)
    assert WORLD.identity(crossed) is None


@settings(deadline=None)  # a busy machine is no failure
@given(st.binary(max_size=300))
def test_any_bytes_name_nobody(data: bytes) -> None:
    framed = b"-----BEGIN CERTIFICATE-----\n" + data + b"\n-----END CERTIFICATE-----\n"
    for text in (data, framed):
        assert WORLD.identity(text) is None


GOOD_PEM = WORLD.node()[0]
GOOD_DER = c.load_certificate(GOOD_PEM).public_bytes(Encoding.DER)
SIGNED_END = 4 + len(c.load_certificate(GOOD_PEM).tbs_certificate_bytes)
SERIAL_AT = 15  # the first byte of its serial number


@settings(deadline=None)  # a busy machine is no failure
@given(st.integers(0, len(GOOD_DER) - 1), st.integers(1, 255))
@example(SERIAL_AT, 128)  # a negative serial number, which the library warns of
def test_a_certificate_with_one_byte_changed_names_nobody_else(at: int, flip: int) -> None:
    der = bytearray(GOOD_DER)
    der[at] ^= flip
    text = b"-----BEGIN CERTIFICATE-----\n" + base64.encodebytes(bytes(der)) + b"-----END CERTIFICATE-----\n"
    found = WORLD.identity(text)
    # The form of the signature, such as its count of unused bits, is not signed itself.
    assert found is None or (at >= SIGNED_END and found == WORLD.identity(GOOD_PEM))


@pytest.mark.parametrize("known", [True, False])
def test_a_negative_serial_number_is_malformed_and_writes_nothing(known: bool) -> None:
    """As in a daemon, where a warning is a line in standard error and raises nothing."""
    der = bytearray(GOOD_DER)
    der[SERIAL_AT] |= 128
    text = b"-----BEGIN CERTIFICATE-----\n" + base64.encodebytes(bytes(der)) + b"-----END CERTIFICATE-----\n"
    with warnings.catch_warnings(record=True) as written:
        warnings.simplefilter("always")
        if known:
            assert WORLD.identity(text) is None
        else:
            with pytest.raises(UserError):
                c.load_certificate(text)
    assert written == []


def test_huge_certificates_are_not_read() -> None:
    assert WORLD.identity(GOOD_PEM + b"\n" * c.PEM_BYTES_MAX) is None


# --- PEM


def test_a_bundle_falls_into_its_certificates() -> None:
    other = World(NOW_S, OTHER).ca
    assert c.split_pem(b"remark\n" + WORLD.ca + b"\n\n" + other + b"end") == (WORLD.ca, other)
    assert c.split_pem(b"") == ()
    assert c.split_pem(b"-----BEGIN CERTIFICATE-----\nabc") == ()


@pytest.mark.parametrize(
    "bundle", [WORLD.ca * (c.BUNDLE_MAX + 1), b"x" * (c.PEM_BYTES_MAX + 1)], ids=["certificates", "bytes"]
)
def test_a_bundle_has_a_limit(bundle: bytes) -> None:
    with pytest.raises(UserError) as caught:
        c.split_pem(bundle)
    assert caught.value.reason == "too-large"


@pytest.mark.parametrize(
    "pem", [b"", b"x", WORLD.ca[:100], c.key_pem(WORLD_KEY)], ids=["nothing", "x", "cut short", "a key"]
)
def test_what_is_no_certificate_is_said_to_be_none(pem: bytes) -> None:
    for ask in (c.expiry, c.authority_hash, c.cluster_of, c.describe, c.renew_at):
        with pytest.raises(UserError):
            ask(pem)


def test_a_key_survives_being_written_and_read() -> None:
    assert c.key_pem(c.load_key(c.key_pem(WORLD_KEY))) == c.key_pem(WORLD_KEY)


BAD_KEYS = {
    "nothing": b"",
    "a certificate": GOOD_PEM,
    "encrypted": WORLD_KEY.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"x")),
    "rsa": WEAK["rsa-2048"].private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
    "cut short": c.key_pem(WORLD_KEY)[:-40],
}


@pytest.mark.parametrize("pem", BAD_KEYS.values(), ids=BAD_KEYS)
def test_bad_keys_are_refused_without_being_shown(pem: bytes) -> None:
    with pytest.raises(UserError) as caught:
        c.load_key(pem)
    assert caught.value.reason == "bad-key"
    assert caught.value.__cause__ is None
    assert not pem or pem.decode()[40:80] not in str(caught.value)


def test_no_key_in_a_repr() -> None:
    assert "key" not in repr(WORLD.authority)
