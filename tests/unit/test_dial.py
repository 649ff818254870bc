"""Connections: real gRPC servers with mutual TLS, and everybody who should not be believed."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any, TypeAlias

import grpc
import grpc.aio
import pytest
from cryptography.x509.oid import ExtendedKeyUsageOID

from spinetta.access import NodeRole
from spinetta.errors import StoreUnavailable, UserError
from spinetta.trust import certificates as c
from spinetta.trust import dial, guest, sealing
from spinetta.trust.credentials import NodeCredentials
from spinetta.trust.dial import ANY, VOTER, WORKER, Dialer
from tests.unit.trust_world import CLUSTER, OTHER, World, forge, forged_by

LIMIT_S = 30.0
CALL_S = 5.0
NOW_S = time.time()
WORLD = World(NOW_S)
NODE, USER, WORKER_PAIR = WORLD.node(), WORLD.user(), WORLD.node("w1", NodeRole.WORKER)
METHOD = "/test.Test/Who"
STREAM = "/test.Test/Ticks"

NOTHING: Any = b""  # the stubs do not know of methods without a message type
Ticks: TypeAlias = "grpc.aio.UnaryStreamCall[bytes, bytes]"
Pair = tuple[bytes, bytes]


def run(story: Coroutine[Any, Any, None]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(LIMIT_S):
            await story

    asyncio.run(limited())


def host() -> str:
    """An address that no other test uses at the same time."""
    return f"127.{random.randint(1, 254)}.{random.randint(0, 254)}.{random.randint(1, 254)}"


class Seen:
    """What a server knows of its callers."""

    def __init__(self) -> None:
        self.pems: list[bytes] = []
        self.tokens: list[str | None] = []

    async def who(self, _: bytes, context: Any) -> bytes:
        self.pems.append(context.auth_context().get("x509_pem_cert", [b""])[0])
        self.tokens.append(dict(context.invocation_metadata()).get("authorization"))
        identity = c.identity_of(self.pems[-1], [WORLD.ca], CLUSTER, now_s=time.time())
        return f"{identity.kind}/{identity.name}".encode() if identity else b"nobody"

    async def add(self, _: Any, context: Any) -> bytes:
        self.tokens.append(dict(context.invocation_metadata()).get("authorization"))
        return b"sum"

    async def ticks(self, _: Any, context: Any) -> AsyncIterator[bytes]:
        self.tokens.append(dict(context.invocation_metadata()).get("authorization"))
        while True:
            yield b"tick"
            await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def server(credentials: grpc.ServerCredentials | None) -> AsyncIterator[tuple[str, Seen]]:
    seen = Seen()
    it = grpc.aio.server()
    it.add_generic_rpc_handlers(
        (
            grpc.method_handlers_generic_handler(
                "test.Test",
                {
                    "Who": grpc.unary_unary_rpc_method_handler(seen.who),
                    "Ticks": grpc.unary_stream_rpc_method_handler(seen.ticks),
                    "Add": grpc.stream_unary_rpc_method_handler(seen.add),
                    "Talk": grpc.stream_stream_rpc_method_handler(seen.ticks),
                },
            ),
        )
    )
    place = f"{host()}:0"
    port = it.add_insecure_port(place) if credentials is None else it.add_secure_port(place, credentials)
    await it.start()
    try:
        yield f"{place[:-2]}:{port}", seen
    finally:
        await it.stop(0)


def shown(pair: Pair, ca: bytes = WORLD.ca) -> grpc.ServerCredentials:
    return dial.server_credentials(lambda: (ca, *pair))


def with_pair(pair: Pair, ca: bytes = WORLD.ca) -> Dialer:
    return Dialer.secured(lambda: (ca, *pair))


async def ask(channel: grpc.aio.Channel) -> str:
    answer: bytes = await channel.unary_unary(METHOD)(NOTHING, timeout=CALL_S)
    return answer.decode()


async def ticks(channel: grpc.aio.Channel) -> Ticks:
    call: Ticks = channel.unary_stream(STREAM)(NOTHING)
    assert await call.read() == b"tick"
    return call


async def cut(stream: Ticks) -> bool:
    """True once a stream has been ended from this side; False: it has come to its end."""
    try:
        while await stream.read() != grpc.aio.EOF:
            pass
    except grpc.aio.AioRpcError:
        return True
    except asyncio.CancelledError:  # of the stream, or of us: the time limit
        here = asyncio.current_task()
        if here is None or here.cancelling():
            raise
        return True
    return False


async def answer(dialer: Dialer, address: str, expect: str = VOTER) -> str:
    """What the server says; ``refused`` when there is no connection."""
    async with dialer.channel(address, expect, [("grpc.enable_http_proxy", 0)]) as channel:
        try:
            return await ask(channel)
        except grpc.aio.AioRpcError as e:
            if e.code() is not grpc.StatusCode.UNAVAILABLE:
                raise
            return "refused"


# --- who gets in, and as whom

KNOWN = {
    "a node": (NODE, "node/n1"),
    "a worker": (WORKER_PAIR, "node/w1"),
    "a user": (USER, "user/ann"),
    "a guest": (guest.guest_pair()[::-1], "nobody"),
}


@pytest.mark.parametrize(("pair", "name"), KNOWN.values(), ids=KNOWN)
def test_who_calls_is_known(pair: Pair, name: str) -> None:
    async def story() -> None:
        async with server(shown(NODE)) as (address, _):
            for expect in (VOTER, ANY, dial.node_name("n1")):
                assert await answer(with_pair(pair), address, expect) == name

    run(story())


def signed_by_guests(**shape: Any) -> Pair:
    subject = c.load_certificate(guest.guest_authority_pem()).subject
    pem, key = forge(guest.guest_authority_key(), subject, NOW_S, **shape)
    return pem, c.key_pem(key)


def ours(**shape: Any) -> Pair:
    pem, key = forged_by(WORLD.authority, NOW_S, **shape)
    return pem, c.key_pem(key)


def through_a_node() -> Pair:
    """A certificate that a node has signed, with the node's own beside it."""
    pem, key = forge(c.load_key(NODE[1]), c.load_certificate(NODE[0]).subject, NOW_S)
    return pem + NODE[0], c.key_pem(key)


