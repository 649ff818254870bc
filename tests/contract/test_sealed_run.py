"""A sealed task with secrets, from the store to its process: real etcd, real shim, the driver of a node in between."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from spinetta.access import MEMBERS
from spinetta.agent import Agent
from spinetta.events import Start, Started, attempt_key
from spinetta.model import IncarnationId, Reason, Revision, TaskId, TaskSpec
from spinetta.node import vault as vaults
from spinetta.node.driver import Driver
from spinetta.node.launching import LaunchSettings
from spinetta.node.vault import Vault
from spinetta.runtime.process import ProcessRuntime
from spinetta.runtime.shim import proctable
from tests.builders import settings
from tests.contract.api_world import Etcd, etcd, etcd_member, new_id, run
from tests.contract.sealed_world import Sealed, sealed_world
from tests.contract.shims import end_of, files_below, runtime, state_dir

pytestmark = pytest.mark.contract
_ = (etcd, etcd_member, state_dir)  # fixtures

MARK = "patient-4711"
PASSWORD = "correct-horse-battery-staple"  # noqa: S105


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vaults, "WAIT_S", 0.2)


def driver(world: Sealed, rt: ProcessRuntime, vault: Vault | None) -> Driver:
    launch = LaunchSettings("n1", 64, "127.0.0.1:1")
    return Driver(Agent(settings("n1")), world.store, rt, launch, remember=lambda _: None, vault=vault)


async def started(d: Driver, spec: TaskSpec, attempt: int = 1) -> Started:
    """What the agent is told of a start."""
    await d._start(Start(spec, attempt, Revision(5), IncarnationId("i"), 600.0))
    event = d._inbox.get_nowait()
    assert isinstance(event, Started)
    return event


def task(*script: str, **fields: object) -> TaskSpec:
    made = TaskSpec(TaskId(new_id()), ("/bin/sh", "-c", *script), owner="ann", clearance=("phi",))
    return replace(made, **fields)  # type: ignore[arg-type]


def shown_by_strings(folder: Path) -> bytes:
    found = b""
    for path in files_below(folder):
        if "logs" not in path.parts:
            out = subprocess.run(["strings", "-a", str(path)], capture_output=True, check=False)
            assert out.returncode == 0 or not path.exists()  # some go meanwhile
            found += out.stdout
    return found


def environments(needle: str) -> list[int]:
    """Processes in whose environment or arguments the text is."""
    found = []
    for process in proctable.read_all():
        for part in ("environ", "cmdline"):
            with contextlib.suppress(OSError):
                if needle.encode() in Path(f"/proc/{process.pid}/{part}").read_bytes():
                    found.append(process.pid)
    return sorted(set(found) - {os.getpid()})


def test_from_the_store_to_the_process(etcd: Etcd, state_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)

    async def story() -> None:
        async with sealed_world(etcd) as world, runtime(state_dir) as rt:
            await world.join("n1", "phi")
            await world.settle()
            await world.put_secret("ann", "db", PASSWORD.encode(), "phi")
            script = f'echo "$WHO"; pwd; cat "$SPINETTA_SECRETS/pgpass"; : {MARK}; read x < "$FIFO"'
            fifo = state_dir.parent / "fifo"
            os.mkfifo(fifo)
            spec = task(
                script,
                name=MARK,
                env=(("FIFO", str(fifo)), ("WHO", f"who-{MARK}")),
                working_directory="/tmp",
                secrets=(("db", "pgpass"),),
            )
            sealed = await world.submit(spec)
            d = driver(world, rt, world.parties["n1"].vault)
            event = await started(d, sealed)
            assert event.exit is None, event
            key = attempt_key(spec.id, 1)
            log = rt.log_path(key, "stdout")
            while PASSWORD not in (log.read_text() if log.exists() else ""):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            assert log.read_text().splitlines() == [f"who-{MARK}", "/tmp", PASSWORD]
            # The process has its arguments; the secret is in nobody's.
            assert environments(PASSWORD) == []
            assert len(environments(f"who-{MARK}")) == 1
            seen = await asyncio.to_thread(shown_by_strings, state_dir)
            assert MARK.encode() not in seen
            assert PASSWORD.encode() not in seen
            await asyncio.to_thread(fifo.write_text, "\n")
            end = await end_of(rt, key)
            assert (end.reason, end.exit_code, end.message) == (Reason.EXIT, 0, "")
            seen = await asyncio.to_thread(shown_by_strings, state_dir)
            assert PASSWORD.encode() not in seen
            assert MARK.encode() not in seen

    run(story())
    assert MARK not in caplog.text
    assert PASSWORD not in caplog.text


def test_what_cannot_be_started_is_told_without_its_words(
    etcd: Etcd, state_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)

    async def story() -> None:
        async with sealed_world(etcd) as world, runtime(state_dir) as rt:
            await world.join("n1", "phi")
            await world.join("n2")
            await world.settle()
            vault = world.parties["n1"].vault
            d = driver(world, rt, vault)
            for n, (spec, words) in enumerate(
                [
                    (task("x", command=(f"/no/{MARK}",)), "program not found: (sealed)"),
                    (task("x", working_directory=f"/no/{MARK}"), "working directory missing: (sealed)"),
                    (task("x", working_directory=MARK), "its working_directory is unlawful"),
                    (task("x", env=((f"{MARK}=", "x"),)), "its env is unlawful"),
                    (task("x", secrets=(("none", "none"),)), "there is no secret none of ann"),
                ]
            ):
                sealed = await world.sealed(spec)
                event = await started(d, sealed, n + 1)
                end = event.exit
                if end is None:
                    end = await end_of(rt, attempt_key(spec.id, n + 1))
                assert not isinstance(end, type(None))
                assert words in getattr(end, "message", ""), end
                assert getattr(end, "reason", "") is Reason.SPAWN_FAILED
                assert MARK not in repr(end)
            # Not the task's fault: another node may run it.
            sealed = await world.sealed(task(f": {MARK}"))
            for other in (world.parties["n2"].vault, None):
                end = (await started(driver(world, rt, other), sealed)).exit
                assert getattr(end, "reason", "") is Reason.NODE_UNFIT
            # In an open cluster tasks ask for secrets in vain.
            plain = replace(task("true"), clearance=(), secrets=(("db", "db"),))
            end = (await started(driver(world, rt, None), plain)).exit
            assert getattr(end, "reason", "") is Reason.NODE_UNFIT
            assert await rt.held() or True

    run(story())
    assert MARK not in caplog.text


def test_an_unlabelled_task_is_started_as_ever(etcd: Etcd, state_dir: Path) -> None:
    async def story() -> None:
        async with sealed_world(etcd) as world, runtime(state_dir) as rt:
            await world.join("n1")
            await world.settle()
            await world.put_secret("ann", "db", PASSWORD.encode(), MEMBERS)
            for vault in (world.parties["n1"].vault, None):
                spec = replace(task('echo "${SPINETTA_SECRETS-none}"'), clearance=())
                assert (await started(driver(world, rt, vault), spec)).exit is None
                await end_of(rt, attempt_key(spec.id, 1))
                assert rt.log_path(attempt_key(spec.id, 1), "stdout").read_text() == "none\n"
            spec = replace(task('cat "$SPINETTA_SECRETS/db"'), clearance=(), secrets=(("db", "db"),))
            assert (await started(driver(world, rt, world.parties["n1"].vault), spec)).exit is None
            await end_of(rt, attempt_key(spec.id, 1))
            assert rt.log_path(attempt_key(spec.id, 1), "stdout").read_text() == PASSWORD

    run(story())
