"""What a second look found: between a look at the rights and what follows from it, and in what a node keeps."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from spinetta.access import UserRole
from spinetta.node.services.desk import Asked
from spinetta.node.services.renew import is_certified
from spinetta.rights import Call, Caller, CallerKind
from spinetta.trust import certificates, guest
from spinetta.trust.credentials import UserCredentials
from spinetta.trust.dial import VOTER, Dialer
from spinetta.v1 import record_pb2 as records
from spinetta.v1 import trust_pb2 as pb
from spinetta.v1.trust_pb2_grpc import EnrollStub
from tests.contract.api_world import Etcd, failure, run
from tests.contract.trust_world import World, world

Story = Callable[[World], Awaitable[None]]
CLIENT = records.TOKEN_ROLE_CLIENT


@pytest.fixture
def play(etcd: Etcd, tmp_path: Path) -> Callable[[Story], None]:
    def go(story: Story) -> None:
        async def main() -> None:
            async with world(etcd, tmp_path) as w:
                await story(w)

        run(main())

    return go


async def _user(w: World, name: str) -> UserCredentials:
    admin = await w.admin()
    await admin.SetUser(pb.SetUserRequest(user=records.UserAcl(name=name, role=records.USER_ROLE_USER), create=True))
    return await _login(w, name)


async def _login(w: World, name: str) -> UserCredentials:
    key = certificates.new_key()
    request = pb.LoginRequest(
        token=await w.token(CLIENT, user=name),
        csr=certificates.csr(key, "x"),
        wall_ms=w.voter.port.wall_ms(),
    )
    got = (await (await w.voter.enroll()).Login(request)).certificates
    return UserCredentials.create(got.ca_bundle, got.certificate, certificates.key_pem(key))


async def _call_back(w: World, name: str) -> None:
    request = pb.SetUserRequest(user=records.UserAcl(name=name), invalidate_certificates=True)
    await (await w.admin()).SetUser(request)


async def _renewed(w: World, who: UserCredentials) -> UserCredentials:
    key = certificates.new_key()
    made = await (await w.voter.trust(who)).Renew(pb.RenewRequest(csr=certificates.csr(key, "x")))
    return UserCredentials.create(made.certificates.ca_bundle, made.certificates.certificate, certificates.key_pem(key))


async def _logged_in_anew(w: World, who: UserCredentials) -> UserCredentials:
    key = certificates.new_key()
    request = pb.LoginRequest(csr=certificates.csr(key, "x"), wall_ms=w.voter.port.wall_ms())
    dialer = Dialer.secured(lambda: (who.ca_pem, who.cert_pem, who.key_pem))
    async with dialer.channel(w.voter.address, VOTER) as channel:
        stub: Any = EnrollStub(channel)
        got = (await stub.Login(request)).certificates
    return UserCredentials.create(got.ca_bundle, got.certificate, certificates.key_pem(key))


@pytest.mark.parametrize("how", [_renewed, _logged_in_anew])
def test_a_voter_that_has_not_heard_of_the_calling_back_gives_no_new_certificate(
    play: Callable[[Story], None], how: Callable[[World, UserCredentials], Awaitable[UserCredentials]]
) -> None:
    async def story(w: World) -> None:
        thief = await _user(w, "ann")
        assert (await (await w.voter.trust(thief)).WhoAmI(pb.WhoAmIRequest())).name == "ann"
        w.voter.acl._take = lambda *_: None  # type: ignore[method-assign] # its watch is behind
        await _call_back(w, "ann")
        failed = await failure(how(w, thief))
        assert failed.code is grpc.StatusCode.UNAUTHENTICATED

    play(story)


def test_certificates_of_a_voter_whose_clock_is_ahead_are_called_back_too(play: Callable[[Story], None]) -> None:
    async def story(w: World) -> None:
        port = w.voter.port
        thief = await _user(w, "ann")
        port.wall_ms = lambda: time.time_ns() // 1_000_000 + 25_000  # type: ignore[method-assign] # as far as is allowed
        renewed = await _renewed(w, thief)
        del port.wall_ms
        assert (await (await w.voter.trust(renewed)).WhoAmI(pb.WhoAmIRequest())).name == "ann"
        await _call_back(w, "ann")
        for stolen in (thief, renewed):
            failed = await failure((await w.voter.trust(stolen)).WhoAmI(pb.WhoAmIRequest()))
            assert failed.code is grpc.StatusCode.UNAUTHENTICATED
        fresh = await _login(w, "ann")  # of a person who has a new token: at once, and to be renewed as ever
        for good in (fresh, await _renewed(w, fresh)):
            assert (await (await w.voter.trust(good)).WhoAmI(pb.WhoAmIRequest())).name == "ann"

    play(story)


def test_a_bearer_with_a_made_up_certificate_has_no_certificate() -> None:
    class Context:
        def auth_context(self) -> Any:
            return {"x509_pem_cert": (guest_made("ann"),)}

        def invocation_metadata(self) -> Any:
            return (("authorization", "Bearer x.y.z"),)

        def peer(self) -> str:
            return "ipv4:127.0.0.1:1"

    caller = Caller(CallerKind.USER, "ann", role=UserRole.USER)
    asked = Asked(None, Context(), Call.RENEW, caller)  # type: ignore[arg-type]
    assert not is_certified(asked)


def guest_made(name: str) -> bytes:
    """What anybody can make, as the key of the guests' authority is public."""
    key = certificates.new_key()
    authority = certificates.Authority(guest.guest_authority_pem(), guest.guest_authority_key())
    return certificates.issue_user(
        authority, certificates.csr(key, name), cluster="0" * 16, name=name, now_s=time.time(), lifetime_s=600
    )
