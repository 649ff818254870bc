"""OIDC bearer tokens: who a token says its bearer is, if an issuer that the cluster believes has signed it.

OpenID Connect Core 1.0, section 3.1.3.7, and Discovery 1.0. PyJWT checks signatures and claims; this module decides
whom to believe, fetches and keeps the issuers' keys, and maps groups to rights. Fetching happens in a thread, with
limits in time and size, and not more often than `REFRESH_MIN_S`, whatever tokens are shown.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import socket
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from http.client import OK, HTTPConnection, HTTPException
from typing import Any
from urllib.parse import urlsplit

import jwt

from spinetta import names
from spinetta.access import Issuer, UserRole
from spinetta.errors import Denied, StoreUnavailable, UserError

log = logging.getLogger("spinetta.node")

ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA")  # no secrets
TOKEN_BYTES_MAX = 16 << 10  # those with hundreds of groups have a few KB; gRPC takes no larger metadata by default
DOCUMENT_BYTES_MAX = 1 << 20  # of keys: a hundred RSA keys with certificates
FETCH_S = 5.0  # for each of two documents, from their connection's standing on
KEYS_KEPT_S = 3600.0  # then they are fetched anew: a key that the issuer has withdrawn is not believed for longer
REFRESH_MIN_S = 30.0  # between two fetches, or anyone could make us ask the issuer with each made-up key id
LEEWAY_S = 30.0  # between clocks, as for joining nodes
GROUPS_MAX = 1000  # in one token
UNTIL_S_MAX = 253_402_300_799.0  # the year 9999: later ends are shown as this one


@dataclass(frozen=True, slots=True)
class OidcIdentity:
    """Who the bearer is. `name` begins with the issuer's prefix; `expires_s` is the token's end, since 1970."""

    name: str
    role: UserRole
    projects: tuple[str, ...]
    clearances: tuple[str, ...]
    expires_s: float


@dataclass(slots=True)
class _Keys:
    """An issuer's keys as last fetched."""

    keys: jwt.PyJWKSet | None = None
    fetched_s: float = float("-inf")
    tried_s: float = float("-inf")
    fetching: asyncio.Lock = field(default_factory=asyncio.Lock)


