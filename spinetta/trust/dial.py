"""Connections to nodes, and what servers show: the only place that makes channels and credentials for the API.

Nobody checks the addresses of nodes. A caller says whom it *expects*, and the certificate must name that: any voter,
any worker, or one node. A gateway connection expects a voter, so that a hostile worker cannot pose as one.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import grpc
import grpc.aio

from spinetta import names
from spinetta.access import NodeRole
from spinetta.errors import StoreUnavailable, UserError
from spinetta.trust import certificates, guest

Pems: TypeAlias = tuple[bytes, bytes, bytes]  # bundle of authorities, certificate, key
Option: TypeAlias = tuple[str, Any]

VOTER = "voter"
WORKER = "worker"
ANY = "any"  # whatever node: for the first contact only, as anything that is said to it a hostile worker hears

_EXPECTED = {
    VOTER: certificates.ROLE_NAMES[NodeRole.VOTER],
    WORKER: certificates.ROLE_NAMES[NodeRole.WORKER],
    ANY: certificates.ANY_NODE_NAME,
}


def node_name(name: str) -> str:
    """What to expect of one node only.

    Raises:
        UserError: not a name for a node.
    """
    return certificates.node_dns(names.check_node_name(name))


async def stands(channel: grpc.aio.Channel) -> bool:
    """Wait until a channel is connected; False when that failed or it was closed. No limit of its own."""
    while (state := channel.get_state(try_to_connect=True)) is not grpc.ChannelConnectivity.READY:
        if state in (grpc.ChannelConnectivity.TRANSIENT_FAILURE, grpc.ChannelConnectivity.SHUTDOWN):
            return False
        try:
            await channel.wait_for_state_change(state)
        except grpc.aio.UsageError:  # closed while we waited
            return False
    return True


class Dialer:
    """Makes channels to nodes, all with the same proof of who is calling.

    Attributes:
        is_secured: its channels are mutual TLS; otherwise plain text, on loopback only.
    """

    def __init__(self, get: Callable[[], Pems] | None, token: Callable[[], str] | None = None) -> None:
        self._get = get
        self._token = token
        self._serial = 0
        self._pems: Pems | None = None
        self._credentials: grpc.ChannelCredentials | None = None

    @classmethod
    def open(cls) -> Dialer:
        """Plain text, on loopback only."""
        return cls(None)

    @classmethod
    def secured(cls, get: Callable[[], Pems]) -> Dialer:
        """With a certificate. `get` is asked at every look at `serial`, so it must be quick."""
        return cls(get)

    @classmethod
    def guest(cls, ca_pem: bytes) -> Dialer:
        """Without an identity, but knowing the cluster's authorities: to join, or to log in."""
        key, certificate = guest.guest_pair()
        return cls(lambda: (ca_pem, certificate, key))

    @classmethod
    def bearer(cls, ca_pem: bytes, token: Callable[[], str]) -> Dialer:
        """With a bearer token, which is asked for at every call; what `token` raises, the call raises.

        Only a node that has proved to be a voter is shown it: others could use it in their turn.
        """
        key, certificate = guest.guest_pair()
        return cls(lambda: (ca_pem, certificate, key), token)

    @property
    def is_secured(self) -> bool:
        """Whether its channels are mutual TLS."""
        return self._get is not None

    @property
    def has_token(self) -> bool:
        """Whether a bearer token says who is calling. Only voters are shown it."""
        return self._token is not None

    @property
    def pems(self) -> Pems | None:
        """What its channels are made with now: to find out why none of them works. None for plain text."""
        return None if self._get is None else self._get()

    @property
    def serial(self) -> int:
        """Grows when the certificates have changed: channels made before should be replaced."""
        if self._get is not None:
            pems = self._get()
            if pems != self._pems:
                self._pems, self._credentials = pems, None
                self._serial += 1
        return self._serial

    def channel(self, address: str, expect: str, options: Sequence[Option] = ()) -> grpc.aio.Channel:
        """A new channel to HOST:PORT. Nothing is sent yet.

        Args:
            address: of the API.
            expect: `VOTER`, `WORKER`, `ANY`, or one node's `node_name`.
            options: gRPC's.

        Raises:
            UserError: not an address; or it is off loopback, and this dialer has plain text only (reason
                ``off-loopback``).
        """
        address = names.check_address(address)  # nothing else that gRPC would understand, such as unix:/path
        if self._get is None:
            return grpc.aio.insecure_channel(names.require_loopback(address), options=list(options))
        own = (
            ("grpc.ssl_target_name_override", _EXPECTED.get(expect, expect)),
            ("grpc.use_local_subchannel_pool", 1),  # a connection made with other certificates is never used again
        )
        bearers: list[Any] = []
        if self._token is not None and expect == VOTER:
            bearers = [kind(self._token) for kind in _BEARERS]
        return grpc.aio.secure_channel(address, self._tls(), options=[*options, *own], interceptors=bearers)

    def _tls(self) -> grpc.ChannelCredentials:
        _ = self.serial  # the latest ones
        if self._credentials is None:
            assert self._pems is not None  # noqa: S101 - `serial` has set it
            ca_pem, certificate, key = self._pems
            self._credentials = grpc.ssl_channel_credentials(ca_pem, key, certificate)
        return self._credentials


