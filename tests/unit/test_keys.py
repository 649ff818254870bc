from __future__ import annotations

import pytest

from spinetta import keys
from spinetta.errors import InvariantViolation
from spinetta.model import NodeId
from tests.builders import task_id

N = NodeId("n1")
T = task_id(7)


def test_spelling() -> None:
    """What an administrator types into etcdctl, and what other versions have stored: for ever."""
    assert keys.task(T) == f"/task/{T}"
    assert keys.blocked(T) == f"/status/blocked/{T}"
    assert keys.queued(T) == f"/status/queued/{T}"
    assert keys.running(N, T) == f"/status/running/n1/{T}"
    assert keys.complete(T) == f"/status/complete/{T}"
    assert keys.node(N) == "/node/n1"
    assert keys.incarnation(N) == "/incarnation/n1"
    assert keys.beat(N) == "/beat/n1"
    assert keys.OFFICE == "/leader/office"
    assert keys.GENERATION == "/generation"
    assert keys.BACKUP == "/backup"


@pytest.mark.parametrize("make", [keys.task, keys.blocked, keys.queued, keys.complete])
def test_task_keys_are_read_back(make: object) -> None:
    assert callable(make)
    assert keys.parse_task(make(T)) == T


@pytest.mark.parametrize("make", [keys.node, keys.incarnation, keys.beat])
def test_node_keys_are_read_back(make: object) -> None:
    assert callable(make)
    assert keys.parse_node(make(N)) == N


def test_running_keys_are_read_back() -> None:
    assert keys.parse_running(keys.running(N, T)) == (N, T)


@pytest.mark.parametrize("key", ["", "/task", "/status/running/n1/x", "/node/n1", "/tasks/x"])
def test_not_the_key_of_a_task(key: str) -> None:
    with pytest.raises(InvariantViolation):
        keys.parse_task(key)


@pytest.mark.parametrize(
    "key", ["", "/status/running/", "/status/running/n1", "/status/running/n1/", "/status/queued/x"]
)
def test_not_a_running_key(key: str) -> None:
    with pytest.raises(InvariantViolation):
        keys.parse_running(key)


@pytest.mark.parametrize("key", ["", "/task/x", "/leader/office", "node/n1"])
def test_not_the_key_of_a_node(key: str) -> None:
    with pytest.raises(InvariantViolation):
        keys.parse_node(key)


def test_one_node_is_not_taken_for_another() -> None:
    """n1 must not see what n10 holds."""
    assert not keys.running(NodeId("n10"), T).startswith(keys.running_on(N))


def test_ends_of_ranges() -> None:
    assert keys.task(T) < keys.after(keys.task(T)) < keys.task(task_id(8))


def test_key_order_is_submission_order() -> None:
    made = [keys.queued(task_id(n)) for n in range(1, 50)]
    assert made == sorted(made)
