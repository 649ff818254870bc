"""Join tokens as text: ``spinetta1_voter_HASH_ID_SECRET_CHECK``.

`HASH` is the SHA-256 of the public key of the cluster's authority, by which the joining side knows that it talks to
the right cluster before it shows the secret; `ID` names the token's record; `CHECK` tells a typing mistake, or a part
that was not copied, from a token that the cluster does not know. All parts are base32 in lower case, joined by ``_``:
one word for shells, terminals (a double click takes all of it) and addresses, with no two characters that look alike.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
from dataclasses import dataclass, field

from spinetta.access import TokenRole
from spinetta.errors import UserError

VERSION = 1
HASH_BYTES = 32
ID_BYTES = 5  # 2^40 ids: two tokens of one cluster will not share one, and creating a token finds out
SECRET_BYTES = 16
CHECK_BYTES = 5
CHANCE_BYTES = ID_BYTES + SECRET_BYTES
TEXT_CHARS_MAX = 1024  # ours have 114 at most; later versions may need more

_HEAD = f"spinetta{VERSION}"
_ROLES = {role.name.lower(): role for role in TokenRole}
_LENGTHS = (52, 8, 26, 8)  # characters of hash, id, secret and check
_ANY_HEAD = re.compile(r"spinetta([1-9][0-9]{0,5})(?:_|$)", re.ASCII)
_COPY = "copy the whole of it, or make a new one with: spinetta token create"


@dataclass(frozen=True, slots=True)
class JoinToken:
    """What a token says.

    Attributes:
        authority_hash: SHA-256 of the SubjectPublicKeyInfo of the cluster's authority.
        id: of its record.
        secret: 16 bytes; whoever has it may join.
    """

    role: TokenRole
    authority_hash: bytes
    id: str
    secret: bytes = field(repr=False)


def create(role: TokenRole, authority_hash: bytes, chance: bytes) -> JoinToken:
    """A new token from `CHANCE_BYTES` random bytes.

    Raises:
        ValueError: hash or chance have another length.
    """
    if len(authority_hash) != HASH_BYTES or len(chance) != CHANCE_BYTES:
        raise ValueError(f"a token is made of a hash of {HASH_BYTES} bytes and {CHANCE_BYTES} random ones")
    return JoinToken(role, authority_hash, _encoded(chance[:ID_BYTES]), chance[ID_BYTES:])


def format(token: JoinToken) -> str:  # noqa: A001 - read as `tokens.format`
    """Its text, which is a secret."""
    parts = (_HEAD, token.role.name.lower(), _encoded(token.authority_hash), token.id, _encoded(token.secret))
    body = "_".join(parts)
    return f"{body}_{_check(body)}"


def parse(text: str) -> JoinToken:
    """What a token's text says. White space around it does not count.

    Raises:
        UserError: it is none, with the reason ``not-a-token``, ``token-newer``, ``token-truncated`` or
            ``token-altered``. The message does not repeat it.
    """
    text = text.strip()
    if not text:
        raise _bad("the join token is empty", "not-a-token", _COPY)
    if text.split() != [text]:
        raise _bad("the join token has white space in it", "token-altered", "write it without, on one line")
    head = _ANY_HEAD.match(text)
    if head is None or len(text) > TEXT_CHARS_MAX:
        if f"{_HEAD}_".startswith(text):
            raise _bad(f"the join token has been cut short: it has {len(text)} characters", "token-truncated", _COPY)
        raise _bad(f"this is not a join token: those begin with {_HEAD}_", "not-a-token", _COPY)
    if int(head[1]) != VERSION:
        raise _bad(
            f"this join token is of format {head[1]}, and this program reads format {VERSION}",
            "token-newer",
            "use the version of spinetta that the cluster has; or a character was changed",
        )
    return _parse_body(text)


def secret_hash(salt: bytes, secret: bytes) -> bytes:
    """What the cluster keeps of a secret. One round is enough: 128 random bits cannot be guessed."""
    return hmac.digest(salt, b"spinetta join token\0" + secret, "sha256")


def matches(secret: bytes, salt: bytes, expected_hash: bytes) -> bool:
    """Whether this is the secret that was hashed, in a time that does not tell how much of it is right."""
    return hmac.compare_digest(secret_hash(salt, secret), expected_hash)


def _parse_body(text: str) -> JoinToken:
    word, _, rest = text[len(_HEAD) + 1 :].partition("_")
    role = _ROLES.get(word)
    if role is None:
        if not rest and any(name.startswith(word) for name in _ROLES):
            raise _cut_short(text, 0)
        raise _altered("it is for no role that there is")
    wanted = len(_HEAD) + 1 + len(word) + sum(_LENGTHS) + len(_LENGTHS)
    if len(text) < wanted:
        raise _cut_short(text, wanted)
    if len(text) > wanted:
        raise _altered(f"it has {len(text)} characters instead of {wanted}")
    body, _, check = text.rpartition("_")
    parts = text.split("_")[2:]
    if tuple(map(len, parts)) != _LENGTHS or not hmac.compare_digest(_check(body).encode(), check.encode()):
        raise _altered("its check does not agree with the rest")
    found_hash, identifier, secret = (_decoded(p) for p in parts[:3])
    if found_hash is None or identifier is None or secret is None:
        raise _altered("it has characters that no token has")
    return JoinToken(role, found_hash, parts[1], secret)


def _check(body: str) -> str:
    return _encoded(hashlib.sha256(f"spinetta join token\0{body}".encode()).digest()[:CHECK_BYTES])


def _encoded(data: bytes) -> str:
    return base64.b32encode(data).decode().rstrip("=").lower()


def _decoded(text: str) -> bytes | None:
    """The bytes; None unless this is the very text that encodes them."""
    try:
        data = base64.b32decode(text.upper() + "=" * (-len(text) % 8))
    except ValueError:
        return None
    return data if _encoded(data) == text else None


def _cut_short(text: str, wanted: int) -> UserError:
    of = f" of {wanted}" if wanted else ""
    return _bad(f"the join token has been cut short: it has {len(text)}{of} characters", "token-truncated", _COPY)


def _altered(why: str) -> UserError:
    return _bad(f"the join token has been altered: {why}", "token-altered", _COPY)


def _bad(message: str, reason: str, hint: str) -> UserError:
    return UserError(message, field="token", hint=hint, reason=reason)
