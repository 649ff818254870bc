"""Images through the API and on the command line: two nodes, each with a store of its own."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import grpc
import pytest

from spinetta.access import NodeRole, UserRole
from spinetta.client import Client
from spinetta.client.aio import AsyncClient
from spinetta.client.images import ImageStep
from spinetta.errors import NotFound, UserError
from spinetta.imageref import parse
from spinetta.v1 import api_pb2 as api
from tests.contract import imagefiles as files
from tests.contract.api_world import Etcd, Node, etcd, etcd_member, failure, node, run
from tests.contract.image_world import Registry, children_of, opened, registry, until
from tests.contract.rights_world import all_of, secured

__all__ = ["etcd", "etcd_member"]
pytestmark = [pytest.mark.contract, pytest.mark.skipif(os.geteuid() != 0, reason="shifts owners: takes root")]
LIMIT_S = 40.0


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    directory = tmp_path_factory.mktemp("registry")
    with registry(directory) as found:
        files.layout(directory / "layout", [files.base()], config={"User": "nobody-here"})
        found.push(directory / "layout", "lab/tool:1")
        yield found


@asynccontextmanager
async def two(etcd: Etcd, tmp_path: Path) -> AsyncIterator[tuple[Node, Node]]:
    async with AsyncExitStack() as stack:
        found = []
        for name in ("a", "b"):
            one = await stack.enter_async_context(node(etcd, tmp_path, name))
            one.port.images = await stack.enter_async_context(opened(tmp_path / name))
            found.append(one)
        yield found[0], found[1]


async def cli(a: Node, *arguments: str, code: int = 0) -> tuple[str, str]:
    """Run a command to its end; what it said."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "spinetta.cli", "image", *arguments,
        env={**os.environ, "SPINETTA_NODE": a.address, "HOME": str(a.port.directory)},
        stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        out, err = await asyncio.wait_for(process.communicate(), LIMIT_S)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == code, (out, err)
    assert b"Traceback" not in err
    return out.decode(), err.decode()


def test_commands_for_the_node_that_is_asked_and_for_another(etcd: Etcd, hub: Registry, tmp_path: Path) -> None:
    name = f"docker://{hub.host}/lab/tool:1"
    (tmp_path / "root.tar").write_bytes(files.base())

    async def scenario() -> None:
        async with two(etcd, tmp_path) as (a, b):
            out, err = await cli(a, "pull", name, "--name", "tool:1")
            assert out.startswith("a has docker://")
            assert "fetching" in err
            assert "unpacking" in err
            assert "'nobody-here' is not in its /etc/passwd; tasks must name a user" in err
            out, _ = await cli(a, "pull", name, "--on", "b", "--json")
            lines = [json.loads(line) for line in out.splitlines()]
            assert lines[-1]["node"] == "b"
            digest = lines[-1]["image"]["digest"]
            assert {"phase", "done_bytes", "total_bytes"} == set(lines[0])
            out, _ = await cli(a, "import", str(tmp_path / "root.tar"), "--name", "base:1", "--json")
            imported = json.loads(out.splitlines()[-1])["image"]
            assert imported["names"] == ["base:1", f"rootfs:{tmp_path}/root.tar"]

            assert b.port.images is not None
            b.port.images.pin(digest, True)
            out, _ = await cli(a, "list", "--all")
            row = next(line for line in out.splitlines() if digest[7:19] in line)
            assert "a,b*" in row

            at = tmp_path / "a/images/unpacked" / digest.removeprefix("sha256:") / "rootfs"
            (at / "bin/sh").unlink()
            out, err = await cli(a, "verify", "tool:1", code=1)
            assert out == "/bin/sh is missing\n"

            await cli(a, "unpin", "--on", "b", name)
            await b.port.images.acquire(parse(name), "t.1")
            _, err = await cli(a, "rm", name, "--on", "b", code=2)
            assert "is in use by 1" in err
            out, _ = await cli(a, "rm", name, "--on", "b", "--force", "--json")
            assert json.loads(out)["images"][0]["what"] == "marked"
            b.port.images.release("t.1")
            await until(lambda: b.port.images is not None and not b.port.images.images(), "it was marked")

            _, err = await cli(a, "pull", "Tool:1", code=2)
            assert "did you mean 'tool'?" in err
            out, _ = await cli(a, "pull", "oci:/nowhere", "--json", code=3)
            assert json.loads(out.splitlines()[-1])["error"]["reason"] == "not-found"
            b.port.images = None
            _, err = await cli(a, "list", "--on", "b")
            assert "b runs no containers" in err

    run(scenario())


