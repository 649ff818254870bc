"""The table of rights: every pair, ownership, labels, and the words."""

from __future__ import annotations

import re
from itertools import product
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spinetta import rights
from spinetta.access import NodeRole, UserRole
from spinetta.rights import Call, Caller, CallerKind, Reach, refusal

LABELS = st.lists(st.sampled_from(["a", "b", "c"]), unique=True).map(tuple)


def user(role: UserRole, name: str = "ann", **fields: object) -> Caller:
    return Caller(CallerKind.USER, name, role=role, **fields)  # type: ignore[arg-type]


def node(role: NodeRole) -> Caller:
    return Caller(CallerKind.NODE, "n1", node_role=role)


def test_everybody_has_words_for_every_call() -> None:
    assert set(rights.DOING) == set(Call)


def test_a_higher_role_may_all_that_a_lower_one_may() -> None:
    for low, high in zip(UserRole, list(UserRole)[1:], strict=False):
        for call in Call:
            assert rights.reach(user(high), call) >= rights.reach(user(low), call), (low, high, call)


def test_an_admin_may_everything_that_is_for_people() -> None:
    refused = {c for c in Call if refusal(user(UserRole.ADMIN), c) is not None}
    assert refused == {Call.PEER, Call.USAGE, Call.GATEWAY}


def test_only_admins_change_who_may_what() -> None:
    changes = (Call.TOKENS, Call.ACCESS_CHANGE, Call.POLICY, Call.AUTHORITIES)
    for role, call in product(UserRole, changes):
        assert (refusal(user(role), call) is None) == (role is UserRole.ADMIN)


@pytest.mark.parametrize("call", Call)
def test_nobody_may_only_ask_to_be_let_in(call: Call) -> None:
    words = refusal(Caller.nobody(), call)
    assert (words is None) == (call in (Call.HEALTH, Call.ENROLL))
    assert refusal(Caller.local(), call, owner="x", clearance=["secret"]) is None


def test_why_somebody_is_nobody_is_told() -> None:
    assert refusal(Caller.nobody("the certificate of user ann has expired"), Call.STATUS) == (
        "the certificate of user ann has expired"
    )


@pytest.mark.parametrize("call", [Call.SUBMIT, Call.CANCEL, Call.SECRETS, Call.TOKENS, Call.ACCESS_CHANGE, Call.STATUS])
@pytest.mark.parametrize("role", NodeRole)
def test_nodes_are_no_users(role: NodeRole, call: Call) -> None:
    assert refusal(node(role), call, owner="n1") is not None


def test_seats_are_between_voters() -> None:
    assert refusal(node(NodeRole.VOTER), Call.PEER) is None
    assert refusal(node(NodeRole.WORKER), Call.PEER) == "node n1 (worker) may not give or take voters' seats"


def test_what_is_own() -> None:
    ann = user(UserRole.USER, projects=("blue",))
    assert ann.owns("ann")
    assert ann.owns("blue")
    assert not ann.owns("bob")
    assert not ann.owns("")  # belongs to nobody
    assert not node(NodeRole.VOTER).owns("n1")


@pytest.mark.parametrize("call", [Call.SUBMIT, Call.CANCEL, Call.LOG, Call.SECRETS, Call.PAYLOAD])
def test_a_user_acts_for_itself_and_its_projects(call: Call) -> None:
    ann = user(UserRole.USER, projects=("blue",))
    assert refusal(ann, call) is None
    assert refusal(ann, call, owner="ann") is None
    assert refusal(ann, call, owner="blue") is None
    assert "not of bob" in (refusal(ann, call, owner="bob") or "")
    assert "belong to nobody" in (refusal(ann, call, owner="") or "")


def test_operators_act_on_all_tasks_but_in_nobody_elses_name() -> None:
    op = user(UserRole.OPERATOR)
    for call in (Call.CANCEL, Call.LOG, Call.PAYLOAD):
        assert refusal(op, call, owner="bob") is None
        assert refusal(op, call, owner="") is None
    for call in (Call.SUBMIT, Call.SECRETS):
        assert refusal(op, call, owner="bob") is not None


@pytest.mark.parametrize("role", UserRole)
@given(has=LABELS, needs=LABELS)
def test_labels_are_for_everybody(role: UserRole, has: tuple[str, ...], needs: tuple[str, ...]) -> None:
    caller = user(role, clearances=has)
    allowed = refusal(caller, Call.LOG, owner="ann", clearance=needs) is None
    assert allowed == (role >= UserRole.USER and set(needs) <= set(has))


def test_the_words_say_who_and_what() -> None:
    assert refusal(user(UserRole.VIEWER), Call.SUBMIT) == "user ann (viewer) may not submit tasks"
    assert refusal(user(UserRole.ADMIN), Call.LOG, owner="ann", clearance=["x", "b"]) == (
        "user ann is not cleared for b, x"
    )


def test_a_record_without_a_role_gives_nothing() -> None:
    for kind in (CallerKind.USER, CallerKind.NODE):
        assert {c for c in Call if refusal(Caller(kind, "x"), c) is None} == rights.FOR_ALL


def test_the_documentation_has_this_very_table() -> None:
    text = (Path(__file__).parents[2] / "docs" / "rights.md").read_text()
    told = {
        cells[0].strip("`"): cells[1:]
        for line in text.splitlines()
        if (cells := [c.strip() for c in line.strip().strip("|").split("|")]) and re.fullmatch(r"`[a-z-]+`", cells[0])
    }
    columns = [*(user(r) for r in UserRole), *(node(r) for r in NodeRole), Caller.nobody()]
    words = {Reach.NONE: "\N{EN DASH}", Reach.OWN: "own", Reach.ANY: "yes"}
    assert told == {c.value: [rights.DOING[c], *(words[rights.reach(who, c)] for who in columns)] for c in Call}
