"""Certificates renewed and authorities exchanged, over real TLS and real etcd, with nodes in this process."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import grpc.aio
import pytest

from spinetta import keys
from spinetta import rotation as rotations
from spinetta.access import Authorities, NodeAcl, NodeRole, Policy, UserAcl, UserRole
from spinetta.errors import Denied, OutcomeUnknown, StoreUnavailable, UserError
from spinetta.model import NodeId
from spinetta.node import founding, renewal
from spinetta.node.keyring import Keyring
from spinetta.node.renewal import Report, TrustKeeper, VoterSource, WorkerSource
from spinetta.node.rescue import make_administrator, rescue
from spinetta.node.revival import have_ended, revive
from spinetta.node.services.authorities import RotationKeeper
from spinetta.rotation import under_way
from spinetta.store.etcd import EtcdStore
from spinetta.store.offline import read_offline
from spinetta.store.protocol import Snapshot
from spinetta.trust import certificates
from spinetta.trust.credentials import NodeCredentials, UserCredentials
from spinetta.trust.dial import VOTER, Dialer
from spinetta.v1 import record_pb2 as records
from spinetta.v1 import trust_pb2 as pb
from spinetta.v1.trust_pb2_grpc import TrustStub
from tests.contract import etcds
from tests.contract.api_world import Etcd, delete, etcd, etcd_member, eventually, failure, put, run
from tests.contract.test_cli_secured import Shell
from tests.contract.trust_world import World, acl_key, report, set_record, voter_node, world

__all__ = ["etcd", "etcd_member"]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(renewal, "LOOK_S", 0.05)
    monkeypatch.setattr(renewal, "RETRY_MIN_S", 0.05)
    monkeypatch.setattr(renewal, "RETRY_MAX_S", 0.2)


class Kept:
    """A node's keeper, and what it said."""

    def __init__(self) -> None:
        self.restarts: list[float] = []
        self.at_once = 0
        self.reports: list[Report] = []
        self.denied: list[str] = []


@contextlib.asynccontextmanager
async def kept(w: World, credentials: NodeCredentials, address: str) -> AsyncIterator[Kept]:
    """The keeper of a node's certificates, running; what it reports goes into the node's record."""
    kept_node = Kept()

    async def say(now: Report) -> None:
        kept_node.reports.append(now)
        await report(w.voter.store, credentials.name, address, **asdict(now))

    async def restart() -> None:
        kept_node.restarts.append(time.monotonic())

    if credentials.role is NodeRole.VOTER:
        keyring = Keyring(w.voter.store, credentials)
        source: Any = VoterSource(w.voter.store, keyring, NodeId(credentials.name), address)
        keeper = TrustKeeper(
            credentials, source, report=say, restart_etcd=restart, store=w.voter.store, denied=kept_node.denied.append
        )
    else:
        source = WorkerSource(Dialer.secured(credentials.pems), lambda: (w.voter.address,))
        keeper = TrustKeeper(credentials, source, report=say, denied=kept_node.denied.append)
    task = asyncio.create_task(keeper.run())
    try:
        yield kept_node
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        if isinstance(source, WorkerSource):
            await source.close()


def scenario(etcd: Etcd, directory: Path, story: Callable[[World], Any], **options: Any) -> None:
    async def main() -> None:
        async with world(etcd, directory, **options) as w:
            await story(w)

    run(main())


async def authorities(w: World, kind: str) -> Authorities:
    found = await w.voter.record(Authorities, keys.authority(kind))
    assert found is not None
    return found


def expires_s(credentials: NodeCredentials) -> float:
    return certificates.expiry(credentials.node_pem)[1]


# --- renewal -------------------------------------------------------------------------------------------------------


def test_certificates_are_renewed_in_time_and_connections_go_on(etcd: Etcd, tmp_path: Path) -> None:
    async def story(w: World) -> None:
        worker = await w.joined("n2")
        voter = w.voter.credentials
        assert voter.etcd_pems is not None
        before = expires_s(worker), expires_s(voter), certificates.expiry(voter.etcd_pems.cert_pem)[1]
        async with kept(w, voter, w.voter.address), kept(w, worker, "127.0.0.1:9"):
            end_s = time.time() + 14.0  # more than a whole life
            while time.time() < end_s:
                fresh = await w.voter.trust(worker)
                assert (await fresh.WhoAmI(pb.WhoAmIRequest())).name == "n2"
                await asyncio.sleep(0.5)
            assert voter.etcd_pems is not None
            after = expires_s(worker), expires_s(voter), certificates.expiry(voter.etcd_pems.cert_pem)[1]
            assert all(b > a for a, b in zip(before, after, strict=True))
            assert min(after) > time.time()

    scenario(etcd, tmp_path, story, policy=Policy(node_certificate_s=10.0))


