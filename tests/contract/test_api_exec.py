"""Exec and CopyOut over the API: who may, by way of which node, and what a slow caller costs. Real shims, real TLS."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from spinetta.access import NodeRole, UserRole
from spinetta.client import AsyncClient
from spinetta.errors import StoreUnavailable, UserError
from spinetta.events import attempt_key
from spinetta.model import TaskId
from spinetta.node.services import limits
from spinetta.runtime.process import ProcessRuntime
from spinetta.trust.credentials import UserCredentials
from spinetta.v1 import api_pb2 as api
from spinetta.v1 import api_pb2_grpc as rpc
from spinetta.v1 import record_pb2 as pb
from tests.contract.api_world import Etcd, Node, etcd, etcd_member, eventually, new_id, node, run, spec
from tests.contract.rights_world import Pair, Secured, all_of, sealed, secured
from tests.contract.shims import clean_up, end_of, living, name_of, runtime, shell

pytestmark = pytest.mark.contract
_ = (etcd, etcd_member)  # fixtures


@pytest.fixture
def shims() -> Iterator[list[Path]]:
    """State directories whose shims are ended."""
    used: list[Path] = []
    yield used
    for state_dir in used:
        clean_up(state_dir)


@dataclass
class Stage:
    """A node, and the shim of its attempts."""

    node: Node
    runtime: ProcessRuntime

    async def running(self, by: Node, given: pb.TaskSpec, script: str = "exec sleep 100", **more: Any) -> str:
        """A task that runs here."""
        task_id = (await by.submit(given))[0]
        assert await self.node.claim(task_id)
        assert await self.runtime.start(shell(attempt_key(TaskId(task_id), 1), script, **more)) is None
        return task_id


@contextlib.asynccontextmanager
async def staged(served: Node, shims: list[Path]) -> AsyncIterator[Stage]:
    shims.append(served.port.shim_dir)
    async with runtime(served.port.shim_dir) as rt:
        yield Stage(served, rt)


async def ran(stub: rpc.SpinettaAsyncStub, task_id: str, *command: str, **fields: Any) -> tuple[bytes, int]:
    """Run it to its end: what it wrote and its exit code."""

    async def requests() -> AsyncIterator[api.ExecRequest]:
        yield api.ExecRequest(start=api.ExecStart(id=task_id, command=command, **fields))

    out, code = b"", -1
    async for answer in stub.Exec(requests()):
        out += answer.output + answer.errors
        if answer.HasField("ended"):
            code = answer.ended.exit_code
    return out, code


async def refused(call: Any) -> str:
    """Its reason."""
    try:
        await call
    except grpc.aio.AioRpcError as e:
        found = next(v for k, v in e.trailing_metadata() or () if k == "spinetta-error-bin")
        assert isinstance(found, bytes)
        return api.ErrorDetail.FromString(found).reason
    return ""


def copied(stub: rpc.SpinettaAsyncStub, task_id: str, path: str = ".") -> Any:
    return all_of(stub.CopyOut(api.CopyOutRequest(id=task_id, path=path)))


def test_who_may(etcd: Etcd, tmp_path: Path, shims: list[Path]) -> None:
    async def story() -> None:
        async with (
            secured(etcd, tmp_path) as cluster,
            cluster.serving("a", clearances=("blue",)) as a,
            staged(a, shims) as s,
        ):
            people = {
                "ann": await cluster.user("ann"),
                "bob": await cluster.user("bob"),
                "eve": await cluster.user("eve", UserRole.VIEWER, projects=("ann",)),
                "pro": await cluster.user("pro", projects=("ann",)),
                "ops": await cluster.user("ops", UserRole.OPERATOR),
                "adm": await cluster.user("adm", UserRole.ADMIN),
                "cle": await cluster.user("cle", projects=("ann",), clearances=("blue",)),
            }
            plain = await s.running(a, spec(owner="ann"))
            secret = await s.running(a, spec(owner="ann", secrets=[pb.SecretRef(name="db", file="db")]))
            await cluster.label("blue")
            await cluster.user("root", UserRole.ADMIN, clearances=("blue",))
            labelled = sealed(["blue"])
            labelled.owner = "ann"
            blue = await s.running(a, labelled)
            may = {"ann": {plain, secret}, "pro": {plain, secret}, "ops": {plain}, "adm": {plain, secret}}
            may["cle"] = {plain, secret, blue}
            for name, pair in people.items():
                async with cluster.as_(a, pair) as stub:
                    for task_id in (plain, secret, blue):
                        allowed = task_id in may.get(name, set())
                        got = await refused(ran(stub, task_id, "true"))
                        assert got == ("" if allowed else "denied"), (name, task_id == secret, got)
                        may_copy = allowed or (name == "ops" and task_id == secret)
                        assert await refused(copied(stub, task_id)) == ("" if may_copy else "denied"), name
            async with cluster.as_(a, None) as stub:
                assert await refused(ran(stub, plain, "true")) == "unauthenticated"
            told = {(call, caller, outcome.partition(":")[0]) for call, caller, _, outcome, _ in a.port.audited}
            assert {("exec", "user ann", "begun"), ("exec", "user ann", "ok"), ("exec", "user bob", "denied")} <= told
            assert {("copy", "user ann", "ok"), ("copy", "user bob", "denied")} <= told

    run(story())


def test_by_way_of_another_node(etcd: Etcd, tmp_path: Path, shims: list[Path]) -> None:
    async def story() -> None:
        async with (
            secured(etcd, tmp_path) as cluster,
            cluster.serving("a") as a,
            cluster.serving("w", NodeRole.WORKER, clearances=("blue",)) as w,
            staged(w, shims) as s,
        ):
            ann = await cluster.user("ann", clearances=("blue",))
            plain = await s.running(a, spec(owner="ann"), "echo x > file; exec sleep 100")
            async with cluster.as_(a, ann) as stub:
                assert await ran(stub, plain[-8:], "sh", "-c", "echo $PWD | grep -c scratch; exit 4") == (b"1\n", 4)
                await eventually(lambda: (w.port.shim_dir / "scratch" / f"{plain}.1" / "file").exists())
                assert b"".join(c.data for c in await copied(stub, plain, "file")) == b"x\n"
                assert await refused(copied(stub, plain, "../x")) == "unreadable"
                assert await refused(ran(stub, plain, "/no/such")) == "cannot-start"
            async with cluster.as_(w, ann) as stub:
                assert await ran(stub, plain, "echo", "direct") == (b"direct\n", 0)
                assert await refused(ran(stub, plain[-8:], "true")) == "ask-a-voter"
            # A node that is told to pass on what nobody has asked for, or to ask on for another.
            async with cluster.as_(w, await cluster.node_pair("a")) as stub:
                assert await refused(ran(stub, plain, "true")) == "denied"
            await labelled(cluster, a, s, ann)
            await s.runtime.stop(f"{plain}.1", "cancelled")
            await w.end(plain)
            async with cluster.as_(a, ann) as stub:
                assert await refused(ran(stub, plain, "true")) == "not-running"

    async def labelled(cluster: Secured, a: Node, s: Stage, ann: Pair) -> None:
        """A voter that is not cleared passes nothing through; the client goes to the node itself."""
        await cluster.label("blue")
        await cluster.user("root", UserRole.ADMIN, clearances=("blue",))
        given = sealed(["blue"])
        given.owner = "ann"
        blue = await s.running(a, given)
        async with cluster.as_(a, ann) as stub:
            assert await refused(ran(stub, blue, "true")) == "ask-node"
            assert await refused(copied(stub, blue)) == "ask-node"
        own = UserCredentials.create(cluster.world.ca, *ann)
        async with AsyncClient(a.address, credentials=own) as client:
            async with client.exec(blue[-8:], ["cat"], takes_input=True) as execution:
                await execution.send(b"hello")
                await execution.end_input()
                assert b"".join([part.data async for part in execution.outputs()]) == b"hello"
                assert (execution.node, execution.task) == ("w", blue)
            async with contextlib.aclosing(client.copy_out(blue[-8:])) as parts:
                entry = await anext(parts)
                assert not isinstance(entry, bytes)

    run(story())


def test_a_caller_that_does_not_read_costs_little(etcd: Etcd, tmp_path: Path, shims: list[Path]) -> None:
    async def story() -> None:
        async with (
            node(etcd, tmp_path, "a") as a,
            node(etcd, tmp_path, "b") as b,
            staged(b, shims) as s,
            AsyncClient(a.address) as client,
        ):
            task_id = await s.running(a, spec())
            much = str(10**12 + os.getpid())  # nobody else's
            async with client.exec(task_id, ["head", "-c", much, "/dev/zero"]) as execution:
                outputs = execution.outputs()
                await anext(outputs)
                (pid,) = living(much)
                written = Path(f"/proc/{pid}/io")

                def count() -> int:
                    return int(next(line for line in written.read_text().splitlines() if "wchar" in line).split()[1])

                async def rests() -> bool:
                    before = count()
                    await asyncio.sleep(0.3)  # nothing happens: that takes time to see
                    return count() == before

                await eventually(rests, within_s=40, what="the command waits")
                assert count() < 32 << 20, "two connections hold a few MiB each"
                await outputs.aclose()
            await eventually(lambda: not name_of(pid), what="it ended with its caller")

    run(story())


def test_so_many_on_one_node(etcd: Etcd, tmp_path: Path, shims: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "EXECS_MAX", 1)
    monkeypatch.setattr(limits, "COPIES_MAX", 0)

    async def story() -> None:
        async with node(etcd, tmp_path) as a, staged(a, shims) as s, AsyncClient(a.address) as client:
            task_id = await s.running(a, spec())
            async with client.exec(task_id, ["sleep", "100"]):
                assert await refused(ran(a.api, task_id, "true")) == "busy"
            assert await refused(copied(a.api, task_id)) == "busy"
            await eventually(lambda: run_again(client, task_id), what="there is room again")

    async def run_again(client: AsyncClient, task_id: str) -> bool:
        try:
            async with client.exec(task_id, ["true"]) as execution:
                return [part async for part in execution.outputs()] == []
        except StoreUnavailable:
            return False

    run(story())


def test_what_cannot_be_asked(etcd: Etcd, tmp_path: Path, shims: list[Path]) -> None:
    async def story() -> None:
        async with node(etcd, tmp_path) as a, staged(a, shims) as s, AsyncClient(a.address) as client:
            queued = (await a.submit())[0]
            for call in (ran(a.api, queued, "true"), copied(a.api, queued)):
                assert await refused(call) == "not-started"
            assert await refused(ran(a.api, new_id(), "true")) == "not-found"
            task_id = await s.running(a, spec())
            assert await refused(ran(a.api, task_id)) == "invalid"
            assert await refused(ran(a.api, task_id, "a\0b")) == "invalid"

            async def nonsense() -> AsyncIterator[api.ExecRequest]:
                yield api.ExecRequest(input=b"x")

            assert await refused(all_of(a.api.Exec(nonsense()))) == "invalid"

            async def nothing() -> AsyncIterator[api.ExecRequest]:
                if task_id == "":
                    yield api.ExecRequest()

            assert await refused(all_of(a.api.Exec(nothing()))) == "invalid"

            async def odd() -> AsyncIterator[api.ExecRequest]:
                yield api.ExecRequest(start=api.ExecStart(id=task_id, command=["cat"], takes_input=True))
                yield api.ExecRequest(start=api.ExecStart(id=task_id, command=["false"]))
                yield api.ExecRequest(signal=4000)
                yield api.ExecRequest(resize=api.WindowSize(rows=1 << 31))
                yield api.ExecRequest()
                yield api.ExecRequest(input_end=True)
                yield api.ExecRequest(input=b"too late")

            assert (await all_of(a.api.Exec(odd())))[-1].ended == api.ExecEnded(exit_code=0)
            far = await s.running(a, spec(working_directory="/tmp"))
            with pytest.raises(UserError, match="of its own choice"):
                [part async for part in client.copy_out(far)]
            await s.runtime.stop(f"{task_id}.1", "cancelled")
            await a.end(task_id)
            with pytest.raises(UserError, match="keep-scratch"):
                await _copied_whole(s, client, task_id)

    async def _copied_whole(s: Stage, client: AsyncClient, task_id: str) -> None:
        await end_of(s.runtime, f"{task_id}.1")
        assert [part async for part in client.copy_out(task_id)], "not yet forgotten"
        await s.runtime.forget(f"{task_id}.1")
        while True:
            [part async for part in client.copy_out(task_id)]

    run(story())
