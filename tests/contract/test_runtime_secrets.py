"""Secrets as files: in memory, for one attempt, in nothing that is written, listed or told."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import socket
import subprocess
from pathlib import Path

import pytest

from spinetta.model import Reason
from spinetta.runtime.process import ProcessRuntime
from spinetta.runtime.shim import proctable
from tests.contract.shims import (
    asynchronous,
    boottime_s,
    files_below,
    files_with,
    identity,
    isolate,
    ran,
    runtime,
    shell,
    state_dir,
    until,
)

pytestmark = pytest.mark.contract
_ = (isolate, state_dir)  # fixtures

CONTENT = b"correct-horse-battery-staple"
SECRETS = (("token", CONTENT), ("key.pem", b"\0\xff" * 5000))


def names_in(folder: Path | str) -> list[str]:
    return sorted(os.listdir(folder))  # noqa: PTH208 - also by way of another's root


def shown_by_processes(needle: bytes) -> list[str]:
    """Command lines and environments of others that contain the bytes."""
    found = []
    for process in proctable.read_all():
        for part in ("cmdline", "environ"):
            path = Path(f"/proc/{process.pid}/{part}")
            with contextlib.suppress(OSError):
                if process.pid != os.getpid() and needle in path.read_bytes():
                    found.append(str(path))
    return found


def mounted_for(where: Path | str) -> list[int]:
    """Pids of processes in whose namespace something is mounted there."""
    found = []
    for process in proctable.read_all():
        with contextlib.suppress(OSError):
            if f" {where} " in Path(f"/proc/{process.pid}/mounts").read_text():
                found.append(process.pid)
    return found


@asynchronous
async def test_a_task_finds_its_secrets_in_memory(state_dir: Path, isolate: bool) -> None:
    async with runtime(state_dir, isolate=isolate) as rt:
        assert "secret-files" in rt.capabilities()
        script = """
            cd "$SPINETTA_SECRETS" && stat -f -c %T . && stat -c '%a %n' . token key.pem && ls -A | wc -l &&
            cat token && echo && sha256sum < key.pem && grep " $PWD " /proc/self/mounts
            echo x > more 2>/dev/null || echo closed
        """
        end = await ran(rt, shell("t.1", script, secrets=SECRETS))
        assert end.exit_code == 0, end
        lines = rt.log_path("t.1", "stdout").read_text().splitlines()
        assert lines[:5] == ["tmpfs", "700 .", "400 token", "400 key.pem", "2"]
        assert lines[5] == CONTENT.decode()
        assert lines[6].split()[0] == hashlib.sha256(SECRETS[1][1]).hexdigest()
        assert {"ro", "nosuid", "nodev", "noexec"} <= set(lines[7].split()[3].split(","))
        assert lines[8] == "closed"


@asynchronous
async def test_nobody_else_sees_them_and_nothing_is_left(state_dir: Path, isolate: bool) -> None:
    async with runtime(state_dir, isolate=isolate) as rt:
        fifo = state_dir / "go"
        os.mkfifo(fifo)
        attempt = shell("t.1", f"echo $SPINETTA_SECRETS; cat {fifo}", secrets=SECRETS)
        assert CONTENT.decode() not in repr(attempt)
        assert await rt.start(attempt) is None
        await until(lambda: rt.log_path("t.1", "stdout").read_text())
        where = Path(rt.log_path("t.1", "stdout").read_text().strip())
        # Neither here, nor in the shim's namespace, nor in that of another task.
        shim = identity(state_dir)["pid"]
        assert names_in(where) == names_in(f"/proc/{shim}/root{where}") == []
        inside = mounted_for(where)
        assert inside
        assert not {os.getpid(), shim} & set(inside)
        end = await ran(rt, shell("u.1", f"ls -A {where}; echo ${{SPINETTA_SECRETS-none}}"))
        assert (end.exit_code, rt.log_path("u.1", "stdout").read_text()) == (0, "none\n")
        # Not in any command line or environment, nor in what is on disk.
        assert shown_by_processes(CONTENT) == []
        assert files_with(state_dir / "attempts", CONTENT) == []
        await asyncio.to_thread(fifo.write_text, "")
        held = await rt.held()
        assert CONTENT.decode() not in repr(held)
        await until_ended(rt, "t.1")
        await rt.forget("t.1")
        fifo.unlink()
        assert files_with(state_dir, CONTENT) == []
        assert (mounted_for(where), names_in(state_dir / "secrets")) == ([], [])


async def until_ended(rt: ProcessRuntime, key: str) -> None:
    async with asyncio.timeout(20):
        while any(h.key == key and h.exit is None for h in await rt.held()):  # noqa: ASYNC110
            await asyncio.sleep(0.01)


@asynchronous
async def test_a_process_in_the_background_keeps_them_no_longer_than_the_attempt(
    state_dir: Path, isolate: bool
) -> None:
    async with runtime(state_dir, isolate=isolate) as rt:
        end = await ran(rt, shell("t.1", "setsid sleep 1000 & echo up", secrets=SECRETS))
        assert end.exit_code == 0
        assert mounted_for(state_dir / "secrets") == []  # the namespace has gone with its last process


@asynchronous
async def test_a_new_daemon_starts_nothing_again(state_dir: Path) -> None:
    async with runtime(state_dir) as rt:
        assert await rt.start(shell("t.1", 'sleep 0.2; cat "$SPINETTA_SECRETS/token"', secrets=SECRETS)) is None
    async with runtime(state_dir) as rt:
        again = await rt.start(shell("t.1", "exit 9", secrets=(("token", b"another"),)))
        assert again is None or again.exit_code == 0
        await until_ended(rt, "t.1")
        assert rt.log_path("t.1", "stdout").read_bytes() == CONTENT


@asynchronous
async def test_what_cannot_be_started_tells_nothing(state_dir: Path) -> None:
    async with runtime(state_dir) as rt:
        end = await ran(rt, shell("t.1", "", working_directory="/no/such/patient", private=True))
        assert (end.reason, end.message) == (Reason.SPAWN_FAILED, "working directory missing: (sealed)")
        end = await ran(rt, shell("t.2", "true", working_directory="patient", private=True))
        assert end.reason is Reason.SPAWN_FAILED
        assert "patient" not in end.message


@pytest.mark.parametrize(
    "secrets",
    [
        {"../up": "eA=="},
        {".hidden": "eA=="},
        {"": "eA=="},
        {"x": "no base64!"},
        {"x": "é"},
        {"x": 1},
        ["x"],
        {f"f{i}": "" for i in range(33)},
        {"x": "A" * (88 << 10)},
    ],
    ids=lambda s: str(s)[:20],
)
@asynchronous
async def test_the_shim_refuses_what_it_should(state_dir: Path, secrets: object) -> None:
    async with runtime(state_dir) as rt:
        await rt.renew(boottime_s())

        def ask() -> str:
            with socket.socket(socket.AF_UNIX) as sock:
                sock.connect(str(state_dir / "shim.sock"))
                with sock.makefile("rw") as lines:
                    lines.write('{"id":1,"op":"hello","version":1}\n')
                    lines.flush()
                    lines.readline()
                    start = {"id": 2, "op": "start", "key": "x.1", "argv": ["true"], "env": {}, "grace_s": 60}
                    lines.write(json.dumps({**start, "secrets": secrets}) + "\n")
                    lines.flush()
                    return lines.readline()

        said = json.loads(await asyncio.to_thread(ask))
        assert said["error"] in ("bad-request", "bad-message")
        assert "eA==" not in said["message"]
        assert "no base64!" not in said["message"]
        assert await rt.held() == []


@asynchronous
async def test_strings_finds_nothing_in_the_state_directory(state_dir: Path) -> None:
    async with runtime(state_dir) as rt:
        await ran(rt, shell("t.1", 'wc -c < "$SPINETTA_SECRETS/token"', secrets=SECRETS))
        await until(lambda: not list((state_dir / "attempts").glob(".*")))  # the end has its place
        for path in files_below(state_dir):
            out = await asyncio.to_thread(
                subprocess.run, ["strings", "-a", "-n", "6", str(path)], capture_output=True, check=False
            )
            assert out.returncode == 0 or not path.exists()  # what was in its scratch directory goes meanwhile
            assert CONTENT not in out.stdout, path