def of_the_same_name() -> Pair:
    """Another authority that calls itself ours."""
    pem, key = forge(c.new_key(), c.load_certificate(WORLD.ca).subject, NOW_S)
    return pem, c.key_pem(key)


def of_etcd() -> Pair:
    key = c.new_key()
    authority = c.create_authority("etcd", CLUSTER, now_s=NOW_S)
    request = c.csr(key, "n1")
    return (
        c.issue_etcd(authority, request, name="n1", address="127.0.0.1", now_s=NOW_S, lifetime_s=3600),
        c.key_pem(key),
    )


STRANGERS: dict[str, tuple[Pair, str]] = {
    "a guest who says he is a node": (signed_by_guests(), "nobody"),
    "a guest who says he is the admin": (signed_by_guests(uris=[f"spiffe://{CLUSTER}/user/admin"], dns=()), "nobody"),
    "two names": (ours(uris=[f"spiffe://{CLUSTER}/node/n1", f"spiffe://{CLUSTER}/user/admin"]), "nobody"),
    "no name": (ours(uris=(), dns=()), "nobody"),
    "a wildcard": (ours(dns=("*.node.spinetta.internal",)), "nobody"),
    "another cluster's name": (ours(uris=[f"spiffe://{OTHER}/node/n1"]), "nobody"),
    "another cluster": (World(NOW_S, OTHER).node(), "refused"),
    "another cluster of our name": (World(NOW_S).node(), "refused"),
    "another authority of our authority's name": (of_the_same_name(), "refused"),
    "etcd's authority": (of_etcd(), "refused"),
    "expired": (ours(since_s=-7200, until_s=-3600), "refused"),
    "not good yet": (ours(since_s=3600, until_s=7200), "refused"),
    "signed by a node": (through_a_node(), "refused"),
    "signed by a guest": (
        (lambda g: (g[0] + guest.guest_pair()[1], c.key_pem(g[1])))(
            forge(c.load_key(guest.guest_pair()[0]), c.load_certificate(guest.guest_pair()[1]).subject, NOW_S)
        ),
        "refused",
    ),
}


