"""Keeping a node's certificates good: renewed in time, and following the cluster's authorities through a rotation."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

import grpc.aio
from cryptography.exceptions import InvalidSignature

from spinetta import accesstxn, keys
from spinetta.access import NodeAcl, NodeRole, Policy
from spinetta.errors import Denied, OutcomeUnknown, SpinettaError, StoreUnavailable
from spinetta.model import NodeId
from spinetta.node import keyring as keyrings
from spinetta.node.answers import error_of
from spinetta.node.keyring import Keyring
from spinetta.node.services.access import read
from spinetta.node.services.certify import node_certificates
from spinetta.node.trouble import TROUBLE, Teller
from spinetta.store.protocol import Store
from spinetta.trust import certificates
from spinetta.trust.credentials import EtcdPems, NodeCredentials
from spinetta.trust.dial import VOTER, Dialer
from spinetta.trust.files import unwritable, write_private
from spinetta.txn import Committed
from spinetta.v1 import trust_pb2 as pb
from spinetta.v1.trust_pb2_grpc import TrustStub

if TYPE_CHECKING:
    from spinetta.v1.trust_pb2_grpc import TrustAsyncStub

A = TypeVar("A")
log = logging.getLogger("spinetta.node")

LOOK_S = 5.0  # between looks at the cluster's authorities: a rotation waits for the slowest node
RETRY_MIN_S, RETRY_MAX_S = 1.0, 30.0
CALL_S = 10.0
LAST_PART = 0.2  # of a certificate's life left: from then on each failure is told loudly
RESTART_LEASE_S = 180  # a restart takes 5 to 10 s, on a bad disk a minute; one that dies meanwhile holds up the others
RESTART_FILE = "etcd-restart-wanted"


@dataclass(frozen=True, slots=True)
class Trust:
    """What the cluster says is to be believed now."""

    ca_bundle: bytes
    generation: int
    etcd_ca_bundle: bytes
    etcd_generation: int


@dataclass(frozen=True, slots=True)
class Report:
    """What a node says of its certificates in its record."""

    trust_generation: int
    certificate_expires_ms: int
    authority_signed: int
    etcd_trust_generation: int
    etcd_authority_signed: int


class Source(Protocol):
    """Where a node asks what to believe, and gets its certificates renewed."""

    async def look(self) -> Trust:
        """What is to be believed now.

        Raises:
            Denied: this node has no place in the cluster any more.
            StoreUnavailable, OutcomeUnknown: ask again later.
        """
        ...

    async def renew(self, csr: bytes, etcd_csr: bytes) -> pb.Certificates:
        """Fresh certificates for the same keys. Raises as `look` does."""
        ...

    async def close(self) -> None:
        """Let go of connections. May be called twice."""
        ...


class VoterSource:
    """A voter looks into the store and signs for itself."""

    def __init__(self, store: Store, keyring: Keyring, name: NodeId, address: str) -> None:
        self._store = store
        self._keyring = keyring
        self._name = name
        self._address = address

    async def look(self) -> Trust:
        """What the store says."""
        found = await read(self._store, [keys.acl_node(self._name), *keyrings.KEYS])
        check_place(found.value(NodeAcl, keys.acl_node(self._name)), self._name)
        known = keyrings.known_of(found.entries)
        return Trust(known.cluster.bundle, known.cluster.generation, known.etcd.bundle, known.etcd.generation)

    async def renew(self, csr: bytes, etcd_csr: bytes) -> pb.Certificates:
        """Signed here."""
        found = await read(self._store, [keys.acl_node(self._name), keys.POLICY, *keyrings.KEYS])
        acl = check_place(found.value(NodeAcl, keys.acl_node(self._name)), self._name)
        policy = found.value(Policy, keys.POLICY) or Policy()
        return node_certificates(
            self._keyring,
            keyrings.known_of(found.entries),
            name=self._name,
            role=acl.role,
            address=self._address,
            csr=csr,
            etcd_csr=etcd_csr,
            now_s=time.time(),
            lifetime_s=policy.node_certificate_s,
        )

    async def close(self) -> None:
        """Nothing of its own to let go of."""


class WorkerSource:
    """A worker asks any voter. Its connection is kept, and made anew when its certificates have changed."""

    def __init__(self, dialer: Dialer, addresses: Callable[[], tuple[str, ...]]) -> None:
        self._dialer = dialer
        self._addresses = addresses
        self._link: tuple[int, str, grpc.aio.Channel] | None = None

    async def look(self) -> Trust:
        """What a voter says."""
        answer = await self._ask(lambda stub: stub.GetTrust(pb.GetTrustRequest(), timeout=CALL_S))
        return Trust(answer.ca_bundle, answer.generation, answer.etcd_ca_bundle, answer.etcd_generation)

    async def renew(self, csr: bytes, etcd_csr: bytes) -> pb.Certificates:
        """Signed by a voter."""
        request = pb.RenewRequest(csr=csr, etcd_csr=etcd_csr)
        return (await self._ask(lambda stub: stub.Renew(request, timeout=CALL_S))).certificates

    async def close(self) -> None:
        """Let go of the connection. May be called twice."""
        link, self._link = self._link, None
        if link is not None:
            await link[2].close()

    async def _ask(self, call: Callable[[TrustAsyncStub], Awaitable[A]]) -> A:
        failure: SpinettaError = StoreUnavailable("no voter's address is known")
        addresses = self._addresses()
        if self._link is not None and self._link[1] in addresses:  # the one that answered last first
            addresses = (self._link[1], *(a for a in addresses if a != self._link[1]))
        for address in addresses:
            try:
                return await call(await self._stub(address))
            except grpc.aio.AioRpcError as e:
                failure = error_of(e, address)
                await self.close()
                if isinstance(failure, Denied):
                    raise failure from e
        raise failure

    async def _stub(self, address: str) -> TrustAsyncStub:
        serial = self._dialer.serial
        if self._link is None or self._link[:2] != (serial, address):
            await self.close()
            self._link = (serial, address, self._dialer.channel(address, VOTER))
        return TrustStub(self._link[2])


def check_place(acl: NodeAcl | None, name: str) -> NodeAcl:
    """The node's rights.

    Raises:
        Denied: it has none (any more).
    """
    if acl is None:
        raise Denied(f"node {name} has not been approved, or has been removed", reason="removed")
    if acl.revoked:
        raise Denied(f"node {name} has been revoked" + (f": {acl.reason}" if acl.reason else ""), reason="revoked")
    return acl


class TrustKeeper:
    """Looks at what is to be believed, renews certificates, restarts etcd when its authorities change. `run` it.

    Args:
        credentials: changed in place; servers and dialers notice by themselves.
        source: the cluster, as this node can ask it.
        report: told what to say in the node's record, whenever that has changed.
        restart_etcd: stops this node's etcd, starts it and returns when it is ready; does nothing without a seat. None
            on a worker.
        store: for the lock that lets one voter restart at a time; None on a worker.
        denied: told, in words, that this node has no place in the cluster any more.
    """

    def __init__(
        self,
        credentials: NodeCredentials,
        source: Source,
        *,
        report: Callable[[Report], Awaitable[None]],
        restart_etcd: Callable[[], Awaitable[None]] | None = None,
        store: Store | None = None,
        denied: Callable[[str], None] | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._credentials = credentials
        self._source = source
        self._report = report
        self._restart_etcd = restart_etcd
        self._store = store
        self._denied = denied
        self._clock = clock
        self._reported: Report | None = None
        self._noticed = asyncio.Event()
        self._refusal = ""
        self._cause = ""  # why certificates are not renewed: the last that was said while they were good
        self._teller = Teller(log)

    def notice(self) -> None:
        """Look at once: something has changed."""
        self._noticed.set()

    async def run(self) -> None:
        """Keep the certificates good. Runs until it is cancelled; then the source is closed."""
        try:
            await self._keep()
        finally:
            await self._source.close()

    async def _keep(self) -> None:
        failures = 0
        while True:
            self._noticed.clear()
            try:
                await self.step()
                failures, self._refusal, self._cause = 0, "", ""
                wait_s = min(LOOK_S, max(self.renew_at_s() - self._clock(), 0.1))
            except Denied as e:
                failures += 1
                self._tell_denied(e)
                wait_s = RETRY_MAX_S
            except (*TROUBLE, OSError) as e:  # OSError: from starting etcd, e.g. the disk is full
                failures += 1
                self._tell_failure(e)
                left_s = self._left_s()
                soon_s = max(left_s / 10, RETRY_MIN_S) if left_s else LOOK_S
                wait_s = min(RETRY_MIN_S * 2 ** min(failures - 1, 8), RETRY_MAX_S, soon_s)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_s * random.uniform(0.8, 1.0)):  # noqa: S311 - spreads the load
                    await self._noticed.wait()

    async def step(self) -> None:
        """One look, and all that follows from it.

        Raises:
            Denied: this node has no place in the cluster any more.
            UserError, StoreUnavailable and others, see `TROUBLE`; OSError: something did not work: try again.
        """
        trust = await self._source.look()
        await self._believe(trust)
        if self._must_renew(trust):
            await self._renew()
        if self._marker.exists():
            await self._restart()
        now = self._say(trust)
        if now != self._reported:
            await self._report(now)
            self._reported = now

    def renew_at_s(self) -> float:
        """When the certificates are renewed at the latest: at two thirds of their lives, by the wall clock."""
        return min(_renew_at_s(pem) for pem in self._certificates())

    @property
    def _marker(self) -> Path:
        return self._credentials.directory / RESTART_FILE

    def _mark(self) -> None:
        try:
            write_private(self._marker, b"")
        except OSError as e:
            raise unwritable(self._marker, e) from e

    def _unmark(self) -> None:
        try:
            self._marker.unlink(missing_ok=True)
        except OSError as e:
            raise unwritable(self._marker, e) from e

    def _certificates(self) -> list[bytes]:
        etcd = self._credentials.etcd_pems
        return [self._credentials.node_pem, *([etcd.cert_pem] if etcd is not None else [])]

    async def _believe(self, trust: Trust) -> None:
        """The authorities of now, on disk and in memory."""
        old = self._credentials.etcd_pems
        etcd = None
        if old is not None and trust.etcd_ca_bundle and trust.etcd_ca_bundle != old.ca_pem:
            if _those(trust.etcd_ca_bundle) != _those(old.ca_pem) and self._restart_etcd is not None:
                # Before the change: a crash in between must not leave etcd with authorities it has not read.
                await asyncio.to_thread(self._mark)
            etcd = EtcdPems(trust.etcd_ca_bundle, old.cert_pem, old.key_pem)
        if await asyncio.to_thread(self._credentials.update, ca_pem=trust.ca_bundle, etcd=etcd):
            log.info("the cluster's certificate authorities have changed (generation %d)", trust.generation)

    def _must_renew(self, trust: Trust) -> bool:
        etcd = self._credentials.etcd_pems
        return (
            self._clock() >= self.renew_at_s()
            or not _signed_by_first(self._credentials.node_pem, trust.ca_bundle)
            or (etcd is not None and not _signed_by_first(etcd.cert_pem, trust.etcd_ca_bundle or etcd.ca_pem))
        )

    async def _renew(self) -> None:
        mine = self._credentials
        old = mine.etcd_pems
        csr = certificates.csr(certificates.load_key(mine.node_key_pem), mine.name)
        etcd_csr = b"" if old is None else certificates.csr(certificates.load_key(old.key_pem), mine.name)
        made = await self._source.renew(csr, etcd_csr)
        etcd = None
        if old is not None and made.etcd_certificate:
            # Not its bundle: that is changed by `_believe`, which sees to it that etcd reads it.
            etcd = EtcdPems(old.ca_pem, made.etcd_certificate, old.key_pem)
        await asyncio.to_thread(mine.update, node_pem=made.certificate, etcd=etcd)
        log.info("certificates renewed, good until %s", _utc(certificates.expiry(mine.node_pem)[1]))

    async def _restart(self) -> None:
        """Restart etcd, one voter at a time. Left for the next look when another one restarts now."""
        if self._restart_etcd is None or self._store is None:
            await asyncio.to_thread(self._unmark)
            return
        lease = await self._store.grant_lease(RESTART_LEASE_S)
        try:
            txn = accesstxn.take_restart(NodeId(self._credentials.name), lease)
            if isinstance(await self._store.commit(txn), Committed):
                log.info("restarting etcd: its certificate authorities have changed")
                await self._restart_etcd()
                await asyncio.to_thread(self._unmark)
        finally:
            with contextlib.suppress(StoreUnavailable, OutcomeUnknown):  # then it ends by itself
                await self._store.revoke_lease(lease)

    def _say(self, trust: Trust) -> Report:
        mine, etcd = self._credentials, self._credentials.etcd_pems
        is_signed = _signed_by_first(mine.node_pem, trust.ca_bundle)
        is_etcd_signed = etcd is not None and _signed_by_first(etcd.cert_pem, etcd.ca_pem)
        behind = int(self._marker.exists())
        return Report(
            trust.generation,
            int(certificates.expiry(mine.node_pem)[1] * 1000),
            trust.generation if is_signed else trust.generation - 1,
            trust.etcd_generation - behind if etcd is not None else 0,
            trust.etcd_generation - int(not is_etcd_signed) if etcd is not None else 0,
        )

    def _ends_s(self) -> float:
        return min(certificates.expiry(pem)[1] for pem in self._certificates())

    def _left_s(self) -> float:
        return max(0.0, self._ends_s() - self._clock())

    def _way_back(self) -> str:
        if self._credentials.role is NodeRole.WORKER:
            return (
                "start it again with --peers and a join token (spinetta token create --role worker): "
                "it stays the same node"
            )
        return "start it again: a voter with a seat makes itself a new one"

    def _tell_denied(self, error: Denied) -> None:
        if str(error) != self._refusal:
            self._refusal = str(error)
            if self._denied is not None:
                self._denied(error.message)
            else:
                log.error("this node has no place in the cluster: %s", error)

    def _tell_failure(self, error: Exception) -> None:
        left_s = self._left_s()
        pem = self._credentials.node_pem
        life_s = certificates.expiry(pem)[1] - _issued_s(pem)
        is_silence = isinstance(error, StoreUnavailable | OutcomeUnknown)
        if left_s > 0 or not is_silence or not self._cause:  # with a certificate that has ended, nobody answers
            self._cause = str(error)
        if left_s <= 0:
            self._teller.tell(
                f"this node's certificate ended at {_utc(self._ends_s())}, as it could not be renewed: {self._cause}; "
                f"put that right, and then {self._way_back()}",
                logging.ERROR,
            )
        elif left_s < LAST_PART * life_s:
            text = f"this node's certificate ends at {_utc(self._ends_s())} and cannot be renewed: {error}"
            self._teller.tell(text, logging.WARNING)
        else:
            self._teller.tell(f"the cluster's certificate authorities cannot be looked up now: {error}")


def _issued_s(pem: bytes) -> float:
    return certificates.expiry(pem)[0] + certificates.BACKDATE_S


def _renew_at_s(pem: bytes) -> float:
    """At two thirds of the life that a certificate was given, not counting that it is backdated."""
    issued_s, until_s = _issued_s(pem), certificates.expiry(pem)[1]
    return issued_s + (until_s - issued_s) * 2 / 3


def _signed_by_first(pem: bytes, bundle: bytes) -> bool:
    """Whether the authority that signs now, the first of a bundle, has signed this certificate."""
    authority = certificates.load_certificate(bundle)
    try:
        certificates.load_certificate(pem).verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def _those(bundle: bytes) -> frozenset[bytes]:
    return frozenset(certificates.split_pem(bundle))


def _utc(time_s: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(time_s))
