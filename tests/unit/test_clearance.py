"""Clearance in the pure core: what matches, what is claimed, what may be submitted."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spinetta import codec, confidential, keys, messages, names, validate
from spinetta.access import (
    MEMBERS,
    Envelope,
    GroupAcl,
    NodeAcl,
    NodeRole,
    SealedKeyShare,
    effective_clearances,
)
from spinetta.claims import Claims
from spinetta.errors import UserError
from spinetta.events import Change, ClearancesChanged, Commit, Entry, List, ListDone, Listing, Read, ReadDone, Reading
from spinetta.match import Obstacle, uncleared, why_never
from spinetta.model import IncarnationId, NodeId, QueueHint, Revision, TaskSpec
from spinetta.payload import hollow
from spinetta.queue import PAGE_KEYS, Window
from spinetta.steal import rivals
from spinetta.txn import Registration
from tests.builders import BIG, entry, hint, node_record, queued, settings, spec, task_id

LABELS = ["a", "b", "c"]
SETS = st.sets(st.sampled_from(LABELS)).map(lambda s: tuple(sorted(s)))


# --- match -----------------------------------------------------------------------------------------------------------


@given(wanted=SETS, has=SETS)
def test_cleared_means_for_all_of_them(wanted: tuple[str, ...], has: tuple[str, ...]) -> None:
    reason = why_never(hint(clearance=wanted), BIG, frozenset(), has)
    assert (reason is None) == (set(wanted) <= set(has))
    if reason is not None:
        assert reason.obstacle is Obstacle.NOT_CLEARED
        assert set(reason.detail.rpartition("for ")[2].split(", ")) == set(wanted) - set(has)


def test_without_clearances_nothing_with_a_label_runs() -> None:
    assert why_never(hint(clearance=("a",)), BIG, frozenset()) is not None


def test_everybody_is_cleared_for_members() -> None:
    assert why_never(hint(clearance=(MEMBERS,)), BIG, frozenset()) is None
    assert uncleared((MEMBERS, "b", "a", "b"), ("b",)) == ["a"]


@given(wanted=SETS, granted=SETS, groups=st.lists(SETS, max_size=3))
def test_on_nodes_and_in_groups(
    wanted: tuple[str, ...], granted: tuple[str, ...], groups: list[tuple[str, ...]]
) -> None:
    acls = tuple(GroupAcl(f"g{i}", labels) for i, labels in enumerate(groups))
    node = NodeAcl(
        "n", NodeRole.WORKER, granted, tuple(g.name for g in acls), effective_clearances(granted, acls), b"k", b"s"
    )
    covers = all(label in granted and all(label in g for g in groups) for label in wanted)
    assert (why_never(hint(clearance=wanted), BIG, frozenset(), node.effective) is None) == covers


def test_only_cleared_peers_are_rivals() -> None:
    peers = [node_record("n1", clearances=("a",)), node_record("n2"), node_record("n3", clearances=("a", "b"))]
    assert rivals(hint(clearance=("a",)), peers) == ["n1", "n3"]


# --- the window ------------------------------------------------------------------------------------------------------


def row(n: int, *labels: str, empty: bool = False) -> Entry:
    value = b"" if empty else codec.encode_hint(hint(clearance=labels))
    return entry(keys.queued(task_id(n)), value, n, n)


def shown(w: Window) -> list[int]:
    return sorted(int(t[:8], 16) for t in w.entries)


def test_the_window_shows_what_the_node_is_cleared_for() -> None:
    w = Window(BIG, frozenset(), frozenset({"a"}))
    w.page(Listing(Revision(9), (row(1), row(2, "a"), row(3, "b"), row(4, "a", "b"), row(5, MEMBERS)), False), "", 0.0)
    assert shown(w) == [1, 2, 5]
    w.change(Change(keys.queued(task_id(6)), row(6, "b"), Revision(10)), 0.0)
    assert shown(w) == [1, 2, 5]
    w.set_clearances(frozenset())
    assert shown(w) == [1, 5]


def test_of_a_task_without_a_hint_the_record_decides() -> None:
    w = Window(BIG, frozenset(), frozenset({"a"}))
    w.page(Listing(Revision(9), (row(1, empty=True), row(2, empty=True)), False), "", 0.0)
    w.set_hint(task_id(1), Revision(1), hint(clearance=("b",)))
    w.set_hint(task_id(2), Revision(2), hint(clearance=("a",)))
    assert shown(w) == [2]
    w.set_clearances(frozenset({"a", "b"}))
    w.page(Listing(Revision(9), (row(1, empty=True), row(2, empty=True)), False), "", 0.0)
    assert shown(w) == [1, 2], "what it could never run before it may run now"


# --- claims ----------------------------------------------------------------------------------------------------------

LIFE = IncarnationId("life")
REG = Registration(NodeId("n1"), Revision(3), Revision(3), Revision(0))


def claims(*clearances: str) -> Claims:
    at = settings()
    return Claims(replace(at, record=replace(at.record, clearances=clearances)))


def listed(c: Claims, *rows: Entry) -> None:
    assert c.poll(1.0, REG, LIFE, BIG, 9, ()) == [List("queue", keys.QUEUED, "", PAGE_KEYS)]
    c.listed(ListDone("queue", Listing(Revision(100), rows, False)), 1.0)


def records(*those: TaskSpec) -> ReadDone:
    entries: dict[str, Entry | None] = {}
    for s in those:
        n = int(s.id[:8], 16)
        task = replace(queued(n), spec=s)
        entries[keys.task(s.id)] = entry(keys.task(s.id), codec.encode_task(task), n, n)
    return ReadDone("claim", Reading(Revision(100), entries))


def test_what_is_cleared_is_claimed() -> None:
    c = claims("a")
    listed(c, row(1, "a"), row(2, "b"))
    assert c.poll(1.0, REG, LIFE, BIG, 9, ()) == [Read("claim", (keys.task(task_id(1)),))]
    (commit,) = c.records_read(records(spec(1, clearance=("a",))), 1.0, 1000, REG)
    assert isinstance(commit, Commit)


def test_a_hint_that_hides_a_label_does_not_help() -> None:
    """The queue key says that the task has no label; its record knows better."""
    c = claims("a")
    listed(c, row(1))
    assert c.poll(1.0, REG, LIFE, BIG, 9, ()) == [Read("claim", (keys.task(task_id(1)),))]
    assert c.records_read(records(spec(1, clearance=("b",))), 1.0, 1000, REG) == []
    assert shown(c.window) == []


def test_a_clearance_lost_while_the_records_are_read() -> None:
    c = claims("a")
    listed(c, row(1, "a"))
    c.poll(1.0, REG, LIFE, BIG, 9, ())
    c.set_clearances(())
    assert c.records_read(records(spec(1, clearance=("a",))), 1.0, 1000, REG) == []


def test_a_clearance_gained_lists_the_queue_anew() -> None:
    c = claims()
    listed(c, row(1, "a"))
    assert shown(c.window) == []
    c.poll(1.0, REG, LIFE, BIG, 9, ())
    c.set_clearances(("a",))
    assert c.poll(1.1, REG, LIFE, BIG, 9, ()) == [List("queue", keys.QUEUED, "", PAGE_KEYS)]
    c.listed(ListDone("queue", Listing(Revision(101), (row(1, "a"),), False)), 1.1)
    assert shown(c.window) == [1]
    assert c.clearances == ("a",)
    c.set_clearances(("a",))
    assert c.poll(1.1, REG, LIFE, BIG, 9, ()) == [Read("claim", (keys.task(task_id(1)),))]


def test_the_event_is_a_value() -> None:
    assert ClearancesChanged(("a",)) == ClearancesChanged(("a",))


def test_the_hint_of_a_task_carries_its_labels() -> None:
    made = QueueHint.of(spec(clearance=("a", "b")))
    assert codec.decode_hint(codec.encode_hint(made)) == made


# --- validation ------------------------------------------------------------------------------------------------------

ENVELOPE = Envelope((SealedKeyShare("a", 1, b"x" * 81),), b"n" * 12, b"ciphertext")
SEALED = hollow(spec(clearance=("a",)), ENVELOPE)


def test_good() -> None:
    validate.check_spec(SEALED, "")
    validate.check_spec(spec(clearance=("a",)), "", to_be_sealed=True)
    validate.check_spec(spec(secrets=(("token", "token"), ("token", "other"))), "")
    assert messages.spec_from_pb(messages.spec_to_pb(SEALED)) == SEALED


@pytest.mark.parametrize(
    ("bad", "field", "message"),
    [
        (spec(clearance=("a",)), "clearance", "must be sealed"),
        (replace(SEALED, clearance=()), "sealed", "without clearance labels cannot be sealed"),
        (replace(SEALED, command=("x",)), "command", "its command in clear"),
        (replace(SEALED, name="x"), "name", "its name in clear"),
        (replace(SEALED, env=(("A", "b"),)), "env", "its env in clear"),
        (replace(SEALED, labels=(("A", "b"),)), "labels", "its labels in clear"),
        (replace(SEALED, working_directory="/x"), "working_directory", "its working directory in clear"),
        (replace(SEALED, clearance=("a", "b")), "sealed", "not sealed to exactly"),
        (replace(SEALED, clearance=("b",)), "sealed", "not sealed to exactly"),
        (replace(SEALED, clearance=("A",)), "clearance[0]", "not a clearance label"),
        (replace(SEALED, clearance=("a", "a")), "clearance", "given twice"),
        (replace(SEALED, clearance=tuple("abcdefghi")), "clearance", "9 clearance labels"),
        (replace(SEALED, sealed=replace(ENVELOPE, nonce=b"")), "sealed", "the envelope is none"),
        (replace(SEALED, sealed=replace(ENVELOPE, ciphertext=b"")), "sealed", "the envelope is none"),
        (
            replace(SEALED, sealed=replace(ENVELOPE, ciphertext=b"x" * (confidential.SEALED_BYTES_MAX + 1))),
            "sealed",
            "sealed bytes",
        ),
        (replace(SEALED, sealed=replace(ENVELOPE, shares=ENVELOPE.shares * 2)), "sealed", "not sealed to exactly"),
        (replace(SEALED, sealed=replace(ENVELOPE, shares=(SealedKeyShare("a", 0, b"x"),))), "sealed", "is none"),
        (replace(SEALED, sealed=replace(ENVELOPE, shares=(SealedKeyShare("a", 1, b"x" * 999),))), "sealed", "is none"),
        (spec(secrets=(("a/b", "x"),)), "secrets[0].name", "not a name for a secret"),
        (spec(secrets=(("", "x"),)), "secrets[0].name", "not a name for a secret"),
        (spec(secrets=(("a", "../x"),)), "secrets[0].file", "not a name for a secret's file"),
        (spec(secrets=(("a", ".x"),)), "secrets[0].file", "not a name for a secret's file"),
        (spec(secrets=(("a", "x"), ("b", "x"))), "secrets[1].file", "two secrets would be the file x"),
        (spec(secrets=tuple((f"s{i}", f"s{i}") for i in range(33))), "secrets", "33 secrets"),
    ],
)
def test_refused(bad: TaskSpec, field: str, message: str) -> None:
    with pytest.raises(UserError) as e:
        validate.check_spec(bad, "")
    assert e.value.field == field
    assert message in str(e.value)


def test_a_clear_payload_has_a_reason_of_its_own() -> None:
    for bad in (spec(clearance=("a",)), replace(SEALED, command=("x",))):
        with pytest.raises(UserError) as e:
            validate.check_spec(bad, "")
        assert e.value.reason == "unsealed"


@pytest.mark.parametrize(("first", "last"), list(product("a0", "z9")))
def test_labels_and_secrets_names(first: str, last: str) -> None:
    assert names.check_clearance(f"{first}._-{last}") == f"{first}._-{last}"
    assert names.check_secret_name(f"{first}.PEM_{last}") == f"{first}.PEM_{last}"


@pytest.mark.parametrize("bad", ["", "A", "-a", "a-", ".a", "a/b", "a b", "ä", "a" * 64, "a\n", "a\0"])
def test_no_labels(bad: str) -> None:
    with pytest.raises(UserError):
        names.check_clearance(bad)


@pytest.mark.parametrize("bad", ["", ".", "..", ".a", "-a", "a/b", "a b", "ä", "a" * 129, "a\n", "a\0"])
def test_no_names_of_secrets(bad: str) -> None:
    with pytest.raises(UserError):
        names.check_secret_name(bad)


def test_every_field_of_a_task_is_sealed_or_known_to_be_visible() -> None:
    """Whoever adds a field must decide: here, in `payload` and in docs/clearance.md."""
    whole: dict[str, Any] = {f.name: getattr(spec(), f.name) for f in dataclasses.fields(TaskSpec)}
    sealed = {"command", "name", "labels", "env", "working_directory"}
    visible = {
        *("id", "resources", "walltime_s", "tags_required", "tags_forbidden", "priority", "retries", "retry_backoff_s"),
        *("restart_on_node_failure", "owner", "grace_s", "clearance", "sealed", "secrets", "overlap", "losses_allowed"),
        *("container", "keep_scratch_s", "open_files_max"),  # nodes are chosen by it
    }
    assert set(whole) == sealed | visible
