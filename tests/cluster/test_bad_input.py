"""The rows of the table of bad input that only a node can answer, and every row of the API, against a real node."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from google.protobuf import json_format

from spinetta.v1 import api_pb2 as api
from spinetta.v1.api_pb2_grpc import SpinettaStub
from tests.bad_input import API, CLI, ID, OTHER_ID, Api, Cli
from tests.cluster.harness import Cluster, running_cluster

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(180)]

STREAMS = {"Watch", "Log", "Leave"}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with running_cluster(tmp_path_factory.mktemp("alone"), 1, "--cpus", "2", "--memory", "1GiB") as cluster:
        yield cluster


@pytest.fixture(scope="module")
def stub(alone: Cluster) -> Iterator[SpinettaStub]:
    options = [("grpc.enable_http_proxy", 0), ("grpc.max_send_message_length", -1)]
    with grpc.insecure_channel(alone.nodes[0].address, options=options) as channel:
        yield SpinettaStub(channel)


def call(stub: SpinettaStub, method: str, request: object) -> None:
    answer = getattr(stub, method)(request, timeout=20)
    if method in STREAMS:
        for _ in answer:
            pass


def request_of(case: Api) -> object:
    return json_format.ParseDict(case.request, getattr(api, f"{case.method}Request")())


def refused(stub: SpinettaStub, method: str, request: object) -> tuple[grpc.RpcError, api.ErrorDetail]:
    with pytest.raises(grpc.RpcError) as caught:
        call(stub, method, request)
    metadata: Any = caught.value.trailing_metadata() or ()
    details = [value for key, value in metadata if key == "spinetta-error-bin"]
    return caught.value, api.ErrorDetail.FromString(details[0]) if details else api.ErrorDetail()


@pytest.mark.parametrize("case", API, ids=lambda c: f"{c.method} {c.part} {c.message}"[:60])
def test_api(case: Api, stub: SpinettaStub) -> None:
    error, detail = refused(stub, case.method, request_of(case))
    assert case.message in detail.message
    assert (error.code().name, detail.field, detail.reason) == (case.status, case.part, case.reason)
    assert detail.hint
    assert case.part in (error.details() or "")


@pytest.mark.parametrize("case", [c for c in CLI if c.online], ids=lambda c: " ".join(c.argv)[:60])
def test_command_line(case: Cli, alone: Cluster) -> None:
    done = alone.cli(*case.argv, check=False, stdin=case.stdin, env=case.env)
    assert case.message in done.stderr
    assert (done.returncode, done.stdout) == (case.code, "")
    assert "Traceback" not in done.stderr


def test_nothing_of_all_that_was_submitted(alone: Cluster) -> None:
    assert alone.json("list")["tasks"] == []


def test_too_large_a_message_is_refused_before_it_is_read(stub: SpinettaStub) -> None:
    tasks = [{"id": ID, "command": ["x" * 100_000] * 2}] * 100
    error, _ = refused(stub, "Submit", json_format.ParseDict({"tasks": tasks}, api.SubmitRequest()))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_what_is_no_message_at_all(alone: Cluster) -> None:
    with grpc.insecure_channel(alone.nodes[0].address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        send: Any = channel.unary_unary("/spinetta.v1.Spinetta/Submit")
        with pytest.raises(grpc.RpcError):
            send(b"\xff\xff\xff", timeout=10)
        unknown: Any = channel.unary_unary("/spinetta.v1.Spinetta/Explode")
        with pytest.raises(grpc.RpcError) as caught:
            unknown(b"", timeout=10)
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_the_same_id_for_another_task(alone: Cluster, stub: SpinettaStub) -> None:
    one = {"tasks": [{"id": ID, "command": ["true"]}]}
    call(stub, "Submit", json_format.ParseDict(one, api.SubmitRequest()))
    call(stub, "Submit", json_format.ParseDict(one, api.SubmitRequest()))
    other = {"tasks": [{"id": OTHER_ID, "command": ["true"]}, {"id": ID, "command": ["false"]}]}
    error, detail = refused(stub, "Submit", json_format.ParseDict(other, api.SubmitRequest()))
    assert error.code() is grpc.StatusCode.ALREADY_EXISTS
    assert detail.field == "tasks[1].command"  # what differs
    assert detail.reason == "already-exists"
    done = alone.cli("submit", "--id", ID, "--", "false", check=False)
    assert done.returncode == 2
    assert ID in done.stderr
    # The two ids differ in their last digit only: what they have in common names neither.
    error, detail = refused(stub, "Get", api.GetRequest(ids=[ID[:20]]))
    if error.code() is not grpc.StatusCode.NOT_FOUND:  # the second task may or may not have been written
        assert (error.code(), detail.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "ambiguous")
    assert json.loads(alone.cli("wait", "--json", ID).stdout)["tasks"][0]["outcome"] == "succeeded"
