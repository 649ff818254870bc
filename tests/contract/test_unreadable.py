"""Records of trust that cannot be read, put into a real store by hand: the loops go on, and nobody may more by it."""

from __future__ import annotations

import asyncio
import base64
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc.aio
import pytest

from spinetta import codec, keys, trustcodec, txn
from spinetta.access import MEMBERS, Authorities, AuthorityState, LabelKey, NodeAcl, NodeRole, Policy
from spinetta.errors import CorruptRecord, Denied, RuntimeUnavailable, StoreUnavailable, UserError
from spinetta.gatewaycodec import Busy
from spinetta.lifecycle import submitted
from spinetta.model import NodeId, Revision, TaskId, TaskSpec
from spinetta.node import hub as hubs
from spinetta.node import labels, renewal, secured
from spinetta.node.hub import Hub
from spinetta.node.keyring import Keyring
from spinetta.node.renewal import Report, TrustKeeper, VoterSource
from spinetta.node.secured import Hooks, Secured
from spinetta.node.services import limits
from spinetta.node.services.nodes import Beats
from spinetta.node.vault import CannotOpen, Vault
from spinetta.store.etcd import EtcdStore
from spinetta.trust import certificates
from spinetta.v1 import trust_pb2 as pb
from tests.contract.api_world import Etcd, etcd, etcd_member, eventually, failure, put, run
from tests.contract.test_gateway_agents import Node
from tests.contract.trust_world import Newcomer, World, acl_key, world

__all__ = ["etcd", "etcd_member"]
pytestmark = pytest.mark.contract

GARBAGE = b"\xff\xff not a record"
FUTURE = b"\x10\x63"  # field 2, as a number that no version of ours knows: a role, or a state


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(renewal, "LOOK_S", 0.05)
    monkeypatch.setattr(renewal, "RETRY_MIN_S", 0.05)
    monkeypatch.setattr(renewal, "RETRY_MAX_S", 0.1)
    monkeypatch.setattr(labels, "LOOK_AGAIN_S", 0.05)
    monkeypatch.setattr(labels, "LOOK_EVERY_S", 0.1)
    monkeypatch.setattr(secured, "ROTATE_EVERY_S", 0.05)
    monkeypatch.setattr(hubs, "RETRY_MIN_S", 0.05)


class Loops:
    """What a secured voter's daemon keeps running beside its server."""

    def __init__(self, task: asyncio.Task[None], part: Secured, vault: Vault, reports: list[Report]) -> None:
        self.task = task
        self.part = part
        self.vault = vault
        self.reports = reports


@contextlib.asynccontextmanager
async def loops(w: World) -> AsyncIterator[Loops]:
    credentials, store = w.voter.credentials, w.voter.store
    vault = Vault(store, NodeId("n1"), lambda: credentials.sealing_private)
    reports: list[Report] = []

    async def say(now: Report) -> None:
        reports.append(now)

    async def restart() -> None:
        return

    hooks = Hooks(say, restart, lambda: True, lambda: True, lambda: frozenset({"phi"}))
    part = Secured(w.voter.port, credentials, store, vault, hooks, w.voter.address)
    task = asyncio.create_task(part.run())
    try:
        yield Loops(task, part, vault, reports)
        assert not task.done(), task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def scenario(etcd: Etcd, directory: Path, story: Callable[[World], Any], **options: Any) -> None:
    async def main() -> None:
        async with world(etcd, directory, **options) as w:
            await story(w)

    run(main())


async def turns(w: World, seconds: float = 1.0) -> None:
    """Each loop looks a few times."""
    await asyncio.sleep(seconds)