class _Bearer:
    """Puts the token of the moment into each call.

    Not gRPC's own call credentials: their plug-in is called, and let go of, in threads of gRPC's, which wait for the
    interpreter with a lock in hand. A server that stops in the same process waits for that lock: for ever.
    """

    def __init__(self, token: Callable[[], str]) -> None:
        self._token = token

    async def pass_on(self, continuation: Any, details: Any, request: Any) -> Any:
        others = [(k, v) for k, v in details.metadata or () if k != "authorization"]
        metadata = grpc.aio.Metadata(*others, ("authorization", f"Bearer {self._token()}"))
        return await continuation(details._replace(metadata=metadata), request)


# A class for each kind of call: of one that is for several gRPC uses the first only.
class _BearerUnaryUnary(_Bearer, grpc.aio.UnaryUnaryClientInterceptor):
    async def intercept_unary_unary(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return await self.pass_on(continuation, client_call_details, request)


class _BearerUnaryStream(_Bearer, grpc.aio.UnaryStreamClientInterceptor):
    async def intercept_unary_stream(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return await self.pass_on(continuation, client_call_details, request)


class _BearerStreamUnary(_Bearer, grpc.aio.StreamUnaryClientInterceptor):
    async def intercept_stream_unary(self, continuation: Any, client_call_details: Any, request_iterator: Any) -> Any:
        return await self.pass_on(continuation, client_call_details, request_iterator)


class _BearerStreamStream(_Bearer, grpc.aio.StreamStreamClientInterceptor):
    async def intercept_stream_stream(self, continuation: Any, client_call_details: Any, request_iterator: Any) -> Any:
        return await self.pass_on(continuation, client_call_details, request_iterator)


_BEARERS = (_BearerUnaryUnary, _BearerUnaryStream, _BearerStreamUnary, _BearerStreamStream)


def server_credentials(get: Callable[[], Pems]) -> grpc.ServerCredentials:
    """What a node shows, and whom it lets in: certificates of its cluster, and guests.

    `get` is asked at every handshake, in a thread of gRPC's: it must be quick and must not raise. What it gives
    anew counts from that handshake on, for its own certificate as well as for the authorities it believes.
    """
    shown: list[Pems] = [get()]

    def configuration(pems: Pems) -> grpc.ServerCertificateConfiguration:
        ca_pem, certificate, key = pems
        return grpc.ssl_server_certificate_configuration(
            [(key, certificate)], ca_pem.rstrip() + b"\n" + guest.guest_authority_pem()
        )

    def fetch() -> grpc.ServerCertificateConfiguration | None:
        pems = get()
        if pems == shown[0]:
            return None
        shown[0] = pems
        return configuration(pems)

    return grpc.dynamic_ssl_server_credentials(
        configuration(shown[0]),
        fetch,  # type: ignore[arg-type] # None is lawful, and means no change: the stubs do not know
        require_client_authentication=True,
    )


async def fetch_leaf(address: str, timeout_s: float) -> bytes:
    """The certificate that a node shows, as PEM. It proves nothing: whoever is in between can show another.

    Raises:
        UserError: not an address; what answers is no node of a secured cluster (reasons ``not-tls``, ``not-a-node``);
            or the clocks are apart (``clock``).
        StoreUnavailable: nothing answers.
    """
    address = names.check_address(address)
    host, port = names.bare_host(address), int(address.rpartition(":")[2])
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # verifies nothing, so the system's authorities are not loaded
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    try:
        async with asyncio.timeout(timeout_s):
            _, writer = await asyncio.open_connection(host, port, ssl=context)
    except TimeoutError:
        raise StoreUnavailable(f"nothing answers at {address} within {timeout_s:g} s") from None
    except ssl.SSLError:
        raise _not_tls(address) from None
    except (ConnectionResetError, BrokenPipeError):
        raise _not_tls(address) from None
    except socket.gaierror as e:
        raise StoreUnavailable(f"there is no address of {host!r}: {e.strerror}") from e
    except OSError as e:
        raise StoreUnavailable(f"nothing answers at {address}: {e.strerror or e}") from e
    tls = writer.get_extra_info("ssl_object")
    der, protocol = tls.getpeercert(binary_form=True), tls.selected_alpn_protocol()
    writer.transport.abort()
    with contextlib.suppress(OSError, ssl.SSLError):
        await writer.wait_closed()
    leaf = ssl.DER_cert_to_PEM_cert(der).encode() if der else b""
    try:
        identity = certificates.describe(leaf)
    except UserError:
        identity = None
    if identity is None or identity.kind != "node" or protocol != "h2":
        raise UserError(f"what answers at {address} is not a node of Spinetta", reason="not-a-node")
    check_clock(identity, address, time.time())
    return leaf


def check_clock(identity: certificates.Identity, address: str, now_s: float) -> None:
    """Refuse when a certificate is not good now.

    Raises:
        UserError: with reason ``clock``.
    """
    if identity.not_before_s <= now_s <= identity.not_after_s:
        return
    early = now_s < identity.not_before_s
    raise UserError(
        f"the certificate of node {identity.name} at {address} "
        + (f"becomes valid {_utc(identity.not_before_s)}" if early else f"expired {_utc(identity.not_after_s)}")
        + f", and here it is {_utc(now_s)}",
        hint="set this machine's clock, or that one's; then try again" if early else "see to both machines' clocks",
        reason="clock",
    )


def unverified(leaf_pem: bytes) -> Dialer:
    """A guest who believes whoever has the key of this very certificate, as fetched by `fetch_leaf`.

    For one question only: which authorities there are. The answer is to be compared with a token.
    """
    return Dialer.guest(leaf_pem)


def _utc(time_s: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(time_s))


def _not_tls(address: str) -> UserError:
    return UserError(
        f"what answers at {address} does not speak TLS",
        hint="an open cluster, on loopback only, needs no token; otherwise look at the address",
        reason="not-tls",
    )
