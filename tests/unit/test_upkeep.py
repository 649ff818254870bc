"""What etcd needs now and then: decided from values, one step at a time."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spinetta import upkeep
from spinetta.upkeep import (
    CORRUPT,
    NOSPACE,
    Compact,
    Defragment,
    Disarm,
    EtcdView,
    MemberView,
    MoveLeader,
    Past,
    Rest,
    next_care,
)

MIB = 1 << 20
QUOTA = 2048 * MIB
NOW_S = 10_000.0


def member(i: int, *, db: int = 100, used: int = 100, leader: int = 1, **more: object) -> MemberView:
    """`db` and `used` in MiB."""
    base = MemberView(i, f"n{i}", leader_id=leader, db_bytes=db * MIB, in_use_bytes=used * MIB, applied=500)
    return replace(base, **more)  # type: ignore[arg-type]


def view(*members: MemberView, alarms: tuple[tuple[int, str], ...] = (), revision: int = 1000) -> EtcdView:
    return EtcdView(members, alarms, revision)


def past_of(*seen: tuple[float, int]) -> Past:
    past = Past()
    for at_s, revision in seen:
        past.look(at_s, revision)
    return past


def care(v: EtcdView, past: Past | None = None, *, now_s: float = NOW_S, pause_s: float = 5.0) -> upkeep.Care:
    return next_care(v, past or Past(), now_s, quota_bytes=QUOTA, pause_s=pause_s)


THREE = (member(1), member(2), member(3))
HOLES = (member(1, db=400), member(2, db=400), member(3, db=400))


def test_nothing_to_do() -> None:
    assert care(view(*THREE)) == Rest()
    assert care(view(member(1))) == Rest()
    assert isinstance(care(view()), Rest)


# --- compaction ----------------------------------------------------------------------------------------------------


def test_history_is_kept_while_there_is_room() -> None:
    past = past_of((NOW_S - 1000, 10), (NOW_S, 1000))
    assert care(view(*(member(i, db=1020, used=1020) for i in (1, 2, 3))), past) == Rest()


def test_history_goes_when_room_gets_short_but_not_the_last_minutes() -> None:
    past = past_of((NOW_S - 400, 10), (NOW_S - 310, 20), (NOW_S - 200, 30), (NOW_S, 40))
    half = view(*(member(i, db=1100, used=1100) for i in (1, 2, 3)))
    assert care(half, past) == Compact(20)
    past.done(Compact(20), NOW_S)
    assert care(half, past, now_s=NOW_S + 5) == Rest()
    past.look(NOW_S + 101, 50)
    assert care(half, past, now_s=NOW_S + 101) == Compact(30)


def test_little_room_leaves_seconds_of_history() -> None:
    past = past_of((NOW_S - 200, 30), (NOW_S - 16, 35), (NOW_S, 40))
    tight = view(*(member(i, db=1500, used=1500) for i in (1, 2, 3)))
    assert care(tight, past) == Compact(35)


def test_what_nobody_has_seen_long_enough_ago_is_not_given_up() -> None:
    tight = view(*(member(i, db=1500, used=1500) for i in (1, 2, 3)))
    assert care(tight, past_of((NOW_S - 3, 40))) == Rest()


def test_a_compaction_needs_a_majority_and_no_more() -> None:
    tight = [member(i, db=1500, used=1500) for i in (1, 2, 3)]
    past = past_of((NOW_S - 100, 30))
    assert care(view(tight[0], tight[1], replace(tight[2], answers=False)), past) == Compact(30)
    lost = view(replace(tight[0], leader_id=0), *(replace(m, answers=False) for m in tight[1:]))
    assert care(lost, past) == Rest("no majority of the voters answers")


def test_the_past_is_bounded() -> None:
    past = Past()
    for i in range(10_000):
        past.look(i * upkeep.LOOK_EVERY_S, i + 1)
    assert len(past.seen) <= upkeep.KEEP_HISTORY_S / upkeep.LOOK_EVERY_S + 2
    assert past.revision_at(10_000 * upkeep.LOOK_EVERY_S - upkeep.KEEP_HISTORY_S) > 0


# --- defragmentation -----------------------------------------------------------------------------------------------


def test_one_member_after_the_other_and_etcds_leader_last() -> None:
    past, done, members, leader = Past(), [], {m.member_id: m for m in HOLES}, 1
    for n in range(20):
        step = care(view(*members.values()), past, now_s=NOW_S + n * upkeep.LOOK_EVERY_S)
        past.done(step, NOW_S + n * upkeep.LOOK_EVERY_S)
        done.append(step)
        if isinstance(step, Defragment):
            assert step.member_id != leader
            members[step.member_id] = replace(members[step.member_id], db_bytes=100 * MIB)
        elif isinstance(step, MoveLeader):
            assert step.member_id == leader
            leader = step.to_id
            members = {i: replace(m, leader_id=leader) for i, m in members.items()}
        else:
            break
    assert [type(step).__name__ for step in done] == ["Defragment", "Defragment", "MoveLeader", "Defragment", "Rest"]


@pytest.mark.parametrize(
    "broken",
    [
        {"answers": False},
        {"leader_id": 0},
        {"voter": False},
        {"applied": 500 - upkeep.BEHIND_MAX - 1 + 5000},  # the others are far behind this one
    ],
)
def test_nobody_is_stopped_while_another_is_not_as_it_should_be(broken: dict[str, object]) -> None:
    for i in range(3):
        members = list(HOLES)
        members[i] = replace(members[i], **broken)  # type: ignore[arg-type]
        assert not isinstance(care(view(*members)), (Defragment, MoveLeader))


@pytest.mark.parametrize(
    ("db", "used", "worth"),
    [
        (400, 100, True),
        (100, 40, False),  # 60 MiB: not worth a stop
        (1000, 600, False),  # less than half: will be used again soon
        (1700, 1300, True),  # near the quota a fifth is enough
        (1700, 1500, False),
        (100, 200, False),  # never less than nothing
    ],
)
def test_when_a_stop_is_worth_it(db: int, used: int, worth: bool) -> None:
    found = care(view(member(1), member(2, db=db, used=used), member(3)))
    assert isinstance(found, Defragment) == worth


def test_a_member_is_left_alone_for_an_hour() -> None:
    past = Past()
    first = care(view(member(1), member(2, db=400), member(3)), past)
    assert isinstance(first, Defragment)
    past.done(first, NOW_S)
    again = view(member(1), member(2, db=400), member(3))
    assert care(again, past, now_s=NOW_S + upkeep.DEFRAGMENT_EVERY_S - 1) == Rest()
    assert care(again, past, now_s=NOW_S + upkeep.DEFRAGMENT_EVERY_S) == first
    past.keep([1, 3])
    assert past.defragmented_s == {}


def test_the_only_voter_stands_still_for_what_leases_allow_and_no_longer() -> None:
    small, large = member(1, db=400, used=80), member(1, db=2000, used=900)
    assert isinstance(care(view(small)), Defragment)
    waits = care(view(large))
    assert isinstance(waits, Rest)
    assert "add voters" in waits.reason
    # … unless nothing is renewed any more anyway.
    assert isinstance(care(view(large, alarms=((1, NOSPACE),))), Defragment)


def test_the_deadline_grows_with_what_is_copied() -> None:
    step = care(view(member(1), member(2, db=1700, used=800), member(3)))
    assert isinstance(step, Defragment)
    assert step.deadline_s == pytest.approx(upkeep.DEADLINE_FACTOR * upkeep.BLOCKED_S_PER_GIB * 800 / 1024)


# --- alarms --------------------------------------------------------------------------------------------------------


def test_nospace_is_taken_back_when_there_is_room_on_all() -> None:
    alarms = ((1, NOSPACE), (2, NOSPACE))
    assert care(view(*THREE, alarms=alarms)) == Disarm(1)
    assert care(view(*THREE, alarms=alarms[1:])) == Disarm(2)
    past = Past()
    past.done(Disarm(1), NOW_S)
    assert care(view(*THREE, alarms=alarms), past) == Disarm(2)  # at once: etcd takes writes when all are taken back
    past.done(Disarm(2), NOW_S)
    assert isinstance(care(view(*THREE, alarms=alarms), past, now_s=NOW_S + upkeep.DISARM_EVERY_S - 1), Rest)
    assert care(view(*THREE, alarms=alarms), past, now_s=NOW_S + upkeep.DISARM_EVERY_S) == Disarm(1)
    past.keep([2])
    assert past.disarmed_s.keys() == {2}
    crowded = view(member(1, db=1900, used=1900), member(2), member(3), alarms=alarms)
    waits = care(crowded)
    assert isinstance(waits, Rest)
    assert "etcd_quota" in waits.reason


def test_a_full_member_is_defragmented_whenever_that_lets_the_alarm_be_taken_back() -> None:
    # 10 % of holes: elsewhere not worth a stop.
    full = view(member(1), member(2, db=1950, used=1750), member(3), alarms=((2, NOSPACE),))
    step = care(full)
    assert isinstance(step, Defragment)
    assert isinstance(care(replace(full, alarms=())), Rest)
    past = Past()
    past.done(step, NOW_S)
    soon_s = upkeep.DUTY_FACTOR * upkeep.blocked_for_s(1750 * MIB)  # it stands still a fifth of the time at most
    assert isinstance(care(full, past, now_s=NOW_S + soon_s - 1), Rest)
    assert care(full, past, now_s=NOW_S + soon_s) == step


def test_a_full_store_does_not_wait_for_etcds_lead_to_be_handed_on_again() -> None:
    leads = view(member(1, db=2000), member(2), member(3), alarms=((1, NOSPACE),))
    move = MoveLeader(1, 3)
    past = Past()
    past.done(move, NOW_S)
    assert care(leads, past, now_s=NOW_S + upkeep.DEFRAGMENT_EVERY_FULL_S) == move
    calm = replace(leads, alarms=())
    assert isinstance(care(calm, past, now_s=NOW_S + upkeep.DEFRAGMENT_EVERY_FULL_S), Rest)
    assert care(calm, past, now_s=NOW_S + upkeep.MOVE_EVERY_S) == move


def test_a_member_whose_own_quota_is_smaller_is_given_room() -> None:
    """Etcd 3.4 does not tell; the alarm does. Its file is what it compares, so that holes are all that can be had."""
    small = view(member(1), member(2, db=110, used=100), member(3), alarms=((2, NOSPACE),))
    past, step = Past(), care(small)
    assert isinstance(step, Defragment)
    past.done(step, NOW_S)
    later_s = NOW_S + upkeep.DEFRAGMENT_EVERY_FULL_S
    assert care(small, past, now_s=later_s) == Disarm(2)  # and not its few holes again and again
    past.done(Disarm(2), later_s)
    assert care(small, past, now_s=later_s) == step  # it has raised it again
    assert care(replace(small, alarms=((3, NOSPACE),))) == Disarm(3)
    assert care(view(member(1), member(2, db=104, used=100), member(3), alarms=((2, NOSPACE),))) == Disarm(2)


def test_waiting_tasks_that_fill_what_submits_may_fill_keep_no_alarm_up() -> None:
    used = int(2048 * upkeep.SUBMITS_UP_TO) + 40
    full = view(*(member(i, db=used, used=used) for i in (1, 2, 3)), alarms=((1, NOSPACE),))
    assert care(full) == Disarm(1)


def test_with_nospace_history_goes_whatever_else_there_is() -> None:
    full = view(*THREE, alarms=((1, NOSPACE),))
    past = past_of((NOW_S - 20, 30), (NOW_S - 10, 40))
    assert care(full, past) == Compact(30)
    past.done(Compact(30), NOW_S)
    # The holes and the alarm have their turns, however long each step takes.
    later_s = NOW_S + upkeep.COMPACT_EVERY_HARD_S
    assert care(full, past, now_s=later_s) == Disarm(1)
    past.done(Disarm(1), later_s)
    assert care(full, past, now_s=later_s) == Compact(40)


def test_hands_off_what_is_corrupt_or_not_known() -> None:
    past = past_of((NOW_S - 400, 30))
    for alarms in (((1, CORRUPT), (1, NOSPACE)), ((3, CORRUPT),)):
        assert "CORRUPT" in care(view(*HOLES, alarms=alarms), past).reason  # type: ignore[union-attr]
    assert isinstance(care(EtcdView(HOLES, None, 1000), past), Rest)


@given(
    st.lists(
        st.builds(
            MemberView,
            st.integers(1, 5),
            st.just("n"),
            voter=st.booleans(),
            answers=st.booleans(),
            leader_id=st.integers(0, 5),
            db_bytes=st.integers(0, 2 * QUOTA),
            in_use_bytes=st.integers(0, 2 * QUOTA),
            applied=st.integers(0, 5000),
        ),
        max_size=5,
        unique_by=lambda m: m.member_id,
    ),
    st.lists(st.tuples(st.integers(1, 5), st.sampled_from([NOSPACE, CORRUPT, "alarm 7"])), max_size=3),
)
def test_whatever_is_seen(members: list[MemberView], alarms: list[tuple[int, str]]) -> None:
    v = EtcdView(tuple(members), tuple(alarms), 1000)
    step = care(v, past_of((NOW_S - 400, 30)))
    by_id = {m.member_id: m for m in members}
    if not isinstance(step, Rest):
        assert v.has_majority
        assert not v.raised(CORRUPT)
    if isinstance(step, Defragment):
        assert all(m.healthy and m.voter for m in members)
        assert by_id[step.member_id].leader_id != step.member_id or len(members) == 1
        assert step.deadline_s > 0
    if isinstance(step, MoveLeader):
        assert by_id[step.to_id].healthy
        assert step.to_id != step.member_id
    if isinstance(step, Disarm):
        assert (step.member_id, NOSPACE) in alarms
        assert all(m.in_use_bytes < upkeep.RELIEVED_BELOW * QUOTA for m in members)
    for text in (*upkeep.notices(v, QUOTA), upkeep.no_majority_words(v), upkeep.back_words(v)):
        assert text


# --- words ---------------------------------------------------------------------------------------------------------


def test_how_full_it_may_get() -> None:
    def words(used: int) -> tuple[str, list[str]]:
        v = view(*(member(i, db=used, used=used) for i in (1, 2, 3)))
        return upkeep.full_words(v, QUOTA), upkeep.notices(v, QUOTA)

    assert words(1600) == ("", [])
    early, told = words(1650)
    assert (early, told) == ("", ["the cluster's store is 80 % full; at 85 % nothing can be submitted"])
    late, told = words(1750)
    assert late == "the cluster's store is 85 % full, and the rest is kept for the tasks that there are"
    assert told == [f"{late}: nothing can be submitted"]
    full = view(*THREE, alarms=((2, NOSPACE),))
    assert "NOSPACE" in upkeep.full_words(full, QUOTA)
    assert [n for n in upkeep.notices(full, QUOTA) if "n2" in n and "NOSPACE" in n]


def test_without_a_majority_it_is_said_who_answers() -> None:
    lost = view(member(1, leader=0), replace(member(2), answers=False), replace(member(3), answers=False))
    assert upkeep.no_majority_words(lost) == (
        "no majority of the 3 voters answers this node: n1 answers but sees no leader; n2, n3 do not answer"
    )
    assert upkeep.no_majority_words(lost, named=False) == "no majority of the cluster's voters answers"
    assert upkeep.back_words(lost).startswith("it goes on by itself when one more of them is back")
    gone = view(*(replace(m, answers=False) for m in THREE))
    assert "cut off" in upkeep.no_majority_words(gone)
    electing = view(*(replace(m, leader_id=0) for m in THREE))
    assert "electing" in upkeep.back_words(electing)
    one = view(*THREE[:2], replace(THREE[2], answers=False))
    assert upkeep.notices(one, QUOTA) == ["voter n3 does not take part"]
