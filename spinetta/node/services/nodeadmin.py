"""Nodes' rights, as administrators change them: who has access, joining decided, clearances, revocation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from spinetta import accesstxn, keys, names, trustcodec
from spinetta.access import (
    GroupAcl,
    JoinRequest,
    NodeAcl,
    NodeRole,
    UserAcl,
    effective_clearances,
    fingerprint,
)
from spinetta.accesstxn import Change, Seen
from spinetta.errors import NotFound, UserError
from spinetta.model import NodeId, Revision
from spinetta.node import keyring as keyrings
from spinetta.node.keyring import Keyring, Known
from spinetta.node.port import NodePort
from spinetta.node.services import access
from spinetta.node.services.access import committed, read, read_under, settle
from spinetta.node.services.certify import needs_keyring
from spinetta.node.services.desk import Asked
from spinetta.node.services.enroll import REQUESTS_MAX
from spinetta.rotation import begin, under_way, without_node
from spinetta.txn import Txn
from spinetta.v1 import record_pb2 as records
from spinetta.v1 import trust_pb2 as pb

NODES_MAX = 20_000  # listed at once: 300 bytes each; a cluster has thousands
USERS_MAX = 10_000  # the same
GROUPS_MAX = 500  # of nodes: each change of one looks at all its members
REASON_CHARS_MAX = 500


class NodeAdmin:
    """The calls about nodes' rights."""

    def __init__(self, port: NodePort, keyring: Keyring | None) -> None:
        self._port = port
        self._keyring = keyring

    async def everybody(self) -> pb.ListAccessResponse:
        """Everybody: nodes, those that wait, users, groups; and the keys of records that cannot be read."""
        needs_keyring(self._keyring, self._port)
        store = self._port.store
        nodes, bad_nodes = await access.read_apart(store, keys.ACL_NODE, NodeAcl, NODES_MAX)
        requests, bad_requests = await access.read_apart(store, keys.REQUEST, JoinRequest, REQUESTS_MAX)
        users, bad_users = await access.read_apart(store, keys.ACL_USER, UserAcl, USERS_MAX)
        groups, bad_groups = await access.read_apart(store, keys.ACL_GROUP, GroupAcl, GROUPS_MAX)
        return pb.ListAccessResponse(
            nodes=[trustcodec.to_pb(v) for v in nodes],
            requests=[trustcodec.to_pb(replace(v, csr=b"", etcd_csr=b"")) for v in requests],
            users=[trustcodec.to_pb(v) for v in users],
            groups=[trustcodec.to_pb(v) for v in groups],
            unreadable=[*bad_nodes, *bad_requests, *bad_users, *bad_groups],
        )

    # --- joining ---

    async def decide(self, request: pb.DecideJoinRequest, asked: Asked) -> pb.DecideJoinResponse:
        """Let a node in that waits, or reject it; one that was rejected can still be let in. May be repeated.

        Raises:
            NotFound: no node of that name waits.
            UserError: it does not say which key was looked at, or (reason ``changed``) another one waits.
        """
        keyring = needs_keyring(self._keyring, self._port)
        name = NodeId(names.check_node_name(request.name, "name"))
        asked.subject = f"node {name}"
        if request.approve and not request.key_hash:
            raise UserError(
                f"to approve node {name} takes the hash of its key, as it was looked at",
                field="key_hash",
                hint="spinetta node requests shows it; an older spinetta does not send it: use the cluster's version",
            )
        instead = access.clearances(request.clearances, "clearances") if request.set_clearances else None

        async def attempt() -> pb.DecideJoinResponse | None:
            request_key, acl_key = keys.request(name), keys.acl_node(name)
            found = await read(self._port.store, [request_key, acl_key, *keyrings.KEYS])
            waiting, acl = found.value(JoinRequest, request_key), found.value(NodeAcl, acl_key)
            if waiting is None and acl is not None and not acl.revoked and request.approve:
                if request.key_hash not in (acl.key_hash, acl.next_key_hash):
                    raise _changed(name, "is in", acl.key_hash)
                return pb.DecideJoinResponse()
            if waiting is None:
                raise NotFound(f"no node {name} waits to be approved", field="name", hint="spinetta node requests")
            # The transaction is guarded by the revision of the very record that is looked at here.
            if request.key_hash and request.key_hash != waiting.key_hash:
                raise _changed(name, "waits", waiting.key_hash)
            if not request.approve:
                if waiting.rejected:
                    return pb.DecideJoinResponse()
                change = found.change(request_key, replace(waiting, rejected=True))
                txn = accesstxn.change((change,), asked.caller.guards)
            else:
                granted = waiting.clearances if instead is None else instead
                groups = await access.read_groups(self._port.store, waiting.groups)
                new = NodeAcl(
                    name,
                    waiting.role,
                    granted,
                    waiting.groups,
                    effective_clearances(granted, groups.records),
                    waiting.key_hash,
                    waiting.sealing_key,
                    created_ms=self._port.wall_ms(),
                    created_by=asked.caller.title,
                )
                known, more = keyrings.known_of(found.entries), list(groups.touched)
                if waiting.role is NodeRole.VOTER:
                    more += keyring.shared_with(known, name, waiting.sealing_key)
                change = found.change(acl_key, new)
                txn = accesstxn.approve(found.seen(request_key), change, more, groups.absent, asked.caller.guards)
            return pb.DecideJoinResponse() if await self._done(txn, asked) else None

        return await settle(attempt)

    # --- nodes that are in ---

    async def set(self, request: pb.SetNodeRequest, asked: Asked) -> pb.SetNodeResponse:
        """Change a node's clearances and groups, revoke it, or forget it once it is revoked. May be repeated.

        Raises:
            NotFound: there is no such node, or group.
            UserError: what is asked for cannot be, or would leave the cluster without a voter.
        """
        keyring = needs_keyring(self._keyring, self._port)
        name = NodeId(names.check_node_name(request.name, "name"))
        asked.subject = f"node {name}"
        reason = check_reason(request.reason)
        acl_key = keys.acl_node(name)

        async def attempt() -> pb.SetNodeResponse | None:
            found = await read(self._port.store, [acl_key, keys.request(name), *keyrings.KEYS])
            acl = found.value(NodeAcl, acl_key)
            if acl is None:
                raise NotFound(f"there is no node {name}", field="name", hint="see: spinetta node access")
            if request.remove:
                return await self._remove(acl, found.seen(acl_key), asked)
            if acl.revoked:
                if request.revoke:
                    return answer_of(acl)
                raise UserError(
                    f"node {name} has been revoked",
                    field="name",
                    hint=f"spinetta node forget {name} frees the name; then it may join anew",
                    reason="revoked",
                )
            if request.revoke:
                new = replace(acl, revoked=True, reason=reason)
                another, wraps = None, []
                if acl.role is NodeRole.VOTER:
                    stay = await self._other_voters(acl)
                    another = min(stay, key=lambda s: (s[0].name == self._port.name, s[0].name))[1]
                    nodes = [(n.name, n.sealing_key) for n, _ in stay]
                    wraps = self._shut_out(keyring, keyrings.known_of(found.entries), name, nodes)
                txn = accesstxn.revoke_node(name, found.change(acl_key, new), wraps, another, asked.caller.guards)
            else:
                new, groups = await self._changed(acl, request)
                if new == acl:
                    return answer_of(acl)
                changes = (found.change(acl_key, new), *groups.touched)
                txn = accesstxn.change(changes, asked.caller.guards, groups.absent)
            return answer_of(new) if await self._done(txn, asked) else None

        return await settle(attempt)

    async def _changed(self, acl: NodeAcl, request: pb.SetNodeRequest) -> tuple[NodeAcl, access.Groups]:
        granted = set(acl.clearances) | set(access.clearances(request.grant, "grant"))
        granted -= set(access.clearances(request.withdraw, "withdraw"))
        member_of = set(acl.groups) | set(access.groups(request.join_groups, "join_groups"))
        member_of -= set(access.groups(request.leave_groups, "leave_groups"))
        clearances, names_of = access.clearances(granted, "grant"), access.groups(member_of, "join_groups")
        found = await access.read_groups(self._port.store, names_of)
        for name in set(found.missing) - set(acl.groups):
            raise NotFound(f"there is no group {name}", field="join_groups", hint=f"spinetta group set {name}")
        effective = effective_clearances(clearances, found.records)
        return replace(acl, clearances=clearances, groups=names_of, effective=effective), found

    async def _other_voters(self, acl: NodeAcl) -> list[tuple[NodeAcl, Seen]]:
        """Those that stay when this one goes."""
        nodes = await read_under(self._port.store, keys.ACL_NODE, NodeAcl, NODES_MAX)
        stay = [
            (n, seen) for n, seen in nodes.values() if n.role is NodeRole.VOTER and not n.revoked and n.name != acl.name
        ]
        if not stay:
            raise UserError(
                f"node {acl.name} is the last one of role voter",
                field="name",
                hint="let another voter join first: without one the cluster could never let anybody in again",
                reason="last-voter",
            )
        return stay

    def _shut_out(self, keyring: Keyring, known: Known, node: str, voters: Sequence[tuple[str, bytes]]) -> list[Change]:
        """The authorities' records with nothing sealed to this voter, and a new authority of etcd begun.

        Etcd asks for a certificate only, not for rights: until its authority is another one, whoever has a voter's
        certificate reads and writes everything.
        """
        now_ms = self._port.wall_ms()
        changes = []
        for kind, old in known.authorities.items():
            new = without_node(old, node)
            if kind == "etcd" and not under_way(old):
                entry = keyring.successor(known, "etcd", voters, now_s=now_ms / 1000)
                new = begin(new, entry, now_ms=now_ms, overlap_s=0.0)
            if new != old:
                changes.append(known.change(new))
        return changes

    async def _remove(self, acl: NodeAcl, seen: Seen, asked: Asked) -> pb.SetNodeResponse | None:
        if not acl.revoked:
            raise UserError(
                f"node {acl.name} has not been revoked",
                field="remove",
                hint=f"first: spinetta node revoke {acl.name}",
                reason="not-revoked",
            )
        # While it has tasks that count as running the leader still deals with it: its name must not be free yet.
        life = Seen(keys.incarnation(NodeId(acl.name)), Revision(0))
        found = await read(self._port.store, [life.key])
        if found.seen(life.key).revision:
            raise UserError(
                f"node {acl.name} has been revoked, and its tasks are being put back",
                field="remove",
                hint="try again in a minute",
                reason="not-closed",
            )
        txn = accesstxn.remove(seen, asked.caller.guards, also=(life,))
        return answer_of(acl) if await self._done(txn, asked) else None

    async def _done(self, txn: Txn, asked: Asked) -> bool:
        if await committed(self._port.store, txn, asked):
            return True
        await asked.again()  # it may be the caller's rights that have changed
        return False


def answer_of(acl: NodeAcl) -> pb.SetNodeResponse:
    """The answer that shows a node's rights as they are now."""
    shown: records.NodeAcl = trustcodec.to_pb(acl)
    return pb.SetNodeResponse(node=shown)


def _changed(name: str, does: str, key_hash: bytes) -> UserError:
    return UserError(
        f"another machine {does} under the name {name} than the one that was looked at: its key is "
        f"{fingerprint(key_hash)}",
        field="name",
        hint="look again: spinetta node requests",
        reason="changed",
    )


def check_reason(reason: str) -> str:
    """The reason, if it can be shown.

    Raises:
        UserError: it is too long, or holds control characters.
    """
    if len(reason) > REASON_CHARS_MAX:
        raise UserError("the reason is too long", field="reason", hint=f"at most {REASON_CHARS_MAX} characters")
    names.check_printable(reason, "the reason", "reason")
    return reason
