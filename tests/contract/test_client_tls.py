"""The client against real TLS servers: whom it believes, whom it asks, what it says when it cannot."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, TypeVar

import grpc
import pytest

from spinetta import tokens
from spinetta.access import NodeRole, TokenRole
from spinetta.client import AsyncClient, Client, diagnose
from spinetta.client.credentials import CredentialsFile, Stored, load, save
from spinetta.client.login import renew, whose_bearer, with_bearer, with_token
from spinetta.errors import Denied, InvariantViolation, StoreUnavailable, UserError
from spinetta.node.services.tokendesk import check_clocks
from spinetta.trust import certificates
from spinetta.trust.certificates import CLOCK_SKEW_MAX_S
from spinetta.trust.contact import meet
from spinetta.trust.credentials import write_private
from spinetta.trust.dial import Dialer
from spinetta.v1 import api_pb2 as api
from spinetta.v1 import trust_pb2 as trust
from tests.contract.tls_world import HOUR_S, Stand, World, failing, serving

pytestmark = pytest.mark.contract

T = TypeVar("T")
ID = "01890a5d-ac96-774b-bcce-b302099a8057"
Code = grpc.StatusCode
ANN = trust.WhoAmIResponse(kind="user", name="ann", role="user")


def run(work: Coroutine[Any, Any, T]) -> T:
    async def limited() -> T:
        async with asyncio.timeout(60):
            return await work

    return asyncio.run(limited())


def client_of(*addresses: str, **options: Any) -> AsyncClient:
    return AsyncClient(addresses, timeout_s=options.pop("timeout_s", 8.0), **options)


async def refused(work: Coroutine[Any, Any, Any]) -> UserError:
    with pytest.raises(UserError) as caught:
        await work
    return caught.value


@pytest.fixture
def world() -> World:
    return World()


# --- whom it believes ---------------------------------------------------------------------------------------------


def test_a_voter_sees_the_callers_certificate(world: World) -> None:
    async def story() -> None:
        stand, own = Stand(WhoAmI=ANN), world.user("ann")
        async with serving(stand, world.node("n1")) as at, client_of(at, credentials=own) as client:
            assert (await client.admin.whoami()).name == "ann"
        [shown] = stand.callers
        identity = certificates.identity_of(shown, [world.ca_pem], world.cluster, now_s=time.time())
        assert identity is not None
        assert (identity.kind, identity.name) == ("user", "ann")

    run(story())


def test_the_client_without_asyncio(world: World) -> None:
    async def story() -> None:
        async with serving(Stand(WhoAmI=ANN), world.node("n1")) as at:

            def work() -> str:
                with Client(at, credentials=world.user("ann")) as client:
                    return client.admin.whoami().name

            assert await asyncio.to_thread(work) == "ann"

    run(story())


def test_a_node_of_another_cluster_is_named_as_such(world: World) -> None:
    other = World(cluster="ffffffffffffffff")

    async def story() -> None:
        stand = Stand(WhoAmI=ANN)
        async with serving(stand, other.node("n1")) as at, client_of(at, credentials=world.user()) as client:
            error = await refused(client.admin.whoami())
        assert error.reason == "other-cluster"
        assert f"is of cluster {other.cluster}, and your credentials are for cluster {world.cluster}" in error.message
        assert stand.asked == []

    run(story())


def test_an_impostor_with_an_authority_of_the_same_name_hears_nothing(world: World) -> None:
    async def story() -> None:
        stand = Stand(WhoAmI=ANN, GetAuthorities=world.authorities())
        async with serving(stand, World().node("n1")) as at, client_of(at, credentials=world.user()) as client:
            error = await refused(client.admin.whoami())
        assert error.reason == "unknown-authority"
        assert stand.asked == []

    run(story())


def test_an_expired_node_certificate_is_told_with_the_clocks(world: World) -> None:
    async def story() -> None:
        pems = world.node("n1", since_s=-2 * HOUR_S, life_s=HOUR_S)
        async with serving(Stand(WhoAmI=ANN), pems) as at, client_of(at, credentials=world.user()) as client:
            error = await refused(client.admin.whoami())
        assert error.reason == "clock"
        assert "the certificate of node n1" in error.message
        assert "expired" in error.message

    run(story())


def test_ones_own_certificate_that_has_expired_is_told_before_anybody_is_blamed(world: World) -> None:
    async def story() -> None:
        own = world.user(since_s=-2 * HOUR_S, life_s=HOUR_S)
        async with serving(Stand(WhoAmI=ANN), world.node("n1")) as at, client_of(at, credentials=own) as client:
            error = await refused(client.admin.whoami())
        assert isinstance(error, Denied)
        assert error.reason == "unauthenticated"
        assert "does not believe our certificate" in error.message or "your certificate expired" in error.message
        assert "spinetta login" in error.hint

    run(story())


def test_credentials_that_the_cluster_does_not_know(world: World) -> None:
    """Its authority is believed here, but the certificate is of another one, e.g. after a forced rotation."""
    stranger = World()

    async def story() -> None:
        key = certificates.new_key()
        leaf = stranger.certify_user("ann", certificates.csr(key, "ann"))
        from spinetta.trust.credentials import UserCredentials

        own = UserCredentials.create(world.ca_pem, leaf, certificates.key_pem(key))
        async with serving(Stand(WhoAmI=ANN), world.node("n1")) as at, client_of(at, credentials=own) as client:
            error = await refused(client.admin.whoami())
        assert isinstance(error, Denied)
        assert error.reason == "unauthenticated"

    run(story())


def test_a_node_certified_by_the_heir_of_an_authority_is_believed(world: World) -> None:
    """Who has been away while the authority was changed still gets in, as its predecessor speaks for the new one."""

    async def story() -> None:
        heir = World()
        _, leaf, key = heir.node("n1")
        heir_pem = certificates.cross_sign(world.authority, heir.ca_pem, now_s=time.time())
        pems = (heir.ca_pem + world.ca_pem, leaf + heir_pem, key)
        async with serving(Stand(WhoAmI=ANN), pems) as at, client_of(at, credentials=world.user()) as client:
            assert (await client.admin.whoami()).name == "ann"

    run(story())


def test_nobody_is_blamed_for_a_connection_that_stands(world: World) -> None:
    async def story() -> None:
        own = world.user()
        async with serving(Stand(), world.node("n1")) as at:
            for dialer in (
                Dialer.secured(lambda: (own.ca_pem, own.cert_pem, own.key_pem)),
                Dialer.bearer(world.ca_pem, lambda: "abc"),
            ):
                assert await diagnose.why([at], dialer, 3.0) is None

    run(story())


# --- plain text and TLS ---------------------------------------------------------------------------------------------


def test_plain_text_where_tls_is_expected(world: World) -> None:
    async def story() -> None:
        stand = Stand(WhoAmI=ANN)
        async with serving(stand, None) as at, client_of(at, credentials=world.user()) as client:
            error = await refused(client.admin.whoami())
        assert error.reason == "not-tls"
        assert "--credentials none" in error.hint
        assert stand.asked == []

    run(story())


def test_tls_where_plain_text_is_expected(world: World) -> None:
    async def story() -> None:
        async with serving(Stand(WhoAmI=ANN), world.node("n1")) as at, client_of(at) as client:
            error = await refused(client.admin.whoami())
        assert isinstance(error, Denied)
        assert error.reason == "unauthenticated"
        assert "spinetta login" in error.hint

    run(story())


def test_plain_text_is_not_spoken_off_loopback() -> None:
    for address in ("10.0.0.5:7220", "node.example.org:7220", "[::1]:7220"):
        with pytest.raises(Denied, match=r"^you have no credentials for the cluster at ") as caught:
            AsyncClient(address)
        assert caught.value.reason == "unauthenticated"
        assert "spinetta login" in caught.value.hint


def test_nobody_there_is_no_question_of_certificates(world: World) -> None:
    async def story() -> None:
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            at = f"127.0.0.1:{sock.getsockname()[1]}"
            async with client_of(at, credentials=world.user(), timeout_s=1.0) as client:
                with pytest.raises(StoreUnavailable, match="no node answers"):
                    await client.admin.whoami()

    run(story())


def test_a_good_node_beside_an_impostor_is_enough(world: World) -> None:
    async def story() -> None:
        bad, good = Stand(WhoAmI=ANN), Stand(WhoAmI=ANN)
        async with (
            serving(bad, World().node("n1")) as at_bad,
            serving(good, world.node("n2")) as at_good,
            client_of(at_bad, at_good, credentials=world.user()) as client,
        ):
            assert (await client.admin.whoami()).name == "ann"
        assert bad.asked == []

    run(story())


def test_an_open_cluster_has_nothing_of_the_kind() -> None:
    async def story() -> None:
        async with serving(Stand(), None) as at, client_of(at) as client:
            assert (await client.admin.whoami()).kind == "local"
            for call in (client.admin.tokens(), client.admin.policy(), client.put_secret("a", b"x", owner="me")):
                assert (await refused(call)).reason == "open-cluster"

    run(story())


# --- workers ----------------------------------------------------------------------------------------------------


def test_a_worker_is_asked_for_voters_and_shown_nothing_else(world: World) -> None:
    async def story() -> None:
        voter = Stand(WhoAmI=ANN)
        async with serving(voter, world.node("v1")) as at_voter:
            worker = Stand(WhoAmI=ANN, GetAuthorities=world.authorities(at_voter))
            async with (
                serving(worker, world.node("w1", NodeRole.WORKER)) as at_worker,
                client_of(at_worker, credentials=world.user()) as client,
            ):
                for _ in range(3):
                    assert (await client.admin.whoami()).name == "ann"
        assert voter.asked == ["WhoAmI"] * 3
        assert worker.asked == ["GetAuthorities"]

    run(story())


def test_a_node_that_says_ask_a_voter_is_followed(world: World) -> None:
    async def story() -> None:
        voter = Stand(WhoAmI=ANN)
        async with serving(voter, world.node("v1")) as at_voter:
            asks = failing(Code.FAILED_PRECONDITION, "ask-a-voter", "nonsense", "10.0.0.999:1", at_voter)
            first = Stand(WhoAmI=asks)
            async with (
                serving(first, world.node("v2")) as at,
                client_of(at, credentials=world.user()) as client,
            ):
                assert (await client.admin.whoami()).name == "ann"

    run(story())


def test_nodes_that_send_each_other_the_client_are_left_after_a_while(world: World) -> None:
    async def story() -> None:
        addresses: list[str] = []

        async def elsewhere(request: Any, context: Any) -> Any:
            await failing(Code.FAILED_PRECONDITION, "ask-a-voter", *addresses)(request, context)

        stands = [Stand(WhoAmI=elsewhere) for _ in range(2)]
        async with AsyncExitStack() as stack:
            for i, stand in enumerate(stands):
                addresses.append(await stack.enter_async_context(serving(stand, world.node(f"v{i}"))))
            client = await stack.enter_async_context(client_of(addresses[0], credentials=world.user(), timeout_s=2.0))
            started_s = time.monotonic()
            with pytest.raises(StoreUnavailable):
                await client.admin.whoami()
            assert time.monotonic() - started_s < 6
        assert sum(len(s.asked) for s in stands) < 200

    run(story())


async def _log(_: Any, __: Any) -> AsyncIterator[api.LogChunk]:
    yield api.LogChunk(data=b"hello\n", attempt=1, node="w1")


def test_a_log_is_fetched_from_the_node_that_has_it(world: World) -> None:
    async def story() -> None:
        worker = Stand(Log=_log)
        async with serving(worker, world.node("w1", NodeRole.WORKER)) as at_worker:

            async def ask_node(request: Any, context: Any) -> AsyncIterator[Any]:
                await failing(Code.FAILED_PRECONDITION, "ask-node", at_worker)(request, context)
                yield

            voter = Stand(Log=ask_node)
            async with serving(voter, world.node("v1")) as at, client_of(at, credentials=world.user()) as client:
                chunks = [c.data async for c in client.log(ID)]
        assert chunks == [b"hello\n"]
        assert worker.asked == ["Log"]

    run(story())


def test_a_bearer_token_is_not_shown_to_the_node_that_has_a_log(world: World, tmp_path: Path) -> None:
    async def story() -> None:
        worker = Stand(Log=_log)
        (tmp_path / "token").write_text("abc.def.ghi\n")
        async with serving(worker, world.node("w1", NodeRole.WORKER)) as at_worker:

            async def ask_node(request: Any, context: Any) -> AsyncIterator[Any]:
                await failing(Code.FAILED_PRECONDITION, "ask-node", at_worker)(request, context)
                yield

            voter = Stand(Log=ask_node)
            options: dict[str, Any] = {"credentials": world.user(), "bearer": tmp_path / "token"}
            async with serving(voter, world.node("v1")) as at, client_of(at, **options) as client:
                with pytest.raises(UserError, match="does not take bearer tokens"):
                    [c async for c in client.log(ID)]
        assert voter.metadata[0]["authorization"] == "Bearer abc.def.ghi"
        assert worker.asked == []

    run(story())


# --- bearer tokens --------------------------------------------------------------------------------------------------


def test_a_bearer_token_is_read_anew_for_each_call_and_shown_to_voters_only(world: World, tmp_path: Path) -> None:
    async def story() -> None:
        token = tmp_path / "token"
        token.write_text("first\n")
        voter = Stand(WhoAmI=ANN)
        async with serving(voter, world.node("v1")) as at_voter:
            worker = Stand(GetAuthorities=world.authorities(at_voter))
            async with (
                serving(worker, world.node("w1", NodeRole.WORKER)) as at_worker,
                client_of(at_worker, credentials=world.user(), bearer=token) as client,
            ):
                await client.admin.whoami()
                token.write_text("second")
                await client.admin.whoami()
                token.unlink()
                error = await refused(client.admin.whoami())
        assert [m["authorization"] for m in voter.metadata] == ["Bearer first", "Bearer second"]
        assert "authorization" not in worker.metadata[0]
        # With a bearer token the certificate is a guest's: two identities in one call would be one too many.
        assert certificates.identity_of(voter.callers[0], [world.ca_pem], world.cluster, now_s=time.time()) is None
        assert error.reason == "unauthenticated"

    run(story())


def test_a_bearer_file_without_a_token(world: World, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("two words")
    for file, message in ((tmp_path / "token", "holds no bearer token"), (tmp_path / "absent", "there is no file")):
        with pytest.raises(UserError, match=message):
            AsyncClient("10.0.0.5:7220", credentials=world.user(), bearer=file)
    with pytest.raises(UserError, match="does not tell which authorities"):
        AsyncClient("10.0.0.5:7220", bearer=tmp_path / "token")


# --- the credentials file -----------------------------------------------------------------------------------------


def test_a_new_certificate_in_the_file_is_used_from_the_next_call_on(world: World, tmp_path: Path) -> None:
    async def story() -> None:
        path, stand = world.user_file(tmp_path / "c.pem"), Stand(WhoAmI=ANN)
        async with serving(stand, world.node("n1")) as at, client_of(at, credentials=path) as client:
            await client.admin.whoami()
            await client.admin.whoami()
            world.user_file(path)
            await client.admin.whoami()
            path.write_text("garbage")  # half an edit: what we had is still good
            await client.admin.whoami()
            path.unlink()
            await client.admin.whoami()
        a, b, c, d, e = stand.callers
        assert a == b
        assert c != a
        assert c == d == e

    run(story())


def test_remarks_survive_and_mode_is_private(world: World, tmp_path: Path) -> None:
    own = world.user()
    path = tmp_path / "deep" / "c.pem"
    save(path, Stored(own.ca_pem, own, ("10.0.0.5:7220", "[fd00::1]:7220")))
    assert load(path) == Stored(own.ca_pem, own, ("10.0.0.5:7220", "[fd00::1]:7220"))
    assert path.stat().st_mode & 0o777 == 0o600
    assert own.key_pem.decode() not in repr(load(path))
    path.chmod(0o640)
    with pytest.raises(UserError, match="others may read"):
        CredentialsFile(path)
    bearer = Stored(own.ca_pem, None, ("10.0.0.5:7220",), "/run/token")
    save(path, bearer)
    assert load(path) == bearer


@pytest.mark.parametrize("text", ["", "nonsense", "# bearer-file: /x\n", "# nodes: a:b\n"])
def test_damaged_files_are_told(text: str, tmp_path: Path) -> None:
    path = tmp_path / "c.pem"
    path.write_text(text)
    path.chmod(0o600)
    with pytest.raises(UserError):
        load(path)


# --- first contact, login, renewal ----------------------------------------------------------------------------------


def token_of(world: World, role: TokenRole = TokenRole.CLIENT) -> str:
    return tokens.format(tokens.create(role, world.ca_hash, os.urandom(tokens.CHANCE_BYTES)))


def door(world: World, *voters: str, **answers: Any) -> Stand:
    """Lets ann in."""

    async def login(request: trust.LoginRequest, _: Any) -> trust.LoginResponse:
        return trust.LoginResponse(
            user="ann",
            certificates=trust.Certificates(
                cluster=world.cluster, certificate=world.certify_user("ann", request.csr), ca_bundle=world.ca_pem
            ),
            voters=voters,
        )

    async def authorities(*_: Any) -> trust.GetAuthoritiesResponse:
        return world.authorities(*voters)

    return Stand(**{"Login": login, "GetAuthorities": authorities, **answers})


def test_login_with_a_token(world: World) -> None:
    async def story() -> None:
        stand = door(world, "10.0.0.7:7220")
        async with serving(stand, world.node("n1")) as at:
            stored = await with_token([at], token_of(world), 8.0)
            assert stored.credentials is not None
            assert (stored.credentials.name, stored.cluster) == ("ann", world.cluster)
            assert stored.nodes == ("10.0.0.7:7220", at)
        assert stand.asked == ["GetAuthorities", "GetAuthorities", "Login"]

    run(story())


def test_a_token_of_another_cluster_is_never_shown(world: World) -> None:
    async def story() -> None:
        stand = door(world)
        async with serving(stand, world.node("n1")) as at:
            error = await refused(with_token([at], token_of(World()), 8.0))
        assert error.reason == "other-cluster"
        assert "Login" not in stand.asked

    run(story())


def test_an_authority_shown_by_somebody_who_has_not_its_key(world: World) -> None:
    """In between: real authority's certificate (it is public), own server certificate."""

    async def story() -> None:
        between = World()
        mixed = trust.GetAuthoritiesResponse(
            cluster=world.cluster, ca_bundle=between.ca_pem + world.ca_pem, wall_ms=int(time.time() * 1000), node="n1"
        )
        stand = Stand(GetAuthorities=mixed, Login=failing(Code.INTERNAL, "never"))
        async with serving(stand, between.node("n1")) as at:
            error = await refused(with_token([at], token_of(world), 8.0))
        assert error.reason == "impostor"
        assert "Login" not in stand.asked

    run(story())


