"""What a task can reach on the node that runs it. A plain process: all that its user may. A container: nothing."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import pytest

from spinetta.config import Settings
from spinetta.container import ContainerSpec
from spinetta.model import Exit
from spinetta.node import founding
from spinetta.node.containers import open_containers
from tests.contract.containers import make_rootfs
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
async def test_a_task_in_a_container_reaches_neither_keys_nor_shim_nor_anything_of_the_node(
    state_dir: Path, tmp_path: Path
) -> None:
    """The same, and by every path that there is: as they are on the node, and through its own processes."""
    data_dir = state_dir.parent
    data_dir.chmod(0o755)
    await founding.found_cluster(data_dir / "trust", "n1", "127.0.0.1:7220")
    image = make_rootfs(tmp_path / "image", 0)
    settings = Settings(name="n1", address="127.0.0.1:1", data_dir=str(data_dir), allow=(f"image:{image}",))
    places = " ".join(shlex.quote(str(p)) for p in (data_dir, data_dir / "trust", state_dir, state_dir / "shim.sock"))
    script = f"""
        for place in {places}; do test -e $place && echo "$place is there"; done
        for pid in $(ls /proc | grep '[0-9]'); do
            for place in {places}; do test -e /proc/$pid/root$place && echo "$place through $pid"; done
        done
        grep -E 'spinetta|shim' /proc/net/unix
        ls /proc | grep -c '^[0-9]'
    """
    async with runtime(state_dir) as rt, open_containers(settings, data_dir, rt) as here:
        wanted = shell("t.1", script, env={}, wants=ContainerSpec(f"rootfs:{image}"))
        ready = await here.runtime.prepare(wanted)
        assert not isinstance(ready, Exit), ready
        end = await ran(rt, ready)
        said = rt.log_path("t.1", "stdout").read_text()
        assert end.exit_code == 0, (end, said)
        assert int(said) <= 5, said  # its init, itself, and what it has just started


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
