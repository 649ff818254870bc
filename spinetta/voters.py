"""Who sits in etcd: which single step comes next on the way to the wanted number of voters.

Pure: the leader calls `next_step` every few seconds with what it sees, carries out the step, and asks again. Nothing
is remembered between two steps, so a crash at any point is just another state to go on from: what was half done is
finished while it still can be, and rolled back otherwise.

Etcd may *pass* two voters but must never *rest* there: with two, the loss of either stops the cluster, which is worse
than one. So one → three begins only when two candidates are there, and three → one is both removals in a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Seat:
    """One etcd member.

    Attributes:
        member_id: etcd's.
        name: of its node; empty until the member has started for the first time.
        peer_url: what ties it to a node, from the moment it is added.
        learner: it has no vote yet.
        healthy: it answers and sees a leader. A learner that is healthy may still be refused as not in sync.
        stale: a learner that has been waited for long enough. Its node should then not be a candidate for a while.
    """

    member_id: int
    name: str
    peer_url: str
    learner: bool = False
    healthy: bool = True
    stale: bool = False


@dataclass(frozen=True, slots=True)
class Sitter:
    """A live node, as far as seats go.

    Attributes:
        name, peer_url: of the node; the URL its etcd member has or would have.
        candidate: it may hold a seat.
        leaving: it is about to go.
        revoked: it is not trusted any more: its seat goes first, whether it answers or not.
    """

    name: str
    peer_url: str
    candidate: bool = True
    leaving: bool = False
    revoked: bool = False

    @property
    def stays(self) -> bool:
        """It may take, or keep, a seat."""
        return self.candidate and not self.leaving and not self.revoked


@dataclass(frozen=True, slots=True)
class AddLearner:
    """Add this node's member as a learner, then have the node start it with exactly the members there are."""

    node: str
    peer_url: str


@dataclass(frozen=True, slots=True)
class Promote:
    """Give the learner its vote. Etcd refuses while it is not in sync: try again."""

    member_id: int


@dataclass(frozen=True, slots=True)
class Remove:
    """Take the member out, then have its node stop it and put its data away."""

    member_id: int
    reason: str


@dataclass(frozen=True, slots=True)
class Nothing:
    """Nothing to do now. `settled`: nothing at all; otherwise something is being waited for."""

    reason: str
    settled: bool = True


Step = AddLearner | Promote | Remove | Nothing


def next_step(
    seats: Sequence[Seat],
    nodes: Sequence[Sitter],
    *,
    wanted: int,
    me: str = "",
    leader_member_id: int = 0,
) -> Step:
    """The next step, given all members and all live nodes.

    Args:
        seats: every etcd member.
        nodes: every live node; a voter whose node is not among them is lost, and is left alone here.
        wanted: number of voters, 3 or 5 (or 1); an even number counts as the one below it.
        me: the node that carries out the step, so that it removes itself last.
        leader_member_id: etcd's leader, removed after all others because that costs an election.
    """
    alive = {node.peer_url: node for node in nodes}
    learners = [seat for seat in seats if seat.learner]
    voters = [seat for seat in seats if not seat.learner]

    for learner in learners:
        node = alive.get(learner.peer_url)
        if node is None or not node.stays or learner.stale:
            why = "did not come up in time" if learner.stale else "its node is gone" if node is None else "unwanted"
            return Remove(learner.member_id, f"learner: {why}")

    revoked = [seat for seat in voters if seat.peer_url in alive and alive[seat.peer_url].revoked]
    for voter in revoked:
        others = [seat for seat in voters if seat is not voter]
        if sum(seat.healthy for seat in others) > len(others) // 2:
            return Remove(voter.member_id, "its node has been revoked")

    # Whatever else there is to do takes a healthy majority before *and* after. Replacing the dead belongs to
    # quorum repair, which waits for proof; until then a seat whose node is silent is neither removed nor replaced.
    for voter in voters:
        if voter.peer_url not in alive:
            return Nothing(f"voter {voter.name or voter.peer_url} is lost: its seat is kept", settled=True)
        if not voter.healthy:
            return Nothing(f"voter {voter.name or voter.peer_url} is not healthy", settled=False)

    staying = [seat for seat in voters if alive[seat.peer_url].stays]
    going = [seat for seat in voters if not alive[seat.peer_url].stays]
    taken = {seat.peer_url for seat in seats}
    spares = sorted((node for node in nodes if node.stays and node.peer_url not in taken), key=lambda node: node.name)
    target = target_voters(len(staying) + len(learners) + len(spares), wanted)

    if learners:
        learner = learners[0]
        if len(staying) >= target:
            return Remove(learner.member_id, "learner: no seat for it any more")
        if not learner.healthy:
            return Nothing(f"learner {learner.name or learner.peer_url} is starting", settled=False)
        return Promote(learner.member_id)
    if len(staying) < target and spares:
        return AddLearner(spares[0].name, spares[0].peer_url)

    mine = {node.peer_url for node in nodes if node.name == me}

    def last(seat: Seat) -> tuple[bool, bool, str]:
        return seat.peer_url in mine, seat.member_id == leader_member_id, seat.peer_url

    if going and len(voters) > 1:
        return Remove(min(going, key=last).member_id, "its node gives up its seat")
    if len(staying) > max(target, 1):
        return Remove(min(staying, key=last).member_id, f"{target} voters are as many as can be had")
    if going:
        return Nothing("the last voter can only leave together with the cluster")
    short = f"{wanted} wanted, " if target < wanted else ""
    return Nothing(f"{short}{len(voters)} voters, {len(spares)} more candidates")


def target_voters(available: int, wanted: int) -> int:
    """How many voters there can be: the largest odd number within both; 0 when nobody is available."""
    count = min(available, wanted)
    return count - 1 if count and count % 2 == 0 else count
