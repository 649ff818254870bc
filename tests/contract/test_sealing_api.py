"""Sealing and secrets over the API: real certificates, real TLS, real etcd, and the node that opens what it runs."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from spinetta import access, codec, confidential, keys, messages, payload, trustcodec
from spinetta.access import MEMBERS, NodeRole, SecretRecord, UserAcl, UserRole
from spinetta.client import make_spec
from spinetta.client.aio import AsyncClient
from spinetta.errors import AlreadyExists, Denied, NotFound, UserError
from spinetta.model import NodeId
from spinetta.node import vault as vaults
from spinetta.node.labeldesk import DirectDesk, RemoteDesk
from spinetta.node.labels import LabelKeeper
from spinetta.node.resealing import Resealer
from spinetta.node.vault import Vault
from spinetta.trust import certificates
from spinetta.trust.credentials import NodeCredentials, UserCredentials
from spinetta.trust.dial import VOTER, Dialer
from spinetta.trust.envelope import Box
from spinetta.v1 import api_pb2 as api
from spinetta.v1 import trust_pb2 as pb
from spinetta.v1.api_pb2_grpc import SpinettaStub
from tests.contract.api_world import Etcd, etcd, etcd_member, failure, put, run
from tests.contract.trust_world import World, world

pytestmark = pytest.mark.contract
_ = (etcd, etcd_member)  # fixtures

MARK = "scan-of-patient-4711"


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vaults, "WAIT_S", 0.3)
    monkeypatch.setattr(vaults, "AGAIN_S", 0.05)


class Scene:
    """A founded cluster whose node n1 keeps keys, and people who use it."""

    def __init__(self, cluster: World, stack: contextlib.AsyncExitStack) -> None:
        self.cluster = cluster
        self.stack = stack
        self.store = cluster.voter.store
        self.port = cluster.voter.port
        self.vault, self.keeper = self.keeping(cluster.voter.credentials)

    def keeping(self, who: NodeCredentials, desk: Any = None) -> tuple[Vault, LabelKeeper]:
        """The part of a daemon that keeps keys."""
        name = NodeId(who.name)
        vault = Vault(self.store, name, lambda: who.sealing_private)
        cleared: Callable[[], frozenset[str]] = lambda: self.clearances.get(name, frozenset())  # noqa: E731
        resealer = Resealer(self.store) if who.role is NodeRole.VOTER else None
        return vault, LabelKeeper(
            desk or DirectDesk(self.store, name), vault, name, who.role, cleared, resealer=resealer
        )

    clearances: dict[str, frozenset[str]] = {}  # noqa: RUF012 - set anew for each scene

    async def grant(self, name: str, *labels: str, withdraw: tuple[str, ...] = ()) -> None:
        """What an administrator does; the node hears of it."""
        await self.admin.admin.set_node(name, grant=labels, withdraw=withdraw)
        found = await self.cluster.voter.record(access.NodeAcl, keys.acl_node(NodeId(name)))
        assert found is not None
        self.clearances[name] = frozenset(found.effective)
        if name == self.port.name:
            self.port.clearances = frozenset(found.effective)

    async def begin(self) -> None:
        self.clearances.clear()
        self.admin = await self.client(self.cluster.admin_credentials)
        await self.keeper.look()

    async def client(self, who: UserCredentials) -> AsyncClient:
        return await self.stack.enter_async_context(AsyncClient(self.cluster.voter.address, credentials=who))

    async def stub(self, who: UserCredentials) -> Any:
        dialer = Dialer.secured(lambda: (who.ca_pem, who.cert_pem, who.key_pem))
        return SpinettaStub(await self.stack.enter_async_context(dialer.channel(self.cluster.voter.address, VOTER)))

    async def person(
        self, name: str = "ann", *clearances: str, role: UserRole = UserRole.USER, **fields: Any
    ) -> UserCredentials:
        await self.admin.admin.set_user(
            UserAcl(name, role, clearances=tuple(sorted(clearances)), **fields), create=True
        )
        key = certificates.new_key()
        request = pb.LoginRequest(
            token=await self.cluster.token(3, user=name),
            csr=certificates.csr(key, name),
            wall_ms=time.time_ns() // 1_000_000,
        )
        made = (await (await self.cluster.voter.enroll()).Login(request)).certificates
        return UserCredentials.create(made.ca_bundle, made.certificate, certificates.key_pem(key))

    async def stored(self, task_id: str) -> bytes:
        entry = (await self.store.read([keys.TASK + task_id])).entries[keys.TASK + task_id]
        assert entry is not None
        return entry.value

    async def everything(self) -> bytes:
        """All that the store holds now."""
        return b"".join(e.key.encode() + e.value for e in (await self.store.list("/")).entries)


@contextlib.asynccontextmanager
async def scene(etcd: Etcd, folder: Path) -> AsyncIterator[Scene]:
    async with contextlib.AsyncExitStack() as stack, world(etcd, folder) as cluster:
        found = Scene(cluster, stack)
        await found.begin()
        try:
            yield found
        finally:
            await stack.aclose()


Story = Callable[[Scene], Awaitable[None]]


@dataclass
class Stage:
    etcd: Etcd
    folder: Path

    def __call__(self, story: Story) -> None:
        async def main() -> None:
            async with scene(self.etcd, self.folder) as found:
                await story(found)

        run(main())


@pytest.fixture
def play(etcd: Etcd, tmp_path: Path) -> Stage:
    return Stage(etcd, tmp_path)


def marked(**options: Any) -> Any:
    return make_spec(["analyse", MARK], name=MARK, env={"WHO": MARK}, labels={"who": MARK}, **options)


def test_a_clients_payload_is_sealed_and_opened_where_it_runs(play: Stage) -> None:
    async def story(s: Scene) -> None:
        await s.grant("n1", "phi")
        await s.keeper.look()
        ann = await s.client(await s.person("ann", "phi"))
        spec = marked(clearance="phi")
        handle = await ann.submit(spec)
        info = await ann.get(handle.id)
        assert (info.task.spec.command, info.task.spec.name, info.task.spec.owner) == ((), "", "ann")
        assert MARK.encode() not in await s.everything()
        opened = await s.vault.open_task(codec.decode_task(await s.stored(handle.id)).spec)
        assert opened.spec.command == spec.command
        assert opened.spec.env == spec.env
        assert opened.private
        # The same again.
        assert (await ann.submit_many([spec]))[0].existed
        assert MARK not in repr(s.port.audited)

    play(story)


def test_every_approved_node_opens_what_is_for_members(play: Stage) -> None:
    async def story(s: Scene) -> None:
        ann = await s.client(await s.person("ann"))
        handle = await ann.submit(marked(clearance=MEMBERS))
        opened = await s.vault.open_task(codec.decode_task(await s.stored(handle.id)).spec)
        assert opened.spec.name == MARK

    play(story)


def test_a_key_that_is_replaced_meanwhile(play: Stage) -> None:
    async def story(s: Scene) -> None:
        await s.grant("n1", "phi")
        await s.cluster.joined("n2", clearances=["phi"])
        await s.keeper.look()
        ann = await s.client(await s.person("ann", "phi"))
        spec = marked(clearance="phi")
        ready = (await ann._sealer.seal([spec]))[0]
        await s.grant("n2", withdraw=("phi",))
        await s.keeper.look()
        assert (await ann._sealer.keys(["phi"]))[0].generation == 2
        assert ready.sealed is not None
        assert ready.sealed.shares[0].generation == 1
        first = (await ann.submit_many([spec]))[0]
        assert not first.existed
        # The keeper seals it anew, and it is still the same submit.
        n3 = await s.cluster.joined("n3", clearances=["phi"])
        await s.keeper.look()
        await s.grant(n3.name, withdraw=("phi",))
        await s.keeper.look()
        stored = codec.decode_task(await s.stored(spec.id)).spec
        assert stored.sealed is not None
        assert stored.sealed.shares[0].generation == 3
        assert (await ann.submit_many([spec]))[0].existed
        assert (await s.vault.open_task(stored)).spec.name == MARK

    play(story)


def test_another_process_cannot_tell_whether_it_is_the_same(play: Stage) -> None:
    async def story(s: Scene) -> None:
        await s.grant("n1", "phi")
        await s.keeper.look()
        who = await s.person("ann", "phi")
        spec = marked(clearance="phi")
        await (await s.client(who)).submit(spec)
        other = await s.client(who)
        with pytest.raises(AlreadyExists, match="cannot be told"):
            await other.submit(spec)

    play(story)


def test_a_clear_payload_is_sealed_by_a_cleared_node_and_refused_by_others(play: Stage) -> None:
    async def story(s: Scene) -> None:
        await s.grant("n1", "phi")
        await s.keeper.look()
        who = await s.person("ann", "phi", "pci")
        stub = await s.stub(who)
        spec = marked(clearance="phi")
        await stub.Submit(api.SubmitRequest(tasks=[messages.spec_to_pb(spec)]))
        assert MARK.encode() not in await s.everything()
        assert (await s.vault.open_task(codec.decode_task(await s.stored(spec.id)).spec)).spec.name == MARK
        for labels, reason in ((["pci"], "unsealed"), (["pci", "phi"], "unsealed")):
            failed = await failure(
                stub.Submit(api.SubmitRequest(tasks=[messages.spec_to_pb(marked(clearance=labels))]))
            )
            assert failed.detail.reason == reason
            assert failed.detail.field == "tasks[0].clearance"
            assert MARK not in repr(failed)
        assert MARK.encode() not in await s.everything()
        assert MARK not in repr(s.port.audited)

    play(story)


def test_what_is_not_sealed_right_is_refused(play: Stage) -> None:
    async def story(s: Scene) -> None:
        await s.grant("n1", "phi")
        await s.keeper.look()
        who = await s.person("ann", "phi", "pci")
        stub, ann = await s.stub(who), await s.client(who)
        good = messages.spec_to_pb((await ann._sealer.seal([marked(clearance="phi")]))[0])

        async def refused(reason: str = "", **changes: Any) -> None:
            bad = type(good).FromString(good.SerializeToString())
            for name, value in changes.items():
                if name == "drop":
                    del bad.sealed.shares[:]
                elif name == "generation":
                    bad.sealed.shares[0].generation = value
                elif name == "clearance":
                    bad.clearance[:] = value
                else:
                    setattr(bad, name, value)
            failed = await failure(stub.Submit(api.SubmitRequest(tasks=[bad])))
            assert failed.code in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION), failed
            assert not reason or failed.detail.reason == reason, failed

        await refused("unsealed", name="clear")
        await refused("unsealed", working_directory="/clear")
        await refused(drop=True)
        await refused("stale-label-key", generation=7)
        await refused(clearance=[])
        await refused(clearance=["pci"])
        await refused(clearance=["phi", "pci"])
        assert (await s.store.list(keys.TASK)).entries == ()

    play(story)


def test_who_is_not_cleared_may_neither_seal_nor_submit(play: Stage) -> None:
    async def story(s: Scene) -> None:
        await s.grant("n1", "phi")
        await s.keeper.look()
        for name, role in (("bob", UserRole.USER), ("boss", UserRole.ADMIN)):
            client = await s.client(await s.person(name, role=role))
            with pytest.raises(Denied):
                await client.submit(marked(clearance="phi"))
            stub = await s.stub(await s.person(name + "2", role=role))
            failed = await failure(stub.Submit(api.SubmitRequest(tasks=[messages.spec_to_pb(marked(clearance="phi"))])))
            assert failed.code is grpc.StatusCode.PERMISSION_DENIED
        viewer = await s.client(await s.person("eve", "phi", role=UserRole.VIEWER))
        with pytest.raises(Denied):
            await viewer.submit(marked(clearance="phi"))
        ann = await s.client(await s.person("ann", "none"))
        with pytest.raises(UserError) as e:
            await ann.submit(marked(clearance="none"))
        assert e.value.reason == "no-label-key"

    play(story)


# --- secrets ---------------------------------------------------------------------------------------------------------


def test_secrets_are_kept_sealed_and_given_to_their_owners_tasks(play: Stage) -> None:
    async def story(s: Scene) -> None:
        await s.grant("n1", "phi")
        await s.keeper.look()
        ann = await s.client(await s.person("ann", "phi"))
        assert await ann.put_secret("token", MARK.encode()) == 1
        assert await ann.put_secret("token", b"new-" + MARK.encode()) == 2
        assert await ann.put_secret("deep", MARK.encode(), labels=["phi"]) == 1
        assert MARK.encode() not in await s.everything()
        listed = {x.name: x for x in await ann.admin.secrets()}
        assert {n: (x.owner, x.labels, x.version, x.created_by) for n, x in listed.items()} == {
            "token": ("ann", (MEMBERS,), 2, "user ann"),
            "deep": ("ann", ("phi",), 1, "user ann"),
        }
        assert all(x.envelope.ciphertext == b"" and x.envelope.shares == () for x in listed.values())
        handle = await ann.submit(["x"], secrets={"token": "t", "deep": "d"}, clearance="phi")
        opened = await s.vault.open_task(codec.decode_task(await s.stored(handle.id)).spec)
        assert dict(opened.secrets) == {"t": b"new-" + MARK.encode(), "d": MARK.encode()}
        plain = await ann.submit(["x"], secrets="token")
        info = await ann.get(plain.id)
        assert info.task.spec.secrets == (("token", "token"),)
        opened = await s.vault.open_task(codec.decode_task(await s.stored(plain.id)).spec)
        assert opened.secrets == (("token", b"new-" + MARK.encode()),)
        await ann.admin.remove_secret("token")
        with pytest.raises(NotFound):
            await ann.admin.remove_secret("token")
        with pytest.raises(vaults.CannotOpen, match="no secret token of ann"):
            await s.vault.open_task(codec.decode_task(await s.stored(plain.id)).spec)
        assert MARK not in repr(s.port.audited)

    play(story)


def test_whose_secrets(play: Stage) -> None:
    async def story(s: Scene) -> None:
        ann = await s.client(await s.person("ann", projects=("lab",)))
        bob = await s.client(await s.person("bob", projects=("lab",)))
        eve = await s.client(await s.person("eve", role=UserRole.OPERATOR))
        viewer = await s.client(await s.person("vic", role=UserRole.VIEWER))
        await ann.put_secret("own", b"1")
        await ann.put_secret("shared", b"2", owner="lab")
        assert [(x.owner, x.name) for x in await bob.admin.secrets()] == [("lab", "shared")]
        assert await bob.put_secret("shared", b"3", owner="lab") == 2
        assert len(await s.admin.admin.secrets()) == 2
        for other in (bob, eve):
            with pytest.raises(Denied):
                await other.put_secret("own", b"x", owner="ann")
            with pytest.raises(Denied):
                await other.admin.remove_secret("own", "ann")
            with pytest.raises(Denied):
                await other.admin.secrets("ann")
        with pytest.raises(Denied):
            await viewer.put_secret("own", b"x")
        # A task in another's name would get that one's secrets.
        for other in (bob, eve):
            with pytest.raises(Denied):
                await other.submit(["x"], owner="ann", secrets="own")

    play(story)


def test_secrets_that_are_refused(play: Stage) -> None:
    async def story(s: Scene) -> None:
        await s.grant("n1", "phi")
        await s.keeper.look()
        who = await s.person("ann")
        ann = await s.client(who)
        for name, content, labels, field in (
            ("a/b", b"", (), "name"),
            ("", b"", (), "name"),
            ("x", b"x" * (confidential.SECRET_BYTES_MAX + 1), (), "content"),
            ("x", b"", ("A",), "labels[0]"),
        ):
            with pytest.raises(UserError) as e:
                await ann.put_secret(name, content, labels=labels)
            assert e.value.field == field
        with pytest.raises(Denied):
            await ann.put_secret("x", b"", labels=["phi"])
        stub = await s.cluster.voter.trust(who)
        sealed = Box.of(b"x", payload.secret_purpose("ann", "x", [MEMBERS])).envelope(await ann._sealer.keys([MEMBERS]))

        async def refused(**changes: Any) -> None:
            fields: dict[str, Any] = {"owner": "ann", "name": "x", "labels": (MEMBERS,), "envelope": sealed} | changes
            failed = await failure(stub.PutSecret(pb.PutSecretRequest(secret=trustcodec.to_pb(SecretRecord(**fields)))))
            assert failed.code in (
                grpc.StatusCode.INVALID_ARGUMENT,
                grpc.StatusCode.PERMISSION_DENIED,
                grpc.StatusCode.FAILED_PRECONDITION,
                grpc.StatusCode.RESOURCE_EXHAUSTED,
            ), failed

        await refused(labels=())
        await refused(labels=("phi",))
        await refused(labels=("phi", MEMBERS))
        await refused(labels=(MEMBERS, MEMBERS))
        await refused(name="../x")
        await refused(owner="bob")
        await refused(owner="a/b")
        await refused(envelope=access.Envelope((), b"", b""))
        await refused(envelope=access.Envelope(sealed.shares, sealed.nonce, b"x" * (1 << 20)))
        stale = access.SealedKeyShare(MEMBERS, 9, sealed.shares[0].sealed)
        await refused(envelope=access.Envelope((stale,), sealed.nonce, sealed.ciphertext))
        assert (await s.store.list(keys.SECRET)).entries == ()

    play(story)


def test_there_are_not_too_many_secrets(play: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(confidential, "SECRETS_PER_OWNER_MAX", 3)

    async def story(s: Scene) -> None:
        ann = await s.client(await s.person("ann"))
        for i in range(3):
            await ann.put_secret(f"s{i}", b"")
        with pytest.raises(UserError) as e:
            await ann.put_secret("s3", b"")
        assert e.value.reason == "too-many"
        assert await ann.put_secret("s1", b"again") == 2

    play(story)


# --- workers ---------------------------------------------------------------------------------------------------------


def test_workers_keep_the_key_that_no_voter_may_have(play: Stage) -> None:
    async def story(s: Scene) -> None:
        async def worker(name: str) -> tuple[Vault, LabelKeeper]:
            who = await s.cluster.joined(name, clearances=["phi"])
            s.clearances[name] = frozenset(["phi"])
            await put(s.store, keys.node(NodeId(name)), b"")

            async def channel() -> grpc.aio.Channel:
                dialer = Dialer.secured(who.pems)
                return await s.stack.enter_async_context(dialer.channel(s.cluster.voter.address, VOTER))

            return s.keeping(who, RemoteDesk(channel))

        vault1, keeper1 = await worker("w1")
        await s.keeper.look()
        assert await s.cluster.voter.record(access.LabelKey, keys.label("phi")) is None
        await keeper1.look()
        vault2, keeper2 = await worker("w2")
        await keeper1.look()
        await keeper2.look()
        ann = await s.client(await s.person("ann", "phi"))
        handle = await ann.submit(marked(clearance="phi"))
        spec = codec.decode_task(await s.stored(handle.id)).spec
        for vault in (vault1, vault2):
            assert (await vault.open_task(spec)).spec.name == MARK
        with pytest.raises(vaults.CannotOpen):
            await s.vault.open_task(spec)
        # One is withdrawn.
        await s.grant("w2", withdraw=("phi",))
        await keeper1.look()
        key = await s.cluster.voter.record(access.LabelKey, keys.label("phi"))
        assert key is not None
        assert [w.node for w in key.latest.wraps] == ["w1"]
        handle = await ann.submit(marked(clearance="phi"))
        spec = codec.decode_task(await s.stored(handle.id)).spec
        assert (await vault1.open_task(spec)).spec.name == MARK
        with pytest.raises(vaults.CannotOpen):
            await vault2.open_task(spec)

    play(story)


def test_people_do_not_keep_keys(play: Stage) -> None:
    async def story(s: Scene) -> None:
        for who in (await s.person("ann", "phi"), s.cluster.admin_credentials):
            stub = await s.cluster.voter.trust(who)
            for call in (
                stub.GetLabelStates(pb.GetLabelStatesRequest()),
                stub.UpdateLabelKey(pb.UpdateLabelKeyRequest()),
            ):
                assert (await failure(call)).code is grpc.StatusCode.PERMISSION_DENIED

    play(story)
