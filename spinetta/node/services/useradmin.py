"""People's rights, groups and the policy, as administrators change them."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from spinetta import accesstxn, keys, names, trustcodec
from spinetta.access import GroupAcl, Limits, NodeAcl, Policy, UserAcl, UserRole, effective_clearances
from spinetta.accesstxn import Change, Seen
from spinetta.errors import AlreadyExists, CorruptRecord, NotFound, UserError
from spinetta.node.keyring import Keyring
from spinetta.node.port import NodePort
from spinetta.node.services import access
from spinetta.node.services.access import check_room, committed, read, read_under, settle
from spinetta.node.services.certify import needs_keyring
from spinetta.node.services.desk import Asked
from spinetta.node.services.nodeadmin import GROUPS_MAX, NODES_MAX, USERS_MAX, check_reason
from spinetta.trust import certificates, oidc
from spinetta.trust.certificates import CLOCK_SKEW_MAX_S
from spinetta.txn import Txn
from spinetta.v1 import trust_pb2 as pb

PROJECTS_MAX = 256  # of one user: each call looks through them
LIMIT_MAX = 1e6  # calls or tasks a second
# A node renews at two thirds: of 30 s there are 10 left, in which a voter may restart. Below, one that is slow for a
# moment is shut out of its cluster, and renewing would be all that nodes do.
LIFETIME_MIN_S, LIFETIME_MAX_S = 30.0, 365 * 86400.0
OVERLAP_MAX_S = 365 * 86400.0
ISSUERS_MAX = 8  # asked for keys by every voter
MAPPINGS_MAX = 100  # of one issuer
URL_CHARS_MAX = 500
MEMBERS_MAX = 100  # nodes that change with a group, and groups that it rests on: etcd takes 128 of each at once


class UserAdmin:
    """The calls about people, groups and the policy."""

    def __init__(self, port: NodePort, keyring: Keyring | None) -> None:
        self._port = port
        self._keyring = keyring

    # --- people ---

    async def set_user(self, request: pb.SetUserRequest, asked: Asked) -> pb.SetUserResponse:
        """Make, change, revoke or remove a user.

        Raises:
            NotFound, AlreadyExists: there is no such user; it is to be made, and is there.
            UserError: what is asked for cannot be, or would leave the cluster without an administrator.
        """
        needs_keyring(self._keyring, self._port)
        name = request.user.name
        if not name:
            raise UserError("a user needs a name", field="user.name")
        names.check_owner(name, "user.name")
        asked.subject = f"user {name}"
        key = keys.acl_user(name)
        made: UserAcl | None = None  # by an attempt whose answer may have been lost

        async def attempt() -> pb.SetUserResponse | None:
            nonlocal made
            found = await read(self._port.store, [key])
            old = found.value(UserAcl, key)
            if request.create:
                if old is not None and old == made:
                    return pb.SetUserResponse(user=trustcodec.to_pb(old))
                if old is not None:
                    raise AlreadyExists(f"there is a user {name} already", field="user.name")
                await check_room(self._port.store, keys.ACL_USER, USERS_MAX, "users", "remove some")
            elif old is None:
                raise NotFound(f"there is no user {name}", field="user.name", hint=f"spinetta user add {name}")
            new = made = self._user(request, old, asked)
            also = []
            was_admin = old is not None and old.role is UserRole.ADMIN and not old.revoked
            if was_admin and (request.remove or new.revoked or new.role is not UserRole.ADMIN):
                also.append(await self._another_admin(name))
            if request.remove:
                txn = accesstxn.remove(found.seen(key), asked.caller.guards, also=also)
            else:
                txn = accesstxn.change((found.change(key, new),), asked.caller.guards, also)
            return pb.SetUserResponse(user=trustcodec.to_pb(new)) if await self._done(txn, asked) else None

        return await settle(attempt)

    def _user(self, request: pb.SetUserRequest, old: UserAcl | None, asked: Asked) -> UserAcl:
        """The user's record as it is to be: whole, where the request does not only say to revoke or invalidate it."""
        wanted = request.user
        now_ms = self._port.wall_ms()
        if (
            old is not None
            and not wanted.role
            and (request.revoke or request.remove or request.invalidate_certificates)
        ):
            new = old
        else:
            role = _role(wanted.role, old)
            new = UserAcl(
                wanted.name,
                role,
                _projects(wanted.projects),
                access.clearances(wanted.clearances, "user.clearances"),
                wanted.revoked,
                check_reason(wanted.reason),
                created_ms=old.created_ms if old is not None else now_ms,
                created_by=old.created_by if old is not None else asked.caller.title,
                # Certificates of an earlier user of this name are not this one's.
                issued_after_ms=old.issued_after_ms if old is not None else now_ms // 1000 * 1000,
                limits=check_limits(trustcodec.from_pb(Limits, wanted.limits), "user.limits"),
            )
        if request.revoke:
            new = replace(new, revoked=True, reason=check_reason(wanted.reason))
        if request.invalidate_certificates or new.revoked:
            new = replace(new, issued_after_ms=_after_all(now_ms, new.issued_after_ms))
        return new

    async def _another_admin(self, name: str) -> Seen:
        """An administrator who stays."""
        users = await read_under(self._port.store, keys.ACL_USER, UserAcl, USERS_MAX)
        for user, seen in users.values():
            if user.name != name and user.role is UserRole.ADMIN and not user.revoked:
                return seen
        raise UserError(
            f"{name} is the last administrator",
            field="user.role",
            hint="make another one first: spinetta user add NAME --role admin",
            reason="last-admin",
        )

    # --- groups ---

    async def set_group(self, request: pb.SetGroupRequest, asked: Asked) -> pb.SetGroupResponse:
        """Say what a group's nodes may be cleared for at most, or remove the group; its nodes follow in the same
        transaction. Members of a group that is removed leave it.

        Raises:
            NotFound: it is to be removed, and is not there.
            UserError: a label is none, there are too many groups, or the group is too large.
        """
        needs_keyring(self._keyring, self._port)
        name = names.check_tag(request.group.name, "group.name")
        asked.subject = f"group {name}"
        new = GroupAcl(name, access.clearances(request.group.clearances, "group.clearances"))
        key = keys.acl_group(name)

        async def attempt() -> pb.SetGroupResponse | None:
            found = await read(self._port.store, [key])
            old = found.value(GroupAcl, key)
            if old is None and request.remove:
                raise NotFound(f"there is no group {name}", field="group.name")
            if old is None:
                await check_room(self._port.store, keys.ACL_GROUP, GROUPS_MAX, "groups", "remove some")
            members, seen = await self._members(None if request.remove else new, name)
            if request.remove:
                txn = accesstxn.remove(found.seen(key), asked.caller.guards, members, seen)
            else:
                txn = accesstxn.change((found.change(key, new), *members), asked.caller.guards, seen)
            return pb.SetGroupResponse(nodes_changed=len(members)) if await self._done(txn, asked) else None

        return await settle(attempt)

    async def _members(self, new: GroupAcl | None, name: str) -> tuple[list[Change], list[Seen]]:
        """The members' records, where they change with the group, and what that rests on: their other groups. A node
        that joins the group meanwhile, or is granted something, writes the group again, see `access.Groups`."""
        nodes = await read_under(self._port.store, keys.ACL_NODE, NodeAcl, NODES_MAX)
        groups = await read_under(self._port.store, keys.ACL_GROUP, GroupAcl, GROUPS_MAX)
        there = {g.name: g for g, _ in groups.values()}
        if new is not None:
            there[name] = new
        changes, used = [], set()
        for acl, seen in nodes.values():
            if name not in acl.groups:
                continue
            member_of = acl.groups if new is not None else tuple(g for g in acl.groups if g != name)
            effective = effective_clearances(acl.clearances, tuple(there.get(g, GroupAcl(g)) for g in member_of))
            changed = replace(acl, groups=member_of, effective=effective)
            if changed != acl:
                changes.append(Change(seen, trustcodec.encode(changed)))
            used |= set(member_of)  # also of those that stay as they are: another group may just be changing
        rests_on = [seen for g, seen in groups.values() if g.name in used and g.name != name]
        if len(changes) + len(rests_on) > MEMBERS_MAX:
            raise UserError(
                f"{len(changes)} nodes would change with the group, and at most {MEMBERS_MAX} can at once",
                field="group",
                hint="use smaller groups; or take nodes out of it first",
                reason="too-many",
            )
        return changes, rests_on

    # --- policy ---

    async def get_policy(self) -> pb.GetPolicyResponse:
        """The policy; the default one when none was ever set.

        Raises:
            CorruptRecord: it cannot be read.
        """
        needs_keyring(self._keyring, self._port)
        found = await read(self._port.store, [keys.POLICY])
        try:
            policy = found.value(Policy, keys.POLICY) or Policy()
        except CorruptRecord as e:
            hint = f"on a voter: spinetta etcdctl del {keys.POLICY}; then set what was not the default anew"
            raise CorruptRecord(e.message, hint=hint) from e
        return pb.GetPolicyResponse(policy=trustcodec.to_pb(policy))

    async def set_policy(self, request: pb.SetPolicyRequest, asked: Asked) -> pb.SetPolicyResponse:
        """A whole new policy.

        Raises:
            UserError: a value is out of range.
        """
        needs_keyring(self._keyring, self._port)
        try:
            policy = check_policy(trustcodec.from_pb(Policy, request.policy))
        except ValueError as e:
            raise UserError("the policy names a role that there is not", field="policy.issuers") from e

        async def attempt() -> pb.SetPolicyResponse | None:
            found = await read(self._port.store, [keys.POLICY])
            txn = accesstxn.change((found.change(keys.POLICY, policy),), asked.caller.guards)
            return pb.SetPolicyResponse() if await self._done(txn, asked) else None

        return await settle(attempt)

    async def _done(self, txn: Txn, asked: Asked) -> bool:
        if await committed(self._port.store, txn, asked):
            return True
        await asked.again()
        return False


