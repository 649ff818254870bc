"""Ids in order of submission, from either end, without asking etcd to read or sort a large range.

etcd answers a descending range by reading all of it, and a limited one by counting the rest. So the ends of a prefix
are walked in windows: ids begin with a time, and a window is a beginning that they share. A window with too many keys
is halved into sixteen, a run of nearly empty ones is widened.
"""

from __future__ import annotations

from dataclasses import dataclass

from spinetta import keys
from spinetta.model import Revision, TaskId
from spinetta.store.protocol import KeyValue, Store

WINDOW_KEYS_MIN, WINDOW_KEYS_MAX = 128, 1000  # read of one window, about twice as many as are wanted
DEPTH = 7  # hexadecimal digits shared in a first window: 17 minutes
AHEAD_MS = 120_000  # clocks that are further ahead than this cost a longer walk, no more
SPARSE_MAX = 2  # nearly empty windows in a row before we look whether the rest is small
_DASHES = (8, 12, 16, 20, 32)


@dataclass(frozen=True, slots=True)
class Ids:
    """Some ids in the order asked for; `more`: there may be others after them; read at this revision."""

    ids: tuple[TaskId, ...]
    more: bool
    revision: Revision


async def oldest_first(store: Store, prefix: str, *, after: str, limit: int, revision: Revision = Revision(0)) -> Ids:
    """The first ids beyond `after` (empty: from the beginning). May be fewer than `limit` though there are more."""
    if after:
        window = prefix + _text(_digits(after)[:DEPTH])
        page = await store.list(window, after=prefix + after, limit=limit, keys_only=True, revision=revision)
        if page.entries:
            return Ids(tuple(keys.parse_task(e.key) for e in page.entries), True, revision or page.revision)
    page = await store.list(
        prefix, after=prefix + after if after else "", limit=limit, keys_only=True, revision=revision
    )
    return Ids(tuple(keys.parse_task(e.key) for e in page.entries), page.more, revision or page.revision)


async def newest_first(
    store: Store, prefix: str, *, before: str, limit: int, now_ms: int, revision: Revision = Revision(0)
) -> Ids:
    """The last ids below `before` (empty: from the end), the latest first.

    Fewer than `limit` only if there are no more.

    Args:
        store, prefix: where to look.
        before: exclusive.
        limit: at most so many.
        now_ms: roughly the time, where the search begins; a wrong one costs time only.
        revision: read as of then; 0: now.
    """
    bound = before
    if not bound:
        start = _text(f"{now_ms + AHEAD_MS:012x}")
        ahead = await store.list(prefix, after=prefix + start, limit=1, keys_only=True, revision=revision)
        revision = revision or ahead.revision
        bound = "g" if ahead.entries else start  # beyond all hexadecimal digits
    most = min(max(2 * limit, WINDOW_KEYS_MIN), WINDOW_KEYS_MAX)
    window: str | None = _digits(bound)[:DEPTH] if bound != "g" else ""
    out: list[TaskId] = []
    sparse = 0
    while window is not None and len(out) <= limit:
        if sparse == SPARSE_MAX:
            page = await store.list(prefix, limit=most, keys_only=True, revision=revision)
            if not page.more or keys.parse_task(page.entries[-1].key) >= bound:
                out += _below(page.entries, bound)
                window = None
                break
            sparse += 1  # asked once: with very many keys the answer costs a tenth of a second
        page = await store.list(prefix + _text(window), limit=most, keys_only=True, revision=revision)
        revision = revision or page.revision
        if page.more:
            inside = bound != "g" and _digits(bound).startswith(window) and len(_digits(bound)) > len(window)
            window = _digits(bound)[: len(window) + 1] if inside else window + "f"
            continue
        out += _below(page.entries, bound)
        bound = _text(window)
        is_sparse = len(page.entries) < max(most // 16, 1)
        sparse += is_sparse
        window = _previous(window, widen=is_sparse)
    return Ids(tuple(out[:limit]), window is not None or len(out) > limit, revision)


def _below(entries: tuple[KeyValue, ...], bound: str) -> list[TaskId]:
    ids = [keys.parse_task(e.key) for e in entries]
    return [i for i in reversed(ids) if i < bound]


def _previous(window: str, *, widen: bool) -> str | None:
    """The window before this one, or a wider one where that contains nothing seen before; None at the beginning."""
    body = window.rstrip("0")
    if not body:
        return None
    previous = f"{body[:-1]}{int(body[-1], 16) - 1:x}"
    depth = len(window) - (widen and len(body) < len(window))
    return previous + "f" * (depth - len(previous))


def _digits(text: str) -> str:
    return text.replace("-", "")


def _text(digits: str) -> str:
    """Digits with the dashes of a UUID."""
    return "-".join(digits[i:j] for i, j in zip((0, *_DASHES), _DASHES, strict=False) if digits[i:j])
