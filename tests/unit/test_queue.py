from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from spinetta import codec, keys, queue
from spinetta.events import Change, Entry, Listing
from spinetta.model import QueueHint, Revision
from spinetta.queue import Window
from tests.builders import BIG, cpus, entry, hint, task_id

TAGS = frozenset({"ssd"})


def window() -> Window:
    return Window(BIG, TAGS)


def row(n: int, revision: int, value: QueueHint | None = None, *, empty: bool = False) -> Entry:
    return entry(keys.queued(task_id(n)), b"" if empty else codec.encode_hint(value or hint()), revision, revision)


def listing(revision: int, *rows: Entry, more: bool = False) -> Listing:
    return Listing(Revision(revision), rows, more)


def put(n: int, revision: int, value: QueueHint | None = None) -> Change:
    new = row(n, revision, value)
    return Change(new.key, new, Revision(revision))


def gone(n: int, revision: int) -> Change:
    return Change(keys.queued(task_id(n)), None, Revision(revision))


def shown(w: Window) -> list[int]:
    return sorted(int(t[:8], 16) for t in w.entries)


def test_a_listing_and_then_events() -> None:
    w = window()
    w.page(listing(10, row(1, 5), row(2, 6)), "", 1.0)
    assert w.covered_to is None
    w.change(put(3, 11), 2.0)
    w.change(gone(1, 12), 3.0)
    assert shown(w) == [2, 3]
    assert w.entries[task_id(3)].seen_at_s == 2.0


def test_nothing_is_taken_in_before_the_first_page() -> None:
    w = window()
    w.change(put(3, 11), 2.0)
    assert shown(w) == []
    assert w.wants_page_after == ""


def test_beyond_a_cut_page_nothing_is_known() -> None:
    w = window()
    w.page(listing(10, row(1, 5), row(2, 6), more=True), "", 1.0)
    assert w.wants_page_after == keys.queued(task_id(2))
    w.change(put(9, 11), 2.0)
    assert shown(w) == [1, 2]
    w.page(listing(12, row(5, 7), row(9, 11)), keys.queued(task_id(2)), 3.0)
    assert shown(w) == [1, 2, 5, 9]
    assert w.wants_page_after is None


def test_what_can_never_run_here_takes_no_place() -> None:
    w = window()
    w.page(
        listing(
            10,
            row(1, 5, hint(cpus(99))),
            row(2, 6, hint(tags_required=("fast",))),
            row(3, 7, hint(tags_forbidden=("ssd",))),
            row(4, 8),
        ),
        "",
        1.0,
    )
    assert shown(w) == [4]


def test_a_page_removes_what_it_does_not_show_unless_that_is_newer() -> None:
    w = window()
    w.page(listing(10, row(1, 5), row(2, 6)), "", 1.0)
    w.change(put(3, 15), 2.0)
    w.page(listing(12, row(2, 6)), "", 3.0)
    assert shown(w) == [2, 3]


def test_a_page_of_the_middle_leaves_the_rest_alone() -> None:
    w = window()
    w.page(listing(10, row(1, 5), row(2, 6), row(3, 7), row(8, 9)), "", 1.0)
    w.page(listing(20, row(3, 7), more=True), keys.queued(task_id(1)), 2.0)
    assert shown(w) == [1, 3, 8]


def test_older_news_changes_nothing() -> None:
    w = window()
    w.page(listing(10, row(1, 9)), "", 1.0)
    w.change(put(1, 7, hint(priority=5)), 2.0)
    w.change(gone(1, 8), 2.0)
    assert w.entries[task_id(1)].revision == 9
    w.drop(task_id(1), Revision(8))
    assert shown(w) == [1]
    w.drop(task_id(1), Revision(9))
    assert shown(w) == []


def test_a_task_queued_again_is_seen_anew() -> None:
    w = window()
    w.page(listing(10, row(1, 5)), "", 1.0)
    w.change(gone(1, 11), 2.0)
    w.change(put(1, 12), 3.0)
    assert w.entries[task_id(1)].seen_at_s == 3.0


def test_when_it_was_first_seen_outlives_a_closed_window() -> None:
    w = window()
    w.page(listing(10, row(1, 5), row(2, 6)), "", 1.0)
    w.clear()
    assert shown(w) == []
    assert w.covered_to == ""
    w.clear()  # twice: a watch that is lost again before the next page
    w.page(listing(20, row(1, 5), row(2, 15)), "", 50.0)
    assert w.entries[task_id(1)].seen_at_s == 1.0
    assert w.entries[task_id(2)].seen_at_s == 50.0


