"""The door: tokens of every kind of badness, names, keys and clocks, over real TLS and real etcd."""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest

from spinetta import keys, tokens, trustcodec
from spinetta.access import Authorities, JoinRequest, NodeAcl, NodeRole, Policy, TokenRecord, TokenRole, UserAcl
from spinetta.config import Settings
from spinetta.errors import UserError
from spinetta.model import NodeId
from spinetta.node import founding
from spinetta.node.admission import admit
from spinetta.node.enlist import enlist
from spinetta.node.keyring import Keyring
from spinetta.store.etcd import EtcdStore
from spinetta.trust import certificates
from spinetta.trust.credentials import NodeCredentials, PendingKeys, UserCredentials
from spinetta.trust.dial import VOTER, Dialer
from spinetta.v1 import record_pb2 as records
from spinetta.v1 import trust_pb2 as pb
from spinetta.v1.trust_pb2_grpc import EnrollStub, TrustStub
from tests.contract.api_world import Etcd, Failed, etcd, etcd_member, eventually, failure, run
from tests.contract.trust_world import Newcomer, World, acl_key, saved, set_record, world

__all__ = ["etcd", "etcd_member"]

VOTER_ROLE, CLIENT_ROLE = 1, 3
Story = Callable[[World], Awaitable[None]]


@pytest.fixture
def play(etcd: Etcd, tmp_path: Path) -> Callable[..., None]:
    def go(story: Story, **options: Any) -> None:
        async def main() -> None:
            async with world(etcd, tmp_path, **options) as w:
                await story(w)

        run(main())

    return go


async def refused(w: World, token: str, name: str = "n2", **changes: Any) -> Failed:
    return await failure(w.join(Newcomer(name), token, **changes))


# --- what goes well ------------------------------------------------------------------------------------------------


def test_a_worker_joins_and_is_known(play: Callable[..., None]) -> None:
    async def story(w: World) -> None:
        credentials = await w.joined("n2", clearances=["phi", "eu"])
        assert (credentials.name, credentials.role, credentials.etcd_pems) == ("n2", NodeRole.WORKER, None)
        acl = await w.voter.record(NodeAcl, acl_key("n2"))
        assert acl is not None
        assert acl.role is NodeRole.WORKER
        assert acl.effective == ("eu", "phi")
        assert acl.key_hash == credentials.identity.key_hash
        who = await (await w.voter.trust(credentials)).WhoAmI(pb.WhoAmIRequest())
        assert (who.kind, who.name, who.role) == ("node", "n2", "worker")
        authorities = await w.voter.record(Authorities, keys.authority("cluster"))
        assert authorities is not None
        assert [x.node for x in authorities.active.wraps] == ["n1"]  # a worker is not given the authority's key

    play(story)


def test_a_voter_gets_etcd_certificates_and_can_sign(play: Callable[..., None]) -> None:
    async def story(w: World) -> None:
        credentials = await w.joined("n2", role=VOTER_ROLE)
        assert credentials.role is NodeRole.VOTER
        assert credentials.etcd_pems is not None
        other = Keyring(w.voter.store, credentials)
        known = await other.read()
        key = certificates.new_key()
        made = other.sign_user(known, certificates.csr(key, "x"), name="ann", now_s=time.time(), lifetime_s=60)
        identity = certificates.identity_of(made, (credentials.ca_pem,), credentials.cluster, now_s=time.time())
        assert identity is not None
        assert identity.name == "ann"

    play(story)


def test_asked_again_with_the_same_key_it_gets_the_same_answer(play: Callable[..., None]) -> None:
    async def story(w: World) -> None:
        newcomer, token = Newcomer("n2"), await w.token()
        for _ in range(3):
            assert (await w.join(newcomer, token)).decision == pb.JoinResponse.APPROVED
        record = await w.voter.record(TokenRecord, keys.token(tokens.parse(token).id))
        assert record is not None
        assert record.uses_left == 0

    play(story)


