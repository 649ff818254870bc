"""Everybody at every method of every service: what the table of rights does not give is refused and writes nothing."""

from __future__ import annotations

import grpc
import pytest

from spinetta.access import NodeRole, UserRole
from spinetta.rights import Call, Caller, CallerKind, Reach, reach
from tests.attacks.fortress import (
    ADMIN,
    GUEST,
    METHODS,
    OPERATOR,
    SEAT,
    USER,
    VIEWER,
    WHO,
    WORKER,
    Fortress,
    Stage,
    call,
)

CALLERS = {
    GUEST: Caller.nobody(),
    VIEWER: Caller(CallerKind.USER, "vic", role=UserRole.VIEWER),
    USER: Caller(CallerKind.USER, "ann", role=UserRole.USER),
    OPERATOR: Caller(CallerKind.USER, "olga", role=UserRole.OPERATOR),
    ADMIN: Caller(CallerKind.USER, "root", role=UserRole.ADMIN),
    WORKER: Caller(CallerKind.NODE, "w1", node_role=NodeRole.WORKER),
    SEAT: Caller(CallerKind.NODE, "v2", node_role=NodeRole.VOTER),
}
# By a node only with the mark that it does so.
PASSED_ON = {Call.LOG, Call.EXEC, Call.COPY, Call.DRAIN, Call.LEAVE, Call.IMAGES, Call.IMAGE_CHANGE, Call.IMAGE_IMPORT}
RIGHT: dict[str, Call] = {
    "Spinetta.Submit": Call.SUBMIT,
    "Spinetta.Cancel": Call.CANCEL,
    "Spinetta.Get": Call.STATUS,
    "Spinetta.List": Call.STATUS,
    "Spinetta.ListArchived": Call.STATUS,
    "Spinetta.Watch": Call.STATUS,
    "Spinetta.Wait": Call.STATUS,
    "Spinetta.Log": Call.LOG,
    "Spinetta.Exec": Call.EXEC,
    "Spinetta.CopyOut": Call.COPY,
    "Spinetta.ListNodes": Call.NODES,
    "Spinetta.DescribeCluster": Call.NODES,
    "Spinetta.Drain": Call.DRAIN,
    "Spinetta.Undrain": Call.DRAIN,
    "Spinetta.Leave": Call.LEAVE,
    "Spinetta.ConfirmDead": Call.CONFIRM_DEAD,
    "Spinetta.Backup": Call.BACKUP,
    "Spinetta.PullImage": Call.IMAGE_CHANGE,  # of a registry; of files of the node it is IMAGE_IMPORT
    "Spinetta.ListImages": Call.IMAGES,
    "Spinetta.RemoveImage": Call.IMAGE_CHANGE,
    "Spinetta.PinImage": Call.IMAGE_CHANGE,
    "Spinetta.VerifyImage": Call.IMAGE_CHANGE,
    "Peer.TakeSeat": Call.PEER,
    "Peer.GiveUpSeat": Call.PEER,
    "Peer.Archive": Call.PEER,
    "Peer.ReadArchive": Call.PEER,
    "Peer.Sample": Call.USAGE,
    "Enroll.GetAuthorities": Call.ENROLL,
    "Enroll.Join": Call.ENROLL,
    "Enroll.Login": Call.ENROLL,
    "Trust.WhoAmI": Call.WHOAMI,
    "Trust.Renew": Call.RENEW,
    "Trust.GetTrust": Call.WHOAMI,
    "Trust.CreateToken": Call.TOKENS,
    "Trust.ListTokens": Call.TOKENS,
    "Trust.RevokeToken": Call.TOKENS,
    "Trust.ListAccess": Call.ACCESS_LIST,
    "Trust.DecideJoin": Call.ACCESS_CHANGE,
    "Trust.SetNode": Call.ACCESS_CHANGE,
    "Trust.SetUser": Call.ACCESS_CHANGE,
    "Trust.SetGroup": Call.ACCESS_CHANGE,
    "Trust.GetPolicy": Call.POLICY,
    "Trust.SetPolicy": Call.POLICY,
    "Trust.RotateAuthority": Call.AUTHORITIES,
    "Trust.ListAuthorities": Call.AUTHORITIES,
    "Trust.GetLabelKeys": Call.LABEL_KEYS,
    "Trust.PutSecret": Call.SECRETS,
    "Trust.ListSecrets": Call.SECRETS,
    "Trust.RemoveSecret": Call.SECRETS,
    "Trust.GetLabelStates": Call.GATEWAY,
    "Trust.UpdateLabelKey": Call.GATEWAY,
    **{f"Gateway.{name}": Call.GATEWAY for name in ("Commit", "Read", "List", "Watch")},
    **{f"Gateway.{name}": Call.GATEWAY for name in ("GrantLease", "KeepAlive", "RevokeLease", "Members")},
    "Health.Check": Call.HEALTH,
    "Health.List": Call.HEALTH,
    "Health.Watch": Call.HEALTH,
    "ServerReflection.ServerReflectionInfo": Call.REFLECTION,
}


def test_no_method_is_forgotten() -> None:
    assert set(RIGHT) == set(METHODS)


def is_given(who: str, right: Call) -> bool:
    if CALLERS[who].kind is CallerKind.NODE and right in PASSED_ON:
        return False
    return reach(CALLERS[who], right) is not Reach.NONE


REFUSED = {grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAUTHENTICATED}


@pytest.mark.parametrize("who", WHO)
def test_what_is_not_given_is_refused_and_writes_nothing(stage: Stage, who: str) -> None:
    async def scenario(f: Fortress) -> dict[str, str]:
        wrong: dict[str, str] = {}
        async with f.channel(who) as channel:
            for name, right in RIGHT.items():
                if is_given(who, right):
                    continue
                before = await f.revision()
                code = await call(channel, METHODS[name], _request(f, name))
                if code not in REFUSED:
                    wrong[name] = code.name
                if await f.revision() != before:
                    wrong[name] = "has written"
        return wrong

    assert stage.run(scenario) == {}


def _request(f: Fortress, name: str) -> bytes:
    """One about something that is there, so that nothing else is wrong with it."""
    method = METHODS[name]
    fields = method.request.DESCRIPTOR.fields_by_name
    message = method.request()
    for field, value in (("id", f.tasks["bob"]), ("ids", [f.tasks["bob"]]), ("owner", "bob"), ("name", "v2")):
        if field in fields:
            if isinstance(value, list):
                getattr(message, field).extend(value)
            else:
                setattr(message, field, value)
    return message.SerializeToString()