def test_login_refusals_before_anything_is_sent(world: World) -> None:
    async def story() -> None:
        for text, reason in (
            ("", "not-a-token"),
            ("hello", "not-a-token"),
            (token_of(world)[:-5], "token-truncated"),
            (token_of(world, TokenRole.VOTER), "token-role"),
        ):
            error = await refused(with_token(["127.0.0.1:1"], text, 1.0))
            assert error.reason == reason
            assert not text or text not in str(error)

    run(story())


def test_first_contact_with_what_is_no_node(world: World) -> None:
    async def story() -> None:
        async with serving(door(world), None) as at:
            assert (await refused(meet([at], world.ca_hash))).reason == "not-tls"
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            with pytest.raises(StoreUnavailable):
                await meet([f"127.0.0.1:{sock.getsockname()[1]}"], world.ca_hash)
        assert (await refused(meet([], world.ca_hash))).message == "no node is named"

    run(story())


def test_first_contact_tells_of_clocks_that_are_apart(world: World) -> None:
    async def story() -> None:
        answer = world.authorities()
        answer.wall_ms -= 3_600_000
        async with serving(Stand(GetAuthorities=answer), world.node("n1")) as at:
            error = await refused(meet([at], world.ca_hash))
        assert error.reason == "clock"
        assert "3600 s apart" in error.message
        assert f"at most {CLOCK_SKEW_MAX_S:g} s" in error.hint

    run(story())


