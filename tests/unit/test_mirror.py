from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from spinetta.events import Change, Changed, List, ListDone, Listing, Unwatch, Watch, WatchLost
from spinetta.mirror import RETRY_S, Delta, Mirror
from spinetta.model import Revision
from tests.builders import entry


def listing(revision: int, **keys: int) -> ListDone:
    rows = tuple(entry(f"/x/{k}", b"", r, r) for k, r in sorted(keys.items()))
    return ListDone("x", Listing(Revision(revision), rows))


def put(key: str, revision: int) -> Change:
    return Change(f"/x/{key}", entry(f"/x/{key}", b"", revision, revision), Revision(revision))


def gone(key: str, revision: int) -> Change:
    return Change(f"/x/{key}", None, Revision(revision))


def told(serial: int, *changes: Change) -> Changed:
    return Changed("x", serial, changes, changes[-1].revision)


def opened() -> Mirror:
    m = Mirror("x", "/x/", 30.0)
    m.open(0.0)
    assert m.poll(0.0) == [List("x", "/x/")]
    return m


def synced(revision: int = 10, **keys: int) -> Mirror:
    m = opened()
    m.listed(listing(revision, **keys), 0.0)
    return m


def seen(m: Mirror) -> dict[str, int]:
    return {k.removeprefix("/x/"): e.modified for k, e in m.entries.items()}


def brief(deltas: Sequence[Delta]) -> list[tuple[str, int, int]]:
    return [(d.key[3:], d.old.modified if d.old else 0, d.new.modified if d.new else 0) for d in deltas]


def test_list_then_watch_from_there() -> None:
    m = opened()
    assert not m.synced
    assert m.next_s is None  # until the listing is answered
    deltas, effects = m.listed(listing(10, a=5), 1.0)
    assert brief(deltas) == [("a", 0, 5)]
    assert effects == [Watch("x", 1, "/x/", Revision(11))]
    assert m.synced
    assert m.next_s == 31.0


def test_events() -> None:
    m = synced(a=5)
    assert brief(m.changed(told(1, put("b", 11), gone("a", 12), put("b", 13)))) == [
        ("b", 0, 11),
        ("a", 5, 0),
        ("b", 11, 13),
    ]
    assert seen(m) == {"b": 13}


def test_a_listing_that_was_not_answered_is_made_again() -> None:
    m = opened()
    assert m.listed(ListDone("x", None), 1.0) == ([], [])
    assert m.next_s == 1.0 + RETRY_S
    assert m.poll(1.0) == []
    assert m.poll(1.0 + RETRY_S) == [List("x", "/x/")]


def test_a_lost_watch_leads_to_a_listing_and_a_new_watch() -> None:
    m = synced(a=5, b=6)
    m.lost(WatchLost("x", 1), 5.0)
    assert m.synced
    assert seen(m) == {"a": 5, "b": 6}
    assert m.poll(5.0 + RETRY_S) == [List("x", "/x/")]
    deltas, effects = m.listed(listing(20, b=6, c=15), 6.0)
    assert brief(deltas) == [("a", 5, 0), ("c", 0, 15)]
    assert effects == [Watch("x", 2, "/x/", Revision(21))]


def test_an_old_watch_says_nothing() -> None:
    m = synced(a=5)
    m.lost(WatchLost("x", 1), 5.0)
    assert m.changed(told(1, put("b", 11))) == []
    m.poll(6.0)
    m.listed(listing(20, a=5), 6.0)
    assert m.changed(told(1, put("b", 21))) == []
    m.lost(WatchLost("x", 1), 7.0)
    assert brief(m.changed(told(2, put("b", 21)))) == [("b", 0, 21)]


def test_a_listing_now_and_then_heals_what_the_watch_dropped() -> None:
    m = synced(a=5, b=6)
    assert m.poll(29.0) == []
    assert m.poll(30.0) == [List("x", "/x/")]
    deltas, effects = m.listed(listing(20, b=17), 31.0)
    assert brief(deltas) == [("a", 5, 0), ("b", 6, 17)]
    assert effects == []  # the watch stands
    assert m.next_s == 61.0


