"""Getting a person's certificate, and a fresh one in time. Keys are made here and never leave this machine."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from spinetta import names, tokens
from spinetta.access import TokenRole
from spinetta.client.channels import Nodes
from spinetta.client.credentials import NODES_MAX, Stored, check_bearer, load, save
from spinetta.errors import InvariantViolation, UserError
from spinetta.trust import certificates
from spinetta.trust.contact import Met, meet
from spinetta.trust.credentials import UserCredentials
from spinetta.trust.dial import Dialer
from spinetta.v1 import trust_pb2 as trust

if TYPE_CHECKING:
    from spinetta.client.aio import AsyncClient

RENEW_LIMIT_S = 3.0  # on top of a command that is done: a person waits


async def with_token(addresses: Sequence[str], text: str, timeout_s: float) -> Stored:
    """Log in with a client's join token.

    Raises:
        UserError: the token is none, is for a node, has been used, revoked or has expired, or is another cluster's.
        StoreUnavailable: nobody answers. The same token may be tried again.
    """
    token = tokens.parse(text)
    if token.role is not TokenRole.CLIENT:
        raise UserError(
            f"this token is for a node of role {token.role.name.lower()}",
            field="token",
            hint="use it with: spinetta node join; for a person: spinetta token create --role client --user NAME",
            reason="token-role",
        )
    met = await meet(addresses, token.authority_hash)
    return await _login(met, Dialer.guest(met.ca_bundle), text.strip(), timeout_s)


async def with_bearer(met: Met, bearer: str, timeout_s: float) -> Stored:
    """Log in with an OIDC bearer token, at a cluster that has been verified (see `trust.contact.meet`).

    Raises:
        UserError: the token is not believed, or gives no rights here.
        StoreUnavailable: nobody answers.
    """
    if not met.verified:
        raise InvariantViolation("a bearer token is shown to a verified cluster only")
    checked = check_bearer(bearer, "the bearer token's file")
    return await _login(met, Dialer.bearer(met.ca_bundle, lambda: checked), "", timeout_s)


async def _login(met: Met, dialer: Dialer, token: str, timeout_s: float) -> Stored:
    key = certificates.new_key()
    request = trust.LoginRequest(token=token, csr=certificates.csr(key, "user"), wall_ms=time.time_ns() // 1_000_000)
    addresses = tuple(dict.fromkeys([*met.voters, met.address]))
    nodes = Nodes(addresses, timeout_s, timeout_s, dialer)
    try:
        # Asked again with the same key it gets the same answer, so that a lost one does not cost the token.
        answer = await nodes.enroll(lambda stub: stub.Login, request, writes=True)
    finally:
        await nodes.close()
    own = _credentials(answer.certificates, met.ca_bundle, certificates.key_pem(key), met.cluster)
    told = [*answer.voters, *met.voters, met.address]
    known = tuple(dict.fromkeys(names.check_address(a) for a in told))
    return Stored(own.ca_pem, own, known[:NODES_MAX])


def _credentials(given: trust.Certificates, ca_pem: bytes, key_pem: bytes, cluster: str) -> UserCredentials:
    """Credentials from what a node gave, once they have been seen to be good."""
    bundle = given.ca_bundle or ca_pem
    leaf = next(iter(certificates.split_pem(given.certificate)), b"")
    own = UserCredentials.create(bundle, leaf, key_pem)
    identity = certificates.identity_of(leaf, [bundle], cluster, now_s=time.time())
    if identity is None or own.cluster != cluster:
        raise UserError("the node gave a certificate that is not good here and now", hint="compare the clocks")
    return own


async def renew(client: AsyncClient, path: Path, now_s: float) -> str | None:
    """Replace the certificate in a credentials file once two thirds of its life are over.

    Returns:
        None, or a warning once it expires within a tenth of its life and has not been renewed.
    """
    stored = load(path)
    own = stored.credentials
    if own is None:
        return None
    since_s, until_s = certificates.expiry(own.cert_pem)
    if not certificates.renew_at(own.cert_pem) <= now_s < until_s:
        return None
    problem = "no node answers in time"
    try:
        async with asyncio.timeout(RENEW_LIMIT_S):
            await _renew(client, path, stored, own)
            return None
    except TimeoutError:
        pass
    except UserError as e:
        problem = e.message
    if now_s < until_s - (until_s - since_s) / 10:
        return None
    when = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(until_s))
    return f"your certificate expires {when} and could not be renewed: {problem}"


async def _renew(client: AsyncClient, path: Path, stored: Stored, own: UserCredentials) -> None:
    csr = certificates.csr(certificates.load_key(own.key_pem), own.name)
    given = await client.admin.renew_certificate(csr, RENEW_LIMIT_S)
    fresh = _credentials(given, own.ca_pem, own.key_pem, own.cluster)
    if load(path).credentials == own:  # not when somebody has logged in anew meanwhile
        save(path, replace(stored, ca_pem=fresh.ca_pem, credentials=fresh))