@pytest.mark.parametrize("sign", [-1, 1])
def test_first_contact_and_the_door_have_one_limit_for_clocks(world: World, sign: int) -> None:
    """What the first contact takes, the door must not refuse right after it."""

    async def met_with(apart_s: float) -> str:
        answer = world.authorities()
        answer.wall_ms += int(sign * apart_s * 1000)
        async with serving(Stand(GetAuthorities=answer), world.node("n1")) as at:
            try:
                await meet([at], world.ca_hash)
            except UserError as e:
                return e.reason
        return ""

    async def story() -> None:
        assert await met_with(CLOCK_SKEW_MAX_S - 15) == ""
        assert await met_with(CLOCK_SKEW_MAX_S + 15) == "clock"
        check_clocks(int(CLOCK_SKEW_MAX_S * 1000), 0, "n1")

    run(story())


def test_first_contact_without_a_hash_is_for_comparing_only(world: World) -> None:
    async def story() -> None:
        stand = door(world)
        async with serving(stand, world.node("n1")) as at:
            met = await meet([at], None)
            assert (met.verified, met.ca_hash) == (False, world.ca_hash)
            verified = await meet([at], met.ca_hash)
            assert verified.verified
            stored = await with_bearer(verified, "abc", 8.0)
            assert stored.credentials is not None
            for showing in (with_bearer(met, "abc", 8.0), whose_bearer(met, "abc", 8.0)):
                with pytest.raises(InvariantViolation):
                    await showing
        assert [m.get("authorization") for m in stand.metadata] == [None, None, None, "Bearer abc"]

    run(story())


