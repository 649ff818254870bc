"""Calls that one node passes on to another: who may have that done, and what the other one's silence means."""

from __future__ import annotations

from typing import Any

import grpc
import grpc.aio
import pytest

from spinetta.errors import Denied, OutcomeUnknown, UserError
from spinetta.node.services.desk import Asked
from spinetta.node.services.forwarding import asked_of_holder, check_passed_on, is_for, passed_on
from spinetta.rights import Call, Caller, CallerKind

NOTHING: Any = None  # neither the desk nor the call itself is looked at
PERSON, NODE = Caller(CallerKind.USER, "ann"), Caller(CallerKind.NODE, "n9")


def asked(caller: Caller, *, forwarded: bool) -> Asked:
    return Asked(NOTHING, NOTHING, Call.DRAIN, caller, is_forwarded=forwarded)


def failed(code: grpc.StatusCode, details: str = "lost", **metadata: str) -> grpc.aio.AioRpcError:
    trailing = grpc.aio.Metadata(*metadata.items())
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), trailing, details=details)


def test_whom_a_call_is_for() -> None:
    for ours in ("", "n1"):
        assert is_for("n1", ours, asked(PERSON, forwarded=False))
        assert is_for("n1", ours, asked(NODE, forwarded=True))
    assert not is_for("n1", "n2", asked(PERSON, forwarded=False))
    with pytest.raises(UserError, match="this is node n1, not n2") as refused:
        is_for("n1", "n2", asked(NODE, forwarded=True))
    assert refused.value.reason == "node-unreachable"


def test_no_node_asks_of_its_own_accord() -> None:
    with pytest.raises(Denied):
        is_for("n1", "n1", asked(NODE, forwarded=False))
    for forwarded, local_only in ((False, False), (False, True), (True, False)):
        with pytest.raises(Denied):
            check_passed_on(asked(NODE, forwarded=forwarded), local_only=local_only)
    check_passed_on(asked(NODE, forwarded=True), local_only=True)
    check_passed_on(asked(PERSON, forwarded=False), local_only=False)


@pytest.mark.parametrize(
    ("error", "told", "said"),
    [
        (failed(grpc.StatusCode.UNAVAILABLE, "failed to connect to all"), UserError, "node n2 does not answer"),
        (failed(grpc.StatusCode.UNAVAILABLE), OutcomeUnknown, "went away"),
        (failed(grpc.StatusCode.DEADLINE_EXCEEDED), OutcomeUnknown, "in time"),
        (failed(grpc.StatusCode.UNAVAILABLE, detail="its own"), grpc.aio.AioRpcError, "lost"),
        (failed(grpc.StatusCode.DEADLINE_EXCEEDED, detail="its own"), grpc.aio.AioRpcError, "lost"),
        (failed(grpc.StatusCode.NOT_FOUND), grpc.aio.AioRpcError, "lost"),
    ],
)
def test_silence_is_not_the_other_nodes_error(error: grpc.aio.AioRpcError, told: type[Exception], said: str) -> None:
    with pytest.raises(told, match=said), passed_on("n2"):
        raise error


def test_who_has_an_attempt_and_does_not_answer() -> None:
    with pytest.raises(UserError) as silent, asked_of_holder("node n2", lambda: "; it goes on"):
        raise failed(grpc.StatusCode.UNAVAILABLE)
    assert (silent.value.message, silent.value.reason) == (
        "node n2 does not answer (lost); it goes on",
        "node-unreachable",
    )
    for own in (failed(grpc.StatusCode.UNAVAILABLE, detail="its own"), failed(grpc.StatusCode.DEADLINE_EXCEEDED)):
        with pytest.raises(grpc.aio.AioRpcError), asked_of_holder("node n2"):
            raise own
