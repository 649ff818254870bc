"""Who sits in etcd: which single step comes next on the way to the wanted number of voters.

Pure: the leader calls `next_step` every few seconds with what it sees, carries out the step, and asks again. Nothing
is remembered between two steps, so a crash at any point is just another state to go on from: what was half done is
finished while it still can be, and rolled back otherwise.

Etcd may *pass* two voters but must never *rest* there: with two, the loss of either stops the cluster, which is worse
than one. So one → three begins only when two candidates are there, and three → one is both removals in a row.

A voter that stays away loses its seat when another node can take it (docs/adr/0023-replacing-a-voter.md). One whose
member is dead is removed *first*: that costs nothing, as it did not count towards the majority that there is, and etcd
adds nobody while a voter is away. One whose member goes on without its node is replaced first, as one that leaves.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
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
        gone: its node has not been registered, or its member not been healthy, for so long that somebody else may
            have its seat; or a person has said that it is dead.
    """

    member_id: int
    name: str
    peer_url: str
    learner: bool = False
    healthy: bool = True
    stale: bool = False
    gone: bool = False

    @property
    def title(self) -> str:
        """What people call it."""
        return self.name or self.peer_url


@dataclass(frozen=True, slots=True)
class Sitter:
    """A live node, as far as seats go.

    Attributes:
        name, peer_url: of the node; the URL its etcd member has or would have.
        candidate: it may hold a seat.
        leaving: it is about to go.
        revoked: it is not trusted any more: its seat goes first, whether it answers or not.
        resting: its member did not come up the last time: it is tried again later, not now.
        member_id: of the member that it says it has; 0: none.
    """

    name: str
    peer_url: str
    candidate: bool = True
    leaving: bool = False
    revoked: bool = False
    resting: bool = False
    member_id: int = 0

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
    """Take the member out, then have its node stop it and put its data away.

    `successor`: the node that is to have the seat next, so that it can be looked at before; empty: none, or one that
    has its own seat already.
    """

    member_id: int
    reason: str
    successor: str = ""


@dataclass(frozen=True, slots=True)
class Nothing:
    """Nothing to do now. `settled`: nothing at all; otherwise something is being waited for."""

    reason: str
    settled: bool = True


Step = AddLearner | Promote | Remove | Nothing


