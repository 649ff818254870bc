"""Nodes with sealing keys and clearances over a real store, each with the keeper and the vault of its daemon."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from spinetta import codec, keys, lifecycle, payload, trustcodec, txn
from spinetta.access import LabelKey, NodeAcl, NodeRole, SecretRecord
from spinetta.errors import StoreUnavailable
from spinetta.model import NodeId, QueueHint, Revision, Task, TaskSpec
from spinetta.node.labeldesk import DirectDesk
from spinetta.node.labels import LabelKeeper
from spinetta.node.resealing import Resealer
from spinetta.node.vault import Vault
from spinetta.store.etcd import EtcdStore
from spinetta.store.protocol import Store
from spinetta.trust.credentials import NodeCredentials
from spinetta.trust.envelope import LabelPublicKey, seal_envelope
from spinetta.trust.sealing import new_sealing_key, public_of
from tests.contract.api_world import Etcd, eventually, put
from tests.unit.trust_world import World


@dataclass
class Party:
    """One node's part in keeping keys."""

    name: str
    acl: NodeAcl
    vault: Vault
    keeper: LabelKeeper
    private: list[bytes] = field(repr=False)


class Sealed:
    """A cluster of such nodes."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.parties: dict[str, Party] = {}
        self.clock_s = 0.0

    async def join(
        self,
        name: str,
        *clearances: str,
        role: NodeRole = NodeRole.VOTER,
        live: bool = True,
        groups: Sequence[str] = (),
    ) -> Party:
        """A node is approved, and comes up."""
        private = [new_sealing_key()]
        acl = NodeAcl(
            name,
            role,
            tuple(sorted(clearances)),
            tuple(groups),
            tuple(sorted(clearances)),
            b"k" * 32,
            public_of(private[0]),
        )
        vault = Vault(self.store, NodeId(name), lambda: private[0])
        keeper = LabelKeeper(
            DirectDesk(self.store, NodeId(name)),
            vault,
            NodeId(name),
            role,
            lambda: self.parties[name].acl.effective,
            resealer=Resealer(self.store) if role is NodeRole.VOTER else None,
            clock=lambda: self.clock_s,
        )
        self.parties[name] = Party(name, acl, vault, keeper, private)
        await self.grant(name, *clearances)
        if live:
            await put(self.store, keys.node(NodeId(name)), b"")
        return self.parties[name]

    async def grant(self, name: str, *clearances: str, revoked: bool = False) -> None:
        """What a node is cleared for from now on."""
        party = self.parties[name]
        labels = tuple(sorted(clearances))
        party.acl = replace(party.acl, clearances=labels, effective=labels, revoked=revoked)
        await put(self.store, keys.acl_node(NodeId(name)), trustcodec.encode(party.acl))

    async def settle(self, rounds: int = 4) -> None:
        """All that are up look, until nothing changes any more."""
        for _ in range(rounds):
            for party in list(self.parties.values()):
                if not party.acl.revoked:
                    await party.keeper.look()

    async def key(self, label: str) -> LabelKey:
        entry = (await self.store.read([keys.label(label)])).entries[keys.label(label)]
        assert entry is not None
        return trustcodec.decode(LabelKey, entry.value)

    async def public(self, *labels: str) -> list[LabelPublicKey]:
        found = [await self.key(label) for label in labels]
        return [LabelPublicKey(k.label, k.latest.number, k.latest.public_key) for k in found]

    async def sealed(self, spec: TaskSpec) -> TaskSpec:
        purpose = payload.task_purpose(spec.id, spec.clearance)
        content = payload.encode_payload(spec)
        return payload.hollow(spec, seal_envelope(content, await self.public(*spec.clearance), purpose))

    async def submit(self, spec: TaskSpec) -> TaskSpec:
        sealed = await self.sealed(spec)
        task = lifecycle.submitted(sealed, now_ms=1, at_node="n1")
        hint = codec.encode_hint(QueueHint.of(sealed))
        assert isinstance(await self.store.commit(txn.submit(task.id, codec.encode_task(task), hint)), txn.Committed)
        return sealed

    async def task(self, spec: TaskSpec) -> Task:
        entry = (await self.store.read([keys.task(spec.id)])).entries[keys.task(spec.id)]
        assert entry is not None
        return codec.decode_task(entry.value)

    async def put_secret(self, owner: str, name: str, content: bytes, *labels: str) -> Revision:
        envelope = seal_envelope(content, await self.public(*labels), payload.secret_purpose(owner, name, labels))
        record = SecretRecord(owner, name, tuple(sorted(labels)), envelope)
        return await put(self.store, keys.secret(owner, name), trustcodec.encode(record))


async def _answers(store: Store) -> bool:
    """On a busy machine a first connection may take longer than a node waits for it."""
    try:
        await store.read(["/"])
    except StoreUnavailable:
        return False
    return True


@asynccontextmanager
async def sealed_world(etcd: Etcd) -> AsyncIterator[Sealed]:
    store = EtcdStore([etcd.endpoint])
    try:
        await eventually(lambda: _answers(store), what="an etcd that answers")
        yield Sealed(store)
    finally:
        await store.close()


def credentials(directory: Path, name: str = "n1", role: NodeRole = NodeRole.VOTER) -> NodeCredentials:
    """Of a node, lawful and its own."""
    world = World(now_s=1.0)
    cert, key = world.node(name, role)
    return NodeCredentials.create(
        directory, ca_pem=world.ca, node_pem=cert, node_key_pem=key, sealing_private=new_sealing_key()
    )
