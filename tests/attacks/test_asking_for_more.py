"""Asking for more than one is given: with the certificate, the renewal, the join, the bearer token."""

from __future__ import annotations

import base64
import json
import time
from typing import Any

import pytest
from cryptography import x509

from spinetta.access import GroupMapping, Issuer, UserRole
from spinetta.errors import Denied
from spinetta.trust import certificates
from spinetta.trust.oidc import OidcVerifier
from spinetta.v1 import record_pb2 as records
from spinetta.v1 import trust_pb2 as pb
from spinetta.v1.trust_pb2_grpc import EnrollStub, TrustStub
from tests.attacks.fortress import ADMIN, GUEST, USER, WORKER, Fortress, Stage
from tests.contract.api_world import failure, run
from tests.contract.trust_world import Newcomer


def test_a_renewal_gives_the_name_and_role_that_one_has(stage: Stage) -> None:
    async def scenario(f: Fortress) -> None:
        key = certificates.new_key()
        for who, name in ((WORKER, "w1"), (USER, "ann")):
            for wanted in ("n1", "v2", "root", "admin", "voter.spinetta.internal"):
                async with f.channel(who) as channel:
                    stub: Any = TrustStub(channel)
                    csr = certificates.csr(key if who == USER else certificates.load_key(f.pems[who][2]), wanted)
                    made = (await stub.Renew(pb.RenewRequest(csr=csr, etcd_csr=csr))).certificates
                identity = certificates.describe(made.certificate)
                assert identity.name == name
                names = certificates.load_certificate(made.certificate).extensions.get_extension_for_class(
                    x509.SubjectAlternativeName
                )
                assert "voter.spinetta" not in repr(names)
                assert (made.etcd_certificate, made.etcd_ca_bundle) == (b"", b"")

    stage.run(scenario)


def test_a_worker_is_told_nothing_of_etcds_authority(stage: Stage) -> None:
    async def scenario(f: Fortress) -> None:
        for who in (WORKER, USER, ADMIN):
            async with f.channel(who) as channel:
                stub: Any = TrustStub(channel)
                told = await stub.GetTrust(pb.GetTrustRequest())
                assert told.ca_bundle
                assert told.etcd_ca_bundle == b""

    stage.run(scenario)


def test_a_workers_token_gives_no_etcd_certificate_however_it_is_asked_for(stage: Stage) -> None:
    async def scenario(f: Fortress) -> None:
        async with f.channel(ADMIN) as channel, f.channel(GUEST) as door:
            admin: Any = TrustStub(channel)
            enroll: Any = EnrollStub(door)
            made = await admin.CreateToken(pb.CreateTokenRequest(role=records.TOKEN_ROLE_WORKER))
            joined = await enroll.Join(Newcomer("w9").request(made.token))  # it sends a request for etcd's, too
            assert joined.role == records.NODE_ROLE_WORKER
            assert (joined.certificates.etcd_certificate, joined.certificates.etcd_ca_bundle) == (b"", b"")
            assert b"BEGIN" in joined.certificates.certificate

    stage.run(scenario)


def test_a_bearer_is_no_certificate_that_renews_itself(stage: Stage) -> None:
    async def scenario(f: Fortress) -> None:
        async with f.channel(GUEST) as channel:
            stub: Any = TrustStub(channel)
            csr = certificates.csr(certificates.new_key(), "root")
            for said in ("Bearer x.y.z", "Basic cm9vdDpyb290", "bearer", "Bearer " + "x" * 13_000, "root"):
                failed = await failure(stub.Renew(pb.RenewRequest(csr=csr), metadata=(("authorization", said),)))
                assert failed.detail.reason == "unauthenticated", (said[:20], failed)

    stage.run(scenario)


def _part(value: dict[str, Any]) -> str:
    return base64.urlsafe_b64encode(json.dumps(value).encode()).rstrip(b"=").decode()


@pytest.mark.parametrize("alg", ["none", "None", "NONE", "nOnE", "", "HS256", "HS512", None, 1, ["RS256"]])
@pytest.mark.parametrize("signature", ["", "AAAA"])
def test_a_token_that_nobody_has_signed(alg: object, signature: str) -> None:
    issuer = Issuer(
        "http://127.0.0.1:1", "spinetta", prefix="uni-", groups=(GroupMapping("ops", UserRole.ADMIN, (), ()),)
    )
    claims = {"iss": issuer.url, "aud": "spinetta", "sub": "eve", "groups": ["ops"], "exp": int(time.time()) + 600}
    token = f"{_part({'alg': alg, 'typ': 'JWT'})}.{_part(claims)}.{signature}"

    async def verify() -> None:
        verifier = OidcVerifier()
        known = verifier._keys.setdefault((issuer.url, issuer.ca_pem), _keys())  # so that it need not fetch any
        assert known.keys is not None
        with pytest.raises(Denied):
            await verifier.verify(token, [issuer])

    run(verify())


def _keys() -> Any:
    import jwt
    from cryptography.hazmat.primitives.asymmetric import rsa

    from spinetta.trust import oidc

    public = rsa.generate_private_key(65537, 2048).public_key()
    jwk = json.loads(jwt.algorithms.RSAAlgorithm.to_jwk(public))
    made = oidc._Keys()
    made.keys = jwt.PyJWKSet.from_dict({"keys": [jwk]})
    made.fetched_s = made.tried_s = time.monotonic()
    return made