class Absences:
    """Since when voters have been away, as the one who looks has seen it himself, on his own monotonic clock.

    Only unbroken looking counts: who was suspended, or has just become the leader, begins anew. So nobody is replaced
    too early; a voter that comes and goes is never replaced while it is there.
    """

    def __init__(self, limit_s: float, look_at_least_every_s: float) -> None:
        """`limit_s`: away for so long is gone; 0: nobody ever is."""
        self._limit_s = limit_s
        self._gap_s = look_at_least_every_s
        self._since_s: dict[int, float] = {}
        self._looked_s = 0.0

    def look(self, now_s: float, away: Collection[int]) -> None:
        """These members are away now, and all others are not."""
        if now_s - self._looked_s > self._gap_s:
            self._since_s.clear()
        self._looked_s = now_s
        self._since_s = {member: self._since_s.get(member, now_s) for member in away}

    def forget(self) -> None:
        """Somebody else is looking now."""
        self._since_s.clear()

    def gone(self, member_id: int) -> bool:
        """Whether it has been away for long enough, as of the last look."""
        since_s = self._since_s.get(member_id)
        return since_s is not None and 0 < self._limit_s <= self._looked_s - since_s


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
        nodes: every live node; a voter whose node is not among them is away.
        wanted: number of voters, 3 or 5 (or 1); an even number counts as the one below it.
        me: the node that carries out the step, so that it removes itself last.
        leader_member_id: etcd's leader, removed after all others because that costs an election.
    """
    plan = _Plan(seats, nodes, wanted)
    return plan.unfit_learner() or plan.revoked() or plan.away() or plan.towards_target(me, leader_member_id)


class _Plan:
    """What is seen, sorted; and the parts of the decision, in their order. A part without an answer says None."""

    def __init__(self, seats: Sequence[Seat], nodes: Sequence[Sitter], wanted: int) -> None:
        self.wanted = wanted
        self.nodes = nodes
        self.here = {node.peer_url: node for node in nodes}
        self.learners = [seat for seat in seats if seat.learner]
        self.voters = [seat for seat in seats if not seat.learner]
        self.staying = [seat for seat in self.voters if self._stays(seat)]
        taken = {seat.peer_url for seat in seats if not self._is_of_another_life(seat)}
        free = sorted((n for n in nodes if n.stays and n.peer_url not in taken), key=lambda node: node.name)
        self.spares = [node for node in free if not node.resting]
        self.resting = [node for node in free if node.resting]
        self.target = target_voters(len(self.staying) + len(self.learners) + len(self.spares), wanted)

    def _stays(self, seat: Seat) -> bool:
        node = self.here.get(seat.peer_url)
        return node is not None and node.stays and seat.healthy

    def _is_of_another_life(self, seat: Seat) -> bool:
        """Its node has begun anew without it, on an empty disk: the member never comes back, and the node is free."""
        node = self.here.get(seat.peer_url)
        return seat.gone and not seat.healthy and node is not None and node.member_id != seat.member_id

    def unfit_learner(self) -> Step | None:
        """Learners without a vote can go at any time."""
        for learner in self.learners:
            node = self.here.get(learner.peer_url)
            if node is None or not node.stays or learner.stale:
                why = "did not come up in time" if learner.stale else "its node is gone" if node is None else "unwanted"
                return Remove(learner.member_id, f"learner: {why}")
        return None

    def _goes_on_without(self, seat: Seat) -> bool:
        others = [each for each in self.voters if each is not seat]
        return sum(each.healthy for each in others) > len(others) // 2

    def revoked(self) -> Step | None:
        """Those that are not trusted any more, whether they answer or not."""
        for voter in self.voters:
            node = self.here.get(voter.peer_url)
            if node is not None and node.revoked and self._goes_on_without(voter):
                return Remove(voter.member_id, "its node has been revoked")
        return None

    def away(self) -> Step | None:
        """Voters that are away. As long as there are any, nothing else is done: one change at a time."""
        missing = [seat for seat in self.voters if seat.peer_url not in self.here or not seat.healthy]
        for voter in missing:
            if not voter.gone:
                what = "is away" if voter.peer_url not in self.here else "is not healthy"
                return Nothing(f"voter {voter.title} {what}", settled=False)
        dead = [seat for seat in missing if not seat.healthy]
        if 2 * (len(self.voters) - len(dead)) <= len(self.voters):
            return Nothing("there is no majority of the voters")
        if missing and not self._worth_it():
            if self.learners:
                return Remove(self.learners[0].member_id, "learner: no seat for it any more")
            return Nothing(f"voter {missing[0].title} stays away: its seat is kept, as no other node could take it")
        if dead and any(not learner.healthy for learner in self.learners):
            return Nothing(f"learner {self.learners[0].title} is starting", settled=False)
        if not dead:
            return None
        successor = self.spares[0].name if self.spares and not self.learners else ""
        return Remove(dead[0].member_id, "it stays away", successor)

    def _worth_it(self) -> bool:
        """Whether more voters could be lost in the end, without those that are away, than can be now.

        What counts now are the voters that are here to stay: the others may go at any moment.
        """
        now = len(self.staying) - (len(self.voters) // 2 + 1)
        return (self.target - 1) // 2 > now

    def towards_target(self, me: str, leader_member_id: int) -> Step:
        """With a healthy majority before and after each step."""
        voters, staying, target = self.voters, self.staying, self.target
        if self.learners:
            learner = self.learners[0]
            if len(staying) >= target:
                return Remove(learner.member_id, "learner: no seat for it any more")
            if not learner.healthy:
                return Nothing(f"learner {learner.title} is starting", settled=False)
            return Promote(learner.member_id)
        if len(staying) < target and self.spares:
            return AddLearner(self.spares[0].name, self.spares[0].peer_url)

        mine = {node.peer_url for node in self.nodes if node.name == me}

        def last(seat: Seat) -> tuple[bool, bool, str]:
            return seat.peer_url in mine, seat.member_id == leader_member_id, seat.peer_url

        going = [seat for seat in voters if seat not in staying]
        if going and len(voters) > 1:
            first = min(going, key=last)
            away = first.peer_url not in self.here
            return Remove(first.member_id, "its node stays away" if away else "its node gives up its seat")
        if len(staying) > max(target, 1):
            if target_voters(len(staying) + len(self.resting), self.wanted) > len(staying):
                return Nothing(f"{self.resting[0].name} is tried again soon", settled=False)
            return Remove(min(staying, key=last).member_id, f"{target} voters are as many as can be had")
        if going:
            return Nothing("the last voter can only leave together with the cluster")
        short = f"{self.wanted} wanted, " if target < self.wanted else ""
        return Nothing(f"{short}{len(voters)} voters, {len(self.spares)} more candidates")


def target_voters(available: int, wanted: int) -> int:
    """How many voters there can be: the largest odd number within both; 0 when nobody is available."""
    count = min(available, wanted)
    return count - 1 if count and count % 2 == 0 else count