def test_a_token_joined_with_enlist(play: Callable[..., None]) -> None:
    async def story(w: World) -> None:
        said: list[str] = []
        token = await w.token(VOTER_ROLE)
        directory = w.directory / "n2" / "trust"
        made = await enlist(
            [w.voter.address], token, name="n2", address="127.0.0.1:7221", directory=directory, say=said.append
        )
        assert (made.name, made.cluster, made.role) == ("n2", w.voter.credentials.cluster, NodeRole.VOTER)
        assert not (directory / "pending.pem").exists()
        assert said

    play(story)


def test_a_node_whose_certificate_has_ended_joins_anew_with_the_keys_it_has(play: Callable[..., None]) -> None:
    async def story(w: World) -> None:
        async def join(**more: Any) -> NodeCredentials:
            return await enlist(
                [w.voter.address],
                await w.token(),
                name="n2",
                address="127.0.0.1:7221",
                directory=w.directory / "n2" / "trust",
                say=lambda _: None,
                **more,
            )

        first = await join()
        second = await join(own=first)
        assert second.identity.key_hash == first.identity.key_hash
        assert second.serial > first.serial
        with pytest.raises(UserError) as caught:
            await join()
        assert caught.value.reason == "name-taken"

    play(story)


# --- bad tokens ----------------------------------------------------------------------------------------------------


def test_expired(play: Callable[..., None]) -> None:
    async def story(w: World) -> None:
        token = await w.token()
        await set_record(w.voter.store, keys.token(tokens.parse(token).id), TokenRecord, expires_ms=1_000_000)
        failed = await refused(w, token)
        assert failed.code is grpc.StatusCode.PERMISSION_DENIED
        assert failed.detail.reason == "token-expired"
        assert "1970" in failed.text
        assert "spinetta token create" in failed.detail.hint

    play(story)


def test_spent(play: Callable[..., None]) -> None:
    async def story(w: World) -> None:
        token = await w.token()
        await w.join(Newcomer("n2"), token)
        assert (await refused(w, token, "n3")).detail.reason == "token-spent"
        assert await w.voter.record(NodeAcl, acl_key("n3")) is None

    play(story)


def test_revoked(play: Callable[..., None]) -> None:
    async def story(w: World) -> None:
        token = await w.token()
        await (await w.admin()).RevokeToken(pb.RevokeTokenRequest(id=tokens.parse(token).id))
        assert (await refused(w, token)).detail.reason == "token-revoked"

    play(story)


def test_unknown_id_and_wrong_secret_have_the_same_words(play: Callable[..., None]) -> None:
    async def story(w: World) -> None:
        real = tokens.parse(await w.token())
        wrong_secret = tokens.format(tokens.JoinToken(real.role, real.authority_hash, real.id, bytes(16)))
        wrong_id = tokens.format(tokens.JoinToken(real.role, real.authority_hash, "aaaaaaaa", real.secret))
        wrong_role = tokens.format(tokens.JoinToken(TokenRole.VOTER, real.authority_hash, real.id, real.secret))
        failures = [await refused(w, t) for t in (wrong_secret, wrong_id, wrong_role)]
        assert {f.detail.reason for f in failures} == {"token-unknown"}
        assert len({f.text for f in failures}) == 1

    play(story)


def test_foreign(play: Callable[..., None]) -> None:
    async def story(w: World) -> None:
        real = tokens.parse(await w.token())
        foreign = tokens.format(tokens.JoinToken(real.role, bytes(32), real.id, real.secret))
        assert (await refused(w, foreign)).detail.reason == "token-foreign"

    play(story)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda t: t[:-12], "token-truncated"),
        (lambda t: t[:-1] + ("a" if t[-1] != "a" else "b"), "token-altered"),
        (lambda _: "hello", "not-a-token"),
        (lambda _: "", "not-a-token"),
    ],
)
def test_spoiled(play: Callable[..., None], spoil: Callable[[str], str], reason: str) -> None:
    async def story(w: World) -> None:
        token = await w.token()
        failed = await refused(w, spoil(token))
        assert failed.detail.reason == reason
        assert tokens.parse(token).id not in failed.text

    play(story)