@pytest.mark.parametrize(("pair", "name"), STRANGERS.values(), ids=STRANGERS)
def test_strangers_are_nobody_or_refused(pair: Pair, name: str) -> None:
    async def story() -> None:
        async with server(shown(NODE)) as (address, seen):
            assert await answer(with_pair(pair), address) == name
            assert len(seen.pems) == (name == "nobody")
            assert await answer(with_pair(NODE), address) == "node/n1"  # and others are not disturbed

    run(story())


def test_the_authority_itself_does_not_get_in_by_name() -> None:
    async def story() -> None:
        async with server(shown(NODE)) as (address, _):
            pair = (WORLD.ca, c.key_pem(WORLD.authority.key))
            assert await answer(with_pair(pair), address) in {"refused", "nobody"}

    run(story())


def test_no_certificate_and_plain_text_are_refused() -> None:
    async def story() -> None:
        async with server(shown(NODE)) as (address, seen):
            options = [("grpc.ssl_target_name_override", "voter.spinetta.internal")]
            none = grpc.aio.secure_channel(address, grpc.ssl_channel_credentials(WORLD.ca), options=options)
            async with none as channel:
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await ask(channel)
                assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
            assert await answer(Dialer.open(), address) == "refused"
            assert seen.pems == []

    run(story())


# --- whom callers believe

POSERS: dict[str, tuple[Pair, str]] = {
    "a worker as a voter": (WORKER_PAIR, VOTER),
    "a voter as a worker": (NODE, WORKER),
    "another node": (NODE, dial.node_name("n2")),
    "a guest": (guest.guest_pair()[::-1], ANY),
    "a guest with a node's names": (signed_by_guests(), VOTER),
    "a user": (USER, ANY),
    "a user with a node's names": (ours(uses=[ExtendedKeyUsageOID.CLIENT_AUTH]), VOTER),
    "another cluster": (World(NOW_S, OTHER).node(), VOTER),
    "another authority of our authority's name": (of_the_same_name(), VOTER),
    "expired": (ours(since_s=-7200, until_s=-3600), VOTER),
    "not good yet": (ours(since_s=3600, until_s=7200), VOTER),
    "signed by a node": (through_a_node(), VOTER),
    "etcd's": (of_etcd(), VOTER),
}


@pytest.mark.parametrize(("pair", "expect"), POSERS.values(), ids=POSERS)
def test_posers_hear_nothing(pair: Pair, expect: str) -> None:
    async def story() -> None:
        async with server(shown(pair)) as (address, seen):
            assert await answer(with_pair(USER), address, expect) == "refused"
            assert await answer(Dialer.bearer(WORLD.ca, lambda: "secret"), address, expect) == "refused"
            assert seen.tokens == []

    run(story())


def test_a_secured_caller_says_nothing_in_plain_text() -> None:
    async def story() -> None:
        async with server(None) as (address, seen):
            for dialer in (with_pair(USER), Dialer.bearer(WORLD.ca, lambda: "secret")):
                assert await answer(dialer, address) == "refused"
            assert seen.tokens == []

    run(story())


def test_plain_text_works_on_loopback() -> None:
    async def story() -> None:
        async with server(None) as (address, _):
            assert await answer(Dialer.open(), address) == "nobody"

    run(story())


