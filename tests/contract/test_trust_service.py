"""Rights as administrators change them: tokens, nodes, users, groups, the policy; over real TLS and real etcd."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from spinetta import keys, tokens, trustcodec
from spinetta.access import (
    Authorities,
    GroupAcl,
    NodeAcl,
    Policy,
    TokenRecord,
    UserAcl,
    UserRole,
    effective_clearances,
)
from spinetta.model import NodeId
from spinetta.node.services import tokenadmin, trust, useradmin
from spinetta.node.services.server import serve
from spinetta.store.etcd import EtcdStore
from spinetta.trust import certificates
from spinetta.trust.credentials import NodeCredentials, UserCredentials
from spinetta.trust.dial import VOTER as A_VOTER
from spinetta.trust.dial import Dialer
from spinetta.v1 import record_pb2 as records
from spinetta.v1 import trust_pb2 as pb
from spinetta.v1.trust_pb2_grpc import EnrollStub, TrustStub
from tests.contract.api_world import Etcd, Failed, HandNode, delete, etcd, etcd_member, eventually, failure, run
from tests.contract.trust_world import Newcomer, World, acl_key, report, set_record, world

__all__ = ["etcd", "etcd_member"]

Story = Callable[[World], Awaitable[None]]
WORKER, VOTER, CLIENT = records.TOKEN_ROLE_WORKER, records.TOKEN_ROLE_VOTER, records.TOKEN_ROLE_CLIENT


@pytest.fixture
def play(etcd: Etcd, tmp_path: Path) -> Callable[..., None]:
    def go(story: Story, **options: Any) -> None:
        async def main() -> None:
            async with world(etcd, tmp_path, **options) as w:
                await story(w)

        run(main())

    return go


async def user(w: World, name: str, role: Any = records.USER_ROLE_USER, **fields: Any) -> UserCredentials:
    """A new user, logged in."""
    admin = await w.admin()
    await admin.SetUser(pb.SetUserRequest(user=records.UserAcl(name=name, role=role, **fields), create=True))
    return await login(w, name)


async def login(w: World, name: str) -> UserCredentials:
    key, token = certificates.new_key(), await w.token(CLIENT, user=name)
    request = pb.LoginRequest(token=token, csr=certificates.csr(key, "x"), wall_ms=time.time_ns() // 1_000_000)
    made = (await (await w.voter.enroll()).Login(request)).certificates
    return UserCredentials.create(made.ca_bundle, made.certificate, certificates.key_pem(key))


async def who(w: World, credentials: UserCredentials | NodeCredentials) -> pb.WhoAmIResponse:
    return await (await w.voter.trust(credentials)).WhoAmI(pb.WhoAmIRequest())


async def set_node(w: World, name: str, **fields: Any) -> records.NodeAcl:
    return (await (await w.admin()).SetNode(pb.SetNodeRequest(name=name, **fields))).node


async def no_node(w: World, name: str, **fields: Any) -> Failed:
    return await failure((await w.admin()).SetNode(pb.SetNodeRequest(name=name, **fields)))


# --- tokens --------------------------------------------------------------------------------------------------------


def test_tokens_are_listed_without_what_they_are_checked_by(play: Callable[..., None]) -> None:
    async def story(w: World) -> None:
        admin = await w.admin()
        made = await admin.CreateToken(pb.CreateTokenRequest(role=VOTER, ttl_s=60, uses=3, clearances=["b", "a", "b"]))
        parsed = tokens.parse(made.token)
        assert parsed.id == made.record.id
        assert list(made.addresses) == [w.voter.address]
        assert abs(made.record.expires_ms / 1000 - time.time() - 60) < 5
        assert (made.record.uses_left, list(made.record.clearances)) == (3, ["a", "b"])
        assert made.record.created_by == "user admin"
        listed = (await admin.ListTokens(pb.ListTokensRequest())).tokens
        assert [t.id for t in listed] == [parsed.id]
        assert not listed[0].salt
        assert not listed[0].secret_hash
        for _ in range(2):
            await admin.RevokeToken(pb.RevokeTokenRequest(id=parsed.id))
        assert (await admin.ListTokens(pb.ListTokensRequest())).tokens[0].revoked
        assert (
            await failure(admin.RevokeToken(pb.RevokeTokenRequest(id="aaaaaaaa")))
        ).code is grpc.StatusCode.NOT_FOUND
        subjects = [a[2] for a in w.voter.port.audited]
        assert f"token {parsed.id}" in subjects
        assert made.token not in str(w.voter.port.audited)

    play(story)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"role": 0}, "role"),
        ({"role": 9}, "role"),
        ({"ttl_s": -1.0}, "ttl_s"),
        ({"ttl_s": float("nan")}, "ttl_s"),
        ({"ttl_s": 1e9}, "ttl_s"),
        ({"uses": 10**6}, "uses"),
        ({"clearances": ["a b"]}, "clearances"),
        ({"clearances": [f"l{i}" for i in range(65)]}, "clearances"),
        ({"groups": ["nowhere"]}, "groups"),
        ({"user": "ann"}, "user"),
        ({"role": CLIENT}, "user"),
        ({"role": CLIENT, "user": "nobody"}, "user"),
        ({"role": CLIENT, "user": "admin", "clearances": ["a"]}, "role"),
    ],
)
def test_tokens_that_cannot_be(play: Callable[..., None], fields: dict[str, Any], field: str) -> None:
    async def story(w: World) -> None:
        request = pb.CreateTokenRequest(**({"role": WORKER} | fields))
        assert (await failure((await w.admin()).CreateToken(request))).detail.field == field

    play(story)


def test_there_is_a_limit_to_tokens_and_ended_ones_make_room(
    play: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenadmin, "TOKENS_MAX", 3)

    async def story(w: World) -> None:
        made = [await w.token() for _ in range(3)]
        failed = await failure((await w.admin()).CreateToken(pb.CreateTokenRequest(role=WORKER)))
        assert failed.detail.reason == "too-many"
        await set_record(w.voter.store, keys.token(tokens.parse(made[0]).id), TokenRecord, expires_ms=1)
        await w.token()
        assert await w.voter.record(TokenRecord, keys.token(tokens.parse(made[0]).id)) is None

    play(story)


# --- who may -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["viewer", "user", "operator", "voter", "worker"])
def test_only_administrators_change_anything(play: Callable[..., None], role: str) -> None:
    async def story(w: World) -> None:
        if role in ("voter", "worker"):
            credentials: Any = await w.joined("n2", role=1 if role == "voter" else 2)
        else:
            credentials = await user(w, "ann", records.UserRole.Value(f"USER_ROLE_{role.upper()}"))
        stub = await w.voter.trust(credentials)
        assert (await stub.WhoAmI(pb.WhoAmIRequest())).role == role
        calls: list[Awaitable[Any]] = [
            stub.CreateToken(pb.CreateTokenRequest(role=WORKER)),
            stub.ListTokens(pb.ListTokensRequest()),
            stub.RevokeToken(pb.RevokeTokenRequest(id="aaaaaaaa")),
            stub.DecideJoin(pb.DecideJoinRequest(name="n9", approve=True)),
            stub.SetNode(pb.SetNodeRequest(name="n1", revoke=True)),
            stub.SetUser(pb.SetUserRequest(user=records.UserAcl(name="ann", role=records.USER_ROLE_ADMIN))),
            stub.SetGroup(pb.SetGroupRequest(group=records.GroupAcl(name="g"))),
            stub.SetPolicy(pb.SetPolicyRequest()),
            stub.RotateAuthority(pb.RotateAuthorityRequest(kind="cluster")),
            stub.ListAuthorities(pb.ListAuthoritiesRequest()),
        ]
        if role != "operator":
            calls.append(stub.ListAccess(pb.ListAccessRequest()))
        before = await w.voter.store.list("/", keys_only=True)
        for call in calls:
            assert (await failure(call)).code is grpc.StatusCode.PERMISSION_DENIED
        after = await w.voter.store.list("/", keys_only=True)
        assert [(e.key, e.modified) for e in after.entries] == [(e.key, e.modified) for e in before.entries]

    play(story)


def test_reflection_names_the_services_of_a_secured_node(play: Callable[..., None]) -> None:
    async def story(w: World) -> None:
        me = w.admin_credentials
        dialer = Dialer.secured(lambda: (me.ca_pem, me.cert_pem, me.key_pem))
        async with dialer.channel(w.voter.address, A_VOTER) as channel:
            asked = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
            answer = await anext(aiter(reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(asked)))
        names = {s.name for s in answer.list_services_response.service}
        assert {f"spinetta.v1.{name}" for name in ("Spinetta", "Peer", "Enroll", "Trust")} <= names

    play(story)


def test_an_administrator_revoked_meanwhile_changes_nothing(play: Callable[..., None]) -> None:
    async def story(w: World) -> None:
        second = await w.voter.trust(await user(w, "bob", records.USER_ROLE_ADMIN))
        assert await second.ListTokens(pb.ListTokensRequest()) is not None
        # Past the view that the node has of rights: what counts is the guard in the transaction.
        await set_record(w.voter.store, keys.acl_user("bob"), UserAcl, revoked=True)
        failed = await failure(second.CreateToken(pb.CreateTokenRequest(role=WORKER)))
        assert failed.code in (grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAUTHENTICATED)
        left = {e.key for e in (await w.voter.store.list(keys.TOKEN, keys_only=True)).entries}
        assert len(left) == 1  # that of bob's own login

    play(story)


# --- nodes ---------------------------------------------------------------------------------------------------------


def test_clearances_are_granted_and_withdrawn(play: Callable[..., None]) -> None:
    async def story(w: World) -> None:
        await w.joined("n2", clearances=["phi"])
        assert list((await set_node(w, "n2", grant=["eu", "gb"])).effective) == ["eu", "gb", "phi"]
        assert list((await set_node(w, "n2", withdraw=["phi", "never"])).effective) == ["eu", "gb"]
        assert (await no_node(w, "n2", grant=["a b"])).detail.field == "grant"
        assert (await no_node(w, "n9", grant=["a"])).code is grpc.StatusCode.NOT_FOUND

    play(story)


def test_a_group_restricts_its_nodes(play: Callable[..., None]) -> None:
    async def story(w: World) -> None:
        admin = await w.admin()
        group = records.GroupAcl(name="rack", clearances=["phi", "eu"])
        assert (await admin.SetGroup(pb.SetGroupRequest(group=group))).nodes_changed == 0
        await w.joined("n2", clearances=["phi", "gb"], groups=["rack"])
        await w.joined("n3", clearances=["eu", "gb"])
        assert (await w.voter.record(NodeAcl, acl_key("n2"))).effective == ("phi",)  # type: ignore[union-attr]
        assert list((await set_node(w, "n3", join_groups=["rack"])).effective) == ["eu"]
        assert (await no_node(w, "n3", join_groups=["other"])).code is grpc.StatusCode.NOT_FOUND
        group = records.GroupAcl(name="rack", clearances=["gb"])
        assert (await admin.SetGroup(pb.SetGroupRequest(group=group))).nodes_changed == 2
        for name in ("n2", "n3"):
            assert (await w.voter.record(NodeAcl, acl_key(name))).effective == ("gb",)  # type: ignore[union-attr]
        assert (await admin.SetGroup(pb.SetGroupRequest(group=group, remove=True))).nodes_changed == 2
        acl = await w.voter.record(NodeAcl, acl_key("n2"))
        assert acl is not None
        assert (acl.groups, acl.effective) == ((), ("gb", "phi"))
        assert await w.voter.record(GroupAcl, keys.acl_group("rack")) is None

    play(story)


def test_a_group_changed_while_nodes_join_it_leaves_nobody_with_more(play: Callable[..., None]) -> None:
    async def story(w: World) -> None:
        admin = await w.admin()
        await admin.SetGroup(pb.SetGroupRequest(group=records.GroupAcl(name="g", clearances=["a", "b"])))
        token = await w.token(uses=8, clearances=["a", "b"], groups=["g"])
        narrow = pb.SetGroupRequest(group=records.GroupAcl(name="g", clearances=["a"]))
        await asyncio.gather(admin.SetGroup(narrow), *(w.join(Newcomer(f"m{i}"), token) for i in range(8)))
        for i in range(8):
            acl = await w.voter.record(NodeAcl, acl_key(f"m{i}"))
            assert acl is not None
            assert acl.effective == ("a",)

    play(story)


@pytest.mark.parametrize("what", ["join", "grant", "another group"])
def test_a_group_is_changed_after_another_has_looked_at_it(play: Callable[..., None], what: str) -> None:
    async def story(w: World) -> None:
        admin = await w.admin()
        for name in ("g", "h"):
            await admin.SetGroup(pb.SetGroupRequest(group=records.GroupAcl(name=name, clearances=["a", "b"])))
        await w.joined("n2", clearances=["a"], groups=["g", "h"])
        token = await w.token(clearances=["a", "b"], groups=["g"])

        async def meanwhile() -> None:
            if what == "join":
                await w.join(Newcomer("n3"), token)
            elif what == "grant":
                await set_node(w, "n2", grant=["b"])
            else:
                await admin.SetGroup(pb.SetGroupRequest(group=records.GroupAcl(name="h", clearances=["b"])))

        w.meddling.before.append(meanwhile)
        await admin.SetGroup(pb.SetGroupRequest(group=records.GroupAcl(name="g", clearances=["a"])))
        for entry in (await w.voter.store.list(keys.ACL_NODE)).entries:
            acl = trustcodec.decode(NodeAcl, entry.value)
            groups = [await w.voter.record(GroupAcl, keys.acl_group(g)) for g in acl.groups]
            assert acl.effective == effective_clearances(acl.clearances, tuple(g for g in groups if g is not None))

    play(story)


def test_a_revoked_node_is_out_and_its_registration_gone(play: Callable[..., None]) -> None:
    async def story(w: World) -> None:
        credentials = await w.joined("n2")
        await report(w.voter.store, "n2", "127.0.0.1:9")
        assert (await no_node(w, "n2", remove=True)).detail.reason == "not-revoked"
        for _ in range(2):
            assert (await set_node(w, "n2", revoke=True, reason="lost")).revoked
        entries = (await w.voter.store.read([keys.node(NodeId("n2"))])).entries
        assert entries[keys.node(NodeId("n2"))] is None
        failed = await failure(who(w, credentials))
        assert failed.code is grpc.StatusCode.UNAUTHENTICATED
        assert "lost" in failed.text
        assert (await no_node(w, "n2", grant=["a"])).detail.reason == "revoked"
        assert (await no_node(w, "n2", remove=True)).detail.reason == "not-closed"  # the leader has it in work
        await delete(w.voter.store, keys.incarnation(NodeId("n2")))
        await set_node(w, "n2", remove=True)
        assert await w.voter.record(NodeAcl, acl_key("n2")) is None
        await w.joined("n2")

    play(story)


def test_the_last_voter_stays(play: Callable[..., None]) -> None:
    async def story(w: World) -> None:
        await w.joined("n2")
        assert (await no_node(w, "n1", revoke=True)).detail.reason == "last-voter"
        await w.joined("n3", role=1)
        results = await asyncio.gather(
            set_node(w, "n1", revoke=True), set_node(w, "n3", revoke=True), return_exceptions=True
        )
        assert sum(isinstance(r, BaseException) for r in results) == 1  # each rests on the other

    play(story)


def test_a_revoked_voter_is_shut_out_of_etcd_by_a_new_authority(play: Callable[..., None]) -> None:
    async def story(w: World) -> None:
        await w.joined("n3", role=1)
        before = await _authorities(w, "etcd")
        assert {x.node for x in before.active.wraps} == {"n1", "n3"}
        await set_node(w, "n3", revoke=True)
        after = await _authorities(w, "etcd")
        assert [e.state.name for e in sorted(after.entries, key=lambda e: e.state)] == ["NEXT", "ACTIVE"]
        assert {x.node for e in after.entries for x in e.wraps} == {"n1"}, "nothing is sealed to it any more"
        assert after.active.retire_at_ms <= time.time() * 1000, "and the old one goes as soon as all have moved"
        assert len((await _authorities(w, "cluster")).entries) == 1, "people keep their certificates"
        await w.joined("n4", role=1)
        again = await set_node(w, "n4", revoke=True)
        assert again.revoked, "also while an exchange is under way"

    play(story)


async def _authorities(w: World, kind: str) -> Authorities:
    entry = (await w.voter.store.read([keys.authority(kind)])).entries[keys.authority(kind)]
    assert entry is not None
    return trustcodec.decode(Authorities, entry.value)


# --- users ---------------------------------------------------------------------------------------------------------


def test_users_are_made_changed_and_removed(play: Callable[..., None]) -> None:
    async def story(w: World) -> None:
        admin = await w.admin()
        ann = await user(w, "ann", projects=["p2", "p1"], clearances=["phi"])
        shown = await who(w, ann)
        assert (shown.role, list(shown.projects), list(shown.clearances)) == ("user", ["p1", "p2"], ["phi"])
        again = pb.SetUserRequest(user=records.UserAcl(name="ann", role=records.USER_ROLE_USER), create=True)
        assert (await failure(admin.SetUser(again))).code is grpc.StatusCode.ALREADY_EXISTS
        changed = await admin.SetUser(pb.SetUserRequest(user=records.UserAcl(name="ann", projects=["p3"])))
        assert (changed.user.role, list(changed.user.projects)) == (records.USER_ROLE_USER, ["p3"])
        await admin.SetUser(pb.SetUserRequest(user=records.UserAcl(name="ann"), remove=True))
        assert (await failure(who(w, ann))).code is grpc.StatusCode.UNAUTHENTICATED
        missing = pb.SetUserRequest(user=records.UserAcl(name="ann"))
        assert (await failure(admin.SetUser(missing))).code is grpc.StatusCode.NOT_FOUND

    play(story)


def test_answers_of_the_store_are_lost(play: Callable[..., None]) -> None:
    async def story(w: World) -> None:
        admin = await w.admin()
        await w.joined("n2")
        ann = records.UserAcl(name="ann", role=records.USER_ROLE_USER)
        group = records.GroupAcl(name="g", clearances=["a"])
        calls: list[Callable[[], Awaitable[Any]]] = [
            lambda: admin.SetUser(pb.SetUserRequest(user=ann, create=True)),
            lambda: admin.SetUser(pb.SetUserRequest(user=ann)),
            lambda: admin.SetGroup(pb.SetGroupRequest(group=group)),
            lambda: admin.SetNode(pb.SetNodeRequest(name="n2", grant=["a"], join_groups=["g"])),
            lambda: admin.SetNode(pb.SetNodeRequest(name="n2", revoke=True)),
            lambda: admin.CreateToken(pb.CreateTokenRequest(role=WORKER)),
        ]
        for call in calls:
            w.meddling.lost = 1
            await call()
            w.meddling.lost = 0
        assert (await failure(calls[0]())).code is grpc.StatusCode.ALREADY_EXISTS

    play(story)


def test_an_administrator_revoked_in_the_middle_of_a_call(play: Callable[..., None]) -> None:
    async def story(w: World) -> None:
        bob = await w.voter.trust(await user(w, "bob", records.USER_ROLE_ADMIN))
        await w.joined("n2")
        policy = records.Policy(node_certificate_s=60, user_certificate_s=60)
        calls: list[Callable[[], Awaitable[Any]]] = [
            lambda: bob.CreateToken(pb.CreateTokenRequest(role=WORKER)),
            lambda: bob.SetNode(pb.SetNodeRequest(name="n2", grant=["a"])),
            lambda: bob.SetNode(pb.SetNodeRequest(name="n2", revoke=True)),
            lambda: bob.SetUser(
                pb.SetUserRequest(user=records.UserAcl(name="eve", role=records.USER_ROLE_VIEWER), create=True)
            ),
            lambda: bob.SetGroup(pb.SetGroupRequest(group=records.GroupAcl(name="g"))),
            lambda: bob.SetPolicy(pb.SetPolicyRequest(policy=policy)),
            lambda: bob.RotateAuthority(pb.RotateAuthorityRequest(kind="etcd")),
        ]
        for call in calls:
            await set_record(w.voter.store, keys.acl_user("bob"), UserAcl, revoked=False)
            await eventually(lambda: _is_known(w, "bob", is_revoked=False), what="the view has it")
            before = {e.key: e.modified for e in (await w.voter.store.list("/", keys_only=True)).entries}
            w.meddling.before.append(lambda: set_record(w.voter.store, keys.acl_user("bob"), UserAcl, revoked=True))
            assert (await failure(call())).code is grpc.StatusCode.UNAUTHENTICATED
            assert not w.meddling.before
            after = {e.key: e.modified for e in (await w.voter.store.list("/", keys_only=True)).entries}
            assert {k for k in after if after[k] != before.get(k)} == {keys.acl_user("bob")}

    play(story)


async def _is_known(w: World, name: str, *, is_revoked: bool) -> bool:
    """Whether the node's own view of rights has caught up."""
    found = await w.voter.acl.user(name)
    return found is not None and found[0].revoked is is_revoked


