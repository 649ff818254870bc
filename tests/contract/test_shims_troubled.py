"""The shim's own upgrade when something is in the way: shims that are silent or too old, daemons that are killed."""

from __future__ import annotations

import asyncio
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from spinetta.errors import RuntimeUnavailable
from spinetta.model import Reason
from spinetta.runtime import generations
from tests.contract.oldshims import (
    begin,
    copy_of_the_code,
    ends,
    go,
    home,
    installed,
    one_is_left,
    one_shim,
    other,
    second,
    shims,
)
from tests.contract.shims import asynchronous, kill_shim, shell

pytestmark = pytest.mark.contract
_ = (home, other)  # fixtures
LIMITS_SAID = ('["process", *LIMITS, OPEN_FILES_LIMIT, ', '["process", ')


async def unanswered(*_: str) -> None:
    raise RuntimeUnavailable("the shim does not answer")


@asynchronous
async def test_one_that_does_not_say_what_it_holds_is_not_taken_for_one_with_nothing(other: Path, home: Path) -> None:
    earlier = await begin(other, home, "old.1")
    async with shims(home) as rt:
        os.kill(earlier, signal.SIGSTOP)
        try:
            with pytest.raises(TimeoutError):  # before its own limit, after which it is RuntimeUnavailable
                await asyncio.wait_for(rt.held(), 1.0)
        finally:
            os.kill(earlier, signal.SIGCONT)
        assert [one.key for one in await rt.held()] == ["old.1"]
        (retiring,) = rt._retiring
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(retiring.runtime, "service", unanswered)
            with pytest.raises(RuntimeUnavailable):  # etcd may run there
                await rt.start_service("etcd", ["/bin/true"], {}, "/", home / "log")
            with pytest.raises(RuntimeUnavailable):
                await rt.service("etcd")
            patch.setattr(retiring.runtime, "held", unanswered)
            with pytest.raises(RuntimeUnavailable):
                await rt.held()


@asynchronous
async def test_one_that_dies_while_a_daemon_begins_is_cleared_up_by_that_daemon(home: Path, tmp_path: Path) -> None:
    """It has answered, and dies at the next question: another comes up in its place, and the daemon begins."""
    code = copy_of_the_code(tmp_path / "code" / "shim")
    held = "    def _held(self, connection: Connection, message: Message) -> None:\n"
    text = (code / "server.py").read_text()
    assert text.count(held) == 1
    (code / "server.py").write_text(text.replace(held, f"{held}        os._exit(1)\n"))
    await begin(code, home, "old.1")
    async with shims(home) as rt:
        assert (await ends(rt, "old.1"))["old.1"][-1].exit.reason is Reason.SHIM_LOST
        assert await rt.start(shell("new.1", "true")) is None


@asynchronous
async def test_limits_that_a_shim_does_not_know_are_told(home: Path, tmp_path: Path) -> None:
    """Of one from before there were any: what asks for none is no trouble."""
    code = copy_of_the_code(tmp_path / "code" / "shim", says_its_code=False)
    for name, change in (("wire.py", ("PROTOCOL_VERSION = 2", "PROTOCOL_VERSION = 1")), ("main.py", LIMITS_SAID)):
        text = (code / name).read_text()
        assert text.count(change[0]) == 1, change
        (code / name).write_text(text.replace(*change))
    await begin(code, home, "old.1")
    async with one_shim(home) as rt:
        plain = rt.warnings()
        assert await rt.start(shell("new.1", "true")) is None
        assert rt.warnings() == plain
        assert await rt.start(shell("new.2", "true", log_bytes_max=1, disk_bytes_max=1, open_files=(9, 9))) is None
        told = " ".join(rt.warnings()[len(plain) :])
        for limit in ("log-limit", "disk-limit", "open-files-limit"):
            assert f"{limit} is missing: this node's shim is of an older version" in told
    await begin(copy_of_the_code(tmp_path / "two" / "shim", says_its_code=False), home)
    async with shims(home) as upgraded:
        assert await upgraded.start(shell("new.3", "true", log_bytes_max=1, disk_bytes_max=1)) is None
        assert "log-limit" not in " ".join(upgraded.warnings())


@asynchronous
async def test_a_service_alone_is_not_ended_for_an_upgrade(other: Path, home: Path, tmp_path: Path) -> None:
    """A voter's restart is for the cluster to allow."""
    with installed(other):
        async with one_shim(home) as rt:
            first = await rt.start_service("etcd", ["/bin/sleep", "1000"], {}, str(tmp_path), tmp_path / "log")
    async with shims(home) as found:
        assert len(found.described()) == 2
        assert found.strands("etcd")
        assert await found.service("etcd") == first


@pytest.mark.parametrize("left", ["shim.sock", "attempts/t.1", "lock", ""])
def test_what_shows_that_a_directory_is_not_free(home: Path, left: str) -> None:
    """Each alone; one with nothing is removed."""
    folder = second(home)
    (folder / "attempts").mkdir(parents=True)
    (folder / "shim.lock").touch()
    with (folder / "shim.lock").open() as lock:
        if left == "lock":  # of a shim that is just starting, or of the process that writes for one that died
            fcntl.flock(lock, fcntl.LOCK_EX)
        elif left:
            (folder / left).touch()
        assert generations.occupied(home) == ([folder] if left else [])
        assert folder.exists() == bool(left)


DAEMON = """
import asyncio, sys
from pathlib import Path
from spinetta.runtime.shims import Shims

async def main():
    async with Shims.connect(Path(sys.argv[1]), node="n1", kill_margin_s=1.0):
        print("up", flush=True)
        await asyncio.sleep(1000)

asyncio.run(main())
"""


@asynchronous
async def test_a_daemon_that_is_killed_in_the_midst(other: Path, home: Path) -> None:
    """At any moment of it: the next one finds what there is, and nothing twice."""
    await begin(other, home, "old.1")
    for n in range(6):
        daemon = subprocess.Popen([sys.executable, "-c", DAEMON, str(home)], stdout=subprocess.PIPE)  # noqa: ASYNC220
        try:
            if n:
                await asyncio.sleep(0.25 + 0.12 * n)  # of some 1 s; not to wait for anything, but to strike anywhere
            else:
                assert daemon.stdout is not None
                await asyncio.to_thread(daemon.stdout.readline)
        finally:
            daemon.kill()
            daemon.communicate()
        if n % 2:
            kill_shim(second(home))
    async with shims(home) as rt:
        assert [one.key for one in await rt.held()] == ["old.1"]
        assert sorted(shim.retiring for shim in rt.described()) == [False, True]
        assert rt.state_dir == second(home)
        assert await rt.start(shell("new.1", "exit 4")) is None
        go(home, "old.1")
        told = await ends(rt, "old.1", "new.1")
        assert {key: one[-1].exit.exit_code for key, one in told.items()} == {"old.1": 0, "new.1": 4}
        await rt.forget("old.1")
        await one_is_left(rt)
