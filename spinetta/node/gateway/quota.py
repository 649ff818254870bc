"""How much one node may ask of the gateway. What is beyond is refused at once, with its reason: nothing waits here."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from spinetta.gatewaycodec import Busy
from spinetta.model import NodeId

ACCOUNTS_MAX = 10_000  # remembered; idle ones are forgotten first, and they are full again by then


@dataclass(frozen=True, slots=True)
class GatewayLimits:
    """Of each worker, at one voter. A busy node makes some 20 calls a second and holds four watches.

    Attributes:
        calls_per_s, calls_burst: calls of any kind.
        bytes_per_s, bytes_burst: of requests and answers, watches aside.
        calls_max: under way at once.
        watches_max: open at once; those of a node of role voter have `voter_watches_max`, each with one at etcd.
    """

    calls_per_s: float = 200.0
    calls_burst: float = 1000.0
    bytes_per_s: float = 8 << 20
    bytes_burst: float = 64 << 20
    calls_max: int = 64
    watches_max: int = 16
    voter_watches_max: int = 256


@dataclass(slots=True)
class _Account:
    calls: float
    bytes: float
    at_s: float
    running: int = 0
    watching: int = 0


@dataclass(slots=True)
class Quota:
    """The accounts of all nodes."""

    limits: GatewayLimits = field(default_factory=GatewayLimits)
    clock: Callable[[], float] = time.monotonic
    _accounts: dict[NodeId, _Account] = field(default_factory=dict)

    @property
    def watching(self) -> int:
        """Watches that are open."""
        return sum(account.watching for account in self._accounts.values())

    def _account(self, node: NodeId) -> _Account:
        now_s = self.clock()
        account = self._accounts.get(node)
        if account is None:
            if len(self._accounts) >= ACCOUNTS_MAX:
                self._forget(now_s)
            account = self._accounts[node] = _Account(self.limits.calls_burst, self.limits.bytes_burst, now_s)
        passed_s = now_s - account.at_s
        account.at_s = now_s
        account.calls = min(self.limits.calls_burst, account.calls + passed_s * self.limits.calls_per_s)
        account.bytes = min(self.limits.bytes_burst, account.bytes + passed_s * self.limits.bytes_per_s)
        return account

    def _forget(self, now_s: float) -> None:
        limits = self.limits
        full_s = max(limits.calls_burst / limits.calls_per_s, limits.bytes_burst / limits.bytes_per_s)
        self._accounts = {
            node: a for node, a in self._accounts.items() if a.running or a.watching or now_s - a.at_s < full_s
        }

    def charge(self, node: NodeId, size_bytes: int) -> None:
        """Count what has been sent to a node; it may fall into debt, which its next call must wait out."""
        self._account(node).bytes -= size_bytes

    @contextlib.contextmanager
    def call(self, node: NodeId, size_bytes: int) -> Iterator[None]:
        """One call. Raises `Busy` when the node has asked for too much."""
        account = self._account(node)
        if account.calls < 1:
            raise Busy(f"{node} makes more than {self.limits.calls_per_s:g} calls a second", hint="try again later")
        if account.bytes < 0:
            raise Busy(f"{node} moves more than {self.limits.bytes_per_s:g} bytes a second", hint="try again later")
        if account.running >= self.limits.calls_max:
            raise Busy(f"{node} has {account.running} calls under way already", hint="wait for their answers")
        account.calls -= 1
        account.bytes -= size_bytes
        account.running += 1
        try:
            yield
        finally:
            account.running -= 1

    @contextlib.contextmanager
    def watch(self, node: NodeId, *, is_voter: bool) -> Iterator[None]:
        """One watch. Raises `Busy` when the node has too many, or asks too often."""
        with self.call(node, 0):
            account = self._accounts[node]
        most = self.limits.voter_watches_max if is_voter else self.limits.watches_max
        if account.watching >= most:
            raise Busy(f"{node} has {account.watching} watches open already", hint="close some")
        account.watching += 1
        try:
            yield
        finally:
            account.watching -= 1