def test_a_certificate_of_an_earlier_user_of_the_name_does_not_count(play: Callable[..., None]) -> None:
    async def story(w: World) -> None:
        admin = await w.admin()
        first = await user(w, "ann")
        await admin.SetUser(pb.SetUserRequest(user=records.UserAcl(name="ann"), remove=True))
        until_s = int(time.time()) + 1  # certificates tell whole seconds
        await eventually(lambda: time.time() > until_s, what="a second passes")
        second = await user(w, "ann")
        assert (await who(w, second)).name == "ann"
        assert (await failure(who(w, first))).code is grpc.StatusCode.UNAUTHENTICATED

    play(story)


def test_certificates_issued_so_far_can_be_made_void(play: Callable[..., None]) -> None:
    async def story(w: World) -> None:
        ann = await user(w, "ann")
        request = pb.SetUserRequest(user=records.UserAcl(name="ann"), invalidate_certificates=True)
        await (await w.admin()).SetUser(request)
        assert (await failure(who(w, ann))).code is grpc.StatusCode.UNAUTHENTICATED
        assert (await who(w, await login(w, "ann"))).name == "ann"  # in the very same second

    play(story)


def test_the_last_administrator_stays(play: Callable[..., None]) -> None:
    async def story(w: World) -> None:
        admin = await w.admin()
        for request in (
            pb.SetUserRequest(user=records.UserAcl(name="admin"), remove=True),
            pb.SetUserRequest(user=records.UserAcl(name="admin"), revoke=True),
            pb.SetUserRequest(user=records.UserAcl(name="admin", role=records.USER_ROLE_OPERATOR)),
        ):
            assert (await failure(admin.SetUser(request))).detail.reason == "last-admin"
        bob = await w.voter.trust(await user(w, "bob", records.USER_ROLE_ADMIN))
        both = await asyncio.gather(
            admin.SetUser(pb.SetUserRequest(user=records.UserAcl(name="bob"), remove=True)),
            bob.SetUser(pb.SetUserRequest(user=records.UserAcl(name="admin"), remove=True)),
            return_exceptions=True,
        )
        assert sum(isinstance(r, BaseException) for r in both) >= 1
        left = [await w.voter.record(UserAcl, keys.acl_user(n)) for n in ("admin", "bob")]
        assert any(u is not None and u.role is UserRole.ADMIN for u in left)

    play(story)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"name": ""}, "user.name"),
        ({"name": "a b"}, "user.name"),
        ({"name": "../x"}, "user.name"),
        ({"role": 9}, "user.role"),
        ({"projects": ["a b"]}, "user.projects"),
        ({"projects": [f"p{i}" for i in range(useradmin.PROJECTS_MAX + 1)]}, "user.projects"),
        ({"clearances": ["A"]}, "user.clearances"),
        ({"limits": records.Limits(calls_per_s=-1.0)}, "user.limits.calls_per_s"),
        ({"reason": "x" * 501}, "reason"),
    ],
)
def test_users_that_cannot_be(play: Callable[..., None], fields: dict[str, Any], field: str) -> None:
    async def story(w: World) -> None:
        request = pb.SetUserRequest(user=records.UserAcl(**({"name": "ann"} | fields)), create=True)
        assert (await failure((await w.admin()).SetUser(request))).detail.field == field

    play(story)


