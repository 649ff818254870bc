"""Batches stay below what etcd takes in one request."""

from __future__ import annotations

from spinetta import txn
from spinetta.model import NodeId, Revision, TaskId
from spinetta.txn import BATCH_BYTES_MAX, NESTED_MAX


def claims(count: int, record_bytes: int) -> list[txn.Txn]:
    return [
        txn.claim(NodeId("n"), TaskId(f"task-{i:032}"), Revision(7), b"r" * record_bytes, b"h" * 40)
        for i in range(count)
    ]


def test_small_ones_go_together_up_to_the_number_of_operations() -> None:
    assert txn.leading(claims(500, 100)) == NESTED_MAX
    assert txn.leading(claims(3, 100)) == 3
    assert txn.leading([]) == 0


def test_large_ones_are_cut_by_bytes() -> None:
    fitting = txn.leading(claims(10, 300_000))
    assert fitting == 3
    assert txn.size_bytes(txn.batch(claims(10, 300_000)[:fitting])) <= BATCH_BYTES_MAX


def test_one_that_is_too_large_by_itself_still_goes_alone() -> None:
    assert txn.leading(claims(2, 2 * BATCH_BYTES_MAX)) == 1


def test_the_size_is_never_below_keys_and_values() -> None:
    one = claims(1, 1000)[0]
    assert txn.size_bytes(one) >= 1000 + 40
    assert txn.size_bytes(txn.batch([one], (txn.NoneUnder("/x/"),))) > txn.size_bytes(one)