@pytest.mark.parametrize("value", [b"", GARBAGE, FUTURE], ids=["empty", "garbage", "future"])
def test_the_loops_go_on_whatever_lies_there(
    etcd: Etcd, tmp_path: Path, caplog: pytest.LogCaptureFixture, value: bytes
) -> None:
    caplog.set_level("INFO")

    async def story(w: World) -> None:
        store = w.voter.store
        async with loops(w) as running:
            await eventually(lambda: running.reports, what="the first look")
            await eventually(lambda: running.vault.private_of(MEMBERS, 1), what="the key of all members")
            kept = {k: (await store.read([k])).entries[k] for k in (keys.authority("cluster"), keys.authority("etcd"))}
            for key in (
                keys.ACL, keys.ACL_NODE, acl_key("n9"), keys.ACL_USER, keys.acl_user("eve"), keys.acl_group("g"),
                keys.token("t"), keys.request(NodeId("n8")), keys.POLICY, keys.AUTHORITY, keys.authority("other"),
                *kept, keys.LABEL, keys.label("phi"), keys.SECRET, keys.secret("ann", "s"), keys.SECRET + "x",
                keys.NODE, keys.node(NodeId("n9")), keys.queued(TaskId("q")), keys.QUEUED, keys.BLOCKED,
                keys.running(NodeId("n1"), TaskId("r")), keys.RUNNING, keys.task(TaskId("q")),
            ):  # fmt: skip
                await put(store, key, value)
            etcd.ctl("put", "--", keys.ACL + "\udcff\udcfe", "x")
            etcd.ctl("put", "--", keys.QUEUED + "\udcff\udcfe", "x")
            etcd.ctl("put", "--", keys.LABEL + "\udcff\udcfe", "x")
            caplog.clear()
            await turns(w, 2.0)
            assert not running.task.done()
            lines = [r.getMessage() for r in caplog.records if r.name.startswith("spinetta")]
            assert len(lines) <= 20, lines  # once for each cause
            assert len(set(lines)) == len(lines), lines
            for key, entry in kept.items():
                assert entry is not None
                await put(store, key, entry.value)
            caplog.clear()
            await eventually(lambda: running.part.acl._follows, what="the rights are followed")
            # An administrator gets in, and mends it.
            admin = await w.admin()
            assert (await admin.WhoAmI(pb.WhoAmIRequest())).role == "admin"
            await admin.SetPolicy(pb.SetPolicyRequest(policy=trustcodec.to_pb(_policy())))
            assert (await admin.GetPolicy(pb.GetPolicyRequest())).policy.approval
            assert running.reports[-1].trust_generation == 1

    scenario(etcd, tmp_path, story)


def _policy() -> Any:
    return Policy(approval=True)


@pytest.mark.parametrize("value", [b"", GARBAGE, FUTURE], ids=["empty", "garbage", "future"])
def test_nobody_may_more_by_a_record_that_cannot_be_read(etcd: Etcd, tmp_path: Path, value: bytes) -> None:
    async def story(w: World) -> None:
        store, admin = w.voter.store, await w.admin()
        worker = await w.joined("n2", clearances=["phi"])
        token, spent = await w.token(), await w.token(approval=True)
        async with loops(w):
            await put(store, keys.POLICY, value)  # whether joins must be approved is not known
            with pytest.raises(grpc.aio.AioRpcError):
                await w.join(Newcomer("n3"), token)
            assert await w.voter.record(NodeAcl, acl_key("n3")) is None
            await store.commit(txn.Txn(then=(txn.Delete(keys.POLICY),)))
            await put(store, acl_key("n2"), value)
            with pytest.raises(grpc.aio.AioRpcError):
                await (await w.voter.trust(worker)).GetLabelStates(pb.GetLabelStatesRequest())
            with pytest.raises(grpc.aio.AioRpcError):
                await w.join(Newcomer("n2"), token)
            await put(store, keys.request(NodeId("n4")), value)
            with pytest.raises(grpc.aio.AioRpcError):
                await w.join(Newcomer("n4"), spent)
            with pytest.raises(grpc.aio.AioRpcError):
                await admin.DecideJoin(pb.DecideJoinRequest(name="n4", approve=True, key_hash=bytes(32)))
            assert await w.voter.record(NodeAcl, acl_key("n4")) is None
            await put(store, keys.token(token.split(".")[0]), value)
            await put(store, keys.acl_user("admin"), value)

            async def is_out() -> bool:
                try:
                    await admin.ListTokens(pb.ListTokensRequest())
                except grpc.aio.AioRpcError:
                    return True
                return False

            await eventually(is_out, what="unreadable rights are none")

    scenario(etcd, tmp_path, story)


def test_how_to_mend_the_policy_is_told(etcd: Etcd, tmp_path: Path) -> None:
    async def story(w: World) -> None:
        await put(w.voter.store, keys.POLICY, GARBAGE)
        failed = await failure((await w.admin()).GetPolicy(pb.GetPolicyRequest()))
        assert failed.detail.reason == "corrupt"
        assert f"etcdctl del {keys.POLICY}" in failed.detail.hint

    scenario(etcd, tmp_path, story)


