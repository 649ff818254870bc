"""What somebody can do who has found a token that was used up, together with the key that was certified for it."""

from __future__ import annotations

import time
from pathlib import Path

from spinetta.trust import certificates
from spinetta.trust.credentials import UserCredentials
from spinetta.v1 import record_pb2 as records
from spinetta.v1 import trust_pb2 as pb
from tests.contract.api_world import Etcd, etcd, etcd_member, failure, run
from tests.contract.trust_world import World, world

__all__ = ["etcd", "etcd_member"]

CLIENT = 3


class Laptop:
    """Ann's, with all that is on its disk: her key, her certificate, the file with the token she came in with."""

    def __init__(self, w: World, token: str) -> None:
        self.w, self.token, self.key = w, token, certificates.new_key()

    async def login(self) -> pb.LoginResponse:
        csr = certificates.csr(self.key, "ann")
        request = pb.LoginRequest(token=self.token, csr=csr, wall_ms=time.time_ns() // 1_000_000)
        return await (await self.w.voter.enroll()).Login(request)

    async def whoami(self, made: pb.LoginResponse) -> pb.WhoAmIResponse:
        pems = made.certificates
        mine = UserCredentials.create(pems.ca_bundle, pems.certificate, certificates.key_pem(self.key))
        return await (await self.w.voter.trust(mine)).WhoAmI(pb.WhoAmIRequest())


async def _ann(w: World) -> Laptop:
    await _add(w, records.USER_ROLE_USER)
    laptop = Laptop(w, await w.token(CLIENT, user="ann"))
    assert (await laptop.whoami(await laptop.login())).name == "ann"
    return laptop


async def _add(w: World, role: records.UserRole.ValueType) -> None:
    user = records.UserAcl(name="ann", role=role)
    await (await w.admin()).SetUser(pb.SetUserRequest(user=user, create=True))


def test_a_stolen_laptop_whose_certificates_are_void_gets_no_new_one_for_its_old_token(
    etcd: Etcd, tmp_path: Path
) -> None:
    async def scenario() -> None:
        async with world(etcd, tmp_path) as w:
            laptop = await _ann(w)
            void = pb.SetUserRequest(user=records.UserAcl(name="ann"), invalidate_certificates=True)
            await (await w.admin()).SetUser(void)
            assert (await failure(laptop.login())).detail.reason.startswith("token-")

    run(scenario())


def test_a_token_of_an_earlier_user_of_the_name_lets_nobody_in_as_the_new_one(etcd: Etcd, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(etcd, tmp_path) as w:
            laptop = await _ann(w)
            gone = pb.SetUserRequest(user=records.UserAcl(name="ann"), remove=True)
            await (await w.admin()).SetUser(gone)
            await _add(w, records.USER_ROLE_ADMIN)
            assert (await failure(laptop.login())).detail.reason.startswith("token-")

    run(scenario())
