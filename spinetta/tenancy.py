"""The change of a node's key from one lease to another, with another time to live.

A daemon that is told to end, and leaves its tasks running, is soon followed by another. Its key is put under a longer
lease before it goes, or it would be given up, and its tasks with it, when the next one takes longer than a lease; that
one puts the key back under a short lease. Leases say when others begin to suspect; nothing safe rests on them.
"""

from __future__ import annotations

from spinetta.events import Effect, GrantLease, LeaseGranted, RevokeLease
from spinetta.model import LeaseId

TAG = "next lease"
RETRY_S = 5.0
SLACK_S = 1.0  # between the time to live that was asked for and what etcd says


class LeaseChange:
    """One change at a time."""

    def __init__(self) -> None:
        self.lease: LeaseId | None = None  # granted: the key is to be put under it
        self._ttl_s = 0  # 0: no change is wanted
        self._then_s = 0  # wanted while another change was under way: the next one
        self._granting = False
        self._not_before_s = 0.0

    @property
    def wanted(self) -> bool:
        """Whether a change is under way, or to come."""
        return bool(self._ttl_s)

    @property
    def next_s(self) -> float | None:
        """When `poll` has something to do."""
        return self._not_before_s if self._ttl_s and self.lease is None and not self._granting else None

    def want(self, ttl_s: int) -> None:
        """Put the key under a lease that lives so long; after the change that is under way, if there is one."""
        if self._granting or self.lease is not None:
            self._then_s = ttl_s
        else:
            self._ttl_s = ttl_s

    def poll(self, now: float) -> list[Effect]:
        """Ask for the lease."""
        if self.next_s is None or self._not_before_s > now:
            return []
        self._granting = True
        return [GrantLease(TAG, self._ttl_s)]

    def granted(self, event: LeaseGranted, now: float) -> list[Effect]:
        """There it is, or not."""
        self._granting = False
        if event.lease is None:
            self._not_before_s = now + RETRY_S
        elif not self._ttl_s:
            return [RevokeLease(event.lease)]
        else:
            self.lease = event.lease
        return []

    def done(self) -> None:
        """The key hangs on it."""
        self.lease, self._ttl_s, self._then_s = None, self._then_s, 0

    def failed(self, now: float) -> None:
        """Nobody knows whether it does. The lease is left to run out: to revoke it might take the key with it."""
        self.lease = None
        if self._then_s:
            self._ttl_s, self._then_s = self._then_s, 0
        self._not_before_s = now + RETRY_S