def test_a_clients_token_is_not_for_nodes_nor_a_nodes_for_people(play: Callable[..., None]) -> None:
    async def story(w: World) -> None:
        client = await w.token(CLIENT_ROLE, user="admin")
        assert (await refused(w, client)).detail.reason == "token-role"
        request = pb.LoginRequest(
            token=await w.token(),
            csr=certificates.csr(certificates.new_key(), "x"),
            wall_ms=time.time_ns() // 1_000_000,
        )
        assert (await failure((await w.voter.enroll()).Login(request))).detail.reason == "token-role"

    play(story)


def test_who_tries_many_tokens_has_to_wait(play: Callable[..., None]) -> None:
    async def story(w: World) -> None:
        real = tokens.parse(await w.token())
        for i in range(20):
            guess = tokens.JoinToken(real.role, real.authority_hash, real.id, bytes([i]) * 16)
            failed = await refused(w, tokens.format(guess))
            if failed.detail.reason == "busy":
                break
        assert failed.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert (await refused(w, tokens.format(real))).detail.reason == "busy"  # also with the right one

    play(story, is_patient=False)


# --- names, keys, clocks -------------------------------------------------------------------------------------------


def test_a_taken_name_is_refused_and_costs_no_use(play: Callable[..., None]) -> None:
    async def story(w: World) -> None:
        token = await w.token(uses=5)
        await w.join(Newcomer("n2"), token)
        failed = await refused(w, token, "n2")  # the same name, the same token, another key
        assert failed.code is grpc.StatusCode.ALREADY_EXISTS
        assert failed.detail.reason == "name-taken"
        assert (await refused(w, token, "n1")).detail.reason == "name-taken"
        record = await w.voter.record(TokenRecord, keys.token(tokens.parse(token).id))
        assert record is not None
        assert record.uses_left == 4

    play(story)


def test_the_same_certificate_key_with_another_sealing_key_is_another_machine(play: Callable[..., None]) -> None:
    async def story(w: World) -> None:
        token, newcomer = await w.token(uses=5), Newcomer("n2")
        await w.join(newcomer, token)
        newcomer.private = Newcomer("x").private
        assert (await failure(w.join(newcomer, token))).detail.reason == "name-taken"

    play(story)


def test_a_request_in_anothers_name_gives_a_certificate_in_ones_own(play: Callable[..., None]) -> None:
    async def story(w: World) -> None:
        newcomer = Newcomer("n2")
        csr = certificates.csr(newcomer.key, "n1")
        answer = await w.join(newcomer, await w.token(), csr=csr)
        assert certificates.describe(answer.certificates.certificate).name == "n2"

    play(story)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"name": "../n1"}, "name"),
        ({"name": "n" * 64}, "name"),
        ({"address": "nowhere"}, "address"),
        ({"csr": b"junk"}, "csr"),
        ({"csr": b""}, "csr"),
        ({"csr": b"x" * 5000}, "csr"),
        ({"etcd_csr": b"x" * 5000}, "etcd_csr"),
        ({"etcd_csr": b"junk"}, "csr"),
        ({"sealing_key": b"short"}, "sealing_key"),
        ({"version": "x" * 100}, "version"),
        ({"version": "9.0.0"}, "version"),
    ],
)
def test_what_cannot_be_used_is_named(play: Callable[..., None], changes: dict[str, Any], field: str) -> None:
    async def story(w: World) -> None:
        token = await w.token()
        failed = await refused(w, token, **changes)
        assert failed.code is grpc.StatusCode.INVALID_ARGUMENT
        assert failed.detail.field == field
        assert (await w.join(Newcomer("n2"), token)).decision == pb.JoinResponse.APPROVED  # it has cost nothing

    play(story)


