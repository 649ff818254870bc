"""The protocol of runtimes, the same tests for plain processes and for containers: real shim, real runc, real image."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from spinetta.config import Settings
from spinetta.container import ContainerSpec, Mount
from spinetta.model import Exit, Reason
from spinetta.node.containers import Containers, open_containers
from spinetta.runtime.granting import GrantingRuntime
from spinetta.runtime.protocol import Exited, Launch, Runtime, ShimRuntime
from spinetta.runtime.shim.wire import KEY
from tests.contract import imagefiles
from tests.contract.containers import make_rootfs
from tests.contract.oldshims import copy_of_the_code, home, installed, one_shim, shims
from tests.contract.shims import (
    KILL_MARGIN_S,
    LIMIT_S,
    asynchronous,
    boottime_s,
    launch,
    living,
    runtime,
    until,
)

pytestmark = pytest.mark.contract
_ = home  # a fixture


@dataclass
class World:
    """A runtime, and what a launch needs to be one of its."""

    kind: str
    state_dir: Path
    image: Path

    @asynccontextmanager
    async def connect(self) -> AsyncIterator[Runtime]:
        async with self.node("mount:/usr") as here:
            yield GrantingRuntime(here.runtime, self.state_dir.parent / "units", {})  # as the daemon has it

    @asynccontextmanager
    async def node(self, *allow: str) -> AsyncIterator[Containers]:
        """All that a daemon has of it."""
        data_dir = self.state_dir.parent
        runtimes = ("container", "process") if self.kind == "runc" else ("process",)
        allowed = (f"image:{self.image}", *allow)
        settings = Settings(
            name="n1", address="127.0.0.1:1", data_dir=str(data_dir), allow=allowed, runtimes=runtimes,
            container_program=os.environ.get("SPINETTA_TEST_CONTAINER_PROGRAM", "auto"),
        )  # fmt: skip
        async with self.shim() as shim, open_containers(settings, data_dir, shim) as here:
            assert set(runtimes) <= set(here.allows), here.warnings
            yield here

    @asynccontextmanager
    async def shim(self) -> AsyncIterator[ShimRuntime]:
        """One shim; for containers and after an upgrade all of a node's, as its daemon has them."""
        if self.kind == "process":
            async with runtime(self.state_dir) as one:
                yield one
        else:
            async with shims(self.state_dir) as found:
                yield found

    def launch(self, key: str, *argv: str, **changes: Any) -> Launch:
        made = launch(key, *argv, **changes)
        if self.kind != "runc" or made.wants is not None:
            return made
        return replace(made, env={}, wants=ContainerSpec(f"rootfs:{self.image}"))

    def shell(self, key: str, script: str, **changes: Any) -> Launch:
        return self.launch(key, "/bin/sh", "-c", script, **changes)


@pytest.fixture(scope="session")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_rootfs(tmp_path_factory.mktemp("both") / "image", 0)


@pytest.fixture(params=["process", "runc", "upgraded"])
def world(request: pytest.FixtureRequest, home: Path, image: Path, tmp_path: Path) -> World:
    """`upgraded`: plain processes again, in a shim beside which one of other code finishes what it holds."""
    if request.param == "upgraded":
        asyncio.run(_held_by_other_code(copy_of_the_code(tmp_path / "code" / "shim"), home))
    return World(request.param, home, image)


async def _held_by_other_code(code: Path, home: Path) -> None:
    with installed(code):
        async with one_shim(home) as rt:
            assert await rt.start(launch("earlier.1", "sleep", "1000", grace_s=1000.0)) is None


async def start(rt: Runtime, wanted: Launch) -> Exit | None:
    ready = await rt.prepare(wanted)
    return ready if isinstance(ready, Exit) else await rt.start(ready)


async def end_of(rt: Runtime, key: str) -> Exit:
    async with asyncio.timeout(LIMIT_S):
        async for event in rt.events():
            if isinstance(event, Exited) and event.key == key:
                return event.exit
    raise AssertionError(f"the events ended before {key}")


async def ran(rt: Runtime, wanted: Launch) -> Exit:
    return await start(rt, wanted) or await end_of(rt, wanted.key)


@asynchronous
async def test_ends_are_told(world: World) -> None:
    async with world.connect() as rt:
        for code in (0, 1, 127):
            ended = await ran(rt, world.shell(f"code.{code}", f"exit {code}"))
            assert (ended.reason, ended.exit_code, ended.signal) == (Reason.EXIT, code, 0), ended
            assert 0 < ended.started_ms <= ended.ended_ms
        ended = await ran(rt, world.shell("signal.1", "kill -SEGV $$"))
        assert (ended.reason, ended.signal) == (Reason.SIGNAL, 11)


