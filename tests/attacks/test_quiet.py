"""What is written down while everybody comes in: nothing that lets somebody else in."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from spinetta.v1 import record_pb2 as records
from spinetta.v1 import trust_pb2 as pb
from spinetta.v1.trust_pb2_grpc import EnrollStub, TrustStub
from tests.attacks.fortress import ADMIN, GUEST, WHO, Fortress, fortress
from tests.contract.api_world import Etcd, failure, run
from tests.contract.trust_world import Newcomer


def test_no_key_and_no_token_is_in_a_log_or_in_etcd(
    etcd: Etcd, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    secrets: set[str] = set()

    async def scenario() -> None:
        async with fortress(etcd, tmp_path) as f:
            secrets.update(_lines(f))
            async with f.channel(ADMIN) as channel, f.channel(GUEST) as door:
                admin: Any = TrustStub(channel)
                enroll: Any = EnrollStub(door)
                token = (await admin.CreateToken(pb.CreateTokenRequest(role=records.TOKEN_ROLE_WORKER))).token
                secrets.add(token)
                new = Newcomer("w8")
                await enroll.Join(new.request(token))
                for bad in (token, token[:-1], token + "x", token[::-1]):  # spent, cut, longer, nonsense
                    failed = await failure(enroll.Join(Newcomer("w7").request(bad)))
                    assert not any(s in failed.text for s in secrets | {bad})
                # The middle of it, where its secret is, must not be anywhere either.
                secrets.add(token[len(token) // 2 : len(token) // 2 + 12])
                secrets.add(new.private.hex())
                state = await f.state()
                audited = repr(f.port.audited)
                for secret in secrets:
                    assert secret not in audited
                    for entry in state.values():
                        assert secret.encode() not in entry.value, entry.key
                assert f.port.credentials is not None
                private = f.port.credentials.sealing_private
                assert all(private not in entry.value and new.private not in entry.value for entry in state.values())

    run(scenario())
    assert len(secrets) == 10
    assert not [s for s in secrets if s in caplog.text]


def _lines(f: Fortress) -> list[str]:
    """Of each private key a line that no other has."""
    return [f.pems[who][2].decode().splitlines()[2] for who in WHO if who != GUEST] + [
        f.port.credentials.node_key_pem.decode().splitlines()[2] if f.port.credentials else ""
    ]
