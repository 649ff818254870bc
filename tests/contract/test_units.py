"""One unit of several: real containers and processes, each with devices of its own, also over the end of a daemon."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import stat
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from spinetta.config import Settings
from spinetta.container import ContainerSpec
from spinetta.devices import read
from spinetta.errors import RuntimeUnavailable
from spinetta.model import Exit, Reason
from spinetta.node.containers import open_containers
from spinetta.options import parse_devices
from spinetta.runtime.granting import GrantingRuntime, device_troubles
from spinetta.runtime.protocol import Launch
from tests.contract.shims import LIMIT_S, asynchronous, groups_of, launch, runtime, state_dir, until
from tests.contract.test_runtimes import end_of, image, start

pytestmark = pytest.mark.contract
_ = (image, state_dir)  # fixtures

NUMBERS = {"0": (10, 229), "1": (10, 237)}  # /dev/fuse and /dev/loop-control: none that every container has
SHOWS = 'echo "$SPINETTA_DEVICES_GPU $CUDA_VISIBLE_DEVICES"; for f in "$0"/*; do echo "${f##*/}"; done; exec sleep 100'


def make_device(path: Path, number: tuple[int, int]) -> None:
    """It can be opened by anybody. The kernel may not have what it stands for, which is told from a refusal."""
    try:
        os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(*number))
    except PermissionError:
        pytest.skip("this machine lets us make no devices")
    path.chmod(0o666)


@contextmanager
def two_cards() -> Iterator[Path]:
    """A folder below /dev with two cards."""
    with tempfile.TemporaryDirectory(prefix="spinetta-cards-", dir="/dev/shm") as name:
        folder = Path(name)
        folder.chmod(0o755)
        for label, number in NUMBERS.items():
            make_device(folder / f"card{label}", number)
        yield folder


@pytest.fixture
def cards() -> Iterator[Path]:
    with two_cards() as folder:
        yield folder


@dataclass
class Node:
    """What a daemon has of its runtimes, which can end and come again."""

    state_dir: Path
    cards: Path
    image: Path

    @asynccontextmanager
    async def daemon(self, wait_s: float = 0.1) -> AsyncIterator[GrantingRuntime]:
        data_dir = self.state_dir.parent
        settings = Settings(
            name="n1",
            address="127.0.0.1:1",
            data_dir=str(data_dir),
            allow=(f"image:{self.image}",),
            devices=parse_devices({"gpu": [f"{label}:{self.cards}/card{label}" for label in NUMBERS]}),
        )
        async with runtime(self.state_dir) as shim, open_containers(settings, data_dir, shim) as here:
            assert "container" in here.allows, here.warnings
            yield GrantingRuntime(here.runtime, data_dir / "units", read(settings.devices), wait_s=wait_s)

    def launch(self, key: str, *, contained: bool = True, gpus: int = 1, **changes: Any) -> Launch:
        made = launch(
            key, "/bin/sh", "-c", SHOWS, str(self.cards), countables=(("gpu", gpus),) if gpus else (), **changes
        )
        return replace(made, wants=ContainerSpec(f"rootfs:{self.image}")) if contained else made

    @property
    def book(self) -> set[str]:
        return {path.name for path in (self.state_dir.parent / "units").iterdir()}


@pytest.fixture
def node(state_dir: Path, cards: Path, image: Path) -> Node:
    state_dir.parent.chmod(0o755)
    return Node(state_dir, cards, image)


async def lines(rt: GrantingRuntime, key: str, number: int) -> list[str]:
    """What it writes, so many lines of it."""
    log = rt.log_path(key, "stdout")
    await until(lambda: log.exists() and log.read_text().count("\n") >= number)
    return log.read_text().splitlines()


async def finish(rt: GrantingRuntime, key: str) -> None:
    await rt.stop(key, "cancelled")
    await end_of(rt, key)
    await rt.forget(key)


def depth(group: Path) -> int:
    return len(group.parts)


def tried_within(groups: list[Path], path: Path) -> int:
    """The errno with which a process in these groups cannot open a file; 0: it can. As root, whom no mode stops."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 255
        try:
            for group in groups:
                (group / "cgroup.procs").write_text("0")
            try:
                os.close(os.open(path, os.O_RDWR | os.O_NONBLOCK))
                code = 0
            except OSError as error:
                code = error.errno or 254
            os.write(writing, bytes([code]))
            signal.pause()  # killed with its group, or below
        finally:
            os._exit(code)
    os.close(writing)
    try:
        return os.read(reading, 1)[0]
    finally:
        os.close(reading)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