@asynchronous
async def test_output_goes_to_the_logs_and_the_attempt_works_in_its_scratch(world: World) -> None:
    async with world.connect() as rt:
        ended = await ran(rt, world.shell("out.1", "echo words; echo complaint >&2; echo x > file && cat file"))
        assert ended.exit_code == 0
        assert rt.log_path("out.1", "stdout").read_text() == "words\nx\n"
        assert rt.log_path("out.1", "stderr").read_text() == "complaint\n"


@pytest.mark.parametrize("program", ["nothing-here", "/bin/nothing-here"])
@asynchronous
async def test_a_program_that_is_not_there(world: World, program: str) -> None:
    async with world.connect() as rt:
        ended = await ran(rt, world.launch("none.1", program))
        assert (ended.reason, ended.exit_code) == (Reason.SPAWN_FAILED, None)
        assert f"program not found: {program}" in ended.message


@asynchronous
async def test_a_stop_is_term_then_kill_of_all(world: World, tmp_path: Path) -> None:
    async with world.connect() as rt:
        assert (
            await start(
                rt, world.shell("polite.1", "trap 'echo bye; exit 3' TERM; echo ready; while :; do sleep 0.1; done")
            )
            is None
        )
        await until(lambda: "ready" in rt.log_path("polite.1", "stdout").read_text())
        await rt.stop("polite.1", "cancelled")
        ended = await end_of(rt, "polite.1")
        assert ended.reason is Reason.CANCELLED
        assert rt.log_path("polite.1", "stdout").read_text() == "ready\nbye\n"
        marker = f"12.{abs(hash(str(tmp_path))) % 10**9}"
        deaf = f"trap '' TERM; sleep {marker} & echo ready; wait; sleep {marker}"
        assert await start(rt, world.shell("deaf.1", deaf, stop_wait_s=0.2)) is None
        await until(lambda: "ready" in rt.log_path("deaf.1", "stdout").read_text())
        await rt.stop("deaf.1", "cancelled")
        assert (await end_of(rt, "deaf.1")).reason is Reason.CANCELLED
        assert living(marker) == []


@asynchronous
async def test_a_second_start_and_unknown_keys_change_nothing(world: World) -> None:
    async with world.connect() as rt:
        once = world.shell("once.1", "echo once; sleep 100")
        assert await start(rt, once) is None
        assert await start(rt, once) is None
        await until(lambda: rt.log_path("once.1", "stdout").read_text() == "once\n")
        await rt.stop("never.1", "cancelled")
        await rt.forget("never.1")
        await rt.stop("once.1", "cancelled")
        ended = await end_of(rt, "once.1")
        assert await start(rt, once) == ended
        assert rt.log_path("once.1", "stdout").read_text() == "once\n"


@asynchronous
async def test_limits_are_told_apart(world: World) -> None:
    async with world.connect() as rt:
        slow = world.shell("wall.1", "sleep 100", walltime_s=0.3)
        assert (await ran(rt, slow)).reason is Reason.WALLTIME
        memory = world.shell("memory.1", "x=a; while :; do x=$x$x; done", memory_bytes=32 << 20)
        assert (await ran(rt, memory)).reason is Reason.OUT_OF_MEMORY
        pids = world.shell("pids.1", "i=0; while [ $i -lt 50 ]; do sleep 30 & i=$((i+1)); done", pids_max=16)
        assert (await ran(rt, pids)).reason is Reason.OUT_OF_PIDS


@asynchronous
async def test_without_renewals_it_is_killed_and_nothing_starts(world: World) -> None:
    async with world.connect() as rt:
        mortal = world.shell("mortal.1", "sleep 100", grace_s=KILL_MARGIN_S + 0.5)
        await rt.renew(boottime_s())
        assert (await ran(rt, mortal)).reason is Reason.FENCED
        late = world.shell("late.1", "echo no", grace_s=KILL_MARGIN_S + 0.01)
        assert (await ran(rt, late)).reason is Reason.FENCED
        log = rt.log_path("late.1", "stdout")
        assert not log.exists() or log.read_text() == ""


