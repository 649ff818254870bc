"""The store, straight from etcd."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any

import grpc

from spinetta.errors import Compacted, InvariantViolation, StoreUnavailable
from spinetta.model import LeaseId, Revision
from spinetta.store import wire
from spinetta.store.connection import REQUIRE_LEADER, Connections
from spinetta.store.failures import GONE, TOO_LARGE_FOR_CLIENT, Refused, cancelled_ourselves, refusal
from spinetta.store.process import EtcdTls
from spinetta.store.protocol import READ_KEYS_MAX, Changes, KeyValue, Page, Snapshot
from spinetta.store.watch import watch
from spinetta.txn import Conflict, Result, Txn

PAGE_KEYS = 4096  # of an unlimited list: what one message carries, far below RECEIVE_BYTES_MAX for records of ours


class EtcdStore:
    """`Store` over etcd's own API.

    Construct and use it inside one event loop. The first endpoint is preferred (a node's own member); others are asked
    while it fails. Connections are opened at first use and kept.

    Args:
        tls: where this voter's etcd certificates are; None: plain text.

    Raises:
        UserError: an endpoint is not ``HOST:PORT`` or ``http://HOST:PORT`` (with `tls` ``https://HOST:PORT``).
    """

    def __init__(self, endpoints: Sequence[str], tls: Callable[[], EtcdTls] | None = None) -> None:
        self._connections = Connections(endpoints, tls)

    @property
    def endpoints(self) -> tuple[str, ...]:
        """Those in use as URLs, which is how etcd tells of its members; the preferred one first."""
        scheme = "http" if self._connections.tls is None else "https"
        return tuple(f"{scheme}://{endpoint}" for endpoint in self._connections.endpoints)

    @property
    def connections(self) -> Connections:
        """For `Members`, which asks the same etcd about itself."""
        return self._connections

    async def set_endpoints(self, endpoints: Sequence[str]) -> None:
        """Use these from now on. Watches over an endpoint that is no longer among them end with `StoreUnavailable`."""
        await self._connections.set_endpoints(endpoints)

    async def refresh(self) -> bool:
        """As `Connections.refresh`: to be called when the certificate files have changed, before the old ones end."""
        return await self._connections.refresh()

    async def close(self) -> None:
        """Let go of connections. May be called twice."""
        await self._connections.close()

    # --- transactions ------------------------------------------------------------------------------------------

    async def commit(self, txn: Txn, *, timeout_s: float = 5.0) -> Result:
        """As `Store.commit`. A put under a lease that is gone is a guard that fails: `Conflict`.

        Raises also:
            UserError: it is larger than etcd takes.
            InvariantViolation: etcd refuses its form, e.g. a key put twice.
        """
        request = wire.txn_request(txn)
        try:
            response = await self._connections.call(_txn, request, timeout_s=timeout_s, write=True)
        except Refused as error:
            if "lease not found" in error.text:
                return Conflict((await self.read((), timeout_s=timeout_s)).revision)
            raise refusal(error) from error
        return wire.txn_result(txn, response)

    # --- reading -----------------------------------------------------------------------------------------------

    async def _read(self, method: Callable[[wire.Stubs], Any], request: wire.Message, timeout_s: float) -> wire.Message:
        try:
            return await self._connections.call(method, request, timeout_s=timeout_s, write=False)
        except Refused as error:
            raise refusal(error) from error

    async def read(self, keys: Sequence[str], *, timeout_s: float = 5.0) -> Snapshot:
        """As `Store.read`."""
        wanted = tuple(dict.fromkeys(keys))
        if len(wanted) > READ_KEYS_MAX:
            raise InvariantViolation(f"{len(wanted)} keys in one read: at most {READ_KEYS_MAX}")
        if not wanted:
            response = await self._read(_txn, wire.txn_request(Txn()), timeout_s)
            return Snapshot(Revision(response.header.revision), {})
        response = await self._read(_txn, wire.read_request(wanted), timeout_s)
        entries = dict(zip(wanted, wire.read_result(response), strict=True))
        return Snapshot(Revision(response.header.revision), entries)

    async def list(
        self,
        prefix: str,
        *,
        after: str = "",
        limit: int = 0,
        keys_only: bool = False,
        newest_first: bool = False,
        revision: Revision = Revision(0),
        timeout_s: float = 5.0,
    ) -> Page:
        """As `Store.list`; `timeout_s` is for each message of a long list.

        `newest_first` makes etcd read and sort the whole range first: bound it by a longer prefix where you can.

        Raises also:
            Compacted: `revision` is no longer to be had.
        """
        low, end = wire.prefix_range(prefix)
        found: list[KeyValue] = []
        page_keys = min(limit, PAGE_KEYS) if limit else PAGE_KEYS
        at, cursor, total = revision, after, 0
        while True:
            try:
                page = await self._page(low, end, cursor, page_keys, keys_only, newest_first, at, timeout_s)
            except _PageTooLarge:
                if page_keys == 1:
                    raise StoreUnavailable(f"a value under {prefix} is larger than a message may be") from None
                page_keys = max(1, page_keys // 8)
                continue
            found += page.entries
            total = total or page.total
            at = page.revision  # the pages of one list are of one revision
            wanted = limit - len(found) if limit else PAGE_KEYS
            if not page.more or wanted <= 0:
                return Page(at, tuple(found), page.more, total)
            cursor = found[-1].key
            page_keys = min(page_keys, wanted)

    async def _page(
        self,
        low: bytes,
        end: bytes,
        cursor: str,
        limit: int,
        keys_only: bool,
        newest_first: bool,
        revision: Revision,
        timeout_s: float,
    ) -> Page:
        if cursor and newest_first:
            end = min(end, wire.encode(cursor)) if end != wire.ALL_KEYS else wire.encode(cursor)
        elif cursor:
            low = max(low, wire.encode(cursor) + b"\0")
        request = wire.range_request(
            low, end, limit=limit, keys_only=keys_only, descending=newest_first, revision=revision
        )
        try:
            response = await self._connections.call(_range, request, timeout_s=timeout_s, write=False)
        except Refused as error:
            if "has been compacted" in error.text:
                raise Compacted(revision + 1) from error
            if TOO_LARGE_FOR_CLIENT in error.text:
                raise _PageTooLarge from error
            raise refusal(error) from error
        entries = tuple(wire.key_value(kv) for kv in response.kvs)
        return Page(revision or Revision(response.header.revision), entries, response.more, response.count)

    def watch(self, prefix: str, *, start: Revision) -> AsyncGenerator[Changes, None]:
        """As `Store.watch`. Close it (``contextlib.aclosing``) when leaving it early."""
        return watch(self._connections, prefix, start)

    # --- leases ------------------------------------------------------------------------------------------------

    async def grant_lease(self, ttl_s: int, *, timeout_s: float = 5.0) -> LeaseId:
        """As `Store.grant_lease`. Etcd raises very short ones (default settings: to 2 s)."""
        try:
            response = await self._connections.call(_grant, wire.lease_grant(ttl_s), timeout_s=timeout_s, write=True)
        except Refused as error:
            raise refusal(error) from error
        return LeaseId(response.ID)

    async def keep_alive(self, lease: LeaseId, *, timeout_s: float = 5.0) -> float | None:
        """As `Store.keep_alive`. An answer proves nothing about the store: a frozen ex-leader keeps answering."""
        connection = await self._connections.pick(timeout_s)
        with connection.use() as stubs:
            call = stubs.lease.LeaseKeepAlive(timeout=timeout_s, metadata=REQUIRE_LEADER)
            try:
                await call.write(wire.lease_keep_alive(lease))
                response = await call.read()
            except grpc.aio.AioRpcError as error:
                connection.hold()
                raise StoreUnavailable(f"lease not renewed: {connection.endpoint}: {error.details()}") from error
            except GONE as error:
                if cancelled_ourselves():
                    raise
                raise StoreUnavailable(
                    f"lease not renewed: {connection.endpoint}: the connection was closed"
                ) from error
            finally:
                call.cancel()
        if response is grpc.aio.EOF:
            connection.hold()
            raise StoreUnavailable(f"lease not renewed: {connection.endpoint} ended the stream")
        return float(response.TTL) if response.TTL > 0 else None

    async def revoke_lease(self, lease: LeaseId, *, timeout_s: float = 5.0) -> None:
        """As `Store.revoke_lease`."""
        try:
            await self._connections.call(_revoke, wire.lease_revoke(lease), timeout_s=timeout_s, write=True)
        except Refused as error:
            if "lease not found" not in error.text:
                raise refusal(error) from error

    # --- upkeep ------------------------------------------------------------------------------------------------

    async def compact(self, revision: Revision, *, timeout_s: float = 5.0) -> None:
        """Forget the history before `revision`. No error when it is forgotten already."""
        try:
            await self._connections.call(_compact, wire.compaction(revision), timeout_s=timeout_s, write=True)
        except Refused as error:
            if "has been compacted" not in error.text:
                raise refusal(error) from error


class _PageTooLarge(Exception):
    """A page did not fit into a message; never leaves `EtcdStore.list`."""


def _txn(stubs: wire.Stubs) -> Any:
    return stubs.kv.Txn


def _range(stubs: wire.Stubs) -> Any:
    return stubs.kv.Range


def _compact(stubs: wire.Stubs) -> Any:
    return stubs.kv.Compact


def _grant(stubs: wire.Stubs) -> Any:
    return stubs.lease.LeaseGrant


def _revoke(stubs: wire.Stubs) -> Any:
    return stubs.lease.LeaseRevoke