# --- policy --------------------------------------------------------------------------------------------------------


def test_the_policy_is_checked(play: Callable[..., None]) -> None:
    async def story(w: World) -> None:
        admin = await w.admin()
        policy = (await admin.GetPolicy(pb.GetPolicyRequest())).policy
        assert policy.node_certificate_s == Policy().node_certificate_s
        policy.node_certificate_s = 30.0
        await admin.SetPolicy(pb.SetPolicyRequest(policy=policy))
        assert (await w.voter.record(Policy, keys.POLICY)).node_certificate_s == 30.0  # type: ignore[union-attr]
        good = records.Issuer(url="https://issuer", audience="spinetta")
        bad: list[tuple[dict[str, Any], str]] = [
            ({"node_certificate_s": 29.9}, "policy.node_certificate_s"),
            ({"user_certificate_s": 10.0}, "policy.user_certificate_s"),
            ({"node_certificate_s": 366 * 86400.0}, "policy.node_certificate_s"),
            ({"user_certificate_s": float("inf")}, "policy.user_certificate_s"),
            ({"overlap_s": -1.0}, "policy.overlap_s"),
            ({"issuers": [records.Issuer(url="http://issuer", audience="x")]}, "policy.issuers[0].url"),
            ({"issuers": [records.Issuer(url="https://issuer")]}, "policy.issuers[0].audience"),
            ({"issuers": [good, good]}, "policy.issuers[0].prefix"),
            ({"issuers": [records.Issuer(url="https://i", audience="x", prefix="i-", ca_pem=b"junk")]}, ""),
        ]
        for fields, field in bad:
            base = {"node_certificate_s": 60.0, "user_certificate_s": 60.0} | fields
            failed = await failure(admin.SetPolicy(pb.SetPolicyRequest(policy=records.Policy(**base))))
            assert failed.code is grpc.StatusCode.INVALID_ARGUMENT
            assert failed.detail.field == field
            is_short = min(base["node_certificate_s"], base["user_certificate_s"]) < 30
            assert (failed.detail.reason == "too-short") == is_short
            assert ("at least 30 s" in failed.text) == is_short

    play(story)


def test_an_open_cluster_says_so(etcd: Etcd, tmp_path: Path) -> None:
    async def main() -> None:
        store = EtcdStore([etcd.endpoint])
        port = HandNode("n1", store, tmp_path)
        try:
            async with (
                serve(port, ["127.0.0.1:0"], extra=[lambda s, d: trust.register(s, port, d, None)]) as server,
                grpc.aio.insecure_channel(server.addresses[0]) as channel,
            ):
                assert (await TrustStub(channel).WhoAmI(pb.WhoAmIRequest())).kind == "local"
                calls: list[Awaitable[Any]] = [
                    TrustStub(channel).CreateToken(pb.CreateTokenRequest(role=WORKER)),
                    TrustStub(channel).ListAccess(pb.ListAccessRequest()),
                    EnrollStub(channel).GetAuthorities(pb.GetAuthoritiesRequest()),
                    EnrollStub(channel).Join(pb.JoinRequest()),
                ]
                for call in calls:
                    assert (await failure(call)).detail.reason == "open-cluster"
        finally:
            await store.close()

    run(main())