def test_a_pull_ends_when_nobody_listens_unless_a_task_wants_it(etcd: Etcd, tmp_path: Path) -> None:
    slow = tmp_path / "slow"
    files.layout(slow, [files.layer(*(files.Entry(f"f{i}", os.urandom(2000)) for i in range(2000)))])

    async def scenario() -> None:
        async with two(etcd, tmp_path) as (a, b), AsyncClient(a.address) as client:
            store = b.port.images
            assert store is not None
            pulling = asyncio.create_task(client.images.pull(f"oci:{slow}", node="b"))
            await until(store.coming, "it is being unpacked")
            pulling.cancel()
            await asyncio.wait((pulling,))
            await until(lambda: not store.coming(), "it has been stopped")
            await until(lambda: not children_of(str(tmp_path / "b")), "nothing runs any more")
            assert store.images() == []
            task = asyncio.create_task(store.acquire(parse(f"oci:{slow}"), "t.1"))
            pulling = asyncio.create_task(client.images.pull(f"oci:{slow}", node="b"))
            await until(store.coming, "it is being unpacked again")
            pulling.cancel()
            assert (await task).rootfs.is_dir()

    run(scenario())


def test_the_python_client(etcd: Etcd, tmp_path: Path) -> None:
    files.layout(tmp_path / "l", [files.base()])

    async def scenario() -> None:
        async with two(etcd, tmp_path) as (a, _), AsyncClient(a.address) as client:
            steps: list[ImageStep] = []
            found = await client.images.pull(f"oci:{tmp_path}/l", name="x:1", tell=steps.append)
            assert (found.node, found.image.names) == ("a", (f"oci:{tmp_path}/l", "x:1"))
            assert "unpack" in {s.phase for s in steps}
            assert (await client.images.verify("x:1")).differences == ()
            assert (await client.images.pin("x:1")).image.pinned
            assert [i.pinned for i in (await client.images.list()).images] == [True]
            with pytest.raises(UserError, match="pinned"):
                await client.images.remove(found.image.digest)
            with pytest.raises(NotFound):
                await client.images.remove("y:1")

            def in_a_thread() -> str:
                with Client(a.address) as other:
                    other.images.pull(f"oci:{tmp_path}/l")
                    other.images.pin("x:1", False)
                    assert other.images.list().images[0].pinned is False
                    assert other.images.verify("x:1").differences == ()
                    return other.images.remove("x:1", force=True).what

            assert await asyncio.to_thread(in_a_thread) == "removed"

    run(scenario())


def test_voters_pass_on_what_people_have_asked_for(etcd: Etcd, tmp_path: Path) -> None:
    """In a secured cluster: an operator's pull reaches a worker, and nobody's import of files does."""
    files.layout(tmp_path / "l", [files.base()])

    async def scenario() -> None:
        async with (
            secured(etcd, tmp_path) as cluster,
            cluster.serving("a") as a,
            cluster.serving("w", NodeRole.WORKER) as w,
            opened(tmp_path / "w") as store,
        ):
            w.port.images = store
            operator = await cluster.user("op", UserRole.OPERATOR)
            viewer = await cluster.user("vic", UserRole.VIEWER)
            async with cluster.as_(a, operator) as ops, cluster.as_(a, viewer) as views:
                importing = api.PullImageRequest(reference=f"oci:{tmp_path}/l", name="x:1", node="w")
                assert (await failure(all_of(ops.PullImage(importing)))).code is grpc.StatusCode.PERMISSION_DENIED
                steps = await all_of(a.api.PullImage(importing))
                assert steps[-1].done
                assert steps[-1].node == "w"
                assert [i.names for i in (await views.ListImages(api.ListImagesRequest(node="w"))).images] == [
                    steps[-1].image.names
                ]
                unreachable = api.PullImageRequest(reference="docker://127.0.0.1:1/a", node="w")
                failed = await failure(all_of(ops.PullImage(unreachable)))
                assert failed.detail.reason == "registry-unreachable"
                await ops.RemoveImage(api.RemoveImageRequest(image="x:1", node="w", force=True))
            assert store.images() == []
            told = [(call, who, what) for call, who, what, *_ in a.port.audited if call.startswith("image")]
            assert ("image-import", "user op", f"pull oci:{tmp_path}/l on w") in told
            assert ("image-change", "user op", "remove x:1 on w") in told

    run(scenario())
