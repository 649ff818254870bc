"""The runtime of a user without rights: no pid namespace, no cgroups. Less is promised, and that is said."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import spinetta
from tests.contract.shims import clean_up

pytestmark = pytest.mark.contract

SCRIPT = """
import asyncio, os, signal, sys, time
from pathlib import Path

home = Path(sys.argv[1])
os.setgid(65534); os.setgroups([]); os.setuid(65534)
os.chdir(home)

from spinetta.model import Reason
from spinetta.runtime.execs import open_command
from spinetta.runtime.process import ProcessRuntime
from spinetta.runtime.protocol import Exited, Launch
from spinetta.runtime.shim import proctable


def shell(key, script, **changes):
    fields = dict(env={"PATH": "/usr/bin:/bin"}, working_directory="", cpu_millis=500, memory_bytes=1 << 26, pids_max=9)
    fields |= dict(walltime_s=0.0, grace_s=600.0, token=7, incarnation="i1", stop_wait_s=0.2)
    return Launch(key=key, argv=["/bin/sh", "-c", script], **(fields | changes))


def living(marker):
    found = []
    for process in proctable.read_all():
        try:
            line = Path(f"/proc/{process.pid}/cmdline").read_bytes()
        except OSError:
            continue
        if marker.encode() in line and process.state not in "ZX" and process.pid != os.getpid():
            found.append(process.pid)
    return found


async def end_of(rt, key):
    async for event in rt.events():
        if isinstance(event, Exited) and event.key == key:
            return event.exit


async def until(condition):
    while not condition():
        await asyncio.sleep(0.01)