@pytest.mark.parametrize("states", [(), (AuthorityState.NEXT,), (AuthorityState.ACTIVE,) * 2])
def test_authorities_of_which_not_exactly_one_signs_are_not_followed(
    etcd: Etcd, tmp_path: Path, states: tuple[AuthorityState, ...]
) -> None:
    async def story(w: World) -> None:
        key = keys.authority("cluster")
        good = await w.voter.record(Authorities, key)
        assert good is not None
        before = w.voter.credentials.ca_pem
        async with loops(w) as running:
            await eventually(lambda: running.reports, what="the first look")
            bad = Authorities("cluster", 7, tuple(_in_state(good, s) for s in states))
            await put(w.voter.store, key, trustcodec.encode(bad))
            await turns(w, 0.5)
            assert w.voter.credentials.ca_pem == before
            with pytest.raises(CorruptRecord):
                await Keyring(w.voter.store, w.voter.credentials).read()
            failed = await failure((await w.admin()).RotateAuthority(pb.RotateAuthorityRequest(kind="cluster")))
            assert failed.detail.reason == "corrupt"

    scenario(etcd, tmp_path, story)


def _in_state(authorities: Authorities, state: AuthorityState) -> Any:
    return replace(authorities.active, state=state)


def test_a_damaged_certificate_is_an_error_of_ours(etcd: Etcd, tmp_path: Path) -> None:
    def damaged(pem: bytes) -> bytes:
        """Its subject is not text any more."""
        der = bytearray(base64.b64decode(b"".join(pem.split(b"\n")[1:-2])))
        at = der.rindex(b"Spinetta cluster")
        der[at - 2] = 0x56
        return b"-----BEGIN CERTIFICATE-----\n" + base64.encodebytes(bytes(der)) + b"-----END CERTIFICATE-----\n"

    async def story(w: World) -> None:
        bad = damaged(w.voter.credentials.ca_pem)
        for read in (certificates.cluster_of, certificates.authority_hash, certificates.expiry):
            with pytest.raises(UserError):
                read(bad)
            key = keys.authority("cluster")
        good = await w.voter.record(Authorities, key)
        assert good is not None
        async with loops(w) as running:
            await eventually(lambda: running.reports, what="the first look")
            entries = (replace(good.active, certificate_pem=bad),)
            await put(w.voter.store, key, trustcodec.encode(replace(good, entries=entries)))
            await turns(w, 0.5)
            assert w.voter.credentials.ca_pem.rstrip() == good.active.certificate_pem.rstrip()

    scenario(etcd, tmp_path, story)


def test_one_node_with_a_sealing_key_that_is_none_keeps_no_other_from_its_keys(etcd: Etcd, tmp_path: Path) -> None:
    async def story(w: World) -> None:
        for name, key in (("n7", b"short"), ("n8", bytes(32))):  # the latter gives everybody the same secret
            acl = NodeAcl(name, NodeRole.WORKER, ("phi",), (), ("phi",), b"k" * 32, key)
            await put(w.voter.store, acl_key(name), trustcodec.encode(acl))
        worker = await w.joined("n2", clearances=["phi"])
        async with loops(w):
            await eventually(lambda: _wrapped(w, MEMBERS, worker.name), what="it gets the key of all members")
            found = await w.voter.record(LabelKey, keys.label(MEMBERS))
            assert found is not None
            assert {x.node for x in found.latest.wraps} == {"n1", "n2"}

    scenario(etcd, tmp_path, story)


async def _wrapped(w: World, label: str, node: str) -> bool:
    found = await w.voter.record(LabelKey, keys.label(label))
    return found is not None and any(x.node == node for x in found.latest.wraps)


def test_a_task_made_by_hand_with_more_than_can_be_read_fails_by_itself(etcd: Etcd, tmp_path: Path) -> None:
    async def story(w: World) -> None:
        vault = Vault(w.voter.store, NodeId("n1"), lambda: w.voter.credentials.sealing_private)
        many = tuple((f"s{i}", f"s{i}") for i in range(500))
        spec = codec.decode_task(codec.encode_task(_task(TaskSpec(TaskId("x"), ("true",), owner="ann", secrets=many))))
        with pytest.raises(CannotOpen, match="500 secrets"):
            await vault.open_task(spec.spec)

    scenario(etcd, tmp_path, story)


