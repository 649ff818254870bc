"""Replacing voters that stay away: the table, every small state there is, and the clock of who is away for how long."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations_with_replacement, product
from typing import TypeAlias

import pytest

from spinetta.voters import (
    Absences,
    AddLearner,
    Nothing,
    Promote,
    Remove,
    Seat,
    Sitter,
    Step,
    next_step,
    target_voters,
)


def seat(n: int, *, learner: bool = False, healthy: bool = True, gone: bool = False) -> Seat:
    return Seat(n, f"n{n}", f"http://n{n}", learner, healthy, gone=gone)


def dead(n: int) -> Seat:
    return seat(n, healthy=False, gone=True)


def node(n: int, member_id: int | None = None) -> Sitter:
    return Sitter(f"n{n}", f"http://n{n}", member_id=n if member_id is None else member_id)


def nodes(*numbers: int) -> list[Sitter]:
    return [node(n) for n in numbers]


LEAVING_2 = replace(node(2), leaving=True)
RESTING_4 = replace(node(4), resting=True)
ORPHAN_3 = seat(3, gone=True)


@pytest.mark.parametrize(
    ("seats", "live", "expected"),
    [
        # away, but not for long enough
        ([seat(1), seat(2), seat(3, healthy=False)], nodes(1, 2, 4), Nothing("voter n3 is away", settled=False)),
        (
            [seat(1), seat(2), seat(3, healthy=False)],
            nodes(1, 2, 3, 4),
            Nothing("voter n3 is not healthy", settled=False),
        ),
        ([seat(1), seat(2), seat(3)], nodes(1, 2, 4), Nothing("voter n3 is away", settled=False)),
        # gone: the dead goes first, and then the spare comes
        ([seat(1), seat(2), dead(3)], nodes(1, 2, 4), Remove(3, "it stays away", "n4")),
        ([seat(1), seat(2)], nodes(1, 2, 4), AddLearner("n4", "http://n4")),
        ([seat(1), seat(2), seat(4, learner=True)], nodes(1, 2, 4), Promote(4)),
        # its node is there, but its member is not well
        ([seat(1), seat(2), dead(3)], nodes(1, 2, 3, 4), Remove(3, "it stays away", "n4")),
        # no spare: three with one dead stay as they are, and so do five
        ([seat(1), seat(2), dead(3)], nodes(1, 2), Nothing),
        ([seat(1), seat(2), dead(3)], nodes(1, 2, 3), Nothing),
        ([seat(1), seat(2), dead(3)], [*nodes(1, 2), RESTING_4], Nothing),
        # a machine that was made anew takes the seat that it had
        ([seat(1), seat(2), dead(3)], [*nodes(1, 2), node(3, 0)], Remove(3, "it stays away", "n3")),
        # one whose member goes on without its node is replaced before it goes
        ([seat(1), seat(2), ORPHAN_3], nodes(1, 2, 4), AddLearner("n4", "http://n4")),
        ([seat(1), seat(2), ORPHAN_3, seat(4, learner=True)], nodes(1, 2, 4), Promote(4)),
        ([seat(1), seat(2), ORPHAN_3, seat(4)], nodes(1, 2, 4), Remove(3, "its node stays away")),
        ([seat(1), seat(2), ORPHAN_3], nodes(1, 2), Nothing),
        # two at once: one after the other
        ([seat(1), seat(2), ORPHAN_3, dead(4), seat(5)], nodes(1, 2, 5, 6, 7), Remove(4, "it stays away", "n6")),
        ([seat(1), seat(2), dead(3), seat(4, healthy=False), seat(5)], nodes(1, 2, 5, 6, 7), Nothing),
        # half done when another one is lost
        ([seat(1), seat(2), dead(3), seat(4)], nodes(1, 2, 4), Remove(3, "it stays away")),
        ([seat(1), seat(2), dead(3), seat(4, learner=True)], nodes(1, 2, 4), Remove(3, "it stays away")),
        ([seat(1), seat(2), dead(3), seat(4, learner=True, healthy=False)], nodes(1, 2, 4), Nothing),
        # no majority: nothing can be done here
        ([seat(1), dead(2), dead(3)], nodes(1, 4, 5), Nothing),
        ([seat(1), dead(2)], nodes(1, 4, 5), Nothing),
        # one that wants to leave is not held back by one that is gone for good
        ([seat(1), seat(2), dead(3)], [node(1), LEAVING_2], Remove(3, "it stays away")),
        # two, because the spare did not come up: it is tried again, and only then is it one
        ([seat(1), seat(2)], [*nodes(1, 2), RESTING_4], Nothing("n4 is tried again soon", settled=False)),
        ([seat(1), seat(2)], [*nodes(1, 2), replace(RESTING_4, candidate=False)], Remove(2, "")),
    ],
)
def test_the_next_step(seats: list[Seat], live: list[Sitter], expected: Step | type[Nothing]) -> None:
    found = next_step(seats, live, wanted=3 if len(seats) < 5 else 5, me="n1", leader_member_id=1)
    if isinstance(expected, Remove) and not expected.reason:
        assert isinstance(found, Remove)
        assert found.member_id == expected.member_id
    elif isinstance(expected, type):
        assert isinstance(found, expected)
    else:
        assert found == expected


def test_two_dead_of_five_and_no_spare_become_three() -> None:
    """Five of which two are dead survive no further loss; three survive one."""
    live = nodes(1, 2, 3)
    five = [seat(1), seat(2), seat(3), dead(4), dead(5)]
    assert next_step(five, live, wanted=5) == Remove(4, "it stays away")
    four = [seat(1), seat(2), seat(3), dead(5)]
    assert next_step(four, live, wanted=5) == Remove(5, "it stays away")
    assert next_step(four[:3], live, wanted=5) == Nothing("5 wanted, 3 voters, 0 more candidates")
    assert isinstance(next_step([seat(1), seat(2), seat(3), seat(4), dead(5)], nodes(1, 2, 3, 4), wanted=5), Nothing)


# --- every small state ---------------------------------------------------------------------------------------------

# Of a voter: well, leaving, dead for good, sick for good with its node there, dead for good with its node made anew,
# alive for good without its node, away since lately.
VOTERS = "wldsbo?"
# Of a learner: none, starting, ready, without its node, did not come up.
LEARNERS = " +^x!"
State: TypeAlias = tuple[str, str, int, int]  # voters sorted, learners, spares, spares that are tried again later


def members(state: State) -> tuple[list[Seat], list[Sitter], int]:
    """What the planner is shown, and how many nodes are spare, ready or not."""
    voters, learners, spares, resting = state
    seats, live, n = [], [], 0
    for kind in voters:
        n += 1
        seats.append(seat(n, healthy=kind in "wlo", gone=kind in "dsbo"))
        if kind in "wlsb":
            live.append(replace(node(n, 0 if kind == "b" else n), leaving=kind == "l"))
    for kind in learners:
        n += 1
        seats.append(replace(seat(n, learner=True, healthy=kind == "^"), stale=kind == "!"))
        if kind != "x":
            live.append(node(n))
    for i in range(spares + resting):
        n += 1
        live.append(replace(node(n, 0), resting=i >= spares))
    return seats, live, n


def step_of(state: State, wanted: int) -> Step:
    seats, live, _ = members(state)
    return next_step(seats, live, wanted=wanted, me="n1", leader_member_id=1)


def healthy(voters: str) -> int:
    return sum(kind in "wlo" for kind in voters)


def margin(voters: str) -> int:
    """How many more can be lost; negative: there is no majority."""
    return healthy(voters) - (len(voters) // 2 + 1)


def taken(state: State, step: Step) -> State:
    """What becomes of a state by a step; insists on what etcd insists on, and on what must never happen."""
    voters, learners, spares, resting = state
    match step:
        case AddLearner():
            assert not learners, "etcd takes one learner at a time"
            assert healthy(voters) == len(voters), "etcd adds nobody while a voter is away"
            assert spares
            return voters, "+", spares - 1, resting
        case Promote(member_id):
            assert learners[member_id - len(voters) - 1] == "^"
            after = (ordered(voters + "w"), "", spares, resting)
        case Remove(member_id, _, successor) if member_id > len(voters):
            kind = learners[member_id - len(voters) - 1]
            assert not successor
            return voters, learners.replace(kind, ""), spares + (kind in "+^"), resting + (kind == "!")
        case Remove(member_id, _, successor):
            kind = voters[member_id - 1]
            left = voters[: member_id - 1] + voters[member_id:]
            assert margin(left) >= 0, "the cluster has lost its majority"
            assert margin(left) >= margin(voters) or kind in "wlo", "a dead one was of use"
            assert not successor or spares or "b" in voters
            after = (left, learners, spares + (kind in "wb"), resting)
        case Nothing():
            return state
    assert margin(voters) >= 0, "etcd would not answer"
    return after


def ordered(voters: str) -> str:
    return "".join(sorted(voters, key=VOTERS.index))


def time_passes(state: State) -> State:
    """What is waited for comes true: for a while away is away for good, a learner starts, a spare may try again."""
    voters, learners, spares, resting = state
    return ordered(voters.replace("?", "d")), learners.replace("+", "^"), spares + resting, 0


@dataclass
class Explorer:
    wanted: int
    known: dict[State, int]

    def steps_to_rest(self, state: State) -> int:
        """How many steps it takes to come to rest, and that each of them may be taken."""
        path: list[State] = []
        while state not in self.known:
            assert state not in path, f"goes in circles: {path}"
            path.append(state)
            step = step_of(state, self.wanted)
            if isinstance(step, Nothing) and step.settled:
                self.at_rest(state)
                self.known[state] = 0
                path.pop()
                break
            if isinstance(step, Nothing):
                after = time_passes(state)
                assert after != state, f"waits for nothing in {state}: {step}"
                state = after
            else:
                state = taken(state, step)
        for done in reversed(path):
            self.known[done] = self.known[state] + 1
            state = done
        return self.known[state]

    def at_rest(self, state: State) -> None:
        voters, learners, spares, _resting = state
        if margin(voters) < 0:
            return
        assert not learners, state
        well, rebuilt = voters.count("w"), voters.count("b")
        target = target_voters(well + rebuilt + spares, self.wanted)
        if set(voters) <= {"w", "l"}:
            assert len(voters) % 2 == 1 or not well, f"rests at {len(voters)} voters: {state}"
            assert len(voters) == max(target, 1), state
            assert "l" not in voters or voters == "l"
            return
        # Some voter is lost, and its seat is kept: with all there are now, no more losses could be survived than so.
        assert (target - 1) // 2 <= well - (len(voters) // 2 + 1), f"could be better: {state}"


def all_states() -> Iterator[State]:
    for count in range(1, 6):
        for voters, learner, spares, resting in product(
            combinations_with_replacement(VOTERS, count), LEARNERS, range(4), range(2)
        ):
            yield "".join(voters), learner.strip(), spares, resting


@pytest.mark.parametrize("wanted", [1, 3, 5])
def test_from_every_small_state_it_comes_to_rest_safely(wanted: int) -> None:
    explorer = Explorer(wanted, {})
    most = max(explorer.steps_to_rest(state) for state in all_states())
    assert most <= 40
    assert len(explorer.known) > 30_000


@pytest.mark.parametrize("lost", [1, 2])
def test_with_as_many_spares_as_are_lost_it_ends_where_it_was(lost: int) -> None:
    state: State = ("w" * (5 - lost) + "d" * lost, "", lost, 0)
    sizes = []
    for _ in range(30):
        step = step_of(state, 5)
        state = time_passes(state) if isinstance(step, Nothing) and not step.settled else taken(state, step)
        sizes.append(len(state[0]))
    assert state == ("wwwww", "", 0, 0)
    assert min(sizes) == 5 - lost


# --- who is away for how long --------------------------------------------------------------------------------------


def looks(absences: Absences, seen: Sequence[tuple[float, set[int]]]) -> None:
    for now_s, away in seen:
        absences.look(now_s, away)


def test_gone_is_who_was_away_at_every_look() -> None:
    absences = Absences(30.0, 60.0)
    looks(absences, [(100.0, set()), (110.0, {3}), (139.0, {3, 4})])
    assert not absences.gone(3)
    looks(absences, [(140.0, {3, 4})])
    assert absences.gone(3)
    assert not absences.gone(4)
    looks(absences, [(141.0, {4}), (142.0, {3, 4})])
    assert not absences.gone(3)
    assert not absences.gone(5)


def test_who_did_not_look_has_seen_nothing() -> None:
    absences = Absences(30.0, 60.0)
    looks(absences, [(100.0, {3}), (200.0, {3})])
    assert not absences.gone(3)
    looks(absences, [(230.0, {3})])
    assert absences.gone(3)
    absences.forget()
    looks(absences, [(231.0, {3})])
    assert not absences.gone(3)


def test_never() -> None:
    absences = Absences(0.0, 60.0)
    looks(absences, [(float(n), {3}) for n in range(1000)])
    assert not absences.gone(3)