async def main():
    async with asyncio.timeout(60), ProcessRuntime.connect(home / "state", node="n1", kill_margin_s=1.0) as rt:
        await rt.renew(time.clock_gettime(time.CLOCK_BOOTTIME))
        limits = ("log-limit", "disk-limit", "open-files-limit")
        assert rt.capabilities() == ("process", *limits, "secret-files"), rt.capabilities()
        said = "\\n".join(rt.warnings())
        for word in ("pid-namespace", "memory-limit", "cpu-limit", "pids-limit", "cgroup-kill", "outlive", "kill late"):
            assert word in said, (word, said)
        assert said.count("Permission denied") <= 10, said  # one reason for all of them is told once

        await rt.start(shell("plain.1", "i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done; exit 3"))
        ended = await end_of(rt, "plain.1")
        assert (ended.reason, ended.exit_code) == (Reason.EXIT, 3)
        # Counted by the kernel for a process and those that it waited for.
        assert 0 < ended.usage.cpu_user_s + ended.usage.cpu_system_s < 5
        assert ended.usage.memory_peak_bytes > 0

        # No mount of its own: a folder in shared memory, for us alone, and gone with the attempt.
        script = 'cd "$SPINETTA_SECRETS" && pwd && stat -f -c %T . && stat -c %a:%u . token && cat token; echo >x'
        await rt.start(shell("secret.1", script, secrets=(("token", b"battery-staple"),)))
        await end_of(rt, "secret.1")
        said = rt.log_path("secret.1", "stdout").read_text().splitlines()
        assert said[1:] == ["tmpfs", "500:65534", "400:65534", "battery-staple"], said
        where = Path(said[0])
        assert where.parent.stat().st_mode & 0o777 == 0o700
        assert not where.exists() and list(where.parent.iterdir()) == []
        # What a task does there of its own is moved by nobody, but what we gave it goes.
        await rt.start(shell("secret.2", script.replace("echo", "chmod 700 .; echo"), secrets=(("token", b"again"),)))
        await end_of(rt, "secret.2")
        assert [p.name for p in (where.parent / "secret.2").iterdir()] == ["x"]

        # A command beside an attempt: found by its pid where there is no group, and no hindrance to its attempt's end.
        for n, ends in enumerate(("exec sleep 100", "read x < go; exit 3")):
            key, marker = f"beside.{n}", f"9{n}{os.getpid()}"
            await rt.start(shell(key, f"mkfifo go; {ends}", secrets=(("token", b"battery-staple"),)))
            fifo = home / "state/scratch" / key / "go"
            await until(fifo.exists)
            script = f"trap '' TERM HUP; cat $SPINETTA_SECRETS/token; setsid sleep {marker} & echo up; sleep {marker}"
            async with open_command(home / "state", key, ["sh", "-c", script]) as command:
                said = b""
                async for item in command.outputs():
                    said += item.data
                    if b"up" in said:
                        break
                assert b"battery-staple" in said, said
                await until(lambda: len(living(marker)) >= 2)
                if n:
                    await asyncio.to_thread(fifo.write_bytes, b"x")
                else:
                    await rt.stop(key, "cancelled")
                ended = await end_of(rt, key)
                assert (ended.reason, ended.exit_code) == ((Reason.EXIT, 3) if n else (Reason.CANCELLED, None)), ended
                await until(lambda: not living(marker))
        await rt.start(shell("beside.3", "exec sleep 100"))
        async with open_command(home / "state", "beside.3", ["sh", "-c", f"trap '' HUP; sleep 93{os.getpid()}; :"]):
            await until(lambda: living(f"93{os.getpid()}"))
        await until(lambda: not living(f"93{os.getpid()}"))
        await rt.stop("beside.3", "cancelled")
        await end_of(rt, "beside.3")

        # Detached twice over, and still found: it can be of no other.
        marker = "alpha-" + str(os.getpid())
        daemon = f"setsid sh -c '(setsid sh -c \\"echo up; sleep 1000; : {marker}\\" &)'; sleep 1000; : {marker}"
        await rt.start(shell("daemon.1", daemon))
        await until(lambda: "up" in rt.log_path("daemon.1", "stdout").read_text())
        await rt.stop("daemon.1", Reason.CANCELLED)
        assert (await end_of(rt, "daemon.1")).reason is Reason.CANCELLED
        assert living(marker) == []

        # With others running, its session and descendants are, and the others live on.
        await rt.start(shell("other.1", f"sleep 1000; : beta-{marker}"))
        await rt.start(shell("tree.1", f"trap '' TERM; setsid sh -c 'sleep 1000; : gamma-{marker}' & sleep 1000; wait"))
        await until(lambda: living("gamma-" + marker))
        await rt.stop("tree.1", Reason.CANCELLED)
        await end_of(rt, "tree.1")
        assert living("gamma-" + marker) == []
        assert living("beta-" + marker)

        # The shim is killed: main processes die by the kernel's doing, the rest of their session by the next shim's.
        await rt.start(shell("left.1", f"(trap '' TERM HUP; sleep 1000; : delta-{marker}) & sleep 1000; wait"))
        await until(lambda: living("delta-" + marker))
        events = rt.events()
        os.kill(rt.shim_pid(), signal.SIGKILL)
        lost = {}
        async for event in events:
            if isinstance(event, Exited) and event.exit.reason is Reason.SHIM_LOST:
                lost[event.key] = event.exit
                if len(lost) == 2:
                    break
        assert set(lost) == {"other.1", "left.1"}
        assert living("delta-" + marker) == []
        assert living("beta-" + marker) == []
        await rt.shutdown_shim()
    print("all is well")


asyncio.run(main())
"""


@pytest.fixture
def home() -> Iterator[Path]:
    """A directory that user nobody owns, with a copy of the package that it may read."""
    with tempfile.TemporaryDirectory(prefix="spinetta-nobody-") as folder:
        path = Path(folder)
        source = Path(spinetta.__file__).parent
        (path / "lib" / "spinetta").mkdir(parents=True)
        for module in source.glob("*.py"):
            shutil.copy(module, path / "lib" / "spinetta" / module.name)
        shutil.copytree(
            source / "runtime",
            path / "lib" / "spinetta" / "runtime",
            ignore=shutil.ignore_patterns("__pycache__"),  # others may be writing there
        )
        subprocess.run(["chown", "-R", "65534:65534", folder], check=True)
        subprocess.run(["chmod", "-R", "a+rX", folder], check=True)
        try:
            yield path
        finally:
            clean_up(path / "state")


def test_a_user_without_rights(home: Path) -> None:
    # Debian's own Python: that of a virtual environment may be in a place where another user has no access.
    done = subprocess.run(
        ["/usr/bin/python3", "-c", SCRIPT, str(home)],
        env={"PYTHONPATH": str(home / "lib"), "PYTHONDONTWRITEBYTECODE": "1", "PATH": "/usr/bin:/bin"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=90,
    )
    assert done.stdout == "all is well\n", done.stdout
