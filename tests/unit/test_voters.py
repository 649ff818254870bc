"""The planner of voters' seats: its table, and all paths through a small world with crashes anywhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spinetta.voters import AddLearner, Nothing, Promote, Remove, Seat, Sitter, Step, next_step, target_voters


def seat(n: int, *, learner: bool = False, healthy: bool = True, stale: bool = False) -> Seat:
    return Seat(n, f"n{n}", f"http://n{n}", learner, healthy, stale)


def node(n: int, *, candidate: bool = True, leaving: bool = False) -> Sitter:
    return Sitter(f"n{n}", f"http://n{n}", candidate, leaving)


def nodes(*numbers: int) -> list[Sitter]:
    return [node(n) for n in numbers]


def step(seats: Sequence[Seat], live: Sequence[Sitter], wanted: int = 3) -> Step:
    return next_step(seats, live, wanted=wanted, me="n1", leader_member_id=1)


ADD_2 = AddLearner("n2", "http://n2")
REVOKED_3 = replace(node(3), revoked=True)


@pytest.mark.parametrize(
    ("seats", "live", "expected"),
    [
        # one → three, whole
        ([seat(1)], nodes(1, 2, 3), ADD_2),
        ([seat(1), seat(2, learner=True)], nodes(1, 2, 3), Promote(2)),
        ([seat(1), seat(2)], nodes(1, 2, 3), AddLearner("n3", "http://n3")),
        ([seat(1), seat(2), seat(3, learner=True)], nodes(1, 2, 3), Promote(3)),
        # not begun with one candidate only
        ([seat(1)], nodes(1), Nothing),
        ([seat(1)], nodes(1, 2), Nothing),
        ([seat(1)], [*nodes(1, 2), node(3, candidate=False)], Nothing),
        ([seat(1)], [*nodes(1, 2), node(3, leaving=True)], Nothing),
        # rolled back when a candidate is gone in the middle
        ([seat(1), seat(2, learner=True)], nodes(1, 2), Remove(2, "")),
        ([seat(1), seat(2, learner=True)], nodes(1, 3, 4), Remove(2, "")),
        ([seat(1), seat(2)], nodes(1, 2), Remove(2, "")),
        ([seat(1), seat(2), seat(3, learner=True)], nodes(1, 2), Remove(3, "")),
        ([seat(1), seat(2), seat(3, learner=True, stale=True)], nodes(1, 2, 3, 4), Remove(3, "")),
        # a revoked one goes first, whether it answers or not, as long as the others can go on without it
        ([seat(1), seat(2), seat(3)], [*nodes(1, 2), REVOKED_3], Remove(3, "its node has been revoked")),
        (
            [seat(1), seat(2), seat(3, healthy=False)],
            [*nodes(1, 2, 4), REVOKED_3],
            Remove(3, "its node has been revoked"),
        ),
        ([seat(1), seat(2, healthy=False), seat(3)], [*nodes(1, 2), REVOKED_3], Nothing),
        ([seat(3)], [REVOKED_3], Nothing),
        # a learner takes its time
        ([seat(1), seat(2, learner=True, healthy=False)], nodes(1, 2, 3), Nothing),
        # at rest
        ([seat(1), seat(2), seat(3)], nodes(1, 2, 3, 4, 5), Nothing),
        # a leaving voter is replaced first …
        ([seat(1), seat(2), seat(3)], [*nodes(1, 2, 4), node(3, leaving=True)], AddLearner("n4", "http://n4")),
        (
            [seat(1), seat(2), seat(3), seat(4, learner=True)],
            [*nodes(1, 2, 4), node(3, leaving=True)],
            Promote(4),
        ),
        ([seat(1), seat(2), seat(3), seat(4)], [*nodes(1, 2, 4), node(3, leaving=True)], Remove(3, "")),
        # … or three → one
        ([seat(1), seat(2), seat(3)], [*nodes(1, 2), node(3, leaving=True)], Remove(3, "")),
        # the leader, which is also this node, goes last
        ([seat(1), seat(2), seat(3)], [node(1, leaving=True), node(2, leaving=True), node(3)], Remove(2, "")),
        ([seat(1), seat(3)], [node(1, leaving=True), node(3)], Remove(1, "")),
        # the only voter hands over, or stays
        ([seat(1)], [node(1, leaving=True), node(2)], ADD_2),
        ([seat(1), seat(2)], [node(1, leaving=True), node(2)], Remove(1, "")),
        ([seat(1)], [node(1, leaving=True)], Nothing),
        # the dead are left alone, and nothing else is done around them
        ([seat(1), seat(2), seat(3)], nodes(1, 2, 4), Nothing),
        ([seat(1), seat(2), seat(3)], [node(1), node(2, leaving=True)], Nothing),
        ([seat(1), seat(2), seat(3, healthy=False)], nodes(1, 2, 3, 4), Nothing),
        ([seat(1), seat(2), seat(3, healthy=False)], [node(1), node(2, leaving=True), node(3), node(4)], Nothing),
    ],
)
def test_the_next_step(seats: list[Seat], live: list[Sitter], expected: Step | type[Nothing]) -> None:
    found = step(seats, live)
    if isinstance(expected, Remove):
        assert isinstance(found, Remove)
        assert found.member_id == expected.member_id
    elif isinstance(expected, type):
        assert isinstance(found, expected)
    else:
        assert found == expected


def test_five_are_reached_in_two_pairs() -> None:
    seats = [seat(1), seat(2), seat(3)]
    assert isinstance(step(seats, nodes(1, 2, 3, 4), wanted=5), Nothing)
    assert isinstance(step(seats, nodes(1, 2, 3, 4, 5), wanted=5), AddLearner)
    assert isinstance(step([*seats, seat(4)], nodes(1, 2, 3, 4), wanted=5), Remove)


@pytest.mark.parametrize(
    ("available", "wanted", "expected"),
    [(0, 3, 0), (1, 3, 1), (2, 3, 1), (3, 3, 3), (9, 3, 3), (4, 5, 3), (5, 5, 5), (9, 4, 3), (3, 1, 1)],
)
def test_target(available: int, wanted: int, expected: int) -> None:
    assert target_voters(available, wanted) == expected


# --- a world ------------------------------------------------------------------------------------------------------


@dataclass
class World:
    """Members and nodes; `apply` does what etcd would, and insists on what must never happen."""

    wanted: int
    seats: list[Seat] = field(default_factory=list)
    live: dict[int, Sitter] = field(default_factory=dict)
    used: set[int] = field(default_factory=set)

    @property
    def voters(self) -> list[Seat]:
        return [seat for seat in self.seats if not seat.learner]

    def up(self, one: Seat) -> bool:
        return one.healthy and any(node.peer_url == one.peer_url for node in self.live.values())

    def apply(self, step: Step) -> None:
        match step:
            case AddLearner(name, peer_url):
                assert not any(seat.learner for seat in self.seats), "etcd takes one learner at a time"
                assert not any(seat.peer_url == peer_url for seat in self.seats)
                self.check_quorum()
                number = max((seat.member_id for seat in self.seats), default=0) + 1
                self.seats.append(Seat(number, "", peer_url, learner=True, healthy=False))
                assert any(node.name == name and node.stays for node in self.live.values())
            case Promote(member_id):
                self.check_quorum()
                self.seats = [
                    replace(seat, learner=False) if seat.member_id == member_id else seat for seat in self.seats
                ]
                self.check_quorum()
            case Remove(member_id, _):
                before = self.voters
                (gone,) = [seat for seat in self.seats if seat.member_id == member_id]
                self.seats.remove(gone)
                if gone in before:
                    assert self.voters, "the last voter was removed"
                    self.check_quorum()
            case Nothing():
                pass

    def check_quorum(self) -> None:
        voters = self.voters
        assert sum(self.up(seat) for seat in voters) > len(voters) // 2, "the cluster has lost its majority"

    def plan(self) -> Step:
        leader = next((seat.member_id for seat in self.voters if self.up(seat)), 0)
        return next_step(self.seats, list(self.live.values()), wanted=self.wanted, me="n1", leader_member_id=leader)

    def learners_start(self) -> None:
        self.seats = [
            replace(seat, healthy=True) if seat.learner and self.up(replace(seat, healthy=True)) else seat
            for seat in self.seats
        ]

    def settle(self, limit: int = 60) -> None:
        """No more faults: it must come to rest, and at rest in the right place."""
        for _ in range(limit):
            step = self.plan()
            if isinstance(step, Nothing) and step.settled:
                break
            self.apply(step)
            self.learners_start()
        else:
            pytest.fail(f"does not settle: {step}")
        voters = self.voters
        if not all(self.up(seat) for seat in voters):
            return  # somebody's seat is kept for quorum repair
        assert len(voters) % 2 == 1, f"rests at {len(voters)} voters"
        assert not any(seat.learner for seat in self.seats)
        by_url = {node.peer_url: node for node in self.live.values()}
        able = sum(node.stays for node in self.live.values())
        assert len(voters) == max(1, target_voters(able, self.wanted))
        if able:
            assert all(by_url[seat.peer_url].stays for seat in voters)


actions = st.one_of(
    st.tuples(st.just("step"), st.just(0)),
    st.tuples(st.just("step"), st.just(0)),
    st.tuples(st.just("start"), st.just(0)),
    st.tuples(st.sampled_from(("join", "leave", "crash spare", "candidate", "stale")), st.integers(1, 7)),
)


@settings(max_examples=400, deadline=None)
@given(wanted=st.sampled_from((1, 3, 5)), script=st.lists(actions, max_size=50))
def test_from_anywhere_it_comes_to_rest_and_never_loses_its_majority(
    wanted: int, script: list[tuple[str, int]]
) -> None:
    world = World(wanted, [seat(1)], {1: node(1)})
    for action, number in script:
        here = world.live.get(number)
        match action:
            case "step":
                world.apply(world.plan())
            case "start":
                world.learners_start()
            case "join" if here is None:
                world.live[number] = node(number)
            case "leave" if here is not None:
                world.live[number] = replace(here, leaving=True)
            case "candidate" if here is not None:
                world.live[number] = replace(here, candidate=not here.candidate)
            case "stale":
                world.seats = [replace(seat, stale=seat.learner) for seat in world.seats]
            case "crash spare" if here is not None:
                # One that votes takes its vote with it: that is for the other test.
                if not any(seat.peer_url == here.peer_url for seat in world.voters):
                    del world.live[number]
    world.seats = [replace(seat, stale=False) for seat in world.seats]
    world.settle()


@settings(max_examples=400, deadline=None)
@given(
    wanted=st.sampled_from((1, 3, 5)),
    count=st.integers(1, 7),
    script=st.lists(
        st.tuples(
            st.sampled_from(("step", "step", "step", "start", "leave", "crash", "sick", "well")), st.integers(1, 7)
        ),
        max_size=50,
    ),
)
def test_with_voters_that_die_nothing_is_made_worse(wanted: int, count: int, script: list[tuple[str, int]]) -> None:
    world = World(wanted, [seat(1)], {n: node(n) for n in range(1, count + 1)})
    for action, number in script:
        here = world.live.get(number)
        if action == "step":
            majority = sum(map(world.up, world.voters)) > len(world.voters) // 2
            planned = world.plan()
            if majority:
                world.apply(planned)
            else:
                # Etcd would not answer; whatever is tried, it is not the removal of a voter.
                assert isinstance(planned, Nothing) or any(
                    seat.learner for seat in world.seats if isinstance(planned, Remove)
                )
        elif action == "start":
            world.learners_start()
        elif here is None:
            continue
        elif action == "leave":
            world.live[number] = replace(here, leaving=True)
        elif action == "crash":
            del world.live[number]
        else:
            world.seats = [
                replace(seat, healthy=action == "well") if seat.peer_url == here.peer_url else seat
                for seat in world.seats
            ]