def test_a_new_key_is_good_beside_the_old_one_until_it_is_used(etcd: Etcd, tmp_path: Path) -> None:
    async def story(w: World) -> None:
        old = await w.joined("n2")
        key = certificates.new_key()
        request = pb.RenewRequest(csr=certificates.csr(key, "n2"))
        made = (await (await w.voter.trust(old)).Renew(request)).certificates
        acl = await w.voter.record(NodeAcl, acl_key("n2"))
        assert acl is not None
        assert acl.key_hash == old.identity.key_hash
        assert acl.next_key_hash == certificates.public_key_hash(key)
        await (await w.voter.trust(old)).WhoAmI(pb.WhoAmIRequest())  # the answer may have been lost
        old_pems = old.pems()
        old.update(node_pem=made.certificate, node_key_pem=certificates.key_pem(key))
        await (await w.voter.trust(old)).Renew(request)
        acl = await w.voter.record(NodeAcl, acl_key("n2"))
        assert acl is not None
        assert (acl.key_hash, acl.next_key_hash) == (certificates.public_key_hash(key), b"")

        async def is_out() -> bool:
            async with Dialer.secured(lambda: old_pems).channel(w.voter.address, VOTER) as channel:
                try:
                    await TrustStub(channel).WhoAmI(pb.WhoAmIRequest())
                except Exception:  # noqa: BLE001 - whichever
                    return True
                return False

        await eventually(is_out, what="the old key counts no more")

    scenario(etcd, tmp_path, story)


def test_a_revoked_node_notices(etcd: Etcd, tmp_path: Path) -> None:
    async def story(w: World) -> None:
        worker, voter = await w.joined("n2"), await w.joined("n3", role=1)
        async with kept(w, worker, "127.0.0.1:9") as one, kept(w, voter, "127.0.0.1:8") as other:
            await eventually(lambda: one.reports and other.reports, what="both report")
            for name in ("n2", "n3"):
                await (await w.admin()).SetNode(pb.SetNodeRequest(name=name, revoke=True, reason="stolen"))
            await eventually(lambda: one.denied and other.denied, what="both notice")
            assert "revoked" in one.denied[0] + other.denied[0]

    scenario(etcd, tmp_path, story)


def test_a_worker_asks_another_voter_when_one_is_gone(etcd: Etcd, tmp_path: Path) -> None:
    async def story(w: World) -> None:
        second, worker = await w.joined("n2", role=1), await w.joined("n3")
        addresses = [w.voter.address]
        source = WorkerSource(Dialer.secured(worker.pems), lambda: tuple(addresses))
        async with voter_node(w.voter.store, w.directory / "n2", second) as other:
            addresses[:] = [other.address, w.voter.address]
            assert (await source.look()).generation == 1
        assert (await source.look()).generation == 1
        addresses[:] = [other.address]
        with pytest.raises((StoreUnavailable, OutcomeUnknown)):
            await source.look()
        addresses[:] = []
        with pytest.raises(StoreUnavailable):
            await source.look()
        await source.close()

    scenario(etcd, tmp_path, story)


def test_a_worker_that_poses_as_a_voter_is_not_asked(etcd: Etcd, tmp_path: Path) -> None:
    async def story(w: World) -> None:
        hostile, worker = await w.joined("n2"), await w.joined("n3")
        async with voter_node(w.voter.store, w.directory / "n2", hostile) as impostor:
            source = WorkerSource(Dialer.secured(worker.pems), lambda: (impostor.address,))
            with pytest.raises(StoreUnavailable):
                await source.look()
            await source.close()

    scenario(etcd, tmp_path, story)


