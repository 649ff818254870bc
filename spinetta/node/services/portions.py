"""Many transactions, in portions that etcd takes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from spinetta import txn

T = TypeVar("T")


def portions(items: Iterable[T], size_bytes: Callable[[T], int]) -> Iterator[list[T]]:
    """The items in order, at most `NESTED_MAX` and `BATCH_BYTES_MAX` together; a larger one alone. Never empty."""
    out: list[T] = []
    total = 0
    for item in items:
        size = size_bytes(item)
        if out and (len(out) == txn.NESTED_MAX or total + size > txn.BATCH_BYTES_MAX):
            yield out
            out, total = [], 0
        out.append(item)
        total += size
    if out:
        yield out