class OidcVerifier:
    """Checks bearer tokens against the issuers of the cluster's policy. Belongs to one event loop."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._keys: dict[tuple[str, bytes], _Keys] = {}

    async def verify(self, token: str, issuers: Sequence[Issuer]) -> OidcIdentity:
        """Who the bearer is, and what the groups in the token give.

        Raises:
            Denied: it is not believed (reason ``unauthenticated``), or none of its groups has rights here.
            StoreUnavailable: the issuer's keys cannot be had now: unknown, so ask again.
        """
        issuer, header = _issuer_of(token, issuers)
        known = self._keys.setdefault((issuer.url, issuer.ca_pem), _Keys())
        key = await self._key(issuer, known, str(header.get("kid", "")), str(header.get("alg", "")))
        try:
            claims = jwt.decode(
                token,
                key,
                algorithms=list(ALGORITHMS),
                audience=issuer.audience,
                issuer=issuer.url,
                leeway=LEEWAY_S,
                options={"require": ["exp", "iss", "aud"], "verify_iat": True, "verify_nbf": True},
            )
            until_s = float(claims["exp"])
        except jwt.ExpiredSignatureError:
            raise _unknown("the bearer token has expired", "get a new one from its issuer") from None
        except jwt.InvalidAudienceError:
            raise _unknown("the bearer token is for another audience", f"ask for {issuer.audience!r}") from None
        except jwt.ImmatureSignatureError:
            raise _unknown("the bearer token is not valid yet", "set both clocks by NTP") from None
        except (jwt.PyJWTError, TypeError, ValueError, OverflowError):  # the latter: claims of an unexpected type
            raise _unknown("the bearer token is not good: its signature or form is wrong") from None
        return _identity(issuer, claims, min(until_s, UNTIL_S_MAX))

    def forget(self, issuers: Sequence[Issuer]) -> None:
        """Keep only what is known of these: the policy has changed."""
        kept = {(i.url, i.ca_pem) for i in issuers}
        self._keys = {k: v for k, v in self._keys.items() if k in kept}

    async def _key(self, issuer: Issuer, known: _Keys, kid: str, alg: str) -> Any:
        async with known.fetching:
            now_s = self._clock()
            stale = now_s - known.fetched_s > KEYS_KEPT_S
            found = None if stale or known.keys is None else _pick(known.keys, kid, alg)
            if found is None and now_s - known.tried_s >= REFRESH_MIN_S:
                known.tried_s = now_s
                try:
                    known.keys = await asyncio.to_thread(_fetch_keys, issuer)
                    known.fetched_s = self._clock()
                    stale = False
                except (OSError, HTTPException, ValueError, jwt.PyJWTError) as e:
                    log.warning("the keys of issuer %s cannot be had: %s", issuer.url, e)
                found = None if stale or known.keys is None else _pick(known.keys, kid, alg)
        if stale or known.keys is None:
            raise StoreUnavailable(f"the keys of issuer {issuer.url} cannot be had now")
        if found is None:
            raise _unknown("the bearer token is signed with a key that its issuer does not have")
        return found


def _issuer_of(token: str, issuers: Sequence[Issuer]) -> tuple[Issuer, dict[str, Any]]:
    """Whose token it claims to be. Nothing of this is believed yet."""
    if len(token) > TOKEN_BYTES_MAX:
        raise _unknown("the bearer token is too long")
    try:
        header = jwt.get_unverified_header(token)
        claims = jwt.decode(token, options={"verify_signature": False})
    except (jwt.PyJWTError, ValueError, RecursionError):
        raise _unknown("the bearer token is not a JSON web token", "send the ID token of your issuer") from None
    url = claims.get("iss")
    for issuer in issuers:
        if issuer.url == url and issuer.prefix:  # without a prefix its names could be those of the cluster's own users
            return issuer, header
    shown = names.quoted(url) if isinstance(url, str) else "nobody"
    raise _unknown(f"the bearer token is by {shown}, which this cluster does not believe", "see: spinetta policy show")


def _pick(keys: jwt.PyJWKSet, kid: str, alg: str) -> Any:
    """The key of this id that may sign with this algorithm; without an id, the only such one."""
    if alg not in ALGORITHMS:
        return None
    usable = [k for k in keys.keys if k.public_key_use in (None, "sig")]
    named = [k for k in usable if k.key_id == kid] if kid else usable
    # An RSA key may sign by all of RSA's algorithms, whichever of them it is listed with.
    fitting = [k for k in named if k.algorithm_name == alg or (k.key_type == "RSA" and alg.startswith(("RS", "PS")))]
    return fitting[0].key if len(fitting) == 1 else None


def _identity(issuer: Issuer, claims: dict[str, Any], until_s: float) -> OidcIdentity:
    name = claims.get(issuer.name_claim)
    if not isinstance(name, str) or not name:
        raise Denied(f"the bearer token has no claim {issuer.name_claim!r}, which names its bearer")
    if issuer.name_claim == "email" and claims.get("email_verified", True) is not True:
        raise Denied(f"the bearer token says itself that the address {names.quoted(name)} has not been verified")
    full = issuer.prefix + name
    try:
        names.check_owner(full)
    except UserError:
        raise Denied(f"{names.quoted(full)} cannot be the name of a user here") from None
    said = claims.get(issuer.groups_claim, [])
    listed = [said] if isinstance(said, str) else said if isinstance(said, list) else []
    groups = {g for g in listed[:GROUPS_MAX] if isinstance(g, str)}
    mine = [m for m in issuer.groups if m.group in groups]
    if not mine:
        raise Denied(
            f"user {full} is in no group that has rights in this cluster",
            hint=f"an administrator maps groups of {issuer.url} with `spinetta policy`",
        )
    return OidcIdentity(
        full,
        max(m.role for m in mine),
        tuple(sorted({p for m in mine for p in m.projects})),
        tuple(sorted({c for m in mine for c in m.clearances})),
        until_s,
    )


def _unknown(text: str, hint: str = "") -> Denied:
    return Denied(text, hint=hint, reason="unauthenticated")


# --- fetching, in a thread ---------------------------------------------------------------------------------------


class _Connection(HTTPConnection):
    """A connection that is cut after `FETCH_S`, whatever comes: a byte now and then would hold its thread for ever."""

    def __init__(self, host: str, port: int, tls: ssl.SSLContext | None) -> None:
        super().__init__(host, port, timeout=FETCH_S)
        self._tls = tls
        self._counting: tuple[threading.Timer, socket.socket] | None = None

    def connect(self) -> None:
        """Connect, and begin to count."""
        super().connect()
        again = self.sock.dup()  # the socket itself changes hands when TLS begins
        timer = threading.Timer(FETCH_S, _cut, (again,))
        self._counting = (timer, again)
        timer.daemon = True
        timer.start()
        if self._tls is not None:
            self.sock = self._tls.wrap_socket(self.sock, server_hostname=self.host)

    def end(self) -> None:
        """Close it."""
        self.close()
        if self._counting is not None:
            self._counting[0].cancel()
            self._counting[1].close()


def _cut(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):  # it has ended
        sock.shutdown(socket.SHUT_RDWR)


def _fetch_keys(issuer: Issuer) -> jwt.PyJWKSet:
    context = ssl.create_default_context(cadata=issuer.ca_pem.decode("ascii") or None)
    configuration = _fetch(issuer.url.rstrip("/") + "/.well-known/openid-configuration", context)
    if configuration.get("issuer") != issuer.url:
        raise ValueError(f"its configuration is that of {configuration.get('issuer')!r}")
    uri = configuration.get("jwks_uri")
    if not isinstance(uri, str):
        raise ValueError("its configuration names no jwks_uri")
    if urlsplit(uri).scheme != urlsplit(issuer.url).scheme:  # or it could make this machine ask itself, in clear
        raise ValueError(f"its jwks_uri {names.quoted(uri)} is of another kind than its own address")
    return jwt.PyJWKSet.from_dict(_fetch(uri, context))


def _fetch(url: str, context: ssl.SSLContext) -> dict[str, Any]:
    check_url(url)
    parts = urlsplit(url)
    tls = context if parts.scheme == "https" else None
    connection = _Connection(str(parts.hostname), parts.port or (443 if tls else 80), tls)
    try:
        connection.request("GET", (parts.path or "/") + (f"?{parts.query}" if parts.query else ""))
        response = connection.getresponse()
        # An issuer says where its keys are; whoever answers in its place does not: no redirect is followed.
        if response.status != OK:
            raise ValueError(f"{url} answers with status {response.status}")
        data = response.read(DOCUMENT_BYTES_MAX + 1)
    finally:
        connection.end()
    if len(data) > DOCUMENT_BYTES_MAX:
        raise ValueError(f"{url} answers with more than {DOCUMENT_BYTES_MAX} bytes")
    document = json.loads(data)
    if not isinstance(document, dict):
        raise ValueError(f"{url} answers with something else than an object")
    return document


def check_url(url: str) -> None:
    """Raise ValueError unless it is ``https://HOST…``, or ``http://`` on loopback, for development."""
    parts = urlsplit(url)
    if parts.scheme == "https" and parts.hostname:
        return
    if parts.scheme == "http" and names.is_loopback(f"{parts.hostname}:{parts.port or 80}"):
        return
    raise ValueError(f"{names.quoted(url)} is not https://…")