@asynchronous
async def test_another_daemon_finds_what_runs_and_what_has_ended(world: World) -> None:
    async with world.connect() as rt:
        assert await start(rt, world.shell("stays.1", "sleep 100", token=11)) is None
        ended = await ran(rt, world.shell("over.1", "exit 4", token=12))
    async with world.connect() as rt:
        held = {h.key: h for h in await rt.held()}
        assert (held["stays.1"].token, held["stays.1"].exit) == (11, None)
        assert (held["over.1"].token, held["over.1"].exit) == (12, ended)
        assert await end_of(rt, "over.1") == ended
        usage = await rt.usage("stays.1")
        assert usage is not None
        assert usage.memory_peak_bytes > 0
        await rt.stop("stays.1", "released")
        assert (await end_of(rt, "stays.1")).reason is Reason.RELEASED


@asynchronous
async def test_what_is_forgotten_is_gone_but_for_its_logs(world: World) -> None:
    async with world.connect() as rt:
        await ran(rt, world.shell("gone.1", "echo kept; echo x > file"))
        await rt.forget("gone.1")
        await rt.forget("gone.1")
        assert [one.key for one in await rt.held() if one.key != "earlier.1"] == []
        assert rt.log_path("gone.1", "stdout").read_text() == "kept\n"
        await until(lambda: not any(where.endswith("/scratch/gone.1") for where, _, _ in os.walk(world.state_dir)))


@asynchronous
async def test_secrets_are_files_of_its_own(world: World) -> None:
    async with world.connect() as rt:
        script = 'cat "$SPINETTA_SECRETS/token"; ls "$SPINETTA_SECRETS" | wc -l'
        ended = await ran(rt, world.shell("secret.1", script, secrets=(("token", b"hush\n"),)))
        assert ended.exit_code == 0, ended
        assert rt.log_path("secret.1", "stdout").read_text().split() == ["hush", "1"]


@asynchronous
async def test_what_runs_is_named(world: World) -> None:
    async with world.connect() as rt:
        assert ("container" in rt.capabilities()) == (world.kind == "runc")
        assert {"process", "memory-limit", "pids-limit"} <= set(rt.capabilities())
    assert all(re.match(KEY, key) for key in ("a.1", "stays.1"))


# --- containers only ------------------------------------------------------------------------------------------------


@pytest.fixture
def cells(home: Path, image: Path) -> World:
    return World("runc", home, image)


@pytest.mark.parametrize(
    ("changes", "reason", "words"),
    [
        ({"network": "host"}, Reason.NODE_UNFIT, "does not allow network:host"),
        ({"user": "root"}, Reason.NODE_UNFIT, "does not allow user:root"),
        ({"mounts": (Mount("/etc", "/data"),)}, Reason.NODE_UNFIT, "does not allow mount:/etc"),
        ({"mounts": (Mount("/usr/nothing", "/data"),)}, Reason.SPAWN_FAILED, "cannot mount /usr/nothing"),
        ({"mounts": (Mount("/usr", "/bin/sh"),)}, Reason.SPAWN_FAILED, "/bin/sh is a link in the image"),
        ({"image": "rootfs:/etc"}, Reason.NODE_UNFIT, "does not allow image:/etc"),
        ({"image": "nothing/here:1"}, Reason.SPAWN_FAILED, "nothing/here"),
    ],
)
@asynchronous
async def test_what_cannot_be_had_says_why(cells: World, changes: dict[str, Any], reason: Reason, words: str) -> None:
    async with cells.connect() as rt:
        wants = replace(ContainerSpec(f"rootfs:{cells.image}"), **changes)
        ended = await ran(
            rt,
            cells.launch("never.1", "/bin/sh", "-c", "exit", env={}, wants=wants),
        )
        assert (ended.reason, words in ended.message) == (reason, True), ended
        await rt.forget("never.1")