def renewing(world: World, **answers: Any) -> Stand:
    async def answer(request: trust.RenewRequest, _: Any) -> trust.RenewResponse:
        pem = world.certify_user("ann", request.csr)
        return trust.RenewResponse(certificates=trust.Certificates(certificate=pem, ca_bundle=world.ca_pem))

    return Stand(**{"Renew": answer, "GetTrust": trust.GetTrustResponse(ca_bundle=world.ca_pem), **answers})


def test_a_new_authority_is_learned_of_and_its_certificate_fetched(world: World, tmp_path: Path) -> None:
    async def story() -> None:
        path, bearer = world.user_file(tmp_path / "c.pem"), tmp_path / "b.pem"
        write_private(tmp_path / "token", b"abc")
        save(bearer, Stored(world.ca_pem, None, ("10.0.0.5:7220",), str(tmp_path / "token")))
        before, heir = load(path), World()  # of the same cluster
        stand = renewing(heir, GetTrust=trust.GetTrustResponse(ca_bundle=heir.ca_pem + world.ca_pem))
        async with serving(stand, world.node("n1")) as at:
            for file in (path, bearer):
                async with client_of(at, credentials=file) as client:
                    assert await renew(client, file, time.time()) is None  # looked at a moment ago
                    assert await renew(client, file, time.time() + 7 * HOUR_S) is None
                    assert await renew(client, file, time.time()) is None
        assert stand.asked == ["GetTrust", "Renew", "GetTrust"]
        after = load(path).credentials
        assert after is not None
        assert certificates.identity_of(after.cert_pem, [heir.ca_pem], world.cluster, now_s=time.time()) is not None
        assert after != before.credentials
        assert load(bearer) == Stored(heir.ca_pem + world.ca_pem, None, ("10.0.0.5:7220",), str(tmp_path / "token"))

    run(story())


