"""Bearer tokens: those of a real issuer are believed as far as the policy says, all others are not.

The issuer is PyPI's oidc-provider-mock, a whole OpenID provider in a process of its own. What no honest issuer would
do is done by `Forge`, a small issuer in this process.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import re
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from spinetta.access import GroupMapping, Issuer, UserRole
from spinetta.errors import Denied, StoreUnavailable
from spinetta.trust.oidc import REFRESH_MIN_S, OidcIdentity, OidcVerifier

pytestmark = pytest.mark.contract

MAPPINGS = (
    GroupMapping("physics", UserRole.USER, ("higgs",), ("patients",)),
    GroupMapping("staff", UserRole.OPERATOR),
    GroupMapping("guests", UserRole.VIEWER),
)
AUDIENCE = "spinetta"
KEY, OTHER_KEY = (rsa.generate_private_key(65537, 2048) for _ in range(2))


def issuer(url: str, **changes: Any) -> Issuer:
    return Issuer(**{"url": url, "audience": AUDIENCE, "prefix": "lab-", "groups": MAPPINGS, **changes})


def verify(token: str, *issuers: Issuer, verifier: OidcVerifier | None = None) -> OidcIdentity:
    return asyncio.run((verifier or OidcVerifier()).verify(token, issuers))


# --- a real issuer -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def provider(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a provider that knows ann (physics and staff), bob (guests) and eve (no group)."""
    log = tmp_path_factory.mktemp("issuer") / "log"
    people = {"ann": ["physics", "staff"], "bob": ["guests"], "eve": []}
    claims = [f"--user-claims={json.dumps({'sub': n, 'groups': g})}" for n, g in people.items()]
    program = Path(sys.executable).with_name("oidc-provider-mock")
    with log.open("wb") as out:
        process = subprocess.Popen(
            [str(program), "--port", "0", *claims], stdout=out, stderr=out, stdin=subprocess.DEVNULL
        )
    try:
        end_s = time.monotonic() + 60
        while (found := re.search(r"running on (http://127\.0\.0\.1:\d+)", log.read_text())) is None:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end_s, log.read_text()
            time.sleep(0.05)  # polling with a limit
        yield found[1]
    finally:
        process.terminate()
        process.wait(20)


