"""A container whose command runs while its runtime, which has made it, has not ended yet; with the real runc."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from spinetta.model import Reason
from spinetta.runtime.process import ProcessRuntime
from spinetta.runtime.shim.container import PURE_V2
from tests.contract.containers import PROGRAM, RUNC, gone, rootfs, script, standing_in
from tests.contract.shims import (
    asynchronous,
    end_of,
    identity,
    isolate,
    living,
    ran,
    runtime,
    state_dir,
    until,
)

pytestmark = pytest.mark.contract
_ = (isolate, rootfs, state_dir)  # fixtures


def needs_overlap(rt: ProcessRuntime) -> None:
    """With version 2 alone the runtime is in the attempt's group, and nothing begins before it is out of it."""
    if PURE_V2 in rt.capabilities() or PROGRAM != RUNC:
        pytest.skip("the command waits for its runtime here")


def lingering(folder: Path, gate: Path, then: str = "exit 0") -> str:
    """A runtime that waits at a gate when it has made the container."""
    return standing_in(folder, f'if [ $command = create ]; then {PROGRAM} "$@" || exit 1; cat {gate} >&2; {then}; fi')


@asynchronous
@pytest.mark.parametrize("then", ["exit 0", "kill -9 $$"])
async def test_the_command_runs_while_its_runtime_ends(
    state_dir: Path, rootfs: Path, tmp_path: Path, isolate: bool, then: str
) -> None:
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    async with runtime(state_dir, isolate=isolate) as rt:
        needs_overlap(rt)
        program = lingering(tmp_path, gate, then)
        assert await rt.start(script(state_dir, rootfs, "m.1", "echo here; exit 4", program=program)) is None
        await until(lambda: (state_dir / "logs/m.1/stdout").read_text() == "here\n")
        assert living(str(gate))
        # Its first process is the runtime's child until then: nobody else learns of its end.
        assert [held.exit for held in await rt.held()] == [None]
        await asyncio.to_thread(gate.write_text, "")
        ended = await end_of(rt, "m.1")
        assert (ended.reason, ended.exit_code) == (Reason.EXIT, 4), ended.message
        await gone(state_dir, "m.1")


@asynchronous
async def test_a_command_whose_runtime_does_not_end_is_stopped(
    state_dir: Path, rootfs: Path, tmp_path: Path, isolate: bool
) -> None:
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    async with runtime(state_dir, isolate=isolate) as rt:
        needs_overlap(rt)
        text = "trap 'echo asked; exit 5' TERM; echo here; while :; do sleep 0.02; done"
        attempt = script(state_dir, rootfs, "m.2", text, program=lingering(tmp_path, gate), stop_wait_s=1.0)
        assert await rt.start(attempt) is None
        log = state_dir / "logs/m.2/stdout"
        await until(lambda: log.read_text() == "here\n")
        await rt.stop("m.2", Reason.CANCELLED)
        ended = await end_of(rt, "m.2")
        assert (ended.reason, ended.exit_code) == (Reason.CANCELLED, 5), ended.message
        assert log.read_text() == "here\nasked\n"
        await until(lambda: not living(str(gate)))
        await gone(state_dir, "m.2")


@asynchronous
async def test_a_shim_that_dies_while_the_runtime_ends_takes_both_along(
    state_dir: Path, rootfs: Path, tmp_path: Path, isolate: bool
) -> None:
    gate, marker = tmp_path / "gate", f"marker-{os.urandom(8).hex()}"
    os.mkfifo(gate)
    async with runtime(state_dir, isolate=isolate) as rt:
        needs_overlap(rt)
        text = f"sleep 1000 # {marker}"
        assert await rt.start(script(state_dir, rootfs, "m.3", text, program=lingering(tmp_path, gate))) is None
        await until(lambda: living(str(gate)) and living(marker))
        os.kill(rt.shim_pid(), signal.SIGKILL)
    async with runtime(state_dir, isolate=isolate) as rt:
        assert (await end_of(rt, "m.3")).reason is Reason.SHIM_LOST
        await until(lambda: not living(str(gate)) and not living(marker))
        await gone(state_dir, "m.3")


@asynchronous
async def test_limits_that_cannot_be_set_end_a_container_that_is_being_made(state_dir: Path, rootfs: Path) -> None:
    async with runtime(state_dir) as rt:
        folder = next(path for path in map(Path, identity(state_dir)["cgroups"]) if (path / "pids.max").exists())
        folder.rmdir()
        ended = await ran(rt, script(state_dir, rootfs, "m.4", "touch ran", pids_max=64))
        assert ended.reason is Reason.NODE_UNFIT
        assert "cannot set the limits" in ended.message
        assert not (state_dir / "scratch/m.4/work/ran").exists()
        await gone(state_dir, "m.4")