def test_authorities_of_another_cluster_are_not_taken(world: World, tmp_path: Path) -> None:
    async def story() -> None:
        path, other = world.user_file(tmp_path / "c.pem"), World(cluster="ffffffffffffffff")
        before = path.read_bytes()
        stand = renewing(world, GetTrust=trust.GetTrustResponse(ca_bundle=world.ca_pem + other.ca_pem))
        async with serving(stand, world.node("n1")) as at, client_of(at, credentials=path) as client:
            assert await renew(client, path, time.time() + 0.5 * HOUR_S + 7 * HOUR_S) is not None
        assert path.read_bytes() == before

    run(story())


def test_renewal_at_two_thirds_of_life(world: World, tmp_path: Path) -> None:
    async def story() -> None:
        fresh = world.user_file(tmp_path / "fresh.pem")
        old = world.user_file(tmp_path / "old.pem", "ann", "10.0.0.5:7220", since_s=-HOUR_S, life_s=HOUR_S * 1.2)
        stand = renewing(world)
        async with serving(stand, world.node("n1")) as at:
            for path in (fresh, old):
                before = path.read_bytes()
                async with client_of(at, credentials=path) as client:
                    assert await renew(client, path, time.time()) is None
                assert (path.read_bytes() != before) == (path == old)
        assert stand.asked == ["GetTrust", "Renew"]
        stored = load(old)
        assert stored.nodes == ("10.0.0.5:7220",)
        assert stored.credentials is not None
        assert certificates.expiry(stored.credentials.cert_pem)[1] > time.time() + HOUR_S / 2

    run(story())