def check_policy(policy: Policy) -> Policy:
    """The policy, if a cluster can live with it.

    Raises:
        UserError: it cannot.
    """
    for name in ("node_certificate_s", "user_certificate_s"):
        _check_lifetime(getattr(policy, name), f"policy.{name}")
    _check_range(policy.overlap_s, 0.0, OVERLAP_MAX_S, "policy.overlap_s")
    check_limits(policy.limits, "policy.limits")
    if len(policy.issuers) > ISSUERS_MAX:
        raise UserError(f"at most {ISSUERS_MAX} issuers", field="policy.issuers", reason="too-many")
    seen: set[str] = set()
    for i, issuer in enumerate(policy.issuers):
        where = f"policy.issuers[{i}]"
        names.check_printable(issuer.url, "the address", f"{where}.url")
        _check_issuer_url(issuer.url, f"{where}.url")
        if not issuer.audience:
            raise UserError("without an audience, tokens meant for others would be taken", field=f"{where}.audience")
        if not issuer.prefix:
            raise UserError(
                "without a prefix an issuer could name the cluster's own users, its administrators too",
                field=f"{where}.prefix",
                hint="e.g. uni-; its user ann is then uni-ann here",
            )
        names.check_owner(issuer.prefix, f"{where}.prefix")
        if issuer.url in seen:
            raise UserError("two issuers have the same address", field=where)
        seen.add(issuer.url)
        others = (other.prefix for other in policy.issuers[:i])
        if any(p.startswith(issuer.prefix) or issuer.prefix.startswith(p) for p in others):
            raise UserError(
                "an issuer's prefix begins with that of another, which could then name its users",
                field=f"{where}.prefix",
                hint="let prefixes end with a sign that does not occur in them, e.g. uni-",
            )
        if len(issuer.groups) > MAPPINGS_MAX:
            raise UserError(f"at most {MAPPINGS_MAX} groups", field=f"{where}.groups", reason="too-many")
        for mapping in issuer.groups:
            _projects(mapping.projects)
            access.clearances(mapping.clearances, f"{where}.groups")
        if issuer.ca_pem:
            certificates.load_certificate(issuer.ca_pem)
    return policy