@asynchronous
async def test_mounts_where_the_image_has_nothing(cells: World) -> None:
    async with cells.connect() as rt:
        wants = ContainerSpec(f"rootfs:{cells.image}", mounts=(Mount("/usr/bin", "/data/programs"),))
        ended = await ran(
            rt,
            cells.launch(
                "mount.1",
                "/bin/sh",
                "-c",
                "cd /data/programs && echo tini-*; touch x",
                env={},
                wants=wants,
            ),
        )
        assert rt.log_path("mount.1", "stdout").read_text() == "tini-static\n"
        assert "Read-only" in rt.log_path("mount.1", "stderr").read_text()
        assert ended.exit_code == 1


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"Env": ["A=x\0y"]}, "Env"),
        ({"User": "70000"}, "70000"),
        ({"User": "nobody-here"}, "nobody-here"),
        ({"Env": ["=x", "A", "B=1=2"], "WorkingDir": "/proc/self/fd/7", "Entrypoint": ["/nothing"]}, ""),
    ],
)
@asynchronous
async def test_what_an_image_says_of_itself_ends_no_daemon(
    cells: World, tmp_path: Path, said: dict[str, Any], words: str
) -> None:
    """Strangers have written it: a command that cannot be contained so fails, and that is all."""
    imagefiles.layout(tmp_path / "layout", [imagefiles.base()], config=said)
    async with cells.node(f"image:{tmp_path}") as here:
        wants = ContainerSpec(f"oci:{tmp_path}/layout")
        ended = await here.runtime.prepare(cells.launch("odd.1", "/bin/busybox", "true", env={}, wants=wants))
        if words:
            assert isinstance(ended, Exit)
            assert (ended.reason, words in ended.message) == (Reason.SPAWN_FAILED, True), ended
        else:
            assert not isinstance(ended, Exit), ended


@asynchronous
async def test_many_at_once_that_need_the_same_mount_points(cells: World) -> None:
    async with cells.connect() as rt:
        wants = ContainerSpec(f"rootfs:{cells.image}", mounts=(Mount("/usr/bin", "/new/place/for/programs"),))
        launches = [cells.launch(f"many.{n}", "/bin/true", env={}, wants=wants) for n in range(1, 33)]
        ready = await asyncio.gather(*(rt.prepare(each) for each in launches))
        assert not [each for each in ready if isinstance(each, Exit)]
        assert len(list((cells.state_dir / "skeletons").iterdir())) == 1


@asynchronous
async def test_a_disk_that_takes_nothing_is_the_nodes_fault(cells: World) -> None:
    async with cells.connect() as rt:
        (cells.state_dir / "skeletons").write_text("no folder")
        wants = ContainerSpec(f"rootfs:{cells.image}", mounts=(Mount("/usr/bin", "/new"),))
        ended = await rt.prepare(cells.launch("full.1", "/bin/true", env={}, wants=wants))
        assert isinstance(ended, Exit)
        assert (ended.reason, "cannot be prepared" in ended.message) == (Reason.NODE_UNFIT, True), ended


@asynchronous
async def test_a_link_that_leads_out_of_what_is_allowed(cells: World, tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    (shared / "way-out").symlink_to("/etc")
    async with cells.node(f"mount:{shared}") as here:
        wants = ContainerSpec(f"rootfs:{cells.image}", mounts=(Mount(f"{shared}/way-out", "/data"),))
        ended = await ran(here.runtime, cells.launch("out.1", "/bin/true", env={}, wants=wants))
        assert ended.reason is Reason.SPAWN_FAILED
        assert "leads to /etc, which this node does not allow" in ended.message


@asynchronous
async def test_a_container_knows_itself_by_name(cells: World) -> None:
    async with cells.connect() as rt:
        ended = await ran(rt, cells.shell("name.1", "cat /proc/sys/kernel/hostname; grep -cw n1 /etc/hosts"))
        assert (ended.exit_code, rt.log_path("name.1", "stdout").read_text()) == (0, "n1\n1\n")


@asynchronous
async def test_a_writable_root_is_its_own(cells: World) -> None:
    async with cells.connect() as rt:
        wants = ContainerSpec(f"rootfs:{cells.image}", writable=True)
        for n in (1, 2):
            script = "test ! -e /tmp/x && touch /tmp/x && ls / | wc -l"
            ended = await ran(rt, cells.launch(f"write.{n}", "/bin/sh", "-c", script, env={}, wants=wants))
            assert ended.exit_code == 0, ended


@asynchronous
async def test_an_image_is_in_use_until_its_attempt_is_forgotten(cells: World) -> None:
    async with cells.node() as here:
        assert await start(here.runtime, cells.shell("uses.1", "sleep 100")) is None
        assert here.images is not None
        assert [info.uses for info in here.images.images()] == [1]
    async with cells.node() as here:
        assert here.images is not None
        assert [info.uses for info in here.images.images()] == [1]
        await here.runtime.stop("uses.1", "cancelled")
        await end_of(here.runtime, "uses.1")
        await here.runtime.forget("uses.1")
        assert [info.uses for info in here.images.images()] == [0]
        assert len(here.described()[0]) >= 1
