"""Why no connection stands, in words: gRPC says no more than that it does not."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from spinetta import names
from spinetta.errors import Denied, StoreUnavailable, UserError
from spinetta.trust import certificates, guest
from spinetta.trust.dial import ANY, Dialer, Pems, fetch_leaf, stands

ADDRESSES_MAX = 8  # looked at: one reason is enough
_OPTIONS = (("grpc.enable_http_proxy", 0), ("grpc.use_local_subchannel_pool", 1))
_LOGIN = "log in anew with: spinetta login"


async def why(addresses: Sequence[str], dialer: Dialer, timeout_s: float) -> UserError | None:
    """What is wrong with the certificates or with plain text at these addresses, where no connection stands.

    None when it is nothing of the kind: nobody answers there, or not in time.
    """
    pems = dialer.pems
    own = None if pems is None else own_certificate(pems, time.time())
    if own is not None:
        return own
    looks = [asyncio.create_task(_look(a, dialer, pems, timeout_s)) for a in addresses[:ADDRESSES_MAX]]
    try:
        found = await asyncio.gather(*looks)
    finally:
        for look in looks:
            look.cancel()
    return next((e for e in found if e is not None), None)


def own_certificate(pems: Pems, now_s: float) -> UserError | None:
    """What is wrong with the certificate that we show."""
    _, own_pem, _ = pems
    if own_pem == guest.guest_pair()[1]:
        return None
    since_s, until_s = certificates.expiry(own_pem)
    if now_s > until_s:
        return Denied(f"your certificate expired {_utc(until_s)}", hint=_LOGIN, reason="unauthenticated")
    if now_s < since_s:
        return UserError(
            f"your certificate becomes valid {_utc(since_s)}, and here it is {_utc(now_s)}",
            hint="set this machine's clock",
            reason="clock",
        )
    return None


async def _look(address: str, dialer: Dialer, pems: Pems | None, timeout_s: float) -> UserError | None:
    if pems is None:
        return await _look_in_the_clear(address, timeout_s)
    if await _gets_in(dialer, address, timeout_s):
        return None  # now it works: somebody was slow
    if pems[1] != guest.guest_pair()[1] and await _gets_in(Dialer.guest(pems[0]), address, timeout_s):
        if await _gets_in(dialer, address, timeout_s):
            return None  # it began to listen between the first look and the second
        return Denied(
            f"the node at {address} does not believe your certificate: the cluster has changed its authority since",
            hint=_LOGIN,
            reason="unauthenticated",
        )
    try:
        leaf = await fetch_leaf(address, timeout_s)
    except StoreUnavailable:
        return None
    except UserError as e:
        if e.reason != "not-tls":
            return e
        return UserError(
            f"what answers at {address} speaks plain text, and your credentials are for a secured cluster",
            hint="is the address right? For an open cluster, on loopback only: --credentials none",
            reason="not-tls",
        )
    authorities = certificates.split_pem(pems[0])
    cluster, theirs = certificates.cluster_of(authorities[0]), certificates.describe(leaf).cluster
    if theirs != cluster:
        return UserError(
            f"the node at {address} is of cluster {theirs}, and your credentials are for cluster {cluster}",
            hint="name its nodes with --node, or other credentials with --credentials",
            reason="other-cluster",
        )
    if certificates.identity_of(leaf, authorities, cluster, now_s=time.time()) is not None:
        return None  # all is well with it: something else is the matter
    return UserError(
        f"the node at {address} has a certificate of an authority that your credentials do not know: "
        "the cluster has changed it, or somebody else answers",
        hint=f"ask an administrator whether the cluster's authority was changed; then {_LOGIN}",
        reason="unknown-authority",
    )


async def _gets_in(dialer: Dialer, address: str, timeout_s: float) -> bool:
    """Whether a connection stands, to whatever node of the cluster."""
    async with dialer.channel(address, ANY, _OPTIONS) as channel:
        try:
            async with asyncio.timeout(timeout_s):
                return await stands(channel)
        except TimeoutError:
            return False


async def _look_in_the_clear(address: str, timeout_s: float) -> UserError | None:
    if not names.is_loopback(address):
        return None
    try:
        leaf = await fetch_leaf(address, timeout_s)
    except (StoreUnavailable, UserError):
        return None
    node = certificates.describe(leaf).name
    return Denied(
        f"the node at {address} ({node}) is of a secured cluster, and you have no credentials for it",
        hint="log in with: spinetta login --node HOST:PORT --token-file FILE; or name them with --credentials",
        reason="unauthenticated",
    )


def _utc(time_s: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(time_s))
