"""Join tokens: made, listed and revoked by administrators."""

from __future__ import annotations

import math
import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from spinetta import accesstxn, keys, names, tokens, trustcodec
from spinetta.access import TokenRecord, TokenRole, UserAcl
from spinetta.accesstxn import Change, Seen
from spinetta.errors import NotFound, UserError
from spinetta.model import Revision
from spinetta.node.keyring import Keyring
from spinetta.node.port import NodePort
from spinetta.node.services import access
from spinetta.node.services.access import committed, read, settle
from spinetta.node.services.certify import needs_keyring
from spinetta.node.services.desk import Asked
from spinetta.trust import certificates
from spinetta.v1 import trust_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Sequence

TTL_S = 3600.0  # long enough to walk to another machine
TTL_MIN_S, TTL_MAX_S = 1.0, 30 * 86400.0  # a token lies about in shells and files: it should not be good for ever
USES_MAX = 10_000  # nodes joined by one script
TOKENS_MAX = 1000  # records; those that ended go when room is needed
SWEEP_MAX = 50  # removed by one call: a transaction stays small
KEPT_S = 86400.0  # after its end, so that whoever shows it is told that it has expired
SALT_BYTES = 16


class Tokens:
    """The calls about tokens."""

    def __init__(self, port: NodePort, keyring: Keyring | None) -> None:
        self._port = port
        self._keyring = keyring

    async def create(self, request: pb.CreateTokenRequest, asked: Asked) -> pb.CreateTokenResponse:
        """A new token; its text is told this once.

        Raises:
            UserError: something asked for cannot be, or there are too many.
        """
        keyring = needs_keyring(self._keyring, self._port)
        role = _role(request)
        now_ms = self._port.wall_ms()
        ttl_s = request.ttl_s or TTL_S
        if not (math.isfinite(ttl_s) and TTL_MIN_S <= ttl_s <= TTL_MAX_S):
            raise UserError(f"a token lives {TTL_MIN_S:g} s to 30 days", field="ttl_s")
        if request.uses > USES_MAX:
            raise UserError(f"a token has at most {USES_MAX} uses", field="uses")
        granted = access.clearances(request.clearances, "clearances")
        groups = access.groups(request.groups, "groups")

        async def attempt() -> pb.CreateTokenResponse | None:
            known = await keyring.read()
            made = tokens.create(
                role,
                certificates.authority_hash(known.cluster.active.certificate_pem),
                os.urandom(tokens.CHANCE_BYTES),
            )
            salt = os.urandom(SALT_BYTES)
            record = TokenRecord(
                made.id,
                role,
                salt,
                tokens.secret_hash(salt, made.secret),
                now_ms + int(ttl_s * 1000),
                request.uses or 1,
                granted,
                groups,
                request.user,
                request.approval,
                created_ms=now_ms,
                created_by=asked.caller.title,
            )
            seen = await self._seen(role, request.user, groups)
            change = Change(Seen(keys.token(made.id), Revision(0)), trustcodec.encode(record))
            await self._make_room(now_ms, asked)
            if not await committed(self._port.store, accesstxn.change((change,), asked.caller.guards, seen), asked):
                await asked.again()
                return None
            asked.subject = f"token {made.id}"
            return pb.CreateTokenResponse(
                token=tokens.format(made), record=shown(record), addresses=self._port.voter_addresses()
            )

        return await settle(attempt)

    async def _seen(self, role: TokenRole, user: str, groups: Sequence[str]) -> list[Seen]:
        """What must be there: the user, the groups."""
        if role is TokenRole.CLIENT:
            found = await read(self._port.store, [keys.acl_user(user)])
            acl = found.value(UserAcl, keys.acl_user(user))
            if acl is None or acl.revoked:
                raise NotFound(f"there is no user {user}", field="user", hint=f"spinetta user add {user}")
            return []  # a change of the user's rights does not matter; they are looked at again at the login
        there = await access.read_groups(self._port.store, groups)
        if there.missing:
            raise NotFound(f"there is no group {there.missing[0]}", field="groups", hint="spinetta group set NAME")
        return [change.seen for change in there.touched]

    async def _make_room(self, now_ms: int, asked: Asked) -> None:
        """Remove tokens that have ended, when there are many."""
        store = self._port.store
        page = await store.list(keys.TOKEN, keys_only=True, limit=TOKENS_MAX)
        if len(page.entries) < TOKENS_MAX:
            return
        everything = await access.read_under(store, keys.TOKEN, TokenRecord, TOKENS_MAX + SWEEP_MAX)
        ended = [s for t, s in everything.values() if t.expires_ms + KEPT_S * 1000 < now_ms][:SWEEP_MAX]
        ended = ended or [s for t, s in everything.values() if t.expires_ms < now_ms or not t.uses_left][:SWEEP_MAX]
        if not ended:
            raise UserError(
                f"there are {TOKENS_MAX} tokens that still count", hint="revoke some, or wait", reason="too-many"
            )
        for seen in ended:
            await store.commit(accesstxn.remove(seen, asked.caller.guards))

    async def everything(self) -> pb.ListTokensResponse:
        """All tokens, without what their secrets could be checked by; and the keys of those that cannot be read."""
        found, bad = await access.read_apart(self._port.store, keys.TOKEN, TokenRecord, TOKENS_MAX + SWEEP_MAX)
        return pb.ListTokensResponse(tokens=[shown(t) for t in found], unreadable=bad)

    async def revoke(self, request: pb.RevokeTokenRequest, asked: Asked) -> pb.RevokeTokenResponse:
        """A token counts no more. May be repeated.

        Raises:
            NotFound: there is none of this id.
        """
        names.check_tag(request.id, "id")
        key = keys.token(request.id)
        asked.subject = f"token {request.id}"

        async def attempt() -> pb.RevokeTokenResponse | None:
            found = await read(self._port.store, [key])
            record = found.value(TokenRecord, key)
            if record is None:
                raise NotFound(f"there is no token {request.id}", field="id", hint="see: spinetta token list")
            if record.revoked:
                return pb.RevokeTokenResponse()
            change = found.change(key, replace(record, revoked=True))
            if await committed(self._port.store, accesstxn.change((change,), asked.caller.guards), asked):
                return pb.RevokeTokenResponse()
            await asked.again()
            return None

        return await settle(attempt)


def shown(record: TokenRecord) -> Any:
    """A token's record for people."""
    message = trustcodec.to_pb(record)
    message.ClearField("salt")
    message.ClearField("secret_hash")
    message.ClearField("last_key_hash")
    return message


def _role(request: pb.CreateTokenRequest) -> TokenRole:
    try:
        role = TokenRole(request.role)
    except ValueError:
        raise UserError("a token is for a role", field="role", hint="voter, worker or client") from None
    if role is TokenRole.CLIENT:
        if not request.user:
            raise UserError("a client's token is for a user", field="user", hint="name one: --user NAME")
        names.check_owner(request.user, "user")
        if request.clearances or request.groups or request.approval:
            raise UserError(
                "clearances, groups and approval are for nodes",
                field="role",
                hint="a user's clearances: spinetta user set",
            )
    elif request.user:
        raise UserError("only a client's token is for a user", field="user", hint="--role client")
    return role
