"""Stored values as people see them."""

from __future__ import annotations

import pytest

from spinetta import access, codec, keys, trustcodec
from spinetta.cli import plain
from spinetta.errors import UserError
from spinetta.model import NodeId, Resources
from tests.builders import holding, node_record, queued, task_id


def test_for_people() -> None:
    task = queued(1, labels=(("run", "7"),))
    shown = plain.to_dict(keys.task(task_id(1)), codec.encode_task(task))
    assert shown["state"] == "QUEUED"
    assert shown["submitted_ms"] == 1000
    assert shown["spec"]["labels"] == {"run": "7"}
    assert shown["spec"]["resources"] == {"cpu_millis": 1000}
    assert plain.to_dict("task", codec.encode_task(task)) == shown
    gpu = plain.to_dict("node", codec.encode_node(node_record(capacity=Resources.of(1000, countables={"gpu": 2}))))
    assert gpu["capacity"]["countables"] == {"gpu": 2}
    held = plain.to_dict(keys.running(NodeId("n1"), task_id(1)), codec.encode_holding(holding(3)))
    assert held == {"attempt": 3, "incarnation": "life", "grace_s": 8.0}


def test_records_of_trust() -> None:
    ann = access.UserAcl("ann", access.UserRole.OPERATOR, ("genomes",), created_ms=5)
    shown = plain.to_dict(keys.acl_user("ann"), trustcodec.encode(ann))
    assert (shown["name"], shown["projects"], shown["created_ms"]) == ("ann", ["genomes"], 5)
    assert "OPERATOR" in shown["role"]
    policy = plain.to_dict(keys.POLICY, trustcodec.encode(access.Policy(approval=True)))
    assert policy["approval"] is True
    wrap = access.LabelGeneration(1, b"p" * 32, (access.Wrap("n1", b"s"),))
    label = plain.to_dict(keys.label("phi"), trustcodec.encode(access.LabelKey("phi", (wrap,))))
    assert label["generations"][0]["wraps"][0]["node"] == "n1"


@pytest.mark.parametrize("key", ["/elsewhere", "", "tasks"])
def test_what_is_not_ours_is_the_users_mistake(key: str) -> None:
    with pytest.raises(UserError):
        plain.to_dict(key, b"")