def test_clocks_apart_both_times_are_told(play: Callable[..., None]) -> None:
    async def story(w: World) -> None:
        failed = await refused(w, await w.token(), wall_ms=(time.time_ns() // 1_000_000) - 3_600_000)
        assert failed.detail.reason == "clock-skew"
        assert failed.text.count("UTC") == 2

    play(story)


# --- races ---------------------------------------------------------------------------------------------------------


def test_of_two_with_one_use_one_wins(play: Callable[..., None]) -> None:
    async def story(w: World) -> None:
        token = await w.token()
        results = await asyncio.gather(*(w.join(Newcomer(f"m{i}"), token) for i in range(6)), return_exceptions=True)
        assert sum(isinstance(r, pb.JoinResponse) for r in results) == 1
        acls = await w.voter.store.list(keys.ACL_NODE, keys_only=True)
        assert len(acls.entries) == 2

    play(story)


def test_many_with_one_token_all_come_in(play: Callable[..., None]) -> None:
    async def story(w: World) -> None:
        token = await w.token(uses=20)
        answers = await asyncio.gather(*(w.join(Newcomer(f"m{i}"), token) for i in range(20)))
        assert all(a.decision == pb.JoinResponse.APPROVED for a in answers)

    play(story)


def test_of_two_for_one_name_one_wins(play: Callable[..., None]) -> None:
    async def story(w: World) -> None:
        token = await w.token(uses=5)
        results = await asyncio.gather(*(w.join(Newcomer("same"), token) for _ in range(4)), return_exceptions=True)
        assert sum(isinstance(r, pb.JoinResponse) for r in results) == 1

    play(story)


@pytest.mark.parametrize("approval", [False, True])
@pytest.mark.parametrize("is_made", [False, True])
def test_an_answer_of_the_store_is_lost(play: Callable[..., None], approval: bool, is_made: bool) -> None:
    async def story(w: World) -> None:
        token = await w.token(approval=approval)
        w.meddling.lost, w.meddling.undone = (2, 0) if is_made else (0, 2)
        answer = await w.join(Newcomer("n2"), token)
        assert answer.decision == (pb.JoinResponse.PENDING if approval else pb.JoinResponse.APPROVED)
        record = await w.voter.record(TokenRecord, keys.token(tokens.parse(token).id))
        assert record is not None
        assert record.uses_left == 0

    play(story)


@pytest.mark.parametrize("is_made", [False, True])
def test_a_login_whose_answer_is_lost(play: Callable[..., None], is_made: bool) -> None:
    async def story(w: World) -> None:
        token = await w.token(CLIENT_ROLE, user="admin")
        w.meddling.lost, w.meddling.undone = (1, 0) if is_made else (0, 1)
        csr = certificates.csr(certificates.new_key(), "x")
        request = pb.LoginRequest(token=token, csr=csr, wall_ms=time.time_ns() // 1_000_000)
        assert (await (await w.voter.enroll()).Login(request)).user == "admin"

    play(story)


def test_the_token_is_revoked_in_the_middle(play: Callable[..., None]) -> None:
    async def story(w: World) -> None:
        token = await w.token()
        key = keys.token(tokens.parse(token).id)
        w.meddling.before.append(lambda: set_record(w.voter.store, key, TokenRecord, revoked=True))
        assert (await refused(w, token)).detail.reason == "token-revoked"
        assert await w.voter.record(NodeAcl, acl_key("n2")) is None

    play(story)


def test_approval_is_asked_for_in_the_middle(play: Callable[..., None]) -> None:
    async def story(w: World) -> None:
        token = await w.token()
        w.meddling.before.append(lambda: set_record(w.voter.store, keys.POLICY, Policy, approval=True))
        assert (await w.join(Newcomer("n2"), token)).decision == pb.JoinResponse.PENDING

    play(story)


def test_an_authority_is_exchanged_in_the_middle(play: Callable[..., None]) -> None:
    async def story(w: World) -> None:
        token, admin = await w.token(VOTER_ROLE), await w.admin()

        async def rotate() -> None:
            await admin.RotateAuthority(pb.RotateAuthorityRequest(kind="cluster"))

        w.meddling.before.append(rotate)
        newcomer = Newcomer("n2")
        assert (await w.join(newcomer, token)).decision == pb.JoinResponse.APPROVED
        found = await w.voter.record(Authorities, keys.authority("cluster"))
        assert found is not None
        assert all({x.node for x in e.wraps} == {"n1", "n2"} for e in found.entries)
        assert len(found.entries) == 2

    play(story)


# --- approval ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("approve", [True, False])
@pytest.mark.parametrize("lost", [0, 1])
def test_the_audit_log_tells_of_changes_and_not_of_waiting(play: Callable[..., None], approve: bool, lost: int) -> None:
    async def story(w: World) -> None:
        newcomer, token = Newcomer("n2"), await w.token(approval=True)

        def told() -> list[tuple[str, str]]:
            return [(a[0], a[3]) for a in w.voter.port.audited if "n2" in a[2]]

        door = await w.voter.enroll()
        before = len(w.voter.port.audited)
        for _ in range(3):
            await door.GetAuthorities(pb.GetAuthoritiesRequest())  # public
        assert len(w.voter.port.audited) == before
        w.meddling.lost = lost
        for _ in range(5):
            assert (await w.join(newcomer, token)).decision == pb.JoinResponse.PENDING
        assert told() == [("enroll", "ok")]
        decision = pb.DecideJoinRequest(name="n2", approve=approve, key_hash=newcomer.key_hash)
        await (await w.admin()).DecideJoin(decision)
        assert told() == [("enroll", "ok"), ("access-change", "ok")]
        for _ in range(3):
            answer = await w.join(newcomer, token)
            assert answer.decision == (pb.JoinResponse.APPROVED if approve else pb.JoinResponse.REJECTED)
        # Each certificate is told of.
        assert told()[2:] == [("enroll", "ok")] * (3 if approve else 0)

    play(story)


def test_an_approved_node(play: Callable[..., None]) -> None:
    async def story(w: World) -> None:
        newcomer, token = Newcomer("n2"), await w.token(VOTER_ROLE, approval=True, clearances=["phi"])
        assert (await w.join(newcomer, token)).decision == pb.JoinResponse.PENDING
        assert (await w.join(newcomer, token)).decision == pb.JoinResponse.PENDING
        assert await w.voter.record(NodeAcl, acl_key("n2")) is None
        assert (await refused(w, await w.token(), "n2")).detail.reason == "name-taken"
        admin = await w.admin()
        listed = await admin.ListAccess(pb.ListAccessRequest())
        assert [r.name for r in listed.requests] == ["n2"]
        for _ in range(2):
            decision = pb.DecideJoinRequest(
                name="n2", approve=True, clearances=["eu"], set_clearances=True, key_hash=newcomer.key_hash
            )
            await admin.DecideJoin(decision)
        answer = await w.join(newcomer, token)
        assert answer.decision == pb.JoinResponse.APPROVED
        assert list(answer.clearances) == ["eu"]
        assert await w.voter.record(JoinRequest, keys.request(NodeId("n2"))) is None
        await Keyring(w.voter.store, saved(w.directory / "x", newcomer, answer.certificates)).read()

    play(story)


def test_a_rejected_node(play: Callable[..., None]) -> None:
    async def story(w: World) -> None:
        newcomer, token = Newcomer("n2"), await w.token(approval=True)
        await w.join(newcomer, token)
        admin = await w.admin()
        await admin.DecideJoin(pb.DecideJoinRequest(name="n2", approve=False))
        assert (await w.join(newcomer, token)).decision == pb.JoinResponse.REJECTED
        await w.join(Newcomer("n2"), await w.token())  # the name is free for another machine

    play(story)


def test_the_policy_asks_for_approval(play: Callable[..., None]) -> None:
    async def story(w: World) -> None:
        assert (await w.join(Newcomer("n2"), await w.token())).decision == pb.JoinResponse.PENDING

    play(story, policy=Policy(approval=True))


def test_enlist_waits_and_goes_on_after_a_restart(play: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spinetta.node.enlist.ASK_AGAIN_S", 0.05)

    async def story(w: World) -> None:
        token, directory, said = await w.token(approval=True), w.directory / "n2" / "trust", list[str]()
        ask = enlist(
            [w.voter.address], token, name="n2", address="127.0.0.1:7221", directory=directory, say=said.append
        )
        waiting = asyncio.create_task(ask)
        await eventually(lambda: said, what="it says that it waits")
        assert "spinetta node approve n2" in said[0]
        waits = await w.voter.record(JoinRequest, keys.request(NodeId("n2")))
        assert waits is not None
        assert said[0].endswith(f" {waits.key_hash.hex()[:16]}")  # what an administrator compares
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        before = PendingKeys.load_or_create(directory).node_key_pem
        admin = await w.admin()
        [request] = (await admin.ListAccess(pb.ListAccessRequest())).requests
        await admin.DecideJoin(pb.DecideJoinRequest(name="n2", approve=True, key_hash=request.key_hash))
        again = Settings(name="n2", data_dir=str(directory.parent), address="127.0.0.1:7221", tls="on")
        with pytest.raises(UserError) as caught:
            await admit(replace(again, peers=(w.voter.address,)), directory.parent, None)
        assert "the same command with the same token" in caught.value.hint
        made = await enlist(
            [w.voter.address], token, name="n2", address="127.0.0.1:7221", directory=directory, say=said.append
        )
        assert made.node_key_pem == before

    play(story)


def test_revoked_in_the_middle(play: Callable[..., None]) -> None:
    async def story(w: World) -> None:
        newcomer, token = Newcomer("n2"), await w.token()
        await w.join(newcomer, token)
        admin = await w.admin()
        await admin.SetNode(pb.SetNodeRequest(name="n2", revoke=True, reason="stolen"))
        failed = await failure(w.join(newcomer, token))
        assert failed.detail.reason == "revoked"
        assert "stolen" in failed.text
        await admin.SetNode(pb.SetNodeRequest(name="n2", remove=True))
        assert (await failure(w.join(newcomer, token))).detail.reason == "token-spent"

    play(story)


# --- the joining side ----------------------------------------------------------------------------------------------


async def enlisting(w: World, token: str, **changes: Any) -> UserError:
    options: dict[str, Any] = {"name": "n2", "address": "127.0.0.1:7221", "directory": w.directory / "n2" / "trust"}
    with pytest.raises(UserError) as caught:
        await enlist([w.voter.address], token, say=lambda _: None, **(options | changes))
    return caught.value


def test_the_joining_side_compares_the_hash_before_it_shows_the_secret(play: Callable[..., None]) -> None:
    async def story(w: World) -> None:
        real = tokens.parse(await w.token())
        foreign = tokens.format(tokens.JoinToken(real.role, bytes(32), real.id, real.secret))
        assert (await enlisting(w, foreign)).reason == "other-cluster"
        assert not any(a[0] == "enroll" and "n2" in a[2] for a in w.voter.port.audited)  # no Join has been seen

    play(story)


def test_the_joining_side_says_what_is_wrong(play: Callable[..., None]) -> None:
    async def story(w: World) -> None:
        assert (await enlisting(w, "")).reason == "no-token"
        assert (await enlisting(w, await w.token(CLIENT_ROLE, user="admin"))).reason == "token-role"
        assert (await enlisting(w, await w.token(), role=NodeRole.VOTER)).reason == "token-role"
        assert (await enlisting(w, await w.token(), name="n1")).reason == "name-taken"
        token = await w.token()
        await (await w.admin()).RevokeToken(pb.RevokeTokenRequest(id=tokens.parse(token).id))
        assert (await enlisting(w, token)).reason == "token-revoked"

    play(story)


# --- people --------------------------------------------------------------------------------------------------------


def test_login_again_with_the_same_key(play: Callable[..., None]) -> None:
    async def story(w: World) -> None:
        admin = await w.admin()
        await admin.SetUser(
            pb.SetUserRequest(user=records.UserAcl(name="ann", role=records.USER_ROLE_USER), create=True)
        )
        token, key = await w.token(CLIENT_ROLE, user="ann"), certificates.new_key()
        enroll = await w.voter.enroll()

        def request(k: certificates.PrivateKey) -> pb.LoginRequest:
            return pb.LoginRequest(token=token, csr=certificates.csr(k, "x"), wall_ms=time.time_ns() // 1_000_000)

        for _ in range(2):
            answer = await enroll.Login(request(key))
            assert answer.user == "ann"
        ann = UserCredentials.create(
            answer.certificates.ca_bundle, answer.certificates.certificate, certificates.key_pem(key)
        )
        who = await (await w.voter.trust(ann)).WhoAmI(pb.WhoAmIRequest())
        assert (who.kind, who.name, who.role) == ("user", "ann", "user")
        assert (await failure(enroll.Login(request(certificates.new_key())))).detail.reason == "token-spent"
        await admin.SetUser(pb.SetUserRequest(user=records.UserAcl(name="ann"), revoke=True))
        assert (await failure(enroll.Login(request(key)))).code is grpc.StatusCode.PERMISSION_DENIED

    play(story)


def test_who_is_at_the_door_is_told_whom_to_believe_only(play: Callable[..., None]) -> None:
    async def story(w: World) -> None:
        answer = await (await w.voter.enroll()).GetAuthorities(pb.GetAuthoritiesRequest())
        assert answer.cluster == w.voter.credentials.cluster
        assert answer.ca_bundle == w.voter.credentials.ca_pem
        assert list(answer.voters) == [w.voter.address]

    play(story)


# --- founding ------------------------------------------------------------------------------------------------------


def test_founding_may_be_repeated_at_any_point(etcd: Etcd, tmp_path: Path) -> None:
    async def main() -> None:
        directory = tmp_path / "trust"
        first = await founding.found_cluster(directory, "n1", "127.0.0.1:7220")
        again = await founding.found_cluster(directory, "n1", "127.0.0.1:7220")
        assert first.cluster == again.cluster
        (directory / "current").unlink()  # as after a crash before the credentials were written
        shutil.rmtree(directory / "1")
        third = await founding.found_cluster(directory, "n1", "127.0.0.1:7220")
        assert third.cluster != first.cluster
        assert UserCredentials.from_file(tmp_path / "admin.pem").cluster == third.cluster
        store = EtcdStore([etcd.endpoint])
        try:
            saved_records = (directory / founding.RECORDS_FILE).read_bytes()
            assert await founding.commit(store, third)
            assert not await founding.commit(store, third)
            (directory / founding.RECORDS_FILE).write_bytes(saved_records)  # a crash before the file was removed
            assert not await founding.commit(store, third)
            (directory / founding.RECORDS_FILE).write_bytes(saved_records)
            with pytest.raises(UserError) as caught:
                await founding.commit(store, first)
            assert caught.value.reason == "other-cluster"
        finally:
            await store.close()

    run(main())


def test_no_key_in_clear_is_in_the_store_or_in_the_first_records(etcd: Etcd, tmp_path: Path) -> None:
    async def main() -> None:
        async with world(etcd, tmp_path) as w:
            await w.joined("n2", role=VOTER_ROLE)
            token = tokens.parse(await w.token())
            page = await w.voter.store.list("/")
            everything = b"".join(e.value for e in page.entries)
            assert b"PRIVATE KEY" not in everything
            assert token.secret not in everything
            known = await w.voter.keyring.read()
            raw = certificates.key_pem(w.voter.keyring._signer(known.cluster).key)
            assert raw.split(b"\n")[1] not in everything
            user = await w.voter.record(UserAcl, keys.acl_user("admin"))
            assert user is not None
            assert trustcodec.encode(user)

    run(main())


def test_a_guest_gets_nowhere_else(play: Callable[..., None]) -> None:
    async def story(w: World) -> None:
        dialer = Dialer.guest(w.voter.credentials.ca_pem)
        async with dialer.channel(w.voter.address, VOTER) as channel:
            failed = await failure(TrustStub(channel).CreateToken(pb.CreateTokenRequest(role=records.TOKEN_ROLE_VOTER)))
            assert failed.code is grpc.StatusCode.UNAUTHENTICATED
            assert (await EnrollStub(channel).GetAuthorities(pb.GetAuthoritiesRequest())).node == "n1"

    play(story)
