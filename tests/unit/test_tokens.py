"""Join tokens: every mistake in copying one is told, and told apart."""

from __future__ import annotations

import hashlib
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spinetta import tokens
from spinetta.access import TokenRole
from spinetta.errors import UserError

HASH = hashlib.sha256(b"authority").digest()
TOKEN = tokens.create(TokenRole.VOTER, HASH, bytes(range(tokens.CHANCE_BYTES)))
TEXT = tokens.format(TOKEN)

some_tokens = st.builds(
    tokens.create,
    st.sampled_from(TokenRole),
    st.binary(min_size=32, max_size=32),
    st.binary(min_size=tokens.CHANCE_BYTES, max_size=tokens.CHANCE_BYTES),
)


def refusal(text: str) -> UserError:
    with pytest.raises(UserError) as caught:
        tokens.parse(text)
    assert caught.value.field == "token"
    assert caught.value.hint
    return caught.value


@settings(deadline=None)  # a busy machine is no failure
@given(some_tokens)
def test_a_token_survives_being_written_and_read(token: tokens.JoinToken) -> None:
    text = tokens.format(token)
    assert tokens.parse(text) == token
    assert tokens.parse(f" {text}\n") == token


@settings(deadline=None)  # a busy machine is no failure
@given(some_tokens)
def test_a_token_is_one_word_without_characters_that_look_alike(token: tokens.JoinToken) -> None:
    text = tokens.format(token)
    assert re.fullmatch(r"spinetta1_(voter|worker|client)(_[a-z2-7]+){4}", text)
    assert len(text) <= 120


@settings(deadline=None)  # a busy machine is no failure
@given(some_tokens, st.data())
def test_every_change_of_one_character_is_refused(token: tokens.JoinToken, data: st.DataObject) -> None:
    text = tokens.format(token)
    at = data.draw(st.integers(0, len(text) - 1))
    other = data.draw(st.characters().filter(lambda c: c != text[at]))
    if (at in (0, len(text) - 1)) and other.isspace():
        other = "x" if text[at] != "x" else "y"
    assert refusal(text[:at] + other + text[at + 1 :]).reason in {
        "not-a-token",
        "token-newer",
        "token-truncated",
        "token-altered",
    }


def test_every_single_lawful_character_anywhere_is_refused() -> None:
    for at, was in enumerate(TEXT):
        for other in "abcdefghijklmnopqrstuvwxyz0123456789_-ABCDEFGHIJKLMNOPQRSTUVWXYZ":
            if other != was:
                refusal(TEXT[:at] + other + TEXT[at + 1 :])


@pytest.mark.parametrize("kept", range(1, len(TEXT)))
def test_every_truncation_is_called_one(kept: int) -> None:
    error = refusal(TEXT[:kept])
    assert error.reason == "token-truncated"
    assert str(kept) in error.message


@pytest.mark.parametrize("lost", range(1, len(TEXT)))
def test_a_lost_beginning_is_refused(lost: int) -> None:
    assert refusal(TEXT[lost:]).reason in {"not-a-token", "token-truncated"}


@settings(deadline=None)  # a busy machine is no failure
@given(some_tokens, st.data())
def test_swapped_and_inserted_characters_are_refused(token: tokens.JoinToken, data: st.DataObject) -> None:
    text = tokens.format(token)
    at = data.draw(st.integers(1, len(text) - 1))
    refusal(text[:at] + data.draw(st.sampled_from("ab7_-=. \n\0é")) + text[at:])
    if text[at] != text[at - 1]:
        refusal(text[: at - 1] + text[at] + text[at - 1] + text[at + 1 :])


@settings(deadline=None)  # a busy machine is no failure
@given(st.text(max_size=300))
def test_any_text_is_refused_without_being_repeated(text: str) -> None:
    error = refusal(text)
    if len(text.strip()) > 30:
        assert text.strip() not in str(error)


@pytest.mark.parametrize("tail", ["", "_", "_voter", "_voter_abc", "_x" * 30])
@pytest.mark.parametrize("version", [2, 3, 10, 999999])
def test_a_newer_format_is_told(version: int, tail: str) -> None:
    assert refusal(f"spinetta{version}{tail}").reason == "token-newer"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "not-a-token"),
        ("  \n", "not-a-token"),
        ("SWMTKN-1-49nj1cmql0jkz5s954yi3oex3nedyz0fb0xx14ie39trti4wxv", "not-a-token"),
        (TEXT.upper(), "not-a-token"),
        ("spinetta0_voter", "not-a-token"),
        ("spinetta01_voter", "not-a-token"),
        ("spinetta1_admin_abc", "token-altered"),
        ("spinetta1_vo", "token-truncated"),
        (TEXT + "a", "token-altered"),
        (f"{TEXT} {TEXT}", "token-altered"),
        (TEXT[:40] + "\n" + TEXT[40:], "token-altered"),
        (TEXT.replace("_voter_", "_worker_"), "token-altered"),
        (TEXT.replace("_voter_", "_client_"), "token-altered"),
        ("spinetta1_" + "a" * 2000, "not-a-token"),
    ],
)
def test_mistakes_are_told_apart(text: str, reason: str) -> None:
    assert refusal(text).reason == reason


def test_a_role_cannot_be_changed_even_at_equal_length() -> None:
    worker = tokens.format(tokens.create(TokenRole.WORKER, HASH, bytes(tokens.CHANCE_BYTES)))
    assert refusal(worker.replace("_worker_", "_client_")).reason == "token-altered"


@settings(deadline=None)  # a busy machine is no failure
@given(some_tokens)
def test_no_secret_in_a_repr(token: tokens.JoinToken) -> None:
    shown = repr(token)
    assert repr(token.secret) not in shown
    assert tokens.format(token).split("_")[4] not in shown


@settings(deadline=None)  # a busy machine is no failure
@given(st.binary(max_size=32), st.binary(min_size=16, max_size=16), st.binary(min_size=16, max_size=16))
def test_a_hash_matches_its_own_salt_and_secret_only(salt: bytes, secret: bytes, other: bytes) -> None:
    kept = tokens.secret_hash(salt, secret)
    assert secret not in kept
    assert tokens.matches(secret, salt, kept)
    assert tokens.matches(other, salt, kept) == (other == secret)
    assert not tokens.matches(secret, salt + b"\1", kept)
    assert not tokens.matches(secret, salt, kept[:-1])
    assert not tokens.matches(secret, salt, b"")


@pytest.mark.parametrize(("size", "chance"), [(31, 21), (32, 20), (32, 22), (0, 0)])
def test_a_token_is_not_made_of_less(size: int, chance: int) -> None:
    with pytest.raises(ValueError, match="random"):
        tokens.create(TokenRole.VOTER, bytes(size), bytes(chance))