@asynchronous
async def test_two_at_once_have_one_each(node: Node) -> None:
    async with node.daemon() as rt:
        for key in ("t.1", "t.2"):
            assert await start(rt, node.launch(key)) is None
        # In its /dev there is no other's; CUDA numbers from 0 what can be opened.
        assert await lines(rt, "t.1", 2) == ["0 0", "card0"]
        assert await lines(rt, "t.2", 2) == ["1 0", "card1"]
        assert node.book == {"t.1", "t.2"}
        for key, own, other in (("t.1", "card0", "card1"), ("t.2", "card1", "card0")):
            groups = [group for group in groups_of(key) if (group / "devices.allow").exists()]
            if not groups:  # version 2 alone: the innermost group has the rules
                groups = [max((found for group in groups_of(key) for found in (group, *group.rglob("*/"))), key=depth)]
            # Even with a device file at hand, which none can make, the other's card is refused.
            assert tried_within(groups, node.cards / other) == errno.EPERM
            assert tried_within(groups, node.cards / own) != errno.EPERM
        # There are no more.
        third = await start(rt, node.launch("t.3"))
        assert isinstance(third, Exit)
        assert (third.reason, third.message) == (
            Reason.NODE_UNFIT,
            "1 of gpu wanted, and none is free: others have not been given back yet",
        )
        # Who asked for none has none.
        assert await start(rt, node.launch("none.1", gpus=0)) is None
        assert await lines(rt, "none.1", 2) == [" ", "*"]
        await finish(rt, "t.1")
        assert await start(rt, node.launch("t.4")) is None
        assert await lines(rt, "t.4", 2) == ["0 0", "card0"]
        for key in ("t.2", "t.4", "none.1"):
            await finish(rt, key)
        assert node.book == set()


@asynchronous
async def test_what_is_just_being_given_back_is_waited_for(node: Node) -> None:
    async with node.daemon(wait_s=LIMIT_S) as rt, asyncio.TaskGroup() as group:
        for key in ("t.1", "t.2"):
            assert await start(rt, node.launch(key, contained=False)) is None
        waits = [group.create_task(start(rt, node.launch(f"w.{n}", contained=False))) for n in range(2)]
        await finish(rt, "t.2")
        done, others = await asyncio.wait(waits, timeout=LIMIT_S, return_when=asyncio.FIRST_COMPLETED)
        assert [task.result() for task in done] == [None]
        assert len(others) == 1
        assert len(node.book) == 2
        await finish(rt, "t.1")
        assert await others.pop() is None
        assert [rt.labels(f"w.{n}") for n in range(2)] == [(("gpu", ("1",)),), (("gpu", ("0",)),)]
        for n in range(2):
            await finish(rt, f"w.{n}")


@asynchronous
async def test_a_card_that_is_gone_is_given_to_nobody(node: Node) -> None:
    (node.cards / "card0").unlink()
    async with node.daemon(wait_s=LIMIT_S) as rt:
        assert await start(rt, node.launch("t.1", gpus=1)) is None
        assert rt.labels("t.1") == (("gpu", ("1",)),)
        assert await lines(rt, "t.1", 2) == ["1 0", "card1"]
        async with asyncio.timeout(LIMIT_S / 2):  # not waited for: nobody could give it back
            ended = await start(rt, node.launch("t.2", gpus=2))
        assert isinstance(ended, Exit)
        gone = f"2 of gpu wanted, and none is free: {node.cards}/card0 of 0 is not there"
        assert (ended.reason, ended.message, ended.lacks) == (Reason.NODE_UNFIT, gone, "gpu")
        await finish(rt, "t.1")


@asynchronous
async def test_one_that_wants_both_has_both(node: Node) -> None:
    async with node.daemon() as rt:
        assert await start(rt, node.launch("t.1", gpus=2)) is None
        assert await lines(rt, "t.1", 3) == ["0,1 0,1", "card0", "card1"]
        await finish(rt, "t.1")


