"""Where join tokens are looked at: is it one of ours, and does it still count?"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Collection

from spinetta import tokens, units
from spinetta.access import Authorities, TokenRecord, TokenRole
from spinetta.errors import Busy, Denied, UserError
from spinetta.node.services.throttle import Bucket
from spinetta.tokens import JoinToken
from spinetta.trust import certificates
from spinetta.trust.certificates import CLOCK_SKEW_MAX_S

# A secret of 128 bits is not guessed; the limits keep those who try from filling logs and asking the store for ever.
GUESSES_PER_PEER_PER_S = 0.5  # sustained, and BURST_S seconds' worth at once; a person mistypes less often
GUESSES_PER_S = 20.0  # of all peers together
PEERS_MAX = 4096  # remembered, 200 B each; the longest silent one is forgotten

_NEW_TOKEN = "ask an administrator for another: spinetta token create"  # noqa: S105 - no secret
_NO_SALT = bytes(16)
_NO_HASH = bytes(32)
_USES = {TokenRole.VOTER: "a node", TokenRole.WORKER: "a node", TokenRole.CLIENT: "a person"}


class TokenDesk:
    """Checks tokens, and refuses those who try many."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._peers: OrderedDict[str, Bucket] = OrderedDict()
        self._all = Bucket(GUESSES_PER_S, clock())

    def admit(self, peer: str) -> None:
        """To be called before anything is looked up for a peer.

        Raises:
            Busy: it has shown many bad tokens lately.
        """
        now_s = self._clock()
        waits_s = [self._all.take(0.0, GUESSES_PER_S, now_s)]
        bucket = self._peers.get(peer)
        if bucket is not None:
            waits_s.append(bucket.take(0.0, GUESSES_PER_PEER_PER_S, now_s))
        if any(waits_s):
            raise Busy("too many wrong join tokens have been shown to this node", retry_after_s=max(waits_s))

    def verify(self, token: JoinToken, record: TokenRecord | None, authorities: Authorities, peer: str) -> TokenRecord:
        """The record of a token whose secret is right; it may not count any more.

        Raises:
            UserError: it is another cluster's, or is not known here: one answer for an unknown id and a wrong secret.
        """
        hashes = {certificates.authority_hash(e.certificate_pem) for e in authorities.entries}
        if token.authority_hash not in hashes:
            raise Denied(
                "the join token is for another cluster, or from before this one's authority was changed",
                field="token",
                hint=_NEW_TOKEN,
                reason="token-foreign",
            )
        # The same work whether there is a record or not.
        salt, expected = (record.salt, record.secret_hash) if record is not None else (_NO_SALT, _NO_HASH)
        if not tokens.matches(token.secret, salt, expected) or record is None or record.role is not token.role:
            self._guessed(peer)
            raise Denied(
                "this cluster does not know the join token", field="token", hint=_NEW_TOKEN, reason="token-unknown"
            )
        return record

    def _guessed(self, peer: str) -> None:
        now_s = self._clock()
        bucket = self._peers.pop(peer, None) or Bucket(GUESSES_PER_PEER_PER_S, now_s)
        bucket.charge(1.0)
        self._all.charge(1.0)
        self._peers[peer] = bucket
        while len(self._peers) > PEERS_MAX:
            self._peers.popitem(last=False)


def check_usable(record: TokenRecord, roles: Collection[TokenRole], now_ms: int) -> None:
    """See that a token may be redeemed now, for one of these roles.

    Raises:
        Denied: it may not, and why.
    """
    if record.role not in roles:
        wanted = "spinetta login" if record.role is TokenRole.CLIENT else "spinetta node join"
        raise Denied(
            f"the join token is for {_USES[record.role]} (role {record.role.name.lower()})",
            field="token",
            hint=f"use it with: {wanted} --token",
            reason="token-role",
        )
    if record.revoked:
        raise Denied("the join token has been revoked", field="token", hint=_NEW_TOKEN, reason="token-revoked")
    if not record.uses_left:
        raise Denied("the join token has been used up", field="token", hint=_NEW_TOKEN, reason="token-spent")
    if record.expires_ms <= now_ms:
        ago = units.format_duration((now_ms - record.expires_ms) / 1000)
        raise Denied(
            f"the join token expired {ago} ago, at {_utc(record.expires_ms)}",
            field="token",
            hint=_NEW_TOKEN,
            reason="token-expired",
        )


def check_clocks(theirs_ms: int, ours_ms: int, node: str) -> None:
    """Refuse a newcomer whose clock is far from ours.

    Raises:
        UserError: with both times.
    """
    apart_s = abs(theirs_ms - ours_ms) / 1000
    if apart_s > CLOCK_SKEW_MAX_S:
        raise UserError(
            f"the clocks are {units.format_duration(apart_s)} apart: on this machine it is {_utc(theirs_ms)}, "
            f"on node {node} {_utc(ours_ms)}",
            field="wall_ms",
            hint=f"set both by NTP; at most {CLOCK_SKEW_MAX_S:g} s are allowed",
            reason="clock-skew",
        )


def _utc(time_ms: int) -> str:
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(time_ms / 1000))
    except (ValueError, OverflowError, OSError):  # of a year that no calendar has
        return f"{time_ms} ms"
