"""Working directories that are not there: the task's own fault in either kind, never the node's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from spinetta.container import ContainerSpec, Mount
from spinetta.model import Exit, Reason
from tests.contract.containers import make_rootfs
from tests.contract.oldshims import home
from tests.contract.shims import asynchronous
from tests.contract.test_runtimes import World, image, ran

pytestmark = pytest.mark.contract
_ = (home, image)  # fixtures


@pytest.fixture(params=["process", "runc"])
def world(request: pytest.FixtureRequest, home: Path, image: Path) -> World:
    return World(request.param, home, image)


@asynchronous
async def test_one_that_is_not_there(world: World) -> None:
    async with world.connect() as rt:
        for n, path in enumerate(("/no/such", "/etc/passwd", "/tmp/new")):
            ended = await ran(rt, world.shell(f"never.{n}", "exit 1", working_directory=path))
            assert (ended.reason, ended.exit_code) == (Reason.SPAWN_FAILED, None), ended
            assert path in ended.message
            assert "directory" in ended.message
        assert (await ran(rt, world.shell("still.1", "exit 5", working_directory="/bin"))).exit_code == 5


@pytest.mark.parametrize("writable", [False, True])
@asynchronous
async def test_one_that_only_the_container_sees(home: Path, image: Path, writable: bool) -> None:
    """Below a mount: the runtime finds out, as it cannot make it there."""
    world = World("runc", home, image)
    wants = ContainerSpec(f"rootfs:{image}", mounts=(Mount("/usr", "/data"),), writable=writable)
    async with world.connect() as rt:
        for n, path in enumerate(("/data/nothing", "/data/bin/tini-static", "/data/bin/tini-static/x")):
            ended = await ran(rt, world.shell(f"never.{n}", "exit 1", working_directory=path, wants=wants, env={}))
            assert ended.reason is Reason.SPAWN_FAILED, ended
            assert path.removesuffix("/x") in ended.message
        ended = await ran(rt, world.shell("there.1", "exit 5", working_directory="/data/bin", wants=wants, env={}))
        assert ended.exit_code == 5, ended


@asynchronous
async def test_a_link_of_the_image_into_a_mount(home: Path, tmp_path: Path) -> None:
    made = make_rootfs(tmp_path / "linked", 0)
    (made / "home").symlink_to("/data/bin")
    wants = ContainerSpec(f"rootfs:{made}", mounts=(Mount("/usr", "/data"),))
    world = World("runc", home, made)
    async with world.connect() as rt:
        ended = await ran(
            rt, world.shell("link.1", "test -e tini-static", working_directory="/home", wants=wants, env={})
        )
        assert ended.exit_code == 0, ended


@asynchronous
async def test_what_is_sealed_is_not_told(home: Path, image: Path) -> None:
    world = World("runc", home, image)
    async with world.connect() as rt:
        for n, hidden in enumerate(
            (
                world.launch("x", "/bin/patient"),
                world.launch("x", "patient"),
                world.launch("x", "/bin/true", working_directory="/patient"),
                world.launch("x", "/bin/true", working_directory="/proc/patient"),
            )
        ):
            ended = await rt.prepare(replace(hidden, key=f"hidden.{n}", private=True))
            assert isinstance(ended, Exit)
            assert (ended.reason, "patient" in ended.message) == (Reason.SPAWN_FAILED, False), ended
            assert "(sealed)" in ended.message
