"""How the services see the daemon they are part of: as little of it as they can do with."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from spinetta.model import Membership, NodeId, TaskId, Usage
from spinetta.node.archive import Archive
from spinetta.runtime.images.store import ImageStore
from spinetta.store.protocol import Store
from spinetta.trust.credentials import NodeCredentials
from spinetta.trust.dial import Dialer


@dataclass(frozen=True, slots=True)
class LeaveStep:
    """Progress of a node that leaves: what it does now, and how many tasks still run there."""

    step: str
    running: int = 0
    done: bool = False


@dataclass(frozen=True, slots=True)
class RunningSample:
    """What a running attempt has used so far, and how much memory, how many processes and threads it has now."""

    attempt: int
    usage: Usage
    memory_bytes: int
    pids: int
    units: tuple[tuple[str, tuple[str, ...]], ...] = ()  # by countable, the labels of those that it has


class NodePort(Protocol):
    """The daemon, as its services use it. Errors are those of `spinetta.errors`."""

    @property
    def name(self) -> NodeId:
        """This node."""
        ...

    @property
    def store(self) -> Store:
        """The cluster's truth."""
        ...

    @property
    def version(self) -> str:
        """Of the software."""
        ...

    @property
    def credentials(self) -> NodeCredentials | None:
        """This node's certificates and keys; None in an open cluster, which speaks plain text on loopback."""
        ...

    @property
    def dialer(self) -> Dialer:
        """Makes channels to other nodes, with this node's certificate."""
        ...

    @property
    def clearances(self) -> frozenset[str]:
        """The labels that count for this node now; all that it is cleared for and its groups are."""
        ...

    @property
    def archive(self) -> Archive:
        """Finished tasks that have left the store and are kept here."""
        ...

    @property
    def images(self) -> ImageStore | None:
        """The images of this node; None: it runs no containers."""
        ...

    def voter_addresses(self) -> tuple[str, ...]:
        """API addresses of the nodes with a voter's seat, as far as this node knows."""
        ...

    def audit(self, call: str, caller: str, object_: str, outcome: str, revision: int) -> None:
        """Write down who did what, or was refused, in this node's audit log."""
        ...

    def wall_ms(self) -> int:
        """The wall clock, for people and for a joining node to compare with."""
        ...

    @property
    def shim_dir(self) -> Path:
        """The state directory of this node's first shim, where logs and kept scratch spaces of all attempts are."""
        ...

    def holder_dir(self, key: str) -> Path:
        """The state directory of the shim that holds an attempt: its socket, and the attempt's scratch space."""
        ...

    def log_path(self, task_id: TaskId, attempt: int, stream: str) -> Path:
        """Where ``stdout`` or ``stderr`` of an attempt made on this node is, or would be."""
        ...

    async def running_sample(self, task_id: TaskId) -> RunningSample | None:
        """What a task that runs on this node uses; None when it is unknown or does not run here."""
        ...

    async def membership(self) -> Membership:
        """etcd's members, leader and alarms."""
        ...

    async def set_draining(self, draining: bool, *, release: bool = False, force: bool = False) -> None:
        """Stop, or start again, taking tasks. Answers when the node's record says so; may be repeated."""
        ...

    @property
    def grace_min_s(self) -> float:
        """The shortest grace a task may ask for: with less, it would be killed between two renewals."""
        ...

    def leave(self, timeout_s: float | None) -> AsyncIterator[LeaveStep]:
        """Drain, wait at most `timeout_s` for the running tasks, give the rest back, give up the seat, deregister.

        None: as long as the node's settings say.

        Goes on when the caller stops listening; asked again while it runs, reports the same progress.
        """
        ...

    async def take_seat(self, member_id: int, initial_cluster: str, cluster_id: str) -> None:
        """Start an etcd member with exactly these settings. May be repeated."""
        ...

    async def give_up_seat(self, member_id: int) -> None:
        """Stop the etcd member, which has been removed, and put its data away. May be repeated."""
        ...
