"""What the agent must know of its node and of the cluster's times; frozen for the life of a daemon."""

from __future__ import annotations

from dataclasses import dataclass

from spinetta.model import NodeId, NodeRecord


@dataclass(frozen=True, slots=True)
class AgentSettings:
    """Times in seconds.

    Attributes:
        record: what the node says of itself; free and running are filled in as they change.
        lease_ttl_s: how long after its last keep-alive others begin to suspect the node.
        grace_s: how long a task may go on without a renewal, unless it says otherwise.
        kill_margin_s: within it before its deadline a task is killed, however busy the machine is.
        clock_rate_error: how much clock rates may differ between nodes (rho).
        reconcile_s: everything that is watched is also listed this often.
        candidate: whether the node may hold the office.
        secured: without a record of its rights under ``/acl/node/`` this node may do nothing.
        collect_after_s: finished tasks leave the store after this time; 0: not by age.
        collect_keep: at most so many finished tasks stay in it, the oldest go first; 0: any number.
        attempts_max: attempts held at once, whatever the resources: each is a process, a cgroup and two files.
    """

    record: NodeRecord
    boot_id: str
    lease_ttl_s: int = 10
    grace_s: float = 60.0
    kill_margin_s: float = 5.0
    clock_rate_error: float = 0.01
    reconcile_s: float = 45.0
    candidate: bool = True
    attempts_max: int = 512
    secured: bool = False
    collect_after_s: float = 7 * 86400.0
    collect_keep: int = 100_000

    @property
    def name(self) -> NodeId:
        """The node's name."""
        return self.record.name

    @property
    def collect_settle_s(self) -> float:
        """No finished task leaves the store before: whoever waits for it may look this seldom (see `reconcile_s`)."""
        return 2 * self.reconcile_s

    @property
    def renew_every_s(self) -> float:
        """Three tries within the time to live of the lease."""
        return self.lease_ttl_s / 3