class _Stay(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        return None


def id_token(provider: str, sub: str, audience: str = AUDIENCE) -> str:
    """The authorization code flow, as a browser and a client would go through it."""
    opener = urllib.request.build_opener(_Stay(), urllib.request.ProxyHandler({}))
    back = "http://127.0.0.1/back"
    query = urllib.parse.urlencode(
        {"client_id": audience, "response_type": "code", "redirect_uri": back, "scope": "openid groups profile"}
    )
    form = urllib.parse.urlencode({"sub": sub}).encode()
    try:
        opener.open(f"{provider}/oauth2/authorize?{query}", data=form, timeout=20)
        raise AssertionError("no redirection")
    except urllib.error.HTTPError as e:
        with e:
            where = urllib.parse.urlsplit(e.headers["Location"])
    code = urllib.parse.parse_qs(where.query)["code"][0]
    body = urllib.parse.urlencode({"grant_type": "authorization_code", "code": code, "redirect_uri": back}).encode()
    basic = base64.b64encode(f"{audience}:secret".encode()).decode()
    request = urllib.request.Request(  # noqa: S310 - the provider of this test
        f"{provider}/oauth2/token", data=body, headers={"Authorization": f"Basic {basic}"}
    )
    with opener.open(request, timeout=20) as response:
        return str(json.load(response)["id_token"])


def test_a_real_issuers_token_gives_what_its_groups_are_mapped_to(provider: str) -> None:
    found = verify(id_token(provider, "ann"), issuer(provider))
    assert (found.name, found.role) == ("lab-ann", UserRole.OPERATOR)
    assert (found.projects, found.clearances) == (("higgs",), ("patients",))
    assert found.expires_s > time.time()
    assert verify(id_token(provider, "bob"), issuer(provider)).role is UserRole.VIEWER


def test_a_real_issuers_token_for_another_audience_is_refused(provider: str) -> None:
    with pytest.raises(Denied, match="another audience"):
        verify(id_token(provider, "ann", "elsewhere"), issuer(provider))


def test_without_a_mapped_group_nobody_gets_in(provider: str) -> None:
    with pytest.raises(Denied, match="in no group that has rights"):
        verify(id_token(provider, "eve"), issuer(provider))


def test_an_issuer_that_the_cluster_does_not_know_is_refused(provider: str) -> None:
    with pytest.raises(Denied, match="does not believe"):
        verify(id_token(provider, "ann"))
    with pytest.raises(Denied, match="does not believe"):
        verify(id_token(provider, "ann"), issuer(provider + "/"))


def test_an_issuer_without_a_prefix_is_not_believed(provider: str) -> None:
    with pytest.raises(Denied, match="does not believe"):
        verify(id_token(provider, "ann"), issuer(provider, prefix=""))


@pytest.mark.parametrize("part", [0, 1, 2])
def test_an_altered_token_of_a_real_issuer_is_refused(provider: str, part: int) -> None:
    parts = id_token(provider, "bob").split(".")
    if part == 1:
        claims = json.loads(base64.urlsafe_b64decode(parts[1] + "=="))
        claims["groups"] = ["staff"]
        parts[1] = base64.urlsafe_b64encode(json.dumps(claims).encode()).decode().rstrip("=")
    elif part == 2:
        parts[2] = parts[2][:-8] + ("A" * 8 if parts[2][-8:] != "A" * 8 else "B" * 8)
    else:
        parts[0] = base64.urlsafe_b64encode(b'{"alg":"none","typ":"JWT"}').decode().rstrip("=")
    with pytest.raises(Denied) as caught:
        verify(".".join(parts), issuer(provider))
    assert caught.value.reason == "unauthenticated"


# --- an issuer that misbehaves -------------------------------------------------------------------------------------


class Forge:
    """An issuer whose keys and documents a test decides."""

    def __init__(self) -> None:
        self.key: Any = KEY
        self.kid = "k1"
        self.asked: list[str] = []
        self.answers: dict[str, Callable[[], bytes]] = {
            "/.well-known/openid-configuration": lambda: json.dumps(
                {"issuer": self.url, "jwks_uri": self.url + "/keys"}
            ).encode(),
            "/keys": lambda: json.dumps({"keys": [self.jwk()]}).encode(),
        }
        forge = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                forge.asked.append(self.path)
                answer = forge.answers.get(self.path)
                if answer is None:
                    self.send_error(404)
                    return
                body = answer()
                if body.startswith(b"Location: "):
                    self.send_response(302)
                    self.send_header("Location", body.decode().removeprefix("Location: "))
                    self.end_headers()
                    return
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def jwk(self) -> dict[str, Any]:
        algorithm = (
            jwt.algorithms.RSAAlgorithm if isinstance(self.key, rsa.RSAPrivateKey) else jwt.algorithms.ECAlgorithm
        )
        found = json.loads(algorithm.to_jwk(self.key.public_key()))
        return {**found, "kid": self.kid, "use": "sig", "alg": self.alg}

    @property
    def alg(self) -> str:
        return "RS256" if isinstance(self.key, rsa.RSAPrivateKey) else "ES256"

    def token(self, headers: dict[str, Any] | None = None, **changes: Any) -> str:
        now_s = int(time.time())
        claims = {
            "iss": self.url, "aud": AUDIENCE, "sub": "mal", "groups": ["staff"], "exp": now_s + 600, "iat": now_s,
        } | changes  # fmt: skip
        claims = {k: v for k, v in claims.items() if v is not None}
        return jwt.encode(claims, self.key, algorithm=self.alg, headers={"kid": self.kid, **(headers or {})})

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(10)


@pytest.fixture
def forge() -> Iterator[Forge]:
    made = Forge()
    yield made
    made.stop()


def test_a_good_token_of_the_small_issuer_is_believed(forge: Forge) -> None:
    assert verify(forge.token(), issuer(forge.url)).name == "lab-mal"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"exp": int(time.time()) - 3600}, "has expired"),
        ({"nbf": int(time.time()) + 3600}, "not valid yet"),
        ({"iat": int(time.time()) + 3600}, "not valid yet"),
        ({"exp": None}, "is not good"),
        ({"aud": None}, "is not good"),
        ({"aud": ["a", "b"]}, "another audience"),
        ({"exp": "soon"}, "is not good"),
        ({"exp": [1]}, "is not good"),
        ({"exp": float("inf")}, "is not good"),
        ({"sub": None}, "no claim 'sub'"),
        ({"sub": ""}, "no claim 'sub'"),
        ({"sub": "x" * 300}, "cannot be the name of a user"),
        ({"sub": "a/b"}, "cannot be the name of a user"),
        ({"sub": "a\nb"}, "cannot be the name of a user"),
        ({"groups": {"staff": True}}, "in no group"),
        ({"groups": [["staff"]]}, "in no group"),
        ({"groups": ["x"] * 1500 + ["staff"]}, "in no group"),
        ({"groups": None}, "in no group"),
        ({"iss": "http://127.0.0.1:1"}, "does not believe"),
        ({"iss": None}, "does not believe"),
    ],
)
def test_claims_that_do_not_hold(forge: Forge, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(Denied, match=re.escape(words)):
        verify(forge.token(**changes), issuer(forge.url))


def test_a_public_key_is_no_shared_secret(forge: Forge) -> None:
    pem = forge.key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    header, claims, _ = forge.token().split(".")
    header = base64.urlsafe_b64encode(json.dumps({"alg": "HS256", "kid": "k1"}).encode()).decode().rstrip("=")
    mac = hmac.new(pem, f"{header}.{claims}".encode(), hashlib.sha256).digest()
    forged = f"{header}.{claims}.{base64.urlsafe_b64encode(mac).decode().rstrip('=')}"
    with pytest.raises(Denied):
        verify(forged, issuer(forge.url))


@pytest.mark.parametrize("alg", ["ES256", "ES384", "ES512", "EdDSA"])
def test_a_key_is_not_used_with_an_algorithm_of_another_kind(forge: Forge, alg: str) -> None:
    _, claims, signature = forge.token().split(".")
    header = base64.urlsafe_b64encode(json.dumps({"alg": alg, "kid": "k1"}).encode()).decode().rstrip("=")
    with pytest.raises(Denied, match="a key that its issuer does not have"):
        verify(f"{header}.{claims}.{signature}", issuer(forge.url))


@pytest.mark.parametrize("header", [{"jku": "http://127.0.0.1:1/keys"}, {"jwk": {"kty": "RSA"}}, {"x5u": "http://x"}])
def test_keys_named_by_the_token_itself_are_ignored(forge: Forge, header: dict[str, Any]) -> None:
    other = Forge()
    try:
        other.url, other.key = forge.url, OTHER_KEY
        with pytest.raises(Denied):
            verify(other.token({**header}), issuer(forge.url))
    finally:
        other.stop()


@pytest.mark.parametrize("text", ["", "x", "a.b.c", "." * 100, "x" * 20_000, "eyJ.eyJ.", "\0", "[" * 9000])
def test_what_is_no_token(text: str) -> None:
    with pytest.raises(Denied) as caught:
        verify(text, issuer("http://127.0.0.1:1"))
    assert caught.value.reason == "unauthenticated"


def test_keys_are_kept_and_a_new_one_is_found(forge: Forge) -> None:
    now = [1000.0]
    verifier = OidcVerifier(clock=lambda: now[0])

    async def story() -> None:
        believed = [issuer(forge.url)]
        for _ in range(5):
            await verifier.verify(forge.token(), believed)
        assert forge.asked.count("/keys") == 1
        forge.key, forge.kid = ec.generate_private_key(ec.SECP256R1()), "k2"
        with pytest.raises(Denied, match="a key that its issuer does not have"):
            await verifier.verify(forge.token(), believed)
        assert forge.asked.count("/keys") == 1, "not asked again so soon, whatever key ids are shown"
        now[0] += REFRESH_MIN_S + 1
        assert (await verifier.verify(forge.token(), believed)).name == "lab-mal"
        assert forge.asked.count("/keys") == 2

    asyncio.run(story())


def test_an_issuer_that_is_down_means_unknown_and_not_no(forge: Forge) -> None:
    token, believed = forge.token(), issuer(forge.url)
    forge.answers.clear()
    with pytest.raises(StoreUnavailable):
        verify(token, believed)


@pytest.mark.parametrize(
    "configuration",
    [
        lambda _: b"Location: http://127.0.0.1:1/",
        lambda _: b"[]",
        lambda _: b"{",
        lambda f: json.dumps({"issuer": "http://other", "jwks_uri": f.url + "/keys"}).encode(),
        lambda f: json.dumps({"issuer": f.url, "jwks_uri": "file:///etc/passwd"}).encode(),
        lambda f: json.dumps({"issuer": f.url, "jwks_uri": "http://192.0.2.1/keys"}).encode(),
        lambda f: json.dumps({"issuer": f.url}).encode(),
        lambda _: b" " * (2 << 20),
    ],
)
def test_an_issuer_with_an_odd_configuration_gives_no_keys(
    forge: Forge, configuration: Callable[[Forge], bytes]
) -> None:
    forge.answers["/.well-known/openid-configuration"] = lambda: configuration(forge)
    with pytest.raises(StoreUnavailable):
        verify(forge.token(), issuer(forge.url))
