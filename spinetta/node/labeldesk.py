"""Reading and writing the keys of labels: directly, or, for a worker, through a voter that checks what it writes."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import grpc
import grpc.aio

from spinetta import keys, labelkeys, trustcodec, txn
from spinetta.access import LabelKey, NodeAcl, NodeRole
from spinetta.errors import CorruptRecord, Denied, OutcomeUnknown, StoreUnavailable, UserError
from spinetta.labelkeys import Cleared
from spinetta.model import NodeId, Revision
from spinetta.node.trouble import Teller
from spinetta.store.protocol import READ_KEYS_MAX, KeyValue, Store
from spinetta.trust.sealing import seal
from spinetta.v1 import record_pb2 as record
from spinetta.v1 import trust_pb2 as pb

log = logging.getLogger("spinetta.node")

GUARDED_MAX = 100  # nodes newly given a key in one write: the rights of each are a guard, and etcd takes 128 in all
PAGE_KEYS = 500  # of rights; about 150 KB
LABELS_MAX = 100  # of one node
CALL_S = 10.0


@dataclass(frozen=True, slots=True)
class LabelState:
    """A label's key as it is stored, and who should have it. `revision` 0: there is none."""

    label: str
    key: LabelKey | None
    revision: Revision
    cleared: tuple[Cleared, ...]


class LabelDesk(Protocol):
    """Where the keys of labels are kept."""

    async def states(self, labels: Sequence[str]) -> list[LabelState]:
        """How these labels stand; those that this node has no part in may be left out.

        Raises:
            StoreUnavailable: it cannot be said now.
        """
        ...

    async def update(self, key: LabelKey, revision: Revision) -> bool:
        """Write a record in the place of the one at this revision; False: something has changed, look again.

        Raises:
            Denied: this node may not make it that.
            StoreUnavailable, OutcomeUnknown: look again.
        """
        ...


class DirectDesk:
    """For a node with access to the store; it also answers for workers."""

    def __init__(self, store: Store, me: NodeId) -> None:
        self._store = store
        self._me = me
        self._teller = Teller(log)

    async def states(self, labels: Sequence[str]) -> list[LabelState]:
        """How these labels stand."""
        acls, _ = await self._rights()
        live = {keys.parse_node(e.key) for e in await self._all(keys.NODE, keys_only=True)}
        found: dict[str, KeyValue | None] = {}
        wanted = list(dict.fromkeys(labels))[:LABELS_MAX]
        for i in range(0, len(wanted), READ_KEYS_MAX):
            found |= (await self._store.read([keys.label(name) for name in wanted[i : i + READ_KEYS_MAX]])).entries
        states = []
        for name in wanted:
            entry = found[keys.label(name)]
            try:
                key = labelkeys.stored(name, entry.value) if entry is not None else None
            except CorruptRecord as e:  # left as it is, and no reason to leave the other labels alone
                self._teller.tell(f"label {name}: {e}", logging.WARNING)
                continue
            revision = entry.modified if entry is not None else Revision(0)
            states.append(LabelState(name, key, revision, labelkeys.cleared_for(name, acls, live)))
        return states

    async def update(self, key: LabelKey, revision: Revision) -> bool:
        """Write a record, as this node."""
        return await self.update_for(self._me, key, revision, may_drop=True)

    async def update_for(self, caller: str, key: LabelKey, revision: Revision, *, may_drop: bool = False) -> bool:
        """Write a record on behalf of a node, if it may; its own rights and those of newly given ones are guards."""
        acls, revisions = await self._rights()
        cleared = labelkeys.cleared_for(key.label, acls, ())
        entry = (await self._store.read([keys.label(key.label)])).entries[keys.label(key.label)]
        if (entry.modified if entry is not None else 0) != revision:
            return False
        old = labelkeys.stored(key.label, entry.value) if entry is not None else None
        refused = labelkeys.why_not_update(old, key, caller, cleared, may_drop=may_drop)
        if refused:
            raise Denied(f"the key of label {key.label}: {refused}")
        new = newly_given(old, key)
        if len(new) > GUARDED_MAX:
            raise Denied(f"the key of label {key.label}: {len(new)} nodes at once", hint=f"at most {GUARDED_MAX}")
        guards = tuple(txn.RevisionIs(keys.acl_node(NodeId(name)), revisions[name]) for name in sorted({caller, *new}))
        body = txn.Txn(
            when=(txn.RevisionIs(keys.label(key.label), revision), *guards),
            then=(txn.Put(keys.label(key.label), trustcodec.encode(key)),),
        )
        return isinstance(await self._store.commit(body), txn.Committed)

    async def _rights(self) -> tuple[list[NodeAcl], dict[str, Revision]]:
        acls, revisions = [], {}
        for entry in await self._all(keys.ACL_NODE):
            try:
                acl = trustcodec.decode(NodeAcl, entry.value)
            except CorruptRecord:
                continue  # unreadable rights are none
            if keys.acl_node(NodeId(acl.name)) == entry.key and (acl.revoked or can_seal_to(acl.sealing_key)):
                acls.append(acl)
                revisions[acl.name] = entry.modified
        return acls, revisions

    async def _all(self, prefix: str, *, keys_only: bool = False) -> list[KeyValue]:
        entries: list[KeyValue] = []
        after = ""
        while True:
            page = await self._store.list(prefix, after=after, limit=PAGE_KEYS, keys_only=keys_only)
            entries += page.entries
            if not page.more or not page.entries:
                return entries
            after = page.entries[-1].key


