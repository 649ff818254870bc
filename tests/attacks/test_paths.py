"""Names that are parts of paths and of keys: none leads anywhere else."""

from __future__ import annotations

from typing import Any

import grpc
import pytest

from spinetta import keys
from spinetta.v1 import api_pb2 as api
from spinetta.v1 import api_pb2_grpc as rpc
from spinetta.v1 import record_pb2 as records
from spinetta.v1 import trust_pb2 as pb
from spinetta.v1.trust_pb2_grpc import TrustStub
from tests.attacks.fortress import ADMIN, USER, Fortress, Stage
from tests.contract.api_world import failure, spec

TRICKS = (
    "../../trust/node.key",
    "..",
    ".",
    "/etc/passwd",
    "../n2",
    "a/b",
    "a\0b",
    "%2e%2e%2f",
    "..\\..\\x",
    "ann/../bob",
    "x" * 300,
    "\u2024\u2024/x",
)
NOT_FOUND = (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND)


@pytest.mark.parametrize("trick", TRICKS)
def test_a_log_is_read_for_ids_of_tasks_only(stage: Stage, trick: str) -> None:
    async def scenario(f: Fortress) -> None:
        secret = f.port.directory / "trust"
        assert secret.exists()
        async with f.channel(ADMIN) as channel:
            stub: Any = rpc.SpinettaStub(channel)
            for fields in ({}, {"follow": True}, {"local_only": True}, {"attempt": 1}):
                failed = await failure(stub.Log(api.LogRequest(id=trick, **fields)).read())
                assert failed.code in NOT_FOUND, failed

    stage.run(scenario)


@pytest.mark.parametrize("trick", TRICKS)
def test_no_name_leads_to_another_key(stage: Stage, trick: str) -> None:
    """Users, nodes, groups, tokens, secrets, owners and labels are each one part of one key."""

    async def scenario(f: Fortress) -> None:
        async with f.channel(ADMIN) as admin, f.channel(USER) as ann:
            trust: Any = TrustStub(admin)
            mine: Any = TrustStub(ann)
            user = records.UserAcl(name=trick, role=records.USER_ROLE_USER)
            secret = records.SecretRecord(owner="ann", name=trick, labels=["members"])
            asked: dict[str, Any] = {
                "a user": trust.SetUser(pb.SetUserRequest(user=user, create=True)),
                "a node": trust.SetNode(pb.SetNodeRequest(name=trick, revoke=True)),
                "a request": trust.DecideJoin(pb.DecideJoinRequest(name=trick, approve=True, key_hash=bytes(32))),
                "a group": trust.SetGroup(pb.SetGroupRequest(group=records.GroupAcl(name=trick))),
                "a token": trust.RevokeToken(pb.RevokeTokenRequest(id=trick)),
                "a token's user": trust.CreateToken(pb.CreateTokenRequest(role=records.TOKEN_ROLE_CLIENT, user=trick)),
                "a token's label": trust.CreateToken(
                    pb.CreateTokenRequest(role=records.TOKEN_ROLE_WORKER, clearances=[trick])
                ),
                "a secret": mine.PutSecret(pb.PutSecretRequest(secret=secret)),
                "a secret's owner": trust.PutSecret(
                    pb.PutSecretRequest(secret=records.SecretRecord(owner=trick, name="x", labels=["members"]))
                ),
                "a secret that goes": mine.RemoveSecret(pb.RemoveSecretRequest(owner="ann", name=trick)),
            }
            before = await f.revision()
            for what, call in asked.items():
                failed = await failure(call)
                assert failed.code in NOT_FOUND, (what, failed)
            assert await f.revision() == before

    stage.run(scenario)


@pytest.mark.parametrize("trick", TRICKS)
def test_no_task_names_files_elsewhere(stage: Stage, trick: str) -> None:
    async def scenario(f: Fortress) -> None:
        async with f.channel(USER) as channel:
            stub: Any = rpc.SpinettaStub(channel)
            for bad in (
                spec(trick),
                spec(owner=trick),
                spec(secrets=[records.SecretRef(name=trick)]),
                spec(secrets=[records.SecretRef(name="db", file=trick)]),
                spec(clearance=[trick]),
            ):
                failed = await failure(stub.Submit(api.SubmitRequest(tasks=[bad])))
                assert failed.code in (*NOT_FOUND, grpc.StatusCode.PERMISSION_DENIED), failed

    stage.run(scenario)


def test_another_users_secret_is_not_to_be_had_by_any_spelling_of_its_owner(stage: Stage) -> None:
    async def scenario(f: Fortress) -> None:
        async with f.channel(USER) as channel:
            stub: Any = TrustStub(channel)
            for owner in ("bob", "Bob", "bob ", " bob", "bob/", "./bob", "bob\0", "ann/../bob"):
                failed = await failure(stub.RemoveSecret(pb.RemoveSecretRequest(owner=owner, name="db")))
                assert failed.code in (*NOT_FOUND, grpc.StatusCode.PERMISSION_DENIED), (owner, failed)
                failed = await failure(stub.ListSecrets(pb.ListSecretsRequest(owner=owner)))
                assert failed.code in (*NOT_FOUND, grpc.StatusCode.PERMISSION_DENIED), (owner, failed)
        assert keys.secret("bob", "db") in await f.state()

    stage.run(scenario)