@pytest.mark.parametrize(
    "address",
    ["10.0.0.1:7220", "example.org:7220", "[::1]:7220", "128.0.0.1:1", "0.0.0.0:7220", "127.0.0.1.evil.org:7220"],
)
def test_plain_text_stays_on_loopback(address: str) -> None:
    async def story() -> None:
        with pytest.raises(UserError) as caught:
            Dialer.open().channel(address, VOTER)
        assert caught.value.reason == "off-loopback"

    run(story())


@pytest.mark.parametrize(
    "address", ["", "x", "unix:/run/etcd.sock", "dns:///127.0.0.1:1", "127.0.0.1:0", "127.0.0.1,10.0.0.1:1"]
)
def test_only_addresses_are_dialled(address: str) -> None:
    async def story() -> None:
        for dialer in (Dialer.open(), with_pair(USER)):
            with pytest.raises(UserError):
                dialer.channel(address, VOTER)

    run(story())


def test_the_kinds_of_dialer() -> None:
    open_, secured, bearer = Dialer.open(), with_pair(USER), Dialer.bearer(WORLD.ca, lambda: "x")
    assert [d.is_secured for d in (open_, secured, bearer, Dialer.guest(WORLD.ca))] == [False, True, True, True]
    assert [d.has_token for d in (open_, secured, bearer)] == [False, False, True]
    assert open_.serial == open_.serial
    for bad in ("", "N1", "*", "n1.node.spinetta.internal"):
        with pytest.raises(UserError):
            dial.node_name(bad)


# --- bearer tokens


def test_a_token_is_asked_for_at_every_call() -> None:
    async def story() -> None:
        tokens = iter(["one", "two", "three"])
        dialer = Dialer.bearer(WORLD.ca, lambda: next(tokens))
        async with server(shown(NODE)) as (address, seen), dialer.channel(address, VOTER) as channel:
            assert [await ask(channel) for _ in range(3)] == ["nobody"] * 3
            assert seen.tokens == ["Bearer one", "Bearer two", "Bearer three"]

    run(story())


def test_every_kind_of_call_carries_the_token_once() -> None:
    async def story() -> None:
        dialer = Dialer.bearer(WORLD.ca, lambda: "good")
        async with server(shown(NODE)) as (address, seen), dialer.channel(address, VOTER) as channel:
            forged = grpc.aio.Metadata(("authorization", "Bearer other"), ("else", "1"))
            await channel.unary_unary(METHOD)(NOTHING, timeout=CALL_S, metadata=forged)
            stream: Any = channel.unary_stream(STREAM)(NOTHING)
            async for tick in stream:
                assert tick == b"tick"
                break
            stream.cancel()
            assert await channel.stream_unary("/test.Test/Add")(iter([NOTHING]), timeout=CALL_S) == b"sum"
            talk: Any = channel.stream_stream("/test.Test/Talk")(iter([NOTHING]))
            assert await anext(aiter(talk)) == b"tick"
            talk.cancel()
            assert seen.tokens == ["Bearer good"] * 4

    run(story())


def test_a_server_stops_while_channels_with_a_token_are_let_go() -> None:
    """With gRPC's own call credentials this stood still for ever within some dozens of rounds."""

    async def story() -> None:
        dialer = Dialer.bearer(WORLD.ca, lambda: "good")
        for _ in range(50):
            async with server(shown(NODE)) as (address, _), dialer.channel(address, VOTER) as channel:
                assert await ask(channel) == "nobody"

    run(story())


@pytest.mark.parametrize("expect", [ANY, WORKER, dial.node_name("w1")])
def test_only_voters_are_shown_a_token(expect: str) -> None:
    async def story() -> None:
        async with server(shown(WORKER_PAIR)) as (address, seen):
            assert await answer(Dialer.bearer(WORLD.ca, lambda: "secret"), address, expect) == "nobody"
            assert seen.tokens == [None]

    run(story())