def newly_given(old: LabelKey | None, new: LabelKey) -> set[str]:
    """Nodes that get a wrap which they did not have."""
    before = {(g.number, w.node, w.sealed) for g in (old.generations if old is not None else ()) for w in g.wraps}
    return {w.node for g in new.generations for w in g.wraps if (g.number, w.node, w.sealed) not in before}


@lru_cache(maxsize=4096)  # nodes; a hundred microseconds each otherwise, of every node at every look
def can_seal_to(sealing_key: bytes) -> bool:
    """Whether this is a sealing key. One that is none must not keep all others from getting theirs."""
    try:
        seal(b"", sealing_key, b"probe")
    except UserError:
        return False
    return True


class RemoteDesk:
    """For a worker: asks a voter."""

    def __init__(self, channel: Callable[[], Awaitable[grpc.aio.Channel]]) -> None:
        """`channel` gives one to a voter that answers, made with this node's certificate; its owner closes it."""
        self._channel = channel
        self._teller = Teller(log)

    async def states(self, labels: Sequence[str]) -> list[LabelState]:
        """How these labels stand, as far as this node has a part in them."""
        from spinetta.v1.trust_pb2_grpc import TrustStub

        try:
            stub = TrustStub(await self._channel())
            answer = await stub.GetLabelStates(pb.GetLabelStatesRequest(), timeout=CALL_S)
        except grpc.aio.AioRpcError as e:
            raise StoreUnavailable(f"the keys of labels cannot be asked for: {e.details()}") from None
        wanted, states = set(labels), []
        for m in answer.states:
            try:
                states += [state_from_pb(m)] if m.label in wanted else []
            except CorruptRecord as e:  # as in `DirectDesk.states`
                self._teller.tell(f"label {m.label}: {e}", logging.WARNING)
        return states

    async def update(self, key: LabelKey, revision: Revision) -> bool:
        """Have a record written."""
        from spinetta.v1.trust_pb2_grpc import TrustStub

        request = pb.UpdateLabelKeyRequest(key=trustcodec.to_pb(key), revision=revision)
        try:
            stub = TrustStub(await self._channel())
            return (await stub.UpdateLabelKey(request, timeout=CALL_S)).changed
        except grpc.aio.AioRpcError as e:
            if e.code() is grpc.StatusCode.PERMISSION_DENIED:
                raise Denied(e.details() or "refused") from None
            raise OutcomeUnknown(f"whether the key of label {key.label} was written is not known") from None


def state_to_pb(state: LabelState) -> pb.GetLabelStatesResponse.State:
    """To the wire."""
    return pb.GetLabelStatesResponse.State(
        label=state.label,
        key=trustcodec.to_pb(state.key) if state.key is not None else None,
        revision=state.revision,
        cleared=[
            pb.GetLabelStatesResponse.ClearedNode(
                name=n.name, sealing_key=n.sealing_key, role=record.NodeRole.ValueType(n.role), live=n.live
            )
            for n in state.cleared
        ],
    )


def state_from_pb(m: pb.GetLabelStatesResponse.State) -> LabelState:
    """From the wire.

    Raises:
        CorruptRecord: a node has a role that this version does not know, or the key has no generation.
    """
    try:
        cleared = tuple(Cleared(n.name, n.sealing_key, NodeRole(n.role), n.live) for n in m.cleared)
        key = labelkeys.stored(m.label, m.key.SerializeToString()) if m.HasField("key") else None
    except ValueError as e:
        raise CorruptRecord(f"the key of label {m.label} cannot be read: {e}") from e
    return LabelState(m.label, key, Revision(m.revision), cleared)
