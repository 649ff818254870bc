"""Stores and voters' files under mutual TLS, for tests of both."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

from cryptography import x509

from spinetta.errors import OutcomeUnknown, StoreUnavailable
from spinetta.store.etcd import EtcdStore
from spinetta.store.process import EtcdTls
from spinetta.trust.certificates import Authority
from spinetta.txn import Put, Txn
from tests.contract.etcds import VoterFiles
from tests.contract.test_membership import Node

LIMIT_S = 100.0
CALL_S = 10.0
WRITE = Txn(then=(Put("/a", b"1"),))


def run(scenario: Coroutine[Any, Any, None]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(LIMIT_S):
            await scenario

    asyncio.run(limited())


async def until(what: Callable[[], bool], limit_s: float = 30.0) -> None:
    end_s = time.monotonic() + limit_s
    while not what():
        assert time.monotonic() < end_s
        await asyncio.sleep(0.02)


async def eventually(what: Callable[[], Coroutine[Any, Any, object]], limit_s: float = 30.0) -> float:
    """Try until it raises nothing; how long that took."""
    start_s = time.monotonic()
    while True:
        try:
            await what()
            return time.monotonic() - start_s
        except (StoreUnavailable, OutcomeUnknown):
            assert time.monotonic() - start_s < limit_s
            await asyncio.sleep(0.05)


@contextlib.asynccontextmanager
async def store_of(*endpoints: str, tls: Callable[[], EtcdTls] | None) -> AsyncIterator[EtcdStore]:
    store = EtcdStore(endpoints, tls)
    try:
        yield store
    finally:
        await store.close()


def voter(folder: Path, authority: Authority, name: str = "x", **more: float) -> VoterFiles:
    folder.mkdir(exist_ok=True)
    files = VoterFiles(folder, name, "127.0.0.1", authority)
    files.renew(**more)
    return files


def shown_by(address: str, files: VoterFiles) -> x509.Certificate:
    """The certificate that a server shows to a new connection."""
    host, _, port = address.rpartition("//")[2].rpartition(":")
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    made.check_hostname, made.verify_mode = False, ssl.CERT_NONE
    made.load_cert_chain(files.tls.cert_file, files.tls.key_file)
    with (
        socket.create_connection((host, int(port)), timeout=CALL_S) as raw,
        made.wrap_socket(raw) as sock,
    ):
        found = sock.getpeercert(binary_form=True)
    assert found is not None
    return x509.load_der_x509_certificate(found)


def in_file(files: VoterFiles) -> x509.Certificate:
    return x509.load_pem_x509_certificate(files.tls.cert_file.read_bytes())


def urls_of(node: Node) -> tuple[str, str]:
    return node.client_url, node.peer_url