def test_a_token_that_cannot_be_had_fails_the_call_with_the_reason() -> None:
    def gone() -> str:
        raise UserError("there is no file token.jwt")

    async def story() -> None:
        async with server(shown(NODE)) as (address, seen):
            async with Dialer.bearer(WORLD.ca, gone).channel(address, VOTER) as channel:
                with pytest.raises(UserError, match="no file"):
                    await ask(channel)
                stream: Any = channel.unary_stream(STREAM)(NOTHING)
                with pytest.raises(UserError, match="no file"):
                    await anext(aiter(stream))
            assert seen.pems == []

    run(story())


# --- certificates that change


def test_a_server_shows_a_renewed_certificate_at_the_next_connection(tmp_path: Path) -> None:
    async def story() -> None:
        credentials = NodeCredentials.create(
            tmp_path / "trust",
            ca_pem=WORLD.ca,
            node_pem=NODE[0],
            node_key_pem=NODE[1],
            sealing_private=sealing.new_sealing_key(),
        )
        async with server(dial.server_credentials(credentials.pems)) as (address, _):
            assert await dial.fetch_leaf(address, CALL_S) == NODE[0]
            async with with_pair(USER).channel(address, VOTER) as channel:
                assert await ask(channel) == "user/ann"
                renewed = WORLD.node()
                await asyncio.to_thread(credentials.update, node_pem=renewed[0], node_key_pem=renewed[1])
                assert await dial.fetch_leaf(address, CALL_S) == renewed[0]
                assert await ask(channel) == "user/ann"  # the open connection goes on
            assert await answer(with_pair(USER), address) == "user/ann"

    run(story())


def test_authorities_come_and_go_without_a_restart() -> None:
    """The whole of a rotation, as the server and its callers see it."""

    async def story() -> None:
        new = World(NOW_S)
        bundle = [WORLD.ca]
        pair = [NODE]
        async with server(dial.server_credentials(lambda: (bundle[0], *pair[0]))) as (address, seen):
            by_new = with_pair(new.user(), WORLD.ca + new.ca)
            assert await answer(by_new, address) == "refused"
            bundle[0] = WORLD.ca + new.ca
            assert await answer(by_new, address) == "nobody"  # for those who believe the old one only; TLS lets it in
            assert c.identity_of(seen.pems[-1], [bundle[0]], CLUSTER, now_s=NOW_S) is not None
            async with with_pair(USER).channel(address, VOTER) as old:
                assert await ask(old) == "user/ann"
                pair[0] = new.node()
                assert await answer(by_new, address) == "nobody"
                assert await answer(with_pair(USER), address) == "refused"  # believes the old one only
                assert await answer(with_pair(USER, WORLD.ca + new.ca), address) == "user/ann"
                bundle[0] = new.ca
                assert await answer(with_pair(USER, WORLD.ca + new.ca), address) == "refused"
                assert await ask(old) == "user/ann"  # an open connection stays: so each call is looked at anew
                assert c.identity_of(seen.pems[-1], [bundle[0]], CLUSTER, now_s=NOW_S) is None

    run(story())


def test_a_successor_certified_by_its_predecessor_is_believed_by_those_who_know_only_that() -> None:
    async def story() -> None:
        new = World(NOW_S)
        crossed = c.cross_sign(WORLD.authority, new.ca, now_s=NOW_S)
        pem, key = new.node()
        async with server(shown((pem + crossed, key), WORLD.ca + new.ca)) as (address, _):
            assert await answer(with_pair(USER), address) == "user/ann"
            assert await answer(with_pair(USER, new.ca), address) == "user/ann"

    run(story())


# --- the first contact