# --- tasks without a hint ---


def test_tasks_without_a_hint_are_read() -> None:
    w = window()
    w.page(listing(10, row(1, 5, empty=True), row(2, 6)), "", 1.0)
    assert w.without_hint() == (task_id(1),)
    w.set_hint(task_id(1), Revision(5), hint(cpus(2)))
    assert w.without_hint() == ()
    assert w.entries[task_id(1)].hint == hint(cpus(2))


def test_a_task_without_a_hint_that_can_never_run_is_not_read_again() -> None:
    w = window()
    w.page(listing(10, row(1, 5, empty=True)), "", 1.0)
    w.set_hint(task_id(1), Revision(5), hint(cpus(99)))
    assert shown(w) == []
    w.page(listing(20, row(1, 5, empty=True)), "", 2.0)
    assert w.without_hint() == ()
    w.change(gone(1, 21), 3.0)
    w.change(Change(keys.queued(task_id(1)), row(1, 22, empty=True), Revision(22)), 3.0)
    assert w.without_hint() == (task_id(1),)


def test_a_hint_of_an_older_revision_is_not_believed() -> None:
    w = window()
    w.page(listing(10, row(1, 5, empty=True)), "", 1.0)
    w.set_hint(task_id(1), Revision(4), hint())
    assert w.entries[task_id(1)].hint is None
    w.set_hint(task_id(2), Revision(4), hint())
    assert shown(w) == [1]


def test_a_hint_of_a_newer_revision_means_that_the_key_has_moved_on() -> None:
    w = window()
    w.page(listing(10, row(1, 5, empty=True)), "", 1.0)
    w.set_hint(task_id(1), Revision(7), hint())
    assert shown(w) == []


# --- bounds ---


def test_the_window_is_bounded() -> None:
    w = window()
    w.page(listing(1), "", 0.0)
    for n in range(1, 4 * queue.WINDOW_MAX):
        w.change(put(n, n + 1), 0.0)
        assert len(w.entries) <= 2 * queue.WINDOW_MAX
    assert shown(w)[0] == 1
    assert w.covered_to is not None
    assert max(keys.queued(t) for t in w.entries) <= w.covered_to


# --- against a naive model ---

steps = st.lists(
    st.one_of(
        st.tuples(st.just("put"), st.integers(1, 12), st.sampled_from([1, 2, 99])),
        st.tuples(st.just("delete"), st.integers(1, 12), st.just(0)),
        st.tuples(st.just("page"), st.integers(0, 12), st.integers(1, 6)),
        st.tuples(st.just("lag"), st.integers(0, 5), st.just(0)),
        st.tuples(st.just("clear"), st.just(0), st.just(0)),
    ),
    max_size=60,
)


@settings(max_examples=300)
@given(steps)
def test_it_agrees_with_the_queue(script: Sequence[tuple[str, int, int]]) -> None:
    """Whatever the order of pages and (late) events: within what is covered, the window is the queue in the end."""
    w = window()
    store: dict[int, tuple[int, int]] = {}
    revision = 1
    late: list[Change] = []
    lag = 0
    for kind, n, x in script:
        revision += 1
        if kind == "put":
            store[n] = (revision, x)
            late.append(put(n, revision, hint(cpus(x))))
        elif kind == "delete":
            if store.pop(n, None) is not None:
                late.append(gone(n, revision))
        elif kind == "lag":
            lag = n
        elif kind == "clear":
            w.clear()
        else:
            after = "" if w.covered_to == "" or n % 3 == 0 else (w.covered_to or "")
            rows = [row(i, r, hint(cpus(c))) for i, (r, c) in sorted(store.items()) if keys.queued(task_id(i)) > after]
            w.page(listing(revision, *rows[:x], more=len(rows) > x), after, 0.0)
        while len(late) > lag:
            w.change(late.pop(0), 0.0)
    for change in late:
        w.change(change, 0.0)
    covered = w.covered_to
    wanted = {
        task_id(i): r
        for i, (r, c) in store.items()
        if c <= 4 and covered != "" and (covered is None or keys.queued(task_id(i)) <= covered)
    }
    known = {t: e.revision for t, e in w.entries.items() if covered is None or keys.queued(t) <= covered}
    assert known == wanted
    # Beyond what is covered the window may show less than there is, and nothing that is not there.
    for t, e in w.entries.items():
        assert store[int(t[:8], 16)][0] == e.revision