def test_a_failure_is_told_ever_more_loudly(etcd: Etcd, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def story(w: World) -> None:
        worker = await w.joined("n2")
        end_s = expires_s(worker)
        source = WorkerSource(Dialer.secured(worker.pems), lambda: ())

        async def say(_: Report) -> None:
            raise AssertionError

        for now_s, level in ((end_s - 19.0, "INFO"), (end_s - 3.0, "WARNING"), (end_s + 1.0, "ERROR")):
            caplog.clear()
            keeper = TrustKeeper(worker, source, report=say, clock=lambda now_s=now_s: now_s)  # type: ignore[misc]
            task = asyncio.create_task(keeper.run())
            await eventually(lambda: [r for r in caplog.records if "cannot be" in r.message or "ended at" in r.message])
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            assert {r.levelname for r in caplog.records if r.name == "spinetta.node"} == {level}

    caplog.set_level("INFO", "spinetta.node")
    scenario(etcd, tmp_path, story, policy=Policy(node_certificate_s=20.0))


class Counted(WorkerSource):
    """Remembers when it was asked."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.asked_s: list[float] = []

    async def look(self) -> renewal.Trust:
        self.asked_s.append(time.monotonic())
        return await super().look()


def test_a_disk_that_takes_no_certificate_is_told_once_and_named_after_the_end(
    etcd: Etcd, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(renewal, "RETRY_MIN_S", 0.5)
    monkeypatch.setattr(renewal, "RETRY_MAX_S", 1.0)
    caplog.set_level("INFO", "spinetta.node")

    def told(level: str) -> list[str]:
        return [r.message for r in caplog.records if r.levelname == level]

    async def say(_: Report) -> None:
        return

    async def story(w: World) -> None:
        worker = await w.joined("n2")
        worker.directory.rename(worker.directory.with_name("away"))
        worker.directory.write_text("in the way")
        now_s = expires_s(worker) - 0.05
        addresses = [w.voter.address]
        source = Counted(Dialer.secured(worker.pems), lambda: tuple(addresses))
        task = asyncio.create_task(TrustKeeper(worker, source, report=say, clock=lambda: now_s).run())
        try:
            await eventually(lambda: len(source.asked_s) >= 3, what="it tries again")
            gaps_s = [b - a for a, b in itertools.pairwise(source.asked_s)]
            assert min(gaps_s) >= 0.8 * renewal.RETRY_MIN_S
            addresses.clear()  # nobody answers a node whose certificate has ended
            now_s += 1.0
            await eventually(lambda: bool(told("ERROR")), what="it tells of the end")
            count = len(source.asked_s)
            await eventually(lambda: len(source.asked_s) >= count + 2, what="it tries again")
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        assert len(told("WARNING")) == 1
        assert len(told("ERROR")) == 1
        for text in (*told("WARNING"), *told("ERROR")):
            assert "credentials cannot be written" in text
        assert "--peers and a join token" in told("ERROR")[0]
        assert "the same node" in told("ERROR")[0]

    scenario(etcd, tmp_path, story, policy=Policy(node_certificate_s=60.0))


def test_a_voter_that_was_off_for_too_long_makes_itself_new_certificates(etcd: Etcd, tmp_path: Path) -> None:
    async def main() -> None:
        store = EtcdStore([etcd.endpoint])
        try:
            long_ago_s = time.time() - 100 * 86400
            mine = await founding.found_cluster(tmp_path / "trust", "n1", "127.0.0.1:7220", now_s=long_ago_s)
            await founding.commit(store, mine)
            assert have_ended(mine, time.time())
            assert await revive(mine, store.read, "127.0.0.1:7220", now_s=time.time())
            assert not have_ended(mine, time.time())
            assert not await revive(mine, store.read, "127.0.0.1:7220", now_s=time.time())
            async with voter_node(store, tmp_path / "n1", mine) as voter:
                assert (await (await voter.trust(mine)).WhoAmI(pb.WhoAmIRequest())).name == "n1"
            await set_record(store, acl_key("n1"), NodeAcl, revoked=True)
            with pytest.raises(Denied):
                await revive(mine, store.read, "127.0.0.1:7220", now_s=time.time() + 100 * 86400)
        finally:
            await store.close()

    run(main())


def test_it_does_so_from_its_own_data_while_no_etcd_runs(tmp_path: Path) -> None:
    async def main() -> None:
        async with etcds.etcd() as member:
            store = EtcdStore([member.client])
            try:
                long_ago_s = time.time() - 100 * 86400
                mine = await founding.found_cluster(tmp_path / "trust", "n1", "127.0.0.1:7220", now_s=long_ago_s)
                await founding.commit(store, mine)
            finally:
                await store.close()
            member.kill()

            async def read_own(those: Sequence[str]) -> Snapshot:
                return await read_offline(member.settings, those)

            assert await revive(mine, read_own, "127.0.0.1:7220", now_s=time.time())
            assert not have_ended(mine, time.time())

    run(main())


def test_a_guest_or_a_bearer_cannot_renew(etcd: Etcd, tmp_path: Path) -> None:
    async def story(w: World) -> None:
        dialer = Dialer.guest(w.voter.credentials.ca_pem)
        csr = certificates.csr(certificates.new_key(), "admin")
        async with dialer.channel(w.voter.address, VOTER) as channel:
            failed = await failure(TrustStub(channel).Renew(pb.RenewRequest(csr=csr)))
            assert failed.detail.reason == "unauthenticated"
        answer = await (await w.admin()).Renew(pb.RenewRequest(csr=csr))
        assert certificates.describe(answer.certificates.certificate).name == "admin"

    scenario(etcd, tmp_path, story)


def test_a_voter_is_told_all_that_there_is_to_tell(etcd: Etcd, tmp_path: Path) -> None:
    async def story(w: World) -> None:
        told = await (await w.voter.trust(w.voter.credentials)).GetTrust(pb.GetTrustRequest())
        assert {f.name for f, _ in told.ListFields()} == set(pb.GetTrustResponse.DESCRIPTOR.fields_by_name)

    scenario(etcd, tmp_path, story)


# --- rotation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["cluster", "etcd"])
def test_an_authority_is_exchanged_under_traffic(etcd: Etcd, tmp_path: Path, kind: str) -> None:
    async def story(w: World) -> None:
        voter, second, worker = w.voter.credentials, await w.joined("n2", role=1), await w.joined("n3")
        old = await authorities(w, kind)
        rotation = RotationKeeper(w.voter.store, w.voter.port.wall_ms)
        calls = 0
        done = asyncio.Event()

        async def traffic() -> None:
            nonlocal calls
            while not done.is_set():  # a new connection each time, by each of them
                for who in (worker, second):
                    assert (await (await w.voter.trust(who)).WhoAmI(pb.WhoAmIRequest())).name == who.name
                    calls += 1

        async def steps() -> None:
            while True:
                await rotation.step()
                await asyncio.sleep(0.05)

        async with (
            kept(w, voter, w.voter.address) as k1,
            kept(w, second, "127.0.0.1:8") as k2,
            kept(w, worker, "127.0.0.1:9") as k3,
            asyncio.TaskGroup() as group,
        ):
            await eventually(lambda: k1.reports and k2.reports and k3.reports, what="all report")
            stepping, calling = group.create_task(steps()), group.create_task(traffic())
            admin = await w.admin()
            await admin.RotateAuthority(pb.RotateAuthorityRequest(kind=kind, overlap_s=1.0))
            assert (await failure(admin.RotateAuthority(pb.RotateAuthorityRequest(kind=kind)))).detail.reason == (
                "rotation-under-way"
            )

            async def over() -> bool:
                found = await authorities(w, kind)
                return found.generation >= 4 and not under_way(found)

            await eventually(over, within_s=40, what="the rotation ends")
            new = await authorities(w, kind)
            assert new.active.certificate_pem != old.active.certificate_pem
            if kind == "cluster":
                await eventually(lambda: worker.ca_pem == new.bundle == second.ca_pem, what="the old one is dropped")
                now_s = time.time()
                assert certificates.identity_of(worker.node_pem, (new.bundle,), voter.cluster, now_s=now_s)
            else:
                await eventually(
                    lambda: second.etcd_pems is not None and second.etcd_pems.ca_pem == new.bundle,
                    what="the old one is dropped",
                )
                await eventually(lambda: len(k1.restarts) == len(k2.restarts) == 2, what="once for each change")
            done.set()
            await calling
            stepping.cancel()
        assert calls > 3

    scenario(etcd, tmp_path, story)


def test_who_was_away_while_it_was_exchanged_comes_back(etcd: Etcd, tmp_path: Path) -> None:
    async def story(w: World) -> None:
        voter, worker = w.voter.credentials, await w.joined("n2")
        rotation = RotationKeeper(w.voter.store, w.voter.port.wall_ms)
        async with kept(w, voter, w.voter.address) as k1:
            await eventually(lambda: k1.reports, what="the voter reports")
            await (await w.admin()).RotateAuthority(pb.RotateAuthorityRequest(kind="cluster", overlap_s=60.0))

            async def moved() -> bool:
                await rotation.step()
                return (await authorities(w, "cluster")).generation == 3 and voter.ca_pem.count(b"BEGIN") == 2

            await eventually(moved, what="the new one signs")
            new = (await authorities(w, "cluster")).active.certificate_pem
            await eventually(lambda: _is_by(voter.node_pem, new), what="the voter shows a certificate by it")
            assert worker.ca_pem != voter.ca_pem  # it knows the old one only, and believes the new one by it
            async with kept(w, worker, "127.0.0.1:9"):
                await eventually(lambda: _is_by(worker.node_pem, new), what="the worker has caught up")
            who = await (await w.voter.trust(w.admin_credentials)).WhoAmI(pb.WhoAmIRequest())
            assert who.name == "admin"  # whose file knows the old one only

    scenario(etcd, tmp_path, story)


def _is_by(pem: bytes, authority: bytes) -> bool:
    cluster = certificates.cluster_of(authority)
    return certificates.identity_of(pem, (authority,), cluster, now_s=time.time()) is not None


def test_who_ends_an_overlap_is_not_shut_out_by_it(etcd: Etcd, tmp_path: Path) -> None:
    async def story(w: World) -> None:
        admin, rotation = await w.admin(), RotationKeeper(w.voter.store, w.voter.port.wall_ms)
        retire = pb.RotateAuthorityRequest(kind="cluster", retire_now=True)
        assert (await failure(admin.RotateAuthority(retire))).detail.reason == "no-rotation"
        await admin.RotateAuthority(pb.RotateAuthorityRequest(kind="cluster"))
        assert (await failure(admin.RotateAuthority(retire))).detail.reason == "not-signing-yet"
        async with kept(w, w.voter.credentials, w.voter.address):

            async def stepped_to(generation: int) -> bool:
                await rotation.step()
                return (await authorities(w, "cluster")).generation == generation

            await eventually(lambda: stepped_to(3), what="the new one signs")
            assert (await failure(admin.RotateAuthority(retire))).detail.reason == "would-shut-out"
            key = certificates.new_key()
            made = (await admin.Renew(pb.RenewRequest(csr=certificates.csr(key, "x")))).certificates
            leaf = certificates.split_pem(made.certificate)[0]
            fresh = UserCredentials.create(made.ca_bundle, leaf, certificates.key_pem(key))
            again = await w.voter.trust(fresh)
            await again.RotateAuthority(retire)
            await eventually(lambda: stepped_to(4), what="the old one is gone")
            assert (await (await w.voter.trust(fresh)).WhoAmI(pb.WhoAmIRequest())).name == "admin"

    scenario(etcd, tmp_path, story)


def test_an_administrator_is_made_on_a_voters_machine(etcd: Etcd, tmp_path: Path) -> None:
    async def story(w: World) -> None:
        store, mine = w.voter.store, w.voter.credentials
        await set_record(store, keys.acl_user("admin"), UserAcl, revoked=True, role=UserRole.VIEWER)
        for name in ("admin", "bob", "bob"):
            made = await make_administrator(store, mine, name, now_s=time.time())
            await eventually(lambda made=made: is_admin(w, made), what="it counts")  # type: ignore[misc]
        worker = await w.joined("n2")
        with pytest.raises(UserError):
            await make_administrator(store, worker, "eve", now_s=time.time())
        assert await w.voter.record(UserAcl, keys.acl_user("eve")) is None
        with pytest.raises(UserError):
            await rescue(tmp_path / "nowhere")

    scenario(etcd, tmp_path, story)


async def is_admin(w: World, credentials: UserCredentials) -> bool:
    try:
        return (await (await w.voter.trust(credentials)).WhoAmI(pb.WhoAmIRequest())).role == "admin"
    except grpc.aio.AioRpcError:
        return False


def test_a_rotation_waits_for_every_live_node_and_no_other(etcd: Etcd, tmp_path: Path) -> None:
    async def story(w: World) -> None:
        await w.joined("n2")
        await report(w.voter.store, "n2", "127.0.0.1:9", trust_generation=1)
        rotation = RotationKeeper(w.voter.store, w.voter.port.wall_ms)
        async with kept(w, w.voter.credentials, w.voter.address):
            await (await w.admin()).RotateAuthority(pb.RotateAuthorityRequest(kind="cluster"))
            await eventually(lambda: w.voter.credentials.ca_pem.count(b"BEGIN") == 2, what="the voter believes it")
            for _ in range(5):
                await rotation.step()
            assert (await authorities(w, "cluster")).generation == 2
            shown = await (await w.admin()).ListAuthorities(pb.ListAuthoritiesRequest())
            assert {(a.nodes_believing, a.nodes) for a in shown.authorities if a.kind == "cluster"} == {(1, 2)}
            await delete(w.voter.store, keys.node(NodeId("n2")))

            async def moved() -> bool:
                await rotation.step()
                return (await authorities(w, "cluster")).generation == 3

            await eventually(moved, what="it goes on without the one that is gone")

    scenario(etcd, tmp_path, story)


def test_a_worker_that_does_not_move_is_named_and_left_behind(
    etcd: Etcd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rotations, "PATIENCE_MS", 300)

    async def story(w: World) -> None:
        stuck = await w.joined("n2")
        await report(w.voter.store, "n2", "127.0.0.1:9", trust_generation=1, authority_signed=1)
        rotation = RotationKeeper(w.voter.store, w.voter.port.wall_ms)
        admin = await w.admin()

        async def waits_for() -> set[tuple[str, ...]]:
            shown = await admin.ListAuthorities(pb.ListAuthoritiesRequest())
            return {tuple(a.lagging) for a in shown.authorities if a.kind == "cluster"}

        assert await waits_for() == {()}
        async with kept(w, w.voter.credentials, w.voter.address):
            await admin.RotateAuthority(pb.RotateAuthorityRequest(kind="cluster", overlap_s=2.0))

            async def stepped_to(generation: int) -> bool:
                await rotation.step()
                return (await authorities(w, "cluster")).generation == generation

            async def is_last() -> bool:
                return not await stepped_to(3) and await waits_for() == {("n2",)}

            await eventually(is_last, what="only the worker lags")
            await eventually(lambda: stepped_to(3), what="the overlap ends")
            assert (await (await w.voter.trust(stuck)).WhoAmI(pb.WhoAmIRequest())).name == "n2"
            await eventually(lambda: stepped_to(4), what="it goes on without the worker")
            assert await waits_for() == {()}

            async def is_out() -> bool:
                try:
                    await (await w.voter.trust(stuck)).WhoAmI(pb.WhoAmIRequest())
                except grpc.aio.AioRpcError:
                    return True
                return False

            await eventually(is_out, what="the worker is left behind")

    scenario(etcd, tmp_path, story)


def test_a_node_whose_rights_cannot_be_read_may_be_a_voter_and_is_waited_for(
    etcd: Etcd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rotations, "PATIENCE_MS", 0)

    async def story(w: World) -> None:
        rotation = RotationKeeper(w.voter.store, w.voter.port.wall_ms)
        admin = await w.admin()
        await put(w.voter.store, acl_key("n9"), b"\xff garbage")
        await report(w.voter.store, "n9", "127.0.0.1:9")
        async with kept(w, w.voter.credentials, w.voter.address):
            await admin.RotateAuthority(pb.RotateAuthorityRequest(kind="cluster", overlap_s=0.001))
            await eventually(lambda: w.voter.credentials.ca_pem.count(b"BEGIN") == 2, what="the voter believes it")
            for _ in range(5):
                await rotation.step()
            found = await authorities(w, "cluster")
            assert found.generation == 2
            assert {x.node for e in found.entries for x in e.wraps} == {"n1"}
            shown = await admin.ListAuthorities(pb.ListAuthoritiesRequest())
            assert [a.lagging for a in shown.authorities if a.kind == "cluster"] == [["n9"]] * 2
            failed = await failure(admin.RotateAuthority(pb.RotateAuthorityRequest(kind="cluster", retire_now=True)))
            assert failed.detail.reason == "not-signing-yet"
            assert "n9" in failed.detail.message

    scenario(etcd, tmp_path, story)


def test_the_command_drops_the_old_authority_and_its_user_stays_in(
    etcd: Etcd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rotations, "PATIENCE_MS", 300)

    async def story(w: World) -> None:
        admin = Shell(w, tmp_path / "home")
        path = tmp_path / "mine.pem"
        w.admin_credentials.to_file(path)
        admin.env["SPINETTA_CREDENTIALS"] = str(path)
        rotation = RotationKeeper(w.voter.store, w.voter.port.wall_ms)
        await w.joined("n2")  # a worker that never moves
        await report(w.voter.store, "n2", "127.0.0.1:9", trust_generation=1, authority_signed=1)
        async with kept(w, w.voter.credentials, w.voter.address) as k1, asyncio.TaskGroup() as group:

            async def steps() -> None:
                while True:
                    await rotation.step()
                    await asyncio.sleep(0.05)

            stepping = group.create_task(steps())
            old = (await authorities(w, "cluster")).active.certificate_pem
            await admin.good("cluster", "rotate-ca", "--kind", "cluster")
            await eventually(lambda: k1.reports[-1].trust_generation == 2, what="the voter believes it")
            assert "waits for n2" in (await admin.good("cluster", "authorities")).err
            assert _is_by(UserCredentials.from_file(path).cert_pem, old)
            ended = await admin.good("cluster", "rotate-ca", "--kind", "cluster", "--retire-now", "--yes")
            assert "n2" in ended.err

            async def is_gone() -> bool:
                found = await authorities(w, "cluster")
                return not under_way(found) and found.active.certificate_pem != old

            await eventually(is_gone, what="the old one is dropped")
            await eventually(lambda: w.voter.credentials.ca_pem.count(b"BEGIN") == 1, what="nobody believes it")
            assert (await admin.json("whoami"))["name"] == "admin"
            stepping.cancel()

    scenario(etcd, tmp_path, story)


def test_a_voter_that_joins_during_a_rotation_can_sign_with_both(etcd: Etcd, tmp_path: Path) -> None:
    async def story(w: World) -> None:
        await (await w.admin()).RotateAuthority(pb.RotateAuthorityRequest(kind="cluster"))
        second = await w.joined("n2", role=1)
        found = await authorities(w, "cluster")
        assert all({x.node for x in e.wraps} == {"n1", "n2"} for e in found.entries)
        async with voter_node(w.voter.store, w.directory / "n2", second) as other:
            admin = await other.trust(w.admin_credentials)
            assert (await admin.CreateToken(pb.CreateTokenRequest(role=records.TOKEN_ROLE_WORKER))).token
        await (await w.admin()).SetNode(pb.SetNodeRequest(name="n2", revoke=True))
        found = await authorities(w, "cluster")
        assert all({x.node for x in e.wraps} == {"n1"} for e in found.entries)

    scenario(etcd, tmp_path, story)


def test_a_disk_that_takes_nothing_does_not_end_the_keeper(
    etcd: Etcd, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="spinetta.node")

    async def story(w: World) -> None:
        async with kept(w, w.voter.credentials, w.voter.address) as node:
            await eventually(lambda: bool(node.reports), what="the first look")
            in_the_way = w.voter.credentials.directory / renewal.RESTART_FILE
            in_the_way.mkdir()  # the marker can be neither written nor removed
            await eventually(lambda: renewal.RESTART_FILE in caplog.text, what="it cannot be removed")
            await (await w.admin()).RotateAuthority(pb.RotateAuthorityRequest(kind="etcd"))
            assert node.reports[-1].etcd_trust_generation <= 1
            in_the_way.rmdir()
            await eventually(lambda: node.reports[-1].etcd_trust_generation == 2, what="it believes the new authority")
            assert caplog.text.count(renewal.RESTART_FILE) == 1  # told once

    scenario(etcd, tmp_path, story)


def test_one_voter_restarts_at_a_time(etcd: Etcd, tmp_path: Path) -> None:
    async def story(w: World) -> None:
        others = [await w.joined(f"n{i}", role=1) for i in (2, 3)]
        at_once = most = count = 0

        async def restart() -> None:
            nonlocal at_once, most, count
            at_once += 1
            most, count = max(most, at_once), count + 1
            await asyncio.sleep(0.2)
            at_once -= 1

        async def say(_: Report) -> None:
            return

        async with asyncio.TaskGroup() as group:
            tasks = []
            for c in (w.voter.credentials, *others):
                source = VoterSource(w.voter.store, Keyring(w.voter.store, c), NodeId(c.name), "127.0.0.1:8")
                keeper = TrustKeeper(c, source, report=say, restart_etcd=restart, store=w.voter.store)
                tasks.append(group.create_task(keeper.run()))
            await (await w.admin()).RotateAuthority(pb.RotateAuthorityRequest(kind="etcd"))
            await eventually(lambda: count == 3, what="each has restarted")
            assert most == 1
            for task in tasks:
                task.cancel()

    scenario(etcd, tmp_path, story)