def test_a_newcomer_asks_the_owner_of_the_certificate_it_has_fetched() -> None:
    async def story() -> None:
        for pair in (NODE, WORKER_PAIR):
            async with server(shown(pair)) as (address, seen):
                leaf = await dial.fetch_leaf(address, CALL_S)
                assert leaf == pair[0]
                assert await answer(dial.unverified(leaf), address, ANY) == "nobody"
                assert seen.pems == [guest.guest_pair()[1]]
                assert await answer(Dialer.guest(WORLD.ca), address, ANY) == "nobody"
                other = dial.unverified(World(NOW_S).node()[0])
                assert await answer(other, address, ANY) == "refused"

    run(story())


@contextlib.asynccontextmanager
async def listener(
    talk: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]], **options: Any
) -> AsyncIterator[str]:
    async def one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.CancelledError):
            await talk(reader, writer)
        writer.transport.abort()

    it = await asyncio.start_server(one, host(), 0, **options)
    where, port = it.sockets[0].getsockname()
    async with it:
        yield f"{where}:{port}"


async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await asyncio.sleep(LIMIT_S)


async def chatty(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
    await writer.drain()
    await asyncio.sleep(LIMIT_S)


async def abrupt(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read(1)


async def failure(address: str, timeout_s: float = CALL_S) -> UserError | StoreUnavailable:
    with pytest.raises((UserError, StoreUnavailable)) as caught:
        await dial.fetch_leaf(address, timeout_s)
    assert isinstance(caught.value, (UserError, StoreUnavailable))
    return caught.value


def test_plain_text_in_place_of_a_secured_node_is_told() -> None:
    async def story() -> None:
        async with server(None) as (address, _):
            error = await failure(address)
            assert isinstance(error, UserError)
            assert error.reason == "not-tls"
            assert address in error.message
        for talk in (chatty, abrupt):
            async with listener(talk) as address:
                error = await failure(address)
                assert isinstance(error, UserError)
                assert error.reason == "not-tls"

    run(story())


def test_nothing_that_answers_is_told() -> None:
    async def story() -> None:
        with socket.socket() as taken:
            taken.bind((host(), 0))  # bound, but does not listen
            error = await failure(":".join(map(str, taken.getsockname())))
            assert isinstance(error, StoreUnavailable)
            assert "nothing answers" in str(error)
        async with listener(silent) as address:
            start_s = time.monotonic()
            error = await failure(address, 0.3)
            assert isinstance(error, StoreUnavailable)
            assert time.monotonic() - start_s < CALL_S
        error = await failure("no-such-host.invalid:7220")
        assert isinstance(error, StoreUnavailable)
        assert "no-such-host.invalid" in str(error)

    run(story())


@pytest.mark.parametrize("address", ["", "x", "127.0.0.1", "127.0.0.1:x", "127.0.0.1:99999", "a b:1", "::1"])
def test_what_is_no_address_is_told(address: str) -> None:
    async def story() -> None:
        assert isinstance(await failure(address), UserError)

    run(story())


@pytest.mark.parametrize("protocol", ["h2", "http/1.1"])
def test_another_server_with_tls_is_no_node(tmp_path: Path, protocol: str) -> None:
    pem, key = signed_by_guests(uris=(), dns=("example.org",)) if protocol == "h2" else NODE
    (tmp_path / "pem").write_bytes(pem + key)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "pem")
    context.set_alpn_protocols([protocol])

    async def story() -> None:
        async with listener(silent, ssl=context) as address:
            error = await failure(address)
            assert isinstance(error, UserError)
            assert error.reason == "not-a-node"

    run(story())


@pytest.mark.parametrize(("since_s", "until_s", "word"), [(-7200, -3600, "expired"), (3600, 7200, "becomes valid")])
def test_clocks_apart_are_told(since_s: float, until_s: float, word: str) -> None:
    async def story() -> None:
        async with server(shown(ours(since_s=since_s, until_s=until_s))) as (address, _):
            error = await failure(address)
            assert isinstance(error, UserError)
            assert error.reason == "clock"
            assert word in error.message
            assert "n1" in error.message
            assert "clock" in error.hint

    run(story())
