from __future__ import annotations

from dataclasses import replace

import pytest

from spinetta import tokens
from spinetta.access import Authorities, AuthorityEntry, AuthorityState, NodeAcl, NodeRole, TokenRecord, TokenRole
from spinetta.errors import Busy, Denied, UserError
from spinetta.node.services import tokendesk
from spinetta.node.services.renew import with_key
from spinetta.node.services.tokendesk import TokenDesk, check_clocks, check_usable
from spinetta.trust import certificates

CA = certificates.create_authority("cluster", "0123456789abcdef", now_s=1e9)
AUTHORITIES = Authorities("cluster", 1, (AuthorityEntry(CA.certificate_pem, AuthorityState.ACTIVE),))
TOKEN = tokens.create(TokenRole.WORKER, certificates.authority_hash(CA.certificate_pem), bytes(range(21)))
RECORD = TokenRecord(
    TOKEN.id, TokenRole.WORKER, b"s" * 16, tokens.secret_hash(b"s" * 16, TOKEN.secret), expires_ms=1000, uses_left=1
)
NODES = (TokenRole.VOTER, TokenRole.WORKER)


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def guess(desk: TokenDesk, peer: str) -> None:
    with pytest.raises(Denied):
        desk.verify(replace(TOKEN, secret=bytes(16)), RECORD, AUTHORITIES, peer)


def guesses_until_busy(desk: TokenDesk, peers: list[str]) -> int:
    for i, peer in enumerate(peers):
        try:
            desk.admit(peer)
        except Busy:
            return i
        guess(desk, peer)
    return len(peers)


def test_a_right_secret() -> None:
    assert TokenDesk(Clock()).verify(TOKEN, RECORD, AUTHORITIES, "p") is RECORD


def test_guessing_is_slowed_for_one_and_for_all() -> None:
    clock = Clock()
    desk = TokenDesk(clock)
    assert guesses_until_busy(desk, ["evil"] * 100) == int(tokendesk.GUESSES_PER_PEER_PER_S * 10)
    desk.admit("good")
    clock.now_s = 10.0
    desk.admit("evil")
    assert guesses_until_busy(desk, [f"bot{i}" for i in range(1000)]) < 1000
    with pytest.raises(Busy):
        desk.admit("good")


def test_memory_of_guessers_is_bounded() -> None:
    desk = TokenDesk(Clock())
    for i in range(tokendesk.PEERS_MAX + 50):
        guess(desk, f"p{i}")
    assert len(desk._peers) == tokendesk.PEERS_MAX


@pytest.mark.parametrize(
    ("record", "roles", "now_ms", "reason"),
    [
        (RECORD, (TokenRole.CLIENT,), 0, "token-role"),
        (replace(RECORD, role=TokenRole.CLIENT), NODES, 0, "token-role"),
        (replace(RECORD, revoked=True), NODES, 0, "token-revoked"),
        (replace(RECORD, uses_left=0), NODES, 0, "token-spent"),
        (RECORD, NODES, 1000, "token-expired"),
    ],
)
def test_what_may_not_be_redeemed(record: TokenRecord, roles: tuple[TokenRole, ...], now_ms: int, reason: str) -> None:
    with pytest.raises(Denied) as caught:
        check_usable(record, roles, now_ms)
    assert caught.value.reason == reason
    assert caught.value.hint


def test_what_may() -> None:
    check_usable(RECORD, NODES, 999)


def test_clocks() -> None:
    check_clocks(30_000, 0, "n1")
    for theirs_ms in (30_001, -30_001, 2**62, -(2**62)):
        with pytest.raises(UserError) as caught:
            check_clocks(theirs_ms, 0, "n1")
        assert caught.value.reason == "clock-skew"


def test_a_new_key_takes_over_once_it_is_shown() -> None:
    acl = NodeAcl("n1", NodeRole.WORKER, key_hash=b"1")
    assert with_key(acl, shown=b"1", wanted=b"1") == acl
    asked = with_key(acl, shown=b"1", wanted=b"2")
    assert (asked.key_hash, asked.next_key_hash) == (b"1", b"2")
    assert with_key(asked, shown=b"1", wanted=b"1") == asked  # the answer was lost: the old one goes on
    shown = with_key(asked, shown=b"2", wanted=b"2")
    assert (shown.key_hash, shown.next_key_hash) == (b"2", b"")
    again = with_key(asked, shown=b"2", wanted=b"3")
    assert (again.key_hash, again.next_key_hash) == (b"2", b"3")
    with pytest.raises(Denied):
        with_key(acl, shown=b"9", wanted=b"2")