def _check_issuer_url(url: str, where: str) -> None:
    try:
        if len(url) > URL_CHARS_MAX:
            raise ValueError("too long")
        oidc.check_url(url)
    except ValueError as e:
        raise UserError("an issuer's address begins with https://", field=where) from e


def check_limits(limits: Limits, where: str) -> Limits:
    """The limits, if they are some.

    Raises:
        UserError: negative, or no numbers.
    """
    _check_range(limits.calls_per_s, 0.0, LIMIT_MAX, f"{where}.calls_per_s")
    _check_range(limits.tasks_per_s, 0.0, LIMIT_MAX, f"{where}.tasks_per_s")
    return limits


def _check_lifetime(value_s: float, where: str) -> None:
    if math.isfinite(value_s) and 0 <= value_s < LIFETIME_MIN_S:
        raise UserError(
            f"{value_s:g} s is too short a life for certificates: at least {LIFETIME_MIN_S:g} s",
            field=where,
            hint="they are renewed at two thirds; who is slower than that is shut out. Days or weeks are usual",
            reason="too-short",
        )
    _check_range(value_s, LIFETIME_MIN_S, LIFETIME_MAX_S, where)


def _check_range(value: float, least: float, most: float, where: str) -> None:
    if not (math.isfinite(value) and least <= value <= most):
        raise UserError(f"{value:g} is out of range", field=where, hint=f"{least:g} to {most:g}")


def _projects(projects: Any) -> tuple[str, ...]:
    found = sorted({p for p in projects if p})
    for project in found:
        names.check_owner(project, "user.projects")
    if len(found) > PROJECTS_MAX:
        raise UserError(f"at most {PROJECTS_MAX} projects", field="user.projects", reason="too-many")
    return tuple(found)


def _after_all(now_ms: int, before_ms: int) -> int:
    """What makes all certificates void that any voter may have issued until now: its clock may be ahead, and none is
    issued before the time set last. A second more: certificates tell whole seconds only, and this very one is meant
    too."""
    return max((now_ms // 1000 + 1 + int(CLOCK_SKEW_MAX_S)) * 1000, before_ms + 1000)


def _role(number: int, old: UserAcl | None) -> UserRole:
    if not number and old is not None:
        return old.role
    try:
        return UserRole(number) if number else UserRole.USER
    except ValueError:
        raise UserError("there is no such role", field="user.role", hint="viewer, user, operator, admin") from None
