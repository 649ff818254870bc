"""What a task can reach on the node that runs it. Tasks are plain processes under the node's own user: a great deal."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import pytest

from spinetta.node import founding
from tests.contract.shims import asynchronous, identity, ran, runtime, shell, state_dir, until

_ = state_dir  # a fixture

SAME_USER = "tasks run under the user of their node, without a container: they can do what the node can"


@pytest.mark.xfail(strict=True, reason=SAME_USER)
@asynchronous
async def test_a_task_does_not_read_the_keys_of_its_node(state_dir: Path, tmp_path: Path) -> None:
    credentials = await founding.found_cluster(tmp_path / "trust", "n1", "127.0.0.1:7220")
    assert credentials.node_key_pem
    folder = shlex.quote(str(tmp_path / "trust"))
    async with runtime(state_dir) as rt:
        end = await ran(rt, shell("t.1", f"find -L {folder} -name '*.key' | xargs cat > /dev/null"))
        keys = await ran(rt, shell("t.2", f"test -z \"$(find -L {folder} -name '*.key' -readable)\""))
        assert end.exit_code or keys.exit_code == 0


@pytest.mark.xfail(strict=True, reason=SAME_USER)
@asynchronous
async def test_a_task_does_not_reach_the_shim(state_dir: Path) -> None:
    where = shlex.quote(str(state_dir / "shim.sock"))
    async with runtime(state_dir) as rt:
        assert (await ran(rt, shell("t.1", f"test -w {where}"))).exit_code == 1


@asynchronous
async def test_a_task_is_given_nothing_of_the_daemons_environment_and_files(state_dir: Path) -> None:
    os.environ["SPINETTA_TOKEN"] = "worker-token-of-the-daemon"  # noqa: S105 - none
    try:
        async with runtime(state_dir) as rt:
            end = await ran(rt, shell("t.1", "env; ls -l /proc/self/fd | grep -c socket:"))
            await until(lambda: rt.log_path("t.1", "stdout").read_text())
            said = rt.log_path("t.1", "stdout").read_text()
            assert "worker-token" not in said
            assert said.splitlines()[-1] == "0", said
            assert end.exit_code == 1  # of grep, which found none
            assert identity(state_dir)["pid"]
    finally:
        del os.environ["SPINETTA_TOKEN"]
