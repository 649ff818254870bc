"""Who is no node knocks at the gateway, again and again: refused, slowed down, and written down."""

from __future__ import annotations

from pathlib import Path

import grpc
import grpc.aio
import pytest

from spinetta import gatewaycodec as gc
from spinetta.node.services.throttle import Throttle
from tests.attacks.fortress import ADMIN, GUEST, Fortress, fortress
from tests.contract.api_world import Etcd, etcd, etcd_member, run

__all__ = ["etcd", "etcd_member"]

pytestmark = pytest.mark.contract

KNOCKS = 300  # many more than a newcomer may make in the time that they take


async def knock(f: Fortress, who: str, times: int, metadata: tuple[tuple[str, str], ...] = ()) -> list[grpc.StatusCode]:
    codes = []
    async with f.channel(who) as channel:
        read = channel.unary_unary(gc.READ.path, gc.READ.encode_request, gc.READ.response.FromString)
        for _ in range(times):
            with pytest.raises(grpc.aio.AioRpcError) as e:
                await read(gc.READ.request(keys=[gc.key_to_pb("/acl/policy")]), timeout=10, metadata=metadata)
            codes.append(e.value.code())
    return codes


@pytest.mark.parametrize("metadata", [(), (("authorization", "Bearer x.y.z"),)], ids=["nothing", "a made-up token"])
def test_a_guest_cannot_make_the_gateway_read_the_store_for_ever(
    etcd: Etcd, tmp_path: Path, metadata: tuple[tuple[str, str], ...]
) -> None:
    async def story() -> None:
        throttle = Throttle()
        async with fortress(etcd, tmp_path, throttle=throttle) as f:
            codes = await knock(f, GUEST, KNOCKS, metadata)
            assert codes[-1] is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert set(codes[:2]) <= {grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAUTHENTICATED}

    run(story())


def test_a_person_at_the_gateway_is_written_down(etcd: Etcd, tmp_path: Path) -> None:
    async def story() -> None:
        async with fortress(etcd, tmp_path) as f:
            assert await knock(f, ADMIN, 1) == [grpc.StatusCode.PERMISSION_DENIED]
            assert any(line[0] == "gateway" and line[1].startswith("user ") for line in f.port.audited), f.port.audited

    run(story())