@asynchronous
async def test_processes_are_told(node: Node) -> None:
    async with node.daemon() as rt:
        asks = {"CUDA_VISIBLE_DEVICES": "0,1", "PATH": "/usr/bin:/bin"}  # what it says itself does not count
        for key in ("t.1", "t.2"):
            assert await start(rt, node.launch(key, contained=False, env=asks)) is None
        assert (await lines(rt, "t.1", 1))[0] == "0 0"
        assert (await lines(rt, "t.2", 1))[0] == "1 1"
        assert await start(rt, node.launch("none.1", contained=False, gpus=0, env=asks)) is None
        assert (await lines(rt, "none.1", 1))[0] == " "
        for key in ("t.1", "t.2", "none.1"):
            await finish(rt, key)


@asynchronous
async def test_they_outlive_the_daemon(node: Node) -> None:
    async with node.daemon() as rt:
        assert await start(rt, node.launch("t.1", contained=False)) is None
        # Another was given one and never started: the daemon died in between.
        assert not isinstance(await rt.prepare(node.launch("t.2", contained=False)), Exit)
    (node.state_dir.parent / "units" / "t.9.new").write_text("{")  # it died while it wrote
    async with node.daemon() as rt:
        assert (rt.labels("t.1"), rt.labels("t.2")) == ((("gpu", ("0",)),), (("gpu", ("1",)),))
        assert [h.key for h in await rt.held()] == ["t.1"]
        assert node.book == {"t.1"}  # nobody holds the other
        assert await start(rt, node.launch("t.3", contained=False)) is None
        assert (await lines(rt, "t.3", 1))[0] == "1 1"
        # Asked for again it has what it has.
        assert await start(rt, node.launch("t.1", contained=False)) is None
        assert rt.labels("t.1") == (("gpu", ("0",)),)
        for key in ("t.1", "t.3"):
            await finish(rt, key)
        assert node.book == set()


@asynchronous
async def test_a_record_that_cannot_be_read_gives_nothing_away(node: Node) -> None:
    async with node.daemon() as rt:
        assert await start(rt, node.launch("t.1", contained=False)) is None
    (node.state_dir.parent / "units" / "t.1").write_text("[")
    async with node.daemon() as rt:
        await rt.held()
        short = await start(rt, node.launch("t.2", contained=False))
        assert isinstance(short, Exit)
        assert short.reason is Reason.NODE_UNFIT
        await finish(rt, "t.1")
        assert await start(rt, node.launch("t.2", contained=False)) is None
        await finish(rt, "t.2")


@asynchronous
async def test_what_became_of_a_start_nobody_knows(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    async with node.daemon() as rt:

        async def lost(_: Launch) -> Exit | None:
            raise RuntimeUnavailable("no answer")

        with monkeypatch.context() as patched:
            patched.setattr(rt._inner, "start", lost)
            with pytest.raises(RuntimeUnavailable):
                await start(rt, node.launch("t.1", contained=False))
        await rt.held()
        assert node.book == {"t.1"}  # it may be on its way still
        await rt.held()
        assert node.book == set()
        # One that is being prepared is in no listing, however often one is made.
        assert not isinstance(await rt.prepare(node.launch("t.2", contained=False)), Exit)
        for _ in range(3):
            await rt.held()
        assert node.book == {"t.2"}
        await rt.forget("t.2")
        assert node.book == set()


def test_a_card_that_cannot_be_used_is_told_of(cards: Path) -> None:
    of = read(parse_devices({"gpu": [*(f"{label}:{cards}/card{label}" for label in ("0", "1", "2")), f"{cards}/all"]}))
    (cards / "card1").chmod(0o660)
    missing = [
        f"the device {cards}/card2 of gpu 2: No such file or directory: no task is given this unit",
        f"the device {cards}/all of gpu: No such file or directory: what is given it cannot start in a container",
    ]
    assert list(device_troubles(of, contained=False)) == missing
    assert list(device_troubles(of, contained=True)) == [
        f"the device {cards}/card1 of gpu 1 is not open to everybody (chmod 666, or a rule for udev): containers that "
        "are given it cannot open it",
        *missing,
    ]