def test_events_that_are_newer_than_the_listing_count() -> None:
    m = synced(a=5, b=6)
    m.poll(30.0)
    m.changed(told(1, put("c", 22), gone("a", 23), put("b", 24)))
    deltas, _ = m.listed(listing(20, a=5, b=6), 31.0)
    assert deltas == []
    assert seen(m) == {"b": 24, "c": 22}


def test_events_that_are_older_than_the_listing_do_not() -> None:
    """A watch that lags would otherwise bring back what the listing has shown to be gone."""
    m = synced(a=5)
    m.poll(30.0)
    m.listed(listing(20, a=18), 31.0)
    assert m.changed(told(1, put("b", 11), put("a", 12), gone("a", 13), gone("b", 19))) == []
    assert seen(m) == {"a": 18}


def test_refresh_lists_at_once_but_not_in_a_storm() -> None:
    m = synced(a=5)
    m.refresh(3.0)
    assert m.next_s == 3.0
    m.poll(3.0)
    m.refresh(3.1)  # under way
    assert m.next_s is None
    m.listed(ListDone("x", None), 4.0)
    m.refresh(4.0)  # pausing
    assert m.next_s == 4.0 + RETRY_S


def test_closed_it_forgets() -> None:
    m = synced(a=5)
    assert m.close() == [Unwatch("x")]
    assert (m.synced, m.entries, m.next_s) == (False, {}, None)
    assert m.changed(told(1, put("b", 11))) == []
    assert m.close() == []
    m.refresh(3.0)
    assert m.next_s is None
    m.open(9.0)
    assert m.poll(9.0) == [List("x", "/x/")]
    _, effects = m.listed(listing(30, c=25), 9.0)
    assert effects == [Watch("x", 2, "/x/", Revision(31))]


def test_a_listing_that_comes_after_closing_is_dropped() -> None:
    m = opened()
    m.close()
    assert m.listed(listing(10, a=5), 1.0) == ([], [])
    assert m.entries == {}


steps = st.lists(
    st.tuples(st.sampled_from(["put", "del", "list", "answer", "tell", "lose"]), st.sampled_from("abc")), max_size=50
)


@settings(max_examples=300)
@given(steps)
def test_it_agrees_with_the_store(script: Sequence[tuple[str, str]]) -> None:
    """Listings answered late, events that lag, watches that break: in the end the mirror is the store."""
    m = Mirror("x", "/x/", 30.0)
    m.open(0.0)
    store: dict[str, int] = {}
    log: list[Change] = []
    revision, now = 1, 0.0
    watch: Watch | None = None
    at = 0  # what of the log has been told to the present watch
    asked: list[ListDone] = []

    def ask() -> None:
        if m.poll(now):
            asked.append(listing(revision, **store))

    def answer() -> None:
        nonlocal watch, at
        if asked:
            for e in m.listed(asked.pop(0), now)[1]:
                assert isinstance(e, Watch)
                watch, at = e, next((i for i, c in enumerate(log) if c.revision >= e.start), len(log))

    def tell() -> None:
        nonlocal at
        if watch is not None and at < len(log):
            m.changed(told(watch.serial, log[at]))
            at += 1

    for kind, key in script:
        now += 7.0
        if kind == "put":
            revision += 1
            store[key] = revision
            log.append(put(key, revision))
        elif kind == "del" and key in store:
            revision += 1
            del store[key]
            log.append(gone(key, revision))
        elif kind == "list":
            ask()
        elif kind == "answer":
            answer()
        elif kind == "tell":
            tell()
        elif kind == "lose" and watch is not None:
            m.lost(WatchLost("x", watch.serial), now)
            watch = None
    now += 100.0
    answer()
    ask()
    answer()
    for _ in range(len(log)):
        tell()
    assert seen(m) == store
