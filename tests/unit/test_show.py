"""Why a task waits, for people."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from spinetta.cli.node import node_table
from spinetta.cli.show import why_never_runs, why_waiting
from spinetta.client.views import NodeInfo, NodeList, TaskInfo
from spinetta.model import NodeRecord, Revision, State, Task
from tests.builders import cpus, node_record, queued, spec


def nodes(*records: NodeRecord, status: str = "ready") -> NodeList:
    return NodeList(tuple(NodeInfo(r, False, False, False, status, 0) for r in records))


def info(task: Task) -> TaskInfo:
    return TaskInfo(task, "", Revision(1), False)


def waits(found: NodeList, **fields: Any) -> list[str]:
    return why_waiting(info(queued(1, **fields)), found)


def test_a_task_that_no_node_can_run_says_so_first() -> None:
    three = nodes(node_record("n1"), node_record("n2"), node_record("n3", tags=["old"]))
    assert waits(three, tags_required=("ssd",), resources=cpus(1)) == [
        "no node of the cluster can ever run it:",
        "n1, n2, n3: the node lacks the tag ssd",
    ]
    assert waits(three, resources=cpus(64), tags_forbidden=("old",)) == [
        "no node of the cluster can ever run it:",
        "n1, n2: 64 cores wanted, 4 there",
        "n3: the task forbids the node's tag old",
    ]


def test_busy_nodes_are_no_obstacle_for_ever() -> None:
    found = nodes(node_record("n1", free=cpus(0.5)), node_record("n2", tags=["old"]))
    assert waits(found, tags_forbidden=("old",)) == [
        "n1: busy: 1 core wanted, 0.5 there",
        "n2: the task forbids the node's tag old",
    ]
    assert waits(nodes(node_record("n1"), status="draining")) == ["n1: the node is draining"]


def test_what_some_node_may_run_one_day_is_not_told_to_wait_for_ever() -> None:
    def never(found: NodeList) -> list[str]:
        return why_never_runs(info(queued(1, tags_required=("ssd",))), found)

    assert never(nodes(node_record("n1"), node_record("n2"))) == ["n1, n2: the node lacks the tag ssd"]
    assert never(nodes(node_record("n1"), node_record("n2", tags=["ssd"], free=cpus(0)))) == []
    assert never(nodes()) == []
    assert why_never_runs(info(Task(spec(1), State.RUNNING)), nodes(node_record("n1"))) == []


def test_what_could_start_says_what_it_waits_for() -> None:
    assert waits(nodes(node_record("n1"))) == ["n1: free; the node will take it when its turn comes"]
    task = Task(spec(1, retries=3, retry_backoff_s=60.0), State.QUEUED, failures=1)
    assert why_waiting(info(task), nodes(node_record("n1"))) == ["n1: free; it has failed and waits for its back-off"]


def test_what_a_lost_node_could_run_is_not_known() -> None:
    gone = nodes(replace(node_record("n2"), address="", capacity=cpus(0)), status="lost")
    found = NodeList(nodes(node_record("n1")).nodes + gone.nodes)
    assert waits(found, tags_required=("ssd",)) == ["n1: the node lacks the tag ssd", "n2: the node is lost"]


def test_a_lost_node_has_no_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    node_table(nodes(replace(node_record("n2"), address="", started_ms=0), status="condemned"))
    assert capsys.readouterr().out.splitlines()[1].split() == ["n2", "condemned", "worker", "0s"]


def test_what_does_not_wait_has_no_reasons() -> None:
    assert why_waiting(info(Task(spec(1), State.RUNNING)), nodes(node_record("n1"))) == []
    assert waits(NodeList(())) == []


def test_the_table_of_nodes_shows_clearance_where_there_is_some(capsys: pytest.CaptureFixture[str]) -> None:
    node_table(nodes(node_record("n1"), node_record("n2")))
    assert "CLEARANCE" not in capsys.readouterr().out
    node_table(nodes(node_record("n1"), replace(node_record("n2"), clearances=("internal", "secret"))))
    header, first, second = capsys.readouterr().out.splitlines()
    at = header.index("CLEARANCE")
    assert (first[at:], second[at:]) == ("", "internal,secret")