def _task(spec: TaskSpec) -> Any:
    return submitted(spec, now_ms=1, at_node="by hand")


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), RuntimeUnavailable("no shim"), UserError("x")]
)
def test_etcd_that_does_not_start_again_does_not_end_the_keeper(
    etcd: Etcd, tmp_path: Path, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")

    async def story(w: World) -> None:
        tries = 0

        async def restart() -> None:
            nonlocal tries
            tries += 1
            if tries < 4:
                raise error

        async def say(_: Report) -> None:
            return

        mine, store = w.voter.credentials, w.voter.store
        source = VoterSource(store, Keyring(store, mine), NodeId("n1"), w.voter.address)
        task = asyncio.create_task(TrustKeeper(mine, source, report=say, restart_etcd=restart, store=store).run())
        (mine.directory / renewal.RESTART_FILE).write_bytes(b"")
        await eventually(lambda: task.done() or tries == 4, what="it is tried again")
        assert not task.done()
        assert sum(str(error) in r.getMessage() for r in caplog.records) == 1
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    scenario(etcd, tmp_path, story)


class Refusing(EtcdStore):
    """A voter's gateway that has taken this node's rights away; for a while."""

    refuses = True

    async def _may(self) -> None:
        if self.refuses:
            raise Denied("this node has been revoked", reason="unauthenticated")

    async def list(self, *args: Any, **options: Any) -> Any:
        await self._may()
        return await super().list(*args, **options)

    async def read(self, *args: Any, **options: Any) -> Any:
        await self._may()
        return await super().read(*args, **options)


def test_a_voter_without_a_seat_that_is_refused_goes_on(etcd: Etcd, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "BEAT_POLL_S", 0.05)

    async def story() -> None:
        store = Refusing([etcd.endpoint])
        hub, beats = Hub(store), Beats(_Port(store))  # type: ignore[arg-type]
        tasks = [asyncio.create_task(hub.run()), asyncio.create_task(beats.run())]
        try:
            with pytest.raises(StoreUnavailable):
                async with hub.listen(timeout_s=0.5):
                    pass
            assert not any(t.done() for t in tasks)
            store.refuses = False
            async with hub.listen(timeout_s=5.0) as listener:
                await put(store, keys.task(TaskId("x")), b"x")
                assert (await listener.news(5.0)).changes[0].revision > Revision(0)
            assert not any(t.done() for t in tasks)
        finally:
            for t in tasks:
                t.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await store.close()

    run(story())


class Overloaded(EtcdStore):
    """A voter's gateway that has too much to do: the first calls of each kind are turned away."""

    def __init__(self, endpoints: list[str]) -> None:
        super().__init__(endpoints)
        self.left = Counter(dict.fromkeys(("commit", "read", "list", "watch", "grant", "keep", "revoke"), 3))

    def _turn_away(self, kind: str) -> None:
        if self.left[kind] > 0:
            self.left[kind] -= 1
            raise Busy("too many calls", hint="try again later")

    async def commit(self, *args: Any, **options: Any) -> Any:
        self._turn_away("commit")
        return await super().commit(*args, **options)

    async def read(self, *args: Any, **options: Any) -> Any:
        self._turn_away("read")
        return await super().read(*args, **options)

    async def list(self, *args: Any, **options: Any) -> Any:
        self._turn_away("list")
        return await super().list(*args, **options)

    async def watch(self, prefix: str, *, start: Revision) -> Any:
        self._turn_away("watch")
        async with contextlib.aclosing(super().watch(prefix, start=start)) as changes:
            async for each in changes:
                yield each

    async def grant_lease(self, *args: Any, **options: Any) -> Any:
        self._turn_away("grant")
        return await super().grant_lease(*args, **options)

    async def keep_alive(self, *args: Any, **options: Any) -> Any:
        self._turn_away("keep")
        return await super().keep_alive(*args, **options)

    async def revoke_lease(self, *args: Any, **options: Any) -> Any:
        self._turn_away("revoke")
        return await super().revoke_lease(*args, **options)


def test_a_node_that_is_turned_away_for_a_while_registers_all_the_same(etcd: Etcd, tmp_path: Path) -> None:
    async def story(w: World) -> None:
        await w.joined("n2")
        store = Overloaded([etcd.endpoint])
        node = Node("n2", store)
        try:
            node.start()

            def is_up() -> bool:
                assert node.task is not None
                assert not node.task.done(), node.task
                busy = {kind for kind, n in store.left.items() if n and kind not in ("revoke", "list")}
                return node.agent.session.told and not busy

            await eventually(is_up, within_s=40, what="it is registered")
        finally:
            await node.stop()
            await store.close()

    scenario(etcd, tmp_path, story)


class _Port:
    def __init__(self, store: EtcdStore) -> None:
        self.store = store
