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
from spinetta.client.admin import AsyncAdmin, WhoAmI
from spinetta.client.channels import Nodes
from spinetta.client.credentials import NODES_MAX, Stored, check_bearer, load, save
from spinetta.errors import InvariantViolation, OutcomeUnknown, StoreUnavailable, UserError
from spinetta.trust import certificates
from spinetta.trust.contact import Met, meet
from spinetta.trust.credentials import UserCredentials
from spinetta.trust.dial import Dialer
from spinetta.v1 import trust_pb2 as trust

if TYPE_CHECKING:
    from spinetta.client.aio import AsyncClient

RENEW_LIMIT_S = 3.0  # on top of a command that is done: a person waits
LOOK_EVERY_S = 6 * 3600.0  # for another authority: an overlap is days, and a working day has a look or two


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


async def whose_bearer(met: Met, bearer: str, timeout_s: float) -> WhoAmI:
    """Who a verified cluster takes this bearer token's holder for.

    Raises:
        UserError: the token is not believed, or gives no rights here.
        StoreUnavailable: nobody answers.
    """
    if not met.verified:
        raise InvariantViolation("a bearer token is shown to a verified cluster only")
    checked = check_bearer(bearer, "the bearer token's file")
    addresses = tuple(dict.fromkeys([*met.voters, met.address]))
    nodes = Nodes(addresses, timeout_s, timeout_s, Dialer.bearer(met.ca_bundle, lambda: checked))
    try:
        return await AsyncAdmin(nodes).whoami()
    finally:
        await nodes.close()


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
    """Keep a credentials file up to date: the certificate once two thirds of its life are over, or once the cluster
    signs with another authority; the authorities to believe, which are asked for now and then.

    Returns:
        None, or a warning once the certificate expires within a tenth of its life and has not been renewed.
    """
    stored = load(path)
    own = stored.credentials
    is_due = own is not None and certificates.renew_at(own.cert_pem) <= now_s < certificates.expiry(own.cert_pem)[1]
    if not is_due and now_s - _looked_s(path) < LOOK_EVERY_S:
        return None
    problem = "no node answers in time"
    try:
        async with asyncio.timeout(RENEW_LIMIT_S):
            await _look(client, path, stored, is_due=is_due)
            return None
    except (TimeoutError, StoreUnavailable, OutcomeUnknown):
        pass
    except UserError as e:
        problem = e.message
    if own is None:
        return None
    since_s, until_s = certificates.expiry(own.cert_pem)
    if now_s < until_s - (until_s - since_s) / 10:
        return None
    when = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(until_s))
    return f"your certificate expires {when} and could not be renewed: {problem}"


async def refresh(client: AsyncClient, path: Path) -> None:
    """Bring a credentials file up to date at once, before something that makes older certificates worthless.

    Raises:
        UserError: it cannot be read or written, or the node refuses.
        StoreUnavailable, OutcomeUnknown: nobody answers in time.
    """
    await _look(client, path, load(path), is_due=False)


def _looked_s(path: Path) -> float:
    """When the latest look was: each writes the file anew. A command a minute must not ask each time."""
    return path.stat().st_mtime


async def _look(client: AsyncClient, path: Path, stored: Stored, *, is_due: bool) -> None:
    bundle = (await client.admin.authorities_pem(RENEW_LIMIT_S)) or stored.ca_pem
    offered = certificates.split_pem(bundle)
    if {certificates.cluster_of(one) for one in offered} != {stored.cluster}:
        raise UserError("the node names authorities of another cluster", reason="other-cluster")
    fresh, own = replace(stored, ca_pem=bundle), stored.credentials
    if own is not None:
        # The first one signs. A certificate of the one before is worthless once the overlap is over.
        is_of_active = certificates.identity_of(own.cert_pem, offered[:1], own.cluster, now_s=time.time()) is not None
        if is_due or not is_of_active:
            csr = certificates.csr(certificates.load_key(own.key_pem), own.name)
            given = await client.admin.renew_certificate(csr, RENEW_LIMIT_S)
            renewed = _credentials(given, bundle, own.key_pem, own.cluster)
        else:
            renewed = UserCredentials.create(bundle, own.cert_pem, own.key_pem)
        fresh = replace(stored, ca_pem=renewed.ca_pem, credentials=renewed)
    if load(path) == stored:  # not when somebody has logged in anew meanwhile
        save(path, fresh)