def test_a_renewal_that_fails_is_quiet_until_the_end_is_near(world: World, tmp_path: Path) -> None:
    async def story() -> None:
        path = world.user_file(tmp_path / "old.pem", since_s=-HOUR_S, life_s=HOUR_S * 1.3)
        before = path.read_bytes()
        stand = renewing(world, Renew=failing(Code.PERMISSION_DENIED, "denied", message="user ann is revoked"))
        async with serving(stand, world.node("n1")) as at, client_of(at, credentials=path) as client:
            assert await renew(client, path, time.time()) is None
            _, until_s = certificates.expiry(load(path).credentials.cert_pem)  # type: ignore[union-attr]
            warning = await renew(client, path, until_s - 60)
        assert warning is not None
        assert "could not be renewed: user ann is revoked" in warning
        assert path.read_bytes() == before

    run(story())


# --- refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "reason"), [(Code.PERMISSION_DENIED, "denied"), (Code.UNAUTHENTICATED, "unauthenticated")]
)
def test_refusals_keep_their_words(code: grpc.StatusCode, reason: str, world: World) -> None:
    async def story() -> None:
        stand = Stand(WhoAmI=failing(code, reason, message="user ann may not do that"))
        async with serving(stand, world.node("n1")) as at, client_of(at, credentials=world.user()) as client:
            error = await refused(client.admin.whoami())
        assert isinstance(error, Denied)
        assert (error.reason, error.message) == (reason, "user ann may not do that")
        assert stand.asked == ["WhoAmI"]  # not asked again: another node would say the same

    run(story())
